//! Points in the stream's work, and the time between two of them.

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::context::Context;
use super::device::Device;
use super::error::DeviceError;

/// A point in the stream's work.
pub struct Event {
    context: Arc<Context>,
    event: sys::CUevent,
}

// SAFETY: the driver's handle is a plain address that any thread may use.
unsafe impl Send for Event {}

impl Device {
    /// Makes an event; [`Event::record`] puts it into the stream.
    pub fn event(&self) -> Result<Event, DeviceError> {
        Ok(Event { event: create(&self.context)?, context: self.context.clone() })
    }
}

impl Event {
    /// Marks the point that the stream's work has reached so far.
    pub fn record(&self) -> Result<(), DeviceError> {
        self.context.outside_capture("record an event")?;
        record(&self.context, self.event)
    }

    /// Microseconds on the device from `earlier` to here; waits for both.
    pub fn microseconds_since(&self, earlier: &Event) -> Result<f32, DeviceError> {
        self.context.outside_capture("wait for an event")?;
        // SAFETY: the event lives.
        self.context.call("wait for an event", || unsafe { sys::cuEventSynchronize(self.event) })?;
        elapsed(&self.context, earlier.event, self.event)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        destroy(&self.context, self.event);
    }
}

pub(super) fn create(context: &Context) -> Result<sys::CUevent, DeviceError> {
    let mut event = ptr::null_mut();
    let flags = sys::CUevent_flags::CU_EVENT_DEFAULT as u32;
    // SAFETY: the driver writes the handle.
    context.call("create an event", || unsafe { sys::cuEventCreate(&mut event, flags) })?;
    Ok(event)
}

pub(super) fn record(context: &Context, event: sys::CUevent) -> Result<(), DeviceError> {
    // SAFETY: both handles live.
    context.call("record an event", || unsafe { sys::cuEventRecord(event, context.stream) })
}

/// Microseconds between two events that have passed.
pub(super) fn elapsed(context: &Context, start: sys::CUevent, end: sys::CUevent) -> Result<f32, DeviceError> {
    let mut milliseconds = 0.0;
    // SAFETY: both handles live; the driver writes one number.
    let call = || unsafe { sys::cuEventElapsedTime(&mut milliseconds, start, end) };
    context.call("take the time between events", call)?;
    Ok(milliseconds * 1000.0)
}

pub(super) fn destroy(context: &Context, event: sys::CUevent) {
    // SAFETY: made by `create` and destroyed once.
    context.release("destroy an event", || unsafe { sys::cuEventDestroy_v2(event) });
}
