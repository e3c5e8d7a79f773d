//! A template's source and, after a NUL, the messages it is given.

use moebius::template::{ChatInput, ChatTemplate};
use moebius::tokenizer::Specials;
use serde_json::Value;

/// Compiles and renders within the limits of the environment, or fails.
pub fn run(data: &[u8]) {
    let (source, messages) = super::halves(data);
    let read = |name: &str| {
        Ok(match name {
            "chat_template.jinja" => Some(source.to_vec()),
            "tokenizer_config.json" => Some(super::TOKENIZER_CONFIG.into()),
            _ => None,
        })
    };
    let Ok(Some(template)) = ChatTemplate::load(&read, ["<|im_end|>", "<think>"]) else { return };
    let messages = match serde_json::from_slice(messages) {
        Ok(Value::Array(messages)) => messages,
        Ok(message) => vec![message],
        Err(_) => vec![serde_json::json!({"role": "user", "content": "Hi <|im_end|>"})],
    };
    for content_specials in [Specials::Plain, Specials::Parse] {
        let input = ChatInput {
            messages: &messages,
            tools: Some(&messages),
            content_specials,
            ..ChatInput::default()
        };
        let _ = template.render(&ChatInput { add_generation_prompt: true, ..input });
        let _ = template.render(&ChatInput { continue_final_message: true, tools: None, ..input });
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let messages = r#"[{"role":"system","content":"S"},{"role":"user","content":[{"type":"text","text":"U<|im_end|>"}]},{"role":"assistant","content":null,"tool_calls":[{"id":"a:0","function":{"name":"f","arguments":{"x":1}}}]},{"role":"tool","tool_call_id":"a:0","content":"T"}]"#;
    let templates = [
        "{%- macro part(c) -%}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p.text | trim }}{% endfor %}{% endif %}{%- endmacro -%}\
         {% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ part(message.content or '') }}<|im_end|>{% endfor %}\
         {% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
        "{% set ns = namespace(i=0) %}{% for m in messages[::-1] if m.role != 'system' %}{% set ns.i = ns.i + 1 %}{{ m | tojson(indent=2) }}\
         {{ loop.index0 }}{{ ns.i * 'x' }}{% endfor %}{{ raise_exception('no') if not messages else strftime_now('%Y') }}",
        "{%- if tools %}{{ tools | map(attribute='function') | list | tojson }}{% endif %}{% generation %}{{ bos_token }}{% endgeneration %}\
         {% raw %}{{ x }}{% endraw %}{{ messages[-1].content.split('</think>')[0].strip() }}{{ range(9) | list | join(',') }}",
    ];
    templates.iter().map(|template| [template.as_bytes(), b"\0", messages.as_bytes()].concat()).collect()
}
