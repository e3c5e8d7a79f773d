//! Reads `config.json` strictly: every field is taken by an architecture, known to leave the maths
//! alone, or switched off. A field that is none of these is an error, because it may change what
//! the model computes.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Largest width, count or length accepted; keeps every product of two of them within 64 bits.
const MAX_SIZE: u64 = 1 << 31;
/// Most layers accepted.
const MAX_LAYERS: usize = 4096;

/// Fields that describe the file, its training, its generation defaults or its embedding in a
/// Python library, and that do not change what a forward pass computes.
const NEUTRAL: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "aux_loss_alpha",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "embedding_dropout",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "ep_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "hidden_dropout",
    "id2label",
    "ignore_index",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "router_bias_update_speed",
    "router_jitter_noise",
    "router_z_loss_coef",
    "sep_token_id",
    "seq_aux",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
    "_from_model_config",
    "max_window_layers",
];

/// One object of `config.json`.
pub struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: String,
    taken: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    /// Wraps the object at `path` (empty for the file itself).
    ///
    /// # Errors
    /// If the value is not an object.
    pub fn new(value: &'a Value, path: &str) -> Result<Self> {
        let object = value.as_object();
        let name = if path.is_empty() { "the file" } else { path };
        let object = object.ok_or_else(|| Error::config(name, "is not an object"))?;
        Ok(Self { object, path: path.to_owned(), taken: RefCell::default() })
    }

    /// The name of a field with its parents, for messages.
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    fn error(&self, name: &str, message: impl Into<String>) -> Error {
        Error::config(self.path(name), message)
    }

    /// A field's value; null counts as absent.
    pub fn value(&self, name: &str) -> Option<&'a Value> {
        self.taken.borrow_mut().insert(name.to_owned());
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// A nested object.
    ///
    /// # Errors
    /// If it is there and not an object.
    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>> {
        self.value(name).map(|value| Fields::new(value, &self.path(name))).transpose()
    }

    /// A non-negative whole number.
    ///
    /// # Errors
    /// If it is there and is none, or is larger than any model.
    pub fn opt_size(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let whole = value
            .as_u64()
            .or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && *f >= 0.0).map(|f| f as u64));
        match whole {
            Some(n) if n <= MAX_SIZE => Ok(Some(n as usize)),
            Some(n) => Err(self.error(name, format!("{n} is over the limit of {MAX_SIZE}"))),
            None => Err(self.error(name, format!("{value} is not a non-negative whole number"))),
        }
    }

    /// As [`Fields::opt_size`], at least 1 and required.
    ///
    /// # Errors
    /// If it is missing, 0 or no size.
    pub fn size(&self, name: &str) -> Result<usize> {
        match self.opt_size(name)? {
            Some(0) => Err(self.error(name, "must be at least 1")),
            Some(n) => Ok(n),
            None => Err(self.error(name, "is missing")),
        }
    }

    /// As [`Fields::opt_size`] with a default.
    ///
    /// # Errors
    /// If it is no size.
    pub fn size_or(&self, name: &str, default: usize) -> Result<usize> {
        Ok(self.opt_size(name)?.unwrap_or(default))
    }

    /// The number of layers, bounded.
    ///
    /// # Errors
    /// If it is missing or over the limit.
    pub fn layers(&self, name: &str) -> Result<usize> {
        let layers = self.size(name)?;
        if layers > MAX_LAYERS {
            return Err(self.error(name, format!("{layers} is over the limit of {MAX_LAYERS}")));
        }
        Ok(layers)
    }

    /// A number that is finite in f32, in which it is computed with.
    ///
    /// # Errors
    /// If it is there and is none.
    pub fn opt_number(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if (number as f32).is_finite() => Ok(Some(number)),
            Some(number) => Err(self.error(name, format!("{number:e} is out of range"))),
            None => Err(self.error(name, format!("{value} is not a number"))),
        }
    }

    /// A required finite number.
    ///
    /// # Errors
    /// If it is missing or none.
    pub fn number(&self, name: &str) -> Result<f64> {
        self.opt_number(name)?.ok_or_else(|| self.error(name, "is missing"))
    }

    /// A switch with a default.
    ///
    /// # Errors
    /// If it is there and neither true nor false.
    pub fn flag_or(&self, name: &str, default: bool) -> Result<bool> {
        match self.value(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.error(name, format!("{other} is neither true nor false"))),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// If it is there and is none.
    pub fn opt_text(&self, name: &str) -> Result<Option<&'a str>> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.error(name, format!("{other} is not a text"))),
        }
    }

    /// A number that is the same for all layers or given per layer.
    ///
    /// # Errors
    /// If it is missing, no size, or a list of another length.
    pub fn size_per_layer(&self, name: &str, layers: usize) -> Result<Vec<usize>> {
        match self.value(name) {
            Some(Value::Array(list)) if list.len() == layers => list
                .iter()
                .map(|v| v.as_u64().filter(|n| (1..=MAX_SIZE).contains(n)).map(|n| n as usize))
                .collect::<Option<_>>()
                .ok_or_else(|| self.error(name, "holds something that is not a positive whole number")),
            Some(Value::Array(list)) => {
                Err(self.error(name, format!("has {} entries for {layers} layers", list.len())))
            }
            _ => Ok(vec![self.size(name)?; layers]),
        }
    }

    /// One of two words per layer, as whether it is the second.
    ///
    /// # Errors
    /// If it is there and is no list of these, or one of another length.
    pub fn word_per_layer(&self, name: &str, layers: usize, words: [&str; 2]) -> Result<Option<Vec<bool>>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let second = |word: &Value| words.iter().position(|known| word == known).map(|index| index == 1);
        let list = value.as_array().and_then(|list| list.iter().map(second).collect::<Option<Vec<_>>>());
        list.filter(|list| list.len() == layers).map(Some).ok_or_else(|| {
            self.error(name, format!("must name {} or {} for every layer", words[0], words[1]))
        })
    }

    /// Accepts absence or one of `allowed`; anything else would change the maths.
    ///
    /// # Errors
    /// If it has another value.
    pub fn only(&self, name: &str, allowed: &[Value]) -> Result<()> {
        match self.value(name) {
            Some(value) if !allowed.contains(value) => {
                let list: Vec<String> = allowed.iter().map(Value::to_string).collect();
                let list = if list.is_empty() { "null".to_owned() } else { list.join(", ") };
                Err(self.error(name, format!("{} is not supported (only {list})", shown(value))))
            }
            _ => Ok(()),
        }
    }

    /// Marks fields that this family carries and that do not change its maths.
    pub fn ignore(&self, names: &[&str]) {
        self.taken.borrow_mut().extend(names.iter().map(|&name| name.to_owned()));
    }

    /// Every field must have been taken, be neutral, or be switched off.
    ///
    /// # Errors
    /// Names the first field that is none of these.
    pub fn finish(&self) -> Result<()> {
        let taken = self.taken.borrow();
        for (name, value) in self.object {
            let off = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::String(text) => text.is_empty(),
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::Bool(true) => false,
            };
            if !off && !taken.contains(name) && !NEUTRAL.contains(&name.as_str()) {
                let message =
                    format!("{} is not understood and may change what the model computes", shown(value));
                return Err(self.error(name, message));
            }
        }
        Ok(())
    }
}

/// A value for a message: the beginning of a long one.
fn shown(value: &Value) -> String {
    const MOST: usize = 200;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_unknown_field_is_an_error_unless_it_is_off() {
        let value = json!({"hidden_size": 8, "new_trick": null, "torch_dtype": "bfloat16"});
        let fields = Fields::new(&value, "text_config").unwrap();
        assert_eq!(fields.size("hidden_size").unwrap(), 8);
        fields.finish().unwrap();
        let value = json!({"new_trick": 2});
        let message = Fields::new(&value, "text_config").unwrap().finish().unwrap_err().to_string();
        assert!(message.contains("text_config.new_trick"), "{message}");
    }

    #[test]
    fn numbers_are_bounded() {
        let value = json!({"a": -1, "b": 1e300, "c": 0, "d": "8", "e": 8.0, "f": 2.5});
        let fields = Fields::new(&value, "").unwrap();
        for name in ["a", "b", "c", "d", "f"] {
            assert!(fields.size(name).is_err(), "{name}");
        }
        assert_eq!(fields.size("e").unwrap(), 8);
    }
}
