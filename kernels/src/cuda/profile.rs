//! How long each operation takes on the device. Off, it costs one load of a flag per launch.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys;

use super::context::{Context, lock};
use super::device::Device;
use super::error::DeviceError;
use super::event;

/// Operations that are remembered until they are taken; later ones are not timed.
const MAX_SPANS: usize = 1 << 16;

/// The time of one operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// The operation: what [`Device::op`] was told, else the kernel, else `"graph"`.
    pub op: &'static str,
    /// Its time on the device.
    pub microseconds: f32,
}

#[derive(Default)]
pub(super) struct Profiler {
    on: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Whether a named operation is open: launches inside belong to it.
    open: bool,
    spans: Vec<Span>,
    unused: Vec<Event>,
}

#[derive(Clone, Copy)]
struct Event(sys::CUevent);

// SAFETY: the driver's handle is a plain address that any thread may use.
unsafe impl Send for Event {}

struct Span {
    op: &'static str,
    start: Event,
    end: Event,
}

/// A span that has begun.
#[must_use]
pub(super) struct Begun {
    op: &'static str,
    start: Event,
}

impl Device {
    /// Turns timing on or off. It begins with nothing remembered. Operations of a graph are timed as one:
    /// nothing is recorded while a graph is captured.
    pub fn profile(&self, on: bool) -> Result<(), DeviceError> {
        self.take_profile()?;
        self.context.profiler.on.store(on, Ordering::Release);
        Ok(())
    }

    /// Runs `work` and times all its launches as one operation; if timing is off, only runs it.
    pub fn op<R>(
        &self,
        op: &'static str,
        work: impl FnOnce() -> Result<R, DeviceError>,
    ) -> Result<R, DeviceError> {
        let context = &self.context;
        let Some(begun) = context.profiler.begin(context, op)? else { return work() };
        lock(&context.profiler.state).open = true;
        let result = work();
        lock(&context.profiler.state).open = false;
        context.profiler.end(context, begun)?;
        result
    }

    /// Waits for the device, and takes the times since the last call, in the stream's order.
    pub fn take_profile(&self) -> Result<Vec<Timing>, DeviceError> {
        let context = &self.context;
        let spans = std::mem::take(&mut lock(&context.profiler.state).spans);
        if spans.is_empty() {
            return Ok(Vec::new());
        }
        let times = context.synchronize("wait for the device").and_then(|()| {
            let time = |span: &Span| {
                let microseconds = event::elapsed(context, span.start.0, span.end.0)?;
                Ok(Timing { op: span.op, microseconds })
            };
            spans.iter().map(time).collect()
        });
        let unused = spans.iter().flat_map(|span| [span.start, span.end]);
        lock(&context.profiler.state).unused.extend(unused);
        times
    }
}

impl Profiler {
    /// Begins a span unless timing is off, a graph is captured, or a named operation is open.
    pub(super) fn begin(&self, context: &Context, op: &'static str) -> Result<Option<Begun>, DeviceError> {
        if !self.on.load(Ordering::Acquire) || context.is_capturing() {
            return Ok(None);
        }
        {
            let state = lock(&self.state);
            if state.open || state.spans.len() >= MAX_SPANS {
                return Ok(None);
            }
        }
        let start = self.record(context)?;
        Ok(Some(Begun { op, start }))
    }

    pub(super) fn end(&self, context: &Context, begun: Begun) -> Result<(), DeviceError> {
        match self.record(context) {
            Ok(end) => {
                lock(&self.state).spans.push(Span { op: begun.op, start: begun.start, end });
                Ok(())
            }
            Err(error) => {
                lock(&self.state).unused.push(begun.start);
                Err(error)
            }
        }
    }

    fn record(&self, context: &Context) -> Result<Event, DeviceError> {
        let unused = lock(&self.state).unused.pop();
        let event = unused.map_or_else(|| event::create(context).map(Event), Ok)?;
        let recorded = event::record(context, event.0);
        if recorded.is_err() {
            lock(&self.state).unused.push(event);
        }
        recorded.map(|()| event)
    }

    /// Destroys all events.
    pub(super) fn clear(&self, context: &Context) {
        let state = std::mem::take(&mut *lock(&self.state));
        let spans = state.spans.iter().flat_map(|span| [span.start, span.end]);
        for event in spans.chain(state.unused) {
            event::destroy(context, event.0);
        }
    }
}
