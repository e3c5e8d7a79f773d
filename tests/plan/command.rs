//! `moebius plan`, and the flags of the KV cache.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::{K2, Temp, case};

fn moebius(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moebius")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
pub fn plan(args: &[&str]) -> Value {
    let output = moebius(&[&["plan", "--json", "--quick"], args].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn fails(args: &[&str], status: i32, message: &str) {
    let output = moebius(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {text}");
    assert!(text.contains(message) && !text.contains("panicked"), "{args:?}: {text}");
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn the_object_has_these_keys() {
    let object = plan(&["demo"]);
    let top = [
        "model",
        "model_type",
        "source",
        "parameters",
        "active_parameters",
        "numerics",
        "threads",
        "parallel",
        "context",
        "model_context",
        "fits",
        "refused",
        "residency",
        "weights",
        "kv",
        "memory",
        "speed",
    ];
    assert_eq!(keys(&object), top);
    let weights = [
        "bytes",
        "by_kind",
        "index_total_bytes",
        "index_unread_tensors",
        "mapped_bytes",
        "copied_bytes",
        "trunk_bytes",
        "expert_bytes",
        "bytes_per_token",
        "expert_bytes_per_token",
    ];
    assert_eq!(keys(&object["weights"]), weights);
    let kv = [
        "type",
        "bytes_per_token",
        "window_bytes_per_token",
        "window_tokens",
        "bytes_per_context",
        "pool_bytes",
        "pool_tokens",
        "pool_contexts",
    ];
    assert_eq!(keys(&object["kv"]), kv);
    assert_eq!(
        keys(&object["memory"]),
        ["scratch_bytes", "staging_bytes", "required_bytes", "available_bytes"]
    );
    let speed = [
        "read_bandwidth",
        "arithmetic",
        "arithmetic_peak",
        "decode_bound",
        "decode_bound_at_context",
        "prefill_bound",
        "disk_bytes_per_token_worst",
        "disk_bytes_per_token_mean",
        "decode_bound_per_disk_gb",
        "prefill_bound_per_disk_gb",
    ];
    assert_eq!(keys(&object["speed"]), speed);
    assert_eq!((&object["source"], &object["fits"]), (&json!("files"), &json!(true)));
    assert_eq!((&object["parallel"], &object["numerics"]), (&json!(1), &json!("model")));
    let decode = object["speed"]["decode_bound"].as_f64().unwrap();
    assert!(decode > object["speed"]["decode_bound_at_context"].as_f64().unwrap());
    let coarse = plan(&["demo", "--dense-format", "q8", "--parallel", "3", "--kv-type", "f32"]);
    assert_eq!((&coarse["parallel"], &coarse["numerics"]), (&json!(3), &json!("model+q8-dense")));
    assert_eq!((&coarse["kv"]["type"], &coarse["kv"]["pool_contexts"]), (&json!("f32"), &json!(3)));
    let bytes = |object: &Value, key: &str| object["weights"][key].as_u64().unwrap();
    assert!(bytes(&coarse, "bytes_per_token") < bytes(&object, "bytes_per_token"));
}

/// What is planned is what runs.
#[test]
fn a_run_takes_what_the_plan_says() {
    let folder = case("gpt_oss_mxfp4");
    for args in [&[][..], &["--context", "500"], &["--kv-memory", "300KiB"], &["--kv-type", "f32"]] {
        let object = plan(&[&[folder.as_str()], args].concat());
        let run = moebius(&[&["run", &folder, "x", "--raw", "--max-tokens", "1"], args].concat());
        let line = stderr(&run);
        let bytes = moebius::memory::Bytes(object["kv"]["pool_bytes"].as_u64().unwrap() as usize);
        let tokens = moebius::memory::Count(object["kv"]["pool_tokens"].as_u64().unwrap() as usize);
        let name = object["kv"]["type"].as_str().unwrap();
        assert!(line.contains(&format!("KV pool {bytes} ({tokens} tokens, {name})")), "{line}: {object}");
        assert!(line.contains(&format!("context {} tokens", object["context"])), "{line}: {object}");
    }
}

#[test]
fn a_model_that_is_not_there_is_planned_from_its_names() {
    for name in ["kimi_k25_int4", "gpt_oss_mxfp4", "deepseek_v3_groups", "qwen3_moe"] {
        let (folder, temp) = (case(name), Temp::new(name));
        let files = ["config.json", "model.safetensors.index.json"];
        for file in files {
            std::fs::copy(Path::new(&folder).join(file), temp.0.join(file)).unwrap();
        }
        let (here, names) = (plan(&[&folder]), plan(&[temp.0.to_str().unwrap()]));
        assert_eq!((&here["source"], &names["source"]), (&json!("files"), &json!("index")));
        for key in ["parameters", "active_parameters", "context", "kv"] {
            assert_eq!(here[key], names[key], "{name} {key}");
        }
        let bytes = |object: &Value| object["weights"]["bytes"].as_u64().unwrap();
        // Some vectors are f32 in the files, and the shapes of packed weights have 32 or 64 bits.
        assert!(bytes(&here).abs_diff(bytes(&names)) * 50 <= bytes(&here), "{name}: {here} {names}");
        let config = temp.0.join("config.json");
        let mut from_path = plan(&[config.to_str().unwrap()]);
        from_path["model"] = names["model"].clone();
        assert_eq!(from_path["weights"], names["weights"]);
        std::fs::remove_file(temp.0.join(files[1])).unwrap();
        let alone = plan(&[config.to_str().unwrap()]);
        assert_eq!(
            (&alone["source"], &alone["weights"]["bytes"]),
            (&json!("config"), &names["weights"]["bytes"])
        );
        assert_eq!(plan(&[temp.0.to_str().unwrap()])["source"], "config");
    }
}

#[test]
fn an_index_that_contradicts_the_configuration_is_named() {
    let (folder, temp) = (case("deepseek_v3_groups"), Temp::new("index"));
    std::fs::copy(Path::new(&folder).join("config.json"), temp.0.join("config.json")).unwrap();
    let name = "model.safetensors.index.json";
    let text = std::fs::read_to_string(Path::new(&folder).join(name)).unwrap();
    let place = temp.0.to_str().unwrap();
    let index = temp.0.join(name);
    let mut object: Value = serde_json::from_str(&text).unwrap();
    object["metadata"]["total_size"] = json!("123456789012");
    std::fs::write(&index, object.to_string()).unwrap();
    let planned = plan(&[place]);
    assert_eq!(planned["weights"]["index_total_bytes"], 123_456_789_012u64);
    assert!(planned["weights"]["index_unread_tensors"].as_u64().unwrap() > 0, "prediction layers: {planned}");
    object["weight_map"].as_object_mut().unwrap().remove("model.norm.weight").unwrap();
    std::fs::write(&index, object.to_string()).unwrap();
    fails(&["plan", place], 1, "model.norm.weight is missing");
    for end in [0, 1, text.len() / 2, text.len() - 2] {
        std::fs::write(&index, &text[..end]).unwrap();
        fails(&["plan", place], 1, name);
    }
    std::fs::write(&index, "{\"weight_map\": {\"model.norm.weight\": 7}}").unwrap();
    fails(&["plan", place], 1, name);
    std::fs::write(temp.0.join("config.json"), "{").unwrap();
    fails(&["plan", temp.0.join("config.json").to_str().unwrap()], 1, "config.json");
}

#[test]
fn large_models_are_planned_anywhere() {
    let object = plan(&[K2]);
    assert_eq!((&object["source"], &object["model_type"]), (&json!("config"), &json!("kimi_k2")));
    assert_eq!(object["kv"]["bytes_per_token"], 70_272);
    assert_eq!(plan(&["full:moonshotai/Kimi-K2-Thinking"])["parameters"], object["parameters"]);
    // No machine that runs tests has 512 GiB to spare for a pool of 2,600 contexts of 32 bits.
    let pool = plan(&[K2, "--kv-memory", "90TiB"]);
    assert_eq!(pool["fits"], false);
    assert!(pool["refused"].as_str().unwrap().contains("are available"), "{pool}");
    let table = moebius(&["plan", K2, "--quick", "--kv-memory", "90TiB"]);
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("fits           no: ") && text.contains("routed experts"), "{text}");
    assert!(text.contains("not promises"), "{text}");
}

#[test]
fn plan_names_what_it_cannot_plan() {
    fails(&["plan", "/nowhere/at/all"], 1, "no such file or folder");
    fails(&["plan", "full:nobody-nothing"], 1, "full:nobody-nothing");
    fails(&["plan", "demo", "--context", "999999"], 1, "--context 999999");
    fails(&["plan", "demo", "--kv-memory", "100"], 1, "holds no block of 64 tokens");
    let temp = Temp::new("cache");
    let output = Command::new(env!("CARGO_BIN_EXE_moebius"))
        .args(["plan", "some-org/some-model"])
        .env_remove("HF_HUB_CACHE")
        .env("HF_HOME", &temp.0)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("some-org/some-model") && text.contains("HF_HUB_OFFLINE"), "{text}");
}

#[test]
fn flags_of_the_cache_are_checked() {
    let run = ["run", "demo", "ROMEO:", "--max-tokens", "2", "--temperature", "0"];
    let with = |more: &[&'static str]| [&run[..], more].concat();
    fails(&with(&["--kv-memory", "much"]), 2, "is not a size");
    fails(&with(&["--kv-memory", "0"]), 2, "holds nothing");
    fails(&with(&["--kv-type", "int3"]), 2, "--kv-type");
    fails(&with(&["--kv-cache-size", "1GiB"]), 2, "--kv-cache-dir");
    for kv_type in ["bf16", "fp8"] {
        fails(&with(&["--kv-type", kv_type, "--numerics", "reference"]), 2, "coarser");
        fails(&with(&["--kv-type", kv_type, "--runner", "reference"]), 2, "coarser");
    }
    fails(
        &with(&["--kv-memory", "64KiB", "--context", "2000"]),
        1,
        "fewer than --context 2000, which takes 1.9 MiB",
    );
    for more in [&["--kv-type", "f32"][..], &["--kv-type", "bf16"], &["--kv-memory", "1MiB"]] {
        let output = moebius(&with(more));
        assert!(output.status.success(), "{more:?}: {}", stderr(&output));
    }
    let exact = moebius(&with(&["--kv-type", "f32", "--runner", "reference"]));
    assert!(exact.status.success() && stderr(&exact).contains("tokens, f32)"), "{}", stderr(&exact));
}
