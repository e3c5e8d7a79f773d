//! Owns a running request: from the body through a bounded pool of CPU workers (JSON, template, tokens) to the engine,
//! and from the engine's sinks back to one queue. Dropping a [`Generation`] cancels whatever of it still runs, so a
//! caller who goes away needs no code of its own. Knows neither endpoint's words.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::Shared;
use super::errors::{ApiError, json_response};
use super::openai::Common;
use super::reply::{PromptInfo, Reply, Surface};
use super::sse::SseStream;
use super::{fields, guard};
use crate::request::{Event, Request, Sink};

/// Events queued for a reader that is merely slow.
const PATIENT_EVENTS: usize = 1024;
/// Events queued before the reader is given up at once.
const MOST_EVENTS: usize = 65_536;

/// No vocabulary has longer tokens, so a longer text cannot fit; found out without tokenising it.
const MAX_TOKEN_BYTES: usize = 512;

/// A request ready for the engine.
pub(super) struct Job {
    /// One per prompt, each with as many choices as the reply says.
    pub(super) requests: Vec<Request>,
    pub(super) reply: Reply,
}

/// A tokenised prompt and the text an answer repeats before its own.
pub(super) struct TokenizedPrompt {
    pub(super) ids: Vec<u32>,
    pub(super) echo: Option<String>,
}

impl Job {
    /// One engine request per prompt. A limit beyond the context becomes what the context leaves, as every OpenAI-shaped
    /// server does; a prompt that leaves nothing is an error.
    pub(super) fn new(
        shared: &Shared,
        surface: Surface,
        common: Common,
        prompts: Vec<TokenizedPrompt>,
    ) -> Result<Self, ApiError> {
        let (context, param) = (shared.state.engine.context(), surface.prompt_param());
        let mut requests = Vec::with_capacity(prompts.len());
        let mut infos = Vec::with_capacity(prompts.len());
        for TokenizedPrompt { ids, echo } in prompts {
            if ids.is_empty() {
                return Err(ApiError::invalid(param, "has no tokens"));
            }
            let left = context.saturating_sub(ids.len());
            if left == 0 {
                let message = format!("the context is {context} tokens, but the prompt has {}", ids.len());
                return Err(ApiError::context_exceeded(param, message));
            }
            let max_tokens = common.max_tokens.map_or(left, |most| most.min(left));
            if common.stop.min_tokens > max_tokens {
                let problem = format!("is more than the {max_tokens} tokens that can be generated");
                return Err(ApiError::invalid("min_tokens", problem));
            }
            requests.push(Request {
                prompt: ids.clone(),
                max_tokens: Some(max_tokens),
                sampling: common.sampling.clone(),
                stop: common.stop.clone(),
                logprobs: common.logprobs,
                skip_special_tokens: common.skip_special_tokens,
                priority: common.priority,
                cache_salt: tenant(shared, &common.cache_salt),
            });
            let tokens = ids.len();
            infos.push(PromptInfo {
                tokens,
                token_ids: common.delivery.return_token_ids.then_some(ids),
                echo,
            });
        }
        let reply = Reply {
            surface,
            id: format!("{}-{}", surface.id_prefix(), guard::new_id()),
            created: guard::unix_seconds(),
            model: shared.state.options.served_model_name.clone(),
            tokenizer: Arc::clone(&shared.state.tokenizer),
            n: common.n,
            prompts: infos,
            stop_token_ids: common.stop.token_ids,
            logprobs: common.logprobs,
            delivery: common.delivery,
        };
        Ok(Self { requests, reply })
    }
}

/// With whom a request shares cached prefixes: those of the same key and the same `cache_salt`. Blocks outlive a server
/// on disk, so the key takes part although a server has but one; hashed, since this may be logged.
fn tenant(shared: &Shared, cache_salt: &str) -> String {
    match &shared.state.options.api_key {
        Some(key) => format!("{}{cache_salt}", key.fingerprint()),
        None => cache_salt.to_owned(),
    }
}

impl Surface {
    pub(super) fn prompt_param(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Completion => "prompt",
        }
    }

    fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl",
            Self::Completion => "cmpl",
        }
    }
}

/// # Errors
/// 400: the text is too long for the context whatever its tokens are.
pub(super) fn check_text(shared: &Shared, surface: Surface, text: &str) -> Result<(), ApiError> {
    let context = shared.state.engine.context();
    if text.len() / MAX_TOKEN_BYTES < context {
        return Ok(());
    }
    let message = format!("the context is {context} tokens, but the prompt has {} bytes", text.len());
    Err(ApiError::context_exceeded(surface.prompt_param(), message))
}

/// What an endpoint adds: from its JSON to a job. Runs on a worker thread.
pub(super) type Prepare = fn(&Shared, Map<String, Value>) -> Result<Job, ApiError>;

/// Answers a generation request, streamed or whole.
pub(super) async fn answer(
    shared: Arc<Shared>,
    request: axum::extract::Request,
    prepare: Prepare,
) -> Response {
    run(&shared, request, prepare).await.unwrap_or_else(IntoResponse::into_response)
}

