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
use crate::simd::tiles::{Amx, BESIDE, Columns, SumTile, TILE, Tiles, WeightRows};

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

/// Dwords that a tile may reach beyond the last row: it has sixteen columns where there are fewer rows.
pub(crate) const REACH: usize = TILE - 1;

/// Rows of x in panels of up to [`PANEL`] rows: `[panel, step, block of up to sixteen rows, plane, pair, row]`. A dword is a
/// pair of neighbouring values.
#[derive(Clone, Copy)]
pub(crate) struct Planes<'a> {
    /// With [`REACH`] dwords of anything after them.
    pub(crate) data: &'a [u32],
    /// Of a value.
    pub(crate) count: usize,
}

impl<'a> Planes<'a> {
    /// Tiles from `v` on of a panel of `rows` rows, from step `step` on: one, or two whose columns are equally many.
    fn columns(&self, rows: usize, step: usize, v: usize) -> (usize, Columns<'a>) {
        let (block, plane) = (v / self.count, v % self.count);
        let columns = TILE.min(rows - block * TILE);
        let len = rows * TILE * self.count;
        let at = block * TILE * TILE * self.count + plane * TILE * columns;
        let two = plane + 1 < self.count || rows >= (block + 2) * TILE;
        let dwords = &self.data[step * len + at..];
        (1 + usize::from(two), Columns { dwords, pair: columns, beside: TILE * columns, step: len })
    }
}

/// Tiles of `rows` rows in `planes` planes.
fn tile_count(planes: usize, rows: usize) -> usize {
    rows.div_ceil(TILE) * planes
}

/// Dwords of a packed row of `width` values in `planes` planes.
pub(crate) fn row(planes: usize, width: usize) -> usize {
    width.div_ceil(GROUP) * TILE * planes
}

/// Packs the rows of one product.
pub(crate) fn pack(isa: Isa, x: Input<'_>, planes: usize, data: &mut [u32]) {
    let width = x.x.width();
    let steps = width.div_ceil(GROUP);
    let whole = x.count() / PANEL * PANEL;
    let row = row(planes, width);
    let (panels, rest) = data[..x.count() * row].split_at_mut(whole * row);
    for (x, data) in [(x.slice(0, whole), panels), (x.slice(whole, x.count() - whole), rest)] {
        if data.is_empty() {
            continue;
        }
        let rows = x.count().min(PANEL);
        let len = rows * TILE * planes;
        // Some thousand values at a time.
        let cut = Cut::new(RowsMut::new(data, len), Bands::Every(8192usize.div_ceil(len)), len);
        for_each_part(cut, &|part| {
            let (first, out) = (part.first_row, part.rows.into_slice());
            isa.run_dots(PackSteps { x, rows, planes, first, steps, out });
        });
    }
}

/// Packs rows, each band in panels of its own.
pub(crate) fn pack_bands(isa: Isa, x: Input<'_>, planes: usize, bands: Bands<'_>, data: &mut [u32]) {
    let width = x.x.width();
    let (steps, row) = (width.div_ceil(GROUP), row(planes, width));
    if row == 0 || x.count() == 0 {
        return;
    }
    for_each_part(Cut::new(RowsMut::new(&mut data[..x.count() * row], row), bands, row), &|part| {
        let (first, count) = (part.first_row, part.rows.count());
        let out = part.rows.into_slice();
        for (top, out) in (0..count).step_by(PANEL).zip(out.chunks_mut(PANEL * row)) {
            let rows = PANEL.min(count - top);
            let x = x.slice(first + top, rows);
            isa.run_dots(PackSteps { x, rows, planes, first: 0, steps, out });
        }
    });
}

/// Some steps of panels of `rows` rows.
struct PackSteps<'a> {
    x: Input<'a>,
    rows: usize,
    planes: usize,
    /// The first, of `steps` of each panel.
    first: usize,
    steps: usize,
    out: &'a mut [u32],
}

