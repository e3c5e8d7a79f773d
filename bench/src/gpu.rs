//! `moebius bench gpu`: everything that one call can find out about the kernels on this machine's device.
//!
//! Three stages: what the device can do at most; whether the kernels compute what they should, on small shapes and on
//! those of Kimi K2, against plain sums in f64 and bit for bit against themselves; and how fast they are beside the
//! first. What is wrong or fails does not end a stage, for time on a device is rare: the rest of it is measured, and
//! then the run ends. Every row has gone to the sink when it was made.
//!
//! Weights and inputs are made on the device from a seed. Every size is in [`Sizes`], so that all of this also runs,
//! at tiny sizes, on an emulated device in the tests.

mod attention;
mod ceilings;
mod check;
mod decode;
mod dense;
mod experts;
mod latent;
mod moe;
mod sizes;
mod timer;

use std::time::{Duration, Instant};

use kernels::cuda::{Availability, Device, DeviceError};

pub use sizes::Sizes;

use crate::row::{NO_MODEL, Row, Setting, Times};
use crate::{Error, Sink};
use ceilings::Peaks;

/// A part of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Bandwidth of copies and reads, and the arithmetic peak.
    Ceilings,
    /// Results against plain ones, and bit for bit.
    Correctness,
    /// Times beside the ceilings, which are measured before.
    Timings,
}

impl Stage {
    /// In the order in which they run.
    pub const ALL: [Self; 3] = [Self::Ceilings, Self::Correctness, Self::Timings];

