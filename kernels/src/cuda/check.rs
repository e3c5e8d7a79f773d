//! What a check on a device needs beside the kernels that it checks: seeded values made where they are used, plain
//! products and attention in f64, comparisons, and loops that show what the device can do at most.
//! `kernels/cuda/check.cu`.

use half::bf16;

use super::buffer::Slice;
use super::device::Device;
use super::error::DeviceError;
use super::experts::ExpertFormat;
use super::image::Kernel;
use super::launch::Launch;
use super::rows::count;
use crate::attention::Mla;
use crate::format::{FP8_BLOCK, GROUP};

const FILL_F32: Kernel = Kernel::new("check", "fill_f32");
const FILL_BF16: Kernel = Kernel::new("check", "fill_bf16");
const FILL_CODES: Kernel = Kernel::new("check", "fill_codes");
const PLAIN_PRODUCT: Kernel = Kernel::new("check", "plain_product");
const PLAIN_LATENT_ATTENTION: Kernel = Kernel::new("check", "plain_latent_attention");
const COMPARE: Kernel = Kernel::new("check", "compare_f64");
const COUNT_DIFFERENCES: Kernel = Kernel::new("check", "count_differences");
const COPY: Kernel = Kernel::new("check", "copy_vectors");
const READ: Kernel = Kernel::new("check", "read_vectors");
const MULTIPLY: Kernel = Kernel::new("check", "multiply_forever");

/// As in check.cu.
const THREADS: u32 = 256;
const WARPS: u64 = THREADS as u64 / 32;
/// Operations of a round of a warp: eight products of 16 x 8 x 16.
const ROUND_OPERATIONS: u64 = 8 * 2 * 16 * 8 * 16;
/// Values of a vector of 16 bytes.
const VECTOR: usize = 4;

/// A launch over `items` of them, in a loop where they are more than the device holds threads.
fn over(device: &Device, kernel: Kernel, items: usize) -> Result<Launch<'_>, DeviceError> {
    let most = device.residency(kernel, THREADS, 0)?.blocks.max(1);
    let blocks = items.div_ceil(THREADS as usize).clamp(1, most as usize);
    Ok(device.launch(kernel, count(blocks), THREADS, 0))
}

/// Values from `-scale` to `scale`, the same for the same seed.
pub fn fill_f32(device: &Device, out: Slice<'_, f32>, seed: u64, scale: f32) -> Result<(), DeviceError> {
    let launch = over(device, FILL_F32, out.len())?.arg(out).arg(out.len() as u64).arg(seed).arg(scale);
    // SAFETY: the arguments of fill_f32; it writes as many values as there are.
    unsafe { launch.run() }
}

/// Values from `center - scale` to `center + scale`, rounded to bf16.
pub fn fill_bf16(
    device: &Device,
    out: Slice<'_, bf16>,
    seed: u64,
    (center, scale): (f32, f32),
) -> Result<(), DeviceError> {
    let launch = over(device, FILL_BF16, out.len())?.arg(out).arg(out.len() as u64);
    // SAFETY: the arguments of fill_bf16; it writes as many values as there are.
    unsafe { launch.arg(seed).arg(center).arg(scale).run() }
}

/// Codes of four or eight bits: any, but with `e4m3` none that is NaN.
pub fn fill_codes(device: &Device, out: Slice<'_, u8>, seed: u64, e4m3: bool) -> Result<(), DeviceError> {
    let launch = over(device, FILL_CODES, out.len())?.arg(out).arg(out.len() as u64);
    // SAFETY: the arguments of fill_codes; it writes as many bytes as there are.
    unsafe { launch.arg(seed).arg(u32::from(e4m3)).run() }
}

