//! Sixteen or thirty-two weight rows against a panel of x, on one thread.

use std::hint::black_box;

use super::codes::{self, Code, Int4, MAX_SCALES, Mxfp4, Q8, SCALES, group_bytes};
use super::packed::{PANEL, Panel, Precision};
use crate::format::{GROUP, Matrix, Values};
use crate::rows::RowsMut;
use crate::simd::dots::block::{self, Ahead};
use crate::simd::dots::{DotWork, Dots, InnerWork, LINE, ROWS};

/// Row blocks multiplied together.
const BLOCKS: usize = 2;
/// Lines that the first rows of a product are asked for ahead.
const AHEAD: usize = 6;

/// `out[t, r] = dot(x[t], w[r]) (+ bias[r])`, all of it on this thread.
pub(crate) struct Product<'a> {
    pub(crate) w: Matrix<'a>,
    pub(crate) x: Panel<'a>,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) out: RowsMut<'a>,
}

impl DotWork for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        match (self.w.values, self.x.precision) {
            (Values::Int4 { .. }, Precision::Int16) => d.enter(Typed::<Int4, Words>::new(self)),
            (Values::Int4 { .. }, Precision::Int8) => d.enter(Typed::<Int4, Bytes>::new(self)),
            (Values::Mxfp4 { .. }, Precision::Int16) => d.enter(Typed::<Mxfp4, Words>::new(self)),
            (Values::Mxfp4 { .. }, Precision::Int8) => d.enter(Typed::<Mxfp4, Bytes>::new(self)),
            (Values::Q8 { .. }, Precision::Int16) => d.enter(Typed::<Q8, Words>::new(self)),
            (Values::Q8 { .. }, Precision::Int8) => d.enter(Typed::<Q8, Bytes>::new(self)),
            _ => panic!("a weight of floats in an integer product"),
        }
    }
}

/// How activations are multiplied.
trait Width: Copy {
    /// One packed group of one row of x: values, start of the sum, scale.
    type Group: AsRef<[u32]> + Copy;
    /// Dwords of values.
    const VALUES: usize;
    /// A group that adds nothing.
    const NOTHING: Self::Group;
    /// Registers that a dword register of codes becomes.
    fn count<C: Code>() -> usize;
    /// They; only the first [`Width::count`] count.
    fn unpack<D: Dots, C: Code>(d: D, dwords: D::I) -> [D::I; 4];
    fn dot<D: Dots, const WIDE: bool>(d: D, sum: D::I, w: D::I, x: D::I) -> D::I;
    fn groups(data: &[u32]) -> &[Self::Group];
}

#[derive(Clone, Copy)]
struct Words;

impl Width for Words {
    type Group = [u32; Precision::Int16.group()];
    const VALUES: usize = Precision::Int16.values();
    const NOTHING: Self::Group = [0; Precision::Int16.group()];
    #[inline(always)]
    fn count<C: Code>() -> usize {
        C::WORDS
    }
    #[inline(always)]
    fn unpack<D: Dots, C: Code>(d: D, dwords: D::I) -> [D::I; 4] {
        C::words(d, dwords)
    }
    #[inline(always)]
    fn dot<D: Dots, const WIDE: bool>(d: D, sum: D::I, w: D::I, x: D::I) -> D::I {
        d.dot_words(sum, w, x)
    }
    #[inline(always)]
    fn groups(data: &[u32]) -> &[Self::Group] {
        data.as_chunks().0
    }
}

#[derive(Clone, Copy)]
struct Bytes;

impl Width for Bytes {
    type Group = [u32; Precision::Int8.group()];
    const VALUES: usize = Precision::Int8.values();
    const NOTHING: Self::Group = [0; Precision::Int8.group()];
    #[inline(always)]
    fn count<C: Code>() -> usize {
        C::BYTES
    }
    #[inline(always)]
    fn unpack<D: Dots, C: Code>(d: D, dwords: D::I) -> [D::I; 4] {
        let [a, b] = C::bytes(d, dwords);
        [a, b, a, b]
    }
    #[inline(always)]
    fn dot<D: Dots, const WIDE: bool>(d: D, sum: D::I, w: D::I, x: D::I) -> D::I {
        d.dot_bytes::<WIDE>(sum, w, x)
    }
    #[inline(always)]
    fn groups(data: &[u32]) -> &[Self::Group] {
        data.as_chunks().0
    }
}

