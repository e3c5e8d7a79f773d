//! One file per architecture, named after its `model_type`; this table finds it.
//!
//! An architecture declares: it turns `config.json` into a [`ModelConfig`] and implements nothing.
//! To add one, write its file and its line here.

mod common;

use serde_json::Value;

use crate::config::ModelConfig;
use crate::error::{Error, Result};

type Describe = fn(&Value) -> Result<ModelConfig>;

/// Declares the module of every architecture and the table that finds it.
macro_rules! architectures {
    ($($name:ident,)*) => {
        $(mod $name;)*
        const ARCHITECTURES: &[(&str, Describe)] = &[$((stringify!($name), $name::describe),)*];
    };
}

architectures! {
    deepseek_v2,
    deepseek_v3,
    ernie4_5_moe,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    hunyuan_v1_moe,
    kimi_k2,
    kimi_k25,
    minimax_m2,
    mixtral,
    olmoe,
    qwen3_moe,
}

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
