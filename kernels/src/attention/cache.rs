//! The pages of one layer's cache.

use crate::rows::Rows;
use crate::simd::{LANES, Lanes};
use half::bf16;

/// Tokens per page.
pub const PAGE: usize = 64;

/// What one cached value is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheType {
    /// 4 bytes.
    F32,
    /// 2 bytes, rounded to nearest even.
    Bf16,
}

impl CacheType {
    /// Bytes per value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// The cache of one layer: rows of all blocks, in block order.
#[derive(Clone, Copy, Debug)]
pub enum CacheSlice<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bf16 bits.
    Bf16(&'a [u16]),
}

/// The cache of one layer, to write to.
#[derive(Debug)]
pub enum CacheMut<'a> {
    /// f32.
    F32(&'a mut [f32]),
    /// bf16 bits.
    Bf16(&'a mut [u16]),
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
    /// That the pages of `end` positions with rows of `columns` are there. (The last page need not be
    /// backed to its end.)
    pub(super) fn check(&self, end: usize, columns: usize) {
        assert!(columns <= self.row, "{columns} columns in cache rows of {}", self.row);
        let pages = end.div_ceil(PAGE);
        assert!(self.table.len() >= pages, "{end} positions in {} pages", self.table.len());
        let len = match self.data {
            CacheSlice::F32(data) => data.len(),
            CacheSlice::Bf16(data) => data.len(),
        };
        let highest = self.table[..pages].iter().max().map_or(0, |&block| block as usize);
        assert!(len >= highest * PAGE * self.row, "block {highest} of a cache of {len} values");
    }
}

/// Stores rows of x at slots (block * 64 + offset), rounding as the cache's type says.
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
    }
}

/// What a cache holds.
pub(super) trait Element: Copy {
    const ZERO: Self;
    fn lanes<L: Lanes>(l: L, x: &[Self; LANES]) -> L::V;
}

impl Element for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn lanes<L: Lanes>(l: L, x: &[Self; LANES]) -> L::V {
        l.load(x)
    }
}

/// bf16 bits.
impl Element for u16 {
    const ZERO: Self = 0;
    #[inline(always)]
    fn lanes<L: Lanes>(l: L, x: &[Self; LANES]) -> L::V {
        l.bf16_words(x)
    }
}

/// Columns of the cache rows of one page.
#[derive(Clone, Copy)]
pub(super) struct Page<'a, E> {
    data: &'a [E],
    stride: usize,
    pub(super) width: usize,
}

impl<'a, E: Element> Page<'a, E> {
    /// Those of a head in the page of `position`.
    #[inline(always)]
    pub(super) fn of(data: &'a [E], pages: &Pages<'_>, position: usize, head: usize, width: usize) -> Self {
        let row = pages.table[position / PAGE] as usize * PAGE;
        Self { data: &data[row * pages.row + head * width..], stride: pages.row, width }
    }

    #[inline(always)]
    pub(super) fn row(&self, offset: usize) -> &'a [E] {
        &self.data[offset * self.stride..][..self.width]
    }
}

/// The values after the last whole chunk, then zeros.
#[inline(always)]
pub(super) fn tail<L: Lanes, E: Element>(l: L, rest: &[E]) -> L::V {
    let mut lanes = [E::ZERO; LANES];
    lanes[..rest.len()].copy_from_slice(rest);
    E::lanes(l, &lanes)
}
