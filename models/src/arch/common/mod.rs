//! What the published architectures share: names, plain attention, gated MLPs, routers. Pieces to
//! declare with, never a model.

mod attention;
mod router;

use kernels::experts::Activation;
use serde_json::Value;

use crate::config::{Ffn, LayerSpec, Linear, Mixer, Mlp, ModelConfig, Residual, SkipRule};
use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::quant::Quantisation;

pub use attention::{Attention, Norms};
pub use router::{PROJECTIONS, RouterKind, W_NAMES, moe};

/// The fields every decoder has.
pub struct Base<'a> {
    pub fields: Fields<'a>,
    /// Prefix of the decoder's tensors, `model` or `language_model.model`.
    root: String,
    pub hidden: usize,
    pub layers: usize,
    vocab: usize,
    max_positions: usize,
    norm_epsilon: f32,
    /// Whether the output head is the embedding.
    pub tied: bool,
    quantisation: Quantisation,
    skip: Vec<SkipRule>,
}

impl<'a> Base<'a> {
    /// Reads them from the object at `path`; `prefix` (empty or ending in a dot) stands before
    /// every tensor name.
    pub fn read(config: &'a Value, path: &str, prefix: &str) -> Result<Self> {
        let fields = Fields::new(config, path)?;
        fields.ignore(&["model_type"]);
        fields.only("hidden_act", &["silu".into(), "swish".into()])?;
        let norm_epsilon = fields.opt_number("rms_norm_eps")?.unwrap_or(1e-6);
        if norm_epsilon < 0.0 {
            return Err(Error::config(fields.path("rms_norm_eps"), format!("{norm_epsilon} is negative")));
        }
        Ok(Self {
            root: format!("{prefix}model"),
            hidden: fields.size("hidden_size")?,
            layers: fields.layers("num_hidden_layers")?,
            vocab: fields.size("vocab_size")?,
            max_positions: fields.size("max_position_embeddings")?,
            norm_epsilon: norm_epsilon as f32,
            tied: fields.flag_or("tie_word_embeddings", false)?,
            quantisation: Quantisation::parse(fields.value("quantization_config"))?,
            // Old exports kept the rotary frequencies as a buffer.
            skip: vec![SkipRule {
                prefix: String::new(),
                suffix: ".rotary_emb.inv_freq".into(),
                reason: "buffer that is recomputed",
            }],
            fields,
        })
    }

    /// `model.layers.<i>`.
    pub fn layer_name(&self, layer: usize) -> String {
        format!("{}.layers.{layer}", self.root)
    }

    /// Allows tensors below `prefix` (within the decoder's names) to be present unread.
    pub fn skip(&mut self, prefix: &str, reason: &'static str) {
        let prefix = format!("{}.{prefix}", self.root);
        self.skip.push(SkipRule { prefix, suffix: String::new(), reason });
    }

    /// Allows multi-token-prediction layers, stored as layers after the last.
    pub fn skip_prediction_layers(&mut self, field: &str) -> Result<()> {
        let count = self.fields.size_or(field, 0)?.min(16);
        for layer in self.layers..self.layers + count {
            self.skip(&format!("layers.{layer}."), "multi-token-prediction layer");
        }
        Ok(())
    }

    /// A linear map.
    pub fn linear(&self, name: String, rows: usize, cols: usize) -> Linear {
        Linear { name, rows, cols, bias: false }
    }

    /// `gate_proj`, `up_proj` and `down_proj` below `name`.
    pub fn mlp(&self, name: &str, intermediate: usize) -> Mlp {
        Mlp {
            gate: self.linear(format!("{name}.gate_proj"), intermediate, self.hidden),
            up: self.linear(format!("{name}.up_proj"), intermediate, self.hidden),
            down: self.linear(format!("{name}.down_proj"), self.hidden, intermediate),
            activation: Activation::SiluGlu,
        }
    }

    /// Layer `layer` with the customary norm names.
    pub fn layer(&self, layer: usize, mixer: Mixer, ffn: Ffn) -> LayerSpec {
        let name = self.layer_name(layer);
        LayerSpec {
            input_norm: format!("{name}.input_layernorm.weight"),
            post_norm: format!("{name}.post_attention_layernorm.weight"),
            mixer,
            ffn,
            residual: Residual::Add,
        }
    }

    /// The whole description; every field must have been accounted for by now.
    pub fn finish(mut self, model_type: &str, prefix: &str, layers: Vec<LayerSpec>) -> Result<ModelConfig> {
        self.fields.finish()?;
        let head = format!("{prefix}lm_head.weight");
        if self.tied {
            let reason = "output head tied to the embedding";
            self.skip.push(SkipRule { prefix: head.clone(), suffix: String::new(), reason });
        }
        Ok(ModelConfig {
            model_type: model_type.to_owned(),
            hidden: self.hidden,
            vocab: self.vocab,
            max_positions: self.max_positions,
            embedding: format!("{}.embed_tokens.weight", self.root),
            final_norm: format!("{}.norm.weight", self.root),
            head: (!self.tied).then_some(head),
            norm_epsilon: self.norm_epsilon,
            layers,
            skip: self.skip,
            quantisation: self.quantisation,
        })
    }
}
