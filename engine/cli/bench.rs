//! `moebius bench`: ceilings, kernels, prefill, decode and quality, measured beside the machine's own limits.

mod context;
mod gpu;
mod swarm;

use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use bench::machine::Machine;
use bench::ops::OpsOptions;
use bench::quality::Text;
use bench::row::{Row, append_csv, table_head};
use bench::seeded::Seeded;
use bench::step::StepOptions;
use bench::{Sink, ceilings, ops, quality, step};
use clap::{Args, Subcommand};
use models::{Capacity, Model, Numerics};

use super::{ActivationsArg, DEMO, DenseFormatArg, NumericsArg, RunnerArg, interrupt, usage};
use crate::error::Error;
use crate::loaded::{DenseFormat, Loaded, open_model};
use crate::memory::check_capacity;
use crate::session::SessionOptions;
use crate::tokenizer::Specials;

#[derive(Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// What the machine can do at most: read bandwidth, arithmetic peaks, cost of a parallel region
    Ceilings {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Every operation at the shapes of K2 and Qwen3-30B, in every format
    Kernels(KernelsArgs),
    /// One token at a time, whole steps and their components
    Decode(DecodeArgs),
    /// Whole prompts and their components
    Prefill(PrefillArgs),
    /// A long context: attention over a full cache, or prompts read to the end
    Context(context::ContextArgs),
    /// Many agents that share a prefix, on a whole engine
    Serve(swarm::ServeArgs),
    /// A CUDA device: what it can do at most, whether kernels are right on it, and how fast they are
    Gpu(gpu::GpuArgs),
    /// What coarser options cost: divergence from --numerics reference, agreement of the likeliest token
    Quality(QualityArgs),
}

#[derive(Args)]
struct OutputArgs {
    /// Threads [default: one per core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    rows: RowsArgs,
}

/// Where rows go.
#[derive(Args)]
struct RowsArgs {
    /// Print one JSON object per row
    #[arg(long)]
    json: bool,
    /// Append the rows to a CSV file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Small sizes, for tests; the figures mean nothing
    #[arg(long, hide = true)]
    quick: bool,
}

#[derive(Args)]
struct KernelsArgs {
    /// Only rows whose name contains this, e.g. experts/k2/int4
    filter: Option<String>,
    /// Timed calls of each [default: enough for a steady median]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    runs: Option<u32>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Args)]
struct QualityArgs {
    /// Checkpoint folder, hub id `org/name[@revision]`, or `demo`
    #[arg(default_value = DEMO)]
    model: String,
    /// Compare on the end of this text [default: for demo a built-in passage, else random tokens]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Most tokens to compare on
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    tokens: u32,
    /// Only this variant; may be repeated [default: all]
    #[arg(long, value_name = "NAME")]
    variant: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Args)]
