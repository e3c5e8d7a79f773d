//! Every byte, before anything is loaded: what the weights, the KV pool and the buffers will take, and whether the
//! machine has it.
//!
//! [`fit`] splits what there is: it chooses the context, the blocks of the KV pool and the engine's other limits.
//! `split` holds its rules, `outline` counts the weights of a model that need not be there, `system` asks what is
//! available, `size` reads and writes numbers of bytes. Nothing here allocates what it plans.

pub mod outline;
mod size;
mod split;
mod system;

use std::fmt;

use kernels::attention::CacheType;
use models::batch::{BlockKind, PAGE_TOKENS, WantLogits};
use models::config::Ffn;
use models::cpu::{CpuRunner, KvCache};
use models::{Batch, Capacity, Component, Model, ModelConfig, Numerics};

use crate::engine::EngineOptions;
use crate::error::Error;
use crate::store::BlockStore;

pub use size::{Bytes, Count, parse_size};
pub use split::{Wishes, fit, fit_into};
pub use system::{available_memory, peak_resident_bytes};

/// The weights of a model, by how they must be at hand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weights {
    /// Read where they are in the files: resident as far as they are touched, and reclaimable.
    pub mapped_bytes: usize,
    /// In 8-bit copies (`--dense-format q8`), which stay.
    pub copied_bytes: usize,
    /// Of the mapped ones, those of routed experts.
    pub expert_bytes: usize,
    /// What one decoded token reads, copies included.
    pub token_bytes: usize,
    /// Of these, of routed experts.
    pub token_expert_bytes: usize,
}

impl Weights {
    /// Of an open model. Reads headers only.
    pub fn of(model: &Model) -> Self {
        let mut batch = Batch::default();
        batch.push(&[0], 0, &[0], WantLogits::Last);
        let experts = |count: fn(&models::config::Moe) -> usize| -> usize {
            let of = |layer: &models::config::LayerSpec| match &layer.ffn {
                Ffn::Moe(moe) => count(moe),
                Ffn::Dense(_) => 0,
            };
            let counts: Vec<usize> = model.config.layers.iter().map(of).collect();
            let cost = bench::cost::cost(model, Numerics::Model, &batch, &counts);
            cost.of(Component::RoutedExperts).bytes as usize
        };
        let none = bench::cost::cost(model, Numerics::Model, &batch, &vec![0; model.config.layers.len()]);
        let trunk = [
            Component::AttentionProjections,
            Component::Router,
            Component::SharedExpert,
            Component::DenseFfn,
            Component::Head,
        ];
        let token_expert_bytes = experts(|moe| moe.rule.top_k);
        Self {
            mapped_bytes: model.weight_bytes(),
            copied_bytes: model.q8.map_or(0, |copy| copy.copied_bytes),
            expert_bytes: experts(|moe| moe.rule.experts),
            token_bytes: trunk.iter().map(|part| none.of(*part).bytes as usize).sum::<usize>()
                + token_expert_bytes,
            token_expert_bytes,
        }
    }

    /// Mapped weights that every token reads.
    pub fn trunk_bytes(&self) -> usize {
        self.token_bytes.saturating_sub(self.token_expert_bytes).saturating_sub(self.copied_bytes)
    }
}

/// The KV pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// How values are stored.
    pub cache_type: CacheType,
    /// Blocks of layers that see everything.
    pub blocks: usize,
    /// Bytes of such a block, all layers.
    pub block_bytes: usize,
    /// Blocks of layers with a window.
    pub window_blocks: usize,
    /// Bytes of such a block, all layers.
    pub window_block_bytes: usize,
}

impl Pool {
    fn new(config: &ModelConfig, numerics: Numerics, capacity: &Capacity) -> Self {
        let block_bytes = |kind| KvCache::block_bytes(config, numerics, capacity, kind);
        Self {
            cache_type: capacity.cache_type.unwrap_or(numerics.cache_type()),
            blocks: capacity.blocks,
            block_bytes: block_bytes(BlockKind::Full),
            window_blocks: capacity.window_blocks,
            window_block_bytes: block_bytes(BlockKind::Window),
        }
    }

    /// All of it.
    pub fn bytes(&self) -> usize {
        let full = self.blocks.saturating_mul(self.block_bytes);
        full.saturating_add(self.window_blocks.saturating_mul(self.window_block_bytes))
    }

    /// Tokens that it holds, of all requests together; those of a shared prefix count once.
    pub fn tokens(&self) -> usize {
        self.blocks * PAGE_TOKENS
    }

    /// Bytes that a token takes for good.
    pub fn token_bytes(&self) -> usize {
        self.block_bytes / PAGE_TOKENS
    }

    /// Bytes that it takes besides, while it is inside the windows.
    pub fn window_token_bytes(&self) -> usize {
        self.window_block_bytes / PAGE_TOKENS
    }
}

/// The name of a way to store cached values, as on the command line.
pub fn cache_type_name(cache_type: CacheType) -> &'static str {
    match cache_type {
        CacheType::F32 => "f32",
        CacheType::Bf16 => "bf16",
        CacheType::Fp8 => "fp8",
    }
}

/// What the label of the numerics says of the cache: nothing, unless it is coarser than published.
pub fn cache_type_label(cache_type: CacheType) -> &'static str {
    match cache_type {
        CacheType::F32 | CacheType::Bf16 => "",
        CacheType::Fp8 => "+fp8-kv",
    }
}

