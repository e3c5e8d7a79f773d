//! Products with a weight as it is stored: `matmul` where it is `[out, in]`, as nearly all are, and
//! `matmul_transposed` where it is `[in, out]`.
//!
//! Work is cut over output columns, and over rows of x where there are many; neither changes a bit of
//! the result. Small products stay on their thread.

pub(crate) mod source;
pub(crate) mod tile;
pub(crate) mod transposed;

use crate::format::Matrix;
use crate::rows::{Rows, RowsMut};
use crate::simd::{Isa, LANES};
pub(crate) use tile::Input;
use tile::{Dequantise, Product};
use transposed::Transposed;

/// Multiply-adds below which a product stays on its thread.
const SMALL: usize = 64 * 1024;
/// Columns of a transposed product below which they are not cut: shorter runs of each row are slow to read.
const MIN_COLUMNS: usize = 512;
/// Rows of x from which on they are cut, too.
const MANY_TOKENS: usize = 64;

/// `out[t, r] = dot(x[t], w[r]) (+ bias[r])`: x is `[tokens, w.cols]`, out `[tokens, w.rows]`. The sum is
/// in canonical order ([`crate::simd`]).
///
/// # Panics
/// If shapes differ, or `w` has fewer bytes than its shape says.
pub fn matmul(isa: Isa, x: &[f32], w: &Matrix<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    matmul_rows(isa, Rows::new(x, w.cols), w, bias, RowsMut::new(out, w.rows));
}

/// [`matmul`] of strided rows.
pub fn matmul_rows(isa: Isa, x: Rows<'_>, w: &Matrix<'_>, bias: Option<&[f32]>, out: RowsMut<'_>) {
    check((x.count(), x.width()), (w.cols, w.rows), bias, &out);
    let grain = grain(w.rows * w.cols * x.count());
    product(isa, grain, Product { x: Input::all(x), w: *w, bias, out });
}

/// [`matmul_rows`] on the calling thread alone.
pub fn matmul_serial(isa: Isa, x: Rows<'_>, w: &Matrix<'_>, bias: Option<&[f32]>, out: RowsMut<'_>) {
    check((x.count(), x.width()), (w.cols, w.rows), bias, &out);
    isa.run(Product { x: Input::all(x), w: *w, bias, out });
}

/// `out[t, j] = sum over i of x[t, i] * w[i, j] (+ bias[j])` for w stored `[in, out]`: x is
/// `[tokens, w.rows]`, out `[tokens, w.cols]`. Every output is one chain of fused multiply-adds, i ascending.
///
/// # Panics
/// If shapes differ, or `w` has fewer bytes than its shape says.
pub fn matmul_transposed(isa: Isa, x: &[f32], w: &Matrix<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    matmul_transposed_rows(isa, Rows::new(x, w.rows), w, bias, RowsMut::new(out, w.cols));
}

/// [`matmul_transposed`] of strided rows.
pub fn matmul_transposed_rows(isa: Isa, x: Rows<'_>, w: &Matrix<'_>, bias: Option<&[f32]>, out: RowsMut<'_>) {
    check((x.count(), x.width()), (w.rows, w.cols), bias, &out);
    let grain = grain(w.rows * w.cols * x.count());
    transposed(isa, grain, Transposed { x: Input::all(x), w: *w, first: 0, bias, out });
}

/// [`matmul_transposed_rows`] on the calling thread alone.
pub fn matmul_transposed_serial(
    isa: Isa,
    x: Rows<'_>,
    w: &Matrix<'_>,
    bias: Option<&[f32]>,
    out: RowsMut<'_>,
) {
    check((x.count(), x.width()), (w.rows, w.cols), bias, &out);
    isa.run(Transposed { x: Input::all(x), w: *w, first: 0, bias, out });
}

/// Where the heads of a per-head product lie: head h takes the columns of x from `h * x_step` on, a
/// matrix of the shape of `w` that begins `h * w_step` rows after it, and the columns of out from
/// `h * out_step` on.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Number of heads.
    pub count: usize,
    /// Columns of x from one head to the next.
    pub x_step: usize,
    /// Stored rows of w from one head to the next.
    pub w_step: usize,
    /// Columns of out from one head to the next.
    pub out_step: usize,
}

/// [`matmul_rows`] of every head with its own matrix (W_UV of latent attention).
///
/// # Panics
/// If x or out are too narrow for the heads, or `w` has too few bytes.
pub fn matmul_heads(isa: Isa, heads: &Heads, x: Rows<'_>, w: &Matrix<'_>, out: RowsMut<'_>) {
    per_head(isa, heads, &HeadProduct { x, w: *w, transposed: false }, 0, heads.count, out);
}

/// [`matmul_transposed_rows`] of every head with its own matrix (W_UK of absorbed latent attention).
///
/// # Panics
/// If x or out are too narrow for the heads, or `w` has too few bytes.
pub fn matmul_transposed_heads(isa: Isa, heads: &Heads, x: Rows<'_>, w: &Matrix<'_>, out: RowsMut<'_>) {
    per_head(isa, heads, &HeadProduct { x, w: *w, transposed: true }, 0, heads.count, out);
}

struct HeadProduct<'a> {
    x: Rows<'a>,
    w: Matrix<'a>,
    transposed: bool,
}

