//! Comparing what lies on the device.

use kernels::cuda::{Buffer, Device, DeviceError, Slice, check};

/// Compares, with a value on the device to do it in.
pub(super) struct Compare<'a> {
    device: &'a Device,
    word: Buffer<u32>,
}

impl<'a> Compare<'a> {
    pub fn new(device: &'a Device) -> Result<Self, DeviceError> {
        Ok(Self { device, word: device.zeroed(1)? })
    }

    /// Words that differ.
    pub fn differences(&self, a: Slice<'_, u32>, b: Slice<'_, u32>) -> Result<u32, DeviceError> {
        check::count_differences(self.device, a, b, self.word.all())
    }

    /// The worst error by magnitude.
    pub fn worst(
        &self,
        got: Slice<'_, f32>,
        want: Slice<'_, f64>,
        magnitudes: Option<Slice<'_, f64>>,
    ) -> Result<f64, DeviceError> {
        check::worst_error(self.device, got, want, magnitudes, self.word.all()).map(f64::from)
    }
}

/// `count` numbers below `end` that lie apart, the first and the last among them.
pub(super) fn spread(count: usize, end: usize) -> Vec<usize> {
    let count = count.min(end);
    let mut numbers: Vec<usize> =
        (0..count).map(|i| if count == 1 { 0 } else { i * (end - 1) / (count - 1) }).collect();
    numbers.dedup();
    numbers
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn numbers_are_spread() {
        assert_eq!(spread(3, 9), [0, 4, 8]);
        assert_eq!(spread(5, 2), [0, 1]);
        assert_eq!(spread(4, 1), [0]);
    }
}
