//! Chat templates: messages and tools to the text a model was trained on.
//!
//! Owns the template a checkpoint ships, the dialect it is written in (`environment.rs`), and the line between what
//! the template says and what it quotes (`guard.rs`). Knows no model: everything particular to one is in its
//! template. Knows no token ids either; `Tokenizer::encode_prompt` takes over from here.

mod environment;
mod guard;
mod json;
mod source;

use std::borrow::Cow;
use std::fmt;

use minijinja::Environment;
use serde_json::{Map, Value};

use crate::tokenizer::{ReadFile, Specials};
use guard::{Markers, noncharacters, noncharacters_in, unused_noncharacter};

const CONFIG: &str = "tokenizer_config.json";
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
/// Named templates in one checkpoint.
const MAX_TEMPLATES: usize = 32;
/// Variables that no request may set.
const RESERVED: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// What can be wrong with a chat template, or with what it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateError {
    /// A file could not be read at all.
    Read {
        /// Its name.
        file: String,
        /// What the reader said.
        why: String,
    },
    /// A file's content is not a chat template.
    File {
        /// Its name.
        file: String,
        /// What is wrong.
        why: String,
    },
    /// The template refused the conversation with these words.
    Raised(String),
    /// The template exceeded a limit.
    Limit(String),
    /// The template failed.
    Render(String),
    /// The request asks for something impossible.
    Input(String),
}

impl fmt::Display for TemplateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TemplateError::Read { file, why } => write!(f, "{file} cannot be read: {why}"),
            TemplateError::File { file, why } => write!(f, "the chat template in {file}: {why}"),
            TemplateError::Raised(text) => write!(f, "the chat template refuses this conversation: {text}"),
            TemplateError::Limit(text) => write!(f, "the chat template was stopped: {text}"),
            TemplateError::Render(text) => write!(f, "the chat template failed: {text}"),
            TemplateError::Input(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for TemplateError {}

/// What a template renders.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChatInput<'a> {
    /// The conversation, each message an object with a known `role`.
    pub messages: &'a [Value],
    /// Tool definitions; templates tell `None` from an empty list.
    pub tools: Option<&'a [Value]>,
    /// Ends the text where the assistant's next turn begins.
    pub add_generation_prompt: bool,
    /// Ends the text inside the last message, for the model to go on with it.
    pub continue_final_message: bool,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: Option<&'a Map<String, Value>>,
    /// Whether control-token strings in the input may become control tokens. `Plain` is the safe form.
    pub content_specials: Specials,
}

/// A rendered chat, ready for `Tokenizer::encode_prompt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedPrompt {
    text: String,
    guard: Option<char>,
}

impl RenderedPrompt {
    /// A prompt in which every control-token string is meant: all of it is trusted.
    pub fn trusted(text: String) -> RenderedPrompt {
        RenderedPrompt { text, guard: None }
    }

    /// The text as the model is to see it.
    pub fn text(&self) -> Cow<'_, str> {
        match self.guard {
            Some(guard) if self.text.contains(guard) => Cow::Owned(self.text.replace(guard, "")),
            _ => Cow::Borrowed(&self.text),
        }
    }

    pub(crate) fn guarded_text(&self) -> &str {
        &self.text
    }

    pub(crate) fn guard(&self) -> Option<char> {
        self.guard
    }
}

/// A checkpoint's chat template. Immutable, and shared between threads behind one `Arc`.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    names: Vec<String>,
    /// `bos_token` and the like.
    tokens: Map<String, Value>,
    markers: Markers,
    /// Noncharacters that occur in the sources, the tokens or the markers.
    used: u32,
}

