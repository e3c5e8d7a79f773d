//! Seeded inputs in every format, and comparisons.
#![allow(dead_code, reason = "no test binary uses all of it")]

use kernels::{Matrix, Values};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In -1 .. 1.
    pub fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    F32,
    F16,
    Bf16,
    Fp8,
    Int4,
    Mxfp4,
    Q8,
}

pub const FORMATS: [Format; 6] =
    [Format::F32, Format::F16, Format::Bf16, Format::Fp8, Format::Int4, Format::Mxfp4];

impl Format {
    /// Formats of 32-column groups have no tails.
    pub fn grouped(self) -> bool {
        matches!(self, Self::Int4 | Self::Mxfp4)
    }
}

/// A weight that owns its bytes. One byte of padding before the values keeps them unaligned.
pub struct Weight {
    format: Format,
    values: Vec<u8>,
    scales: Vec<u8>,
    pub rows: usize,
    pub cols: usize,
}

impl Weight {
    pub fn random(random: &mut Random, format: Format, rows: usize, cols: usize) -> Self {
        let n = rows * cols;
        let mut values = vec![0];
        let mut scales = vec![0];
        let bf16 = |x: f32| half::bf16::from_f32(x).to_le_bytes();
        match format {
            Format::F32 => (0..n).for_each(|_| values.extend(random.value().to_le_bytes())),
            Format::F16 => (0..n).for_each(|_| {
                // A quarter are small enough to be subnormal halves.
                let scale = if random.below(4) == 0 { 6e-5 } else { 1.0 };
                values.extend(half::f16::from_f32(random.value() * scale).to_le_bytes());
            }),
            Format::Bf16 => (0..n).for_each(|_| values.extend(bf16(random.value()))),
            Format::Fp8 => {
                values.extend((0..n).map(|_| match random.next() as u8 {
                    code if code & 0x7f == 0x7f => 0,
                    code => code,
                }));
                for _ in 0..rows.div_ceil(128) * cols.div_ceil(128) {
                    scales.extend((random.value() * 0.01).to_le_bytes());
                }
            }
            Format::Int4 => {
                assert_eq!(cols % 32, 0);
                values.extend((0..n / 2).map(|_| random.next() as u8));
                (0..n / 32).for_each(|_| scales.extend(bf16(random.value() * 0.2)));
            }
            Format::Mxfp4 => {
                assert_eq!(cols % 32, 0);
                values.extend((0..n / 2).map(|_| random.next() as u8));
                scales.extend((0..n / 32).map(|_| 120 + random.below(8) as u8));
            }
            Format::Q8 => {
                assert_eq!(cols % 32, 0);
                values.extend((0..n).map(|_| (random.next() as u8).max(1)));
                (0..n / 32).for_each(|_| scales.extend(bf16(random.value() * 0.01)));
            }
        }
        Self { format, values, scales, rows, cols }
    }

    pub fn matrix(&self) -> Matrix<'_> {
        let (values, scales) = (&self.values[1..], &self.scales[1..]);
        let values = match self.format {
            Format::F32 => Values::F32(values),
            Format::F16 => Values::F16(values),
            Format::Bf16 => Values::Bf16(values),
            Format::Fp8 => Values::Fp8 { values, scales },
            Format::Int4 => Values::Int4 { packed: values, scales },
            Format::Mxfp4 => Values::Mxfp4 { blocks: values, scales },
            Format::Q8 => Values::Q8 { codes: values, scales },
        };
        Matrix::new(values, self.rows, self.cols)
    }
}

/// Bits, with one NaN for all.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }).collect()
}

/// That every value is within `tolerance` times the matching size (such as the sum of magnitudes) of
/// what it should be.
#[track_caller]
pub fn assert_close(got: &[f32], want: &[f64], size: &[f64], tolerance: f64, what: &str) {
    assert_eq!((got.len(), size.len()), (want.len(), want.len()), "{what}");
    for (i, ((got, want), size)) in got.iter().zip(want).zip(size).enumerate() {
        let error = (f64::from(*got) - want).abs();
        assert!(error <= tolerance * size + 1e-30, "{what}: [{i}] is {got}, should be {want}; size {size}");
    }
}

/// [`assert_close`] against the greatest magnitude of all.
#[track_caller]
pub fn assert_close_overall(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    let size = want.iter().fold(0.0f64, |a, b| a.max(b.abs()));
    assert_close(got, want, &vec![size; want.len()], tolerance, what);
}

/// What `f` gives in pools of 1, 2 and 3 threads.
pub fn in_pools<T: Send>(f: impl Fn() -> T + Sync) -> Vec<T> {
    (1..=3)
        .map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(&f)
        })
        .collect()
}
