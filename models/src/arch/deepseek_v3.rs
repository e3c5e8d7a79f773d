//! DeepSeek V3, R1, V3.1 and Moonlight: latent attention, sigmoid router with a selection bias.
//! `kimi_k2`, `kimi_k25` and `glm4_moe_lite` are this model under other names.

use kernels::rope::Rotation;
use kernels::route::{GroupRule, RouterRule, Score};
use serde_json::Value;

use super::common::{Base, PROJECTIONS, RouterKind, moe};
use crate::config::{Ffn, Linear, Mixer, Mla, MlaQuery, ModelConfig};
use crate::error::{Error, Result};
use crate::rope;

/// Epsilon of the latent norms: the reference builds them without passing the model's.
const LATENT_EPSILON: f32 = 1e-6;

pub fn describe(config: &Value) -> Result<ModelConfig> {
    describe_at(config, "", "", "deepseek_v3")
}

/// As [`describe`], for a decoder described by the object at `path`, with `prefix` before its
/// tensor names.
pub fn describe_at(config: &Value, path: &str, prefix: &str, model_type: &str) -> Result<ModelConfig> {
    let mut base = Base::read(config, path, prefix)?;
    base.skip_prediction_layers("num_nextn_predict_layers")?;
    let fields = &base.fields;
    fields.only("scoring_func", &["sigmoid".into()])?;
    fields.only("topk_method", &["noaux_tc".into()])?;
    let kind = RouterKind::deepseek(fields, Score::Sigmoid, GroupRule::TopTwoSum, true)?;
    let plan = MoePlan::read(&base, kind)?;
    let attention = LatentAttention::read(&base)?;
    let layers = (0..base.layers)
        .map(|layer| {
            let mut ffn = plan.ffn(&base, layer);
            if let Ffn::Moe(moe) = &mut ffn {
                moe.selection_bias = Some(format!("{}.e_score_correction_bias", moe.router.name));
            }
            base.layer(layer, Mixer::Mla(attention.layer(&base, layer)), ffn)
        })
        .collect();
    base.finish(model_type, prefix, layers)
}

/// DeepSeek's latent attention, the same for all layers but for the names.
pub struct LatentAttention {
    heads: usize,
    q_rank: Option<usize>,
    kv_rank: usize,
    nope_dim: usize,
    rope_dim: usize,
    value_dim: usize,
    bias: bool,
    rope: rope::Scaled,
}

impl LatentAttention {
    pub fn read(base: &Base) -> Result<Self> {
        let fields = &base.fields;
        let heads = fields.size("num_attention_heads")?;
        let (nope_dim, rope_dim) = (fields.size("qk_nope_head_dim")?, fields.size("qk_rope_head_dim")?);
        // All heads share one latent, so these repeat what follows from the others.
        fields.ignore(&["num_key_value_heads", "head_dim"]);
        fields.only("partial_rotary_factor", &[1.0.into(), 1.into()])?;
        fields.only("qk_head_dim", &[(nope_dim + rope_dim).into()])?;
        let interleaved = fields.flag_or("rope_interleave", true)?;
        let rotation = if interleaved { Rotation::Interleaved } else { Rotation::Half };
        Ok(Self {
            heads,
            q_rank: fields.opt_size("q_lora_rank")?.filter(|&rank| rank > 0),
            kv_rank: fields.size("kv_lora_rank")?,
            nope_dim,
            rope_dim,
            value_dim: fields.size("v_head_dim")?,
            bias: fields.flag_or("attention_bias", false)?,
            rope: rope::read(fields, rope_dim, rotation, 10_000.0)?,
        })
    }

    pub fn layer(&self, base: &Base, layer: usize) -> Mla {
        let name = format!("{}.self_attn", base.layer_name(layer));
        let (heads, hidden, bias) = (self.heads, base.hidden, self.bias);
        let linear = |part: &str, rows, cols| base.linear(format!("{name}.{part}"), rows, cols);
        let q_width = heads * (self.nope_dim + self.rope_dim);
        let query = match self.q_rank {
            None => MlaQuery::Direct(linear("q_proj", q_width, hidden)),
            Some(rank) => MlaQuery::LowRank {
                a: Linear { bias, ..linear("q_a_proj", rank, hidden) },
                norm: format!("{name}.q_a_layernorm.weight"),
                b: linear("q_b_proj", q_width, rank),
            },
        };
        let scale = ((self.nope_dim + self.rope_dim) as f64).powf(-0.5) * self.rope.mscale_all_dim.powi(2);
        Mla {
            heads,
            nope_dim: self.nope_dim,
            rope_dim: self.rope_dim,
            value_dim: self.value_dim,
            kv_rank: self.kv_rank,
            query,
            kv_a: Linear { bias, ..linear("kv_a_proj_with_mqa", self.kv_rank + self.rope_dim, hidden) },
            kv_norm: format!("{name}.kv_a_layernorm.weight"),
            kv_b: linear("kv_b_proj", heads * (self.nope_dim + self.value_dim), self.kv_rank),
            o: Linear { bias, ..linear("o_proj", hidden, heads * self.value_dim) },
            latent_epsilon: LATENT_EPSILON,
            rope: Some(self.rope.rope.clone()),
            scale: scale as f32,
        }
    }
}

/// Which layers have experts, and what they look like.
pub struct MoePlan {
    dense_layers: usize,
    every: Vec<usize>,
    dense_intermediate: usize,
    intermediate: usize,
    shared: usize,
    rule: RouterRule,
}

impl MoePlan {
    pub fn read(base: &Base, kind: RouterKind) -> Result<Self> {
        let fields = &base.fields;
        let every = match fields.value("moe_layer_freq") {
            None => vec![1; base.layers],
            // A list says layer by layer: 1 = experts.
            Some(Value::Array(list))
                if list.len() == base.layers && list.iter().all(|v| *v == 0 || *v == 1) =>
            {
                list.iter().map(|v| usize::from(*v == 1)).collect()
            }
            Some(Value::Number(_)) => vec![fields.size("moe_layer_freq")?; base.layers],
            Some(other) => {
                let message = format!("{other} is neither a number nor one 0 or 1 per layer");
                return Err(Error::config(fields.path("moe_layer_freq"), message));
            }
        };
        let dense_layers = fields.size_or("first_k_dense_replace", 0)?;
        // Newer files name every layer's kind instead.
        let kinds = fields.word_per_layer("mlp_layer_types", base.layers, ["dense", "sparse"])?;
        let (every, dense_layers) = match kinds {
            Some(sparse) => (sparse.into_iter().map(usize::from).collect(), 0),
            None => (every, dense_layers),
        };
        let rule = kind.rule(fields, "n_routed_experts", "num_experts_per_tok")?;
        Ok(Self {
            dense_layers,
            every,
            dense_intermediate: fields.size("intermediate_size")?,
            intermediate: fields.size("moe_intermediate_size")?,
            shared: fields.size_or("n_shared_experts", 0)?,
            rule,
        })
    }

    pub fn ffn(&self, base: &Base, layer: usize) -> Ffn {
        let name = format!("{}.mlp", base.layer_name(layer));
        let every = self.every[layer];
        if layer < self.dense_layers || every == 0 || !layer.is_multiple_of(every) {
            return Ffn::Dense(base.mlp(&name, self.dense_intermediate));
        }
        let mut moe = moe(base, &name, self.rule, self.intermediate, PROJECTIONS);
        if self.shared > 0 {
            moe.shared = Some(base.mlp(&format!("{name}.shared_experts"), self.shared * self.intermediate));
        }
        Ffn::Moe(moe)
    }
}
