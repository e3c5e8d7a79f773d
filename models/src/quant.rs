//! `quantization_config`: which weights are stored in which published format.
//!
//! Only what the engine executes from the mapped bytes is accepted; anything else is an error that
//! names the field, because a wrong guess here gives a model that talks nonsense.

use std::collections::HashSet;

use serde_json::Value;

use crate::error::{Error, Result};

/// Most patterns with wildcards, and largest compiled expression: every name is held against each.
const MAX_PATTERNS: usize = 256;
const MAX_EXPRESSION_BYTES: usize = 1 << 18;

/// How one linear weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// `X.weight` in F32, F16 or BF16.
    Plain,
    /// `X.weight` F8_E4M3 with `X.weight_scale_inv` per 128 x 128.
    Fp8,
    /// `X.weight_packed`, `X.weight_scale`, `X.weight_shape`; groups of 32.
    Int4,
    /// `X_blocks`, `X_scales` (gpt-oss experts).
    Mxfp4,
}

/// The checkpoint's scheme.
#[derive(Clone, Debug, Default)]
pub struct Quantisation {
    scheme: Option<Scheme>,
}

#[derive(Clone, Debug)]
struct Scheme {
    stored: Stored,
    /// Modules left unquantised.
    ignore: Ignore,
}

#[derive(Clone, Debug, Default)]
struct Ignore {
    /// The module itself, anything below it, or every module whose last name this is.
    names: HashSet<String>,
    patterns: Vec<Pattern>,
}

impl Ignore {
    fn parse(list: &[Value], field: &str) -> Result<Self> {
        let mut ignore = Self::default();
        for item in list {
            let text = item.as_str().ok_or_else(|| Error::config(field, "holds a non-string"))?;
            match Pattern::parse(text, field)? {
                Some(pattern) => ignore.patterns.push(pattern),
                None => {
                    ignore.names.insert(text.to_owned());
                }
            }
            if ignore.patterns.len() > MAX_PATTERNS {
                return Err(Error::config(field, format!("has more than {MAX_PATTERNS} patterns")));
            }
        }
        Ok(ignore)
    }

    fn matches(&self, name: &str) -> bool {
        // "gate" names every module called so; "lm_head" or a full path names one and its children.
        let mut above = name.match_indices('.').map(|(end, _)| &name[..end]).chain([name]);
        let last = name.rsplit('.').next().unwrap_or(name);
        self.names.contains(last)
            || above.any(|module| self.names.contains(module))
            || self.patterns.iter().any(|pattern| pattern.matches(name))
    }
}

#[derive(Clone, Debug)]
enum Pattern {
    /// `*` stands for any run of characters.
    Glob(String),
    /// compressed-tensors' `re:` form, matched from the start of the name.
    Regex(regex::Regex),
}

impl Pattern {
    /// `None` for a plain name.
    fn parse(text: &str, field: &str) -> Result<Option<Self>> {
        let Some(expression) = text.strip_prefix("re:") else {
            return Ok(text.contains('*').then(|| Self::Glob(text.to_owned())));
        };
        let mut builder = regex::RegexBuilder::new(&format!("^(?:{expression})"));
        builder.size_limit(MAX_EXPRESSION_BYTES).dfa_size_limit(MAX_EXPRESSION_BYTES);
        match builder.build() {
            Ok(regex) => Ok(Some(Self::Regex(regex))),
            Err(error) => Err(Error::config(field, format!("{text:?} cannot be used: {error}"))),
        }
    }

    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Glob(pattern) => glob(pattern.as_bytes(), name.as_bytes()),
            Self::Regex(regex) => regex.is_match(name),
        }
    }
}

/// Whether `pattern` matches the beginning of `text` up to a module boundary; iterative, linear in
/// practice, never exponential.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    loop {
        if p == pattern.len() && (t == text.len() || text[t] == b'.') {
            return true;
        }
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p, t));
            p += 1;
        } else if p < pattern.len() && t < text.len() && pattern[p] == text[t] {
            p += 1;
            t += 1;
        } else if let Some((star_p, star_t)) = star.filter(|&(_, at)| at < text.len()) {
            star = Some((star_p, star_t + 1));
            p = star_p + 1;
            t = star_t + 1;
        } else {
            return false;
        }
    }
}

impl Quantisation {
    /// Reads `quantization_config` (absent or null = nothing is quantised).
    ///
    /// # Errors
    /// A method, format or layout that is not executed.
    pub fn parse(value: Option<&Value>) -> Result<Self> {
        let Some(config) = value.filter(|v| !v.is_null()) else { return Ok(Self::default()) };
        let field = |name: &str| format!("quantization_config.{name}");
        let text = |name: &str| config.get(name).and_then(Value::as_str);
        let method =
            text("quant_method").ok_or_else(|| Error::config(field("quant_method"), "is missing"))?;
        let (stored, ignore_field) = match method {
            "fp8" => {
                expect(config, "fmt", &["e4m3", "float8_e4m3fn"])?;
                let block = config.get("weight_block_size");
                if block.is_none_or(|b| *b != serde_json::json!([128, 128])) {
                    let message =
                        format!("only [128, 128] is supported, not {}", block.unwrap_or(&Value::Null));
                    return Err(Error::config(field("weight_block_size"), message));
                }
                (Stored::Fp8, "modules_to_not_convert")
            }
            "compressed-tensors" => {
                compressed_tensors(config)?;
                (Stored::Int4, "ignore")
            }
            "mxfp4" => (Stored::Mxfp4, "modules_to_not_convert"),
            other => {
                let message = format!("{other:?} is not supported (fp8, compressed-tensors and mxfp4 are)");
                return Err(Error::config(field("quant_method"), message));
            }
        };
        let ignore = match config.get(ignore_field) {
            None | Some(Value::Null) => Ignore::default(),
            Some(Value::Array(list)) => Ignore::parse(list, &field(ignore_field))?,
            Some(_) => return Err(Error::config(field(ignore_field), "is not a list")),
        };
        Ok(Self { scheme: Some(Scheme { stored, ignore }) })
    }

