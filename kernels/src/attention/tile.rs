//! One tile of positions: scores, weights, weighted values, all in registers.
//!
//! Each is a [`Work`] of its own, so that none of them takes registers from another.

use super::cache::{PAGE, Pages};
use super::span::{Chunk, Weights};
use super::state::{PEAK, SUM};
use crate::simd::{LANES, Lanes, Work, exp};

/// Rows that are taken together.
pub(super) const TILE_ROWS: usize = 4;
/// Keys that are taken together.
pub(super) const TILE_KEYS: usize = 3;
/// Chunks of values that are taken together.
pub(super) const TILE_CHUNKS: usize = 2;
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
                let count = TILE_KEYS.min(end - offset);
                for (sums, out) in l.sum4x3(lanes).iter().zip(out.iter_mut()) {
                    // What follows the sums is overwritten by the next ones, if there is room for it.
                    match out[offset..].first_chunk_mut() {
                        Some(out) => *out = *sums,
                        None => out[offset..][..count].copy_from_slice(&sums[..count]),
                    }
                }
                offset += TILE_KEYS;
            }
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
