//! The CUDA device: what is there, memory, launches, graphs and timing. The only part of Moebius that
//! speaks to the driver.
//!
//! The driver library is looked for at run time; a machine without one uses the host kernels of this
//! crate. Kernels are compiled ahead of time (`kernels/cuda/compile.py`) and embedded, so neither a build
//! nor a user needs a CUDA toolkit.
//!
//! What holds everywhere below this module:
//!
//! * **One stream.** Everything a [`Device`] does happens in the order it was asked for. One thread owns
//!   the device.
//! * **Nothing panics on what the driver says.** Every call returns a [`DeviceError`] that names the
//!   operation, the kernel and the driver's own words. An error after which a device cannot be used any
//!   more is returned again, at once, by every later call; dropping buffers then is safe.
//! * **A launch allocates nothing**, and works while a graph is captured. A [`Graph`] keeps the buffers
//!   that it uses alive.

mod attention;
mod buffer;
pub mod check;
mod context;
mod dense;
mod device;
mod error;
mod event;
mod experts;
mod gather;
mod graph;
mod group;
mod host;
mod image;
mod launch;
mod norm;
mod profile;
mod ring;
mod rope;
mod route;
mod rows;
mod sample;
mod source;

pub use attention::{GroupedAttention, LatentAttention, Places};
pub use buffer::{Buffer, Plain, Slice};
pub use dense::{
    Dense, DenseFormat, DenseGateUp, DenseHeads, DenseInput, DenseLayout, DenseShape, DenseValues,
    DenseWeight, DenseWorkspace, DenseWorkspaceSize, VendorProducts,
};
pub use device::{Availability, Device, DeviceInfo, DeviceSummary, MemoryInfo};
pub use error::{Cause, DeviceError};
pub use event::Event;
pub use experts::{
    EXPERT_LEN, ExpertAddress, ExpertFormat, ExpertsDown, ExpertsUp, GroupedPairs, Multiply, Tiles,
    WeightAddress,
};
pub use gather::Gather;
pub use graph::Graph;
pub use group::{Finalize, Group, UNIT_LEN, Units, max_units};
pub use host::HostBuffer;
pub use image::Kernel;
pub use launch::{Argument, Grid, Launch, MAX_ARGUMENTS, Residency};
pub use norm::{HeadNorm, RmsNorm, Split};
pub use profile::Timing;
pub use ring::{ExpertRing, Grouped, News};
pub use rope::{CacheWrite, Embed, EmbeddingTable, Heads, Rotate, WriteRows, rotation_table};
pub use route::Route;
pub use rows::{Order, Planes, Strided};
pub use sample::{Adjust, Adjustment, Penalties, Sample, Sampling};
