//! The oracle: the whole decoder written plainly in candle operations, in f32, with weights
//! dequantised exactly. Every fast path is compared against it, so it takes no short cut that one
//! of them takes: it materialises latent attention, loops over experts and holds its own reading of
//! every weight format and router. It knows nothing of speed beyond keeping small models in memory.

mod attention;
mod ffn;
mod router;
mod tensors;

use std::sync::Arc;

use candle_core::Tensor;
use kernels::attention::PAGE;

use crate::Model;
use crate::batch::Batch;
use crate::config::{Ffn, LayerSpec, Mixer, ModelConfig, Residual};
use crate::error::{Error, Result};
use crate::runner::{Capacity, Numerics, Point, Probe, Runner};
use crate::weights::{FfnWeights, MixerWeights};
use attention::LayerCache;
use tensors::{Tensors, rms_norm, rows, values};

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Run(format!("reference runner: {error}"))
    }
}

/// Runs a model in candle operations on the host; always [`Numerics::Reference`].
pub struct ReferenceRunner {
    model: Arc<Model>,
    capacity: Capacity,
    /// One per layer.
    caches: Vec<LayerCache>,
    tensors: Tensors,
}

impl ReferenceRunner {
    /// A runner with an empty cache of `capacity.blocks` pages.
    ///
    /// # Errors
    /// If the slots of the cache cannot be counted.
    pub fn new(model: Arc<Model>, capacity: Capacity) -> Result<Self> {
        let slots = capacity.blocks.checked_mul(PAGE).filter(|slots| u32::try_from(*slots).is_ok());
        let slots = slots.ok_or_else(|| Error::Run(format!("{} blocks are too many", capacity.blocks)))?;
        let caches = model.config.layers.iter().map(|layer| LayerCache::new(layer, slots)).collect();
        Ok(Self { model, capacity, caches, tensors: Tensors::new() })
    }

    /// One decoder layer on the residual stream `x` `[tokens, hidden]`.
    fn layer(&mut self, index: usize, x: Tensor, batch: &Batch, probe: &mut dyn Probe) -> Result<Tensor> {
        let model = Arc::clone(&self.model);
        let (spec, weights) = (&model.config.layers[index], &model.weights.layers[index]);
        let epsilon = model.config.norm_epsilon;
        let (cache, tensors) = (&mut self.caches[index], &mut self.tensors);
        let LayerSpec { mixer, ffn, residual: Residual::Add, .. } = spec;

        let normed = rms_norm(&x, &weights.input_norm, epsilon)?;
        report(probe, index, Point::MixerNorm, &normed)?;
        let mixed = match (mixer, &weights.mixer) {
            (Mixer::Gqa(spec), MixerWeights::Gqa(weights)) => {
                attention::gqa(spec, weights, epsilon, &normed, batch, cache, tensors)?
            }
            (Mixer::Mla(spec), MixerWeights::Mla(weights)) => {
                attention::mla(spec, weights, &normed, batch, cache, tensors)?
            }
            _ => unreachable!("weights are loaded from the description"),
        };
        report(probe, index, Point::MixerOut, &mixed)?;
        let x = (x + mixed)?;

        let normed = rms_norm(&x, &weights.post_norm, epsilon)?;
        report(probe, index, Point::FfnNorm, &normed)?;
        let out = match (ffn, &weights.ffn) {
            (Ffn::Dense(spec), FfnWeights::Dense(weights)) => ffn::mlp(spec, weights, &normed, tensors)?,
            (Ffn::Moe(spec), FfnWeights::Moe(weights)) => {
                let routing = ffn::routing(spec, weights, &normed, tensors)?;
                probe.routing(index, spec.rule.top_k, &routing.ids, &routing.weights);
                ffn::moe(spec, weights, &routing, &normed, tensors)?
            }
            _ => unreachable!("weights are loaded from the description"),
        };
        report(probe, index, Point::FfnOut, &out)?;
        let x = (x + out)?;
        report(probe, index, Point::LayerOut, &x)?;
        Ok(x)
    }

