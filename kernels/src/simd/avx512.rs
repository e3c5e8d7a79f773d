//! The lanes as two registers of sixteen.

use super::{LANES, Lanes, Work};
use std::arch::x86_64::*;

/// Proof that the processor has AVX-512 F, BW, DQ and VL (and what every such processor has besides).
/// Only [`Avx512::new`] makes one, which is what every `unsafe` block here relies on.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn new() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }
}

/// Lanes 0..16 and 16..32.
type V = [__m512; 2];

/// One operation on both registers.
macro_rules! both {
    ($f:ident, $($v:ident),+) => {
        // SAFETY: the token proves AVX-512; the operation touches registers only.
        unsafe { [$f($($v[0]),+), $f($($v[1]),+)] }
    };
}

#[inline(always)]
fn nibbles(_: Avx512, x: &[u8; 16]) -> [__m512i; 2] {
    // SAFETY: the token proves AVX-512; 16 bytes are read from a reference to 16 bytes.
    unsafe {
        let x = _mm_loadu_si128(x.as_ptr().cast());
        let mask = _mm_set1_epi8(15);
        let low = _mm_and_si128(x, mask);
        let high = _mm_and_si128(_mm_srli_epi16::<4>(x), mask);
        [
            _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)),
            _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(low, high)),
        ]
    }
}

/// Looks both registers of codes up in a table of sixteen values.
#[inline(always)]
fn look_up(_: Avx512, codes: [__m512i; 2], table: &[f32; 16]) -> V {
    // SAFETY: the token proves AVX-512; 64 bytes are read from a reference to 16 f32.
    unsafe {
        let table = _mm512_loadu_ps(table.as_ptr());
        [_mm512_permutexvar_ps(codes[0], table), _mm512_permutexvar_ps(codes[1], table)]
    }
}

/// The first steps of four canonical reductions, down to four lanes of each.
#[inline(always)]
fn four_lanes(_: Avx512, v: [V; 4]) -> __m512 {
    // SAFETY: the token proves AVX-512.
    unsafe {
        let [a, b, c, d] = [
            _mm512_add_ps(v[0][0], v[0][1]),
            _mm512_add_ps(v[1][0], v[1][1]),
            _mm512_add_ps(v[2][0], v[2][1]),
            _mm512_add_ps(v[3][0], v[3][1]),
        ];
        // Lanes j and j + 8: the lower and the upper halves of two registers side by side.
        let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b));
        let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xEE>(c, d));
        // j and j + 4: now four lanes of each.
        _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xDD>(ab, cd))
    }
}

const INT4: [f32; 16] =
    [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];

impl Lanes for Avx512 {
    type V = V;
    type Part = V;
    const PARTS: usize = 1;
    const WHOLE_ROWS: usize = 4;

