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
    child::{assert_caught, assert_caught_sanitized, assert_ends, is_child, rerun_sanitized},
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
