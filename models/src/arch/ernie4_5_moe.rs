//! ERNIE 4.5 MoE: interleaved rotation, softmax router with a selection bias, some layers dense.

use kernels::rope::Rotation;
use kernels::route::{Normalise, Score};
use serde_json::Value;

use super::common::{Attention, Base, Norms, PROJECTIONS, RouterKind, moe};
use crate::config::{Ffn, Mixer, ModelConfig};
use crate::error::Result;

pub fn describe(config: &Value) -> Result<ModelConfig> {
    let mut base = Base::read(config, "", "")?;
    base.skip("mtp_", "multi-token-prediction layer");
    // Tied unless the file says otherwise.
    base.tied = base.fields.flag_or("tie_word_embeddings", true)?;
    let fields = &base.fields;
    fields.only("use_rmsnorm", &[true.into()])?;
    fields.only("moe_gate_act", &["softmax".into()])?;
    // Capacity limits and load balancing belong to training.
    fields.ignore(&["moe_capacity", "moe_gate", "moe_use_aux_free", "num_nextn_predict_layers"]);
    fields.only("use_bias", &[false.into()])?;
    fields.only("compression_ratio", &[1.0.into(), 1.into()])?;
    let attention = Attention::read(&base, Norms::None, Rotation::Interleaved, None)?;

    let floor = fields.opt_number("moe_norm_min")?.unwrap_or(1e-12);
    let kind = RouterKind {
        score: Score::Softmax,
        groups: None,
        normalise: Some(Normalise::Floor(floor as f32)),
        scale: 1.0,
    };
    let rule = kind.rule(fields, "moe_num_experts", "moe_k")?;
    let intermediate = fields.size("moe_intermediate_size")?;
    let dense = fields.size("intermediate_size")?;
    let shared = fields.size_or("moe_num_shared_experts", 0)?;
    let first = fields.size_or("moe_layer_start_index", 0)?;
    // -1 stands for the last layer.
    let last = match fields.opt_number("moe_layer_end_index")? {
        Some(last) if last >= 0.0 => last as usize,
        _ => base.layers - 1,
    };
    let interval = fields.size_or("moe_layer_interval", 1)?.max(1);
    let layers = (0..base.layers)
        .map(|layer| {
            let name = format!("{}.mlp", base.layer_name(layer));
            let sparse = (layer + 1).is_multiple_of(interval) && (first..=last).contains(&layer);
            let ffn = if sparse {
                let mut moe = moe(&base, &name, rule, intermediate, PROJECTIONS);
                moe.selection_bias = Some(format!("{name}.moe_statics.e_score_correction_bias"));
                if shared > 0 {
                    moe.shared = Some(base.mlp(&format!("{name}.shared_experts"), shared * intermediate));
                }
                Ffn::Moe(moe)
            } else {
                Ffn::Dense(base.mlp(&name, dense))
            };
            base.layer(layer, Mixer::Gqa(base.gqa(layer, &attention)), ffn)
        })
        .collect();
    base.finish("ernie4_5_moe", "", layers)
}
