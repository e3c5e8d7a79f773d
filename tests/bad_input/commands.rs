//! Command lines, prompts and token lists.

use serde_json::json;

use crate::tiny::{self, Folder, Tiny, moebius, moebius_unlimited};

#[test]
fn a_wrong_command_line_ends_with_2() {
    let cases: &[(&[&str], &str)] = &[
        (&["frobnicate"], "frobnicate"),
        (&["run", "--frobnicate"], "--frobnicate"),
        (&["run", "demo", "x", "y"], "'y'"),
        (&["run", "demo", ""], "the prompt is empty"),
        (&["run", "demo", "x", "--max-tokens", "-1"], "-1"),
        (&["run", "demo", "x", "--max-tokens", "18446744073709551616"], "--max-tokens"),
        (&["run", "demo", "x", "--max-tokens", "1e3"], "--max-tokens"),
        (&["run", "demo", "x", "--max-tokens"], "--max-tokens"),
        (&["run", "demo", "x", "--top-k", "-1"], "-1"),
        (&["run", "demo", "x", "--seed", "18446744073709551616"], "--seed"),
        (&["run", "demo", "x", "--temperature", "hot"], "--temperature"),
        (&["run", "demo", "x", "--temperature", ""], "--temperature"),
        (&["run", "demo", "x", "--context", "-1"], "-1"),
        (&["run", "demo", "x", "--context", "99999999999999999999"], "--context"),
        (&["run", "demo", "x", "--threads", "0"], "--threads"),
        (&["run", "demo", "x", "--threads", "-2"], "-2"),
        (&["run", "demo", "x", "--threads", "100000"], "--threads"),
        (&["run", "demo", "x", "--runner", "gpu"], "--runner"),
        (&["run", "demo", "x", "--numerics", "fp4"], "--numerics"),
        (&["trace", "demo"], "--tokens"),
        (&["trace", "demo", "--tokens", "x", "--output", "y", "--chunk", "0"], "--chunk"),
        (&["trace", "demo", "--tokens", "x", "--output", "y", "--greedy", "-1"], "-1"),
        (&["trace", "demo", "--tokens", "x", "--output", "y", "--logits", "some"], "--logits"),
        (&["check", "demo", "--tolerance", "none"], "--tolerance"),
        (&["inspect", "demo", "--yaml"], "--yaml"),
    ];
    for (arguments, words) in cases {
        moebius(arguments).fails(2, &["error: ", words]);
    }
}

#[test]
fn impossible_requests_end_with_1() {
    let folder = Tiny::new(tiny::mixtral()).folder();
    let place = folder.path().to_str().unwrap();
    let long = "x".repeat(100);
    let cases: &[(&[&str], &[&str])] = &[
        (&["x", "--max-tokens", "0"], &["max_tokens", "at least 1"]),
        (&["x", "--max-tokens", "64"], &["context is 64 tokens", "1 prompt tokens and 64 tokens"]),
        (&["x", "--max-tokens", "18446744073709551615"], &["context is 64 tokens", "18446744073709551615"]),
        (&[&long], &["context is 64 tokens", "100 prompt tokens"]),
        (&[&long, "--context", "50"], &["context is 50 tokens", "100 prompt tokens"]),
        (&["x", "--context", "65"], &["--context 65 is more than the 64 tokens"]),
        (
            &["x", "--context", "18446744073709551615"],
            &["--context 18446744073709551615 is more than the 64"],
        ),
        (&["x", "--context", "0"], &["--context 0 has room for no token"]),
        (&["x", "--temperature", "-1"], &["temperature"]),
        (&["x", "--temperature", "NaN"], &["temperature"]),
        (&["x", "--temperature", "inf"], &["temperature"]),
        (&["x", "--top-p", "1.5"], &["top_p"]),
        (&["x", "--top-p", "NaN"], &["top_p"]),
        (&["x", "--min-p", "-1"], &["min_p"]),
        (&["x", "--repetition-penalty", "0"], &["repetition_penalty"]),
        (&["x", "--frequency-penalty", "inf"], &["frequency_penalty"]),
    ];
    for (arguments, words) in cases {
        let start = ["run", place, "--raw", "--threads", "1"];
        moebius_unlimited(&[&start[..], arguments].concat()).fails(1, words);
    }
    let fine: &[&[&str]] = &[
        &["x", "--top-k", "18446744073709551615"],
        &["x", "--seed", "18446744073709551615", "--temperature", "100"],
        &["x", "--context", "3"],
        &["\u{fffd}\u{7f}\u{1f980}"],
    ];
    for arguments in fine {
        let start = ["run", place, "--raw", "--threads", "1"];
        moebius_unlimited(&[&start[..], arguments].concat()).succeeds();
    }
    // A context that fits the configuration and no machine.
    let mut config = tiny::mixtral();
    config["max_position_embeddings"] = (1u32 << 31).into();
    config["num_hidden_layers"] = 32.into();
    let folder = Tiny::new(config).folder();
    let place = folder.path().to_str().unwrap();
    moebius(&["run", place, "x", "--context", "2147483648"]).fails(1, &["choose a smaller --context"]);
}

