//! What can go wrong before a generation runs, in one type for the command line.

use std::fmt;

/// A command that failed, and why. Every message names what a user can act on.
#[derive(Debug)]
pub enum Error {
    /// The checkpoint or its execution.
    Model(models::Error),
    /// Finding or downloading a model.
    Hub(crate::hub::HubError),
    /// The tokenizer's files.
    Tokenizer(crate::tokenizer::TokenizerError),
    /// The chat template.
    Template(crate::template::TemplateError),
    /// The prefix cache's folder.
    Store(crate::store::StoreError),
    /// The engine refused a request.
    Submit(crate::request::SubmitError),
    /// A file that is read or written for the user.
    Io(String, std::io::Error),
    /// Asked for something that cannot be done, with the reason.
    Unsupported(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model(error) => error.fmt(f),
            Self::Hub(error) => error.fmt(f),
            Self::Tokenizer(error) => error.fmt(f),
            Self::Template(error) => error.fmt(f),
            Self::Store(error) => error.fmt(f),
            Self::Submit(error) => error.fmt(f),
            Self::Io(path, error) => write!(f, "{path}: {error}"),
            Self::Unsupported(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}

macro_rules! from {
    ($($variant:ident($source:ty)),* $(,)?) => {
        $(impl From<$source> for Error {
            fn from(error: $source) -> Self {
                Self::$variant(error)
            }
        })*
    };
}

from! {
    Model(models::Error),
    Hub(crate::hub::HubError),
    Tokenizer(crate::tokenizer::TokenizerError),
    Template(crate::template::TemplateError),
    Store(crate::store::StoreError),
    Submit(crate::request::SubmitError),
}
