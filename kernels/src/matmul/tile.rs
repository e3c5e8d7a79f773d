//! A tile of weight rows against rows of x, on one thread.

use super::source::{Row, Source, with_source};
use crate::format::{Matrix, Values};
use crate::rows::{Rows, RowsMut};
use crate::simd::{LANES, Lanes, Work, padded};

/// Weight rows multiplied at a time.
const TILE_ROWS: usize = 4;
/// Rows of x multiplied at a time: 4 x 3 sums of one part leave registers for the operands.
const TILE_TOKENS: usize = 3;
/// Chunks of a weight row dequantised at a time: 4 rows of 1536 f32 are 24 KiB, half a first cache, and
/// three rows of x fit beside them. Fewer would move the sums in and out of the registers more often.
const TILE_CHUNKS: usize = 48;
/// Rows of x whose sums (32 KiB) wait while the next chunks are dequantised.
const TOKENS: usize = 64;

/// Lanes of the products of one row of x with the weight rows of a tile.
type TileLanes = [[f32; LANES]; TILE_ROWS];

/// Begins on a cache line, so that no chunk lies in two.
#[repr(align(64))]
struct Aligned<T>(T);

/// Rows of x, perhaps picked: row t is `x.row(picks[t])`.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub(crate) x: Rows<'a>,
    pub(crate) picks: Option<&'a [u32]>,
}

impl<'a> Input<'a> {
    pub(crate) fn all(x: Rows<'a>) -> Self {
        Self { x, picks: None }
    }

    #[inline]
    pub(crate) fn count(&self) -> usize {
        self.picks.map_or(self.x.count(), <[u32]>::len)
    }

    #[inline]
    pub(crate) fn row(&self, t: usize) -> &'a [f32] {
        self.x.row(self.picks.map_or(t, |picks| picks[t] as usize))
    }

    /// Rows `start .. start + count`.
    pub(crate) fn slice(&self, start: usize, count: usize) -> Self {
        match self.picks {
            Some(picks) => Self { picks: Some(&picks[start..][..count]), ..*self },
            None => Self::all(self.x.slice(start, count)),
        }
    }
}

/// `out[t, r] = dot(x[t], w[r]) (+ bias[r])`, all of it on this thread.
pub(crate) struct Product<'a> {
    pub(crate) x: Input<'a>,
    pub(crate) w: Matrix<'a>,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) out: RowsMut<'a>,
}

impl Work for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        with_source!(self.w, source => match self.x.count() {
            1 => self.few::<L, _, 4, 1>(l, source),
            2 if L::WHOLE_ROWS >= 2 => self.few::<L, _, 4, 2>(l, source),
            3 if L::WHOLE_ROWS >= 3 => self.few::<L, _, 4, 3>(l, source),
            4 if L::WHOLE_ROWS >= 4 => self.few::<L, _, 2, 4>(l, source),
            _ => self.many(l, source),
        })
    }
}

impl Product<'_> {
    /// `T` rows of x: weights are dequantised in registers, `R` rows at a time.
    #[inline(always)]
    fn few<L: Lanes, S: Source, const R: usize, const T: usize>(&mut self, l: L, source: S) {
        let x = std::array::from_fn(|t| self.x.row(t));
        let whole = self.w.rows / R * R;
        for r in (0..whole).step_by(R) {
            let rows: [S::Row; R] = std::array::from_fn(|i| source.row(r + i));
            let dots: [[f32; R]; T] = dots(l, rows, x);
            dots.iter().enumerate().for_each(|(t, dots)| self.finish(r, t, dots));
        }
        for r in whole..self.w.rows {
            let dots: [[f32; 1]; T] = dots(l, [source.row(r)], x);
            dots.iter().enumerate().for_each(|(t, dots)| self.finish(r, t, dots));
        }
    }

    /// Many rows of x: weights are dequantised once per [`TOKENS`] of them.
    #[inline(always)]
    fn many<L: Lanes, S: Source>(&mut self, l: L, source: S) {
        let chunks = self.w.cols.div_ceil(LANES);
        let panels = chunks.div_ceil(TILE_CHUNKS).max(1);
        // All about as long: the sums are moved as often for a short panel as for a long one.
        let panel = chunks.div_ceil(panels).max(1);
        let mut weights = Aligned([[[0.0; LANES]; TILE_CHUNKS]; TILE_ROWS]);
        let mut lanes = Aligned([[[0.0; LANES]; TILE_ROWS]; TOKENS]);
        let (weights, lanes) = (&mut weights.0, &mut lanes.0);
        for r in (0..self.w.rows).step_by(TILE_ROWS) {
            let rows = TILE_ROWS.min(self.w.rows - r);
            for t in (0..self.x.count()).step_by(TOKENS) {
                let tokens = TOKENS.min(self.x.count() - t);
                for c in (0..chunks).step_by(panel) {
                    if t == 0 || panels > 1 {
                        for (i, weights) in weights[..rows].iter_mut().enumerate() {
                            dequantise(l, source.row(r + i), self.w.cols, c, &mut weights[..panel]);
                        }
                    }
                    let (row, chunk) = if c + panel < chunks { (r, c + panel) } else { (r + TILE_ROWS, 0) };
                    let next = |i: usize| (row + i < self.w.rows).then(|| source.row(row + i));
                    let next = [next(0), next(1), next(2), next(3)];
                    let next = next.each_ref().map(|row| match row {
                        Some(row) => row.bytes(chunk, panel),
                        None => &[],
                    });
                    l.enter(Accumulate {
                        x: self.x,
                        weights,
                        chunks: (c, panel),
                        tokens: (t, tokens),
                        next,
                        lanes,
                    });
                }
                for (i, lanes) in lanes[..tokens].iter().enumerate() {
                    let [a, b, c, d] = lanes;
                    let dots = l.sum4([l.load(a), l.load(b), l.load(c), l.load(d)]);
                    self.finish(r, t + i, &dots[..rows]);
                }
            }
        }
    }

    #[inline(always)]
    fn finish(&mut self, r: usize, t: usize, dots: &[f32]) {
        let out = &mut self.out.row(t)[r..][..dots.len()];
        match self.bias {
            Some(bias) => out.iter_mut().zip(dots).zip(&bias[r..]).for_each(|((o, d), b)| *o = d + b),
            None => out.copy_from_slice(dots),
        }
    }
}

