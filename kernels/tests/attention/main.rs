//! Attention against the reference, and the same bits however it is cut.

mod cache;
#[path = "../common/mod.rs"]
mod common;
mod fp8;
mod long;
mod positions;

use cache::{Cache, TYPES, heads as head_rows, latents};
use common::{Random, assert_close_overall, bits, in_pools};
use kernels::attention::{
    BatchQueries, CacheMut, CacheSlice, CacheType, Gqa, Mla, PAGE, Pages, Queries, RowShape, SPAN, Sequence,
    gqa, gqa_batch, mla, mla_batch, write_rows,
};
use kernels::{Isa, Rows, reference};

#[test]
fn bf16_rows_are_rounded_to_nearest_even() {
    let x = [1.0, f32::from_bits(0x3f80_8000), f32::from_bits(0x3f81_8000), f32::from_bits(0x3f80_8001)];
    let mut data = [0; 8];
    write_rows(CacheMut::Bf16(&mut data), 4, &[1], Rows::new(&x, 4));
    assert_eq!(data, [0, 0, 0, 0, 0x3f80, 0x3f80, 0x3f82, 0x3f81]);
}

#[test]
fn mla_meets_the_reference() {
    let mut random = Random(11);
    for kind in TYPES {
        for (heads, latent, rope) in [(1, 8, 4), (5, 40, 24), (3, 96, 8), (2, 200, 33), (9, 512, 64)] {
            let shape = Mla { heads, latent, rope, scale: 0.3 };
            let cache = Cache::random(&mut random, kind, 150, latents(latent, rope));
            let rows = random.values(3 * heads * (latent + rope));
            for first_position in [0, 61, 147] {
                let queries = Queries { rows: &rows, first_position };
                let want = reference::mla(&shape, queries, &cache.pages());
                let mut first: Option<Vec<u32>> = None;
                for isa in Isa::available() {
                    let mut out = vec![f32::NAN; want.len()];
                    mla(isa, &shape, queries, &cache.pages(), &mut [], &mut out);
                    assert_close_overall(&out, &want, 4e-6, &format!("{shape:?} {kind:?} {first_position}"));
                    assert_eq!(first.get_or_insert_with(|| bits(&out)), &bits(&out), "{isa:?} {shape:?}");
                }
            }
        }
    }
}

#[test]
fn gqa_meets_the_reference() {
    let mut random = Random(12);
    let sinks = random.values(24);
    for kind in TYPES {
        for (heads, kv_heads, head_dim, value_dim) in
            [(1, 1, 1, 1), (4, 2, 16, 16), (24, 2, 64, 64), (6, 6, 33, 47), (12, 1, 128, 96), (8, 1, 40, 160)]
        {
            for (window, sinks) in [(None, None), (Some(1), None), (Some(70), Some(&sinks[..heads]))] {
                let shape = Gqa { heads, kv_heads, head_dim, value_dim, scale: 0.4, window, sinks };
                let keys = Cache::random(&mut random, kind, 200, head_rows(kv_heads, head_dim));
                let values = {
                    let shape = RowShape { plain: 3, ..head_rows(kv_heads, value_dim) };
                    Cache::random(&mut random, kind, 200, shape)
                };
                let rows = random.values(4 * heads * head_dim);
                for first_position in [0, 62, 196] {
                    let queries = Queries { rows: &rows, first_position };
                    let want = reference::gqa(&shape, queries, &keys.pages(), &values.pages());
                    let mut first: Option<Vec<u32>> = None;
                    for isa in Isa::available() {
                        let mut out = vec![f32::NAN; want.len()];
                        gqa(isa, &shape, queries, (&keys.pages(), &values.pages()), &mut [], &mut out);
                        assert_close_overall(
                            &out,
                            &want,
                            4e-6,
                            &format!("{shape:?} {kind:?} {first_position}"),
                        );
                        assert_eq!(first.get_or_insert_with(|| bits(&out)), &bits(&out), "{isa:?} {shape:?}");
                    }
                }
            }
        }
    }
}

