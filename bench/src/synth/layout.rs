//! Which tensor goes where: shards of at most so many bytes in the manifest's order, and within a
//! shard the order of the safetensors library (wide types first, then by name), which keeps every
//! tensor aligned. Only `weight_shape` goes before all: it is all that a sparse file really holds.

use std::collections::BTreeMap;

use models::ModelConfig;
use models::manifest::{Role, TensorSpec, manifest};
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use super::SynthError;
use super::values::{Fill, INT4_RMS, Spread, Stream, fp8_rms};

/// Deviation of logits; enough for a clear first choice.
const LOGIT_DEVIATION: f64 = 3.0;
/// What attention adds to the stream, against 1: what all tokens have in common grows by attention,
/// and would bring all tokens to the same experts.
const ATTENTION_GAIN: f64 = 0.5;

/// One tensor of a shard.
pub(crate) struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// First byte, from the beginning of the shard's data.
    pub start: u64,
    pub bytes: u64,
    pub fill: Fill,
    pub stream: Stream,
}

/// One file.
pub(crate) struct Shard {
    pub file: String,
    /// Length and JSON, padded.
    pub header: Vec<u8>,
    pub tensors: Vec<Tensor>,
    pub data_bytes: u64,
}

impl Shard {
    /// Writes the data's bytes from `start` on.
    pub fn fill(&self, start: u64, mut out: &mut [u8]) {
        let mut at = start;
        let first = self.tensors.partition_point(|tensor| tensor.start + tensor.bytes <= start);
        for tensor in &self.tensors[first..] {
            let inside = at - tensor.start;
            let (part, rest) = out.split_at_mut(((tensor.bytes - inside) as usize).min(out.len()));
            tensor.fill.write(tensor.stream, inside, part);
            at += part.len() as u64;
            out = rest;
            if out.is_empty() {
                break;
            }
        }
    }
}

/// A whole checkpoint's weights.
pub(crate) struct Layout {
    pub shards: Vec<Shard>,
    pub tensors: usize,
    pub parameters: u64,
    /// Of all tensors.
    pub bytes: u64,
}

impl Layout {
    pub fn new(config: &Value, seed: u64, shard_bytes: u64) -> Result<Self, SynthError> {
        let model = models::arch::describe(config)?;
        let specs = manifest(&model, &|_| false)?;
        let parameters = specs.iter().map(|spec| spec.parameters as u64).sum();
        let mut values = Values { model: &model, plain: plain_type(config), fills: BTreeMap::new() };
        let mut groups: Vec<Vec<Tensor>> = Vec::new();
        let (mut used, mut bytes) = (0, 0);
        for (index, spec) in specs.iter().enumerate() {
            let before = index.checked_sub(1).map(|before| &specs[before]);
            let (dtype, fill) = values.of(spec, before)?;
            let elements: u64 = spec.shape.iter().map(|&n| n as u64).product();
            let size = elements * dtype.bitsize() as u64 / 8;
            if groups.is_empty() || used + size > shard_bytes {
                groups.push(Vec::new());
                used = 0;
            }
            used += size;
            bytes += size;
            let (name, shape) = (spec.name.clone(), spec.shape.clone());
            let stream = Stream::new(seed, &name);
            let tensor = Tensor { name, dtype, shape, start: 0, bytes: size, fill, stream };
            groups.last_mut().expect("one was pushed").push(tensor);
        }
        let count = groups.len();
        let named = |(index, tensors)| {
            Shard::new(format!("model-{:05}-of-{count:05}.safetensors", index + 1), tensors)
        };
        let shards = groups.into_iter().enumerate().map(named).collect();
        Ok(Self { shards, tensors: specs.len(), parameters, bytes })
    }

    /// `model.safetensors.index.json`.
    pub fn index(&self) -> Value {
        let mut map: Map<String, Value> = Map::new();
        for shard in &self.shards {
            map.extend(shard.tensors.iter().map(|tensor| (tensor.name.clone(), shard.file.as_str().into())));
        }
        json!({"metadata": {"total_size": self.bytes}, "weight_map": map})
    }
}

impl Shard {
    fn new(file: String, mut tensors: Vec<Tensor>) -> Self {
        tensors.sort_by(|a, b| {
            let class = |tensor: &Tensor| (matches!(tensor.fill, Fill::Bytes(_)), tensor.dtype);
            class(b).cmp(&class(a)).then_with(|| a.name.cmp(&b.name))
        });
        let mut header = json!({"__metadata__": {"format": "pt"}});
        let mut data_bytes = 0;
        for tensor in &mut tensors {
            tensor.start = data_bytes;
            data_bytes += tensor.bytes;
            let (dtype, shape, offsets) =
                (tensor.dtype.to_string(), &tensor.shape, [tensor.start, data_bytes]);
            header[tensor.name.as_str()] = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        }
        let mut json = header.to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        let header = [&(json.len() as u64).to_le_bytes()[..], &json].concat();
        Self { file, header, tensors, data_bytes }
    }
}

