//! How wide the buffers of a chain must be.

use models::Model;
use models::config::{Ffn, Mixer};
use models::weights::{MixerWeights, MlaQueryWeights};

/// The widest of each kind of row.
#[derive(Default)]
pub struct Widths {
    pub low: usize,
    pub query: usize,
    pub key: usize,
    pub planes: usize,
    pub experts: usize,
    pub top_k: usize,
    pub inter: usize,
}

impl Widths {
    pub fn of(model: &Model) -> Self {
        let mut widths = Self::default();
        for (spec, weights) in model.config.layers.iter().zip(&model.weights.layers) {
            let (low, query, key) = match (&spec.mixer, &weights.mixer) {
                (Mixer::Mla(m), MixerWeights::Mla(w)) => {
                    let low = match &w.query {
                        MlaQueryWeights::Direct(_) => 0,
                        MlaQueryWeights::LowRank { a, .. } => a.weight.rows(),
                    };
                    let head = (m.kv_rank + m.rope_dim).max(m.nope_dim + m.rope_dim).max(m.value_dim);
                    (low, m.heads * head, m.kv_rank + m.rope_dim)
                }
                (Mixer::Gqa(g), _) => (0, g.heads * g.head_dim, g.kv_heads * g.head_dim),
                _ => unreachable!("weights of the same description"),
            };
            let (mlp, moe) = match &spec.ffn {
                Ffn::Dense(mlp) => (Some(mlp), None),
                Ffn::Moe(moe) => (moe.shared.as_ref(), Some(moe)),
            };
            let inner = mlp.map_or(0, |mlp| mlp.gate.rows);
            let (experts, top_k, inter) =
                moe.map_or((0, 0, 0), |moe| (moe.rule.experts, moe.rule.top_k, moe.intermediate));
            let max = |a: &mut usize, b: usize| *a = (*a).max(b);
            max(&mut widths.low, low);
            max(&mut widths.query, query);
            max(&mut widths.key, key);
            max(&mut widths.planes, query.max(low).max(inner));
            max(&mut widths.experts, experts);
            max(&mut widths.top_k, top_k);
            max(&mut widths.inter, inter);
        }
        widths
    }
}
