//! The binary as its users call it: output, exit status, errors.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn moebius(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moebius"));
    command.args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    moebius(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn json(args: &[&str]) -> Value {
    let output = run(args);
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_str(&stdout(&output)).unwrap()
}

#[track_caller]
fn fails(args: &[&str], status: i32, message: &str) {
    let output = run(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {text}");
    assert!(text.contains(message), "{args:?}: {text}");
    assert!(!text.contains("panicked"), "{args:?}: {text}");
}

fn case(name: &str) -> String {
    format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn no_arguments_show_the_built_in_model() {
    let output = run(&[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).starts_with("ROMEO:\n") && stdout(&output).len() > 100, "{}", stdout(&output));
    assert!(stderr(&output).contains("tokens"), "{}", stderr(&output));
}

#[test]
fn run_prints_tokens_to_stdout_and_the_rest_to_stderr() {
    let args = ["run", "demo", "ROMEO:", "--seed", "3", "--max-tokens", "40"];
    let (first, second) = (run(&args), run(&args));
    assert!(first.status.success(), "{}", stderr(&first));
    assert_eq!(stdout(&first), stdout(&second), "same seed, same text");
    assert!(!stdout(&first).contains("tokens,"), "statistics on stdout");
    assert!(stderr(&first).contains("40 tokens"), "{}", stderr(&first));
    let other = run(&["run", "demo", "ROMEO:", "--seed", "4", "--max-tokens", "40"]);
    assert_ne!(stdout(&first), stdout(&other), "the seed changes nothing");
}

#[test]
fn json_has_every_field_of_the_contract() {
    let object = json(&[
        "run",
        "demo",
        "ROMEO:",
        "--json",
        "--temperature",
        "0",
        "--max-tokens",
        "12",
        "--threads",
        "1",
    ]);
    let fields = [
        "text",
        "token_ids",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "load_seconds",
        "time_to_first_token_seconds",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "peak_rss_bytes",
        "numerics",
        "runner",
        "threads",
    ];
    let keys: Vec<&str> = object.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, fields);
    assert_eq!(object["completion_tokens"], 12);
    assert_eq!(object["token_ids"].as_array().unwrap().len(), 12);
    assert_eq!((&object["numerics"], &object["runner"]), (&"model".into(), &"cpu".into()));
    assert_eq!((&object["threads"], &object["finish_reason"]), (&1.into(), &"length".into()));
    assert!(object["peak_rss_bytes"].as_u64().unwrap() > 1 << 20);
}

/// The result of a greedy run of the built-in model.
#[track_caller]
fn greedy(prompt: &str, more: &[&str]) -> Value {
    json(&[&["run", "demo", prompt, "--json", "--temperature", "0"], more].concat())
}

#[test]
fn threads_change_no_token() {
    let ids = |threads| greedy("O Romeo", &["--threads", threads, "--max-tokens", "60"])["token_ids"].clone();
    assert_eq!(ids("1"), ids("3"));
}

#[test]
fn both_runners_give_the_same_greedy_text() {
    let exact = ["--numerics", "reference", "--max-tokens", "24", "--runner"];
    let text = |runner| greedy("KING:", &[&exact[..], &[runner]].concat())["text"].clone();
    assert_eq!(text("cpu"), text("reference"));
}

#[test]
fn coarser_options_are_named_at_start_and_in_the_result() {
    let args = ["run", "demo", "ROMEO:", "--max-tokens", "4", "--json", "--temperature", "0"];
    for (option, value, said, named) in [
        ("--activations", "int8", "--activations int8:", "model+int8-activations"),
        ("--dense-format", "q8", "--dense-format q8:", "model+q8-dense"),
    ] {
        let output = run(&[&args[..], &[option, value]].concat());
        assert!(output.status.success() && stderr(&output).contains(said), "{}", stderr(&output));
        let result: Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!(result["numerics"], named);
        fails(&[&args[..], &[option, value, "--numerics", "reference"]].concat(), 2, "coarser");
        fails(&[&args[..], &[option, value, "--runner", "reference"]].concat(), 2, "coarser");
    }
    assert_eq!(json(&args)["numerics"], "model");
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let all = greedy("ROMEO:", &["--max-tokens", "60"]);
    let text = all["text"].as_str().unwrap();
    let stop: String = text.chars().skip(20).take(4).collect();
    let cut = json(&[
        "run",
        "demo",
        "ROMEO:",
        "--json",
        "--temperature",
        "0",
        "--max-tokens",
        "60",
        "--stop",
        &stop,
    ]);
    assert_eq!(cut["finish_reason"], "stop");
    assert_eq!(cut["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);
}

#[test]
fn the_prompt_may_come_from_standard_input() {
    let mut child = moebius(&["run", "demo", "--json", "--temperature", "0", "--max-tokens", "5"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"ROMEO:").unwrap();
    let output = child.wait_with_output().unwrap();
    let piped: Value = serde_json::from_slice(&output.stdout).unwrap();
    let given = json(&["run", "demo", "ROMEO:", "--json", "--temperature", "0", "--max-tokens", "5"]);
    assert_eq!(piped["token_ids"], given["token_ids"]);
}

/// A reader who leaves (`| head`) ends the generation, and that is no failure.
#[test]
fn a_reader_who_leaves_ends_the_run() {
    let begun = std::time::Instant::now();
    let mut child =
        moebius(&["run", "demo", "ROMEO:", "--runner", "reference", "--ignore-eos", "--max-tokens", "2000"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
    let mut first = [0; 1];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
    // The reference runner needs far longer for all 2000 tokens.
    assert!(begun.elapsed().as_secs() < 20);
}

#[test]
fn wrong_command_lines_exit_with_2() {
    fails(&["run", "demo", "x", "--threads", "0"], 2, "threads");
    fails(&["run", "demo", "x", "--max-tokens", "-1"], 2, "max-tokens");
    fails(&["run", "demo", "x", "--temperature", "warm"], 2, "temperature");
    fails(&["run", "demo", "x", "--runner", "abacus"], 2, "runner");
    fails(&["run", "demo", ""], 2, "empty");
    fails(&["sing"], 2, "sing");
    fails(&["trace", "demo"], 2, "--tokens");
}

#[test]
fn runs_that_fail_exit_with_1_and_say_why() {
    fails(&["run", "/nowhere/at/all", "x"], 1, "no such file or folder");
    fails(&["run", "not a model", "x"], 1, "not a model");
    fails(&["run", "demo", "x", "--temperature", "-1"], 1, "temperature");
    fails(&["run", "demo", "x", "--max-tokens", "0"], 1, "max_tokens");
    fails(&["run", "demo", "x", "--max-tokens", "999999999"], 1, "context");
    fails(&["run", "demo", "x", "--context", "999999"], 1, "--context 999999");
    fails(&["run", "demo", &"word ".repeat(20_000)], 1, "context");
}

#[test]
fn inspect_counts_what_is_in_the_files() {
    let object = json(&["inspect", &case("kimi_k25_int4"), "--json"]);
    assert_eq!(object["model_type"], "kimi_k25");
    // One row of 48 + 16 values per layer and token, in bf16.
    assert_eq!(object["kv_bytes_per_token"], 3 * 64 * 2);
    assert_eq!(object["skipped"]["vision tower"]["tensors"], 6);
    let parameters = object["parameters"].as_u64().unwrap();
    let active = object["active_parameters"].as_u64().unwrap();
    // 12 of 16 experts of 3 x 64 x 128 weights rest, in two layers.
    assert_eq!(parameters - active, 2 * 12 * 3 * 64 * 128);
    let table = run(&["inspect", &case("deepseek_v3_groups")]);
    assert!(stdout(&table).contains("multi-token-prediction layer"), "{}", stdout(&table));
}

#[test]
fn trace_writes_the_golden_names_and_shapes() {
    let folder = case("qwen3_moe");
    let golden = std::fs::read(format!("{folder}/golden.safetensors")).unwrap();
    let golden = safetensors::SafeTensors::deserialize(&golden).unwrap();
    let prompts: Vec<Vec<i32>> = (0..3)
        .map(|p| {
            let ids = golden.tensor(&format!("prompt{p}.input_ids")).unwrap();
            ids.data().as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
        })
        .collect();
    let temporary = std::env::temp_dir().join(format!("moebius-trace-{}", std::process::id()));
    std::fs::create_dir_all(&temporary).unwrap();
    let tokens = temporary.join("tokens.json");
    std::fs::write(&tokens, serde_json::to_string(&prompts).unwrap()).unwrap();
    for (logits, chunk) in [("all", "64"), ("last", "7"), ("none", "1000")] {
        let output = temporary.join("trace.safetensors");
        let args = [
            "trace",
            &folder,
            "--tokens",
            tokens.to_str().unwrap(),
            "--output",
            output.to_str().unwrap(),
            "--greedy",
            "32",
            "--chunk",
            chunk,
            "--logits",
            logits,
            "--numerics",
            "reference",
        ];
        let result = run(&args);
        assert!(result.status.success(), "{}", stderr(&result));
        let bytes = std::fs::read(&output).unwrap();
        let trace = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for name in golden.names() {
            if name.ends_with("input_ids") || name.ends_with("greedy_margin") {
                continue;
            }
            let ours = trace.tensor(name);
            if name.ends_with("logits") {
                let rows = ours.map(|tensor| tensor.shape()[0]).unwrap_or(0);
                let prompt = name.as_bytes()[6] - b'0';
                let tokens = prompts[usize::from(prompt)].len();
                assert_eq!(
                    rows,
                    match logits {
                        "all" => tokens,
                        "last" => 1,
                        _ => 0,
                    },
                    "{name}"
                );
                continue;
            }
            let (ours, golden) = (ours.unwrap(), golden.tensor(name).unwrap());
            assert_eq!((ours.shape(), ours.dtype()), (golden.shape(), golden.dtype()), "{name}");
            if name.ends_with("greedy_ids") || name.ends_with("topk_idx") {
                assert_eq!(ours.data(), golden.data(), "{name}");
            }
        }
    }
    std::fs::remove_dir_all(&temporary).unwrap();
    let trace = ["trace", &folder, "--output", "/nowhere/x", "--tokens"];
    fails(&[&trace[..], &["/nowhere.json"]].concat(), 1, "/nowhere.json");
    fails(&[&trace[..], &["/dev/zero"]].concat(), 1, "/dev/zero");
}

#[test]
fn check_finds_no_difference_between_the_runners() {
    for name in ["kimi_k2_int4", "gpt_oss_mxfp4", "kimi_k2_fp8", "hunyuan_v1_moe"] {
        let object = json(&["check", &case(name), "--json"]);
        assert_eq!(object["first_difference"], Value::Null, "{name}: {object}");
        assert!(object["rows"].as_array().unwrap().len() > 10);
    }
    let strict = run(&["check", "demo", "--tolerance", "1e-12"]);
    assert_eq!(strict.status.code(), Some(1));
    assert!(stderr(&strict).contains("layer 0"), "{}", stderr(&strict));
    fails(&["check", "demo", "--prompt", ""], 1, "--prompt has 0 tokens");
    fails(&["check", "demo", "--prompt", &"word ".repeat(2000)], 1, "1 to 1024 can be compared");
}

/// The hub is asked at the endpoint that was named, and not at all offline.
#[test]
fn hub_ids_go_to_the_endpoint_and_nowhere_else() {
    let home = std::env::temp_dir().join(format!("moebius-hub-{}", std::process::id()));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let hub = |offline: &str| {
        let output = moebius(&["run", "some-org/some-model", "x"])
            .env_remove("HF_HUB_CACHE")
            .env("HF_HOME", &home)
            .env("HF_ENDPOINT", &endpoint)
            .env("HF_HUB_OFFLINE", offline)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        stderr(&output)
    };
    let offline = hub("1");
    assert!(offline.contains("some-org/some-model") && offline.contains("HF_HUB_OFFLINE"), "{offline}");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let read = std::io::Read::read(&mut stream, &mut request).unwrap();
        stream
            .write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .unwrap();
        String::from_utf8_lossy(&request[..read]).into_owned()
    });
    let missing = hub("0");
    assert!(missing.contains("some-org/some-model"), "{missing}");
    assert!(server.join().unwrap().starts_with("GET /api/models/some-org/some-model/"));
    let _ = std::fs::remove_dir_all(&home);
}
