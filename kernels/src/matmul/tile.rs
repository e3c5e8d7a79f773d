//! A tile of weight rows against rows of x, on one thread.

use super::source::{Row, Source, with_source};
use crate::format::{Matrix, Values};
use crate::rows::{Rows, RowsMut};
use crate::simd::{LANES, Lanes, Work, padded};

/// Weight rows multiplied at a time.
const TILE_ROWS: usize = 4;
/// Rows of x multiplied at a time: 4 x 3 accumulators of two 512-bit registers leave 8 for operands.
const TILE_TOKENS: usize = 3;
/// Tiles of weight rows dequantised at a time, which halves how often x comes from the second cache.
const TILES: usize = 2;
/// Chunks of a weight row dequantised at a time: 8 rows of 768 f32 are 24 KiB, half a first cache, and
/// three rows of x fit beside them.
const TILE_CHUNKS: usize = 24;
/// Rows of x whose accumulators (32 KiB) wait while the next chunks are dequantised.
const TOKENS: usize = 32;

/// Lanes of the products of one row of x with the weight rows of a tile.
type TileLanes = [[f32; LANES]; TILE_ROWS];

/// Rows of x, perhaps picked: row t is `x.row(picks[t])`.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub(crate) x: Rows<'a>,
    pub(crate) picks: Option<&'a [u32]>,
}

impl<'a> Input<'a> {
    pub(crate) fn all(x: Rows<'a>) -> Self {
        Self { x, picks: None }
    }

    #[inline]
    pub(crate) fn count(&self) -> usize {
        self.picks.map_or(self.x.count(), <[u32]>::len)
    }

    #[inline]
    pub(crate) fn row(&self, t: usize) -> &'a [f32] {
        self.x.row(self.picks.map_or(t, |picks| picks[t] as usize))
    }

    /// Rows `start .. start + count`.
    pub(crate) fn slice(&self, start: usize, count: usize) -> Self {
        match self.picks {
            Some(picks) => Self { picks: Some(&picks[start..][..count]), ..*self },
            None => Self::all(self.x.slice(start, count)),
        }
    }
}

/// `out[t, r] = dot(x[t], w[r]) (+ bias[r])`, all of it on this thread.
pub(crate) struct Product<'a> {
    pub(crate) x: Input<'a>,
    pub(crate) w: Matrix<'a>,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) out: RowsMut<'a>,
}

impl Work for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        with_source!(self.w, source => if self.x.count() == 1 {
            self.one(l, source)
        } else {
            self.many(l, source)
        })
    }
}

