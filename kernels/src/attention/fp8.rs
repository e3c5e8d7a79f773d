//! Rows of 8-bit codes with scales: how they are laid out, and how a row becomes one.

use super::cache::RowShape;
use half::bf16;

/// Codes per scale, at most: a head's last tile may be shorter, and no two heads share one.
pub const TILE: usize = 128;

/// The greatest e4m3fn value.
const GREATEST: f32 = 448.0;

/// The bits of infinity; those of NaN are greater.
const INFINITE: u32 = 0x7f80_0000;

/// A row's codes, scales and plain values, as bytes.
#[inline(always)]
pub(super) fn parts(shape: RowShape, row: &[u8]) -> (&[u8], &[u8], &[u8]) {
    let (codes, rest) = row.split_at(shape.codes());
    let (scales, plain) = rest.split_at(4 * shape.heads * shape.tiles());
    (codes, scales, plain)
}

/// Stores a row as [`RowShape`] says.
pub(super) fn write_row(shape: RowShape, x: &[f32], out: &mut [u8]) {
    let (codes, rest) = out.split_at_mut(shape.codes());
    let (scales, plain) = rest.split_at_mut(4 * shape.heads * shape.tiles());
    let mut scales = scales.as_chunks_mut().0.iter_mut();
    if shape.width > 0 {
        for (x, codes) in x.chunks(shape.width).zip(codes.chunks_mut(shape.width)) {
            for (x, codes) in x.chunks(TILE).zip(codes.chunks_mut(TILE)) {
                *scales.next().expect("one scale per tile") = write_tile(x, codes).to_le_bytes();
            }
        }
    }
    for (x, out) in x[shape.codes()..].iter().zip(plain.as_chunks_mut().0) {
        *out = bf16::from_f32(*x).to_le_bytes();
    }
}

/// Writes the codes of a tile, and gives back its scale.
fn write_tile(x: &[f32], codes: &mut [u8]) -> f32 {
    // Bits of magnitudes are ordered as they are, with infinity and NaN after all others.
    let mut greatest = 0;
    for x in x {
        let bits = x.to_bits() & 0x7fff_ffff;
        greatest = greatest.max(if bits < INFINITE { bits } else { 0 });
    }
    let greatest = f32::from_bits(greatest);
    let scale = (greatest / GREATEST).max(f32::MIN_POSITIVE);
    for (x, code) in x.iter().zip(codes) {
        *code = encode(x / scale);
    }
    scale
}

/// The e4m3fn code nearest to x, ties to even; of NaN, 0, and of what is beyond 448, 448.
#[inline(always)]
fn encode(x: f32) -> u8 {
    // Both kinds of code are computed and one is taken: without branches a row takes less than half the time.
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let bits = x.to_bits() & 0x7fff_ffff;
    let bits = if bits > INFINITE { 0 } else { bits.min(GREATEST.to_bits()) };
    // Subnormal codes count 2^-9. Adding 2^14 leaves the nearest multiple of that in the low bits.
    let small = (f32::from_bits(bits) + 16384.0).to_bits().wrapping_sub(16384f32.to_bits());
    // Three bits of mantissa are left of 23, rounded to even; the carry may go into the exponent, whose bias
    // is 7 instead of 127.
    let large = ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20).wrapping_sub(120 << 3);
    let code = if bits < (1f32 / 64.0).to_bits() { small } else { large };
    sign | code as u8
}

#[cfg(test)]
mod tests {
    use super::encode;
    use crate::reference::e4m3;

    #[test]
    fn codes_are_the_nearest() {
        let values: Vec<f32> = (0..0x7f).map(e4m3).collect();
        for (code, pair) in values.windows(2).enumerate() {
            let (low, high) = (code as u8, code as u8 + 1);
            let middle = (pair[0] + pair[1]) / 2.0;
            let even = if low % 2 == 0 { low } else { high };
            let cases = [
                (pair[0], low),
                (middle.next_down(), low),
                (middle, even),
                (middle.next_up(), high),
                (pair[1], high),
            ];
            for (x, want) in cases {
                assert_eq!((encode(x), encode(-x)), (want, want | 0x80), "{x}");
            }
        }
        assert_eq!(encode(f32::NAN) & 0x7f, 0);
        assert_eq!((encode(f32::INFINITY), encode(f32::NEG_INFINITY)), (0x7e, 0xfe));
        assert_eq!((encode(448.0001), encode(-f32::MAX)), (0x7e, 0xfe));
        assert_eq!((encode(0.0), encode(-0.0), encode(f32::MIN_POSITIVE)), (0, 0x80, 0));
    }
}
