//! A device for tests: the mock driver with emulated kernels, or with `MOEBIUS_CUDA=device` the machine's own.
//!
//! The mock is compiled from `kernels/cuda` and loaded under the name of NVIDIA's driver library before anything
//! asks for one; the code under test notices nothing. Where it cannot be built, tests say `SKIP` and pass.
//!
//! A test takes the device for itself: `mock::on_device(|device| ...)`, or `mock::in_every_order(|device| ...)` to
//! run three times with threads scheduled forward, in reverse and at random. When it is done nothing may be left
//! allocated.

mod child;
mod compile;
mod control;
#[allow(dead_code, reason = "not every test crate uses it")]
mod faults;

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::MutexGuard;

use kernels::cuda::Device;

#[allow(unused_imports, reason = "not every test crate uses all")]
pub use self::{
    child::{
        assert_caught, assert_caught_sanitized, assert_ends, is_child, is_sanitized, rerun_all_sanitized,
        rerun_sanitized, thinned,
    },
    control::{Control, Gpu, How, Kind, Order},
    faults::{Fault, for_every_call},
};

/// Whether tests run on the machine's own device.
pub fn on_real_device() -> bool {
    std::env::var_os("MOEBIUS_CUDA").is_some_and(|value| value == "device")
}

fn skip(reason: &str) {
    println!("SKIP cuda tests: {reason}");
}

/// The mock without a device opened on it, for one test at a time. None, and a line that says why, where there is
/// no mock.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn control() -> Option<Guarded> {
    let lock = control::lock();
    if on_real_device() {
        skip("this one needs the mock driver");
        return None;
    }
    match Control::load() {
        Ok(control) => {
            control.reset();
            Some(Guarded { control, _lock: lock })
        }
        Err(reason) => {
            skip(&reason);
            None
        }
    }
}

/// The mock and the lock on it.
pub struct Guarded {
    control: Control,
    _lock: MutexGuard<'static, ()>,
}

impl Deref for Guarded {
    type Target = Control;
    fn deref(&self) -> &Control {
        &self.control
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        finish(self.control);
    }
}

/// Leaves the mock as it was found; nothing may be left over, unless the test has failed anyway.
fn finish(mock: Control) {
    let leaked = mock.leaked();
    mock.reset();
    child::report(&mock.take_ran());
    if !std::thread::panicking() {
        assert_eq!(leaked, 0, "allocations or objects that were not given back");
    }
}

/// An open device, and the mock if it is one.
pub struct Session {
    device: ManuallyDrop<Device>,
    mock: Option<Control>,
    _lock: MutexGuard<'static, ()>,
}

/// The device, for one test at a time. None, and a line that says why, where there is none. What is made on it must
/// be dropped before it.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn device() -> Option<Session> {
    device_like(Gpu::H100)
}

/// The same, pretending to be `gpu`. The machine's own device is what it is.
pub fn device_like(gpu: Gpu) -> Option<Session> {
    let lock = control::lock();
    let mock = if on_real_device() {
        None
    } else {
        match Control::load() {
            Ok(control) => Some(control),
            Err(reason) => {
                skip(&reason);
                return None;
            }
        }
    };
    if let Some(mock) = mock {
        mock.reset();
        mock.set_gpu(gpu);
    }
    let device = Device::open(0).unwrap_or_else(|error| panic!("{error}"));
    Some(Session { device: ManuallyDrop::new(device), mock, _lock: lock })
}

/// Runs `body` on the device.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn on_device(body: impl FnOnce(&Device)) {
    if let Some(session) = device() {
        body(&session);
    }
}

/// Runs `body` on a device that pretends to be `gpu`.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn on_device_like(gpu: Gpu, body: impl FnOnce(&Device)) {
    if let Some(session) = device_like(gpu) {
        body(&session);
    }
}

/// Runs `body` with threads scheduled forward, in reverse and at random. The machine's own device schedules as it
/// likes, once.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn in_every_order(body: impl FnMut(&Device)) {
    in_every_order_like(Gpu::H100, body);
}

/// The same on a device that pretends to be `gpu`.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn in_every_order_like(gpu: Gpu, mut body: impl FnMut(&Device)) {
    let Some(session) = device_like(gpu) else { return };
    let Some(mock) = session.mock() else { return body(&session) };
    for order in [Order::Forward, Order::Reverse, Order::Random(0x5eed)] {
        mock.set_order(order);
        // Shown with the output of a test that fails.
        println!("threads scheduled: {order:?}");
        body(&session);
    }
}

/// Which things an order of threads takes, where each takes some.
#[derive(Clone, Copy, Debug)]
pub struct Turn(Option<usize>);

#[allow(dead_code, reason = "not every test crate uses it")]
impl Turn {
    /// Whether the thing of this number is for this order: three that follow each other are for three orders, and the
    /// machine's own device, which has one, takes all.
    pub fn has(self, number: usize) -> bool {
        self.0.is_none_or(|turn| number % 3 == turn)
    }
}

/// Runs `body` as [`in_every_order`] does, in turns: what is long in all can be shared between the orders.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn by_turns(mut body: impl FnMut(&Device, Turn)) {
    let mut turn = 0;
    in_every_order(|device| {
        body(device, Turn((!on_real_device()).then_some(turn)));
        turn += 1;
    });
}

#[allow(dead_code, reason = "not every test crate uses it")]
impl Session {
    /// None on the machine's own device.
    pub fn mock(&self) -> Option<Control> {
        self.mock
    }
}

impl Deref for Session {
    type Target = Device;
    fn deref(&self) -> &Device {
        &self.device
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: dropped here, once, and not used again.
        unsafe { ManuallyDrop::drop(&mut self.device) };
        if let Some(mock) = self.mock {
            finish(mock);
        }
    }
}
