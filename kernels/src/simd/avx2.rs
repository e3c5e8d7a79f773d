//! The lanes as four registers of eight.

use super::{LANES, Lanes, Work};
use std::arch::x86_64::*;

/// Proof that the processor has AVX2, FMA and F16C. Only [`Avx2::new`] makes one, which is what every
/// `unsafe` block here relies on.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn new() -> Option<Self> {
        let all = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }
}

/// Lanes 0..8, 8..16, 16..24 and 24..32.
type V = [__m256; 4];

/// One operation on all four registers.
macro_rules! all {
    ($f:ident, $($v:ident),+) => {
        // SAFETY: the token proves AVX2 and FMA; the operation touches registers only.
        unsafe { [$f($($v[0]),+), $f($($v[1]),+), $f($($v[2]),+), $f($($v[3]),+)] }
    };
}

/// The nibbles of 16 bytes as 32 bytes, in column order.
#[inline(always)]
fn nibbles(_: Avx2, x: &[u8; 16]) -> [__m128i; 2] {
    // SAFETY: the token proves AVX2; 16 bytes are read from a reference to 16 bytes.
    unsafe {
        let x = _mm_loadu_si128(x.as_ptr().cast());
        let mask = _mm_set1_epi8(15);
        let low = _mm_and_si128(x, mask);
        let high = _mm_and_si128(_mm_srli_epi16::<4>(x), mask);
        [_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)]
    }
}

/// Eight bf16 words as f32.
#[inline(always)]
fn widen(_: Avx2, words: __m128i) -> __m256 {
    // SAFETY: the token proves AVX2.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words))) }
}

/// The upper and the lower byte of the e2m1 values as bf16, by code.
const E2M1_HIGH: [u8; 16] =
    [0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0];
const E2M1_LOW: [u8; 16] = [0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0, 0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0];

impl Lanes for Avx2 {
    type V = V;
    type Part = __m256;
    const PARTS: usize = 4;
    const WHOLE_ROWS: usize = 1;

