//! Products with a weight stored `[in, out]`, on one thread.

use super::source::{Row, Source, with_source};
use super::tile::Input;
use crate::format::{Matrix, Values};
use crate::rows::RowsMut;
use crate::simd::{LANES, Lanes, Work};

/// Rows of x multiplied at a time.
const TILE_TOKENS: usize = 4;
/// Chunks of columns summed at a time.
const TILE_CHUNKS: usize = 2;

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
        debug_assert!(self.first.is_multiple_of(LANES));
        with_source!(self.w, source => {
            let mut t = 0;
            while t + TILE_TOKENS <= self.x.count() {
                let x = [self.x.row(t), self.x.row(t + 1), self.x.row(t + 2), self.x.row(t + 3)];
                self.tokens(l, source, t, x);
                t += TILE_TOKENS;
            }
            while t < self.x.count() {
                self.tokens(l, source, t, [self.x.row(t)]);
                t += 1;
            }
        })
    }
}

impl Transposed<'_> {
    #[inline(always)]
    fn tokens<L: Lanes, S: Source, const T: usize>(&mut self, l: L, source: S, t: usize, x: [&[f32]; T]) {
        let last = self.first + self.out.width();
        let mut c = self.first / LANES;
        while (c + TILE_CHUNKS) * LANES <= last {
            self.columns::<L, S, T, TILE_CHUNKS>(l, source, t, x, c);
            c += TILE_CHUNKS;
        }
        while c * LANES < last {
            self.columns::<L, S, T, 1>(l, source, t, x, c);
            c += 1;
        }
    }

    #[inline(always)]
    fn columns<L: Lanes, S: Source, const T: usize, const C: usize>(
        &mut self,
        l: L,
        source: S,
        t: usize,
        x: [&[f32]; T],
        chunk: usize,
    ) {
        let whole = (chunk + C) * LANES <= self.w.cols;
        let mut sums = [[l.splat(0.0); C]; T];
        for i in 0..self.w.rows {
            let row = source.row(i);
            for c in 0..C {
                let w = if whole { row.chunk(l, chunk + c) } else { row.tail(l) };
                for (sums, x) in sums.iter_mut().zip(x) {
                    sums[c] = l.fma(l.splat(x[i]), w, sums[c]);
                }
            }
        }
        for (token, sums) in sums.iter().enumerate() {
            let mut lanes = [[0.0; LANES]; C];
            for (lanes, sum) in lanes.iter_mut().zip(sums) {
                l.store(*sum, lanes);
            }
            let at = chunk * LANES - self.first;
            let out = &mut self.out.row(t + token)[at..];
            let values = lanes.as_flattened();
            match self.bias {
                Some(bias) => out.iter_mut().zip(values).zip(&bias[at..]).for_each(|((o, v), b)| *o = v + b),
                None => out.iter_mut().zip(values).for_each(|(o, v)| *o = *v),
            }
        }
    }
}
