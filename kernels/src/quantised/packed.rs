//! Activations in whole numbers.

use super::codes::{Code, Int4, Mxfp4, Q8, order};
use crate::format::{GROUP, Matrix, Values};
use crate::matmul::Input;
use crate::matmul::rowwise::{FEW, columns_len, pack_columns};
use crate::matmul::tiled::{self, Planes, REACH};
use crate::rows::{Bands, Cut, RowsMut, for_each_part};
use crate::simd::dots::{LINE, block};
use crate::simd::{Isa, LANES, Lanes, Work};

/// Rows of x that are multiplied with weights expanded once.
pub(crate) const PANEL: usize = 64;
/// Dwords of a cache line less one.
const SLACK: usize = LINE / 4 - 1;

/// Bits of an activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 16.
    Int16,
    /// 8.
    Int8,
}

impl Precision {
    /// Dwords of one group of values.
    pub(crate) const fn values(self) -> usize {
        match self {
            Self::Int16 => 16,
            Self::Int8 => 8,
        }
    }

    /// Planes of bf16 that take the place of a value where bf16 weights are multiplied in tiles.
    const fn planes(self) -> usize {
        match self {
            Self::Int16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Dwords of one packed group: its values, the start of its sums, its scale.
    pub(crate) const fn group(self) -> usize {
        self.values() + 2
    }

    const fn limit(self) -> f32 {
        match self {
            Self::Int16 => 32767.0,
            Self::Int8 => 127.0,
        }
    }
}

/// How activations must be packed for weights of one format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    precision: Precision,
    /// Whether codes are nibbles.
    nibbles: bool,
    offset: i32,
}

impl Packing {
    /// None for weights of floats.
    pub(crate) fn of(w: &Matrix<'_>, precision: Precision) -> Option<Self> {
        let (nibbles, offset) = match w.values {
            Values::Int4 { .. } => (true, Int4::OFFSET),
            Values::Mxfp4 { .. } => (true, Mxfp4::OFFSET),
            Values::Q8 { .. } => (false, Q8::OFFSET),
            _ => return None,
        };
        Some(Self { precision, nibbles, offset })
    }

    /// Dwords of one row of `columns`.
    pub(crate) fn row(self, columns: usize) -> usize {
        columns / GROUP * self.precision.group()
    }
}

/// Dwords that `rows` packed rows of `columns` take at most.
fn packed_len(precision: Option<Precision>, rows: usize, columns: usize) -> usize {
    let whole = precision.map_or(0, |precision| whole_len(precision, rows, columns));
    let planes = precision.map_or(0, |precision| planes_len(precision, rows, columns));
    whole.max(planes).max(columns_len(rows, columns))
}

fn planes_len(precision: Precision, rows: usize, columns: usize) -> usize {
    rows * tiled::row(precision.planes(), columns)
}

fn experts_len(precision: Precision, floats: bool, rows: usize, columns: usize) -> usize {
    if floats { planes_len(precision, rows, columns) } else { whole_len(precision, rows, columns) }
}

fn whole_len(precision: Precision, rows: usize, columns: usize) -> usize {
    rows * columns.div_ceil(GROUP) * precision.group()
}

/// Room for the packed rows of one product, allocated once.
#[derive(Debug)]
pub struct Activations {
    precision: Option<Precision>,
    room: Room,
    data: Aligned,
}

/// What rows may be packed as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Any,
    Whole,
    Planes,
}

/// Zeros from the beginning of a cache line on: reading across two is slower.
#[derive(Debug)]
struct Aligned {
    values: Vec<u32>,
    start: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let values = vec![0; len + SLACK + REACH];
        // (At most fifteen, save where the compiler cannot know: then any start will do.)
        let start = values.as_ptr().align_offset(LINE).min(SLACK);
        Self { values, start }
    }

    fn slice(&mut self, len: usize) -> &mut [u32] {
        &mut self.values[self.start..][..len]
    }
}

impl Activations {
    /// Room for `rows` rows of up to `columns`; see [`Activations::bytes`]. Without a precision weights of few bits are
    /// multiplied in f32 like all others, and bf16 weights never in tiles.
    pub fn new(precision: Option<Precision>, rows: usize, columns: usize) -> Self {
        Self { precision, room: Room::Any, data: Aligned::new(packed_len(precision, rows, columns)) }
    }

