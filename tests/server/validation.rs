//! Every field: what a good value becomes, and that a bad one is a 400 that names it.

use std::sync::Arc;

use moebius::request::SamplingParams;
use moebius::template::ChatTemplate;
use serde_json::{Value, json};

use crate::client::post;
use crate::script::{EOS, Mode, TestServer};
use crate::{CHAT, COMPLETIONS, chat, completion};

#[test]
fn fields_reach_the_engine() {
    let server = TestServer::start(Mode::Answer);
    let body = chat(json!({
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5,
        "presence_penalty": -2, "frequency_penalty": 2, "logit_bias": {"3": -100, "5": 0.5}, "seed": -1,
        "stop": ["a", "b"], "stop_token_ids": [4, EOS], "min_tokens": 2, "max_tokens": 9,
        "max_completion_tokens": 8, "include_stop_str_in_output": true, "skip_special_tokens": false,
        "user": "u", "metadata": {"a": 1}, "service_tier": "auto", "store": false, "cache_salt": "s", "priority": 1,
        "parallel_tool_calls": true, "response_format": {"type": "text"}, "tool_choice": "auto", "best_of": 1,
        "a_field_of_tomorrow": [1], "prompt_embeds": "gASVAAAA",
    }));
    assert_eq!(post(server.address, CHAT, &body).status, 200);
    let sent = server.script.last();
    let expected = SamplingParams {
        temperature: 0.5,
        top_k: 7,
        top_p: 0.25,
        min_p: 0.125,
        repetition_penalty: 1.5,
        presence_penalty: -2.0,
        frequency_penalty: 2.0,
        logit_bias: vec![(3, -100.0), (5, 0.5)],
        seed: Some(u64::MAX),
    };
    assert_eq!(sent.sampling, expected);
    assert_eq!(sent.stop.strings, ["a", "b"]);
    assert_eq!(sent.stop.token_ids, [EOS, 4]);
    assert_eq!((sent.stop.min_tokens, sent.max_tokens), (2, Some(8)));
    assert!(sent.stop.include_in_output && !sent.skip_special_tokens);

    // `null` is the same as absent, for every field at once.
    let nulls: serde_json::Map<String, Value> = body
        .as_object()
        .expect("an object")
        .keys()
        .filter(|key| *key != "messages")
        .chain(
            ["logprobs", "top_logprobs", "stream", "stream_options", "tools", "n", "ignore_eos", "model"]
                .map(String::from)
                .iter(),
        )
        .map(|key| (key.clone(), Value::Null))
        .collect();
    assert_eq!(post(server.address, CHAT, &chat(nulls.into())).status, 200);
    let sent = server.script.last();
    assert_eq!(sent.sampling, SamplingParams { temperature: 1.0, ..SamplingParams::greedy() });

    post(
        server.address,
        CHAT,
        &chat(json!({"ignore_eos": true, "stop_token_ids": [9], "stop": "x", "top_k": -1})),
    );
    let sent = server.script.last();
    assert_eq!(
        (sent.stop.token_ids, sent.stop.strings, sent.sampling.top_k),
        (vec![9], vec!["x".to_owned()], 0)
    );

    post(server.address, COMPLETIONS, &completion(json!({"max_tokens": 2_000_000_000})));
    let sent = server.script.last();
    assert_eq!(sent.max_tokens, Some(4096 - sent.prompt.len()), "a limit beyond the context is what is left");
}

/// Values that no bounded number field takes.
fn bad_numbers() -> [Value; 9] {
    [
        json!(-1e9),
        json!(1e300),
        json!(-1e300),
        json!(i64::MIN),
        json!(u64::MAX),
        json!("1"),
        json!([1]),
        json!({}),
        json!(true),
    ]
}

