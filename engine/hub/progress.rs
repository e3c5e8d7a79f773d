//! What the user sees of a download.
//!
//! Owns the two forms: a bar on a terminal, a line now and then elsewhere. Refuses to know where the
//! bytes come from. Nothing here goes to stdout, which belongs to the tokens.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};

/// Receives the course of a download. Positions and totals are bytes of all files together.
pub trait Progress {
    /// The bytes that are needed, as far as known; grows when the weights become known.
    fn total(&mut self, bytes: u64);
    /// A file begins, of so many bytes.
    fn file(&mut self, name: &str, bytes: u64);
    /// The bytes that are there; falls when a partial file has to be given up.
    fn position(&mut self, bytes: u64);
    /// Something the user should know: a retry, a wait.
    fn note(&mut self, text: &str);
    /// All is there.
    fn finish(&mut self);
}

/// No display.
impl Progress for () {
    fn total(&mut self, _bytes: u64) {}
    fn file(&mut self, _name: &str, _bytes: u64) {}
    fn position(&mut self, _bytes: u64) {}
    fn note(&mut self, _text: &str) {}
    fn finish(&mut self) {}
}

/// A bar if stderr is a terminal, else lines.
pub fn to_stderr() -> Box<dyn Progress> {
    if std::io::stderr().is_terminal() {
        Box::new(Bar::new())
    } else {
        Box::new(Lines::new(std::io::stderr(), Duration::from_secs(10)))
    }
}

/// Bytes, rate and remaining time in one line on stderr.
pub struct Bar(ProgressBar);

impl Bar {
    /// An empty bar.
    pub fn new() -> Self {
        let bar = ProgressBar::new(0);
        let form = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left";
        // A template is checked when it is read; this one is fixed.
        bar.set_style(ProgressStyle::with_template(form).unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self(bar)
    }
}

impl Default for Bar {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for Bar {
    fn total(&mut self, bytes: u64) {
        self.0.set_length(bytes);
    }

    fn file(&mut self, name: &str, _bytes: u64) {
        self.0.set_message(name.to_owned());
    }

    fn position(&mut self, bytes: u64) {
        self.0.set_position(bytes);
    }

    fn note(&mut self, text: &str) {
        self.0.println(text);
    }

    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A line for each file, and one with bytes, rate and remaining time every so often.
pub struct Lines<W> {
    out: W,
    every: Duration,
    last: Instant,
    total: u64,
    position: u64,
    /// Where and when the first file began: what was there before says nothing about the rate.
    start: Option<(Instant, u64)>,
}

impl<W: Write> Lines<W> {
    /// Lines on `out`, one `every` so often while bytes arrive.
    pub fn new(out: W, every: Duration) -> Self {
        Self { out, every, last: Instant::now(), total: 0, position: 0, start: None }
    }

    /// A closed stderr must not end a download.
    fn line(&mut self, text: &str) {
        let _ = writeln!(self.out, "{text}");
    }
}

impl<W: Write> Progress for Lines<W> {
    fn total(&mut self, bytes: u64) {
        self.total = bytes;
    }

    fn file(&mut self, name: &str, bytes: u64) {
        self.start.get_or_insert((Instant::now(), self.position));
        self.line(&format!("downloading {name}, {}", HumanBytes(bytes)));
    }

    fn position(&mut self, bytes: u64) {
        self.position = bytes;
        let Some((begun, from)) = self.start else { return };
        if self.last.elapsed() < self.every {
            return;
        }
        self.last = Instant::now();
        let seconds = begun.elapsed().as_secs_f64().max(1e-3);
        let rate = bytes.saturating_sub(from) as f64 / seconds;
        let mut line =
            format!("{} of {}, {}/s", HumanBytes(bytes), HumanBytes(self.total), HumanBytes(rate as u64));
        if rate >= 1.0 {
            let left = Duration::from_secs_f64(self.total.saturating_sub(bytes) as f64 / rate);
            line += &format!(", {} left", HumanDuration(left));
        }
        self.line(&line);
    }

    fn note(&mut self, text: &str) {
        self.line(text);
    }

    fn finish(&mut self) {
        if let Some((begun, from)) = self.start.take() {
            let bytes = HumanBytes(self.position.saturating_sub(from));
            self.line(&format!("downloaded {bytes} in {}", HumanDuration(begun.elapsed())));
        }
    }
}