    /// Room for routed experts; see [`Activations::bytes_for_experts`]. If they are stored in `floats`, for planes of bf16 alone,
    /// else for whole numbers alone: so how an expert is multiplied does not depend on which others are beside it.
    pub fn for_experts(precision: Precision, floats: bool, rows: usize, columns: usize) -> Self {
        let room = if floats { Room::Planes } else { Room::Whole };
        let data = Aligned::new(experts_len(precision, floats, rows, columns));
        Self { precision: Some(precision), room, data }
    }

    /// Bytes that [`Activations::for_experts`] allocates: 72 (or 40) for 32 values, of floats 128 (or 64), and 120.
    pub fn bytes_for_experts(precision: Precision, floats: bool, rows: usize, columns: usize) -> usize {
        4 * (experts_len(precision, floats, rows, columns) + SLACK + REACH)
    }

    /// Bytes that [`Activations::new`] allocates: 4 for every value, rows rounded up to sixteen, and 120.
    pub fn bytes(precision: Option<Precision>, rows: usize, columns: usize) -> usize {
        4 * (packed_len(precision, rows, columns) + SLACK + REACH)
    }

    /// Packs `x` for weights like `w`, each band in panels of its own; none if that has no use.
    pub(crate) fn pack(
        &mut self,
        isa: Isa,
        x: Input<'_>,
        w: &Matrix<'_>,
        bands: Bands<'_>,
    ) -> Option<PackedRows<'_>> {
        let (precision, columns) = (self.precision?, x.x.width());
        if self.room == Room::Planes {
            let (Values::Bf16(_), Some(_)) = (w.values, isa.tiles()) else { return None };
            let (count, row) = (precision.planes(), tiled::row(precision.planes(), columns));
            let data = self.data.slice(x.count() * row + REACH);
            tiled::pack_bands(isa, x, count, bands, data);
            return Some(PackedRows { data, row, form: Form::Planes(count) });
        }
        let packing = Packing::of(w, precision)?;
        let data = self.data.slice(packing.row(columns) * x.count());
        pack_bands(isa, x, packing, bands, data);
        Some(PackedRows { data, row: packing.row(columns), form: Form::Whole(packing.precision) })
    }

    /// Packs the rows of one product with `w`, if that has a use.
    pub(crate) fn pack_rows(&mut self, isa: Isa, x: Input<'_>, w: &Matrix<'_>) -> Option<PackedRows<'_>> {
        if !matches!(w.values, Values::Bf16(_) | Values::Fp8 { .. }) {
            return self.pack(isa, x, w, Bands::Every(PANEL));
        }
        let width = x.x.width();
        if let (Values::Bf16(_), Some(precision), Some(_)) = (w.values, self.precision, isa.tiles()) {
            let (count, row) = (precision.planes(), tiled::row(precision.planes(), width));
            let data = self.data.slice(x.count() * row + REACH);
            tiled::pack(isa, x, count, data);
            return Some(PackedRows { data, row, form: Form::Planes(count) });
        }
        if x.count() <= FEW {
            return None;
        }
        let data = self.data.slice(columns_len(x.count(), width));
        pack_columns(isa, x, data);
        Some(PackedRows { data, row: width.next_multiple_of(GROUP), form: Form::Columns })
    }
}

/// Packed rows, in panels of [`PANEL`] from the first on.
#[derive(Clone, Copy)]
pub(crate) struct PackedRows<'a> {
    data: &'a [u32],
    /// Dwords of a row.
    row: usize,
    form: Form,
}

/// What rows are packed as.
#[derive(Clone, Copy)]
enum Form {
    Whole(Precision),
    /// Columns of f32 for weights of floats.
    Columns,
    /// So many planes of bf16 for weights of bf16.
    Planes(usize),
}

impl<'a> PackedRows<'a> {
    /// The rows from `start` on, with which a panel must begin.
    pub(crate) fn rows_from(&self, start: usize) -> Self {
        Self { data: &self.data[start * self.row..], ..*self }
    }

    /// The first `rows` rows, one panel, if they are packed in whole numbers.
    pub(crate) fn panel(&self, rows: usize) -> Option<Panel<'a>> {
        let Form::Whole(precision) = self.form else { return None };
        Some(Panel { data: &self.data[..rows * self.row], rows, precision })
    }

    /// What [`pack_columns`] left, if that packed them.
    pub(crate) fn columns(&self) -> Option<&'a [u32]> {
        matches!(self.form, Form::Columns).then_some(self.data)
    }

    /// What [`tiled::pack`] left, if that packed them.
    pub(crate) fn planes(&self) -> Option<Planes<'a>> {
        let Form::Planes(count) = self.form else { return None };
        Some(Planes { data: self.data, count })
    }
}

