//! The description that an architecture file makes of a checkpoint, and that every runner executes.
//!
//! A model is declared, not coded: `arch/<family>.rs` turns `config.json` into a [`ModelConfig`],
//! and one decoder runs them all. Mixers and feed-forward kinds are closed enums, so a new kind of
//! block is one variant and the compiler lists what it touches. Room is kept for layers with a
//! recurrent state (a [`Mixer`] variant with a fixed [`CacheRows`]-free state), sparse-attention
//! indexers (an option on [`Mla`]), latent experts (an option on [`Moe`]) and other residual
//! schemes ([`Residual`]).
//!
//! Shapes are `[out, in]`. Tensor names are as published, prefix included.

use kernels::attention::{CacheType, RowShape};
use kernels::experts::Activation;
use kernels::rope::Rotation;
use kernels::route::RouterRule;

use crate::batch::BlockKind;
use crate::quant::Quantisation;

/// A whole decoder-only model.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// `model_type` of the text model, as published.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding and of the output head.
    pub vocab: usize,
    /// Longest context the maker declares, in tokens.
    pub max_positions: usize,
    /// Name of the token embedding `[vocab, hidden]`.
    pub embedding: String,
    /// Name of the last norm `[hidden]`.
    pub final_norm: String,
    /// Name of the output head `[vocab, hidden]`; `None` = the embedding is used (tied).
    pub head: Option<String>,
    /// Epsilon of the layer norms and the last norm.
    pub norm_epsilon: f32,
    /// Decoder layers in order.
    pub layers: Vec<LayerSpec>,
    /// Tensors that may be present and are not read.
    pub skip: Vec<SkipRule>,
    /// Which weights are stored quantised, and how.
    pub quantisation: Quantisation,
}

/// Tensors that a rule allows to be present unread, with the reason `inspect` prints.
#[derive(Clone, Debug)]
pub struct SkipRule {
    /// A tensor is skipped if its name starts with this (empty = any start) ...
    pub prefix: String,
    /// ... and ends with this (empty = any end).
    pub suffix: String,
    /// Why, e.g. `vision tower`.
    pub reason: &'static str,
}

/// One decoder layer: norm, mixer, residual; norm, feed-forward, residual.
#[derive(Clone, Debug)]
pub struct LayerSpec {
    /// Name of the norm before the mixer.
    pub input_norm: String,
    /// Name of the norm before the feed-forward part.
    pub post_norm: String,
    /// What mixes tokens.
    pub mixer: Mixer,
    /// What follows.
    pub ffn: Ffn,
    /// How both are added to the stream.
    pub residual: Residual,
}

/// How a sublayer's output joins the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// `x + f(norm(x))`.
    Add,
}

/// A linear map `y = x W^T (+ b)`; its stored form follows from the checkpoint's quantisation.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Name without `.weight`.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Whether `<name>.bias` `[rows]` belongs to it.
    pub bias: bool,
}

/// What mixes information between positions.
#[derive(Clone, Debug)]
pub enum Mixer {
    /// Grouped-query attention.
    Gqa(Gqa),
    /// Multi-head latent attention.
    Mla(Mla),
}

/// Rotary embedding of one kind of layer; frequencies are final (scaling applied).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Rotated values per head, the first ones of the head (GQA) or the whole rope part (MLA).
    pub dim: usize,
    /// Which values form a pair.
    pub rotation: Rotation,
    /// `dim / 2` inverse frequencies.
    pub inv_freq: Vec<f32>,
    /// Multiplies cos and sin (YaRN's concentration; 1 for most models).
    pub attention_scale: f32,
}

/// RMS norm of queries and keys.
#[derive(Clone, Debug)]
pub enum QkNorm {
    /// None.
    None,
    /// Per head, weight `[head_dim]`, before the rotation.
    PerHead {
        /// Weight of the query norm.
        q: String,
        /// Weight of the key norm.
        k: String,
    },
    /// Per head, weight `[head_dim]`, after the rotation.
    PerHeadAfterRope {
        /// Weight of the query norm.
        q: String,
        /// Weight of the key norm.
        k: String,
    },
    /// Over the whole projection, weight `[heads * head_dim]`, before the rotation.
    Whole {
        /// Weight of the query norm.
        q: String,
        /// Weight of the key norm.
        k: String,
    },
}

/// Grouped-query attention.
#[derive(Clone, Debug)]
pub struct Gqa {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// `[heads * head_dim, hidden]`.
    pub q: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub k: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub v: Linear,
    /// `[hidden, heads * head_dim]`.
    pub o: Linear,
    /// Norm of q and k, with the layer's epsilon.
    pub qk_norm: QkNorm,
    /// Rotation; `None` = no positions.
    pub rope: Option<Rope>,
    /// A query at i sees keys j with `i - window < j <= i`; `None` = all.
    pub window: Option<usize>,
    /// Per-head logits `[heads]` that join the softmax denominator without a value.
    pub sinks: Option<String>,
    /// Multiplies scores.
    pub scale: f32,
}

impl Gqa {
    /// The blocks that hold its keys and values.
    pub fn block_kind(&self) -> BlockKind {
        if self.window.is_some() { BlockKind::Window } else { BlockKind::Full }
    }
}

/// The query side of latent attention.
#[derive(Clone, Debug)]
pub enum MlaQuery {
    /// One projection `[heads * (nope + rope), hidden]`.
    Direct(Linear),
    /// `b(norm(a(x)))` through a low rank.
    LowRank {
        /// `[rank, hidden]`.
        a: Linear,
        /// Norm of the low rank `[rank]`.
        norm: String,
        /// `[heads * (nope + rope), rank]`.
        b: Linear,
    },
}

