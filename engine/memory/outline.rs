//! What a model is made of, from `config.json` and the index alone: every tensor that the description asks for, with
//! its bytes. Where the files are there, their headers say the types; else the configuration does.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use bench::synth::{Recipe, plain_type};
use kernels::format::GROUP;
use models::config::Ffn;
use models::manifest::{Role, TensorSpec, manifest, verify};
use models::{Checkpoint, ModelConfig};
use safetensors::tensor::Dtype;
use serde::Deserialize;
use serde_json::Value;

use super::Weights;
use crate::error::Error;
use crate::hub::{self, HubOptions, ModelRef};
use crate::loaded::{DenseFormat, open_checkpoint};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Largest configuration and index that are read (K2's index has 20 MB).
const MAX_CONFIG_BYTES: u64 = 8 << 20;
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// Where the sizes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The headers of all files.
    Files,
    /// The configuration, and the names in the index.
    Index,
    /// The configuration alone.
    Config,
}

impl Source {
    /// A name for results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Files => "files",
            Self::Index => "index",
            Self::Config => "config",
        }
    }
}

/// Totals of one kind of tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// Weights.
    pub parameters: usize,
    /// Bytes, scales included.
    pub bytes: usize,
}

/// What an index says beside the shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexTotals {
    /// `metadata.total_size`, if it says so.
    pub total_bytes: Option<usize>,
    /// Tensors that the model has and nothing reads.
    pub unread: usize,
}

/// A model's description and the sizes of its weights.
#[derive(Debug)]
pub struct Outline {
    /// The description.
    pub config: ModelConfig,
    /// Where the sizes come from.
    pub source: Source,
    /// Sizes by kind.
    pub kinds: BTreeMap<Role, Total>,
    /// What the index says, if there is one.
    pub index: Option<IndexTotals>,
    /// Bytes of float weights that can have 8-bit copies, and bytes of these copies.
    dense: (usize, usize),
    /// Bytes of routed experts that one token goes to.
    token_expert_bytes: usize,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    metadata: Option<Metadata>,
    weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Metadata {
    #[serde(default)]
    total_size: Value,
}

impl Outline {
    /// Of MODEL: a checkpoint folder, complete or with its `config.json` alone; the path of a `config.json`; a hub id,
    /// of which nothing but configuration and index is ever downloaded; `demo`; a shape that `synth` knows by name
    /// (`full:ORG-MODEL`).
    ///
    /// # Errors
    /// If there is no such model, its files are broken, or its configuration cannot be run.
    pub fn open(name: &str) -> Result<Self, Error> {
        let path = Path::new(name);
        if path.is_file() && path.extension().is_some_and(|extension| extension == "json") {
            // Beside it, as in its folder; a configuration by another name stands for itself.
            let named = path.file_name().is_some_and(|name| name == CONFIG);
            let index = path.with_file_name(INDEX);
            return Self::of_files(path, (named && index.is_file()).then_some(index.as_path()));
        }
        if !path.exists() && Recipe::names().any(|known| known == name.replace('/', "-")) {
            let recipe = Recipe::find(name, None).map_err(|error| Error::Unsupported(error.to_string()))?;
            return Self::of_config(&recipe.config, None);
        }
        match ModelRef::parse(name)? {
            ModelRef::Folder(folder) => Self::of_folder(name, &folder),
            ModelRef::Demo | ModelRef::Gguf(_) => Self::of_checkpoint(&open_checkpoint(name)?),
            ModelRef::Hub { repo, revision } => {
                let options = HubOptions::from_env()?;
                let files = hub::describe(&repo, revision.as_deref(), &options, &mut *hub::to_stderr())?;
                match files {
                    hub::Described::Folder(folder) => Self::of_folder(name, &folder),
                    hub::Described::Files { config, index } => Self::of_files(&config, index.as_deref()),
                }
            }
        }
    }

