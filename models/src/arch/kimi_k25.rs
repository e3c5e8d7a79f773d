//! Kimi K2.5, K2.6 and K2.7: a K2 text model under `text_config`, beside a vision tower that is
//! skipped.

use serde_json::Value;

use super::deepseek_v3;
use crate::config::{ModelConfig, SkipRule};
use crate::error::{Error, Result};
use crate::fields::Fields;

pub fn describe(config: &Value) -> Result<ModelConfig> {
    let fields = Fields::new(config, "")?;
    // Of the outer object only the text model's place and the vision side's settings are left.
    fields.ignore(&["model_type", "text_config", "vision_config", "media_placeholder_token_id"]);
    fields.ignore(&["use_unified_vision_chunk", "video_placeholder", "tie_word_embeddings", "vocab_size"]);
    fields.ignore(&["quantization_config", "hidden_size", "image_token_id", "video_token_id"]);
    fields.ignore(&["vision_start_token_id", "vision_end_token_id"]);
    fields.ignore(&["projection_hidden_size", "projection_layer_norm_eps"]);
    fields.finish()?;
    let text = config.get("text_config").ok_or_else(|| Error::config("text_config", "is missing"))?;
    let inner = text.get("model_type").and_then(Value::as_str);
    if !matches!(inner, Some("kimi_k2" | "deepseek_v3")) {
        let message = format!("{inner:?} is not supported (kimi_k2 and deepseek_v3 are)");
        return Err(Error::config("text_config.model_type", message));
    }
    // Some releases hold the scheme beside the text model instead of inside it.
    let mut text = text.clone();
    if let (Some(object), Some(outer)) = (text.as_object_mut(), config.get("quantization_config")) {
        object.entry("quantization_config").or_insert_with(|| outer.clone());
    }
    let mut model = deepseek_v3::describe_at(&text, "text_config", "language_model.", "kimi_k25")?;
    for prefix in ["vision_tower.", "mm_projector."] {
        model.skip.push(SkipRule { prefix: prefix.into(), suffix: String::new(), reason: "vision tower" });
    }
    Ok(model)
}
