//! `moebius bench context`: what a long context costs. Attention over a full cache of a model's shape, without its
//! weights; or, with `--prefill`, a prompt really read to the end in chunks of given sizes, and again after a restart
//! with its blocks on disk.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bench::Sink as Rows;
use bench::context::{ContextOptions, attention, cache_bytes};
use bench::machine::resident_bytes;
use bench::row::{Row, Setting, Times};
use bench::seeded::Seeded;
use bench::synth::Recipe;
use clap::Args;

use super::{Output, RowsArgs, measured};
use crate::cli::{CacheArgs, ComputeArgs, DEMO, interrupt, usage};
use crate::engine::ArchiveOptions;
use crate::error::Error;
use crate::loaded::{Loaded, open_model};
use crate::memory::check_available;
use crate::progress::{Progress, Unit};
use crate::request::{Event, Request, SamplingParams, StopRule};
use crate::session::{Session, SessionOptions};

/// Log-probabilities that are compared between runs: all of a small vocabulary.
const COMPARED_LOGPROBS: usize = 1024;

#[derive(Args)]
pub struct ContextArgs {
    /// Checkpoint folder, hub id `org/name[@revision]`, `demo`; without --prefill also a shape that `synth` knows, such as
    /// full:moonshotai-Kimi-K2-Thinking
    #[arg(default_value = DEMO)]
    model: String,
    /// Tokens in the cache, or of the prompt [default: the model's context]
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: Option<u32>,
    /// Read a prompt of so many tokens to its end
    #[arg(long)]
    prefill: bool,
    /// With --prefill: sizes of chunks, e.g. 512,4096; the results must be the same bits
    #[arg(long, value_delimiter = ',', default_value = "512", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    chunk: Vec<u32>,
    /// Timed steps [default: enough for a steady median]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    runs: Option<u32>,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    rows: RowsArgs,
}

pub fn run(args: &ContextArgs) -> Result<ExitCode, Error> {
    if args.prefill { prefill(args) } else { full_cache(args) }
}

fn full_cache(args: &ContextArgs) -> Result<ExitCode, Error> {
    let config = match Recipe::find(&args.model, None) {
        Ok(recipe) => models::arch::describe(&recipe.config)?,
        Err(bench::synth::SynthError::Unknown(_)) => {
            open_model(&args.model, crate::loaded::DenseFormat::Published)?.config.clone()
        }
        Err(error) => return Err(Error::Unsupported(error.to_string())),
    };
    let session = args.cache.apply(&args.compute, args.compute.options());
    let tokens = args.tokens.map_or(config.max_positions, |tokens| tokens as usize);
    let options = ContextOptions {
        tokens,
        cache_type: session.kv_type.unwrap_or(session.numerics().cache_type()),
        runs: args.runs.map(|runs| runs as usize),
        quick: args.rows.quick,
    };
    check_available(&format!("a cache of {tokens} tokens"), cache_bytes(&config, &options))?;
    let pool = session.pool()?;
    measured(&args.rows, |sink| pool.install(|| attention(&config, &args.model, &options, sink)))
}

/// What a prompt's end gave.
struct Run {
    /// Of the prompt.
    tokens: usize,
    seconds: f64,
    cached_tokens: usize,
    token: u32,
    /// Bits of the log-probabilities.
    bits: Vec<u32>,
    /// Most that was resident while it ran, beyond what was before the engine was made.
    grown_bytes: u64,
    planned_bytes: usize,
    setting: Setting,
}

