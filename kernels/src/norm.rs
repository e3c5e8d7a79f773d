//! Root-mean-square norms.
//!
//! y = x / sqrt(mean(x^2) + eps) * weight in f32, computed as (x * (1 / sqrt(..))) * weight with the sum of
//! squares in canonical lane order. Zero-centred weights (1 + w) are the caller's to prepare.

use crate::rows::{Bands, Cut, Rows, RowsMut, for_each_part};
use crate::simd::{Isa, LANES, Lanes, Work, padded};

/// Values below which a call stays on its thread.
const SMALL: usize = 64 * 1024;

/// Norms rows of `width` values; no weight means a weight of ones.
///
/// # Panics
/// If shapes differ.
pub fn rms_norm(isa: Isa, x: &[f32], weight: Option<&[f32]>, eps: f32, width: usize, out: &mut [f32]) {
    rms_norm_rows(isa, Rows::new(x, width), weight, eps, RowsMut::new(out, width));
}

/// [`rms_norm`] in place; a per-head norm has the head's width.
pub fn rms_norm_in_place(isa: Isa, x: &mut [f32], weight: Option<&[f32]>, eps: f32, width: usize) {
    rms_norm_rows_in_place(isa, RowsMut::new(x, width), weight, eps);
}

/// [`rms_norm`] of strided rows.
pub fn rms_norm_rows(isa: Isa, x: Rows<'_>, weight: Option<&[f32]>, eps: f32, out: RowsMut<'_>) {
    assert_eq!((x.count(), x.width()), (out.count(), out.width()), "norm: shape of input and output");
    in_parallel(isa, Norm { x: Some(x), weight, eps, out });
}

/// [`rms_norm`] of strided rows in place, such as the latent part of `[tokens, latent + rope]`.
pub fn rms_norm_rows_in_place(isa: Isa, x: RowsMut<'_>, weight: Option<&[f32]>, eps: f32) {
    in_parallel(isa, Norm { x: None, weight, eps, out: x });
}

fn in_parallel(isa: Isa, norm: Norm<'_>) {
    assert!(norm.weight.is_none_or(|w| w.len() == norm.out.width()), "norm: one weight per column");
    let width = norm.out.width();
    let rows = if norm.out.count() * width < SMALL { norm.out.count() } else { (SMALL / width / 4).max(1) };
    let Norm { x, weight, eps, out } = norm;
    if rows == 0 {
        return;
    }
    for_each_part(Cut::new(out, Bands::Every(rows), width), &|part| {
        let x = x.map(|x| x.slice(part.first_row, part.rows.count()));
        isa.run(Norm { x, weight, eps, out: part.rows });
    });
}

struct Norm<'a> {
    /// Copied to `out` first; none where `out` holds the input.
    x: Option<Rows<'a>>,
    weight: Option<&'a [f32]>,
    eps: f32,
    out: RowsMut<'a>,
}

impl Work for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        for t in 0..self.out.count() {
            let row = self.out.row(t);
            if let Some(x) = self.x {
                row.copy_from_slice(x.row(t));
            }
            let (chunks, rest) = row.as_chunks::<LANES>();
            let mut squares = l.splat(0.0);
            for chunk in chunks {
                let v = l.load(chunk);
                squares = l.fma(v, v, squares);
            }
            if !rest.is_empty() {
                let v = l.load(&padded(rest, 0.0));
                squares = l.fma(v, v, squares);
            }
            let scale = 1.0 / (l.sum(squares) / row.len() as f32 + self.eps).sqrt();
            match self.weight {
                Some(weight) => row.iter_mut().zip(weight).for_each(|(v, w)| *v = *v * scale * w),
                None => row.iter_mut().for_each(|v| *v *= scale),
            }
        }
    }
}
