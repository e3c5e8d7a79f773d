//! Products with bf16 weights in tile registers, where the processor has them ([`crate::simd::tiles`]).
//!
//! A value of x is one or two planes of bf16: the nearest, and the nearest to what is left. (Two planes keep 16 bits of every
//! value, one keeps 8.) Each plane has sums of its own, over all columns of a weight row in steps of 32, ascending, whatever
//! is done side by side; planes are added at the end. So neither the number of rows of x nor of threads changes a bit. The
//! order is not that of [`super::rowwise`]: a processor with tiles gives other last bits than one without.
//!
//! One row of x costs what reading the weights costs, and so do sixteen.

use super::tile::Input;
use crate::format::{GROUP, Matrix, Values};
use crate::quantised::PANEL;
use crate::rows::{Bands, Cut, RowsMut, for_each_part};
use crate::simd::Isa;
use crate::simd::dots::{DotWork, Dots, InnerWork, block};
use crate::simd::tiles::{Amx, Columns, SumTile, TILE, Tiles, WeightRows};

/// Bytes of a weight row in a step of [`GROUP`] columns.
const STEP: usize = 2 * GROUP;
/// Weight rows multiplied together: two tiles.
const PAIR: usize = 2 * TILE;
/// Tiles of x whose sums stay in registers.
const FEW: usize = 2;
/// Tiles of x that are multiplied with weights read once.
const MANY: usize = 16;
/// Steps taken at a time where x has many tiles: two tiles of weights are 32 KiB, which stay in the first cache, and all
/// tiles of x 256 KiB, which stay in the second.
const DEPTH: usize = 16;
/// Weight rows for which those tiles of x stay there.
const ROWS: usize = 128;
/// Rows of x that are packed one by one; more are transposed.
const SINGLE: usize = 4;

/// Rows of x in panels of [`PANEL`] rows: `[panel, step, block of sixteen rows, plane, pair, row]`. A dword is a pair of
/// neighbouring values.
#[derive(Clone, Copy)]
pub(crate) struct Planes<'a> {
    pub(crate) data: &'a [u32],
    pub(crate) shape: Shape,
}

/// How rows of x are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Of a value.
    planes: usize,
    /// Rows of x in a tile: sixteen, or as many as there are.
    columns: usize,
}

impl Shape {
    pub(crate) fn new(planes: usize, rows: usize) -> Self {
        Self { planes, columns: TILE.min(rows) }
    }

    /// Tiles of `rows` rows, at most a panel.
    fn tiles(self, rows: usize) -> usize {
        rows.div_ceil(TILE) * self.planes
    }

    /// Dwords of a tile.
    fn tile(self) -> usize {
        TILE * self.columns
    }

    /// Dwords of a row of `width` values in a whole panel.
    pub(crate) fn row(self, width: usize) -> usize {
        width.div_ceil(GROUP) * TILE * self.planes
    }

    /// Dwords that [`pack`] writes for `rows` rows of `width` values.
    pub(crate) fn len(self, rows: usize, width: usize) -> usize {
        let rest = width.div_ceil(GROUP) * self.tiles(rows % PANEL) * self.tile();
        rows / PANEL * PANEL * self.row(width) + rest
    }
}

/// Packs rows of x.
pub(crate) fn pack(isa: Isa, x: Input<'_>, shape: Shape, data: &mut [u32]) {
    let width = x.x.width();
    let steps = width.div_ceil(GROUP);
    let whole = x.count() / PANEL * PANEL;
    let (panels, rest) = data[..shape.len(x.count(), width)].split_at_mut(whole * shape.row(width));
    for (x, data) in [(x.slice(0, whole), panels), (x.slice(whole, x.count() - whole), rest)] {
        if data.is_empty() {
            continue;
        }
        let rows = x.count().min(PANEL);
        let len = shape.tiles(rows) * shape.tile();
        // Some thousand values at a time.
        let cut = Cut::new(RowsMut::new(data, len), Bands::Every(8192usize.div_ceil(len)), len);
        for_each_part(cut, &|part| {
            let (first, out) = (part.first_row, part.rows.into_slice());
            isa.run_dots(PackSteps { x, rows, shape, first, steps, len, out });
        });
    }
}

