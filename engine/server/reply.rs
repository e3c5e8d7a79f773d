//! Owns the JSON of answers: choices, chunks, log-probabilities and usage, for both endpoints and both ways of sending.
//! A [`Choice`] collects what the engine pushed; a [`Reply`] holds what stays the same over one answer and turns choices
//! into JSON. Knows no HTTP.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::errors::ApiError;
use super::openai::Delivery;
use crate::request::{Event, FinishReason, TokenLogprobs};
use crate::tokenizer::Tokenizer;

/// Which endpoint's words are spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Surface {
    Chat,
    Completion,
}

/// What an answer repeats about one prompt.
#[derive(Debug)]
pub(super) struct PromptInfo {
    pub(super) tokens: usize,
    /// Only if the caller wants ids back.
    pub(super) token_ids: Option<Vec<u32>>,
    /// Text to put before the generated one.
    pub(super) echo: Option<String>,
}

/// What has arrived for one choice and was not sent yet.
#[derive(Debug, Default)]
pub(super) struct Choice {
    index: usize,
    /// The opening chunk is out.
    pub(super) opened: bool,
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<(u32, TokenLogprobs)>,
    /// Characters of the text before `logprobs[0]`.
    offset: usize,
    completion_tokens: usize,
    cached_tokens: usize,
    pub(super) finish: Option<FinishReason>,
}

impl Choice {
    /// Something to show.
    pub(super) fn has_text(&self) -> bool {
        !self.text.is_empty()
    }

    /// Something left that must not be lost at the end.
    pub(super) fn has_rest(&self) -> bool {
        self.has_text() || !self.token_ids.is_empty() || !self.logprobs.is_empty()
    }
}

/// One answer.
pub(super) struct Reply {
    pub(super) surface: Surface,
    pub(super) id: String,
    /// Unix seconds.
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) tokenizer: Arc<Tokenizer>,
    /// Choices per prompt; choice `i` continues prompt `i / n`.
    pub(super) n: usize,
    pub(super) prompts: Vec<PromptInfo>,
    /// Not part of the text, so without log-probabilities.
    pub(super) stop_token_ids: Vec<u32>,
    /// `Some(k)`: log-probabilities with k alternatives.
    pub(super) logprobs: Option<usize>,
    pub(super) delivery: Delivery,
}

impl Reply {
    /// One empty choice per sequence.
    pub(super) fn choices(&self) -> Vec<Choice> {
        let count = self.prompts.len() * self.n;
        let offset = |index: usize| self.prompt(index).echo.as_ref().map_or(0, |text| text.chars().count());
        (0..count).map(|index| Choice { index, offset: offset(index), ..Choice::default() }).collect()
    }

    fn prompt(&self, choice: usize) -> &PromptInfo {
        &self.prompts[choice / self.n]
    }

    /// Adds an event to its choice.
    ///
    /// # Errors
    /// The generation failed; the whole answer does.
    pub(super) fn apply(&self, choice: &mut Choice, event: Event) -> Result<(), ApiError> {
        match event {
            Event::Prefill { .. } => {}
            Event::Token { id, text, logprobs } => {
                choice.completion_tokens += 1;
                choice.text.push_str(&text);
                if self.delivery.return_token_ids {
                    choice.token_ids.push(id);
                }
                if let Some(logprobs) = logprobs.filter(|_| !self.stop_token_ids.contains(&id)) {
                    choice.logprobs.push((id, logprobs));
                }
            }
            Event::Finished { summary, .. } if summary.reason == FinishReason::Cancelled => {
                return Err(ApiError::unavailable("the generation was cancelled"));
            }
            Event::Finished { text, summary } => {
                choice.text.push_str(&text);
                choice.completion_tokens = summary.completion_tokens;
                choice.cached_tokens = summary.cached_tokens;
                choice.finish = Some(summary.reason);
            }
            Event::Failed(problem) => {
                // The cause may name files of this machine; it is for the operator.
                tracing::error!(reply = %self.id, %problem, "a generation failed");
                return Err(ApiError::internal(format!("the engine failed on this request ({})", self.id)));
            }
        }
        Ok(())
    }

