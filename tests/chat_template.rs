//! Chat templates: the dialect, the files they come from, and templates that mean harm.

use std::time::Instant;

use moebius::template::{ChatInput, ChatTemplate, RenderedPrompt, TemplateError};
use serde_json::{Value, json};

fn template(source: &str) -> Result<ChatTemplate, TemplateError> {
    let read = |name: &str| Ok((name == "chat_template.jinja").then(|| source.as_bytes().to_vec()));
    Ok(ChatTemplate::load(&read, ["<|end|>", "<think>", "</think>"])?.expect("there is a template"))
}

fn render(source: &str, messages: &[Value]) -> Result<RenderedPrompt, TemplateError> {
    template(source)?.render(&ChatInput { messages, ..ChatInput::default() })
}

#[test]
fn hostile_templates_are_stopped_soon() {
    let nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}";
    let cases = [
        format!("{nested}{{% endfor %}}{{% endfor %}}{{% endfor %}}"),
        format!("{nested}x{{% endfor %}}{{% endfor %}}{{% endfor %}}"),
        "{% set n = namespace(s='ab') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}".into(),
        "{% set s %}{{ 'a' * 99999 }}{% endset %}".to_owned() + &"{% set s %}{{ s }}{{ s }}{% endset %}".repeat(40),
        "{% macro f(s) %}{{ f(s ~ s) }}{% endmacro %}{{ f('abcdefgh') }}".into(),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
        "{% set n = namespace(s=[]) %}{% for a in range(99999) %}{% set n.s = [n.s] %}{% endfor %}{{ n.s }}".into(),
        "{% set n = namespace(s=[1]) %}{% for a in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}".into(),
        "{% for x in [[]] recursive %}{{ loop([[[[x]]]]) }}{% endfor %}".into(),
        "{% for a in ['ab'] %}".to_owned() + &"{% for a in [a ~ a] %}".repeat(60) + &"{% endfor %}".repeat(61),
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(),
        "{{ 'x' * 99999999999 }}".into(),
        "{{ range(999999999) | list }}".into(),
        "{% include 'default' %}".into(),
        "{{ ".to_owned() + &"(".repeat(5000),
        "{% if a %}".repeat(5000),
    ];
    for source in &cases {
        let start = Instant::now();
        let error = render(source, &[]).expect_err(source).to_string();
        let seconds = start.elapsed().as_secs_f64();
        println!("{seconds:.3} s: {error}: {}", &source[..source.len().min(70)]);
        assert!(seconds < if cfg!(debug_assertions) { 60.0 } else { 4.0 });
    }
    assert!(template(&"x".repeat(1 << 20)).is_err());
}

#[test]
fn deep_expressions_do_not_exhaust_the_stack() {
    let bytes = 120_000;
    for (link, last) in [
        ("|batch(1)", ""),
        ("|batch(1)", "|tojson"),
        ("|batch(1)", "|string|length"),
        ("|d", ""),
        ("[0]", ""),
    ] {
        let source = "{{ [1]".to_owned() + &link.repeat(bytes / link.len()) + last + " }}";
        println!("{link} {last}: {:?}", render(&source, &[]).map(|prompt| prompt.text().len()));
    }
    for link in ["not ", "-", "1 ~ ", "1 + ", "1 if ", "x.", "a == ", "1 and ", "["] {
        let source = "{{ ".to_owned() + &link.repeat(bytes / link.len()) + "1 }}";
        println!("{link}: {:?}", render(&source, &[]).map(|prompt| prompt.text().len()));
    }
    for link in ["{% if a %}", "{% elif b %}", "{% set x %}", "{% filter upper %}"] {
        println!(
            "{link}: {:?}",
            template(&("{% if x %}".to_owned() + &link.repeat(bytes / link.len()))).map(|_| ())
        );
    }
}

