//! A block of queries over one span of positions: the tiles of the span, one after another.
//!
//! The rows of a block are queries of some heads of some tokens. A tile's keys are unpacked to f32 a few at
//! a time, and its values two chunks of columns at a time, for all rows that share them; what is summed
//! lies in registers, four rows by three keys or by two chunks. Which rows share a tile decides nothing but
//! speed: every score and every output is summed by itself, in canonical order.

use super::cache::{CacheSlice, PAGE, Pages};
use super::state::{PEAK, state_chunks};
use super::stored::{Page, Plain, Row, Scaled, Stored};
use super::tile::{Ahead, Keys3, PACE, Rows4, Scores, Soften, TILE_CHUNKS, TILE_KEYS, TILE_ROWS, Values};
use crate::rows::Rows;
use crate::simd::{LANES, Lanes, Work, padded};

pub(super) type Chunk = [f32; LANES];

/// Scores of one row against a tile, then its weights.
pub(super) type Weights = [f32; PAGE];

/// Queries `[tokens, heads]` of one sequence. With more than one token, all heads share a key head.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    /// `[tokens, heads * key]`.
    pub(super) queries: Rows<'a>,
    /// Position of the first token.
    pub(super) first_position: usize,
    /// Positions that a query sees, its own among them.
    pub(super) window: usize,
    pub(super) keys: Pages<'a>,
    pub(super) values: Pages<'a>,
    /// The key head of the first head.
    pub(super) kv_head: usize,
    /// Heads of the block that share a key head.
    pub(super) per: usize,
    /// Width of a key.
    pub(super) key: usize,
    /// Width of a value.
    pub(super) value: usize,
    pub(super) scale: f32,
}

impl Block<'_> {
    pub(super) fn tokens(&self) -> usize {
        self.queries.count()
    }

    pub(super) fn heads(&self) -> usize {
        self.queries.width() / self.key
    }

    /// Positions that a token sees.
    pub(super) fn visible(&self, token: usize) -> (usize, usize) {
        let position = self.first_position + token;
        ((position + 1).saturating_sub(self.window), position + 1)
    }

    /// Positions from the first that any token sees to the last.
    pub(super) fn range(&self) -> (usize, usize) {
        (self.visible(0).0, self.first_position + self.tokens())
    }

    /// Whether keys and values are the same rows of the cache.
    fn same_rows(&self) -> bool {
        let start = |pages: &Pages<'_>| pages.data.bytes(pages.row).0;
        start(&self.keys) == start(&self.values) && std::ptr::eq(self.keys.table, self.values.table)
    }

    /// Tokens that see something of the tile of `first`: all from one to another.
    fn seeing(&self, first: usize) -> (usize, usize) {
        let begin = first.saturating_sub(self.first_position);
        let end = (first + PAGE - 1).saturating_add(self.window).saturating_sub(self.first_position);
        (begin, end.min(self.tokens()))
    }

    /// What a token sees of the tile of `first`.
    fn offsets(&self, token: usize, first: usize) -> (usize, usize) {
        let (begin, end) = self.visible(token);
        (begin.max(first) - first, end.min(first + PAGE) - first)
    }
}

/// Memory of one block.
pub(super) struct Workspace<'s> {
    /// Queries as [`Prepare`] lays them out.
    pub(super) queries: &'s mut [Rows4],
    /// Keys or values of part of a tile.
    pub(super) unpacked: &'s mut [Chunk],
    /// One per row.
    pub(super) weights: &'s mut [Weights],
    /// Per row, what is left of its earlier sums.
    pub(super) keep: &'s mut [Chunk],
}

/// Lays the queries of a block out by fours: chunk after chunk, and in each chunk row after row. What a row
/// lacks to whole chunks is zero; what rows lack to fours is whatever was there.
pub(super) struct Prepare<'a, 's> {
    pub(super) block: &'s Block<'a>,
    pub(super) queries: &'s mut [Rows4],
}

impl Work for Prepare<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { block, queries } = self;
        let chunks = block.key.div_ceil(LANES);
        let mut row = 0;
        for token in 0..block.tokens() {
            for query in block.queries.row(token).chunks_exact(block.key) {
                let out = &mut queries[row / TILE_ROWS * chunks..][..chunks];
                for (out, query) in out.iter_mut().zip(query.chunks(LANES)) {
                    l.store(load_part(l, query), &mut out[row % TILE_ROWS]);
                }
                row += 1;
            }
        }
    }
}

/// The states of a block's rows over the tiles in `range`, which lies in one span. Rows that see nothing of it
/// are left without a peak.
pub(super) struct Span<'a, 's> {
    pub(super) block: &'s Block<'a>,
    pub(super) range: (usize, usize),
    pub(super) space: Workspace<'s>,
    /// `[tokens * heads, state_chunks]`.
    pub(super) states: &'s mut [Chunk],
}

impl Work for Span<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { block, range, space, states } = self;
        match (block.keys.data, block.values.data) {
            (CacheSlice::F32(keys), CacheSlice::F32(values)) => {
                let keys = Plain { data: keys, row: block.keys.row };
                let values = Plain { data: values, row: block.values.row };
                tiles(l, block, (keys, values), range, space, states)
            }
            (CacheSlice::Bf16(keys), CacheSlice::Bf16(values)) => {
                let keys = Plain { data: keys, row: block.keys.row };
                let values = Plain { data: values, row: block.values.row };
                tiles(l, block, (keys, values), range, space, states)
            }
            (CacheSlice::Fp8 { data: keys, shape: k }, CacheSlice::Fp8 { data: values, shape: v }) => {
                let (keys, values) = (Scaled::new(keys, k), Scaled::new(values, v));
                tiles(l, block, (keys, values), range, space, states)
            }
            _ => panic!("keys and values of different types"),
        }
    }
}

