//! `moebius bench kernels`: every operation at the shapes of K2 and Qwen3-30B, in every format.
//!
//! Weights and caches come in turn from memory larger than any cache, so that each call reads them as a step does;
//! activations stay in caches, as they do there. Regions find their threads awake, as within a step.
//!
//! Every path of `PATHS` is measured: f32 activations with all formats, 16- and 8-bit ones with weights of 4 or 8 bits.

mod cases;
mod weights;

use std::convert::Infallible;

use kernels::Isa;
use models::Numerics;

pub use cases::measure;

use crate::ceilings::{Bound, Work, Yardstick, summary, timed};
use crate::row::{NO_MODEL, Row, Setting};
use crate::{Error, Sink};
use weights::{Format, Stored};

/// What is measured.
#[derive(Clone, Debug, Default)]
pub struct OpsOptions {
    /// Only rows whose name contains this.
    pub filter: Option<String>,
    /// Timed calls of each; `None` = as many as give a steady median.
    pub runs: Option<usize>,
    /// Tiny shapes, for tests.
    pub quick: bool,
}

/// A way of computing that kernels can be asked for.
#[derive(Clone, Copy, Debug)]
struct Path {
    /// The numerics it belongs to.
    numerics: Numerics,
    /// Its arithmetic ceiling.
    peak: Bound,
}

/// All of them. In integers only products with weights of few bits differ, and in tiles those with bf16.
const PATHS: [Path; 3] = [
    Path { numerics: Numerics::Reference, peak: Bound::F32 },
    Path { numerics: Numerics::Model, peak: Bound::Int16 },
    Path { numerics: Numerics::Int8Activations, peak: Bound::Int8 },
];

/// What every case needs.
struct Ops<'a> {
    options: &'a OpsOptions,
    sink: &'a mut dyn Sink,
    yardstick: Yardstick,
    stored: Stored,
    isa: Isa,
    path: Path,
    setting: Setting,
    /// Rows so far.
    count: usize,
}

impl<'a> Ops<'a> {
    fn new(options: &'a OpsOptions, path: Path, sink: &'a mut dyn Sink) -> Result<Self, Error> {
        let yardstick = Yardstick::new(options.quick)?;
        sink.note(&format!("ceilings: {}", yardstick.ceilings()));
        let setting = Setting {
            numerics: path.numerics.as_str().into(),
            runner: "cpu",
            threads: rayon::current_num_threads(),
            model: NO_MODEL.into(),
        };
        let stored = Stored::new(if options.quick { 8 << 20 } else { 512 << 20 });
        let isa = Isa::detect();
        Ok(Self { options, sink, yardstick, stored, isa, path, setting, count: 0 })
    }

    /// Whether a row of this name is asked for; asked before anything is prepared for it.
    fn wants(&self, name: &str) -> bool {
        let filter = self.options.filter.as_deref();
        !self.sink.stopped() && filter.is_none_or(|filter| name.contains(filter))
    }

    /// The arithmetic ceiling of products with such weights; none if this path does with them what another one does.
    fn peak(&self, format: Format) -> Option<Bound> {
        match (self.path.numerics, format) {
            (Numerics::Reference, _) => Some(self.path.peak),
            (_, Format::Bf16) => (self.isa == Isa::Avx512Amx).then_some(Bound::Tiles),
            _ => format.is_quantised().then_some(self.path.peak),
        }
    }

    /// Times `call`, which gets the number of the run, and writes the row.
    fn time(
        &mut self,
        name: &str,
        work: Work,
        call: impl FnMut(&Stored, Isa, usize) + Send,
    ) -> Result<(), Error> {
        self.time_against(self.path.peak, name, work, call)
    }

    /// [`Ops::time`] with another arithmetic ceiling than that of the path.
    fn time_against(
        &mut self,
        peak: Bound,
        name: &str,
        work: Work,
        mut call: impl FnMut(&Stored, Isa, usize) + Send,
    ) -> Result<(), Error> {
        let (stored, isa, mut run) = (&self.stored, self.isa, 0);
        let mut once = || {
            run += 1;
            Ok::<_, Infallible>((timed(|| call(stored, isa, run)), work))
        };
        let Ok(_warm_up) = once();
        let (runs, quick, sink) = (self.options.runs, self.options.quick, &*self.sink);
        let enough = |count: usize, total: f64| match runs {
            Some(runs) => count >= runs.max(1),
            None => {
                let slow = (count >= 2 && total > 4.0) || (count >= 3 && total > 0.4);
                count >= 25 || slow || (quick && count >= 2) || sink.stopped()
            }
        };
        let Ok(samples) = self.yardstick.beside(peak, once, enough);
        let (times, work, share) = summary(&samples, peak);
        self.count += 1;
        Ok(self.sink.row(Row::new(name, times, work, Some(share), &self.setting))?)
    }
}
