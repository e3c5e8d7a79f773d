//! What one thread does at a time, and the memory it does it in.

use super::PAGE;
use super::SPAN;
use super::call::{Call, Shape};
use super::span::{Block, Chunk, Prepare, Span, Weights, Workspace};
use super::state::{Total, state_chunks};
use super::tile::{Rows4, TILE_KEYS, TILE_ROWS};
use crate::rows::RowsMut;
use crate::simd::{LANES, Lanes, Work};

/// Stack memory of a part: at most `ROWS` rows, chunks of queries, of keys or values of part of a tile, and of
/// states. On a cache line of its own: chunks that straddle two are slower to load.
#[repr(align(64))]
struct Memory<const ROWS: usize, const QUERIES: usize, const UNPACKED: usize, const STATES: usize> {
    queries: [Rows4; QUERIES],
    unpacked: [Chunk; UNPACKED],
    states: [Chunk; STATES],
    weights: [Weights; ROWS],
    keep: [Chunk; 2],
    totals: [Total; ROWS],
}

/// Large enough that unpacking is a small part of the work: 350 KiB.
type Large = Memory<64, 288, 216, 1088>;
/// Quick to clear, for short contexts and narrow heads: 73 KiB.
type Small = Memory<32, 34, 128, 192>;

impl<const ROWS: usize, const QUERIES: usize, const UNPACKED: usize, const STATES: usize>
    Memory<ROWS, QUERIES, UNPACKED, STATES>
{
    #[inline(always)]
    fn clear() -> Self {
        Self {
            queries: [[[0.0; LANES]; TILE_ROWS]; QUERIES],
            unpacked: [[0.0; LANES]; UNPACKED],
            states: [[0.0; LANES]; STATES],
            weights: [[0.0; PAGE]; ROWS],
            keep: [[0.0; LANES]; 2],
            totals: [Total::NONE; ROWS],
        }
    }

    /// Rows that fit.
    fn rows(shape: &Shape<'_>) -> usize {
        let chunks = shape.key.div_ceil(LANES);
        let fits = TILE_KEYS * chunks <= UNPACKED;
        let rows = ROWS.min(QUERIES / chunks * TILE_ROWS).min(STATES / state_chunks(shape.value));
        if fits { rows } else { 0 }
    }

    fn room(&mut self) -> Room<'_> {
        let Self { queries, unpacked, states, weights, keep, totals } = self;
        Room { queries, unpacked, states, weights, keep, totals }
    }
}

/// Tokens and heads of the greatest block, if no sequence has more than `tokens`.
pub(super) fn limits(shape: &Shape<'_>, tokens: usize) -> (usize, usize) {
    let (most, per) = (Large::rows(shape), shape.per());
    assert!(most > 0, "heads of {} and {} are too wide", shape.key, shape.value);
    if per > most {
        // The greatest divisor: so every block of a key head is as large as the others.
        return (1, (1..=most).rev().find(|n| per.is_multiple_of(*n)).unwrap_or(1));
    }
    match tokens {
        0 | 1 => (1, per * (most / per).min(shape.kv_heads)),
        _ => (tokens.min(most / per), per),
    }
}

/// [`Memory`] of some size.
struct Room<'m> {
    queries: &'m mut [Rows4],
    unpacked: &'m mut [Chunk],
    states: &'m mut [Chunk],
    weights: &'m mut [Weights],
    keep: &'m mut [Chunk],
    totals: &'m mut [Total],
}

/// Some heads of some rows, of whatever sequences; not of those whose spans are parts of their own.
pub(super) struct Part<'p, 'a, 'o> {
    pub(super) call: &'p Call<'a, 'p>,
    /// Tokens and heads that are taken together at most.
    pub(super) block: (usize, usize),
    pub(super) first_row: usize,
    pub(super) first_head: usize,
    /// `[rows, heads * value]`.
    pub(super) out: RowsMut<'o>,
}

impl Work for Part<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        if self.block.0 * self.block.1 <= Small::rows(&self.call.shape) {
            self.run_in(l, Small::clear().room());
        } else {
            self.run_in(l, Large::clear().room());
        }
    }
}

