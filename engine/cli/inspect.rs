//! `moebius inspect`: what is in the files. Reads headers only.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Args;
use models::Model;
use models::config::{Ffn, Mixer};
use models::manifest::{Role, manifest};
use serde_json::{Value, json};

use super::{DEMO, print};
use crate::error::Error;
use crate::loaded::{DenseFormat, open_model};
use crate::memory::Bytes;

#[derive(Args)]
pub struct InspectArgs {
    /// Checkpoint folder, hub id `org/name[@revision]`, or `demo`
    #[arg(default_value = DEMO)]
    model: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Totals of one kind of tensor.
#[derive(Default)]
struct Total {
    tensors: usize,
    parameters: usize,
    bytes: usize,
}

/// What `inspect` says of a model.
struct Summary<'a> {
    model: &'a Model,
    by_role: BTreeMap<Role, Total>,
    formats: BTreeMap<String, usize>,
    skipped: BTreeMap<&'static str, Total>,
    parameters: usize,
    active: usize,
}

pub fn run(args: &InspectArgs) -> Result<ExitCode, Error> {
    let model = open_model(&args.model, DenseFormat::Published)?;
    let summary = Summary::new(&model)?;
    print(&if args.json { format!("{}\n", summary.json()) } else { summary.table() })?;
    Ok(ExitCode::SUCCESS)
}

impl<'a> Summary<'a> {
    fn new(model: &'a Model) -> Result<Self, Error> {
        let tensors = model.checkpoint.tensors();
        let specs = manifest(&model.config, &|name| tensors.contains_key(name))?;
        let mut by_role: BTreeMap<Role, Total> = BTreeMap::new();
        let mut formats: BTreeMap<String, usize> = BTreeMap::new();
        for spec in &specs {
            let entry = &tensors[&spec.name];
            let bytes = entry.bytes.as_slice().len();
            let total = by_role.entry(spec.role).or_default();
            total.tensors += 1;
            total.parameters += spec.parameters;
            total.bytes += bytes;
            *formats.entry(format!("{:?}", entry.dtype)).or_default() += bytes;
        }
        let mut skipped: BTreeMap<&'static str, Total> = BTreeMap::new();
        for (name, reason) in &model.weights.skipped.tensors {
            let total = skipped.entry(reason).or_default();
            total.tensors += 1;
            total.bytes += tensors[name].bytes.as_slice().len();
        }
        let parameters: usize = by_role.values().map(|total| total.parameters).sum();
        Ok(Self { model, by_role, formats, skipped, parameters, active: active(model, parameters) })
    }

    fn json(&self) -> Value {
        let config = &self.model.config;
        let totals = |total: &Total| json!({"tensors": total.tensors, "parameters": total.parameters, "bytes": total.bytes});
        let by_role: serde_json::Map<String, Value> =
            self.by_role.iter().map(|(role, total)| (role.as_str().to_owned(), totals(total))).collect();
        let skipped: serde_json::Map<String, Value> =
            self.skipped.iter().map(|(reason, total)| ((*reason).to_owned(), totals(total))).collect();
        json!({
            "model_type": config.model_type,
            "layers": config.layers.len(),
            "moe_layers": moe_layers(self.model),
            "hidden": config.hidden,
            "vocab": config.vocab,
            "max_positions": config.max_positions,
            "parameters": self.parameters,
            "active_parameters": self.active,
            "weight_bytes": self.model.weight_bytes(),
            "by_kind": by_role,
            "formats": self.formats,
            "skipped": skipped,
            "kv_bytes_per_token": config.cache_values_per_token() * 2,
            "kv_bytes_per_token_reference": config.cache_values_per_token() * 4,
        })
    }

    fn table(&self) -> String {
        use std::fmt::Write;
        let config = &self.model.config;
        let mut out = String::new();
        let layers = config.layers.len();
        let _ = writeln!(out, "architecture   {}", config.model_type);
        let _ = writeln!(out, "layers         {layers} ({} with experts)", moe_layers(self.model));
        if let Some(line) = experts_line(self.model) {
            let _ = writeln!(out, "experts        {line}");
        }
        let _ = writeln!(out, "attention      {}", attention_line(self.model));
        let _ = writeln!(out, "hidden, vocab  {}, {}", config.hidden, config.vocab);
        let _ = writeln!(out, "context        {} tokens", config.max_positions);
        let (all, active) = (count(self.parameters), count(self.active));
        let _ = writeln!(out, "parameters     {all}, {active} active per token");
        let _ = writeln!(out, "weights        {}", Bytes(self.model.weight_bytes()));
        for (role, total) in &self.by_role {
            let (name, parameters) = (role.as_str(), count(total.parameters));
            let bytes = Bytes(total.bytes).to_string();
            let _ = writeln!(out, "  {name:<14} {parameters:>10} {bytes:>11} {:>7} tensors", total.tensors);
        }
        let formats: Vec<String> =
            self.formats.iter().map(|(format, bytes)| format!("{format} {}", Bytes(*bytes))).collect();
        let _ = writeln!(out, "stored as      {}", formats.join(", "));
        for (reason, total) in &self.skipped {
            let _ =
                writeln!(out, "skipped        {} tensors, {} ({reason})", total.tensors, Bytes(total.bytes));
        }
        let values = config.cache_values_per_token();
        let _ = writeln!(out, "KV cache       {} per token (f32: {})", Bytes(values * 2), Bytes(values * 4));
        out
    }
}

fn moe_layers(model: &Model) -> usize {
    model.config.layers.iter().filter(|layer| matches!(layer.ffn, Ffn::Moe(_))).count()
}

/// All parameters but those of the routed experts a token does not go to.
fn active(model: &Model, parameters: usize) -> usize {
    let idle = model.config.layers.iter().map(|layer| match &layer.ffn {
        Ffn::Moe(moe) => {
            let expert = 3 * model.config.hidden * moe.intermediate;
            (moe.rule.experts - moe.rule.top_k) * expert
        }
        Ffn::Dense(_) => 0,
    });
    parameters.saturating_sub(idle.sum())
}

fn experts_line(model: &Model) -> Option<String> {
    model.config.layers.iter().find_map(|layer| match &layer.ffn {
        Ffn::Moe(moe) => {
            let shared = if moe.shared.is_some() { " and a shared one" } else { "" };
            Some(format!(
                "{} of {} per token{shared}, {} wide",
                moe.rule.top_k, moe.rule.experts, moe.intermediate
            ))
        }
        Ffn::Dense(_) => None,
    })
}

fn attention_line(model: &Model) -> String {
    match model.config.layers.first().map(|layer| &layer.mixer) {
        Some(Mixer::Mla(mla)) => {
            format!("latent (MLA), {} heads, {} + {} cached", mla.heads, mla.kv_rank, mla.rope_dim)
        }
        Some(Mixer::Gqa(gqa)) => {
            format!("grouped, {} heads, {} key heads of {}", gqa.heads, gqa.kv_heads, gqa.head_dim)
        }
        None => "none".into(),
    }
}

/// A count for people: 1.03T, 32.9B, 0.85M.
fn count(n: usize) -> String {
    let n = n as f64;
    match n {
        _ if n >= 1e12 => format!("{:.2}T", n / 1e12),
        _ if n >= 1e9 => format!("{:.2}B", n / 1e9),
        _ if n >= 1e6 => format!("{:.2}M", n / 1e6),
        _ => format!("{n}"),
    }
}
