//! Owns `/v1/completions` between validation and the engine. A prompt here is what the model reads, with no template
//! around it: control tokens in it are parsed unless the operator switched that off.

use serde_json::{Map, Value};

use super::Shared;
use super::errors::ApiError;
use super::generation::{Job, TokenizedPrompt, check_text};
use super::openai::{Prompt, ValidCompletion};
use super::reply::Surface;

/// From the body to a job.
pub(super) fn prepare(shared: &Shared, body: Map<String, Value>) -> Result<Job, ApiError> {
    let completion = ValidCompletion::new(body, &shared.rules())?;
    let echo = completion.echo;
    let prompts = completion.prompts.into_iter().map(|prompt| tokenize(shared, prompt, echo));
    let prompts = prompts.collect::<Result<Vec<_>, _>>()?;
    Job::new(shared, Surface::Completion, completion.common, prompts)
}

fn tokenize(shared: &Shared, prompt: Prompt, echo: bool) -> Result<TokenizedPrompt, ApiError> {
    let tokenizer = &shared.state.tokenizer;
    match prompt {
        Prompt::Ids(ids) => {
            let text = echo.then(|| tokenizer.decode(&ids, false));
            Ok(TokenizedPrompt { ids, echo: text })
        }
        Prompt::Text(text) => {
            check_text(shared, Surface::Completion, &text)?;
            let ids = tokenizer.encode(&text, shared.state.options.prompt_specials);
            let refused = |error| ApiError::invalid("prompt", format_args!("cannot be tokenised: {error}"));
            Ok(TokenizedPrompt { ids: ids.map_err(refused)?, echo: echo.then_some(text) })
        }
    }
}
