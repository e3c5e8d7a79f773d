//! The `cpu` runner: our kernels over the mapped bytes, with a paged cache.
//!
//! Everything it needs is allocated when it is made; a forward pass allocates nothing. Work is
//! spread over the rayon pool it is called in, whose threads are held for the whole pass. Latent attention is computed in absorbed form for
//! prompts and decoding alike: one form for every token is what makes a prompt give the same bits
//! whole or in chunks.

mod attention;
mod cache;
mod ffn;
mod scratch;

use std::sync::Arc;

use kernels::matmul::{dequantize_row, matmul_with};
use kernels::norm::rms_norm;
use kernels::quantised::Activations;
use kernels::rope::fill_cos_sin;
use kernels::rows::{Rows, RowsMut, add};
use kernels::simd::Isa;
use kernels::team::hold;

use crate::Model;
use crate::batch::{Batch, BlockKind};
use crate::config::{LayerSpec, Mixer, ModelConfig, Rope};
use crate::error::Result;
use crate::runner::{Capacity, Component, Numerics, Point, Probe, Runner};
use crate::weights::LinearWeights;
use scratch::Scratch;

pub use cache::{KvCache, LayerCache, Store};

/// Runs a model on the host's cores.
pub struct CpuRunner {
    model: Arc<Model>,
    isa: Isa,
    numerics: Numerics,
    capacity: Capacity,
    cache: KvCache,
    rotations: Rotations,
    scratch: Scratch,
}

impl CpuRunner {
    /// Allocates the cache and all buffers for `capacity`, as [`CpuRunner::plan`] says.
    pub fn new(model: Arc<Model>, numerics: Numerics, capacity: Capacity) -> Self {
        Self::with_isa(model, numerics, capacity, Isa::detect())
    }

    /// As [`CpuRunner::new`] with a given instruction set, for tests: see [`Runner::arithmetic`].
    pub fn with_isa(model: Arc<Model>, numerics: Numerics, capacity: Capacity, isa: Isa) -> Self {
        let config = &model.config;
        let cache = KvCache::new(config, numerics, &capacity);
        let rotations = Rotations::new(config, capacity.batch_tokens);
        let scratch = Scratch::new(config, numerics, &capacity);
        Self { isa, numerics, capacity, cache, rotations, scratch, model }
    }

    /// Bytes that [`CpuRunner::new`] would allocate: cache, then everything else.
    pub fn plan(config: &ModelConfig, numerics: Numerics, capacity: &Capacity) -> (usize, usize) {
        (KvCache::bytes(config, numerics, capacity), Scratch::bytes(config, numerics, capacity))
    }
}

impl Runner for CpuRunner {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn arithmetic(&self) -> &'static str {
        match (self.isa, self.numerics) {
            (Isa::Avx512Amx, Numerics::Model | Numerics::Int8Activations) => "cpu with tiles",
            _ => "cpu",
        }
    }

    fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    fn numerics(&self) -> Numerics {
        self.numerics
    }

    fn forward(&mut self, batch: &Batch, probe: &mut dyn Probe, logits: &mut [f32]) -> Result<()> {
        batch.check(&self.capacity, self.model.config.vocab, logits.len())?;
        hold(|| self.step(batch, probe, logits));
        Ok(())
    }

    fn block_bytes(&self, kind: BlockKind) -> usize {
        KvCache::block_bytes(&self.model.config, self.numerics, &self.capacity, kind)
    }

    fn read_block(&self, kind: BlockKind, block: u32, out: &mut [u8]) {
        self.cache.read_block(kind, block, out);
    }

    fn write_block(&mut self, kind: BlockKind, block: u32, bytes: &[u8]) {
        self.cache.write_block(kind, block, bytes);
    }

    fn copy_block(&mut self, kind: BlockKind, from: u32, to: u32) {
        self.cache.copy_block(kind, from, to);
    }
}

