//! Checkpoints as published, the descriptions that architectures make of them, and the runners
//! that execute a description. This crate knows no request.
//!
//! The way in is [`Model::open`]; the way through is [`runner::Runner`].

pub mod arch;
pub mod batch;
pub mod check;
pub mod checkpoint;
pub mod config;
pub mod cpu;
pub mod error;
pub mod fields;
pub mod manifest;
pub mod quant;
pub mod reference;
pub mod rope;
pub mod runner;
pub mod weights;

use std::sync::Arc;

pub use batch::{Batch, WantLogits};
pub use checkpoint::Checkpoint;
pub use config::ModelConfig;
pub use error::{Error, Result};
pub use runner::{Capacity, Component, NoProbe, Numerics, Point, Probe, Runner};

/// A checkpoint with its description and weights; what every runner is made from.
pub struct Model {
    /// The files.
    pub checkpoint: Checkpoint,
    /// What they describe.
    pub config: ModelConfig,
    /// Where each weight is.
    pub weights: weights::ModelWeights,
    /// 8-bit copies of float weights, if they were asked for.
    pub q8: Option<weights::Q8Copy>,
}

impl Model {
    /// Describes an open checkpoint and finds all its weights. Reads headers only.
    ///
    /// # Errors
    /// Names the field or tensor that is missing, unexpected or not understood.
    pub fn open(checkpoint: Checkpoint) -> Result<Arc<Self>> {
        let config = arch::describe(checkpoint.config())?;
        let weights = weights::ModelWeights::load(&config, &checkpoint)?;
        Ok(Arc::new(Self { checkpoint, config, weights, q8: None }))
    }

    /// As [`Model::open`], with 8-bit copies of the float weights outside the routed experts in place of these
    /// (coarser; `--dense-format q8`). Reads all of them, on the threads of the current rayon pool, if `admit` does
    /// not refuse what the copies take.
    ///
    /// # Errors
    /// As [`Model::open`], and what `admit` gives.
    pub fn open_q8<E: From<Error>>(
        checkpoint: Checkpoint,
        admit: impl FnOnce(weights::Q8Copy) -> std::result::Result<(), E>,
    ) -> std::result::Result<Arc<Self>, E> {
        let config = arch::describe(checkpoint.config())?;
        let mut weights = weights::ModelWeights::load(&config, &checkpoint)?;
        let plan = weights.plan_q8();
        admit(plan)?;
        weights.copy_dense_to_q8(kernels::Isa::detect());
        Ok(Arc::new(Self { checkpoint, config, weights, q8: Some(plan) }))
    }

    /// What a result should say of how it was computed: the numerics, and what is coarser by request.
    pub fn numerics_label(&self, numerics: Numerics) -> String {
        let dense = if self.q8.is_some() { "+q8-dense" } else { "" };
        format!("{}{dense}", numerics.as_str())
    }

    /// Bytes of all tensors that are read where they are.
    pub fn weight_bytes(&self) -> usize {
        let all: usize = self.checkpoint.tensors().values().map(|entry| entry.bytes.as_slice().len()).sum();
        let skipped = self.weights.skipped.tensors.iter();
        let replaced = self.q8.map_or(0, |q8| q8.replaced_bytes);
        all - replaced
            - skipped.map(|(name, _)| self.checkpoint.tensors()[name].bytes.as_slice().len()).sum::<usize>()
    }
}
