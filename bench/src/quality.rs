//! `moebius bench quality`: what an option costs in accuracy, against `--numerics reference` of the same runner.
//!
//! Both see the same tokens (teacher forcing), in windows that each begin with an empty cache. With P the exact
//! distribution of the next token and Q the tested one, the divergence is KL(P || Q), in nats.

use std::sync::Arc;
use std::time::Instant;

use kernels::attention::CacheType;
use models::cpu::CpuRunner;
use models::{Batch, Capacity, Model, NoProbe, Numerics, Runner, WantLogits};

use crate::cost::blocks;
use crate::row::{Row, Setting, Times};
use crate::{Error, Sink};

/// Text that the demo model was not trained on: speeches of plays that are not in its training text. Public domain.
pub const PASSAGE: &str = include_str!("quality/passage.txt");
/// Tokens that begin with an empty cache together.
const WINDOW: usize = 256;

/// A way to run a model that is not exact. A new option is a line of [`VARIANTS`].
pub struct Variant {
    /// Name of the row, after `quality/`.
    pub name: &'static str,
    /// `numerics` of the row.
    numerics: Numerics,
    /// With 8-bit copies of float weights.
    q8: bool,
    /// How cached values are stored; `None` = as the numerics say.
    cache_type: Option<CacheType>,
}

const fn variant(name: &'static str, numerics: Numerics, q8: bool) -> Variant {
    Variant { name, numerics, q8, cache_type: None }
}

impl Variant {
    /// `numerics` of its row.
    fn label(&self) -> String {
        let q8 = if self.q8 { "+q8-dense" } else { "" };
        let kv = if self.cache_type == Some(CacheType::Fp8) { "+fp8-kv" } else { "" };
        format!("{}{q8}{kv}", self.numerics.as_str())
    }
}

/// All of them.
pub const VARIANTS: &[Variant] = &[
    variant("model", Numerics::Model, false),
    variant("int8-activations", Numerics::Int8Activations, false),
    variant("q8-dense", Numerics::Model, true),
    Variant { cache_type: Some(CacheType::Fp8), ..variant("fp8-kv", Numerics::Model, false) },
    variant("int8-activations-q8-dense", Numerics::Int8Activations, true),
];

/// Tokens to compare on.
#[derive(Clone, Debug)]
pub struct Text {
    /// Their ids.
    pub tokens: Vec<u32>,
    /// Where they are from, for the row.
    pub source: String,
}

/// What [`measure`]'s runners hold.
pub fn capacity(model: &Model) -> Capacity {
    let tokens = WINDOW.min(model.config.max_positions);
    Capacity::new(blocks(tokens), tokens, tokens)
}

/// A row for every variant, or for those of the given names; `q8` opens the model with 8-bit copies.
///
/// # Errors
/// If there is no variant of a name, there are no tokens, logits are not finite, or a row cannot be written.
pub fn measure(
    (model, q8): (&Arc<Model>, &(dyn Fn() -> Result<Arc<Model>, Error> + Sync)),
    name: &str,
    text: &Text,
    names: &[String],
    sink: &mut dyn Sink,
) -> Result<(), Error> {
    let unknown = names.iter().find(|name| !VARIANTS.iter().any(|variant| variant.name == **name));
    if let Some(unknown) = unknown {
        let known: Vec<&str> = VARIANTS.iter().map(|variant| variant.name).collect();
        let message = format!("{unknown:?} is not one of the variants: {}", known.join(", "));
        return Err(Error::Unsupported(message));
    }
    if text.tokens.is_empty() {
        return Err(Error::Unsupported("there are no tokens to compare on".into()));
    }
    let chosen = VARIANTS.iter().filter(|v| names.is_empty() || names.iter().any(|name| *name == v.name));
    for variant in chosen {
        let copied = if variant.q8 { Some(q8()?) } else { None };
        let found = compare((model, copied.as_ref().unwrap_or(model)), variant, &text.tokens, sink)?;
        let setting = Setting {
            numerics: variant.label(),
            runner: "cpu",
            threads: rayon::current_num_threads(),
            model: name.to_owned(),
        };
        let times = Times::of(&found.seconds);
        let mut row = Row::new(format!("quality/{}", variant.name), times, (0, 0), None, &setting);
        row.tokens_per_second = Some(found.divergences.len() as f64 / found.seconds.iter().sum::<f64>());
        let mut sorted = found.divergences;
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let row = row
            .with("kl_mean", sorted.iter().sum::<f64>() / count as f64)
            .with("kl_p999", sorted[(count * 999).div_ceil(1000) - 1])
            .with("kl_max", sorted[count - 1])
            .with("top1_agreement", found.agreeing as f64 / count as f64)
            .with("positions", count)
            .with("text", text.source.as_str());
        sink.row(row)?;
    }
    Ok(())
}

