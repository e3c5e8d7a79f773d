//! `moebius check`: two runners side by side, layer by layer, and a scan for NaN and infinite weights.

use std::process::ExitCode;
use std::sync::Mutex;

use clap::Args;
use models::check::{LOGIT_ROWS, Scanned, Tolerance, compare, scan_weights_with};
use models::{Capacity, Model, Numerics};
use serde_json::json;

use super::{ComputeArgs, DEMO, print};
use crate::error::Error;
use crate::loaded::Loaded;
use crate::memory::check_capacity;
use crate::progress::{Progress, Unit};
use crate::session::{RunnerKind, SessionOptions};
use crate::tokenizer::Specials;

/// What is compared unless the user says otherwise.
const PROMPT: &str = "The quick brown fox jumps over the lazy dog, and 12345 times 678 is not yet known.";

/// Longest prompt: the reference runner holds the scores of all pairs of its tokens, for every head.
const MAX_PROMPT_TOKENS: usize = 1024;

#[derive(Args)]
pub struct CheckArgs {
    /// Checkpoint folder, hub id `org/name[@revision]`, or `demo`
    #[arg(default_value = DEMO)]
    model: String,
    /// Text to run [default: a sentence with words and figures]
    #[arg(long)]
    prompt: Option<String>,
    /// Largest relative difference (Euclidean norm) that counts as equal [default: 1e-4, or 0.05
    /// with --numerics model]
    #[arg(long)]
    tolerance: Option<f64>,
    /// Do not read all weights for NaN and infinity
    #[arg(long)]
    skip_scan: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

pub fn run(args: &CheckArgs) -> Result<ExitCode, Error> {
    let loaded = Loaded::open_with(&args.model, args.compute.options().dense)?;
    let model = &loaded.model;
    let numerics = match args.compute.numerics {
        None if args.compute.activations.is_none() => Numerics::Reference,
        _ => args.compute.options().numerics(),
    };
    let tested = SessionOptions { numerics: Some(numerics), ..args.compute.options() };
    let trusted = SessionOptions { runner: RunnerKind::Reference, ..tested.clone() };
    let pool = tested.pool()?;
    let text = args.prompt.as_deref().unwrap_or(PROMPT);
    let mut prompt = loaded.tokenizer.encode(text, Specials::Plain)?;
    let longest = model.config.max_positions.min(MAX_PROMPT_TOKENS);
    if args.prompt.is_none() {
        prompt.truncate(longest);
    }
    if prompt.is_empty() || prompt.len() > longest {
        let message = format!("--prompt has {} tokens; 1 to {longest} can be compared", prompt.len());
        return Err(Error::Unsupported(message));
    }
    if !args.skip_scan {
        let scanned = pool.install(|| scan(model))?;
        eprintln!("{} tensors hold no NaN and no infinity", scanned.tensors);
    }
    let blocks = prompt.len().div_ceil(models::batch::PAGE_TOKENS);
    let capacity = Capacity::new(blocks, prompt.len(), LOGIT_ROWS);
    check_capacity(&model.config, Numerics::Reference, &capacity)?;
    let (mut trusted, mut tested) = (trusted.runner(model, capacity)?, tested.runner(model, capacity)?);
    let mut tolerance = Tolerance::REFERENCE;
    if numerics != Numerics::Reference {
        // A bf16 cache moves values by 2^-9, and now and then a token to another expert; 8 bits by 2^-8.
        let relative_l2 = if numerics == Numerics::Model { 0.05 } else { 0.1 };
        tolerance = Tolerance { relative_l2, routing: 0.05 };
    }
    tolerance.relative_l2 = args.tolerance.unwrap_or(tolerance.relative_l2);
    let report = pool.install(|| compare(&mut *trusted, &mut *tested, &prompt, tolerance))?;

    if args.json {
        let rows: Vec<_> = report
            .rows
            .iter()
            .map(|row| json!({"layer": row.layer, "point": row.point, "relative_l2": row.relative_l2, "max_abs": row.max_abs}))
            .collect();
        let first = report.first.as_ref().map(|row| json!({"layer": row.layer, "point": row.point}));
        let result = json!({"tokens": prompt.len(), "numerics": numerics.as_str(), "first_difference": first, "rows": rows});
        print(&format!("{result}\n"))?;
    } else {
        let mut table = String::from("layer  point            relative   largest\n");
        for row in &report.rows {
            let mark = if report.first.as_ref() == Some(row) { "  <- first over tolerance" } else { "" };
            let (layer, point) = (row.layer, row.point);
            table.push_str(&format!(
                "{layer:>5}  {point:<15} {:>9.1e} {:>9.1e}{mark}\n",
                row.relative_l2, row.max_abs
            ));
        }
        print(&table)?;
    }
    report.verdict()?;
    eprintln!(
        "{} and {} agree on {} tokens ({} numerics)",
        trusted.name(),
        tested.name(),
        prompt.len(),
        numerics.as_str()
    );
    Ok(ExitCode::SUCCESS)
}

/// Reads all weights, with a bar.
fn scan(model: &Model) -> Result<Scanned, Error> {
    let total = model.weight_bytes() as u64;
    let progress = Mutex::new((Progress::new("reading weights", Unit::Bytes), 0));
    let scanned = scan_weights_with(model, &|bytes| {
        let mut progress = progress.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        progress.1 += bytes as u64;
        let done = progress.1;
        progress.0.set(done, total);
    });
    Ok(scanned?)
}
