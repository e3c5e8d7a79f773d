//! What can be written: named shapes, whole published shapes, and the user's own `config.json`.

use std::path::Path;

use serde_json::{Value, json};

use super::SynthError;
use super::published::{self, KIMI_UNQUANTISED, PUBLISHED, Shape, int4, with, yarn};
use super::tokenizer;

/// Largest `config.json` that is read.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Before the name of a whole published shape.
const FULL: &str = "full:";

/// A shape to write.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// What it was asked for as.
    pub name: String,
    /// Its `config.json`, with the token ids of the byte-level tokenizer that is written beside it.
    pub config: Value,
}

/// The fields of `config.json` that describe the text model.
fn text(config: &mut Value) -> &mut Value {
    if config["text_config"].is_object() { &mut config["text_config"] } else { config }
}

fn slice_of_k2() -> Value {
    with(published::kimi_k2_thinking(), json!({"num_hidden_layers": 2}))
}

fn slice_of_qwen3() -> Value {
    let ignore = ["lm_head", "re:.*self_attn.*", r"re:.*mlp\.gate$"];
    let changes =
        json!({"num_hidden_layers": 8, "max_window_layers": 8, "quantization_config": int4(&ignore)});
    with(published::qwen3_30b(), changes)
}

/// Under 1 M parameters; a cache of 512 bytes per token. Two layers of two heads, since attention is all of the work at
/// its end: 262,144 tokens are 6e13 operations, which two cores do in minutes.
fn tiny_256k() -> Value {
    let changes = json!({
        "hidden_size": 128, "intermediate_size": 384, "kv_lora_rank": 96, "moe_intermediate_size": 64,
        "n_routed_experts": 16, "num_attention_heads": 2, "num_experts_per_tok": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "q_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
        "v_head_dim": 32, "vocab_size": 512, "max_position_embeddings": 262_144,
        "rope_scaling": yarn(64.0, 1.0, 1.0), "quantization_config": int4(KIMI_UNQUANTISED),
    });
    with(published::kimi_k2_thinking(), changes)
}

const NAMED: &[Shape] =
    &[("kimi-k2-slice", slice_of_k2), ("qwen3-30b-slice", slice_of_qwen3), ("tiny-256k", tiny_256k)];

impl Recipe {
    /// The names that [`Recipe::find`] knows, beside paths.
    pub fn names() -> impl Iterator<Item = &'static str> {
        let full = PUBLISHED.iter().map(|(name, _)| *name);
        NAMED.iter().map(|(name, _)| *name).chain(full)
    }

    /// A recipe by its name: one of the named shapes, `full:ORG-MODEL` (`full:ORG/MODEL` too), or the
    /// path of a `config.json` or its folder.
    ///
    /// `layers` replaces the number of decoder layers; for `kimi-k2-slice` it counts the layers with
    /// experts, which one dense layer precedes.
    ///
    /// # Errors
    /// If there is no such recipe or file, or its model cannot be run.
    pub fn find(name: &str, layers: Option<usize>) -> Result<Self, SynthError> {
        if let Some((_, config)) = NAMED.iter().find(|(known, _)| *known == name) {
            let dense = usize::from(name == "kimi-k2-slice");
            return Self::new(name, config(), layers.map(|layers| layers.saturating_add(dense)));
        }
        if name.starts_with(FULL) {
            let wanted = name.replace('/', "-");
            let found = PUBLISHED.iter().find(|(known, _)| *known == wanted);
            let (_, config) = found.ok_or_else(|| SynthError::Unknown(name.to_owned()))?;
            return Self::new(name, config(), layers);
        }
        let mut path = Path::new(name).to_owned();
        if path.is_dir() {
            path.push("config.json");
        }
        let io = |error| SynthError::Io(path.clone(), error);
        let size = match path.metadata() {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(SynthError::Unknown(name.to_owned()));
            }
            Err(error) => return Err(io(error)),
        };
        let refuse = |why: String| SynthError::Config(format!("{}: {why}", path.display()));
        if size > MAX_CONFIG_BYTES {
            return Err(refuse(format!("{size} bytes; the limit is {MAX_CONFIG_BYTES}")));
        }
        let bytes = std::fs::read(&path).map_err(io)?;
        let config: Value = serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
        if !config.is_object() {
            return Err(refuse("is no object".into()));
        }
        Self::new(name, config, layers)
    }

    /// A recipe for a configuration, with another number of layers if asked.
    ///
    /// # Errors
    /// If the model cannot be run, or its vocabulary is too small for bytes and control tokens.
    pub fn new(name: &str, mut config: Value, layers: Option<usize>) -> Result<Self, SynthError> {
        if let Some(layers) = layers {
            set_layers(text(&mut config), layers);
        }
        let vocab = models::arch::describe(&config)?.vocab;
        if vocab < tokenizer::SIZE {
            let message = format!(
                "vocab_size: {vocab} is too small for bytes and control tokens ({})",
                tokenizer::SIZE
            );
            return Err(SynthError::Config(message));
        }
        tokenizer::set_ids(&mut config);
        if config["text_config"].is_object() {
            tokenizer::set_ids(&mut config["text_config"]);
        }
        Ok(Self { name: name.to_owned(), config })
    }
}

/// Sets the number of layers; lists with an entry per layer are repeated or cut to match.
fn set_layers(text: &mut Value, layers: usize) {
    let Some(fields) = text.as_object_mut() else { return };
    let before = fields.get("num_hidden_layers").and_then(Value::as_u64);
    for value in fields.values_mut() {
        if let Value::Array(list) = value
            && !list.is_empty()
            && Some(list.len() as u64) == before
        {
            *list = list.iter().cycle().take(layers).cloned().collect();
        }
    }
    fields.insert("num_hidden_layers".into(), layers.into());
}
