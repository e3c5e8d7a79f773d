//! Integer products: weights of 4 or 8 bits with activations of 16 or 8, all in groups of 32 columns.
//!
//! A group of activations is `scale * q` with whole q: 16 bits (`q` up to 32767, finer than bf16: the
//! greatest error is 2^-16 of the group's greatest value, where bf16 leaves 2^-9 of every value) or 8 bits
//! (up to 127, an option of its own). For each output, group by group, ascending from zero:
//!
//! `acc = fma(f32(sum of w * q), weight scale * activation scale, acc)`
//!
//! The sum is whole and exact, so no order of its terms, no number of rows, threads or registers and no
//! instruction set changes a bit.
//!
//! # Layout
//!
//! Weights stay as published. Sixteen rows at a time are transposed in registers (`simd::dots`),
//! a line of 64 bytes from each, so that a lane is a row and a group's scale costs one operation for
//! sixteen outputs. For few rows of x each code is used from the register; for more, two blocks of sixteen
//! rows are expanded into a scratch of 8 KiB that stays in the first cache, and all rows of x are multiplied
//! with it. Activations are packed once in the order in which the codes come out of the registers.

pub(crate) mod codes;
mod copy;
mod packed;
mod product;

pub use copy::to_q8;
pub use packed::{Activations, Precision};
pub(crate) use packed::{PANEL, PackedRows};
pub(crate) use product::Product;

use crate::format::{Matrix, Values};

/// Whether weights of this format can be multiplied in integers.
pub fn is_quantised(w: &Matrix<'_>) -> bool {
    matches!(w.values, Values::Int4 { .. } | Values::Mxfp4 { .. } | Values::Q8 { .. })
}
