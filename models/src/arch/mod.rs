//! One file per architecture, named after its `model_type`; this table finds it.
//!
//! An architecture declares: it turns `config.json` into a [`ModelConfig`] and implements nothing.
//! To add one, write its file and its line here.

mod common;

mod deepseek_v2;
mod deepseek_v3;
mod ernie4_5_moe;
mod glm4_moe;
mod glm4_moe_lite;
mod gpt_oss;
mod hunyuan_v1_moe;
mod kimi_k2;
mod kimi_k25;
mod minimax_m2;
mod olmoe;
mod qwen3_moe;

use serde_json::Value;

use crate::config::ModelConfig;
use crate::error::{Error, Result};

type Describe = fn(&Value) -> Result<ModelConfig>;

const ARCHITECTURES: &[(&str, Describe)] = &[
    ("deepseek_v2", deepseek_v2::describe),
    ("deepseek_v3", deepseek_v3::describe),
    ("ernie4_5_moe", ernie4_5_moe::describe),
    ("glm4_moe", glm4_moe::describe),
    ("glm4_moe_lite", glm4_moe_lite::describe),
    ("gpt_oss", gpt_oss::describe),
    ("hunyuan_v1_moe", hunyuan_v1_moe::describe),
    ("kimi_k2", kimi_k2::describe),
    ("kimi_k25", kimi_k25::describe),
    ("minimax_m2", minimax_m2::describe),
    ("olmoe", olmoe::describe),
    ("qwen3_moe", qwen3_moe::describe),
];

/// Every `model_type` that can be run.
pub fn supported() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|(name, _)| *name)
}

/// Describes the model of a `config.json`.
///
/// # Errors
/// If the architecture is unknown, or a field is missing, contradictory or not understood.
pub fn describe(config: &Value) -> Result<ModelConfig> {
    let model_type = config.get("model_type").and_then(Value::as_str);
    let model_type = model_type.ok_or_else(|| Error::config("model_type", "is missing"))?;
    match ARCHITECTURES.iter().find(|(name, _)| *name == model_type) {
        Some((_, describe)) => describe(config),
        None => {
            let known: Vec<&str> = supported().collect();
            let message = format!("{model_type:?} is not supported ({} are)", known.join(", "));
            Err(Error::config("model_type", message))
        }
    }
}
