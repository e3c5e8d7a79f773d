//! OLMoE: q/k norms over the whole projection, softmax router with raw probabilities.

use kernels::rope::Rotation;
use serde_json::Value;

use super::common::{Attention, Base, Norms, PROJECTIONS, RouterKind, moe};
use crate::config::{Ffn, Mixer, ModelConfig};
use crate::error::Result;

pub fn describe(config: &Value) -> Result<ModelConfig> {
    let base = Base::read(config, "", "")?;
    let fields = &base.fields;
    fields.only("clip_qkv", &[])?;
    let mut attention = Attention::read(&base, Norms::Whole, Rotation::Half, None)?;
    let bias = fields.flag_or("attention_bias", false)?;
    (attention.qkv_bias, attention.o_bias) = (bias, bias);
    let rule = RouterKind::softmax(fields.flag_or("norm_topk_prob", false)?);
    let rule = rule.rule(fields, "num_experts", "num_experts_per_tok")?;
    let intermediate = fields.size("intermediate_size")?;
    let layers = (0..base.layers)
        .map(|layer| {
            let block = format!("{}.mlp", base.layer_name(layer));
            let ffn = Ffn::Moe(moe(&base, &block, rule, intermediate, PROJECTIONS));
            base.layer(layer, Mixer::Gqa(base.gqa(layer, &attention)), ffn)
        })
        .collect();
    base.finish("olmoe", "", layers)
}
