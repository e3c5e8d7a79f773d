//! Owns the request bodies of the two generation endpoints: which fields exist, their types, ranges and defaults. A
//! [`ValidChat`] or [`ValidCompletion`] exists only past validation, so nothing behind it checks again. A field that
//! would change the answer and is not implemented is refused, never ignored; a field nobody knows is ignored. Knows no
//! tokenizer and no engine.

use serde_json::{Map, Value};

use super::ServerOptions;
use super::errors::{ApiError, quoted};
use super::fields::{Fields, token_id};
use super::messages;
use crate::request::{SamplingParams, StopRule};

/// Levels of priority; lower goes first.
const PRIORITIES: std::ops::RangeInclusive<i64> = -1_000_000..=1_000_000;
const MAX_SALT_BYTES: usize = 1024;
/// Most choices of one prompt.
pub(super) const MAX_CHOICES: u32 = 16;
/// Most prompts times choices of one request.
pub(super) const MAX_SEQUENCES: usize = 128;
/// Most alternatives listed with a token.
pub(super) const MAX_LOGPROBS: u32 = 20;
const MAX_STOP_STRINGS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_TOKENS: usize = 256;
const MAX_LOGIT_BIAS: usize = 1024;
const MAX_MESSAGES: usize = 65_536;
const MAX_TOKENS: u32 = i32::MAX as u32;
/// What OpenAI and vLLM generate for a completion that names no limit.
const COMPLETION_MAX_TOKENS: usize = 16;

/// Variables of chat templates that a request may set. Everything else a template reads is the server's.
const TEMPLATE_VARIABLES: &[&str] = &[
    "enable_thinking",
    "thinking",
    "preserve_thinking",
    "clear_thinking",
    "reasoning_effort",
    "thinking_effort",
    "thinking_budget",
];
const EFFORTS: &[&str] = &["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// What validation has to know besides the body.
pub(super) struct Rules<'a> {
    pub(super) options: &'a ServerOptions,
    /// Size of the logits.
    pub(super) vocab: usize,
    /// The chat template understands a list of content parts; otherwise their texts are joined.
    pub(super) template_reads_parts: bool,
}

/// How the answer is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Delivery {
    pub(super) stream: bool,
    /// The stream ends with a usage chunk.
    pub(super) include_usage: bool,
    /// Every chunk carries the usage so far.
    pub(super) continuous_usage: bool,
    pub(super) return_token_ids: bool,
}

/// What both endpoints share.
#[derive(Clone, Debug)]
pub(super) struct Common {
    /// Choices per prompt.
    pub(super) n: usize,
    pub(super) sampling: SamplingParams,
    pub(super) stop: StopRule,
    pub(super) max_tokens: Option<usize>,
    pub(super) logprobs: Option<usize>,
    pub(super) skip_special_tokens: bool,
    pub(super) priority: i32,
    pub(super) cache_salt: String,
    pub(super) delivery: Delivery,
}

/// A chat request that may run.
#[derive(Debug)]
pub(super) struct ValidChat {
    pub(super) common: Common,
    /// As the template reads them.
    pub(super) messages: Vec<Value>,
    pub(super) tools: Option<Vec<Value>>,
    pub(super) add_generation_prompt: bool,
    pub(super) continue_final_message: bool,
    pub(super) variables: Map<String, Value>,
}

/// One prompt of a completion.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// A completion request that may run.
#[derive(Debug)]
pub(super) struct ValidCompletion {
    pub(super) common: Common,
    /// At least one, none empty.
    pub(super) prompts: Vec<Prompt>,
    pub(super) echo: bool,
}

impl ValidChat {
    /// # Errors
    /// 400 or 404 with the field.
    pub(super) fn new(body: Map<String, Value>, rules: &Rules<'_>) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body);
        check_model(&mut fields, rules.options)?;
        let listed = fields.array("messages", MAX_MESSAGES)?;
        let listed = listed.ok_or_else(|| ApiError::invalid("messages", "is missing"))?;
        let messages = messages::validate(listed, rules.template_reads_parts)?;

        let continue_final_message = fields.bool("continue_final_message")?.unwrap_or(false);
        let asked = fields.bool("add_generation_prompt")?;
        if continue_final_message {
            if asked == Some(true) {
                let problem = "must be false with 'continue_final_message'";
                return Err(ApiError::invalid("add_generation_prompt", problem));
            }
            if messages.last().is_none_or(|last| last["role"] != "assistant") {
                let problem = "needs an assistant message at the end of 'messages'";
                return Err(ApiError::invalid("continue_final_message", problem));
            }
        }

        let mut common = common(&mut fields, rules)?;
        let top = fields.count("top_logprobs", 0..=MAX_LOGPROBS)?;
        common.logprobs = match (fields.bool("logprobs")?.unwrap_or(false), top) {
            (true, top) => Some(top.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(_)) => return Err(ApiError::invalid("top_logprobs", "needs 'logprobs': true")),
        };
        common.max_tokens = common.max_tokens.or(rules.options.default_max_tokens);
        let valid = Self {
            common,
            messages,
            tools: tools(&mut fields)?,
            add_generation_prompt: asked.unwrap_or(!continue_final_message),
            continue_final_message,
            variables: template_variables(&mut fields)?,
        };
        fields.finish();
        Ok(valid)
    }
}

