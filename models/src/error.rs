//! What can be wrong with a checkpoint. Every message names the file, tensor or field.

use std::fmt;

/// A checkpoint, its configuration or a forward pass that cannot be used, and why.
#[derive(Debug)]
pub enum Error {
    /// A file could not be read.
    Io {
        /// File or folder.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file's content breaks its format.
    Format {
        /// File name.
        file: String,
        /// What is wrong, naming the tensor or line where there is one.
        message: String,
    },
    /// A configuration field is missing, contradictory or not understood.
    Config {
        /// The field, with its parents, e.g. `text_config.rope_scaling.type`.
        field: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// A tensor is missing, unexpected, mis-shaped or mis-typed.
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        message: String,
    },
    /// A forward pass could not be run.
    Run(String),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn format(file: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Format { file: file.into(), message: message.into() }
    }

    pub(crate) fn config(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Config { field: field.into(), message: message.into() }
    }

    pub(crate) fn tensor(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), message: message.into() }
    }

    pub(crate) fn io(path: &std::path::Path, source: std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { path, source } => write!(f, "{path}: {source}"),
            Self::Format { file, message } => write!(f, "{file}: {message}"),
            Self::Config { field, message } => write!(f, "config.json: {field}: {message}"),
            Self::Tensor { name, message } => write!(f, "tensor {name}: {message}"),
            Self::Run(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}
