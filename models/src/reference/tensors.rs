//! Weights as f32 candle tensors, and the few operations that every block needs.
//!
//! The dequantiser is written from the formats' descriptions alone and shares nothing with the
//! `kernels` crate but the borrowed bytes: two independent readings that must agree.

use std::collections::HashMap;

use candle_core::{D, Device, Tensor};
use half::{bf16, f16};
use kernels::format::{FP8_BLOCK, GROUP, Matrix, Values};
use rayon::prelude::*;

use crate::error::Result;
use crate::weights::{LinearWeights, Weight};

/// Dequantised matrices kept for the next forward pass; makes small models quick and no more.
const KEPT_BYTES: usize = 256 << 20;
/// Largest piece of any other matrix that is dequantised at a time.
const PIECE_BYTES: usize = 128 << 20;

/// A tensor on the host.
pub(super) fn tensor(values: &[f32], shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Ok(Tensor::from_slice(values, shape, &Device::Cpu)?)
}

/// All values in row-major order.
pub(super) fn values(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

/// `x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension.
pub(super) fn rms_norm(x: &Tensor, weight: &[f32], epsilon: f32) -> Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = x.broadcast_div(&(mean_square + f64::from(epsilon))?.sqrt()?)?;
    Ok(normed.broadcast_mul(&tensor(weight, weight.len())?)?)
}

/// `y + bias` over the last dimension.
pub(super) fn add_bias(y: Tensor, bias: Option<&[f32]>) -> Result<Tensor> {
    match bias {
        Some(bias) => Ok(y.broadcast_add(&tensor(bias, bias.len())?)?),
        None => Ok(y),
    }
}

/// Dequantises matrices at use and keeps the first [`KEPT_BYTES`] of them.
pub(super) struct Tensors {
    /// By address, first row and rows of the stored bytes, which outlive the runner.
    kept: HashMap<(usize, usize, usize), Tensor>,
    room_bytes: usize,
}

impl Tensors {
    pub(super) fn new() -> Self {
        Self { kept: HashMap::new(), room_bytes: KEPT_BYTES }
    }

    /// `x W^T + b`: `x` is `[n, in]`, the result `[n, out]`.
    pub(super) fn linear(&mut self, x: &Tensor, linear: &LinearWeights) -> Result<Tensor> {
        add_bias(self.product(x, &linear.weight)?, linear.bias.as_deref())
    }

    /// `x W^T` for a weight stored `[out, in]`: `x` is `[n, in]`, the result `[n, out]`.
    ///
    /// A weight that is not kept is dequantised in pieces of whole rows.
    pub(super) fn product(&mut self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        let matrix = weight.view();
        if let Some(whole) = self.kept(&matrix)? {
            return Ok(x.matmul(&whole.t()?)?);
        }
        let step = piece_rows(&matrix);
        let mut parts = Vec::new();
        for first in (0..matrix.rows).step_by(step) {
            let piece = dequantise(&matrix.slice(first, step.min(matrix.rows - first)))?;
            parts.push(x.matmul(&piece.t()?)?);
        }
        Ok(Tensor::cat(&parts, 1)?)
    }

    /// `x W` for a weight stored `[in, out]`: `x` is `[n, in]`, the result `[n, out]`.
    pub(super) fn product_transposed(&mut self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        let matrix = weight.view();
        match self.kept(&matrix)? {
            Some(whole) => Ok(x.matmul(&whole)?),
            None => Ok(x.matmul(&dequantise(&matrix)?)?),
        }
    }

    /// The whole matrix `[rows, cols]` if it is kept or there is room to keep it.
    fn kept(&mut self, matrix: &Matrix<'_>) -> Result<Option<Tensor>> {
        let key = (address(&matrix.values), matrix.first_row, matrix.rows);
        if let Some(tensor) = self.kept.get(&key) {
            return Ok(Some(tensor.clone()));
        }
        let bytes = 4 * matrix.rows * matrix.cols;
        if bytes > self.room_bytes {
            return Ok(None);
        }
        self.room_bytes -= bytes;
        let whole = dequantise(matrix)?;
        self.kept.insert(key, whole.clone());
        Ok(Some(whole))
    }
}

/// Rows of a piece of at most [`PIECE_BYTES`].
fn piece_rows(matrix: &Matrix<'_>) -> usize {
    (PIECE_BYTES / (4 * matrix.cols)).max(1)
}

fn address(values: &Values<'_>) -> usize {
    let bytes = match values {
        Values::F32(bytes) | Values::F16(bytes) | Values::Bf16(bytes) => bytes,
        Values::Fp8 { values, .. } => values,
        Values::Int4 { packed, .. } => packed,
        Values::Mxfp4 { blocks, .. } => blocks,
        Values::Q8 { codes, .. } => codes,
    };
    bytes.as_ptr() as usize
}

