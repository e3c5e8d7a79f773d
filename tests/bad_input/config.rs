//! `config.json` and `generation_config.json`.

use std::time::{Duration, Instant};

use models::manifest::manifest;
use moebius::loaded::Loaded;
use serde_json::{Value, json};

use crate::tiny::{self, Tiny};

/// The families with weights, and the configuration of a tiny checkpoint of each.
const CASES: [&str; 16] = [
    "deepseek_v2",
    "deepseek_v3_groups",
    "deepseek_v3_k2",
    "ernie4_5_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss_bf16",
    "gpt_oss_mxfp4",
    "hunyuan_v1_moe",
    "kimi_k25_int4",
    "kimi_k2_fp8",
    "kimi_k2_int4",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen3_moe",
];

pub fn golden(case: &str) -> Value {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case);
    serde_json::from_slice(&std::fs::read(path.join("config.json")).unwrap()).unwrap()
}

/// Describes the model and lists its tensors.
fn describe(config: &Value) -> Result<usize, String> {
    let description = models::arch::describe(config).map_err(|error| error.to_string())?;
    let tensors = manifest(&description, &|_| false).map_err(|error| error.to_string())?;
    Ok(tensors.len())
}

/// Fields of `change` replace those of `config`; objects are merged.
fn merge(config: &mut Value, change: &Value) {
    match (config, change) {
        (Value::Object(fields), Value::Object(change)) => {
            for (name, value) in change {
                merge(fields.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (place, value) => *place = value.clone(),
    }
}

#[test]
fn a_bad_field_is_named() {
    let yarn = |more: Value| {
        let mut scaling = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
        merge(&mut scaling, &more);
        json!({ "rope_scaling": scaling })
    };
    let int4 =
        |weights: Value| json!({"quantization_config": {"config_groups": {"group_0": {"weights": weights}}}});
    let half = u64::MAX / 2 + 1;
    #[rustfmt::skip]
    let cases: Vec<(&str, Value, &str)> = vec![
        ("mixtral", json!({"model_type": null}), "model_type: is missing"),
        ("mixtral", json!({"model_type": 5}), "model_type: is missing"),
        ("mixtral", json!({"model_type": "llama"}), "model_type: \"llama\" is not supported (deepseek_v2, "),
        // Counts and widths.
        ("mixtral", json!({"hidden_size": null}), "hidden_size: is missing"),
        ("mixtral", json!({"hidden_size": 0}), "hidden_size: must be at least 1"),
        ("mixtral", json!({"hidden_size": -8}), "hidden_size: -8 is not a non-negative whole number"),
        ("mixtral", json!({"hidden_size": 2.5}), "hidden_size: 2.5 is not a non-negative whole number"),
        ("mixtral", json!({"hidden_size": "64"}), "hidden_size: \"64\" is not a non-negative whole number"),
        ("mixtral", json!({"hidden_size": [64]}), "hidden_size: [64] is not a non-negative whole number"),
        ("mixtral", json!({"hidden_size": true}), "hidden_size: true is not a non-negative whole number"),
        ("mixtral", json!({"hidden_size": half}), "hidden_size: 9223372036854775808 is over the limit"),
        ("mixtral", json!({"hidden_size": 1e300}), "hidden_size: 18446744073709551615 is over the limit"),
        ("mixtral", json!({"hidden_size": 2147483648u32, "vocab_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1}), "rope_theta: "),
        ("mixtral", json!({"hidden_size": 65}), "head_dim: is missing and does not follow"),
        ("mixtral", json!({"vocab_size": half}), "vocab_size: 9223372036854775808 is over the limit"),
        ("mixtral", json!({"vocab_size": 0}), "vocab_size: must be at least 1"),
        ("mixtral", json!({"max_position_embeddings": 0}), "max_position_embeddings: must be at least 1"),
        ("mixtral", json!({"max_position_embeddings": half}), "max_position_embeddings: "),
        ("mixtral", json!({"num_hidden_layers": 1_000_000_000}), "num_hidden_layers: 1000000000 is over the limit of 4096"),
        ("mixtral", json!({"num_hidden_layers": half}), "num_hidden_layers: "),
        ("mixtral", json!({"num_hidden_layers": 0}), "num_hidden_layers: must be at least 1"),
        ("mixtral", json!({"intermediate_size": 2147483648u32, "num_local_experts": 4096}), "the configuration asks for more than"),
        ("mixtral", json!({"num_local_experts": 4096, "num_hidden_layers": 4096}), "the configuration asks for more than 1048576 tensors"),
        ("mixtral", json!({"num_local_experts": 2147483648u32}), "num_local_experts: 2147483648 in a layer are over the limit of 4096"),
        ("hunyuan_v1_moe", json!({"num_experts": 2147483648u32}), "num_experts: 2147483648 in a layer are over the limit of 4096"),
        ("gpt_oss_mxfp4", json!({"intermediate_size": 2147483648u32, "hidden_size": 2147483648u32}), "the configuration asks for more than"),
        ("kimi_k2", json!({"num_attention_heads": 2147483648u32, "qk_nope_head_dim": 2147483648u32, "v_head_dim": 2147483648u32}), "the configuration asks for more than"),
        // Heads and rotation.
        ("mixtral", json!({"num_attention_heads": 0}), "num_attention_heads: must be at least 1"),
        ("mixtral", json!({"num_key_value_heads": 0}), "num_key_value_heads: 0 does not divide the 4 query heads"),
        ("mixtral", json!({"num_key_value_heads": 3}), "num_key_value_heads: 3 does not divide the 4 query heads"),
        ("mixtral", json!({"num_key_value_heads": 8}), "num_key_value_heads: 8 does not divide the 4 query heads"),
        ("mixtral", json!({"head_dim": 0}), "over 0 values cannot be rotated"),
        ("mixtral", json!({"head_dim": 7}), "over 7 values cannot be rotated"),
        ("mixtral", json!({"head_dim": 2147483648u32}), "over 2147483648 values cannot be rotated"),
        ("minimax_m2", json!({"rotary_dim": 4096}), "4096 rotated values are more than a head's"),
        ("minimax_m2", json!({"rotary_dim": -2}), "rotary_dim: -2 is not"),
        ("glm4_moe", json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor: 1.5 is no share of a head"),
        ("glm4_moe", json!({"partial_rotary_factor": -0.5}), "partial_rotary_factor: -0.5 is no share of a head"),
        ("glm4_moe", json!({"partial_rotary_factor": "half"}), "partial_rotary_factor: \"half\" is not a number"),
        ("kimi_k2", json!({"qk_rope_head_dim": 15}), "over 15 values cannot be rotated"),
        ("kimi_k2", json!({"qk_head_dim": 5}), "qk_head_dim: 5 is not supported"),
        ("mixtral", json!({"sliding_window": 0}), "sliding_window: must be at least 1"),
        ("mixtral", json!({"sliding_window": -1}), "sliding_window: -1 is not"),
        ("mixtral", json!({"rope_theta": 0}), "rope_theta: theta 0 over"),
        ("mixtral", json!({"rope_theta": -1e4}), "rope_theta: theta -10000 over"),
        ("mixtral", json!({"rope_theta": 1e300}), "rope_theta: 1e300 is out of range"),
        ("mixtral", json!({"rope_theta": "NaN"}), "rope_theta: \"NaN\" is not a number"),
        ("mixtral", json!({"rope_scaling": "yarn"}), "rope_scaling: is not an object"),
        ("mixtral", json!({"rope_scaling": {"type": "longrope", "factor": 2.0}}), "rope_scaling.rope_type: \"longrope\" is not supported"),
        ("mixtral", json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}), "rope_scaling.rope_type: \"dynamic\" is not supported"),
        ("mixtral", json!({"rope_scaling": {"rope_type": 5}}), "rope_scaling.rope_type: 5 is not a text"),
        ("mixtral", json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor: is missing"),
        ("mixtral", json!({"rope_scaling": {"type": "linear", "factor": 0.0}}), "rope_scaling.factor: 0 must be positive"),
        ("mixtral", json!({"rope_scaling": {"type": "linear", "factor": 1e-300}}), "rope_scaling.factor: gives frequencies"),
        ("mixtral", json!({"rope_scaling": {"type": "default", "more": 3}}), "rope_scaling.more: 3 is not understood"),
        ("mixtral", json!({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}), "rope_parameters.low_freq_factor: is missing"),
        ("mixtral", yarn(json!({"factor": -4.0})), "rope_scaling.factor: -4 must be positive"),
        ("mixtral", yarn(json!({"factor": 1e-60})), "rope_scaling.factor: gives frequencies"),
        ("mixtral", yarn(json!({"original_max_position_embeddings": 0})), "original_max_position_embeddings: 0 must be positive"),
        ("mixtral", yarn(json!({"beta_fast": "fast"})), "rope_scaling.beta_fast: \"fast\" is not a number"),
        ("mixtral", yarn(json!({"attention_factor": 1e300})), "rope_scaling.attention_factor: 1e300 is out of range"),
        ("mixtral", yarn(json!({"mscale": 1.0, "mscale_all_dim": 1e300})), "rope_scaling.mscale_all_dim: 1e300 is out of range"),
        // Experts and layers.
        ("mixtral", json!({"num_experts_per_tok": 9}), "num_experts_per_tok: 9 of 8 experts cannot be chosen"),
        ("mixtral", json!({"num_experts_per_tok": 0}), "num_experts_per_tok: must be at least 1"),
        ("ernie4_5_moe", json!({"moe_k": 1000}), "moe_k: 1000 of "),
        ("hunyuan_v1_moe", json!({"moe_topk": 1000}), "moe_topk: 1000 of "),
        ("hunyuan_v1_moe", json!({"moe_topk": [2]}), "moe_topk: has 1 entries for 3 layers"),
        ("hunyuan_v1_moe", json!({"num_experts": [8, "8", 8]}), "num_experts: holds something that is not a positive"),
        ("deepseek_v3_groups", json!({"n_group": 3}), "n_group: 3 groups of "),
        ("deepseek_v3_groups", json!({"n_group": 1, "topk_group": 2}), "topk_group: 2 of 1 groups cannot be kept"),
        ("deepseek_v3_groups", json!({"topk_group": 0}), "topk_group: 0 of "),
        ("deepseek_v3_groups", json!({"n_group": 0}), "topk_group: "),
        ("deepseek_v3_groups", json!({"scoring_func": "tanh"}), "scoring_func: \"tanh\" is not supported"),
        ("deepseek_v2", json!({"topk_method": "noaux_tc"}), "topk_method: \"noaux_tc\" is not supported"),
        ("kimi_k2", json!({"moe_layer_freq": [1, 1]}), "moe_layer_freq: [1,1] is neither"),
        ("kimi_k2", json!({"moe_layer_freq": [0, 1, "x"]}), "moe_layer_freq: "),
        ("kimi_k2", json!({"moe_layer_freq": 0}), "moe_layer_freq: must be at least 1"),
        ("kimi_k2", json!({"routed_scaling_factor": 1e300}), "routed_scaling_factor: 1e300 is out of range"),
        ("gpt_oss_bf16", json!({"layer_types": ["full_attention"]}), "layer_types: must name full_attention or sliding_attention for every layer"),
        ("gpt_oss_bf16", json!({"layer_types": ["linear", "linear", "linear", "linear"]}), "layer_types: must name"),
        ("gpt_oss_bf16", json!({"layer_types": 5}), "layer_types: must name"),
        ("minimax_m2", json!({"attn_type_list": [1]}), "attn_type_list: must be 1 (full attention) for every layer"),
        ("minimax_m2", json!({"attn_type_list": [1, 0, 1]}), "attn_type_list: must be 1"),
        ("qwen3_moe", json!({"mlp_only_layers": "0"}), "mlp_only_layers: \"0\" is no list of layers"),
        ("qwen3_moe", json!({"mlp_only_layers": [-1]}), "mlp_only_layers: [-1] is no list of layers"),
        ("qwen3_moe", json!({"norm_topk_prob": "yes"}), "norm_topk_prob: \"yes\" is neither true nor false"),
        ("qwen3_moe", json!({"hidden_act": "relu"}), "hidden_act: \"relu\" is not supported"),
        ("olmoe", json!({"clip_qkv": 8.0}), "clip_qkv: 8.0 is not supported (only null)"),
        ("mixtral", json!({"rms_norm_eps": -1e-6}), "rms_norm_eps: -0.000001 is negative"),
        ("mixtral", json!({"rms_norm_eps": 1e300}), "rms_norm_eps: 1e300 is out of range"),
        // What nobody has heard of.
        ("mixtral", json!({"new_trick": true}), "new_trick: true is not understood and may change what the model computes"),
        ("mixtral", json!({"new_trick": {"deep": "x".repeat(1 << 20)}}), "is not understood"),
        ("kimi_k25_int4", json!({"new_trick": 2}), "config.json: new_trick: 2 is not understood"),
        ("kimi_k25_int4", json!({"text_config": {"new_trick": 2}}), "text_config.new_trick: 2 is not understood"),
        ("kimi_k25_int4", json!({"text_config": {"hidden_size": -1}}), "text_config.hidden_size: -1"),
        ("kimi_k25_int4", json!({"text_config": 5}), "text_config.model_type"),
        ("kimi_k25_int4", json!({"text_config": {"model_type": "kimi_k25"}}), "text_config.model_type"),
        // Formats of weights.
        ("mixtral", json!({"quantization_config": "fp8"}), "quantization_config.quant_method: is missing"),
        ("mixtral", json!({"quantization_config": {"quant_method": "awq"}}), "quantization_config.quant_method: \"awq\" is not supported"),
        ("mixtral", json!({"quantization_config": {"quant_method": "bitsandbytes"}}), "quant_method: \"bitsandbytes\" is not supported"),
        ("mixtral", json!({"quantization_config": {"quant_method": "fp8"}}), "quantization_config.weight_block_size: only [128, 128]"),
        ("mixtral", json!({"quantization_config": {"quant_method": "mxfp4"}}), "MXFP4 is supported for fused experts only"),
        ("kimi_k2_fp8", json!({"quantization_config": {"weight_block_size": [64, 64]}}), "weight_block_size: only [128, 128] is supported, not [64,64]"),
        ("kimi_k2_fp8", json!({"quantization_config": {"fmt": "e5m2"}}), "quantization_config.fmt: \"e5m2\" is not supported"),
        ("kimi_k2_int4", json!({"quantization_config": {"format": "int-quantized"}}), "quantization_config.format: \"int-quantized\" is not supported"),
        ("kimi_k2_int4", json!({"quantization_config": {"config_groups": null}}), "quantization_config.config_groups: is missing or empty"),
        ("kimi_k2_int4", json!({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}), "quantization_config.kv_cache_scheme: must be null"),
        ("kimi_k2_int4", json!({"quantization_config": {"ignore": "lm_head"}}), "quantization_config.ignore: is not a list"),
        ("kimi_k2_int4", json!({"quantization_config": {"ignore": [5]}}), "quantization_config.ignore: holds a non-string"),
        ("kimi_k2_int4", json!({"quantization_config": {"ignore": ["re:("]}}), "quantization_config.ignore: \"re:(\" cannot be used"),
        ("kimi_k2_int4", json!({"quantization_config": {"ignore": ["re:(((a{99}){99}){99}){99}"]}}), "quantization_config.ignore: "),
        ("kimi_k2_int4", json!({"quantization_config": {"ignore": vec!["re:a*"; 300]}}), "quantization_config.ignore: has more than 256 patterns"),
        ("kimi_k2_int4", json!({"moe_intermediate_size": 40}), "has 40 columns, which are no whole groups of 32"),
        ("kimi_k2_int4", int4(json!({"num_bits": 8})), "config_groups.group_0.weights.num_bits: 8 is not supported (only 4)"),
        ("kimi_k2_int4", int4(json!({"group_size": 128})), "weights.group_size: 128 is not supported (only 32)"),
        ("kimi_k2_int4", int4(json!({"symmetric": false})), "weights.symmetric: false is not supported"),
        ("kimi_k2_int4", int4(json!({"strategy": "channel"})), "weights.strategy: \"channel\" is not supported"),
        ("kimi_k2_int4", int4(json!({"actorder": "group"})), "weights.actorder: is not supported"),
        ("gpt_oss_mxfp4", json!({"hidden_size": 100, "head_dim": 16}), "has 100 columns, which are no whole groups of 32"),
    ];
    for (case, change, words) in cases {
        let mut config = golden(case);
        merge(&mut config, &change);
        let change = change.to_string();
        let what = format!("{case} with {}", &change[..change.len().min(200)]);
        let begun = Instant::now();
        let message = describe(&config).expect_err(&what);
        assert!(message.contains(words), "{what}: no {words:?} in {message}");
        assert!(message.len() < 2000, "{what}: a message of {} bytes", message.len());
        assert!(begun.elapsed() < Duration::from_secs(10), "{what}: {:?}", begun.elapsed());
    }
}

#[test]
fn what_is_off_or_does_not_matter_is_accepted() {
    for off in [json!(null), json!(false), json!(0), json!(0.0), json!(""), json!([]), json!({})] {
        let mut config = golden("mixtral");
        config["new_trick"] = off;
        describe(&config).unwrap();
    }
    for (name, value) in
        [("hidden_size", json!(64.0)), ("torch_dtype", json!("float64")), ("auto_map", json!({"a": "b"}))]
    {
        let mut config = golden("mixtral");
        config[name] = value;
        describe(&config).unwrap();
    }
}

/// Every field of every family, each with every kind of wrong value: described or refused, and a wrong type is refused
/// by name unless the field does not matter.
#[test]
fn any_value_in_any_field_is_described_or_refused() {
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1),
        json!(2),
        json!(7),
        json!(1u32 << 31),
        json!(1u64 << 63),
        json!(0.5),
        json!(-1e300),
        json!(1e300),
        json!(1e-300),
        json!([]),
        json!([1, -1, "x"]),
        json!(vec![1; 3]),
        json!("re:(.*)*"),
        json!({"type": "yarn", "factor": 1e-40}),
    ];
    for case in CASES {
        let config = golden(case);
        describe(&config).unwrap_or_else(|error| panic!("{case}: {error}"));
        let mut places = Vec::new();
        collect(&config, &mut String::new(), &mut places);
        for place in places {
            let mut changed = config.clone();
            for value in &values {
                *changed.pointer_mut(&place).unwrap() = value.clone();
                let begun = Instant::now();
                let _ = describe(&changed);
                assert!(
                    begun.elapsed() < Duration::from_secs(10),
                    "{case}: {place} = {value}: {:?}",
                    begun.elapsed()
                );
            }
            *changed.pointer_mut(&place).unwrap() = json!({"wrong": ["type"]});
            let name = place.rsplit('/').find(|part| part.parse::<usize>().is_err()).unwrap_or_default();
            if let Err(message) = describe(&changed) {
                assert!(message.contains(name), "{case}: {place} of another type: {message}");
            }
        }
    }
}

/// JSON pointers to every value below `value`.
fn collect(value: &Value, path: &mut String, places: &mut Vec<String>) {
    let mut visit = |key: &str, value: &Value| {
        let len = path.len();
        path.push('/');
        path.push_str(key);
        places.push(path.clone());
        collect(value, path, places);
        path.truncate(len);
    };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| visit(key, value)),
        Value::Array(list) => list.iter().enumerate().for_each(|(i, value)| visit(&i.to_string(), value)),
        _ => {}
    }
}

#[test]
fn a_configuration_cut_at_any_byte_is_refused() {
    let tiny = Tiny::new(tiny::mixtral());
    let folder = tiny.folder();
    let whole = tiny.config.to_string();
    for end in 0..whole.len() {
        folder.write("config.json", &whole[..end]);
        tiny::refused(&folder, &format!("cut at {end}"), "config.json: ");
    }
    for (text, words) in [
        ("null", "model_type: is missing"),
        ("[]", "model_type: is missing"),
        ("NaN", "config.json: expected value"),
        (r#"{"hidden_size": NaN}"#, "config.json: expected value"),
        (r#"{"hidden_size": Infinity}"#, "config.json: expected value"),
        (r#"{"hidden_size": 1e999}"#, "config.json: number out of range"),
        ("{} {}", "config.json: trailing characters"),
        ("\u{feff}{}", "config.json: expected value"),
        (&"[".repeat(1 << 20), "config.json: recursion limit"),
        (&"{\"a\":".repeat(1 << 18), "config.json: recursion limit"),
    ] {
        folder.write("config.json", text);
        tiny::refused(&folder, &text[..text.len().min(40)], words);
    }
    folder.write("config.json", format!("[{}0]", "0,".repeat(5 << 20)));
    tiny::refused(&folder, "ten million numbers", "config.json: has 10485763 bytes; the limit is 8388608");
    folder.write("config.json", b"{\"model_type\": \"\xff\"}");
    tiny::refused(&folder, "not UTF-8", "config.json: invalid unicode");
}

/// What the program says to numbers that ask for all memory there is.
#[test]
fn a_huge_model_takes_no_memory() {
    let tiny = Tiny::new(tiny::mixtral());
    let folder = tiny.folder();
    let cases = [
        (json!({"num_hidden_layers": 1_000_000_000}), "num_hidden_layers"),
        (json!({"num_hidden_layers": 4096}), "is missing"),
        (json!({"num_local_experts": 1u32 << 31}), "num_local_experts"),
        (json!({"num_local_experts": 4096, "num_hidden_layers": 4096}), "1048576 tensors"),
        (json!({"hidden_size": 1u32 << 31}), "rope_theta"),
        (json!({"hidden_size": 1u32 << 31, "head_dim": 2}), "model.embed_tokens.weight"),
        (json!({"vocab_size": 1u32 << 31}), "model.embed_tokens.weight"),
        (
            json!({"intermediate_size": 1u32 << 31}),
            "has shape [16, 32], the configuration asks for [2147483648, 32]",
        ),
        (json!({"num_attention_heads": 1u32 << 31, "head_dim": 4096}), "self_attn.q_proj.weight"),
    ];
    for (change, words) in cases {
        let mut config = tiny.config.clone();
        merge(&mut config, &change);
        folder.write("config.json", config.to_string());
        tiny::refuses(&folder, &[words]);
    }
}

#[test]
fn generation_defaults_are_checked() {
    let folder = Tiny::new(tiny::mixtral()).folder();
    let place = folder.path().to_str().unwrap();
    let open = |text: &str| {
        folder.write("generation_config.json", text);
        Loaded::open(place).map(|loaded| loaded.defaults).map_err(|error| error.to_string())
    };
    let whole = r#"{"do_sample": true, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "eos_token_id": [5, 6, 99999]}"#;
    assert_eq!(open(whole).unwrap().stop_token_ids, [5, 6]);
    for end in 0..whole.len() {
        let message = open(&whole[..end]).expect_err("cut");
        assert!(message.contains("generation_config.json: "), "cut at {end}: {message}");
    }
    for (name, value) in [
        ("temperature", json!(-1)),
        ("temperature", json!(1e300)),
        ("temperature", json!("hot")),
        ("top_p", json!(1.5)),
        ("top_p", json!(-0.1)),
        ("top_k", json!(-1)),
        ("top_k", json!(1u64 << 63)),
        ("min_p", json!([0.5])),
        ("repetition_penalty", json!(0)),
        ("repetition_penalty", json!(-2)),
        ("max_new_tokens", json!(0)),
        ("max_new_tokens", json!(-5)),
        ("max_new_tokens", json!(1u64 << 63)),
    ] {
        let message = open(&json!({ name: value }).to_string()).expect_err(name);
        assert!(message.contains("generation_config.json: ") && message.contains(name), "{name}: {message}");
    }
    for ids in [json!(1u64 << 63), json!("x"), json!(1.5), json!([5, null]), json!([-1])] {
        let message = open(&json!({ "eos_token_id": ids }).to_string()).expect_err("no ids");
        assert!(message.contains("generation_config.json: eos_token_id"), "{ids}: {message}");
    }
    for ids in [json!(-1), json!(260), json!([]), json!(null)] {
        assert!(
            open(&json!({ "eos_token_id": ids }).to_string()).unwrap().stop_token_ids.is_empty(),
            "{ids}"
        );
    }
}
