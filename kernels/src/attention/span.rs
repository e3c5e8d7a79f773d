//! Some heads of one row, which share a key head, over some positions.

use super::SPAN;
use super::cache::{CacheSlice, Element, PAGE, Pages};
use crate::matmul::source::Row;
use crate::matmul::tile::dots;
use crate::rows::Rows;
use crate::simd::{LANES, Lanes, Work, exp, padded};

/// Heads taken together at most.
const HEADS: usize = 8;
/// Chunks of state on the stack; two of them are 34 KiB.
const STATE: usize = 136;

/// Values of one head's state: the weighted sum of values in whole chunks, then one chunk that begins with
/// the greatest score and the sum of weights.
pub(super) fn state_len(value: usize) -> usize {
    (value.div_ceil(LANES) + 1) * LANES
}

/// Heads taken together, by the width of a value head.
pub(super) fn group_heads(value: usize) -> usize {
    let heads = STATE / (state_len(value) / LANES);
    assert!(heads > 0, "value heads of {value}");
    heads.min(HEADS)
}

/// Query heads of one row that share a key head.
#[derive(Clone, Copy)]
pub(super) struct Group<'a> {
    /// `[heads, key]`.
    pub(super) queries: &'a [f32],
    pub(super) keys: &'a Pages<'a>,
    pub(super) values: &'a Pages<'a>,
    /// First column and width of the key in a cache row.
    pub(super) key_columns: (usize, usize),
    pub(super) value_columns: (usize, usize),
    pub(super) scale: f32,
}

type Chunk = [f32; LANES];

/// The state of the heads over `range`, which lies in one span.
pub(super) struct Span<'a, 's> {
    pub(super) group: Group<'a>,
    pub(super) range: (usize, usize),
    pub(super) state: &'s mut [Chunk],
}

impl Work for Span<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { group, range, state } = self;
        match (group.keys.data, group.values.data) {
            (CacheSlice::F32(keys), CacheSlice::F32(values)) => {
                tiles(l, &group, (keys, values), range, state)
            }
            (CacheSlice::Bf16(keys), CacheSlice::Bf16(values)) => {
                tiles(l, &group, (keys, values), range, state)
            }
            _ => panic!("keys and values of different types"),
        }
    }
}

/// The output of the heads over `range`, span by span.
pub(super) struct Serial<'a, 's> {
    pub(super) group: Group<'a>,
    pub(super) range: (usize, usize),
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) out: &'s mut [f32],
}

impl Work for Serial<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let heads = self.group.queries.len() / self.group.key_columns.1;
        let value = self.group.value_columns.1;
        let len = heads * state_len(value) / LANES;
        let (mut total, mut next) = ([[0.0; LANES]; STATE], [[0.0; LANES]; STATE]);
        let (total, next) = (&mut total[..len], &mut next[..len]);
        let (begin, end) = self.range;
        for first in (begin / SPAN * SPAN..end).step_by(SPAN) {
            let range = (begin.max(first), end.min(first + SPAN));
            if range.0 == begin {
                l.enter(Span { group: self.group, range, state: total });
            } else {
                l.enter(Span { group: self.group, range, state: next });
                merge(l, value, total, next);
            }
        }
        finish(l, value, self.sinks, total, self.out);
    }
}

/// The output of all heads of one row from the states of its spans, one per row of `states`.
pub(super) struct Finish<'a, 's> {
    pub(super) states: Rows<'a>,
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) value: usize,
    pub(super) out: &'s mut [f32],
}

impl Work for Finish<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let len = state_len(self.value);
        for (h, out) in self.out.chunks_exact_mut(self.value).enumerate() {
            let state = self.states.columns(h * len, len);
            let mut total = [[0.0; LANES]; STATE];
            let total = &mut total[..len / LANES];
            total.copy_from_slice(state.row(0).as_chunks().0);
            for span in 1..state.count() {
                merge(l, self.value, total, state.row(span).as_chunks().0);
            }
            finish(l, self.value, self.sinks.map(|sinks| &sinks[h..=h]), total, out);
        }
    }
}

/// Columns of the cache rows of one page.
#[derive(Clone, Copy)]
struct Page<'a, E> {
    data: &'a [E],
    stride: usize,
    width: usize,
}

impl<'a, E: Element> Page<'a, E> {
    #[inline(always)]
    fn of(data: &'a [E], pages: &Pages<'_>, position: usize, columns: (usize, usize)) -> Self {
        let row = pages.table[position / PAGE] as usize * PAGE;
        Self { data: &data[row * pages.row + columns.0..], stride: pages.row, width: columns.1 }
    }

    #[inline(always)]
    fn row(&self, offset: usize) -> CacheRow<'a, E> {
        let (chunks, rest) = self.data[offset * self.stride..][..self.width].as_chunks();
        CacheRow { chunks, rest }
    }
}

#[derive(Clone, Copy)]
struct CacheRow<'a, E> {
    chunks: &'a [[E; LANES]],
    rest: &'a [E],
}

