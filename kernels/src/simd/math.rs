//! Exponentials and reductions over slices, the same bits on every instruction set.

use super::{Isa, LANES, Lanes, Work};

/// e^x within 2 units in the last place: subnormal results are rounded properly, 0 below -104 and
/// infinity above 88.73; NaN stays.
///
/// Cody-Waite reduction by n ln 2 and the degree-5 polynomial of Cephes' `expf`, by Horner's rule with
/// fused multiply-adds. 2^n is applied in two halves so that results under 2^-126 round once.
#[inline(always)]
pub(crate) fn exp<L: Lanes>(l: L, x: L::V) -> L::V {
    /// Adding it leaves the nearest whole number in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 minus its nearest f32.
    const LN2_LOW: f32 = -1.904_654_3e-9;
    let x = l.max(l.splat(-110.0), l.min(l.splat(89.0), x));
    let round = l.splat(ROUND);
    let n = l.sub(l.fma(x, l.splat(std::f32::consts::LOG2_E), round), round);
    let r = l.fma(n, l.splat(-std::f32::consts::LN_2), x);
    let r = l.fma(n, l.splat(-LN2_LOW), r);
    let mut p = l.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = l.fma(p, r, l.splat(c));
    }
    let p = l.add(l.fma(l.mul(r, r), p, r), l.splat(1.0));
    let n_half = l.sub(l.fma(n, l.splat(0.5), round), round);
    l.mul(l.mul(p, l.pow2(n_half)), l.pow2(l.sub(n, n_half)))
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid<L: Lanes>(l: L, x: L::V) -> L::V {
    let one = l.splat(1.0);
    l.div(one, l.add(one, exp(l, l.mul(x, l.splat(-1.0)))))
}

/// x / (1 + e^-x).
#[inline(always)]
pub(crate) fn silu<L: Lanes>(l: L, x: L::V) -> L::V {
    l.div(x, l.add(l.splat(1.0), exp(l, l.mul(x, l.splat(-1.0)))))
}

/// Replaces every x by e^(x - shift); a shift of 0 leaves e^x.
pub fn exp_in_place(isa: Isa, shift: f32, x: &mut [f32]) {
    isa.run(Map { x, f: Function::Exp { shift } });
}

/// Replaces every x by 1 / (1 + e^-x).
pub fn sigmoid_in_place(isa: Isa, x: &mut [f32]) {
    isa.run(Map { x, f: Function::Sigmoid });
}

/// The sum in canonical order.
pub fn sum(isa: Isa, x: &[f32]) -> f32 {
    isa.run(Sum(x))
}

/// The greatest value; of NaN, any answer but a panic. Negative infinity if empty.
pub fn max(isa: Isa, x: &[f32]) -> f32 {
    isa.run(Max(x))
}

#[derive(Clone, Copy)]
enum Function {
    Exp { shift: f32 },
    Sigmoid,
}

struct Map<'a> {
    x: &'a mut [f32],
    f: Function,
}

impl Work for Map<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let (chunks, rest) = self.x.as_chunks_mut::<LANES>();
        for chunk in chunks {
            apply(l, self.f, chunk);
        }
        if !rest.is_empty() {
            let mut last = [0.0; LANES];
            last[..rest.len()].copy_from_slice(rest);
            apply(l, self.f, &mut last);
            rest.copy_from_slice(&last[..rest.len()]);
        }
    }
}

#[inline(always)]
fn apply<L: Lanes>(l: L, f: Function, chunk: &mut [f32; LANES]) {
    let x = l.load(chunk);
    let y = match f {
        Function::Exp { shift } => exp(l, l.sub(x, l.splat(shift))),
        Function::Sigmoid => sigmoid(l, x),
    };
    l.store(y, chunk);
}

struct Sum<'a>(&'a [f32]);

impl Work for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> f32 {
        let (chunks, rest) = self.0.as_chunks::<LANES>();
        let mut total = l.splat(0.0);
        for chunk in chunks {
            total = l.add(total, l.load(chunk));
        }
        if !rest.is_empty() {
            total = l.add(total, l.load(&padded(rest, 0.0)));
        }
        l.sum(total)
    }
}

struct Max<'a>(&'a [f32]);

impl Work for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> f32 {
        let (chunks, rest) = self.0.as_chunks::<LANES>();
        let mut peak = l.splat(f32::NEG_INFINITY);
        for chunk in chunks {
            peak = l.max(peak, l.load(chunk));
        }
        if !rest.is_empty() {
            peak = l.max(peak, l.load(&padded(rest, f32::NEG_INFINITY)));
        }
        l.peak(peak)
    }
}

/// The last values of a row, filled up to 32 lanes.
#[inline(always)]
pub(crate) fn padded(rest: &[f32], fill: f32) -> [f32; LANES] {
    let mut lanes = [fill; LANES];
    lanes[..rest.len()].copy_from_slice(rest);
    lanes
}
