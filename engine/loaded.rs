//! A model ready to be served: checkpoint, tokenizer, template and the maker's generation defaults.

use std::path::PathBuf;
use std::sync::Arc;

use models::{Checkpoint, Model};
use serde_json::Value;

use crate::error::Error;
use crate::hub::{self, HubOptions, ModelRef};
use crate::memory::check_available;
use crate::progress::{Progress, Unit};
use crate::request::{Request, SamplingParams, StopRule};
use crate::template::{ChatInput, ChatTemplate, RenderedPrompt};
use crate::tokenizer::{Specials, Tokenizer};

/// The built-in model's files, in the layout K2-Thinking ships (`models/demo/README.md`).
const DEMO: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../models/demo/config.json")),
    ("generation_config.json", include_bytes!("../models/demo/generation_config.json")),
    ("model.safetensors", include_bytes!("../models/demo/model.safetensors")),
    ("tiktoken.model", include_bytes!("../models/demo/tiktoken.model")),
    ("tokenizer_config.json", include_bytes!("../models/demo/tokenizer_config.json")),
];

/// What a model's maker recommends in `generation_config.json`.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// Choice of tokens; greedy where the file says nothing or `do_sample` is false.
    pub sampling: SamplingParams,
    /// Ids that end a generation: of the generation configuration, the configuration and the
    /// tokenizer together.
    pub stop_token_ids: Vec<u32>,
    /// Most tokens to generate.
    pub max_tokens: Option<usize>,
}

/// A loaded model.
pub struct Loaded {
    /// What the user called it.
    pub name: String,
    /// Files, description, weights.
    pub model: Arc<Model>,
    /// Text to ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Chat form, if the model has one.
    pub template: Option<Arc<ChatTemplate>>,
    /// The maker's recommendation.
    pub defaults: Defaults,
}

/// In which form float weights outside the routed experts are multiplied (`--dense-format`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DenseFormat {
    /// As they are in the files.
    #[default]
    Published,
    /// In 8-bit copies made at start, in place of the originals.
    Q8,
}

/// Finds and opens a model without its tokenizer: what `inspect`, `trace` and `check` need.
///
/// # Errors
/// If there is no such model, a download fails, the files are broken or the machine has no room for copies.
pub fn open_model(name: &str, dense: DenseFormat) -> Result<Arc<Model>, Error> {
    let checkpoint = open_checkpoint(name)?;
    match dense {
        DenseFormat::Published => Ok(Model::open(checkpoint)?),
        DenseFormat::Q8 => Model::open_q8(checkpoint, |copy| {
            check_available("8-bit copies of float weights (--dense-format q8)", copy.copied_bytes)
        }),
    }
}

/// Finds and opens the files of a model.
///
/// # Errors
/// As [`open_model`].
pub fn open_checkpoint(name: &str) -> Result<Checkpoint, Error> {
    let folder = match ModelRef::parse(name)? {
        ModelRef::Demo => return Ok(Checkpoint::embedded(DEMO)?),
        ModelRef::Folder(folder) => folder,
        ModelRef::Gguf(path) => {
            let message = format!("{}: .gguf files cannot be run yet", path.display());
            return Err(Error::Unsupported(message));
        }
        ModelRef::Hub { repo, revision } => fetch(&repo, revision.as_deref())?,
    };
    let mut progress = Progress::new("opening", Unit::Files);
    Ok(Checkpoint::open_with(&folder, &mut |done, total| progress.set(done, total))?)
}

fn fetch(repo: &str, revision: Option<&str>) -> Result<PathBuf, Error> {
    Ok(hub::fetch(repo, revision, &HubOptions::from_env()?, &mut *hub::to_stderr())?)
}

impl Loaded {
    /// Opens a model by the name a user gives: `demo`, a folder, or `org/name[@revision]`.
    ///
    /// # Errors
    /// As [`open_model`], or if its tokenizer, template or generation defaults are unusable.
    pub fn open(name: &str) -> Result<Self, Error> {
        Self::open_with(name, DenseFormat::Published)
    }

    /// [`Loaded::open`] with a form of the float weights.
    ///
    /// # Errors
    /// As [`Loaded::open`].
    pub fn open_with(name: &str, dense: DenseFormat) -> Result<Self, Error> {
        let model = open_model(name, dense)?;
        let read = |file: &str| {
            let bytes = model.checkpoint.file(file).map_err(|error| error.to_string())?;
            Ok(bytes.map(|bytes| bytes.into_owned()))
        };
        let tokenizer = Tokenizer::load(&read)?;
        let vocab = model.config.vocab;
        if tokenizer.vocab_size() > vocab {
            let message = format!(
                "the tokenizer has {} ids, the embedding {vocab} rows: they are not of the same model",
                tokenizer.vocab_size()
            );
            return Err(Error::Unsupported(message));
        }
        let controls = tokenizer.specials().map(|(_, text)| text);
        let template = ChatTemplate::load(&read, controls)?.map(Arc::new);
        let defaults = defaults(&model, &tokenizer)?;
        Ok(Self { name: name.to_owned(), tokenizer: Arc::new(tokenizer), template, defaults, model })
    }

