//! The tensors a description asks for: names, types, shapes. One list for everyone: the loader holds
//! a checkpoint against it, `inspect` and `plan` count with it, `synth` writes it.

use std::collections::BTreeSet;

use kernels::format::{FP8_BLOCK, GROUP};
use safetensors::tensor::Dtype;

use crate::checkpoint::Checkpoint;
use crate::config::{
    Experts, Ffn, Gqa, LayerSpec, Linear, Mixer, Mla, MlaQuery, Mlp, ModelConfig, Moe, QkNorm,
};
use crate::error::{Error, Result};
use crate::quant::Stored;

/// What a tensor is part of; `inspect` sums bytes and parameters by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Token embedding.
    Embedding,
    /// Output head.
    Head,
    /// Norm weights.
    Norm,
    /// Attention projections, sinks included.
    Attention,
    /// MLP of a layer without experts.
    DenseMlp,
    /// Router weights and biases.
    Router,
    /// Shared experts.
    SharedExpert,
    /// Routed experts.
    RoutedExpert,
}

impl Role {
    /// A name for tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Head => "output head",
            Self::Norm => "norms",
            Self::Attention => "attention",
            Self::DenseMlp => "dense mlp",
            Self::Router => "router",
            Self::SharedExpert => "shared experts",
            Self::RoutedExpert => "routed experts",
        }
    }
}

/// Most tensors of one model (Kimi K2 has 210,000), and most weights (it has 2^40): what a
/// configuration may ask for before anything of it has been found.
const MAX_TENSORS: usize = 1 << 20;
const MAX_PARAMETERS: usize = 1 << 50;

/// Types a plain weight may have.
pub const PLAIN: &[Dtype] = &[Dtype::F32, Dtype::F16, Dtype::BF16];

/// One tensor that must be there.
#[derive(Clone, Debug)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Types it may have, the customary one of the format last.
    pub dtypes: &'static [Dtype],
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// What it is part of.
    pub role: Role,
    /// Weights it stands for: its elements for a plain weight, the unpacked values for a packed
    /// one, 0 for scales and shapes.
    pub parameters: usize,
}

/// Collects the manifest of a description.
struct Manifest<'a> {
    config: &'a ModelConfig,
    present: &'a dyn Fn(&str) -> bool,
    tensors: Vec<TensorSpec>,
    parameters: usize,
}

/// Every tensor the description asks for. `present` says what the files hold, where a family is
/// published in more than one layout (`|_| false` = the customary one).
///
/// # Errors
/// If a quantised weight's shape does not fit its format, or there is more than any model has.
pub fn manifest(config: &ModelConfig, present: &dyn Fn(&str) -> bool) -> Result<Vec<TensorSpec>> {
    let mut m = Manifest { config, present, tensors: Vec::new(), parameters: 0 };
    m.plain(&config.embedding, &[config.vocab, config.hidden], Role::Embedding)?;
    m.plain(&config.final_norm, &[config.hidden], Role::Norm)?;
    if let Some(head) = &config.head {
        m.plain(head, &[config.vocab, config.hidden], Role::Head)?;
    }
    for layer in &config.layers {
        m.layer(layer)?;
    }
    Ok(m.tensors)
}

