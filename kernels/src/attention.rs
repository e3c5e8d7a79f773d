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
mod span;

pub use cache::{CacheMut, CacheSlice, CacheType, PAGE, Pages, write_rows};

use crate::matmul::pieces;
use crate::rows::{Bands, Cut, Rows, RowsMut, for_each_part};
use crate::simd::{Isa, LANES};
use span::{Finish, Group, Serial, Span, group_heads, state_len};

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
    if spans < 2 { 0 } else { rows * spans * heads * state_len(value) }
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
    cache: &Pages<'_>,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    let shape = Shape {
        heads: shape.heads,
        kv_heads: 1,
        key: shape.latent + shape.rope,
        value: shape.latent,
        scale: shape.scale,
        window: usize::MAX,
        sinks: None,
    };
    attend(isa, &shape, queries, (cache, cache), scratch, out);
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
    (keys, values): (&Pages<'_>, &Pages<'_>),
    scratch: &mut [f32],
    out: &mut [f32],
) {
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
    attend(isa, &shape, queries, (keys, values), scratch, out);
}

/// What both kinds of attention are.
struct Shape<'a> {
    heads: usize,
    kv_heads: usize,
    key: usize,
    value: usize,
    scale: f32,
    window: usize,
    sinks: Option<&'a [f32]>,
}

impl Shape<'_> {
    /// First position that the query at `position` sees.
    fn begin(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }

    /// Heads that one [`Group`] takes: they share a key head, and its state fits.
    fn group_heads(&self) -> usize {
        let per = self.heads / self.kv_heads;
        let most = group_heads(self.value).min(per);
        // The greatest divisor: so every group of a key head is as large as the others.
        (1..=most).rev().find(|n| per.is_multiple_of(*n)).unwrap_or(1)
    }
}

/// One call.
struct Call<'a> {
    isa: Isa,
    shape: &'a Shape<'a>,
    queries: Rows<'a>,
    first_position: usize,
    keys: &'a Pages<'a>,
    values: &'a Pages<'a>,
}

fn attend(
    isa: Isa,
    shape: &Shape<'_>,
    queries: Queries<'_>,
    (keys, values): (&Pages<'_>, &Pages<'_>),
    scratch: &mut [f32],
    out: &mut [f32],
) {
    let rows = Rows::new(queries.rows, shape.heads * shape.key);
    let out = RowsMut::new(out, shape.heads * shape.value);
    assert_eq!(rows.count(), out.count(), "rows in and out");
    if rows.count() == 0 {
        return;
    }
    let end = queries.first_position + rows.count();
    keys.check(end, shape.kv_heads * shape.key);
    values.check(end, shape.kv_heads * shape.value);

    let visible = end - shape.begin(queries.first_position);
    let work = rows.count() * shape.heads * visible * (shape.key + shape.value);
    let group = shape.group_heads();
    let (band, columns) = pieces(work, (rows.count(), shape.heads), (1, group));
    let call = Call { isa, shape, queries: rows, first_position: queries.first_position, keys, values };

    let spans = end.div_ceil(SPAN) - shape.begin(queries.first_position) / SPAN;
    let state = state_len(shape.value);
    let needed = rows.count() * spans * shape.heads * state;
    let split = spans > 1
        && rows.count() * shape.heads <= SPLIT_HEADS
        && (band, columns) != (rows.count(), shape.heads)
        && scratch.len() >= needed;
    if split {
        let scratch = &mut scratch[..needed];
        let states = RowsMut::new(scratch, shape.heads * state);
        for_each_part(Cut::new(states, Bands::Every(1), group * state), &|part| {
            call.span(part.first_row / spans, part.first_row % spans, part.first_column / state, part.rows);
        });
        call.merge(spans, Rows::new(scratch, shape.heads * state), out);
    } else {
        for_each_part(Cut::new(out, Bands::Every(band), columns * shape.value), &|mut part| {
            for row in 0..part.rows.count() {
                let first = part.first_column / shape.value;
                for (i, out) in part.rows.row(row).chunks_mut(group * shape.value).enumerate() {
                    call.serial(part.first_row + row, first + i * group, out);
                }
            }
        });
    }
}

impl<'a> Call<'a> {
    fn group(&self, row: usize, heads: (usize, usize)) -> Group<'a> {
        let Shape { key, value, kv_heads, .. } = *self.shape;
        let kv_head = heads.0 / (self.shape.heads / kv_heads);
        Group {
            queries: self.queries.columns(heads.0 * key, (heads.1 - heads.0) * key).row(row),
            keys: self.keys,
            values: self.values,
            key_columns: (kv_head * key, key),
            value_columns: (kv_head * value, value),
            scale: self.shape.scale,
        }
    }

    /// Positions that row `row` sees.
    fn visible(&self, row: usize) -> (usize, usize) {
        let position = self.first_position + row;
        (self.shape.begin(position), position + 1)
    }

    fn sinks(&self, heads: (usize, usize)) -> Option<&'a [f32]> {
        self.shape.sinks.map(|sinks| &sinks[heads.0..heads.1])
    }

    /// One group of heads of a row, its spans one after another.
    fn serial(&self, row: usize, head: usize, out: &mut [f32]) {
        let heads = (head, head + out.len() / self.shape.value);
        let group = self.group(row, heads);
        self.isa.run(Serial { group, range: self.visible(row), sinks: self.sinks(heads), out });
    }

    /// The state of one span of some heads of a row.
    fn span(&self, row: usize, span: usize, head: usize, mut out: RowsMut<'_>) {
        let heads = (head, head + out.width() / state_len(self.shape.value));
        let (begin, end) = self.visible(row);
        let span = self.first_span() + span;
        let range = (begin.max(span * SPAN), end.min((span + 1) * SPAN));
        if range.0 < range.1 {
            let group = self.group(row, heads);
            self.isa.run(Span { group, range, state: out.row(0).as_chunks_mut::<LANES>().0 });
        }
    }

    fn first_span(&self) -> usize {
        self.shape.begin(self.first_position) / SPAN
    }

    /// Merges what [`Self::spans`] left.
    fn merge(&self, spans: usize, states: Rows<'_>, mut out: RowsMut<'_>) {
        for row in 0..out.count() {
            let (begin, end) = self.visible(row);
            let seen = (begin / SPAN - self.first_span(), end.div_ceil(SPAN) - self.first_span());
            let states = states.slice(row * spans + seen.0, seen.1 - seen.0);
            self.isa.run(Finish {
                states,
                sinks: self.shape.sinks,
                value: self.shape.value,
                out: out.row(row),
            });
        }
    }
}
