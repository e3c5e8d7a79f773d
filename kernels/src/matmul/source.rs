//! Stored rows as chunks of 32 f32: the one place that knows how each format is laid out.

use crate::format::{FP8_BLOCK, GROUP, Matrix, Values};
use crate::simd::{LANES, Lanes};

/// The rows of a weight in one format.
pub(crate) trait Source: Copy {
    /// One row.
    type Row: Row;
    /// Row `index` of the view.
    fn row(&self, index: usize) -> Self::Row;
}

/// One row of a weight: whole chunks of 32 columns, then perhaps a tail.
pub(crate) trait Row: Copy {
    /// Columns `32 * index ..`, dequantised.
    fn chunk<L: Lanes>(&self, l: L, index: usize) -> L::V;
    /// The columns after the last whole chunk, then zeros. Only asked for where there are some.
    fn tail<L: Lanes>(&self, l: L) -> L::V;
    /// Where `count` whole chunks from `first` on are stored, or as many as there are, to fetch them early.
    #[inline(always)]
    fn bytes(&self, _first: usize, _count: usize) -> &[u8] {
        &[]
    }
}

/// `f(source)` for the source of a [`Matrix`].
macro_rules! with_source {
    ($matrix:expr, $source:ident => $body:expr) => {
        match $matrix.values {
            Values::F32(_) => {
                let $source = $crate::matmul::source::F32::of(&$matrix);
                $body
            }
            Values::F16(_) => {
                let $source = $crate::matmul::source::F16::of(&$matrix);
                $body
            }
            Values::Bf16(_) => {
                let $source = $crate::matmul::source::Bf16::of(&$matrix);
                $body
            }
            Values::Fp8 { .. } => {
                let $source = $crate::matmul::source::Fp8::of(&$matrix);
                $body
            }
            Values::Int4 { .. } => {
                let $source = $crate::matmul::source::Int4::of(&$matrix);
                $body
            }
            Values::Mxfp4 { .. } => {
                let $source = $crate::matmul::source::Mxfp4::of(&$matrix);
                $body
            }
            Values::Q8 { .. } => {
                let $source = $crate::matmul::source::Q8::of(&$matrix);
                $body
            }
        }
    };
}
pub(crate) use with_source;

/// `rows` rows of `row` bytes from byte row `first` on.
fn part(bytes: &[u8], first: usize, rows: usize, row: usize) -> &[u8] {
    &bytes[first * row..][..rows * row]
}

/// Zeroes the lanes from `len` on, so that a tail cannot bring in 0 * infinity.
#[inline(always)]
fn cut<L: Lanes>(l: L, v: L::V, len: usize) -> L::V {
    let mut lanes = [0.0; LANES];
    l.store(v, &mut lanes);
    lanes[len..].fill(0.0);
    l.load(&lanes)
}

/// A format of one code per value without scales: f32, f16 or bf16.
macro_rules! plain_source {
    ($name:ident, $row:ident, $bytes:literal, $lanes:ident) => {
        #[derive(Clone, Copy)]
        pub(crate) struct $name<'a> {
            bytes: &'a [u8],
            row: usize,
        }

        impl<'a> $name<'a> {
            pub(crate) fn of(w: &Matrix<'a>) -> Self {
                let Values::$name(bytes) = w.values else { unreachable!("the caller matched the format") };
                let row = w.cols * ($bytes / LANES);
                Self { bytes: part(bytes, w.first_row, w.rows, row), row }
            }
        }

        impl<'a> Source for $name<'a> {
            type Row = $row<'a>;
            #[inline(always)]
            fn row(&self, index: usize) -> $row<'a> {
                let (chunks, rest) = self.bytes[index * self.row..][..self.row].as_chunks();
                $row { chunks, rest }
            }
        }

        #[derive(Clone, Copy)]
        pub(crate) struct $row<'a> {
            chunks: &'a [[u8; $bytes]],
            rest: &'a [u8],
        }

        impl Row for $row<'_> {
            #[inline(always)]
            fn chunk<L: Lanes>(&self, l: L, index: usize) -> L::V {
                l.$lanes(&self.chunks[index])
            }
            #[inline(always)]
            fn tail<L: Lanes>(&self, l: L) -> L::V {
                let mut bytes = [0; $bytes];
                bytes[..self.rest.len()].copy_from_slice(self.rest);
                l.$lanes(&bytes)
            }
            #[inline(always)]
            fn bytes(&self, first: usize, count: usize) -> &[u8] {
                let end = self.chunks.len().min(first + count);
                self.chunks[first.min(end)..end].as_flattened()
            }
        }
    };
}

plain_source!(F32, F32Row, 128, f32);
plain_source!(F16, F16Row, 64, f16);
plain_source!(Bf16, Bf16Row, 64, bf16);

#[derive(Clone, Copy)]
pub(crate) struct Fp8<'a> {
    values: &'a [u8],
    scales: &'a [[u8; 4]],
    first_row: usize,
    cols: usize,
}

