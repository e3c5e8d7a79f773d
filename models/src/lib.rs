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
}

impl Model {
    /// Describes an open checkpoint and finds all its weights. Reads headers only.
    ///
    /// # Errors
    /// Names the field or tensor that is missing, unexpected or not understood.
    pub fn open(checkpoint: Checkpoint) -> Result<Arc<Self>> {
        let config = arch::describe(checkpoint.config())?;
        let weights = weights::ModelWeights::load(&config, &checkpoint)?;
        Ok(Arc::new(Self { checkpoint, config, weights }))
    }

    /// Bytes of all tensors that are read.
    pub fn weight_bytes(&self) -> usize {
        let all: usize = self.checkpoint.tensors().values().map(|entry| entry.bytes.as_slice().len()).sum();
        let skipped = self.weights.skipped.tensors.iter();
        all - skipped.map(|(name, _)| self.checkpoint.tensors()[name].bytes.as_slice().len()).sum::<usize>()
    }
}