/// Sixteen consecutive weight rows, or as many as there are.
#[derive(Clone, Copy)]
struct Block<'a> {
    /// Codes and scales from the first of the rows on.
    codes: &'a [u8],
    scales: &'a [u8],
    rows: usize,
}

/// A product with the format known.
struct Typed<'a, C, W> {
    product: Product<'a>,
    codes: &'a [u8],
    scales: &'a [u8],
    groups: usize,
    kinds: std::marker::PhantomData<(C, W)>,
}

type Scales<F> = [[F; BLOCKS]; MAX_SCALES];

impl<'a, C: Code, W: Width> Typed<'a, C, W> {
    fn new(product: Product<'a>) -> Self {
        let Matrix { first_row, rows, cols, .. } = product.w;
        assert!(cols.is_multiple_of(GROUP), "{cols} columns are not whole groups of {GROUP}");
        let groups = cols / GROUP;
        let (codes, scales) = codes::bytes(&product.w);
        let (row, scale_row) = (groups * group_bytes::<C>(), groups * C::SCALE);
        assert!(codes.len() >= (first_row + rows) * row, "codes of {rows} rows");
        assert!(scales.len() >= (first_row + rows) * scale_row, "scales of {rows} rows");
        assert!(product.x.rows <= PANEL && product.out.count() == product.x.rows, "rows of a panel");
        assert!(W::groups(product.x.data).len() == groups * product.x.rows, "columns of x");
        let (codes, scales) = (&codes[first_row * row..], &scales[first_row * scale_row..]);
        Self { product, codes, scales, groups, kinds: std::marker::PhantomData }
    }

    fn block(&self, row: usize) -> Block<'a> {
        let rows = self.product.w.rows.saturating_sub(row).min(ROWS);
        let at = row.min(self.product.w.rows);
        Block {
            codes: &self.codes[at * self.groups * group_bytes::<C>()..],
            scales: &self.scales[at * self.groups * C::SCALE..],
            rows,
        }
    }
}

impl<C: Code, W: Width> DotWork for Typed<'_, C, W> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dots>(self, d: D) {
        match self.product.x.rows {
            1 => d.call(FewRows::<C, W, 1>(self)),
            2 => d.call(FewRows::<C, W, 2>(self)),
            // Of words, twice as many as bytes, three rows are quicker with the scratch.
            3 => d.call(FewRows::<C, W, 3>(self)),
            4 => d.call(FewRows::<C, W, 4>(self)),
            _ => d.call(ManyRows(self)),
        }
    }
}

/// `T` rows of x: codes are used from the registers they are unpacked in.
struct FewRows<'a, C, W, const T: usize>(Typed<'a, C, W>);

