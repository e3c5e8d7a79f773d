//! What the device can do at most: copies, reads, and products in registers.

use super::sizes::Sizes;
use super::{Gpu, doing};
use crate::Error;
use crate::ceilings::{Bound, Work};
use crate::row::{Row, Share};
use kernels::cuda::check;

/// Per second; 0 before they are measured.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Peaks {
    /// Bytes read or written.
    pub copy: f64,
    /// Operations of bf16 products.
    pub bf16: f64,
}

impl Peaks {
    /// The ceiling that asks for more time, and its share of so many seconds.
    pub fn share(&self, work: Work, seconds: f64) -> Option<Share> {
        if self.copy == 0.0 || self.bf16 == 0.0 {
            return None;
        }
        let memory = (Bound::CopyBandwidth, self.copy, work.bytes as f64 / self.copy);
        let compute = (Bound::Bf16, self.bf16, work.operations as f64 / self.bf16);
        let (bound, value, least) = if memory.2 >= compute.2 { memory } else { compute };
        Some(Share { bound, value, share: least / seconds })
    }
}

/// Measures them.
pub(super) fn measure(gpu: &mut Gpu<'_>, sizes: &Sizes) -> Result<(), Error> {
    let device = gpu.device;
    let failed = |error| doing("measure the ceilings", error);
    let free = device.memory().map_err(failed)?.free_bytes;
    // Both sides in a part of what is there, in whole vectors.
    let words = sizes.copy_bytes.min(free / 4) / 16 * 4;
    let (from, to) = (device.alloc::<u32>(words).map_err(failed)?, device.alloc(words).map_err(failed)?);
    check::fill_codes(device, from.all().cast(), 1, false).map_err(failed)?;
    let never = device.zeroed::<u32>(1).map_err(failed)?;
    let out = device.zeroed::<f32>(1).map_err(failed)?;
    let bytes = 4 * words as u64;
    let runs = gpu.runs;

    let copy = |name: &str| format!("gpu/ceiling/{name}");
    check::copy_vectors(device, from.all(), to.all()).map_err(failed)?;
    let times = gpu.runs(runs, || check::copy_vectors(device, from.all(), to.all())).map_err(failed)?;
    gpu.peaks.copy = 2.0 * bytes as f64 / times.median;
    gpu.row(Row::new(copy("copy"), times, (2 * bytes, 0), None, &gpu.setting))?;

    // The driver's own copy, which need not be slower.
    let times = gpu.runs(runs, || to.copy_from(&from)).map_err(failed)?;
    gpu.peaks.copy = gpu.peaks.copy.max(2.0 * bytes as f64 / times.median);
    gpu.row(Row::new(copy("driver_copy"), times, (2 * bytes, 0), None, &gpu.setting))?;

    check::read_vectors(device, from.all(), never.all()).map_err(failed)?;
    let times = gpu.runs(runs, || check::read_vectors(device, from.all(), never.all())).map_err(failed)?;
    gpu.row(Row::new(copy("read"), times, (bytes, 0), None, &gpu.setting))?;

    let rounds = sizes.multiply_rounds;
    let operations = check::multiply_forever(device, rounds, out.all()).map_err(failed)?;
    let work = || check::multiply_forever(device, rounds, out.all()).map(|_| ());
    let times = gpu.runs(runs, work).map_err(failed)?;
    gpu.peaks.bf16 = operations as f64 / times.median;
    gpu.row(Row::new(copy("mma_sync_bf16"), times, (0, operations), None, &gpu.setting))?;

    let Peaks { copy, bf16 } = gpu.peaks;
    gpu.note(&format!("ceilings: copy {:.3} TB/s, mma.sync bf16 {:.0} TFLOP/s", copy / 1e12, bf16 / 1e12));
    Ok(())
}
