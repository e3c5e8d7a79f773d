//! `moebius bench`: every command on tiny inputs; form of the rows, files, exit status.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const KEYS: [&str; 15] = [
    "name",
    "seconds_median",
    "seconds_min",
    "seconds_max",
    "runs",
    "bytes",
    "operations",
    "ceiling",
    "ceiling_value",
    "share_of_ceiling",
    "tokens_per_second",
    "numerics",
    "runner",
    "threads",
    "model",
];

fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moebius"));
    command.arg("bench").args(args).stdin(Stdio::null()).output().unwrap()
}

fn case(name: &str) -> String {
    format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The rows of a successful run, each of which has all keys with values that can be.
#[track_caller]
fn rows(args: &[&str]) -> Vec<Value> {
    let output = bench(&[args, &["--json", "--quick"]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!rows.is_empty(), "{args:?}: no rows");
    for row in &rows {
        let keys: Vec<&str> = row.as_object().unwrap().keys().map(String::as_str).take(15).collect();
        assert_eq!(keys, KEYS, "{row}");
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"));
        let (median, min, max) = (number("seconds_median"), number("seconds_min"), number("seconds_max"));
        assert!(0.0 < min && min <= median && median <= max && max < 1e3, "{row}");
        assert!(number("runs") >= 1.0 && number("threads") >= 1.0, "{row}");
        assert!(row["bytes"].is_u64() && row["operations"].is_u64(), "{row}");
        if row["ceiling"].is_null() {
            assert!(row["ceiling_value"].is_null() && row["share_of_ceiling"].is_null(), "{row}");
        } else {
            let known = ["read_bandwidth", "f32", "bf16", "bf16_tiles", "int16", "int8"];
            assert!(known.contains(&row["ceiling"].as_str().unwrap()), "{row}");
            assert!(number("ceiling_value") > 1e6, "{row}");
            // Tiny inputs stay in caches, which are faster than memory.
            let share = number("share_of_ceiling");
            assert!(share > 0.0 && share < 100.0, "{row}");
        }
    }
    rows
}

fn names(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["name"].as_str().unwrap()).collect()
}

#[track_caller]
fn fails(args: &[&str], status: i32, message: &str) {
    let output = bench(args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {text}");
    assert!(text.contains(message), "{args:?}: {text}");
    assert!(!text.contains("panicked"), "{args:?}: {text}");
}

#[test]
fn ceilings_cover_reads_peaks_and_regions() {
    let rows = rows(&["ceilings", "--threads", "2"]);
    let names = names(&rows);
    for name in
        ["read/4k-pages", "read/huge-pages/prefetch-512", "f32/portable", "int8/portable", "region/team"]
    {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    let threads: Vec<u64> = rows.iter().map(|row| row["threads"].as_u64().unwrap()).collect();
    assert!(threads.contains(&1) && threads.contains(&2));
    // The best of each kind is its ceiling.
    let best = |bound: &str| {
        let of = rows.iter().filter(|row| row["ceiling"] == bound);
        of.map(|row| row["share_of_ceiling"].as_f64().unwrap()).fold(0.0, f64::max)
    };
    assert!((best("read_bandwidth") - 1.0).abs() < 0.02 && (best("f32") - 1.0).abs() < 0.02);
}

#[test]
fn kernels_cover_every_operation_and_format() {
    let all = rows(&["kernels", "--runs", "2", "--threads", "2"]);
    let names = names(&all);
    let operations = [
        "matmul",
        "transposed",
        "heads-uk",
        "heads-uv",
        "experts",
        "router",
        "norm",
        "rope",
        "attention/mla",
        "attention/gqa",
    ];
    for operation in operations {
        assert!(names.iter().any(|name| name.starts_with(operation)), "{operation} in {names:?}");
    }
    for format in ["f32", "f16", "bf16", "fp8", "int4", "mxfp4", "q8"] {
        assert!(names.contains(&format!("matmul/tiny/{format}/m3").as_str()), "{format} in {names:?}");
    }
    assert!(all.iter().all(|row| row["runs"] == 2));
    let some = rows(&["kernels", "matmul/tiny/int4", "--runs", "1"]);
    // Two numbers of rows, in f32, in 16 and in 8 bits.
    assert_eq!(some.len(), 6);
    let numerics: Vec<&str> = some.iter().map(|row| row["numerics"].as_str().unwrap()).collect();
    assert_eq!(numerics[0], "reference");
    assert_eq!((numerics[2], numerics[4]), ("model", "model+int8-activations"));
    assert_eq!(some[0]["bytes"], 160 * 96 / 2 + 160 * 96 / 32 * 2);
    assert_eq!(some[1]["operations"], 2 * 3 * 160 * 96);
    fails(&["kernels", "no-such-row", "--quick"], 1, "no-such-row");
}

#[test]
fn decode_gives_the_step_and_its_components() {
    for model in ["demo", &case("kimi_k2_int4"), &case("gpt_oss_mxfp4"), &case("qwen3_moe")] {
        let rows = rows(&["decode", model, "--runs", "3", "--context", "20"]);
        let whole = &rows[0];
        assert_eq!((&whole["name"], &whole["runs"]), (&"decode".into(), &3.into()));
        assert_eq!((&whole["runner"], &whole["model"]), (&"cpu".into(), &model.into()));
        assert_eq!((&whole["numerics"], &whole["context"]), (&"model".into(), &20.into()));
        assert!(whole["tokens_per_second"].as_f64().unwrap() > 0.0);
        assert!(
            whole["peak_rss_bytes"].as_u64().unwrap() > 0 && whole["planned_bytes"].as_u64().unwrap() > 0
        );
        let parts = &rows[1..];
        let names = names(parts);
        for part in ["attention_projections", "attention", "router", "routed_experts", "head", "other"] {
            assert!(names.contains(&format!("decode/{part}").as_str()), "{part} in {names:?}");
        }
        // The parts are the whole, but for medians of few runs.
        let sum = |key: &str| parts.iter().map(|row| row[key].as_f64().unwrap()).sum::<f64>();
        for key in ["bytes", "operations"] {
            let whole = whole[key].as_f64().unwrap();
            assert!((sum(key) - whole).abs() <= 0.2 * whole, "{key}: {} of {whole}", sum(key));
        }
        assert!((0.3..3.0).contains(&sum("share_of_step")), "{}", sum("share_of_step"));
    }
}

#[test]
fn a_batch_and_a_prompt_are_counted() {
    let batch =
        rows(&["decode", "demo", "--runs", "2", "--batch", "4", "--context", "0", "--numerics", "reference"]);
    assert_eq!((&batch[0]["name"], &batch[0]["sequences"]), (&"decode-4".into(), &4.into()));
    assert_eq!(batch[0]["numerics"], "reference");
    assert!(!batch[0]["ceiling"].as_str().unwrap().starts_with("bf16"), "{}", batch[0]);
    let prompts = rows(&["prefill", "demo", "--runs", "1", "--tokens", "40,80", "--threads", "1"]);
    let wholes: Vec<&Value> =
        prompts.iter().filter(|row| !row["name"].as_str().unwrap().contains('/')).collect();
    assert_eq!(wholes.len(), 2);
    assert_eq!((&wholes[0]["name"], &wholes[1]["name"]), (&"prefill-40".into(), &"prefill-80".into()));
    let operations = |row: &Value| row["operations"].as_f64().unwrap();
    let ratio = operations(wholes[1]) / operations(wholes[0]);
    assert!((1.9..2.6).contains(&ratio), "twice the tokens, {ratio} times the operations");
}

#[test]
fn a_machine_without_a_gpu_is_told_in_one_line() {
    if kernels::cuda::Device::probe() != kernels::cuda::Availability::NoDriver {
        println!("SKIP: this machine has a CUDA driver");
        return;
    }
    fails(&["gpu"], 1, "no CUDA driver library: nothing to check here");
    assert!(bench(&["gpu", "--json"]).stdout.is_empty());
    fails(&["gpu", "--only", "nothing"], 2, "ceilings, correctness, timings");
}

#[test]
fn quality_compares_with_exact_arithmetic() {
    for (model, source) in [("demo", "built-in passage"), (&case("kimi_k2_int4"), "random tokens")] {
        let rows = rows(&["quality", model, "--tokens", "300"]);
        let row = rows.iter().find(|row| row["name"] == "quality/model").unwrap();
        assert_eq!((&row["positions"], &row["text"]), (&300.into(), &source.into()));
        let number = |key: &str| row[key].as_f64().unwrap();
        assert!(number("kl_mean") >= 0.0 && number("kl_mean") < 0.05, "{row}");
        assert!(number("kl_mean") <= number("kl_p999") && number("kl_p999") <= number("kl_max"), "{row}");
        assert!(number("top1_agreement") > 0.9 && number("top1_agreement") <= 1.0, "{row}");
    }
    fails(&["quality", "demo", "--variant", "no-such"], 1, "no-such");
    fails(&["quality", "demo", "--text", "/no/such/file"], 1, "/no/such/file");
}

#[test]
fn a_csv_file_has_one_head_and_a_machine_line_per_run() {
    let path: PathBuf = std::env::temp_dir().join(format!("moebius-bench-{}.csv", std::process::id()));
    let _ = std::fs::remove_file(&path);
    for _ in 0..2 {
        rows(&["decode", "demo", "--runs", "1", "--context", "0", "--csv", path.to_str().unwrap()]);
    }
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let head = format!("{},notes", KEYS.join(","));
    assert_eq!(text.lines().next(), Some(head.as_str()));
    assert_eq!(text.lines().filter(|line| *line == head).count(), 1, "{text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("# machine: ")).count(), 2, "{text}");
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("decode")).collect();
    assert!(rows.len() > 10 && rows.len().is_multiple_of(2), "{text}");
    assert!(rows.iter().all(|row| row.split(',').count() == 16), "{text}");
    fails(&["ceilings", "--quick", "--csv", "/no/such/folder/x.csv"], 1, "/no/such/folder/x.csv");
}

#[test]
fn a_wrong_command_line_exits_with_2_and_a_failed_run_with_1() {
    fails(&["no-such-thing"], 2, "no-such-thing");
    fails(&[], 2, "Usage");
    fails(&["decode", "--batch", "0"], 2, "--batch");
    fails(&["prefill", "--tokens", "a"], 2, "--tokens");
    fails(&["decode", "demo", "--runner", "reference"], 2, "reference");
    fails(&["decode", "/no/such/model"], 1, "/no/such/model");
    fails(&["decode", "demo", "--quick", "--context", "4000"], 1, "2048");
    fails(&["prefill", "demo", "--quick", "--tokens", "999999"], 1, "2048");
}

#[test]
fn without_json_there_is_a_table() {
    let output = bench(&["prefill", "demo", "--quick", "--runs", "1", "--tokens", "8"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.starts_with("name"), "{text}");
    assert!(text.lines().nth(1).unwrap().starts_with("prefill-8 "), "{text}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("machine: "));
}

#[test]
fn a_full_cache_takes_what_the_formula_says() {
    let config = std::fs::read(format!("{}/models/demo/config.json", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let field = |name: &str| config[name].as_u64().unwrap();
    let (latent, rope) = (field("kv_lora_rank"), field("qk_rope_head_dim"));
    let coarse = latent + 4 * latent.div_ceil(128) + 2 * rope;
    for (kv_type, bytes) in [("f32", 4 * (latent + rope)), ("bf16", 2 * (latent + rope)), ("fp8", coarse)] {
        let rows = rows(&["context", "demo", "--tokens", "1000", "--runs", "2", "--kv-type", kv_type]);
        assert_eq!(names(&rows), ["context/attention-1000"]);
        // In whole blocks.
        assert_eq!(rows[0]["cache_bytes"], 1024 * field("num_hidden_layers") * bytes, "{kv_type}");
        assert_eq!(rows[0]["numerics"], format!("{kv_type} cache"));
    }
}

#[test]
fn a_prompt_gives_the_same_bits_in_any_chunks_and_from_disk() {
    let folder = std::env::temp_dir().join(format!("moebius-bench-kv-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    let place = folder.to_str().unwrap();
    let args =
        ["context", "demo", "--prefill", "--tokens", "400", "--chunk", "64,300", "--kv-cache-dir", place];
    let rows = rows(&args);
    assert_eq!(names(&rows), ["context/prefill-by-64", "context/prefill-by-300", "context/restored"]);
    assert!(rows.iter().all(|row| row["same_bits"] == true), "{rows:?}");
    let cached: Vec<_> = rows.iter().map(|row| row["cached_tokens"].as_u64().unwrap()).collect();
    assert_eq!(cached, [0, 0, 384]);
    fails(&args, 2, "is not empty");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_swarm_is_told_what_each_would_be_told_alone() {
    let args = ["serve", "demo", "--agents", "5", "--shared", "130", "--rounds", "2", "--unshared", "1"];
    let rows = rows(&args);
    assert_eq!(names(&rows), ["serve/swarm_call", "serve/unshared_call"]);
    assert_eq!(
        (&rows[0]["calls"], &rows[0]["compared_alone"], &rows[0]["equal_alone"]),
        (&10.into(), &5.into(), &5.into())
    );
    assert!(rows[0]["served_of_shareable"].as_f64().unwrap() > 0.5, "{}", rows[0]);
    fails(&["serve", "demo", "--private-min", "9", "--private-max", "3"], 2, "--private-max");
}