/// Up to [`PANEL`] packed rows: group after group, the rows of each side by side.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a> {
    pub(crate) data: &'a [u32],
    pub(crate) rows: usize,
    pub(crate) precision: Precision,
}

/// Packs the rows of x, each band in panels of its own, on all threads.
fn pack_bands(isa: Isa, x: Input<'_>, packing: Packing, bands: Bands<'_>, data: &mut [u32]) {
    let width = packing.row(x.x.width());
    if width == 0 || x.count() == 0 {
        return;
    }
    let rows = RowsMut::new(&mut data[..x.count() * width], width);
    if x.count() == 1 {
        let out = rows.into_slice();
        return isa.run(Pack { x, packing, out });
    }
    for_each_part(Cut::new(rows, bands, width), &|part| {
        let (first, count) = (part.first_row, part.rows.count());
        let out = part.rows.into_slice();
        for (i, out) in out.chunks_mut(PANEL * width).enumerate() {
            let x = x.slice(first + i * PANEL, PANEL.min(count - i * PANEL));
            isa.run(Pack { x, packing, out });
        }
    });
}

/// Packs one panel on this thread.
struct Pack<'a> {
    x: Input<'a>,
    packing: Packing,
    out: &'a mut [u32],
}

impl Work for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { x, packing: Packing { precision, nibbles, offset }, out } = self;
        let (group, rows) = (precision.group(), x.count());
        for t in 0..rows {
            let outs = out[t * group..].chunks_mut(rows * group);
            for (x, out) in x.row(t).as_chunks::<LANES>().0.iter().zip(outs) {
                let (q, sum, scale) = quantise(l, x, precision.limit());
                let (values, rest) = out[..group].split_at_mut(precision.values());
                match (nibbles, precision) {
                    (true, Precision::Int16) => words(&q, const { &order(true, true) }, values),
                    (true, Precision::Int8) => bytes(&q, const { &order(true, false) }, values),
                    (false, Precision::Int16) => words(&q, const { &order(false, true) }, values),
                    (false, Precision::Int8) => bytes(&q, const { &order(false, false) }, values),
                }
                rest[0] = (-offset * sum) as u32;
                rest[1] = scale.to_bits();
            }
        }
    }
}

/// Whole numbers up to `limit`, their sum, and what one of them is worth: NaN if any value is not finite.
#[inline(always)]
fn quantise<L: Lanes>(l: L, x: &[f32; LANES], limit: f32) -> ([i32; LANES], i32, f32) {
    /// Adding it leaves the nearest whole number in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    /// Groups of nothing greater are zero: the inverse of their scale is no number.
    const LEAST: f32 = 1e-30;
    let v = l.load(x);
    let peak = l.peak(l.max(v, l.mul(v, l.splat(-1.0))));
    let finite = l.sum(l.mul(v, l.splat(0.0)));
    if peak <= LEAST {
        return ([0; LANES], 0, 0.0 + finite);
    }
    let whole = l.fma(v, l.splat(limit / peak), l.splat(ROUND));
    let whole = l.max(l.splat(ROUND - limit), l.min(l.splat(ROUND + limit), whole));
    // Below 2^24: exact in any order.
    let sum = l.sum(l.add(whole, l.splat(-ROUND))) as i32;
    let mut rounded = [0.0; LANES];
    l.store(whole, &mut rounded);
    let mut q = [0; LANES];
    // Not `map`, which may end up as a call for every value.
    for (q, rounded) in q.iter_mut().zip(rounded) {
        *q = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    }
    (q, sum, peak / limit + finite)
}

#[inline(always)]
fn words(q: &[i32; GROUP], order: &[u8; GROUP], out: &mut [u32]) {
    // The length is known to the compiler, which then moves several values at once.
    let out: &mut [u32; Precision::Int16.values()] = block::first(out);
    for (out, pair) in out.iter_mut().zip(order.as_chunks::<2>().0) {
        let [a, b] = [q[usize::from(pair[0])] as u32, q[usize::from(pair[1])] as u32];
        *out = a & 0xFFFF | b << 16;
    }
}

#[inline(always)]
fn bytes(q: &[i32; GROUP], order: &[u8; GROUP], out: &mut [u32]) {
    let out: &mut [u32; Precision::Int8.values()] = block::first(out);
    for (out, four) in out.iter_mut().zip(order.as_chunks::<4>().0) {
        let at = |i: usize| q[usize::from(four[i])] as u32 & 0xFF;
        *out = at(0) | at(1) << 8 | at(2) << 16 | at(3) << 24;
    }
}
