//! The settings of a download, and the one place where the environment is read for them.
//!
//! Owns the names and the precedence of the variables that all hub tools share, so that a cache or a
//! token set up for one of them serves here too. Refuses to use any of it: a value is only read.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::HubError;

/// The public hub.
const ENDPOINT: &str = "https://huggingface.co";
/// Longest token file.
const MAX_TOKEN_BYTES: usize = 4096;

/// A secret; its value is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A token as a header can carry it, without white space around it; `None` for an empty one.
    ///
    /// # Errors
    /// [`HubError::Setting`] for anything but visible ASCII.
    pub fn new(text: &str) -> Result<Option<Self>, HubError> {
        let text = text.trim();
        if text.len() > MAX_TOKEN_BYTES || !text.bytes().all(|b| b.is_ascii_graphic()) {
            let reason = "the token is too long or has characters no token has".to_owned();
            return Err(HubError::Setting { name: "HF_TOKEN", reason });
        }
        Ok((!text.is_empty()).then(|| Self(text.to_owned())))
    }

    pub(super) fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// How a model is looked up and downloaded.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// The folder with the `models--org--name` folders.
    pub cache: PathBuf,
    /// Scheme, host and perhaps a path; no slash at the end.
    pub endpoint: String,
    /// Sent to the endpoint's host and to no other.
    pub token: Option<Token>,
    /// The network is not used.
    pub offline: bool,
    /// Ask the hub whether the revision has moved, though the cache is complete.
    pub refresh: bool,
    /// Attempts after the first, for each file; those that brought at least 1 MiB do not count.
    pub retries: u32,
    /// Wait before the first retry; doubled each time, up to half a minute.
    pub backoff: Duration,
    /// Longest wait for a connection, for an answer, and for the next bytes of one.
    pub timeout: Duration,
    /// Use the proxy of `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, unless `NO_PROXY` names the host.
    pub proxy_from_environment: bool,
    /// PEM file with the certificates to trust instead of Mozilla's.
    pub certificates: Option<PathBuf>,
}

impl HubOptions {
    /// The public hub with this cache: no token, no proxy.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            cache: cache.into(),
            endpoint: ENDPOINT.to_owned(),
            token: None,
            offline: false,
            refresh: false,
            retries: 5,
            backoff: Duration::from_millis(500),
            timeout: Duration::from_secs(60),
            proxy_from_environment: false,
            certificates: None,
        }
    }

    /// The settings of this process's environment.
    ///
    /// # Errors
    /// As [`HubOptions::from_vars`].
    pub fn from_env() -> Result<Self, HubError> {
        let options = Self::from_vars(&|name| std::env::var_os(name))?;
        Ok(Self { proxy_from_environment: true, ..options })
    }

    /// The settings given by `var`, which answers as [`std::env::var_os`] does. An empty value counts as
    /// none. In order of precedence:
    ///
    /// - cache: `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME/hub`, `XDG_CACHE_HOME/huggingface/hub`,
    ///   `~/.cache/huggingface/hub`;
    /// - token: `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, the file `HF_TOKEN_PATH`, the file `token` in the
    ///   folder above;
    /// - endpoint: `HF_ENDPOINT`;
    /// - no network: `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` is `1`, `ON`, `YES` or `TRUE`;
    /// - certificates: `SSL_CERT_FILE`, `REQUESTS_CA_BUNDLE`.
    ///
    /// # Errors
    /// [`HubError::Setting`] where a value cannot be used or no cache folder can be derived.
    pub fn from_vars(var: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, HubError> {
        let value = |name: &str| var(name).filter(|value| !value.is_empty());
        let text = |name: &'static str| match value(name).map(OsString::into_string) {
            Some(Err(_)) => Err(HubError::Setting { name, reason: "is not text".into() }),
            Some(Ok(text)) => Ok(Some(text)),
            None => Ok(None),
        };
        let home = || value("HOME").or_else(|| value("USERPROFILE")).map(PathBuf::from);
        let folder = |name: &str| value(name).map(|path| expand_home(PathBuf::from(path), home()));
        let base = folder("HF_HOME")
            .or_else(|| folder("XDG_CACHE_HOME").map(|path| path.join("huggingface")))
            .or_else(|| home().map(|path| path.join(".cache").join("huggingface")));
        let cache = folder("HF_HUB_CACHE")
            .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| base.as_ref().map(|path| path.join("hub")))
            .ok_or_else(|| HubError::Setting {
                name: "HF_HOME",
                reason: "not set, and there is no home folder".into(),
            })?;
        let mut options = Self::new(cache);

        options.token = match text("HF_TOKEN")?.or(text("HUGGING_FACE_HUB_TOKEN")?) {
            Some(token) => Token::new(&token)?,
            None => match folder("HF_TOKEN_PATH").or_else(|| base.map(|path| path.join("token"))) {
                Some(path) => read_token(&path)?,
                None => None,
            },
        };
        if let Some(endpoint) = text("HF_ENDPOINT")? {
            options.endpoint = endpoint.trim_end_matches('/').to_owned();
        }
        let on = |name| -> Result<bool, HubError> {
            let value = text(name)?.unwrap_or_default().to_ascii_uppercase();
            Ok(["1", "ON", "YES", "TRUE"].contains(&value.as_str()))
        };
        options.offline = on("HF_HUB_OFFLINE")? || on("TRANSFORMERS_OFFLINE")?;
        options.certificates = folder("SSL_CERT_FILE").or_else(|| folder("REQUESTS_CA_BUNDLE"));
        Ok(options)
    }
}

fn expand_home(path: PathBuf, home: Option<PathBuf>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

/// The token in a file; a file that is not there is no token.
fn read_token(path: &Path) -> Result<Option<Token>, HubError> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_file() && found.len() <= MAX_TOKEN_BYTES as u64 => {}
        _ => return Ok(None),
    }
    match std::fs::read_to_string(path) {
        Ok(text) => Token::new(&text),
        Err(error) => Err(HubError::io(path, error)),
    }
}
