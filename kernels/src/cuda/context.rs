//! What every handle of a device shares: the driver's context and stream, the first fatal error, and what
//! must wait while a graph is captured. The one place where results of the driver become errors.

use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{self, CUresult};

use super::device::DeviceInfo;
use super::error::{Cause, DeviceError};
use super::image::Modules;
use super::profile::Profiler;

pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    pub(super) info: DeviceInfo,
    pub(super) modules: Mutex<Modules>,
    pub(super) profiler: Profiler,
    lost: OnceLock<DeviceError>,
    last_kernel: Mutex<Option<&'static str>>,
    capturing: AtomicBool,
    captured: Mutex<Captured>,
}

/// What a capture collects beside the graph.
#[derive(Default)]
pub(super) struct Captured {
    /// Memory that the graph reads or writes: it must live as long as the graph.
    pub kept: Vec<Arc<Memory>>,
    /// Memory dropped meanwhile: it is freed when the capture has ended.
    dropped: Vec<Block>,
}

// SAFETY: the driver's handles are plain addresses that any thread may use; every call makes the context
// current in its thread first, and whatever changes is behind a lock or atomic.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Memory of a context, freed when the last holder goes.
pub(super) struct Memory {
    pub context: Arc<Context>,
    pub block: Block,
}

/// An allocation of the driver.
#[derive(Clone, Copy)]
pub(super) enum Block {
    /// Device memory.
    Device {
        /// Its address on the device.
        address: u64,
    },
    /// Pinned host memory that the device can reach.
    Host {
        /// Its address on the host.
        pointer: *mut u8,
        /// Its address on the device.
        address: u64,
    },
}

// SAFETY: an address; what lies there is reached through the driver or by volatile access only.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Memory {
    pub(super) fn address(&self) -> u64 {
        match self.block {
            Block::Device { address } | Block::Host { address, .. } => address,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Freeing waits for the device, which a capture forbids.
        if self.context.is_capturing() {
            lock(&self.context.captured).dropped.push(self.block);
        } else {
            self.context.free(self.block);
        }
    }
}

/// A lock that a panic elsewhere does not spoil: what is behind it is whole at any time.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a call of the driver; a function that the library lacks is an error, not a panic.
pub(super) fn guarded(operation: &'static str, call: impl FnOnce() -> CUresult) -> Result<(), DeviceError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(CUresult::CUDA_SUCCESS) => Ok(()),
        Ok(result) => Err(DeviceError::new(operation, describe(result))),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map_or("unknown reason", String::as_str);
            Err(DeviceError::unavailable(operation, format!("the driver library cannot be used: {text}")))
        }
    }
}