/// Weight rows of a tile, dequantised and filled with zeros to whole chunks.
type TileWeights = [[[f32; LANES]; TILE_CHUNKS]; TILE_ROWS];

/// Adds the products of some chunks of weights to the lanes of some rows of x. No format is left here.
struct Accumulate<'a, 'l> {
    x: Input<'a>,
    weights: &'l TileWeights,
    /// First chunk, of those the weights hold, and how many at most.
    chunks: (usize, usize),
    /// First row of x, and how many.
    tokens: (usize, usize),
    /// What will be dequantised next, of each row.
    next: [&'l [u8]; TILE_ROWS],
    lanes: &'l mut [TileLanes; TOKENS],
}

impl Work for Accumulate<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let (first, count) = self.tokens;
        let row = |t: usize| &self.x.row(first + t)[self.chunks.0 * LANES..];
        let mut t = 0;
        while t < count {
            // Rather 2 + 2 than 3 + 1: a single row waits for its sums.
            let tokens = match count - t {
                n @ (1 | 2) => n,
                4 => 2,
                _ => TILE_TOKENS,
            };
            // Each tile of rows of x fetches its share of the next weights.
            let fetch = t * TILE_ROWS / count..(t + tokens) * TILE_ROWS / count;
            let panel = Panel { weights: self.weights, chunks: self.chunks, next: &self.next[fetch] };
            match tokens {
                1 => panel.add(l, [row(t)], rows_of(self.lanes, t)),
                2 => panel.add(l, [row(t), row(t + 1)], rows_of(self.lanes, t)),
                _ => panel.add(l, [row(t), row(t + 1), row(t + 2)], rows_of(self.lanes, t)),
            }
            t += tokens;
        }
    }
}

/// The products of some rows of x with some weight rows, all in registers.
#[inline(always)]
pub(crate) fn dots<L: Lanes, W: Row, const R: usize, const T: usize>(
    l: L,
    rows: [W; R],
    x: [&[f32]; T],
) -> [[f32; R]; T] {
    let x = x.map(|x| x.as_chunks::<LANES>());
    let mut lanes = [[l.splat(0.0); R]; T];
    for c in 0..x[0].0.len() {
        let mut v = [l.splat(0.0); T];
        for (v, (chunks, _)) in v.iter_mut().zip(x) {
            *v = l.load(&chunks[c]);
        }
        for (r, row) in rows.iter().enumerate() {
            let w = row.chunk(l, c);
            for (lanes, v) in lanes.iter_mut().zip(v) {
                lanes[r] = l.fma(w, v, lanes[r]);
            }
        }
    }
    if !x[0].1.is_empty() {
        for (lanes, (_, rest)) in lanes.iter_mut().zip(x) {
            let v = l.load(&padded(rest, 0.0));
            for (lanes, row) in lanes.iter_mut().zip(&rows) {
                *lanes = l.fma(row.tail(l), v, *lanes);
            }
        }
    }
    let mut out = [[0.0; R]; T];
    let (fours, rest) = lanes.as_flattened().as_chunks::<4>();
    let sums = out.as_flattened_mut();
    for (sums, lanes) in sums.chunks_mut(4).zip(fours) {
        sums.copy_from_slice(&l.sum4(*lanes));
    }
    for (sum, lanes) in sums[4 * fours.len()..].iter_mut().zip(rest) {
        *sum = l.sum(*lanes);
    }
    out
}

