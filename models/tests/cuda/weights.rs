//! A model's weights on the device, byte for byte as published.

use kernels::Matrix;
use kernels::Values;
use kernels::cuda::{Buffer, Device, DeviceError, ExpertAddress, ExpertFormat, WeightAddress};
use models::config::{Ffn, Mixer};
use models::weights::{
    ExpertWeights, FfnWeights, GateUpWeights, LinearWeights, MixerWeights, MlaQueryWeights, MlpWeights,
    Weight,
};
use models::{Model, ModelConfig};

type Result<T> = std::result::Result<T, DeviceError>;

/// A matrix, all of the stored tensor.
pub struct DeviceWeight {
    pub format: ExpertFormat,
    pub codes: Buffer<u8>,
    pub scales: Option<Buffer<u8>>,
    pub bias: Option<Buffer<f32>>,
    pub rows: usize,
    pub cols: usize,
}

impl DeviceWeight {
    pub fn upload(device: &Device, weight: &Weight, bias: Option<&[f32]>) -> Result<Self> {
        Self::of(device, &weight.view(), bias)
    }

    /// The rows that the view names, if it is a part: they lie one after another.
    fn of(device: &Device, view: &Matrix<'_>, bias: Option<&[f32]>) -> Result<Self> {
        let Matrix { values, first_row, rows, cols } = *view;
        let part = |bytes: &[u8], row: usize| device.upload(&bytes[first_row * row..][..rows * row]);
        let (format, codes, scales) = match values {
            Values::Bf16(bytes) => (ExpertFormat::Bf16, part(bytes, 2 * cols)?, None),
            Values::Fp8 { values, scales } => {
                assert_eq!(first_row, 0, "blocks of rows");
                (ExpertFormat::Fp8, part(values, cols)?, Some(device.upload(scales)?))
            }
            Values::Int4 { packed, scales } => {
                (ExpertFormat::Int4, part(packed, cols / 2)?, Some(part(scales, cols / 16)?))
            }
            Values::Mxfp4 { blocks, scales } => {
                (ExpertFormat::Mxfp4, part(blocks, cols / 2)?, Some(part(scales, cols / 32)?))
            }
            _ => panic!("weights that the device's kernels do not take"),
        };
        let bias = bias.map(|bias| device.upload(bias)).transpose()?;
        Ok(Self { format, codes, scales, bias, rows, cols })
    }

    pub fn linear(device: &Device, linear: &LinearWeights) -> Result<Self> {
        Self::upload(device, &linear.weight, linear.bias.as_deref())
    }

    fn address(&self) -> WeightAddress {
        WeightAddress {
            codes: self.codes.address(),
            scales: self.scales.as_ref().map_or(0, Buffer::address),
            bias: self.bias.as_ref().map_or(0, Buffer::address),
        }
    }
}

pub struct DeviceMlp {
    pub gate: DeviceWeight,
    pub up: DeviceWeight,
    pub down: DeviceWeight,
}

impl DeviceMlp {
    fn upload(device: &Device, mlp: &MlpWeights) -> Result<Self> {
        let [gate, up, down] =
            [&mlp.gate, &mlp.up, &mlp.down].map(|linear| DeviceWeight::linear(device, linear));
        Ok(Self { gate: gate?, up: up?, down: down? })
    }
}

pub enum DeviceMixer {
    Mla {
        /// Down to the low rank and its norm, if there is one.
        a: Option<(DeviceWeight, Buffer<f32>)>,
        q: DeviceWeight,
        kv_a: DeviceWeight,
        kv_norm: Buffer<f32>,
        kv_b: DeviceWeight,
        o: DeviceWeight,
    },
    Gqa {
        q: DeviceWeight,
        k: DeviceWeight,
        v: DeviceWeight,
        o: DeviceWeight,
        q_norm: Option<Buffer<f32>>,
        k_norm: Option<Buffer<f32>>,
        sinks: Option<Buffer<f32>>,
    },
}

pub struct DeviceMoe {
    pub router: DeviceWeight,
    pub selection_bias: Option<Buffer<f32>>,
    pub format: ExpertFormat,
    /// Held for what the table points at.
    _experts: Vec<DeviceWeight>,
    pub table: Buffer<u64>,
    pub interleaved: bool,
    pub shared: Option<DeviceMlp>,
}

pub enum DeviceFfn {
    Dense(DeviceMlp),
    Moe(DeviceMoe),
}

pub struct DeviceLayer {
    pub input_norm: Buffer<f32>,
    pub post_norm: Buffer<f32>,
    pub mixer: DeviceMixer,
    pub ffn: DeviceFfn,
}

pub struct DeviceModel {
    pub embedding: DeviceWeight,
    pub final_norm: Buffer<f32>,
    pub head: DeviceWeight,
    pub layers: Vec<DeviceLayer>,
}