/// The driver's name and sentence for a result.
fn describe(result: CUresult) -> Cause {
    type Lookup = unsafe fn(CUresult, *mut *const c_char) -> CUresult;
    let word = |lookup: Lookup| {
        let mut text: *const c_char = ptr::null();
        // SAFETY: the driver sets the pointer to a string of its own that lives as long as the process.
        let found = catch_unwind(AssertUnwindSafe(|| unsafe { lookup(result, &mut text) }));
        if !matches!(found, Ok(CUresult::CUDA_SUCCESS)) || text.is_null() {
            return None;
        }
        // SAFETY: not null, so such a string.
        Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    Cause::Driver {
        code: result as u32,
        name: word(sys::cuGetErrorName).unwrap_or_else(|| format!("error {}", result as u32)),
        text: word(sys::cuGetErrorString).unwrap_or_else(|| "no description".into()),
    }
}

impl Context {
    /// Takes the primary context of `device` and makes a stream on it.
    pub(super) fn new(device: sys::CUdevice, info: DeviceInfo) -> Result<Arc<Self>, DeviceError> {
        let mut context = ptr::null_mut();
        // SAFETY: the device comes from the driver.
        guarded("take the device's context", || unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut context, device)
        })?;
        // From here on, dropping `this` gives the context back.
        let mut this = Self {
            device,
            context,
            stream: ptr::null_mut(),
            info,
            modules: Mutex::default(),
            profiler: Profiler::default(),
            lost: OnceLock::new(),
            last_kernel: Mutex::new(None),
            capturing: AtomicBool::new(false),
            captured: Mutex::default(),
        };
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the driver writes the handle.
        this.call("create a stream", || unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
        this.stream = stream;
        Ok(Arc::new(this))
    }

    /// Makes the context current and runs `call`. Returns the first fatal error at once if there was one.
    pub(super) fn call(
        &self,
        operation: &'static str,
        call: impl FnOnce() -> CUresult,
    ) -> Result<(), DeviceError> {
        self.call_about(operation, None, call)
    }

    /// As [`call`](Self::call), about `kernel`.
    pub(super) fn call_about(
        &self,
        operation: &'static str,
        kernel: Option<&'static str>,
        call: impl FnOnce() -> CUresult,
    ) -> Result<(), DeviceError> {
        if let Some(error) = self.lost.get() {
            return Err(error.clone());
        }
        // SAFETY: the context is held until `self` is dropped.
        let entered = guarded(operation, || unsafe { sys::cuCtxSetCurrent(self.context) });
        entered.and_then(|()| guarded(operation, call)).map_err(|error| {
            let error = error.about(kernel).found_after(*lock(&self.last_kernel));
            if error.is_lost() {
                // Several threads may find it; the first one's words stay.
                let _ = self.lost.set(error.clone());
            }
            error
        })
    }

    /// Gives something back to the driver. It cannot fail in a way that a caller could act on: a fatal
    /// error is remembered, and after one nothing is asked of the driver any more.
    pub(super) fn release(&self, operation: &'static str, call: impl FnOnce() -> CUresult) {
        let _ = self.call(operation, call);
    }

    /// Fails where `operation` would break a capture.
    pub(super) fn outside_capture(&self, operation: &'static str) -> Result<(), DeviceError> {
        if self.is_capturing() {
            return Err(DeviceError::refused(operation, "not possible while a graph is captured"));
        }
        Ok(())
    }

    pub(super) fn is_capturing(&self) -> bool {
        self.capturing.load(Ordering::Acquire)
    }

    pub(super) fn begin_capture(&self) {
        self.capturing.store(true, Ordering::Release);
    }

    /// Ends the time of collecting: frees what was dropped and returns what the graph needs.
    pub(super) fn end_capture(&self) -> Vec<Arc<Memory>> {
        self.capturing.store(false, Ordering::Release);
        let captured = std::mem::take(&mut *lock(&self.captured));
        for block in captured.dropped {
            self.free(block);
        }
        captured.kept
    }

    /// Notes that the graph being captured, if one is, uses `memory`.
    pub(super) fn keep(&self, memory: &Arc<Memory>) {
        if self.is_capturing() {
            lock(&self.captured).kept.push(memory.clone());
        }
    }

    pub(super) fn launched(&self, kernel: &'static str) {
        *lock(&self.last_kernel) = Some(kernel);
    }

    /// Waits until the stream has done everything.
    pub(super) fn synchronize(&self, operation: &'static str) -> Result<(), DeviceError> {
        self.outside_capture(operation)?;
        // SAFETY: the stream lives as long as the context.
        self.call(operation, || unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    fn free(&self, block: Block) {
        match block {
            Block::Device { address } => {
                // SAFETY: allocated by this context and freed once. The driver waits for work that uses it.
                self.release("free device memory", || unsafe { sys::cuMemFree_v2(address) })
            }
            Block::Host { pointer, .. } => {
                // The driver does not promise to wait before it frees pinned memory.
                let _ = self.synchronize("free host memory");
                // SAFETY: allocated by this context and freed once; nothing in flight uses it.
                self.release("free host memory", || unsafe { sys::cuMemFreeHost(pointer.cast()) })
            }
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.profiler.clear(self);
        let modules = std::mem::take(&mut *lock(&self.modules));
        modules.unload(self);
        if !self.stream.is_null() {
            // SAFETY: made in `new`, destroyed once.
            self.release("destroy the stream", || unsafe { sys::cuStreamDestroy_v2(self.stream) });
        }
        // Also after a fatal error: it is how the process lets go of the device.
        let release = || {
            // SAFETY: taken in `new`, given back once.
            unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) }
        };
        let _ = guarded("give back the device's context", release);
    }
}
