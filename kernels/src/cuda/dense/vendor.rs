//! Products of many tokens by cuBLASLt, where it is installed: only for those who ask for it.

use std::ffi::c_void;
use std::mem::size_of;
use std::panic::catch_unwind;
use std::ptr::from_ref;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{self, cublasLtMatmulDescAttributes_t as Attribute};
use cudarc::driver::sys::CUresult;

use super::super::buffer::Buffer;
use super::super::device::Device;
use super::super::error::DeviceError;
use super::{Dense, DenseValues};

const OPEN: &str = "open cuBLASLt";
const MULTIPLY: &str = "multiply with cuBLASLt";
/// As NVIDIA recommends for its newer devices.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Below, weights are streamed, which the library is no better at.
const FEWEST_TOKENS: usize = 65;
/// `CUBLAS_OP_T`, which these bindings lack.
const TRANSPOSED: i32 = 1;

/// NVIDIA's library of products. Its sums have another order than [`Dense::launch`]'s, and one that changes with the
/// number of tokens, the device and the version of the library: a token's bits then depend on its batch.
pub struct VendorProducts {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer<u8>,
}

impl VendorProducts {
    /// Opens the library.
    ///
    /// # Errors
    /// Where it is not installed, or does not start.
    pub fn open(device: &Device) -> Result<Self, DeviceError> {
        // SAFETY: loads and unloads the library, whose initialisers may run at any time.
        if !catch_unwind(|| unsafe { sys::is_culib_present() }).unwrap_or(false) {
            let reason = "there is no library libcublasLt.so.12; products without it are the default";
            return Err(DeviceError::unavailable(OPEN, reason));
        }
        let workspace = device.alloc(WORKSPACE_BYTES)?;
        let handle = guarded(device, OPEN, result::create_handle)?;
        Ok(Self { handle, workspace })
    }

    /// Does what [`Dense::launch`] does, for bf16 weights, one plane of x and more than 64 tokens.
    ///
    /// # Errors
    /// If the product is another, or as the library says.
    ///
    /// # Panics
    /// If shapes differ.
    pub fn launch(&self, device: &Device, product: &Dense<'_>) -> Result<(), DeviceError> {
        product.check();
        let DenseValues::Bf16(weight) = product.weight.values else {
            return Err(DeviceError::refused(MULTIPLY, "only bf16 weights"));
        };
        if product.x.planes.count != 1 || product.tokens < FEWEST_TOKENS {
            let reason = format!(
                "{} planes of {} tokens; it takes one plane of {FEWEST_TOKENS} tokens or more",
                product.x.planes.count, product.tokens
            );
            return Err(DeviceError::refused(MULTIPLY, reason));
        }
        for memory in [weight.memory, product.x.planes.values.memory, product.out.values.memory] {
            device.context.keep(memory);
        }
        device.context.keep(self.workspace.all().memory);
        if let Some(bias) = product.bias {
            device.context.keep(bias.memory);
        }
        // SAFETY: weight, x, bias and out lie inside their slices, as checked; the workspace is this value's, and
        // only products of the one stream use it.
        guarded(device, MULTIPLY, || unsafe { self.multiply(device, product, weight.address()) })
    }

    /// # Safety
    ///
    /// The product's sizes must have been checked, and the weight of bf16 values be at `weight`.
    unsafe fn multiply(&self, device: &Device, product: &Dense<'_>, weight: u64) -> Result<(), CublasError> {
        let (rows, columns, tokens) = (product.weight.rows, product.weight.cols, product.tokens);
        // The library's matrices are stored by columns: out^T = x^T W^T, of which it transposes W^T back.
        let (bf16, f32) = (sys::cudaDataType_t::CUDA_R_16BF, sys::cudaDataType_t::CUDA_R_32F);
        let weights = Layout::new(bf16, columns, rows, columns)?;
        let x = Layout::new(bf16, columns, tokens, product.x.stride)?;
        let out = Layout::new(f32, rows, tokens, product.out.stride)?;
        let description = Description::new(f32)?;
        // SAFETY: the description lives; each value has the type that its attribute wants.
        unsafe {
            description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
            if let Some(bias) = product.bias {
                let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
                description.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
                description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.address())?;
            }
        }
        let preference = Preference::new(&self.workspace.len())?;
        // SAFETY: everything named lives until the call returns; the matrices are as large as their layouts say.
        unsafe {
            let algorithm = result::get_matmul_algo_heuristic(
                self.handle,
                description.0,
                weights.0,
                x.0,
                out.0,
                out.0,
                preference.0,
            )?;
            let (alpha, beta) = (1f32, if product.add { 1f32 } else { 0.0 });
            let out_at = product.out.values.address() as *mut c_void;
            result::matmul(
                self.handle,
                description.0,
                from_ref(&alpha).cast(),
                from_ref(&beta).cast(),
                weight as *const c_void,
                weights.0,
                product.x.planes.values.address() as *const c_void,
                x.0,
                out_at,
                out.0,
                out_at,
                out.0,
                &algorithm.algo,
                self.workspace.address() as *mut c_void,
                self.workspace.len(),
                device.context.stream.cast(),
            )
        }
    }
}

impl Drop for VendorProducts {
    fn drop(&mut self) {
        // SAFETY: opened once and closed once. It waits for nothing: what it was asked for is in the stream.
        let close = || unsafe {
            let _ = result::destroy_handle(self.handle);
            CUresult::CUDA_SUCCESS
        };
        self.workspace.all().memory.context.release("close cuBLASLt", close);
    }
}

/// Runs `call` with the device's context; the library's errors as ours.
fn guarded<T>(
    device: &Device,
    operation: &'static str,
    call: impl FnOnce() -> Result<T, CublasError>,
) -> Result<T, DeviceError> {
    let mut outcome = None;
    device.context.call(operation, || {
        outcome = Some(call());
        CUresult::CUDA_SUCCESS
    })?;
    outcome.expect("it was called").map_err(|error| DeviceError::refused(operation, error.to_string()))
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(of: sys::cudaDataType, rows: usize, columns: usize, stride: usize) -> Result<Self, CublasError> {
        result::create_matrix_layout(of, rows as u64, columns as u64, stride as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new(scale: sys::cudaDataType) -> Result<Self, CublasError> {
        result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, scale).map(Self)
    }

    /// # Safety
    ///
    /// The value must be of the attribute's type.
    unsafe fn set<T>(&self, attribute: Attribute, value: &T) -> Result<(), CublasError> {
        // SAFETY: the description lives; the value is read before the call returns.
        unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, from_ref(value).cast(), size_of::<T>())
        }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(workspace_bytes: &usize) -> Result<Self, CublasError> {
        let this = result::create_matmul_pref().map(Self)?;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let (at, bytes) = (from_ref(workspace_bytes).cast(), size_of::<usize>());
        // SAFETY: the preference lives; a 64-bit number is what the attribute wants.
        unsafe { result::set_matmul_pref_attribute(this.0, attribute, at, bytes)? };
        Ok(this)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
