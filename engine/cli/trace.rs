//! `moebius trace`: logits and routing of given tokens, as a safetensors file.

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::{ComputeArgs, print};
use crate::error::Error;
use crate::loaded::open_model;
use crate::memory::check_available;
use crate::progress::{Progress, Unit};
use crate::trace::{KeepLogits, TraceOptions, Tracer, write};

/// Largest file of token ids.
const MAX_TOKENS_FILE_BYTES: u64 = 256 << 20;

#[derive(Args)]
pub struct TraceArgs {
    /// Checkpoint folder, hub id `org/name[@revision]`, or `demo`
    model: String,
    /// JSON file: a list of prompts, each a list of token ids
    #[arg(long)]
    tokens: PathBuf,
    /// Safetensors file to write
    #[arg(long)]
    output: PathBuf,
    /// Also generate this many tokens greedily, ignoring end-of-sequence
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    greedy: usize,
    /// Split prompts into chunks of this many tokens
    #[arg(long, allow_negative_numbers = true)]
    chunk: Option<std::num::NonZeroUsize>,
    /// Which logits to keep
    #[arg(long, value_enum, default_value = "all")]
    logits: LogitsArg,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogitsArg {
    All,
    Last,
    None,
}

pub fn run(args: &TraceArgs) -> Result<ExitCode, Error> {
    let prompts = read_prompts(&args.tokens)?;
    let model = open_model(&args.model, args.compute.options().dense)?;
    let options = TraceOptions {
        greedy: args.greedy,
        chunk: args.chunk.map(usize::from),
        logits: match args.logits {
            LogitsArg::All => KeepLogits::All,
            LogitsArg::Last => KeepLogits::Last,
            LogitsArg::None => KeepLogits::None,
        },
    };
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let total: usize = prompts.iter().map(Vec::len).sum();
    if options.logits == KeepLogits::All {
        // All traces are held until the file is written.
        check_available(
            "the logits of all prompts",
            total.saturating_mul(model.config.vocab).saturating_mul(8),
        )?;
    }
    let run = args.compute.options();
    let mut tracer = Tracer::new(&model, &run, options, longest)?;
    let mut progress = Progress::new("tracing", Unit::Tokens);
    let (mut traces, mut done) = (Vec::new(), 0);
    for (index, prompt) in prompts.iter().enumerate() {
        let trace = tracer.trace(prompt);
        traces.push(trace.map_err(|error| Error::Unsupported(format!("prompt {index}: {error}")))?);
        done += prompt.len();
        progress.set(done as u64, total as u64);
    }
    write(&args.output, &traces, model.config.vocab)?;
    let (path, numerics) = (args.output.display().to_string(), model.numerics_label(run.numerics()));
    if args.json {
        let result = serde_json::json!({"output": path, "prompts": prompts.len(), "tokens": total, "numerics": numerics});
        print(&format!("{result}\n"))?;
    }
    eprintln!("{path}: {} prompts, {total} tokens, {numerics} numerics", prompts.len());
    Ok(ExitCode::SUCCESS)
}

fn read_prompts(path: &PathBuf) -> Result<Vec<Vec<u32>>, Error> {
    let io = |error| Error::Io(path.display().to_string(), error);
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(io)?;
    file.take(MAX_TOKENS_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_TOKENS_FILE_BYTES {
        let message = format!("{}: longer than {MAX_TOKENS_FILE_BYTES} bytes", path.display());
        return Err(Error::Unsupported(message));
    }
    serde_json::from_slice(&bytes).map_err(|error| {
        Error::Unsupported(format!("{}: not a list of lists of token ids: {error}", path.display()))
    })
}