impl DotWork for PackSteps<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        let Self { x, rows, planes, first, steps, out } = self;
        let mut values = [[0.0; GROUP]; TILE];
        for (step, out) in (first..).zip(out.chunks_mut(rows * TILE * planes)) {
            let (top, column) = (step / steps * PANEL, step % steps * GROUP);
            for (block, out) in out.chunks_mut(planes * TILE * TILE).enumerate() {
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
                        single(d, values, (planes, count), &mut out[t..]);
                    }
                } else {
                    together(d, &values, (planes, count), out);
                }
            }
        }
    }
}

/// One row of x; its values in `out` are `columns` apart.
#[inline(always)]
fn single<D: Dots>(d: D, values: &[f32; GROUP], (planes, columns): (usize, usize), out: &mut [u32]) {
    let halves = values.as_chunks::<TILE>().0;
    let mut left = [load(d, &halves[0]), load(d, &halves[1])];
    for plane in 0..planes {
        let mut rounded = [[0.0; TILE]; 2];
        for (rounded, left) in rounded.iter_mut().zip(&mut left) {
            *rounded = d.store(take_nearest(d, left));
        }
        let out = out[plane * TILE * columns..].iter_mut().step_by(columns);
        for (out, [even, odd]) in out.zip(rounded.as_flattened().as_chunks::<2>().0) {
            *out = even.to_bits() >> 16 | odd.to_bits() & 0xFFFF_0000;
        }
    }
}