    /// Ids of a conversation in the model's chat form, ready for its answer.
    ///
    /// # Errors
    /// If the model has no template, or the template refuses the messages.
    pub fn chat_prompt(&self, messages: &[Value], content_specials: Specials) -> Result<Vec<u32>, Error> {
        let template = self.template.as_ref().ok_or_else(|| {
            Error::Unsupported(format!(
                "{} has no chat template; use --raw to continue plain text",
                self.name
            ))
        })?;
        let prompt: RenderedPrompt = template.render(&ChatInput {
            messages,
            add_generation_prompt: true,
            content_specials,
            ..ChatInput::default()
        })?;
        Ok(self.tokenizer.encode_prompt(&prompt)?)
    }

    /// A request with the model's defaults.
    pub fn request(&self, prompt: Vec<u32>) -> Request {
        Request {
            prompt,
            max_tokens: self.defaults.max_tokens,
            sampling: self.defaults.sampling.clone(),
            stop: StopRule { token_ids: self.defaults.stop_token_ids.clone(), ..StopRule::default() },
            logprobs: None,
            skip_special_tokens: true,
            priority: 0,
            cache_salt: String::new(),
        }
    }
}

fn defaults(model: &Model, tokenizer: &Tokenizer) -> Result<Defaults, Error> {
    let file = "generation_config.json";
    let generation = model.checkpoint.json(file)?.unwrap_or(Value::Null);
    if !generation.is_object() && !generation.is_null() {
        return Err(Error::Unsupported(format!("{file}: is not an object")));
    }
    let number = |name: &str, allowed: std::ops::RangeInclusive<f64>| match generation.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64().filter(|number| allowed.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(Error::Unsupported(format!("{file}: {name}: {value} is out of range"))),
        },
    };
    let mut sampling = SamplingParams::greedy();
    if generation.get("do_sample") != Some(&Value::Bool(false)) && generation.is_object() {
        let sampled = generation.get("do_sample") == Some(&Value::Bool(true));
        let temperature = number("temperature", 0.0..=100.0)?;
        sampling.temperature = temperature.unwrap_or(if sampled { 1.0 } else { 0.0 }) as f32;
        sampling.top_p = number("top_p", 0.0..=1.0)?.filter(|p| *p > 0.0).unwrap_or(1.0) as f32;
        sampling.top_k = number("top_k", 0.0..=1e9)?.unwrap_or(0.0) as usize;
        sampling.min_p = number("min_p", 0.0..=1.0)?.unwrap_or(0.0) as f32;
    }
    sampling.repetition_penalty = number("repetition_penalty", 1e-3..=100.0)?.unwrap_or(1.0) as f32;

    let config = model.checkpoint.config();
    let mut stop_token_ids = eos_ids(file, &generation)?;
    stop_token_ids.extend(eos_ids("config.json", config)?);
    stop_token_ids.extend(eos_ids("config.json", &config["text_config"])?);
    stop_token_ids.retain(|id| (*id as usize) < model.config.vocab);
    stop_token_ids.extend(turn_end(model, tokenizer)?);
    stop_token_ids.sort_unstable();
    stop_token_ids.dedup();
    let max_tokens = number("max_new_tokens", 1.0..=1e9)?.map(|n| n as usize);
    Ok(Defaults { sampling, stop_token_ids, max_tokens })
}

/// `eos_token_id`: one id, a list of ids, or nothing.
fn eos_ids(file: &str, source: &Value) -> Result<Vec<u32>, Error> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let value = source.get("eos_token_id").unwrap_or(&Value::Null);
    let ids = match value {
        // -1 stands for none in some files.
        Value::Null => Some(Vec::new()),
        Value::Number(number) if number.as_i64() == Some(-1) => Some(Vec::new()),
        Value::Array(list) => list.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    };
    ids.ok_or_else(|| {
        Error::Unsupported(format!("{file}: eos_token_id: {value} is neither an id nor a list of ids"))
    })
}

/// The id of the tokenizer's `eos_token`, which is the end of a turn where the model chats.
fn turn_end(model: &Model, tokenizer: &Tokenizer) -> Result<Option<u32>, Error> {
    let config = model.checkpoint.json("tokenizer_config.json")?.unwrap_or(Value::Null);
    let token = &config["eos_token"];
    let text = token.as_str().or(token["content"].as_str());
    Ok(text.and_then(|text| tokenizer.special_id(text)))
}
