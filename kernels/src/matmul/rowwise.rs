//! Products with bf16 weights.
//!
//! For few rows of x sixteen weight rows are transposed in registers, as for integer products ([`crate::quantised`]),
//! so that a lane is a weight row; for many a lane is a row of x. Nothing is summed across lanes. Sums are in the same
//! order for any number of rows of x, threads and on every instruction set: a group of 32 columns is one chain of
//! fused multiply-adds from zero, in the order 1, 0, 3, 2, ..., and is then added to the groups before it. (Pairs with the
//! second value first are what `vdpbf16ps` does.)

use std::hint::black_box;

use super::tile::Input;
use crate::format::{GROUP, Matrix, Values};
use crate::quantised::{PANEL, padded};
use crate::rows::{Bands, Cut, RowsMut, for_each_part};
use crate::simd::Isa;
use crate::simd::dots::{DotWork, Dots, InnerWork, LINE, ROWS};

/// Rows of x up to which a lane is a weight row.
pub(crate) const FEW: usize = 4;
/// Vectors of a panel of rows of x.
const VECTORS: usize = PANEL / ROWS;
/// Groups taken at a time: of 64 rows of x they are 16 KiB, which stay in the first cache.
const CHUNK: usize = 2;
/// Groups that a weight row read from end to end is asked for ahead.
const AHEAD: usize = 8;
/// Weight rows multiplied together at most, and for which columns of x are transposed once; their sums, 48 KiB, are
/// read and written once per chunk.
const TILE: usize = 12;
const AT_ONCE: usize = 16 * TILE;

/// `out[t, r] = dot(x[t], w[r]) (+ bias[r])` with w in bf16, all of it on this thread.
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
        let Values::Bf16(bytes) = self.w.values else { panic!("a weight that is not bf16") };
        let Matrix { first_row, rows, cols, .. } = self.w;
        let stride = 2 * cols;
        assert!(bytes.len() >= (first_row + rows) * stride, "{rows} rows of bf16");
        let rows = Bf16Rows { bytes: &bytes[first_row * stride..], rows, stride, groups: cols.div_ceil(GROUP) };
        if self.x.count() <= FEW {
            d.call(FewRows { product: self, rows });
        } else {
            d.call(ManyRows { product: self, rows });
        }
    }
}

/// The weight, from its first row on.
#[derive(Clone, Copy)]
struct Bf16Rows<'a> {
    bytes: &'a [u8],
    rows: usize,
    /// Bytes of a row.
    stride: usize,
    groups: usize,
}

impl Bf16Rows<'_> {
    /// The columns of one group of sixteen rows, pairs side by side; zeros for what is not there.
    #[inline(always)]
    fn line<D: Dots>(&self, d: D, row: usize, group: usize) -> [D::I; 16] {
        let (here, at) = (ROWS.min(self.rows - row), group * LINE);
        let block = &self.bytes[row * self.stride..];
        if here == ROWS && at + LINE <= self.stride {
            d.transpose(block, self.stride, at)
        } else {
            d.transpose(&padded(block, here, self.stride, at), LINE, 0)
        }
    }
}

/// Up to [`FEW`] rows of x: weights are read row block by row block, which the memory likes best.
struct FewRows<'a> {
    product: RowProduct<'a>,
    rows: Bf16Rows<'a>,
}

impl<D: Dots> InnerWork<D> for FewRows<'_> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { mut product, rows } = self;
        let x = product.x;
        for row in (0..rows.rows).step_by(ROWS) {
            let mut sums = [d.zero(); FEW];
            // The sixteen rows after these follow them: they are read in order while these are worked on.
            let ahead = (row + ROWS) * rows.stride;
            for group in 0..rows.groups {
                let dwords = rows.line(d, row, group);
                let line = Line { dwords, ahead: rows.bytes, at: ahead + group * ROWS * LINE };
                let x = |t: usize| &x.row(t)[group * GROUP..];
                match product.x.count() {
                    1 => few(d, line, [x(0)], &mut sums),
                    2 => few(d, line, [x(0), x(1)], &mut sums),
                    3 => few(d, line, [x(0), x(1), x(2)], &mut sums),
                    _ => few(d, line, [x(0), x(1), x(2), x(3)], &mut sums),
                }
            }
            for (t, sum) in sums.iter().enumerate().take(product.x.count()) {
                product.store(d, t, row, *sum);
            }
        }
    }
}

/// Many rows of x, in panels: now a lane is a row of x, which is transposed once per chunk for many weight rows,
/// while these are only widened. Each output is still the same chain.
struct ManyRows<'a> {
    product: RowProduct<'a>,
    rows: Bf16Rows<'a>,
}

/// Sixteen rows of x at one column.
type Lanes = [u32; ROWS];
type Widened = [[f32; CHUNK * GROUP]; TILE];