/// `columns` rows of x; the others are not looked at.
#[inline(always)]
fn together<D: Dots>(
    d: D,
    values: &[[f32; GROUP]; TILE],
    (planes, columns): (usize, usize),
    out: &mut [u32],
) {
    for half in 0..2 {
        let mut part = [[0.0; TILE]; TILE];
        for (part, values) in part.iter_mut().zip(values) {
            part.copy_from_slice(&values[half * TILE..][..TILE]);
        }
        let transposed = d.transpose_f32(&part);
        for (i, [even, odd]) in transposed.as_chunks::<2>().0.iter().enumerate() {
            let mut left = [*even, *odd];
            for plane in 0..planes {
                let [even, odd] = &mut left;
                let (even, odd) = (d.bits(take_nearest(d, even)), d.bits(take_nearest(d, odd)));
                let pair = d.xor(d.shr::<16>(even), d.and(odd, d.splat(0xFFFF_0000)));
                let pair = d.store(d.as_f32(pair)).map(f32::to_bits);
                let out = &mut out[(plane * TILE + half * TILE / 2 + i) * columns..];
                match out.first_chunk_mut::<TILE>() {
                    Some(out) if columns == TILE => *out = pair,
                    _ => out[..columns].copy_from_slice(&pair[..columns]),
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
        let at_once = MANY / x.count * TILE;
        for first in (0..out.count()).step_by(at_once) {
            let count = at_once.min(out.count() - first);
            let pass = Pass {
                x: Planes { data: &x.data[first * row(x.count, cols)..], ..x },
                tokens: count,
                steps: cols.div_ceil(GROUP),
                bytes,
                stride,
                rows,
                bias,
                out: out.reborrow().slice(first, count),
            };
            if tile_count(x.count, count) <= FEW {
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

const _: () = assert!(TILE * DEPTH * STEP == BESIDE, "the second tile of a pair");

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
        let across = tile_count(self.x.count, self.tokens);
        let tiles = Tiles::new(amx, TILE.min(self.tokens));
        // Without the last step, if it is not a whole one.
        let whole = self.stride / STEP;
        for row in (0..self.rows).step_by(TILE) {
            let count = TILE.min(self.rows - row);
            if count == TILE && whole > 0 {
                let w = WeightRows { bytes: &self.bytes[row * self.stride..], stride: self.stride };
                let mut v = 0;
                while v < across {
                    let (count, x) = self.x.columns(self.tokens, 0, v);
                    let (sums, next) = ((&mut sums[v..], across), (self.line(row + TILE, 0), self.stride));
                    match count {
                        1 => tiles.multiply::<1, 1, true, true>(w, x, whole, sums, next),
                        _ => tiles.multiply::<1, 2, true, true>(w, x, whole, sums, next),
                    }
                    v += count;
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
        let across = tile_count(self.x.count, self.tokens);
        for step in (first..self.steps).step_by(DEPTH) {
            let steps = DEPTH.min(self.steps - step);
            let w = self.copy(rows, (step, steps), &mut copied);
            let mut v = 0;
            while v < across {
                let (count, x) = self.x.columns(self.tokens, step, v);
                let (sums, next) = ((&mut sums[v..], across), (std::ptr::null(), 0));
                match count {
                    1 => tiles.multiply::<1, 1, false, false>(w, x, steps, sums, next),
                    _ => tiles.multiply::<1, 2, false, false>(w, x, steps, sums, next),
                }
                v += count;
            }
        }
    }

    /// Some steps at a time of some weight rows, for all columns of x.
    #[inline(always)]
    fn many<D: Dots>(mut self, d: D, amx: Amx) {
        let mut sums = [SumTile::ZERO; ROWS / TILE * MANY];
        let mut copied = Copied::ZERO;
        let across = tile_count(self.x.count, self.tokens);
        let tiles = Tiles::new(amx, TILE.min(self.tokens));
        for top in (0..self.rows).step_by(ROWS) {
            let here = ROWS.min(self.rows - top);
            for step in (0..self.steps).step_by(DEPTH) {
                let steps = DEPTH.min(self.steps - step);
                for row in (0..here).step_by(PAIR) {
                    let rows = (top + row, PAIR.min(here - row));
                    let w = self.copy(rows, (step, steps), &mut copied);
                    let sums = &mut sums[row / TILE * across..];
                    // What is copied next.
                    let next = match (row + PAIR < here, step + DEPTH < self.steps) {
                        (true, _) => self.line(top + row + PAIR, step),
                        (false, true) => self.line(top, step + DEPTH),
                        (false, false) => self.line(top + ROWS, 0),
                    };
                    if step == 0 {
                        self.multiply::<true>(&tiles, w, (step, steps), sums, next);
                    } else {
                        self.multiply::<false>(&tiles, w, (step, steps), sums, next);
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
        mut next: *const u8,
    ) {
        let mut asked = 0;
        let planes = self.x.count;
        let across = tile_count(planes, self.tokens);
        for panel in 0..self.tokens.div_ceil(PANEL) {
            let before = panel * tile_count(planes, PANEL);
            let rows = (self.tokens - panel * PANEL).min(PANEL);
            let data = &self.x.data[panel * PANEL * self.steps * TILE * planes..];
            let mut v = 0;
            while v < tile_count(planes, rows) {
                let (count, x) = Planes { data, ..self.x }.columns(rows, step, v);
                let sums = (&mut sums[before + v..], across);
                match (count, asked < PAIR) {
                    (1, true) => tiles.multiply::<2, 1, FRESH, true>(w, x, steps, sums, (next, self.stride)),
                    (1, false) => {
                        tiles.multiply::<2, 1, FRESH, false>(w, x, steps, sums, (next, self.stride))
                    }
                    (_, true) => tiles.multiply::<2, 2, FRESH, true>(w, x, steps, sums, (next, self.stride)),
                    (_, false) => {
                        tiles.multiply::<2, 2, FRESH, false>(w, x, steps, sums, (next, self.stride))
                    }
                }
                next = next.wrapping_add(TILE * self.stride);
                asked += TILE;
                v += count;
            }
        }
    }

    /// Where step `step` of a row lies, if there is such a row.
    fn line(&self, row: usize, step: usize) -> *const u8 {
        self.bytes.as_ptr().wrapping_add(row * self.stride + step * STEP)
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
            for (tokens, planes) in sums.chunks_exact(self.x.count).enumerate() {
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
