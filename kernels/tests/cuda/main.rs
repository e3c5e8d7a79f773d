//! The CUDA kernels and the layer that launches them, on the mock driver or, with `MOEBIUS_CUDA=device`, on the
//! machine's own device.

mod device;
mod driver;
mod gather;
#[path = "../mock/mod.rs"]
mod mock;
mod sample;
