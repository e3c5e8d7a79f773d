//! The state of a row over one span, and how the states of its spans become its output.

use super::span::Chunk;
use crate::rows::Rows;
use crate::simd::{LANES, Lanes, Work, exp, padded};

/// Where the last chunk of a state holds the greatest score.
pub(super) const PEAK: usize = 0;
/// Where it holds the sum of weights.
pub(super) const SUM: usize = 1;

/// Chunks of a row's state: the weighted sum of values, then one that begins with [`PEAK`] and [`SUM`].
pub(super) fn state_chunks(value: usize) -> usize {
    value.div_ceil(LANES) + 1
}

/// What the spans so far of a row come to; their weighted sum of values lies in the row's output.
#[derive(Clone, Copy)]
pub(super) struct Total {
    peak: f32,
    sum: f32,
}

impl Total {
    pub(super) const NONE: Self = Self { peak: f32::NEG_INFINITY, sum: 0.0 };

    /// The first span of the row.
    #[inline(always)]
    pub(super) fn first(state: &[Chunk], out: &mut [f32]) -> Self {
        let (last, chunks) = state.split_last().expect("a state has a last chunk");
        out.copy_from_slice(&chunks.as_flattened()[..out.len()]);
        Self { peak: last[PEAK], sum: last[SUM] }
    }

    /// A later span of the row.
    #[inline(always)]
    pub(super) fn merge<L: Lanes>(&mut self, l: L, state: &[Chunk], out: &mut [f32]) {
        let (last, chunks) = state.split_last().expect("a state has a last chunk");
        let peak = if self.peak > last[PEAK] { self.peak } else { last[PEAK] };
        let (keep, take) = (exp_one(l, self.peak - peak), exp_one(l, last[PEAK] - peak));
        map(l, out, |index, out| l.fma(l.load(&chunks[index]), l.splat(take), l.mul(out, l.splat(keep))));
        *self = Self { peak, sum: last[SUM].mul_add(take, self.sum * keep) };
    }

    /// Weighted sums over the sum of weights, which a sink is part of.
    #[inline(always)]
    pub(super) fn finish<L: Lanes>(self, l: L, sink: Option<f32>, out: &mut [f32]) {
        let sum = match sink {
            Some(sink) => self.sum + exp_one(l, sink - self.peak),
            None => self.sum,
        };
        map(l, out, |_, out| l.div(out, l.splat(sum)));
    }
}

/// The output of some heads of one row from the states of its spans, one per row of `states`.
pub(super) struct Finish<'a, 's> {
    /// `[spans, heads * state_chunks]`.
    pub(super) states: Rows<'a>,
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) value: usize,
    pub(super) out: &'s mut [f32],
}

impl Work for Finish<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let len = state_chunks(self.value) * LANES;
        for (h, out) in self.out.chunks_exact_mut(self.value).enumerate() {
            let states = self.states.columns(h * len, len);
            let state = |span| states.row(span).as_chunks().0;
            let mut total = Total::first(state(0), out);
            for span in 1..states.count() {
                total.merge(l, state(span), out);
            }
            total.finish(l, self.sinks.map(|sinks| sinks[h]), out);
        }
    }
}

/// `f` of every chunk.
#[inline(always)]
fn map<L: Lanes>(l: L, x: &mut [f32], f: impl Fn(usize, L::V) -> L::V) {
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for (index, chunk) in chunks.iter_mut().enumerate() {
        l.store(f(index, l.load(chunk)), chunk);
    }
    if !rest.is_empty() {
        let mut last = padded(rest, 0.0);
        l.store(f(chunks.len(), l.load(&last)), &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

#[inline(always)]
fn exp_one<L: Lanes>(l: L, x: f32) -> f32 {
    let mut lanes = padded(&[], x);
    l.store(exp(l, l.load(&lanes)), &mut lanes);
    lanes[0]
}
