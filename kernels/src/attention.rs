//! Attention over a paged cache: grouped-query with windows and sinks, and absorbed latent (MLA).
//!
//! Positions are taken in tiles of 64, each one page, and tiles in spans of 2048 positions, both from
//! absolute position 0. Within a span softmax is kept online, tile by tile, ascending; spans are merged
//! in ascending order. A query skips the tiles outside its window. All of that depends on the query's
//! own position only: chunking, the other rows of the call and the number of threads change nothing,
//! whether spans were computed side by side or one after another.
//!
//! Latent attention is grouped-query attention with one key head of `[latent | rope]` whose values are
//! the first `latent` of the same row.

mod cache;
mod call;
mod fp8;
mod part;
mod span;
mod state;
mod stored;
mod tile;

pub use cache::{CacheMut, CacheSlice, CacheType, PAGE, Pages, RowShape, write_rows};
pub use fp8::TILE as FP8_TILE;

use crate::simd::{Isa, LANES};
use call::{Shape, attend};
use state::state_chunks;

/// Positions whose softmax is kept in one piece.
pub const SPAN: usize = 2048;

/// Heads of all rows up to which spans are computed side by side: enough for 64 threads with less than
/// 64 heads, and with 131,072 positions of 512 values it bounds the scratch at 34 MiB.
const SPLIT_HEADS: usize = 256;

/// Consecutive queries of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// `[tokens, heads * width]`, rotated.
    pub rows: &'a [f32],
    /// Absolute position of the first. Query at position p sees positions 0 ..= p, all already in the cache.
    pub first_position: usize,
}

/// Queries of a batch of sequences.
#[derive(Clone, Copy)]
pub struct BatchQueries<'a> {
    /// `[tokens, heads * width]`, rotated.
    pub rows: &'a [f32],
    /// Number of sequences.
    pub count: usize,
    /// Sequence by index. They follow one another and cover all rows.
    pub sequence: &'a (dyn Fn(usize) -> Sequence<'a> + Sync),
}

/// Consecutive queries of one sequence in a batch.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// Row of the first.
    pub first: usize,
    /// How many.
    pub tokens: usize,
    /// As in [`Queries`].
    pub first_position: usize,
    /// The sequence's keys; its latents, where those are cached.
    pub keys: Pages<'a>,
    /// The sequence's values; the same latents.
    pub values: Pages<'a>,
}

/// Absorbed latent attention.
#[derive(Clone, Copy, Debug)]
pub struct Mla {
    /// Query heads.
    pub heads: usize,
    /// Width of the latent (kv_lora_rank), which is also the output's.
    pub latent: usize,
    /// Width of the rotated part.
    pub rope: usize,
    /// Multiplied into every score.
    pub scale: f32,
}

impl Mla {
    /// f32 values of scratch with which [`mla`] can use all threads for up to `tokens` rows and
    /// `context` positions.
    pub fn scratch_len(&self, tokens: usize, context: usize) -> usize {
        scratch_len(self.heads, self.latent, tokens, context)
    }
}

/// Grouped-query attention.
#[derive(Clone, Copy, Debug)]
pub struct Gqa<'a> {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head h uses `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a query or key head.
    pub head_dim: usize,
    /// Width of a value head, and so of the output's.
    pub value_dim: usize,
    /// Multiplied into every score.
    pub scale: f32,
    /// With a window w, the query at position i sees positions j with i - w < j <= i.
    pub window: Option<usize>,
    /// Per head, a logit that takes part in the softmax and has no value.
    pub sinks: Option<&'a [f32]>,
}

impl Gqa<'_> {
    /// f32 values of scratch with which [`gqa`] can use all threads for up to `tokens` rows and
    /// `context` positions.
    pub fn scratch_len(&self, tokens: usize, context: usize) -> usize {
        match self.window {
            Some(window) if window <= SPAN => 0,
            _ => scratch_len(self.heads, self.value_dim, tokens, context),
        }
    }
}

fn scratch_len(heads: usize, value: usize, tokens: usize, context: usize) -> usize {
    let spans = context.div_ceil(SPAN);
    let rows = tokens.min(SPLIT_HEADS / heads.max(1));
    if spans < 2 { 0 } else { rows * spans * heads * state_chunks(value) * LANES }
}

/// Absorbed latent attention: queries are `[tokens, heads * (latent + rope)]`, rows of the cache
/// `[latent | rope]`, out is `[tokens, heads * latent]`. With less scratch than [`Mla::scratch_len`] long
/// contexts use fewer threads, for the same result.
///
/// # Panics
/// If shapes differ, or the table has too few pages for the last query.
pub fn mla(
    isa: Isa,
    shape: &Mla,
    queries: Queries<'_>,
    pages: &Pages<'_>,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    let width = shape.heads * (shape.latent + shape.rope);
    let sequence = |_| alone(queries, width, (pages, pages));
    mla_batch(isa, shape, BatchQueries { rows: queries.rows, count: 1, sequence: &sequence }, scratch, out);
}

/// [`mla`] of several sequences at once.
///
/// # Panics
/// As [`mla`], and if the sequences do not cover the rows one after another.
pub fn mla_batch(isa: Isa, shape: &Mla, queries: BatchQueries<'_>, scratch: &mut [f32], out: &mut [f32]) {
    let shape = Shape {
        heads: shape.heads,
        kv_heads: 1,
        key: shape.latent + shape.rope,
        value: shape.latent,
        scale: shape.scale,
        window: usize::MAX,
        sinks: None,
    };
    attend(isa, shape, queries, scratch, out);
}

/// Grouped-query attention: queries are `[tokens, heads * head_dim]`, rows of the caches
/// `[kv_heads * head_dim]` and `[kv_heads * value_dim]`, out is `[tokens, heads * value_dim]`. With less
/// scratch than [`Gqa::scratch_len`] long contexts use fewer threads, for the same result.
///
/// # Panics
/// If shapes differ, or a table has too few pages for the last query.
pub fn gqa(
    isa: Isa,
    shape: &Gqa<'_>,
    queries: Queries<'_>,
    pages: (&Pages<'_>, &Pages<'_>),
    scratch: &mut [f32],
    out: &mut [f32],
) {
    let sequence = |_| alone(queries, shape.heads * shape.head_dim, pages);
    gqa_batch(isa, shape, BatchQueries { rows: queries.rows, count: 1, sequence: &sequence }, scratch, out);
}

/// [`gqa`] of several sequences at once.
///
/// # Panics
/// As [`gqa`], and if the sequences do not cover the rows one after another.
pub fn gqa_batch(isa: Isa, shape: &Gqa<'_>, queries: BatchQueries<'_>, scratch: &mut [f32], out: &mut [f32]) {
    assert!(shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads), "query heads per key head");
    assert!(shape.sinks.is_none_or(|s| s.len() == shape.heads), "one sink per head");
    assert!(shape.window != Some(0), "a window of nothing");
    let shape = Shape {
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        key: shape.head_dim,
        value: shape.value_dim,
        scale: shape.scale,
        window: shape.window.unwrap_or(usize::MAX),
        sinks: shape.sinks,
    };
    attend(isa, shape, queries, scratch, out);
}

/// The only sequence of a batch, with rows of `width`.
fn alone<'a>(queries: Queries<'a>, width: usize, (keys, values): (&Pages<'a>, &Pages<'a>)) -> Sequence<'a> {
    let (tokens, first_position) = (queries.rows.len() / width, queries.first_position);
    Sequence { first: 0, tokens, first_position, keys: *keys, values: *values }
}
