//! Hunyuan A13B: q/k norms after the rotation, softmax router, NTK positions with a fixed alpha.

use kernels::rope::Rotation;
use serde_json::Value;

use super::common::{Attention, Base, Norms, PROJECTIONS, RouterKind, moe};
use crate::config::{Ffn, Mixer, ModelConfig};
use crate::error::Result;

pub fn describe(config: &Value) -> Result<ModelConfig> {
    let base = Base::read(config, "", "")?;
    let fields = &base.fields;
    // Training settings, ids of other modalities and switches of variants that were not released.
    fields.ignore(&["attention_head_dim", "capacity_factor", "cla_share_factor", "class_num", "dense_list"]);
    fields.ignore(&["enable_lm_head_fp32", "eod_token_id", "im_start_id", "im_end_id", "im_newline_id"]);
    fields.ignore(&[
        "image_token_id",
        "max_seq_length",
        "moe_drop_tokens",
        "moe_random_routing_dropped_token",
    ]);
    fields.ignore(&[
        "norm_type",
        "org_vocab_size",
        "pool_type",
        "mask_init_id",
        "text_start_id",
        "text_end_id",
    ]);
    fields.ignore(&["use_mixed_mlp_moe", "video_start_id", "video_end_id", "add_classification_head"]);
    fields.ignore(&["kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]);
    fields.ignore(&["num_media_embeds", "skip_cls_token", "pad_id", "xpos_scale_base"]);
    fields.ignore(&["anyres_pooling_size", "anyres_vit_max_image_size", "anyres_vit_two_views"]);
    fields.ignore(&["vit_add_patchemb_bias", "vit_input_resolution", "vit_mapping_type", "vit_norm_type"]);
    fields.ignore(&["vit_patch", "vit_path", "vit_remove_prenorm", "vit_token", "vit_type"]);
    fields.ignore(&["vit_used_rms_norm"]);
    for off in ["use_cla", "use_mla", "position_embedding_xpos", "mlp_bias", "moe_layer_num_skipped"] {
        fields.only(off, &[false.into(), 0.into()])?;
    }
    fields.only("use_rotary_pos_emb", &[true.into()])?;
    fields.only("group_limited_greedy", &[false.into()])?;
    fields.only("norm_topk_prob", &[true.into()])?;
    for one in ["routed_scaling_factor", "n_group", "topk_group"] {
        fields.only(one, &[1.0.into(), 1.into()])?;
    }
    let norms = if fields.flag_or("use_qk_norm", true)? { Norms::PerHeadAfterRope } else { Norms::None };
    let mut attention = Attention::read(&base, norms, Rotation::Half, None)?;
    let bias = fields.flag_or("attention_bias", false)?;
    (attention.qkv_bias, attention.o_bias) = (bias, bias);

    let experts = fields.size_per_layer("num_experts", base.layers)?;
    let top_k = fields.size_per_layer("moe_topk", base.layers)?;
    fields.ignore(&["num_experts_per_tok", "num_local_experts"]);
    let dense = fields.size("intermediate_size")?;
    let intermediate = match fields.value("moe_intermediate_size") {
        Some(_) => fields.size_per_layer("moe_intermediate_size", base.layers)?,
        None => vec![dense; base.layers],
    };
    let shared = match fields.value("num_shared_expert") {
        Some(_) => fields.size_per_layer("num_shared_expert", base.layers)?,
        None => vec![1; base.layers],
    };
    let layers = (0..base.layers)
        .map(|layer| {
            let name = format!("{}.mlp", base.layer_name(layer));
            let rule = RouterKind::softmax(true).rule_of(
                fields,
                ("num_experts", experts[layer]),
                ("moe_topk", top_k[layer]),
            )?;
            let mut moe = moe(&base, &name, rule, intermediate[layer], PROJECTIONS);
            moe.router.name = format!("{name}.gate.wg");
            moe.shared = Some(base.mlp(&format!("{name}.shared_mlp"), shared[layer] * intermediate[layer]));
            Ok(base.layer(layer, Mixer::Gqa(base.gqa(layer, &attention)), Ffn::Moe(moe)))
        })
        .collect::<Result<_>>()?;
    base.finish("hunyuan_v1_moe", "", layers)
}
