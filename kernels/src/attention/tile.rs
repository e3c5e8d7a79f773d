//! One tile of positions: scores, weights, weighted values, all in registers.
//!
//! Each is a [`Work`] of its own, so that none of them takes registers from another.

use super::cache::{PAGE, Pages};
use super::span::{Chunk, Weights};
use super::state::{PEAK, SUM};
use super::stored::{Page, Row, Stored};
use crate::simd::{LANES, Lanes, Work, exp};

/// Rows that are taken together.
pub(super) const TILE_ROWS: usize = 4;
/// Keys that are taken together.
pub(super) const TILE_KEYS: usize = 3;
/// Chunks of values that are taken together.
pub(super) const TILE_CHUNKS: usize = 2;
/// So many rows that share a key are not worth unpacking it to memory: all of them fit in registers.
pub(super) const FEW_ROWS: usize = 8;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Positions between two looks ahead.
pub(super) const PACE: usize = 8;

/// A chunk of each of some queries.
pub(super) type Rows4 = [Chunk; TILE_ROWS];
/// A chunk of each of some keys.
pub(super) type Keys3 = [Chunk; TILE_KEYS];

/// Lines of a page that will be read soon, asked for a few at a time while something else is computed. (The
/// columns of one key head are too short a run for the processor to see what comes next.)
pub(super) struct Ahead {
    /// The next one, and how many there are from it on.
    line: *const u8,
    left: usize,
    pace: usize,
}

impl Ahead {
    /// The rows of the page of `first`, up to `end`, in about so many steps; nothing where the block reads but
    /// some columns.
    pub(super) fn new(pages: &Pages<'_>, (first, end): (usize, usize), columns: usize, steps: usize) -> Self {
        if first >= end || columns != pages.row {
            return Self { line: std::ptr::null(), left: 0, pace: 0 };
        }
        let row = pages.table[first / PAGE] as usize * PAGE;
        let (data, bytes) = pages.data.bytes(pages.row);
        let left = (PAGE.min(end - first) * bytes).div_ceil(LINE);
        Self { line: data.wrapping_add(row * bytes), left, pace: left.div_ceil(steps) }
    }

    #[inline(always)]
    fn step<L: Lanes>(&mut self, l: L) {
        let count = self.pace.min(self.left);
        for _ in 0..count {
            l.prefetch_line(self.line);
            self.line = self.line.wrapping_add(LINE);
        }
        self.left -= count;
    }
}

/// Scores of rows and the keys at `offset .. end`, not scaled.
pub(super) struct Scores<'s> {
    pub(super) queries: &'s [Rows4],
    pub(super) keys: &'s [Keys3],
    pub(super) chunks: usize,
    pub(super) offset: usize,
    pub(super) end: usize,
    pub(super) ahead: &'s mut Ahead,
    pub(super) out: &'s mut [Weights],
}

impl Work for Scores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { queries, keys, chunks, offset, end, ahead, out } = self;
        for (queries, out) in queries.chunks_exact(chunks).zip(out.as_chunks_mut::<TILE_ROWS>().0) {
            let mut offset = offset;
            for keys in keys.chunks_exact(chunks) {
                ahead.step(l);
                let mut lanes = [[l.splat(0.0); TILE_KEYS]; TILE_ROWS];
                for (queries, keys) in queries.iter().zip(keys) {
                    let [a, b, c] = keys;
                    let (a, b, c) = (l.load(a), l.load(b), l.load(c));
                    for (lanes, query) in lanes.iter_mut().zip(queries) {
                        let query = l.load(query);
                        lanes[0] = l.fma(a, query, lanes[0]);
                        lanes[1] = l.fma(b, query, lanes[1]);
                        lanes[2] = l.fma(c, query, lanes[2]);
                    }
                }
                let [a, b, c, d] = lanes;
                let last = end.min(offset + TILE_KEYS);
                for key in 0..TILE_KEYS {
                    let sums = l.sum4([a[key], b[key], c[key], d[key]]);
                    if offset + key < last {
                        put(sums, offset + key, out);
                    }
                }
                offset += TILE_KEYS;
            }
        }
    }
}

#[inline(always)]
fn put(sums: [f32; TILE_ROWS], offset: usize, out: &mut [Weights; TILE_ROWS]) {
    assert!(offset < PAGE, "a tile ends with its page");
    for (sum, out) in sums.into_iter().zip(out) {
        out[offset] = sum;
    }
}

