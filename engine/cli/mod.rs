//! The command line: one file per command. Tokens and results go to stdout, everything else to
//! stderr. Exit status: 0 done, 1 the run failed, 2 the command line is wrong.

mod bench;
mod chat;
mod check;
mod inspect;
mod interrupt;
mod plan;
mod run;
#[cfg(feature = "server")]
mod serve;
mod synth;
mod trace;

use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind as Wrong;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use kernels::attention::CacheType;
use models::Numerics;

use crate::engine::ArchiveOptions;
use crate::error::Error;
use crate::loaded::DenseFormat;
use crate::memory::parse_size;
use crate::request::{Request, SamplingParams};
use crate::session::{RunnerKind, SessionOptions};

/// The model a command uses when none is named.
const DEMO: &str = "demo";

/// Runs open-weight mixture-of-experts models from the files their makers publish.
#[derive(Parser)]
#[command(name = "moebius", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Stream an answer; without PROMPT on a terminal, chat
    Run(run::RunArgs),
    /// Serve an OpenAI-compatible HTTP API
    #[cfg(feature = "server")]
    Serve(serve::ServeArgs),
    /// Show what is in the files: architecture, parameters, formats, bytes, KV bytes per token
    Inspect(inspect::InspectArgs),
    /// Show what a model needs and how fast it can be on this machine, from its configuration and index alone
    Plan(plan::PlanArgs),
    /// Write logits and routing of given tokens as a safetensors file
    Trace(trace::TraceArgs),
    /// Compare two runners layer by layer and name the first that differs
    Check(check::CheckArgs),
    /// Write a seeded synthetic checkpoint of a known shape
    Synth(synth::SynthArgs),
    /// Measure ceilings, kernels, prefill, decode or quality beside the machine's own limits
    Bench(bench::BenchArgs),
}

/// How to compute.
#[derive(Args, Clone)]
struct ComputeArgs {
    /// Threads [default: one per core]
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// How exact: f32 throughout, or the precision the model was published for [default: model]
    #[arg(long, value_enum)]
    numerics: Option<NumericsArg>,
    /// Activations where weights have 4 or 8 bits: 8 bits instead of 16 (and where tile registers multiply bf16: one bf16
    /// instead of two); faster, and coarser than the model was published for
    #[arg(long, value_enum)]
    activations: Option<ActivationsArg>,
    /// Float weights of attention, dense and shared experts and the head: in 8-bit copies made at start; half
    /// the memory, and coarser than the model was published for
    #[arg(long, value_enum)]
    dense_format: Option<DenseFormatArg>,
    /// Implementation
    #[arg(long, value_enum, default_value = "cpu")]
    runner: RunnerArg,
    /// Longest prompt plus output, in tokens [default: what fits, up to 32768]
    #[arg(long, allow_negative_numbers = true)]
    context: Option<usize>,
}

/// The KV cache: how large, how exact, and where it goes when it leaves memory.
#[derive(Args, Clone)]
struct CacheArgs {
    /// Memory of the KV pool, e.g. 4GiB [default: for --context of all parallel requests, if that fits]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    kv_memory: Option<usize>,
    /// How keys and values are stored; fp8 is coarser than the model was published for [default: bf16; with
    /// --numerics reference f32]
    #[arg(long, value_enum)]
    kv_type: Option<KvTypeArg>,
    /// Folder that keeps cached prompts for later requests and later runs
    #[arg(long, value_name = "DIR")]
    kv_cache_dir: Option<PathBuf>,
    /// Most bytes of that folder [default: 10GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "kv_cache_dir")]
    kv_cache_size: Option<usize>,
}

/// Bytes of `--kv-cache-dir` unless the user says otherwise.
const KV_CACHE_BYTES: u64 = 10 << 30;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KvTypeArg {
    F32,
    Bf16,
    Fp8,
}

impl From<KvTypeArg> for CacheType {
    fn from(kv_type: KvTypeArg) -> Self {
        match kv_type {
            KvTypeArg::F32 => Self::F32,
            KvTypeArg::Bf16 => Self::Bf16,
            KvTypeArg::Fp8 => Self::Fp8,
        }
    }
}