impl<D: Dots> InnerWork<D> for ManyRows<'_> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { mut product, rows } = self;
        // With packed rows of x each weight row is read from end to end, as the memory likes it.
        let at_once = if product.packed.is_some() { D::TOKENS } else { AT_ONCE };
        let ahead = if product.packed.is_some() { AHEAD } else { CHUNK };
        let mut acc = [[d.zero(); VECTORS]; AT_ONCE];
        let mut gathered = [[0; ROWS]; CHUNK * GROUP * VECTORS];
        let mut weights: Widened = [[0.0; CHUNK * GROUP]; TILE];
        for first in (0..product.x.count()).step_by(PANEL) {
            let tokens = PANEL.min(product.x.count() - first);
            let vectors = tokens.div_ceil(ROWS);
            let panel = product.packed.map(|data| data[first * rows.groups * GROUP..].as_chunks::<ROWS>().0);
            for top in (0..rows.rows).step_by(at_once) {
                let here = at_once.min(rows.rows - top);
                acc[..here].fill([d.zero(); VECTORS]);
                for group in (0..rows.groups).step_by(CHUNK) {
                    let count = CHUNK.min(rows.groups - group);
                    let x = match panel {
                        Some(panel) => &panel[group * GROUP * vectors..][..count * GROUP * vectors],
                        None => {
                            let out = &mut gathered[..count * GROUP * vectors];
                            columns(d, product.x.slice(first, tokens), group, out);
                            out
                        }
                    };
                    let mut row = 0;
                    while row < here {
                        let tile = D::TOKENS.min(here - row);
                        rows.widen(d, (top + row, tile), (group, count), ahead, &mut weights);
                        let acc = &mut acc[row..];
                        d.call(ByTokens { w: &weights, rows: tile, x, vectors, acc });
                        row += tile;
                    }
                }
                for (r, acc) in acc[..here].iter().enumerate() {
                    for (v, acc) in acc[..vectors].iter().enumerate() {
                        for (t, sum) in d.store(*acc).iter().enumerate().take(tokens - v * ROWS) {
                            // Without a bias nothing is added: -0.0 + 0.0 is another value.
                            let sum = product.bias.map_or(*sum, |bias| sum + bias[top + r]);
                            product.out.row(first + v * ROWS + t)[top + r] = sum;
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

/// Packs rows of x for [`RowProduct`], in panels: column after column, the rows of each side by side; zeros for what
/// is not there.
pub(crate) fn pack_columns(isa: Isa, x: Input<'_>, data: &mut [u32]) {
    let width = x.x.width().next_multiple_of(GROUP);
    let panels = data[..columns_len(x.count(), width)].chunks_mut(PANEL * width);
    for (panel, data) in panels.enumerate() {
        let x = x.slice(panel * PANEL, PANEL.min(x.count() - panel * PANEL));
        let (len, vectors) = (data.len(), x.count().div_ceil(ROWS));
        let part = (16 * GROUP * vectors * ROWS).min(len);
        for_each_part(Cut::new(RowsMut::new(data, len), Bands::Every(1), part), &|part| {
            let group = part.first_column / (GROUP * vectors * ROWS);
            isa.run_dots(PackColumns { x, group, out: part.rows.into_slice() });
        });
    }
}

/// Some groups of a panel.
struct PackColumns<'a> {
    x: Input<'a>,
    group: usize,
    out: &'a mut [u32],
}

impl DotWork for PackColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        columns(d, self.x, self.group, self.out.as_chunks_mut().0);
    }
}

/// Columns from `group` on of up to a panel of rows of x, as many as `out` holds.
#[inline(always)]
fn columns<D: Dots>(d: D, x: Input<'_>, group: usize, out: &mut [Lanes]) {
    let vectors = x.count().div_ceil(ROWS);
    for (half, out) in out.chunks_mut(ROWS * vectors).enumerate() {
        let at = group * GROUP + half * ROWS;
        for v in 0..vectors {
            let mut block = [[0.0; ROWS]; ROWS];
            for (t, block) in block.iter_mut().enumerate().take(x.count() - v * ROWS) {
                match x.row(v * ROWS + t).get(at..).unwrap_or_default() {
                    x if x.len() >= ROWS => block.copy_from_slice(&x[..ROWS]),
                    x => block[..x.len()].copy_from_slice(x),
                }
            }
            for (out, column) in out[v..].iter_mut().step_by(vectors).zip(d.transpose_f32(&block)) {
                *out = d.store(column).map(f32::to_bits);
            }
        }
    }
}

impl Bf16Rows<'_> {
    /// Some groups of some rows as f32, zeros after the last column.
    #[inline(always)]
    fn widen<D: Dots>(
        &self,
        d: D,
        (row, count): (usize, usize),
        (group, groups): (usize, usize),
        ahead: usize,
        out: &mut Widened,
    ) {
        for (r, out) in out.iter_mut().enumerate().take(count) {
            let start = (row + r) * self.stride;
            let line = &self.bytes[start..][..self.stride];
            for g in group..group + groups {
                d.prefetch(self.bytes, start + (g + ahead) * LINE);
            }
            for (g, out) in (group..group + groups).zip(out.as_chunks_mut::<GROUP>().0) {
                match line[g * LINE..].first_chunk::<LINE>() {
                    Some(line) => d.widen_bf16(line, out),
                    None => {
                        let mut padded = [0; LINE];
                        let rest = &line[g * LINE..];
                        padded[..rest.len()].copy_from_slice(rest);
                        d.widen_bf16(&padded, out);
                    }
                }
            }
        }
    }
}

/// Adds the products of some weight rows, at most a tile, with a panel of x.
struct ByTokens<'a, D: Dots> {
    w: &'a Widened,
    rows: usize,
    /// Column after column, `vectors` of each.
    x: &'a [Lanes],
    vectors: usize,
    acc: &'a mut [[D::F; VECTORS]],
}

