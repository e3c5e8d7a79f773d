//! The byte-level tokenizer written beside every synthetic checkpoint: ids 0 to 255 are bytes, then
//! come the control tokens. No published vocabulary is copied.

use serde_json::{Map, Value, json};

/// Control tokens, from id 256 on.
const CONTROLS: [&str; 7] =
    ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "[PAD]"];
/// Ids in all; a model needs at least as many embedding rows.
pub(crate) const SIZE: usize = 256 + CONTROLS.len();

const CHAT_TEMPLATE: &str = "{%- for message in messages -%}<|im_{{ message['role'] }}|>{{ message['content'] }}\
     <|im_end|>{%- endfor -%}{%- if add_generation_prompt -%}<|im_assistant|>{%- endif -%}";

fn id(control: &str) -> usize {
    256 + CONTROLS.iter().position(|&name| name == control).expect("one of CONTROLS")
}

/// Replaces the token ids of a configuration.
pub(crate) fn set_ids(config: &mut Value) {
    for (field, control) in
        [("bos_token_id", "[BOS]"), ("eos_token_id", "<|im_end|>"), ("pad_token_id", "[PAD]")]
    {
        config[field] = id(control).into();
    }
}

/// `generation_config.json`: greedy, so that runs can be compared.
pub(crate) fn generation_config() -> Value {
    let mut config = json!({"do_sample": false, "transformers_version": "4.51.0"});
    set_ids(&mut config);
    config
}

/// `tokenizer_config.json`.
pub(crate) fn tokenizer_config() -> Value {
    let token = |content: &str| json!({"content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true});
    let added: Map<String, Value> =
        CONTROLS.iter().map(|&name| (id(name).to_string(), token(name))).collect();
    json!({
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "<|im_end|>",
        "pad_token": "[PAD]",
        "unk_token": null,
        "clean_up_tokenization_spaces": false,
        "tokenizer_class": "TikTokenTokenizer",
        "chat_template": CHAT_TEMPLATE,
    })
}

/// `tiktoken.model`: every byte, by its own value.
pub(crate) fn tiktoken_model() -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |value: usize| char::from(DIGITS[value]);
    (0..256).map(|byte| format!("{}{}== {byte}\n", digit(byte >> 2), digit((byte & 3) << 4))).collect()
}