    /// The answer in one piece.
    pub(super) fn whole(&self, choices: &mut [Choice]) -> Value {
        let usage = self.usage(choices);
        let list: Vec<Value> = choices
            .iter_mut()
            .map(|choice| match self.surface {
                Surface::Chat => {
                    let message = json!({"role": "assistant", "content": std::mem::take(&mut choice.text), "refusal": null});
                    self.choice(choice, "message", message, true)
                }
                Surface::Completion => {
                    let mut text = self.prompt(choice.index).echo.clone().unwrap_or_default();
                    text.push_str(&std::mem::take(&mut choice.text));
                    let mut object = self.choice(choice, "text", text.into(), true);
                    if let Some(ids) = &self.prompt(choice.index).token_ids {
                        object["prompt_token_ids"] = json!(ids);
                    }
                    object
                }
            })
            .collect();
        let mut whole = self.envelope(list, Some(usage));
        if self.surface == Surface::Chat
            && let Some(ids) = &self.prompts[0].token_ids
        {
            whole["prompt_token_ids"] = json!(ids);
        }
        whole
    }

    /// The chunk that opens a choice: the role, or what is known of a completion before its first token.
    pub(super) fn opening(&self, choice: &mut Choice) -> Option<Value> {
        choice.opened = true;
        let prompt = self.prompt(choice.index);
        match self.surface {
            Surface::Chat => {
                let delta = json!({"role": "assistant", "content": ""});
                let mut chunk = self.chunk_with(choice, self.bare(choice.index, "delta", delta, None));
                if let Some(ids) = &prompt.token_ids {
                    chunk["prompt_token_ids"] = json!(ids);
                }
                Some(chunk)
            }
            Surface::Completion => {
                if prompt.echo.is_none() && prompt.token_ids.is_none() {
                    return None;
                }
                let text = prompt.echo.clone().unwrap_or_default();
                let mut object = self.bare(choice.index, "text", text.into(), None);
                if let Some(ids) = &prompt.token_ids {
                    object["prompt_token_ids"] = json!(ids);
                }
                Some(self.chunk_with(choice, object))
            }
        }
    }

    /// The chunk with what arrived since the last one.
    pub(super) fn delta(&self, choice: &mut Choice) -> Value {
        let text = std::mem::take(&mut choice.text);
        let object = match self.surface {
            Surface::Chat => self.choice(choice, "delta", json!({"content": text}), false),
            Surface::Completion => self.choice(choice, "text", text.into(), false),
        };
        self.chunk_with(choice, object)
    }

    /// The chunk that closes a choice.
    pub(super) fn closing(&self, choice: &Choice) -> Value {
        let object = match self.surface {
            Surface::Chat => self.bare(choice.index, "delta", json!({}), choice.finish),
            Surface::Completion => self.bare(choice.index, "text", "".into(), choice.finish),
        };
        self.chunk_with(choice, object)
    }

    /// The chunk after all choices, if the caller asked for it.
    pub(super) fn closing_usage(&self, choices: &[Choice]) -> Option<Value> {
        self.delivery.include_usage.then(|| self.envelope(Vec::new(), Some(self.usage(choices))))
    }

    fn chunk_with(&self, choice: &Choice, object: Value) -> Value {
        let usage = match self.delivery {
            Delivery { continuous_usage: true, .. } => {
                Some(usage(self.prompt(choice.index).tokens, choice.cached_tokens, choice.completion_tokens))
            }
            Delivery { include_usage: true, .. } => Some(Value::Null),
            _ => None,
        };
        self.envelope(vec![object], usage)
    }