/// Columns `32 * chunk ..` of a row of `cols` columns, as many as `out` holds, the last filled with zeros.
#[inline(always)]
pub(super) fn dequantise<L: Lanes, W: Row>(
    l: L,
    row: W,
    cols: usize,
    chunk: usize,
    out: &mut [[f32; LANES]],
) {
    let whole = (cols / LANES).saturating_sub(chunk).min(out.len());
    let (chunks, rest) = out.split_at_mut(whole);
    for (c, out) in chunks.iter_mut().enumerate() {
        l.store(row.chunk(l, chunk + c), out);
    }
    if let Some(out) = rest.first_mut()
        && (chunk + whole) * LANES < cols
    {
        l.store(row.tail(l), out);
    }
}

/// `T` of the rows from `t` on. (A length known to the compiler keeps their sums in registers.)
#[inline(always)]
fn rows_of<V, const T: usize>(lanes: &mut [V], t: usize) -> &mut [V; T] {
    lanes[t..].first_chunk_mut().expect("the caller counted")
}

/// Some dequantised chunks of a tile of weight rows.
struct Panel<'l> {
    weights: &'l TileWeights,
    /// Which chunk of the rows the first is, and how many there are at most.
    chunks: (usize, usize),
    /// What will be dequantised next, to be fetched meanwhile.
    next: &'l [&'l [u8]],
}

impl Panel<'_> {
    /// Adds to `lanes[t][r]` the products of `x[t]`, which begins at the first chunk, with weight row r; to
    /// nothing at the beginning of a row.
    #[inline(always)]
    fn add<L: Lanes, const T: usize>(&self, l: L, x: [&[f32]; T], lanes: &mut [TileLanes; T]) {
        let (first, count) = self.chunks;
        let whole = count.min(x[0].len() / LANES);
        let rest = if whole < count { x[0].len() % LANES } else { 0 };
        let chunks = x.map(|x| &x.as_chunks::<LANES>().0[..whole]);
        let weights: [_; TILE_ROWS] = std::array::from_fn(|r| &self.weights[r][..whole]);
        for part in 0..L::PARTS {
            let mut sums = [[l.splat_part(0.0); TILE_ROWS]; T];
            if first > 0 {
                for (sum, lanes) in sums.as_flattened_mut().iter_mut().zip(lanes.as_flattened()) {
                    *sum = l.load_part(lanes, part);
                }
            }
            for c in 0..whole {
                if part == 0 {
                    for bytes in self.next {
                        l.prefetch(bytes, c * 64);
                    }
                }
                add_chunk(l, part, weights.map(|w| &w[c]), chunks.map(|x| &x[c]), &mut sums);
            }
            if rest > 0 {
                let x = x.map(|x| padded(&x[whole * LANES..], 0.0));
                add_chunk(l, part, self.weights.each_ref().map(|w| &w[whole]), x.each_ref(), &mut sums);
            }
            for (sum, lanes) in sums.as_flattened().iter().zip(lanes.as_flattened_mut()) {
                l.store_part(*sum, lanes, part);
            }
        }
    }
}

#[inline(always)]
fn add_chunk<L: Lanes, const T: usize>(
    l: L,
    part: usize,
    weights: [&[f32; LANES]; TILE_ROWS],
    x: [&[f32; LANES]; T],
    sums: &mut [[L::Part; TILE_ROWS]; T],
) {
    let mut v = [l.splat_part(0.0); T];
    for (v, x) in v.iter_mut().zip(x) {
        *v = l.load_part(x, part);
    }
    for (r, weights) in weights.iter().enumerate() {
        let w = l.load_part(weights, part);
        for (sums, v) in sums.iter_mut().zip(v) {
            sums[r] = l.fma_part(w, v, sums[r]);
        }
    }
}

/// One row as f32, exactly.
pub(crate) struct Dequantise<'a> {
    pub(crate) w: Matrix<'a>,
    pub(crate) row: usize,
    pub(crate) out: &'a mut [f32],
}

impl Work for Dequantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        with_source!(self.w, source => {
            let row = source.row(self.row);
            let (chunks, rest) = self.out.as_chunks_mut::<LANES>();
            for (c, out) in chunks.iter_mut().enumerate() {
                l.store(row.chunk(l, c), out);
            }
            if !rest.is_empty() {
                let mut last = [0.0; LANES];
                l.store(row.tail(l), &mut last);
                rest.copy_from_slice(&last[..rest.len()]);
            }
        })
    }
}