    /// Checks everything that a batch may get wrong, before anything is written.
    fn check(&self, batch: &Batch, logits: &[f32]) -> Result<()> {
        let fail = |message: String| Err(Error::Run(message));
        let (tokens, vocab, blocks) = (batch.tokens.len(), self.model.config.vocab, self.capacity.blocks);
        if tokens > self.capacity.batch_tokens {
            return fail(format!("a batch of {tokens} tokens; the limit is {}", self.capacity.batch_tokens));
        }
        if (batch.positions.len(), batch.slots.len()) != (tokens, tokens) {
            let counts = format!("{} positions and {} slots", batch.positions.len(), batch.slots.len());
            return fail(format!("a batch of {tokens} tokens has {counts}"));
        }
        if let Some(id) = batch.tokens.iter().find(|id| **id as usize >= vocab) {
            return fail(format!("token id {id} is outside the vocabulary of {vocab}"));
        }
        if let Some(slot) = batch.slots.iter().find(|slot| **slot as usize >= blocks * PAGE) {
            return fail(format!("cache slot {slot} is outside the capacity of {blocks} blocks of {PAGE}"));
        }
        if let Some(block) = batch.tables.iter().find(|block| **block as usize >= blocks) {
            return fail(format!("cache block {block} is outside the capacity of {blocks} blocks"));
        }
        let mut next = 0;
        for span in &batch.sequences {
            let end = span.first + span.tokens;
            if span.first != next || span.tokens == 0 || end > tokens {
                return fail(format!(
                    "a sequence of tokens {}..{end} does not follow token {next}",
                    span.first
                ));
            }
            let positions = &batch.positions[span.first..end];
            if positions.windows(2).any(|pair| pair[0].checked_add(1) != Some(pair[1])) {
                return fail(format!("the positions of tokens {}..{end} are not consecutive", span.first));
            }
            let last = positions[span.tokens - 1] as usize;
            if span.table + span.blocks > batch.tables.len() || last / PAGE >= span.blocks {
                return fail(format!("position {last} is outside its block table of {} blocks", span.blocks));
            }
            next = end;
        }
        if next != tokens {
            return fail(format!("sequences cover {next} of {tokens} tokens"));
        }
        let rows = batch.logit_rows.len();
        if rows > self.capacity.logit_rows {
            return fail(format!("{rows} rows of logits; the limit is {}", self.capacity.logit_rows));
        }
        if let Some(row) = batch.logit_rows.iter().find(|row| **row as usize >= tokens) {
            return fail(format!("logits of token {row} are asked for; the batch has {tokens}"));
        }
        if logits.len() != rows * vocab {
            return fail(format!("{rows} rows of {vocab} logits do not fit a slice of {}", logits.len()));
        }
        Ok(())
    }
}

impl Runner for ReferenceRunner {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    fn numerics(&self) -> Numerics {
        Numerics::Reference
    }

    fn forward(&mut self, batch: &Batch, probe: &mut dyn Probe, logits: &mut [f32]) -> Result<()> {
        self.check(batch, logits)?;
        if batch.tokens.is_empty() {
            return Ok(());
        }
        let model = Arc::clone(&self.model);
        let mut x = rows(&model.weights.embedding, &batch.tokens)?;
        report(probe, 0, Point::Embedding, &x)?;
        for index in 0..model.config.layers.len() {
            x = self.layer(index, x, batch, probe)?;
        }
        if batch.logit_rows.is_empty() {
            return Ok(());
        }
        let wanted = Tensor::from_slice(&batch.logit_rows, batch.logit_rows.len(), x.device())?;
        let x = rms_norm(&x.index_select(&wanted, 0)?, &model.weights.final_norm, model.config.norm_epsilon)?;
        report(probe, model.config.layers.len().saturating_sub(1), Point::FinalNorm, &x)?;
        logits.copy_from_slice(&values(&self.tensors.product(&x, &model.weights.head)?)?);
        Ok(())
    }
}

fn report(probe: &mut dyn Probe, layer: usize, point: Point, x: &Tensor) -> Result<()> {
    if probe.wants(layer, point) {
        probe.value(layer, point, &values(x)?);
    }
    Ok(())
}
