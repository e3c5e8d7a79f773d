//! The lanes in plain Rust: what the other instruction sets must agree with, bit for bit.

use super::{LANES, Lanes, Work};
use half::{bf16, f16};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// e2m1 values of the sixteen codes.
pub(crate) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The value of an e4m3fn code: bias 7, subnormals of 2^-9, no infinity, `0x7f` and `0xff` NaN.
pub(crate) fn e4m3(code: u8) -> f32 {
    let magnitude = code & 0x7f;
    let value = match magnitude {
        0x7f => f32::NAN,
        0..8 => f32::from(magnitude) * (1.0 / 512.0),
        _ => f32::from_bits((u32::from(magnitude) << 20) + (120 << 23)),
    };
    if code & 0x80 == 0 { value } else { -value }
}

type V = [f32; LANES];

// Unrolled into every kernel, 32 lanes would make a hundred times the code for nothing: a call each.
macro_rules! outlined {
    ($($name:ident($($v:ident: $type:ty),+) = |$i:ident| $body:expr;)+) => {
        $(#[inline(never)]
        fn $name($($v: &$type),+) -> V {
            std::array::from_fn(|$i| $body)
        })+
    };
}

outlined! {
    add(a: V, b: V) = |i| a[i] + b[i];
    sub(a: V, b: V) = |i| a[i] - b[i];
    mul(a: V, b: V) = |i| a[i] * b[i];
    div(a: V, b: V) = |i| a[i] / b[i];
    fma(a: V, b: V, c: V) = |i| a[i].mul_add(b[i], c[i]);
    max(a: V, b: V) = |i| if a[i] > b[i] { a[i] } else { b[i] };
    min(a: V, b: V) = |i| if a[i] < b[i] { a[i] } else { b[i] };
    pow2(n: V) = |i| f32::from_bits(((n[i] as i32).wrapping_add(127) as u32) << 23);
    from_f32(x: [u8; 128]) = |i| f32::from_le_bytes([x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]]);
    from_f16(x: [u8; 64]) = |i| f16::from_le_bytes([x[2 * i], x[2 * i + 1]]).to_f32();
    from_bf16(x: [u8; 64]) = |i| bf16::from_le_bytes([x[2 * i], x[2 * i + 1]]).to_f32();
    from_bf16_words(x: [u16; 32]) = |i| bf16::from_bits(x[i]).to_f32();
    from_e4m3(x: [u8; 32]) = |i| e4m3(x[i]);
    from_int4(x: [u8; 16]) = |i| f32::from(nibble(x, i)) - 8.0;
    from_e2m1(x: [u8; 16]) = |i| E2M1[usize::from(nibble(x, i))];
}

#[inline]
fn fold(mut v: V, f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [16, 8, 4, 2, 1] {
        for j in 0..half {
            v[j] = f(v[j], v[j + half]);
        }
    }
    v[0]
}

#[inline]
fn nibble(x: &[u8; 16], i: usize) -> u8 {
    if i.is_multiple_of(2) { x[i / 2] & 15 } else { x[i / 2] >> 4 }
}

impl Lanes for Portable {
    type V = V;
    type Part = V;
    const PARTS: usize = 1;
    const WHOLE_ROWS: usize = 1;

    #[inline(never)]
    fn enter<W: Work>(self, work: W) -> W::Output {
        work.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> V {
        *x
    }
    #[inline(always)]
    fn store(self, v: V, out: &mut [f32; LANES]) {
        *out = v;
    }
    #[inline(always)]
    fn splat_part(self, x: f32) -> V {
        self.splat(x)
    }
    #[inline(always)]
    fn load_part(self, x: &[f32; LANES], _: usize) -> V {
        self.load(x)
    }
    #[inline(always)]
    fn store_part(self, v: V, out: &mut [f32; LANES], _: usize) {
        self.store(v, out);
    }
    #[inline(always)]
    fn fma_part(self, a: V, b: V, c: V) -> V {
        self.fma(a, b, c)
    }
    #[inline(always)]
    fn prefetch(self, _: &[u8], _: usize) {}
    #[inline(always)]
    fn prefetch_line(self, _: *const u8) {}
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        add(&a, &b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        sub(&a, &b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        mul(&a, &b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        div(&a, &b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        fma(&a, &b, &c)
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        max(&a, &b)
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        min(&a, &b)
    }
    #[inline(always)]
    fn pow2(self, n: V) -> V {
        pow2(&n)
    }
    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        fold(v, |a, b| a + b)
    }
    #[inline(always)]
    fn sum4(self, v: [V; 4]) -> [f32; 4] {
        v.map(|v| self.sum(v))
    }
    #[inline(always)]
    fn peak(self, v: V) -> f32 {
        fold(v, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn f32(self, x: &[u8; 128]) -> V {
        from_f32(x)
    }
    #[inline(always)]
    fn f16(self, x: &[u8; 64]) -> V {
        from_f16(x)
    }
    #[inline(always)]
    fn bf16(self, x: &[u8; 64]) -> V {
        from_bf16(x)
    }
    #[inline(always)]
    fn bf16_words(self, x: &[u16; 32]) -> V {
        from_bf16_words(x)
    }
    #[inline(always)]
    fn e4m3(self, x: &[u8; 32]) -> V {
        from_e4m3(x)
    }
    #[inline(always)]
    fn e4m3_times(self, x: &[u8; 32], scale: f32) -> V {
        mul(&from_e4m3(x), &self.splat(scale))
    }
    #[inline(always)]
    fn int4(self, x: &[u8; 16]) -> V {
        from_int4(x)
    }
    #[inline(always)]
    fn e2m1(self, x: &[u8; 16]) -> V {
        from_e2m1(x)
    }
}
