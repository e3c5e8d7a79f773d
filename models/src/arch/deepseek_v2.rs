//! DeepSeek V2 and V2-Lite: latent attention as V3's, softmax router without a selection bias.

use kernels::route::{GroupRule, Score};
use serde_json::Value;

use super::common::{Base, RouterKind};
use super::deepseek_v3::{LatentAttention, MoePlan};
use crate::config::{Mixer, ModelConfig};
use crate::error::{Error, Result};

pub fn describe(config: &Value) -> Result<ModelConfig> {
    let mut base = Base::read(config, "", "")?;
    base.skip_prediction_layers("num_nextn_predict_layers")?;
    let fields = &base.fields;
    fields.only("scoring_func", &["softmax".into()])?;
    let mut kind = RouterKind::deepseek(fields, Score::Softmax, GroupRule::Max, false)?;
    match fields.opt_text("topk_method")?.unwrap_or("greedy") {
        "greedy" => kind.groups = None,
        "group_limited_greedy" => {}
        other => {
            let message = format!("{other:?} is not supported (greedy and group_limited_greedy are)");
            return Err(Error::config(fields.path("topk_method"), message));
        }
    }
    // The maker's code either normalises or scales, never both.
    if kind.normalise.is_some() {
        kind.scale = 1.0;
    }
    let plan = MoePlan::read(&base, kind)?;
    let attention = LatentAttention::read(&base)?;
    let layers = (0..base.layers)
        .map(|layer| base.layer(layer, Mixer::Mla(attention.layer(&base, layer)), plan.ffn(&base, layer)))
        .collect();
    base.finish("deepseek_v2", "", layers)
}
