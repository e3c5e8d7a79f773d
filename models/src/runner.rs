//! The seam between what decides (engine) and what computes (runners): a [`Batch`] in, logits out.

use crate::batch::Batch;
use crate::config::ModelConfig;
use crate::error::Result;

/// How exact the arithmetic is (`--numerics`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerics {
    /// f32 throughout, weights dequantised exactly, cache in f32.
    Reference,
    /// The precision the model was published for: cache in bf16. Products still take f32
    /// activations, which is finer than the mode allows.
    Model,
}

impl Numerics {
    /// The name used on the command line and in results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Model => "model",
        }
    }
}

/// How much a runner is made for; fixed at start.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Blocks of [`kernels::attention::PAGE`] tokens in the cache.
    pub blocks: usize,
    /// Most tokens of one batch.
    pub batch_tokens: usize,
    /// Most rows of logits of one batch.
    pub logit_rows: usize,
}

/// Runs a model on one kind of device and owns its cache.
pub trait Runner: Send {
    /// `reference`, `cpu`, ...
    fn name(&self) -> &'static str;

    /// What it runs.
    fn config(&self) -> &ModelConfig;

    /// How exact it computes.
    fn numerics(&self) -> Numerics;

    /// Runs the batch and writes the logits of `batch.logit_rows` to `logits`
    /// `[logit_rows, vocab]`.
    ///
    /// # Errors
    /// If a token id is outside the vocabulary or the batch exceeds the capacity; the cache then
    /// still holds what it held.
    fn forward(&mut self, batch: &Batch, probe: &mut dyn Probe, logits: &mut [f32]) -> Result<()>;
}

/// A value inside a layer that `trace` and `check` look at. All are `[tokens, width]` in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// Embedding rows (reported for layer 0 only).
    Embedding,
    /// After the norm before the mixer.
    MixerNorm,
    /// Output of the mixer, before the residual.
    MixerOut,
    /// After the norm before the feed-forward part.
    FfnNorm,
    /// Output of the feed-forward part, before the residual.
    FfnOut,
    /// The residual stream after the layer.
    LayerOut,
    /// After the last norm (reported for the last layer only; rows of `logit_rows`).
    FinalNorm,
}

impl Point {
    /// A name a reader of `check` finds in the code.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::MixerNorm => "input_norm",
            Self::MixerOut => "attention_out",
            Self::FfnNorm => "post_norm",
            Self::FfnOut => "ffn_out",
            Self::LayerOut => "layer_out",
            Self::FinalNorm => "final_norm",
        }
    }
}

/// A part of a forward pass whose time `bench` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Component {
    /// Embedding rows, layer norms, residuals, rotations, cache writes: all that is none of the others.
    Other,
    /// Products with attention weights, W_UK and W_UV of latent attention included.
    AttentionProjections,
    /// Scores, softmax and values over the cache.
    Attention,
    /// Router logits and the choice of experts.
    Router,
    /// Routed experts, grouping and combine included.
    RoutedExperts,
    /// The shared expert.
    SharedExpert,
    /// The MLP of a layer without experts.
    DenseFfn,
    /// The output head; the norm before it is [`Component::Other`].
    Head,
}

/// Sees inside a forward pass.
pub trait Probe: Send {
    /// Whether [`Probe::value`] wants this point; asked before any work for it.
    fn wants(&self, _layer: usize, _point: Point) -> bool {
        false
    }

    /// A value `[tokens, width]`.
    fn value(&mut self, _layer: usize, _point: Point, _values: &[f32]) {}

    /// What the pass does from here on, until the next call or its end; a pass begins with
    /// [`Component::Other`]. Called some ten times per layer, so it must be cheap.
    fn enter(&mut self, _layer: usize, _component: Component) {}

    /// Routing of a layer with experts: ids `[tokens, top_k]` ascending per token, weights in the
    /// same order.
    fn routing(&mut self, _layer: usize, _top_k: usize, _ids: &[u32], _weights: &[f32]) {}
}

/// Looks at nothing.
pub struct NoProbe;

impl Probe for NoProbe {}
