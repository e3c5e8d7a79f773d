//! Copies of rows on the device. `kernels/cuda/gather.cu`.

use super::buffer::Slice;
use super::device::Device;
use super::error::DeviceError;
use super::image::Kernel;
use super::rows::{Strided, count};

const GATHER: Kernel = Kernel::new("gather", "gather_rows");
const THREADS: u32 = 128;

/// Copies rows that an index names (those whose logits are wanted), or parts of rows to where they belong (the rotated
/// part of a query beside its latent part).
pub struct Gather<'a> {
    /// `[_, width]`.
    pub from: Strided<'a>,
    /// Rows of `from`; without an index, at least `rows`.
    pub from_rows: usize,
    /// `[rows]`: which row of `from` each is, below `from_rows`, as the device cannot check; a row whose index is
    /// below zero is left as it is. None: row r is row r.
    pub index: Option<Slice<'a, i32>>,
    /// `[rows, width]`; must not overlap what is read.
    pub to: Strided<'a>,
    /// Rows.
    pub rows: usize,
    /// Values of a row.
    pub width: usize,
}

impl Gather<'_> {
    /// Puts it into the stream.
    ///
    /// # Panics
    /// If shapes differ.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (rows, width) = (self.rows, self.width);
        self.from.check(self.from_rows, width, "gather: from");
        self.to.check(rows, width, "gather: to");
        match self.index {
            Some(index) => assert!(index.len() >= rows, "gather: one index per row"),
            None => assert!(self.from_rows >= rows, "gather: {rows} rows of {}", self.from_rows),
        }
        if rows * width == 0 {
            return Ok(());
        }
        let launch = device.launch(GATHER, (count(rows), count(width).div_ceil(THREADS)), THREADS, 0).early();
        let launch = launch.arg(self.from.values).arg(self.from.stride as u64).arg(self.index);
        let launch = launch.arg(self.to.values).arg(self.to.stride as u64).arg(count(width));
        // SAFETY: the arguments of gather_rows; all rows lie inside their slices, as checked, and indices inside
        // `from` by the caller's promise.
        unsafe { launch.run() }
    }
}
