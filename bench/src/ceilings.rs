//! What the machine can do at most, and measuring beside it.
//!
//! A shared host's memory bandwidth drifts by tens of per cent within minutes. So a share of a ceiling is never
//! taken across runs: [`Yardstick::beside`] measures the ceilings between timed calls, a few milliseconds each,
//! and a row's share is the median of the ratios.
//!
//! The ceilings are those of all threads of the current rayon pool together. `bf16` is the higher of the bf16
//! instruction's and f32's, with which such products can be computed too: on some processors (Sapphire Rapids) the
//! former is no faster. `bf16_tiles` is the higher of that and the tile registers', where there are such; two planes of bf16
//! take two of its operations for one.

mod command;
mod instructions;

use std::io;
use std::time::Instant;

use kernels::team;
use memmap2::MmapMut;

pub use command::measure;
use instructions::{Peak, peaks, read};

use crate::row::{Share, Times, median};

/// What may bind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Reading memory, bytes per second.
    ReadBandwidth,
    /// Copying memory of a device, bytes per second that are read or written.
    CopyBandwidth,
    /// Operations on f32, fused.
    F32,
    /// Products of bf16 summed in f32, by whatever vector instruction is fastest.
    Bf16,
    /// The same in tile registers, if there are such.
    Tiles,
    /// Products of 16-bit integers summed in 32 bits.
    Int16,
    /// Products of 8-bit integers summed in 32 bits.
    Int8,
}

impl Bound {
    /// The arithmetic ones.
    pub const PEAKS: [Self; 5] = [Self::F32, Self::Bf16, Self::Tiles, Self::Int16, Self::Int8];

    /// Whether `peak` is a way to compute with such values.
    fn takes(self, peak: &Peak) -> bool {
        peak.bound == self
            || (matches!(self, Self::Bf16 | Self::Tiles) && peak.bound == Self::F32)
            || (self == Self::Tiles && peak.bound == Self::Bf16)
    }

    /// The name in results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ReadBandwidth => "read_bandwidth",
            Self::CopyBandwidth => "copy_bandwidth",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Tiles => "bf16_tiles",
            Self::Int16 => "int16",
            Self::Int8 => "int8",
        }
    }
}

/// Bytes or operations per second, of all threads together.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes per second.
    pub read_bandwidth: f64,
    /// Operations per second; a multiply-add counts as two. So the others.
    pub f32: f64,
    /// See [`Bound::Bf16`].
    pub bf16: f64,
    /// See [`Bound::Tiles`].
    pub tiles: f64,
    /// See [`Bound::Int16`].
    pub int16: f64,
    /// See [`Bound::Int8`].
    pub int8: f64,
}

impl Ceilings {
    /// One of them.
    pub fn of(&self, bound: Bound) -> f64 {
        match bound {
            // What streams through a host is measured by reading.
            Bound::ReadBandwidth | Bound::CopyBandwidth => self.read_bandwidth,
            Bound::F32 => self.f32,
            Bound::Bf16 => self.bf16,
            Bound::Tiles => self.tiles,
            Bound::Int16 => self.int16,
            Bound::Int8 => self.int8,
        }
    }
}

impl std::fmt::Display for Ceilings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "read {:.1} GB/s", self.read_bandwidth / 1e9)?;
        for bound in Bound::PEAKS {
            write!(f, ", {} {:.0} Gop/s", bound.as_str(), self.of(bound) / 1e9)?;
        }
        Ok(())
    }
}

/// What one call must do at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Bytes to read, each once.
    pub bytes: u64,
    /// Operations; a multiply-add counts as two.
    pub operations: u64,
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.operations += other.operations;
    }
}

impl Work {
    /// Nothing.
    pub const NONE: Self = Self { bytes: 0, operations: 0 };

    /// Least seconds if only `bound`, at `rate` per second, binds.
    fn seconds(&self, bound: Bound, rate: f64) -> f64 {
        let count = if bound == Bound::ReadBandwidth { self.bytes } else { self.operations };
        count as f64 / rate
    }
}

/// One timed call and the ceilings measured beside it.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Of the call.
    pub seconds: f64,
    /// What it did.
    pub work: Work,
    /// Bytes per second.
    pub read: f64,
    /// Operations per second.
    pub peak: f64,
}

impl Sample {
    fn least(&self, bound: Bound) -> f64 {
        self.work.seconds(bound, if bound == Bound::ReadBandwidth { self.read } else { self.peak })
    }
}

