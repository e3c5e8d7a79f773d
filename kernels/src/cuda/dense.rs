//! Dense products on the device: planes of bf16 times a weight as it was published. `kernels/cuda/dense.cu`; the
//! reference is [`crate::reference::matmul`].
//!
//! Every output is summed in one order, which its weight's shape decides ([`DenseShape::piece`]), so that a token
//! has the same bits alone, in a batch, and on a device with more multiprocessors:
//!
//! * k is cut into pieces, each a multiple of 128 long; a piece's sum begins at zero;
//! * within a piece steps of sixteen k ascend, and within a step the planes of x go from the smallest to the
//!   largest; the sixteen products of a step are the tensor cores' to add;
//! * with FP8 weights, each block of 128 k is summed from zero, and the piece becomes
//!   `fma(scale, block, piece)`;
//! * pieces are added to zero in ascending order; then comes the bias; then what is in the output already.
//!
//! For few tokens the weight is streamed once: blocks of 64 rows with up to eight stages of copies under way, k cut
//! over blocks, and the last block of some rows to arrive adds their pieces. For many tokens blocks are of 128 rows
//! and take all pieces themselves.
//!
//! These kernels are the default for any number of tokens. [`VendorProducts`] is not: what it adds up in which order
//! is its own.
//!
//! Weights may be read while the kernel before is still running: what writes a weight must have ended before the
//! launch of whatever stands in front of its product.

mod plan;
mod vendor;

pub use plan::{DenseLayout, DenseShape, DenseWorkspaceSize};
pub use vendor::VendorProducts;

use half::bf16;

use super::buffer::{Buffer, Slice};
use super::device::Device;
use super::error::DeviceError;
use super::launch::Launch;
use super::rows::{Planes, Strided, count};
use crate::experts::Activation;
use plan::Plan;

/// Rows and columns of a block of FP8 scales.
const SCALE_BLOCK: usize = crate::format::FP8_BLOCK;

/// How a weight's values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenseFormat {
    /// 2 bytes per value.
    Bf16,
    /// e4m3 codes with an f32 scale per block of 128 x 128.
    Fp8,
}

/// The stored values of a weight in device memory, as published and row after row.
#[derive(Clone, Copy)]
pub enum DenseValues<'a> {
    /// Aligned to 16 bytes.
    Bf16(Slice<'a, bf16>),
    /// See [`crate::Values::Fp8`].
    Fp8 {
        /// One byte per value, aligned to 16 bytes.
        codes: Slice<'a, u8>,
        /// `[ceil(rows / 128), ceil(cols / 128)]`.
        scales: Slice<'a, f32>,
    },
}

/// A weight `[rows, cols]` in device memory.
#[derive(Clone, Copy)]
pub struct DenseWeight<'a> {
    /// All of them.
    pub values: DenseValues<'a>,
    /// Stored rows.
    pub rows: usize,
    /// Stored columns: a multiple of 8.
    pub cols: usize,
}

impl<'a> DenseWeight<'a> {
    /// How the values are stored.
    pub fn format(&self) -> DenseFormat {
        match self.values {
            DenseValues::Bf16(_) => DenseFormat::Bf16,
            DenseValues::Fp8 { .. } => DenseFormat::Fp8,
        }
    }

    #[track_caller]
    fn check(&self) {
        let (rows, cols) = (self.rows, self.cols);
        let (address, values) = match self.values {
            DenseValues::Bf16(values) => (values.address(), values.len()),
            DenseValues::Fp8 { codes, scales } => {
                let blocks = rows.div_ceil(SCALE_BLOCK) * cols.div_ceil(SCALE_BLOCK);
                assert!(scales.len() >= blocks, "dense: {blocks} scales of {}", scales.len());
                (codes.address(), codes.len())
            }
        };
        assert!(values >= rows * cols, "dense: {rows} x {cols} weights of {values}");
        assert!(cols.is_multiple_of(8), "dense: {cols} columns, not a multiple of 8");
        assert!(address.is_multiple_of(16), "dense: a weight at {address:#x}, not aligned to 16 bytes");
    }

    /// Values and scales as kernels take them.
    fn arguments(&self) -> (Slice<'a, u8>, Option<Slice<'a, f32>>) {
        match self.values {
            DenseValues::Bf16(values) => (values.cast(), None),
            DenseValues::Fp8 { codes, scales } => (codes, Some(scales)),
        }
    }
}