    fn of_folder(name: &str, folder: &Path) -> Result<Self, Error> {
        let index = folder.join(INDEX);
        if index.is_file() {
            let shards: HashSet<String> = read_index(&index)?.weight_map.into_values().collect();
            if !shards.iter().all(|shard| folder.join(shard).is_file()) {
                return Self::of_files(&folder.join(CONFIG), Some(&index));
            }
        } else if !folder.join(SINGLE).is_file() {
            return Self::of_files(&folder.join(CONFIG), None);
        }
        match ModelRef::parse(name)? {
            ModelRef::Folder(_) => Self::of_checkpoint(&open_checkpoint(name)?),
            _ => Self::of_checkpoint(&Checkpoint::open(folder)?),
        }
    }

    fn of_files(config: &Path, index: Option<&Path>) -> Result<Self, Error> {
        let config = read_json(config, MAX_CONFIG_BYTES)?;
        Self::of_config(&config, index.map(read_index).transpose()?)
    }

    /// Of a configuration, checked against an index if there is one.
    fn of_config(config: &Value, index: Option<Index>) -> Result<Self, Error> {
        let plain = plain_type(config);
        let config = models::arch::describe(config)?;
        let named = |name: &str| index.as_ref().is_some_and(|index| index.weight_map.contains_key(name));
        let specs = manifest(&config, &named)?;
        let source = if index.is_some() { Source::Index } else { Source::Config };
        if let Some(missing) = specs.iter().find(|spec| index.is_some() && !named(&spec.name)) {
            let message = format!("{INDEX}: {} is missing, which {CONFIG} asks for", missing.name);
            return Err(Error::Unsupported(message));
        }
        let index = index.map(|index| IndexTotals {
            total_bytes: index.metadata.and_then(|metadata| total_size(&metadata.total_size)),
            unread: index.weight_map.len().saturating_sub(specs.len()),
        });
        let bytes = |spec: &TensorSpec| {
            let dtype =
                if spec.dtypes.contains(&plain) { plain } else { *spec.dtypes.last().unwrap_or(&plain) };
            let elements = spec.shape.iter().fold(1usize, |product, dim| product.saturating_mul(*dim));
            (dtype, elements.saturating_mul(dtype.bitsize()) / 8)
        };
        Ok(Self::new(config, source, index, &specs, bytes))
    }

    /// Of files that are all there: headers only.
    fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Self, Error> {
        let config = models::arch::describe(checkpoint.config())?;
        let tensors = checkpoint.tensors();
        let specs = manifest(&config, &|name| tensors.contains_key(name))?;
        verify(&config, &specs, checkpoint)?;
        let bytes = |spec: &TensorSpec| {
            let entry = &tensors[&spec.name];
            (entry.dtype, entry.bytes.as_slice().len())
        };
        Ok(Self::new(config, Source::Files, None, &specs, bytes))
    }

    fn new(
        config: ModelConfig,
        source: Source,
        index: Option<IndexTotals>,
        specs: &[TensorSpec],
        bytes: impl Fn(&TensorSpec) -> (Dtype, usize),
    ) -> Self {
        let mut kinds: BTreeMap<Role, Total> = BTreeMap::new();
        let mut dense = (0, 0);
        for spec in specs {
            let (dtype, bytes) = bytes(spec);
            let total = kinds.entry(spec.role).or_default();
            total.parameters += spec.parameters;
            total.bytes += bytes;
            let copied = can_be_copied(spec, dtype, &config);
            dense.0 += if copied { bytes } else { 0 };
            dense.1 += if copied { spec.parameters / GROUP * (GROUP + 2) } else { 0 };
        }
        let expert_bytes = kinds.get(&Role::RoutedExpert).map_or(0, |total| total.bytes);
        let (active, all) = expert_counts(&config);
        // All experts of a model are stored alike; the quotient is exact in 128 bits.
        let token_expert_bytes =
            if all == 0 { 0 } else { (expert_bytes as u128 * active as u128 / all as u128) as usize };
        Self { config, source, kinds, index, dense, token_expert_bytes }
    }

    fn of(&self, role: Role) -> Total {
        self.kinds.get(&role).copied().unwrap_or_default()
    }

    /// All weights of the model.
    pub fn parameters(&self) -> usize {
        self.kinds.values().map(|total| total.parameters).sum()
    }

    /// Those that one token meets: all but the routed experts that it does not go to.
    pub fn active_parameters(&self) -> usize {
        let (active, all) = expert_counts(&self.config);
        let experts = self.of(Role::RoutedExpert).parameters;
        let met = if all == 0 { 0 } else { (experts as u128 * active as u128 / all as u128) as usize };
        self.parameters() - experts + met
    }

