//! The weights of a description, borrowed from the checkpoint's bytes. Small vectors (norms, biases)
//! are widened to f32 once; matrices never are.

use half::{bf16, f16};
use kernels::format::{GROUP, Matrix, Values};
use kernels::quantised::to_q8;
use kernels::simd::Isa;
use safetensors::tensor::Dtype;

use crate::checkpoint::{Bytes, Checkpoint};
use crate::config::{
    Experts, Ffn, Gqa, LayerSpec, Linear, Mixer, Mla, MlaQuery, Mlp, ModelConfig, Moe, QkNorm,
};
use crate::error::{Error, Result};
use crate::manifest::{self, Skipped};
use crate::quant::Stored;

/// One stored matrix `[rows, cols]`, kept alive by its file.
#[derive(Clone, Debug)]
pub struct Weight {
    parts: Parts,
    first_row: usize,
    rows: usize,
    cols: usize,
}

#[derive(Clone, Debug)]
enum Parts {
    F32(Bytes),
    F16(Bytes),
    Bf16(Bytes),
    Fp8 { values: Bytes, scales: Bytes },
    Int4 { packed: Bytes, scales: Bytes },
    Mxfp4 { blocks: Bytes, scales: Bytes },
    Q8 { codes: Bytes, scales: Bytes },
}

impl Weight {
    /// The matrix as kernels take it.
    pub fn view(&self) -> Matrix<'_> {
        let values = match &self.parts {
            Parts::F32(bytes) => Values::F32(bytes.as_slice()),
            Parts::F16(bytes) => Values::F16(bytes.as_slice()),
            Parts::Bf16(bytes) => Values::Bf16(bytes.as_slice()),
            Parts::Fp8 { values, scales } => {
                Values::Fp8 { values: values.as_slice(), scales: scales.as_slice() }
            }
            Parts::Int4 { packed, scales } => {
                Values::Int4 { packed: packed.as_slice(), scales: scales.as_slice() }
            }
            Parts::Mxfp4 { blocks, scales } => {
                Values::Mxfp4 { blocks: blocks.as_slice(), scales: scales.as_slice() }
            }
            Parts::Q8 { codes, scales } => Values::Q8 { codes: codes.as_slice(), scales: scales.as_slice() },
        };
        Matrix { values, first_row: self.first_row, rows: self.rows, cols: self.cols }
    }

    /// Bytes of a weight of floats; 0 for others.
    fn bytes(&self) -> usize {
        match &self.parts {
            Parts::F32(bytes) | Parts::F16(bytes) | Parts::Bf16(bytes) => bytes.as_slice().len(),
            _ => 0,
        }
    }

    /// Whether both are the same bytes.
    fn is_same(&self, other: &Self) -> bool {
        match (&self.parts, &other.parts) {
            (
                Parts::F32(a) | Parts::F16(a) | Parts::Bf16(a),
                Parts::F32(b) | Parts::F16(b) | Parts::Bf16(b),
            ) => std::ptr::eq(a.as_slice(), b.as_slice()),
            _ => false,
        }
    }

    /// Stored rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Stored columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Floats in whole groups, not a part of a tensor.
    fn can_be_q8(&self) -> bool {
        self.bytes() > 0 && self.cols.is_multiple_of(GROUP) && self.first_row == 0
    }

    /// Replaces floats by an 8-bit copy ([`to_q8`]).
    fn copy_to_q8(&mut self, isa: Isa) {
        let (Parts::F32(bytes) | Parts::F16(bytes) | Parts::Bf16(bytes)) = &self.parts else { return };
        if self.can_be_q8() {
            let replaced = bytes.clone();
            let (codes, scales) = to_q8(isa, &self.view());
            self.parts = Parts::Q8 { codes: Bytes::owned(codes), scales: Bytes::owned(scales) };
            replaced.release();
        }
    }

    fn slice(&self, start: usize, rows: usize) -> Self {
        assert!(start + rows <= self.rows);
        Self { first_row: self.first_row + start, rows, ..self.clone() }
    }
}

