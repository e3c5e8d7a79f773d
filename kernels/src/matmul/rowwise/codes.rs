//! Floats of 16 and 8 bits as products by rows take them.

use crate::format::{FP8_BLOCK, GROUP, Matrix, Values};
use crate::simd::dots::{Dots, LINE, ROWS, block, e4m3};

/// A stored form whose codes are floats.
pub(super) trait Code: Copy {
    /// Bytes of one value.
    const BYTES: usize;
    /// Groups of columns in a line.
    const GROUPS: usize = LINE / (GROUP * Self::BYTES);
    /// Columns in a dword.
    const COLUMNS: usize = 4 / Self::BYTES;

    /// The columns of a dword, of each pair the second first; [`Code::COLUMNS`] count.
    fn values<D: Dots>(d: D, dword: D::I) -> [D::F; 4];
    /// The columns of one group.
    fn widen<D: Dots>(d: D, codes: &[u8], out: &mut [f32; GROUP]);
    /// `acc` and a group's sum, times its scale if there is one.
    fn join<D: Dots>(d: D, acc: D::F, sum: D::F, scale: D::F) -> D::F;
}

#[derive(Clone, Copy)]
pub(super) struct Bf16;

impl Code for Bf16 {
    const BYTES: usize = 2;

    #[inline(always)]
    fn values<D: Dots>(d: D, dword: D::I) -> [D::F; 4] {
        let [second, first] = halves(d, dword);
        [second, first, second, first]
    }
    #[inline(always)]
    fn widen<D: Dots>(d: D, codes: &[u8], out: &mut [f32; GROUP]) {
        d.widen_bf16(codes.first_chunk().expect("a group"), out);
    }
    #[inline(always)]
    fn join<D: Dots>(d: D, acc: D::F, sum: D::F, _: D::F) -> D::F {
        d.add(acc, sum)
    }
}

/// e4m3, each exact in bf16; the scale of a block multiplies sums.
#[derive(Clone, Copy)]
pub(super) struct E4m3;

impl Code for E4m3 {
    const BYTES: usize = 1;

    #[inline(always)]
    fn values<D: Dots>(d: D, dword: D::I) -> [D::F; 4] {
        let (even, odd) = e4m3::as_bf16(d, dword);
        let ([third, first], [fourth, second]) = (halves(d, even), halves(d, odd));
        [second, first, fourth, third]
    }
    #[inline(always)]
    fn widen<D: Dots>(d: D, codes: &[u8], out: &mut [f32; GROUP]) {
        d.widen_e4m3(codes.first_chunk().expect("a group"), out);
    }
    #[inline(always)]
    fn join<D: Dots>(d: D, acc: D::F, sum: D::F, scale: D::F) -> D::F {
        d.fma(sum, scale, acc)
    }
}

/// Both words of a dword as f32, the upper one first.
#[inline(always)]
fn halves<D: Dots>(d: D, dword: D::I) -> [D::F; 2] {
    [d.as_f32(d.and(dword, d.splat(0xFFFF_0000))), d.as_f32(d.shl::<16>(dword))]
}

/// The weight, from its first row on.
#[derive(Clone, Copy)]
pub(super) struct CodeRows<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) rows: usize,
    /// Bytes of a row.
    pub(super) stride: usize,
    pub(super) groups: usize,
    /// Of blocks of 128 x 128; none for bf16.
    scales: &'a [[u8; 4]],
    /// Place of the first row in its weight.
    first_row: usize,
}

impl<'a> CodeRows<'a> {
    pub(super) fn new(w: &Matrix<'a>) -> Self {
        let Matrix { first_row, rows, cols, .. } = *w;
        let (bytes, scales, stride): (&[u8], &[u8], _) = match w.values {
            Values::Bf16(bytes) => (bytes, &[], 2 * cols),
            Values::Fp8 { values, scales } => (values, scales, cols),
            _ => panic!("a weight that has no rows of floats of few bits"),
        };
        assert!(bytes.len() >= (first_row + rows) * stride, "{rows} rows of {stride} bytes");
        if let Values::Fp8 { .. } = w.values {
            let blocks = (first_row + rows).div_ceil(FP8_BLOCK) * cols.div_ceil(FP8_BLOCK);
            assert!(scales.len() >= 4 * blocks, "scales of {blocks} blocks");
        }
        let bytes = &bytes[first_row * stride..];
        let groups = cols.div_ceil(GROUP);
        Self { bytes, rows, stride, groups, scales: scales.as_chunks().0, first_row }
    }

    /// The codes of one line of sixteen rows, from `group` on; zeros for what is not there.
    #[inline(always)]
    pub(super) fn line<D: Dots, C: Code>(&self, d: D, row: usize, group: usize) -> [D::I; 16] {
        let bytes = &self.bytes[row * self.stride..];
        let at = group * GROUP * C::BYTES;
        block::lines::<D, true>(d, bytes, ROWS.min(self.rows - row), self.stride, at)
    }

    /// Asks for one line of the first sixteen rows.
    #[inline(always)]
    pub(super) fn ask<D: Dots>(&self, d: D, at: usize) {
        if at < self.stride {
            for r in 0..ROWS {
                d.prefetch(self.bytes, r * self.stride + at);
            }
        }
    }

    /// The scale of one group of one row.
    #[inline(always)]
    pub(super) fn scale(&self, row: usize, group: usize) -> f32 {
        let across = self.groups.div_ceil(FP8_BLOCK / GROUP);
        let at = (self.first_row + row) / FP8_BLOCK * across + group / (FP8_BLOCK / GROUP);
        // (None for bf16.)
        self.scales.get(at).map_or(0.0, |bytes| f32::from_le_bytes(*bytes))
    }

    /// The scales of one group of sixteen rows.
    #[inline(always)]
    pub(super) fn scales<D: Dots>(&self, d: D, row: usize, group: usize) -> D::F {
        let last = ROWS.min(self.rows - row) - 1;
        if (self.first_row + row) / FP8_BLOCK == (self.first_row + row + last) / FP8_BLOCK {
            return d.splat_f32(self.scale(row, group));
        }
        let mut scales = [0; ROWS];
        for (r, scale) in scales.iter_mut().enumerate().take(last + 1) {
            *scale = self.scale(row + r, group).to_bits();
        }
        d.load_f32(&scales)
    }
}
