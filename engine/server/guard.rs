//! Owns who may talk to the server and how much they may send: addresses, `Host`, API key, request ids, body type, size
//! and pace. Everything here runs before a request is understood. Knows no endpoint but `/health`, the one open door.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::body::BodyDataStream;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tokio_stream::StreamExt;

use super::errors::ApiError;
use super::{ServerError, ServerOptions, Shared};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID_BYTES: usize = 128;
/// In which the memory for bodies is counted; smaller bodies are bounded by the number of requests.
pub(super) const BODY_UNIT_BYTES: usize = 64 * 1024;

/// A secret that never shows in a log.
#[derive(Clone)]
pub struct ApiKey(String);

impl ApiKey {
    /// Tells keys apart without giving them away.
    pub(super) fn fingerprint(&self) -> String {
        blake3::hash(self.0.as_bytes()).to_hex().to_string()
    }

    /// Compared in a time that depends on the length of `given` alone.
    pub(super) fn matches(&self, given: &[u8]) -> bool {
        let key = self.0.as_bytes();
        let mut difference = key.len() ^ given.len();
        for (index, byte) in given.iter().enumerate() {
            difference |= usize::from(byte ^ key[index % key.len()]);
        }
        std::hint::black_box(difference) == 0
    }

    /// Fit to be sent in a header.
    pub(super) fn is_usable(&self) -> bool {
        !self.0.is_empty() && self.0.bytes().all(|byte| byte.is_ascii_graphic())
    }
}

impl From<String> for ApiKey {
    fn from(key: String) -> Self {
        Self(key)
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// Refuses an address that others can reach, unless there is a key or the operator insists.
///
/// # Errors
/// [`ServerError::PublicWithoutKey`], [`ServerError::BadApiKey`].
pub(super) fn check_exposure(options: &ServerOptions, address: IpAddr) -> Result<(), ServerError> {
    match &options.api_key {
        Some(key) if !key.is_usable() => Err(ServerError::BadApiKey),
        None if !options.insecure_no_auth && !is_loopback(address) => {
            Err(ServerError::PublicWithoutKey { address })
        }
        _ => Ok(()),
    }
}

/// Loopback in either family, mapped addresses included.
pub(super) fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Which `Host`s are answered. On loopback the browser is the only thing between a web page and this server, and a page
/// can point its own name at 127.0.0.1; so names are checked there.
#[derive(Debug)]
pub(super) enum HostPolicy {
    Any,
    /// Loopback names, and these (lower case).
    Listed(Vec<String>),
}

impl HostPolicy {
    pub(super) fn new(options: &ServerOptions, loopback: bool) -> Self {
        if !loopback && options.allowed_hosts.is_empty() {
            return Self::Any;
        }
        Self::Listed(options.allowed_hosts.iter().map(|host| host.to_ascii_lowercase()).collect())
    }

    /// Every place in which a request names a host has to name an allowed one.
    fn allows(&self, request: &Request) -> bool {
        let Self::Listed(listed) = self else { return true };
        let mut headers = request.headers().get_all(header::HOST).iter();
        let named = match (headers.next(), headers.next()) {
            (Some(host), None) => host.to_str().is_ok_and(|host| listed_or_loopback(listed, host)),
            _ => false,
        };
        named
            && request
                .uri()
                .authority()
                .is_none_or(|authority| listed_or_loopback(listed, authority.as_str()))
    }
}

fn listed_or_loopback(listed: &[String], host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    // "[::1]:8080", "127.0.0.1:8080", "localhost"
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) if port.is_empty() || port.starts_with(':') => address,
        Some(_) => return false,
        None => host.split_once(':').map_or(host.as_str(), |(name, _)| name),
    };
    let loopback = name == "localhost" || name.parse().is_ok_and(is_loopback);
    loopback || listed.iter().any(|allowed| *allowed == host || allowed == name)
}

/// Around every route: request id, host, key, one log line.
pub(super) async fn guard(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = if !shared.hosts.allows(&request) {
        ApiError::forbidden_host().into_response()
    } else if path != "/health" && !is_authorized(&shared.state.options, request.headers()) {
        ApiError::unauthorized().into_response()
    } else {
        next.run(request).await
    };
    let (status, milliseconds) = (response.status().as_u16(), started.elapsed().as_millis() as u64);
    tracing::info!(id = ?id, %method, path = %super::errors::quoted(&path), status, milliseconds, "answered");
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

fn is_authorized(options: &ServerOptions, headers: &HeaderMap) -> bool {
    let Some(key) = &options.api_key else { return true };
    let Some(value) = headers.get(header::AUTHORIZATION) else { return false };
    match value.as_bytes().split_at_checked("Bearer ".len()) {
        Some((scheme, given)) => scheme.eq_ignore_ascii_case(b"Bearer ") && key.matches(given),
        None => false,
    }
}

/// The caller's own id where it is harmless in a header and a log, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let harmless = |value: &&HeaderValue| {
        (1..=MAX_REQUEST_ID_BYTES).contains(&value.len())
            && value.as_bytes().iter().all(|byte| matches!(byte, b' '..=b'~'))
    };
    headers.get(REQUEST_ID).filter(harmless).cloned().unwrap_or_else(|| {
        HeaderValue::try_from(format!("req-{}", new_id())).expect("hexadecimal digits are valid in a header")
    })
}

/// 128 bits that do not repeat, in hexadecimal. Not a secret.
pub(super) fn new_id() -> String {
    let random = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}

/// Now.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// A body and its share of the room for all bodies.
pub(super) struct JsonBody {
    pub(super) bytes: Vec<u8>,
    room: Option<OwnedSemaphorePermit>,
}

