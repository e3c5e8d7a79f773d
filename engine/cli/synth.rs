//! `moebius synth`: placeholder until its library lands.

use std::process::ExitCode;

use clap::Args;

use crate::error::Error;

#[derive(Args)]
pub struct SynthArgs {}

pub fn run(_args: &SynthArgs) -> Result<ExitCode, Error> {
    Err(Error::Unsupported("synth is being written".into()))
}