    /// Weights that a prompt's token is multiplied with: the active ones without embedding and head.
    pub fn multiplied_parameters(&self) -> usize {
        let skipped = self.of(Role::Embedding).parameters + self.of(Role::Head).parameters;
        self.active_parameters().saturating_sub(skipped)
    }

    /// Bytes of all weights as published.
    pub fn bytes(&self) -> usize {
        self.kinds.values().map(|total| total.bytes).sum()
    }

    /// The weights as they would be in memory.
    pub fn weights(&self, dense: DenseFormat) -> Weights {
        let head = if self.config.head.is_some() { self.of(Role::Head) } else { self.of(Role::Embedding) };
        let fixed = [Role::Attention, Role::DenseMlp, Role::Router, Role::SharedExpert, Role::Norm];
        let fixed: usize = fixed.iter().map(|role| self.of(*role).bytes).sum();
        let (replaced, copied) = match dense {
            DenseFormat::Published => (0, 0),
            DenseFormat::Q8 => self.dense,
        };
        // A tied embedding is still read where it is.
        let kept = if self.config.head.is_none() && replaced > 0 { head.bytes } else { 0 };
        Weights {
            mapped_bytes: self.bytes() - replaced + kept,
            copied_bytes: copied,
            expert_bytes: self.of(Role::RoutedExpert).bytes,
            token_bytes: fixed + head.bytes + self.token_expert_bytes - replaced + copied,
            token_expert_bytes: self.token_expert_bytes,
        }
    }
}

/// Experts that a token goes to and experts that there are, each weighted by its size, over all layers.
fn expert_counts(config: &ModelConfig) -> (usize, usize) {
    let of = |layer: &models::config::LayerSpec| match &layer.ffn {
        Ffn::Moe(moe) => (moe.rule.top_k * moe.intermediate, moe.rule.experts * moe.intermediate),
        Ffn::Dense(_) => (0, 0),
    };
    config.layers.iter().map(of).fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1))
}

/// Whether `--dense-format q8` copies a weight: float matrices of whole groups, of attention (but the one that latent
/// attention applies per head), dense and shared experts and the head.
fn can_be_copied(spec: &TensorSpec, dtype: Dtype, config: &ModelConfig) -> bool {
    let float = matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
    let matrix = spec.shape.len() == 2 && spec.shape[1].is_multiple_of(GROUP) && spec.parameters > 0;
    let tied = config.head.is_none() && spec.role == Role::Embedding;
    let role = matches!(spec.role, Role::Attention | Role::DenseMlp | Role::SharedExpert | Role::Head);
    float && matrix && (role || tied) && !spec.name.ends_with("kv_b_proj.weight")
}

/// A count of bytes; some writers give a float or a string.
fn total_size(value: &Value) -> Option<usize> {
    match value {
        Value::String(text) => text.parse().ok(),
        Value::Number(number) => {
            let whole = number.as_u64();
            whole
                .or(number.as_f64().filter(|n| (0.0..1e18).contains(n)).map(|n| n as u64))
                .map(|n| n as usize)
        }
        _ => None,
    }
}

fn read(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    let failed = |error| Error::Io(path.display().to_string(), error);
    let metadata = path.metadata().map_err(failed)?;
    // Before it is opened: to open a pipe waits for a writer.
    if !metadata.is_file() || metadata.len() > limit {
        let (path, size) = (path.display(), metadata.len());
        let message = format!("{path}: is no file of at most {limit} bytes (it has {size})");
        return Err(Error::Unsupported(message));
    }
    std::fs::read(path).map_err(failed)
}

fn read_json(path: &Path, limit: u64) -> Result<Value, Error> {
    parse(path, &read(path, limit)?)
}

fn read_index(path: &Path) -> Result<Index, Error> {
    parse(path, &read(path, MAX_INDEX_BYTES)?)
}

fn parse<T: for<'de> Deserialize<'de>>(path: &Path, bytes: &[u8]) -> Result<T, Error> {
    let parsed = serde_json::from_slice(bytes);
    parsed.map_err(|error| Error::Unsupported(format!("{}: {error}", path.display())))
}
