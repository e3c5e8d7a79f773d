//! e4m3 codes as bf16, in which each of them is exact, by looking up their bytes.

use super::Dots;

/// The upper and the lower byte of the bf16 of a code without its sign.
const fn bytes(code: u8) -> [u8; 2] {
    let (exponent, mantissa) = (code >> 3, code & 7);
    let bits = match (exponent, mantissa) {
        (0, 0) => 0,
        // 2^-9 * mantissa: its first bit goes.
        (0, _) => {
            let first = 7 - mantissa.leading_zeros() as u16;
            (118 + first) << 7 | (mantissa as u16) << (7 - first) & 0x7F
        }
        (15, 7) => 0x7FC0,
        _ => (120 + exponent as u16) << 7 | (mantissa as u16) << 4,
    };
    [(bits >> 8) as u8, bits as u8]
}

/// Tables by nibble. The upper byte follows from the upper nibble of a code, the lower one from the lower nibble; what is
/// otherwise for the smallest upper nibble and for NaN is put right by the other nibble, where a mask lets it.
struct Nibbles {
    upper: [u8; 16],
    smallest: [u8; 16],
    greatest: [u8; 16],
    upper_smallest: [u8; 16],
    upper_greatest: [u8; 16],
    lower_smallest: [u8; 16],
}

const NIBBLES: Nibbles = {
    let mut out = Nibbles {
        upper: [0; 16],
        smallest: [0; 16],
        greatest: [0; 16],
        upper_smallest: [0; 16],
        upper_greatest: [0; 16],
        lower_smallest: [0; 16],
    };
    let mut i = 0;
    while i < 16 {
        let nibble = i as u8;
        // Of the code with the lower nibble 8: a normal one that is not NaN.
        out.upper[i] = bytes((nibble & 7) << 4 | 8)[0] | (nibble & 8) << 4;
        out.smallest[i] = if nibble & 7 == 0 { 0xFF } else { 0 };
        out.greatest[i] = if nibble & 7 == 7 { 0xFF } else { 0 };
        out.upper_smallest[i] = bytes(nibble)[0] ^ bytes(8)[0];
        out.upper_greatest[i] = bytes(0x70 | nibble)[0] ^ bytes(0x78)[0];
        out.lower_smallest[i] = bytes(nibble)[1] ^ nibble << 4;
        i += 1;
    }
    out
};

/// The four codes of every dword: the first and third as the words of a dword, and the second and fourth.
#[inline(always)]
pub(crate) fn as_bf16<D: Dots>(d: D, codes: D::I) -> (D::I, D::I) {
    let mask = d.splat(0x0F0F_0F0F);
    let (low, high) = (d.and(codes, mask), d.and(d.shr_words::<4>(codes), mask));
    let smallest = d.look_up(&NIBBLES.smallest, high);
    let greatest = d.look_up(&NIBBLES.greatest, high);
    let upper =
        d.xor(d.look_up(&NIBBLES.upper, high), d.and(smallest, d.look_up(&NIBBLES.upper_smallest, low)));
    let upper = d.xor(upper, d.and(greatest, d.look_up(&NIBBLES.upper_greatest, low)));
    let lower = d.xor(d.shl::<4>(low), d.and(smallest, d.look_up(&NIBBLES.lower_smallest, low)));
    words(d, upper, lower)
}

/// The words of upper and lower bytes: those of even bytes, those of odd ones.
#[inline(always)]
fn words<D: Dots>(d: D, upper: D::I, lower: D::I) -> (D::I, D::I) {
    let (even, odd) = (d.splat(0x00FF_00FF), d.splat(0xFF00_FF00));
    let first = d.xor(d.and(lower, even), d.and(d.shl::<8>(upper), odd));
    let second = d.xor(d.and(d.shr::<8>(lower), even), d.and(upper, odd));
    (first, second)
}