impl Product<'_> {
    /// One row of x: weights are dequantised in registers.
    #[inline(always)]
    fn one<L: Lanes, S: Source>(&mut self, l: L, source: S) {
        let x = self.x.row(0);
        let mut r = 0;
        while r + TILE_ROWS <= self.w.rows {
            let rows: [S::Row; TILE_ROWS] =
                [source.row(r), source.row(r + 1), source.row(r + 2), source.row(r + 3)];
            let [dots] = dots(l, rows, [x]);
            self.finish(r, 0, &dots);
            r += TILE_ROWS;
        }
        while r < self.w.rows {
            let [dots] = dots(l, [source.row(r)], [x]);
            self.finish(r, 0, &dots);
            r += 1;
        }
    }

    /// Many rows of x: weights are dequantised once per [`TOKENS`] of them.
    #[inline(always)]
    fn many<L: Lanes, S: Source>(&mut self, l: L, source: S) {
        const ROWS: usize = TILES * TILE_ROWS;
        let chunks = self.w.cols.div_ceil(LANES);
        let mut weights = [[[[0.0; LANES]; TILE_CHUNKS]; TILE_ROWS]; TILES];
        let mut lanes = [[[[0.0; LANES]; TILE_ROWS]; TOKENS]; TILES];
        for r in (0..self.w.rows).step_by(ROWS) {
            let rows = ROWS.min(self.w.rows - r);
            let tiles = rows.div_ceil(TILE_ROWS);
            for t in (0..self.x.count()).step_by(TOKENS) {
                let tokens = TOKENS.min(self.x.count() - t);
                for lanes in &mut lanes[..tiles] {
                    lanes[..tokens].fill([[0.0; LANES]; TILE_ROWS]);
                }
                for c in (0..chunks).step_by(TILE_CHUNKS) {
                    if t == 0 || chunks > TILE_CHUNKS {
                        for (i, weights) in weights.as_flattened_mut()[..rows].iter_mut().enumerate() {
                            dequantise(l, source.row(r + i), self.w.cols, c, weights);
                        }
                    }
                    let weights = &weights[..tiles];
                    l.enter(Accumulate {
                        x: self.x,
                        weights,
                        chunk: c,
                        first: t,
                        count: tokens,
                        lanes: &mut lanes,
                    });
                }
                for (tile, lanes) in lanes[..tiles].iter().enumerate() {
                    for (i, lanes) in lanes[..tokens].iter().enumerate() {
                        let [a, b, c, d] = lanes;
                        let dots = l.sum4([l.load(a), l.load(b), l.load(c), l.load(d)]);
                        let first = tile * TILE_ROWS;
                        self.finish(r + first, t + i, &dots[..TILE_ROWS.min(rows - first)]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn finish(&mut self, r: usize, t: usize, dots: &[f32]) {
        let out = &mut self.out.row(t)[r..][..dots.len()];
        match self.bias {
            Some(bias) => out.iter_mut().zip(dots).zip(&bias[r..]).for_each(|((o, d), b)| *o = d + b),
            None => out.copy_from_slice(dots),
        }
    }
}

/// Weight rows of a tile, dequantised and filled with zeros to whole chunks.
type TileWeights = [[[f32; LANES]; TILE_CHUNKS]; TILE_ROWS];

/// Adds the products of some chunks of weights to the lanes of some rows of x. No format is left here.
struct Accumulate<'a, 'l> {
    x: Input<'a>,
    weights: &'l [TileWeights],
    /// First chunk, of those the weights hold.
    chunk: usize,
    /// First row of x.
    first: usize,
    count: usize,
    lanes: &'l mut [[TileLanes; TOKENS]; TILES],
}

impl Work for Accumulate<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let mut t = 0;
        while t < self.count {
            let row = |i: usize| self.x.row(self.first + t + i);
            let tiles = self.weights.iter().zip(self.lanes.iter_mut());
            match self.count - t {
                1 => {
                    let x = [row(0)];
                    tiles.for_each(|(w, lanes)| add_products(l, w, x, self.chunk, rows_of(lanes, t)));
                    t += 1;
                }
                2 => {
                    let x = [row(0), row(1)];
                    tiles.for_each(|(w, lanes)| add_products(l, w, x, self.chunk, rows_of(lanes, t)));
                    t += 2;
                }
                _ => {
                    let x = [row(0), row(1), row(2)];
                    tiles.for_each(|(w, lanes)| add_products(l, w, x, self.chunk, rows_of(lanes, t)));
                    t += TILE_TOKENS;
                }
            }
        }
    }
}

/// The products of some rows of x with some weight rows, all in registers.
#[inline(always)]
pub(crate) fn dots<L: Lanes, W: Row, const R: usize, const T: usize>(
    l: L,
    rows: [W; R],
    x: [&[f32]; T],
) -> [[f32; R]; T] {
    let x = x.map(|x| x.as_chunks::<LANES>());
    let mut lanes = [[l.splat(0.0); R]; T];
    for c in 0..x[0].0.len() {
        let mut v = [l.splat(0.0); T];
        for (v, (chunks, _)) in v.iter_mut().zip(x) {
            *v = l.load(&chunks[c]);
        }
        for (r, row) in rows.iter().enumerate() {
            let w = row.chunk(l, c);
            for (lanes, v) in lanes.iter_mut().zip(v) {
                lanes[r] = l.fma(w, v, lanes[r]);
            }
        }
    }
    if !x[0].1.is_empty() {
        for (lanes, (_, rest)) in lanes.iter_mut().zip(x) {
            let v = l.load(&padded(rest, 0.0));
            for (lanes, row) in lanes.iter_mut().zip(&rows) {
                *lanes = l.fma(row.tail(l), v, *lanes);
            }
        }
    }
    let mut out = [[0.0; R]; T];
    let (fours, rest) = lanes.as_flattened().as_chunks::<4>();
    let sums = out.as_flattened_mut();
    for (sums, lanes) in sums.chunks_mut(4).zip(fours) {
        sums.copy_from_slice(&l.sum4(*lanes));
    }
    for (sum, lanes) in sums[4 * fours.len()..].iter_mut().zip(rest) {
        *sum = l.sum(*lanes);
    }
    out
}

/// Columns `32 * chunk ..` of a row of `cols` columns, as many as `out` holds, the last filled with zeros.
#[inline(always)]
pub(super) fn dequantise<L: Lanes, W: Row>(
    l: L,
    row: W,
    cols: usize,
    chunk: usize,
    out: &mut [[f32; LANES]],
) {
    let whole = cols / LANES;
    for (c, out) in (chunk..cols.div_ceil(LANES)).zip(out) {
        let v = if c < whole { row.chunk(l, c) } else { row.tail(l) };
        l.store(v, out);
    }
}

/// `T` of the rows from `t` on. (A length known to the compiler keeps their sums in registers.)
#[inline(always)]
fn rows_of<V, const T: usize>(lanes: &mut [V], t: usize) -> &mut [V; T] {
    lanes[t..].first_chunk_mut().expect("the caller counted")
}

/// Adds to `lanes[t][r]` the products of `x[t]`, from column `32 * chunk` on, with `weights[r]`.
#[inline(always)]
fn add_products<L: Lanes, const T: usize>(
    l: L,
    weights: &TileWeights,
    x: [&[f32]; T],
    chunk: usize,
    lanes: &mut [TileLanes; T],
) {
    let mut sums = [[l.splat(0.0); TILE_ROWS]; T];
    for (sums, lanes) in sums.iter_mut().zip(lanes.iter()) {
        for (sum, lanes) in sums.iter_mut().zip(lanes) {
            *sum = l.load(lanes);
        }
    }
    let x = x.map(|x| &x[chunk * LANES..]);
    let count = x[0].len().div_ceil(LANES).min(TILE_CHUNKS);
    let whole = count.min(x[0].len() / LANES);
    let chunks = x.map(|x| &x.as_chunks::<LANES>().0[..whole]);
    for c in 0..whole {
        let mut v = [l.splat(0.0); T];
        for (v, chunks) in v.iter_mut().zip(chunks) {
            *v = l.load(&chunks[c]);
        }
        add_chunk(l, weights, c, v, &mut sums);
    }
    if whole < count {
        let mut v = [l.splat(0.0); T];
        for (v, x) in v.iter_mut().zip(x) {
            *v = l.load(&padded(&x[whole * LANES..], 0.0));
        }
        add_chunk(l, weights, whole, v, &mut sums);
    }
    for (sums, lanes) in sums.iter().zip(lanes) {
        for (sum, lanes) in sums.iter().zip(lanes) {
            l.store(*sum, lanes);
        }
    }
}

#[inline(always)]
fn add_chunk<L: Lanes, const T: usize>(
    l: L,
    weights: &TileWeights,
    chunk: usize,
    x: [L::V; T],
    sums: &mut [[L::V; TILE_ROWS]; T],
) {
    for (r, weights) in weights.iter().enumerate() {
        let w = l.load(&weights[chunk]);
        for (sums, x) in sums.iter_mut().zip(x) {
            sums[r] = l.fma(w, x, sums[r]);
        }
    }
}

/// One row as f32, exactly.
pub(crate) struct Dequantise<'a> {
    pub(crate) w: Matrix<'a>,
    pub(crate) row: usize,
    pub(crate) out: &'a mut [f32],
}

impl Work for Dequantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        with_source!(self.w, source => {
            let row = source.row(self.row);
            let (chunks, rest) = self.out.as_chunks_mut::<LANES>();
            for (c, out) in chunks.iter_mut().enumerate() {
                l.store(row.chunk(l, c), out);
            }
            if !rest.is_empty() {
                let mut last = [0.0; LANES];
                l.store(row.tail(l), &mut last);
                rest.copy_from_slice(&last[..rest.len()]);
            }
        })
    }
}