#[test]
fn wrong_values_are_named() {
    let server = TestServer::start(Mode::Answer);
    let check = |path: &str, body: Value, param: &str| {
        let answer = post(server.address, path, &body);
        let shown: String = body.to_string().chars().take(200).collect();
        assert_eq!(answer.status, 400, "{param}: {shown}: {}", answer.text());
        let error = answer.error();
        assert_eq!(error["param"], param, "{shown}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(answer.body.len() < 6000, "errors are short");
    };
    let both = |field: &str, value: Value| {
        check(CHAT, chat(json!({field: value})), field);
        check(COMPLETIONS, completion(json!({field: value})), field);
    };
    let numbers = [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "best_of",
    ];
    for field in numbers {
        for value in bad_numbers() {
            both(field, value);
        }
    }
    for field in ["top_p", "repetition_penalty", "n", "max_tokens", "max_completion_tokens", "best_of"] {
        both(field, json!(0));
    }
    for field in ["n", "max_tokens", "top_k", "seed", "min_tokens"] {
        both(field, json!(1.5));
    }
    for field in
        ["stream", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "return_token_ids"]
    {
        for value in [json!(1), json!("true"), json!([])] {
            both(field, value);
        }
    }
    let long_list = |n: usize, item: Value| Value::Array(vec![item; n]);
    let biases: serde_json::Map<String, Value> = (0..1025).map(|id| (id.to_string(), json!(1))).collect();
    let cases = [
        ("n", json!(1_000_000_000)),
        ("n", json!(17)),
        ("best_of", json!(2)),
        ("best_of", json!(1_000_000_000)),
        ("seed", json!("x")),
        ("seed", json!(u64::MAX)),
        ("logit_bias", json!(biases)),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"-1": 1})),
        ("logit_bias", json!({"+1": 1})),
        ("logit_bias", json!({"": 1})),
        ("logit_bias", json!({"720720": 1})),
        ("logit_bias", json!({"99999999999999999999": 1})),
        ("logit_bias", json!({"1": 101})),
        ("logit_bias", json!({"1": "1"})),
        ("logit_bias", json!([1])),
        ("stop", long_list(17, json!("x"))),
        ("stop", json!("")),
        ("stop", json!(["a", ""])),
        ("stop", json!([1])),
        ("stop", json!(1)),
        ("stop", json!("\u{10ffff}".repeat(300))),
        ("stop_token_ids", long_list(257, json!(1))),
        ("stop_token_ids", json!([-1])),
        ("stop_token_ids", json!([1e9])),
        ("stop_token_ids", json!(["1"])),
        ("stop_token_ids", json!([u64::MAX])),
        ("stream_options", json!({"include_usage": true})),
        ("stream_options", json!(1)),
        ("response_format", json!({"type": "json_object"})),
        (
            "response_format",
            json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}),
        ),
        ("response_format", json!({"type": 1})),
        ("response_format", json!("text")),
        ("structured_outputs", json!({"regex": "(a+)+b"})),
        ("guided_json", json!({"$ref": "#"})),
        ("guided_regex", json!("(a+)+b")),
        ("guided_choice", json!(["a"])),
        ("guided_grammar", json!("root ::= root")),
        ("grammar", json!("root ::= root")),
        ("prompt_logprobs", json!(1)),
        ("use_beam_search", json!(true)),
        ("bad_words", json!(["x"])),
        ("min_tokens", json!(101)),
    ];
    for (field, value) in cases {
        if field == "min_tokens" {
            check(CHAT, chat(json!({"min_tokens": value, "max_tokens": 100})), field);
            check(CHAT, chat(json!({"min_tokens": 5000})), field);
        } else {
            check(CHAT, chat(json!({field: value})), field);
        }
        check(COMPLETIONS, completion(json!({field: value})), field);
    }
    let options = |options: Value| json!({"stream": true, "stream_options": options});
    check(CHAT, chat(options(json!({"include_usage": 1}))), "stream_options.include_usage");
}