impl ValidCompletion {
    /// # Errors
    /// 400 or 404 with the field.
    pub(super) fn new(body: Map<String, Value>, rules: &Rules<'_>) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body);
        check_model(&mut fields, rules.options)?;
        let prompts = prompts(fields.take("prompt"), rules.vocab)?;
        let mut common = common(&mut fields, rules)?;
        if prompts.len() * common.n > MAX_SEQUENCES {
            let problem = format!("times 'n' is more than {MAX_SEQUENCES} sequences");
            return Err(ApiError::invalid("prompt", problem));
        }
        common.max_tokens =
            common.max_tokens.or(rules.options.default_max_tokens).or(Some(COMPLETION_MAX_TOKENS));
        common.logprobs = fields.count("logprobs", 0..=MAX_LOGPROBS)?;
        let echo = fields.bool("echo")?.unwrap_or(false);
        if echo && common.logprobs.is_some() {
            return Err(ApiError::unsupported(
                "echo",
                "log-probabilities of the prompt; use one of echo, logprobs",
            ));
        }
        if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::unsupported("suffix", "text after the completion"));
        }
        fields.finish();
        Ok(Self { common, prompts, echo })
    }
}

fn check_model(fields: &mut Fields, options: &ServerOptions) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(id) if !options.serves(&id) => Err(ApiError::model_not_found(&id, &options.served_model_name)),
        _ => Ok(()),
    }
}

fn common(fields: &mut Fields, rules: &Rules<'_>) -> Result<Common, ApiError> {
    refuse_unimplemented(fields)?;
    let n = fields.count("n", 1..=MAX_CHOICES)?.unwrap_or(1);
    if let Some(best_of) = fields.integer("best_of", 1..=i64::MAX)?
        && best_of > 1
    {
        return Err(ApiError::unsupported("best_of", "more than 1; use 'n'"));
    }
    // Any limit is fine that is a number at all: what the context leaves is applied once the prompt is known.
    let newer = fields.count("max_completion_tokens", 1..=MAX_TOKENS)?;
    let max_tokens = newer.or(fields.count("max_tokens", 1..=MAX_TOKENS)?);
    let stop = stop(fields, rules)?;
    if let Some(most) = max_tokens
        && stop.min_tokens > most
    {
        return Err(ApiError::invalid(
            "min_tokens",
            format_args!("is more than the {most} tokens to generate"),
        ));
    }
    Ok(Common {
        n,
        sampling: sampling(fields, rules)?,
        stop,
        max_tokens,
        logprobs: None,
        skip_special_tokens: fields.bool("skip_special_tokens")?.unwrap_or(true),
        priority: fields.integer("priority", PRIORITIES)?.unwrap_or(0) as i32,
        cache_salt: cache_salt(fields)?,
        delivery: delivery(fields)?,
    })
}

fn cache_salt(fields: &mut Fields) -> Result<String, ApiError> {
    let salt = fields.string("cache_salt")?.unwrap_or_default();
    if salt.len() > MAX_SALT_BYTES {
        return Err(ApiError::invalid("cache_salt", format_args!("is longer than {MAX_SALT_BYTES} bytes")));
    }
    Ok(salt)
}

fn sampling(fields: &mut Fields, rules: &Rules<'_>) -> Result<SamplingParams, ApiError> {
    let default = rules.options.default_sampling.clone();
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
    Ok(SamplingParams {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(default.temperature),
        // -1 is vLLM's way to say all.
        top_k: fields
            .integer("top_k", -1..=i64::from(u32::MAX))?
            .map_or(default.top_k, |k| usize::try_from(k).unwrap_or(0)),
        top_p: fields.positive("top_p", 1.0)?.unwrap_or(default.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(default.min_p),
        repetition_penalty: fields
            .positive("repetition_penalty", 10.0)?
            .unwrap_or(default.repetition_penalty),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(default.presence_penalty),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0..=2.0)?
            .unwrap_or(default.frequency_penalty),
        logit_bias: logit_bias(fields, rules.vocab)?.unwrap_or(default.logit_bias),
        // Every 64-bit pattern is a seed of its own.
        seed: seed.map(i64::cast_unsigned).or(default.seed),
    })
}