struct ModelArgs {
    /// Checkpoint folder, hub id `org/name[@revision]`, or `demo`
    #[arg(default_value = DEMO)]
    model: String,
    /// How exact: f32 throughout, or the precision the model was published for [default: model]
    #[arg(long, value_enum)]
    numerics: Option<NumericsArg>,
    /// Activations where weights have 4 or 8 bits: 8 bits instead of 16 (in tiles: one bf16 instead of two)
    #[arg(long, value_enum, conflicts_with = "numerics")]
    activations: Option<ActivationsArg>,
    /// Float weights outside the routed experts: in 8-bit copies
    #[arg(long, value_enum)]
    dense_format: Option<DenseFormatArg>,
    /// Implementation
    #[arg(long, value_enum, default_value = "cpu")]
    runner: RunnerArg,
    /// Timed runs [default: enough for a steady median]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    runs: Option<u32>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Args)]
struct DecodeArgs {
    /// Sequences that decode together
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Tokens of every sequence that are cached before
    #[arg(long, default_value_t = 128)]
    context: u32,
    #[command(flatten)]
    common: ModelArgs,
}

#[derive(Args)]
struct PrefillArgs {
    /// Lengths of prompts, e.g. 512,2048
    #[arg(long, value_delimiter = ',', default_value = "512", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    tokens: Vec<u32>,
    /// Tokens that are cached before the prompt
    #[arg(long, default_value_t = 0)]
    context: u32,
    #[command(flatten)]
    common: ModelArgs,
}

pub fn run(args: &BenchArgs) -> Result<ExitCode, Error> {
    interrupt::install();
    match &args.what {
        What::Ceilings { output } => {
            let threads = pool(output)?.current_num_threads();
            // It makes a pool for every number of threads.
            measured(&output.rows, |sink| ceilings::measure(threads, output.rows.quick, sink))
        }
        What::Kernels(args) => {
            let (filter, runs) = (args.filter.clone(), args.runs.map(|runs| runs as usize));
            let options = OpsOptions { filter, runs, quick: args.output.rows.quick };
            let pool = pool(&args.output)?;
            measured(&args.output.rows, |output| pool.install(|| ops::measure(&options, output)))
        }
        What::Quality(args) => compare(args),
        What::Context(args) => context::run(args),
        What::Serve(args) => swarm::run(args),
        What::Gpu(args) => gpu::run(args),
        What::Decode(args) => {
            let common = &args.common;
            let options = StepOptions { batch: args.batch as usize, ..common.options(args.context) };
            let sizes = [(options.decode_length(), options.decode_capacity())];
            common.measured(&sizes, |model, sink| step::decode(model, &common.model, &options, sink))
        }
        What::Prefill(args) => {
            let common = &args.common;
            let lengths: Vec<usize> = args.tokens.iter().map(|&tokens| tokens as usize).collect();
            let options = common.options(args.context);
            let size = |&tokens: &usize| (options.context + tokens, options.prefill_capacity(tokens));
            let sizes: Vec<_> = lengths.iter().map(size).collect();
            common
                .measured(&sizes, |model, sink| step::prefill(model, &common.model, &lengths, &options, sink))
        }
    }
}

fn compare(args: &QualityArgs) -> Result<ExitCode, Error> {
    let wanted = args.tokens as usize;
    let (model, text) = if args.text.is_some() || args.model == DEMO {
        let loaded = Loaded::open(&args.model)?;
        let (text, source) = match &args.text {
            Some(path) => {
                let failed = |error| Error::Io(path.display().to_string(), error);
                let bytes = std::fs::read(path).map_err(failed)?;
                (String::from_utf8_lossy(&bytes).into_owned(), path.display().to_string())
            }
            None => (quality::PASSAGE.to_owned(), "built-in passage".to_owned()),
        };
        // The end of a text is what models in its likeness were not trained on.
        let mut tokens = loaded.tokenizer.encode(&text, Specials::Plain)?;
        tokens.drain(..tokens.len().saturating_sub(wanted));
        (loaded.model, Text { tokens, source })
    } else {
        let model = open_model(&args.model, DenseFormat::Published)?;
        let tokens = Seeded::new(0).tokens(wanted, model.config.vocab);
        (model, Text { tokens, source: "random tokens".into() })
    };
    check_capacity(&model.config, Numerics::Reference, &quality::capacity(&model))?;
    let pool = pool(&args.output)?;
    measured(&args.output.rows, |output| {
        let q8 = || {
            let model = open_model(&args.model, DenseFormat::Q8);
            model.map_err(|error| bench::Error::Unsupported(error.to_string()))
        };
        pool.install(|| quality::measure((&model, &q8), &args.model, &text, &args.variant, output))
    })
}

impl ModelArgs {
    fn numerics(&self) -> Numerics {
        match self.numerics {
            Some(NumericsArg::Reference) => Numerics::Reference,
            Some(NumericsArg::Model) | None => match self.activations {
                Some(ActivationsArg::Int8) => Numerics::Int8Activations,
                None => Numerics::Model,
            },
        }
    }