impl JsonBody {
    /// Takes room for what has arrived, not for what was declared.
    fn extend(&mut self, more: &[u8], shared: &Shared) -> Result<(), ApiError> {
        self.bytes.extend_from_slice(more);
        let held = self.room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let missing = (self.bytes.len() / BODY_UNIT_BYTES).saturating_sub(held);
        if missing > 0 {
            let more = Arc::clone(&shared.bodies).try_acquire_many_owned(missing as u32);
            let more = more.map_err(|_| ApiError::busy("too many large bodies are being read"))?;
            match &mut self.room {
                Some(room) => room.merge(more),
                None => self.room = Some(more),
            }
        }
        Ok(())
    }
}

/// The body of a request that says it is JSON.
///
/// # Errors
/// 415 for another type or a compressed body, 413 over the limit, 408 when it stops arriving, 429 when bodies take all
/// the memory that is meant for them.
pub(super) async fn read_json_body(request: Request, shared: &Shared) -> Result<JsonBody, ApiError> {
    let options = &shared.state.options;
    let (parts, body) = request.into_parts();
    let mut stream = body.into_data_stream();
    let refusal = check_content(&parts.headers, options);
    let read = match refusal {
        Some(error) => Err(error),
        None => read_body(&mut stream, shared).await,
    };
    // A refusal sent while the caller still writes would be lost in a connection reset; so the rest is read, for a moment.
    if read.as_ref().is_err_and(|error| error.status() != axum::http::StatusCode::REQUEST_TIMEOUT) {
        let _ = timeout(Duration::from_secs(2), discard(&mut stream, options.max_body_bytes)).await;
    }
    read
}

/// A missing type is refused too: a web page of another origin can send such a request without asking first.
fn check_content(headers: &HeaderMap, options: &ServerOptions) -> Option<ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        return Some(ApiError::unsupported_media("the Content-Type must be application/json"));
    }
    let plain = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"identity");
    if !headers.get_all(header::CONTENT_ENCODING).iter().all(plain) {
        return Some(ApiError::unsupported_media("compressed bodies are not read; send plain JSON"));
    }
    let declared =
        headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    declared
        .is_some_and(|bytes| bytes > options.max_body_bytes as u64)
        .then(|| ApiError::too_large(options.max_body_bytes))
}

async fn read_body(stream: &mut BodyDataStream, shared: &Shared) -> Result<JsonBody, ApiError> {
    let options = &shared.state.options;
    let deadline = Instant::now() + options.timeouts.body_total;
    let mut body = JsonBody { bytes: Vec::new(), room: None };
    loop {
        let patience = options.timeouts.body_idle.min(deadline.saturating_duration_since(Instant::now()));
        match timeout(patience, stream.next()).await {
            Err(_) => return Err(ApiError::body_timeout()),
            Ok(None) => return Ok(body),
            Ok(Some(Err(_))) => return Err(ApiError::malformed("the request body broke off")),
            Ok(Some(Ok(bytes))) if body.bytes.len() + bytes.len() > options.max_body_bytes => {
                return Err(ApiError::too_large(options.max_body_bytes));
            }
            Ok(Some(Ok(bytes))) => body.extend(&bytes, shared)?,
        }
    }
}

async fn discard(stream: &mut BodyDataStream, most_bytes: usize) {
    let mut bytes = 0;
    while let Ok(Some(Ok(chunk))) = timeout(Duration::from_millis(500), stream.next()).await {
        bytes += chunk.len();
        if bytes > most_bytes {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_match_only_themselves() {
        let key = ApiKey::from("secret".to_owned());
        assert!(key.matches(b"secret"));
        for wrong in ["", "s", "secre", "secrets", "secretsecret", "Secret", "terces"] {
            assert!(!key.matches(wrong.as_bytes()), "{wrong}");
        }
        assert!(!format!("{key:?}").contains("secret"));
        assert!(!ApiKey::from(String::new()).is_usable());
        assert!(!ApiKey::from("a b".to_owned()).is_usable());
    }

    /// The place of the first wrong byte must not show. Medians of many interleaved rounds; the bound is loose because
    /// other programs run, and an early exit would miss it by far.
    #[test]
    fn the_time_of_a_comparison_does_not_tell_where_it_differs() {
        let key = ApiKey::from("k".repeat(4096));
        let (mut early, mut late) = (vec![b'k'; 4096], vec![b'k'; 4096]);
        early[0] = b'x';
        late[4095] = b'x';
        let time = |given: &[u8]| {
            let start = Instant::now();
            for _ in 0..50 {
                assert!(!std::hint::black_box(&key).matches(std::hint::black_box(given)));
            }
            start.elapsed().as_secs_f64()
        };
        let mut ratios: Vec<f64> = (0..101).map(|_| time(&late) / time(&early)).collect();
        ratios.sort_by(f64::total_cmp);
        assert!((0.5..2.0).contains(&ratios[50]), "median ratio {}", ratios[50]);
    }

    #[test]
    fn hosts() {
        let listed = ["box.lan".to_owned(), "pinned.lan:8080".to_owned()];
        for allowed in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1:1",
            "[::1]:8080",
            "[::1]",
            "box.lan:9",
            "pinned.lan:8080",
        ] {
            assert!(listed_or_loopback(&listed, allowed), "{allowed}");
        }
        for foreign in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "[::1].evil",
            "10.0.0.1",
            "pinned.lan:1",
        ] {
            assert!(!listed_or_loopback(&listed, foreign), "{foreign}");
        }
    }
}