impl<D: Dots, C: Code, W: Width, const T: usize> InnerWork<D> for FewRows<'_, C, W, T> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self(mut typed) = self;
        let (x, _) = W::groups(typed.product.x.data).as_chunks::<T>();
        let nothing = [W::NOTHING; T];
        let stride = typed.groups * group_bytes::<C>();
        let mut scales = [[d.zero(); 4]; SCALES / 4];
        let per = 4 / C::SCALE;
        for row in (0..typed.product.w.rows).step_by(ROWS) {
            let block = typed.block(row);
            let mut acc = [d.zero(); T];
            for first in (0..typed.groups).step_by(SCALES / C::SCALE) {
                let end = typed.groups.min(first + SCALES / C::SCALE);
                typed.scales(d, block, first, &mut scales);
                for group in (first..end).step_by(C::GROUPS) {
                    let at = group * group_bytes::<C>();
                    if row == 0 {
                        // Nothing asked for the first rows.
                        for r in 0..ROWS {
                            d.prefetch(block.codes, r * stride + at + AHEAD * LINE);
                        }
                    }
                    // The sixteen rows after these, four parts of them side by side.
                    let ahead = Ahead::<1> { codes: block.codes, stride, at };
                    for line in 0..ROWS {
                        ahead.ask(d, line);
                    }
                    let mut line =
                        Line { dwords: typed.line(d, block, at), x: [&nothing; 4], scales: [d.zero(); 4] };
                    for g in 0..C::GROUPS {
                        // The last line may hold fewer groups, and after them what is of no use.
                        if let Some(x) = x.get(group + g) {
                            line.x[g] = x;
                            line.scales[g] = scales[(group - first) / per + g / per][g % per];
                        }
                    }
                    line.multiply::<C, W>(d, &mut acc);
                }
            }
            for (t, acc) in acc.iter().enumerate() {
                block::store(d, &mut typed.product.out, typed.product.bias, (t, row), *acc);
            }
        }
    }
}

/// One line of sixteen rows, and what it is multiplied with.
struct Line<'a, D: Dots, G, const T: usize> {
    dwords: [D::I; 16],
    /// Of each group; [`Code::GROUPS`] of them count.
    x: [&'a [G; T]; 4],
    scales: [D::F; 4],
}

impl<D: Dots, G: AsRef<[u32]>, const T: usize> Line<'_, D, G, T> {
    #[inline(always)]
    fn multiply<C: Code, W: Width>(&self, d: D, acc: &mut [D::F; T]) {
        // As many sums side by side as registers hold, so that none waits for another.
        match (C::GROUPS, T) {
            (4, 1) => self.groups::<C, W, 4, 2>(d, 0, acc),
            (_, 1) => self.groups::<C, W, 2, 2>(d, 0, acc),
            _ => {
                for first in (0..C::GROUPS).step_by(2) {
                    self.groups::<C, W, 2, 1>(d, first, acc);
                }
            }
        }
    }

    /// `G` groups from `first` on, with `CHAINS` sums each for every row of x.
    #[inline(always)]
    fn groups<C: Code, W: Width, const GROUPS: usize, const CHAINS: usize>(
        &self,
        d: D,
        first: usize,
        acc: &mut [D::F; T],
    ) {
        let dwords = 16 / C::GROUPS;
        let x = &self.x[first..][..GROUPS];
        let mut sums = [[[d.splat(0); CHAINS]; T]; GROUPS];
        for (sums, x) in sums.iter_mut().zip(x) {
            for (sums, x) in sums.iter_mut().zip(*x) {
                sums[0] = d.splat(x.as_ref()[W::VALUES]);
            }
        }
        for k in 0..dwords {
            for (g, (sums, x)) in sums.iter_mut().zip(x).enumerate() {
                let codes = W::unpack::<D, C>(d, self.dwords[(first + g) * dwords + k]);
                for (j, codes) in codes.iter().take(W::count::<C>()).enumerate() {
                    for (sums, x) in sums.iter_mut().zip(*x) {
                        let x = d.splat(x.as_ref()[k * W::count::<C>() + j]);
                        let sum = &mut sums[j % CHAINS];
                        *sum = if C::WIDE {
                            W::dot::<D, true>(d, *sum, *codes, x)
                        } else {
                            W::dot::<D, false>(d, *sum, *codes, x)
                        };
                    }
                }
            }
        }
        for ((sums, x), weight_scale) in sums.iter().zip(x).zip(&self.scales[first..]) {
            for ((sums, x), acc) in sums.iter().zip(*x).zip(&mut *acc) {
                let mut sum = sums[0];
                for chain in &sums[1..] {
                    sum = d.add_i32(sum, *chain);
                }
                let scale = d.splat_f32(f32::from_bits(x.as_ref()[W::VALUES + 1]));
                *acc = d.fma(d.to_f32(sum), d.mul(*weight_scale, scale), *acc);
            }
        }
    }
}