/// [`Scores`] of [`FEW_ROWS`] rows and the keys of a page.
pub(super) struct FewScores<'s, S> {
    pub(super) queries: &'s [Rows4],
    pub(super) page: Page<S>,
    pub(super) offsets: (usize, usize),
    pub(super) ahead: &'s mut Ahead,
    pub(super) out: &'s mut [Weights],
}

impl<S: Stored> Work for FewScores<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { queries, page, offsets, ahead, out } = self;
        let (a, b) = queries.split_at(queries.len() / 2);
        let whole = page.width / LANES;
        let [out_a, out_b] = out.as_chunks_mut::<TILE_ROWS>().0 else { unreachable!("few rows") };
        for offset in offsets.0..offsets.1 {
            if offset % 3 == 0 {
                ahead.step(l);
                ahead.step(l);
            }
            let row = page.row(offset);
            let mut lanes = [[l.splat(0.0); TILE_ROWS]; 2];
            for (chunk, (a, b)) in a.iter().zip(b).take(whole).enumerate() {
                add_few(l, [a, b], row.whole(l, chunk), &mut lanes);
            }
            if whole < a.len() {
                add_few(l, [&a[whole], &b[whole]], row.rest(l, whole), &mut lanes);
            }
            put(l.sum4(lanes[0]), offset, out_a);
            put(l.sum4(lanes[1]), offset, out_b);
        }
    }
}

#[inline(always)]
fn add_few<L: Lanes>(l: L, queries: [&Rows4; 2], key: L::V, lanes: &mut [[L::V; TILE_ROWS]; 2]) {
    for (lanes, queries) in lanes.iter_mut().zip(queries) {
        for (lanes, query) in lanes.iter_mut().zip(queries) {
            *lanes = l.fma(key, l.load(query), *lanes);
        }
    }
}

/// Turns scores into weights against the greatest score so far of their row, and says by which factor what
/// the row summed before shrinks.
pub(super) struct Soften<'s> {
    pub(super) scale: f32,
    /// First position of the tile.
    pub(super) first: usize,
    /// Position of the first row, and how many rows have the same.
    pub(super) position: usize,
    pub(super) per: usize,
    pub(super) window: usize,
    pub(super) weights: &'s mut [Weights],
    pub(super) keep: &'s mut [Chunk],
    pub(super) states: &'s mut [Chunk],
}

impl Work for Soften<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { scale, first, position, per, window, weights, keep, states } = self;
        let len = states.len() / weights.len();
        let scale = l.splat(scale);
        let shifts = keep.as_flattened_mut();
        let rows = weights.iter_mut().zip(states.chunks_exact_mut(len)).zip(shifts);
        for (row, ((scores, state), shift)) in rows.enumerate() {
            let (mut a, mut b) = halves(l, scores);
            (a, b) = (l.mul(a, scale), l.mul(b, scale));
            set_halves(l, (a, b), scores);
            let end = position + row / per + 1;
            let begin = end.saturating_sub(window);
            if begin > first || end < first + PAGE {
                scores[..begin.max(first) - first].fill(f32::NEG_INFINITY);
                scores[end.min(first + PAGE) - first..].fill(f32::NEG_INFINITY);
                (a, b) = halves(l, scores);
            }
            let peak = l.peak(l.max(a, b));
            let old = &mut state[len - 1][PEAK];
            let peak = if *old > peak { *old } else { peak };
            *shift = *old - peak;
            *old = peak;
        }
        for keep in &mut keep[..weights.len().div_ceil(LANES)] {
            l.store(exp(l, l.load(keep)), keep);
        }
        let rows = weights.iter_mut().zip(states.chunks_exact_mut(len)).zip(keep.as_flattened());
        for ((weights, state), keep) in rows {
            let last = &mut state[len - 1];
            let shift = l.splat(last[PEAK]);
            let (a, b) = halves(l, weights);
            let (a, b) = (exp(l, l.sub(a, shift)), exp(l, l.sub(b, shift)));
            set_halves(l, (a, b), weights);
            last[SUM] = last[SUM].mul_add(*keep, l.sum(l.add(a, b)));
        }
    }
}

#[inline(always)]
fn halves<L: Lanes>(l: L, x: &Weights) -> (L::V, L::V) {
    (l.load(x.first_chunk().expect("two chunks")), l.load(x.last_chunk().expect("two chunks")))
}

