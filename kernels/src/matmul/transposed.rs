//! Products with a weight stored `[in, out]`, on one thread.
//!
//! Sums wait in memory while eight weight rows at a time are dequantised: reading a strip of many columns
//! from each row, rather than down a narrow column, is what the memory is fast at.

use super::source::{Row, Source, with_source};
use super::tile::{Input, dequantise};
use crate::format::{Matrix, Values};
use crate::rows::RowsMut;
use crate::simd::{LANES, Lanes, Work};

/// Weight rows added at a time.
const ROWS: usize = 8;
/// Rows of x at a time.
const TOKENS: usize = 32;
/// Chunks of sums on the stack, 32 KiB: a strip of 8 for 32 rows of x, of 32 for up to 8; all for one.
const SUMS: usize = 256;
/// Chunks of the widest strip; eight weight rows of it are 32 KiB.
const STRIP: usize = 32;

type Chunk = [f32; LANES];

/// `out[t, j] = sum over i of x[t, i] * w[i, first + j] (+ bias[j])`, i ascending, on this thread.
pub(crate) struct Transposed<'a> {
    pub(crate) x: Input<'a>,
    pub(crate) w: Matrix<'a>,
    /// First column, a multiple of 32; `out` and `bias` begin there.
    pub(crate) first: usize,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) out: RowsMut<'a>,
}

impl Work for Transposed<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        assert!(self.first.is_multiple_of(LANES), "columns from {}", self.first);
        with_source!(self.w, source => if self.x.count() == 1 {
            self.one(l, source)
        } else {
            self.strips(l, source)
        })
    }
}

impl Transposed<'_> {
    /// One row of x: weights are dequantised in registers.
    #[inline(always)]
    fn one<L: Lanes, S: Source>(&mut self, l: L, source: S) {
        let mut sums = [[0.0; LANES]; SUMS];
        let x = self.x.row(0);
        let chunks = self.out.width().div_ceil(LANES);
        for c in (0..chunks).step_by(SUMS) {
            let sums = &mut sums[..SUMS.min(chunks - c)];
            sums.fill([0.0; LANES]);
            let (fours, rest) = x.as_chunks::<4>();
            let first = self.first / LANES + c;
            for (i, x) in fours.iter().enumerate() {
                let row = |r| source.row(4 * i + r);
                add_stored(l, x, [row(0), row(1), row(2), row(3)], (self.w.cols, first), sums);
            }
            for (i, x) in rest.iter().enumerate() {
                let row = source.row(4 * fours.len() + i);
                add_stored(l, &[*x], [row], (self.w.cols, first), sums);
            }
            self.finish(0, c * LANES, sums.as_flattened());
        }
    }

    #[inline(always)]
    fn strips<L: Lanes, S: Source>(&mut self, l: L, source: S) {
        let mut sums = [[0.0; LANES]; SUMS];
        let mut weights = [[[0.0; LANES]; STRIP]; ROWS];
        let chunks = self.out.width().div_ceil(LANES);
        for t in (0..self.x.count()).step_by(TOKENS) {
            let tokens = TOKENS.min(self.x.count() - t);
            let strip = (SUMS / tokens).min(STRIP);
            for c in (0..chunks).step_by(strip) {
                let strip = strip.min(chunks - c);
                let sums = &mut sums[..tokens * strip];
                sums.fill([0.0; LANES]);
                for i in (0..self.w.rows).step_by(ROWS) {
                    let rows = ROWS.min(self.w.rows - i);
                    for (r, weights) in weights[..rows].iter_mut().enumerate() {
                        let chunk = self.first / LANES + c;
                        dequantise(l, source.row(i + r), self.w.cols, chunk, &mut weights[..strip]);
                    }
                    let (x, weights) = (self.x, &weights[..rows]);
                    l.enter(AddRows { x, weights, row: i, token: t, strip, sums });
                }
                for (i, sums) in sums.chunks_exact(strip).enumerate() {
                    self.finish(t + i, c * LANES, sums.as_flattened());
                }
            }
        }
    }

    #[inline(always)]
    fn finish(&mut self, token: usize, column: usize, sums: &[f32]) {
        let out = &mut self.out.row(token)[column..];
        match self.bias {
            Some(bias) => out.iter_mut().zip(sums).zip(&bias[column..]).for_each(|((o, s), b)| *o = s + b),
            None => out.iter_mut().zip(sums).for_each(|(o, s)| *o = *s),
        }
    }
}

/// Adds the products of some values of x with as many rows of `cols` columns, from chunk `first` on.
#[inline(always)]
fn add_stored<L: Lanes, W: Row, const R: usize>(
    l: L,
    x: &[f32; R],
    rows: [W; R],
    (cols, first): (usize, usize),
    sums: &mut [Chunk],
) {
    let whole = cols / LANES;
    let mut splat = [l.splat(0.0); R];
    for (splat, x) in splat.iter_mut().zip(x) {
        *splat = l.splat(*x);
    }
    for (c, sums) in sums.iter_mut().enumerate() {
        let mut sum = l.load(sums);
        for (x, row) in splat.iter().zip(&rows) {
            let w = if first + c < whole { row.chunk(l, first + c) } else { row.tail(l) };
            sum = l.fma(*x, w, sum);
        }
        l.store(sum, sums);
    }
}

/// Adds the products with some weight rows, ascending, to the sums of some rows of x.
struct AddRows<'a, 's> {
    x: Input<'a>,
    weights: &'s [[Chunk; STRIP]],
    /// Of the weights, the first.
    row: usize,
    /// First row of x; there are as many as strips of sums.
    token: usize,
    strip: usize,
    sums: &'s mut [Chunk],
}

impl Work for AddRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        for (t, sums) in self.sums.chunks_exact_mut(self.strip).enumerate() {
            let x = &self.x.row(self.token + t)[self.row..][..self.weights.len()];
            match (x.first_chunk::<ROWS>(), self.weights.first_chunk::<ROWS>()) {
                (Some(x), Some(weights)) => add_rows(l, x, weights, sums),
                _ => x.iter().zip(self.weights).for_each(|(x, w)| {
                    add_rows(l, &[*x], std::slice::from_ref(w).first_chunk().expect("one row"), sums)
                }),
            }
        }
    }
}

#[inline(always)]
fn add_rows<L: Lanes, const R: usize>(l: L, x: &[f32; R], weights: &[[Chunk; STRIP]; R], sums: &mut [Chunk]) {
    let mut splat = [l.splat(0.0); R];
    for (splat, x) in splat.iter_mut().zip(x) {
        *splat = l.splat(*x);
    }
    for (c, sums) in sums.iter_mut().enumerate().take(STRIP) {
        let mut sum = l.load(sums);
        for (x, weights) in splat.iter().zip(weights) {
            sum = l.fma(*x, l.load(&weights[c]), sum);
        }
        l.store(sum, sums);
    }
}
