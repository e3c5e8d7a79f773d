//! Synthetic checkpoints, and measurements over kernels and models. This crate knows no request.
//!
//! Everything is measured on the threads of the rayon pool it is called in, and goes row by row to a [`Sink`].

pub mod ceilings;
pub mod context;
pub mod cost;
pub mod gpu;
pub mod machine;
pub mod ops;
pub mod quality;
pub mod row;
pub mod seeded;
pub mod step;
pub mod synth;

use std::fmt;
use std::io;

/// Takes results as they come.
pub trait Sink: Send {
    /// A measured row.
    ///
    /// # Errors
    /// If it cannot be written; that ends the measurement.
    fn row(&mut self, row: row::Row) -> io::Result<()>;

    /// What is going on, for people.
    fn note(&mut self, _text: &str) {}

    /// Whether to measure no more.
    fn stopped(&self) -> bool {
        false
    }
}

/// Why a measurement failed.
#[derive(Debug)]
pub enum Error {
    /// The model or its execution.
    Model(models::Error),
    /// Memory, threads, or where rows go.
    Io(io::Error),
    /// What cannot be measured, with the reason.
    Unsupported(String),
    /// A device, and what was being done with it.
    Device(String, kernels::cuda::DeviceError),
    /// A check that found something wrong.
    Wrong(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model(error) => error.fmt(f),
            Self::Io(error) => error.fmt(f),
            Self::Device(what, error) => write!(f, "{what}: {error}"),
            Self::Unsupported(message) | Self::Wrong(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}

impl From<models::Error> for Error {
    fn from(error: models::Error) -> Self {
        Self::Model(error)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
