//! Sizes that no maker chose and no rule forbids: what describes itself consistently runs.

use serde_json::{Value, json};

use crate::config::golden;
use crate::tiny::{self, Tiny};

fn changed(case: &str, change: Value) -> Value {
    let mut config = golden(case);
    let fields = config.as_object_mut().unwrap();
    fields.extend(change.as_object().unwrap().clone());
    fields.insert("vocab_size".into(), 257.into());
    config
}

#[test]
fn odd_sizes_run_on_both_runners() {
    let configs = [
        changed(
            "mixtral",
            json!({"hidden_size": 6, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 1, "num_local_experts": 1, "num_experts_per_tok": 1}),
        ),
        changed(
            "mixtral",
            json!({"hidden_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 3, "sliding_window": 1}),
        ),
        changed(
            "qwen3_moe",
            json!({"hidden_size": 33, "head_dim": 10, "num_attention_heads": 5, "num_key_value_heads": 5, "moe_intermediate_size": 7, "num_experts": 3, "num_experts_per_tok": 3}),
        ),
        changed(
            "qwen3_moe",
            json!({"hidden_size": 1, "head_dim": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "moe_intermediate_size": 1, "mlp_only_layers": [1], "intermediate_size": 1}),
        ),
        changed(
            "olmoe",
            json!({"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 5}),
        ),
        changed(
            "glm4_moe",
            json!({"hidden_size": 17, "head_dim": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 3, "intermediate_size": 9}),
        ),
        changed(
            "minimax_m2",
            json!({"hidden_size": 31, "head_dim": 6, "rotary_dim": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 2}),
        ),
        changed(
            "kimi_k2",
            json!({"hidden_size": 9, "num_attention_heads": 3, "q_lora_rank": 5, "kv_lora_rank": 3, "qk_nope_head_dim": 1, "qk_rope_head_dim": 2, "v_head_dim": 1, "moe_intermediate_size": 3, "intermediate_size": 1}),
        ),
        changed(
            "kimi_k2_fp8",
            json!({"hidden_size": 129, "num_attention_heads": 3, "q_lora_rank": 7, "kv_lora_rank": 127, "qk_nope_head_dim": 3, "qk_rope_head_dim": 6, "v_head_dim": 5, "moe_intermediate_size": 131, "intermediate_size": 1}),
        ),
        changed(
            "kimi_k2_int4",
            json!({"hidden_size": 96, "num_attention_heads": 1, "kv_lora_rank": 33, "moe_intermediate_size": 32, "n_routed_experts": 5, "num_experts_per_tok": 5}),
        ),
        changed(
            "deepseek_v3_groups",
            json!({"n_group": 8, "topk_group": 3, "n_routed_experts": 8, "num_experts_per_tok": 3}),
        ),
        changed(
            "deepseek_v2",
            json!({"hidden_size": 5, "num_attention_heads": 1, "kv_lora_rank": 1, "qk_nope_head_dim": 1, "qk_rope_head_dim": 2, "v_head_dim": 1}),
        ),
        changed(
            "gpt_oss_mxfp4",
            json!({"hidden_size": 32, "intermediate_size": 32, "head_dim": 2, "num_attention_heads": 3, "num_key_value_heads": 3, "sliding_window": 2}),
        ),
        changed(
            "gpt_oss_bf16",
            json!({"hidden_size": 7, "intermediate_size": 3, "head_dim": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 1}),
        ),
        changed(
            "ernie4_5_moe",
            json!({"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 3, "intermediate_size": 5}),
        ),
        changed(
            "hunyuan_v1_moe",
            json!({"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 3}),
        ),
    ];
    for config in configs {
        println!("{config}");
        let folder = Tiny::new(config).folder();
        let place = folder.path().to_str().unwrap();
        tiny::moebius_unlimited(&["inspect", place]).succeeds();
        let check = tiny::moebius_unlimited(&["check", place, "--prompt", "The quick brown fox"]);
        check.succeeds();
    }
}

#[test]
fn the_vocabulary_must_not_exceed_the_embedding() {
    let mut config = tiny::mixtral();
    config["vocab_size"] = 255.into();
    let folder = Tiny::new(config.clone()).folder();
    let place = folder.path().to_str().unwrap();
    let words = "the tokenizer has 256 ids, the embedding 255 rows";
    for command in ["run", "check"] {
        tiny::moebius(&[command, place, if command == "run" { "x" } else { "--json" }]).fails(1, &[words]);
    }
    config["vocab_size"] = 300.into();
    let folder = Tiny::new(config).folder();
    let run = ["run", folder.path().to_str().unwrap(), "x", "--raw", "--max-tokens", "2"];
    tiny::moebius_unlimited(&run).succeeds();
}