/// Online softmax over the tiles in `range`.
#[inline(always)]
fn tiles<L: Lanes, S: Stored>(
    l: L,
    block: &Block<'_>,
    (keys, values): (S, S),
    range: (usize, usize),
    space: Workspace<'_>,
    states: &mut [Chunk],
) {
    let Workspace { queries, unpacked, weights, keep } = space;
    let len = state_chunks(block.value);
    for state in states.chunks_exact_mut(len) {
        state.fill([0.0; LANES]);
        state[len - 1][PEAK] = f32::NEG_INFINITY;
    }
    let (heads, per) = (block.heads(), block.per);
    let chunks = block.key.div_ceil(LANES);
    // Where the values are the keys they are read with them.
    let apart = if block.same_rows() { 0 } else { heads / per * block.value };
    for first in (range.0 / PAGE * PAGE..range.1).step_by(PAGE) {
        let (begin, end) = block.seeing(first);
        let offsets = (block.offsets(begin, first).0, block.offsets(end - 1, first).1);
        let fours = ((end - begin) * heads).div_ceil(TILE_ROWS);
        let mut values_ahead = Ahead::new(&block.values, (first, range.1), apart, fours * (PAGE / TILE_KEYS));
        let next = (first + PAGE, range.1);
        let paces = fours * block.value.div_ceil(TILE_CHUNKS * LANES) * (PAGE / PACE);
        let mut keys_ahead = Ahead::new(&block.keys, next, heads / per * block.key, paces);
        for group in 0..heads / per {
            let head = block.kv_head + group;
            // With several groups there is but one token.
            let rows = (begin * heads + group * per, end * per + group * per);
            // Whole fours: rows too many get scores that nobody reads.
            let fours = (rows.0 / TILE_ROWS, rows.1.div_ceil(TILE_ROWS));
            let queries = &queries[fours.0 * chunks..fours.1 * chunks];
            let scores = &mut weights[fours.0 * TILE_ROWS..fours.1 * TILE_ROWS];
            let page = Page::of(keys, &block.keys, first, head, block.key);
            let most = unpacked.len() / (TILE_KEYS * chunks) * TILE_KEYS;
            for offset in (offsets.0..offsets.1).step_by(most) {
                let end = offsets.1.min(offset + most);
                let keys = unpack_keys(l, page, (offset, end), unpacked);
                l.enter(Scores { queries, keys, chunks, offset, end, ahead: &mut values_ahead, out: scores });
            }

            let states = &mut states[rows.0 * len..rows.1 * len];
            let weights = &mut weights[rows.0..rows.1];
            let Block { scale, window, .. } = *block;
            let position = block.first_position + begin;
            l.enter(Soften { scale, first, position, per, window, weights, keep, states });

            let page = Page::of(values, &block.values, first, head, block.value);
            for chunk in (0..len - 1).step_by(TILE_CHUNKS) {
                let values = unpack_values(l, page, chunk, offsets, unpacked);
                // Rows that see the same of the tile are taken together.
                let mut row = 0;
                while row < weights.len() {
                    let seen = block.offsets(begin + row / per, first);
                    let mut last = row + per;
                    while last < weights.len() && block.offsets(begin + last / per, first) == seen {
                        last += per;
                    }
                    let values = &values[seen.0 - offsets.0..seen.1 - offsets.0];
                    let (rows, ahead) = ((row, last), &mut keys_ahead);
                    l.enter(Values { values, chunk, rows, offset: seen.0, weights, keep, ahead, states });
                    row = last;
                }
            }
        }
    }
}

/// The keys at `offsets`, laid out by threes: chunk after chunk, and in each chunk key after key.
#[inline(always)]
fn unpack_keys<L: Lanes, S: Stored>(
    l: L,
    page: Page<S>,
    offsets: (usize, usize),
    unpacked: &mut [Chunk],
) -> &[Keys3] {
    let chunks = page.width.div_ceil(LANES);
    let count = offsets.1 - offsets.0;
    let keys = &mut unpacked.as_chunks_mut::<TILE_KEYS>().0[..count.div_ceil(TILE_KEYS) * chunks];
    for j in 0..count {
        let out = &mut keys[j / TILE_KEYS * chunks..][..chunks];
        let row = page.row(offsets.0 + j);
        let whole = page.width / LANES;
        for (chunk, out) in out[..whole].iter_mut().enumerate() {
            l.store(row.whole(l, chunk), &mut out[j % TILE_KEYS]);
        }
        if whole < chunks {
            l.store(row.rest(l, whole), &mut out[whole][j % TILE_KEYS]);
        }
    }
    keys
}

/// Two chunks of columns of the values at `offsets`; past the last column, zeros or whatever was there.
#[inline(always)]
fn unpack_values<L: Lanes, S: Stored>(
    l: L,
    page: Page<S>,
    chunk: usize,
    offsets: (usize, usize),
    unpacked: &mut [Chunk],
) -> &[[Chunk; TILE_CHUNKS]] {
    let whole = page.width / LANES;
    let values = &mut unpacked.as_chunks_mut::<TILE_CHUNKS>().0[..offsets.1 - offsets.0];
    for (j, value) in values.iter_mut().enumerate() {
        let row = page.row(offsets.0 + j);
        for (chunk, out) in (chunk..).zip(value) {
            if chunk < whole {
                l.store(row.whole(l, chunk), out);
            } else if chunk * LANES < page.width {
                l.store(row.rest(l, chunk), out);
            }
        }
    }
    values
}

#[inline(always)]
fn load_part<L: Lanes>(l: L, x: &[f32]) -> L::V {
    match x.first_chunk() {
        Some(chunk) => l.load(chunk),
        None => l.load(&padded(x, 0.0)),
    }
}