/// Rows `ids` of a weight `[rows, cols]`, as `[ids, cols]`.
pub(super) fn rows(weight: &Weight, ids: &[u32]) -> Result<Tensor> {
    let matrix = weight.view();
    let mut out = vec![0.0; ids.len() * matrix.cols];
    for (&id, out) in ids.iter().zip(out.chunks_exact_mut(matrix.cols)) {
        dequantise_row(&matrix, id as usize, out);
    }
    Ok(Tensor::from_vec(out, (ids.len(), matrix.cols), &Device::Cpu)?)
}

/// The matrix `[rows, cols]` in f32.
fn dequantise(matrix: &Matrix<'_>) -> Result<Tensor> {
    let mut out = vec![0.0; matrix.rows * matrix.cols];
    out.par_chunks_exact_mut(matrix.cols).enumerate().for_each(|(row, out)| dequantise_row(matrix, row, out));
    Ok(Tensor::from_vec(out, (matrix.rows, matrix.cols), &Device::Cpu)?)
}

/// One row in f32, exactly as its format defines the values.
fn dequantise_row(matrix: &Matrix<'_>, row: usize, out: &mut [f32]) {
    let cols = matrix.cols;
    let row = matrix.first_row + row;
    let start = row * cols;
    match matrix.values {
        Values::F32(bytes) => {
            let stored = bytes[4 * start..][..4 * cols].as_chunks().0;
            out.iter_mut().zip(stored).for_each(|(out, &b)| *out = f32::from_le_bytes(b));
        }
        Values::F16(bytes) => {
            let stored = bytes[2 * start..][..2 * cols].as_chunks().0;
            out.iter_mut().zip(stored).for_each(|(out, &b)| *out = f16::from_le_bytes(b).to_f32());
        }
        Values::Bf16(bytes) => {
            let stored = bytes[2 * start..][..2 * cols].as_chunks().0;
            out.iter_mut().zip(stored).for_each(|(out, &b)| *out = bf16::from_le_bytes(b).to_f32());
        }
        Values::Fp8 { values, scales } => {
            let scales = scales.as_chunks().0;
            let first_scale = row / FP8_BLOCK * cols.div_ceil(FP8_BLOCK);
            for (col, (out, &code)) in out.iter_mut().zip(&values[start..][..cols]).enumerate() {
                let scale = f32::from_le_bytes(scales[first_scale + col / FP8_BLOCK]);
                *out = E4M3[usize::from(code)] * scale;
            }
        }
        Values::Int4 { packed, scales } => {
            let scales = scales.as_chunks().0;
            for (col, out) in out.iter_mut().enumerate() {
                let scale = bf16::from_le_bytes(scales[(start + col) / GROUP]).to_f32();
                *out = (f32::from(nibble(packed, start + col)) - 8.0) * scale;
            }
        }
        Values::Q8 { codes, scales } => {
            let scales = scales.as_chunks().0;
            for (col, out) in out.iter_mut().enumerate() {
                let scale = bf16::from_le_bytes(scales[(start + col) / GROUP]).to_f32();
                *out = (f32::from(codes[start + col]) - 128.0) * scale;
            }
        }
        Values::Mxfp4 { blocks, scales } => {
            for (col, out) in out.iter_mut().enumerate() {
                let scale = power_of_two(scales[(start + col) / GROUP]);
                *out = E2M1[usize::from(nibble(blocks, start + col))] * scale;
            }
        }
    }
}

/// Value `index` of a row-major matrix of nibbles: the low one of a byte is the even column.
fn nibble(packed: &[u8], index: usize) -> u8 {
    packed[index / 2] >> (4 * (index % 2)) & 15
}

/// e8m0: `2^(code - 127)`, 255 = NaN.
fn power_of_two(code: u8) -> f32 {
    match code {
        0 => f32::MIN_POSITIVE / 2.0,
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// e2m1: sign, two exponent bits, one mantissa bit.
const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// e4m3fn by code.
const E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = e4m3(code as u8);
        code += 1;
    }
    table
};