/// A linear map with its bias.
#[derive(Clone, Debug)]
pub struct LinearWeights {
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

/// Weights of [`Gqa`].
#[derive(Debug)]
pub struct GqaWeights {
    /// Query projection.
    pub q: LinearWeights,
    /// Key projection.
    pub k: LinearWeights,
    /// Value projection.
    pub v: LinearWeights,
    /// Output projection.
    pub o: LinearWeights,
    /// Weights of the query norm, if there is one.
    pub q_norm: Option<Vec<f32>>,
    /// Weights of the key norm, if there is one.
    pub k_norm: Option<Vec<f32>>,
    /// Sink logits `[heads]`.
    pub sinks: Option<Vec<f32>>,
}

/// Weights of [`MlaQuery`].
#[derive(Debug)]
pub enum MlaQueryWeights {
    /// One projection.
    Direct(LinearWeights),
    /// Down, norm, up.
    LowRank {
        /// To the low rank.
        a: LinearWeights,
        /// Norm of the low rank `[rank]`.
        norm: Vec<f32>,
        /// To the heads.
        b: LinearWeights,
    },
}

/// Weights of [`Mla`].
#[derive(Debug)]
pub struct MlaWeights {
    /// Query side.
    pub query: MlaQueryWeights,
    /// To latent and rotated key.
    pub kv_a: LinearWeights,
    /// Norm of the latent.
    pub kv_norm: Vec<f32>,
    /// `[heads * (nope + value), kv_rank]`, per head `[W_UK | W_UV]`.
    pub kv_b: LinearWeights,
    /// Output projection.
    pub o: LinearWeights,
}

/// Weights of a layer's mixer.
#[derive(Debug)]
pub enum MixerWeights {
    /// Grouped-query attention.
    Gqa(GqaWeights),
    /// Latent attention.
    Mla(MlaWeights),
}

/// Weights of [`Mlp`].
#[derive(Debug)]
pub struct MlpWeights {
    /// `[inter, hidden]`.
    pub gate: LinearWeights,
    /// `[inter, hidden]`.
    pub up: LinearWeights,
    /// `[hidden, inter]`.
    pub down: LinearWeights,
}

/// Gate and up of one routed expert.
#[derive(Debug)]
pub enum GateUpWeights {
    /// Two matrices `[inter, hidden]`.
    Separate {
        /// Gate.
        gate: Weight,
        /// Up.
        up: Weight,
    },
    /// `[2 inter, hidden]`; even rows gate, odd rows up.
    Interleaved(Weight),
    /// `[hidden, 2 inter]`; even columns gate, odd columns up.
    InterleavedTransposed(Weight),
}

/// One routed expert.
#[derive(Debug)]
pub struct ExpertWeights {
    /// Gate and up.
    pub gate_up: GateUpWeights,
    /// `[2 inter]`, interleaved.
    pub gate_up_bias: Option<Vec<f32>>,
    /// `[hidden, inter]`, or `[inter, hidden]` if transposed.
    pub down: Weight,
    /// Whether `down` is stored `[in, out]`.
    pub down_transposed: bool,
    /// `[hidden]`.
    pub down_bias: Option<Vec<f32>>,
}

/// Weights of [`Moe`].
#[derive(Debug)]
pub struct MoeWeights {
    /// `[experts, hidden]`, bias of the logits included.
    pub router: LinearWeights,
    /// Added to scores for selection only `[experts]`.
    pub selection_bias: Option<Vec<f32>>,
    /// By expert id.
    pub experts: Vec<ExpertWeights>,
    /// Shared expert.
    pub shared: Option<MlpWeights>,
}

/// Weights of a layer's feed-forward part.
#[derive(Debug)]
pub enum FfnWeights {
    /// One MLP.
    Dense(MlpWeights),
    /// Routed experts.
    Moe(MoeWeights),
}

/// Weights of one layer.
#[derive(Debug)]
pub struct LayerWeights {
    /// `[hidden]`.
    pub input_norm: Vec<f32>,
    /// `[hidden]`.
    pub post_norm: Vec<f32>,
    /// Mixer.
    pub mixer: MixerWeights,
    /// Feed-forward part.
    pub ffn: FfnWeights,
}

/// All weights of a model.
#[derive(Debug)]
pub struct ModelWeights {
    /// `[vocab, hidden]`.
    pub embedding: Weight,
    /// `[hidden]`.
    pub final_norm: Vec<f32>,
    /// `[vocab, hidden]`; the embedding if tied.
    pub head: Weight,
    /// Layers in order.
    pub layers: Vec<LayerWeights>,
    /// Tensors that were there and are not read.
    pub skipped: Skipped,
}

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

/// What 8-bit copies take, and what they stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Q8Copy {
    /// Allocated bytes.
    pub copied_bytes: usize,
    /// Mapped bytes that are no longer read.
    pub replaced_bytes: usize,
}

impl ModelWeights {
    /// Replaces the float weights of attention, dense and shared experts and the head by 8-bit copies
    /// (`--dense-format q8`). Left as they are: the router, W_UK and W_UV, which are applied per head, and the
    /// embedding, of which a token reads one row.
    pub fn copy_dense_to_q8(&mut self, isa: Isa) {
        self.dense(&mut |weight| weight.copy_to_q8(isa));
    }

    /// What [`ModelWeights::copy_dense_to_q8`] will take.
    pub fn plan_q8(&mut self) -> Q8Copy {
        let mut total = Q8Copy::default();
        let tied = self.head.is_same(&self.embedding);
        let (values, bytes) = (self.head.rows * self.head.cols, self.head.bytes());
        self.dense(&mut |weight| {
            if weight.can_be_q8() {
                let groups = weight.rows * weight.cols / GROUP;
                total.copied_bytes += groups * (GROUP + 2);
                total.replaced_bytes += weight.bytes();
            }
        });
        if tied && values > 0 && self.head.can_be_q8() {
            // The embedding is still read where it is.
            total.replaced_bytes -= bytes;
        }
        total
    }

    fn dense(&mut self, f: &mut dyn FnMut(&mut Weight)) {
        for layer in &mut self.layers {
            let mixer = match &mut layer.mixer {
                MixerWeights::Gqa(w) => vec![&mut w.q, &mut w.k, &mut w.v, &mut w.o],
                MixerWeights::Mla(w) => match &mut w.query {
                    MlaQueryWeights::Direct(q) => vec![q, &mut w.kv_a, &mut w.o],
                    MlaQueryWeights::LowRank { a, b, .. } => vec![a, b, &mut w.kv_a, &mut w.o],
                },
            };
            mixer.into_iter().for_each(|linear| f(&mut linear.weight));
            let mlp = match &mut layer.ffn {
                FfnWeights::Dense(mlp) => Some(mlp),
                FfnWeights::Moe(moe) => moe.shared.as_mut(),
            };
            if let Some(MlpWeights { gate, up, down }) = mlp {
                [gate, up, down].into_iter().for_each(|linear| f(&mut linear.weight));
            }
        }
        f(&mut self.head);
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
