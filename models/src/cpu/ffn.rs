//! The feed-forward part of a layer: one MLP, or router, routed experts and shared expert.

use kernels::experts::{
    Dispatch, DispatchLimits, ExpertFfn, GateUp, Routed, SharedExpert, ffn, ffn_scratch_len, run_experts,
};
use kernels::matmul::matmul;
use kernels::route::route_rows;

use super::Step;
use crate::config::{Ffn, Mlp, ModelConfig, Moe};
use crate::runner::{Capacity, Component, Numerics};
use crate::weights::{ExpertWeights, FfnWeights, GateUpWeights, MlpWeights, MoeWeights};

/// Tokens whose expert outputs are held at a time. Bounds the memory of long prompts; enough that
/// a weight read once serves many tokens.
const DISPATCH_TOKENS: usize = 512;

/// Buffers of the feed-forward part, sized for the widest layer.
pub struct FfnScratch {
    /// `[tokens, widest MLP]`.
    inner: Vec<f32>,
    /// `[tokens, hidden]`.
    shared: Vec<f32>,
    /// `[tokens, experts]`.
    logits: Vec<f32>,
    /// `[tokens, top_k]`.
    ids: Vec<u32>,
    /// `[tokens, top_k]`.
    weights: Vec<f32>,
    router: Vec<f32>,
    /// One per distinct shape of routed experts; `by_layer` says which.
    dispatches: Vec<Dispatch>,
    by_layer: Vec<Option<usize>>,
}

/// Lengths of the buffers of [`FfnScratch`].
#[derive(Default)]
struct Sizes {
    inner: usize,
    shared: usize,
    experts: usize,
    top_k: usize,
    router: usize,
    limits: Vec<DispatchLimits>,
    by_layer: Vec<Option<usize>>,
}

impl Sizes {
    fn of(config: &ModelConfig, numerics: Numerics, tokens: usize) -> Self {
        let mut sizes = Self::default();
        for layer in &config.layers {
            let (mlp, moe) = match &layer.ffn {
                Ffn::Dense(mlp) => (Some(mlp), None),
                Ffn::Moe(moe) => (moe.shared.as_ref(), Some(moe)),
            };
            if let Some(mlp) = mlp {
                sizes.inner = sizes.inner.max(ffn_scratch_len(tokens, mlp.gate.rows));
            }
            let limits = moe.map(|moe| {
                sizes.experts = sizes.experts.max(moe.rule.experts);
                sizes.top_k = sizes.top_k.max(moe.rule.top_k);
                sizes.router = sizes.router.max(tokens * moe.rule.scratch_len());
                if moe.shared.is_some() {
                    sizes.shared = tokens * config.hidden;
                }
                DispatchLimits {
                    tokens: tokens.min(DISPATCH_TOKENS),
                    top_k: moe.rule.top_k,
                    experts: moe.rule.experts,
                    hidden: config.hidden,
                    inter: moe.intermediate,
                    precision: numerics.precision(),
                    floats: !config.quantisation.is_some(),
                }
            });
            let index = limits.map(|limits| {
                let known = sizes.limits.iter().position(|other| *other == limits);
                known.unwrap_or_else(|| {
                    sizes.limits.push(limits);
                    sizes.limits.len() - 1
                })
            });
            sizes.by_layer.push(index);
        }
        sizes
    }
}

impl FfnScratch {
    pub fn new(config: &ModelConfig, numerics: Numerics, capacity: &Capacity) -> Self {
        let tokens = capacity.batch_tokens;
        let sizes = Sizes::of(config, numerics, tokens);
        Self {
            inner: vec![0.0; sizes.inner],
            shared: vec![0.0; sizes.shared],
            logits: vec![0.0; tokens * sizes.experts],
            ids: vec![0; tokens * sizes.top_k],
            weights: vec![0.0; tokens * sizes.top_k],
            router: vec![0.0; sizes.router],
            dispatches: sizes.limits.iter().map(|limits| Dispatch::new(*limits)).collect(),
            by_layer: sizes.by_layer,
        }
    }

