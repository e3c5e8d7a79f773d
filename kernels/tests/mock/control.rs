//! The control functions of the mock driver, and the lock that makes one test at a time their owner.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::compile;

/// In which order threads that wait go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "not every test crate uses all")]
pub enum Order {
    Forward,
    Reverse,
    Random(u64),
}

/// What the device pretends to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    pub capability: (u32, u32),
    pub multiprocessors: u32,
}

#[allow(dead_code, reason = "not every test crate uses all")]
impl Gpu {
    pub const A100: Self = Self { capability: (8, 0), multiprocessors: 108 };
    pub const RTX_4090: Self = Self { capability: (8, 9), multiprocessors: 128 };
    pub const H100: Self = Self { capability: (9, 0), multiprocessors: 132 };
    pub const B200: Self = Self { capability: (10, 0), multiprocessors: 148 };
    pub const RTX_5090: Self = Self { capability: (12, 0), multiprocessors: 170 };

    pub const fn with_multiprocessors(self, multiprocessors: u32) -> Self {
        Self { multiprocessors, ..self }
    }
}

/// Which calls are counted, or fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "not every test crate uses all")]
pub enum Kind {
    Any = 0,
    Allocation = 1,
    Launch = 2,
}

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "not every test crate uses all")]
pub enum How {
    /// This once.
    Once = 0,
    /// It and all after it: the device is lost.
    Forever = 1,
    /// It succeeds; the error shows at the next call that waits for the device.
    Later = 2,
}

/// The loaded library and its functions.
struct Functions {
    folder: PathBuf,
    reset: unsafe extern "C" fn(),
    set_schedule: unsafe extern "C" fn(c_int, u64, c_uint),
    set_device: unsafe extern "C" fn(c_int, c_int, c_int),
    set_device_count: unsafe extern "C" fn(c_int),
    set_driver_version: unsafe extern "C" fn(c_int),
    set_memory: unsafe extern "C" fn(usize),
    set_lazy: unsafe extern "C" fn(c_int),
    fail: unsafe extern "C" fn(c_int, u64, c_int, c_int),
    calls: unsafe extern "C" fn(c_int) -> u64,
    injected_into: unsafe extern "C" fn() -> *const c_char,
    last_message: unsafe extern "C" fn() -> *const c_char,
    kernels: unsafe extern "C" fn() -> *const c_char,
    take_ran: unsafe extern "C" fn() -> *const c_char,
    live_allocations: unsafe extern "C" fn() -> usize,
    live_bytes: unsafe extern "C" fn() -> usize,
    live_objects: unsafe extern "C" fn() -> usize,
    forgotten: unsafe extern "C" fn() -> usize,
}