impl CacheArgs {
    /// Adds what these say to how a model runs.
    fn apply(&self, compute: &ComputeArgs, options: SessionOptions) -> SessionOptions {
        let wrong = |message: &str| -> ! { Cli::command().error(Wrong::ArgumentConflict, message).exit() };
        let coarse = self.kv_type.is_some_and(|kv_type| kv_type != KvTypeArg::F32);
        if coarse && compute.is_exact() {
            wrong(
                "--kv-type bf16 and fp8 are coarser than --numerics reference and --runner reference allow",
            );
        }
        if self.kv_type == Some(KvTypeArg::Fp8) {
            static SAID: std::sync::Once = std::sync::Once::new();
            SAID.call_once(|| eprintln!("--kv-type fp8: cached keys and values of 8 bits"));
        }
        if self.kv_cache_dir.as_ref().is_some_and(|folder| folder.as_os_str().is_empty()) {
            wrong("--kv-cache-dir is empty");
        }
        let limit_bytes = self.kv_cache_size.map_or(KV_CACHE_BYTES, |bytes| bytes as u64);
        let store = |folder: &PathBuf| ArchiveOptions { folder: folder.clone(), limit_bytes };
        SessionOptions {
            kv_memory: self.kv_memory,
            kv_type: self.kv_type.map(CacheType::from),
            archive: self.kv_cache_dir.as_ref().map(store),
            ..options
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum NumericsArg {
    Reference,
    Model,
}

#[derive(Clone, Copy, ValueEnum)]
enum ActivationsArg {
    Int8,
}

#[derive(Clone, Copy, ValueEnum)]
enum DenseFormatArg {
    Q8,
}

#[derive(Clone, Copy, ValueEnum)]
enum RunnerArg {
    Reference,
    Cpu,
}

impl From<RunnerArg> for RunnerKind {
    fn from(runner: RunnerArg) -> Self {
        match runner {
            RunnerArg::Reference => Self::Reference,
            RunnerArg::Cpu => Self::Cpu,
        }
    }
}

impl ComputeArgs {
    /// Once per command: what was asked for that is coarser than the model was published for.
    fn say_what_is_coarser(&self) {
        static SAID: std::sync::Once = std::sync::Once::new();
        SAID.call_once(|| {
            if self.activations.is_some() {
                eprintln!(
                    "--activations int8: activations of 8 bits where weights have 4 or 8, of bf16 where tiles \
                     multiply bf16"
                );
            }
            if self.dense_format.is_some() {
                eprintln!("--dense-format q8: 8-bit copies of float weights");
            }
        });
    }

    /// Whether nothing coarser than f32 is allowed.
    fn is_exact(&self) -> bool {
        matches!(self.numerics, Some(NumericsArg::Reference)) || matches!(self.runner, RunnerArg::Reference)
    }

    fn options(&self) -> SessionOptions {
        let numerics = self.numerics.map(|numerics| match numerics {
            NumericsArg::Reference => Numerics::Reference,
            NumericsArg::Model => Numerics::Model,
        });
        if self.is_exact() && (self.activations.is_some() || self.dense_format.is_some()) {
            let message = "--activations and --dense-format are coarser than --numerics reference and \
                 --runner reference allow";
            Cli::command().error(Wrong::ArgumentConflict, message).exit();
        }
        let numerics = match self.activations {
            Some(ActivationsArg::Int8) => Some(Numerics::Int8Activations),
            None => numerics,
        };
        self.say_what_is_coarser();
        let options = SessionOptions {
            dense: self.dense_format.map_or(DenseFormat::Published, |DenseFormatArg::Q8| DenseFormat::Q8),
            threads: self.threads.map(usize::from),
            numerics,
            runner: self.runner.into(),
            context: self.context,
            sequences: 1,
            ..SessionOptions::default()
        };
        if numerics.is_some_and(|numerics| numerics != options.numerics()) {
            eprintln!("warning: the reference runner always computes in f32 (--numerics reference)");
        }
        options
    }
}

/// Choice of tokens; what is not given is as the model's maker recommends.
#[derive(Args, Clone, Default)]
struct SamplingArgs {
    /// 0 = greedy
    #[arg(long, allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep the smallest set of tokens whose probability reaches this
    #[arg(long, allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Keep the k most likely tokens; 0 = all
    #[arg(long, allow_negative_numbers = true)]
    top_k: Option<usize>,
    /// Drop tokens less likely than this share of the most likely one
    #[arg(long, allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Same seed, same output [default: drawn at random]
    #[arg(long, allow_negative_numbers = true)]
    seed: Option<u64>,
    /// Penalty on tokens seen in prompt or output; 1 = off
    #[arg(long, allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Penalty on tokens in the output
    #[arg(long, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Penalty per occurrence in the output
    #[arg(long, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Most tokens to generate [default: the model's, else what the context leaves]
    #[arg(long, allow_negative_numbers = true)]
    max_tokens: Option<usize>,
    /// Text that ends the answer; may be repeated
    #[arg(long)]
    stop: Vec<String>,
    /// Do not stop at the model's end-of-sequence tokens
    #[arg(long)]
    ignore_eos: bool,
}

impl SamplingArgs {
    fn apply(&self, request: &mut Request) {
        self.apply_sampling(&mut request.sampling);
        request.max_tokens = self.max_tokens.or(request.max_tokens);
        request.stop.strings.extend(self.stop.iter().cloned());
        if self.ignore_eos {
            request.stop.token_ids.clear();
        }
    }

    fn apply_sampling(&self, sampling: &mut SamplingParams) {
        let set = |field: &mut f32, value: Option<f32>| *field = value.unwrap_or(*field);
        set(&mut sampling.temperature, self.temperature);
        set(&mut sampling.top_p, self.top_p);
        set(&mut sampling.min_p, self.min_p);
        set(&mut sampling.repetition_penalty, self.repetition_penalty);
        set(&mut sampling.presence_penalty, self.presence_penalty);
        set(&mut sampling.frequency_penalty, self.frequency_penalty);
        sampling.top_k = self.top_k.unwrap_or(sampling.top_k);
        sampling.seed = self.seed.or(sampling.seed);
    }
}

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("MOEBIUS_LOG");
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();

    let result = match Cli::parse().command {
        None => run::demo(),
        Some(Command::Run(args)) => run::run(&args),
        #[cfg(feature = "server")]
        Some(Command::Serve(args)) => serve::run(&args),
        Some(Command::Inspect(args)) => inspect::run(&args),
        Some(Command::Plan(args)) => plan::run(&args),
        Some(Command::Trace(args)) => trace::run(&args),
        Some(Command::Check(args)) => check::run(&args),
        Some(Command::Synth(args)) => synth::run(&args),
        Some(Command::Bench(args)) => bench::run(&args),
    };
    match result {
        Ok(code) => code,
        // Whoever read the output has seen enough (`moebius run ... | head`).
        Err(Error::Io(place, error)) if place == "stdout" && error.kind() == ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The command line is wrong in a way the parser cannot see.
fn usage(message: &str) -> ExitCode {
    eprintln!("error: {message}");
    ExitCode::from(2)
}

/// Writes to stdout at once.
fn print(text: &str) -> Result<(), Error> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|error| Error::Io("stdout".into(), error))
}
