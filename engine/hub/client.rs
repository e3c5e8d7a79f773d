//! HTTP to the hub: one GET at a time, redirects followed here.
//!
//! Owns the connection, the token and what answers mean. Refuses to know files and caches. Redirects are
//! followed by hand for one reason: the token goes to the endpoint's own scheme, host and port, and once
//! a chain of redirects has left it, to nobody, not even back (the CVE-2025-51471 class). A redirect
//! from https to http is refused.

use std::collections::BTreeMap;
use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{Response, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::cache::{Check, Content, is_commit, is_hex};
use super::{HubError, HubOptions, Listing, Remote, Token, check_remote_name};

/// Most redirects of one request.
const MAX_REDIRECTS: usize = 10;
/// Longest `Location`.
const MAX_LOCATION_BYTES: usize = 16 << 10;
/// Largest answer to the question for a repository's files, and most files in it.
const MAX_LISTING_BYTES: u64 = 32 << 20;
const MAX_FILES: usize = 50_000;
/// Longest time for that answer.
const LISTING_SECONDS: u64 = 300;
/// Longest wait between attempts, also where the server asks for more.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// A request that failed: for good, or so that another attempt may help.
pub(super) enum Failure {
    Final(HubError),
    /// With the wait the server asked for.
    Again(HubError, Option<Duration>),
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Final(error)
    }
}

/// An answer with the headers that only the endpoint itself may set.
pub(super) struct Answer {
    pub(super) response: Response<Body>,
    linked_etag: Option<String>,
    etag: Option<String>,
    linked_size: Option<u64>,
}

impl Answer {
    pub(super) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        header(&self.response, name)
    }

    /// `Content-Range: bytes first-last/total`; `first` is absent in the form `bytes */total`.
    pub(super) fn content_range(&self) -> Option<(Option<u64>, u64)> {
        let (range, total) = self.header("content-range")?.trim().strip_prefix("bytes ")?.split_once('/')?;
        let first = range.split_once('-').and_then(|(first, _)| first.trim().parse().ok());
        Some((first, total.trim().parse().ok()?))
    }
}

fn header<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

/// Speaks to one endpoint.
pub(super) struct Client {
    agent: Agent,
    endpoint: Uri,
    base: String,
    token: Option<Token>,
    retries: u32,
    backoff: Duration,
}

