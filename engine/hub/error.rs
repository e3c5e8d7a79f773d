//! What can go wrong on the way to a model, each with what to do about it.
//!
//! Owns the wording. Refuses to quote servers: their texts could say anything, also to a terminal, so
//! only numbers and checked or escaped names get into a message. Never holds a token.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a model cannot be had. The fields are what [`fmt::Display`] puts into its sentence.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum HubError {
    /// MODEL names nothing.
    NotAModel { given: String, reason: String },
    /// Offline, and the cache does not hold the model.
    Offline { repo: String, missing: String, cache: PathBuf },
    /// A setting, such as `HF_ENDPOINT`, cannot be used.
    Setting { name: &'static str, reason: String },
    /// 401, or 404 where no token was sent: the hub hides private repositories.
    Unauthorized { repo: String, token_sent: bool },
    /// 403: the licence must be accepted first, or the token lacks the right.
    Forbidden { repo: String, gated: bool },
    /// The repository, revision or file does not exist.
    NotFound { repo: String, what: &'static str },
    /// Another status than the ones that mean something here.
    Status { url: String, status: u16 },
    /// No connection, or it broke, after all retries.
    Network { url: String, reason: String },
    /// The server's answer is malformed, contradicts itself or is beyond a limit.
    Answer { url: String, reason: String },
    /// A file name in the repository that could leave the folder.
    HostileName { repo: String, name: String, reason: &'static str },
    /// The repository is not a checkpoint this program runs.
    Unusable { repo: String, reason: String },
    /// A file's length is not the one in the listing.
    Length { name: String, expected: u64, got: u64 },
    /// A file's checksum is wrong, twice if the first attempt went on from a partial file.
    Checksum { name: String },
    /// No space left.
    DiskFull { path: PathBuf },
    /// Another process holds a file's lock and makes no progress.
    Locked { path: PathBuf },
    /// Any other failure of the file system.
    Io { path: PathBuf, source: io::Error },
}

impl HubError {
    /// An error of the file system at `path`.
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path: path.to_owned() }
            }
            _ => Self::Io { path: path.to_owned(), source },
        }
    }
}

impl fmt::Display for HubError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAModel { given, reason } => write!(f, "{given:?} is not a model: {reason}"),
            Self::Offline { repo, missing, cache } => write!(
                f,
                "{repo} is not complete in the cache {} ({missing}), and the network is off by HF_HUB_OFFLINE or \
                 TRANSFORMERS_OFFLINE",
                cache.display()
            ),
            Self::Setting { name, reason } => write!(f, "{name}: {reason}"),
            Self::Unauthorized { repo, token_sent: false } => {
                write!(f, "{repo} does not exist or is not public; if it is private or gated, set HF_TOKEN")
            }
            Self::Unauthorized { repo, token_sent: true } => {
                write!(
                    f,
                    "{repo}: the hub refuses the token; check HF_TOKEN or the token file, and its rights"
                )
            }
            Self::Forbidden { repo, gated: true } => {
                write!(
                    f,
                    "{repo} is gated: accept its licence on its page on the hub, then use a token of that account"
                )
            }
            Self::Forbidden { repo, gated: false } => {
                write!(f, "{repo}: the hub denies access (403); does the token have the right to read it?")
            }
            Self::NotFound { repo, what } => write!(f, "{repo}: there is no such {what} on the hub"),
            Self::Status { url, status } => write!(f, "{url}: the server answered with status {status}"),
            Self::Network { url, reason } => write!(f, "{url}: {reason}"),
            Self::Answer { url, reason } => write!(f, "{url}: unusable answer: {reason}"),
            Self::HostileName { repo, name, reason } => write!(
                f,
                "{repo} holds a file named {name:?}, refused because of {reason}; nothing was downloaded"
            ),
            Self::Unusable { repo, reason } => write!(f, "{repo} cannot be run: {reason}"),
            Self::Length { name, expected, got } => {
                write!(f, "{name}: the server sends {got} bytes where the listing says {expected}")
            }
            Self::Checksum { name } => {
                write!(f, "{name}: the checksum of what came is wrong; it was discarded, try again")
            }
            Self::DiskFull { path } => write!(
                f,
                "{}: no space left; make room or set HF_HUB_CACHE to another disk (the download goes on where it stopped)",
                path.display()
            ),
            Self::Locked { path } => {
                write!(f, "{}: another process holds this lock and makes no progress", path.display())
            }
            Self::Io { path, source } => write!(f, "{}: {source}", path.display()),
        }
    }
}

impl std::error::Error for HubError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