fn logit_bias(fields: &mut Fields, vocab: usize) -> Result<Option<Vec<(u32, f32)>>, ApiError> {
    const NAME: &str = "logit_bias";
    let Some(entries) = fields.object(NAME)? else { return Ok(None) };
    if entries.len() > MAX_LOGIT_BIAS {
        let problem = format!("has {} entries; at most {MAX_LOGIT_BIAS} are allowed", entries.len());
        return Err(ApiError::invalid(NAME, problem));
    }
    let mut biases = Vec::with_capacity(entries.len());
    for (key, value) in &entries {
        let digits = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit());
        let id = key.parse::<u32>().ok().filter(|id| digits && (*id as usize) < vocab);
        let Some(id) = id else {
            return Err(ApiError::invalid(
                NAME,
                format_args!("has the key {}; keys are token ids below {vocab}", quoted(key)),
            ));
        };
        match value.as_f64() {
            Some(bias) if (-100.0..=100.0).contains(&bias) => biases.push((id, bias as f32)),
            _ => {
                return Err(ApiError::invalid(NAME, "has a value that is not a number between -100 and 100"));
            }
        }
    }
    Ok(Some(biases))
}

fn stop(fields: &mut Fields, rules: &Rules<'_>) -> Result<StopRule, ApiError> {
    let strings = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(items)) if items.len() <= MAX_STOP_STRINGS => items
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(text),
                _ => Err(ApiError::invalid("stop", "must be a string or an array of strings")),
            })
            .collect::<Result<_, _>>()?,
        Some(Value::Array(_)) => {
            return Err(ApiError::invalid("stop", format_args!("has more than {MAX_STOP_STRINGS} strings")));
        }
        Some(_) => return Err(ApiError::invalid("stop", "must be a string or an array of strings")),
    };
    if let Some(bad) = strings.iter().find(|text| text.is_empty() || text.len() > MAX_STOP_BYTES) {
        let problem = format!("has a string of {} bytes; 1 to {MAX_STOP_BYTES} are allowed", bad.len());
        return Err(ApiError::invalid("stop", problem));
    }
    let mut token_ids = match fields.bool("ignore_eos")? {
        Some(true) => Vec::new(),
        _ => rules.options.stop_token_ids.clone(),
    };
    for id in fields.token_ids("stop_token_ids", rules.vocab, MAX_STOP_TOKENS)?.unwrap_or_default() {
        if !token_ids.contains(&id) {
            token_ids.push(id);
        }
    }
    Ok(StopRule {
        token_ids,
        strings,
        include_in_output: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
        min_tokens: fields.count("min_tokens", 0..=MAX_TOKENS)?.unwrap_or(0),
    })
}

fn delivery(fields: &mut Fields) -> Result<Delivery, ApiError> {
    let stream = fields.bool("stream")?.unwrap_or(false);
    let mut delivery = Delivery {
        stream,
        return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
        ..Delivery::default()
    };
    if let Some(options) = fields.object("stream_options")? {
        if !stream {
            return Err(ApiError::invalid("stream_options", "is only allowed with 'stream': true"));
        }
        let mut options = Fields::new(options);
        let inside = |error: ApiError| error.within(format_args!("stream_options"));
        delivery.include_usage = options.bool("include_usage").map_err(inside)?.unwrap_or(false);
        delivery.continuous_usage = options.bool("continuous_usage_stats").map_err(inside)?.unwrap_or(false)
            && delivery.include_usage;
        options.finish();
    }
    Ok(delivery)
}

/// Fields whose silent loss would change the meaning of a request.
fn refuse_unimplemented(fields: &mut Fields) -> Result<(), ApiError> {
    const CONSTRAINED: &str = "constrained output is not implemented yet";
    if let Some(format) = fields.object("response_format")? {
        match format.get("type").and_then(Value::as_str) {
            Some("text") => {}
            Some("json_object" | "json_schema" | "structural_tag" | "grammar") => {
                return Err(ApiError::unsupported("response_format", CONSTRAINED));
            }
            _ => return Err(ApiError::invalid("response_format", "must have the type 'text'")),
        }
    }
    for name in
        ["structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar"]
    {
        fields.refuse(name, CONSTRAINED)?;
    }
    fields.refuse("prompt_logprobs", "log-probabilities of the prompt are not implemented yet")?;
    fields.refuse("use_beam_search", "beam search")?;
    fields.refuse("bad_words", "use 'logit_bias'")?;
    fields.refuse("allowed_token_ids", "use 'logit_bias'")?;
    fields.refuse("truncate_prompt_tokens", "shorten the prompt before sending it")?;
    // Accepted for compatibility; none of them changes the tokens.
    for name in ["user", "metadata", "service_tier", "store", "safety_identifier"] {
        fields.take(name);
    }
    Ok(())
}

