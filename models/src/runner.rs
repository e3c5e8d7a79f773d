//! The seam between what decides (engine) and what computes (runners): a [`Batch`] in, logits out.

use kernels::attention::CacheType;
use kernels::quantised::Precision;

use crate::batch::{Batch, BlockKind};
use crate::config::ModelConfig;
use crate::error::Result;

/// How exact the arithmetic is (`--numerics`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerics {
    /// f32 throughout, weights dequantised exactly, cache in f32.
    Reference,
    /// At least the precision the model was published for: cache in bf16; activations in 16-bit whole numbers
    /// with a scale per 32 values where weights have 4 or 8 bits ([`kernels::quantised`]: finer than bf16); as two
    /// bf16 (16 bits) where dense weights are bf16 and the processor has AMX; in f32 elsewhere.
    Model,
    /// Coarser, asked for by name (`--activations int8`): as `Model`, with 8 bits instead of 16, and one bf16.
    Int8Activations,
}

impl Numerics {
    /// The name used on the command line and in results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Model => "model",
            Self::Int8Activations => "model+int8-activations",
        }
    }

    /// How cached values are stored unless asked otherwise.
    pub fn cache_type(self) -> CacheType {
        match self {
            Self::Reference => CacheType::F32,
            Self::Model | Self::Int8Activations => CacheType::Bf16,
        }
    }

    /// Bits of activations that meet weights of 4 or 8 bits; none if those are dequantised.
    pub fn precision(self) -> Option<Precision> {
        match self {
            Self::Reference => None,
            Self::Model => Some(Precision::Int16),
            Self::Int8Activations => Some(Precision::Int8),
        }
    }
}

/// How much a runner is made for; fixed at start.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Blocks of [`PAGE_TOKENS`](crate::batch::PAGE_TOKENS) tokens in the cache, of layers that see everything.
    pub blocks: usize,
    /// The same of layers with a window; nothing where the model has none.
    pub window_blocks: usize,
    /// How cached values are stored; `None` = as the numerics say.
    pub cache_type: Option<CacheType>,
    /// Most tokens of one batch.
    pub batch_tokens: usize,
    /// Most rows of logits of one batch.
    pub logit_rows: usize,
}

impl Capacity {
    /// The same blocks for layers with and without windows.
    pub const fn new(blocks: usize, batch_tokens: usize, logit_rows: usize) -> Self {
        Self { blocks, window_blocks: blocks, cache_type: None, batch_tokens, logit_rows }
    }

    /// Blocks of a kind.
    pub fn blocks_of(&self, kind: BlockKind) -> usize {
        match kind {
            BlockKind::Full => self.blocks,
            BlockKind::Window => self.window_blocks,
        }
    }
}

/// Runs a model on one kind of device and owns its cache.
pub trait Runner: Send {
    /// `reference`, `cpu`, ...
    fn name(&self) -> &'static str;

    /// What the bits of its results depend on besides model, numerics and batch: two runners that agree in this give the
    /// same.
    fn arithmetic(&self) -> &'static str {
        self.name()
    }

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

    /// Bytes of a block of all layers of a kind, as [`Runner::read_block`] gives them.
    fn block_bytes(&self, kind: BlockKind) -> usize;

    /// Copies a block of all layers of a kind to `out`, [`Runner::block_bytes`] long, in a form that only
    /// the same runner of the same model, numerics and cache type understands.
    ///
    /// # Panics
    /// If there is no such block.
    fn read_block(&self, kind: BlockKind, block: u32, out: &mut [u8]);

    /// Puts back what [`Runner::read_block`] gave, into any block.
    ///
    /// # Panics
    /// If there is no such block.
    fn write_block(&mut self, kind: BlockKind, block: u32, bytes: &[u8]);

    /// Makes block `to` a copy of `from`.
    ///
    /// # Panics
    /// If there is no such block.
    fn copy_block(&mut self, kind: BlockKind, from: u32, to: u32);
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