/// Some steps of panels of `rows` rows.
struct PackSteps<'a> {
    x: Input<'a>,
    rows: usize,
    shape: Shape,
    /// The first, of `steps` of each panel.
    first: usize,
    steps: usize,
    /// Dwords of a step.
    len: usize,
    out: &'a mut [u32],
}

impl DotWork for PackSteps<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        let Self { x, rows, shape, first, steps, len, out } = self;
        let mut values = [[0.0; GROUP]; TILE];
        for (step, out) in (first..).zip(out.chunks_mut(len)) {
            let (top, column) = (step / steps * PANEL, step % steps * GROUP);
            for (block, out) in out.chunks_mut(shape.planes * shape.tile()).enumerate() {
                let count = TILE.min(rows - block * TILE);
                for (t, values) in values.iter_mut().enumerate().take(count) {
                    let x = &x.row(top + block * TILE + t)[column..];
                    match x.first_chunk() {
                        Some(x) => *values = *x,
                        None => {
                            values[..x.len()].copy_from_slice(x);
                            values[x.len()..].fill(0.0);
                        }
                    }
                }
                if count <= SINGLE {
                    for (t, values) in values.iter().enumerate().take(count) {
                        single(d, values, shape, &mut out[t..]);
                    }
                } else {
                    // (Of rows that are not there anything: no tile has columns for them, or no output.)
                    together(d, &values, shape, out);
                }
            }
        }
    }
}

/// One row of x; its values in `out` are `columns` apart.
#[inline(always)]
fn single<D: Dots>(d: D, values: &[f32; GROUP], shape: Shape, out: &mut [u32]) {
    let halves = values.as_chunks::<TILE>().0;
    let mut left = [load(d, &halves[0]), load(d, &halves[1])];
    for plane in 0..shape.planes {
        let mut rounded = [[0.0; TILE]; 2];
        for (rounded, left) in rounded.iter_mut().zip(&mut left) {
            *rounded = d.store(take_nearest(d, left));
        }
        let out = out[plane * shape.tile()..].iter_mut().step_by(shape.columns);
        for (out, [even, odd]) in out.zip(rounded.as_flattened().as_chunks::<2>().0) {
            *out = even.to_bits() >> 16 | odd.to_bits() & 0xFFFF_0000;
        }
    }
}

/// Sixteen rows of x, the last of them perhaps not there.
#[inline(always)]
fn together<D: Dots>(d: D, values: &[[f32; GROUP]; TILE], shape: Shape, out: &mut [u32]) {
    for half in 0..2 {
        let mut part = [[0.0; TILE]; TILE];
        for (part, values) in part.iter_mut().zip(values) {
            part.copy_from_slice(&values[half * TILE..][..TILE]);
        }
        let columns = d.transpose_f32(&part);
        for (i, [even, odd]) in columns.as_chunks::<2>().0.iter().enumerate() {
            let mut left = [*even, *odd];
            for plane in 0..shape.planes {
                let [even, odd] = &mut left;
                let (even, odd) = (d.bits(take_nearest(d, even)), d.bits(take_nearest(d, odd)));
                let pair = d.xor(d.shr::<16>(even), d.and(odd, d.splat(0xFFFF_0000)));
                let pair = d.store(d.as_f32(pair)).map(f32::to_bits);
                let out = &mut out[plane * shape.tile() + (half * TILE / 2 + i) * shape.columns..];
                match out.first_chunk_mut::<TILE>() {
                    Some(out) if shape.columns == TILE => *out = pair,
                    _ => out[..shape.columns].copy_from_slice(&pair[..shape.columns]),
                }
            }
        }
    }
}

#[inline(always)]
fn load<D: Dots>(d: D, values: &[f32; TILE]) -> D::F {
    d.load_f32(&values.map(f32::to_bits))
}

/// The nearest bf16, ties to even, leaving the rest; NaN of what is not finite.
#[inline(always)]
fn take_nearest<D: Dots>(d: D, x: &mut D::F) -> D::F {
    let bits = d.bits(*x);
    let even = d.and(d.shr::<16>(bits), d.splat(1));
    let rounded = d.add_i32(d.add_i32(bits, d.splat(0x7FFF)), even);
    let rounded = d.as_f32(d.and(rounded, d.splat(0xFFFF_0000)));
    let nearest = d.fma(*x, d.zero(), rounded);
    *x = d.fma(nearest, d.splat_f32(-1.0), *x);
    nearest
}