impl Client {
    pub(super) fn new(options: &HubOptions) -> Result<Self, HubError> {
        let setting = |name, reason: String| HubError::Setting { name, reason };
        let base = options.endpoint.trim_end_matches('/').to_owned();
        let endpoint: Uri =
            base.parse().map_err(|_| setting("HF_ENDPOINT", format!("{base:?} is not a URL")))?;
        if !matches!(endpoint.scheme_str(), Some("https" | "http")) || endpoint.query().is_some() {
            return Err(setting("HF_ENDPOINT", format!("{base:?} is not an http or https URL")));
        }
        let mut tls = TlsConfig::builder();
        if let Some(path) = &options.certificates {
            let pem = std::fs::read(path).map_err(|e| HubError::io(path, e))?;
            let roots: Vec<_> = parse_pem(&pem)
                .filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                })
                .collect();
            if roots.is_empty() {
                return Err(setting("SSL_CERT_FILE", format!("{} has no certificate", path.display())));
            }
            tls = tls.root_certs(RootCerts::from(roots));
        }
        let mut config = Agent::config_builder()
            .tls_config(tls.build())
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("moebius/", env!("CARGO_PKG_VERSION")))
            // Lengths, ranges and checksums are those of the bytes as they travel.
            .accept_encoding("identity")
            .timeout_resolve(Some(options.timeout))
            .timeout_connect(Some(options.timeout))
            .timeout_recv_response(Some(options.timeout))
            .timeout_per_read(Some(options.timeout));
        if !options.proxy_from_environment {
            config = config.proxy(None);
        }
        Ok(Self {
            agent: config.build().into(),
            endpoint,
            base,
            token: options.token.clone(),
            retries: options.retries,
            backoff: options.backoff,
        })
    }

    /// Address of a file whose name needs no escapes.
    pub(super) fn file_url(&self, repo: &str, commit: &str, name: &str) -> String {
        format!("{}/{repo}/resolve/{commit}/{name}", self.base)
    }

    /// One GET, from byte `from` on if that is not 0. Any status but a redirect is an answer.
    pub(super) fn get(&self, url: &str, range: Option<&str>) -> Result<Answer, Failure> {
        let mut uri: Uri = url.parse().map_err(|_| answer(url, "it is not a URL"))?;
        let (mut linked_etag, mut etag, mut linked_size) = (None, None, None);
        let mut trusted = true;
        for _ in 0..=MAX_REDIRECTS {
            trusted = trusted && same_origin(&uri, &self.endpoint);
            let mut request = self.agent.get(uri.clone());
            if let Some(range) = range {
                request = request.header("range", range);
            }
            if let (true, Some(token)) = (trusted, &self.token) {
                request = request.header("authorization", format!("Bearer {}", token.secret()));
            }
            let response = request.call().map_err(|error| network(&uri, &error))?;
            if trusted {
                let text = |name| header(&response, name).map(str::to_owned);
                linked_etag = linked_etag.or(text("x-linked-etag"));
                linked_size = linked_size.or(text("x-linked-size").and_then(|size| size.parse().ok()));
                etag = text("etag").or(etag);
            }
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(Answer { response, linked_etag, etag, linked_size });
            }
            let location =
                header(&response, "location").ok_or_else(|| answer(url, "a redirect to nowhere"))?;
            let next = join(&uri, location)
                .ok_or_else(|| answer(url, "a redirect to something not a web address"))?;
            if uri.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(answer(url, "a redirect from https to http").into());
            }
            uri = next;
        }
        Err(answer(url, "too many redirects").into())
    }

    /// Repeats `attempt` while it may help. It says with the failure whether it got anywhere.
    pub(super) fn retry<T>(
        &self,
        mut note: impl FnMut(&str),
        mut attempt: impl FnMut() -> Result<T, (Failure, bool)>,
    ) -> Result<T, HubError> {
        let mut failed = 0;
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err((Failure::Final(error), _)) => return Err(error),
                Err((Failure::Again(error, asked), progressed)) => {
                    failed = if progressed { 1 } else { failed + 1 };
                    if failed > self.retries {
                        return Err(error);
                    }
                    let wait = self.backoff.saturating_mul(1 << (failed - 1).min(16));
                    let wait = wait.max(asked.unwrap_or_default()).min(MAX_WAIT);
                    note(&format!(
                        "{error}; attempt {failed} of {} in {:.1} s",
                        self.retries,
                        wait.as_secs_f64()
                    ));
                    std::thread::sleep(wait);
                }
            }
        }
    }

    /// What a status other than success means for `repo`.
    pub(super) fn refusal(&self, answer: &Answer, url: &str, repo: &str) -> Failure {
        let repo = repo.to_owned();
        let status = answer.status();
        // The hub names the cause here; only known words are believed.
        let code = answer.header("x-error-code").unwrap_or_default();
        match (status, code) {
            (401 | 403, "GatedRepo") => Failure::Final(HubError::Forbidden { repo, gated: true }),
            (401, _) => Failure::Final(HubError::Unauthorized { repo, token_sent: self.token.is_some() }),
            (403, _) => Failure::Final(HubError::Forbidden { repo, gated: false }),
            (404, "RevisionNotFound") => Failure::Final(HubError::NotFound { repo, what: "revision" }),
            (404, "EntryNotFound") => Failure::Final(HubError::NotFound { repo, what: "file" }),
            (404, _) => Failure::Final(HubError::NotFound { repo, what: "repository or revision" }),
            (408 | 425 | 429 | 500 | 502 | 503 | 504, _) => {
                let asked = answer.header("retry-after").and_then(|seconds| seconds.trim().parse().ok());
                Failure::Again(
                    HubError::Status { url: url.to_owned(), status },
                    asked.map(Duration::from_secs),
                )
            }
            _ => Failure::Final(HubError::Status { url: url.to_owned(), status }),
        }
    }

    /// The files of `repo` at `revision`, every name checked.
    pub(super) fn list(
        &self,
        repo: &str,
        revision: &str,
        note: impl FnMut(&str),
    ) -> Result<Listing, HubError> {
        let escaped = revision.replace('/', "%2F").replace('+', "%2B");
        let url = format!("{}/api/models/{repo}/revision/{escaped}?blobs=true", self.base);
        let text = self.retry(note, || self.read(&url, repo).map_err(|failure| (failure, false)))?;
        let listing: Answered = serde_json::from_slice(&text).map_err(|e| answer(&url, &e.to_string()))?;
        if !is_commit(&listing.sha) {
            return Err(answer(&url, "`sha` is not a commit"));
        }
        if is_hex(revision, 40) && !revision.eq_ignore_ascii_case(&listing.sha) {
            return Err(answer(&url, "it is about another commit"));
        }
        if listing.siblings.len() > MAX_FILES {
            return Err(answer(&url, "the repository has too many files"));
        }
        let mut files = BTreeMap::new();
        for sibling in listing.siblings {
            let name = sibling.rfilename.clone();
            if let Err(reason) = check_remote_name(&name) {
                return Err(HubError::HostileName { repo: repo.to_owned(), name, reason });
            }
            files.insert(name, sibling.remote());
        }
        Ok(Listing { commit: listing.sha, files })
    }

    fn read(&self, url: &str, repo: &str) -> Result<Vec<u8>, Failure> {
        let found = self.get(url, None)?;
        if found.status() != 200 {
            return Err(self.refusal(&found, url, repo));
        }
        let mut text = Vec::new();
        let started = std::time::Instant::now();
        let mut body = found.response.into_body().into_reader().take(MAX_LISTING_BYTES + 1);
        let mut chunk = vec![0; 64 << 10];
        loop {
            match body.read(&mut chunk) {
                Ok(0) => return Ok(text),
                Ok(n) => text.extend_from_slice(&chunk[..n]),
                Err(error) => return Err(broken(url, &error)),
            }
            if text.len() as u64 > MAX_LISTING_BYTES || started.elapsed().as_secs() > LISTING_SECONDS {
                return Err(answer(url, "the list of files is too long or too slow").into());
            }
        }
    }

    /// Contents and size of a file of which the listing does not tell them.
    pub(super) fn probe(
        &self,
        url: &str,
        name: &str,
        note: impl FnMut(&str),
    ) -> Result<(Content, u64), HubError> {
        self.retry(note, || self.probe_once(url, name).map_err(|failure| (failure, false)))
    }

    fn probe_once(&self, url: &str, name: &str) -> Result<(Content, u64), Failure> {
        let found = self.get(url, Some("bytes=0-0"))?;
        let size = match found.status() {
            200 => found.header("content-length").and_then(|length| length.parse().ok()),
            206 | 416 => found.content_range().map(|(_, total)| total),
            _ => return Err(self.refusal(&found, url, name)),
        };
        let size =
            size.or(found.linked_size).ok_or_else(|| answer(url, "it does not tell the file's size"))?;
        let bare = |etag: &str| etag.trim_start_matches("W/").trim_matches('"').to_owned();
        let etag = found.linked_etag.as_deref().or(found.etag.as_deref()).map(bare);
        let content = etag.and_then(|etag| {
            let check = if is_hex(&etag, 64) { Check::Sha256 } else { |_| Check::Length };
            Content::new(&etag, check)
        });
        Ok((content.ok_or_else(|| answer(url, "no usable ETag"))?, size))
    }
}

