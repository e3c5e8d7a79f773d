//! Products with weights of floats of few bits: bf16 and FP8.
//!
//! For up to sixteen rows of x sixteen weight rows are transposed in registers, as for integer products
//! ([`crate::quantised`]), so that a lane is a weight row; for more a lane is a row of x. Nothing is summed across
//! lanes. Sums are in the same order for any number of rows of x, threads and on every instruction set: a group of 32
//! columns is one chain of fused multiply-adds from zero, in the order 1, 0, 3, 2, ..., and is then added to the groups
//! before it: of FP8 by one more multiply-add with the scale of its block, so that codes stay exact. (Pairs with the second
//! value first are what `vdpbf16ps` does.)

mod codes;
mod some;

use std::hint::black_box;
use std::marker::PhantomData;

use self::codes::{Bf16, Code, CodeRows, E4m3};
use self::some::{SOME, SomeRows};
use super::tile::Input;
use crate::format::{GROUP, Matrix, Values};
use crate::quantised::PANEL;
use crate::rows::{Bands, Cut, RowsMut, for_each_part};
use crate::simd::Isa;
use crate::simd::dots::{DotWork, Dots, InnerWork, LINE, ROWS, block};

/// Rows of x that are multiplied with codes as they come from memory.
pub(crate) const FEW: usize = 4;
/// Vectors of a panel of rows of x.
const VECTORS: usize = PANEL / ROWS;
/// Groups taken at a time: of 64 rows of x they are 32 KiB, which stay in the first cache.
const CHUNK: usize = 4;
/// Lines that a weight row read from end to end is asked for ahead.
const AHEAD: usize = 6;
/// Weight rows multiplied together at most, and for which columns of x are transposed once; their sums, 48 KiB, are
/// read and written once per chunk.
const TILE: usize = 12;
const AT_ONCE: usize = 16 * TILE;

/// `out[t, r] = dot(x[t], w[r]) (+ bias[r])` with w in bf16 or FP8, all of it on this thread.
pub(crate) struct RowProduct<'a> {
    pub(crate) x: Input<'a>,
    /// The same rows as [`pack_columns`] leaves them, perhaps.
    pub(crate) packed: Option<&'a [u32]>,
    pub(crate) w: Matrix<'a>,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) out: RowsMut<'a>,
}

impl DotWork for RowProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        match self.w.values {
            Values::Fp8 { .. } => self.of::<D, E4m3>(d),
            _ => self.of::<D, Bf16>(d),
        }
    }
}

impl RowProduct<'_> {
    #[inline(always)]
    fn of<D: Dots, C: Code>(self, d: D) {
        let rows = CodeRows::new(&self.w);
        if self.x.count() <= FEW {
            d.call(FewRows::<C> { product: self, rows, code: PhantomData });
        } else {
            d.call(ManyRows::<C> { product: self, rows, code: PhantomData });
        }
    }
}

/// Up to [`FEW`] rows of x: weights are read row block by row block, which the memory likes best.
struct FewRows<'a, C> {
    product: RowProduct<'a>,
    rows: CodeRows<'a>,
    code: PhantomData<C>,
}

impl<D: Dots, C: Code> InnerWork<D> for FewRows<'_, C> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { mut product, rows, .. } = self;
        let x = product.x;
        for row in (0..rows.rows).step_by(ROWS) {
            let mut sums = [d.zero(); FEW];
            // The sixteen rows after these follow them: they are read in order while these are worked on.
            let ahead = (row + ROWS) * rows.stride;
            for first in (0..rows.groups).step_by(C::GROUPS) {
                let at = first / C::GROUPS * LINE;
                let dwords = rows.line::<D, C>(d, row, first);
                if row == 0 {
                    // Nothing asked for the first rows.
                    rows.ask(d, at + AHEAD * LINE);
                }
                for g in 0..C::GROUPS.min(rows.groups - first) {
                    let group = first + g;
                    let part = 16 / C::GROUPS * g;
                    let scale = rows.scales(d, row, group);
                    let line = Columns {
                        dwords: &dwords[part..][..16 / C::GROUPS],
                        scale,
                        ahead: rows.bytes,
                        at: ahead + at + part * rows.stride,
                        step: rows.stride,
                    };
                    let x = |t: usize| &x.row(t)[group * GROUP..];
                    match product.x.count() {
                        1 => few::<D, C, 1>(d, line, [x(0)], &mut sums),
                        2 => few::<D, C, 2>(d, line, [x(0), x(1)], &mut sums),
                        3 => few::<D, C, 3>(d, line, [x(0), x(1), x(2)], &mut sums),
                        _ => few::<D, C, 4>(d, line, [x(0), x(1), x(2), x(3)], &mut sums),
                    }
                }
            }
            for (t, sum) in sums.iter().enumerate().take(product.x.count()) {
                block::store(d, &mut product.out, product.bias, (t, row), *sum);
            }
        }
    }
}

