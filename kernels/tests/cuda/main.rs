//! The CUDA kernels and the layer that launches them, on the mock driver or, with `MOEBIUS_CUDA=device`, on the
//! machine's own device.

mod address_sanitizer;
mod attention;
mod bench;
mod capture;
mod check;
#[path = "../common/mod.rs"]
mod common;
mod dense;
mod device;
mod driver;
mod experts;
mod finalize;
mod gather;
mod group;
#[path = "../mock/mod.rs"]
mod mock;
mod norm;
mod ring;
mod rope;
mod route;
mod sample;