/// The same rows in one call, in chunks of 1, 7 and 64, and in pools of 1, 2 and 3 threads.
#[test]
fn chunks_and_threads_change_nothing() {
    let mut random = Random(13);
    let tokens = 200;
    let isa = Isa::detect();
    let sinks = random.values(8);
    for window in [None, Some(128)] {
        let shape = Gqa {
            heads: 8,
            kv_heads: 2,
            head_dim: 48,
            value_dim: 40,
            scale: 0.2,
            window,
            sinks: window.map(|_| &sinks[..]),
        };
        let keys = Cache::random(&mut random, CacheType::Bf16, tokens, head_rows(2, 48));
        let values = Cache::random(&mut random, CacheType::Bf16, tokens, head_rows(2, 40));
        let rows = random.values(tokens * 8 * 48);
        let mut whole = vec![f32::NAN; tokens * 8 * 40];
        let pages = (&keys.pages(), &values.pages());
        gqa(isa, &shape, Queries { rows: &rows, first_position: 0 }, pages, &mut [], &mut whole);
        for chunk in [1, 7, 64, tokens] {
            for out in in_pools(|| {
                let mut out = vec![f32::NAN; whole.len()];
                let parts = rows.chunks(chunk * 8 * 48).zip(out.chunks_mut(chunk * 8 * 40));
                for (i, (rows, out)) in parts.enumerate() {
                    let queries = Queries { rows, first_position: i * chunk };
                    gqa(isa, &shape, queries, pages, &mut [], out);
                }
                out
            }) {
                assert_eq!(bits(&whole), bits(&out), "chunks of {chunk}, window {window:?}");
            }
        }
    }
}

/// Long contexts: spans one after another or side by side, for one row or several that straddle spans.
#[test]
fn spans_side_by_side_change_nothing() {
    let mut random = Random(14);
    let positions = 3 * SPAN + 70;
    let shape = Mla { heads: 10, latent: 64, rope: 32, scale: 0.2 };
    let cache = Cache::random(&mut random, CacheType::Bf16, positions, latents(64, 32));
    let sinks = random.values(10);
    let windowed = Gqa {
        heads: 10,
        kv_heads: 2,
        head_dim: 48,
        value_dim: 48,
        scale: 0.2,
        window: Some(SPAN + 100),
        sinks: Some(&sinks),
    };
    for (first_position, tokens) in [(positions - 1, 1), (2 * SPAN - 3, 7), (SPAN, 1), (SPAN - 1, 2)] {
        let rows = random.values(tokens * 10 * 96);
        let queries = Queries { rows: &rows, first_position };
        let pages = cache.pages();
        let want = reference::mla(&shape, queries, &pages);
        let mut alone = vec![f32::NAN; want.len()];
        mla(Isa::detect(), &shape, queries, &pages, &mut [], &mut alone);
        assert_close_overall(&alone, &want, 4e-6, "long");

        let gqa_rows = &rows[..tokens * 10 * 48];
        let gqa_queries = Queries { rows: gqa_rows, first_position };
        let want = reference::gqa(&windowed, gqa_queries, &pages, &pages);
        let mut alone_windowed = vec![f32::NAN; want.len()];
        gqa(Isa::detect(), &windowed, gqa_queries, (&pages, &pages), &mut [], &mut alone_windowed);
        assert_close_overall(&alone_windowed, &want, 4e-6, "long with a window");

        for isa in Isa::available() {
            for (out, out_windowed) in in_pools(|| {
                let mut scratch = vec![f32::NAN; shape.scratch_len(tokens, positions)];
                let mut out = vec![f32::NAN; alone.len()];
                mla(isa, &shape, queries, &pages, &mut scratch, &mut out);
                let mut scratch = vec![f32::NAN; windowed.scratch_len(tokens, positions)];
                let mut windowed_out = vec![f32::NAN; alone_windowed.len()];
                gqa(isa, &windowed, gqa_queries, (&pages, &pages), &mut scratch, &mut windowed_out);
                (out, windowed_out)
            }) {
                assert_eq!(bits(&alone), bits(&out), "{isa:?} {first_position}+{tokens}");
                assert_eq!(bits(&alone_windowed), bits(&out_windowed), "{isa:?} {first_position}+{tokens}");
            }
        }
    }
}

/// Lengths of sequences around tiles and spans, and new tokens of each.
const SEQUENCES: [(usize, usize); 12] = [
    (1, 1),
    (63, 1),
    (64, 64),
    (65, 3),
    (2047, 1),
    (2048, 2),
    (2049, 1),
    (4097, 1),
    (4097, 5),
    (130, 130),
    (2060, 40),
    (200, 1),
];

/// Sequences whose keys and values (or latents, twice) are random.
struct Batch {
    caches: Vec<(Cache, Cache)>,
    rows: Vec<f32>,
    width: usize,
}

