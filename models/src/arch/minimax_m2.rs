//! MiniMax-M2, M2.1, M2.5 and M2.7: partial rotation, norms over whole projections, sigmoid router.

use kernels::rope::Rotation;
use kernels::route::{Normalise, Score};
use serde_json::Value;

use super::common::{Attention, Base, Norms, RouterKind, W_NAMES, moe};
use crate::config::{Ffn, Mixer, ModelConfig};
use crate::error::{Error, Result};

pub fn describe(config: &Value) -> Result<ModelConfig> {
    let mut base = Base::read(config, "", "")?;
    base.skip_prediction_layers("num_mtp_modules")?;
    base.skip("mtp", "multi-token-prediction layer");
    let fields = &base.fields;
    // Sizes of the prediction modules and of a shared expert that no release has.
    fields.ignore(&["use_mtp", "mtp_transformer_layers", "mlp_intermediate_size", "shared_moe_mode"]);
    fields.only("shared_intermediate_size", &[0.into()])?;
    fields.only("scoring_func", &["sigmoid".into()])?;
    fields.only("sliding_window", &[])?;
    for beta in ["layernorm_full_attention_beta", "layernorm_linear_attention_beta", "layernorm_mlp_beta"] {
        fields.only(beta, &[1.0.into(), 1.into()])?;
    }
    if let Some(kinds) = fields.value("attn_type_list") {
        let full = |list: &Vec<Value>| list.len() == base.layers && list.iter().all(|kind| *kind == 1);
        if !kinds.as_array().is_some_and(full) {
            let message = "must be 1 (full attention) for every layer; nothing else is supported";
            return Err(Error::config(fields.path("attn_type_list"), message));
        }
    }
    fields.only("qk_norm_type", &["per_layer".into()])?;
    let norms = if fields.flag_or("use_qk_norm", true)? { Norms::Whole } else { Norms::None };
    let rotary = match fields.opt_size("rotary_dim")? {
        Some(rotary) => Some(rotary),
        None => Attention::rotary_dim(&base, 1.0)?,
    };
    let attention = Attention::read(&base, norms, Rotation::Half, rotary)?;

    let biased = fields.flag_or("use_routing_bias", true)?;
    let kind = RouterKind {
        score: Score::Sigmoid,
        groups: None,
        normalise: Some(Normalise::Epsilon(0.0)),
        scale: 1.0,
    };
    let rule = kind.rule(fields, "num_local_experts", "num_experts_per_tok")?;
    let intermediate = fields.size("intermediate_size")?;
    let layers = (0..base.layers)
        .map(|layer| {
            let block = format!("{}.block_sparse_moe", base.layer_name(layer));
            let mut moe = moe(&base, &block, rule, intermediate, W_NAMES);
            moe.selection_bias = biased.then(|| format!("{block}.e_score_correction_bias"));
            base.layer(layer, Mixer::Gqa(base.gqa(layer, &attention)), Ffn::Moe(moe))
        })
        .collect();
    base.finish("minimax_m2", "", layers)
}