    /// Bytes of all buffers.
    pub fn bytes(config: &ModelConfig, numerics: Numerics, capacity: &Capacity) -> usize {
        let tokens = capacity.batch_tokens;
        let sizes = Sizes::of(config, numerics, tokens);
        let values = sizes.inner + sizes.shared + tokens * (sizes.experts + 2 * sizes.top_k) + sizes.router;
        4 * values + sizes.limits.iter().map(DispatchLimits::bytes).sum::<usize>()
    }

    /// `out = ffn(x)`, both `[tokens, hidden]`.
    pub fn run(&mut self, step: &mut Step<'_>, x: &[f32], out: &mut [f32]) {
        match (&step.layer.ffn, &step.weights.ffn) {
            (Ffn::Dense(mlp), FfnWeights::Dense(weights)) => {
                step.enter(Component::DenseFfn);
                step.ffn(x, &mlp_view(mlp, weights), &mut self.inner, out);
            }
            (Ffn::Moe(moe), FfnWeights::Moe(weights)) => self.moe(step, (moe, weights), x, out),
            _ => unreachable!("weights are loaded from the same description"),
        }
    }

    fn moe(&mut self, step: &mut Step<'_>, moe: (&Moe, &MoeWeights), x: &[f32], out: &mut [f32]) {
        let (moe, weights) = moe;
        let rule = &moe.rule;
        let tokens = step.batch.tokens.len();
        let logits = &mut self.logits[..tokens * rule.experts];
        let ids = &mut self.ids[..tokens * rule.top_k];
        let chosen = &mut self.weights[..tokens * rule.top_k];
        step.enter(Component::Router);
        matmul(step.isa, x, &weights.router.weight.view(), weights.router.bias.as_deref(), logits);
        let bias = weights.selection_bias.as_deref();
        route_rows(step.isa, rule, logits, bias, &mut self.router, (ids, chosen));
        step.probe.routing(step.index, rule.top_k, ids, chosen);
        step.enter(Component::RoutedExperts);

        let dispatch = self.by_layer[step.index].map(|index| &mut self.dispatches[index]);
        let dispatch = dispatch.expect("a layer with experts has a dispatch");
        let lookup = |id: u32| expert_view(moe, &weights.experts[id as usize]);
        let shared = moe.shared.as_ref().zip(weights.shared.as_ref()).map(|(mlp, weights)| SharedExpert {
            ffn: mlp_view(mlp, weights),
            activations: Some(step.activations),
            inner: &mut self.inner,
            outer: &mut self.shared,
        });
        run_experts(step.isa, Routed { x, ids, weights: chosen }, &lookup, shared, dispatch, out);
    }
}

impl Step<'_> {
    fn ffn(&mut self, x: &[f32], weights: &ExpertFfn<'_>, inner: &mut [f32], out: &mut [f32]) {
        ffn(self.isa, x, weights, Some(self.activations), inner, out);
    }
}

fn mlp_view<'a>(mlp: &Mlp, weights: &'a MlpWeights) -> ExpertFfn<'a> {
    ExpertFfn {
        gate_up: GateUp::Separate { gate: weights.gate.weight.view(), up: weights.up.weight.view() },
        gate_up_bias: None,
        down: weights.down.weight.view(),
        down_transposed: false,
        down_bias: None,
        activation: mlp.activation,
    }
}

fn expert_view<'a>(moe: &Moe, weights: &'a ExpertWeights) -> ExpertFfn<'a> {
    ExpertFfn {
        gate_up: match &weights.gate_up {
            GateUpWeights::Separate { gate, up } => GateUp::Separate { gate: gate.view(), up: up.view() },
            GateUpWeights::Interleaved(w) => GateUp::Interleaved(w.view()),
            GateUpWeights::InterleavedTransposed(w) => GateUp::InterleavedTransposed(w.view()),
        },
        gate_up_bias: weights.gate_up_bias.as_deref(),
        down: weights.down.view(),
        down_transposed: weights.down_transposed,
        down_bias: weights.down_bias.as_deref(),
        activation: moe.activation,
    }
}
