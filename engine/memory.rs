//! Every byte, before anything is loaded: what the weights, the cache and the buffers will take, and
//! whether the machine has it.

use std::fmt;

use models::cpu::CpuRunner;
use models::{Capacity, ModelConfig, Numerics};

use crate::engine::EngineOptions;
use crate::error::Error;

/// Context that is planned for unless the user says otherwise, if it fits.
const DEFAULT_CONTEXT: usize = 32 * 1024;
/// Context below which a default is not reduced.
const MIN_CONTEXT: usize = 2048;

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug)]
pub struct MemoryPlan {
    /// Mapped weights; resident as far as they are touched, and reclaimable.
    pub weight_bytes: usize,
    /// 8-bit copies of weights, made by the time of this plan.
    pub copied_bytes: usize,
    /// The cache; allocated at start, resident as it fills.
    pub cache_bytes: usize,
    /// Activations, logits and other buffers.
    pub scratch_bytes: usize,
    /// What the system can give, if it says.
    pub available_bytes: Option<usize>,
}

impl MemoryPlan {
    /// The plan for one engine on the cpu runner.
    pub fn new(
        config: &ModelConfig,
        (weight_bytes, copied_bytes): (usize, usize),
        numerics: Numerics,
        options: &EngineOptions,
    ) -> Self {
        let (cache_bytes, runner_bytes) = CpuRunner::plan(config, numerics, &options.capacity());
        // Logits of every running request, and the sampler's copy and candidates of one.
        let logits = config.vocab * (4 * options.running + 20);
        let available_bytes = available_memory();
        Self {
            weight_bytes,
            copied_bytes,
            cache_bytes,
            scratch_bytes: runner_bytes + logits,
            available_bytes,
        }
    }

    /// What must fit for good: mapped weights can be dropped and read again, the rest cannot.
    pub fn required_bytes(&self) -> usize {
        self.cache_bytes + self.scratch_bytes
    }

    /// Refuses a plan that the machine cannot hold.
    ///
    /// # Errors
    /// With the numbers.
    pub fn check(&self) -> Result<(), Error> {
        match self.available_bytes {
            Some(available) if self.required_bytes() > available => Err(Error::Unsupported(format!(
                "cache ({}) and buffers ({}) need {}, but {} are available; choose a smaller --context",
                Bytes(self.cache_bytes),
                Bytes(self.scratch_bytes),
                Bytes(self.required_bytes()),
                Bytes(available),
            ))),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (weights, cache, scratch) = (self.weight_bytes, self.cache_bytes, self.scratch_bytes);
        write!(f, "weights {} (mapped), ", Bytes(weights))?;
        if self.copied_bytes > 0 {
            write!(f, "8-bit copies {}, ", Bytes(self.copied_bytes))?;
        }
        write!(f, "cache {}, buffers {}", Bytes(cache), Bytes(scratch))?;
        match self.available_bytes {
            Some(available) => write!(f, "; {} available", Bytes(available)),
            None => Ok(()),
        }
    }
}

/// The engine's limits for `sequences` requests at a time: the user's context, or the default one
/// made smaller until it fits.
///
/// # Errors
/// If the user's context exceeds the model's, or nothing fits.
pub fn fit(
    config: &ModelConfig,
    weight_bytes: (usize, usize),
    numerics: Numerics,
    context: Option<usize>,
    sequences: usize,
) -> Result<(EngineOptions, MemoryPlan), Error> {
    let longest = config.max_positions;
    let plan = |context: usize| {
        let options = EngineOptions::new(context, sequences, config.window());
        (options, MemoryPlan::new(config, weight_bytes, numerics, &options))
    };
    if let Some(context) = context {
        if context > longest {
            let message =
                format!("--context {context} is more than the {longest} tokens the model was made for");
            return Err(Error::Unsupported(message));
        }
        let (options, plan) = plan(context);
        plan.check()?;
        return Ok((options, plan));
    }
    let mut context = longest.min(DEFAULT_CONTEXT);
    loop {
        let (options, plan) = plan(context);
        match plan.check() {
            Ok(()) => return Ok((options, plan)),
            Err(_) if context > MIN_CONTEXT => context = (context / 2).max(MIN_CONTEXT),
            Err(error) => return Err(error),
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

/// What Linux calls `MemAvailable`.
fn available_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The most memory this process has had resident, in bytes; 0 where the system does not say.
pub fn peak_resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok());
    kib.unwrap_or(0) * 1024
}

/// A number of bytes for people.
pub struct Bytes(pub usize);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        match unit {
            0 => write!(f, "{} B", self.0),
            _ => write!(f, "{value:.1} {}", UNITS[unit]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_readable() {
        assert_eq!(Bytes(900).to_string(), "900 B");
        assert_eq!(Bytes(1536).to_string(), "1.5 KiB");
        assert_eq!(Bytes(18_421_383_168).to_string(), "17.2 GiB");
    }
}
