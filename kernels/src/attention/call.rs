//! One call: how its work is cut into parts for the threads.
//!
//! Without long contexts a call is one parallel region, over rows and heads of all sequences. Where few rows
//! of a sequence meet several spans, their spans are parts of their own, in the same region, and a second
//! region merges them.

use super::part::{Part, Split, limits};
use super::span::Block;
use super::state::{Finish, state_chunks};
use super::{BatchQueries, SPAN, SPLIT_HEADS, Sequence};
use crate::rows::{Bands, Cut, Rows, RowsMut, for_each_part, for_each_part_of_two};
use crate::simd::{Isa, LANES};
use crate::team;

/// Multiply-adds below which a call stays on its thread.
const SMALL: usize = 64 * 1024;
/// Parts per thread, where there is enough to cut: what one thread does not get done, others take over.
const PARTS: usize = 4;
/// Heads that share unpacked keys which are not cut further for the sake of more parts; and for the sake of a
/// part for every thread.
const FEW_HEADS: (usize, usize) = (16, 8);

/// What both kinds of attention are.
#[derive(Clone, Copy)]
pub(super) struct Shape<'a> {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) key: usize,
    pub(super) value: usize,
    pub(super) scale: f32,
    pub(super) window: usize,
    pub(super) sinks: Option<&'a [f32]>,
}

impl Shape<'_> {
    /// Query heads that share a key head.
    pub(super) fn per(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// First position that the query at `position` sees.
    fn begin(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }

    /// Spans that queries from `first_position` on see: from one to another.
    fn spans(&self, first_position: usize, tokens: usize) -> (usize, usize) {
        (self.begin(first_position) / SPAN, (first_position + tokens).div_ceil(SPAN))
    }
}

/// One call.
pub(super) struct Call<'a, 's> {
    pub(super) shape: Shape<'s>,
    pub(super) queries: Rows<'a>,
    pub(super) batch: BatchQueries<'a>,
    /// Sequences before this one have their spans computed side by side, where that makes [`Call::states`].
    split: usize,
}

/// Attention of all rows of a batch.
pub(super) fn attend(
    isa: Isa,
    shape: Shape<'_>,
    batch: BatchQueries<'_>,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    let queries = Rows::new(batch.rows, shape.heads * shape.key);
    let mut out = RowsMut::new(out, shape.heads * shape.value);
    assert_eq!(queries.count(), out.count(), "rows in and out");
    let mut call = Call { shape, queries, batch, split: 0 };
    let (longest, work) = call.check();
    if queries.count() == 0 {
        return;
    }
    let limits = limits(&shape, longest);
    let parallel = work > SMALL && team::threads() > 1;
    let state = state_chunks(shape.value) * LANES;
    let states = if parallel { call.choose_split(scratch.len() / (shape.heads * state)) } else { 0 };

    let (mut band, mut heads) = if parallel { limits } else { (queries.count(), shape.heads) };
    let parts =
        |band: usize, heads: usize| (states + queries.count().div_ceil(band)) * shape.heads.div_ceil(heads);
    while parallel && parts(band, heads) < PARTS * team::threads() {
        let few = if parts(band, heads) < team::threads() { FEW_HEADS.1 } else { FEW_HEADS.0 };
        let fewer = fewer_heads(&shape, heads, few);
        match (band, fewer) {
            (2.., _) => band = band.div_ceil(2),
            (_, Some(fewer)) => heads = fewer,
            _ => break,
        }
    }
    let block = (limits.0.min(band), limits.1.min(heads));
    let call = &call;
    let (scratch, _) = scratch.split_at_mut(states * shape.heads * state);
    for_each_part_of_two(
        (
            Cut::new(RowsMut::new(scratch, shape.heads * state), Bands::Every(1), heads * state),
            Cut::new(out.reborrow(), Bands::Every(band), heads * shape.value),
        ),
        &|part| {
            let first_head = part.first_column / state;
            isa.run(Split {
                call,
                block: limits.1.min(heads),
                index: part.first_row,
                first_head,
                out: part.rows,
            });
        },
        &|part| {
            let first_head = part.first_column / shape.value;
            isa.run(Part { call, block, first_row: part.first_row, first_head, out: part.rows });
        },
    );
    if states > 0 {
        let states = Rows::new(scratch, shape.heads * state);
        for_each_part(Cut::new(out, Bands::Every(1), shape.per() * shape.value), &|part| {
            call.merge(isa, states, part.first_row, part.first_column / shape.value, part.rows)
        });
    }
}

/// The next smaller number of heads that parts may have.
fn fewer_heads(shape: &Shape<'_>, heads: usize, few: usize) -> Option<usize> {
    let per = shape.per();
    if heads > per {
        return Some((heads / per).div_ceil(2) * per).filter(|&fewer| fewer < heads);
    }
    (few..heads).rev().find(|fewer| 2 * fewer <= heads && per.is_multiple_of(*fewer))
}