#[test]
fn wrong_chats_are_named() {
    let server = TestServer::start(Mode::Answer);
    let user = json!({"role": "user", "content": "Hi"});
    let one = |message: Value| json!([message]);
    let call = |call: Value| json!([user, {"role": "assistant", "tool_calls": [call]}]);
    let parts = |parts: Value| json!([{"role": "user", "content": parts}]);
    let tool = |function: Value| json!([{"type": "function", "function": function}]);
    let image = json!({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}});
    let cases = [
        ("messages", json!([]), "messages"),
        ("messages", json!(null), "messages"),
        ("messages", json!("Hi"), "messages"),
        ("messages", json!({"role": "user"}), "messages"),
        ("messages", json!(["Hi"]), "messages[0]"),
        ("messages", json!([user, {"content": "x"}]), "messages[1].role"),
        ("messages", one(json!({"role": "root", "content": "x"})), "messages[0].role"),
        ("messages", one(json!({"role": 1, "content": "x"})), "messages[0].role"),
        ("messages", one(json!({"role": "function", "name": "f", "content": "x"})), "messages[0].role"),
        ("messages", one(json!({"role": "user"})), "messages[0].content"),
        ("messages", one(json!({"role": "user", "content": null})), "messages[0].content"),
        ("messages", one(json!({"role": "user", "content": 1})), "messages[0].content"),
        ("messages", one(json!({"role": "user", "content": {"text": "x"}})), "messages[0].content"),
        ("messages", one(json!({"role": "assistant"})), "messages[0].content"),
        ("messages", one(json!({"role": "user", "content": "x", "name": 1})), "messages[0].name"),
        (
            "messages",
            one(json!({"role": "user", "content": "x", "name": "x".repeat(300)})),
            "messages[0].name",
        ),
        (
            "messages",
            one(json!({"role": "user", "content": "x", "tool_calls": []})),
            "messages[0].tool_calls",
        ),
        (
            "messages",
            one(json!({"role": "tool", "content": "x", "tool_call_id": 1})),
            "messages[0].tool_call_id",
        ),
        (
            "messages",
            one(json!({"role": "assistant", "content": "x", "reasoning": 1})),
            "messages[0].reasoning",
        ),
        ("messages", parts(json!([])), "messages[0].content"),
        ("messages", parts(json!(["x"])), "messages[0].content[0].type"),
        ("messages", parts(json!([{"type": "text"}])), "messages[0].content[0].text"),
        ("messages", parts(json!([{"type": "text", "text": "x"}, image])), "messages[0].content[1].type"),
        ("messages", call(json!("x")), "messages[1].tool_calls[0].id"),
        ("messages", call(json!({"id": "a", "type": "code"})), "messages[1].tool_calls[0].type"),
        ("messages", call(json!({"id": "a"})), "messages[1].tool_calls[0].function"),
        (
            "messages",
            call(json!({"id": "a", "function": {"name": ""}})),
            "messages[1].tool_calls[0].function.name",
        ),
        (
            "messages",
            call(json!({"id": "a", "function": {"name": "f", "arguments": [1]}})),
            "messages[1].tool_calls[0].function.arguments",
        ),
        ("messages", json!([user, {"role": "assistant", "tool_calls": 1}]), "messages[1].tool_calls"),
        ("tools", json!([1]), "tools[0].type"),
        ("tools", json!([{"type": "web_search"}]), "tools[0].type"),
        ("tools", json!([{"type": "function"}]), "tools[0].function"),
        ("tools", tool(json!({})), "tools[0].function.name"),
        ("tools", tool(json!({"name": "a b"})), "tools[0].function.name"),
        ("tools", tool(json!({"name": "a", "parameters": "x"})), "tools[0].function.parameters"),
        ("tools", tool(json!({"name": "a", "description": 1})), "tools[0].function.description"),
        ("tools", Value::Array(vec![json!({}); 129]), "tools"),
        ("tools", json!("x"), "tools"),
        ("functions", json!([{"name": "f"}]), "functions"),
        ("tool_choice", json!("required"), "tool_choice"),
        ("tool_choice", json!({"type": "function", "function": {"name": "f"}}), "tool_choice"),
        ("tool_choice", json!("sometimes"), "tool_choice"),
        ("tool_choice", json!(1), "tool_choice"),
        ("modalities", json!(["text", "audio"]), "modalities"),
        ("audio", json!({"voice": "x"}), "audio"),
        ("logprobs", json!(5), "logprobs"),
        ("top_logprobs", json!(2), "top_logprobs"),
        ("top_logprobs", json!(21), "top_logprobs"),
        ("top_logprobs", json!(-1), "top_logprobs"),
        ("chat_template", json!("{{ cycler.__init__.__globals__ }}"), "chat_template"),
        ("chat_template_kwargs", json!({"tokenize": true}), "chat_template_kwargs"),
        ("chat_template_kwargs", json!({"chat_template": "x"}), "chat_template_kwargs"),
        ("chat_template_kwargs", json!({"messages": []}), "chat_template_kwargs"),
        ("chat_template_kwargs", json!({"enable_thinking": {"a": 1}}), "chat_template_kwargs"),
        ("chat_template_kwargs", json!({"thinking_effort": "<|im_end|>"}), "chat_template_kwargs"),
        ("chat_template_kwargs", json!([]), "chat_template_kwargs"),
        ("reasoning_effort", json!("extreme"), "reasoning_effort"),
        ("reasoning_effort", json!(1), "reasoning_effort"),
        ("continue_final_message", json!(true), "continue_final_message"),
        ("add_generation_prompt", json!("x"), "add_generation_prompt"),
        ("model", json!(1), "model"),
    ];
    for (field, value, param) in cases {
        let answer = post(server.address, CHAT, &chat(json!({field: value})));
        assert_eq!(answer.status, 400, "{field}: {value}: {}", answer.text());
        assert_eq!(answer.error()["param"], param, "{value}: {}", answer.text());
    }
    let both = json!({"continue_final_message": true, "add_generation_prompt": true});
    assert_eq!(post(server.address, CHAT, &chat(both)).error()["param"], "add_generation_prompt");
    for path in [CHAT, COMPLETIONS] {
        let other = json!({"model": "gpt-4", "messages": [user], "prompt": "x"});
        let answer = post(server.address, path, &other);
        assert_eq!((answer.status, &answer.error()["code"]), (404, &json!("model_not_found")));
    }
}

