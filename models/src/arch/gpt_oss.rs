//! gpt-oss 20b and 120b: attention sinks, windows on some layers, clamped SwiGLU, MXFP4 experts.

use kernels::experts::Activation;
use kernels::rope::Rotation;
use kernels::route::Score;
use serde_json::Value;

use super::common::{Attention, Base, Norms, PROJECTIONS, RouterKind, moe};
use crate::config::{Experts, Ffn, Linear, Mixer, ModelConfig};
use crate::error::{Error, Result};

/// The slope of the gate's sigmoid; no configuration carries it.
const ALPHA: f32 = 1.702;

pub fn describe(config: &Value) -> Result<ModelConfig> {
    let base = Base::read(config, "", "")?;
    let fields = &base.fields;
    // Repeats `num_experts_per_tok` and the rope scaling's original length.
    fields.ignore(&["experts_per_token", "initial_context_length"]);
    let mut attention = Attention::read(&base, Norms::None, Rotation::Half, None)?;
    let bias = fields.flag_or("attention_bias", true)?;
    (attention.qkv_bias, attention.o_bias) = (bias, bias);
    let window = Attention::window(fields)?;

    let kind = RouterKind { score: Score::SoftmaxOfChosen, groups: None, normalise: None, scale: 1.0 };
    let rule = kind.rule(fields, "num_local_experts", "num_experts_per_tok")?;
    let limit = fields.opt_number("swiglu_limit")?.unwrap_or(7.0) as f32;
    let intermediate = fields.size("intermediate_size")?;
    let kinds = layer_kinds(&base)?;
    let layers = (0..base.layers)
        .map(|layer| {
            let name = base.layer_name(layer);
            attention.window = if kinds[layer] { window } else { None };
            let mut gqa = base.gqa(layer, &attention);
            gqa.sinks = Some(format!("{name}.self_attn.sinks"));
            let mut moe = moe(&base, &format!("{name}.mlp"), rule, intermediate, PROJECTIONS);
            let router = base.linear(format!("{name}.mlp.router"), rule.experts, base.hidden);
            moe.router = Linear { bias: true, ..router };
            moe.experts = Experts::GptOss { prefix: format!("{name}.mlp.experts") };
            moe.activation = Activation::ClampedSwiGlu { limit, alpha: ALPHA };
            base.layer(layer, Mixer::Gqa(gqa), Ffn::Moe(moe))
        })
        .collect();
    base.finish("gpt_oss", "", layers)
}

/// Per layer, whether it has a window; without a list every other layer does, the first included.
fn layer_kinds(base: &Base) -> Result<Vec<bool>> {
    let fields = &base.fields;
    let Some(value) = fields.value("layer_types") else {
        return Ok((0..base.layers).map(|layer| layer.is_multiple_of(2)).collect());
    };
    let kinds: Option<Vec<bool>> = value.as_array().and_then(|list| {
        list.iter()
            .map(|kind| match kind.as_str() {
                Some("sliding_attention") => Some(true),
                Some("full_attention") => Some(false),
                _ => None,
            })
            .collect()
    });
    kinds.filter(|kinds| kinds.len() == base.layers).ok_or_else(|| {
        let message = "must name sliding_attention or full_attention for every layer";
        Error::config(fields.path("layer_types"), message)
    })
}
