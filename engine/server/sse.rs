//! Owns server-sent events: the order of chunks, the framing, the keep-alive comments and the one error a broken stream
//! ends with. It is a plain stream polled by the connection: no task of its own, so a dropped connection drops the
//! generation with it.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::time::{Instant, Sleep};
use tokio_stream::Stream;

use super::errors::ApiError;
use super::generation::Generation;
use super::reply::{Choice, Reply};
use crate::request::Event;

/// Bytes collected into one write while events are waiting.
const WRITE_BYTES: usize = 16 * 1024;

/// The body of a streamed answer.
pub(super) struct SseStream {
    reply: Reply,
    choices: Vec<Choice>,
    /// `None` once the last event is in `out`.
    generation: Option<Generation>,
    out: Vec<u8>,
    ping: Duration,
    quiet: Pin<Box<Sleep>>,
}

impl SseStream {
    /// `ping` is the time without events after which a comment is sent.
    pub(super) fn new(reply: Reply, generation: Generation, ping: Duration) -> Self {
        let quiet = Box::pin(tokio::time::sleep(ping));
        Self { choices: reply.choices(), reply, generation: Some(generation), out: Vec::new(), ping, quiet }
    }

    fn on_event(&mut self, index: usize, event: Event) -> Result<(), ApiError> {
        let (reply, choice) = (&self.reply, &mut self.choices[index]);
        reply.apply(choice, event)?;
        if !choice.opened
            && let Some(chunk) = reply.opening(choice)
        {
            write_data(&mut self.out, &chunk);
        }
        // Ids and log-probabilities of tokens that are only part of a character wait for the whole one.
        if choice.has_text() || (choice.finish.is_some() && choice.has_rest()) {
            write_data(&mut self.out, &reply.delta(choice));
        }
        if choice.finish.is_some() {
            write_data(&mut self.out, &reply.closing(choice));
        }
        Ok(())
    }

    fn finish(&mut self, end: Result<(), ApiError>) {
        self.generation = None;
        match end {
            Ok(()) => {
                if let Some(chunk) = self.reply.closing_usage(&self.choices) {
                    write_data(&mut self.out, &chunk);
                }
                self.out.extend_from_slice(b"data: [DONE]\n\n");
            }
            Err(error) => write_data(&mut self.out, &error.body()),
        }
    }
}

impl Stream for SseStream {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        while this.out.len() < WRITE_BYTES {
            let Some(generation) = &mut this.generation else { break };
            match generation.poll_event(cx) {
                Poll::Ready(Some(Ok((index, event)))) => {
                    if let Err(error) = this.on_event(index, event) {
                        this.finish(Err(error));
                    }
                }
                Poll::Ready(Some(Err(error))) => this.finish(Err(error)),
                Poll::Ready(None) => this.finish(Ok(())),
                Poll::Pending => break,
            }
        }
        if this.out.is_empty() {
            if this.generation.is_none() {
                return Poll::Ready(None);
            }
            if this.quiet.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            // Readers skip comments; people who watch the wire see how far a long prompt is.
            let progress = this.generation.as_ref().map(Generation::progress);
            let comment = match progress.filter(|(done, total)| done < total) {
                Some((done, total)) => format!(": prefill {done}/{total}\n\n"),
                None => ": ping\n\n".to_owned(),
            };
            this.out.extend_from_slice(comment.as_bytes());
        }
        this.quiet.as_mut().reset(Instant::now() + this.ping);
        Poll::Ready(Some(Ok(std::mem::take(&mut this.out).into())))
    }
}

impl IntoResponse for SseStream {
    fn into_response(self) -> Response {
        let headers = [
            (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
            (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
        ];
        (headers, Body::from_stream(self)).into_response()
    }
}

/// One event. JSON text has no raw line break, so it is always one `data` line.
fn write_data(out: &mut Vec<u8>, chunk: &Value) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, chunk)
        .expect("JSON values without foreign keys can be written to memory");
    out.extend_from_slice(b"\n\n");
}
