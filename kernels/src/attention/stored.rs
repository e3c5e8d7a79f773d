//! How columns of cached rows become lanes.

use super::cache::{PAGE, Pages, RowShape};
use super::fp8::{self, TILE};
use crate::simd::{LANES, Lanes};

/// The rows of a cache, by what they are stored as.
pub(super) trait Stored: Copy {
    /// Some columns of a row.
    type Row: Row;

    /// Columns `head * width ..` of row `index`, `width` of them.
    fn row(self, index: usize, head: usize, width: usize) -> Self::Row;
}

/// Columns of a cached row, in chunks of 32.
pub(super) trait Row: Copy {
    /// A chunk of columns that are all there.
    fn whole<L: Lanes>(self, l: L, chunk: usize) -> L::V;
    /// The columns from the chunk's first on, less than a chunk of them, then zeros.
    fn rest<L: Lanes>(self, l: L, chunk: usize) -> L::V;
}

/// What rows of plain values hold.
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

/// Rows of `row` values that stand for themselves.
#[derive(Clone, Copy)]
pub(super) struct Plain<'a, E> {
    pub(super) data: &'a [E],
    pub(super) row: usize,
}

impl<'a, E: Element> Stored for Plain<'a, E> {
    type Row = &'a [E];

    #[inline(always)]
    fn row(self, index: usize, head: usize, width: usize) -> &'a [E] {
        &self.data[index * self.row + head * width..][..width]
    }
}

impl<E: Element> Row for &[E] {
    #[inline(always)]
    fn whole<L: Lanes>(self, l: L, chunk: usize) -> L::V {
        E::lanes(l, self[chunk * LANES..].first_chunk().expect("a whole chunk"))
    }

    #[inline(always)]
    fn rest<L: Lanes>(self, l: L, chunk: usize) -> L::V {
        let rest = &self[chunk * LANES..];
        let mut lanes = [E::ZERO; LANES];
        lanes[..rest.len()].copy_from_slice(rest);
        E::lanes(l, &lanes)
    }
}

/// Rows of codes with scales.
#[derive(Clone, Copy)]
pub(super) struct Scaled<'a> {
    data: &'a [u8],
    shape: RowShape,
    bytes: usize,
}

impl<'a> Scaled<'a> {
    pub(super) fn new(data: &'a [u8], shape: RowShape) -> Self {
        Self { data, shape, bytes: super::CacheType::Fp8.row_bytes(shape) }
    }
}

impl<'a> Stored for Scaled<'a> {
    type Row = ScaledRow<'a>;

    #[inline(always)]
    fn row(self, index: usize, head: usize, width: usize) -> ScaledRow<'a> {
        let shape = self.shape;
        let (codes, scales, plain) = fp8::parts(shape, &self.data[index * self.bytes..][..self.bytes]);
        let coded = width.min(shape.width);
        ScaledRow {
            codes: &codes[head * shape.width..][..coded],
            scales: scales[4 * head * shape.tiles()..].as_chunks().0,
            plain: plain[..2 * (width - coded)].as_chunks().0,
        }
    }
}

/// Codes of one head, the scales of its tiles, and the bf16 values after them.
#[derive(Clone, Copy)]
pub(super) struct ScaledRow<'a> {
    codes: &'a [u8],
    scales: &'a [[u8; 4]],
    plain: &'a [[u8; 2]],
}

impl ScaledRow<'_> {
    #[inline(always)]
    fn scale(self, column: usize) -> f32 {
        f32::from_le_bytes(self.scales[column / TILE])
    }
}

impl Row for ScaledRow<'_> {
    #[inline(always)]
    fn whole<L: Lanes>(self, l: L, chunk: usize) -> L::V {
        let column = chunk * LANES;
        if column + LANES <= self.codes.len() {
            let codes = self.codes[column..].first_chunk().expect("a whole chunk");
            return l.e4m3_times(codes, self.scale(column));
        }
        if column >= self.codes.len() {
            let plain = self.plain[column - self.codes.len()..][..LANES].as_flattened();
            return l.bf16(plain.first_chunk().expect("a whole chunk"));
        }
        self.rest(l, chunk)
    }

    /// Also of chunks that are partly codes and partly plain values, of which there may be a whole one.
    #[inline(always)]
    fn rest<L: Lanes>(self, l: L, chunk: usize) -> L::V {
        let column = chunk * LANES;
        let mut lanes = [0.0; LANES];
        let coded = LANES.min(self.codes.len().saturating_sub(column));
        if coded > 0 {
            let mut codes = [0; LANES];
            codes[..coded].copy_from_slice(&self.codes[column..][..coded]);
            l.store(l.e4m3_times(&codes, self.scale(column)), &mut lanes);
        }
        let plain = &self.plain[(column + coded - self.codes.len()).min(self.plain.len())..];
        for (lane, bytes) in lanes[coded..].iter_mut().zip(plain) {
            *lane = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
        }
        l.load(&lanes)
    }
}

/// Columns of the cache rows of one page.
#[derive(Clone, Copy)]
pub(super) struct Page<S> {
    stored: S,
    first: usize,
    head: usize,
    pub(super) width: usize,
}

impl<S: Stored> Page<S> {
    /// Those of a head in the page of `position`.
    #[inline(always)]
    pub(super) fn of(stored: S, pages: &Pages<'_>, position: usize, head: usize, width: usize) -> Self {
        Self { stored, first: pages.table[position / PAGE] as usize * PAGE, head, width }
    }

    #[inline(always)]
    pub(super) fn row(&self, offset: usize) -> S::Row {
        self.stored.row(self.first + offset, self.head, self.width)
    }
}