/// `out[t, r] = dot(x[t], w[r]) (+ bias[r])` with w in bf16, all of it on this thread.
pub(crate) struct TiledProduct<'a> {
    pub(crate) amx: Amx,
    pub(crate) x: Planes<'a>,
    pub(crate) w: Matrix<'a>,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) out: RowsMut<'a>,
}

impl DotWork for TiledProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        let Matrix { first_row, rows, cols, values: Values::Bf16(bytes) } = self.w else {
            panic!("a weight that is not bf16");
        };
        let stride = 2 * cols;
        assert!(bytes.len() >= (first_row + rows) * stride, "{rows} rows of {stride} bytes");
        let bytes = &bytes[first_row * stride..(first_row + rows) * stride];
        let Self { amx, x, bias, mut out, .. } = self;
        let at_once = MANY / x.shape.planes * TILE;
        for first in (0..out.count()).step_by(at_once) {
            let count = at_once.min(out.count() - first);
            let pass = Pass {
                x: Planes { data: &x.data[first * x.shape.row(cols)..], ..x },
                tokens: count,
                steps: cols.div_ceil(GROUP),
                bytes,
                stride,
                rows,
                bias,
                out: out.reborrow().slice(first, count),
            };
            if x.shape.tiles(count) <= FEW {
                d.call(FewTiles(pass, amx))
            } else {
                d.call(ManyTiles(pass, amx))
            }
        }
    }
}

/// Rows of x that are multiplied with weights read once.
struct Pass<'a> {
    x: Planes<'a>,
    tokens: usize,
    steps: usize,
    bytes: &'a [u8],
    /// Bytes of a weight row.
    stride: usize,
    rows: usize,
    bias: Option<&'a [f32]>,
    out: RowsMut<'a>,
}

/// Weights of up to [`DEPTH`] steps; zeros for what is not there. On cache lines: values that lie across two cost a third
/// of the speed.
#[repr(align(64))]
struct Copied([u8; PAIR * DEPTH * STEP]);

impl Copied {
    const ZERO: Self = Self([0; PAIR * DEPTH * STEP]);
}

struct FewTiles<'a>(Pass<'a>, Amx);

impl<D: Dots> InnerWork<D> for FewTiles<'_> {
    #[inline(always)]
    fn run(self, d: D) {
        self.0.few(d, self.1);
    }
}

struct ManyTiles<'a>(Pass<'a>, Amx);

impl<D: Dots> InnerWork<D> for ManyTiles<'_> {
    #[inline(always)]
    fn run(self, d: D) {
        self.0.many(d, self.1);
    }
}