async fn run(
    shared: &Arc<Shared>,
    request: axum::extract::Request,
    prepare: Prepare,
) -> Result<Response, ApiError> {
    // Before the body: bodies are what a flood of requests would cost.
    let limit = shared.state.options.max_concurrent_requests;
    let permit = Arc::clone(&shared.requests).try_acquire_owned();
    let permit = permit.map_err(|_| ApiError::busy(format!("{limit} requests are already running")))?;
    let body = guard::read_json_body(request, shared).await?;
    let Job { requests, reply } =
        on_worker(shared, move |shared| prepare(shared, fields::parse_object(&body.bytes)?)).await?;
    tracing::info!(
        reply = %reply.id,
        sequences = requests.len() * reply.n,
        prompt_tokens = reply.prompts.iter().map(|prompt| prompt.tokens).sum::<usize>(),
        stream = reply.delivery.stream,
        "generating"
    );
    let mut generation = Generation::start(shared, requests, reply.n, permit)?;
    if reply.delivery.stream {
        return Ok(SseStream::new(reply, generation, shared.state.options.timeouts.ping).into_response());
    }
    let mut choices = reply.choices();
    while let Some(event) = generation.event().await {
        let (index, event) = event?;
        reply.apply(&mut choices[index], event)?;
    }
    Ok(json_response(StatusCode::OK, &reply.whole(&mut choices)))
}

/// Runs CPU work off the I/O threads, on as many threads as there is room for. The room belongs to the work, not to the
/// caller: a caller who leaves does not make place for another while the work goes on.
async fn on_worker<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Shared) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let room = Arc::clone(&shared.workers).acquire_owned().await;
    let room = room.map_err(|_| ApiError::unavailable("the server is stopping"))?;
    let shared = Arc::clone(shared);
    let task = tokio::task::spawn_blocking(move || {
        let _room = room;
        work(&shared)
    });
    task.await.unwrap_or_else(|error| {
        tracing::error!(%error, "preparing a request panicked");
        Err(ApiError::internal("the request could not be prepared"))
    })
}

/// The events of all choices of one request, in the order of their arrival.
pub(super) struct Generation {
    events: mpsc::Receiver<(usize, Event)>,
    /// Tokens of a prompt that were read, and all of them: two 32-bit halves.
    progress: Arc<AtomicU64>,
    stopping: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// Choices without an end yet.
    live: usize,
    _permit: OwnedSemaphorePermit,
}

impl Generation {
    /// Submits every request, or none: what was accepted before a refusal is cancelled.
    pub(super) fn start(
        shared: &Shared,
        requests: Vec<Request>,
        n: usize,
        permit: OwnedSemaphorePermit,
    ) -> Result<Self, ApiError> {
        let (sender, events) = mpsc::channel(MOST_EVENTS);
        let live = requests.len() * n;
        let progress = Arc::new(AtomicU64::new(0));
        for (prompt, request) in requests.into_iter().enumerate() {
            let patience = shared.state.options.timeouts.write_stall;
            let sink = |choice| sink(sender.clone(), prompt * n + choice, patience, Arc::clone(&progress));
            shared.state.engine.submit_choices(request, (0..n).map(sink).collect())?;
        }
        Ok(Self { events, progress, stopping: Box::pin(shared.stopped()), live, _permit: permit })
    }

    /// How many tokens of how many of a prompt have been read, as far as is known.
    pub(super) fn progress(&self) -> (u32, u32) {
        let packed = self.progress.load(Ordering::Relaxed);
        ((packed >> 32) as u32, packed as u32)
    }

    /// The next event; `None` after the last choice ended. An error is the last thing that comes.
    pub(super) fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<(usize, Event), ApiError>>> {
        if self.live == 0 {
            return Poll::Ready(None);
        }
        let problem = match self.events.poll_recv(cx) {
            Poll::Ready(Some((index, event))) => {
                match event {
                    Event::Finished { .. } => self.live -= 1,
                    Event::Failed(_) => self.live = 0,
                    _ => {}
                }
                return Poll::Ready(Some(Ok((index, event))));
            }
            Poll::Ready(None) => "the engine has stopped",
            Poll::Pending if self.stopping.as_mut().poll(cx).is_ready() => "the server is stopping",
            Poll::Pending => return Poll::Pending,
        };
        self.live = 0;
        self.events.close();
        Poll::Ready(Some(Err(ApiError::unavailable(problem))))
    }

    async fn event(&mut self) -> Option<Result<(usize, Event), ApiError>> {
        std::future::poll_fn(|cx| self.poll_event(cx)).await
    }
}

/// Never blocks the engine: a reader who falls behind is waited for a while by queueing, then given up.
fn sink(
    sender: mpsc::Sender<(usize, Event)>,
    index: usize,
    patience: Duration,
    progress: Arc<AtomicU64>,
) -> Sink {
    let mut behind_since: Option<Instant> = None;
    Box::new(move |event| {
        if sender.is_closed() {
            return false;
        }
        if sender.max_capacity() - sender.capacity() < PATIENT_EVENTS {
            behind_since = None;
        } else if behind_since.get_or_insert_with(Instant::now).elapsed() > patience {
            tracing::warn!("a reader stopped reading; its generation is cancelled");
            return false;
        }
        if let Event::Prefill { done, total } = event {
            progress.store((done as u64) << 32 | total as u64, Ordering::Relaxed);
            return true;
        }
        sender.try_send((index, event)).is_ok()
    })
}
