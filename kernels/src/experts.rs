//! Expert feed-forward: gate and up, activation, down; for the routed experts of many tokens at once,
//! and for a dense or shared one.
//!
//! The pairs (token, rank) are grouped by expert, so that every weight is read once. Each pair has an
//! output row of its own, and a token's rows are added in rank order: the result depends neither on
//! the grouping nor on which thread did what. Two parallel regions, gate/up and down, are each cut
//! over experts and over output columns within an expert, so that many tokens on many experts
//! and one token on eight both fill the threads.

mod dispatch;
mod gate_up;

pub use dispatch::{Dispatch, DispatchLimits, Routed, SharedExpert, run_experts};

use crate::format::Matrix;
use crate::matmul::transposed::Transposed;
use crate::matmul::{self, Input, Operand};
use crate::quantised::{Activations, PANEL};
use crate::rows::{Bands, Cut, Rows, RowsMut, for_each_part};
use crate::simd::Isa;
use gate_up::GateUpProduct;

/// What is done with gate g and up u.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// silu(g) * u.
    SiluGlu,
    /// gpt-oss: with g = min(g, limit) and u = clamp(u, -limit, limit): g * sigmoid(alpha * g) * (u + 1).
    ClampedSwiGlu {
        /// 7 in gpt-oss.
        limit: f32,
        /// 1.702 in gpt-oss.
        alpha: f32,
    },
}

/// How gate and up projections are stored.
#[derive(Clone, Copy, Debug)]
pub enum GateUp<'a> {
    /// Two weights `[inter, hidden]`.
    Separate {
        /// Gate.
        gate: Matrix<'a>,
        /// Up.
        up: Matrix<'a>,
    },
    /// `[2 * inter, hidden]`: row 2r is gate r, row 2r + 1 is up r.
    Interleaved(Matrix<'a>),
    /// `[hidden, 2 * inter]`: column 2r is gate r, column 2r + 1 is up r.
    InterleavedTransposed(Matrix<'a>),
}

/// The weights of one feed-forward.
#[derive(Clone, Copy, Debug)]
pub struct ExpertFfn<'a> {
    /// Gate and up projection.
    pub gate_up: GateUp<'a>,
    /// `[2 * inter]`, gate and up interleaved.
    pub gate_up_bias: Option<&'a [f32]>,
    /// `[hidden, inter]`, or `[inter, hidden]` if `down_transposed`.
    pub down: Matrix<'a>,
    /// Whether `down` is stored `[in, out]`.
    pub down_transposed: bool,
    /// `[hidden]`.
    pub down_bias: Option<&'a [f32]>,
    /// What is done with gate and up.
    pub activation: Activation,
}

impl ExpertFfn<'_> {
    /// Width of what it takes.
    pub fn hidden(&self) -> usize {
        match self.gate_up {
            GateUp::Separate { gate, .. } => gate.cols,
            GateUp::Interleaved(w) => w.cols,
            GateUp::InterleavedTransposed(w) => w.rows,
        }
    }

    /// Width between the projections.
    pub fn inter(&self) -> usize {
        match self.gate_up {
            GateUp::Separate { gate, .. } => gate.rows,
            GateUp::Interleaved(w) => w.rows / 2,
            GateUp::InterleavedTransposed(w) => w.cols / 2,
        }
    }

    /// A weight that x is multiplied with.
    fn first(&self) -> &Matrix<'_> {
        match &self.gate_up {
            GateUp::Separate { gate, .. } => gate,
            GateUp::Interleaved(w) | GateUp::InterleavedTransposed(w) => w,
        }
    }

    fn gate_up_transposed(&self) -> bool {
        matches!(self.gate_up, GateUp::InterleavedTransposed(_))
    }

    fn check(&self) {
        let (hidden, inter) = (self.hidden(), self.inter());
        if let GateUp::Separate { gate, up } = self.gate_up {
            assert_eq!((gate.rows, gate.cols), (up.rows, up.cols), "shapes of gate and up");
        }
        let down = if self.down_transposed {
            (self.down.cols, self.down.rows)
        } else {
            (self.down.rows, self.down.cols)
        };
        assert_eq!(down, (hidden, inter), "the down projection is [hidden, inter]");
        assert!(self.gate_up_bias.is_none_or(|b| b.len() == 2 * inter), "one bias per gate and up");
        assert!(self.down_bias.is_none_or(|b| b.len() == hidden), "one bias per output column");
    }

    /// Multiply-adds per row of gate and up, and of down.
    fn work(&self) -> (usize, usize) {
        (2 * self.inter() * self.hidden(), self.down.rows * self.down.cols)
    }
}

/// f32 values of scratch that [`ffn`] needs.
pub fn ffn_scratch_len(tokens: usize, inter: usize) -> usize {
    tokens * inter
}

/// A dense or shared feed-forward over all rows: x and out are `[tokens, hidden]`; scratch as
/// [`ffn_scratch_len`] says. With `activations`, of room for x and for `[tokens, inter]`, weights of 4 or 8 bits are
/// multiplied in integers.
///
/// # Panics
/// If shapes differ.
pub fn ffn(
    isa: Isa,
    x: &[f32],
    ffn: &ExpertFfn<'_>,
    mut activations: Option<&mut Activations>,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    ffn.check();
    let x = Rows::new(x, ffn.hidden());
    let out = RowsMut::new(out, ffn.hidden());
    assert_eq!(x.count(), out.count(), "rows in and out");
    let (count, inter) = (x.count(), ffn.inter());
    if count == 0 {
        return;
    }
    let inner = &mut scratch[..ffn_scratch_len(count, inter)];
    let x = Operand::packed_for(isa, Input::all(x), ffn.first(), activations.as_deref_mut());
    let (rows, columns) = matmul::pieces(ffn.work().0 * count, (count, inter), (PANEL, gate_up::BLOCK));
    let cut = Cut::new(RowsMut::new(inner, inter), Bands::Every(rows.next_multiple_of(PANEL)), columns);
    for_each_part(cut, &|part| {
        let x = x.slice(part.first_row, part.rows.count());
        GateUpProduct { x, ffn: *ffn, first: part.first_column, out: part.rows }.run(isa);
    });
    let inner = Input::all(Rows::new(inner, inter));
    let (w, bias) = (ffn.down, ffn.down_bias);
    if ffn.down_transposed {
        matmul::transposed(isa, Transposed { x: inner, w, first: 0, bias, out });
    } else {
        matmul::product(isa, Operand::packed_for(isa, inner, &w, activations), &w, bias, out);
    }
}

/// Columns of the down projection from `first` on, on this thread.
fn down_part(isa: Isa, x: Operand<'_>, ffn: &ExpertFfn<'_>, first: usize, out: RowsMut<'_>) {
    let bias = ffn.down_bias.map(|bias| &bias[first..][..out.width()]);
    if ffn.down_transposed {
        isa.run(Transposed { x: x.rows, w: ffn.down, first, bias, out });
    } else {
        matmul::product_serial(isa, x, ffn.down.slice(first, out.width()), bias, out);
    }
}
