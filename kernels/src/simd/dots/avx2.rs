//! The lanes as two registers of eight.

use super::{DotWork, Dots, InnerWork, LINE, ROWS};
use crate::simd::avx2::Avx2;
use std::arch::x86_64::*;

/// Lanes 0..8 and 8..16.
type I = [__m256i; 2];
type F = [__m256; 2];

macro_rules! both {
    ($f:ident, $($v:expr),+) => {
        // SAFETY: the token proves AVX2 and FMA; the operation touches registers only.
        unsafe { [$f($($v[0]),+), $f($($v[1]),+)] }
    };
}

/// Dwords of the 32 bytes at each of 8 rows, `stride` bytes apart.
///
/// # Safety
/// The processor has AVX2; 32 bytes can be read at `start` and at the seven rows after it.
#[inline(always)]
unsafe fn transpose8(start: *const u8, stride: usize) -> [__m256i; 8] {
    // SAFETY: the caller says so.
    unsafe {
        let mut a = [_mm256_setzero_si256(); 8];
        for (r, a) in a.iter_mut().enumerate() {
            *a = _mm256_loadu_si256(start.add(r * stride).cast());
        }
        let mut b = a;
        for i in 0..4 {
            b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
        }
        for i in 0..2 {
            a[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
            a[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
            a[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
            a[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
        }
        for i in 0..4 {
            b[i] = _mm256_permute2x128_si256::<0x20>(a[i], a[4 + i]);
            b[4 + i] = _mm256_permute2x128_si256::<0x31>(a[i], a[4 + i]);
        }
        b
    }
}

impl Dots for Avx2 {
    type I = I;
    type F = F;
    const TOKENS: usize = 2;

    #[inline]
    fn enter<W: DotWork>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inner<W: DotWork>(token: Avx2, work: W) -> W::Output {
            work.run(token)
        }
        // SAFETY: the token proves the features that `inner` enables.
        unsafe { inner(self, work) }
    }

    #[inline]
    fn call<W: InnerWork<Self>>(self, work: W) {
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline(never)]
        fn inner<W: InnerWork<Avx2>>(token: Avx2, work: W) {
            work.run(token)
        }
        // SAFETY: the token proves the features that `inner` enables.
        unsafe { inner(self, work) }
    }

    #[inline(always)]
    fn transpose(self, rows: &[u8], stride: usize, at: usize) -> [I; 16] {
        assert!(rows.len() >= (ROWS - 1) * stride + at + LINE, "a line of every row");
        let mut out = [self.splat(0); 16];
        for half in 0..2 {
            // SAFETY: the token proves AVX2; the assertion says that 64 bytes follow `r * stride + at`.
            let (a, b) = unsafe {
                let start = rows.as_ptr().add(at + 32 * half);
                (transpose8(start, stride), transpose8(start.add(8 * stride), stride))
            };
            for i in 0..8 {
                out[8 * half + i] = [a[i], b[i]];
            }
        }
        out
    }
    #[inline(always)]
    fn load_f32(self, bits: &[u32; ROWS]) -> F {
        // SAFETY: the token proves AVX2; 64 bytes are read from a reference to 64.
        unsafe { [_mm256_loadu_ps(bits.as_ptr().cast()), _mm256_loadu_ps(bits.as_ptr().add(8).cast())] }
    }
    #[inline(always)]
    fn transpose_f32(self, rows: &[[f32; ROWS]; ROWS]) -> [F; 16] {
        let mut out = [self.zero(); 16];
        for half in 0..2 {
            // SAFETY: the token proves AVX2; 32 bytes are read from each of 8 rows of 64, twice.
            let (a, b) = unsafe {
                let start = rows.as_ptr().cast::<u8>().add(32 * half);
                (transpose8(start, LINE), transpose8(start.add(8 * LINE), LINE))
            };
            for i in 0..8 {
                out[8 * half + i] = self.as_f32([a[i], b[i]]);
            }
        }
        out
    }
    #[inline(always)]
    fn widen_bf16(self, x: &[u8; LINE], out: &mut [f32; 32]) {
        for i in 0..4 {
            // SAFETY: the token proves AVX2; 16 bytes of 64 are read, 32 of 128 written, four times.
            unsafe {
                let words = _mm_loadu_si128(x.as_ptr().add(16 * i).cast());
                let wide = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words));
                _mm256_storeu_si256(out.as_mut_ptr().add(8 * i).cast(), wide);
            }
        }
    }
    #[inline(always)]
    fn widen_e4m3(self, x: &[u8; 32], out: &mut [f32; 32]) {
        crate::simd::widen_e4m3(self, x, out);
    }
    #[inline(always)]
    fn prefetch(self, bytes: &[u8], at: usize) {
        // SAFETY: prefetching reads nothing that a program can see and faults nowhere, so any address will do; a
        // check of the bound would cost more than the prefetch.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at).cast()) }
    }
    #[inline(always)]
    fn prefetch_second(self, bytes: &[u8], at: usize) {
        // SAFETY: as [`Dots::prefetch`].
        unsafe { _mm_prefetch::<_MM_HINT_T1>(bytes.as_ptr().wrapping_add(at).cast()) }
    }

    #[inline(always)]
    fn splat(self, x: u32) -> I {
        // SAFETY: the token proves AVX2.
        unsafe { [_mm256_set1_epi32(x as i32); 2] }
    }
    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        both!(_mm256_and_si256, a, b)
    }
    #[inline(always)]
    fn xor(self, a: I, b: I) -> I {
        both!(_mm256_xor_si256, a, b)
    }
    #[inline(always)]
    fn add_i32(self, a: I, b: I) -> I {
        both!(_mm256_add_epi32, a, b)
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: I) -> I {
        // SAFETY: the token proves AVX2.
        unsafe {
            let n = _mm_cvtsi32_si128(N as i32);
            [_mm256_sll_epi32(a[0], n), _mm256_sll_epi32(a[1], n)]
        }
    }
    #[inline(always)]
    fn shr_words<const N: u32>(self, a: I) -> I {
        // SAFETY: the token proves AVX2.
        unsafe {
            let n = _mm_cvtsi32_si128(N as i32);
            [_mm256_srl_epi16(a[0], n), _mm256_srl_epi16(a[1], n)]
        }
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: I) -> I {
        // SAFETY: the token proves AVX2.
        unsafe {
            let n = _mm_cvtsi32_si128(N as i32);
            [_mm256_srl_epi32(a[0], n), _mm256_srl_epi32(a[1], n)]
        }
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], a: I) -> I {
        // SAFETY: the token proves AVX2; 16 bytes are read from a reference to 16.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            [_mm256_shuffle_epi8(table, a[0]), _mm256_shuffle_epi8(table, a[1])]
        }
    }
    #[inline(always)]
    fn dot_words(self, sum: I, w: I, x: I) -> I {
        let products = both!(_mm256_madd_epi16, w, x);
        both!(_mm256_add_epi32, sum, products)
    }
    #[inline(always)]
    fn dot_bytes<const WIDE: bool>(self, sum: I, w: I, x: I) -> I {
        if WIDE {
            // Two products of bytes may exceed an i16, and the instruction saturates: even and odd bytes apart.
            let even = self.and(w, self.splat(0x00FF_00FF));
            let odd = self.shr_words::<8>(w);
            // SAFETY: the token proves AVX2.
            let (x_even, x_odd) = unsafe {
                let high = [_mm256_slli_epi16::<8>(x[0]), _mm256_slli_epi16::<8>(x[1])];
                (
                    [_mm256_srai_epi16::<8>(high[0]), _mm256_srai_epi16::<8>(high[1])],
                    [_mm256_srai_epi16::<8>(x[0]), _mm256_srai_epi16::<8>(x[1])],
                )
            };
            return self.dot_words(self.dot_words(sum, even, x_even), odd, x_odd);
        }
        // SAFETY: the token proves AVX2.
        let ones = unsafe { [_mm256_set1_epi16(1); 2] };
        let pairs = both!(_mm256_maddubs_epi16, w, x);
        let products = both!(_mm256_madd_epi16, pairs, ones);
        both!(_mm256_add_epi32, sum, products)
    }

    #[inline(always)]
    fn zero(self) -> F {
        self.splat_f32(0.0)
    }
    #[inline(always)]
    fn splat_f32(self, x: f32) -> F {
        // SAFETY: the token proves AVX2.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn as_f32(self, a: I) -> F {
        both!(_mm256_castsi256_ps, a)
    }
    #[inline(always)]
    fn bits(self, a: F) -> I {
        both!(_mm256_castps_si256, a)
    }
    #[inline(always)]
    fn to_f32(self, a: I) -> F {
        both!(_mm256_cvtepi32_ps, a)
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        both!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn store(self, a: F) -> [f32; ROWS] {
        let mut out = [0.0; ROWS];
        // SAFETY: the token proves AVX2; 16 values are written to an array of 16.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), a[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), a[1]);
        }
        out
    }
    #[inline(always)]
    fn e8m0(self, code: I) -> F {
        [e8m0(self, code[0]), e8m0(self, code[1])]
    }
}

#[inline(always)]
fn e8m0(_: Avx2, code: __m256i) -> __m256 {
    // SAFETY: the token proves AVX2.
    unsafe {
        let value = _mm256_slli_epi32::<23>(code);
        let zero = _mm256_cmpeq_epi32(code, _mm256_setzero_si256());
        let value = _mm256_blendv_epi8(value, _mm256_set1_epi32(1 << 22), zero);
        let nan = _mm256_cmpeq_epi32(code, _mm256_set1_epi32(255));
        _mm256_castsi256_ps(_mm256_blendv_epi8(value, _mm256_set1_epi32(0x7FC0_0000), nan))
    }
}
