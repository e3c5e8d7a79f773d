//! How weights come out of a register of sixteen rows.

use crate::format::{GROUP, Matrix, Values};
use crate::simd::dots::Dots;

/// Bytes of a row's scales that are transposed at a time.
pub(crate) const SCALES: usize = 64;
/// Scales of one row in that many bytes, at most.
pub(crate) const MAX_SCALES: usize = 64;

/// A format whose codes, less an offset, are whole numbers.
pub(crate) trait Code: Copy {
    /// Groups of 32 columns in 64 bytes of a row.
    const GROUPS: usize;
    /// What is taken off every code.
    const OFFSET: i32;
    /// Registers of words, and of bytes, that one dword register becomes.
    const WORDS: usize;
    const BYTES: usize;
    /// Whether codes may exceed 128.
    const WIDE: bool;
    /// Bytes of one scale.
    const SCALE: usize;

    /// Codes as words; only the first [`Code::WORDS`] count.
    fn words<D: Dots>(d: D, dwords: D::I) -> [D::I; 4];
    /// Codes as bytes; only the first [`Code::BYTES`] count.
    fn bytes<D: Dots>(d: D, dwords: D::I) -> [D::I; 2];
    /// The scales in one dword of sixteen rows, the lowest first; the first `4 / SCALE` count.
    fn scales<D: Dots>(d: D, dword: D::I) -> [D::F; 4];
}

/// Bytes of the codes and of the scales of a whole weight.
pub(crate) fn bytes<'a>(w: &Matrix<'a>) -> (&'a [u8], &'a [u8]) {
    match w.values {
        Values::Int4 { packed, scales } => (packed, scales),
        Values::Mxfp4 { blocks, scales } => (blocks, scales),
        Values::Q8 { codes, scales } => (codes, scales),
        _ => panic!("a weight of floats in an integer product"),
    }
}

const BYTES_PER_LINE: usize = crate::simd::dots::LINE;

/// Bytes of one group's codes.
pub(crate) const fn group_bytes<C: Code>() -> usize {
    BYTES_PER_LINE / C::GROUPS
}

#[inline(always)]
fn bf16_pair<D: Dots>(d: D, dword: D::I) -> [D::F; 4] {
    let low = d.as_f32(d.shl::<16>(dword));
    let high = d.as_f32(d.and(dword, d.splat(0xFFFF_0000)));
    [low, high, low, high]
}

/// Nibbles, each its value plus 8.
#[derive(Clone, Copy)]
pub(crate) struct Int4;

impl Code for Int4 {
    const GROUPS: usize = 4;
    const OFFSET: i32 = 8;
    const WORDS: usize = 4;
    const BYTES: usize = 2;
    const WIDE: bool = false;
    const SCALE: usize = 2;

    #[inline(always)]
    fn words<D: Dots>(d: D, v: D::I) -> [D::I; 4] {
        let mask = d.splat(0x000F_000F);
        [
            d.and(v, mask),
            d.and(d.shr_words::<4>(v), mask),
            d.and(d.shr_words::<8>(v), mask),
            d.shr_words::<12>(v),
        ]
    }
    #[inline(always)]
    fn bytes<D: Dots>(d: D, v: D::I) -> [D::I; 2] {
        let mask = d.splat(0x0F0F_0F0F);
        [d.and(v, mask), d.and(d.shr_words::<4>(v), mask)]
    }
    #[inline(always)]
    fn scales<D: Dots>(d: D, dword: D::I) -> [D::F; 4] {
        bf16_pair(d, dword)
    }
}

/// e2m1 nibbles. Twice their value is whole: looked up, plus 12; the scale is halved.
#[derive(Clone, Copy)]
pub(crate) struct Mxfp4;

impl Mxfp4 {
    const TABLE: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];
}

impl Code for Mxfp4 {
    const GROUPS: usize = 4;
    const OFFSET: i32 = 12;
    const WORDS: usize = 4;
    const BYTES: usize = 2;
    const WIDE: bool = false;
    const SCALE: usize = 1;

    #[inline(always)]
    fn words<D: Dots>(d: D, v: D::I) -> [D::I; 4] {
        let [even, odd] = Self::bytes(d, v);
        let mask = d.splat(0x00FF_00FF);
        [d.and(even, mask), d.and(odd, mask), d.shr_words::<8>(even), d.shr_words::<8>(odd)]
    }
    #[inline(always)]
    fn bytes<D: Dots>(d: D, v: D::I) -> [D::I; 2] {
        let [even, odd] = Int4::bytes(d, v);
        [d.look_up(&Self::TABLE, even), d.look_up(&Self::TABLE, odd)]
    }
    #[inline(always)]
    fn scales<D: Dots>(d: D, dword: D::I) -> [D::F; 4] {
        let (low, half) = (d.splat(0xFF), d.splat_f32(0.5));
        [
            d.mul(d.e8m0(d.and(dword, low)), half),
            d.mul(d.e8m0(d.and(d.shr::<8>(dword), low)), half),
            d.mul(d.e8m0(d.and(d.shr::<16>(dword), low)), half),
            d.mul(d.e8m0(d.shr::<24>(dword)), half),
        ]
    }
}

/// Bytes, each its value plus 128.
#[derive(Clone, Copy)]
pub(crate) struct Q8;

impl Code for Q8 {
    const GROUPS: usize = 2;
    const OFFSET: i32 = 128;
    const WORDS: usize = 2;
    const BYTES: usize = 1;
    const WIDE: bool = true;
    const SCALE: usize = 2;

    #[inline(always)]
    fn words<D: Dots>(d: D, v: D::I) -> [D::I; 4] {
        let (even, odd) = (d.and(v, d.splat(0x00FF_00FF)), d.shr_words::<8>(v));
        [even, odd, even, odd]
    }
    #[inline(always)]
    fn bytes<D: Dots>(_: D, v: D::I) -> [D::I; 2] {
        [v, v]
    }
    #[inline(always)]
    fn scales<D: Dots>(d: D, dword: D::I) -> [D::F; 4] {
        bf16_pair(d, dword)
    }
}

/// Columns that lie side by side in one dword of packed activations: word or byte j of dword i of a group is
/// column `order(..)[i * n + j]`, n being 2 words or 4 bytes.
pub(crate) const fn order(nibbles: bool, words: bool) -> [u8; GROUP] {
    let mut out = [0; GROUP];
    let mut i = 0;
    while i < GROUP {
        let column = match (nibbles, words) {
            // Dword d of the codes holds columns 8d ..; register s of it columns 8d + s and 8d + s + 4.
            (true, true) => i / 8 * 8 + i / 2 % 4 + i % 2 * 4,
            (true, false) => i / 8 * 8 + i / 4 % 2 + i % 4 * 2,
            // Dword d of the codes holds columns 4d ..; register s of it columns 4d + s and 4d + s + 2.
            (false, true) => i / 4 * 4 + i / 2 % 2 + i % 2 * 2,
            (false, false) => i,
        };
        out[i] = column as u8;
        i += 1;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_permutations() {
        for (nibbles, words) in [(true, true), (true, false), (false, true), (false, false)] {
            let mut order = order(nibbles, words);
            order.sort_unstable();
            assert!(order.iter().enumerate().all(|(i, &column)| i == usize::from(column)));
        }
    }
}
