//! Contexts of up to 262,144 positions: around tiles, spans and powers of two, every cache type.

use crate::cache::{Cache, TYPES, heads as head_rows, latents};
use crate::common::{Random, assert_close_overall, bits};
use kernels::attention::{CacheType, Gqa, Mla, Queries, RowShape, SPAN, gqa, mla};
use kernels::{Isa, reference};

const LENGTHS: [usize; 15] =
    [1, 63, 64, 65, 4095, 4096, 4097, 32767, 32768, 32769, 131071, 131072, 131073, 262143, 262144];
const LONGEST: usize = LENGTHS[LENGTHS.len() - 1];

/// Of the greatest output. A quarter of a million weights are summed, each from a score of 48 products.
const TOLERANCE: f64 = 2e-5;

/// A cache of the longest length, filled in steps.
fn filled(random: &mut Random, kind: CacheType, shape: RowShape) -> Cache {
    let mut cache = Cache::empty(random, kind, LONGEST, shape);
    for position in (0..LONGEST).step_by(4096) {
        let x = random.values(4096 * shape.values());
        cache.write(position, &x);
    }
    cache
}

/// The plain instruction set is slow: it takes one cache type at each length.
fn sets(kind: usize, length: usize) -> impl Iterator<Item = Isa> {
    Isa::available().into_iter().filter(move |&isa| isa != Isa::Portable || length % TYPES.len() == kind)
}

/// That `f` with every instruction set, with 1 and 2 threads, and with scratch for all spans or none gives the
/// same bits, close to `want`.
fn check(
    want: &[f64],
    (sets, scratch): (impl Iterator<Item = Isa>, usize),
    what: &str,
    f: impl Fn(Isa, &mut [f32], &mut [f32]) + Sync,
) {
    let mut first: Option<Vec<u32>> = None;
    for isa in sets {
        // With one thread nothing is cut; with two, spans are side by side where there is scratch.
        let all = [(1, 0), (2, scratch), (2, 0)];
        let cuts = if isa == Isa::Portable { &all[1..2] } else { &all[..] };
        for &(threads, scratch) in cuts {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![f32::NAN; want.len()];
            pool.install(|| f(isa, &mut vec![f32::NAN; scratch], &mut out));
            assert_close_overall(&out, want, TOLERANCE, what);
            assert_eq!(first.get_or_insert_with(|| bits(&out)), &bits(&out), "{isa:?}, {threads}, {what}");
        }
    }
}

#[test]
fn latents_of_long_contexts() {
    let mut random = Random(41);
    let shape = Mla { heads: 3, latent: 40, rope: 8, scale: 0.6 };
    for (index, kind) in TYPES.into_iter().enumerate() {
        let cache = filled(&mut random, kind, latents(shape.latent, shape.rope));
        for (at, length) in LENGTHS.into_iter().enumerate() {
            // A row at the end, or two that lie on both sides of a boundary.
            let tokens = (1 + at % 2).min(length);
            let rows = random.values(tokens * shape.heads * 48);
            let queries = Queries { rows: &rows, first_position: length - tokens };
            let pages = cache.pages();
            let want = reference::mla(&shape, queries, &pages);
            let plan = (sets(index, at), shape.scratch_len(tokens, length));
            check(&want, plan, &format!("{kind:?}, {length} latents"), |isa, scratch, out| {
                mla(isa, &shape, queries, &pages, scratch, out)
            });
        }
    }
}

#[test]
fn grouped_queries_of_long_contexts() {
    let mut random = Random(42);
    let sinks = random.values(2);
    for (index, kind) in TYPES.into_iter().enumerate() {
        let keys = filled(&mut random, kind, head_rows(1, 40));
        let values = filled(&mut random, kind, head_rows(1, 33));
        for (at, length) in LENGTHS.into_iter().enumerate() {
            let windows = [None, Some(128), Some(2 * SPAN + 77), Some(length)];
            for (window, sinks) in windows.into_iter().zip([None, Some(&sinks[..]), Some(&sinks[..]), None]) {
                // What a window over everything gives is known from none: few lengths are enough.
                if window == Some(length) && at % 8 != 5 {
                    continue;
                }
                let shape =
                    Gqa { heads: 2, kv_heads: 1, head_dim: 40, value_dim: 33, scale: 0.6, window, sinks };
                let tokens = (1 + at % 2).min(length);
                let rows = random.values(tokens * shape.heads * shape.head_dim);
                let queries = Queries { rows: &rows, first_position: length - tokens };
                let (keys, values) = (keys.pages(), values.pages());
                let want = reference::gqa(&shape, queries, &keys, &values);
                let plan = (sets(index, at), shape.scratch_len(tokens, length));
                check(&want, plan, &format!("{kind:?}, {length}, {window:?}"), |isa, scratch, out| {
                    gqa(isa, &shape, queries, (&keys, &values), scratch, out)
                });
            }
        }
    }
}
