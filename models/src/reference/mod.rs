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
use kernels::attention::{CacheType, PAGE};

use crate::Model;
use crate::batch::{Batch, BlockKind};
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
        let most = capacity.blocks.max(capacity.window_blocks);
        if most.checked_mul(PAGE).is_none_or(|slots| u32::try_from(slots).is_err()) {
            return Err(Error::Run(format!("{most} blocks are too many")));
        }
        if let Some(cache_type) = capacity.cache_type.filter(|cache_type| *cache_type != CacheType::F32) {
            let message = format!("the reference runner caches f32, not {cache_type:?}");
            return Err(Error::Run(message));
        }
        let cache = |layer: &LayerSpec| LayerCache::new(layer, capacity.blocks_of(layer.block_kind()) * PAGE);
        let caches = model.config.layers.iter().map(cache).collect();
        Ok(Self { model, capacity, caches, tensors: Tensors::new() })
    }

    /// The caches of a kind.
    fn caches_of(&self, kind: BlockKind) -> impl Iterator<Item = &LayerCache> {
        let layers = self.model.config.layers.iter().zip(&self.caches);
        layers.filter(move |(layer, _)| layer.block_kind() == kind).map(|(_, cache)| cache)
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
        batch.check(&self.capacity, self.model.config.vocab, logits.len())?;
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

    fn block_bytes(&self, kind: BlockKind) -> usize {
        self.model.config.cache_bytes_per_token(kind, CacheType::F32) * PAGE
    }

    fn read_block(&self, kind: BlockKind, block: u32, out: &mut [u8]) {
        assert_eq!(out.len(), self.block_bytes(kind), "bytes of a block");
        let values = self.caches_of(kind).flat_map(|cache| cache.block(block));
        for (out, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
            *out = value.to_le_bytes();
        }
    }

    fn write_block(&mut self, kind: BlockKind, block: u32, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.block_bytes(kind), "bytes of a block");
        let mut values = bytes.as_chunks().0.iter();
        for (layer, cache) in self.model.config.layers.iter().zip(&mut self.caches) {
            if layer.block_kind() == kind {
                cache
                    .block_mut(block)
                    .zip(&mut values)
                    .for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
            }
        }
    }

    fn copy_block(&mut self, kind: BlockKind, from: u32, to: u32) {
        let mut bytes = vec![0; self.block_bytes(kind)];
        self.read_block(kind, from, &mut bytes);
        self.write_block(kind, to, &bytes);
    }
}

fn report(probe: &mut dyn Probe, layer: usize, point: Point, x: &Tensor) -> Result<()> {
    if probe.wants(layer, point) {
        probe.value(layer, point, &values(x)?);
    }
    Ok(())
}