/// Where blocks that share a sum meet; one for all products of a device's stream.
pub struct DenseWorkspace {
    sums: Buffer<f32>,
    counters: Buffer<u32>,
}

impl DenseWorkspace {
    /// Of this size: the [`DenseWorkspaceSize::max`] of all products.
    pub fn new(device: &Device, size: DenseWorkspaceSize) -> Result<Self, DeviceError> {
        Ok(Self { sums: device.alloc(size.sums)?, counters: device.zeroed(size.counters)? })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.sums.bytes() + self.counters.bytes()
    }

    #[track_caller]
    fn check(&self, wanted: DenseWorkspaceSize) {
        let size = DenseWorkspaceSize { sums: self.sums.len(), counters: self.counters.len() };
        assert_eq!(size.max(wanted), size, "dense: the workspace is too small");
    }
}

/// Rows of x as a product reads them.
#[derive(Clone, Copy)]
pub struct DenseInput<'a> {
    /// In natural order; 1 or 3 of them.
    pub planes: Planes<'a>,
    /// Values from one token to the next: a multiple of 8.
    pub stride: usize,
}

impl<'a> DenseInput<'a> {
    /// Rows that follow each other.
    pub fn new(planes: Planes<'a>, width: usize) -> Self {
        Self { planes, stride: width }
    }

    #[track_caller]
    fn check(&self, tokens: usize, width: usize) {
        let Self { planes, stride } = *self;
        assert!(width <= stride || tokens <= 1, "dense: x has rows of {width} values, {stride} apart");
        let plane = tokens.saturating_sub(1) * stride + width;
        let wanted = (planes.count - 1) * planes.stride + plane;
        assert!(wanted <= planes.values.len(), "dense: {wanted} values of x, of {}", planes.values.len());
        let aligned = planes.values.address().is_multiple_of(16) && planes.stride.is_multiple_of(8);
        assert!(aligned && stride.is_multiple_of(8), "dense: x is not aligned to 16 bytes");
    }
}

/// `out = W x + bias`, or that added to what is there.
pub struct Dense<'a> {
    /// `[tokens, weight.cols]`.
    pub x: DenseInput<'a>,
    /// Tokens.
    pub tokens: usize,
    /// `[outputs, inputs]`.
    pub weight: DenseWeight<'a>,
    /// `[weight.rows]`.
    pub bias: Option<Slice<'a, f32>>,
    /// `[tokens, weight.rows]`.
    pub out: Strided<'a>,
    /// Whether the product is added to `out`.
    pub add: bool,
    /// As [`DenseShape::workspace_size`] says.
    pub workspace: &'a DenseWorkspace,
}

impl Dense<'_> {
    /// The shape that decides the order of the sums.
    pub fn shape(&self) -> DenseShape {
        DenseShape {
            format: self.weight.format(),
            layout: DenseLayout::Rows,
            rows: self.weight.rows,
            columns: self.weight.cols,
            heads: 1,
            planes: self.x.planes.count,
        }
    }

    #[track_caller]
    fn check(&self) {
        self.weight.check();
        self.x.check(self.tokens, self.weight.cols);
        self.out.check(self.tokens, self.weight.rows, "dense: out");
        assert!(self.bias.is_none_or(|bias| bias.len() >= self.weight.rows), "dense: one bias per output");
    }

    /// # Panics
    /// If shapes differ or the workspace is too small.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (shape, tokens) = (self.shape(), self.tokens);
        self.check();
        if tokens * shape.rows == 0 {
            return Ok(());
        }
        let plan = shape.plan(tokens, device.info().multiprocessors);
        self.workspace.check(plan.workspace);
        let place = Place { head_rows: 0, first_row: 0, x_head: 0, out_head: 0 };
        let launch = product(device, &plan, &shape, tokens, self.x, self.weight, &place, self.workspace);
        let launch = launch.arg(self.bias).arg(self.out.values).arg(count(self.out.stride)).arg(0u32);
        // SAFETY: the arguments of a product; x, weight, bias and out lie inside their slices, and the workspace
        // is as large as the plan says, as checked.
        unsafe { launch.arg(u32::from(self.add)).run() }
    }
}