impl<E: Element> Row for CacheRow<'_, E> {
    #[inline(always)]
    fn chunk<L: Lanes>(&self, l: L, index: usize) -> L::V {
        E::lanes(l, &self.chunks[index])
    }
    #[inline(always)]
    fn tail<L: Lanes>(&self, l: L) -> L::V {
        let mut lanes = [E::ZERO; LANES];
        lanes[..self.rest.len()].copy_from_slice(self.rest);
        E::lanes(l, &lanes)
    }
}

/// Online softmax over the tiles of `range`.
#[inline(always)]
fn tiles<L: Lanes, E: Element>(
    l: L,
    group: &Group<'_>,
    (keys, values): (&[E], &[E]),
    range: (usize, usize),
    state: &mut [Chunk],
) {
    let len = state_len(group.value_columns.1) / LANES;
    for state in state.chunks_exact_mut(len) {
        state.fill([0.0; LANES]);
        state[len - 1][0] = f32::NEG_INFINITY;
    }
    let mut weights = [[[0.0; LANES]; PAGE / LANES]; HEADS];
    let mut keep = [0.0; HEADS];
    for first in (range.0 / PAGE * PAGE..range.1).step_by(PAGE) {
        let offsets = (range.0.max(first) - first, range.1.min(first + PAGE) - first);
        weights.fill([[f32::NEG_INFINITY; LANES]; PAGE / LANES]);
        scores(l, group, Page::of(keys, group.keys, first, group.key_columns), offsets, &mut weights);
        for ((state, weights), keep) in state.chunks_exact_mut(len).zip(&mut weights).zip(&mut keep) {
            *keep = soften(l, weights, &mut state[len - 1]);
        }
        let page = Page::of(values, group.values, first, group.value_columns);
        let mut heads = state.chunks_exact_mut(len);
        let mut h = 0;
        loop {
            let four = [heads.next(), heads.next(), heads.next(), heads.next()];
            match four {
                [Some(a), Some(b), Some(c), Some(d)] => {
                    let weights = [&weights[h], &weights[h + 1], &weights[h + 2], &weights[h + 3]];
                    let keep = [keep[h], keep[h + 1], keep[h + 2], keep[h + 3]];
                    weigh(l, page, offsets, weights, keep, [a, b, c, d]);
                    h += 4;
                }
                some => {
                    for state in some.into_iter().flatten() {
                        weigh(l, page, offsets, [&weights[h]], [keep[h]], [state]);
                        h += 1;
                    }
                    break;
                }
            }
        }
    }
}

/// Scaled scores of the keys at `offsets`: four heads by two keys, then head by head.
#[inline(always)]
fn scores<L: Lanes, E: Element>(
    l: L,
    group: &Group<'_>,
    page: Page<'_, E>,
    offsets: (usize, usize),
    out: &mut [[Chunk; PAGE / LANES]; HEADS],
) {
    let width = group.key_columns.1;
    let mut fours = group.queries.chunks_exact(4 * width);
    let mut h = 0;
    for four in &mut fours {
        let (a, b) = four.split_at(2 * width);
        let ((a, b), (c, d)) = (a.split_at(width), b.split_at(width));
        let mut j = offsets.0;
        while j + 2 <= offsets.1 {
            let dots = dots(l, [page.row(j), page.row(j + 1)], [a, b, c, d]);
            for (dots, out) in dots.iter().zip(&mut out[h..]) {
                put(dots, group.scale, j, out);
            }
            j += 2;
        }
        if j < offsets.1 {
            let dots = dots(l, [page.row(j)], [a, b, c, d]);
            for (dots, out) in dots.iter().zip(&mut out[h..]) {
                put(dots, group.scale, j, out);
            }
        }
        h += 4;
    }
    for query in fours.remainder().chunks_exact(width) {
        let mut j = offsets.0;
        while j + 4 <= offsets.1 {
            let rows = [page.row(j), page.row(j + 1), page.row(j + 2), page.row(j + 3)];
            put(dots(l, rows, [query]).as_flattened(), group.scale, j, &mut out[h]);
            j += 4;
        }
        while j < offsets.1 {
            put(dots(l, [page.row(j)], [query]).as_flattened(), group.scale, j, &mut out[h]);
            j += 1;
        }
        h += 1;
    }
}

#[inline(always)]
fn put(dots: &[f32], scale: f32, offset: usize, out: &mut [Chunk; PAGE / LANES]) {
    for (out, dot) in out.as_flattened_mut()[offset..].iter_mut().zip(dots) {
        *out = dot * scale;
    }
}

/// Turns scores into weights against the greatest score so far, and gives back the factor by which what
/// was summed before shrinks. `last` begins with greatest score and sum of weights.
#[inline(always)]
fn soften<L: Lanes>(l: L, scores: &mut [Chunk; PAGE / LANES], last: &mut Chunk) -> f32 {
    let [a, b] = scores;
    let [old, sum, ..] = last;
    let peak = l.peak(l.max(l.load(a), l.load(b)));
    let peak = if *old > peak { *old } else { peak };
    let keep = exp_one(l, *old - peak);
    let shift = l.splat(peak);
    let x = exp(l, l.sub(l.load(a), shift));
    let y = exp(l, l.sub(l.load(b), shift));
    l.store(x, a);
    l.store(y, b);
    *sum = sum.mul_add(keep, l.sum(l.add(x, y)));
    *old = peak;
    keep
}

