//! Up to sixteen rows of x: a lane is a weight row, as for few, but codes are widened once for all of them.

use std::marker::PhantomData;

use super::RowProduct;
use super::codes::{Code, CodeRows};
use crate::format::GROUP;
use crate::matmul::Input;
use crate::rows::{Bands, Cut, RowsMut, for_each_part};
use crate::simd::dots::block::{self, Ahead};
use crate::simd::dots::{Dots, InnerWork, LINE, ROWS};

/// Rows of x at most.
pub(crate) const SOME: usize = 16;

/// One group of one row of x, as bits.
type Group = [u32; GROUP];

/// Group after group, the rows of x side by side; zeros after the last column.
pub(super) fn pack(x: Input<'_>, data: &mut [u32]) {
    let count = x.count();
    let groups = RowsMut::new(data, count * GROUP);
    for_each_part(Cut::new(groups, Bands::Every(16), count * GROUP), &|part| {
        let first = part.first_row;
        for (g, out) in part.rows.into_slice().chunks_mut(count * GROUP).enumerate() {
            copy(x, first + g, out.as_chunks_mut().0);
        }
    });
}

fn copy(x: Input<'_>, group: usize, out: &mut [Group]) {
    for (t, out) in out.iter_mut().enumerate() {
        let x = x.row(t).get(group * GROUP..).unwrap_or_default();
        let x = &x[..x.len().min(GROUP)];
        for (out, x) in out.iter_mut().zip(x) {
            *out = x.to_bits();
        }
        out[x.len()..].fill(0);
    }
}

/// Rows `first .. first + tokens` of a product.
pub(super) struct SomeRows<'a, 'b, C> {
    pub(super) product: &'b mut RowProduct<'a>,
    pub(super) rows: CodeRows<'a>,
    pub(super) first: usize,
    pub(super) tokens: usize,
    pub(super) code: PhantomData<C>,
}

impl<D: Dots, C: Code> InnerWork<D> for SomeRows<'_, '_, C> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { product, rows, first, tokens, .. } = self;
        let width = rows.groups * GROUP;
        let packed = product.packed.map(|data| data[first * width..][..tokens * width].as_chunks().0);
        let x = product.x.slice(first, tokens);
        let mut gathered = [[0; GROUP]; SOME];
        let mut widened = [[d.zero(); GROUP]; 2];
        // As many rows of x at a time as registers hold sums of.
        let tiles = tokens.div_ceil((2 * D::TOKENS).min(SOME));
        for row in (0..rows.rows).step_by(ROWS) {
            let mut acc = [d.zero(); SOME];
            let codes = &rows.bytes[row * rows.stride..];
            for line in (0..rows.groups).step_by(C::GROUPS) {
                let ahead = Ahead::<1> { codes, stride: rows.stride, at: line / C::GROUPS * LINE };
                let widened = widened.as_flattened_mut();
                for (k, dword) in rows.line::<D, C>(d, row, line).into_iter().enumerate() {
                    ahead.ask(d, k);
                    let values = C::values(d, dword);
                    widened[C::COLUMNS * k..][..C::COLUMNS].copy_from_slice(&values[..C::COLUMNS]);
                }
                let groups = line..rows.groups.min(line + C::GROUPS);
                for (group, widened) in groups.zip(widened.as_chunks::<GROUP>().0) {
                    let x = match packed {
                        Some(packed) => &packed[group * tokens..][..tokens],
                        None => {
                            copy(x, group, &mut gathered[..tokens]);
                            &gathered[..tokens]
                        }
                    };
                    let w = Widened { values: widened, scale: rows.scales(d, row, group) };
                    for tile in 0..tiles {
                        let (from, to) = (tile * tokens / tiles, (tile + 1) * tokens / tiles);
                        multiply::<D, C>(d, &w, &x[from..to], &mut acc[from..]);
                    }
                }
            }
            for (t, acc) in acc.iter().enumerate().take(tokens) {
                block::store(d, &mut product.out, product.bias, (first + t, row), *acc);
            }
        }
    }
}

/// One group of sixteen weight rows, values in the order of the chain.
struct Widened<'a, D: Dots> {
    values: &'a [D::F; GROUP],
    scale: D::F,
}

#[inline(always)]
fn multiply<D: Dots, C: Code>(d: D, w: &Widened<'_, D>, x: &[Group], acc: &mut [D::F]) {
    macro_rules! rows {
        ($($n:literal)*) => {
            match x.len() {
                $($n => {
                    let (x, acc) = (x.first_chunk().expect("counted"), block::first(acc));
                    d.call(Group16::<D, C, $n> { w, x, acc, code: PhantomData });
                })*
                _ => unreachable!("more rows than a tile holds"),
            }
        };
    }
    rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16);
}

/// One group of sixteen weight rows with `T` rows of x, in registers.
struct Group16<'a, D: Dots, C, const T: usize> {
    w: &'a Widened<'a, D>,
    x: &'a [Group; T],
    acc: &'a mut [D::F; T],
    code: PhantomData<C>,
}

impl<D: Dots, C: Code, const T: usize> InnerWork<D> for Group16<'_, D, C, T> {
    #[inline(always)]
    fn run(self, d: D) {
        let Self { w, x, acc, .. } = self;
        let mut sums = [d.zero(); T];
        // In steps long enough that the end of the loop is foreseen.
        for i in (0..GROUP).step_by(4) {
            for j in 0..4 {
                for t in 0..T {
                    // The second of a pair first.
                    let x = d.splat_f32(f32::from_bits(x[t][i + (j ^ 1)]));
                    sums[t] = d.fma(w.values[i + j], x, sums[t]);
                }
            }
        }
        for t in 0..T {
            acc[t] = C::join(d, acc[t], sums[t], w.scale);
        }
    }
}
