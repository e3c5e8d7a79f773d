//! Integer products of sixteen weight rows at a time.
//!
//! A lane is a weight row, so nothing is ever summed across lanes. The sum of one group of 32 columns is
//! exact in 32-bit integers, whatever the order; groups are then added in f32, ascending, with one rounding
//! each. So every instruction set gives the same bits with whatever instructions it has.

pub(crate) mod block;
pub(crate) mod e4m3;
mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use super::Isa;
use super::portable::Portable;

/// Rows of a block: one per lane.
pub(crate) const ROWS: usize = 16;
/// Bytes of a row that are transposed at a time.
pub(crate) const LINE: usize = 64;

/// Sixteen i32 and sixteen f32 lanes of one instruction set. The value itself proves that the processor has
/// the features.
pub(crate) trait Dots: Copy {
    /// 16 x 32 bits of integers: one i32, two words or four bytes.
    type I: Copy;
    /// 16 f32.
    type F: Copy;
    /// Rows of x whose products with two row blocks fit in registers.
    const TOKENS: usize;

    /// Runs `work` in a function of its own, compiled once for all callers.
    fn enter<W: DotWork>(self, work: W) -> W::Output;
    /// Runs `work`, which holds registers, in a function of its own.
    fn call<W: InnerWork<Self>>(self, work: W);

    /// Dword d of each of 16 rows, for the 16 dwords from byte `at` on; row r begins at `r * stride`.
    fn transpose(self, rows: &[u8], stride: usize, at: usize) -> [Self::I; 16];
    /// 16 f32 from their bits.
    fn load_f32(self, bits: &[u32; ROWS]) -> Self::F;
    /// Value i of each of 16 rows, for i below 16.
    fn transpose_f32(self, rows: &[[f32; ROWS]; ROWS]) -> [Self::F; 16];
    /// 32 little-endian bf16 as f32.
    fn widen_bf16(self, x: &[u8; LINE], out: &mut [f32; 32]);
    /// 32 e4m3 codes as f32.
    fn widen_e4m3(self, x: &[u8; 32], out: &mut [f32; 32]);
    /// Asks for the cache line `at` bytes from the first of `bytes`, which need not exist.
    fn prefetch(self, bytes: &[u8], at: usize);
    /// The same, no nearer than the second cache.
    fn prefetch_second(self, bytes: &[u8], at: usize);

    fn splat(self, x: u32) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn xor(self, a: Self::I, b: Self::I) -> Self::I;
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I;
    /// Every dword shifted left.
    fn shl<const N: u32>(self, a: Self::I) -> Self::I;
    /// Every word shifted right, zeros from above.
    fn shr_words<const N: u32>(self, a: Self::I) -> Self::I;
    /// Every dword shifted right, zeros from above.
    fn shr<const N: u32>(self, a: Self::I) -> Self::I;
    /// Every byte, below 16, looked up.
    fn look_up(self, table: &[u8; 16], a: Self::I) -> Self::I;
    /// `sum + w.low * x.low + w.high * x.high`, words as i16.
    fn dot_words(self, sum: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// `sum` plus the four products of bytes of w (u8, at most `MAX` if the format says so) and x (i8).
    /// `WIDE`: w may exceed 128, so that the sum of two products may not fit an i16.
    fn dot_bytes<const WIDE: bool>(self, sum: Self::I, w: Self::I, x: Self::I) -> Self::I;

    fn zero(self) -> Self::F;
    fn splat_f32(self, x: f32) -> Self::F;
    /// The same bits.
    fn as_f32(self, a: Self::I) -> Self::F;
    /// The same bits.
    fn bits(self, a: Self::F) -> Self::I;
    /// Nearest f32, ties to even.
    fn to_f32(self, a: Self::I) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn store(self, a: Self::F) -> [f32; ROWS];
    /// `a` where the byte in `code`, a dword below 256, is neither 0 nor 255; else 2^-127 or NaN.
    fn e8m0(self, code: Self::I) -> Self::F;
}

/// One serial piece of computation, written over any [`Dots`]; as [`super::Work`].
pub(crate) trait DotWork {
    /// What it gives back.
    type Output;

    /// Does it.
    fn run<D: Dots>(self, d: D) -> Self::Output;
}

/// A part of a [`DotWork`] that is not to be inlined into it.
pub(crate) trait InnerWork<D: Dots> {
    /// Does it.
    fn run(self, d: D);
}

impl Isa {
    /// Runs `work` with this instruction set.
    ///
    /// # Panics
    /// If the processor lacks it.
    #[inline]
    pub(crate) fn run_dots<W: DotWork>(self, work: W) -> W::Output {
        match self {
            Self::Portable => Portable.enter(work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => super::avx2::Avx2::new().expect("this processor has no AVX2").enter(work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => super::avx512::Avx512::new().expect("this processor has no AVX-512").enter(work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni | Self::Avx512Amx => {
                avx512::Vnni::new().expect("this processor has no AVX-512 VNNI").enter(work)
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => panic!("{self:?} is not of this processor family"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) fn vnni_present() -> bool {
    avx512::Vnni::new().is_some()
}