    /// The name that users know it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ceilings => "ceilings",
            Self::Correctness => "correctness",
            Self::Timings => "timings",
        }
    }

    /// How long it may take before what is left of it is left out. Looked at between measurements.
    fn limit(self) -> Duration {
        Duration::from_secs(match self {
            Self::Ceilings => 30,
            Self::Correctness => 105,
            Self::Timings => 150,
        })
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct GpuOptions {
    /// Only this stage; `Timings` with the ceilings.
    pub only: Option<Stage>,
}

/// Opens the device that the driver counts as `ordinal`.
///
/// # Errors
/// One line that says why there is nothing to check.
pub fn open(ordinal: usize) -> Result<Device, Error> {
    match Device::probe() {
        Availability::Devices(_) => Device::open(ordinal).map_err(|error| doing("open the device", error)),
        found => Err(Error::Unsupported(format!("{found}: nothing to check here"))),
    }
}

/// Name, driver and clocks of a device, as [`crate::machine::Machine::device`] has it.
pub fn describe(device: &Device) -> String {
    let info = device.info();
    let ((major, minor), driver) = (info.compute_capability, info.driver);
    let mut text = format!(
        "{} (compute {major}.{minor}, {} SMs, {:.1} GiB, CUDA {}.{}",
        info.name,
        info.multiprocessors,
        info.memory_bytes as f64 / (1u64 << 30) as f64,
        driver.0,
        driver.1
    );
    // What the driver library says of CUDA is not the version that people know a driver by.
    if let Some(version) = driver_version() {
        text += &format!(", driver {version}");
    }
    for (name, khz) in [("SM", info.clock_khz), ("memory", info.memory_clock_khz)] {
        if khz > 0 {
            text += &format!(", {name} {} MHz", khz / 1000);
        }
    }
    text + ")"
}

fn driver_version() -> Option<String> {
    let text = std::fs::read_to_string("/sys/module/nvidia/version").ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Runs the stages.
///
/// # Errors
/// The first that went wrong.
pub fn measure(
    device: &Device,
    options: &GpuOptions,
    sizes: &Sizes,
    sink: &mut dyn Sink,
) -> Result<(), Error> {
    let setting = Setting { numerics: "model".into(), runner: "cuda", threads: 1, model: NO_MODEL.into() };
    let mut gpu = Gpu {
        device,
        sink,
        setting,
        runs: sizes.runs,
        peaks: Peaks::default(),
        stage: Stage::Ceilings,
        begun: Instant::now(),
        left_out: 0,
        wrong: Vec::new(),
        failed: None,
    };
    gpu.note(&format!("device: {}", describe(device)));
    if let Ok(parts) = std::env::var(WITHOUT) {
        gpu.note(&format!("without: {parts}"));
    }
    for stage in Stage::ALL {
        let needed = options.only.is_none_or(|only| only == stage)
            || (stage == Stage::Ceilings && options.only == Some(Stage::Timings));
        if !needed {
            continue;
        }
        (gpu.stage, gpu.begun, gpu.left_out) = (stage, Instant::now(), 0);
        let memory = gpu.device.memory().map_err(|error| doing("ask for free memory", error))?;
        gpu.note(&format!("{}: {:.1} GB are free", stage.as_str(), memory.free_bytes as f64 / 1e9));
        let result = match stage {
            Stage::Ceilings => ceilings::measure(&mut gpu, sizes),
            Stage::Correctness => check::measure(&mut gpu, sizes),
            Stage::Timings => timings(&mut gpu, sizes),
        };
        let result = result.and_then(|()| gpu.verdict());
        let (seconds, left_out) = (gpu.begun.elapsed().as_secs_f64(), gpu.left_out);
        let name = stage.as_str();
        if let Err(error) = result {
            gpu.note(&format!("{name}: FAILED after {seconds:.1} s: {error}"));
            return Err(error);
        }
        let left_out = match left_out {
            0 => String::new(),
            count => format!("; {count} measurements left out, out of time"),
        };
        gpu.note(&format!("{name}: passed in {seconds:.1} s{left_out}"));
    }
    Ok(())
}

fn timings(gpu: &mut Gpu<'_>, sizes: &Sizes) -> Result<(), Error> {
    type Measure = fn(&mut Gpu<'_>, &Sizes) -> Result<(), Error>;
    let parts: [(&str, Measure); 4] = [
        ("experts", moe::measure),
        ("attention", attention::measure),
        ("dense", dense::measure),
        ("layer", decode::measure),
    ];
    for (name, part) in parts {
        if !is_left_out(name) {
            let result = part(gpu, sizes);
            gpu.go_on(result)?;
        }
    }
    Ok(())
}

/// Parts that are left out: `experts`, `attention`, `dense`, `layer`, and of experts `wgmma`. After some errors a
/// process cannot use its device any more; what comes after the part that did it can then be had from another process.
const WITHOUT: &str = "MOEBIUS_BENCH_GPU_WITHOUT";

fn is_left_out(part: &str) -> bool {
    std::env::var(WITHOUT).is_ok_and(|parts| names(&parts, part))
}

fn names(parts: &str, part: &str) -> bool {
    parts.split([',', ' ']).any(|name| name == part)
}

/// What every stage needs.
struct Gpu<'a> {
    device: &'a Device,
    sink: &'a mut dyn Sink,
    setting: Setting,
    /// Repetitions of what is timed.
    runs: usize,
    peaks: Peaks,
    stage: Stage,
    begun: Instant,
    left_out: usize,
    /// What checks found in this stage, in the order found.
    wrong: Vec<String>,
    /// The first part of this stage that failed.
    failed: Option<Error>,
}

impl Gpu<'_> {
    fn note(&mut self, text: &str) {
        self.sink.note(text);
    }

    /// Whether there is time for another measurement; counts those for which there was none.
    fn has_time(&mut self) -> bool {
        let ended = self.begun.elapsed() > self.stage.limit() || self.sink.stopped();
        self.left_out += usize::from(ended);
        !ended
    }

    fn row(&mut self, row: Row) -> Result<(), Error> {
        Ok(self.sink.row(row)?)
    }

    /// Says that a part of a stage failed and keeps the error for the end of the stage: the next part may succeed. (If
    /// the device is lost it fails at once.) Rows that cannot be written end everything.
    fn go_on(&mut self, result: Result<(), Error>) -> Result<(), Error> {
        match result {
            Err(error @ Error::Io(_)) => Err(error),
            Err(error) => {
                self.note(&format!("{}: a part FAILED: {error}", self.stage.as_str()));
                self.failed.get_or_insert(error);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// What came of the stage, after all of it.
    fn verdict(&mut self) -> Result<(), Error> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        match std::mem::take(&mut self.wrong).as_slice() {
            [] => Ok(()),
            [one] => Err(Error::Wrong(one.clone())),
            [first, others @ ..] => {
                Err(Error::Wrong(format!("{first}; wrong results besides: {}", others.len())))
            }
        }
    }

    /// Runs `work` some times and says how long each took on the device.
    fn runs(
        &self,
        count: usize,
        mut work: impl FnMut() -> Result<(), DeviceError>,
    ) -> Result<Times, DeviceError> {
        let mut events = vec![self.device.event()?];
        events[0].record()?;
        for _ in 0..count {
            work()?;
            let event = self.device.event()?;
            event.record()?;
            events.push(event);
        }
        let mut seconds = Vec::new();
        for pair in events.windows(2) {
            // Clocks of an emulated device may stand still.
            seconds.push((f64::from(pair[1].microseconds_since(&pair[0])?) * 1e-6).max(1e-9));
        }
        Ok(Times::of(&seconds))
    }

    /// A row of a check. What is larger than its tolerance is told now and an error at the end of the stage.
    fn checked(&mut self, name: &str, times: Times, findings: &[Finding]) -> Result<(), Error> {
        let mut row = Row::new(name, times, (0, 0), None, &self.setting);
        for finding in findings {
            row = row.with(finding.what, finding.value);
            if finding.most > 0.0 && finding.most.is_finite() {
                row = row.with(&format!("{}_tolerance", finding.what), finding.most);
            }
        }
        self.row(row)?;
        if let Some(Finding { what, value, most }) = findings.iter().find(|finding| finding.is_wrong()) {
            let wrong = format!("{name}: {what} {value:e}, at most {most:e} would be right");
            self.note(&format!("WRONG: {wrong}"));
            self.wrong.push(wrong);
        }
        Ok(())
    }
}

/// What a check found.
#[derive(Clone, Copy, Debug)]
struct Finding {
    what: &'static str,
    value: f64,
    /// Infinite where it is only told.
    most: f64,
}

impl Finding {
    /// An error of at most so much.
    fn error(what: &'static str, value: f64, most: f64) -> Self {
        Self { what, value, most }
    }

    /// Words that differ, where none may.
    fn differences(what: &'static str, count: u32) -> Self {
        Self { what, value: f64::from(count), most: 0.0 }
    }

    /// Words that differ, to be told.
    fn told(what: &'static str, count: u32) -> Self {
        Self { what, value: f64::from(count), most: f64::INFINITY }
    }

    fn is_wrong(&self) -> bool {
        self.value.is_nan() || self.value > self.most
    }
}

/// An error of the device while `what` was done.
fn doing(what: impl Into<String>, error: DeviceError) -> Error {
    Error::Device(what.into(), error)
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn parts_are_named_in_a_list() {
        assert!(names("dense,wgmma", "dense") && names("dense wgmma", "wgmma"));
        assert!(!names("", "dense") && !names("densely", "dense"));
    }
}