impl DeviceModel {
    pub fn upload(device: &Device, model: &Model) -> Result<Self> {
        let weights = &model.weights;
        let mut layers = Vec::new();
        for layer in &weights.layers {
            layers.push(DeviceLayer {
                input_norm: device.upload(&layer.input_norm)?,
                post_norm: device.upload(&layer.post_norm)?,
                mixer: mixer(device, &layer.mixer)?,
                ffn: ffn(device, &layer.ffn)?,
            });
        }
        Ok(Self {
            embedding: DeviceWeight::upload(device, &weights.embedding, None)?,
            final_norm: device.upload(&weights.final_norm)?,
            head: DeviceWeight::upload(device, &weights.head, None)?,
            layers,
        })
    }
}

fn mixer(device: &Device, mixer: &MixerWeights) -> Result<DeviceMixer> {
    let optional = |values: &Option<Vec<f32>>| values.as_ref().map(|v| device.upload(v)).transpose();
    let linear = |linear: &LinearWeights| DeviceWeight::linear(device, linear);
    Ok(match mixer {
        MixerWeights::Mla(w) => {
            let (a, q) = match &w.query {
                MlaQueryWeights::Direct(q) => (None, q),
                MlaQueryWeights::LowRank { a, norm, b } => (Some((linear(a)?, device.upload(norm)?)), b),
            };
            DeviceMixer::Mla {
                a,
                q: linear(q)?,
                kv_a: linear(&w.kv_a)?,
                kv_norm: device.upload(&w.kv_norm)?,
                kv_b: linear(&w.kv_b)?,
                o: linear(&w.o)?,
            }
        }
        MixerWeights::Gqa(w) => DeviceMixer::Gqa {
            q: linear(&w.q)?,
            k: linear(&w.k)?,
            v: linear(&w.v)?,
            o: linear(&w.o)?,
            q_norm: optional(&w.q_norm)?,
            k_norm: optional(&w.k_norm)?,
            sinks: optional(&w.sinks)?,
        },
    })
}

fn ffn(device: &Device, ffn: &FfnWeights) -> Result<DeviceFfn> {
    let moe = match ffn {
        FfnWeights::Dense(mlp) => return Ok(DeviceFfn::Dense(DeviceMlp::upload(device, mlp)?)),
        FfnWeights::Moe(moe) => moe,
    };
    let (mut weights, mut addresses, mut interleaved) = (Vec::new(), Vec::new(), false);
    for expert in &moe.experts {
        let ExpertWeights { gate_up, gate_up_bias, down, down_transposed, down_bias } = expert;
        assert!(!down_transposed, "transposed experts");
        let down = DeviceWeight::upload(device, down, down_bias.as_deref())?;
        match gate_up {
            GateUpWeights::Separate { gate, up } => {
                let [gate, up] = [gate, up].map(|weight| DeviceWeight::upload(device, weight, None));
                let (gate, up) = (gate?, up?);
                addresses.push(ExpertAddress {
                    gate: gate.address(),
                    up: up.address(),
                    down: down.address(),
                });
                weights.extend([gate, up]);
            }
            GateUpWeights::Interleaved(weight) => {
                interleaved = true;
                let both = DeviceWeight::upload(device, weight, gate_up_bias.as_deref())?;
                let address =
                    ExpertAddress::interleaved(both.format, both.cols, both.address(), down.address());
                addresses.push(address);
                weights.push(both);
            }
            GateUpWeights::InterleavedTransposed(_) => panic!("transposed experts"),
        }
        weights.push(down);
    }
    Ok(DeviceFfn::Moe(DeviceMoe {
        router: DeviceWeight::linear(device, &moe.router)?,
        selection_bias: moe.selection_bias.as_ref().map(|bias| device.upload(bias)).transpose()?,
        format: weights[0].format,
        table: device.upload(&ExpertAddress::table(&addresses))?,
        _experts: weights,
        interleaved,
        shared: moe.shared.as_ref().map(|mlp| DeviceMlp::upload(device, mlp)).transpose()?,
    }))
}

/// Whether the device's kernels take all weights of the model as they are stored.
pub fn supports(model: &Model) -> bool {
    let dense = |weight: &Weight| matches!(weight.view().values, Values::Bf16(_) | Values::Fp8 { .. });
    let experts = |config: &ModelConfig| {
        config.layers.iter().zip(&model.weights.layers).all(|(spec, layer)| {
            let mixer = match (&spec.mixer, &layer.mixer) {
                (Mixer::Mla(_), MixerWeights::Mla(w)) => dense(&w.kv_b.weight) && dense(&w.o.weight),
                (Mixer::Gqa(_), MixerWeights::Gqa(w)) => dense(&w.q.weight) && dense(&w.o.weight),
                _ => false,
            };
            mixer
                && match (&spec.ffn, &layer.ffn) {
                    (Ffn::Moe(_), FfnWeights::Moe(moe)) => {
                        dense(&moe.router.weight)
                            && moe.experts.iter().all(|e| {
                                !e.down_transposed
                                    && !matches!(e.gate_up, GateUpWeights::InterleavedTransposed(_))
                            })
                    }
                    _ => true,
                }
        })
    };
    dense(&model.weights.embedding) && experts(&model.config)
}