    /// How the linear map `name` (without `.weight`) is stored, if it is one the scheme covers.
    /// Norms, embeddings, the head and routers are never asked for.
    pub fn stored(&self, name: &str) -> Stored {
        match &self.scheme {
            Some(scheme) if !scheme.ignore.matches(name) => scheme.stored,
            _ => Stored::Plain,
        }
    }

    /// Whether anything is quantised.
    pub fn is_some(&self) -> bool {
        self.scheme.is_some()
    }
}

fn expect(config: &Value, name: &str, allowed: &[&str]) -> Result<()> {
    match config.get(name) {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(text)) if allowed.contains(&text.as_str()) => Ok(()),
        Some(other) => Err(Error::config(
            format!("quantization_config.{name}"),
            format!("{other} is not supported (only {})", allowed.join(", ")),
        )),
    }
}

/// Accepts one group: INT4, symmetric, groups of 32, no activation quantisation, `pack-quantized`.
fn compressed_tensors(config: &Value) -> Result<()> {
    let fail =
        |field: &str, message: String| Err(Error::config(format!("quantization_config.{field}"), message));
    if config.get("format").and_then(Value::as_str) != Some("pack-quantized") {
        let found = config.get("format").unwrap_or(&Value::Null);
        return fail("format", format!("{found} is not supported (only \"pack-quantized\")"));
    }
    let groups = config.get("config_groups").and_then(Value::as_object);
    let Some(groups) = groups.filter(|groups| !groups.is_empty()) else {
        return fail("config_groups", "is missing or empty".into());
    };
    for (name, group) in groups {
        for activations in ["input_activations", "output_activations"] {
            if group.get(activations).is_some_and(|v| !v.is_null()) {
                return fail(&format!("config_groups.{name}.{activations}"), "must be null".into());
            }
        }
        if group.get("targets").is_some_and(|t| *t != serde_json::json!(["Linear"])) {
            return fail(&format!("config_groups.{name}.targets"), "only [\"Linear\"] is supported".into());
        }
        let weights = group.get("weights").unwrap_or(&Value::Null);
        let wanted = [
            ("num_bits", serde_json::json!(4)),
            ("type", serde_json::json!("int")),
            ("symmetric", serde_json::json!(true)),
            ("strategy", serde_json::json!("group")),
            ("group_size", serde_json::json!(32)),
        ];
        for (key, value) in wanted {
            if weights.get(key) != Some(&value) {
                let found = weights.get(key).unwrap_or(&Value::Null);
                let message = format!("{found} is not supported (only {value})");
                return fail(&format!("config_groups.{name}.weights.{key}"), message);
            }
        }
        let order = weights.get("actorder");
        if order.is_some_and(|v| !v.is_null() && *v != Value::Bool(false)) {
            return fail(&format!("config_groups.{name}.weights.actorder"), "is not supported".into());
        }
    }
    if config.get("kv_cache_scheme").is_some_and(|v| !v.is_null()) {
        return fail("kv_cache_scheme", "must be null".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_globs_and_expressions_select_modules() {
        let ignore = |text: &str| Ignore::parse(&[text.into()], "ignore").unwrap();
        let name = ignore("lm_head");
        assert!(name.matches("lm_head") && !name.matches("lm_heads") && name.matches("model.lm_head"));
        let path = ignore("model.layers.1");
        assert!(path.matches("model.layers.1.mlp.gate") && !path.matches("model.layers.10.mlp.gate"));
        let glob = ignore("model.layers.*.self_attn");
        assert!(glob.matches("model.layers.12.self_attn.q_proj"));
        assert!(!glob.matches("model.layers.12.mlp.gate"));
        assert!(!glob.matches("model.layers.12.self_attention.q_proj"));
        let regex = ignore(r"re:.*mlp\.(gate|up|gate_up|down)_proj.*");
        assert!(regex.matches("model.layers.0.mlp.gate_proj"));
        assert!(!regex.matches("model.layers.1.mlp.experts.3.gate_proj"));
    }

    #[test]
    fn an_unsupported_scheme_names_its_field() {
        let awq = serde_json::json!({"quant_method": "awq", "bits": 4});
        let message = Quantisation::parse(Some(&awq)).unwrap_err().to_string();
        assert!(message.contains("quantization_config.quant_method") && message.contains("awq"), "{message}");
    }
}