/// More rows of x: two blocks of codes are expanded, and multiplied with all rows of x.
struct ManyRows<'a, C, W>(Typed<'a, C, W>);

impl<D: Dots, C: Code, W: Width> InnerWork<D> for ManyRows<'_, C, W> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self(mut typed) = self;
        let rows = typed.product.w.rows;
        let x = W::groups(typed.product.x.data);
        let tokens = typed.product.x.rows;
        let stride = typed.groups * group_bytes::<C>();
        let scales_at_once = SCALES / C::SCALE;
        let mut scales: Scales<D::F> = [[d.zero(); BLOCKS]; MAX_SCALES];
        let mut acc = [[d.zero(); BLOCKS]; PANEL];
        let mut expanded = [[d.splat(0); BLOCKS]; LINE];
        let mut transposed = [[d.zero(); 4]; SCALES / 4];
        for row in (0..rows).step_by(BLOCKS * ROWS) {
            let blocks = [typed.block(row), typed.block(row + ROWS)];
            acc[..tokens].fill([d.zero(); BLOCKS]);
            for first in (0..typed.groups).step_by(scales_at_once) {
                let end = typed.groups.min(first + scales_at_once);
                for (b, block) in blocks.iter().enumerate() {
                    typed.scales(d, *block, first, &mut transposed);
                    let per = 4 / C::SCALE;
                    for (scales, four) in scales.chunks_mut(per).zip(&transposed) {
                        for (scales, scale) in scales.iter_mut().zip(four) {
                            scales[b] = *scale;
                        }
                    }
                }
                for group in (first..end).step_by(C::GROUPS) {
                    let count = C::GROUPS.min(end - group);
                    let at = group * group_bytes::<C>();
                    let scales = &scales[group - first..][..count];
                    let x = &x[group * tokens..][..count * tokens];
                    let ahead = Ahead { codes: blocks[0].codes, stride, at };
                    for (b, block) in blocks.iter().enumerate() {
                        expand::<D, C, W>(d, typed.line(d, *block, at), b, &ahead, &mut expanded);
                    }
                    let (w, acc) = (&expanded, &mut acc);
                    if C::WIDE {
                        d.call(Multiply::<W, D, true> { w, scales, x, tokens, acc });
                    } else {
                        d.call(Multiply::<W, D, false> { w, scales, x, tokens, acc });
                    }
                }
            }
            for (t, acc) in acc.iter().enumerate().take(tokens) {
                for (b, acc) in acc.iter().enumerate() {
                    block::store(d, &mut typed.product.out, typed.product.bias, (t, row + b * ROWS), *acc);
                }
            }
        }
    }
}

impl<C: Code, W: Width> Typed<'_, C, W> {
    /// 64 bytes of the codes of a block, from byte `at` of its rows on.
    #[inline(always)]
    fn line<D: Dots>(&self, d: D, block: Block<'_>, at: usize) -> [D::I; 16] {
        block::lines::<D, false>(d, block.codes, block.rows, self.groups * group_bytes::<C>(), at)
    }

    /// The scales of a block from group `first` on: those of one dword of every row together.
    #[inline(always)]
    fn scales<D: Dots>(&self, d: D, block: Block<'_>, first: usize, out: &mut [[D::F; 4]; SCALES / 4]) {
        let stride = self.groups * C::SCALE;
        let at = first * C::SCALE;
        for r in 0..ROWS {
            d.prefetch(block.scales, BLOCKS * ROWS * stride + at * ROWS + r * LINE);
        }
        let dwords = block::lines::<D, false>(d, block.scales, block.rows, stride, at);
        for (out, dword) in out.iter_mut().zip(dwords) {
            *out = C::scales(d, dword);
        }
    }
}

