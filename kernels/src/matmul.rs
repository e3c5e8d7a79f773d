//! Products with a weight as it is stored: `matmul` where it is `[out, in]`, as nearly all are, and
//! `matmul_transposed` where it is `[in, out]`.
//!
//! With [`Activations`], weights of 4 or 8 bits are multiplied in integers ([`crate::quantised`]); without, and all
//! others, in f32, exactly dequantised.
//!
//! Work is cut over output columns, and over rows of x where there are many; neither changes a bit of
//! the result. Small products stay on their thread.

pub(crate) mod rowwise;
pub(crate) mod source;
pub(crate) mod tile;
pub(crate) mod tiled;
pub(crate) mod transposed;

use crate::format::{Matrix, Values};
use crate::quantised::{self, Activations, PANEL, PackedRows};
use crate::rows::{Bands, Cut, Rows, RowsMut, for_each_part};
use crate::simd::{Isa, LANES};
use crate::team;
use rowwise::RowProduct;
pub(crate) use tile::Input;
use tile::{Dequantise, Product};
use tiled::TiledProduct;
use transposed::Transposed;

/// Multiply-adds below which a product stays on its thread.
const SMALL: usize = 64 * 1024;
/// Pieces of large work per thread: what one thread does not get done, others take over.
const PIECES: usize = 8;
/// Columns of a transposed product below which they are not cut: shorter runs of each row are slow to read.
pub(crate) const MIN_COLUMNS: usize = 512;
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
    product(isa, Operand::float(Input::all(x)), w, bias, out);
}

/// [`matmul_rows`], in integers where there are `activations` and `w` is of 4 or 8 bits.
///
/// # Panics
/// Also if `activations` has no room for x.
pub fn matmul_with(
    isa: Isa,
    activations: Option<&mut Activations>,
    x: Rows<'_>,
    w: &Matrix<'_>,
    bias: Option<&[f32]>,
    out: RowsMut<'_>,
) {
    check((x.count(), x.width()), (w.cols, w.rows), bias, &out);
    let x = Operand::packed_for(isa, Input::all(x), w, activations);
    product(isa, x, w, bias, out);
}

/// [`matmul_rows`] on the calling thread alone.
pub fn matmul_serial(isa: Isa, x: Rows<'_>, w: &Matrix<'_>, bias: Option<&[f32]>, out: RowsMut<'_>) {
    check((x.count(), x.width()), (w.cols, w.rows), bias, &out);
    product_serial(isa, Operand::float(Input::all(x)), *w, bias, out);
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
    transposed(isa, Transposed { x: Input::all(x), w: *w, first: 0, bias, out });
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
    per_head(heads, x, (w, w.cols, w.rows), out, &|x, w, out| matmul_serial(isa, x, &w, None, out));
}

/// [`matmul_transposed_rows`] of every head with its own matrix (W_UK of absorbed latent attention).
///
/// # Panics
/// If x or out are too narrow for the heads, or `w` has too few bytes.
pub fn matmul_transposed_heads(isa: Isa, heads: &Heads, x: Rows<'_>, w: &Matrix<'_>, out: RowsMut<'_>) {
    per_head(heads, x, (w, w.rows, w.cols), out, &|x, w, out| {
        matmul_transposed_serial(isa, x, &w, None, out)
    });
}