impl<D: Dots> InnerWork<D> for ByTokens<'_, D> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { w, rows, x, vectors, acc } = self;
        for first in (0..vectors).step_by(2) {
            macro_rules! tile {
                ($($n:literal)*) => {
                    match rows {
                        $($n => {
                            let (w, acc) = (w.first_chunk().expect("a tile"), part(acc));
                            if vectors - first > 1 {
                                d.call(TokenTile::<D, $n, 2> { w, x, vectors, first, acc });
                            } else {
                                d.call(TokenTile::<D, $n, 1> { w, x, vectors, first, acc });
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

/// `T` of the accumulators. (A length known to the compiler saves it checks.)
#[inline(always)]
fn part<V, const T: usize>(acc: &mut [V]) -> &mut [V; T] {
    acc.first_chunk_mut().expect("the caller counted")
}

/// [`ByTokens`] of `R` weight rows and `V` vectors of rows of x, in registers.
struct TokenTile<'a, D: Dots, const R: usize, const V: usize> {
    w: &'a [[f32; CHUNK * GROUP]; R],
    x: &'a [Lanes],
    vectors: usize,
    first: usize,
    acc: &'a mut [[D::F; VECTORS]; R],
}

impl<D: Dots, const R: usize, const V: usize> InnerWork<D> for TokenTile<'_, D, R, V> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { w, x, vectors, first, acc } = self;
        for (x, g) in x.chunks_exact(GROUP * vectors).zip(0..CHUNK) {
            // Left to itself the compiler keeps sums and accumulators in registers, more than there are.
            let acc = black_box(&mut *acc);
            let mut sums = [[d.zero(); V]; R];
            for i in 0..GROUP {
                let lanes: &[Lanes; V] = x[(i ^ 1) * vectors + first..].first_chunk().expect("a panel's vectors");
                let mut x = [d.zero(); V];
                for (x, lanes) in x.iter_mut().zip(lanes) {
                    *x = d.load_f32(lanes);
                }
                for (sums, w) in sums.iter_mut().zip(w) {
                    let w = d.splat_f32(w[g * GROUP + (i ^ 1)]);
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = d.fma(w, x, *sum);
                    }
                }
            }
            for (sums, acc) in sums.iter().zip(acc) {
                let acc: &mut [D::F; V] = part(&mut acc[first..]);
                for (sum, acc) in sums.iter().zip(acc) {
                    *acc = d.add(*acc, *sum);
                }
            }
        }
    }
}

impl RowProduct<'_> {
    /// Sixteen outputs of row `t`, from column `row` on, as far as they exist.
    #[inline(always)]
    fn store<D: Dots>(&mut self, d: D, t: usize, row: usize, sums: D::F) {
        let count = ROWS.min(self.w.rows.saturating_sub(row));
        if count == 0 {
            return;
        }
        let out = &mut self.out.row(t)[row..][..count];
        let sums = d.store(sums);
        match out.as_mut_array::<ROWS>() {
            Some(out) => *out = sums,
            None => out.copy_from_slice(&sums[..count]),
        }
        if let Some(bias) = self.bias {
            out.iter_mut().zip(&bias[row..]).for_each(|(o, b)| *o += b);
        }
    }
}

/// One line of a block of rows: 32 columns.
struct Line<'a, D: Dots> {
    dwords: [D::I; 16],
    /// What is needed later: sixteen lines, the first at `at`.
    ahead: &'a [u8],
    at: usize,
}

/// The two columns of a dword, the second first.
#[inline(always)]
fn pair<D: Dots>(d: D, dword: D::I) -> [D::F; 2] {
    [d.as_f32(d.and(dword, d.splat(0xFFFF_0000))), d.as_f32(d.shl::<16>(dword))]
}

/// Adds the products of a line with `T` rows of x. (Of columns that are not there, weights and x are zero.)
#[inline(always)]
fn few<D: Dots, const T: usize>(d: D, line: Line<'_, D>, x: [&[f32]; T], acc: &mut [D::F; FEW]) {
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
    for (k, dword) in line.dwords.into_iter().enumerate() {
        d.prefetch(line.ahead, line.at + k * LINE);
        let [second, first] = pair(d, dword);
        for (sum, x) in sums.iter_mut().zip(groups) {
            *sum = d.fma(second, d.splat_f32(x[2 * k + 1]), *sum);
            *sum = d.fma(first, d.splat_f32(x[2 * k]), *sum);
        }
    }
    for (sum, acc) in sums.into_iter().zip(acc) {
        *acc = d.add(*acc, sum);
    }
}
