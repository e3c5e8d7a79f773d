//! What a forward pass must do at least, by component: every weight it needs and every cached row it sees, read
//! once, and the multiply-adds of its products. Activations are left out: they stay in caches.

use kernels::attention::PAGE;
use kernels::format::{FP8_BLOCK, GROUP};
use kernels::{Matrix, Values};
use models::config::{Ffn, LayerSpec, Mixer, ModelConfig};
use models::weights::{
    ExpertWeights, FfnWeights, GateUpWeights, LinearWeights, MixerWeights, MlaQueryWeights, MlpWeights,
    Weight,
};
use models::{Batch, Component, Model, Numerics};

use crate::ceilings::Work;

/// Components and their names in results.
pub const COMPONENTS: [(Component, &str); 8] = [
    (Component::AttentionProjections, "attention_projections"),
    (Component::Attention, "attention"),
    (Component::Router, "router"),
    (Component::RoutedExperts, "routed_experts"),
    (Component::SharedExpert, "shared_expert"),
    (Component::DenseFfn, "dense_ffn"),
    (Component::Head, "head"),
    (Component::Other, "other"),
];

/// Work by component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost([Work; COMPONENTS.len()]);

impl Cost {
    /// Of one component.
    pub fn of(&self, component: Component) -> Work {
        self.0[component as usize]
    }

    /// Of all.
    pub fn total(&self) -> Work {
        let mut total = Work::NONE;
        self.0.iter().for_each(|work| total += *work);
        total
    }

    /// Counts the work of `from` to `into`: where both are done in one go.
    pub fn join(&mut self, from: Component, into: Component) {
        let work = std::mem::replace(&mut self.0[from as usize], Work::NONE);
        self.0[into as usize] += work;
    }

    fn add(&mut self, component: Component, bytes: usize, operations: usize) {
        self.0[component as usize] += Work { bytes: bytes as u64, operations: operations as u64 };
    }
}

/// Bytes of the stored values of a matrix, scales included.
pub fn stored_bytes(w: &Matrix<'_>) -> usize {
    let count = w.rows * w.cols;
    match w.values {
        Values::F32(_) => 4 * count,
        Values::F16(_) | Values::Bf16(_) => 2 * count,
        Values::Fp8 { .. } => count + 4 * w.rows.div_ceil(FP8_BLOCK) * w.cols.div_ceil(FP8_BLOCK),
        Values::Int4 { .. } => count / 2 + 2 * count / GROUP,
        Values::Mxfp4 { .. } => count / 2 + count / GROUP,
        Values::Q8 { .. } => count + 2 * count / GROUP,
    }
}

/// Bytes of a weight and multiply-adds of one row with it.
fn weight(w: &Weight) -> (usize, usize) {
    let w = w.view();
    (stored_bytes(&w), w.rows * w.cols)
}

fn linear(w: &LinearWeights) -> (usize, usize) {
    let (bytes, products) = weight(&w.weight);
    (bytes + 4 * w.bias.as_ref().map_or(0, Vec::len), products)
}

fn sum<const N: usize>(parts: [(usize, usize); N]) -> (usize, usize) {
    parts.into_iter().fold((0, 0), |sum, part| (sum.0 + part.0, sum.1 + part.1))
}

fn mlp(w: &MlpWeights) -> (usize, usize) {
    sum([linear(&w.gate), linear(&w.up), linear(&w.down)])
}

fn expert(w: &ExpertWeights) -> (usize, usize) {
    let gate_up = match &w.gate_up {
        GateUpWeights::Separate { gate, up } => sum([weight(gate), weight(up)]),
        GateUpWeights::Interleaved(w) | GateUpWeights::InterleavedTransposed(w) => weight(w),
    };
    let biases = [&w.gate_up_bias, &w.down_bias].into_iter().flatten().map(Vec::len).sum::<usize>();
    sum([gate_up, weight(&w.down), (4 * biases, 0)])
}