/// The type of unquantised weights that a `config.json` names.
pub fn plain_type(config: &Value) -> Dtype {
    let field = |name: &str| config[name].as_str().or(config["text_config"][name].as_str());
    match field("dtype").or(field("torch_dtype")) {
        Some("float16") => Dtype::F16,
        Some("float32") => Dtype::F32,
        _ => Dtype::BF16,
    }
}

/// Chooses types and values.
struct Values<'a> {
    model: &'a ModelConfig,
    plain: Dtype,
    /// Tables made so far; there are few, for many tensors.
    fills: BTreeMap<(Dtype, u64, u64), Fill>,
}

impl Values<'_> {
    /// Type and values of a tensor; `before` is the one before it in the manifest, of which scales
    /// are the scales.
    fn of(&mut self, spec: &TensorSpec, before: Option<&TensorSpec>) -> Result<(Dtype, Fill), SynthError> {
        let dtype = self.dtype(spec)?;
        let width = spec.shape.last().copied().unwrap_or(1);
        let is = |suffix: &str| spec.name.ends_with(suffix);
        let around = |scale: f64| Spread::Around(scale);
        let fill = match dtype {
            _ if is(".weight_shape") => {
                // The scales before it are `[rows, columns / 32]`.
                let [rows, groups] = before.map_or(&[0, 0][..], |scales| &scales.shape) else {
                    return Err(unexpected(spec));
                };
                let shape = [*rows as u64, 32 * *groups as u64];
                let wide = dtype == Dtype::I64;
                let bytes =
                    |n: u64| if wide { n.to_le_bytes().to_vec() } else { (n as u32).to_le_bytes().to_vec() };
                Fill::Bytes(shape.into_iter().flat_map(bytes).collect())
            }
            Dtype::I32 if is(".weight_packed") => Fill::Int4,
            Dtype::F8_E4M3 => Fill::Fp8,
            Dtype::U8 if is("_blocks") => Fill::Mxfp4,
            Dtype::U8 if is("_scales") => Fill::exponents(deviation(spec, 32 * width)),
            _ if is(".weight_scale") => {
                self.plain(spec, dtype, around(deviation(spec, 32 * width) / INT4_RMS))?
            }
            _ if is(".weight_scale_inv") => {
                let columns = before.and_then(|values| values.shape.last().copied()).unwrap_or(128 * width);
                self.plain(spec, dtype, around(deviation(spec, columns) / fp8_rms()))?
            }
            _ => {
                let (mean, deviation) = self.moments(spec);
                self.plain(spec, dtype, Spread::Normal { mean, deviation })?
            }
        };
        Ok((dtype, fill))
    }

    fn dtype(&self, spec: &TensorSpec) -> Result<Dtype, SynthError> {
        let wide = spec.name.ends_with("e_score_correction_bias")
            || (spec.role == Role::Router && self.model.model_type == "hunyuan_v1_moe");
        let wanted = if wide { Dtype::F32 } else { self.plain };
        let customary = spec.dtypes.last().copied().ok_or_else(|| unexpected(spec))?;
        Ok(if spec.dtypes.contains(&wanted) { wanted } else { customary })
    }

    /// Mean and deviation of a plain tensor.
    fn moments(&self, spec: &TensorSpec) -> (f64, f64) {
        let head = LOGIT_DEVIATION / (self.model.hidden as f64).sqrt();
        match spec.role {
            Role::Norm => (1.0, 0.05),
            Role::Embedding => (0.0, if self.model.head.is_none() { head } else { 1.0 }),
            Role::Head => (0.0, head),
            _ if spec.name.ends_with("e_score_correction_bias") => (0.0, 0.01),
            _ if spec.name.ends_with("bias") => (0.0, 0.02),
            _ if spec.shape.len() == 1 => (0.0, 0.5),
            // Fused experts are stored `[experts, in, out]`, all else `[out, in]`.
            _ => (
                0.0,
                deviation(
                    spec,
                    if spec.shape.len() == 3 { spec.shape[1] } else { spec.shape[spec.shape.len() - 1] },
                ),
            ),
        }
    }

    fn plain(&mut self, spec: &TensorSpec, dtype: Dtype, spread: Spread) -> Result<Fill, SynthError> {
        let key = match spread {
            Spread::Normal { mean, deviation } => (dtype, mean.to_bits(), deviation.to_bits()),
            Spread::Around(mean) => (dtype, mean.to_bits(), u64::MAX),
        };
        if let Some(fill) = self.fills.get(&key) {
            return Ok(fill.clone());
        }
        let fill = Fill::plain(dtype, spread).ok_or_else(|| unexpected(spec))?;
        self.fills.insert(key, fill.clone());
        Ok(fill)
    }
}

/// Of a linear map's weights with so many inputs.
fn deviation(spec: &TensorSpec, inputs: usize) -> f64 {
    let gain =
        if spec.role == Role::Attention && spec.name.contains(".o_proj.") { ATTENTION_GAIN } else { 1.0 };
    gain / (inputs.max(1) as f64).sqrt()
}

fn unexpected(spec: &TensorSpec) -> SynthError {
    let message = format!("tensor {}: no values are known for {:?} {:?}", spec.name, spec.dtypes, spec.shape);
    SynthError::Config(message)
}
