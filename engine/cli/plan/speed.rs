//! Upper bounds of speed: what must be read and computed, by what this machine was just measured to read and compute.

use bench::ceilings::{Bound, Yardstick};
use bench::step::arithmetic;
use models::Numerics;
use models::config::Ffn;

use crate::engine::EngineOptions;
use crate::error::Error;
use crate::memory::outline::Outline;
use crate::memory::{MemoryPlan, Residency};

/// Without so much memory to spare the ceilings are measured with a buffer of 32 MiB instead of 512.
const MEMORY_TO_MEASURE: usize = 2 << 30;
/// What disks are counted in: a tenfold faster one gives ten times the tokens.
pub const DISK_BYTES_PER_SECOND: f64 = 1e9;

/// Bounds; none of them a promise.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// Bytes per second, measured.
    pub read_bandwidth: f64,
    /// Which arithmetic ceiling counts.
    pub bound: Bound,
    /// Operations per second, measured.
    pub peak: f64,
    /// Tokens per second of one request at the beginning of a context, with all it needs in memory.
    pub decode: f64,
    /// The same at the end of the planned context.
    pub decode_at_end: f64,
    /// Tokens per second of a prompt, in steps of the planned size.
    pub prefill: f64,
    /// What comes from disk; none if all is in memory.
    pub disk: Option<Disk>,
}

/// Reads from disk, if experts are chosen evenly.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Bytes per decoded token at worst.
    pub token_bytes_worst: f64,
    /// Bytes per decoded token on average.
    pub token_bytes_mean: f64,
    /// Decoded tokens per second for every [`DISK_BYTES_PER_SECOND`] that it reads, on average.
    pub decode: f64,
    /// The same of a prompt's tokens.
    pub prefill: f64,
}

impl Speed {
    /// Measures the ceilings of the current rayon pool, in less than a second or two, and divides.
    pub fn measure(
        outline: &Outline,
        plan: &MemoryPlan,
        limits: &EngineOptions,
        numerics: Numerics,
        quick: bool,
    ) -> Result<Self, Error> {
        let small = quick || plan.available_bytes.is_some_and(|bytes| bytes < MEMORY_TO_MEASURE);
        let failed = |error| Error::Io("memory to measure with".into(), error);
        let ceilings = Yardstick::new(small).map_err(failed)?.ceilings();
        let bound = arithmetic(numerics);
        let (read_bandwidth, peak) = (ceilings.read_bandwidth, ceilings.of(bound));
        let weights = &plan.weights;

        let kv = |context: usize| {
            let seen = limits.window.map_or(0, |(window, _)| window.min(context));
            context as f64 * plan.pool.token_bytes() as f64 + (seen * plan.pool.window_token_bytes()) as f64
        };
        let decode = |context| read_bandwidth / (weights.token_bytes as f64 + kv(context)).max(1.0);

        let step = limits.step_tokens as f64;
        let operations = 2.0 * step * outline.multiplied_parameters() as f64;
        let trunk = (weights.token_bytes - weights.token_expert_bytes) as f64;
        let bytes = trunk + weights.expert_bytes as f64 * share_of_experts(outline, step);
        let prefill = step / (bytes / read_bandwidth).max(operations / peak);

        Ok(Self {
            read_bandwidth,
            bound,
            peak,
            decode: decode(0),
            decode_at_end: decode(limits.context),
            prefill,
            disk: from_disk(plan, step, share_of_experts(outline, step)),
        })
    }
}

/// What comes from disk, where a step of so many tokens touches so large a part of the experts.
fn from_disk(plan: &MemoryPlan, step: f64, touched: f64) -> Option<Disk> {
    let weights = &plan.weights;
    let (trunk, experts) = (weights.trunk_bytes(), weights.expert_bytes as f64);
    let token = weights.token_expert_bytes as f64;
    let room = plan.room_for_weights()?;
    let (worst, mean, step_bytes) = match plan.residency() {
        Residency::Memory => return None,
        Residency::ExpertsFromDisk => {
            // What is not in memory can be all that a token asks for.
            let missing = (experts - (room - trunk) as f64).max(0.0);
            let part = missing / experts.max(1.0);
            (token.min(missing), token * part, experts * touched * part)
        }
        // What is read in a fixed order and does not fit is never there when it is needed again.
        Residency::Disk => {
            let all = trunk as f64 + token;
            (all, all, trunk as f64 + experts * touched)
        }
    };
    let rate = |tokens: f64, bytes: f64| tokens * DISK_BYTES_PER_SECOND / bytes.max(1.0);
    let (decode, prefill) = (rate(1.0, mean), rate(step, step_bytes));
    Some(Disk { token_bytes_worst: worst, token_bytes_mean: mean, decode, prefill })
}

/// The part of all routed experts that a step of `tokens` touches, if they are chosen evenly.
fn share_of_experts(outline: &Outline, tokens: f64) -> f64 {
    let moe = outline.config.layers.iter().find_map(|layer| match &layer.ffn {
        Ffn::Moe(moe) => Some(moe),
        Ffn::Dense(_) => None,
    });
    let idle = moe.map_or(1.0, |moe| 1.0 - moe.rule.top_k as f64 / moe.rule.experts.max(1) as f64);
    1.0 - idle.powf(tokens)
}
