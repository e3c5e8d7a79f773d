//! What the published architectures share: names, plain attention, gated MLPs, routers. Pieces to
//! declare with, never a model.

use kernels::experts::Activation;
use kernels::rope::Rotation;
use kernels::route::{GroupRule, Groups, Normalise, RouterRule, Score};
use serde_json::Value;

use crate::config::{
    Experts, Ffn, Gqa, LayerSpec, Linear, Mixer, Mlp, ModelConfig, Moe, QkNorm, Residual, Rope, SkipRule,
};
use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::quant::Quantisation;
use crate::rope;

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
    tied: bool,
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

    /// `q_proj`, `k_proj`, `v_proj` and `o_proj` below `self_attn`, with what [`Attention`] says.
    pub fn gqa(&self, layer: usize, attention: &Attention) -> Gqa {
        let Attention { heads, kv_heads, head_dim, qkv_bias, o_bias, .. } = *attention;
        let name = format!("{}.self_attn", self.layer_name(layer));
        let input = |part: &str, heads: usize| Linear {
            bias: qkv_bias,
            ..self.linear(format!("{name}.{part}"), heads * head_dim, self.hidden)
        };
        let o = self.linear(format!("{name}.o_proj"), self.hidden, heads * head_dim);
        let norm = |part: &str| format!("{name}.{part}.weight");
        Gqa {
            heads,
            kv_heads,
            head_dim,
            q: input("q_proj", heads),
            k: input("k_proj", kv_heads),
            v: input("v_proj", kv_heads),
            o: Linear { bias: o_bias, ..o },
            qk_norm: match attention.qk_norm {
                Norms::None => QkNorm::None,
                Norms::PerHead => QkNorm::PerHead { q: norm("q_norm"), k: norm("k_norm") },
                Norms::Whole => QkNorm::Whole { q: norm("q_norm"), k: norm("k_norm") },
                Norms::PerHeadAfterRope => {
                    QkNorm::PerHeadAfterRope { q: norm("query_layernorm"), k: norm("key_layernorm") }
                }
            },
            rope: Some(attention.rope.clone()),
            window: attention.window,
            sinks: None,
            scale: (head_dim as f32).powf(-0.5),
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

/// Which norms plain attention has.
#[derive(Clone, Copy)]
pub enum Norms {
    None,
    PerHead,
    PerHeadAfterRope,
    Whole,
}

/// The fields of plain grouped-query attention, the same for all layers unless changed.
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub qk_norm: Norms,
    pub rope: Rope,
    pub window: Option<usize>,
}

impl Attention {
    /// Reads head counts and the rotation over `rotary` of the head's values (`None` = all).
    pub fn read(base: &Base, qk_norm: Norms, rotation: Rotation, rotary: Option<usize>) -> Result<Self> {
        let fields = &base.fields;
        let heads = fields.size("num_attention_heads")?;
        let kv_heads = fields.size_or("num_key_value_heads", heads)?;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let message = format!("{kv_heads} does not divide the {heads} query heads");
            return Err(Error::config(fields.path("num_key_value_heads"), message));
        }
        let head_dim = match fields.opt_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if base.hidden.is_multiple_of(heads) => base.hidden / heads,
            None => return Err(Error::config(fields.path("head_dim"), "is missing and does not follow")),
        };
        let rotary = rotary.unwrap_or(head_dim);
        if rotary > head_dim {
            let message = format!("{rotary} rotated values are more than a head's {head_dim}");
            return Err(Error::config(fields.path("head_dim"), message));
        }
        let rope = rope::read(fields, rotary, rotation, 10_000.0)?.rope;
        let (qkv_bias, o_bias) = (false, false);
        Ok(Self { heads, kv_heads, head_dim, qkv_bias, o_bias, qk_norm, rope, window: None })
    }

    /// `partial_rotary_factor` of a head, as newer and older files hold it.
    pub fn rotary_dim(base: &Base, default: f64) -> Result<Option<usize>> {
        let fields = &base.fields;
        let nested = match fields.object("rope_parameters")? {
            Some(parameters) => parameters.opt_number("partial_rotary_factor")?,
            None => None,
        };
        let factor = nested.or(fields.opt_number("partial_rotary_factor")?).unwrap_or(default);
        let heads = fields.size("num_attention_heads")?;
        let head_dim = fields.size_or("head_dim", base.hidden / heads)?;
        if !(0.0..=1.0).contains(&factor) {
            let message = format!("{factor} is no share of a head");
            return Err(Error::config(fields.path("partial_rotary_factor"), message));
        }
        Ok(Some((head_dim as f64 * factor) as usize))
    }
}

/// Which router a family has, before its counts are known.
pub struct RouterKind {
    pub score: Score,
    pub groups: Option<Groups>,
    pub normalise: Option<Normalise>,
    pub scale: f64,
}

impl RouterKind {
    /// Softmax over all, top-k, optionally made to sum to 1.
    pub fn softmax(normalise: bool) -> Self {
        let normalise = normalise.then_some(Normalise::Epsilon(0.0));
        Self { score: Score::Softmax, groups: None, normalise, scale: 1.0 }
    }

    /// DeepSeek's fields: groups, `norm_topk_prob`, `routed_scaling_factor`.
    pub fn deepseek(fields: &Fields, score: Score, rule: GroupRule, normalised: bool) -> Result<Self> {
        let count = fields.size_or("n_group", 1)?;
        let keep = fields.size_or("topk_group", 1)?;
        if keep == 0 || keep > count {
            let message = format!("{keep} of {count} groups cannot be kept");
            return Err(Error::config(fields.path("topk_group"), message));
        }
        let normalise = fields.flag_or("norm_topk_prob", normalised)?;
        Ok(Self {
            score,
            groups: (count > keep).then_some(Groups { count, keep, rule }),
            normalise: normalise.then_some(Normalise::Epsilon(1e-20)),
            scale: fields.opt_number("routed_scaling_factor")?.unwrap_or(1.0),
        })
    }

    /// The rule for `experts` experts of which `top_k` are chosen.
    pub fn rule(self, fields: &Fields, experts: usize, top_k: usize) -> Result<RouterRule> {
        if top_k == 0 || top_k > experts {
            let message = format!("{top_k} of {experts} experts cannot be chosen");
            return Err(Error::config(fields.path("num_experts_per_tok"), message));
        }
        if let Some(groups) = &self.groups {
            let whole = groups.count > 0 && experts.is_multiple_of(groups.count);
            if !whole || groups.keep * (experts / groups.count) < top_k {
                let message = format!("{} groups of {experts} experts cannot give {top_k}", groups.count);
                return Err(Error::config(fields.path("n_group"), message));
            }
        }
        let Self { score, groups, normalise, scale } = self;
        Ok(RouterRule { experts, top_k, score, groups, normalise, scale: scale as f32 })
    }
}

/// Routed experts below `<layer>.<block>`: router `gate`, experts `experts.<e>.<names>`.
pub fn moe(base: &Base, block: &str, rule: RouterRule, intermediate: usize, names: [&'static str; 3]) -> Moe {
    let [gate, up, down] = names;
    Moe {
        router: base.linear(format!("{block}.gate"), rule.experts, base.hidden),
        selection_bias: None,
        rule,
        intermediate,
        experts: Experts::PerExpert { prefix: format!("{block}.experts"), gate, up, down },
        activation: Activation::SiluGlu,
        shared: None,
    }
}

/// Names of an expert's projections in most families.
pub const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
/// The same where gate, up and down are called w1, w3 and w2.
pub const W_NAMES: [&str; 3] = ["w1", "w3", "w2"];
