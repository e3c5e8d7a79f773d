//! `moebius bench decode` and `prefill`: whole steps of the cpu runner, and every component of them.
//!
//! Every step takes new seeded tokens: repeated ones would go to the same experts and flatter. The weights are
//! touched first, and every timed step stands between two looks at the ceilings.

use std::sync::Arc;
use std::time::Instant;

use models::cpu::CpuRunner;
use models::{Batch, Capacity, Component, Model, Numerics, Probe, Runner, WantLogits};
use rayon::prelude::*;

use crate::ceilings::{Bound, Sample, Work, Yardstick, summary};
use crate::cost::{COMPONENTS, Cost, blocks, cost, most_experts, top_k};
use crate::machine::resident_bytes;
use crate::row::{Row, Setting};
use crate::seeded::Seeded;
use crate::{Error, Sink};

/// Tokens of one pass while a context is filled.
const CHUNK: usize = 512;
/// Passes before the first timed one.
const WARM_UP: usize = 2;

/// What is measured.
#[derive(Clone, Debug)]
pub struct StepOptions {
    /// How exact.
    pub numerics: Numerics,
    /// Sequences that decode together.
    pub batch: usize,
    /// Tokens of every sequence that are cached before the first timed step.
    pub context: usize,
    /// Timed steps; `None` = as many as give a steady median.
    pub runs: Option<usize>,
    /// Small ceilings, for tests.
    pub quick: bool,
}

impl StepOptions {
    fn decode_runs(&self) -> usize {
        self.runs.unwrap_or(24).max(1)
    }

    /// Most tokens of one sequence while decoding.
    pub fn decode_length(&self) -> usize {
        self.context + WARM_UP + self.decode_runs()
    }

    /// What the runner of [`decode`] holds.
    pub fn decode_capacity(&self) -> Capacity {
        let batch_tokens = self.batch.max(self.context.min(CHUNK));
        Capacity::new(self.batch * blocks(self.decode_length()), batch_tokens, self.batch)
    }

    /// What the runner of [`prefill`] of so many tokens holds.
    pub fn prefill_capacity(&self, tokens: usize) -> Capacity {
        let batch_tokens = tokens.max(self.context.min(CHUNK));
        Capacity::new(blocks(self.context + tokens), batch_tokens, 1)
    }
}

/// The arithmetic ceiling of what `numerics` permits.
pub fn arithmetic(numerics: Numerics) -> Bound {
    match numerics {
        Numerics::Reference => Bound::F32,
        Numerics::Model => Bound::Tiles,
        Numerics::Int8Activations => Bound::Int8,
    }
}

/// One token for each of `options.batch` sequences, again and again.
///
/// # Errors
/// If the context is longer than the model's, the runner fails, or a row cannot be written.
pub fn decode(
    model: &Arc<Model>,
    name: &str,
    options: &StepOptions,
    sink: &mut dyn Sink,
) -> Result<(), Error> {
    check_length(model, options.decode_length())?;
    let mut yardstick = ready(model, options, sink)?;
    let mut bench = StepBench::new(model, name, options, options.decode_capacity());
    let per_sequence = blocks(options.decode_length());
    let tables: Vec<Vec<u32>> = (0..options.batch)
        .map(|s| (s * per_sequence..(s + 1) * per_sequence).map(|b| b as u32).collect())
        .collect();
    for table in &tables {
        bench.fill(options.context, table)?;
    }
    let mut start = options.context;
    let mut next = |bench: &mut StepBench| {
        bench.batch.clear();
        for table in &tables {
            let token = bench.seeded.below(model.config.vocab);
            bench.batch.push(&[token], start, table, WantLogits::Last);
        }
        start += 1;
        bench.forward()
    };
    for _ in 0..WARM_UP {
        next(&mut bench)?;
    }
    let runs = options.decode_runs();
    let name = if options.batch == 1 { "decode".into() } else { format!("decode-{}", options.batch) };
    bench.measure(&mut yardstick, &name, (&mut next, &mut |count, _| count >= runs), sink)
}