impl Batch {
    fn random(
        random: &mut Random,
        kind: CacheType,
        width: usize,
        (key, value): (RowShape, RowShape),
    ) -> Self {
        let caches = SEQUENCES
            .iter()
            .map(|&(end, _)| (Cache::random(random, kind, end, key), Cache::random(random, kind, end, value)))
            .collect();
        let tokens: usize = SEQUENCES.iter().map(|&(_, tokens)| tokens).sum();
        Self { caches, rows: random.values(tokens * width), width }
    }

    fn sequence(&self, index: usize) -> Sequence<'_> {
        let first = SEQUENCES[..index].iter().map(|&(_, tokens)| tokens).sum();
        let (end, tokens) = SEQUENCES[index];
        let (keys, values) = &self.caches[index];
        Sequence { first, tokens, first_position: end - tokens, keys: keys.pages(), values: values.pages() }
    }

    fn queries(&self, index: usize, first: usize, count: usize) -> Queries<'_> {
        let Sequence { first: row, first_position, .. } = self.sequence(index);
        let rows = &self.rows[(row + first) * self.width..][..count * self.width];
        Queries { rows, first_position: first_position + first }
    }

    fn reference(&self, f: impl Fn(Queries<'_>, &Sequence<'_>) -> Vec<f64>) -> Vec<f64> {
        let one = |index: usize| f(self.queries(index, 0, SEQUENCES[index].1), &self.sequence(index));
        (0..SEQUENCES.len()).flat_map(one).collect()
    }

    /// What `alone` writes for every chunk of every sequence must meet `want`, and be the bits of what
    /// `together` writes for all, with any number of threads and scratch for all spans, some or none.
    fn check(
        &self,
        want: &[f64],
        scratch_len: usize,
        what: &str,
        alone: impl Fn(Queries<'_>, &Sequence<'_>, &mut [f32]),
        together: impl Fn(Isa, BatchQueries<'_>, &mut [f32], &mut [f32]) + Sync,
    ) {
        let width = want.len() / (self.rows.len() / self.width);
        let in_chunks = |chunk: usize| {
            let mut out = vec![f32::NAN; want.len()];
            for index in 0..SEQUENCES.len() {
                let sequence = self.sequence(index);
                for first in (0..sequence.tokens).step_by(chunk) {
                    let count = chunk.min(sequence.tokens - first);
                    let out = &mut out[(sequence.first + first) * width..][..count * width];
                    alone(self.queries(index, first, count), &sequence, out);
                }
            }
            out
        };
        let whole = in_chunks(usize::MAX);
        assert_close_overall(&whole, want, 4e-6, what);
        for chunk in [1, 2, 7, 64] {
            assert_eq!(bits(&whole), bits(&in_chunks(chunk)), "chunks of {chunk}, {what}");
        }
        for isa in Isa::available() {
            for (threads, scratch) in
                [(1, scratch_len), (2, scratch_len), (4, scratch_len), (2, scratch_len / 3), (4, 0)]
            {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let out = pool.install(|| {
                    let (mut out, mut scratch) = (vec![f32::NAN; want.len()], vec![f32::NAN; scratch]);
                    let sequence = |index| self.sequence(index);
                    let queries =
                        BatchQueries { rows: &self.rows, count: SEQUENCES.len(), sequence: &sequence };
                    together(isa, queries, &mut scratch, &mut out);
                    out
                });
                assert_eq!(bits(&whole), bits(&out), "{isa:?}, {threads} threads, {what}");
            }
        }
    }
}

#[test]
fn grouped_queries_alone_or_in_a_batch() {
    let mut random = Random(16);
    let sinks = random.values(16);
    let cases = [
        (CacheType::Bf16, (8, 1), (40, 33), None, false),
        (CacheType::F32, (8, 8), (17, 32), Some(70), true),
        (CacheType::Bf16, (9, 3), (33, 47), Some(SPAN + 100), true),
        (CacheType::F32, (16, 2), (64, 96), Some(128), true),
        (CacheType::Bf16, (12, 1), (32, 1), Some(1), false),
        (CacheType::Fp8, (3, 1), (40, 33), None, false),
        (CacheType::Fp8, (4, 2), (136, 47), Some(SPAN + 100), true),
    ];
    for (kind, (heads, kv_heads), (head_dim, value_dim), window, sink) in cases {
        let sinks = sink.then(|| &sinks[..heads]);
        let shape = Gqa { heads, kv_heads, head_dim, value_dim, scale: 0.3, window, sinks };
        let widths = (head_rows(kv_heads, head_dim), head_rows(kv_heads, value_dim));
        let batch = Batch::random(&mut random, kind, heads * head_dim, widths);
        batch.check(
            &batch.reference(|queries, s| reference::gqa(&shape, queries, &s.keys, &s.values)),
            shape.scratch_len(SEQUENCES.len(), 4 * SPAN),
            &format!("{shape:?}"),
            |queries, s, out| gqa(Isa::detect(), &shape, queries, (&s.keys, &s.values), &mut [], out),
            |isa, queries, scratch, out| gqa_batch(isa, &shape, queries, scratch, out),
        );
    }
}

