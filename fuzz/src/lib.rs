//! The bodies of the fuzz targets: plain functions of bytes, for libFuzzer and for `tests/bad_input.rs`.

pub mod chat_template;
#[cfg(feature = "server")]
pub mod http_body;
pub mod index_and_config;
pub mod safetensors_header;
pub mod tokenizer_files;

/// A target's name, its body, and inputs to begin with.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// All targets.
pub const TARGETS: &[Target] = &[
    ("safetensors_header", safetensors_header::run, safetensors_header::seeds),
    ("index_and_config", index_and_config::run, index_and_config::seeds),
    ("tokenizer_files", tokenizer_files::run, tokenizer_files::seeds),
    ("chat_template", chat_template::run, chat_template::seeds),
    #[cfg(feature = "server")]
    ("http_body", http_body::run, http_body::seeds),
];

/// The part before the first NUL and the part after it.
pub(crate) fn halves(data: &[u8]) -> (&[u8], &[u8]) {
    match data.iter().position(|byte| *byte == 0) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (data, &[]),
    }
}

/// A `tiktoken.model` of the 256 single bytes and some words.
pub(crate) fn ranks() -> String {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let line = |byte: u32| {
        let (high, low) = (digits[(byte >> 2) as usize] as char, digits[(byte << 4 & 63) as usize] as char);
        format!("{high}{low}== {byte}\n")
    };
    (0..256).map(line).collect::<String>() + "YWI= 256\nYWJj 257\n"
}

/// A `tokenizer_config.json` that goes with [`ranks`].
pub(crate) const TOKENIZER_CONFIG: &str = r#"{"added_tokens_decoder": {
    "258": {"content": "<|im_end|>", "special": true}, "259": {"content": "<think>", "special": false}},
    "eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}"}"#;