/// Prompts of the given lengths, one after another, each in one pass.
///
/// # Errors
/// As [`decode`].
pub fn prefill(
    model: &Arc<Model>,
    name: &str,
    lengths: &[usize],
    options: &StepOptions,
    sink: &mut dyn Sink,
) -> Result<(), Error> {
    let longest = lengths.iter().max().copied().unwrap_or(0);
    check_length(model, options.context + longest)?;
    let mut yardstick = ready(model, options, sink)?;
    for &tokens in lengths {
        let mut bench = StepBench::new(model, name, options, options.prefill_capacity(tokens));
        let table: Vec<u32> = (0..blocks(options.context + tokens) as u32).collect();
        bench.fill(options.context, &table)?;
        let mut next = |bench: &mut StepBench| {
            let ids = bench.seeded.tokens(tokens, model.config.vocab);
            bench.batch.clear();
            bench.batch.push(&ids, options.context, &table, WantLogits::Last);
            bench.forward()
        };
        next(&mut bench)?;
        let runs = options.runs;
        let mut enough = |count: usize, total: f64| match runs {
            Some(runs) => count >= runs.max(1),
            None => count >= 9 || (count >= 3 && total > 10.0),
        };
        bench.measure(&mut yardstick, &format!("prefill-{tokens}"), (&mut next, &mut enough), sink)?;
    }
    Ok(())
}

/// Ceilings measured, weights touched.
fn ready(model: &Model, options: &StepOptions, sink: &mut dyn Sink) -> Result<Yardstick, Error> {
    let yardstick = Yardstick::new(options.quick)?;
    sink.note(&format!("ceilings: {}", yardstick.ceilings()));
    sink.note(&format!("touching {:.2} GB of weights", model.weight_bytes() as f64 / 1e9));
    touch(model);
    Ok(yardstick)
}

/// That the model takes sequences of so many tokens.
///
/// # Errors
/// If not.
pub fn check_length(model: &Model, length: usize) -> Result<(), Error> {
    let longest = model.config.max_positions;
    if length > longest {
        let message = format!("{length} tokens are more than the {longest} the model was made for");
        return Err(Error::Unsupported(message));
    }
    Ok(())
}

/// Runs the next step; gives back its seconds.
type Next<'n, 'a> = &'n mut dyn FnMut(&mut StepBench<'a>) -> Result<f64, Error>;

/// A runner with all that a measurement of it needs.
struct StepBench<'a> {
    model: &'a Arc<Model>,
    options: &'a StepOptions,
    capacity: Capacity,
    setting: Setting,
    runner: CpuRunner,
    seeded: Seeded,
    batch: Batch,
    logits: Vec<f32>,
    clock: Clock,
}

impl<'a> StepBench<'a> {
    fn new(model: &'a Arc<Model>, name: &str, options: &'a StepOptions, capacity: Capacity) -> Self {
        let runner = CpuRunner::new(Arc::clone(model), options.numerics, capacity);
        let setting = Setting {
            numerics: model.numerics_label(options.numerics),
            runner: runner.name(),
            threads: rayon::current_num_threads(),
            model: name.to_owned(),
        };
        let logits = vec![0.0; capacity.logit_rows * model.config.vocab];
        let clock = Clock::new(model);
        let (seeded, batch) = (Seeded::new(1), Batch::default());
        Self { model, options, capacity, setting, runner, seeded, batch, logits, clock }
    }

    /// Caches `tokens` tokens of the sequence with this table.
    fn fill(&mut self, tokens: usize, table: &[u32]) -> Result<(), Error> {
        for first in (0..tokens).step_by(CHUNK) {
            let ids = self.seeded.tokens(CHUNK.min(tokens - first), self.model.config.vocab);
            self.batch.clear();
            self.batch.push(&ids, first, table, WantLogits::None);
            self.forward()?;
        }
        Ok(())
    }

    /// Runs the batch; gives back its seconds. The clock then holds those of its components.
    fn forward(&mut self) -> Result<f64, Error> {
        let logits = &mut self.logits[..self.batch.logit_rows.len() * self.model.config.vocab];
        self.clock.begin();
        let begun = Instant::now();
        self.runner.forward(&self.batch, &mut self.clock, logits)?;
        let seconds = begun.elapsed().as_secs_f64();
        self.clock.enter(0, Component::Other);
        Ok(seconds)
    }

