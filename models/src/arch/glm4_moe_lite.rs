//! GLM-4.7-Flash: DeepSeek V3's architecture under GLM's name.

use serde_json::Value;

use super::deepseek_v3;
use crate::config::ModelConfig;
use crate::error::Result;

pub fn describe(config: &Value) -> Result<ModelConfig> {
    deepseek_v3::describe_at(config, "", "", "glm4_moe_lite")
}