#[test]
fn server_side_template_injection_is_text_or_an_error() {
    let payloads = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('id').read() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ request.application.__globals__ }}",
        "{% for c in ().__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
        "{{ config.items() }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{% import 'os' as os %}{{ os.popen('id') }}",
        "{% include '/etc/passwd' %}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ open('/etc/passwd').read() }}",
        "{{ raise_exception.__globals__ }}",
    ];
    for payload in payloads {
        if let Ok(prompt) = render(payload, &[]) {
            assert!(!prompt.text().contains("root:") && !prompt.text().contains("uid="), "{payload}");
            assert!(prompt.text().len() < 200, "{payload}: {}", prompt.text());
        }
        // As content it is quoted, not run.
        let messages = [json!({"role": "user", "content": payload})];
        assert_eq!(render("{{ messages[0].content }}", &messages).unwrap().text(), payload);
    }
}

#[test]
fn the_dialect_of_published_templates() {
    let messages = [json!({"role": "user", "content": " Hello ", "n": null, "tool_calls": [{"f": 1.0}]})];
    let cases = [
        ("{{ messages[0]['content'].strip() }}|{{ messages[0].get('x', 'd') }}", "Hello|d"),
        ("{{ messages[0].content | trim | upper }}{{ messages[0].missing }}", "HELLO"),
        (
            "{% if messages[0].missing is defined %}a{% else %}b{% endif %}{{ messages[0].n is none }}",
            "bTrue",
        ),
        ("{% for k, v in messages[0].items() %}{{ k }},{% endfor %}", "role,content,n,tool_calls,"),
        (
            "{% for x in range(9) %}{% if x == 1 %}{% continue %}{% endif %}{% if x > 2 %}{% break %}{% endif %}{{ x }}{% endfor %}",
            "02",
        ),
        (
            "{%- set ns = namespace(a=1) %}{% for x in [1, 2] %}{% set ns.a = ns.a + x %}{% endfor %}{{ ns.a }}",
            "4",
        ),
        (
            "{{ messages[0].tool_calls | tojson }}{{ {'a': '<é>'} | tojson }}",
            "[{\"f\": 1.0}]{\"a\": \"<é>\"}",
        ),
        ("{% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),
        ("{% generation %}a{% endgeneration %}{{ 'b'.split(',')[-1] }}", "ab"),
        ("{{ 'a,b'.split(',') | join('+') }}{{ 'abc'[::-1] }}{{ messages[-1:] | length }}", "a+bcba1"),
        (
            "{% macro f(x, y='z') -%}\n {{ x }}{{ y }}\n{%- endmacro %}{{ f('a') }}{{ f('b', y=none) }}",
            "azbNone",
        ),
        ("{{ strftime_now('%Y') | int > 2024 }}{{ bos_token }}{{ tools is none }}", "TrueTrue"),
        ("{% set a, b = 1, 2 %}{{ a ~ b }}{% set c = 3 if a else 4 %}{{ c }}", "123"),
        (
            "{{ none is iterable }}{{ [] is iterable }}{{ {} is iterable }}{{ 'a' is iterable }}{{ 1 is iterable }}",
            "FalseTrueTrueTrueFalse",
        ),
        ("{{ 'x' if messages[0].role in ['user', 'tool'] }}{{ 'a' 'b' }}", "xab"),
    ];
    for (source, want) in cases {
        match render(source, &messages) {
            Ok(prompt) => assert_eq!(prompt.text(), want, "{source}"),
            Err(error) => panic!("{source}: {error}"),
        }
    }
    assert_eq!(render("{{ raise_exception('no') }}", &[]).unwrap_err(), TemplateError::Raised("no".into()));
    let in_macro = "{% macro f() %}{{ raise_exception('no') }}{% endmacro %}{{ f() }}";
    assert_eq!(render(in_macro, &[]).unwrap_err(), TemplateError::Raised("no".into()));
    assert!(render("{{ a.b.c }}", &[]).is_err());
}

#[test]
fn template_files_and_names() {
    let load = |files: &[(&str, &str)]| {
        ChatTemplate::load(
            &|name| Ok(files.iter().find(|f| f.0 == name).map(|f| f.1.as_bytes().to_vec())),
            [],
        )
    };
    let show = |template: &ChatTemplate, tools: Option<&[Value]>| {
        template.render(&ChatInput { tools, ..ChatInput::default() }).map(|prompt| prompt.text().into_owned())
    };
    let listed = r#"{"chat_template": [{"name": "default", "template": "d{{ bos_token }}"},
        {"name": "tool_use", "template": "t"}], "bos_token": {"content": "<s>"}}"#;
    let both = load(&[("tokenizer_config.json", listed)]).unwrap().unwrap();
    assert_eq!(show(&both, None).unwrap(), "d<s>");
    assert_eq!(show(&both, Some(&[])).unwrap(), "t");
    let file = load(&[("tokenizer_config.json", listed), ("chat_template.jinja", "j")]).unwrap().unwrap();
    assert_eq!(show(&file, Some(&[])).unwrap(), "j");
    let json = load(&[("chat_template.json", r#"{"chat_template": "p"}"#)]).unwrap().unwrap();
    assert_eq!(show(&json, None).unwrap(), "p");
    let only = r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "x", "template": ""}]}"#;
    assert!(show(&load(&[("tokenizer_config.json", only)]).unwrap().unwrap(), None).is_err());
    assert!(load(&[("tokenizer_config.json", "{}")]).unwrap().is_none() && load(&[]).unwrap().is_none());
    assert!(load(&[("tokenizer_config.json", "{")]).is_err());
    assert!(
        load(&[("chat_template.jinja", "{% if %}")]).unwrap_err().to_string().contains("chat_template.jinja")
    );
}