/// `x` times some rows of a weight, in f64, and the sums of the terms' magnitudes, which errors are measured by.
pub struct PlainProduct<'a> {
    /// `[tokens, columns]`.
    pub x: Slice<'a, f32>,
    /// Codes of a weight `[_, columns]`.
    pub codes: Slice<'a, u8>,
    /// Its scales; of bf16 there are none.
    pub scales: Option<Slice<'a, u8>>,
    /// How it is stored.
    pub format: ExpertFormat,
    /// The first of its rows.
    pub first_row: usize,
    /// How many of them.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Tokens.
    pub tokens: usize,
    /// `[tokens, rows]`.
    pub out: Slice<'a, f64>,
    /// `[tokens, rows]`.
    pub magnitudes: Slice<'a, f64>,
}

impl PlainProduct<'_> {
    /// # Panics
    /// If a shape is wrong.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let outputs = self.tokens * self.rows;
        let (rows, columns) = (self.first_row + self.rows, self.columns);
        let blocks = rows.div_ceil(FP8_BLOCK) * columns.div_ceil(FP8_BLOCK);
        let (codes, scales) = match self.format {
            ExpertFormat::Bf16 => (2 * rows * columns, 0),
            ExpertFormat::Fp8 => (rows * columns, 4 * blocks),
            ExpertFormat::Int4 => (rows * columns / 2, rows * columns / GROUP * 2),
            ExpertFormat::Mxfp4 => (rows * columns / 2, rows * columns / GROUP),
        };
        assert!(self.codes.len() >= codes, "plain product: {codes} bytes of {}", self.codes.len());
        assert!(
            self.scales.map_or(0, |scales| scales.len()) >= scales,
            "plain product: {scales} bytes of scales"
        );
        assert!(self.x.len() >= self.tokens * self.columns, "plain product: x");
        assert!(self.out.len() >= outputs && self.magnitudes.len() >= outputs, "plain product: room");
        if outputs == 0 {
            return Ok(());
        }
        let format = match self.format {
            ExpertFormat::Bf16 => 0u32,
            ExpertFormat::Fp8 => 1,
            ExpertFormat::Int4 => 2,
            ExpertFormat::Mxfp4 => 3,
        };
        let launch = device.launch(PLAIN_PRODUCT, count(outputs.div_ceil(WARPS as usize)), THREADS, 0);
        let launch = launch.arg(self.x).arg(self.codes).arg(self.scales).arg(format);
        let launch = launch.arg(count(self.first_row)).arg(count(self.rows)).arg(count(self.columns));
        // SAFETY: the arguments of plain_product; everything has the size that was checked.
        unsafe { launch.arg(count(self.tokens)).arg(self.out).arg(self.magnitudes).run() }
    }
}

/// Latent attention of one row over bf16 rows that lie in order, in f64.
pub struct PlainLatentAttention<'a> {
    /// `[heads, latent + rope]`.
    pub query: Slice<'a, f32>,
    /// `[length, latent + rope]`.
    pub rows: Slice<'a, bf16>,
    /// Rows that are seen.
    pub length: usize,
    /// Heads, widths and scale.
    pub shape: Mla,
    /// `[heads, length]` to work in.
    pub scores: Slice<'a, f64>,
    /// `[heads, latent]`.
    pub out: Slice<'a, f64>,
}

impl PlainLatentAttention<'_> {
    /// # Panics
    /// If a shape is wrong.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let Mla { heads, latent, rope, scale } = self.shape;
        let (length, width) = (self.length, latent + rope);
        assert!(self.query.len() >= heads * width && self.rows.len() >= length * width, "plain attention");
        assert!(self.scores.len() >= heads * length && self.out.len() >= heads * latent, "plain attention");
        let launch = device.launch(PLAIN_LATENT_ATTENTION, count(heads), THREADS, 0);
        let launch = launch.arg(self.query).arg(self.rows).arg(count(length)).arg(count(latent));
        // SAFETY: the arguments of plain_latent_attention; everything has the size that was checked.
        unsafe { launch.arg(count(rope)).arg(scale).arg(self.scores).arg(self.out).run() }
    }
}

