//! Programs run again and again, each time with another call of the driver failing: what goes wrong must come back
//! as an error, in time, with nothing left behind and nothing quietly wrong.

use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::Duration;

use kernels::cuda::{Device, DeviceError};

use super::control::{Control, How, Kind};

/// Far more than a program takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is made to fail.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which calls are counted.
    pub kind: Kind,
    /// The `CUresult` to return.
    pub result: u32,
    pub how: How,
}

/// Runs `program` on a newly opened device without a fault, then with `fault` at every `step`-th call. Opening the
/// device counts.
///
/// A program must return an error or, where the failed call only gave something back or asked for what is good to
/// know, what it returns without a fault. It must not panic or hang, must ask for everything to be given back, and must leave a device that a next
/// process could open.
pub fn for_every_call<T, P>(fault: Fault, step: u64, program: P)
where
    T: PartialEq + Debug + Send,
    P: Fn(&Device) -> Result<T, DeviceError> + Sync,
{
    let Some(mock) = super::control() else { return };
    let expected = once(&mock, &program).unwrap_or_else(|error| panic!("without a fault: {error}"));
    let calls = mock.calls(fault.kind);
    assert!(calls > 0, "the program makes no such calls: {fault:?}");
    let mut errors = 0;
    for n in (1..=calls).step_by(step as usize) {
        mock.reset();
        mock.fail(fault.kind, n, fault.result, fault.how);
        let result = once(&mock, &program);
        let place = format!("{fault:?} at call {n} of {calls}, {}", mock.injected_into());
        assert!(!mock.injected_into().is_empty(), "{place}: never reached");
        match result {
            Err(_) => errors += 1,
            Ok(value) => {
                assert!(may_pass(&mock.injected_into(), fault), "{place}: no error");
                assert_eq!(value, expected, "{place}: no error, and another result");
            }
        }
        // Nothing can be given back to a context that cannot be entered.
        let cannot = mock.injected_into() == "cuCtxSetCurrent";
        assert!(cannot || mock.leaked() == 0, "{place}: {} not given back", mock.leaked());
    }
    assert!(errors > 0, "no fault had an effect: {fault:?}");
    mock.reset();
    assert_eq!(once(&mock, &program).unwrap(), expected, "after all faults");
}

/// Whether a program may succeed although the call failed: it gives something back, belongs to what does, or asks
/// for what a program can do without.
fn may_pass(call: &str, fault: Fault) -> bool {
    let dispensable =
        ["Free", "Destroy", "Unload", "Release", "CtxSetCurrent", "StreamSynchronize", "DeviceGetAttribute"];
    dispensable.iter().any(|part| call.contains(part)) || fault.how == How::Later
}

/// Runs the program with an eye on the clock. Nothing can end a thread that hangs, so the process ends.
fn once<T, P>(mock: &Control, program: &P) -> Result<T, DeviceError>
where
    T: Send,
    P: Fn(&Device) -> Result<T, DeviceError> + Sync,
{
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        scope.spawn(move || {
            let run = || Device::open(0).and_then(|device| program(&device));
            let _ = sender.send(catch_unwind(AssertUnwindSafe(run)));
        });
        match receiver.recv_timeout(PATIENCE) {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => panic!("the program panicked; {} failed", mock.injected_into()),
            Err(_) => {
                eprintln!("the program hangs; {} failed", mock.injected_into());
                std::process::abort();
            }
        }
    })
}