fn tools(fields: &mut Fields) -> Result<Option<Vec<Value>>, ApiError> {
    fields.refuse("functions", "use 'tools'")?;
    fields.take("function_call");
    fields.bool("parallel_tool_calls")?;
    if let Some(kinds) = fields.array("modalities", 8)?
        && kinds.iter().any(|kind| kind != "text")
    {
        return Err(ApiError::unsupported("modalities", "only text is generated"));
    }
    fields.refuse("audio", "only text is generated")?;
    let tools = messages::tools(fields.array("tools", messages::MAX_TOOLS)?.unwrap_or_default())?;
    match fields.take("tool_choice") {
        None => {}
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => {}
            "none" => return Ok(None),
            "required" => {
                return Err(ApiError::unsupported(
                    "tool_choice",
                    "forcing a tool call is not implemented yet",
                ));
            }
            _ => return Err(ApiError::invalid("tool_choice", "must be 'auto' or 'none'")),
        },
        Some(Value::Object(_)) => {
            return Err(ApiError::unsupported("tool_choice", "forcing a tool call is not implemented yet"));
        }
        Some(_) => return Err(ApiError::invalid("tool_choice", "must be 'auto' or 'none'")),
    }
    Ok(Some(tools).filter(|tools| !tools.is_empty()))
}

fn template_variables(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    const KWARGS: &str = "chat_template_kwargs";
    if fields.take("chat_template").is_some() {
        return Err(ApiError::unsupported("chat_template", "the template is the model's own"));
    }
    let mut variables = Map::new();
    if let Some(effort) = fields.string("reasoning_effort")? {
        check_effort("reasoning_effort", &effort)?;
        variables.insert("reasoning_effort".into(), effort.into());
    }
    for (key, value) in fields.object(KWARGS)?.unwrap_or_default() {
        if !TEMPLATE_VARIABLES.contains(&key.as_str()) {
            let known = TEMPLATE_VARIABLES.join(", ");
            return Err(ApiError::invalid(
                KWARGS,
                format_args!("has the key {}; known: {known}", quoted(&key)),
            ));
        }
        match &value {
            Value::Null => continue,
            Value::String(effort) if key.ends_with("_effort") => check_effort(KWARGS, effort)?,
            Value::Bool(_) if !key.ends_with("_effort") => {}
            Value::Number(budget) if key == "thinking_budget" && budget.is_u64() => {}
            _ => return Err(ApiError::invalid(KWARGS, format_args!("has a wrong value for '{key}'"))),
        }
        variables.insert(key, value);
    }
    Ok(variables)
}

fn check_effort(param: &'static str, effort: &str) -> Result<(), ApiError> {
    if EFFORTS.contains(&effort) {
        return Ok(());
    }
    Err(ApiError::invalid(
        param,
        format_args!("has the effort {}; known: {}", quoted(effort), EFFORTS.join(", ")),
    ))
}

fn prompts(value: Option<Value>, vocab: usize) -> Result<Vec<Prompt>, ApiError> {
    const NAME: &str = "prompt";
    let wrong =
        || ApiError::invalid(NAME, "must be a string, an array of strings, token ids, or an array of those");
    let prompts = match value {
        None => return Err(ApiError::invalid(NAME, "is missing")),
        Some(Value::String(text)) => vec![Prompt::Text(text)],
        Some(Value::Array(items)) if matches!(items.first(), Some(Value::Number(_))) => {
            vec![Prompt::Ids(ids(&items, vocab)?)]
        }
        Some(Value::Array(items)) if items.len() > MAX_SEQUENCES => {
            return Err(ApiError::invalid(NAME, format_args!("has more than {MAX_SEQUENCES} items")));
        }
        Some(Value::Array(items)) => items
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(Prompt::Text(text)),
                Value::Array(list) => Ok(Prompt::Ids(ids(&list, vocab)?)),
                _ => Err(wrong()),
            })
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(wrong()),
    };
    let empty = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.is_empty(),
        Prompt::Ids(ids) => ids.is_empty(),
    };
    if prompts.is_empty() || prompts.iter().any(empty) {
        return Err(ApiError::invalid(NAME, "is empty"));
    }
    Ok(prompts)
}

fn ids(items: &[Value], vocab: usize) -> Result<Vec<u32>, ApiError> {
    items.iter().map(|item| token_id("prompt", item, vocab)).collect()
}