/// Where weights will be, by what the machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// All in memory.
    Memory,
    /// What every token needs is in memory; routed experts come from disk as far as they do not fit.
    ExpertsFromDisk,
    /// Not even what every token needs fits: each token reads it from disk.
    Disk,
}

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug)]
pub struct MemoryPlan {
    /// The model's weights.
    pub weights: Weights,
    /// The KV pool; allocated at start, resident as it fills.
    pub pool: Pool,
    /// Activations, logits and other buffers.
    pub scratch_bytes: usize,
    /// Buffers of the store behind the pool, if there is one.
    pub staging_bytes: usize,
    /// What the system can give, if it says; after 8-bit copies were made.
    pub available_bytes: Option<usize>,
}

impl MemoryPlan {
    /// The plan for one engine on the cpu runner.
    pub fn new(
        config: &ModelConfig,
        weights: Weights,
        numerics: Numerics,
        options: &EngineOptions,
        (store, available_bytes): (bool, Option<usize>),
    ) -> Self {
        let capacity = options.capacity();
        let (_, runner_bytes) = CpuRunner::plan(config, numerics, &capacity);
        let pool = Pool::new(config, numerics, &capacity);
        // Logits of every running request, and the sampler's copy and candidates of one.
        let logits = config.vocab.saturating_mul(4 * options.running + 20);
        let staging = BlockStore::staging_bytes(pool.block_bytes + pool.window_block_bytes) as usize;
        Self {
            weights,
            pool,
            scratch_bytes: runner_bytes.saturating_add(logits),
            staging_bytes: if store { staging } else { 0 },
            available_bytes,
        }
    }

    /// What must fit for good: mapped weights can be dropped and read again, the rest cannot.
    pub fn required_bytes(&self) -> usize {
        self.pool.bytes().saturating_add(self.buffer_bytes())
    }

    /// Scratch and staging.
    pub fn buffer_bytes(&self) -> usize {
        self.scratch_bytes.saturating_add(self.staging_bytes)
    }

    /// What is left for mapped weights; none if the system does not say what there is.
    pub fn room_for_weights(&self) -> Option<usize> {
        Some(self.available_bytes?.saturating_sub(self.required_bytes()))
    }

    /// Where weights will be; in memory if the system does not say how much there is.
    pub fn residency(&self) -> Residency {
        match self.room_for_weights() {
            Some(room) if room < self.weights.trunk_bytes() => Residency::Disk,
            Some(room) if room < self.weights.mapped_bytes => Residency::ExpertsFromDisk,
            _ => Residency::Memory,
        }
    }

    /// Refuses a plan that the machine cannot hold.
    ///
    /// # Errors
    /// With the numbers.
    pub fn check(&self) -> Result<(), Error> {
        match self.available_bytes {
            Some(available) if self.required_bytes() > available => Err(Error::Unsupported(format!(
                "the KV pool ({} for {} tokens) and buffers ({}) need {}, but {} are available; choose a smaller \
                 --context or --kv-memory",
                Bytes(self.pool.bytes()),
                Count(self.pool.tokens()),
                Bytes(self.buffer_bytes()),
                Bytes(self.required_bytes()),
                Bytes(available),
            ))),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { weights, pool, .. } = self;
        let (mapped, token) = (Bytes(weights.mapped_bytes), Bytes(weights.token_bytes));
        write!(f, "weights {mapped} (mapped, {token} per token), ")?;
        if weights.copied_bytes > 0 {
            write!(f, "8-bit copies {}, ", Bytes(weights.copied_bytes))?;
        }
        let (bytes, tokens, name) =
            (Bytes(pool.bytes()), Count(pool.tokens()), cache_type_name(pool.cache_type));
        write!(f, "KV pool {bytes} ({tokens} tokens, {name}), buffers {}", Bytes(self.scratch_bytes))?;
        if self.staging_bytes > 0 {
            write!(f, ", staging {}", Bytes(self.staging_bytes))?;
        }
        if let Some(available) = self.available_bytes {
            write!(f, "; {} available", Bytes(available))?;
        }
        match self.residency() {
            Residency::Memory => Ok(()),
            Residency::ExpertsFromDisk => f.write_str(": experts will be read from disk"),
            Residency::Disk => f.write_str(": weights will be read from disk again and again"),
        }
    }
}

/// Refuses a runner of `capacity` that the machine cannot hold: cache, buffers and one batch's logits.
///
/// # Errors
/// With the numbers.
pub fn check_capacity(config: &ModelConfig, numerics: Numerics, capacity: &Capacity) -> Result<(), Error> {
    let (cache, buffers) = CpuRunner::plan(config, numerics, capacity);
    let logits = capacity.logit_rows.saturating_mul(config.vocab).saturating_mul(4);
    check_available("cache, buffers and logits", cache.saturating_add(buffers).saturating_add(logits))
}

/// Refuses to go on if the machine cannot give `bytes` for `what`.
///
/// # Errors
/// With the numbers.
pub fn check_available(what: &str, bytes: usize) -> Result<(), Error> {
    match available_memory() {
        Some(available) if bytes > available => {
            let (bytes, available) = (Bytes(bytes), Bytes(available));
            Err(Error::Unsupported(format!("{what} need {bytes}, but {available} are available")))
        }
        _ => Ok(()),
    }
}
