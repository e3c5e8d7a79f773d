//! Finds every weight of a description in a checkpoint.

use half::{bf16, f16};
use safetensors::tensor::Dtype;

use super::{
    ExpertWeights, FfnWeights, GateUpWeights, GqaWeights, LayerWeights, LinearWeights, MixerWeights,
    MlaQueryWeights, MlaWeights, MlpWeights, ModelWeights, MoeWeights, Parts, Weight,
};
use crate::checkpoint::{Bytes, Checkpoint};
use crate::config::{
    Experts, Ffn, Gqa, LayerSpec, Linear, Mixer, Mla, MlaQuery, Mlp, ModelConfig, Moe, QkNorm,
};
use crate::error::{Error, Result};
use crate::manifest;
use crate::quant::Stored;

impl ModelWeights {
    /// Finds every weight of the description in the checkpoint; reads no matrix.
    ///
    /// # Errors
    /// Names the first tensor that is missing, unexpected, mis-shaped or mis-typed.
    pub fn load(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Self> {
        let specs = manifest::manifest(config, &|name| checkpoint.tensors().contains_key(name))?;
        let skipped = manifest::verify(config, &specs, checkpoint)?;
        let loader = Loader { config, checkpoint };
        let embedding = loader.plain(&config.embedding, &[config.vocab, config.hidden])?;
        let head = match &config.head {
            Some(name) => loader.plain(name, &[config.vocab, config.hidden])?,
            None => embedding.clone(),
        };
        let layers = config.layers.iter().map(|layer| loader.layer(layer)).collect::<Result<_>>()?;
        Ok(Self { embedding, final_norm: loader.vector(&config.final_norm)?, head, layers, skipped })
    }
}

struct Loader<'a> {
    config: &'a ModelConfig,
    checkpoint: &'a Checkpoint,
}

