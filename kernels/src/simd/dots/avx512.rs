//! The lanes as one register of sixteen, with and without VNNI.

use super::{DotWork, Dots, InnerWork, LINE, ROWS};
use crate::simd::avx512::Avx512;
use std::arch::x86_64::*;

/// Proof of AVX-512 VNNI besides what [`Avx512`] proves. Only [`Vnni::new`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Vnni(Avx512);

impl Vnni {
    pub(crate) fn new() -> Option<Self> {
        let base = Avx512::new()?;
        is_x86_feature_detected!("avx512vnni").then_some(Self(base))
    }
}

#[inline(always)]
fn transpose(_: Avx512, rows: &[u8], stride: usize, at: usize) -> [__m512i; 16] {
    assert!(rows.len() >= (ROWS - 1) * stride + at + LINE, "a line of every row");
    // SAFETY: the token proves AVX-512; the assertion says that 64 bytes follow `r * stride + at`.
    unsafe { transpose16(rows.as_ptr().add(at), stride) }
}

/// Dword d of the 64 bytes at each of 16 rows, `stride` bytes apart.
///
/// # Safety
/// The processor has AVX-512; 64 bytes can be read at `start` and at the 15 rows after it.
#[inline(always)]
unsafe fn transpose16(start: *const u8, stride: usize) -> [__m512i; 16] {
    // SAFETY: the caller says so.
    unsafe {
        let mut fours = [[_mm512_setzero_si512(); 4]; 4];
        for (r, four) in fours.iter_mut().enumerate() {
            *four = transpose4(start.add(4 * r * stride), stride);
        }
        let [a, b, c, d] = fours;
        let mut out = [_mm512_setzero_si512(); 16];
        for j in 0..4 {
            let (low, low2) =
                (_mm512_shuffle_i32x4::<0x44>(a[j], b[j]), _mm512_shuffle_i32x4::<0x44>(c[j], d[j]));
            let (high, high2) =
                (_mm512_shuffle_i32x4::<0xEE>(a[j], b[j]), _mm512_shuffle_i32x4::<0xEE>(c[j], d[j]));
            out[j] = _mm512_shuffle_i32x4::<0x88>(low, low2);
            out[4 + j] = _mm512_shuffle_i32x4::<0xDD>(low, low2);
            out[8 + j] = _mm512_shuffle_i32x4::<0x88>(high, high2);
            out[12 + j] = _mm512_shuffle_i32x4::<0xDD>(high, high2);
        }
        out
    }
}

/// 128-bit lane L of register j: dword 4L + j of four rows, `stride` bytes apart.
///
/// # Safety
/// The processor has AVX-512; 64 bytes can be read at `start` and at the three rows after it.
#[inline(always)]
unsafe fn transpose4(start: *const u8, stride: usize) -> [__m512i; 4] {
    // SAFETY: the caller says so.
    unsafe {
        let a = _mm512_loadu_si512(start.cast());
        let b = _mm512_loadu_si512(start.add(stride).cast());
        let c = _mm512_loadu_si512(start.add(2 * stride).cast());
        let d = _mm512_loadu_si512(start.add(3 * stride).cast());
        let (ab0, ab1) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd0, cd1) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab0, cd0),
            _mm512_unpackhi_epi64(ab0, cd0),
            _mm512_unpacklo_epi64(ab1, cd1),
            _mm512_unpackhi_epi64(ab1, cd1),
        ]
    }
}

/// What both tokens do alike.
macro_rules! shared_operations {
    ($base:expr) => {
        type I = __m512i;
        type F = __m512;
        const TOKENS: usize = 12;

        #[inline(always)]
        fn transpose(self, rows: &[u8], stride: usize, at: usize) -> [__m512i; 16] {
            transpose($base(self), rows, stride, at)
        }
        #[inline(always)]
        fn load_f32(self, bits: &[u32; ROWS]) -> __m512 {
            // SAFETY: the token proves AVX-512; 64 bytes are read from a reference to 64.
            unsafe { _mm512_loadu_ps(bits.as_ptr().cast()) }
        }
        #[inline(always)]
        fn transpose_f32(self, rows: &[[f32; ROWS]; ROWS]) -> [__m512; 16] {
            // SAFETY: the token proves AVX-512; 64 bytes are read from each of 16 rows of 64.
            let dwords = unsafe { transpose16(rows.as_ptr().cast(), LINE) };
            let mut out = [self.zero(); 16];
            for (out, dword) in out.iter_mut().zip(dwords) {
                *out = self.as_f32(dword);
            }
            out
        }
        #[inline(always)]
        fn widen_bf16(self, x: &[u8; LINE], out: &mut [f32; 32]) {
            for i in 0..2 {
                // SAFETY: the token proves AVX-512; 32 bytes of 64 are read, 64 of 128 written, twice.
                unsafe {
                    let words = _mm256_loadu_si256(x.as_ptr().add(32 * i).cast());
                    let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words));
                    _mm512_storeu_si512(out.as_mut_ptr().add(16 * i).cast(), wide);
                }
            }
        }
        #[inline(always)]
        fn widen_e4m3(self, x: &[u8; 32], out: &mut [f32; 32]) {
            crate::simd::widen_e4m3($base(self), x, out);
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
        fn splat(self, x: u32) -> __m512i {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_set1_epi32(x as i32) }
        }
        #[inline(always)]
        fn and(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_and_si512(a, b) }
        }
        #[inline(always)]
        fn xor(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_xor_si512(a, b) }
        }
        #[inline(always)]
        fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_add_epi32(a, b) }
        }
        #[inline(always)]
        fn shl<const N: u32>(self, a: __m512i) -> __m512i {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_slli_epi32::<N>(a) }
        }
        #[inline(always)]
        fn shr_words<const N: u32>(self, a: __m512i) -> __m512i {
            // SAFETY: the token proves AVX-512 BW.
            unsafe { _mm512_srli_epi16::<N>(a) }
        }
        #[inline(always)]
        fn shr<const N: u32>(self, a: __m512i) -> __m512i {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_srli_epi32::<N>(a) }
        }
        #[inline(always)]
        fn look_up(self, table: &[u8; 16], a: __m512i) -> __m512i {
            // SAFETY: the token proves AVX-512 BW; 16 bytes are read from a reference to 16.
            unsafe {
                let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
                _mm512_shuffle_epi8(table, a)
            }
        }
        #[inline(always)]
        fn zero(self) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        fn splat_f32(self, x: f32) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn as_f32(self, a: __m512i) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_castsi512_ps(a) }
        }
        #[inline(always)]
        fn bits(self, a: __m512) -> __m512i {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_castps_si512(a) }
        }
        #[inline(always)]
        fn to_f32(self, a: __m512i) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_cvtepi32_ps(a) }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn store(self, a: __m512) -> [f32; ROWS] {
            let mut out = [0.0; ROWS];
            // SAFETY: the token proves AVX-512; 16 values are written to an array of 16.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), a) }
            out
        }
        #[inline(always)]
        fn e8m0(self, code: __m512i) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe {
                let zero = _mm512_cmpeq_epi32_mask(code, _mm512_setzero_si512());
                let nan = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255));
                let value = _mm512_slli_epi32::<23>(code);
                let value = _mm512_mask_mov_epi32(value, zero, _mm512_set1_epi32(1 << 22));
                _mm512_castsi512_ps(_mm512_mask_mov_epi32(value, nan, _mm512_set1_epi32(0x7FC0_0000)))
            }
        }
    };
}