/// A product of its own for every head, each with its part of one weight: what latent attention absorbs into
/// queries (transposed) and outputs.
pub struct DenseHeads<'a> {
    /// `[tokens, heads, columns]`.
    pub x: DenseInput<'a>,
    /// Values of x from one head to the next: a multiple of 8.
    pub x_head_stride: usize,
    /// Tokens.
    pub tokens: usize,
    /// Of all heads. With FP8 the blocks of scales are those of the whole weight.
    pub weight: DenseWeight<'a>,
    /// First row of head 0.
    pub first_row: usize,
    /// Rows from one head to the next: with `transposed` and FP8 a multiple of 8, as is `first_row`.
    pub row_stride: usize,
    /// Rows of a head.
    pub rows: usize,
    /// Heads.
    pub heads: usize,
    /// Whether a head's rows are summed over, `out = x W`, with `rows` columns of x and `weight.cols` outputs; else
    /// `out = W x`, with `weight.cols` columns of x and `rows` outputs.
    pub transposed: bool,
    /// `[tokens, heads, outputs]`.
    pub out: Strided<'a>,
    /// Values of `out` from one head to the next.
    pub out_head_stride: usize,
    /// As [`DenseShape::workspace_size`] says.
    pub workspace: &'a DenseWorkspace,
}

impl DenseHeads<'_> {
    /// The shape that decides the order of the sums.
    pub fn shape(&self) -> DenseShape {
        let (layout, rows, columns) = if self.transposed {
            (DenseLayout::Transposed, self.weight.cols, self.rows)
        } else {
            (DenseLayout::Rows, self.rows, self.weight.cols)
        };
        let (format, planes) = (self.weight.format(), self.x.planes.count);
        DenseShape { format, layout, rows, columns, heads: self.heads, planes }
    }

    /// # Panics
    /// If shapes differ or the workspace is too small.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (shape, tokens) = (self.shape(), self.tokens);
        if tokens * self.heads * shape.rows == 0 {
            return Ok(());
        }
        self.weight.check();
        let last = self.heads - 1;
        self.x.check(tokens, last * self.x_head_stride + shape.columns);
        assert!(shape.columns.is_multiple_of(8), "dense: heads of {} values", shape.columns);
        assert!(self.x_head_stride.is_multiple_of(8), "dense: heads of x are not aligned to 16 bytes");
        assert!(shape.rows <= self.out_head_stride || last == 0, "dense: heads of out overlap");
        self.out.check(tokens, last * self.out_head_stride + shape.rows, "dense: out");
        let rows = self.first_row + last * self.row_stride + self.rows;
        assert!(rows <= self.weight.rows, "dense: heads take {rows} rows of {}", self.weight.rows);
        let eighths = self.first_row.is_multiple_of(8) && self.row_stride.is_multiple_of(8);
        let anywhere = !self.transposed || shape.format == DenseFormat::Bf16;
        assert!(eighths || anywhere, "dense: a head that begins within eight rows");
        let plan = shape.plan(tokens, device.info().multiprocessors);
        self.workspace.check(plan.workspace);
        let place = Place {
            first_row: self.first_row,
            head_rows: self.row_stride,
            x_head: self.x_head_stride,
            out_head: self.out_head_stride,
        };
        let launch = product(device, &plan, &shape, tokens, self.x, self.weight, &place, self.workspace);
        let launch = launch.arg(None::<Slice<'_, f32>>).arg(self.out.values).arg(count(self.out.stride));
        // SAFETY: the arguments of a product; x, weight and out of all heads lie inside their slices, and the
        // workspace is as large as the plan says, as checked.
        unsafe { launch.arg(count(place.out_head)).arg(0u32).run() }
    }
}

/// Gate and up products and the activation: `out = activation(G x, U x)`, as planes for the product after it.
pub struct DenseGateUp<'a> {
    /// `[tokens, gate.cols]`.
    pub x: DenseInput<'a>,
    /// Tokens.
    pub tokens: usize,
    /// `[inter, hidden]`.
    pub gate: DenseWeight<'a>,
    /// `[inter, hidden]`, stored alike.
    pub up: DenseWeight<'a>,
    /// `[2 * inter]`, gate and up alternating.
    pub bias: Option<Slice<'a, f32>>,
    /// What is done with gate and up.
    pub activation: Activation,
    /// `[tokens, inter]`, as many planes as x has.
    pub out: Planes<'a>,
    /// Values of `out` from one token to the next.
    pub out_stride: usize,
    /// As [`DenseShape::workspace_size`] says.
    pub workspace: &'a DenseWorkspace,
}