impl Manifest<'_> {
    /// Adds a tensor; `unpacked` are the dimensions of the weights it stands for, none for a scale.
    fn push(
        &mut self,
        name: String,
        dtypes: &'static [Dtype],
        shape: Vec<usize>,
        role: Role,
        unpacked: &[usize],
    ) -> Result<()> {
        let parameters = match unpacked {
            [] => Some(0),
            dims => dims.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim)),
        };
        let room = |n: &usize| *n <= MAX_PARAMETERS - self.parameters && self.tensors.len() < MAX_TENSORS;
        let Some(parameters) = parameters.filter(room) else {
            let limits = format!("{MAX_TENSORS} tensors and {MAX_PARAMETERS} weights");
            let message = format!("with its {shape:?} the configuration asks for more than {limits}");
            return Err(Error::tensor(name, message));
        };
        self.parameters += parameters;
        self.tensors.push(TensorSpec { name, dtypes, shape, role, parameters });
        Ok(())
    }

    fn plain(&mut self, name: &str, shape: &[usize], role: Role) -> Result<()> {
        self.push(name.to_owned(), PLAIN, shape.to_vec(), role, shape)
    }

    fn layer(&mut self, layer: &LayerSpec) -> Result<()> {
        self.plain(&layer.input_norm, &[self.config.hidden], Role::Norm)?;
        self.plain(&layer.post_norm, &[self.config.hidden], Role::Norm)?;
        match &layer.mixer {
            Mixer::Gqa(gqa) => self.gqa(gqa)?,
            Mixer::Mla(mla) => self.mla(mla)?,
        }
        match &layer.ffn {
            Ffn::Dense(mlp) => self.mlp(mlp, Role::DenseMlp),
            Ffn::Moe(moe) => self.moe(moe),
        }
    }

    fn gqa(&mut self, gqa: &Gqa) -> Result<()> {
        for linear in [&gqa.q, &gqa.k, &gqa.v, &gqa.o] {
            self.linear(linear, Role::Attention)?;
        }
        let widths = match &gqa.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead { q, k } | QkNorm::PerHeadAfterRope { q, k } => {
                Some((q, k, gqa.head_dim, gqa.head_dim))
            }
            QkNorm::Whole { q, k } => Some((q, k, gqa.heads * gqa.head_dim, gqa.kv_heads * gqa.head_dim)),
        };
        if let Some((q, k, q_width, k_width)) = widths {
            self.plain(q, &[q_width], Role::Norm)?;
            self.plain(k, &[k_width], Role::Norm)?;
        }
        if let Some(sinks) = &gqa.sinks {
            self.plain(sinks, &[gqa.heads], Role::Attention)?;
        }
        Ok(())
    }

    fn mla(&mut self, mla: &Mla) -> Result<()> {
        match &mla.query {
            MlaQuery::Direct(q) => self.linear(q, Role::Attention)?,
            MlaQuery::LowRank { a, norm, b } => {
                self.linear(a, Role::Attention)?;
                self.plain(norm, &[a.rows], Role::Norm)?;
                self.linear(b, Role::Attention)?;
            }
        }
        self.plain(&mla.kv_norm, &[mla.kv_rank], Role::Norm)?;
        for linear in [&mla.kv_a, &mla.kv_b, &mla.o] {
            self.linear(linear, Role::Attention)?;
        }
        Ok(())
    }

    fn mlp(&mut self, mlp: &Mlp, role: Role) -> Result<()> {
        for linear in [&mlp.gate, &mlp.up, &mlp.down] {
            self.linear(linear, role)?;
        }
        Ok(())
    }

    fn moe(&mut self, moe: &Moe) -> Result<()> {
        let (experts, hidden, inter) = (moe.rule.experts, self.config.hidden, moe.intermediate);
        self.plain(&format!("{}.weight", moe.router.name), &[experts, hidden], Role::Router)?;
        if moe.router.bias {
            self.plain(&format!("{}.bias", moe.router.name), &[experts], Role::Router)?;
        }
        if let Some(bias) = &moe.selection_bias {
            self.plain(bias, &[experts], Role::Router)?;
        }
        if let Some(shared) = &moe.shared {
            self.mlp(shared, Role::SharedExpert)?;
        }
        let role = Role::RoutedExpert;
        match &moe.experts {
            Experts::PerExpert { prefix, .. } if (self.present)(&fused(prefix).0) => {
                let (gate_up, down) = fused(prefix);
                self.plain(&gate_up, &[experts, 2 * inter, hidden], role)?;
                self.plain(&down, &[experts, hidden, inter], role)?;
            }
            Experts::PerExpert { prefix, gate, up, down } => {
                for e in 0..experts {
                    for (part, rows, cols) in
                        [(gate, inter, hidden), (up, inter, hidden), (down, hidden, inter)]
                    {
                        let name = format!("{prefix}.{e}.{part}");
                        self.linear(&Linear { name, rows, cols, bias: false }, role)?;
                    }
                }
            }
            Experts::GptOss { prefix } => {
                let quantised = self.config.quantisation.stored(prefix) == Stored::Mxfp4;
                for (part, rows, cols) in [("gate_up_proj", 2 * inter, hidden), ("down_proj", hidden, inter)]
                {
                    let name = format!("{prefix}.{part}");
                    if quantised {
                        groups_of_32(&name, cols)?;
                        let groups = vec![experts, rows, cols / GROUP];
                        let blocks = [&groups[..], &[GROUP / 2]].concat();
                        let unpacked = [experts, rows, cols];
                        self.push(format!("{name}_blocks"), &[Dtype::U8], blocks, role, &unpacked)?;
                        self.push(format!("{name}_scales"), &[Dtype::U8], groups, role, &[])?;
                    } else {
                        self.plain(&name, &[experts, cols, rows], role)?;
                    }
                    self.plain(&format!("{name}_bias"), &[experts, rows], role)?;
                }
            }
        }
        Ok(())
    }

    fn linear(&mut self, linear: &Linear, role: Role) -> Result<()> {
        let Linear { name, rows, cols, bias } = linear;
        let unpacked = [*rows, *cols];
        match self.config.quantisation.stored(name) {
            Stored::Plain => self.plain(&format!("{name}.weight"), &unpacked, role)?,
            Stored::Fp8 => {
                self.push(format!("{name}.weight"), &[Dtype::F8_E4M3], unpacked.to_vec(), role, &unpacked)?;
                let blocks = vec![rows.div_ceil(FP8_BLOCK), cols.div_ceil(FP8_BLOCK)];
                self.push(format!("{name}.weight_scale_inv"), &[Dtype::F32], blocks, role, &[])?;
            }
            Stored::Int4 => {
                groups_of_32(name, *cols)?;
                let (packed, scales) = (vec![*rows, cols / 8], vec![*rows, cols / GROUP]);
                self.push(format!("{name}.weight_packed"), &[Dtype::I32], packed, role, &unpacked)?;
                self.push(format!("{name}.weight_scale"), &[Dtype::BF16], scales, role, &[])?;
                self.push(format!("{name}.weight_shape"), &[Dtype::I64, Dtype::I32], vec![2], role, &[])?;
            }
            Stored::Mxfp4 => {
                return Err(Error::tensor(name, "MXFP4 is supported for fused experts only"));
            }
        }
        if *bias {
            self.plain(&format!("{name}.bias"), &[*rows], role)?;
        }
        Ok(())
    }
}