    #[inline]
    fn enter<W: Work>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inner<W: Work>(token: Avx2, work: W) -> W::Output {
            work.run(token)
        }
        // SAFETY: the token proves the features that `inner` enables.
        unsafe { inner(self, work) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        // SAFETY: the token proves AVX2.
        unsafe { [_mm256_set1_ps(x); 4] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> V {
        let p = x.as_ptr();
        // SAFETY: the token proves AVX2; 32 values are read from a reference to 32.
        unsafe {
            [
                _mm256_loadu_ps(p),
                _mm256_loadu_ps(p.add(8)),
                _mm256_loadu_ps(p.add(16)),
                _mm256_loadu_ps(p.add(24)),
            ]
        }
    }
    #[inline(always)]
    fn store(self, v: V, out: &mut [f32; LANES]) {
        let p = out.as_mut_ptr();
        // SAFETY: the token proves AVX2; 32 values are written to a reference to 32.
        unsafe {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
            _mm256_storeu_ps(p.add(16), v[2]);
            _mm256_storeu_ps(p.add(24), v[3]);
        }
    }
    #[inline(always)]
    fn splat_part(self, x: f32) -> __m256 {
        // SAFETY: the token proves AVX2.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn load_part(self, x: &[f32; LANES], part: usize) -> __m256 {
        let eight = &x.as_chunks::<8>().0[part];
        // SAFETY: the token proves AVX2; 8 values are read from a reference to 8.
        unsafe { _mm256_loadu_ps(eight.as_ptr()) }
    }
    #[inline(always)]
    fn store_part(self, v: __m256, out: &mut [f32; LANES], part: usize) {
        let eight = &mut out.as_chunks_mut::<8>().0[part];
        // SAFETY: the token proves AVX2; 8 values are written to a reference to 8.
        unsafe { _mm256_storeu_ps(eight.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn fma_part(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the token proves FMA.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn prefetch(self, bytes: &[u8], at: usize) {
        // SAFETY: every processor of this family has the instruction, which faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at.min(bytes.len())).cast()) }
    }
    #[inline(always)]
    fn prefetch_line(self, line: *const u8) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        all!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        all!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        all!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        all!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        all!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        all!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        all!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn pow2(self, mut n: V) -> V {
        // A loop: what a closure calls would not be inlined, because it lacks the features.
        for n in &mut n {
            // SAFETY: the token proves AVX2.
            unsafe {
                let e = _mm256_add_epi32(_mm256_cvtps_epi32(*n), _mm256_set1_epi32(127));
                *n = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(e));
            }
        }
        n
    }
    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        // SAFETY: the token proves AVX2.
        unsafe {
            let v = _mm256_add_ps(_mm256_add_ps(v[0], v[2]), _mm256_add_ps(v[1], v[3]));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }
    #[inline(always)]
    fn sum4(self, v: [V; 4]) -> [f32; 4] {
        // SAFETY: the token proves AVX2; 32 bytes are written to an array of 8 f32.
        unsafe {
            let eight = |v: V| _mm256_add_ps(_mm256_add_ps(v[0], v[2]), _mm256_add_ps(v[1], v[3]));
            let [a, b, c, d] = [eight(v[0]), eight(v[1]), eight(v[2]), eight(v[3])];
            // Lanes j and j + 4: the lower and the upper halves of two registers side by side.
            let ab =
                _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            let cd =
                _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(c, d), _mm256_permute2f128_ps::<0x31>(c, d));
            // j and j + 2: now two lanes each of a, c, b, d.
            let v = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xEE>(ab, cd));
            let v = _mm256_add_ps(v, _mm256_movehdup_ps(v));
            let mut lanes = [0.0; 8];
            _mm256_storeu_ps(lanes.as_mut_ptr(), v);
            [lanes[0], lanes[4], lanes[2], lanes[6]]
        }
    }
    #[inline(always)]
    fn peak(self, v: V) -> f32 {
        // SAFETY: the token proves AVX2.
        unsafe {
            let v = _mm256_max_ps(_mm256_max_ps(v[0], v[2]), _mm256_max_ps(v[1], v[3]));
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
    }
    #[inline(always)]
    fn f32(self, x: &[u8; 128]) -> V {
        let p = x.as_ptr().cast::<f32>();
        // SAFETY: the token proves AVX2; 128 bytes are read, unaligned, from a reference to 128.
        unsafe {
            [
                _mm256_loadu_ps(p),
                _mm256_loadu_ps(p.wrapping_add(8)),
                _mm256_loadu_ps(p.wrapping_add(16)),
                _mm256_loadu_ps(p.wrapping_add(24)),
            ]
        }
    }
    #[inline(always)]
    fn f16(self, x: &[u8; 64]) -> V {
        let p = x.as_ptr().cast::<__m128i>();
        // SAFETY: the token proves F16C; 64 bytes are read, unaligned, from a reference to 64.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(p)),
                _mm256_cvtph_ps(_mm_loadu_si128(p.wrapping_add(1))),
                _mm256_cvtph_ps(_mm_loadu_si128(p.wrapping_add(2))),
                _mm256_cvtph_ps(_mm_loadu_si128(p.wrapping_add(3))),
            ]
        }
    }
    #[inline(always)]
    fn bf16(self, x: &[u8; 64]) -> V {
        let p = x.as_ptr().cast::<__m128i>();
        // SAFETY: the token proves AVX2; 64 bytes are read, unaligned, from a reference to 64.
        unsafe {
            [
                widen(self, _mm_loadu_si128(p)),
                widen(self, _mm_loadu_si128(p.wrapping_add(1))),
                widen(self, _mm_loadu_si128(p.wrapping_add(2))),
                widen(self, _mm_loadu_si128(p.wrapping_add(3))),
            ]
        }
    }
    #[inline(always)]
    fn bf16_words(self, x: &[u16; 32]) -> V {
        // SAFETY: 32 words are 64 bytes; this processor family is little endian.
        self.bf16(unsafe { &*x.as_ptr().cast() })
    }
    #[inline(always)]
    fn e4m3(self, x: &[u8; 32]) -> V {
        // As halves, whose bias is 8 greater; see avx512.rs.
        let p = x.as_ptr().cast::<__m128i>();
        // SAFETY: the token proves AVX2 and F16C; 32 bytes are read from a reference to 32.
        unsafe {
            let mut out = [_mm256_setzero_ps(); 4];
            for part in 0..2 {
                let codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(p.wrapping_add(part)));
                let halves =
                    _mm256_and_si256(_mm256_slli_epi16::<7>(codes), _mm256_set1_epi16(0xBFFF_u16 as i16));
                let magnitude = _mm256_and_si256(halves, _mm256_set1_epi16(0x7FFF));
                let nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3F80));
                let halves = _mm256_or_si256(halves, _mm256_and_si256(nan, _mm256_set1_epi16(0x7E00)));
                let bias = _mm256_set1_ps(256.0);
                out[2 * part] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), bias);
                out[2 * part + 1] =
                    _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)), bias);
            }
            out
        }
    }
    #[inline(always)]
    fn e4m3_times(self, x: &[u8; 32], scale: f32) -> V {
        // As above; 256 is a power of two, so it may be multiplied into the scale first.
        let p = x.as_ptr().cast::<__m128i>();
        // SAFETY: the token proves AVX2 and F16C; 32 bytes are read from a reference to 32.
        unsafe {
            let scale = _mm256_set1_ps(scale * 256.0);
            let mut out = [_mm256_setzero_ps(); 4];
            for part in 0..2 {
                let codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(p.wrapping_add(part)));
                let halves =
                    _mm256_and_si256(_mm256_slli_epi16::<7>(codes), _mm256_set1_epi16(0xBFFF_u16 as i16));
                out[2 * part] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), scale);
                out[2 * part + 1] =
                    _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)), scale);
            }
            out
        }
    }
    #[inline(always)]
    fn int4(self, x: &[u8; 16]) -> V {
        let [a, b] = nibbles(self, x);
        // SAFETY: the token proves AVX2.
        unsafe {
            let eight = _mm_set1_epi8(8);
            let (a, b) = (_mm_sub_epi8(a, eight), _mm_sub_epi8(b, eight));
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(a))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(b))),
            ]
        }
    }
    #[inline(always)]
    fn e2m1(self, x: &[u8; 16]) -> V {
        let [a, b] = nibbles(self, x);
        // Every value is exact in bf16: look its two bytes up and join them.
        // SAFETY: the token proves AVX2; the tables are 16 bytes each.
        unsafe {
            let high = _mm_loadu_si128(E2M1_HIGH.as_ptr().cast());
            let low = _mm_loadu_si128(E2M1_LOW.as_ptr().cast());
            let (a_low, a_high) = (_mm_shuffle_epi8(low, a), _mm_shuffle_epi8(high, a));
            let (b_low, b_high) = (_mm_shuffle_epi8(low, b), _mm_shuffle_epi8(high, b));
            [
                widen(self, _mm_unpacklo_epi8(a_low, a_high)),
                widen(self, _mm_unpackhi_epi8(a_low, a_high)),
                widen(self, _mm_unpacklo_epi8(b_low, b_high)),
                widen(self, _mm_unpackhi_epi8(b_low, b_high)),
            ]
        }
    }
}