/// Many rows of x, in panels: now a lane is a row of x, which is transposed once per chunk for many weight rows,
/// while these are only widened. Each output is still the same chain.
struct ManyRows<'a, C> {
    product: RowProduct<'a>,
    rows: CodeRows<'a>,
    code: PhantomData<C>,
}

/// Sixteen rows of x at one column.
type Lanes = [u32; ROWS];
/// (Whole cache lines: one that lies across two costs a third of the speed.)
#[repr(align(64))]
struct Widened {
    values: [[f32; CHUNK * GROUP]; TILE],
    /// Of each row; a chunk is a block.
    scales: [f32; TILE],
}

impl<D: Dots, C: Code> InnerWork<D> for ManyRows<'_, C> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { mut product, rows, code } = self;
        // With packed rows of x each weight row is read from end to end, as the memory likes it.
        let at_once = if product.packed.is_some() { 2 * D::TOKENS.max(4) } else { AT_ONCE };
        let ahead = if product.packed.is_some() { AHEAD } else { CHUNK / C::GROUPS };
        let mut acc = [[d.zero(); VECTORS]; AT_ONCE];
        let mut gathered = [[0; ROWS]; CHUNK * GROUP * VECTORS];
        let mut weights = Widened { values: [[0.0; CHUNK * GROUP]; TILE], scales: [0.0; TILE] };
        for first in (0..product.x.count()).step_by(PANEL) {
            let tokens = PANEL.min(product.x.count() - first);
            if tokens <= SOME {
                d.call(SomeRows::<C> { product: &mut product, rows, first, tokens, code });
                continue;
            }
            let vectors = tokens.div_ceil(ROWS);
            let columns_of = rows.groups * GROUP;
            let panel = product.packed.map(|data| data[first * columns_of..].as_chunks::<ROWS>().0);
            for top in (0..rows.rows).step_by(at_once) {
                let here = at_once.min(rows.rows - top);
                acc[..here].fill([d.zero(); VECTORS]);
                for group in (0..rows.groups).step_by(CHUNK) {
                    let count = CHUNK.min(rows.groups - group);
                    let x = match panel {
                        Some(panel) => Pairs { lanes: panel, columns: columns_of, first: group * GROUP },
                        None => {
                            let columns_of = count * GROUP;
                            let out = &mut gathered[..columns_of * vectors];
                            columns(d, product.x.slice(first, tokens), group, columns_of, out);
                            Pairs { lanes: out, columns: columns_of, first: 0 }
                        }
                    };
                    let mut row = 0;
                    while row < here {
                        let tile = D::TOKENS.min(here - row);
                        rows.widen::<D, C>(d, (top + row, tile), (group, count), ahead, &mut weights);
                        let acc = &mut acc[row..];
                        d.call(ByTokens::<D, C> {
                            w: &weights,
                            rows: tile,
                            x,
                            groups: count,
                            vectors,
                            acc,
                            code,
                        });
                        row += tile;
                    }
                }
                for (b, acc) in acc[..here].chunks(ROWS).enumerate() {
                    for v in 0..vectors {
                        let mut sums = [[0.0; ROWS]; ROWS];
                        for (sums, acc) in sums.iter_mut().zip(acc) {
                            *sums = d.store(acc[v]);
                        }
                        for (t, sums) in
                            d.transpose_f32(&sums).into_iter().enumerate().take(tokens - v * ROWS)
                        {
                            let at = (first + v * ROWS + t, top + b * ROWS);
                            block::store(d, &mut product.out, product.bias, at, sums);
                        }
                    }
                }
            }
        }
    }
}

/// Dwords that [`pack_columns`] writes for `rows` rows of `columns`.
pub(crate) fn columns_len(rows: usize, columns: usize) -> usize {
    rows.next_multiple_of(ROWS) * columns.next_multiple_of(GROUP)
}

/// A panel of rows of x: two vectors of rows after two, of each column after column; the last may stand alone.
#[derive(Clone, Copy)]
struct Pairs<'a> {
    lanes: &'a [Lanes],
    columns: usize,
    /// First column of interest.
    first: usize,
}

impl<'a> Pairs<'a> {
    /// `V` vectors from the even vector `vector` on, of the columns of interest.
    #[inline(always)]
    fn of<const V: usize>(&self, vector: usize) -> &'a [[Lanes; V]] {
        self.lanes[vector * self.columns + V * self.first..].as_chunks().0
    }
}