impl ChatTemplate {
    /// Loads a checkpoint's chat template; `None` if it has none. `controls` are the strings of the tokenizer's control
    /// tokens.
    ///
    /// The file `chat_template.jinja` wins over `chat_template` in `tokenizer_config.json` (a template, or a list of
    /// named ones, of which `tool_use` serves requests with tools), and that over `chat_template.json`.
    pub fn load<'a>(
        read: ReadFile,
        controls: impl IntoIterator<Item = &'a str>,
    ) -> Result<Option<ChatTemplate>, TemplateError> {
        let open = |file: &str| read(file).map_err(|why| TemplateError::Read { file: file.to_owned(), why });
        let parse = |file: &str| -> Result<Value, TemplateError> {
            let Some(bytes) = open(file)? else { return Ok(Value::Null) };
            serde_json::from_slice(&bytes).map_err(|error| in_file(file, error))
        };
        let config = parse(CONFIG)?;
        let file = "chat_template.jinja";
        let (file, templates) = match open(file)? {
            Some(bytes) => {
                let source = String::from_utf8(bytes).map_err(|error| in_file(file, error))?;
                (file, vec![(DEFAULT.to_owned(), source)])
            }
            None => match &config["chat_template"] {
                Value::Null => {
                    ("chat_template.json", templates_in(&parse("chat_template.json")?["chat_template"]))
                }
                found => (CONFIG, templates_in(found)),
            },
        };
        if templates.is_empty() {
            return Ok(None);
        }
        if templates.len() > MAX_TEMPLATES {
            return Err(in_file(
                file,
                format!("{} templates; the limit is {MAX_TEMPLATES}", templates.len()),
            ));
        }
        let env = environment::build(&templates).map_err(|why| in_file(file, why))?;
        let tokens = special_tokens(&config);
        let markers = Markers::new(controls);
        let in_sources = templates.iter().fold(0, |mask, (_, source)| mask | noncharacters(source));
        let used = in_sources
            | markers.used()
            | tokens.values().fold(0, |mask, token| mask | noncharacters_in(token));
        let names = templates.into_iter().map(|(name, _)| name).collect();
        Ok(Some(ChatTemplate { env, names, tokens, markers, used }))
    }

    /// Renders a conversation.
    pub fn render(&self, input: &ChatInput) -> Result<RenderedPrompt, TemplateError> {
        let refuse = |why: &str| Err(TemplateError::Input(why.to_owned()));
        if input.add_generation_prompt && input.continue_final_message {
            return refuse("a prompt cannot both continue the last message and begin a new one");
        }
        let name = self.choose(input.tools.is_some())?;
        let values = input.messages.iter().chain(input.tools.into_iter().flatten());
        let values = values.chain(input.variables.into_iter().flat_map(Map::values));
        let mut used = values.fold(self.used, |mask, value| mask | noncharacters_in(value));
        let mut take = || {
            let found = unused_noncharacter(used);
            used |= found.map_or(0, |found| noncharacters(found.encode_utf8(&mut [0; 4])));
            let why = "the conversation uses up the Unicode noncharacters U+FDD0 to U+FDEF";
            found.ok_or_else(|| TemplateError::Input(why.to_owned()))
        };

        let guard = if input.content_specials == Specials::Plain { Some(take()?) } else { None };
        let (mut messages, tools, variables): (Vec<Value>, Option<Vec<Value>>, _) = match guard {
            Some(guard) => (
                input.messages.iter().map(|message| self.markers.message(message, guard)).collect(),
                input.tools.map(|tools| tools.iter().map(|tool| self.markers.outside(tool, guard)).collect()),
                input.variables.map(|variables| self.markers.variables(variables, guard)),
            ),
            None => (input.messages.to_vec(), input.tools.map(<[Value]>::to_vec), input.variables.cloned()),
        };
        let end_mark = if input.continue_final_message { Some(take()?) } else { None };
        if let Some(mark) = end_mark {
            let Some(text) = messages.last_mut().and_then(final_text) else {
                return refuse("the last message has no text to continue");
            };
            text.push(mark);
            text.push(' ');
        }

        let mut context = self.tokens.clone();
        context
            .extend(variables.into_iter().flatten().filter(|(name, _)| !RESERVED.contains(&name.as_str())));
        context.insert("messages".to_owned(), Value::Array(messages));
        context.insert("tools".to_owned(), tools.map_or(Value::Null, Value::Array));
        context.insert("add_generation_prompt".to_owned(), input.add_generation_prompt.into());
        let mut text = environment::render(&self.env, name, environment::from_json_map(&context))?;
        if let Some(mark) = end_mark {
            let Some(at) = text.rfind(mark) else {
                return refuse("the chat template does not show the last message, so it cannot be continued");
            };
            let trimmed = !text[at + mark.len_utf8()..].starts_with(' ');
            text.truncate(at);
            if trimmed {
                text.truncate(text.trim_end().len());
            }
        }
        Ok(RenderedPrompt { text, guard })
    }

    fn choose(&self, with_tools: bool) -> Result<&str, TemplateError> {
        let find = |wanted: &str| self.names.iter().find(|name| *name == wanted).map(String::as_str);
        if with_tools && let Some(name) = find(TOOL_USE) {
            return Ok(name);
        }
        if let Some(name) = find(DEFAULT) {
            return Ok(name);
        }
        match self.names.as_slice() {
            [only] => Ok(only),
            names => {
                let why = format!("the checkpoint has no default chat template, only {}", names.join(", "));
                Err(TemplateError::Input(why))
            }
        }
    }
}

fn in_file(file: &str, why: impl fmt::Display) -> TemplateError {
    TemplateError::File { file: file.to_owned(), why: why.to_string() }
}

/// A template as a string, or named templates in a list.
fn templates_in(value: &Value) -> Vec<(String, String)> {
    let named =
        |item: &Value| Some((item["name"].as_str()?.to_owned(), item["template"].as_str()?.to_owned()));
    match value {
        Value::String(source) => vec![(DEFAULT.to_owned(), source.clone())],
        Value::Array(list) => list.iter().filter_map(named).collect(),
        Value::Object(map) => map
            .iter()
            .filter_map(|(name, source)| Some((name.clone(), source.as_str()?.to_owned())))
            .collect(),
        _ => Vec::new(),
    }
}

/// The special tokens that a configuration names, as the variables templates know them by.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let text = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
    let mut tokens = Map::new();
    for (key, value) in config.as_object().into_iter().flatten() {
        if key.ends_with("_token")
            && let Some(text) = text(value)
        {
            tokens.insert(key.clone(), Value::String(text));
        }
    }
    if let Some(list) = config["additional_special_tokens"].as_array() {
        tokens.insert("additional_special_tokens".to_owned(), list.iter().filter_map(text).collect());
    }
    tokens
}

/// The text that a message ends with: its content, or the last text of its parts.
fn final_text(message: &mut Value) -> Option<&mut String> {
    match message.get_mut("content")? {
        Value::String(text) => Some(text),
        Value::Array(parts) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    }
}