impl Part<'_, '_, '_> {
    #[inline(always)]
    fn run_in<L: Lanes>(mut self, l: L, mut room: Room<'_>) {
        let value = self.call.shape.value;
        let (end, heads) = (self.first_row + self.out.count(), self.out.width() / value);
        let mut row = self.first_row;
        let mut index = self.call.sequence_of(row);
        while row < end {
            let sequence = self.call.sequence(index);
            let last = end.min(sequence.first + sequence.tokens);
            if self.call.is_split(index, &sequence) {
                row = last;
            }
            while row < last {
                let tokens = self.block.0.min(last - row);
                for head in (0..heads).step_by(self.block.1) {
                    let heads = self.block.1.min(heads - head);
                    let place = (row - sequence.first, tokens);
                    let block = self.call.block(&sequence, place, (self.first_head + head, heads));
                    let sinks = self.call.shape.sinks.map(|sinks| &sinks[self.first_head + head..][..heads]);
                    let out = self.out.reborrow().slice(row - self.first_row, tokens);
                    attend_block(l, &block, sinks, &mut room, out.columns(head * value, heads * value));
                }
                row += tokens;
            }
            index += 1;
        }
    }
}

/// The output of a block, span by span.
#[inline(always)]
fn attend_block<L: Lanes>(
    l: L,
    block: &Block<'_>,
    sinks: Option<&[f32]>,
    room: &mut Room<'_>,
    mut out: RowsMut<'_>,
) {
    let Room { queries, unpacked, states, weights, keep, totals } = room;
    let (value, heads) = (block.value, block.heads());
    let len = state_chunks(value);
    let states = &mut states[..block.tokens() * heads * len];
    l.enter(Prepare { block, queries });
    let (begin, end) = block.range();
    for first in (begin / SPAN * SPAN..end).step_by(SPAN) {
        let range = (begin.max(first), end.min(first + SPAN));
        let space = Workspace { queries, unpacked, weights, keep };
        l.enter(Span { block, range, space, states });
        let mut rows = states.chunks_exact(len).zip(totals.iter_mut());
        for token in 0..block.tokens() {
            let (begin, end) = block.visible(token);
            let outs = out.row(token).chunks_exact_mut(value);
            for (out, (state, total)) in outs.zip(&mut rows) {
                if begin / SPAN == first / SPAN {
                    *total = Total::first(state, out);
                } else if begin < first && first < end {
                    total.merge(l, state, out);
                }
            }
        }
    }
    for token in 0..block.tokens() {
        for (h, out) in out.row(token).chunks_exact_mut(value).enumerate() {
            totals[token * heads + h].finish(l, sinks.map(|sinks| sinks[h]), out);
        }
    }
}

/// The states of some heads of a token over one span.
pub(super) struct Split<'p, 'a, 'o> {
    pub(super) call: &'p Call<'a, 'p>,
    /// Heads that are taken together at most.
    pub(super) block: usize,
    /// Of the state, among all of the call.
    pub(super) index: usize,
    pub(super) first_head: usize,
    /// `[1, heads * state_chunks]`.
    pub(super) out: RowsMut<'o>,
}

impl Work for Split<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        let shape = &self.call.shape;
        let (sequence, token, span) = self.call.state(self.index);
        let states = self.out.row(0).as_chunks_mut::<LANES>().0;
        let len = state_chunks(shape.value);
        let heads = states.len() / len;
        let mut memory = Large::clear();
        let Room { queries, unpacked, weights, keep, .. } = memory.room();
        for (index, states) in states.chunks_mut(self.block * len).enumerate() {
            let head = index * self.block;
            let block = self.call.block(
                &sequence,
                (token, 1),
                (self.first_head + head, self.block.min(heads - head)),
            );
            let (begin, end) = block.range();
            let range = (begin.max(span * SPAN), end.min((span + 1) * SPAN));
            if range.0 < range.1 {
                l.enter(Prepare { block: &block, queries });
                let space = Workspace { queries, unpacked, weights, keep };
                l.enter(Span { block: &block, range, space, states });
            }
        }
    }
}