fn prefill(args: &ContextArgs) -> Result<ExitCode, Error> {
    let options = args.cache.apply(&args.compute, args.compute.options());
    // Blocks of the first run go to disk, if anywhere, and come back for the last.
    let archive = options.archive.clone();
    if let Some(ArchiveOptions { folder, .. }) = &archive
        && folder.read_dir().is_ok_and(|mut entries| entries.next().is_some())
    {
        let place = folder.display();
        return Ok(usage(&format!("--kv-cache-dir {place} is not empty: nothing would be computed")));
    }
    let mut runs = Vec::new();
    for (index, &chunk) in args.chunk.iter().enumerate() {
        let archive = archive.clone().filter(|_| index == 0);
        let options = SessionOptions { step_tokens: Some(chunk as usize), archive, ..options.clone() };
        runs.push((format!("context/prefill-by-{chunk}"), once(args, &options)?));
    }
    if archive.is_some() {
        let archive = archive.clone();
        let options = SessionOptions { step_tokens: Some(args.chunk[0] as usize), archive, ..options };
        runs.push(("context/restored".to_owned(), once(args, &options)?));
    }
    let (first, cold) = (&runs[0].1, runs[0].1.seconds);
    let same = |run: &Run| (run.token, &run.bits) == (first.token, &first.bits);
    let different = runs.iter().filter(|(_, run)| !same(run)).count();
    let code = measured(&args.rows, |sink: &mut Output| {
        for (name, run) in &runs {
            let computed = first.cached_tokens + run.cached_tokens;
            let mut row = Row::new(name.clone(), Times::of(&[run.seconds]), (0, 0), None, &run.setting)
                .with("cached_tokens", run.cached_tokens)
                .with("same_bits", same(run))
                .with("compared_logprobs", run.bits.len())
                .with("grown_bytes", run.grown_bytes)
                .with("planned_bytes", run.planned_bytes)
                .with("times_sooner", cold / run.seconds);
            row.tokens_per_second = (computed == 0).then_some(run.tokens as f64 / run.seconds);
            sink.row(row)?;
        }
        Ok(())
    })?;
    if different > 0 {
        return Err(Error::Unsupported(format!("{different} runs gave other bits than the first")));
    }
    Ok(code)
}

/// Reads a prompt whose end fills the context, in an engine of its own.
fn once(args: &ContextArgs, options: &SessionOptions) -> Result<Run, Error> {
    let loaded = Loaded::open_with(&args.model, options.dense)?;
    let config = &loaded.model.config;
    let tokens = args.tokens.map_or(config.max_positions, |tokens| tokens as usize);
    let prompt = Seeded::new(11).tokens(tokens - 1, config.vocab);
    let (vocab, weights) = (config.vocab, loaded.model.weight_bytes());
    let before = resident_bytes().0;
    let peak = Arc::new(AtomicU64::new(before));
    let seen = Arc::clone(&peak);
    let observer = move |_: &_| {
        seen.fetch_max(resident_bytes().0, Ordering::Relaxed);
    };
    let options = SessionOptions { context: Some(tokens), sequences: 1, ..options.clone() };
    let session = Session::start_watched(loaded, &options, Some(Box::new(observer)))?;
    eprintln!("{}: context {} tokens; {}", args.model, session.context, session.plan);
    let request = Request {
        prompt,
        max_tokens: Some(1),
        sampling: SamplingParams::greedy(),
        stop: StopRule::default(),
        logprobs: Some(vocab.min(COMPARED_LOGPROBS)),
        skip_special_tokens: true,
        priority: 0,
        cache_salt: String::new(),
    };
    let mut progress = Progress::new("reading the prompt", Unit::Tokens);
    let (begun, mut first_token, mut bits) = (Instant::now(), None, Vec::new());
    let answer = session.generate(request, |event| {
        match event {
            Event::Prefill { done, total } => progress.set(*done as u64, *total as u64),
            Event::Token { logprobs: Some(logprobs), .. } => {
                first_token.get_or_insert(begun.elapsed().as_secs_f64());
                bits = logprobs.top.iter().flat_map(|(id, logprob)| [*id, logprob.to_bits()]).collect();
            }
            _ => {}
        }
        !interrupt::asked()
    })?;
    let Some(seconds) = first_token else {
        return Err(Error::Unsupported("interrupted".into()));
    };
    Ok(Run {
        tokens: tokens - 1,
        seconds,
        cached_tokens: answer.summary.cached_tokens,
        token: answer.token_ids[0],
        bits,
        grown_bytes: peak.load(Ordering::Relaxed).saturating_sub(before),
        planned_bytes: session.plan.required_bytes() + weights,
        setting: Setting {
            numerics: session.numerics.clone(),
            runner: session.runner,
            threads: session.threads,
            model: args.model.clone(),
        },
    })
}