/// Packs rows of x for [`RowProduct`], in panels; zeros for what is not there.
pub(crate) fn pack_columns(isa: Isa, x: Input<'_>, data: &mut [u32]) {
    let width = x.x.width().next_multiple_of(GROUP);
    let panels = data[..columns_len(x.count(), width)].chunks_mut(PANEL * width);
    for (panel, data) in panels.enumerate() {
        let x = x.slice(panel * PANEL, PANEL.min(x.count() - panel * PANEL));
        if x.count() <= SOME {
            some::pack(x, &mut data[..x.count() * width]);
            continue;
        }
        for (pair, data) in data.chunks_mut(2 * ROWS * width).enumerate() {
            let x = x.slice(pair * 2 * ROWS, (2 * ROWS).min(x.count() - pair * 2 * ROWS));
            let (len, vectors) = (data.len(), x.count().div_ceil(ROWS));
            let part = (16 * GROUP * vectors * ROWS).min(len);
            for_each_part(Cut::new(RowsMut::new(data, len), Bands::Every(1), part), &|part| {
                let group = part.first_column / (GROUP * vectors * ROWS);
                isa.run_dots(PackColumns { x, group, out: part.rows.into_slice() });
            });
        }
    }
}

/// Some groups of up to two vectors of rows.
struct PackColumns<'a> {
    x: Input<'a>,
    group: usize,
    out: &'a mut [u32],
}

impl DotWork for PackColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        let out = self.out.as_chunks_mut().0;
        let columns_of = out.len() / self.x.count().div_ceil(ROWS);
        columns(d, self.x, self.group, columns_of, out);
    }
}

/// `count` columns from `group` on of up to a panel of rows of x.
#[inline(always)]
fn columns<D: Dots>(d: D, x: Input<'_>, group: usize, count: usize, out: &mut [Lanes]) {
    let vectors = x.count().div_ceil(ROWS);
    for v in 0..vectors {
        let (pair, wide) = (v & !1, 2.min(vectors - (v & !1)));
        let out = &mut out[pair * count..];
        for half in 0..count / ROWS {
            let column = group * GROUP + half * ROWS;
            let mut block = [[0.0; ROWS]; ROWS];
            for (t, block) in block.iter_mut().enumerate().take(x.count() - v * ROWS) {
                match x.row(v * ROWS + t).get(column..).unwrap_or_default() {
                    x if x.len() >= ROWS => block.copy_from_slice(&x[..ROWS]),
                    x => block[..x.len()].copy_from_slice(x),
                }
            }
            let out = out[half * ROWS * wide + v - pair..].iter_mut().step_by(wide);
            for (out, column) in out.zip(d.transpose_f32(&block)) {
                *out = d.store(column).map(f32::to_bits);
            }
        }
    }
}

impl CodeRows<'_> {
    /// Some groups of some rows as f32, zeros after the last column; and their scales.
    #[inline(always)]
    fn widen<D: Dots, C: Code>(
        &self,
        d: D,
        (row, count): (usize, usize),
        (group, groups): (usize, usize),
        ahead: usize,
        out: &mut Widened,
    ) {
        let bytes = GROUP * C::BYTES;
        let (at, len) = (group * bytes, groups * bytes);
        for (r, out) in out.scales.iter_mut().enumerate().take(count) {
            *out = self.scale(row + r, group);
        }
        for (r, out) in out.values.iter_mut().enumerate().take(count) {
            let start = (row + r) * self.stride;
            let out = out.as_chunks_mut::<GROUP>().0;
            if at + len <= self.stride {
                let codes = self.bytes[start + at..][..len].chunks_exact(bytes);
                for (g, (codes, out)) in codes.zip(out).enumerate() {
                    if g % C::GROUPS == 0 {
                        d.prefetch(self.bytes, start + at + g * bytes + ahead * LINE);
                    }
                    C::widen(d, codes, out);
                }
            } else {
                for (g, out) in (group..group + groups).zip(out) {
                    let mut line = [0; LINE];
                    let rest = &self.bytes[start..][..self.stride][g * bytes..];
                    let here = rest.len().min(bytes);
                    line[..here].copy_from_slice(&rest[..here]);
                    C::widen(d, &line, out);
                }
            }
        }
    }
}

/// Adds the products of some weight rows, at most a tile, with a panel of x.
struct ByTokens<'a, D: Dots, C> {
    w: &'a Widened,
    rows: usize,
    x: Pairs<'a>,
    groups: usize,
    vectors: usize,
    acc: &'a mut [[D::F; VECTORS]],
    code: PhantomData<C>,
}