/// The hub's description of a repository, as far as it is used.
#[derive(Deserialize)]
struct Answered {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    #[serde(alias = "oid")]
    sha256: Option<String>,
    size: Option<u64>,
}

impl Sibling {
    fn remote(self) -> Remote {
        let blob = self.blob_id.filter(|id| is_hex(id, 40)).and_then(|id| Content::new(&id, Check::GitBlob));
        match self.lfs {
            None => Remote { size: self.size, content: blob },
            Some(lfs) => {
                let sha256 = lfs.sha256.filter(|sha256| is_hex(sha256, 64));
                let content = sha256.and_then(|sha256| Content::new(&sha256, Check::Sha256));
                Remote { size: lfs.size.or(self.size), content }
            }
        }
    }
}

fn answer(url: &str, reason: &str) -> HubError {
    HubError::Answer { url: url.to_owned(), reason: reason.to_owned() }
}

/// A connection that broke while a body was read.
pub(super) fn broken(url: &str, error: &std::io::Error) -> Failure {
    Failure::Again(
        HubError::Network { url: url.to_owned(), reason: format!("the download broke off: {error}") },
        None,
    )
}

fn network(uri: &Uri, error: &ureq::Error) -> Failure {
    // Without the query, which on storage hosts holds a signature.
    let port = uri.port().map(|port| format!(":{port}")).unwrap_or_default();
    let (scheme, host) = (uri.scheme_str().unwrap_or("?"), uri.host().unwrap_or("?"));
    let url = format!("{scheme}://{host}{port}{}", uri.path());
    let failed = |reason: String| HubError::Network { url: url.clone(), reason };
    match error {
        ureq::Error::HostNotFound => Failure::Final(failed("no such host; is the network up?".into())),
        ureq::Error::Rustls(error) => Failure::Final(failed(format!(
            "no trusted connection ({error}); behind a proxy with its own certificates set SSL_CERT_FILE"
        ))),
        other => Failure::Again(failed(other.to_string()), None),
    }
}

fn same_origin(a: &Uri, b: &Uri) -> bool {
    let port = |uri: &Uri| uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    a.scheme() == b.scheme() && host(a).is_some() && host(a) == host(b) && port(a) == port(b)
}

/// The address a redirect leads to. The same parser reads it that the connection is made from.
fn join(base: &Uri, location: &str) -> Option<Uri> {
    if location.len() > MAX_LOCATION_BYTES {
        return None;
    }
    let scheme = base.scheme_str()?;
    let authority = base.authority()?;
    let text = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.contains("://") {
        location.to_owned()
    } else {
        let folder = &base.path()[..=base.path().rfind('/')?];
        format!("{scheme}://{authority}{folder}{location}")
    };
    let uri: Uri = text.parse().ok()?;
    matches!(uri.scheme_str(), Some("http" | "https")).then_some(uri).filter(|uri| uri.host().is_some())
}
