//! `moebius bench gpu`: the one-call check of a CUDA device.

use std::path::PathBuf;
use std::process::ExitCode;

use bench::gpu::{self, GpuOptions, Sizes, Stage};
use bench::machine::Machine;
use clap::{Args, ValueEnum};

use super::{RowsArgs, measured_on};
use crate::error::Error;

#[derive(Args)]
pub struct GpuArgs {
    /// Which device, as the driver counts them
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: usize,
    /// Only this stage (timings: with the ceilings)
    #[arg(long, value_enum, value_name = "STAGE")]
    only: Option<StageArg>,
    /// Few batch sizes and contexts
    #[arg(long)]
    quick: bool,
    /// Sizes for an emulated device; the figures mean nothing
    #[arg(long, hide = true)]
    tiny: bool,
    /// Print one JSON object per row
    #[arg(long)]
    json: bool,
    /// Append the rows to a CSV file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum StageArg {
    Ceilings,
    Correctness,
    Timings,
}

impl From<StageArg> for Stage {
    fn from(stage: StageArg) -> Self {
        match stage {
            StageArg::Ceilings => Self::Ceilings,
            StageArg::Correctness => Self::Correctness,
            StageArg::Timings => Self::Timings,
        }
    }
}

pub fn run(args: &GpuArgs) -> Result<ExitCode, Error> {
    let device = gpu::open(args.device)?;
    let machine = Machine { device: Some(gpu::describe(&device)), ..Machine::detect() };
    let rows = RowsArgs { json: args.json, csv: args.csv.clone(), quick: args.quick };
    let options = GpuOptions { only: args.only.map(Stage::from) };
    let sizes = if args.tiny { Sizes::tiny() } else { Sizes::k2(args.quick) };
    measured_on(&machine, &rows, true, |output| gpu::measure(&device, &options, &sizes, output))
}