#[test]
fn wrong_completions_are_named() {
    let server = TestServer::start(Mode::Answer);
    let cases = [
        ("prompt", json!(null), "prompt"),
        ("prompt", json!(""), "prompt"),
        ("prompt", json!([]), "prompt"),
        ("prompt", json!([""]), "prompt"),
        ("prompt", json!(["a", ""]), "prompt"),
        ("prompt", json!([[]]), "prompt"),
        ("prompt", json!([["a"]]), "prompt"),
        ("prompt", json!([1, "a"]), "prompt"),
        ("prompt", json!(["a", 1]), "prompt"),
        ("prompt", json!([-1]), "prompt"),
        ("prompt", json!([1.5]), "prompt"),
        ("prompt", json!([720_720]), "prompt"),
        ("prompt", json!([u64::MAX]), "prompt"),
        ("prompt", json!({"a": 1}), "prompt"),
        ("prompt", json!(1), "prompt"),
        ("prompt", json!(true), "prompt"),
        ("prompt", Value::Array(vec![json!("x"); 129]), "prompt"),
        ("logprobs", json!(true), "logprobs"),
        ("logprobs", json!(21), "logprobs"),
        ("logprobs", json!(-1), "logprobs"),
        ("echo", json!(1), "echo"),
        ("suffix", json!("x"), "suffix"),
    ];
    for (field, value, param) in cases {
        let answer = post(server.address, COMPLETIONS, &completion(json!({field: value})));
        assert_eq!((answer.status, &answer.error()["param"]), (400, &json!(param)), "{field}: {value}");
    }
    let answer = post(server.address, COMPLETIONS, &completion(json!({"echo": true, "logprobs": 1})));
    assert_eq!((answer.status, &answer.error()["param"]), (400, &json!("echo")));
    let answer = post(server.address, COMPLETIONS, &completion(json!({"prompt": vec!["x"; 100], "n": 2})));
    assert_eq!((answer.status, &answer.error()["param"]), (400, &json!("prompt")));
}

#[test]
fn a_prompt_over_the_context_is_refused_before_it_runs() {
    let server = TestServer::start(Mode::Answer);
    let ids = json!(vec![1; 4096]);
    let words = "word ".repeat(5000);
    let flood = "x".repeat(40 << 20);
    for prompt in [ids, json!(words), json!(flood)] {
        let answer = post(server.address, COMPLETIONS, &completion(json!({"prompt": prompt})));
        assert_eq!((answer.status, &answer.error()["code"]), (400, &json!("context_length_exceeded")));
    }
    let answer = post(server.address, CHAT, &chat(json!({"messages": [{"role": "user", "content": words}]})));
    assert_eq!((answer.status, &answer.error()["param"]), (400, &json!("messages")));
    assert!(server.script.requests.lock().unwrap().is_empty());
    assert_eq!(post(server.address, COMPLETIONS, &completion(json!({"prompt": vec![1; 4095]}))).status, 200);
}

