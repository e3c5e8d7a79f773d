//! gpt-oss 20b and 120b: attention sinks, windows on some layers, clamped SwiGLU, MXFP4 experts.

use kernels::experts::Activation;
use kernels::rope::Rotation;
use kernels::route::Score;
use serde_json::{Value, json};

use super::common::{Attention, Base, Norms, PROJECTIONS, RouterKind, moe};
use crate::config::{Experts, Ffn, Linear, Mixer, ModelConfig};
use crate::error::Result;

/// The slope of the gate's sigmoid; only newer files carry it.
const ALPHA: f64 = 1.702;

pub fn describe(config: &Value) -> Result<ModelConfig> {
    // Without a field the reference stretches positions as the published models do.
    let mut config = config.clone();
    if config["rope_scaling"].is_null() && config["rope_parameters"].is_null() {
        config["rope_scaling"] = json!({
            "rope_type": "yarn", "factor": 32, "beta_fast": 32, "beta_slow": 1, "truncate": false,
            "original_max_position_embeddings": 4096,
        });
    }
    let base = Base::read(&config, "", "")?;
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
    let alpha = fields.opt_number("swiglu_alpha")?.unwrap_or(ALPHA) as f32;
    let intermediate = fields.size("intermediate_size")?;
    // Without a list every other layer has a window, the first included.
    let windowed = fields
        .word_per_layer("layer_types", base.layers, ["full_attention", "sliding_attention"])?
        .unwrap_or_else(|| (0..base.layers).map(|layer| layer.is_multiple_of(2)).collect());
    let layers = (0..base.layers)
        .map(|layer| {
            let name = base.layer_name(layer);
            attention.window = if windowed[layer] { window } else { None };
            let mut gqa = base.gqa(layer, &attention);
            gqa.sinks = Some(format!("{name}.self_attn.sinks"));
            let mut moe = moe(&base, &format!("{name}.mlp"), rule, intermediate, PROJECTIONS);
            let router = base.linear(format!("{name}.mlp.router"), rule.experts, base.hidden);
            moe.router = Linear { bias: true, ..router };
            moe.experts = Experts::GptOss { prefix: format!("{name}.mlp.experts") };
            moe.activation = Activation::ClampedSwiGlu { limit, alpha };
            base.layer(layer, Mixer::Gqa(gqa), Ffn::Moe(moe))
        })
        .collect();
    base.finish("gpt_oss", "", layers)
}
