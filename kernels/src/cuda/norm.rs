//! Root-mean-square norms on the device, and f32 rows as planes. `kernels/cuda/norm.cu`; the reference is
//! [`crate::reference::rms_norm`].

use super::buffer::Slice;
use super::device::Device;
use super::error::DeviceError;
use super::image::Kernel;
use super::rows::{PlaneArguments, Planes, Strided, count};

const RMS_NORM: Kernel = Kernel::new("norm", "rms_norm");
const HEAD_NORM: Kernel = Kernel::new("norm", "head_norm");
const SPLIT: Kernel = Kernel::new("norm", "split");

/// Heads that a block norms, a warp each.
const HEADS: usize = 4;
/// Values that a block splits.
const SPLIT_VALUES: usize = 128 * 8;

/// Norms rows: x becomes x + delta first, if there is one, and the norm goes wherever it is wanted.
pub struct RmsNorm<'a> {
    /// `[rows, width]`; written if there is a delta.
    pub x: Strided<'a>,
    /// `[rows, width]`: what the residual stream gains.
    pub delta: Option<Strided<'a>>,
    /// `[width]`; none means ones.
    pub weight: Option<Slice<'a, f32>>,
    /// Added to the mean of squares.
    pub eps: f32,
    /// Rows.
    pub rows: usize,
    /// Values of a row.
    pub width: usize,
    /// f32 rows; may be `x`.
    pub out: Option<Strided<'a>>,
    /// Planes in natural order.
    pub natural: Option<Planes<'a>>,
    /// Planes in nibble order, as many.
    pub nibble: Option<Planes<'a>>,
}

impl RmsNorm<'_> {
    /// # Panics
    /// If shapes differ, or the result is wanted nowhere.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (rows, width) = (self.rows, self.width);
        self.x.check(rows, width, "norm: x");
        if let Some(delta) = self.delta {
            delta.check(rows, width, "norm: delta");
        }
        if let Some(out) = self.out {
            out.check(rows, width, "norm: out");
        }
        assert!(self.weight.is_none_or(|weight| weight.len() == width), "norm: one weight per column");
        let wanted = self.out.is_some() || self.natural.is_some() || self.nibble.is_some();
        assert!(wanted, "norm: the result goes nowhere");
        let planes = PlaneArguments::new(self.natural, self.nibble, (rows, width), "norm");
        if rows == 0 {
            return Ok(());
        }
        // By the width alone, on which the order of the sum depends.
        let threads = match width {
            0..=1024 => 128,
            1025..=4096 => 256,
            _ => 512,
        };
        let launch = device.launch(RMS_NORM, count(rows), threads, 0).early();
        let launch = launch.arg(self.x.values).arg(self.x.stride as u64);
        let launch = launch.arg(self.delta.map(|delta| delta.values));
        let launch = launch.arg(self.delta.map_or(0, |delta| delta.stride as u64));
        let launch = launch.arg(self.weight).arg(self.eps).arg(count(width));
        let launch = launch.arg(self.out.map(|out| out.values));
        let launch = launch.arg(self.out.map_or(0, |out| out.stride as u64));
        let launch = launch.arg(planes.natural).arg(planes.nibble).arg(planes.stride).arg(planes.count);
        // SAFETY: the arguments of rms_norm; all rows and planes lie inside their slices, as checked.
        unsafe { launch.run() }
    }
}

/// Norms every head of every row in place, with the same weights.
pub struct HeadNorm<'a> {
    /// Rows that hold the heads, from the first value of the first head on.
    pub x: Strided<'a>,
    /// Rows.
    pub rows: usize,
    /// Heads of a row.
    pub heads: usize,
    /// Values from one head to the next.
    pub head_stride: usize,
    /// Values of a head that are normed.
    pub width: usize,
    /// `[width]`; none means ones.
    pub weight: Option<Slice<'a, f32>>,
    /// Added to the mean of squares.
    pub eps: f32,
}

impl HeadNorm<'_> {
    /// # Panics
    /// If shapes differ.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (rows, heads, width) = (self.rows, self.heads, self.width);
        assert!(width <= self.head_stride || heads <= 1, "norm: heads overlap");
        let row = heads.saturating_sub(1) * self.head_stride + width;
        self.x.check(rows, row, "norm: heads");
        assert!(self.weight.is_none_or(|weight| weight.len() == width), "norm: one weight per column");
        if rows * heads == 0 {
            return Ok(());
        }
        let launch = device.launch(HEAD_NORM, count((rows * heads).div_ceil(HEADS)), 32 * HEADS as u32, 0);
        let launch = launch.early().arg(self.x.values).arg(self.x.stride as u64).arg(count(rows));
        let launch = launch.arg(count(heads)).arg(count(self.head_stride)).arg(count(width));
        let launch = launch.arg(self.weight).arg(self.eps);
        // SAFETY: the arguments of head_norm; all heads lie inside the slice, as checked.
        unsafe { launch.run() }
    }
}

/// Writes f32 rows as planes.
pub struct Split<'a> {
    /// `[rows, width]`.
    pub x: Strided<'a>,
    /// Rows.
    pub rows: usize,
    /// Values of a row.
    pub width: usize,
    /// Planes in natural order.
    pub natural: Option<Planes<'a>>,
    /// Planes in nibble order, as many.
    pub nibble: Option<Planes<'a>>,
}

impl Split<'_> {
    /// # Panics
    /// If shapes differ, or no planes are wanted.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (rows, width) = (self.rows, self.width);
        self.x.check(rows, width, "split: x");
        assert!(self.natural.is_some() || self.nibble.is_some(), "split: the result goes nowhere");
        let planes = PlaneArguments::new(self.natural, self.nibble, (rows, width), "split");
        if rows * width == 0 {
            return Ok(());
        }
        let grid = (count(rows), count(width.div_ceil(SPLIT_VALUES)));
        let launch = device.launch(SPLIT, grid, 128, 0).early();
        let launch = launch.arg(self.x.values).arg(self.x.stride as u64).arg(count(width));
        let launch = launch.arg(planes.natural).arg(planes.nibble).arg(planes.stride).arg(planes.count);
        // SAFETY: the arguments of split; rows and planes lie inside their slices, as checked.
        unsafe { launch.run() }
    }
}
