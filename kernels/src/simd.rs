//! Instruction sets, and the one order in which everything is summed.
//!
//! # Canonical order
//!
//! A product of two rows of K values keeps 32 f32 lanes. Element k goes to lane k mod 32; each lane
//! is accumulated by fused multiply-add in ascending k. After the last element lanes j and j+16 are
//! added, then j and j+8, j+4, j+2, j+1: lane 0 is the result. Where K is not a multiple of 32 the
//! missing elements are a multiply-add of zero by zero. Sums, sums of squares and maxima use the
//! same lanes and the same reduction.
//!
//! The order holds for portable, AVX2 and AVX-512 code alike, for one row or many, for any number of
//! threads, so all of them give the same bits. (Which NaN a NaN is stays open.) A weight is first
//! dequantised to f32: its code, exact in f32, times its scale, rounded once. (Weights of bf16 and FP8
//! have another order, `matmul::rowwise`, and so do products in whole numbers, [`crate::quantised`], and those in tile
//! registers, `matmul::tiled`, which only some processors have.)
//!
//! Where a matrix is stored `[in, out]` (`matmul_transposed`) and where attention sums values over
//! positions, every output is one lane: a chain of fused multiply-adds, ascending.
//!
//! # How it is built
//!
//! An operation is written once as `Work`, over the 32 lanes of `Lanes`; [`Isa`] instantiates it per
//! instruction set inside one function that enables the features. All of it is inlined there.

pub(crate) mod dots;
mod math;
mod portable;
pub(crate) mod tiles;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

pub(crate) use math::{exp, padded, silu};
pub use math::{exp_in_place, max, sigmoid_in_place, sum};

/// f32 lanes of the canonical order.
pub const LANES: usize = 32;

/// An instruction set. Chosen once at start ([`Isa::detect`]) and handed to every operation; there is
/// no global.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust: any processor, and slow where the build target has no fused multiply-add.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI: integer products in one instruction instead of two or three.
    Avx512Vnni,
    /// AVX-512 with VNNI and the tiles of AMX: activations packed for bf16 weights are multiplied in tiles, with other last
    /// bits than by the others (`matmul::tiled`).
    Avx512Amx,
}

impl Isa {
    /// The best that this processor has.
    pub fn detect() -> Self {
        [Self::Avx512Amx, Self::Avx512Vnni, Self::Avx512, Self::Avx2]
            .into_iter()
            .find(|isa| isa.present())
            .unwrap_or(Self::Portable)
    }

    /// All that this processor has, plainest first.
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Vnni, Self::Avx512Amx]
            .into_iter()
            .filter(|isa| isa.present())
            .collect()
    }

    fn present(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::Avx512::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => dots::vnni_present(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Amx => dots::vnni_present() && tiles::Amx::new().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The tiles of this instruction set, if it has such.
    pub(crate) fn tiles(self) -> Option<tiles::Amx> {
        (self == Self::Avx512Amx).then(|| tiles::Amx::new().expect("this processor has no AMX"))
    }

    /// Runs `work` with this instruction set.
    ///
    /// # Panics
    /// If the processor lacks it.
    #[inline]
    pub(crate) fn run<W: Work>(self, work: W) -> W::Output {
        match self {
            Self::Portable => portable::Portable.enter(work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::new().expect("this processor has no AVX2").enter(work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Vnni | Self::Avx512Amx => {
                avx512::Avx512::new().expect("this processor has no AVX-512").enter(work)
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => panic!("{self:?} is not of this processor family"),
        }
    }
}

/// One serial piece of computation, written over any [`Lanes`]. Implementations of `run` and all that
/// they call with lanes must be `#[inline(always)]`: only then are they compiled for the instruction
/// set.
pub(crate) trait Work {
    /// What it gives back.
    type Output;

    /// Does it.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// 32 f32 lanes of one instruction set. The value itself proves that the processor has the features.
pub(crate) trait Lanes: Copy {
    /// 32 values.
    type V: Copy;

    /// Some of the 32 values: as many as a tile of 4 x 3 sums leaves room for in the registers.
    type Part: Copy;
    /// Parts that make 32 values; part p begins with value `p * 32 / PARTS`.
    const PARTS: usize;
    /// Rows of x whose sums with a few weight rows all stay in registers as whole [`Lanes::V`].
    const WHOLE_ROWS: usize;

    /// Runs `work` in a function of its own, compiled once for all callers.
    fn enter<W: Work>(self, work: W) -> W::Output;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &[f32; LANES]) -> Self::V;
    fn store(self, v: Self::V, out: &mut [f32; LANES]);

    fn splat_part(self, x: f32) -> Self::Part;
    fn load_part(self, x: &[f32; LANES], part: usize) -> Self::Part;
    fn store_part(self, v: Self::Part, out: &mut [f32; LANES], part: usize);
    /// As [`Lanes::fma`].
    fn fma_part(self, a: Self::Part, b: Self::Part, c: Self::Part) -> Self::Part;
    /// Asks for the cache line of `bytes[at]`, if there is one.
    fn prefetch(self, bytes: &[u8], at: usize);
    /// Asks for the cache line at an address, whatever is there.
    fn prefetch_line(self, line: *const u8);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a > b ? a : b`: with a NaN in either, `b`.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b`: with a NaN in either, `b`.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// 2^n for whole n in -126 ..= 127; anything else gives some value.
    fn pow2(self, n: Self::V) -> Self::V;

    /// The canonical reduction of the lanes by addition.
    fn sum(self, v: Self::V) -> f32;
    /// [`Lanes::sum`] of four at once, which shares their shuffles.
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4];
    /// [`Lanes::sum`] of four rows of three, then anything.
    #[inline(always)]
    fn sum4x3(self, v: [[Self::V; 3]; 4]) -> [[f32; 4]; 4] {
        let [a, b, c, d] = v;
        let mut out = [[0.0; 4]; 4];
        for key in 0..3 {
            let sums = self.sum4([a[key], b[key], c[key], d[key]]);
            for (out, sum) in out.iter_mut().zip(sums) {
                out[key] = sum;
            }
        }
        out
    }
    /// The canonical reduction of the lanes by [`Lanes::max`].
    fn peak(self, v: Self::V) -> f32;

    /// 32 little-endian f32.
    fn f32(self, x: &[u8; 128]) -> Self::V;
    /// 32 little-endian IEEE halves.
    fn f16(self, x: &[u8; 64]) -> Self::V;
    /// 32 little-endian bf16.
    fn bf16(self, x: &[u8; 64]) -> Self::V;
    /// 32 bf16 as words.
    fn bf16_words(self, x: &[u16; 32]) -> Self::V;
    /// 32 e4m3fn codes.
    fn e4m3(self, x: &[u8; 32]) -> Self::V;
    /// 32 e4m3fn codes, each times a scale of at most 2^119, rounded once; the codes of NaN give some value.
    fn e4m3_times(self, x: &[u8; 32], scale: f32) -> Self::V;
    /// 32 nibbles, low first, each minus 8.
    fn int4(self, x: &[u8; 16]) -> Self::V;
    /// 32 e2m1 nibbles, low first.
    fn e2m1(self, x: &[u8; 16]) -> Self::V;
    /// 32 bytes, each minus 128.
    fn q8(self, x: &[u8; 32]) -> Self::V {
        let values = x.map(|code| f32::from(code) - 128.0);
        self.load(&values)
    }
}

/// 32 e4m3 codes as f32.
#[inline(always)]
fn widen_e4m3<L: Lanes>(l: L, codes: &[u8; 32], out: &mut [f32; LANES]) {
    l.store(l.e4m3(codes), out);
}
