//! Owns the HTTP server: its options, its routes and what all requests share. The API is OpenAI's; `openai` and `messages`
//! say what may be asked, `chat` and `completions` turn it into tokens, `generation` runs it, `reply` and `sse` write the
//! answer, `guard` keeps the door, `listen` holds the connections. The engine behind it is a [`Generate`]; nothing here
//! knows a tensor.
//!
//! Promises: every number, list, string and wait of a caller is bounded before it costs anything; every error is
//! OpenAI-shaped JSON; a caller who goes away cancels its generation; one request cannot change another; no prompt text
//! is logged.

mod chat;
mod completions;
mod errors;
mod fields;
mod generation;
mod guard;
mod listen;
mod messages;
mod openai;
mod reply;
mod sse;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use axum::Router;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request as HttpRequest, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};

pub use errors::ApiError;
pub use guard::ApiKey;
pub use listen::{run, serve};

use crate::request::{Generate, SamplingParams};
use crate::template::ChatTemplate;
use crate::tokenizer::{Specials, Tokenizer};

/// How long the server waits for what.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// For the whole head of a request; also for the next request on an open connection.
    pub header: Duration,
    /// For the next piece of a body.
    pub body_idle: Duration,
    /// For a whole body.
    pub body_total: Duration,
    /// For a reader to take anything at all.
    pub write_stall: Duration,
    /// Without events in a stream before a comment shows that it is alive.
    pub ping: Duration,
    /// For connections to end after a shutdown was asked for.
    pub shutdown: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            header: Duration::from_secs(10),
            body_idle: Duration::from_secs(30),
            body_total: Duration::from_secs(300),
            write_stall: Duration::from_secs(30),
            ping: Duration::from_secs(5),
            shutdown: Duration::from_secs(5),
        }
    }
}

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Name or address to listen on.
    pub host: String,
    /// 0 = any free one.
    pub port: u16,
    /// Asked of every caller, except for `/health`.
    pub api_key: Option<ApiKey>,
    /// Listen without a key on an address that others can reach.
    pub insecure_no_auth: bool,
    /// Values of `Host` answered besides loopback names, with or without a port. Checked when listening on loopback, and
    /// elsewhere if there are any.
    pub allowed_hosts: Vec<String>,
    /// The model's id in requests and answers.
    pub served_model_name: String,
    /// Other ids for the same model.
    pub model_aliases: Vec<String>,
    /// For what a request does not say.
    pub default_sampling: SamplingParams,
    /// Most tokens to generate where a request does not say. `None`: what the context leaves for a chat, 16 for a
    /// completion, as OpenAI has it.
    pub default_max_tokens: Option<usize>,
    /// Ids that end every generation, except with `ignore_eos`.
    pub stop_token_ids: Vec<u32>,
    /// Control tokens spelled in chat messages. `Plain` (the default) keeps callers from forging turns.
    pub content_specials: Specials,
    /// Control tokens spelled in completion prompts. `Parse` (the default): this endpoint is the model's raw input.
    pub prompt_specials: Specials,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// Generation requests at one time, from the first byte of the body to the last of the answer; more are told to
    /// come back.
    pub max_concurrent_requests: usize,
    /// Open connections; more wait to be accepted.
    pub max_connections: usize,
    /// How long to wait for callers.
    pub timeouts: Timeouts,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8080,
            api_key: None,
            insecure_no_auth: false,
            allowed_hosts: Vec::new(),
            served_model_name: "moebius".into(),
            model_aliases: Vec::new(),
            default_sampling: SamplingParams { temperature: 1.0, ..SamplingParams::greedy() },
            default_max_tokens: None,
            stop_token_ids: Vec::new(),
            content_specials: Specials::Plain,
            prompt_specials: Specials::Parse,
            max_body_bytes: 64 << 20,
            max_concurrent_requests: 256,
            max_connections: 1024,
            timeouts: Timeouts::default(),
        }
    }
}

impl ServerOptions {
    /// Every id the model answers to, the main one first.
    fn model_ids(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.served_model_name).chain(&self.model_aliases).map(String::as_str)
    }

    fn serves(&self, id: &str) -> bool {
        self.model_ids().any(|served| served == id)
    }
}

/// What the server serves.
#[derive(Clone)]
pub struct AppState {
    /// Runs the requests.
    pub engine: Arc<dyn Generate>,
    /// The model's.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's, if it has one; without it there are no chats.
    pub template: Option<Arc<ChatTemplate>>,
    /// The operator's.
    pub options: ServerOptions,
}

