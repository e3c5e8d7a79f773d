//! How large everything is.

use kernels::attention::Mla;
use kernels::cuda::max_units;
use kernels::route::{Normalise, RouterRule, Score};

/// Columns that share a scale.
pub(super) const GROUP: usize = kernels::format::GROUP;

/// Widths of a layer of routed experts.
#[derive(Clone, Copy, Debug)]
pub(super) struct MoeShape {
    pub hidden: usize,
    pub inter: usize,
    pub experts: usize,
    pub top_k: usize,
}

impl MoeShape {
    /// Bytes of one expert in INT4.
    pub fn expert_bytes(&self) -> usize {
        3 * self.hidden * self.inter / 2 + 3 * self.hidden * self.inter / GROUP * 2
    }

    /// Operations of so many tokens.
    pub fn operations(&self, tokens: usize) -> u64 {
        6 * (tokens * self.top_k * self.hidden * self.inter) as u64
    }

    /// Bytes of what so many tokens read and write beside weights: planes in, planes between, f32 out.
    pub fn activation_bytes(&self, tokens: usize) -> u64 {
        let pair = 2 * self.hidden + 6 * self.inter + 4 * self.hidden;
        (tokens * (2 * 2 * self.hidden + self.top_k * pair)) as u64
    }

    /// The most units of any list.
    pub fn units(&self, tokens: usize, size: usize) -> usize {
        max_units(tokens * self.top_k, self.experts, size)
    }

    /// As K2 routes.
    pub fn rule(&self) -> RouterRule {
        RouterRule {
            experts: self.experts,
            top_k: self.top_k,
            score: Score::Sigmoid,
            groups: None,
            normalise: Some(Normalise::Epsilon(1e-20)),
            scale: 2.827,
        }
    }
}

/// Widths of a layer of latent attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct LatentShape {
    pub heads: usize,
    pub latent: usize,
    pub rope: usize,
    /// Of a head's query and key without the rotated part, before it is absorbed.
    pub nope: usize,
    /// Of a head's value.
    pub value: usize,
    pub query_rank: usize,
}

impl LatentShape {
    /// Of a query and of a cached row.
    pub fn width(&self) -> usize {
        self.latent + self.rope
    }

    /// With a scale such that few positions get most of the weight, of values between -1 and 1: a sum over the wrong
    /// ones is then far off.
    pub fn sharp(&self) -> Mla {
        Mla {
            heads: self.heads,
            latent: self.latent,
            rope: self.rope,
            scale: 12.0 / (self.width() as f32).sqrt(),
        }
    }
}

/// What is checked and timed, and how large it is.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Repetitions of what is timed.
    pub(super) runs: usize,
    /// Bytes of each side of a copy.
    pub(super) copy_bytes: usize,
    /// Turns of the loop that shows the arithmetic peak.
    pub(super) multiply_rounds: u32,
    /// Smaller shapes first.
    pub(super) checked: Vec<Checked>,
    pub(super) timed: Timed,
}

/// Shapes and numbers of tokens of a check.
#[derive(Clone, Debug)]
pub(super) struct Checked {
    pub name: &'static str,
    pub moe: MoeShape,
    pub expert_tokens: Vec<usize>,
    pub latent: LatentShape,
    pub contexts: Vec<usize>,
    pub vocab: usize,
    pub dense_tokens: Vec<usize>,
}

/// The same of what is timed; in every list what is wanted most comes first, for time may run out.
#[derive(Clone, Debug)]
pub(super) struct Timed {
    pub moe: MoeShape,
    /// Layers that take turns, if there is memory for them.
    pub layers: usize,
    pub batches: Vec<usize>,
    pub latent: LatentShape,
    pub contexts: Vec<usize>,
    pub sequences: Vec<usize>,
    pub vocab: usize,
    pub dense_tokens: Vec<usize>,
    /// Of the decode layer.
    pub layer_context: usize,
    pub layer_batches: Vec<usize>,
    /// Memory that turns go through, so that no cache holds it.
    pub turn_bytes: usize,
    /// The most turns of a graph.
    pub turns: usize,
}

const K2_MOE: MoeShape = MoeShape { hidden: 7168, inter: 2048, experts: 384, top_k: 8 };
const K2_LATENT: LatentShape =
    LatentShape { heads: 64, latent: 512, rope: 64, nope: 128, value: 128, query_rank: 1536 };
const K2_VOCAB: usize = 163_840;
const SMALL_MOE: MoeShape = MoeShape { hidden: 256, inter: 128, experts: 16, top_k: 4 };
const SMALL_LATENT: LatentShape =
    LatentShape { heads: 16, latent: 128, rope: 32, nope: 32, value: 32, query_rank: 64 };

impl Sizes {
    /// A layer of Kimi K2 with all there is to measure; `quick` leaves out most batch sizes.
    pub fn k2(quick: bool) -> Self {
        let few = |all: &[usize], quickly: &[usize]| if quick { quickly.to_vec() } else { all.to_vec() };
        let small = Checked {
            name: "small",
            moe: SMALL_MOE,
            expert_tokens: vec![1, 3, 40, 300],
            latent: SMALL_LATENT,
            contexts: vec![1, 70, 1000],
            vocab: 1000,
            dense_tokens: vec![1, 5, 33, 130],
        };
        let k2 = Checked {
            name: "k2",
            moe: K2_MOE,
            expert_tokens: few(&[1, 4, 16, 64, 512, 2048, 8192], &[1, 64]),
            latent: K2_LATENT,
            contexts: few(&[4096, 131_072], &[4096]),
            vocab: K2_VOCAB,
            dense_tokens: few(&[1, 16, 64, 512], &[16]),
        };
        let timed = Timed {
            moe: K2_MOE,
            layers: if quick { 1 } else { 2 },
            batches: few(&[1, 16, 64, 512, 2048, 8192, 1024, 2, 4, 8, 32, 128, 256], &[1, 16, 512]),
            latent: K2_LATENT,
            contexts: few(&[131_072, 262_144, 4096, 32_768], &[131_072]),
            sequences: few(&[1, 4], &[1]),
            vocab: K2_VOCAB,
            dense_tokens: few(&[1, 16, 64, 512], &[1, 64]),
            layer_context: 4096,
            layer_batches: few(&[1, 16], &[1]),
            turn_bytes: 512 << 20,
            turns: 8,
        };
        Self {
            runs: 20,
            copy_bytes: if quick { 1 << 30 } else { 4 << 30 },
            multiply_rounds: 20_000,
            checked: vec![small, k2],
            timed,
        }
    }

    /// For an emulated device: everything runs, and times mean nothing.
    pub fn tiny() -> Self {
        let checked = Checked {
            name: "tiny",
            moe: MoeShape { hidden: 64, inter: 32, experts: 6, top_k: 2 },
            expert_tokens: vec![1, 9],
            latent: LatentShape { heads: 4, latent: 32, rope: 8, nope: 16, value: 16, query_rank: 24 },
            contexts: vec![3, 150],
            vocab: 72,
            dense_tokens: vec![1, 5],
        };
        let timed = Timed {
            moe: checked.moe,
            layers: 2,
            batches: vec![1, 5],
            latent: checked.latent,
            contexts: vec![130],
            sequences: vec![2],
            vocab: 72,
            dense_tokens: vec![3],
            layer_context: 70,
            layer_batches: vec![2],
            turn_bytes: 1 << 14,
            turns: 2,
        };
        Self { runs: 3, copy_bytes: 1 << 14, multiply_rounds: 1, checked: vec![checked], timed }
    }
}
