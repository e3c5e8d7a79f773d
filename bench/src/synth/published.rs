//! Published configurations, as `config.json` holds them, without what only their makers' Python
//! reads. Token ids are not here: they belong to the tokenizer, which is synth's own.

use serde_json::{Value, json};

/// A name and the configuration it stands for.
pub(crate) type Shape = (&'static str, fn() -> Value);

/// Whole published shapes.
pub(crate) const PUBLISHED: &[Shape] = &[
    ("full:moonshotai-Kimi-K2-Thinking", kimi_k2_thinking),
    ("full:moonshotai-Kimi-K2-Instruct", kimi_k2_instruct),
    ("full:moonshotai-Kimi-K2-Instruct-0905", kimi_k2_instruct_0905),
    ("full:moonshotai-Kimi-K2.5", kimi_k2_5),
    ("full:moonshotai-Moonlight-16B-A3B", moonlight),
    ("full:deepseek-ai-DeepSeek-V3", deepseek_v3),
    ("full:deepseek-ai-DeepSeek-V2-Lite", deepseek_v2_lite),
    ("full:Qwen-Qwen3-30B-A3B", qwen3_30b),
    ("full:Qwen-Qwen3-235B-A22B", qwen3_235b),
    ("full:openai-gpt-oss-20b", || gpt_oss(24, 32)),
    ("full:openai-gpt-oss-120b", || gpt_oss(36, 128)),
    ("full:zai-org-GLM-4.5-Air", glm_4_5_air),
    ("full:zai-org-GLM-4.5", glm_4_5),
    ("full:zai-org-GLM-4.7-Flash", glm_4_7_flash),
    ("full:MiniMaxAI-MiniMax-M2", minimax_m2),
    ("full:mistralai-Mixtral-8x7B", mixtral_8x7b),
    ("full:allenai-OLMoE-1B-7B", olmoe),
];

/// `base` with the fields of `changes` put in; a field set to null stays, as null.
pub(crate) fn with(mut base: Value, changes: Value) -> Value {
    if let (Some(base), Value::Object(changes)) = (base.as_object_mut(), changes) {
        base.extend(changes);
    }
    base
}

/// compressed-tensors INT4 in groups of 32 for everything but `ignore`.
pub(crate) fn int4(ignore: &[&str]) -> Value {
    json!({
        "config_groups": {"group_0": {
            "input_activations": null,
            "output_activations": null,
            "targets": ["Linear"],
            "weights": {
                "actorder": null, "block_structure": null, "dynamic": false, "group_size": 32, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": true, "type": "int",
            },
        }},
        "format": "pack-quantized",
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    })
}

/// What K2's releases leave unquantised: all but the routed experts.
pub(crate) const KIMI_UNQUANTISED: &[&str] =
    &["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"];

fn fp8() -> Value {
    json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]})
}

pub(crate) fn yarn(factor: f64, beta_fast: f64, mscale: f64) -> Value {
    json!({
        "beta_fast": beta_fast, "beta_slow": 1.0, "factor": factor, "mscale": mscale, "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096, "type": "yarn",
    })
}

/// What all models have in common.
fn common() -> Value {
    json!({
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": true,
    })
}

/// What all K2 text models have in common, unquantised.
fn kimi_k2() -> Value {
    let fields = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "attention_bias": false,
        "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_size": 7168,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 262144,
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "pretraining_tp": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5,
        "rope_scaling": yarn(64.0, 1.0, 1.0), "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid", "seq_aux": true, "topk_group": 1, "topk_method": "noaux_tc",
        "v_head_dim": 128, "vocab_size": 163840,
    });
    with(common(), fields)
}

pub(crate) fn kimi_k2_thinking() -> Value {
    with(kimi_k2(), json!({"quantization_config": int4(KIMI_UNQUANTISED)}))
}

fn kimi_k2_instruct() -> Value {
    let changes = json!({
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_scaling": yarn(32.0, 1.0, 1.0),
        "quantization_config": fp8(),
    });
    with(kimi_k2(), changes)
}

fn kimi_k2_instruct_0905() -> Value {
    let changes = json!({"max_position_embeddings": 262144, "rope_scaling": yarn(64.0, 1.0, 1.0)});
    with(kimi_k2_instruct(), changes)
}

fn kimi_k2_5() -> Value {
    json!({
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "ignore_index": -100,
        "media_placeholder_token_id": 163605,
        "text_config": with(kimi_k2_thinking(), json!({"rope_scaling": yarn(64.0, 32.0, 1.0)})),
        "tie_word_embeddings": false,
        "use_unified_vision_chunk": true,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
    })
}

fn moonlight() -> Value {
    let changes = json!({
        "model_type": "deepseek_v3", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": null, "intermediate_size": 11264, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 1408,
        "routed_scaling_factor": 2.446, "rope_scaling": null, "max_position_embeddings": 8192,
    });
    with(kimi_k2(), changes)
}