    fn envelope(&self, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let object = match (self.surface, self.delivery.stream) {
            (Surface::Chat, true) => "chat.completion.chunk",
            (Surface::Chat, false) => "chat.completion",
            (Surface::Completion, _) => "text_completion",
        };
        let mut envelope = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("moebius-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        });
        if let Some(usage) = usage {
            envelope["usage"] = usage;
        }
        envelope
    }

    /// A choice with the log-probabilities and ids it holds, which it then no longer holds.
    fn choice(&self, choice: &mut Choice, key: &str, value: Value, last: bool) -> Value {
        let mut object = self.bare(choice.index, key, value, choice.finish.filter(|_| last));
        if self.logprobs.is_some() {
            let tokens = std::mem::take(&mut choice.logprobs);
            object["logprobs"] = match self.surface {
                Surface::Chat => self.chat_logprobs(&tokens),
                Surface::Completion => self.completion_logprobs(&tokens, &mut choice.offset),
            };
        }
        if self.delivery.return_token_ids {
            object["token_ids"] = json!(std::mem::take(&mut choice.token_ids));
        }
        object
    }

    fn bare(&self, index: usize, key: &str, value: Value, finish: Option<FinishReason>) -> Value {
        let mut object = Map::new();
        object.insert("index".into(), index.into());
        object.insert(key.into(), value);
        object.insert("logprobs".into(), Value::Null);
        object.insert("finish_reason".into(), finish.map(FinishReason::as_str).into());
        Value::Object(object)
    }

    fn chat_logprobs(&self, tokens: &[(u32, TokenLogprobs)]) -> Value {
        let entry = |id: u32, logprob: f32| {
            let bytes = self.tokenizer.token_bytes(id).unwrap_or_default();
            json!({"token": String::from_utf8_lossy(bytes), "logprob": finite(logprob), "bytes": bytes})
        };
        let content: Vec<Value> = tokens
            .iter()
            .map(|(id, logprobs)| {
                let mut object = entry(*id, logprobs.chosen);
                let top = logprobs.top.iter().map(|(id, logprob)| entry(*id, *logprob));
                object["top_logprobs"] = top.collect();
                object
            })
            .collect();
        json!({"content": content, "refusal": null})
    }

    fn completion_logprobs(&self, tokens: &[(u32, TokenLogprobs)], offset: &mut usize) -> Value {
        let text_of = |id: u32| {
            let bytes = self.tokenizer.token_bytes(id).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        let mut columns = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (id, logprobs) in tokens {
            let text = text_of(*id);
            let mut top: Map<String, Value> =
                logprobs.top.iter().map(|(id, logprob)| (text_of(*id), finite(*logprob).into())).collect();
            top.insert(text.clone(), finite(logprobs.chosen).into());
            columns.0.push(*offset);
            *offset += text.chars().count();
            columns.1.push(text);
            columns.2.push(finite(logprobs.chosen));
            columns.3.push(top);
        }
        let (text_offset, tokens, token_logprobs, top_logprobs) = columns;
        json!({
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        })
    }

    /// A prompt counts once, however many choices continue it.
    fn usage(&self, choices: &[Choice]) -> Value {
        let prompt = self.prompts.iter().map(|prompt| prompt.tokens).sum();
        // So is what came from the cache: the least that any of its choices found.
        let cached =
            choices.chunks(self.n).map(|of_prompt| of_prompt.iter().map(|choice| choice.cached_tokens).min());
        let completion = choices.iter().map(|choice| choice.completion_tokens).sum();
        usage(prompt, cached.flatten().sum(), completion)
    }
}

fn usage(prompt: usize, cached: usize, completion: usize) -> Value {
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
    })
}

/// JSON has no infinity; the API's number for "impossible" is this.
fn finite(logprob: f32) -> f32 {
    const IMPOSSIBLE: f32 = -9999.0;
    if logprob.is_finite() { logprob } else { IMPOSSIBLE }
}