/// `f` of every head: its columns of x, its weight, its columns of out.
fn per_head(
    heads: &Heads,
    x: Rows<'_>,
    (w, width_in, width_out): (&Matrix<'_>, usize, usize),
    out: RowsMut<'_>,
    f: &(dyn Fn(Rows<'_>, Matrix<'_>, RowsMut<'_>) + Sync),
) {
    assert!(heads.count < 2 || heads.out_step >= width_out, "the outputs of two heads overlap");
    if heads.count == 0 || x.count() == 0 {
        return;
    }
    let step = heads.out_step.max(width_out);
    let (rows, across) = pieces(heads.count * w.rows * w.cols * x.count(), (x.count(), heads.count), (64, 1));
    let out = out.columns(0, (heads.count - 1) * step + width_out);
    for_each_part(Cut::new(out, Bands::Every(rows), across * step), &|mut part| {
        let x = x.slice(part.first_row, part.rows.count());
        let first = part.first_column / step;
        for head in first..heads.count.min(first + across) {
            let x = x.columns(head * heads.x_step, width_in);
            let w = Matrix { first_row: w.first_row + head * heads.w_step, ..*w };
            f(x, w, part.rows.reborrow().columns((head - first) * step, width_out));
        }
    });
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

/// How to cut `work` multiply-adds over `rows` and `columns` of their results, the latter in multiples of
/// the least number of each: into some pieces per thread, over columns first, none of them small.
pub(crate) fn pieces(
    work: usize,
    (rows, columns): (usize, usize),
    (least_rows, least): (usize, usize),
) -> (usize, usize) {
    // Asking for the number of threads starts rayon's own pool if there is no other: not for small work.
    let wanted = if work <= SMALL { 1 } else { (work / SMALL).min(PIECES * team::threads()) };
    if wanted <= 1 || team::threads() == 1 {
        return (rows, columns);
    }
    let across = wanted.min(columns.div_ceil(least));
    let down = wanted.div_ceil(across).min(rows.div_ceil(least_rows));
    (rows.div_ceil(down), columns.div_ceil(across).next_multiple_of(least))
}

/// What a weight is multiplied with: rows of f32, and perhaps the same rows packed.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) rows: Input<'a>,
    packed: Option<PackedRows<'a>>,
}

impl<'a> Operand<'a> {
    pub(crate) fn float(rows: Input<'a>) -> Self {
        Self { rows, packed: None }
    }

    pub(crate) fn new(rows: Input<'a>, packed: Option<PackedRows<'a>>) -> Self {
        Self { rows, packed }
    }

    /// Packs the rows if there is room and a use.
    pub(crate) fn packed_for(
        isa: Isa,
        rows: Input<'a>,
        w: &Matrix<'_>,
        activations: Option<&'a mut Activations>,
    ) -> Self {
        Self { rows, packed: activations.and_then(|room| room.pack_rows(isa, rows, w)) }
    }

    pub(crate) fn count(&self) -> usize {
        self.rows.count()
    }

    /// Rows `start .. start + count`; `start` is a multiple of [`PANEL`].
    pub(crate) fn slice(&self, start: usize, count: usize) -> Self {
        Self {
            rows: self.rows.slice(start, count),
            packed: self.packed.map(|packed| packed.rows_from(start)),
        }
    }
}

/// A product on this thread.
pub(crate) fn product_serial(
    isa: Isa,
    x: Operand<'_>,
    w: Matrix<'_>,
    bias: Option<&[f32]>,
    mut out: RowsMut<'_>,
) {
    if let (Values::Bf16(_), Some(x), Some(amx)) =
        (w.values, x.packed.and_then(|packed| packed.planes()), isa.tiles())
    {
        return isa.run_dots(TiledProduct { amx, x, w, bias, out });
    }
    if let Values::Bf16(_) | Values::Fp8 { .. } = w.values {
        let packed = x.packed.and_then(|packed| packed.columns());
        return isa.run_dots(RowProduct { x: x.rows, packed, w, bias, out });
    }
    let Some(packed) = x.packed.filter(|packed| quantised::is_quantised(&w) && packed.panel(0).is_some())
    else {
        return isa.run(Product { x: x.rows, w, bias, out });
    };
    for t in (0..out.count()).step_by(PANEL) {
        let rows = PANEL.min(out.count() - t);
        let x = packed.rows_from(t).panel(rows).expect("whole numbers");
        isa.run_dots(quantised::Product { w, x, bias, out: out.reborrow().slice(t, rows) });
    }
}

/// A product on all threads.
pub(crate) fn product(isa: Isa, x: Operand<'_>, w: &Matrix<'_>, bias: Option<&[f32]>, out: RowsMut<'_>) {
    let (tokens, width) = (x.count(), w.rows);
    if tokens * width == 0 {
        return;
    }
    let (rows, columns) = pieces(tokens * width * w.cols, (tokens, width), (PANEL, LANES));
    let cut = Cut::new(out, Bands::Every(rows.next_multiple_of(PANEL)), columns);
    for_each_part(cut, &|part| {
        let (first, count) = (part.first_column, part.rows.width());
        let x = x.slice(part.first_row, part.rows.count());
        let bias = bias.map(|bias| &bias[first..][..count]);
        product_serial(isa, x, w.slice(first, count), bias, part.rows);
    });
}

/// As [`product`].
pub(crate) fn transposed(isa: Isa, p: Transposed<'_>) {
    let (tokens, width) = (p.x.count(), p.out.width());
    if tokens * width == 0 {
        return;
    }
    let (rows, columns) = pieces(tokens * width * p.w.rows, (tokens, width), (MANY_TOKENS, MIN_COLUMNS));
    let Transposed { x, w, first, bias, out } = p;
    for_each_part(Cut::new(out, Bands::Every(rows), columns), &|part| {
        let (at, count) = (part.first_column, part.rows.width());
        isa.run(Transposed {
            x: x.slice(part.first_row, part.rows.count()),
            w,
            first: first + at,
            bias: bias.map(|bias| &bias[at..][..count]),
            out: part.rows,
        });
    });
}