/// The cost of `batch`; `experts` is the number of distinct experts that each layer used.
pub fn cost(model: &Model, numerics: Numerics, batch: &Batch, experts: &[usize]) -> Cost {
    let config = &model.config;
    let (tokens, rows) = (batch.tokens.len(), batch.logit_rows.len());
    let value_bytes = match numerics {
        Numerics::Reference => 4,
        Numerics::Model | Numerics::Int8Activations => 2,
    };
    let mut cost = Cost([Work::NONE; COMPONENTS.len()]);
    let (bytes, products) = weight(&model.weights.head);
    if rows > 0 {
        cost.add(Component::Head, bytes, 2 * rows * products);
    }
    let (bytes, _) = weight(&model.weights.embedding);
    cost.add(Component::Other, tokens * bytes / config.vocab, 0);
    for ((layer, weights), &experts) in config.layers.iter().zip(&model.weights.layers).zip(experts) {
        let (bytes, products) = match &weights.mixer {
            MixerWeights::Gqa(w) => sum([linear(&w.q), linear(&w.k), linear(&w.v), linear(&w.o)]),
            MixerWeights::Mla(w) => {
                let query = match &w.query {
                    MlaQueryWeights::Direct(q) => linear(q),
                    MlaQueryWeights::LowRank { a, b, .. } => sum([linear(a), linear(b)]),
                };
                sum([query, linear(&w.kv_a), linear(&w.kv_b), linear(&w.o)])
            }
        };
        cost.add(Component::AttentionProjections, bytes, 2 * tokens * products);
        let (seen, products) = attention(layer, batch);
        cost.add(Component::Attention, seen * layer.cache_rows().total() * value_bytes, 2 * products);
        let written = tokens * layer.cache_rows().total() * value_bytes;
        cost.add(Component::Other, written + 2 * 4 * config.hidden, 0);
        match &weights.ffn {
            FfnWeights::Dense(w) => {
                let (bytes, products) = mlp(w);
                cost.add(Component::DenseFfn, bytes, 2 * tokens * products);
            }
            FfnWeights::Moe(w) => {
                let (bytes, products) = linear(&w.router);
                cost.add(Component::Router, bytes, 2 * tokens * products);
                let (bytes, products) = expert(&w.experts[0]);
                let pairs = tokens * top_k(layer);
                cost.add(Component::RoutedExperts, experts * bytes, 2 * pairs * products);
                if let Some(shared) = &w.shared {
                    let (bytes, products) = mlp(shared);
                    cost.add(Component::SharedExpert, bytes, 2 * tokens * products);
                }
            }
        }
    }
    cost
}

/// Cached rows that one layer's attention must read, and its multiply-adds.
fn attention(layer: &LayerSpec, batch: &Batch) -> (usize, usize) {
    let (per_position, window) = match &layer.mixer {
        Mixer::Gqa(g) => (g.heads * 2 * g.head_dim, g.window),
        Mixer::Mla(m) => (m.heads * (2 * m.kv_rank + m.rope_dim), None),
    };
    let (mut seen, mut products) = (0, 0);
    for span in &batch.sequences {
        let first = batch.positions[span.first] as usize;
        let begin = |position: usize| window.map_or(0, |window| (position + 1).saturating_sub(window));
        seen += first + span.tokens - begin(first);
        let positions = first..first + span.tokens;
        products += positions.map(|position| position + 1 - begin(position)).sum::<usize>() * per_position;
    }
    (seen, products)
}

/// Experts per token of a layer; 0 of a dense one.
pub fn top_k(layer: &LayerSpec) -> usize {
    match &layer.ffn {
        Ffn::Moe(moe) => moe.rule.top_k,
        Ffn::Dense(_) => 0,
    }
}

/// Blocks of the cache that `tokens` positions of one sequence take.
pub fn blocks(tokens: usize) -> usize {
    tokens.div_ceil(PAGE)
}

/// The most experts a layer has.
pub fn most_experts(config: &ModelConfig) -> usize {
    let counts = config.layers.iter().map(|layer| match &layer.ffn {
        Ffn::Moe(moe) => moe.rule.experts,
        Ffn::Dense(_) => 0,
    });
    counts.max().unwrap_or(0)
}