#[test]
fn latent_queries_alone_or_in_a_batch() {
    let mut random = Random(17);
    for (kind, heads, latent, rope) in
        [(CacheType::Bf16, 66, 8, 4), (CacheType::F32, 3, 72, 16), (CacheType::Fp8, 4, 40, 8)]
    {
        let shape = Mla { heads, latent, rope, scale: 0.3 };
        let (row, rows) = (latent + rope, latents(latent, rope));
        let batch = Batch::random(&mut random, kind, heads * row, (rows, rows));
        batch.check(
            &batch.reference(|queries, s| reference::mla(&shape, queries, &s.keys)),
            shape.scratch_len(SEQUENCES.len(), 4 * SPAN),
            &format!("{shape:?}"),
            |queries, s, out| mla(Isa::detect(), &shape, queries, &s.keys, &mut [], out),
            |isa, queries, scratch, out| {
                let sequence =
                    |index| Sequence { values: batch.sequence(index).keys, ..batch.sequence(index) };
                mla_batch(isa, &shape, BatchQueries { sequence: &sequence, ..queries }, scratch, out)
            },
        );
    }
}

#[test]
#[should_panic(expected = "first row of sequence 1")]
fn sequences_with_a_gap_are_refused() {
    let data = [0.0; 2 * PAGE];
    let pages = Pages { data: CacheSlice::F32(&data), row: 1, table: &[0] };
    let shape = Mla { heads: 1, latent: 1, rope: 0, scale: 1.0 };
    let sequence =
        |index| Sequence { first: 2 * index, tokens: 1, first_position: 0, keys: pages, values: pages };
    let queries = BatchQueries { rows: &[1.0; 3], count: 2, sequence: &sequence };
    mla_batch(Isa::Portable, &shape, queries, &mut [], &mut [0.0; 3]);
}

/// Scores far apart: the running maximum moves at every tile, and a great sink takes all the weight.
#[test]
fn extreme_scores() {
    let positions = 300;
    let mut cache = Cache::random(&mut Random(15), CacheType::F32, positions, latents(1, 0));
    for p in 0..positions {
        cache.f32[cache.table[p / PAGE] as usize * PAGE + p % PAGE] = p as f32;
    }
    let pages = cache.pages();
    for isa in Isa::available() {
        for (query, want) in [(1e4, 299.0), (-1e4, 0.0), (0.0, 149.5)] {
            let shape = Mla { heads: 1, latent: 1, rope: 0, scale: 1.0 };
            let mut out = [f32::NAN];
            let queries = Queries { rows: &[query], first_position: positions - 1 };
            mla(isa, &shape, queries, &pages, &mut [], &mut out);
            assert_close_overall(&out, &[want], 1e-6, "extreme");
            for (sink, share) in [(-1e6, 1.0), (1e8, 0.0)] {
                let shape = Gqa {
                    heads: 1,
                    kv_heads: 1,
                    head_dim: 1,
                    value_dim: 1,
                    scale: 1.0,
                    window: None,
                    sinks: Some(&[sink]),
                };
                gqa(isa, &shape, queries, (&pages, &pages), &mut [], &mut out);
                assert_close_overall(&out, &[want * share], 1e-6, "extreme sink");
            }
        }
    }
}

#[test]
#[should_panic(expected = "65 positions in 1 pages")]
fn a_short_table_is_refused() {
    let data = [0.0; PAGE];
    let pages = Pages { data: CacheSlice::F32(&data), row: 1, table: &[0] };
    let shape = Mla { heads: 1, latent: 1, rope: 0, scale: 1.0 };
    let queries = Queries { rows: &[1.0], first_position: PAGE };
    mla(Isa::Portable, &shape, queries, &pages, &mut [], &mut [0.0]);
}
