//! A bar on stderr for whatever takes over a second.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is counted.
#[derive(Clone, Copy)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Tokens.
    Tokens,
    /// Files.
    Files,
}

/// Appears after a second, goes when it is dropped. Draws nothing where stderr is no terminal.
pub struct Progress {
    label: &'static str,
    unit: Unit,
    begun: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Nothing is drawn yet.
    pub fn new(label: &'static str, unit: Unit) -> Self {
        Self { label, unit, begun: Instant::now(), bar: None }
    }

    /// `done` of `total`.
    pub fn set(&mut self, done: u64, total: u64) {
        if self.bar.is_none() && self.begun.elapsed() > Duration::from_secs(1) && done < total {
            let template = match self.unit {
                Unit::Bytes => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}, {eta} left",
                Unit::Files => "{msg} [{bar:30}] {pos}/{len} files, {per_sec}, {eta} left",
                Unit::Tokens => "{msg} [{bar:30}] {pos}/{len} tokens, {per_sec}, {eta} left",
            };
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(template).expect("the template is constant");
            self.bar =
                Some(bar.with_style(style).with_message(self.label).with_elapsed(self.begun.elapsed()));
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    /// Takes the bar away.
    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