#[inline(always)]
fn set_halves<L: Lanes>(l: L, (a, b): (L::V, L::V), x: &mut Weights) {
    l.store(a, x.first_chunk_mut().expect("two chunks"));
    l.store(b, x.last_chunk_mut().expect("two chunks"));
}

/// Adds weighted values to two chunks of the states of some rows that see the same, shrunk by `keep` first.
pub(super) struct Values<'s> {
    pub(super) values: &'s [[Chunk; TILE_CHUNKS]],
    pub(super) chunk: usize,
    /// From one to another.
    pub(super) rows: (usize, usize),
    /// Of the first value.
    pub(super) offset: usize,
    pub(super) weights: &'s [Weights],
    pub(super) keep: &'s [Chunk],
    pub(super) ahead: &'s mut Ahead,
    pub(super) states: &'s mut [Chunk],
}

impl Work for Values<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        let (mut row, end) = self.rows;
        while row + TILE_ROWS <= end {
            self.add::<L, TILE_ROWS>(l, row);
            row += TILE_ROWS;
        }
        while row < end {
            self.add::<L, 1>(l, row);
            row += 1;
        }
    }
}

impl Values<'_> {
    #[inline(always)]
    fn add<L: Lanes, const T: usize>(&mut self, l: L, row: usize) {
        let len = self.states.len() / self.weights.len();
        let weights: &[Weights; T] = self.weights[row..].first_chunk().expect("the caller counted");
        let keep = &self.keep.as_flattened()[row..][..T];
        let states = &mut self.states[row * len..][..T * len];
        // A state ends with a chunk of its own, which a last chunk without a second leaves alone.
        let two = self.chunk + TILE_CHUNKS < len;
        let mut sums = [[l.splat(0.0); TILE_CHUNKS]; T];
        for ((sums, state), keep) in sums.iter_mut().zip(states.chunks_exact(len)).zip(keep) {
            sums[0] = l.mul(l.load(&state[self.chunk]), l.splat(*keep));
            sums[1] = l.mul(l.load(&state[self.chunk + 1]), l.splat(*keep));
        }
        let mut offset = self.offset;
        for values in self.values.chunks(PACE) {
            self.ahead.step(l);
            assert!(offset + values.len() <= PAGE, "a tile ends with its page");
            for (j, [a, b]) in values.iter().enumerate() {
                let (a, b) = (l.load(a), l.load(b));
                for (sums, weights) in sums.iter_mut().zip(weights) {
                    let weight = l.splat(weights[offset + j]);
                    sums[0] = l.fma(weight, a, sums[0]);
                    sums[1] = l.fma(weight, b, sums[1]);
                }
            }
            offset += values.len();
        }
        for (sums, state) in sums.iter().zip(states.chunks_exact_mut(len)) {
            l.store(sums[0], &mut state[self.chunk]);
            if two {
                l.store(sums[1], &mut state[self.chunk + 1]);
            }
        }
    }
}

/// [`Values`] of one chunk and [`FEW_ROWS`] rows, from a page; or of the `TAIL` after its whole chunks.
pub(super) struct FewValues<'s, S, const TAIL: bool> {
    pub(super) page: Page<S>,
    pub(super) offsets: (usize, usize),
    pub(super) chunk: usize,
    pub(super) weights: &'s [Weights],
    pub(super) keep: &'s [Chunk],
    pub(super) ahead: &'s mut Ahead,
    pub(super) states: &'s mut [Chunk],
}

impl<S: Stored, const TAIL: bool> Work for FewValues<'_, S, TAIL> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { page, offsets, chunk, weights, keep, ahead, states } = self;
        let len = states.len() / FEW_ROWS;
        let weights: &[Weights; FEW_ROWS] = weights.first_chunk().expect("few rows");
        let mut sums = [l.splat(0.0); FEW_ROWS];
        for ((sum, state), keep) in sums.iter_mut().zip(states.chunks_exact(len)).zip(keep.as_flattened()) {
            *sum = l.mul(l.load(&state[chunk]), l.splat(*keep));
        }
        for first in (offsets.0..offsets.1).step_by(PACE) {
            ahead.step(l);
            for offset in first..offsets.1.min(first + PACE).min(PAGE) {
                let row = page.row(offset);
                let v = if TAIL { row.rest(l, chunk) } else { row.whole(l, chunk) };
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = l.fma(l.splat(weights[offset]), v, *sum);
                }
            }
        }
        for (sum, state) in sums.iter().zip(states.chunks_exact_mut(len)) {
            l.store(*sum, &mut state[chunk]);
        }
    }
}
