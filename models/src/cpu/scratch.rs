//! Every buffer of the runner besides the cache, allocated once.

use super::attention::AttentionScratch;
use super::ffn::FfnScratch;
use crate::config::ModelConfig;
use crate::runner::Capacity;

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
}

impl Scratch {
    pub fn new(config: &ModelConfig, capacity: &Capacity) -> Self {
        let rows = vec![0.0; capacity.batch_tokens * config.hidden];
        Self {
            stream: rows.clone(),
            normed: rows.clone(),
            output: rows,
            last: vec![0.0; capacity.logit_rows * config.hidden],
            attention: AttentionScratch::new(config, capacity),
            ffn: FfnScratch::new(config, capacity),
        }
    }

    pub fn bytes(config: &ModelConfig, capacity: &Capacity) -> usize {
        let rows = (3 * capacity.batch_tokens + capacity.logit_rows) * config.hidden * 4;
        rows + AttentionScratch::bytes(config, capacity) + FfnScratch::bytes(config, capacity)
    }
}
