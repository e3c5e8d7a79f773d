//! Owns `/v1/chat/completions` between validation and the engine: messages through the model's template into tokens.

use serde_json::{Map, Value};

use super::Shared;
use super::errors::ApiError;
use super::generation::{Job, TokenizedPrompt, check_text};
use super::messages;
use super::openai::ValidChat;
use super::reply::Surface;
use crate::template::{ChatInput, ChatTemplate, RenderedPrompt};
use crate::tokenizer::Specials;

/// From the body to a job.
pub(super) fn prepare(shared: &Shared, body: Map<String, Value>) -> Result<Job, ApiError> {
    let chat = ValidChat::new(body, &shared.rules())?;
    let Some(template) = &shared.state.template else {
        let problem = "the model has no chat template; use /v1/completions";
        return Err(ApiError::unsupported("messages", problem));
    };
    let rendered = match render(shared, template, &chat, &chat.messages) {
        Ok(rendered) => rendered,
        // Some templates walk through the arguments of earlier calls and fail on their text.
        Err(error) => match messages::with_parsed_arguments(&chat.messages) {
            Some(parsed) => render(shared, template, &chat, &parsed)?,
            None => return Err(error),
        },
    };
    check_text(shared, Surface::Chat, &rendered.text())?;
    let ids = shared.state.tokenizer.encode_prompt(&rendered);
    let ids =
        ids.map_err(|error| ApiError::invalid("messages", format_args!("cannot be tokenised: {error}")))?;
    Job::new(shared, Surface::Chat, chat.common, vec![TokenizedPrompt { ids, echo: None }])
}

fn render(
    shared: &Shared,
    template: &ChatTemplate,
    chat: &ValidChat,
    messages: &[Value],
) -> Result<RenderedPrompt, ApiError> {
    let input = ChatInput {
        messages,
        tools: chat.tools.as_deref(),
        add_generation_prompt: chat.add_generation_prompt,
        continue_final_message: chat.continue_final_message,
        variables: Some(&chat.variables),
        content_specials: shared.state.options.content_specials,
    };
    let refused = |error| ApiError::invalid("messages", format_args!("cannot be rendered: {error}"));
    template.render(&input).map_err(refused)
}

/// Whether the template writes the text of content parts, rather than the list itself or an error.
pub(super) fn reads_parts(template: &ChatTemplate) -> bool {
    const PROBE: &str = "moebius-probe";
    let messages = [serde_json::json!({"role": "user", "content": [{"type": "text", "text": PROBE}]})];
    let input = ChatInput {
        messages: &messages,
        tools: None,
        add_generation_prompt: true,
        continue_final_message: false,
        variables: None,
        content_specials: Specials::Plain,
    };
    template.render(&input).is_ok_and(|rendered| {
        let text = rendered.text();
        text.contains(PROBE) && !text.contains("\"type\"") && !text.contains("'type'")
    })
}