/// Puts the codes of a line where [`Multiply`] finds them: value after value, both blocks side by side.
#[inline(always)]
fn expand<D: Dots, C: Code, W: Width>(
    d: D,
    dwords: [D::I; 16],
    block: usize,
    ahead: &Ahead<'_, BLOCKS>,
    out: &mut [[D::I; BLOCKS]; LINE],
) {
    for (k, dword) in dwords.into_iter().enumerate() {
        // One at a time: requests in a bunch wait for one another.
        ahead.ask(d, block * ROWS + k);
        let codes = W::unpack::<D, C>(d, dword);
        for (j, codes) in codes.iter().take(W::count::<C>()).enumerate() {
            out[k * W::count::<C>() + j][block] = *codes;
        }
    }
}

/// Adds the products of expanded groups with a panel of x.
struct Multiply<'a, W: Width, D: Dots, const WIDE: bool> {
    w: &'a [[D::I; BLOCKS]; LINE],
    /// Of each group.
    scales: &'a [[D::F; BLOCKS]],
    /// Group after group, the rows of each.
    x: &'a [W::Group],
    tokens: usize,
    acc: &'a mut [[D::F; BLOCKS]; PANEL],
}

impl<W: Width, D: Dots, const WIDE: bool> InnerWork<D> for Multiply<'_, W, D, WIDE> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { w, scales, x, tokens, acc } = self;
        // Tiles as equal as they can be: 13 rows are 7 and 6, not 12 and 1.
        let tiles = tokens.div_ceil(D::TOKENS);
        for tile in 0..tiles {
            let (first, end) = (tile * tokens / tiles, (tile + 1) * tokens / tiles);
            let acc = &mut acc[first..];
            macro_rules! tile {
                ($($n:literal)*) => {
                    match end - first {
                        $($n => d.call(Tile::<W, D, $n, WIDE> { w, scales, x: &x[first..], tokens, acc: block::first(acc) }),)*
                        _ => unreachable!("more rows than a tile holds"),
                    }
                };
            }
            tile!(1 2 3 4 5 6 7 8 9 10 11 12);
        }
    }
}

/// [`Multiply`] of `T` rows of x, in registers.
struct Tile<'a, W: Width, D: Dots, const T: usize, const WIDE: bool> {
    w: &'a [[D::I; BLOCKS]; LINE],
    scales: &'a [[D::F; BLOCKS]],
    x: &'a [W::Group],
    tokens: usize,
    acc: &'a mut [[D::F; BLOCKS]; T],
}

impl<W: Width, D: Dots, const T: usize, const WIDE: bool> InnerWork<D> for Tile<'_, W, D, T, WIDE> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { w, scales, x, tokens, acc } = self;
        for ((w, scales), g) in w.chunks_exact(W::VALUES).zip(scales).zip(0..) {
            let x: &[W::Group; T] = x[g * tokens..].first_chunk().expect("the caller counted");
            // Left to itself the compiler keeps sums and accumulators in registers, more than there are.
            let acc = black_box(&mut *acc);
            let mut sums: [[D::I; BLOCKS]; T] = [[d.splat(0); BLOCKS]; T];
            for (sums, x) in sums.iter_mut().zip(x) {
                *sums = [d.splat(x.as_ref()[W::VALUES]); BLOCKS];
            }
            for (i, [w0, w1]) in w.iter().enumerate() {
                for (sums, x) in sums.iter_mut().zip(x) {
                    let x = d.splat(x.as_ref()[i]);
                    sums[0] = W::dot::<D, WIDE>(d, sums[0], *w0, x);
                    sums[1] = W::dot::<D, WIDE>(d, sums[1], *w1, x);
                }
            }
            for ((sums, x), acc) in sums.iter().zip(x).zip(acc) {
                let scale = d.splat_f32(f32::from_bits(x.as_ref()[W::VALUES + 1]));
                for b in 0..BLOCKS {
                    acc[b] = d.fma(d.to_f32(sums[b]), d.mul(scales[b], scale), acc[b]);
                }
            }
        }
    }
}