/// Multi-head latent attention (`models-maths.md` section 1).
#[derive(Clone, Debug)]
pub struct Mla {
    /// Heads.
    pub heads: usize,
    /// Unrotated query/key width per head.
    pub nope_dim: usize,
    /// Rotated width, shared by all heads on the key side.
    pub rope_dim: usize,
    /// Value width per head.
    pub value_dim: usize,
    /// Width of the cached latent.
    pub kv_rank: usize,
    /// Query projection; each head is `[nope | rope]`.
    pub query: MlaQuery,
    /// `[kv_rank + rope_dim, hidden]`.
    pub kv_a: Linear,
    /// Norm of the latent `[kv_rank]`.
    pub kv_norm: String,
    /// `[heads * (nope_dim + value_dim), kv_rank]`; per head rows `[W_UK | W_UV]`.
    pub kv_b: Linear,
    /// `[hidden, heads * value_dim]`.
    pub o: Linear,
    /// Epsilon of the query and latent norms (not the layer's).
    pub latent_epsilon: f32,
    /// Rotation of the rope parts; `None` = no positions.
    pub rope: Option<Rope>,
    /// Multiplies scores, YaRN's mscale squared included.
    pub scale: f32,
}

/// The feed-forward part of a layer.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one per layer")]
pub enum Ffn {
    /// One gated MLP.
    Dense(Mlp),
    /// Routed experts.
    Moe(Moe),
}

/// `down(activation(gate(x), up(x)))`.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[inter, hidden]`.
    pub gate: Linear,
    /// `[inter, hidden]`.
    pub up: Linear,
    /// `[hidden, inter]`.
    pub down: Linear,
    /// Nonlinearity.
    pub activation: Activation,
}

/// Routed experts with an optional shared expert.
#[derive(Clone, Debug)]
pub struct Moe {
    /// `[experts, hidden]`; never quantised; logits in f32.
    pub router: Linear,
    /// Name of the selection bias `[experts]`.
    pub selection_bias: Option<String>,
    /// Scores, groups, top-k, normalisation, scale.
    pub rule: RouterRule,
    /// Width of an expert.
    pub intermediate: usize,
    /// Where the experts are.
    pub experts: Experts,
    /// Nonlinearity of the routed experts.
    pub activation: Activation,
    /// Added unscaled for every token.
    pub shared: Option<Mlp>,
}

/// How the tensors of routed experts are laid out. Published files of one family come in more than
/// one form, so the loader settles [`Experts::PerExpert`] against what the files hold.
#[derive(Clone, Debug)]
pub enum Experts {
    /// `<prefix>.<e>.<gate|up|down>`, each a linear of its own; where the files hold
    /// `<prefix>.gate_up_proj` `[E, 2I, H]` and `<prefix>.down_proj` `[E, H, I]` instead, those.
    PerExpert {
        /// Before the expert's number.
        prefix: String,
        /// Name of the gate projection.
        gate: &'static str,
        /// Name of the up projection.
        up: &'static str,
        /// Name of the down projection.
        down: &'static str,
    },
    /// gpt-oss: `<prefix>.gate_up_proj*` and `<prefix>.down_proj*` with biases; gate and up
    /// interleaved on the output axis; MXFP4 `[E, out, in/32, 16]` or plain `[E, in, out]`.
    GptOss {
        /// Before the names.
        prefix: String,
    },
}

impl LayerSpec {
    /// Widths of the rows this layer caches for one token: one entry per paged cache.
    pub fn cache_rows(&self) -> CacheRows {
        match &self.mixer {
            Mixer::Gqa(g) => {
                let row = RowShape { heads: g.kv_heads, width: g.head_dim, plain: 0 };
                CacheRows { shapes: [row; 2], count: 2 }
            }
            Mixer::Mla(m) => {
                let row = RowShape { heads: 1, width: m.kv_rank, plain: m.rope_dim };
                CacheRows { shapes: [row; 2], count: 1 }
            }
        }
    }

    /// The blocks that hold these rows.
    pub fn block_kind(&self) -> BlockKind {
        match &self.mixer {
            Mixer::Gqa(gqa) => gqa.block_kind(),
            Mixer::Mla(_) => BlockKind::Full,
        }
    }
}

/// What a layer caches per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheRows {
    shapes: [RowShape; 2],
    count: usize,
}

impl CacheRows {
    /// A token's row in each cache: `[latent | k_pe]` for MLA; keys, then values for GQA.
    pub fn shapes(&self) -> &[RowShape] {
        &self.shapes[..self.count]
    }

    /// Values per token of all caches together.
    pub fn total(&self) -> usize {
        self.shapes().iter().map(RowShape::values).sum()
    }

    /// Bytes per token of all caches together.
    pub fn bytes(&self, cache_type: CacheType) -> usize {
        self.shapes().iter().map(|shape| cache_type.row_bytes(*shape)).sum()
    }
}

impl ModelConfig {
    /// Cached values per token over all layers.
    pub fn cache_values_per_token(&self) -> usize {
        self.layers.iter().map(|layer| layer.cache_rows().total()).sum()
    }

    /// Bytes that the layers whose blocks are of a kind cache per token.
    pub fn cache_bytes_per_token(&self, kind: BlockKind, cache_type: CacheType) -> usize {
        let layers = self.layers.iter().filter(|layer| layer.block_kind() == kind);
        layers.map(|layer| layer.cache_rows().bytes(cache_type)).sum()
    }

    /// The widest window of layers that have one: behind it, their cache is read by none.
    pub fn window(&self) -> Option<usize> {
        let windows = self.layers.iter().map(|layer| match &layer.mixer {
            Mixer::Gqa(gqa) => gqa.window,
            Mixer::Mla(_) => None,
        });
        windows.flatten().max()
    }
}
