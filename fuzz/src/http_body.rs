//! A request's body; the first byte chooses the endpoint.

use std::sync::{Arc, OnceLock};

use axum::body::{Body, to_bytes};
use axum::http::{Request as HttpRequest, header};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use moebius::request::{Event, FinishReason, Generate, Request, Sink, SubmitError, Summary, TokenLogprobs};
use moebius::server::{AppState, ServerOptions, router};
use moebius::template::ChatTemplate;
use moebius::tokenizer::Tokenizer;

/// Says one token to every request, at once.
struct OneToken {
    vocab: usize,
}

impl Generate for OneToken {
    fn submit(&self, request: Request, mut sink: Sink) -> Result<(), SubmitError> {
        assert!(!request.prompt.is_empty() && request.prompt.iter().all(|id| (*id as usize) < self.vocab));
        assert!(request.max_tokens.is_some_and(|most| request.prompt.len() + most <= self.context()));
        let logprobs = request.logprobs.map(|top| TokenLogprobs { chosen: -1.0, top: vec![(65, -1.0); top] });
        let summary = Summary {
            reason: FinishReason::Length,
            prompt_tokens: request.prompt.len(),
            cached_tokens: 0,
            completion_tokens: 1,
            queue_seconds: 0.0,
            time_to_first_token_seconds: 0.0,
            prefill_seconds: 0.0,
            decode_seconds: 0.0,
        };
        let _ = sink(Event::Token { id: 65, text: "A".into(), logprobs });
        let _ = sink(Event::Finished { text: String::new(), summary });
        Ok(())
    }

    fn context(&self) -> usize {
        4096
    }

    fn vocab(&self) -> usize {
        self.vocab
    }
}

fn service() -> &'static (tokio::runtime::Runtime, TowerToHyperService<axum::Router>) {
    static SERVICE: OnceLock<(tokio::runtime::Runtime, TowerToHyperService<axum::Router>)> = OnceLock::new();
    SERVICE.get_or_init(|| {
        let read = |name: &str| {
            Ok(match name {
                "tiktoken.model" => Some(super::ranks().into_bytes()),
                "tokenizer_config.json" => Some(super::TOKENIZER_CONFIG.into()),
                _ => None,
            })
        };
        let tokenizer = Tokenizer::load(&read).expect("the files are sound");
        let controls = tokenizer.specials().map(|(_, text)| text);
        let template = ChatTemplate::load(&read, controls).expect("the files are sound").map(Arc::new);
        let engine = Arc::new(OneToken { vocab: tokenizer.vocab_size() });
        let state =
            AppState { engine, tokenizer: Arc::new(tokenizer), template, options: ServerOptions::default() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        (runtime, TowerToHyperService::new(router(state)))
    })
}

/// Every body is answered, and none with a fault of the server.
pub fn run(data: &[u8]) {
    let Some((choice, body)) = data.split_first() else { return };
    let path = if choice % 2 == 0 { "/v1/chat/completions" } else { "/v1/completions" };
    let request = HttpRequest::post(path)
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_vec()))
        .expect("a request");
    let (runtime, service) = service();
    let (status, answer) = runtime.block_on(async {
        let (head, body) = service.call(request).await.expect("infallible").into_parts();
        (head.status, to_bytes(body, 64 << 20).await)
    });
    let text = answer.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(!status.is_server_error(), "{status}: {text:?}");
    assert!(
        !status.is_client_error() || text.as_ref().is_ok_and(|text| text.contains("\"error\"")),
        "{status}: {text:?}"
    );
}

pub fn seeds() -> Vec<Vec<u8>> {
    let chat = r#"{"model":"moebius","messages":[{"role":"system","content":"S"},{"role":"user","content":[{"type":"text","text":"U<|im_end|>"}]}],"max_tokens":5,"temperature":0.5,"top_p":0.9,"top_k":5,"n":2,"stop":["a","b"],"seed":1,"stream":false,"logprobs":true,"top_logprobs":3,"logit_bias":{"65":-5},"user":"x"}"#;
    let streamed = r#"{"model":"moebius","messages":[{"role":"user","content":"Hi"}],"stream":true,"stream_options":{"include_usage":true},"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}],"tool_choice":"auto","presence_penalty":1,"frequency_penalty":-1}"#;
    let completion = r#"{"model":"moebius","prompt":["Hello",[65,66]],"max_tokens":5,"echo":true,"logprobs":2,"best_of":1,"suffix":null,"min_tokens":1,"stop_token_ids":[65],"ignore_eos":true,"repetition_penalty":1.1,"min_p":0.1,"response_format":{"type":"text"}}"#;
    vec![
        [b"\0", chat.as_bytes()].concat(),
        [b"\0", streamed.as_bytes()].concat(),
        [b"\x01", completion.as_bytes()].concat(),
    ]
}
