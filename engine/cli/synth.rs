//! `moebius synth`: a seeded synthetic checkpoint of a known shape, in its published format.

use std::path::PathBuf;
use std::process::ExitCode;

use bench::synth::{Options, Recipe, SynthError, write};
use clap::Args;
use serde_json::json;

use super::{interrupt, print, usage};
use crate::error::Error;
use crate::memory::Bytes;
use crate::progress::{Progress, Unit};

#[derive(Args)]
pub struct SynthArgs {
    /// kimi-k2-slice, qwen3-30b-slice, tiny-256k, full:ORG-MODEL, or the path of a config.json
    name: String,
    /// Folder to write; made if it does not exist
    #[arg(long)]
    output: PathBuf,
    /// Decoder layers; for kimi-k2-slice those with experts [default: the shape's]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4096))]
    layers: Option<u16>,
    /// Same seed, same bytes
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Files of full length that occupy almost nothing; values read as zero
    #[arg(long)]
    sparse: bool,
    /// Replace the checkpoint in the folder
    #[arg(long)]
    force: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &SynthArgs) -> Result<ExitCode, Error> {
    let recipe = match Recipe::find(&args.name, args.layers.map(usize::from)) {
        Err(error @ SynthError::Unknown(_)) => return Ok(usage(&error.to_string())),
        recipe => recipe.map_err(failed)?,
    };
    let options = Options { seed: args.seed, sparse: args.sparse, force: args.force, ..Options::default() };
    interrupt::install();
    let mut progress = Progress::new("writing", Unit::Bytes);
    let summary = write(&recipe, &args.output, &options, &mut |done, total| {
        progress.set(done, total);
        !interrupt::asked()
    });
    let summary = summary.map_err(failed)?;
    drop(progress);
    let (path, seconds) = (args.output.display().to_string(), summary.seconds);
    if args.json {
        let result = json!({
            "name": recipe.name,
            "output": path,
            "seed": args.seed,
            "sparse": args.sparse,
            "tensors": summary.tensors,
            "shards": summary.shards,
            "parameters": summary.parameters,
            "bytes": summary.bytes,
            "seconds": seconds,
        });
        print(&format!("{result}\n"))?;
    }
    let (bytes, sparse) = (Bytes(summary.bytes as usize), if args.sparse { " (sparse)" } else { "" });
    eprintln!(
        "{path}: {} tensors, {bytes}{sparse} in {} files, in {seconds:.1} s",
        summary.tensors, summary.shards
    );
    Ok(ExitCode::SUCCESS)
}

fn failed(error: SynthError) -> Error {
    match error {
        SynthError::Model(error) => Error::Model(error),
        SynthError::Io(path, error) => Error::Io(path.display().to_string(), error),
        error => Error::Unsupported(error.to_string()),
    }
}