/// Times and medians of bytes, operations and share of samples whose arithmetic ceiling is `peak`; of the two
/// ceilings the one that asks for more time binds.
///
/// # Panics
/// If there is no sample.
pub fn summary(samples: &[Sample], peak: Bound) -> (Times, (u64, u64), Share) {
    let of = |f: &dyn Fn(&Sample) -> f64| median(samples.iter().map(f));
    let (read, compute) = (of(&|s| s.least(Bound::ReadBandwidth)), of(&|s| s.least(peak)));
    let bound = if read >= compute { Bound::ReadBandwidth } else { peak };
    let value = of(&|s| if bound == Bound::ReadBandwidth { s.read } else { s.peak });
    let share = Share { bound, value, share: of(&|s| s.least(bound) / s.seconds) };
    let seconds: Vec<f64> = samples.iter().map(|s| s.seconds).collect();
    let counts = (of(&|s| s.work.bytes as f64) as u64, of(&|s| s.work.operations as f64) as u64);
    (Times::of(&seconds), counts, share)
}

/// Bytes one task of a read takes.
const READ_TASK: usize = 1 << 20;
/// Tasks per thread of a peak: a thread that is late does not halve the result.
const PEAK_TASKS: usize = 8;
/// How long one look at an arithmetic peak takes.
const PEAK_SECONDS: f64 = 2e-3;
/// Parts of memory that a thread reads side by side: on some machines more than one from front to back.
const STREAMS: usize = 4;
/// How a thread reads memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// Front to back, asking so many bytes ahead.
    Stream(usize),
    /// [`STREAMS`] parts at a time.
    SideBySide,
}
/// Ways to read of which the best is the ceiling.
const READINGS: [Reading; 5] = [
    Reading::Stream(0),
    Reading::Stream(512),
    Reading::Stream(2048),
    Reading::Stream(8192),
    Reading::SideBySide,
];

/// Pages of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    Small,
    Huge,
}

/// Memory whose every page is its own, first touched by the threads of the pool.
fn memory(bytes: usize, pages: Pages) -> io::Result<MmapMut> {
    let mut memory = MmapMut::map_anon(bytes)?;
    #[cfg(target_os = "linux")]
    {
        use memmap2::Advice;
        // A kernel without huge pages refuses the advice; the pages are then small.
        let _ = memory.advise(if pages == Pages::Huge { Advice::HugePage } else { Advice::NoHugePage });
    }
    let _ = pages;
    use rayon::prelude::*;
    memory.par_chunks_mut(2 << 20).for_each(|part| part.iter_mut().step_by(4096).for_each(|byte| *byte = 1));
    Ok(memory)
}

/// Seconds of `body`, whose regions find all threads awake.
pub(crate) fn timed(body: impl FnOnce() + Send) -> f64 {
    team::hold(|| {
        team::run(4 * team::threads(), &|_| spin(10e-6));
        let begun = Instant::now();
        body();
        begun.elapsed().as_secs_f64()
    })
}

/// Keeps the thread busy for so many seconds.
fn spin(seconds: f64) {
    if seconds == 0.0 {
        return;
    }
    let begun = Instant::now();
    while begun.elapsed().as_secs_f64() < seconds {
        std::hint::spin_loop();
    }
}

/// Bytes per second of one read of `bytes`.
fn read_rate(bytes: &[u8], reading: Reading) -> f64 {
    let seconds = match reading {
        Reading::Stream(prefetch) => {
            let tasks: Vec<&[u8]> = bytes.chunks(READ_TASK).collect();
            timed(|| team::run(tasks.len(), &|i| read(tasks[i], prefetch)))
        }
        Reading::SideBySide => {
            let tasks: Vec<&[u8]> = bytes.chunks(STREAMS * READ_TASK).collect();
            timed(|| team::run(tasks.len(), &|i| read_side_by_side(tasks[i])))
        }
    };
    bytes.len() as f64 / seconds
}

/// Reads all bytes once, some from each of [`STREAMS`] parts in turn.
fn read_side_by_side(bytes: &[u8]) {
    /// Bytes from one part at a time.
    const TURN: usize = 2048;
    let part = bytes.len() / STREAMS;
    for at in (0..part).step_by(TURN) {
        for bytes in bytes.chunks_exact(part) {
            read(&bytes[at..part.min(at + TURN)], 0);
        }
    }
}

/// Turns of a peak's loop that keep a thread busy for [`PEAK_SECONDS`].
fn turns(peak: &Peak) -> u64 {
    let trial = 2000;
    peak.run(trial);
    let begun = Instant::now();
    peak.run(trial);
    (PEAK_SECONDS / begun.elapsed().as_secs_f64().max(1e-9) * trial as f64) as u64 + 1
}