impl Loader<'_> {
    fn entry(&self, name: &str) -> Result<(Dtype, &Bytes)> {
        let entry = self.checkpoint.tensors().get(name);
        entry.map(|entry| (entry.dtype, &entry.bytes)).ok_or_else(|| Error::tensor(name, "is missing"))
    }

    fn bytes(&self, name: &str) -> Result<Bytes> {
        Ok(self.entry(name)?.1.clone())
    }

    /// A small tensor widened to f32.
    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let (dtype, bytes) = self.entry(name)?;
        widen(dtype, bytes.as_slice())
            .ok_or_else(|| Error::tensor(name, format!("is {dtype:?}, not a float")))
    }

    fn plain(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        let (dtype, bytes) = self.entry(name)?;
        let bytes = bytes.clone();
        let parts = match dtype {
            Dtype::F32 => Parts::F32(bytes),
            Dtype::F16 => Parts::F16(bytes),
            Dtype::BF16 => Parts::Bf16(bytes),
            other => return Err(Error::tensor(name, format!("is {other:?}, not a plain float"))),
        };
        let cols = shape[shape.len() - 1];
        let rows = shape[..shape.len() - 1].iter().product();
        Ok(Weight { parts, first_row: 0, rows, cols })
    }

    fn weight(&self, name: &str, rows: usize, cols: usize) -> Result<Weight> {
        let part = |suffix: &str| self.bytes(&format!("{name}.{suffix}"));
        let parts = match self.config.quantisation.stored(name) {
            Stored::Plain => return self.plain(&format!("{name}.weight"), &[rows, cols]),
            Stored::Fp8 => Parts::Fp8 { values: part("weight")?, scales: part("weight_scale_inv")? },
            Stored::Int4 => {
                self.check_shape(&format!("{name}.weight_shape"), rows, cols)?;
                Parts::Int4 { packed: part("weight_packed")?, scales: part("weight_scale")? }
            }
            Stored::Mxfp4 => return Err(Error::tensor(name, "MXFP4 is supported for fused experts only")),
        };
        Ok(Weight { parts, first_row: 0, rows, cols })
    }

    /// `weight_shape` repeats the unpacked shape; a file that contradicts itself is refused.
    fn check_shape(&self, name: &str, rows: usize, cols: usize) -> Result<()> {
        let (dtype, bytes) = self.entry(name)?;
        let bytes = bytes.as_slice();
        let found: Vec<i64> = match dtype {
            Dtype::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            _ => bytes.as_chunks().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect(),
        };
        if found != [rows as i64, cols as i64] {
            return Err(Error::tensor(name, format!("says {found:?}, the configuration {:?}", [rows, cols])));
        }
        Ok(())
    }

    fn linear(&self, linear: &Linear) -> Result<LinearWeights> {
        let weight = self.weight(&linear.name, linear.rows, linear.cols)?;
        Ok(LinearWeights { weight, bias: self.bias(linear)? })
    }

    fn bias(&self, linear: &Linear) -> Result<Option<Vec<f32>>> {
        linear.bias.then(|| self.vector(&format!("{}.bias", linear.name))).transpose()
    }

    fn layer(&self, layer: &LayerSpec) -> Result<LayerWeights> {
        Ok(LayerWeights {
            input_norm: self.vector(&layer.input_norm)?,
            post_norm: self.vector(&layer.post_norm)?,
            mixer: match &layer.mixer {
                Mixer::Gqa(gqa) => MixerWeights::Gqa(self.gqa(gqa)?),
                Mixer::Mla(mla) => MixerWeights::Mla(self.mla(mla)?),
            },
            ffn: match &layer.ffn {
                Ffn::Dense(mlp) => FfnWeights::Dense(self.mlp(mlp)?),
                Ffn::Moe(moe) => FfnWeights::Moe(self.moe(moe)?),
            },
        })
    }

    fn gqa(&self, gqa: &Gqa) -> Result<GqaWeights> {
        let (q_norm, k_norm) = match &gqa.qk_norm {
            QkNorm::None => (None, None),
            QkNorm::PerHead { q, k } | QkNorm::PerHeadAfterRope { q, k } | QkNorm::Whole { q, k } => {
                (Some(self.vector(q)?), Some(self.vector(k)?))
            }
        };
        Ok(GqaWeights {
            q: self.linear(&gqa.q)?,
            k: self.linear(&gqa.k)?,
            v: self.linear(&gqa.v)?,
            o: self.linear(&gqa.o)?,
            q_norm,
            k_norm,
            sinks: gqa.sinks.as_ref().map(|name| self.vector(name)).transpose()?,
        })
    }

    fn mla(&self, mla: &Mla) -> Result<MlaWeights> {
        Ok(MlaWeights {
            query: match &mla.query {
                MlaQuery::Direct(q) => MlaQueryWeights::Direct(self.linear(q)?),
                MlaQuery::LowRank { a, norm, b } => MlaQueryWeights::LowRank {
                    a: self.linear(a)?,
                    norm: self.vector(norm)?,
                    b: self.linear(b)?,
                },
            },
            kv_a: self.linear(&mla.kv_a)?,
            kv_norm: self.vector(&mla.kv_norm)?,
            kv_b: self.linear(&mla.kv_b)?,
            o: self.linear(&mla.o)?,
        })
    }

    fn mlp(&self, mlp: &Mlp) -> Result<MlpWeights> {
        Ok(MlpWeights {
            gate: self.linear(&mlp.gate)?,
            up: self.linear(&mlp.up)?,
            down: self.linear(&mlp.down)?,
        })
    }

    fn moe(&self, moe: &Moe) -> Result<MoeWeights> {
        let router = LinearWeights {
            weight: self
                .plain(&format!("{}.weight", moe.router.name), &[moe.rule.experts, self.config.hidden])?,
            bias: self.bias(&moe.router)?,
        };
        Ok(MoeWeights {
            router,
            selection_bias: moe.selection_bias.as_ref().map(|name| self.vector(name)).transpose()?,
            experts: self.experts(moe)?,
            shared: moe.shared.as_ref().map(|mlp| self.mlp(mlp)).transpose()?,
        })
    }

    fn experts(&self, moe: &Moe) -> Result<Vec<ExpertWeights>> {
        let (count, hidden, inter) = (moe.rule.experts, self.config.hidden, moe.intermediate);
        let bare = |gate_up, down| ExpertWeights {
            gate_up,
            gate_up_bias: None,
            down,
            down_transposed: false,
            down_bias: None,
        };
        match &moe.experts {
            Experts::PerExpert { prefix, gate, up, down } => {
                let (fused_gate_up, fused_down) = manifest::fused(prefix);
                if self.checkpoint.tensors().contains_key(&fused_gate_up) {
                    let gate_up = self.plain(&fused_gate_up, &[count, 2 * inter, hidden])?;
                    let down = self.plain(&fused_down, &[count, hidden, inter])?;
                    let expert = |e: usize| {
                        let gate = gate_up.slice(2 * e * inter, inter);
                        let up = gate_up.slice((2 * e + 1) * inter, inter);
                        bare(GateUpWeights::Separate { gate, up }, down.slice(e * hidden, hidden))
                    };
                    return Ok((0..count).map(expert).collect());
                }
                let expert = |e: usize| {
                    let gate = self.weight(&format!("{prefix}.{e}.{gate}"), inter, hidden)?;
                    let up = self.weight(&format!("{prefix}.{e}.{up}"), inter, hidden)?;
                    let down = self.weight(&format!("{prefix}.{e}.{down}"), hidden, inter)?;
                    Ok(bare(GateUpWeights::Separate { gate, up }, down))
                };
                (0..count).map(expert).collect()
            }
            Experts::GptOss { prefix } => self.gpt_oss_experts(prefix, count, hidden, inter),
        }
    }

    fn gpt_oss_experts(
        &self,
        prefix: &str,
        count: usize,
        hidden: usize,
        inter: usize,
    ) -> Result<Vec<ExpertWeights>> {
        let quantised = self.config.quantisation.stored(prefix) == Stored::Mxfp4;
        // Stored `[E, out, in]` in MXFP4 and `[E, in, out]` otherwise.
        let part = |part: &str, out: usize, cols: usize| -> Result<(Weight, usize, Vec<f32>)> {
            let name = format!("{prefix}.{part}");
            let bias = self.vector(&format!("{name}_bias"))?;
            if quantised {
                let blocks = self.bytes(&format!("{name}_blocks"))?;
                let scales = self.bytes(&format!("{name}_scales"))?;
                let parts = Parts::Mxfp4 { blocks, scales };
                Ok((Weight { parts, first_row: 0, rows: count * out, cols }, out, bias))
            } else {
                Ok((self.plain(&name, &[count, cols, out])?, cols, bias))
            }
        };
        let (gate_up, gate_up_rows, gate_up_bias) = part("gate_up_proj", 2 * inter, hidden)?;
        let (down, down_rows, down_bias) = part("down_proj", hidden, inter)?;
        let expert = |e: usize| {
            let gate_up = gate_up.slice(e * gate_up_rows, gate_up_rows);
            ExpertWeights {
                gate_up: if quantised {
                    GateUpWeights::Interleaved(gate_up)
                } else {
                    GateUpWeights::InterleavedTransposed(gate_up)
                },
                gate_up_bias: Some(gate_up_bias[2 * e * inter..2 * (e + 1) * inter].to_vec()),
                down: down.slice(e * down_rows, down_rows),
                down_transposed: !quantised,
                down_bias: Some(down_bias[e * hidden..(e + 1) * hidden].to_vec()),
            }
        };
        Ok((0..count).map(expert).collect())
    }
}

fn widen(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let pairs = || bytes.as_chunks::<2>().0.iter();
    Some(match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => pairs().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => pairs().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        _ => return None,
    })
}
