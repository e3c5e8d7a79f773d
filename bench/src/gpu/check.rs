//! Whether results are right: against plain sums in f64, run after run, and of a token alone as in a batch.

mod dense;
mod experts;
mod latent;
mod words;

use super::sizes::{Checked, Sizes};
use super::{Gpu, is_left_out};
use crate::Error;

type Measure = fn(&mut Gpu<'_>, &Checked) -> Result<(), Error>;

/// Errors of sums of f32 by the sum of the magnitudes of their terms.
const SUMS: f64 = 1e-5;
/// Rounding to bf16: at most half of 2^-7, relative.
const BF16: f64 = 1.0 / 256.0;

pub(super) fn measure(gpu: &mut Gpu<'_>, sizes: &Sizes) -> Result<(), Error> {
    for checked in &sizes.checked {
        let parts: [(&str, Measure); 3] =
            [("experts", experts::measure), ("attention", latent::measure), ("dense", dense::measure)];
        for (name, part) in parts {
            if !is_left_out(name) {
                let result = part(gpu, checked);
                gpu.go_on(result)?;
            }
        }
    }
    Ok(())
}