/// Sign, four exponent bits (bias 7), three mantissa bits; no infinity, one NaN per sign.
const fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3 & 15) as u32, (code & 7) as f32);
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        // 2^(exponent - 7) has the biased f32 exponent `exponent - 7 + 127`.
        _ => (1.0 + mantissa / 8.0) * f32::from_bits((exponent + 120) << 23),
    };
    if code >> 7 == 1 { -magnitude } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dequantised(values: Values<'_>, rows: usize, cols: usize) -> Vec<f32> {
        super::values(&dequantise(&Matrix::new(values, rows, cols)).unwrap()).unwrap()
    }

    #[test]
    fn every_fp8_code_has_its_value() {
        let codes: Vec<u8> = (0..=255).collect();
        let scales: Vec<u8> = [2f32, 0.5].iter().flat_map(|s| s.to_le_bytes()).collect();
        let got = dequantised(Values::Fp8 { values: &codes, scales: &scales }, 1, 256);
        for (code, got) in got.into_iter().enumerate() {
            let (sign, exponent, mantissa) = (code >> 7, (code >> 3 & 15) as i32, (code & 7) as f64);
            let scale = if code < 128 { 2.0 } else { 0.5 };
            let value = if exponent == 0 {
                mantissa * 2f64.powi(-9)
            } else {
                (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7)
            };
            let want = (if sign == 1 { -value } else { value }) * scale;
            if code & 127 == 127 {
                assert!(got.is_nan(), "code {code}: {got}");
            } else {
                assert_eq!(f64::from(got), want, "code {code}");
            }
        }
        assert_eq!((E4M3[0x7e], E4M3[1], E4M3[0x38]), (448.0, 0.001953125, 1.0));
    }

    /// 130 x 200 has partial blocks on both edges; a slice of its rows keeps the rows' own scales.
    #[test]
    fn fp8_blocks_may_be_partial() {
        let codes = [0x38; 130 * 200];
        let scales: Vec<u8> = [1f32, 2.0, 3.0, 4.0].iter().flat_map(|s| s.to_le_bytes()).collect();
        let matrix = Matrix::new(Values::Fp8 { values: &codes, scales: &scales }, 130, 200);
        let got = values(&dequantise(&matrix).unwrap()).unwrap();
        for (row, col, want) in [(0, 127, 1.0), (127, 128, 2.0), (128, 0, 3.0), (129, 199, 4.0)] {
            assert_eq!(got[row * 200 + col], want, "[{row}, {col}]");
        }
        let last = values(&dequantise(&matrix.slice(127, 3)).unwrap()).unwrap();
        assert_eq!(last, got[127 * 200..]);
    }

    #[test]
    fn int4_is_offset_by_eight_and_low_nibble_first() {
        // Two rows of 64: byte j holds columns 2j and 2j + 1.
        let packed: Vec<u8> = (0..64).map(|j: u8| (2 * j % 16) | (((2 * j + 1) % 16) << 4)).collect();
        let scale = [1.0, 0.5, -2.0, 3.0];
        let scales: Vec<u8> = scale.iter().flat_map(|&s| bf16::from_f32(s).to_le_bytes()).collect();
        let got = dequantised(Values::Int4 { packed: &packed, scales: &scales }, 2, 64);
        for (at, got) in got.into_iter().enumerate() {
            assert_eq!(got, (at % 16) as f32 * scale[at / 32] - 8.0 * scale[at / 32], "value {at}");
        }
    }

    #[test]
    fn mxfp4_takes_every_code_and_scale() {
        let blocks: Vec<u8> = (0..16).map(|j: u8| (2 * j % 16) | (((2 * j + 1) % 16) << 4)).collect();
        for scale in 0..=255u8 {
            let got = dequantised(Values::Mxfp4 { blocks: &blocks, scales: &[scale] }, 1, 32);
            for (at, got) in got.into_iter().enumerate() {
                let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][at % 8];
                let sign = if at % 16 < 8 { 1.0 } else { -1.0 };
                let want = (sign * magnitude * 2f64.powi(i32::from(scale) - 127)) as f32;
                assert!(
                    got == want || scale == 255 && got.is_nan(),
                    "scale {scale} code {}: {got} {want}",
                    at % 16
                );
            }
        }
    }

    #[test]
    fn a_matrix_in_pieces_and_plain_halves() {
        let halves: Vec<u8> = (0..6).flat_map(|v| f16::from_f32(v as f32 - 2.5).to_le_bytes()).collect();
        assert_eq!(dequantised(Values::F16(&halves), 2, 3), [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]);
        let upper: Vec<u8> = (0..4).flat_map(|v| bf16::from_f32(v as f32).to_le_bytes()).collect();
        let second = Matrix { first_row: 1, ..Matrix::new(Values::Bf16(&upper), 1, 2) };
        assert_eq!(values(&dequantise(&second).unwrap()).unwrap(), [2.0, 3.0]);
        assert_eq!(piece_rows(&Matrix::new(Values::F32(&[]), 163_840, 7168)), 4681);
    }
}
