//! Choosing tokens on the device: penalties, filters and the draw, or the most likely token.
//!
//! The order is that of the engine's sampler: bias and penalties; mask; temperature 0 takes the most likely
//! token (of equals the lowest id); else min-p, top-k, top-p as a share of what is left, one draw. What
//! differs is the arithmetic: probabilities relative to the most likely token are whole numbers of 2^-40, so that their
//! sums are exact and no order of threads changes a choice, and the draw goes through the ids in ascending
//! order. A token less likely than 2^-40 of the most likely one is never drawn.

use super::buffer::{Plain, Slice};
use super::device::Device;
use super::error::DeviceError;
use super::image::Kernel;

const SAMPLE: Kernel = Kernel::new("sample", "sample");
const ADJUST: Kernel = Kernel::new("sample", "adjust_logits");
/// As in `sample.cu`.
const SAMPLE_THREADS: u32 = 512;
const ADJUST_THREADS: u32 = 256;

/// What is done to the logit of one token of one row before the choice; at most one per row and token.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Adjustment {
    /// Row of the logits.
    pub row: u32,
    /// Token id.
    pub token: u32,
    /// Added first.
    pub bias: f32,
    /// 0 if the token is in neither prompt nor output; else 1 + its occurrences in the output.
    pub seen: u32,
}

/// Penalties of a row: a seen token's logit is divided by `repetition` if above 0, else multiplied; then
/// `frequency` per occurrence and `presence` are taken off if it occurs in the output.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Penalties {
    /// 1 = off.
    pub repetition: f32,
    /// 0 = off.
    pub frequency: f32,
    /// 0 = off.
    pub presence: f32,
}

/// How a row's token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Sampling {
    /// 0 = the most likely token, whatever the rest says.
    pub temperature: f32,
    /// Least probability relative to the most likely token; 0 = off.
    pub min_p: f32,
    /// Share of the probability that the kept tokens have together; 1 = off.
    pub top_p: f32,
    /// Tokens kept; 0 = all.
    pub top_k: u32,
    /// The draw, as a share of 2^64.
    pub uniform: u64,
}

impl Sampling {
    /// The most likely token.
    pub const GREEDY: Self = Self { temperature: 0.0, min_p: 0.0, top_p: 1.0, top_k: 0, uniform: 0 };
}

// SAFETY: numbers of 4 and 8 bytes, the last at offset 16: no padding, and every bit pattern is a value.
unsafe impl Plain for Adjustment {}
// SAFETY: three numbers of 4 bytes.
unsafe impl Plain for Penalties {}
// SAFETY: four numbers of 4 bytes and one of 8 at offset 16.
unsafe impl Plain for Sampling {}

/// Adjusts logits in place.
pub struct Adjust<'a> {
    /// `[rows, vocab]`.
    pub logits: Slice<'a, f32>,
    /// Width of a row.
    pub vocab: usize,
    /// Every row and token named lies inside.
    pub adjustments: &'a [Adjustment],
    /// The same, on the device.
    pub on_device: Slice<'a, Adjustment>,
    /// `[rows]`.
    pub penalties: Slice<'a, Penalties>,
}

impl Adjust<'_> {
    /// Puts it into the stream. The first `adjustments.len()` values of `on_device` are used.
    ///
    /// # Errors
    /// As the driver says.
    ///
    /// # Panics
    /// If an adjustment lies outside the logits, or a buffer is too short.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let rows = self.logits.len() / self.vocab;
        let inside = |a: &Adjustment| (a.row as usize) < rows && (a.token as usize) < self.vocab;
        assert!(self.adjustments.iter().all(inside), "an adjustment outside the logits");
        assert!(self.on_device.len() >= self.adjustments.len() && self.penalties.len() >= rows, "lengths");
        let count = self.adjustments.len() as u32;
        if count == 0 {
            return Ok(());
        }
        let launch = device.launch(ADJUST, count.div_ceil(ADJUST_THREADS), ADJUST_THREADS, 0);
        let launch = launch.arg(self.logits).arg(self.vocab as u32).arg(self.on_device).arg(count);
        // SAFETY: the arguments of `adjust_logits`; what it reads and writes was checked above.
        unsafe { launch.arg(self.penalties).run() }
    }
}

/// Chooses a token per row.
pub struct Sample<'a> {
    /// `[rows, vocab]`; NaN counts as -inf, and of +inf the lowest id wins.
    pub logits: Slice<'a, f32>,
    /// Rows that are looked at: the first ones.
    pub rows: usize,
    /// Width of a row.
    pub vocab: usize,
    /// `[rows, ceil(vocab / 32)]`, bit i of word w for token 32 w + i: 1 = may be chosen. Where nothing above -inf
    /// may be, the lowest id that may be chosen is.
    pub mask: Option<Slice<'a, u32>>,
    /// `[rows]`.
    pub sampling: Slice<'a, Sampling>,
    /// `[rows]`, written.
    pub tokens: Slice<'a, u32>,
    /// `[rows]`, written: logit - ln(sum of exp(logits)) of the chosen token, without mask and temperature.
    pub log_probabilities: Option<Slice<'a, f32>>,
}

impl Sample<'_> {
    /// Puts it into the stream.
    ///
    /// # Errors
    /// As the driver says.
    ///
    /// # Panics
    /// If a buffer is too short.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let Self { rows, vocab, .. } = *self;
        assert!(vocab > 0 && self.logits.len() >= rows * vocab, "logits");
        assert!(self.mask.is_none_or(|mask| mask.len() >= rows * vocab.div_ceil(32)), "mask");
        assert!(self.sampling.len() >= rows && self.tokens.len() >= rows, "one of each per row");
        assert!(self.log_probabilities.is_none_or(|out| out.len() >= rows), "one log-probability per row");
        if rows == 0 {
            return Ok(());
        }
        let launch = device.launch(SAMPLE, rows as u32, SAMPLE_THREADS, 0).arg(self.logits).arg(vocab as u32);
        let launch = launch.arg(self.mask).arg(self.sampling).arg(self.tokens).arg(self.log_probabilities);
        // SAFETY: the arguments of `sample`; what it reads and writes was checked above.
        unsafe { launch.run() }
    }
}
