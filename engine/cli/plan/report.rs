//! The findings as a table and as one JSON object.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::Findings;
use super::speed::{DISK_BYTES_PER_SECOND, Disk};
use crate::memory::{Bytes, Count, Residency, cache_type_name};

impl Residency {
    fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::ExpertsFromDisk => "experts_from_disk",
            Self::Disk => "disk",
        }
    }
}

impl Findings {
    fn numerics(&self) -> String {
        let copies = if self.plan.weights.copied_bytes > 0 { "+q8-dense" } else { "" };
        let cache = crate::memory::cache_type_label(self.plan.pool.cache_type);
        format!("{}{copies}{cache}", self.options.numerics().as_str())
    }

    /// Bytes of one request's whole context.
    fn context_bytes(&self) -> usize {
        let pool = &self.plan.pool;
        let seen = self.limits.window.map_or(0, |(window, _)| window.min(self.limits.context));
        self.limits.context * pool.token_bytes() + seen * pool.window_token_bytes()
    }

    /// Requests of the whole context that the pool holds at a time.
    fn whole_requests(&self) -> usize {
        self.plan.pool.tokens() / self.limits.context.next_multiple_of(models::batch::PAGE_TOKENS)
    }

    pub fn json(&self) -> Value {
        let Self { outline, plan, limits, speed, .. } = self;
        let (weights, pool) = (&plan.weights, &plan.pool);
        let kinds: Map<String, Value> = outline
            .kinds
            .iter()
            .map(|(role, total)| {
                let total = json!({"parameters": total.parameters, "bytes": total.bytes});
                (role.as_str().to_owned(), total)
            })
            .collect();
        json!({
            "model": self.model,
            "model_type": outline.config.model_type,
            "source": outline.source.as_str(),
            "parameters": outline.parameters(),
            "active_parameters": outline.active_parameters(),
            "numerics": self.numerics(),
            "threads": self.threads,
            "parallel": self.options.sequences,
            "context": limits.context,
            "model_context": outline.config.max_positions,
            "fits": self.refused.is_none(),
            "refused": self.refused,
            "residency": plan.residency().as_str(),
            "weights": {
                "bytes": outline.bytes(),
                "by_kind": kinds,
                "index_total_bytes": outline.index.and_then(|index| index.total_bytes),
                "index_unread_tensors": outline.index.map_or(0, |index| index.unread),
                "mapped_bytes": weights.mapped_bytes,
                "copied_bytes": weights.copied_bytes,
                "trunk_bytes": weights.trunk_bytes(),
                "expert_bytes": weights.expert_bytes,
                "bytes_per_token": weights.token_bytes,
                "expert_bytes_per_token": weights.token_expert_bytes,
            },
            "kv": {
                "type": cache_type_name(pool.cache_type),
                "bytes_per_token": pool.token_bytes(),
                "window_bytes_per_token": pool.window_token_bytes(),
                "window_tokens": limits.window.map_or(0, |(window, _)| window),
                "bytes_per_context": self.context_bytes(),
                "pool_bytes": pool.bytes(),
                "pool_tokens": pool.tokens(),
                "pool_contexts": self.whole_requests(),
            },
            "memory": {
                "scratch_bytes": plan.scratch_bytes,
                "staging_bytes": plan.staging_bytes,
                "required_bytes": plan.required_bytes() + weights.copied_bytes,
                "available_bytes": self.available_bytes,
            },
            "speed": {
                "read_bandwidth": speed.read_bandwidth,
                "arithmetic": speed.bound.as_str(),
                "arithmetic_peak": speed.peak,
                "decode_bound": speed.decode,
                "decode_bound_at_context": speed.decode_at_end,
                "prefill_bound": speed.prefill,
                "disk_bytes_per_token_worst": speed.disk.map_or(0.0, |disk| disk.token_bytes_worst),
                "disk_bytes_per_token_mean": speed.disk.map_or(0.0, |disk| disk.token_bytes_mean),
                "decode_bound_per_disk_gb": speed.disk.map(|disk| disk.decode),
                "prefill_bound_per_disk_gb": speed.disk.map(|disk| disk.prefill),
            },
        })
    }

    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = [Self::write_needs, Self::write_fit, Self::write_speed].map(|write| write(self, &mut out));
        out
    }

    fn write_needs(&self, out: &mut String) -> std::fmt::Result {
        let Self { outline, plan, limits, .. } = self;
        let (weights, pool) = (&plan.weights, &plan.pool);
        let config = &outline.config;
        let source = match outline.source {
            crate::memory::outline::Source::Files => "the files' headers",
            crate::memory::outline::Source::Index => "config.json and the index",
            crate::memory::outline::Source::Config => "config.json alone",
        };
        let (all, active) = (Count(outline.parameters()), Count(outline.active_parameters()));
        writeln!(out, "model          {} ({}), from {source}", self.model, config.model_type)?;
        writeln!(out, "parameters     {all}, {active} active per token")?;
        writeln!(out, "weights        {}", Bytes(outline.bytes()))?;
        for (role, total) in &outline.kinds {
            writeln!(out, "  {:<14} {:>10}", role.as_str(), Bytes(total.bytes))?;
        }
        if let Some((total, unread)) =
            outline.index.and_then(|index| Some((index.total_bytes?, index.unread)))
        {
            let described = outline.bytes();
            if unread > 0 {
                writeln!(
                    out,
                    "  the index counts {}, {unread} tensors that are not read among it",
                    Bytes(total)
                )?;
            } else if total.abs_diff(described) > described / 100 {
                writeln!(
                    out,
                    "  the index counts {} instead: config.json does not say all types",
                    Bytes(total)
                )?;
            }
        }
        let (token, experts) = (Bytes(weights.token_bytes), Bytes(weights.token_expert_bytes));
        writeln!(out, "per token      {token} read, {experts} of routed experts among it")?;

        let (context, longest) = (Count(limits.context), Count(config.max_positions));
        writeln!(out, "context        {context} tokens of the model's {longest}")?;
        let window = match limits.window {
            Some((tokens, _)) => {
                let bytes = Count(pool.window_token_bytes());
                format!(" and {bytes} for each of the last {}", Count(tokens))
            }
            None => String::new(),
        };
        let (bytes, name) = (Count(pool.token_bytes()), cache_type_name(pool.cache_type));
        writeln!(
            out,
            "KV cache       {name}: {bytes} bytes per token{window}; {} per context",
            Bytes(self.context_bytes())
        )?;
        let (tokens, contexts, parallel) =
            (Count(pool.tokens()), self.whole_requests(), self.options.sequences);
        writeln!(out, "KV pool        {}: {tokens} tokens", Bytes(pool.bytes()))?;
        let whole =
            if contexts == 1 { "one whole context".to_owned() } else { format!("{contexts} whole contexts") };
        writeln!(out, "requests       {parallel} at a time; the pool holds {whole}")?;
        writeln!(out, "buffers        {}", Bytes(plan.scratch_bytes))?;
        if plan.staging_bytes > 0 {
            writeln!(out, "staging        {}", Bytes(plan.staging_bytes))?;
        }
        if weights.copied_bytes > 0 {
            let (copies, mapped) = (Bytes(weights.copied_bytes), Bytes(weights.mapped_bytes));
            writeln!(out, "8-bit copies   {copies}; {mapped} are read where they are")?;
        }
        Ok(())
    }

    fn write_fit(&self, out: &mut String) -> std::fmt::Result {
        let Self { plan, speed, .. } = self;
        let weights = &plan.weights;
        let required = Bytes(plan.required_bytes() + weights.copied_bytes);
        let Some(available) = self.available_bytes else {
            return writeln!(out, "memory         {required} for good; the system does not say what it has");
        };
        writeln!(out, "memory         {required} for good, {} available", Bytes(available))?;
        if let Some(refused) = &self.refused {
            return writeln!(out, "fits           no: {refused}");
        }
        let (room, trunk) = (Bytes(plan.room_for_weights().unwrap_or(0)), Bytes(weights.trunk_bytes()));
        let bytes = |of: fn(&Disk) -> f64| Bytes(speed.disk.as_ref().map_or(0.0, of) as usize);
        match plan.residency() {
            Residency::Memory => {
                writeln!(out, "fits           yes: all weights stay in memory, {room} for them")
            }
            Residency::ExpertsFromDisk => {
                let (worst, mean) =
                    (bytes(|disk| disk.token_bytes_worst), bytes(|disk| disk.token_bytes_mean));
                writeln!(
                    out,
                    "fits           in part: {room} for weights hold the {trunk} that every token needs"
                )?;
                writeln!(
                    out,
                    "               from disk per token: {worst} of routed experts at worst, {mean} evenly"
                )
            }
            Residency::Disk => {
                let token = bytes(|disk| disk.token_bytes_worst);
                writeln!(
                    out,
                    "fits           hardly: {room} for weights, less than the {trunk} that every token needs"
                )?;
                writeln!(out, "               from disk per token: {token}, all that it needs")
            }
        }
    }

    fn write_speed(&self, out: &mut String) -> std::fmt::Result {
        let speed = &self.speed;
        let (read, peak) = (speed.read_bandwidth / 1e9, speed.peak / 1e9);
        let (threads, bound) = (self.threads, speed.bound.as_str());
        writeln!(out, "measured       {read:.1} GB/s read, {peak:.0} Gop/s {bound}, {threads} threads")?;
        let end = Count(self.limits.context);
        let (decode, at_end) = (rate(speed.decode), rate(speed.decode_at_end));
        let memory = if speed.disk.is_some() { ", if it were all in memory" } else { "" };
        writeln!(out, "decode         at most {decode} tokens/s, {at_end} behind {end} tokens{memory}")?;
        writeln!(out, "prefill        at most {} tokens/s{memory}", rate(speed.prefill))?;
        if let Some(disk) = &speed.disk {
            let (decode, prefill) = (rate(disk.decode), rate(disk.prefill));
            let unit = DISK_BYTES_PER_SECOND / 1e9;
            writeln!(
                out,
                "from disk      for each {unit:.0} GB/s that it reads: decode {decode}, prefill {prefill}"
            )?;
        }
        writeln!(
            out,
            "These are ceilings of the {} numerics, not promises: `moebius bench` measures.",
            self.numerics()
        )
    }
}

/// A rate for people: three digits that matter.
fn rate(tokens_per_second: f64) -> String {
    match tokens_per_second {
        rate if rate >= 100.0 => Count(rate as usize).to_string(),
        rate if rate >= 10.0 => format!("{rate:.1}"),
        rate => format!("{rate:.2}"),
    }
}