/// Why the server did not start or went down.
#[derive(Debug)]
pub enum ServerError {
    /// Others could reach the server and nothing would keep them out.
    PublicWithoutKey {
        /// Where it was to listen.
        address: IpAddr,
    },
    /// The key is empty or cannot be sent in a header.
    BadApiKey,
    /// The address cannot be listened on.
    Bind {
        /// As `host:port`.
        address: String,
        /// What the system says.
        source: io::Error,
    },
    /// The runtime or the listening socket failed.
    Io(io::Error),
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PublicWithoutKey { address } => write!(
                f,
                "{address} can be reached from other machines and there is no API key; set a key, listen on 127.0.0.1, \
                 or insist with --insecure-no-auth"
            ),
            Self::BadApiKey => write!(f, "the API key must be visible ASCII characters, at least one"),
            Self::Bind { address, source } => write!(f, "cannot listen on {address}: {source}"),
            Self::Io(source) => write!(f, "the server failed: {source}"),
        }
    }
}

impl std::error::Error for ServerError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Bind { source, .. } | Self::Io(source) => Some(source),
            _ => None,
        }
    }
}

/// Bodies of the largest allowed size that may be in memory at one time.
const LARGEST_BODIES: usize = 4;

/// What all requests share.
struct Shared {
    state: AppState,
    hosts: guard::HostPolicy,
    /// Unix seconds.
    started: u64,
    template_reads_parts: bool,
    /// Room for generation requests.
    requests: Arc<Semaphore>,
    /// Room for bodies, in units of [`guard::BODY_UNIT_BYTES`].
    bodies: Arc<Semaphore>,
    /// Room for JSON, templates and tokens.
    workers: Arc<Semaphore>,
    /// Becomes true once.
    stopping: watch::Sender<bool>,
}

impl Shared {
    fn new(state: AppState, loopback: bool) -> Arc<Self> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            hosts: guard::HostPolicy::new(&state.options, loopback),
            started: guard::unix_seconds(),
            template_reads_parts: state.template.as_deref().is_some_and(chat::reads_parts),
            requests: Arc::new(Semaphore::new(state.options.max_concurrent_requests)),
            bodies: Arc::new(Semaphore::new(
                LARGEST_BODIES * state.options.max_body_bytes.div_ceil(guard::BODY_UNIT_BYTES),
            )),
            workers: Arc::new(Semaphore::new(threads.div_ceil(2))),
            stopping: watch::Sender::new(false),
            state,
        })
    }

    /// Done once the server is stopping.
    fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut stopping = self.stopping.subscribe();
        async move {
            // An error means that nobody is left to stop it.
            if stopping.wait_for(|stop| *stop).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn rules(&self) -> openai::Rules<'_> {
        openai::Rules {
            options: &self.state.options,
            vocab: self.state.engine.vocab(),
            template_reads_parts: self.template_reads_parts,
        }
    }
}

/// The routes, for a caller that has connections of its own; [`serve`] adds the limits that belong to connections.
pub fn router(state: AppState) -> Router {
    let host = state.options.host.as_str();
    let loopback = host == "localhost" || host.parse().is_ok_and(guard::is_loopback);
    routes(Shared::new(state, loopback))
}

fn routes(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/version", get(version))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .fallback(async || ApiError::not_found())
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&shared), guard::guard))
        .with_state(shared)
}

async fn health() -> Response {
    ok(&json!({"status": "ok"}))
}

async fn version() -> Response {
    ok(&json!({"version": env!("CARGO_PKG_VERSION")}))
}

async fn models(State(shared): State<Arc<Shared>>) -> Response {
    let data: Vec<Value> = shared.state.options.model_ids().map(|id| model_object(&shared, id)).collect();
    ok(&json!({"object": "list", "data": data}))
}

async fn model(State(shared): State<Arc<Shared>>, id: Result<Path<String>, PathRejection>) -> Response {
    // Not UTF-8, so nobody's name.
    let Ok(Path(id)) = id else { return ApiError::not_found().into_response() };
    if shared.state.options.serves(&id) {
        return ok(&model_object(&shared, &id));
    }
    ApiError::model_not_found(&id, &shared.state.options.served_model_name).into_response()
}

fn model_object(shared: &Shared, id: &str) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": shared.started,
        "owned_by": "moebius",
        "max_model_len": shared.state.engine.context(),
    })
}

async fn chat_completions(State(shared): State<Arc<Shared>>, request: HttpRequest) -> Response {
    generation::answer(shared, request, chat::prepare).await
}

async fn completions(State(shared): State<Arc<Shared>>, request: HttpRequest) -> Response {
    generation::answer(shared, request, completions::prepare).await
}

fn ok(body: &Value) -> Response {
    errors::json_response(StatusCode::OK, body)
}