fn deepseek_v3() -> Value {
    let changes = json!({
        "model_type": "deepseek_v3", "num_attention_heads": 128, "num_key_value_heads": 128,
        "first_k_dense_replace": 3, "n_routed_experts": 256, "n_group": 8, "topk_group": 4,
        "routed_scaling_factor": 2.5, "rope_theta": 10000, "rope_scaling": yarn(40.0, 32.0, 1.0),
        "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "vocab_size": 129280,
        "num_nextn_predict_layers": 1, "quantization_config": fp8(),
    });
    with(kimi_k2(), changes)
}

fn deepseek_v2_lite() -> Value {
    let changes = json!({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_attention_heads": 16,
        "num_key_value_heads": 16, "hidden_size": 2048, "num_hidden_layers": 27, "q_lora_rank": null,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "norm_topk_prob": false, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "topk_method": "greedy", "rope_theta": 10000,
        "rope_scaling": yarn(40.0, 32.0, 0.707), "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
        "vocab_size": 102400,
    });
    with(kimi_k2(), changes)
}

fn glm_4_7_flash() -> Value {
    let changes = json!({
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "hidden_size": 2048,
        "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20, "q_lora_rank": 768,
        "qk_nope_head_dim": 192, "v_head_dim": 256, "intermediate_size": 10240, "moe_intermediate_size": 1536,
        "n_routed_experts": 64, "num_experts_per_tok": 4, "routed_scaling_factor": 1.8, "rope_theta": 1000000,
        "rope_scaling": null, "rope_interleave": true, "max_position_embeddings": 202752, "vocab_size": 154880,
        "num_nextn_predict_layers": 1,
    });
    with(kimi_k2(), changes)
}

/// What plain-attention models have in common.
fn gqa() -> Value {
    with(common(), json!({"output_router_logits": false, "rope_scaling": null}))
}

pub(crate) fn qwen3_30b() -> Value {
    let fields = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": false,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
        "use_sliding_window": false, "vocab_size": 151936,
    });
    with(gqa(), fields)
}

fn qwen3_235b() -> Value {
    let changes = json!({
        "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94, "moe_intermediate_size": 1536,
        "num_attention_heads": 64, "num_hidden_layers": 94,
    });
    with(qwen3_30b(), changes)
}

fn gpt_oss(layers: usize, experts: usize) -> Value {
    let kinds = ["sliding_attention", "full_attention"];
    let unquantised =
        ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"];
    let fields = json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": true,
        "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880, "initial_context_length": 4096,
        "intermediate_size": 2880, "layer_types": (0..layers).map(|layer| kinds[layer % 2]).collect::<Vec<_>>(),
        "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
        "num_hidden_layers": layers, "num_key_value_heads": 8, "num_local_experts": experts,
        "quantization_config": {"modules_to_not_convert": unquantised, "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": false,
        },
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "vocab_size": 201088,
    });
    with(gqa(), fields)
}

fn glm_4_5() -> Value {
    let fields = json!({
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": true,
        "first_k_dense_replace": 3, "head_dim": 128, "hidden_size": 5120, "intermediate_size": 12288,
        "max_position_embeddings": 131072, "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 160,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 96, "num_experts_per_tok": 8,
        "num_hidden_layers": 92, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 1000000, "routed_scaling_factor": 2.5,
        "topk_group": 1, "use_qk_norm": true, "vocab_size": 151552,
    });
    with(gqa(), fields)
}

fn glm_4_5_air() -> Value {
    let changes = json!({
        "first_k_dense_replace": 1, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_routed_experts": 128, "num_hidden_layers": 46, "routed_scaling_factor": 1.0, "use_qk_norm": false,
    });
    with(glm_4_5(), changes)
}

fn minimax_m2() -> Value {
    let unquantised = json!({"modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]});
    let fields = json!({
        "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "attn_type_list": vec![1; 62],
        "head_dim": 128, "hidden_size": 3072, "intermediate_size": 1536, "max_position_embeddings": 196608,
        "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
        "num_local_experts": 256, "num_mtp_modules": 3, "qk_norm_type": "per_layer",
        "quantization_config": with(fp8(), unquantised), "rms_norm_eps": 1e-6, "rope_theta": 5000000,
        "rotary_dim": 64, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "scoring_func": "sigmoid",
        "shared_intermediate_size": 0, "use_mtp": true, "use_qk_norm": true, "use_routing_bias": true,
        "vocab_size": 200064,
    });
    with(gqa(), fields)
}

fn mixtral_8x7b() -> Value {
    let fields = json!({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
        "vocab_size": 32000,
    });
    let mut config = with(gqa(), fields);
    if let Some(config) = config.as_object_mut() {
        config.remove("rope_scaling");
    }
    config
}

fn olmoe() -> Value {
    let fields = json!({
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": false, "clip_qkv": null,
        "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": false,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
        "vocab_size": 50304,
    });
    with(gqa(), fields)
}
