//! Values of tensors: a counter-based generator, and what turns its words into stored numbers.
//!
//! Word `i` of a tensor is SplitMix64's output for state `key + i * γ` (Steele, Lea, Flood 2014), where
//! `key` mixes the seed with the tensor's name. Every word becomes eight bytes of the tensor, in order.

use std::sync::Arc;

use half::{bf16, f16};
use safetensors::tensor::Dtype;

const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
/// Entries of a table of values; 12 bits choose one.
const TABLE: usize = 4096;

/// Root mean square of the stored integers of [`Fill::Int4`]: -7 to 7, 0 twice.
pub(crate) const INT4_RMS: f64 = 4.183_300_132_670_378;
/// Root mean square of the stored numbers of MXFP4 blocks: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and negatives.
pub(crate) const MXFP4_RMS: f64 = 2.926_174_978_535_961;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The generator of one tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stream {
    key: u64,
}

impl Stream {
    pub fn new(seed: u64, name: &str) -> Self {
        let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
        let name = name.bytes().fold(0xCBF2_9CE4_8422_2325, fnv);
        Self { key: mix(mix(seed.wrapping_add(GAMMA)) ^ name) }
    }

    #[inline]
    fn word(self, index: u64) -> u64 {
        mix(self.key.wrapping_add(index.wrapping_mul(GAMMA)))
    }
}

/// How the values of a plain tensor or of scales are spread.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Spread {
    /// About normal, within 3.7 deviations.
    Normal { mean: f64, deviation: f64 },
    /// Between three and five quarters of a mean.
    Around(f64),
}

impl Spread {
    /// The value below which a share of (i + 1/2) / 4096 of all values lie.
    fn quantile(self, i: usize) -> f64 {
        let share = (i as f64 + 0.5) / TABLE as f64;
        match self {
            Self::Normal { mean, deviation } => mean + deviation * normal_quantile(share),
            Self::Around(mean) => mean * (0.75 + 0.5 * share),
        }
    }
}

/// Inverse of the normal distribution function (P. J. Acklam 2003, relative error 1.2e-9).
fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e1,
        2.209460984245205e2,
        -2.759285104469687e2,
        1.38357751867269e2,
        -3.066479806614716e1,
        2.506628277459239,
    ];
    const B: [f64; 6] = [
        -5.447609879822406e1,
        1.615858368580409e2,
        -1.556989798598866e2,
        6.680131188771972e1,
        -1.328068155288572e1,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-3,
        -3.223964580411365e-1,
        -2.400758277161838,
        -2.549732539343734,
        4.374664141464968,
        2.938163982698783,
    ];
    const D: [f64; 5] =
        [7.784695709041462e-3, 3.224671290700398e-1, 2.445134137142996, 3.754408661907416, 1.0];
    let polynomial = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    if p > 0.5 {
        return -normal_quantile(1.0 - p);
    }
    if p < 0.02425 {
        let q = (-2.0 * p.ln()).sqrt();
        return polynomial(&C, q) / polynomial(&D, q);
    }
    let q = p - 0.5;
    let r = q * q;
    polynomial(&A, r) * q / polynomial(&B, r)
}

/// What the bytes of a tensor are made of.
#[derive(Clone, Debug)]
pub(crate) enum Fill {
    /// 16-bit values, drawn from a table.
    Table16(Arc<[u16; TABLE]>),
    /// 32-bit values, drawn from a table.
    Table32(Arc<[u32; TABLE]>),
    /// Nibbles 1 to 15 about 8, as signed 4-bit integers with an offset are stored. The mean is exactly
    /// 0: that of -8 to 7 is not, and would grow from layer to layer. So 8 is twice as likely.
    Int4,
    /// Any nibbles.
    Mxfp4,
    /// Finite e4m3 codes.
    Fp8,
    /// Exponents `base` and `base + 1`, the second for this share of 256.
    Exponents { base: u8, above: u16 },
    /// These bytes.
    Bytes(Vec<u8>),
}

impl Fill {
    /// Values of a plain type; `None` if it is none.
    pub fn plain(dtype: Dtype, spread: Spread) -> Option<Self> {
        let table16 = |bits: &dyn Fn(f64) -> u16| {
            let table: Vec<u16> = (0..TABLE).map(|i| bits(spread.quantile(i))).collect();
            Self::Table16(Arc::new(table.try_into().expect("4096 entries")))
        };
        Some(match dtype {
            Dtype::BF16 => table16(&|value| bf16::from_f64(value).to_bits()),
            Dtype::F16 => table16(&|value| f16::from_f64(value).to_bits()),
            Dtype::F32 => {
                let table: Vec<u32> = (0..TABLE).map(|i| (spread.quantile(i) as f32).to_bits()).collect();
                Self::Table32(Arc::new(table.try_into().expect("4096 entries")))
            }
            _ => return None,
        })
    }

    /// MXFP4 scales that give the weights this deviation.
    pub fn exponents(deviation: f64) -> Self {
        let scale = deviation / MXFP4_RMS;
        let base = scale.log2().floor();
        // The mean square of a mix of one power of two and the next, set to the wanted one.
        let above = ((scale / base.exp2()).powi(2) - 1.0) / 3.0;
        Self::Exponents {
            base: (base + 127.0).clamp(0.0, 253.0) as u8,
            above: (above * 256.0).round() as u16,
        }
    }

