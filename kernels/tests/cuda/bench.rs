//! The test kernels on the mock driver through cudarc, below the project's own layer, whose checks would otherwise
//! come first.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::result::{self, module};
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError};

use crate::mock::{self, Guarded};

/// What a driver reads of a module: these kernels are never compiled for a device.
pub const PTX: &str = ".version 8.0
.target sm_80
.address_size 64
.visible .entry selftest_scale(.param .u64 a) { ret; }
.visible .entry selftest_poke(.param .u64 a) { ret; }
.visible .entry selftest_sums(.param .u64 a) { ret; }
.visible .entry selftest_deadlock() { ret; }
.visible .entry selftest_shared_overrun(.param .u64 a)
.maxntid 256, 1, 1
{
    .shared .align 4 .b8 table[1024];
    ret;
}
.visible .entry selftest_nowhere() { ret; }\0";

/// A context with the test kernels loaded.
pub struct Bench {
    pub stream: Arc<CudaStream>,
    pub module: sys::CUmodule,
}

impl Bench {
    pub fn open() -> Self {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: the tests use one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().unwrap();
        let module = load(PTX).unwrap();
        Self { stream, module }
    }

    pub fn function(&self, name: &str) -> Result<sys::CUfunction, DriverError> {
        // SAFETY: the module lives as long as `self`.
        unsafe { module::get_function(self.module, CString::new(name).unwrap()) }
    }

    pub fn launch(
        &self,
        name: &str,
        (grid, block): (u32, u32),
        shared: u32,
        arguments: &[Argument],
    ) -> Result<(), DriverError> {
        let function = self.function(name)?;
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(Argument::pointer).collect();
        let stream = self.stream.cu_stream();
        // SAFETY: the arguments are those of the kernel. Kernels that misbehave do so where the mock sees it.
        unsafe { result::launch_kernel(function, (grid, 1, 1), (block, 1, 1), shared, stream, &mut pointers) }
    }

    pub fn scale(
        &self,
        out: &CudaSlice<f32>,
        input: &CudaSlice<f32>,
        a: f32,
        b: f32,
    ) -> Result<(), DriverError> {
        let count = out.len() as u32;
        let arguments = [at(out), at(input), Argument::F32(a), Argument::F32(b), Argument::U32(count)];
        self.launch("selftest_scale", (count.div_ceil(64), 64), 0, &arguments)
    }

    pub fn poke(&self, out: &CudaSlice<u8>, offset: i64) -> Result<(), DriverError> {
        self.launch("selftest_poke", (1, 32), 0, &[at(out), Argument::I64(offset), Argument::U32(7)])
    }

    pub fn read(&self, from: &CudaSlice<f32>) -> Result<Vec<f32>, DriverError> {
        self.stream.clone_dtoh(from)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // SAFETY: loaded by `open`, unloaded once.
        let _ = unsafe { module::unload(self.module) };
    }
}

pub fn load(ptx: &str) -> Result<sys::CUmodule, DriverError> {
    // SAFETY: text that ends with a zero byte.
    unsafe { module::load_data(ptx.as_ptr().cast()) }
}

pub enum Argument {
    U64(u64),
    I64(i64),
    U32(u32),
    F32(f32),
}

impl Argument {
    fn pointer(&self) -> *mut c_void {
        match self {
            Self::U64(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::I64(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
        }
    }
}

pub fn at<T>(slice: &CudaSlice<T>) -> Argument {
    Argument::U64(slice.device_ptr(slice.stream()).0)
}

/// The mock, and the bench on it where there is one.
pub fn open() -> Option<(Guarded, Bench)> {
    let mock = mock::control()?;
    Some((mock, Bench::open()))
}

pub fn uninitialised<T: cudarc::driver::DeviceRepr>(
    bench: &Bench,
    len: usize,
) -> Result<CudaSlice<T>, DriverError> {
    // SAFETY: what is read of it is compared with what the mock leaves there.
    unsafe { bench.stream.alloc(len) }
}

pub fn error<T>(result: Result<T, DriverError>) -> Option<CUresult> {
    result.err().map(|error| error.0)
}
