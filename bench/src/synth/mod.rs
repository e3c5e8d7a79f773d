//! `moebius synth`: a seeded synthetic checkpoint of a known shape, in its published format.
//!
//! The list of tensors is [`models::manifest`]'s, so what is written is what the loader asks for.
//! Values come from a counter-based generator: the value at an offset of a tensor depends on the
//! seed, the tensor's name and the offset, and on nothing else, so that any number of threads gives
//! the same bytes. Weights are about N(0, 1/in), norms about 1: activations keep their size through
//! any number of layers, and tokens spread evenly over experts.
//!
//! Not written: tensors no runner reads (vision towers, prediction layers).
//!
//! ```no_run
//! use bench::synth::{Options, Recipe, write};
//!
//! let recipe = Recipe::find("tiny-256k", None)?;
//! let summary = write(&recipe, "/tmp/tiny".as_ref(), &Options::default(), &mut |_done, _total| true)?;
//! println!("{} tensors", summary.tensors);
//! # Ok::<(), bench::synth::SynthError>(())
//! ```

mod files;
mod layout;
mod published;
mod recipes;
mod tokenizer;
mod values;
mod write;

use std::fmt;
use std::path::PathBuf;

pub use layout::plain_type;
pub use recipes::Recipe;
pub use write::{Options, Summary, write};

/// Why no checkpoint was written.
#[derive(Debug)]
pub enum SynthError {
    /// No recipe has this name, and no file either.
    Unknown(String),
    /// The configuration cannot be run, so nothing can be written for it.
    Model(models::Error),
    /// A configuration that cannot be given a checkpoint, with the reason.
    Config(String),
    /// The folder holds something already.
    Occupied(PathBuf),
    /// The disk is full.
    Full {
        /// The file that could not grow.
        path: PathBuf,
        /// What the whole checkpoint needs.
        needed_bytes: u64,
    },
    /// A file could not be read or written.
    Io(PathBuf, std::io::Error),
    /// The caller asked to stop.
    Cancelled,
}

impl fmt::Display for SynthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(name) => {
                let known: Vec<&str> = Recipe::names().collect();
                write!(f, "{name:?} is neither a config.json nor one of: {}", known.join(", "))
            }
            Self::Model(error) => error.fmt(f),
            Self::Config(message) => f.write_str(message),
            Self::Occupied(path) => {
                write!(f, "{} is not empty; --force replaces the checkpoint in it", path.display())
            }
            Self::Full { path, needed_bytes } => {
                let (path, mib) = (path.display(), needed_bytes.div_ceil(1 << 20));
                write!(
                    f,
                    "{path}: the disk is full; the checkpoint needs {mib} MiB. What was written is removed"
                )
            }
            Self::Io(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Cancelled => f.write_str("interrupted; what was written is removed"),
        }
    }
}

impl std::error::Error for SynthError {}

impl From<models::Error> for SynthError {
    fn from(error: models::Error) -> Self {
        Self::Model(error)
    }
}
