//! Bodies that nobody thought of: answered with 2xx or 4xx, and the server goes on.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::client::{exchange, get, post, post_bytes};
use crate::script::{Mode, TestServer};
use crate::{CHAT, COMPLETIONS, chat, completion};

/// Any JSON, with a liking for edges.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-2i64..20).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0.0..2.0).prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        prop::sample::select(vec![
            "user",
            "assistant",
            "tool",
            "text",
            "function",
            "auto",
            "none",
            "low",
            "<|im_end|>",
            "tiny"
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        let key = prop::sample::select(vec![
            "role",
            "content",
            "type",
            "text",
            "id",
            "function",
            "name",
            "arguments",
            "tool_calls",
            "5",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key, inner), 0..5).prop_map(|fields| fields
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect::<Value>()),
        ]
    })
}

const FIELDS: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "best_of",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "echo",
    "suffix",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "response_format",
    "tools",
    "tool_choice",
    "reasoning_effort",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "chat_template_kwargs",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "return_token_ids",
    "prompt_logprobs",
    "functions",
    "function_call",
    "modalities",
    "user",
    "unknown",
];

#[test]
fn any_body_is_answered_and_none_is_a_fault() {
    let server = TestServer::start(Mode::Answer);
    let fields = prop::collection::vec((prop::sample::select(FIELDS), any_value()), 0..4);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let outcome = runner.run(&(any::<bool>(), any::<bool>(), fields), |(is_chat, valid_base, fields)| {
        let (path, base) =
            if is_chat { (CHAT, chat(json!({}))) } else { (COMPLETIONS, completion(json!({}))) };
        let mut body = if valid_base { base } else { json!({}) };
        for (key, value) in fields {
            body[key] = value;
        }
        let answer = post(server.address, path, &body);
        prop_assert!(
            (200..300).contains(&answer.status) || (400..500).contains(&answer.status),
            "{body}: {answer:?}"
        );
        if answer.status >= 400 {
            answer.error();
        }
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(get(server.address, "/health").status, 200);
    server.script.wait_idle();
}

#[test]
fn any_bytes_are_answered() {
    let server = TestServer::start(Mode::Answer);
    let good = chat(json!({"stop": ["a\\\"b"], "n": 1})).to_string().into_bytes();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let changes = prop::collection::vec((0..good.len(), any::<u8>()), 0..4);
    let outcome = runner.run(&(changes, 0..=good.len()), |(changes, end)| {
        let mut body = good.clone();
        for (at, byte) in changes {
            body[at] = byte;
        }
        body.truncate(end);
        let answer = exchange(server.address, &post_bytes(CHAT, &body));
        prop_assert!(matches!(answer.status, 200 | 400 | 404), "{answer:?}");
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}