    /// Writes the bytes from `offset` on.
    pub fn write(&self, stream: Stream, offset: u64, out: &mut [u8]) {
        match self {
            Self::Table16(table) => words(stream, offset, out, |word| {
                let lane = |k: u32| u64::from(table[(word >> (16 * k)) as usize & (TABLE - 1)]) << (16 * k);
                lane(0) | lane(1) | lane(2) | lane(3)
            }),
            Self::Table32(table) => words(stream, offset, out, |word| {
                let lane = |k: u32| u64::from(table[(word >> (32 * k)) as usize & (TABLE - 1)]) << (32 * k);
                lane(0) | lane(1)
            }),
            Self::Int4 => words(stream, offset, out, |word| {
                let pairs = word | word >> 1;
                let any = pairs | pairs >> 2;
                word | (!any & 0x1111_1111_1111_1111) << 3
            }),
            Self::Mxfp4 => words(stream, offset, out, |word| word),
            Self::Fp8 => words(stream, offset, out, |word| {
                // The top bit of a byte tells whether its low seven are all ones, which is NaN.
                let nan = (word & 0x7F7F_7F7F_7F7F_7F7F).wrapping_add(0x0101_0101_0101_0101)
                    & 0x8080_8080_8080_8080;
                word ^ nan >> 7
            }),
            &Self::Exponents { base, above } => words(stream, offset, out, |word| {
                let exponent = |byte: u8| base + u8::from(u16::from(byte) < above);
                u64::from_le_bytes(word.to_le_bytes().map(exponent))
            }),
            Self::Bytes(bytes) => {
                let start = offset as usize;
                out.copy_from_slice(&bytes[start..start + out.len()]);
            }
        }
    }
}

/// Writes bytes `offset ..` of a tensor whose words `make` turns into eight bytes each.
fn words(stream: Stream, offset: u64, out: &mut [u8], make: impl Fn(u64) -> u64) {
    let mut index = offset / 8;
    let word = |index: u64| make(stream.word(index)).to_le_bytes();
    let inside = (offset % 8) as usize;
    let (first, rest) = out.split_at_mut(if inside == 0 { 0 } else { (8 - inside).min(out.len()) });
    if !first.is_empty() {
        first.copy_from_slice(&word(index)[inside..inside + first.len()]);
        index += 1;
    }
    let (whole, last) = rest.as_chunks_mut::<8>();
    for bytes in whole {
        *bytes = word(index);
        index += 1;
    }
    last.copy_from_slice(&word(index)[..last.len()]);
}

/// Root mean square of the codes of [`Fill::Fp8`].
pub(crate) fn fp8_rms() -> f64 {
    let square = |code: u32| {
        let (exponent, mantissa) = ((code >> 3) as i32, f64::from(code & 7));
        let value =
            if exponent == 0 { mantissa / 512.0 } else { (8.0 + mantissa) * f64::from(exponent - 10).exp2() };
        value * value
    };
    let sum: f64 = (0..128).map(|code| square(code.min(0x7E))).sum();
    (sum / 128.0).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(fill: &Fill, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        fill.write(Stream::new(1, "a.weight"), 0, &mut out);
        out
    }

    fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        (mean, (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt())
    }

    #[test]
    fn bytes_do_not_depend_on_how_a_tensor_is_cut() {
        let spread = Spread::Normal { mean: 0.0, deviation: 1.0 };
        let fills = [Fill::plain(Dtype::BF16, spread).unwrap(), Fill::Int4, Fill::Fp8, Fill::exponents(0.01)];
        for fill in fills {
            let whole = bytes(&fill, 1000);
            let mut parts = vec![0; 1000];
            for (start, end) in [(0, 1), (1, 6), (6, 8), (8, 9), (9, 500), (500, 503), (503, 1000)] {
                fill.write(Stream::new(1, "a.weight"), start as u64, &mut parts[start..end]);
            }
            assert_eq!(whole, parts);
        }
    }

    #[test]
    fn values_have_the_deviation_asked_for() {
        let normal = Fill::plain(Dtype::BF16, Spread::Normal { mean: 1.0, deviation: 0.5 }).unwrap();
        let values: Vec<f64> = bytes(&normal, 1 << 18)
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| f64::from(bf16::from_le_bytes(*b).to_f32()))
            .collect();
        let (mean, deviation) = mean_and_deviation(&values);
        assert!((mean - 1.0).abs() < 0.01 && (deviation - 0.5).abs() < 0.01, "{mean} {deviation}");

        let nibbles = bytes(&Fill::Int4, 1 << 17);
        let values: Vec<f64> =
            nibbles.iter().flat_map(|b| [b & 15, b >> 4]).map(|q| f64::from(q) - 8.0).collect();
        let (mean, deviation) = mean_and_deviation(&values);
        assert!(mean.abs() < 0.05 && (deviation - INT4_RMS).abs() < 0.05, "{mean} {deviation}");
        assert!(values.iter().all(|v| (-7.0..=7.0).contains(v)));

        let codes = bytes(&Fill::Fp8, 1 << 17);
        assert!(codes.iter().all(|code| code & 0x7F != 0x7F));
        assert!(codes.contains(&0x7E) && codes.contains(&0xFE) && codes.contains(&0));
    }

    #[test]
    fn exponents_give_the_mean_square_asked_for() {
        for deviation in [0.0186, 0.011, 0.0078] {
            let square = |s: &u8| (f64::from(*s) - 127.0).exp2().powi(2);
            let scales = bytes(&Fill::exponents(deviation), 1 << 16);
            let rms = (scales.iter().map(square).sum::<f64>() / scales.len() as f64).sqrt() * MXFP4_RMS;
            assert!((rms / deviation - 1.0).abs() < 0.02, "{rms} {deviation}");
        }
    }

    #[test]
    fn streams_differ_by_seed_and_name() {
        let word = |seed, name| Stream::new(seed, name).word(0);
        assert_eq!(word(1, "a"), word(1, "a"));
        assert!(word(1, "a") != word(2, "a") && word(1, "a") != word(1, "b"));
    }
}