#[test]
fn variables_reach_the_template_but_not_the_conversation() {
    let source = "{{ enable_thinking }}{{ messages | length }}{{ add_generation_prompt }}{{ mood }}";
    let variables =
        json!({"enable_thinking": false, "messages": [], "add_generation_prompt": true, "mood": "<|end|>"});
    let messages = [json!({"role": "user", "content": "x"})];
    let input = ChatInput { messages: &messages, variables: variables.as_object(), ..ChatInput::default() };
    let prompt = template(source).unwrap().render(&input).unwrap();
    assert_eq!(prompt.text(), "False1False<|end|>");
    assert_ne!(prompt, RenderedPrompt::trusted("False1False<|end|>".into()));
}

#[test]
fn thinking_in_history_is_found_by_the_template() {
    let source = "{% for m in messages %}{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let messages = [
        json!({"role": "assistant", "content": "<think>a</think>b"}),
        json!({"role": "user", "content": "<think>c</think>d"}),
    ];
    assert_eq!(render(source, &messages).unwrap().text(), "b<think>c</think>d");
}

#[test]
fn the_last_message_can_be_continued() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|end|>{% endfor %}";
    let spaced = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}";
    let messages =
        [json!({"role": "user", "content": "x"}), json!({"role": "assistant", "content": "Once "})];
    let go_on = |source: &str, messages: &[Value]| {
        let input = ChatInput { messages, continue_final_message: true, ..ChatInput::default() };
        template(source).unwrap().render(&input).map(|prompt| prompt.text().into_owned())
    };
    assert_eq!(go_on(source, &messages).unwrap(), "<user>x<|end|><assistant>Once");
    assert_eq!(go_on(spaced, &messages).unwrap(), "<user>x<|end|><assistant>Once ");
    assert!(go_on("constant", &messages).is_err());
    assert!(go_on(source, &[]).is_err());
    assert!(go_on(source, &[json!({"role": "assistant", "content": null})]).is_err());
    let both =
        ChatInput { add_generation_prompt: true, continue_final_message: true, ..ChatInput::default() };
    assert!(template(source).unwrap().render(&both).is_err());
}

#[test]
fn guards_avoid_noncharacters_in_the_text() {
    let source = "{{ messages[0].content }}\u{fdd1}";
    let content = "\u{fdd0}<|end|>\u{fdd2}";
    let messages = [json!({"role": "user", "content": content})];
    assert_eq!(render(source, &messages).unwrap().text(), format!("{content}\u{fdd1}"));
    let ascii =
        render("{{ messages[0].content | tojson(ensure_ascii=true) }}é", &[json!({"content": "é<|end|>"})]);
    assert_eq!(ascii.unwrap().text(), "\"\\u00e9<|end|>\"é");
    let all: String = ('\u{fdd0}'..='\u{fdef}').collect();
    assert!(matches!(render(source, &[json!({"content": all})]), Err(TemplateError::Input(_))));
}
