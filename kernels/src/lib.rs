//! Host kernels over buffers the caller owns: products from the published bytes, routing, expert
//! feed-forward, attention, norms and rotations; and the same for CUDA devices in [`cuda`].
//!
//! This crate knows no model and no request. Every operation has a plain reference beside it
//! (`reference.rs`), and three properties hold for all of them:
//!
//! * **One summation order.** The order in which an output is summed depends on its own inputs
//!   only: never on the number of rows in the call, the number of threads, or (but for products in
//!   tile registers) the instruction set chosen at start (see [`simd`]). A row gives the same bits
//!   alone or in a batch.
//! * **No allocation.** Callers pass every buffer.
//! * **f32 accumulation**, with weights dequantised exactly.

pub mod attention;
pub mod cuda;
pub mod experts;
pub mod format;
pub mod matmul;
pub mod norm;
pub mod quantised;
pub mod reference;
pub mod rope;
pub mod route;
pub mod rows;
pub mod simd;
pub mod team;

pub use format::{Matrix, Values};
pub use rows::{Rows, RowsMut};
pub use simd::Isa;