impl<D: Dots, C: Code> InnerWork<D> for ByTokens<'_, D, C> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { w, rows, x, groups, vectors, acc, code } = self;
        for first in (0..vectors).step_by(2) {
            macro_rules! tile {
                ($($n:literal)*) => {
                    match rows {
                        $($n => {
                            let (scales, acc) = (w.scales.first_chunk().expect("a tile"), block::first(acc));
                            let w = w.values.first_chunk().expect("a tile");
                            if vectors - first > 1 {
                                let x = &x.of(first)[..groups * GROUP];
                                d.call(TokenTile::<D, C, $n, 2> { w, scales, x, first, acc, code });
                            } else {
                                let x = &x.of(first)[..groups * GROUP];
                                d.call(TokenTile::<D, C, $n, 1> { w, scales, x, first, acc, code });
                            }
                        })*
                        _ => unreachable!("more rows than a tile holds"),
                    }
                };
            }
            tile!(1 2 3 4 5 6 7 8 9 10 11 12);
        }
    }
}

/// [`ByTokens`] of `R` weight rows and `V` vectors of rows of x, in registers.
struct TokenTile<'a, D: Dots, C, const R: usize, const V: usize> {
    w: &'a [[f32; CHUNK * GROUP]; R],
    scales: &'a [f32; R],
    x: &'a [[Lanes; V]],
    first: usize,
    acc: &'a mut [[D::F; VECTORS]; R],
    code: PhantomData<C>,
}

impl<D: Dots, C: Code, const R: usize, const V: usize> InnerWork<D> for TokenTile<'_, D, C, R, V> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { w, scales, x, first, acc, .. } = self;
        for (x, g) in x.as_chunks::<GROUP>().0.iter().zip(0..CHUNK) {
            // Left to itself the compiler keeps sums and accumulators in registers, more than there are.
            let acc = black_box(&mut *acc);
            let mut sums = [[d.zero(); V]; R];
            for (i, pair) in x.as_chunks::<2>().0.iter().enumerate() {
                for j in [1, 0] {
                    let mut x = [d.zero(); V];
                    for (x, lanes) in x.iter_mut().zip(&pair[j]) {
                        *x = d.load_f32(lanes);
                    }
                    for (sums, w) in sums.iter_mut().zip(w) {
                        let w = d.splat_f32(w[g * GROUP + 2 * i + j]);
                        for (sum, x) in sums.iter_mut().zip(x) {
                            *sum = d.fma(w, x, *sum);
                        }
                    }
                }
            }
            for ((sums, acc), scale) in sums.iter().zip(acc).zip(scales) {
                let acc: &mut [D::F; V] = block::first(&mut acc[first..]);
                for (sum, acc) in sums.iter().zip(acc) {
                    *acc = C::join(d, *acc, *sum, d.splat_f32(*scale));
                }
            }
        }
    }
}

/// One group of a block of rows.
struct Columns<'a, D: Dots> {
    dwords: &'a [D::I],
    scale: D::F,
    /// What is needed later: lines `step` bytes apart, the first at `at`.
    ahead: &'a [u8],
    at: usize,
    step: usize,
}

/// Adds the products of a group with `T` rows of x. (Of columns that are not there, weights and x are zero.)
#[inline(always)]
fn few<D: Dots, C: Code, const T: usize>(
    d: D,
    columns: Columns<'_, D>,
    x: [&[f32]; T],
    acc: &mut [D::F; FEW],
) {
    let mut rest = [[0.0; GROUP]; T];
    let mut groups = [&[0.0; GROUP]; T];
    for ((group, rest), x) in groups.iter_mut().zip(&mut rest).zip(x) {
        *group = match x.first_chunk() {
            Some(x) => x,
            None => {
                rest[..x.len()].copy_from_slice(x);
                rest
            }
        };
    }
    let mut sums = [d.zero(); T];
    for (k, dword) in columns.dwords.iter().enumerate() {
        d.prefetch(columns.ahead, columns.at + k * columns.step);
        let values = C::values(d, *dword);
        for (j, value) in values.into_iter().enumerate().take(C::COLUMNS) {
            for (sum, x) in sums.iter_mut().zip(groups) {
                // The second of a pair first.
                *sum = d.fma(value, d.splat_f32(x[C::COLUMNS * k + (j ^ 1)]), *sum);
            }
        }
    }
    for (sum, acc) in sums.into_iter().zip(acc) {
        *acc = C::join(d, *acc, sum, columns.scale);
    }
}