impl CpuRunner {
    /// [`Runner::forward`] of a batch that was checked.
    fn step(&mut self, batch: &Batch, probe: &mut dyn Probe, logits: &mut [f32]) {
        let Self { model, isa, cache, rotations, scratch, .. } = self;
        let (config, weights, isa) = (&model.config, &model.weights, *isa);
        let (tokens, hidden) = (batch.tokens.len(), config.hidden);
        if tokens == 0 {
            return;
        }
        rotations.fill(&batch.positions);
        let Scratch { stream, normed, output, attention, ffn, last, activations } = scratch;
        let stream = &mut stream[..tokens * hidden];
        let normed = &mut normed[..tokens * hidden];
        let output = &mut output[..tokens * hidden];

        let embedding = weights.embedding.view();
        for (row, &id) in stream.chunks_exact_mut(hidden).zip(&batch.tokens) {
            dequantize_row(isa, &embedding, id as usize, row);
        }
        report(probe, 0, Point::Embedding, stream);

        for (index, (layer, layer_weights)) in config.layers.iter().zip(&weights.layers).enumerate() {
            let angles = rotations.of(index);
            let (weights, activations) = (layer_weights, &mut *activations);
            let step = &mut Step { isa, config, layer, weights, batch, index, angles, activations, probe };
            rms_norm(isa, stream, Some(&weights.input_norm), config.norm_epsilon, hidden, normed);
            report(step.probe, index, Point::MixerNorm, normed);
            attention.run(step, cache.layer_mut(index), normed, output);
            step.enter(Component::Other);
            report(step.probe, index, Point::MixerOut, output);
            add(stream, output);

            rms_norm(isa, stream, Some(&weights.post_norm), config.norm_epsilon, hidden, normed);
            report(step.probe, index, Point::FfnNorm, normed);
            ffn.run(step, normed, output);
            step.enter(Component::Other);
            report(step.probe, index, Point::FfnOut, output);
            add(stream, output);
            report(step.probe, index, Point::LayerOut, stream);
        }

        if batch.logit_rows.is_empty() {
            return;
        }
        let last = &mut last[..batch.logit_rows.len() * hidden];
        for (row, &token) in last.chunks_exact_mut(hidden).zip(&batch.logit_rows) {
            row.copy_from_slice(&stream[token as usize * hidden..][..hidden]);
        }
        let normed = &mut normed[..last.len().min(tokens * hidden)];
        rms_norm(isa, last, Some(&weights.final_norm), config.norm_epsilon, hidden, normed);
        report(probe, config.layers.len() - 1, Point::FinalNorm, normed);
        probe.enter(config.layers.len() - 1, Component::Head);
        let (x, out) = (Rows::new(normed, hidden), RowsMut::new(logits, config.vocab));
        matmul_with(isa, Some(activations), x, &weights.head.view(), None, out);
    }
}

fn report(probe: &mut dyn Probe, layer: usize, point: Point, values: &[f32]) {
    if probe.wants(layer, point) {
        probe.value(layer, point, values);
    }
}

/// What every part of one layer's pass needs.
struct Step<'a> {
    isa: Isa,
    config: &'a ModelConfig,
    layer: &'a LayerSpec,
    weights: &'a crate::weights::LayerWeights,
    batch: &'a Batch,
    index: usize,
    angles: Option<Angles<'a>>,
    /// Room for packed rows.
    activations: &'a mut Activations,
    probe: &'a mut dyn Probe,
}

impl Step<'_> {
    fn enter(&mut self, component: Component) {
        self.probe.enter(self.index, component);
    }

    /// `out` = the linear map of x: `[tokens, in]` to `[tokens, out]`.
    fn linear(&mut self, x: &[f32], weights: &LinearWeights, out: &mut [f32]) {
        let w = weights.weight.view();
        let (x, out) = (Rows::new(x, w.cols), RowsMut::new(out, w.rows));
        matmul_with(self.isa, Some(self.activations), x, &w, weights.bias.as_deref(), out);
    }
}

/// Cosines and sines of one step's positions, once for every distinct rotation of the model.
struct Rotations {
    ropes: Vec<Rope>,
    /// Which of `ropes` a layer uses.
    by_layer: Vec<Option<usize>>,
    /// Per rope `[tokens, dim / 2]`.
    cos: Vec<Vec<f32>>,
    sin: Vec<Vec<f32>>,
}

/// The rotation of one layer, ready to apply.
#[derive(Clone, Copy)]
struct Angles<'a> {
    rope: &'a Rope,
    /// `[tokens, dim / 2]`.
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Rotations {
    fn new(config: &ModelConfig, batch_tokens: usize) -> Self {
        let mut ropes: Vec<Rope> = Vec::new();
        let by_layer = config
            .layers
            .iter()
            .map(|layer| {
                let rope = match &layer.mixer {
                    Mixer::Gqa(gqa) => gqa.rope.as_ref(),
                    Mixer::Mla(mla) => mla.rope.as_ref(),
                }?;
                let known = ropes.iter().position(|other| other == rope);
                Some(known.unwrap_or_else(|| {
                    ropes.push(rope.clone());
                    ropes.len() - 1
                }))
            })
            .collect();
        let table = |rope: &Rope| vec![0.0; batch_tokens * rope.dim / 2];
        let (cos, sin) = (ropes.iter().map(table).collect(), ropes.iter().map(table).collect());
        Self { ropes, by_layer, cos, sin }
    }

    fn fill(&mut self, positions: &[u32]) {
        for (rope, (cos, sin)) in self.ropes.iter().zip(self.cos.iter_mut().zip(&mut self.sin)) {
            let half = rope.dim / 2;
            let rows = cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half));
            for (&position, (cos, sin)) in positions.iter().zip(rows) {
                fill_cos_sin(position, &rope.inv_freq, rope.attention_scale, cos, sin);
            }
        }
    }

    fn of(&self, layer: usize) -> Option<Angles<'_>> {
        let index = self.by_layer[layer]?;
        Some(Angles { rope: &self.ropes[index], cos: &self.cos[index], sin: &self.sin[index] })
    }
}

impl Angles<'_> {
    /// Rotates one head vector of token `token`.
    fn rotate(&self, token: usize, head: &mut [f32]) {
        let half = self.rope.dim / 2;
        let row = token * half..(token + 1) * half;
        kernels::rope::rotate(head, &self.cos[row.clone()], &self.sin[row], self.rope.rotation);
    }
}
