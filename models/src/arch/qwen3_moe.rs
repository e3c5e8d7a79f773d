//! Qwen3 MoE (30B-A3B, 235B-A22B, Coder): per-head q/k norms, softmax router.

use kernels::rope::Rotation;
use serde_json::Value;

use super::common::{Attention, Base, Norms, PROJECTIONS, RouterKind, moe};
use crate::config::{Ffn, Mixer, ModelConfig};
use crate::error::{Error, Result};

pub fn describe(config: &Value) -> Result<ModelConfig> {
    let base = Base::read(config, "", "")?;
    let fields = &base.fields;
    let mut attention = Attention::read(&base, Norms::PerHead, Rotation::Half, None)?;
    fields.only("use_qk_norm", &[true.into()])?;
    let bias = fields.flag_or("attention_bias", false)?;
    (attention.qkv_bias, attention.o_bias) = (bias, bias);
    match fields.flag_or("use_sliding_window", false)? {
        true => attention.window = Attention::window(fields)?,
        false => fields.ignore(&["sliding_window"]),
    }

    let rule = RouterKind::softmax(fields.flag_or("norm_topk_prob", false)?);
    // transformers 5 writes the second name.
    let experts = if fields.value("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let rule = rule.rule(fields, experts, "num_experts_per_tok")?;
    let intermediate = fields.size("moe_intermediate_size")?;
    let dense = fields.opt_size("intermediate_size")?;
    let step = fields.size_or("decoder_sparse_step", 1)?;
    let listed = match fields.value("mlp_only_layers") {
        None => &[],
        Some(Value::Array(list)) if list.iter().all(Value::is_u64) => &list[..],
        Some(other) => {
            let message = format!("{other} is no list of layers");
            return Err(Error::config(fields.path("mlp_only_layers"), message));
        }
    };
    let is_dense =
        |layer: usize| listed.contains(&layer.into()) || step == 0 || !(layer + 1).is_multiple_of(step);
    let layers = (0..base.layers)
        .map(|layer| {
            let name = format!("{}.mlp", base.layer_name(layer));
            let ffn = if is_dense(layer) {
                let missing = || Error::config(fields.path("intermediate_size"), "is missing");
                Ffn::Dense(base.mlp(&name, dense.ok_or_else(missing)?))
            } else {
                Ffn::Moe(moe(&base, &name, rule, intermediate, PROJECTIONS))
            };
            Ok(base.layer(layer, Mixer::Gqa(base.gqa(layer, &attention)), ffn))
        })
        .collect::<Result<_>>()?;
    base.finish("qwen3_moe", "", layers)
}
