//! `moebius plan`: what a model needs and how fast it can be here, from its configuration and index alone. Reads no
//! weights and allocates nothing that it plans.

mod report;
mod speed;

use std::process::ExitCode;

use clap::Args;

use super::{CacheArgs, ComputeArgs, DEMO, print};
use crate::engine::EngineOptions;
use crate::error::Error;
use crate::memory::outline::Outline;
use crate::memory::{MemoryPlan, available_memory, fit_into};
use crate::session::{RunnerKind, SessionOptions};
use speed::Speed;

#[derive(Args)]
pub struct PlanArgs {
    /// Checkpoint folder (its config.json is enough), the path of a config.json, hub id `org/name[@revision]`, `demo`,
    /// or a shape that `synth` knows (full:ORG-MODEL)
    #[arg(default_value = DEMO)]
    model: String,
    /// Requests that run at a time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Measure with small sizes, for tests; the figures mean nothing
    #[arg(long, hide = true)]
    quick: bool,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

/// Everything that the command found out.
struct Findings {
    model: String,
    outline: Outline,
    options: SessionOptions,
    /// Of the system, before any 8-bit copies.
    available_bytes: Option<usize>,
    limits: EngineOptions,
    plan: MemoryPlan,
    /// Why the machine cannot hold it; the plan is then that of a machine that can.
    refused: Option<String>,
    threads: usize,
    speed: Speed,
}

pub fn run(args: &PlanArgs) -> Result<ExitCode, Error> {
    let options = args.cache.apply(&args.compute, args.compute.options());
    let options = SessionOptions { sequences: usize::from(args.parallel), ..options };
    let outline = Outline::open(&args.model)?;
    let weights = outline.weights(options.dense);
    let available_bytes = available_memory();
    let left = available_bytes.map(|bytes| bytes.saturating_sub(weights.copied_bytes));
    let (numerics, wishes) = (options.numerics(), options.wishes());
    let fitted = fit_into(left, &outline.config, weights, numerics, &wishes);
    let (limits, mut plan, refused) = match fitted {
        Ok((limits, plan)) => (limits, plan, None),
        // What a larger machine would need; an error there too is one of the wishes.
        Err(error) => {
            let (limits, plan) = fit_into(None, &outline.config, weights, numerics, &wishes)?;
            (limits, plan, Some(error.to_string()))
        }
    };
    plan.available_bytes = left;
    let pool = options.pool()?;
    let threads = pool.current_num_threads();
    if options.runner == RunnerKind::Reference {
        eprintln!("the speeds are those of the cpu runner; the reference runner is far slower");
    }
    let speed = pool.install(|| Speed::measure(&outline, &plan, &limits, numerics, args.quick))?;
    let findings = Findings {
        model: args.model.clone(),
        outline,
        options,
        available_bytes,
        limits,
        plan,
        refused,
        threads,
        speed,
    };
    print(&if args.json { format!("{}\n", findings.json()) } else { findings.table() })?;
    Ok(ExitCode::SUCCESS)
}