impl<'a> Fp8<'a> {
    pub(crate) fn of(w: &Matrix<'a>) -> Self {
        let Values::Fp8 { values, scales } = w.values else { unreachable!("the caller matched the format") };
        let values = part(values, w.first_row, w.rows, w.cols);
        Self { values, scales: scales.as_chunks().0, first_row: w.first_row, cols: w.cols }
    }
}

impl<'a> Source for Fp8<'a> {
    type Row = Fp8Row<'a>;
    #[inline(always)]
    fn row(&self, index: usize) -> Fp8Row<'a> {
        let (chunks, rest) = self.values[index * self.cols..][..self.cols].as_chunks();
        let blocks = self.cols.div_ceil(FP8_BLOCK);
        let scales = &self.scales[(self.first_row + index) / FP8_BLOCK * blocks..][..blocks];
        Fp8Row { chunks, rest, scales }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Fp8Row<'a> {
    chunks: &'a [[u8; 32]],
    rest: &'a [u8],
    scales: &'a [[u8; 4]],
}

impl Row for Fp8Row<'_> {
    #[inline(always)]
    fn chunk<L: Lanes>(&self, l: L, index: usize) -> L::V {
        let scale = f32::from_le_bytes(self.scales[index / (FP8_BLOCK / LANES)]);
        l.mul(l.e4m3(&self.chunks[index]), l.splat(scale))
    }
    #[inline(always)]
    fn tail<L: Lanes>(&self, l: L) -> L::V {
        let mut bytes = [0; 32];
        bytes[..self.rest.len()].copy_from_slice(self.rest);
        let scale = f32::from_le_bytes(self.scales[self.scales.len() - 1]);
        cut(l, l.mul(l.e4m3(&bytes), l.splat(scale)), self.rest.len())
    }
    #[inline(always)]
    fn bytes(&self, first: usize, count: usize) -> &[u8] {
        let end = self.chunks.len().min(first + count);
        self.chunks[first.min(end)..end].as_flattened()
    }
}

/// A format of codes with a scale per 32 columns: no row has a tail.
macro_rules! group_source {
    ($name:ident, $row:ident, $codes:ident, $bytes:literal, $scale_bytes:literal, $lanes:ident, $scale:path) => {
        #[derive(Clone, Copy)]
        pub(crate) struct $name<'a> {
            codes: &'a [[u8; $bytes]],
            scales: &'a [[u8; $scale_bytes]],
            groups: usize,
        }

        impl<'a> $name<'a> {
            pub(crate) fn of(w: &Matrix<'a>) -> Self {
                let Values::$name { $codes: codes, scales } = w.values else {
                    unreachable!("the caller matched the format")
                };
                assert!(w.cols.is_multiple_of(GROUP), "{} columns are not whole groups of {GROUP}", w.cols);
                let groups = w.cols / GROUP;
                Self {
                    codes: part(codes, w.first_row, w.rows, groups * $bytes).as_chunks().0,
                    scales: part(scales, w.first_row, w.rows, groups * $scale_bytes).as_chunks().0,
                    groups,
                }
            }
        }

        impl<'a> Source for $name<'a> {
            type Row = $row<'a>;
            #[inline(always)]
            fn row(&self, index: usize) -> $row<'a> {
                $row {
                    codes: &self.codes[index * self.groups..][..self.groups],
                    scales: &self.scales[index * self.groups..][..self.groups],
                }
            }
        }

        #[derive(Clone, Copy)]
        pub(crate) struct $row<'a> {
            codes: &'a [[u8; $bytes]],
            scales: &'a [[u8; $scale_bytes]],
        }

        impl Row for $row<'_> {
            #[inline(always)]
            fn chunk<L: Lanes>(&self, l: L, index: usize) -> L::V {
                l.mul(l.$lanes(&self.codes[index]), l.splat($scale(self.scales[index])))
            }
            #[inline(always)]
            fn tail<L: Lanes>(&self, _: L) -> L::V {
                unreachable!("rows are whole groups")
            }
            #[inline(always)]
            fn bytes(&self, first: usize, count: usize) -> &[u8] {
                let end = self.codes.len().min(first + count);
                self.codes[first.min(end)..end].as_flattened()
            }
        }
    };
}

group_source!(Int4, Int4Row, packed, 16, 2, int4, bf16_scale);
group_source!(Mxfp4, Mxfp4Row, blocks, 16, 1, e2m1, e8m0_scale);
group_source!(Q8, Q8Row, codes, 32, 2, q8, bf16_scale);

#[inline(always)]
fn bf16_scale(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// 2^(s - 127), of which s = 0 is the subnormal 2^-127; 255 is NaN.
#[inline(always)]
fn e8m0_scale([s]: [u8; 1]) -> f32 {
    match s {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(s) << 23),
    }
}