#[test]
fn bad_token_lists_are_refused() {
    let folder = Tiny::new(tiny::mixtral()).folder();
    let tokens = Folder::new();
    let (file, output) = (tokens.path().join("tokens.json"), tokens.path().join("out.safetensors"));
    let (place, file, output) =
        (folder.path().to_str().unwrap(), file.to_str().unwrap(), output.to_str().unwrap());
    let trace = |more: &[&str]| {
        let start = ["trace", place, "--tokens", file, "--output", output, "--threads", "1"];
        moebius_unlimited(&[&start[..], more].concat())
    };
    trace(&[]).fails(1, &["tokens.json: No such file"]);
    std::fs::write(file, "[[1]]").unwrap();
    trace(&["--greedy", "18446744073709551615"]).fails(1, &["exceed the model's context of 64"]);
    let long = json!([vec![1; 65]]).to_string();
    for (text, words) in [
        ("", "tokens.json: not a list of lists of token ids: EOF"),
        ("{}", "tokens.json: not a list"),
        ("[1, 2]", "tokens.json: not a list"),
        ("[[-1]]", "tokens.json: not a list of lists of token ids: invalid value: integer `-1`"),
        ("[[1.5]]", "tokens.json: not a list"),
        ("[[4294967296]]", "tokens.json: not a list"),
        ("[[\"1\"]]", "tokens.json: not a list"),
        ("[[1], []]", "prompt 1: a prompt has no tokens"),
        ("[[1, 2], [260]]", "260 is outside the vocabulary of 260"),
        ("[[4294967295]]", "4294967295 is outside the vocabulary of 260"),
        (&long, "65 tokens exceed the model's context of 64"),
        (&"[".repeat(1 << 20), "tokens.json: not a list"),
    ] {
        tokens.write("tokens.json", text);
        trace(&[]).fails(1, &[words]);
        trace(&["--runner", "reference", "--chunk", "1"]).fails(1, &[words]);
    }
    tokens.write("tokens.json", "[[1, 2, 3]]");
    trace(&["--greedy", "62"]).fails(1, &["65 tokens exceed the model's context of 64"]);
    trace(&["--chunk", "18446744073709551615"]).succeeds();
    tokens.write("tokens.json", "[]");
    trace(&[]).succeeds();
    moebius(&["trace", place, "--tokens", file, "--output", "/nonexistent/x"])
        .fails(1, &["/nonexistent/x: No such"]);
}

#[test]
fn a_prompt_to_check_may_be_anything() {
    let folder = Tiny::new(tiny::mixtral()).folder();
    let place = folder.path().to_str().unwrap();
    moebius_unlimited(&["check", place, "--prompt", "x", "--threads", "1"]).succeeds();
    let answer = moebius_unlimited(&["check", place, "--prompt", "\u{1f980}\u{7f}\r\n", "--threads", "1"]);
    answer.succeeds();
}