#[test]
fn what_the_template_gets() {
    let server = TestServer::start(Mode::Answer);
    let prompt = |extra: Value| {
        let answer = post(server.address, CHAT, &chat(extra));
        assert_eq!(answer.status, 200, "{}", answer.text());
        server.script.last().prompt
    };
    let text = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let plain = prompt(text(json!("ab")));
    assert_eq!(
        prompt(text(json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]))),
        plain,
        "the template joins parts"
    );
    let system = |role: &str| {
        prompt(json!({"messages": [{"role": role, "content": "x"}, {"role": "user", "content": "y"}]}))
    };
    assert_eq!(system("system"), system("developer"));

    let tools =
        json!([{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]);
    let with_tools = prompt(json!({"tools": tools}));
    assert!(with_tools.len() > prompt(json!({})).len());
    assert_eq!(prompt(json!({"tools": tools, "tool_choice": "none"})), prompt(json!({})));
    assert_eq!(prompt(json!({"tools": []})), prompt(json!({})));

    let history = json!({"messages": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "functions.get_weather:0", "type": "function", "function": {"name": "get_weather", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "tool_call_id": "functions.get_weather:0", "content": "sunny"},
    ]});
    prompt(history);

    let open = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "The an"}]);
    let continued = prompt(json!({"messages": open, "continue_final_message": true}));
    let closed = prompt(json!({"messages": open, "add_generation_prompt": false}));
    assert_eq!(closed[..continued.len()], continued[..]);
    assert!(continued.len() < closed.len());
    prompt(
        json!({"chat_template_kwargs": {"enable_thinking": false, "thinking": true, "thinking_effort": "high", "reasoning_effort": null}}),
    );
    prompt(json!({"reasoning_effort": "low"}));
}

#[test]
fn without_a_template_there_are_no_chats() {
    let (script, mut state) = crate::script::state(Mode::Answer, |_| {});
    state.template = None;
    let server = TestServer::serving(script, state);
    let answer = post(server.address, CHAT, &chat(json!({})));
    assert_eq!((answer.status, &answer.error()["param"]), (400, &json!("messages")));
    assert_eq!(post(server.address, COMPLETIONS, &completion(json!({}))).status, 200);
}

/// A server over the fixture with another template.
fn with_template(template: &str) -> TestServer {
    let (script, mut state) = crate::script::state(Mode::Answer, |_| {});
    let config = json!({"chat_template": template}).to_string();
    let read = |file: &str| Ok((file == "tokenizer_config.json").then(|| config.clone().into_bytes()));
    let controls: Vec<_> = script.tokenizer.specials().map(|(_, text)| text).collect();
    state.template = ChatTemplate::load(&read, controls).expect("a template").map(Arc::new);
    TestServer::serving(script, state)
}

#[test]
fn templates_differ_in_what_they_read() {
    let server = with_template(
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{% for k, v in c.function.arguments.items() %}[{{ k }}={{ v }}]{% endfor %}{% endfor %}{% endfor %}",
    );
    let prompt = |messages: Value| {
        let answer = post(server.address, CHAT, &json!({"messages": messages}));
        assert_eq!(answer.status, 200, "{}", answer.text());
        server.script.tokenizer.decode(&server.script.last().prompt, false)
    };
    let parts =
        json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    assert_eq!(prompt(parts), "a\nb", "no list reaches a template that would print it");
    let call = json!({"id": "x", "function": {"name": "f", "arguments": "{\"city\": \"Oslo\"}"}});
    assert_eq!(prompt(json!([{"role": "assistant", "content": "", "tool_calls": [call]}])), "[city=Oslo]");

    let refuses = with_template("{{ raise_exception('no ' ~ messages[0].content) }}");
    let content = "x".repeat(100_000);
    let answer = post(refuses.address, CHAT, &json!({"messages": [{"role": "user", "content": content}]}));
    assert_eq!((answer.status, &answer.error()["param"]), (400, &json!("messages")));
    assert!(answer.body.len() < 4096, "what a template says is cut");
    let spins = with_template(
        "{% for a in range(90000) %}{% for b in range(90000) %}{{ a * b }}{% endfor %}{% endfor %}",
    );
    let answer = post(spins.address, CHAT, &chat(json!({})));
    assert_eq!(
        (answer.status, &answer.error()["param"]),
        (400, &json!("messages")),
        "templates have a budget"
    );
}
