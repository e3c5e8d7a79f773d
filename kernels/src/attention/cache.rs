//! The pages of one layer's cache.

use super::fp8;
use crate::rows::Rows;
use half::bf16;

/// Tokens per page.
pub const PAGE: usize = 64;

/// What cached values are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheType {
    /// 4 bytes a value.
    F32,
    /// 2 bytes a value, rounded to nearest even.
    Bf16,
    /// e4m3 codes with an f32 scale per tile of up to [`FP8_TILE`](super::FP8_TILE) values: see [`RowShape`].
    Fp8,
}

impl CacheType {
    /// Bytes of one row: of K2's latents (512 and 64 values) 2304, 1152 or 656.
    pub fn row_bytes(self, shape: RowShape) -> usize {
        match self {
            Self::F32 => 4 * shape.values(),
            Self::Bf16 => 2 * shape.values(),
            Self::Fp8 => shape.codes() + 4 * shape.heads * shape.tiles() + 2 * shape.plain,
        }
    }
}

/// What a row of a cache consists of: `heads` times `width` values, then `plain` ones. For keys and values
/// those are the heads; for latents one head as wide as the latent, and plain the rotated part.
///
/// As [`CacheType::Fp8`] a row is bytes, without any alignment, in the order of FlashMLA's cache:
///
/// * `heads * width` e4m3fn codes;
/// * the scales, f32, little endian: `ceil(width / 128)` for each head, one for every 128 codes of the head,
///   the last of which may be for fewer;
/// * `plain` bf16 values, little endian.
///
/// A scale is 1/448 of the greatest magnitude of its tile (448 is the greatest e4m3fn value), but at least
/// 2^-126; a code is value / scale, rounded to nearest even; and what is read is code * scale, rounded to f32.
/// So a finite value comes back within 2^-4 of itself, or within 2^-10 of a scale where it is less than 2^-6 of
/// one. Every value that is read is finite: infinities are stored as the greatest finite value of their
/// tile, or, where it has none but zeros, as 448 * 2^-126, and NaN as 0; neither changes how others are
/// stored. (Who computes them meets them in the row's own results, which the cache has no part in.) Plain
/// values are stored as [`CacheType::Bf16`] stores them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowShape {
    /// Key or value heads; 1 for latents.
    pub heads: usize,
    /// Values of a head.
    pub width: usize,
    /// Values after all heads that stay bf16.
    pub plain: usize,
}

impl RowShape {
    /// Values per row.
    pub fn values(&self) -> usize {
        self.codes() + self.plain
    }

    /// Values of all heads.
    pub(super) fn codes(&self) -> usize {
        self.heads * self.width
    }

    /// Scales per head.
    pub(super) fn tiles(&self) -> usize {
        self.width.div_ceil(fp8::TILE)
    }
}

/// The cache of one layer: rows of all blocks, in block order.
#[derive(Clone, Copy, Debug)]
pub enum CacheSlice<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bf16 bits.
    Bf16(&'a [u16]),
    /// Codes and scales.
    Fp8 {
        /// `[rows, row_bytes]`.
        data: &'a [u8],
        /// Of every row.
        shape: RowShape,
    },
}

impl CacheSlice<'_> {
    /// Where it starts, and the bytes of a row of so many values.
    pub(super) fn bytes(&self, row: usize) -> (*const u8, usize) {
        match *self {
            Self::F32(data) => (data.as_ptr().cast(), 4 * row),
            Self::Bf16(data) => (data.as_ptr().cast(), 2 * row),
            Self::Fp8 { data, shape } => (data.as_ptr(), CacheType::Fp8.row_bytes(shape)),
        }
    }
}

/// The cache of one layer, to write to.
#[derive(Debug)]
pub enum CacheMut<'a> {
    /// f32.
    F32(&'a mut [f32]),
    /// bf16 bits.
    Bf16(&'a mut [u16]),
    /// Codes and scales.
    Fp8 {
        /// `[rows, row_bytes]`.
        data: &'a mut [u8],
        /// Of every row.
        shape: RowShape,
    },
}

/// The pages of one sequence: position p is row `table[p / 64] * 64 + p % 64`.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    /// The cache of the layer.
    pub data: CacheSlice<'a>,
    /// Values per row.
    pub row: usize,
    /// Block ids of the sequence.
    pub table: &'a [u32],
}

impl Pages<'_> {
    /// That the pages of `end` positions whose rows have `heads` of `width` columns are there. (The last page
    /// need not be backed to its end.)
    pub(super) fn check(&self, end: usize, heads: usize, width: usize) {
        let columns = heads * width;
        assert!(columns <= self.row, "{columns} columns in cache rows of {}", self.row);
        let pages = end.div_ceil(PAGE);
        assert!(self.table.len() >= pages, "{end} positions in {} pages", self.table.len());
        let (len, row) = match self.data {
            CacheSlice::F32(data) => (data.len(), self.row),
            CacheSlice::Bf16(data) => (data.len(), self.row),
            CacheSlice::Fp8 { data, shape } => {
                assert_eq!(shape.values(), self.row, "values in cache rows of {shape:?}");
                // A head may go on with plain values where no other head follows.
                let fits = if shape.heads == 1 { heads == 1 } else { width == shape.width };
                assert!(fits, "{heads} heads of {width} in cache rows of {shape:?}");
                (data.len(), CacheType::Fp8.row_bytes(shape))
            }
        };
        let highest = self.table[..pages].iter().max().map_or(0, |&block| block as usize);
        assert!(len >= highest * PAGE * row, "block {highest} of a cache of {} rows", len / row.max(1));
    }
}

/// Stores rows of x, each of `row` values, at slots (block * 64 + offset), rounding as the cache's type says.
///
/// # Panics
/// If a slot lies outside the cache, or there is not one slot per row.
pub fn write_rows(cache: CacheMut<'_>, row: usize, slots: &[u32], x: Rows<'_>) {
    assert_eq!((x.count(), x.width()), (slots.len(), row), "one cache row per slot");
    match cache {
        CacheMut::F32(data) => {
            for (t, &slot) in slots.iter().enumerate() {
                data[slot as usize * row..][..row].copy_from_slice(x.row(t));
            }
        }
        CacheMut::Bf16(data) => {
            for (t, &slot) in slots.iter().enumerate() {
                let out = &mut data[slot as usize * row..][..row];
                out.iter_mut().zip(x.row(t)).for_each(|(o, x)| *o = bf16::from_f32(*x).to_bits());
            }
        }
        CacheMut::Fp8 { data, shape } => {
            assert_eq!(shape.values(), row, "values in cache rows of {shape:?}");
            let bytes = CacheType::Fp8.row_bytes(shape);
            for (t, &slot) in slots.iter().enumerate() {
                fp8::write_row(shape, x.row(t), &mut data[slot as usize * bytes..][..bytes]);
            }
        }
    }
}
