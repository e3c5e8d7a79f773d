//! `moebius bench context`: one decode step's attention over a full cache of a model's real shape, without its weights.
//! The cache is the runner's own, filled with seeded rows; blocks stand in the order of a pool that was long in use.

use std::convert::Infallible;

use kernels::attention::{CacheType, Gqa, Mla, PAGE, Queries, gqa, mla};
use kernels::simd::Isa;
use kernels::team;
use models::batch::BlockKind;
use models::config::{Mixer, ModelConfig};
use models::cpu::KvCache;
use models::{Capacity, Numerics};

use crate::ceilings::{Bound, Work, Yardstick, summary, timed};
use crate::machine::resident_bytes;
use crate::row::{Row, Setting};
use crate::seeded::Seeded;
use crate::{Error, Sink};

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct ContextOptions {
    /// Cached positions, the new token's included.
    pub tokens: usize,
    /// How they are stored.
    pub cache_type: CacheType,
    /// Timed steps; `None` = as many as give a steady median.
    pub runs: Option<usize>,
    /// Small buffers for the ceilings, for tests.
    pub quick: bool,
}

/// Different blocks of rows per layer; they are repeated.
const SEEDED_BLOCKS: usize = 4;

/// What the cache of so many tokens takes: blocks of all layers, and their bytes by the models' formula.
pub fn cache_bytes(config: &ModelConfig, options: &ContextOptions) -> usize {
    KvCache::bytes(config, Numerics::Model, &capacity(options))
}

fn capacity(options: &ContextOptions) -> Capacity {
    let cache_type = Some(options.cache_type);
    Capacity { cache_type, ..Capacity::new(options.tokens.div_ceil(PAGE), 1, 1) }
}

/// Measures the attention of all layers over all positions.
///
/// # Errors
/// If memory for the ceilings cannot be had, or a row cannot be written.
pub fn attention(
    config: &ModelConfig,
    name: &str,
    options: &ContextOptions,
    sink: &mut dyn Sink,
) -> Result<(), Error> {
    let mut yardstick = Yardstick::new(options.quick)?;
    sink.note(&format!("ceilings: {}", yardstick.ceilings()));
    let before = resident_bytes().0;
    let capacity = capacity(options);
    let mut cache = KvCache::new(config, Numerics::Model, &capacity);
    let mut seeded = Seeded::new(7);
    let table = shuffled(capacity.blocks, &mut seeded);
    sink.note(&format!("filling {:.2} GB of cache", cache_bytes(config, options) as f64 / 1e9));
    fill(config, &mut cache, &capacity, &mut seeded);
    let grown = resident_bytes().0.saturating_sub(before);

    let mut step = Step::new(config, options.tokens, &mut seeded);
    let work = work(config, options);
    let mut once = || {
        let seconds = timed(|| team::hold(|| step.run(config, &cache, &table)));
        Ok::<_, Infallible>((seconds, work))
    };
    let Ok(_warm_up) = once();
    let (runs, quick) = (options.runs, options.quick);
    let stopped = || sink.stopped();
    let enough = |count: usize, total: f64| match runs {
        Some(runs) => count >= runs.max(1),
        None => stopped() || (quick && count >= 2) || (count >= 3 && total > 20.0) || count >= 9,
    };
    let Ok(samples) = yardstick.beside(Bound::F32, once, enough);
    let (times, work, share) = summary(&samples, Bound::F32);
    let setting = Setting {
        numerics: format!("{:?} cache", options.cache_type).to_lowercase(),
        runner: "cpu",
        threads: rayon::current_num_threads(),
        model: name.to_owned(),
    };
    let row = Row::new(format!("context/attention-{}", options.tokens), times, work, Some(share), &setting)
        .with("times_bound", 1.0 / share.share)
        .with("layers", config.layers.len())
        .with("cache_bytes", cache_bytes(config, options))
        .with("resident_bytes", grown);
    Ok(sink.row(row)?)
}

/// Blocks in a seeded order.
fn shuffled(blocks: usize, seeded: &mut Seeded) -> Vec<u32> {
    let mut table: Vec<u32> = (0..blocks as u32).collect();
    for index in (1..blocks).rev() {
        table.swap(index, seeded.below(index + 1) as usize);
    }
    table
}

