//! Memory that stands for weights in any format, and activations.

use kernels::format::{FP8_BLOCK, GROUP};
use kernels::{Matrix, Values};
use rayon::prelude::*;

/// The formats of weights.
pub const FORMATS: [Format; 7] =
    [Format::F32, Format::F16, Format::Bf16, Format::Fp8, Format::Int4, Format::Mxfp4, Format::Q8];

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    F32,
    F16,
    Bf16,
    Fp8,
    Int4,
    Mxfp4,
    Q8,
}

impl Format {
    /// Whether it can be multiplied in integers.
    pub fn is_quantised(self) -> bool {
        matches!(self, Self::Int4 | Self::Mxfp4 | Self::Q8)
    }

    /// For names of rows.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int4 => "int4",
            Self::Mxfp4 => "mxfp4",
            Self::Q8 => "q8",
        }
    }
}

/// Bytes that are sound values in every format.
pub struct Stored {
    values: Vec<u8>,
    /// Powers of two near one, for MXFP4.
    exponents: Vec<u8>,
}

impl Stored {
    /// So many bytes, first touched by all threads.
    pub fn new(bytes: usize) -> Self {
        // The upper byte of every second word is that of a value near 1 in f16 and below in bf16 and f32:
        // subnormal weights would be slow, and are rare. No byte is a NaN of e4m3.
        let byte =
            |i: usize| if i % 2 == 1 { 0x3c } else { (i.wrapping_mul(2_654_435_761) >> 13) as u8 & 0xbf };
        let values = (0..bytes).into_par_iter().map(byte).collect();
        Self { values, exponents: vec![0x7a; bytes / 16] }
    }

    /// Part `copy` of so many bytes; parts come again after the memory is used up.
    fn part(&self, bytes: usize, copy: usize) -> &[u8] {
        let parts = self.values.len() / bytes.next_multiple_of(64);
        assert!(parts > 0, "{bytes} bytes of {}", self.values.len());
        &self.values[copy % parts * bytes.next_multiple_of(64)..][..bytes]
    }

    /// Matrix `copy` of this shape.
    pub fn matrix(&self, format: Format, (rows, cols): (usize, usize), copy: usize) -> Matrix<'_> {
        let count = rows * cols;
        let values = match format {
            Format::F32 => Values::F32(self.part(4 * count, copy)),
            Format::F16 => Values::F16(self.part(2 * count, copy)),
            Format::Bf16 => Values::Bf16(self.part(2 * count, copy)),
            Format::Fp8 => {
                let blocks = rows.div_ceil(FP8_BLOCK) * cols.div_ceil(FP8_BLOCK);
                Values::Fp8 { values: self.part(count, copy), scales: self.part(4 * blocks, copy) }
            }
            Format::Int4 => Values::Int4 {
                packed: self.part(count / 2, copy),
                scales: self.part(2 * count / GROUP, copy + 7),
            },
            Format::Q8 => {
                Values::Q8 { codes: self.part(count, copy), scales: self.part(2 * count / GROUP, copy + 7) }
            }
            Format::Mxfp4 => {
                Values::Mxfp4 { blocks: self.part(count / 2, copy), scales: &self.exponents[..count / GROUP] }
            }
        };
        Matrix::new(values, rows, cols)
    }
}

/// Activations between -0.5 and 0.5.
pub fn activations(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8 as f32 / 256.0 - 0.5).collect()
}

/// Cached rows in bf16: values near 0.01.
pub fn cached(count: usize) -> Vec<u16> {
    (0..count)
        .into_par_iter()
        .map(|i| 0x3c00 | ((i.wrapping_mul(2_654_435_761) >> 9) & 0x80ff) as u16)
        .collect()
}