impl Pass<'_> {
    /// Weights are read from end to end, in place; sums stay in tiles.
    #[inline(always)]
    fn few<D: Dots>(mut self, d: D, amx: Amx) {
        let mut sums = [SumTile::ZERO; FEW];
        let across = self.x.shape.tiles(self.tokens);
        let tiles = Tiles::new(amx, self.x.shape.columns);
        let x = Columns { dwords: self.x.data, across };
        // Without the last step, if it is not a whole one.
        let whole = self.stride / STEP;
        for row in (0..self.rows).step_by(TILE) {
            let count = TILE.min(self.rows - row);
            if count == TILE && whole > 0 {
                let w = WeightRows { bytes: &self.bytes[row * self.stride..], stride: self.stride };
                match across {
                    1 => tiles.multiply::<1, 1, true, true>(w, x, whole, (&mut sums, across)),
                    _ => tiles.multiply::<1, 2, true, true>(w, x, whole, (&mut sums, across)),
                }
                if whole < self.steps {
                    self.rest(&tiles, (row, count), whole, &mut sums);
                }
            } else {
                sums.fill(SumTile::ZERO);
                self.rest(&tiles, (row, count), 0, &mut sums);
            }
            self.store(d, (row, count), across, &sums);
        }
    }

    /// Adds the steps from `first` on, of rows that are not all there or end within a step.
    #[inline(never)]
    fn rest(&self, tiles: &Tiles, rows: (usize, usize), first: usize, sums: &mut [SumTile]) {
        let mut copied = Copied::ZERO;
        let across = self.x.shape.tiles(self.tokens);
        for step in (first..self.steps).step_by(DEPTH) {
            let steps = DEPTH.min(self.steps - step);
            let w = self.copy(rows, (step, steps), &mut copied);
            let dwords = &self.x.data[step * across * self.x.shape.tile()..];
            let x = Columns { dwords, across };
            match across {
                1 => tiles.multiply::<1, 1, false, false>(w, x, steps, (&mut *sums, across)),
                _ => tiles.multiply::<1, 2, false, false>(w, x, steps, (&mut *sums, across)),
            }
        }
    }

    /// Some steps at a time of some weight rows, for all columns of x.
    #[inline(always)]
    fn many<D: Dots>(mut self, d: D, amx: Amx) {
        let mut sums = [SumTile::ZERO; ROWS / TILE * MANY];
        let mut copied = Copied::ZERO;
        let across = self.x.shape.tiles(self.tokens);
        let tiles = Tiles::new(amx, self.x.shape.columns);
        for top in (0..self.rows).step_by(ROWS) {
            let here = ROWS.min(self.rows - top);
            for step in (0..self.steps).step_by(DEPTH) {
                let steps = DEPTH.min(self.steps - step);
                for row in (0..here).step_by(PAIR) {
                    let rows = (top + row, PAIR.min(here - row));
                    let w = self.copy(rows, (step, steps), &mut copied);
                    let sums = &mut sums[row / TILE * across..];
                    if step == 0 {
                        self.multiply::<true>(&tiles, w, (step, steps), sums);
                    } else {
                        self.multiply::<false>(&tiles, w, (step, steps), sums);
                    }
                }
            }
            self.store(d, (top, here), across, &sums);
        }
    }

    /// Two tiles of weight rows, over some steps, with all columns of x.
    #[inline(always)]
    fn multiply<const FRESH: bool>(
        &self,
        tiles: &Tiles,
        w: WeightRows<'_>,
        (step, steps): (usize, usize),
        sums: &mut [SumTile],
    ) {
        let shape = self.x.shape;
        let across = shape.tiles(self.tokens);
        for panel in 0..self.tokens.div_ceil(PANEL) {
            let before = panel * shape.tiles(PANEL);
            let x = &self.x.data[before * self.steps * shape.tile()..];
            let here = shape.tiles((self.tokens - panel * PANEL).min(PANEL));
            for v in (0..here).step_by(2) {
                let x = Columns { dwords: &x[(step * here + v) * shape.tile()..], across: here };
                let sums = (&mut sums[before + v..], across);
                match here - v {
                    1 => tiles.multiply::<2, 1, FRESH, false>(w, x, steps, sums),
                    _ => tiles.multiply::<2, 2, FRESH, false>(w, x, steps, sums),
                }
            }
        }
    }

    /// Some rows and steps, side by side: rows that are far apart would take one another's place in the first cache. (Asking
    /// for what is copied next, between products, gained nothing.)
    #[inline(always)]
    fn copy<'c>(
        &self,
        (row, count): (usize, usize),
        (step, steps): (usize, usize),
        out: &'c mut Copied,
    ) -> WeightRows<'c> {
        const WIDTH: usize = DEPTH * STEP;
        let at = step * STEP;
        let len = (steps * STEP).min(self.stride - at);
        for (r, out) in out.0.chunks_exact_mut(WIDTH).enumerate() {
            let filled = if r < count { len } else { 0 };
            if r < count {
                out[..len].copy_from_slice(&self.bytes[(row + r) * self.stride + at..][..len]);
            }
            out[filled..steps * STEP].fill(0);
        }
        WeightRows { bytes: &out.0, stride: WIDTH }
    }

    /// Adds planes and writes outputs.
    #[inline(always)]
    fn store<D: Dots>(&mut self, d: D, (row, count): (usize, usize), across: usize, sums: &[SumTile]) {
        for (first, sums) in (row..row + count).step_by(TILE).zip(sums.chunks_exact(across)) {
            for (tokens, planes) in sums.chunks_exact(self.x.shape.planes).enumerate() {
                let mut sums = planes[0];
                for plane in &planes[1..] {
                    for (sums, plane) in sums.0.iter_mut().zip(&plane.0) {
                        *sums = d.store(d.add(load(d, sums), load(d, plane)));
                    }
                }
                for (t, sums) in (tokens * TILE..self.tokens).zip(d.transpose_f32(&sums.0)) {
                    block::store(d, &mut self.out, self.bias, (t, first), sums);
                }
            }
        }
    }
}
