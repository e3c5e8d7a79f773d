//! The weights of a description, borrowed from the checkpoint's bytes. Small vectors (norms, biases)
//! are widened to f32 once; matrices never are.

mod load;

use kernels::format::{GROUP, Matrix, Values};
use kernels::quantised::to_q8;
use kernels::simd::Isa;

use crate::checkpoint::Bytes;
use crate::manifest::Skipped;

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

/// Weights of [`crate::config::Gqa`].
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

/// Weights of [`crate::config::MlaQuery`].
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

/// Weights of [`crate::config::Mla`].
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

/// Weights of [`crate::config::Mlp`].
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

/// Weights of [`crate::config::Moe`].
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