/// Operations per second with all threads on it.
fn peak_rate(peak: &Peak, turns: u64) -> f64 {
    let (tasks, turns) = (PEAK_TASKS * team::threads(), turns.div_ceil(PEAK_TASKS as u64));
    let seconds = timed(|| team::run(tasks, &|_| peak.run(turns)));
    (tasks as u64 * turns * peak.operations) as f64 / seconds
}

/// The greatest of some values: what a machine can do if nothing else runs.
fn best_of(count: usize, mut value: impl FnMut() -> f64) -> f64 {
    (0..count).map(|_| value()).fold(0.0, f64::max)
}

/// The best way to compute with each kind of value, and how many turns of it to time.
struct Best {
    bound: Bound,
    peak: Peak,
    turns: u64,
}

/// Measures the ceilings again and again, beside what is timed. For the pool that it was made in.
pub struct Yardstick {
    buffer: MmapMut,
    window: usize,
    next: usize,
    reading: Reading,
    best: Vec<Best>,
    ceilings: Ceilings,
}

impl Yardstick {
    /// Measures all ceilings, in less than a second. Holds 512 MiB to read from, as no cache does; with `quick`
    /// 32 MiB, for tests.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(quick: bool) -> io::Result<Self> {
        let bytes = if quick { 32 << 20 } else { 512 << 20 };
        let buffer = memory(bytes, Pages::Huge)?;
        let rated = peaks().into_iter().map(|peak| {
            let turns = turns(&peak);
            (best_of(3, || peak_rate(&peak, turns)), peak, turns)
        });
        let rated: Vec<(f64, Peak, u64)> = rated.collect();
        let best = Bound::PEAKS.into_iter().filter_map(|bound| {
            let ways = rated.iter().filter(|(_, peak, _)| bound.takes(peak));
            let &(_, peak, turns) = ways.max_by(|a, b| a.0.total_cmp(&b.0))?;
            Some(Best { bound, peak, turns })
        });
        let best = best.collect();
        let nothing =
            Ceilings { read_bandwidth: 0.0, f32: 0.0, bf16: 0.0, tiles: 0.0, int16: 0.0, int8: 0.0 };
        let mut yardstick =
            Self { buffer, window: bytes / 4, next: 0, reading: Reading::Stream(0), best, ceilings: nothing };
        let mut reads = Vec::new();
        for reading in READINGS {
            yardstick.reading = reading;
            reads.push((best_of(5, || yardstick.read()), reading));
        }
        let (rate, reading) = reads.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are some");
        yardstick.reading = reading;
        let peak = |bound| best_of(5, || yardstick.peak(bound));
        let [f32, bf16, tiles, int16, int8] = Bound::PEAKS.map(peak);
        yardstick.ceilings = Ceilings { read_bandwidth: rate, f32, bf16, tiles, int16, int8 };
        Ok(yardstick)
    }

    /// As measured at the start, the best of some looks.
    pub fn ceilings(&self) -> Ceilings {
        self.ceilings
    }

    /// Resident memory that is the yardstick's own.
    pub fn buffer_bytes(&self) -> u64 {
        self.buffer.len() as u64
    }

    /// Bytes per second, now.
    fn read(&mut self) -> f64 {
        let part = &self.buffer[self.next..self.next + self.window];
        self.next = (self.next + self.window) % self.buffer.len();
        read_rate(part, self.reading)
    }

    /// Operations per second, now.
    fn peak(&self, bound: Bound) -> f64 {
        let best = self.best.iter().find(|best| best.bound == bound).expect("an arithmetic bound");
        peak_rate(&best.peak, best.turns)
    }

    /// Times `call` as often as `enough` does not say stop, each between two looks at the ceilings. The call gives
    /// back how long it took and what it did; `enough` gets the number of samples and the seconds of all so far.
    ///
    /// # Errors
    /// If a call fails.
    pub fn beside<E>(
        &mut self,
        peak: Bound,
        mut call: impl FnMut() -> Result<(f64, Work), E>,
        mut enough: impl FnMut(usize, f64) -> bool,
    ) -> Result<Vec<Sample>, E> {
        let (mut samples, mut total) = (Vec::new(), 0.0);
        let mut before = (self.read(), self.peak(peak));
        while samples.is_empty() || !enough(samples.len(), total) {
            let (seconds, work) = call()?;
            let after = (self.read(), self.peak(peak));
            let (read, peak) = ((before.0 + after.0) / 2.0, (before.1 + after.1) / 2.0);
            samples.push(Sample { seconds, work, read, peak });
            (before, total) = (after, total + seconds);
        }
        Ok(samples)
    }
}