    /// Times `next` and writes the rows: the whole step, then its components.
    fn measure(
        mut self,
        yardstick: &mut Yardstick,
        name: &str,
        (next, enough): (Next<'_, 'a>, &mut dyn FnMut(usize, f64) -> bool),
        sink: &mut dyn Sink,
    ) -> Result<(), Error> {
        let peak = arithmetic(self.options.numerics);
        let mut parts: Vec<([f64; COMPONENTS.len()], Cost)> = Vec::new();
        let samples = yardstick.beside(
            peak,
            || {
                let seconds = next(&mut self)?;
                let mut cost = cost(self.model, self.options.numerics, &self.batch, &self.clock.distinct);
                if self.clock.seconds[Component::SharedExpert as usize] == 0.0 {
                    // It is computed together with the routed ones.
                    cost.join(Component::SharedExpert, Component::RoutedExperts);
                }
                parts.push((self.clock.seconds, cost));
                Ok::<_, Error>((seconds, cost.total()))
            },
            |count, total| enough(count, total) || sink.stopped(),
        )?;
        let (times, work, share) = summary(&samples, peak);
        let mut row = Row::new(name, times, work, Some(share), &self.setting);
        row.tokens_per_second = Some(self.batch.tokens.len() as f64 / times.median);
        let (cache, buffers) = CpuRunner::plan(&self.model.config, self.options.numerics, &self.capacity);
        let weights = self.model.weight_bytes();
        let peak_rss = resident_bytes().1.saturating_sub(yardstick.buffer_bytes());
        let row = row
            .with("context", self.options.context)
            .with("sequences", self.batch.sequences.len())
            .with("experts_per_layer", self.clock.mean_distinct(self.model))
            .with("weight_bytes", weights)
            .with("cache_bytes", cache)
            .with("buffer_bytes", buffers)
            .with("planned_bytes", weights + cache + buffers)
            .with("peak_rss_bytes", peak_rss);
        sink.row(row)?;
        let whole = times.median;
        for (component, part) in COMPONENTS {
            let samples: Vec<Sample> = samples
                .iter()
                .zip(&parts)
                .map(|(sample, (seconds, cost))| {
                    let (seconds, work) = (seconds[component as usize], cost.of(component));
                    Sample { seconds, work, ..*sample }
                })
                .filter(|sample| sample.seconds > 0.0 && sample.work != Work::NONE)
                .collect();
            if samples.is_empty() {
                continue;
            }
            let (times, work, share) = summary(&samples, peak);
            let row = Row::new(format!("{name}/{part}"), times, work, Some(share), &self.setting);
            sink.row(row.with("share_of_step", times.median / whole))?;
        }
        Ok(())
    }
}

/// Reads a byte of every page of every weight.
fn touch(model: &Model) {
    let skipped = &model.weights.skipped.tensors;
    let tensors = model.checkpoint.tensors().iter();
    let read = tensors.filter(|(name, _)| !skipped.iter().any(|(other, _)| other == *name));
    for (_, entry) in read {
        entry.bytes.as_slice().par_chunks(1 << 20).for_each(|part| {
            part.iter().step_by(4096).for_each(|byte| _ = std::hint::black_box(*byte));
        });
    }
}

/// Times the components of one pass and counts the experts of each layer.
struct Clock {
    /// By component.
    seconds: [f64; COMPONENTS.len()],
    at: (Component, Instant),
    /// Which experts the current layer used.
    used: Vec<bool>,
    /// Distinct experts by layer.
    distinct: Vec<usize>,
}

impl Clock {
    fn new(model: &Model) -> Self {
        Self {
            seconds: [0.0; COMPONENTS.len()],
            at: (Component::Other, Instant::now()),
            used: vec![false; most_experts(&model.config)],
            distinct: vec![0; model.config.layers.len()],
        }
    }

    fn begin(&mut self) {
        self.seconds = [0.0; COMPONENTS.len()];
        self.distinct.fill(0);
        self.at = (Component::Other, Instant::now());
    }

    /// Distinct experts of the layers that have any, on average.
    fn mean_distinct(&self, model: &Model) -> f64 {
        let layers = model.config.layers.iter().zip(&self.distinct).filter(|(layer, _)| top_k(layer) > 0);
        let (count, sum) = layers.fold((0, 0), |(count, sum), (_, n)| (count + 1, sum + n));
        sum as f64 / f64::from(count.max(1))
    }
}

impl Probe for Clock {
    fn enter(&mut self, _layer: usize, component: Component) {
        let now = Instant::now();
        self.seconds[self.at.0 as usize] += (now - self.at.1).as_secs_f64();
        self.at = (component, now);
    }

    fn routing(&mut self, layer: usize, _top_k: usize, ids: &[u32], _weights: &[f32]) {
        self.used.fill(false);
        ids.iter().for_each(|id| self.used[*id as usize] = true);
        self.distinct[layer] = self.used.iter().filter(|used| **used).count();
    }
}