    #[inline]
    fn enter<W: Work>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn inner<W: Work>(token: Avx512, work: W) -> W::Output {
            work.run(token)
        }
        // SAFETY: the token proves the features that `inner` enables.
        unsafe { inner(self, work) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        // SAFETY: the token proves AVX-512.
        unsafe { [_mm512_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> V {
        // SAFETY: the token proves AVX-512; 32 values are read from a reference to 32.
        unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))] }
    }
    #[inline(always)]
    fn store(self, v: V, out: &mut [f32; LANES]) {
        // SAFETY: the token proves AVX-512; 32 values are written to a reference to 32.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm512_storeu_ps(out.as_mut_ptr().add(16), v[1]);
        }
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
        both!(_mm512_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        both!(_mm512_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        both!(_mm512_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        both!(_mm512_div_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        both!(_mm512_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        both!(_mm512_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        both!(_mm512_min_ps, a, b)
    }
    #[inline(always)]
    fn pow2(self, mut n: V) -> V {
        // A loop: what a closure calls would not be inlined, because it lacks the features.
        for n in &mut n {
            // SAFETY: the token proves AVX-512.
            unsafe {
                let e = _mm512_add_epi32(_mm512_cvtps_epi32(*n), _mm512_set1_epi32(127));
                *n = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(e));
            }
        }
        n
    }
    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        // SAFETY: the token proves AVX-512.
        unsafe {
            let v = _mm512_add_ps(v[0], v[1]);
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }
    #[inline(always)]
    fn sum4(self, v: [V; 4]) -> [f32; 4] {
        // SAFETY: the token proves AVX-512; 64 bytes are written to an array of 16 f32.
        unsafe {
            let v = four_lanes(self, v);
            let v = _mm512_add_ps(v, _mm512_permute_ps::<0b1110>(v));
            let v = _mm512_add_ps(v, _mm512_permute_ps::<0b01>(v));
            let mut lanes = [0.0; 16];
            _mm512_storeu_ps(lanes.as_mut_ptr(), v);
            [lanes[0], lanes[4], lanes[8], lanes[12]]
        }
    }
    #[inline(always)]
    fn sum4x3(self, v: [[V; 3]; 4]) -> [[f32; 4]; 4] {
        let [a, b, c, d] = v;
        let x = four_lanes(self, [a[0], b[0], c[0], d[0]]);
        let y = four_lanes(self, [a[1], b[1], c[1], d[1]]);
        let z = four_lanes(self, [a[2], b[2], c[2], d[2]]);
        // SAFETY: the token proves AVX-512; 64 bytes are written to 16 f32.
        unsafe {
            // Lanes j and j + 2: two lanes each of x and y, then of z twice.
            let xy = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(x, y), _mm512_shuffle_ps::<0xEE>(x, y));
            let zz = _mm512_add_ps(z, _mm512_permute_ps::<0b1110>(z));
            // j and j + 1: now one lane each of x, y and z.
            let v = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(xy, zz), _mm512_shuffle_ps::<0xDD>(xy, zz));
            let mut out = [[0.0; 4]; 4];
            _mm512_storeu_ps(out.as_mut_ptr().cast(), v);
            out
        }
    }
    #[inline(always)]
    fn peak(self, v: V) -> f32 {
        // SAFETY: the token proves AVX-512.
        unsafe {
            let v = _mm512_max_ps(v[0], v[1]);
            let v = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
    }
    #[inline(always)]
    fn f32(self, x: &[u8; 128]) -> V {
        // SAFETY: the token proves AVX-512; 128 bytes are read, unaligned, from a reference to 128.
        unsafe { [_mm512_loadu_ps(x.as_ptr().cast()), _mm512_loadu_ps(x.as_ptr().add(64).cast())] }
    }
    #[inline(always)]
    fn f16(self, x: &[u8; 64]) -> V {
        // SAFETY: the token proves AVX-512; 64 bytes are read, unaligned, from a reference to 64.
        unsafe {
            [
                _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())),
                _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().add(32).cast())),
            ]
        }
    }
    #[inline(always)]
    fn bf16(self, x: &[u8; 64]) -> V {
        // SAFETY: the token proves AVX-512; 64 bytes are read, unaligned, from a reference to 64.
        unsafe {
            let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().add(32).cast()));
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(low)),
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(high)),
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
        // The seven magnitude bits become exponent and mantissa of a half, whose bias is 8 greater;
        // subnormals stay subnormal, which the conversion takes at full speed.
        // SAFETY: the token proves AVX-512; 32 bytes are read, unaligned, from a reference to 32.
        unsafe {
            let codes = _mm512_cvtepi8_epi16(_mm256_loadu_si256(x.as_ptr().cast()));
            let halves =
                _mm512_and_si512(_mm512_slli_epi16::<7>(codes), _mm512_set1_epi16(0xBFFF_u16 as i16));
            let magnitude = _mm512_and_si512(halves, _mm512_set1_epi16(0x7FFF));
            let nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x3F80));
            let halves = _mm512_mask_mov_epi16(halves, nan, _mm512_set1_epi16(0x7E00));
            let bias = _mm512_set1_ps(256.0);
            [
                _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), bias),
                _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(halves)), bias),
            ]
        }
    }
    #[inline(always)]
    fn e4m3_times(self, x: &[u8; 32], scale: f32) -> V {
        // As above; 256 is a power of two, so it may be multiplied into the scale first.
        // SAFETY: the token proves AVX-512; 32 bytes are read, unaligned, from a reference to 32.
        unsafe {
            let codes = _mm512_cvtepi8_epi16(_mm256_loadu_si256(x.as_ptr().cast()));
            let halves =
                _mm512_and_si512(_mm512_slli_epi16::<7>(codes), _mm512_set1_epi16(0xBFFF_u16 as i16));
            let scale = _mm512_set1_ps(scale * 256.0);
            [
                _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), scale),
                _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(halves)), scale),
            ]
        }
    }
    #[inline(always)]
    fn int4(self, x: &[u8; 16]) -> V {
        look_up(self, nibbles(self, x), &INT4)
    }
    #[inline(always)]
    fn e2m1(self, x: &[u8; 16]) -> V {
        look_up(self, nibbles(self, x), &super::portable::E2M1)
    }
}