impl Dots for Avx512 {
    shared_operations!(|token: Avx512| token);

    #[inline]
    fn enter<W: DotWork>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn inner<W: DotWork>(token: Avx512, work: W) -> W::Output {
            work.run(token)
        }
        // SAFETY: the token proves the features that `inner` enables.
        unsafe { inner(self, work) }
    }
    #[inline]
    fn call<W: InnerWork<Self>>(self, work: W) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        #[inline(never)]
        fn inner<W: InnerWork<Avx512>>(token: Avx512, work: W) {
            work.run(token)
        }
        // SAFETY: the token proves the features that `inner` enables.
        unsafe { inner(self, work) }
    }
    #[inline(always)]
    fn dot_words(self, sum: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: the token proves AVX-512 BW.
        unsafe { _mm512_add_epi32(sum, _mm512_madd_epi16(w, x)) }
    }
    #[inline(always)]
    fn dot_bytes<const WIDE: bool>(self, sum: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: the token proves AVX-512 BW.
        unsafe {
            if WIDE {
                // Two products of bytes may exceed an i16, and the instruction saturates: even and odd apart.
                let even = _mm512_and_si512(w, _mm512_set1_epi16(0x00FF));
                let odd = _mm512_srli_epi16::<8>(w);
                let x_even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x));
                let sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, x_even));
                return _mm512_add_epi32(sum, _mm512_madd_epi16(odd, _mm512_srai_epi16::<8>(x)));
            }
            let pairs = _mm512_maddubs_epi16(w, x);
            _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }
}

/// An instruction of VNNI as assembly. Two reasons: the compiler takes the intrinsic of words apart into a product and a
/// sum where sums wait for one another, which doubles the load of the ports that bind here; and it keeps the order of
/// what is not `pure`, where it would else put one whole chain of sums after all the others.
macro_rules! vnni {
    ($name:ident, $instruction:literal) => {
        #[inline]
        #[target_feature(enable = "avx512f,avx512vnni")]
        fn $name(mut sum: __m512i, w: __m512i, x: __m512i) -> __m512i {
            // SAFETY: registers only.
            unsafe {
                std::arch::asm!(
                    concat!($instruction, " {0}, {1}, {2}"),
                    inout(zmm_reg) sum,
                    in(zmm_reg) w,
                    in(zmm_reg) x,
                    options(nomem, nostack, preserves_flags)
                );
            }
            sum
        }
    };
}

vnni!(dpwssd, "vpdpwssd");
vnni!(dpbusd, "vpdpbusd");

impl Dots for Vnni {
    shared_operations!(|token: Vnni| token.0);

    #[inline]
    fn enter<W: DotWork>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn inner<W: DotWork>(token: Vnni, work: W) -> W::Output {
            work.run(token)
        }
        // SAFETY: the token proves the features that `inner` enables.
        unsafe { inner(self, work) }
    }
    #[inline]
    fn call<W: InnerWork<Self>>(self, work: W) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        #[inline(never)]
        fn inner<W: InnerWork<Vnni>>(token: Vnni, work: W) {
            work.run(token)
        }
        // SAFETY: the token proves the features that `inner` enables.
        unsafe { inner(self, work) }
    }
    #[inline(always)]
    fn dot_words(self, sum: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: the token proves AVX-512 VNNI.
        unsafe { dpwssd(sum, w, x) }
    }
    #[inline(always)]
    fn dot_bytes<const WIDE: bool>(self, sum: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: the token proves AVX-512 VNNI.
        unsafe { dpbusd(sum, w, x) }
    }
}