impl DenseGateUp<'_> {
    /// The shape that decides the order of the sums.
    pub fn shape(&self) -> DenseShape {
        DenseShape {
            format: self.gate.format(),
            layout: DenseLayout::GateUp,
            rows: self.gate.rows,
            columns: self.gate.cols,
            heads: 1,
            planes: self.x.planes.count,
        }
    }

    /// # Panics
    /// If shapes differ or the workspace is too small.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (shape, tokens, out) = (self.shape(), self.tokens, self.out);
        self.gate.check();
        self.up.check();
        let up = (self.up.rows, self.up.cols, self.up.format());
        assert_eq!(up, (shape.rows, shape.columns, shape.format), "dense: gate and up");
        self.x.check(tokens, shape.columns);
        assert!(self.bias.is_none_or(|bias| bias.len() >= 2 * shape.rows), "dense: biases of gate and up");
        assert_eq!(out.count, shape.planes, "dense: planes of x and out");
        let plane = tokens.saturating_sub(1) * self.out_stride + shape.rows;
        let room = (out.count - 1) * out.stride + plane <= out.values.len();
        assert!(room && shape.rows <= self.out_stride && plane <= out.stride, "dense: planes of out");
        if tokens * shape.rows == 0 {
            return Ok(());
        }
        let plan = shape.plan(tokens, device.info().multiprocessors);
        self.workspace.check(plan.workspace);
        let ((gate, gate_scales), (up, up_scales)) = (self.gate.arguments(), self.up.arguments());
        let launch = begin(device, &plan, self.x).arg(gate).arg(up).arg(gate_scales).arg(up_scales);
        let launch = launch.arg(count(self.gate.cols)).arg(0u32);
        let launch = sizes(launch, &plan, &shape, tokens, self.workspace).arg(self.bias);
        let launch = launch.arg(out.values).arg(out.stride as u64).arg(count(self.out_stride));
        let launch = match self.activation {
            Activation::SiluGlu => launch.arg(0u32).arg(0f32).arg(0f32),
            Activation::ClampedSwiGlu { limit, alpha } => launch.arg(1u32).arg(limit).arg(alpha),
        };
        // SAFETY: the arguments of a pair; x, both weights, bias and out lie inside their slices, and the
        // workspace is as large as the plan says, as checked.
        unsafe { launch.run() }
    }
}

/// Where a head's rows and values are.
struct Place {
    first_row: usize,
    head_rows: usize,
    x_head: usize,
    out_head: usize,
}

fn begin<'d>(device: &'d Device, plan: &Plan, x: DenseInput<'_>) -> Launch<'d> {
    let launch = device.launch(plan.kernel, plan.grid, plan.threads, plan.shared_bytes).early();
    launch.arg(x.planes.values).arg(x.planes.stride as u64).arg(count(x.stride))
}

fn sizes<'d>(
    launch: Launch<'d>,
    plan: &Plan,
    shape: &DenseShape,
    tokens: usize,
    workspace: &DenseWorkspace,
) -> Launch<'d> {
    let launch = launch.arg(count(shape.rows)).arg(count(shape.columns)).arg(count(tokens));
    launch.arg(count(plan.piece)).arg(&workspace.sums).arg(&workspace.counters)
}

/// The arguments of a product up to its counters.
#[allow(clippy::too_many_arguments, reason = "a kernel's arguments, put together in one place")]
fn product<'d>(
    device: &'d Device,
    plan: &Plan,
    shape: &DenseShape,
    tokens: usize,
    x: DenseInput<'_>,
    weight: DenseWeight<'_>,
    place: &Place,
    workspace: &DenseWorkspace,
) -> Launch<'d> {
    let (values, scales) = weight.arguments();
    let launch = begin(device, plan, x).arg(count(place.x_head)).arg(values).arg(scales);
    let launch = launch.arg(count(weight.cols)).arg(count(place.first_row)).arg(count(place.head_rows));
    sizes(launch, plan, shape, tokens, workspace)
}
