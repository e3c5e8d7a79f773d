//! The lanes as arrays.

use super::{DotWork, Dots, InnerWork, LINE, ROWS};
use crate::simd::portable::Portable;

type I = [u32; ROWS];
type F = [f32; ROWS];

fn map(a: I, f: impl Fn(u32) -> u32) -> I {
    a.map(f)
}

fn zip(a: I, b: I, f: impl Fn(u32, u32) -> u32) -> I {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// Both words, as they are.
fn words(a: u32) -> [i32; 2] {
    [i32::from(a as i16), i32::from((a >> 16) as i16)]
}

impl Dots for Portable {
    type I = I;
    type F = F;
    const TOKENS: usize = 4;

    #[inline(always)]
    fn enter<W: DotWork>(self, work: W) -> W::Output {
        work.run(self)
    }

    #[inline(never)]
    fn call<W: InnerWork<Self>>(self, work: W) {
        work.run(self)
    }

    #[inline(always)]
    fn transpose(self, rows: &[u8], stride: usize, at: usize) -> [I; 16] {
        let mut out = [[0; ROWS]; 16];
        for r in 0..ROWS {
            let line: &[u8; LINE] = rows[r * stride + at..].first_chunk().expect("a line of every row");
            for (out, dword) in out.iter_mut().zip(line.as_chunks::<4>().0) {
                out[r] = u32::from_le_bytes(*dword);
            }
        }
        out
    }
    #[inline(always)]
    fn load_f32(self, bits: &[u32; ROWS]) -> F {
        bits.map(f32::from_bits)
    }
    #[inline(always)]
    fn transpose_f32(self, rows: &[[f32; ROWS]; ROWS]) -> [F; 16] {
        std::array::from_fn(|i| std::array::from_fn(|r| rows[r][i]))
    }
    #[inline(always)]
    fn widen_bf16(self, x: &[u8; LINE], out: &mut [f32; 32]) {
        for (out, x) in out.iter_mut().zip(x.as_chunks().0) {
            *out = f32::from_bits(u32::from(u16::from_le_bytes(*x)) << 16);
        }
    }
    #[inline(always)]
    fn widen_e4m3(self, x: &[u8; 32], out: &mut [f32; 32]) {
        crate::simd::widen_e4m3(self, x, out);
    }
    #[inline(always)]
    fn prefetch(self, _: &[u8], _: usize) {}
    #[inline(always)]
    fn prefetch_second(self, _: &[u8], _: usize) {}

    #[inline(always)]
    fn splat(self, x: u32) -> I {
        [x; ROWS]
    }
    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn xor(self, a: I, b: I) -> I {
        zip(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    fn add_i32(self, a: I, b: I) -> I {
        zip(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: I) -> I {
        map(a, |a| a << N)
    }
    #[inline(always)]
    fn shr_words<const N: u32>(self, a: I) -> I {
        map(a, |a| (a >> N) & ((0xFFFF_u32 >> N) * 0x1_0001))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: I) -> I {
        map(a, |a| a >> N)
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], a: I) -> I {
        map(a, |a| u32::from_le_bytes(a.to_le_bytes().map(|b| table[usize::from(b & 15)])))
    }
    #[inline(always)]
    fn dot_words(self, sum: I, w: I, x: I) -> I {
        std::array::from_fn(|i| {
            let ([a, b], [c, d]) = (words(w[i]), words(x[i]));
            sum[i].wrapping_add((a * c).wrapping_add(b * d) as u32)
        })
    }
    #[inline(always)]
    fn dot_bytes<const WIDE: bool>(self, sum: I, w: I, x: I) -> I {
        std::array::from_fn(|i| {
            let products = w[i].to_le_bytes().into_iter().zip(x[i].to_le_bytes());
            let dot: i32 = products.map(|(w, x)| i32::from(w) * i32::from(x as i8)).sum();
            sum[i].wrapping_add(dot as u32)
        })
    }

    #[inline(always)]
    fn zero(self) -> F {
        [0.0; ROWS]
    }
    #[inline(always)]
    fn splat_f32(self, x: f32) -> F {
        [x; ROWS]
    }
    #[inline(always)]
    fn as_f32(self, a: I) -> F {
        a.map(f32::from_bits)
    }
    #[inline(always)]
    fn bits(self, a: F) -> I {
        a.map(f32::to_bits)
    }
    #[inline(always)]
    fn to_f32(self, a: I) -> F {
        a.map(|a| a as i32 as f32)
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn store(self, a: F) -> [f32; ROWS] {
        a
    }
    #[inline(always)]
    fn e8m0(self, code: I) -> F {
        code.map(|code| match code {
            0 => f32::from_bits(1 << 22),
            255 => f32::NAN,
            _ => f32::from_bits(code << 23),
        })
    }
}