/// Heads `first .. first + count`; `out` begins at the columns of the first.
fn per_head(isa: Isa, heads: &Heads, p: &HeadProduct<'_>, first: usize, count: usize, out: RowsMut<'_>) {
    let (width_in, width_out) = if p.transposed { (p.w.rows, p.w.cols) } else { (p.w.cols, p.w.rows) };
    assert!(heads.count < 2 || heads.out_step >= width_out, "the outputs of two heads overlap");
    match count {
        0 => {}
        1 => {
            let x = p.x.columns(first * heads.x_step, width_in);
            let w = Matrix { first_row: p.w.first_row + first * heads.w_step, ..p.w };
            let out = out.columns(0, width_out);
            if p.transposed {
                matmul_transposed_rows(isa, x, &w, None, out);
            } else {
                matmul_rows(isa, x, &w, None, out);
            }
        }
        _ => {
            let (left, right) = out.split_columns(count / 2 * heads.out_step);
            let work = count * p.w.rows * p.w.cols * p.x.count();
            let halves = (
                || per_head(isa, heads, p, first, count / 2, left),
                || per_head(isa, heads, p, first + count / 2, count - count / 2, right),
            );
            if work < SMALL {
                (halves.0)();
                (halves.1)();
            } else {
                rayon::join(halves.0, halves.1);
            }
        }
    }
}

/// Row `row` of `w` as f32, exactly.
///
/// # Panics
/// If there is no such row, or `out` is not `w.cols` long.
pub fn dequantize_row(isa: Isa, w: &Matrix<'_>, row: usize, out: &mut [f32]) {
    assert!(row < w.rows, "row {row} of {}", w.rows);
    assert_eq!(out.len(), w.cols, "room for one row");
    isa.run(Dequantise { w: w.slice(row, 1), row: 0, out });
}

fn check((tokens, width): (usize, usize), w: (usize, usize), bias: Option<&[f32]>, out: &RowsMut<'_>) {
    assert_eq!(width, w.0, "columns of x and of the weight");
    assert_eq!((out.count(), out.width()), (tokens, w.1), "output [tokens, columns]");
    assert!(bias.is_none_or(|b| b.len() == w.1), "one bias per output column");
}

/// Multiply-adds of one piece of a product of `work` of them: four pieces per thread, none small.
pub(crate) fn grain(work: usize) -> usize {
    // Asking for the number of threads starts rayon's own pool if there is no other: not for small work.
    if work <= SMALL || rayon::current_num_threads() == 1 {
        return usize::MAX;
    }
    SMALL.max(work / (4 * rayon::current_num_threads()))
}

/// Cuts a product into pieces of about `grain` multiply-adds.
pub(crate) fn product(isa: Isa, grain: usize, p: Product<'_>) {
    let (tokens, rows) = (p.x.count(), p.w.rows);
    if tokens * rows * p.w.cols <= grain {
        return isa.run(p);
    }
    if rows >= 2 * LANES {
        let at = (rows / 2).next_multiple_of(4);
        let (left, right) = p.out.split_columns(at);
        let (bias_left, bias_right) = p.bias.map(|b| b.split_at(at)).unzip();
        let (w_left, w_right) = (p.w.slice(0, at), p.w.slice(at, rows - at));
        rayon::join(
            || product(isa, grain, Product { x: p.x, w: w_left, bias: bias_left, out: left }),
            || product(isa, grain, Product { x: p.x, w: w_right, bias: bias_right, out: right }),
        );
    } else if tokens >= MANY_TOKENS {
        let at = (tokens / 2).next_multiple_of(LANES);
        let (top, bottom) = p.out.split_rows(at);
        let (x_top, x_bottom) = p.x.split(at);
        rayon::join(
            || product(isa, grain, Product { x: x_top, w: p.w, bias: p.bias, out: top }),
            || product(isa, grain, Product { x: x_bottom, w: p.w, bias: p.bias, out: bottom }),
        );
    } else {
        isa.run(p);
    }
}

/// As [`product`].
pub(crate) fn transposed(isa: Isa, grain: usize, p: Transposed<'_>) {
    let (tokens, width) = (p.x.count(), p.out.width());
    if tokens * width * p.w.rows <= grain {
        return isa.run(p);
    }
    if width >= 2 * MIN_COLUMNS {
        let at = (width / 2).next_multiple_of(LANES);
        let (left, right) = p.out.split_columns(at);
        let (bias_left, bias_right) = p.bias.map(|b| b.split_at(at)).unzip();
        let (x, w, first) = (p.x, p.w, p.first);
        rayon::join(
            || transposed(isa, grain, Transposed { x, w, first, bias: bias_left, out: left }),
            || transposed(isa, grain, Transposed { x, w, first: first + at, bias: bias_right, out: right }),
        );
    } else if tokens >= MANY_TOKENS {
        let at = (tokens / 2).next_multiple_of(4);
        let (top, bottom) = p.out.split_rows(at);
        let (x_top, x_bottom) = p.x.split(at);
        rayon::join(
            || transposed(isa, grain, Transposed { x: x_top, out: top, ..p }),
            || transposed(isa, grain, Transposed { x: x_bottom, out: bottom, ..p }),
        );
    } else {
        isa.run(p);
    }
}
