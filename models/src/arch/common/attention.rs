//! Plain grouped-query attention: the fields and names that most families share.

use kernels::rope::Rotation;

use super::Base;
use crate::config::{Gqa, Linear, QkNorm, Rope};
use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::rope;

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

    /// `sliding_window`; null = none.
    pub fn window(fields: &Fields) -> Result<Option<usize>> {
        match fields.opt_size("sliding_window")? {
            Some(0) => Err(Error::config(fields.path("sliding_window"), "must be at least 1")),
            window => Ok(window),
        }
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

impl Base<'_> {
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
}