/// Adds the weighted values at `offsets` to the states of some heads, shrunk by `keep` first.
#[inline(always)]
fn weigh<L: Lanes, E: Element, const T: usize>(
    l: L,
    page: Page<'_, E>,
    offsets: (usize, usize),
    weights: [&[Chunk; PAGE / LANES]; T],
    keep: [f32; T],
    mut states: [&mut [Chunk]; T],
) {
    let whole = page.width / LANES;
    let weights = weights.map(|w| &w.as_flattened()[offsets.0..offsets.1]);
    let mut c = 0;
    while c + 2 <= whole {
        weigh_chunks::<L, E, T, 2, false>(l, page, (c, offsets.0), weights, keep, &mut states);
        c += 2;
    }
    if c < whole {
        weigh_chunks::<L, E, T, 1, false>(l, page, (c, offsets.0), weights, keep, &mut states);
    }
    if whole * LANES < page.width {
        weigh_chunks::<L, E, T, 1, true>(l, page, (whole, offsets.0), weights, keep, &mut states);
    }
}

/// `C` whole chunks of [`weigh`], or the `TAIL` after them.
#[inline(always)]
fn weigh_chunks<L: Lanes, E: Element, const T: usize, const C: usize, const TAIL: bool>(
    l: L,
    page: Page<'_, E>,
    (chunk, offset): (usize, usize),
    weights: [&[f32]; T],
    keep: [f32; T],
    states: &mut [&mut [Chunk]; T],
) {
    let mut sums = [[l.splat(0.0); C]; T];
    for ((sums, state), keep) in sums.iter_mut().zip(states.iter()).zip(keep) {
        for (sum, state) in sums.iter_mut().zip(chunks_of::<C>(state, chunk)) {
            *sum = l.mul(l.load(state), l.splat(keep));
        }
    }
    for j in 0..weights[0].len() {
        let row = page.row(offset + j);
        for c in 0..C {
            let v = if TAIL { row.tail(l) } else { row.chunk(l, chunk + c) };
            for (sums, weights) in sums.iter_mut().zip(weights) {
                sums[c] = l.fma(l.splat(weights[j]), v, sums[c]);
            }
        }
    }
    for (sums, state) in sums.iter().zip(states) {
        let state: &mut [Chunk; C] = state[chunk..].first_chunk_mut().expect("the caller counted");
        for (sum, state) in sums.iter().zip(state) {
            l.store(*sum, state);
        }
    }
}

/// `C` chunks from `first` on. (A length known to the compiler keeps their sums in registers.)
#[inline(always)]
fn chunks_of<const C: usize>(state: &[Chunk], first: usize) -> &[Chunk; C] {
    state[first..].first_chunk().expect("the caller counted")
}

/// Merges the states of a later span into the total.
#[inline(always)]
fn merge<L: Lanes>(l: L, value: usize, total: &mut [Chunk], later: &[Chunk]) {
    let len = state_len(value) / LANES;
    for (total, later) in total.chunks_exact_mut(len).zip(later.chunks_exact(len)) {
        let ([old, sum, ..], [new, add, ..]) = (total[len - 1], later[len - 1]);
        let peak = if old > new { old } else { new };
        let (keep, take) = (exp_one(l, old - peak), exp_one(l, new - peak));
        for (total, later) in total[..len - 1].iter_mut().zip(later) {
            let kept = l.mul(l.load(total), l.splat(keep));
            l.store(l.fma(l.load(later), l.splat(take), kept), total);
        }
        total[len - 1][0] = peak;
        total[len - 1][1] = add.mul_add(take, sum * keep);
    }
}

/// Weighted sums over sums of weights.
#[inline(always)]
fn finish<L: Lanes>(l: L, value: usize, sinks: Option<&[f32]>, total: &[Chunk], out: &mut [f32]) {
    let len = state_len(value) / LANES;
    for (h, (total, out)) in total.chunks_exact(len).zip(out.chunks_exact_mut(value)).enumerate() {
        let [peak, sum, ..] = total[len - 1];
        let sum = match sinks {
            Some(sinks) => sum + exp_one(l, sinks[h] - peak),
            None => sum,
        };
        for (total, out) in total[..len - 1].iter().zip(out.chunks_mut(LANES)) {
            let mut lanes = [0.0; LANES];
            l.store(l.div(l.load(total), l.splat(sum)), &mut lanes);
            out.copy_from_slice(&lanes[..out.len()]);
        }
    }
}

#[inline(always)]
fn exp_one<L: Lanes>(l: L, x: f32) -> f32 {
    let mut lanes = padded(&[], x);
    l.store(exp(l, l.load(&lanes)), &mut lanes);
    lanes[0]
}
