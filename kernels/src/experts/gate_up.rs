//! Gate, up and activation of some columns, on one thread.

use super::{Activation, ExpertFfn, GateUp};
use crate::format::Matrix;
use crate::matmul::transposed::Transposed;
use crate::matmul::{Operand, product_serial};
use crate::quantised::PANEL;
use crate::rows::RowsMut;
use crate::simd::{Isa, LANES, Lanes, Work, exp, silu};

/// Columns activated at a time; cuts are multiples of it.
pub(super) const BLOCK: usize = 4 * LANES;
/// Rows of x at a time: gate and up of a block are 64 KiB of stack, and as much again interleaved.
const TOKENS: usize = PANEL;
/// Values of a block at most.
const LARGE: usize = BLOCK * TOKENS;
const SMALL: usize = LARGE / 8;

/// `out[t, j]` = the activation of gate and up `first + j` of `x[t]`.
pub(super) struct GateUpProduct<'a> {
    pub(super) x: Operand<'a>,
    pub(super) ffn: ExpertFfn<'a>,
    /// First column, a multiple of [`BLOCK`].
    pub(super) first: usize,
    pub(super) out: RowsMut<'a>,
}

impl GateUpProduct<'_> {
    // Not into the recursion that cuts the work: its frames should not hold these blocks.
    #[inline(never)]
    pub(super) fn run(mut self, isa: Isa) {
        // As wide as the buffers allow: reading the rows of one weight is best not interrupted.
        let tokens = self.x.count().clamp(1, TOKENS);
        let wide = TOKENS / tokens * BLOCK;
        for column in (0..self.out.width()).step_by(wide) {
            let width = wide.min(self.out.width() - column);
            for t in (0..self.x.count()).step_by(TOKENS) {
                let x = self.x.slice(t, TOKENS.min(self.x.count() - t));
                // Buffers are filled with zeros first: for few values not the large ones.
                match x.count() * width {
                    ..=SMALL => self.block::<SMALL, { 2 * SMALL }>(isa, x, t, column, width),
                    _ => self.block::<LARGE, { 2 * LARGE }>(isa, x, t, column, width),
                }
            }
        }
    }

    /// Rows `token ..` of `out` for the rows of `x`; columns `column .. column + width` of `out`.
    #[inline(never)]
    fn block<const N: usize, const PAIRS: usize>(
        &mut self,
        isa: Isa,
        x: Operand<'_>,
        token: usize,
        column: usize,
        width: usize,
    ) {
        let (mut gate, mut up) = ([0.0; N], [0.0; N]);
        let (gate, up) = (&mut gate[..x.count() * width], &mut up[..x.count() * width]);
        let first = self.first + column;
        let part = |w: Matrix<'_>, from: usize, rows: usize, out: &mut [f32]| {
            product_serial(isa, x, w.slice(from, rows), None, RowsMut::new(out, rows));
        };
        match self.ffn.gate_up {
            GateUp::Separate { gate: gate_weight, up: up_weight } => {
                part(gate_weight, first, width, gate);
                part(up_weight, first, width, up);
            }
            GateUp::Interleaved(w) => {
                let mut pairs = [0.0; PAIRS];
                let pairs = &mut pairs[..x.count() * 2 * width];
                part(w, 2 * first, 2 * width, pairs);
                part_pairs(pairs, gate, up);
            }
            GateUp::InterleavedTransposed(w) => {
                let mut pairs = [0.0; PAIRS];
                let pairs = &mut pairs[..x.count() * 2 * width];
                let out = RowsMut::new(pairs, 2 * width);
                isa.run(Transposed { x: x.rows, w, first: 2 * first, bias: None, out });
                part_pairs(pairs, gate, up);
            }
        }
        if let Some(bias) = self.ffn.gate_up_bias {
            let bias = bias[2 * first..][..2 * width].as_chunks::<2>().0;
            for (gate, up) in gate.chunks_exact_mut(width).zip(up.chunks_exact_mut(width)) {
                for ((g, u), [bias_gate, bias_up]) in gate.iter_mut().zip(up).zip(bias) {
                    *g += bias_gate;
                    *u += bias_up;
                }
            }
        }
        isa.run(Activate { activation: self.ffn.activation, gate, up });
        for (t, row) in gate.chunks_exact(width).enumerate() {
            self.out.row(token + t)[column..][..width].copy_from_slice(row);
        }
    }
}

fn part_pairs(pairs: &[f32], gate: &mut [f32], up: &mut [f32]) {
    for ((g, u), pair) in gate.iter_mut().zip(up).zip(pairs.as_chunks::<2>().0) {
        [*g, *u] = *pair;
    }
}

/// Replaces gate by its activation with up.
struct Activate<'a> {
    activation: Activation,
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Work for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let (gates, gate_rest) = self.gate.as_chunks_mut::<LANES>();
        let (ups, up_rest) = self.up.as_chunks::<LANES>();
        for (gate, up) in gates.iter_mut().zip(ups) {
            activate(l, self.activation, gate, up);
        }
        if !gate_rest.is_empty() {
            let (mut gate, mut up) = ([0.0; LANES], [0.0; LANES]);
            gate[..gate_rest.len()].copy_from_slice(gate_rest);
            up[..up_rest.len()].copy_from_slice(up_rest);
            activate(l, self.activation, &mut gate, &up);
            gate_rest.copy_from_slice(&gate[..gate_rest.len()]);
        }
    }
}

#[inline(always)]
fn activate<L: Lanes>(l: L, activation: Activation, gate: &mut [f32; LANES], up: &[f32; LANES]) {
    let (g, u) = (l.load(gate), l.load(up));
    let y = match activation {
        Activation::SiluGlu => l.mul(silu(l, g), u),
        Activation::ClampedSwiGlu { limit, alpha } => {
            let g = l.min(l.splat(limit), g);
            let u = l.max(l.splat(-limit), l.min(l.splat(limit), u));
            let one = l.splat(1.0);
            let sigmoid = l.div(one, l.add(one, exp(l, l.mul(g, l.splat(-alpha)))));
            l.mul(l.mul(g, sigmoid), l.add(u, one))
        }
    };
    l.store(y, gate);
}
