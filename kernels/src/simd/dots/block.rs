//! Blocks of sixteen weight rows on their way in, and sixteen outputs on their way out.

use super::{Dots, LINE, ROWS};
use crate::rows::RowsMut;

/// Lines that the others are brought from the second cache ahead.
const NEAR: usize = 2;
/// Parts of the rows to come that are asked for side by side: one stream does not reach the bandwidth of a core.
const PARTS: usize = 4;

/// What is asked for while a line of `ROWS * BLOCKS` rows is worked on: as many lines of the rows that follow them, into
/// the second cache, and their own next lines into the first.
pub(crate) struct Ahead<'a, const BLOCKS: usize> {
    /// From the first of the rows on, `stride` bytes each.
    pub(crate) codes: &'a [u8],
    pub(crate) stride: usize,
    pub(crate) at: usize,
}

impl<const BLOCKS: usize> Ahead<'_, BLOCKS> {
    /// Asks for one of `ROWS * BLOCKS` lines of each.
    #[inline(always)]
    pub(crate) fn ask<D: Dots>(&self, d: D, line: usize) {
        let rows = ROWS * BLOCKS / PARTS;
        let part = (PARTS + line % PARTS) * rows * self.stride;
        d.prefetch_second(self.codes, part + self.at * rows + line / PARTS * LINE);
        d.prefetch(self.codes, line * self.stride + self.at + NEAR * LINE);
    }
}

/// Dwords of 64 bytes of `rows` rows, at most sixteen, from byte `at` on; each row has `stride` bytes. Zeros for rows that
/// are not there; where a row ends before, zeros if `ZEROS`, else anything.
#[inline(always)]
pub(crate) fn lines<D: Dots, const ZEROS: bool>(
    d: D,
    bytes: &[u8],
    rows: usize,
    stride: usize,
    at: usize,
) -> [D::I; 16] {
    let in_place = if ZEROS { at + LINE <= stride } else { (ROWS - 1) * stride + at + LINE <= bytes.len() };
    if rows == ROWS && in_place {
        return d.transpose(bytes, stride, at);
    }
    d.transpose(&padded(bytes, rows, stride, at), LINE, 0)
}

#[inline(never)]
fn padded(bytes: &[u8], rows: usize, stride: usize, at: usize) -> [u8; ROWS * LINE] {
    let mut out = [0; ROWS * LINE];
    let len = LINE.min(stride - at);
    for (r, out) in out.chunks_exact_mut(LINE).enumerate().take(rows) {
        out[..len].copy_from_slice(&bytes[r * stride + at..][..len]);
    }
    out
}

/// Writes sums to row `t` of `out` from column `column` on, as far as there are columns, plus their biases.
#[inline(always)]
pub(crate) fn store<D: Dots>(
    d: D,
    out: &mut RowsMut<'_>,
    bias: Option<&[f32]>,
    (t, column): (usize, usize),
    sums: D::F,
) {
    let count = ROWS.min(out.width().saturating_sub(column));
    if count == 0 {
        return;
    }
    let out = &mut out.row(t)[column..][..count];
    let sums = d.store(sums);
    match out.first_chunk_mut::<ROWS>() {
        Some(out) => *out = sums,
        None => out.copy_from_slice(&sums[..count]),
    }
    if let Some(bias) = bias {
        out.iter_mut().zip(&bias[column..]).for_each(|(o, b)| *o += b);
    }
}

/// The first `N`. (A length known to the compiler saves it checks and keeps sums in registers.)
#[inline(always)]
pub(crate) fn first<V, const N: usize>(values: &mut [V]) -> &mut [V; N] {
    values.first_chunk_mut().expect("the caller counted")
}