/// The greatest of `|got - want| / magnitude`, where none is given or it is 0 of `|got - want|`; infinite if anything
/// is NaN. `worst` is a value to work in.
///
/// # Panics
/// If there are not as many of each.
pub fn worst_error(
    device: &Device,
    got: Slice<'_, f32>,
    want: Slice<'_, f64>,
    magnitudes: Option<Slice<'_, f64>>,
    worst: Slice<'_, u32>,
) -> Result<f32, DeviceError> {
    assert!(got.len() == want.len() && magnitudes.is_none_or(|m| m.len() == got.len()), "comparison");
    worst.zero()?;
    let launch = over(device, COMPARE, got.len())?.arg(got).arg(want).arg(magnitudes);
    // SAFETY: the arguments of compare_f64; there are as many of each, and `worst` holds one value or more.
    unsafe { launch.arg(got.len() as u64).arg(worst.slice(..1)).run()? };
    Ok(f32::from_bits(worst.slice(..1).read()?[0]))
}

/// How many words differ. `different` is a value to work in.
///
/// # Panics
/// If there are not as many of both.
pub fn count_differences(
    device: &Device,
    a: Slice<'_, u32>,
    b: Slice<'_, u32>,
    different: Slice<'_, u32>,
) -> Result<u32, DeviceError> {
    assert_eq!(a.len(), b.len(), "comparison");
    different.zero()?;
    let launch = over(device, COUNT_DIFFERENCES, a.len())?.arg(a).arg(b).arg(a.len() as u64);
    // SAFETY: the arguments of count_differences; both have as many words, and `different` holds one or more.
    unsafe { launch.arg(different.slice(..1)).run()? };
    Ok(different.slice(..1).read()?[0])
}

/// Copies by reading and writing vectors.
///
/// # Panics
/// If sizes differ or are no multiple of 16 bytes.
pub fn copy_vectors(device: &Device, from: Slice<'_, u32>, to: Slice<'_, u32>) -> Result<(), DeviceError> {
    assert!(from.len() == to.len() && from.len().is_multiple_of(VECTOR), "copy of vectors");
    assert!(from.address().is_multiple_of(16) && to.address().is_multiple_of(16), "copy of vectors");
    let launch = over(device, COPY, from.len() / VECTOR)?.arg(from).arg(to);
    // SAFETY: the arguments of copy_vectors; both sides hold as many vectors, aligned as checked.
    unsafe { launch.arg((from.len() / VECTOR) as u64).run() }
}

/// Reads everything once. `never` is written only if all of it is one odd pattern.
///
/// # Panics
/// If the size is no multiple of 16 bytes.
pub fn read_vectors(device: &Device, from: Slice<'_, u32>, never: Slice<'_, u32>) -> Result<(), DeviceError> {
    assert!(from.len().is_multiple_of(VECTOR) && !never.is_empty(), "read of vectors");
    assert!(from.address().is_multiple_of(16), "read of vectors");
    let launch = over(device, READ, from.len() / VECTOR)?.arg(from).arg((from.len() / VECTOR) as u64);
    // SAFETY: the arguments of read_vectors; as many vectors are there, aligned as checked.
    unsafe { launch.arg(never).run() }
}

/// Multiplies fragments of bf16 in registers on the whole device, and returns how many operations that will be.
pub fn multiply_forever(device: &Device, rounds: u32, out: Slice<'_, f32>) -> Result<u64, DeviceError> {
    assert!(!out.is_empty(), "room for a result that never comes");
    let blocks = device.residency(MULTIPLY, THREADS, 0)?.blocks.max(1);
    let launch = device.launch(MULTIPLY, blocks, THREADS, 0).arg(rounds).arg(out);
    // SAFETY: the arguments of multiply_forever, which writes one value at most.
    unsafe { launch.run()? };
    Ok(u64::from(blocks) * WARPS * u64::from(rounds) * ROUND_OPERATIONS)
}