fn floats(count: usize, seeded: &mut Seeded) -> Vec<f32> {
    (0..count).map(|_| (seeded.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}

fn fill(config: &ModelConfig, cache: &mut KvCache, capacity: &Capacity, seeded: &mut Seeded) {
    for (index, layer) in config.layers.iter().enumerate() {
        let blocks = capacity.blocks_of(layer.block_kind()) as u32;
        for (store, shape) in cache.layer_mut(index).stores.iter_mut().zip(layer.cache_rows().shapes()) {
            let rows: Vec<_> = (0..SEEDED_BLOCKS).map(|_| floats(PAGE * shape.values(), seeded)).collect();
            for block in 0..blocks {
                let slots: [u32; PAGE] = std::array::from_fn(|row| block * PAGE as u32 + row as u32);
                store.write(&slots, &rows[block as usize % SEEDED_BLOCKS]);
            }
        }
    }
}

/// Bytes and operations of one step's attention.
fn work(config: &ModelConfig, options: &ContextOptions) -> Work {
    let mut work = Work { bytes: 0, operations: 0 };
    for layer in &config.layers {
        let (seen, products) = match &layer.mixer {
            Mixer::Mla(m) => (options.tokens, m.heads * (2 * m.kv_rank + m.rope_dim)),
            Mixer::Gqa(g) => {
                (g.window.map_or(options.tokens, |w| w.min(options.tokens)), 2 * g.heads * g.head_dim)
            }
        };
        work.bytes += (seen * layer.cache_rows().bytes(options.cache_type)) as u64;
        work.operations += (2 * seen * products) as u64;
    }
    work
}

/// Buffers of one token's attention.
struct Step {
    isa: Isa,
    last: usize,
    query: Vec<f32>,
    scratch: Vec<f32>,
    out: Vec<f32>,
}

impl Step {
    fn new(config: &ModelConfig, tokens: usize, seeded: &mut Seeded) -> Self {
        let (mut query, mut scratch, mut out) = (0, 0, 0);
        for layer in &config.layers {
            let lens = match &layer.mixer {
                Mixer::Mla(m) => {
                    let shape = mla_shape(m);
                    let row = m.kv_rank + m.rope_dim;
                    (m.heads * row, shape.scratch_len(1, tokens), m.heads * m.kv_rank)
                }
                Mixer::Gqa(g) => {
                    let width = g.heads * g.head_dim;
                    (width, gqa_shape(g).scratch_len(1, tokens), width)
                }
            };
            (query, scratch, out) = (query.max(lens.0), scratch.max(lens.1), out.max(lens.2));
        }
        let query = floats(query, seeded);
        Self { isa: Isa::detect(), last: tokens - 1, query, scratch: vec![0.0; scratch], out: vec![0.0; out] }
    }

    fn run(&mut self, config: &ModelConfig, cache: &KvCache, table: &[u32]) {
        let Self { isa, last, query, scratch, out } = self;
        for (index, layer) in config.layers.iter().enumerate() {
            let stores = &cache.layer(index).stores;
            let queries = |width: usize| Queries { rows: &query[..width], first_position: *last };
            match &layer.mixer {
                Mixer::Mla(m) => {
                    let (width, shape) = (m.heads * (m.kv_rank + m.rope_dim), mla_shape(m));
                    let out = &mut out[..m.heads * m.kv_rank];
                    mla(*isa, &shape, queries(width), &stores[0].pages(table), scratch, out);
                }
                Mixer::Gqa(g) => {
                    let (width, shape) = (g.heads * g.head_dim, gqa_shape(g));
                    let pages = (&stores[0].pages(table), &stores[1].pages(table));
                    gqa(*isa, &shape, queries(width), pages, scratch, &mut out[..width]);
                }
            }
        }
    }
}

fn mla_shape(m: &models::config::Mla) -> Mla {
    Mla { heads: m.heads, latent: m.kv_rank, rope: m.rope_dim, scale: m.scale }
}

fn gqa_shape(g: &models::config::Gqa) -> Gqa<'static> {
    let models::config::Gqa { heads, kv_heads, head_dim, scale, window, .. } = *g;
    Gqa { heads, kv_heads, head_dim, value_dim: head_dim, scale, window, sinks: None }
}

/// Bytes per token over all layers.
pub fn bytes_per_token(config: &ModelConfig, cache_type: CacheType) -> usize {
    let of = |kind| config.cache_bytes_per_token(kind, cache_type);
    of(BlockKind::Full) + of(BlockKind::Window)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::Recipe;

    /// The figures that the makers' shapes give: 61 layers of 576 bf16 values, or of 656 bytes.
    #[test]
    fn k2_caches_what_the_formula_says() {
        let recipe = Recipe::find("full:moonshotai-Kimi-K2-Thinking", None).unwrap();
        let config = models::arch::describe(&recipe.config).unwrap();
        assert_eq!(bytes_per_token(&config, CacheType::Bf16), 70_272);
        assert_eq!(bytes_per_token(&config, CacheType::Fp8), 61 * 656);
        let options =
            ContextOptions { tokens: 262_144, cache_type: CacheType::Bf16, runs: None, quick: true };
        assert_eq!(cache_bytes(&config, &options), 70_272 * 262_144);
    }
}