    fn options(&self, context: u32) -> StepOptions {
        StepOptions {
            numerics: self.numerics(),
            batch: 1,
            context: context as usize,
            runs: self.runs.map(|runs| runs as usize),
            quick: self.output.rows.quick,
        }
    }

    /// Opens the model, checks that it and the machine can take sequences and runners of these sizes, and
    /// measures.
    fn measured(
        &self,
        sizes: &[(usize, Capacity)],
        measure: impl FnOnce(&std::sync::Arc<Model>, &mut Output) -> Result<(), bench::Error> + Send,
    ) -> Result<ExitCode, Error> {
        if let RunnerArg::Reference = self.runner {
            return Ok(usage(
                "bench measures the cpu runner; the reference runner is there to be compared with",
            ));
        }
        let dense = self.dense_format.map_or(DenseFormat::Published, |DenseFormatArg::Q8| DenseFormat::Q8);
        let model = open_model(&self.model, dense)?;
        for (longest, capacity) in sizes {
            step::check_length(&model, *longest)?;
            check_capacity(&model.config, self.numerics(), capacity)?;
        }
        let pool = pool(&self.output)?;
        measured(&self.output.rows, |output| pool.install(|| measure(&model, output)))
    }
}

fn pool(output: &OutputArgs) -> Result<std::sync::Arc<rayon::ThreadPool>, Error> {
    SessionOptions { threads: output.threads.map(usize::from), ..SessionOptions::default() }.pool()
}

/// Runs `measure` and writes its rows as the arguments say; after Ctrl-C those so far.
fn measured(
    args: &RowsArgs,
    measure: impl FnOnce(&mut Output) -> Result<(), bench::Error>,
) -> Result<ExitCode, Error> {
    measured_on(&Machine::detect(), args, false, measure)
}

/// The same on a machine that is known; with `follow`, rows that go to stdout as JSON are lines on stderr, too.
fn measured_on(
    machine: &Machine,
    args: &RowsArgs,
    follow: bool,
    measure: impl FnOnce(&mut Output) -> Result<(), bench::Error>,
) -> Result<ExitCode, Error> {
    let written = |error| {
        let path = args.csv.as_ref().map_or_else(String::new, |path| path.display().to_string());
        Error::Io(path, error)
    };
    if let Some(path) = &args.csv {
        // Before anything takes long: can it be written?
        append_csv(path, machine, &[]).map_err(written)?;
    }
    let mut output = Output { json: args.json, follow, rows: Vec::new() };
    output.note(&machine.line());
    let result = measure(&mut output);
    if let Some(path) = &args.csv {
        append_csv(path, machine, &output.rows).map_err(written)?;
    }
    result?;
    Ok(ExitCode::SUCCESS)
}

impl From<bench::Error> for Error {
    fn from(error: bench::Error) -> Self {
        match error {
            bench::Error::Model(error) => Self::Model(error),
            bench::Error::Io(error) if error.kind() == ErrorKind::BrokenPipe => {
                Self::Io("stdout".into(), error)
            }
            error => Self::Unsupported(error.to_string()),
        }
    }
}

/// Rows to stdout as they come, and kept for the CSV.
struct Output {
    json: bool,
    follow: bool,
    rows: Vec<Row>,
}

impl Sink for Output {
    fn row(&mut self, row: Row) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.json {
            writeln!(out, "{}", row.json())?;
            if self.follow {
                eprintln!("{}", row.line());
            }
        } else {
            if self.rows.is_empty() {
                writeln!(out, "{}", table_head())?;
            }
            writeln!(out, "{}", row.line())?;
        }
        self.rows.push(row);
        out.flush()
    }

    fn note(&mut self, text: &str) {
        eprintln!("{text}");
    }

    fn stopped(&self) -> bool {
        interrupt::asked()
    }
}