/// Names of experts fused in memory order `[E, 2I, H]` and `[E, H, I]`.
pub(crate) fn fused(prefix: &str) -> (String, String) {
    (format!("{prefix}.gate_up_proj"), format!("{prefix}.down_proj"))
}

fn groups_of_32(name: &str, cols: usize) -> Result<()> {
    if cols.is_multiple_of(GROUP) {
        return Ok(());
    }
    Err(Error::tensor(name, format!("has {cols} columns, which are no whole groups of {GROUP}")))
}

/// What the loader found beside the manifest.
#[derive(Debug, Default)]
pub struct Skipped {
    /// Tensors skipped by rule, with the reason.
    pub tensors: Vec<(String, &'static str)>,
}

/// Holds a checkpoint against a manifest: nothing missing, nothing mis-shaped or mis-typed, nothing
/// there that no rule explains.
///
/// # Errors
/// Names the first tensor that is wrong.
pub fn verify(config: &ModelConfig, manifest: &[TensorSpec], checkpoint: &Checkpoint) -> Result<Skipped> {
    for spec in manifest {
        let entry = checkpoint.tensors().get(&spec.name).ok_or_else(|| {
            Error::tensor(&spec.name, format!("is missing (expected {:?} {:?})", spec.dtypes, spec.shape))
        })?;
        // Some makers store a vector as one row.
        let row = matches!(spec.shape[..], [n] if entry.shape == [1, n]);
        if entry.shape != spec.shape && !row {
            let message = format!("has shape {:?}, the configuration asks for {:?}", entry.shape, spec.shape);
            return Err(Error::tensor(&spec.name, message));
        }
        if !spec.dtypes.contains(&entry.dtype) {
            let message = format!("is {:?}, expected one of {:?}", entry.dtype, spec.dtypes);
            return Err(Error::tensor(&spec.name, message));
        }
    }
    let wanted: BTreeSet<&str> = manifest.iter().map(|spec| spec.name.as_str()).collect();
    let mut skipped = Skipped::default();
    for (name, entry) in checkpoint.tensors() {
        if wanted.contains(name.as_str()) {
            continue;
        }
        // What a switched-off part leaves behind.
        if entry.shape.contains(&0) {
            skipped.tensors.push((name.clone(), "without elements"));
            continue;
        }
        let rule = config.skip.iter().find(|rule| {
            name.len() >= rule.prefix.len() + rule.suffix.len()
                && name.starts_with(&rule.prefix)
                && name.ends_with(&rule.suffix)
        });
        match rule {
            Some(rule) => skipped.tensors.push((name.clone(), rule.reason)),
            None => return Err(Error::tensor(name, "is unexpected: no part of this architecture reads it")),
        }
    }
    Ok(skipped)
}