/// What [`compare`] found.
struct Found {
    /// Of every position, in nats.
    divergences: Vec<f64>,
    /// Positions at which both have the same likeliest token.
    agreeing: usize,
    /// Of the variant's passes.
    seconds: Vec<f64>,
}

fn compare(
    (model, tested): (&Arc<Model>, &Arc<Model>),
    variant: &Variant,
    tokens: &[u32],
    sink: &mut dyn Sink,
) -> Result<Found, Error> {
    let capacity = capacity(model);
    let vocab = model.config.vocab;
    let mut exact = CpuRunner::new(Arc::clone(model), Numerics::Reference, capacity);
    let mut tested = CpuRunner::new(
        Arc::clone(tested),
        variant.numerics,
        Capacity { cache_type: variant.cache_type, ..capacity },
    );
    let table: Vec<u32> = (0..capacity.blocks as u32).collect();
    let (mut p, mut q) = (vec![0.0; capacity.logit_rows * vocab], vec![0.0; capacity.logit_rows * vocab]);
    let mut found = Found { divergences: Vec::new(), agreeing: 0, seconds: Vec::new() };
    let mut batch = Batch::default();
    for window in tokens.chunks(capacity.batch_tokens) {
        batch.clear();
        batch.push(window, 0, &table, WantLogits::All);
        let (p, q) = (&mut p[..window.len() * vocab], &mut q[..window.len() * vocab]);
        exact.forward(&batch, &mut NoProbe, p)?;
        let begun = Instant::now();
        tested.forward(&batch, &mut NoProbe, q)?;
        found.seconds.push(begun.elapsed().as_secs_f64());
        for (p, q) in p.chunks_exact(vocab).zip(q.chunks_exact(vocab)) {
            let divergence = divergence(p, q);
            if !divergence.is_finite() {
                return Err(Error::Unsupported(format!("{}: logits that are not finite", variant.name)));
            }
            found.divergences.push(divergence);
            found.agreeing += usize::from(top(p) == top(q));
        }
        if sink.stopped() {
            break;
        }
    }
    Ok(found)
}

/// KL(softmax(p) || softmax(q)) in nats.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |x: &[f32]| {
        let peak = x.iter().fold(f64::NEG_INFINITY, |peak, &x| peak.max(f64::from(x)));
        peak + x.iter().map(|&x| (f64::from(x) - peak).exp()).sum::<f64>().ln()
    };
    let (sum_p, sum_q) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let (log_p, log_q) = (f64::from(p) - sum_p, f64::from(q) - sum_q);
        log_p.exp() * (log_p - log_q)
    });
    let sum = terms.sum::<f64>();
    // Rounding may leave a tiny negative number; a NaN must stay one.
    if sum < 0.0 { 0.0 } else { sum }
}

/// The first of the greatest.
fn top(x: &[f32]) -> usize {
    (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_zero_for_equal_and_known_for_simple_ones() {
        assert_eq!(divergence(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]), 0.0);
        // P = (1/2, 1/2), Q = (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2.
        let found = divergence(&[0.0, 0.0], &[0.0, 3f32.ln()]);
        assert!((found - 0.5 * (4f64 / 3.0).ln()).abs() < 1e-7, "{found}");
        assert!(!divergence(&[0.0, f32::NAN], &[0.0, 0.0]).is_finite());
    }
}