impl Functions {
    fn load() -> Result<Self, String> {
        let folder = compile::library_folder(&super::child::options())?;
        let open = |name: &str| {
            // SAFETY: the mock's initialisers only fill a table. Loaded by its full path before anything asks for a
            // driver by name, it is what every later request by that name finds.
            let library = unsafe { Library::open(Some(folder.join(name)), RTLD_NOW | RTLD_GLOBAL) };
            library.unwrap_or_else(|error| panic!("{}: {error}", folder.join(name).display()))
        };
        let library = open("libcuda.so.1");
        // For the life of the process, as a driver is.
        std::mem::forget(open("libcuda.so"));
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the types of the fields are those in driver_control.cpp.
                *unsafe { library.get($name) }.expect("a control function")
            };
        }
        let functions = Self {
            reset: function!(b"mock_reset"),
            set_schedule: function!(b"mock_set_schedule"),
            set_device: function!(b"mock_set_device"),
            set_device_count: function!(b"mock_set_device_count"),
            set_driver_version: function!(b"mock_set_driver_version"),
            set_memory: function!(b"mock_set_memory"),
            set_lazy: function!(b"mock_set_lazy"),
            fail: function!(b"mock_fail"),
            calls: function!(b"mock_calls"),
            injected_into: function!(b"mock_injected_into"),
            last_message: function!(b"mock_last_message"),
            kernels: function!(b"mock_kernels"),
            take_ran: function!(b"mock_take_ran"),
            live_allocations: function!(b"mock_live_allocations"),
            live_bytes: function!(b"mock_live_bytes"),
            live_objects: function!(b"mock_live_objects"),
            forgotten: function!(b"mock_forgotten"),
            folder,
        };
        std::mem::forget(library);
        Ok(functions)
    }
}

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Makes the caller the only user of the process's device. Not to be asked for twice by one thread.
pub fn lock() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The mock driver, for whoever holds the lock.
#[derive(Clone, Copy)]
pub struct Control(&'static Functions);

/// What the loaded mock does next. None of this is safe against other users of the mock; [`lock`] is.
// SAFETY, of every call below: the functions take plain numbers and lock what they touch.
#[allow(dead_code, reason = "not every test crate uses all")]
#[allow(clippy::undocumented_unsafe_blocks, reason = "said once, above")]
impl Control {
    /// Builds and loads the mock at the first call; the reason if it cannot be built here. Leaves it as it is, for
    /// another test may be using it.
    pub fn load() -> Result<Self, String> {
        static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
        Ok(Self(FUNCTIONS.get_or_init(Functions::load).as_ref().map_err(String::clone)?))
    }

    /// Where `libcuda.so.1` lies: for `LD_LIBRARY_PATH` of other programs.
    pub fn library_folder(&self) -> &'static std::path::Path {
        &self.0.folder
    }

    /// Forgets everything but what is allocated.
    pub fn reset(&self) {
        unsafe { (self.0.reset)() }
    }

    pub fn set_order(&self, order: Order) {
        let (order, seed) = match order {
            Order::Forward => (0, 1),
            Order::Reverse => (1, 1),
            Order::Random(seed) => (2, seed),
        };
        unsafe { (self.0.set_schedule)(order, seed, 2) }
    }

    /// What devices opened from now on are.
    pub fn set_gpu(&self, gpu: Gpu) {
        let (major, minor) = gpu.capability;
        unsafe { (self.0.set_device)(major as c_int, minor as c_int, gpu.multiprocessors as c_int) }
    }

    pub fn set_device_count(&self, count: u32) {
        unsafe { (self.0.set_device_count)(count as c_int) }
    }

    /// Of the CUDA version `(12, 8)`.
    pub fn set_driver_version(&self, (major, minor): (u32, u32)) {
        unsafe { (self.0.set_driver_version)((major * 1000 + minor * 10) as c_int) }
    }

    /// Memory of the device.
    pub fn set_memory_bytes(&self, bytes: usize) {
        unsafe { (self.0.set_memory)(bytes) }
    }

    /// Whether work runs as late as it may: when somebody waits for it.
    pub fn set_lazy(&self, lazy: bool) {
        unsafe { (self.0.set_lazy)(c_int::from(lazy)) }
    }

    /// Makes the `n`-th call from now (the next is 1) return `result`, a number of `CUresult`.
    pub fn fail(&self, kind: Kind, n: u64, result: u32, how: How) {
        unsafe { (self.0.fail)(kind as c_int, n, result as c_int, how as c_int) }
    }

    /// Calls since the last reset.
    pub fn calls(&self, kind: Kind) -> u64 {
        unsafe { (self.0.calls)(kind as c_int) }
    }

    /// The call that failed on demand; empty if that has not happened.
    pub fn injected_into(&self) -> String {
        text(unsafe { (self.0.injected_into)() })
    }

    /// The last thing that the mock had to say about a fault of the program.
    pub fn last_message(&self) -> String {
        text(unsafe { (self.0.last_message)() })
    }

    /// The names of all emulated kernels: those that a kernel file exports.
    pub fn kernels(&self) -> Vec<String> {
        text(unsafe { (self.0.kernels)() }).lines().map(String::from).collect()
    }

    /// Names and orders, as `gather_rows reverse`: what has run to its end since this was last asked.
    pub fn take_ran(&self) -> Vec<String> {
        text(unsafe { (self.0.take_ran)() }).lines().map(String::from).collect()
    }

    pub fn live_allocations(&self) -> usize {
        unsafe { (self.0.live_allocations)() }
    }

    pub fn live_bytes(&self) -> usize {
        unsafe { (self.0.live_bytes)() }
    }

    /// Contexts, streams, events, modules and graphs.
    pub fn live_objects(&self) -> usize {
        unsafe { (self.0.live_objects)() }
    }

    /// Allocations and objects that had not been given back when their context ended without an error.
    pub fn forgotten(&self) -> usize {
        unsafe { (self.0.forgotten)() }
    }

    /// What is alive or was forgotten.
    pub fn leaked(&self) -> usize {
        self.live_allocations() + self.live_objects() + self.forgotten()
    }
}

fn text(at: *const c_char) -> String {
    // SAFETY: a string of the mock, valid until its next call, which the lock's holder has not made.
    unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned()
}
