//! GLM-4.5, 4.6 and 4.7: partial rotation, biased q/k/v, DeepSeek's router.

use kernels::rope::Rotation;
use kernels::route::{GroupRule, Score};
use serde_json::Value;

use super::common::{Attention, Base, Norms, RouterKind};
use super::deepseek_v3::MoePlan;
use crate::config::{Ffn, Mixer, ModelConfig};
use crate::error::Result;

pub fn describe(config: &Value) -> Result<ModelConfig> {
    let mut base = Base::read(config, "", "")?;
    base.skip_prediction_layers("num_nextn_predict_layers")?;
    let fields = &base.fields;
    let norms = if fields.flag_or("use_qk_norm", false)? { Norms::PerHead } else { Norms::None };
    let rotary = Attention::rotary_dim(&base, 0.5)?;
    let mut attention = Attention::read(&base, norms, Rotation::Half, rotary)?;
    attention.qkv_bias = fields.flag_or("attention_bias", false)?;
    fields.only("scoring_func", &["sigmoid".into()])?;
    fields.only("topk_method", &["noaux_tc".into()])?;
    let kind = RouterKind::deepseek(fields, Score::Sigmoid, GroupRule::TopTwoSum, true)?;
    let plan = MoePlan::read(&base, kind)?;
    let layers = (0..base.layers)
        .map(|layer| {
            let mut ffn = plan.ffn(&base, layer);
            if let Ffn::Moe(moe) = &mut ffn {
                moe.selection_bias = Some(format!("{}.e_score_correction_bias", moe.router.name));
            }
            base.layer(layer, Mixer::Gqa(base.gqa(layer, &attention)), ffn)
        })
        .collect();
    base.finish("glm4_moe", "", layers)
}
