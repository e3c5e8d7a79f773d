//! Mixtral 8x7B and 8x22B: plain attention, two of eight experts.

use kernels::rope::Rotation;
use serde_json::Value;

use super::common::{Attention, Base, Norms, RouterKind, W_NAMES, moe};
use crate::config::{Ffn, Mixer, ModelConfig};
use crate::error::Result;

pub fn describe(config: &Value) -> Result<ModelConfig> {
    let base = Base::read(config, "", "")?;
    let fields = &base.fields;
    let mut attention = Attention::read(&base, Norms::None, Rotation::Half, None)?;
    attention.window = Attention::window(fields)?;
    let rule = RouterKind::softmax(true).rule(fields, "num_local_experts", "num_experts_per_tok")?;
    let intermediate = fields.size("intermediate_size")?;
    let layers = (0..base.layers)
        .map(|layer| {
            let block = format!("{}.block_sparse_moe", base.layer_name(layer));
            let ffn = Ffn::Moe(moe(&base, &block, rule, intermediate, W_NAMES));
            base.layer(layer, Mixer::Gqa(base.gqa(layer, &attention)), ffn)
        })
        .collect();
    base.finish("mixtral", "", layers)
}
