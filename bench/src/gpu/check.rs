//! Whether results are right: against plain sums in f64, run after run, and of a token alone as in a batch.

mod dense;
mod experts;
mod latent;
mod words;

use super::Gpu;
use super::sizes::Sizes;
use crate::Error;

/// Errors of sums of f32 by the sum of the magnitudes of their terms.
const SUMS: f64 = 1e-5;
/// Rounding to bf16: at most half of 2^-7, relative.
const BF16: f64 = 1.0 / 256.0;

pub(super) fn measure(gpu: &mut Gpu<'_>, sizes: &Sizes) -> Result<(), Error> {
    for checked in &sizes.checked {
        experts::measure(gpu, checked)?;
        latent::measure(gpu, checked)?;
        dense::measure(gpu, checked)?;
    }
    Ok(())
}
