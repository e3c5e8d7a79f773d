//! Captured work: recorded once, launched many times with one call.

use std::fmt;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::context::{Context, Memory};
use super::device::Device;
use super::error::DeviceError;

/// Launches, copies and fills of a [`Device::capture`], to be done again by one call. It keeps the memory
/// that they use alive. What changes from launch to launch must lie in that memory.
pub struct Graph {
    context: Arc<Context>,
    executable: sys::CUgraphExec,
    kept: Vec<Arc<Memory>>,
}

// SAFETY: the driver's handle is a plain address; it must be used by one thread at a time, and a graph is
// not `Sync`.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("buffers", &self.kept.len()).finish_non_exhaustive()
    }
}

/// Ends a capture on every way out, panics of the closure included.
struct Capture<'a> {
    context: &'a Context,
}

impl Capture<'_> {
    fn begin(context: &Context) -> Result<Capture<'_>, DeviceError> {
        context.outside_capture("capture a graph")?;
        // Relaxed: modules may be loaded meanwhile. What would disturb a capture is refused by this module.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as the context.
        context.call("begin a capture", || unsafe { sys::cuStreamBeginCapture_v2(context.stream, mode) })?;
        context.begin_capture();
        Ok(Capture { context })
    }

    fn end(self) -> (Result<sys::CUgraph, DeviceError>, Vec<Arc<Memory>>) {
        let context = self.context;
        std::mem::forget(self);
        finish(context)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if let (Ok(graph), _kept) = finish(self.context) {
            // Whatever ended the capture is the error to tell.
            let _ = destroy(self.context, graph);
        }
    }
}

fn finish(context: &Context) -> (Result<sys::CUgraph, DeviceError>, Vec<Arc<Memory>>) {
    let mut graph = ptr::null_mut();
    // SAFETY: this stream is capturing; the driver writes the handle, or null where the capture broke.
    let ended =
        context.call("end a capture", || unsafe { sys::cuStreamEndCapture(context.stream, &mut graph) });
    let kept = context.end_capture();
    (ended.map(|()| graph), kept)
}

fn destroy(context: &Context, graph: sys::CUgraph) -> Result<(), DeviceError> {
    if graph.is_null() {
        return Ok(());
    }
    // SAFETY: made by the end of a capture and destroyed once.
    context.call("destroy a captured graph", || unsafe { sys::cuGraphDestroy(graph) })
}

impl Device {
    /// Runs `work` while recording what it asks of the device instead of doing it.
    ///
    /// In `work`, launches, copies on the device and fills are recorded; memory cannot be allocated and
    /// nothing can be read, written by the host, or waited for.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), DeviceError>) -> Result<Graph, DeviceError> {
        let context = &self.context;
        let capture = Capture::begin(context)?;
        // On an error, dropping the capture ends it.
        work()?;
        let (graph, kept) = capture.end();
        let graph = graph?;
        let mut executable = ptr::null_mut();
        // SAFETY: the graph comes from the capture; the driver writes the handle.
        let made = context
            .call("make a graph", || unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) });
        let made = made.map(|()| Graph { context: context.clone(), executable, kept });
        destroy(context, graph)?;
        made
    }
}

impl Graph {
    /// Does all of it again, in the stream's order and without waiting.
    pub fn launch(&self) -> Result<(), DeviceError> {
        let context = &self.context;
        context.outside_capture("launch a graph")?;
        let begun = context.profiler.begin(context, "graph")?;
        // SAFETY: the graph is executable and its memory is kept; this thread is the only one to use it.
        let launched =
            context.call("launch a graph", || unsafe { sys::cuGraphLaunch(self.executable, context.stream) });
        context.launched("a graph");
        if let Some(begun) = begun {
            context.profiler.end(context, begun)?;
        }
        launched
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `capture` and destroyed once; the driver lets a running one finish.
        self.context.release("destroy a graph", || unsafe { sys::cuGraphExecDestroy(self.executable) });
    }
}
