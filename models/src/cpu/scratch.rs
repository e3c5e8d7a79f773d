//! Every buffer of the runner besides the cache, allocated once.

use super::attention::AttentionScratch;
use super::ffn::FfnScratch;
use crate::config::{Ffn, Mixer, MlaQuery, ModelConfig};
use crate::runner::{Capacity, Numerics};
use kernels::quantised::Activations;

/// Buffers of one forward pass; all are `[tokens, hidden]` unless said otherwise.
pub struct Scratch {
    /// The residual stream.
    pub stream: Vec<f32>,
    /// A sublayer's input; at the end, of the rows whose logits are wanted.
    pub normed: Vec<f32>,
    /// A sublayer's output.
    pub output: Vec<f32>,
    /// Rows whose logits are wanted `[logit_rows, hidden]`.
    pub last: Vec<f32>,
    pub attention: AttentionScratch,
    pub ffn: FfnScratch,
    /// Packed rows of the widest product.
    pub activations: Activations,
}

impl Scratch {
    pub fn new(config: &ModelConfig, numerics: Numerics, capacity: &Capacity) -> Self {
        let widest = widest_input(config);
        let rows = vec![0.0; capacity.batch_tokens * config.hidden];
        Self {
            stream: rows.clone(),
            normed: rows.clone(),
            output: rows,
            last: vec![0.0; capacity.logit_rows * config.hidden],
            attention: AttentionScratch::new(config, capacity),
            ffn: FfnScratch::new(config, numerics, capacity),
            activations: Activations::new(numerics.precision(), capacity.batch_tokens, widest),
        }
    }

    pub fn bytes(config: &ModelConfig, numerics: Numerics, capacity: &Capacity) -> usize {
        let rows = (3 * capacity.batch_tokens + capacity.logit_rows) * config.hidden * 4;
        let widest = widest_input(config);
        let packed = Activations::bytes(numerics.precision(), capacity.batch_tokens, widest);
        let parts = AttentionScratch::bytes(config, capacity) + FfnScratch::bytes(config, numerics, capacity);
        rows + parts + packed
    }
}

/// Columns of the widest weight outside the routed experts.
fn widest_input(config: &ModelConfig) -> usize {
    let widths = config.layers.iter().flat_map(|layer| {
        let mixer = match &layer.mixer {
            Mixer::Gqa(gqa) => gqa.heads * gqa.head_dim,
            Mixer::Mla(mla) => match &mla.query {
                MlaQuery::Direct(_) => mla.heads * mla.value_dim,
                MlaQuery::LowRank { b, .. } => b.cols.max(mla.heads * mla.value_dim),
            },
        };
        let mlp = match &layer.ffn {
            Ffn::Dense(mlp) => Some(mlp),
            Ffn::Moe(moe) => moe.shared.as_ref(),
        };
        [mixer, mlp.map_or(0, |mlp| mlp.down.cols)]
    });
    widths.fold(config.hidden, usize::max)
}