impl<'a> Call<'a, '_> {
    pub(super) fn sequence(&self, index: usize) -> Sequence<'a> {
        (self.batch.sequence)(index)
    }

    /// That the sequences cover the rows and have their pages. Gives back the most tokens of one and about how
    /// many multiply-adds there are.
    fn check(&self) -> (usize, usize) {
        let Shape { kv_heads, key, value, .. } = self.shape;
        let (mut next, mut longest, mut seen) = (0, 0, 0);
        for index in 0..self.batch.count {
            let Sequence { first, tokens, first_position, keys, values } = self.sequence(index);
            assert_eq!(first, next, "first row of sequence {index}");
            let end = first_position + tokens;
            keys.check(end, kv_heads, key);
            values.check(end, kv_heads, value);
            next += tokens;
            longest = longest.max(tokens);
            seen += tokens * (end - self.shape.begin(first_position));
        }
        assert_eq!(next, self.queries.count(), "rows of all sequences");
        (longest, seen * self.shape.heads * (key + value))
    }

    /// Takes as many sequences with long contexts as there is room for states of all heads, and gives back
    /// how many states that makes.
    fn choose_split(&mut self, room: usize) -> usize {
        let mut states = 0;
        while self.split < self.batch.count {
            let more = self.states(&self.sequence(self.split));
            if states + more > room {
                break;
            }
            states += more;
            self.split += 1;
        }
        states
    }

    /// States that a sequence needs if its spans are computed side by side; none if they are not.
    fn states(&self, sequence: &Sequence<'_>) -> usize {
        let (begin, end) = self.shape.spans(sequence.first_position, sequence.tokens);
        let few = sequence.tokens * self.shape.heads <= SPLIT_HEADS;
        if few && end - begin > 1 { sequence.tokens * (end - begin) } else { 0 }
    }

    /// Whether the spans of a sequence are parts of their own.
    pub(super) fn is_split(&self, index: usize, sequence: &Sequence<'_>) -> bool {
        index < self.split && self.states(sequence) > 0
    }

    /// The sequence that row `row` belongs to.
    pub(super) fn sequence_of(&self, row: usize) -> usize {
        let (mut low, mut high) = (0, self.batch.count);
        while high - low > 1 {
            let middle = low.midpoint(high);
            if self.sequence(middle).first <= row { low = middle } else { high = middle }
        }
        low
    }

    /// Sequence, token and span of a state.
    pub(super) fn state(&self, mut index: usize) -> (Sequence<'a>, usize, usize) {
        for sequence in (0..self.split).map(|index| self.sequence(index)) {
            let states = self.states(&sequence);
            if index < states {
                let (begin, end) = self.shape.spans(sequence.first_position, sequence.tokens);
                return (sequence, index / (end - begin), begin + index % (end - begin));
            }
            index -= states;
        }
        unreachable!("there is a part for every state and no more")
    }

    /// Some heads of some tokens of a sequence.
    pub(super) fn block(
        &self,
        sequence: &Sequence<'a>,
        (first, tokens): (usize, usize),
        (head, heads): (usize, usize),
    ) -> Block<'a> {
        let Shape { key, value, scale, window, .. } = self.shape;
        let per = self.shape.per();
        Block {
            queries: self.queries.slice(sequence.first + first, tokens).columns(head * key, heads * key),
            first_position: sequence.first_position + first,
            window,
            keys: sequence.keys,
            values: sequence.values,
            kv_head: head / per,
            per: per.min(heads),
            key,
            value,
            scale,
        }
    }

    /// The output of some heads of a row from the states of its spans, if it has any.
    fn merge(&self, isa: Isa, states: Rows<'_>, row: usize, head: usize, mut out: RowsMut<'_>) {
        let index = self.sequence_of(row);
        let sequence = self.sequence(index);
        if !self.is_split(index, &sequence) {
            return;
        }
        let before: usize = (0..index).map(|index| self.states(&self.sequence(index))).sum();
        let (begin, end) = self.shape.spans(sequence.first_position, sequence.tokens);
        let token = row - sequence.first;
        let seen = self.shape.spans(sequence.first_position + token, 1);
        let first = before + token * (end - begin) + seen.0 - begin;
        let heads = out.width() / self.shape.value;
        let state = state_chunks(self.shape.value) * LANES;
        isa.run(Finish {
            states: states.slice(first, seen.1 - seen.0).columns(head * state, heads * state),
            sinks: self.shape.sinks.map(|sinks| &sinks[head..][..heads]),
            value: self.shape.value,
            out: out.row(0),
        });
    }
}
