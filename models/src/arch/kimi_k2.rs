//! Kimi K2 (Instruct, 0905, Thinking): DeepSeek V3's architecture with other numbers.

use serde_json::Value;

use super::deepseek_v3;
use crate::config::ModelConfig;
use crate::error::Result;

pub fn describe(config: &Value) -> Result<ModelConfig> {
    deepseek_v3::describe_at(config, "", "", "kimi_k2")
}
