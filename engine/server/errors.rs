//! Owns what a caller sees when something is refused or fails: one type, one JSON shape
//! (`{"error":{"message","type","param","code"}}`), one place that maps engine errors to HTTP statuses. Knows no route.
//! Messages name the caller's field and what to do; they never carry paths, addresses or prompt text.

use std::borrow::Cow;
use std::fmt;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::request::SubmitError;

/// Longest piece of a caller's own text that an error repeats, in characters.
const QUOTED_CHARACTERS: usize = 64;
/// Longest message, in characters: what a template says may repeat a whole conversation.
const MESSAGE_CHARACTERS: usize = 1024;

/// A refused or failed request, in the shape of the OpenAI API.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<Cow<'static, str>>,
    message: String,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if let Some((end, _)) = message.char_indices().nth(MESSAGE_CHARACTERS) {
            message.truncate(end);
            message.push('…');
        }
        Self { status, kind, code: Some(code), param: None, message }
    }

    /// 400: the field `param` is wrong.
    pub(super) fn invalid(param: impl Into<Cow<'static, str>>, message: impl fmt::Display) -> Self {
        let param = param.into();
        let message = format!("'{param}' {message}");
        Self {
            param: Some(param),
            ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", "invalid_value", message)
        }
    }

    /// 400: the field `param` asks for something that this server cannot do; better said than ignored.
    pub(super) fn unsupported(param: impl Into<Cow<'static, str>>, what: &str) -> Self {
        Self {
            code: Some("unsupported_value"),
            ..Self::invalid(param, format_args!("is not supported: {what}"))
        }
    }

    /// 400: the body as a whole is not a request.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", "invalid_json", message)
    }

    /// 400: prompt longer than the context.
    pub(super) fn context_exceeded(param: &'static str, message: impl Into<String>) -> Self {
        let code = "context_length_exceeded";
        Self {
            param: Some(param.into()),
            ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", code, message)
        }
    }

    /// 401: no key, or the wrong one.
    pub(super) fn unauthorized() -> Self {
        let message = "missing or wrong API key; send it as 'Authorization: Bearer KEY'";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", "invalid_api_key", message)
    }

    /// 403: the `Host` is not one of this server's names.
    pub(super) fn forbidden_host() -> Self {
        let message = "this Host is not allowed; use localhost or 127.0.0.1, or start the server with this host allowed";
        Self::new(StatusCode::FORBIDDEN, "permission_error", "host_not_allowed", message)
    }

    /// 404: no such model here.
    pub(super) fn model_not_found(id: &str, served: &str) -> Self {
        let message = format!("the model {} does not exist; this server has '{served}'", quoted(id));
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", "model_not_found", message);
        Self { param: Some("model".into()), ..error }
    }

    /// 404: no such path.
    pub(super) fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", "not_found", "no such endpoint")
    }

    /// 405: the path exists, the method does not.
    pub(super) fn method_not_allowed() -> Self {
        let message = "this endpoint does not take this method";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", "method_not_allowed", message)
    }

    /// 408: the body stopped arriving.
    pub(super) fn body_timeout() -> Self {
        let message = "the request body did not arrive in time";
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "request_timeout", message)
    }

    /// 413: the body is over the limit.
    pub(super) fn too_large(limit_bytes: usize) -> Self {
        let message = format!("the request body is larger than {limit_bytes} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", "request_too_large", message)
    }

    /// 415: not plain JSON.
    pub(super) fn unsupported_media(message: &str) -> Self {
        let (status, code) = (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type");
        Self::new(status, "invalid_request_error", code, message)
    }

    /// 429: come back later.
    pub(super) fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full", message)
    }

    /// 500: the engine failed on this request.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal_error", message)
    }

    /// 503: the engine or the server is stopping.
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "service_unavailable", message)
    }

    /// Moves a field error into an element of a list: `role` in `messages[3]` becomes `messages[3].role`.
    pub(super) fn within(mut self, prefix: fmt::Arguments<'_>) -> Self {
        if let Some(param) = self.param.take() {
            let whole = format!("{prefix}.{param}");
            self.message = self.message.replacen(param.as_ref(), &whole, 1);
            self.param = Some(whole.into());
        }
        self
    }

    /// HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The body, also sent as the last event of a stream that fails.
    pub(super) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status.as_u16(), self.message)
    }
}

impl std::error::Error for ApiError {}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::EmptyPrompt => Self::invalid("prompt", "has no tokens"),
            SubmitError::ContextExceeded { .. } => Self::context_exceeded("prompt", error.to_string()),
            SubmitError::Invalid { param, message } => Self::invalid(param, message),
            SubmitError::QueueFull { .. } => Self::busy(error.to_string()),
            SubmitError::Stopped => Self::unavailable(error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &self.body());
        let headers = response.headers_mut();
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}

/// Any JSON answer of this server.
pub(super) fn json_response(status: StatusCode, body: &Value) -> Response {
    let content_type = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    (status, [content_type], body.to_string()).into_response()
}

/// A caller's own text, short and on one line.
pub(super) fn quoted(text: &str) -> String {
    let mut short: String = text.chars().take(QUOTED_CHARACTERS).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    format!("{short:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nested_field_is_named_once_and_whole() {
        let error = ApiError::invalid("role", "must be a string").within(format_args!("messages[3]"));
        assert_eq!(error.body()["error"]["param"], "messages[3].role");
        assert_eq!(error.body()["error"]["message"], "'messages[3].role' must be a string");
    }

    #[test]
    fn quotes_are_short_and_escaped() {
        assert_eq!(quoted("a\nb"), "\"a\\nb\"");
        assert!(quoted(&"x".repeat(10_000)).len() < 80);
    }
}
