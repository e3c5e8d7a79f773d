//! Synthetic checkpoints, and measurements over kernels and models. This crate knows no request.

pub mod synth;
