//! Text to token ids and back.
//!
//! Owns the two vocabulary formats that checkpoints ship (`tokenizer.json`, and Kimi's `tiktoken.model`), the added
//! tokens of `tokenizer_config.json`, and the decoders. Knows nothing of messages or templates beyond one type:
//! a `RenderedPrompt`, whose guarded parts must not become control tokens.
//!
//! No token is ever added that the text does not contain (no implicit BOS): templates write their own.

mod added;
mod decoder;
mod huggingface;
mod scanner;
mod tiktoken;
mod vocabulary;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use crate::template::RenderedPrompt;
pub use added::Specials;
use added::{AddedToken, AddedTokens, Segment};
pub use decoder::IncrementalDecoder;
use huggingface::HuggingFace;
use tiktoken::Tiktoken;
use vocabulary::{MAX_ID, Vocabulary};

/// What can be wrong with a tokenizer's files, or with a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerError {
    /// The checkpoint has no vocabulary that can be read.
    Missing,
    /// A file could not be read at all.
    Read {
        /// Its name.
        file: String,
        /// What the reader said.
        why: String,
    },
    /// A file's content is not what it should be.
    File {
        /// Its name.
        file: String,
        /// Line, from 1, in line-based files.
        line: Option<usize>,
        /// What is wrong.
        why: String,
    },
    /// A text could not be encoded.
    Encode(String),
}

impl TokenizerError {
    fn in_file(file: &str, why: impl Into<String>) -> TokenizerError {
        TokenizerError::File { file: file.to_owned(), line: None, why: why.into() }
    }

    fn at_line(file: &str, line: usize, why: &str) -> TokenizerError {
        TokenizerError::File { file: file.to_owned(), line: Some(line), why: why.to_owned() }
    }
}

impl fmt::Display for TokenizerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TokenizerError::Missing => {
                write!(f, "the checkpoint has neither {} nor {}", huggingface::FILE, tiktoken::FILE)
            }
            TokenizerError::Read { file, why } => write!(f, "{file} cannot be read: {why}"),
            TokenizerError::File { file, line: Some(line), why } => write!(f, "{file}, line {line}: {why}"),
            TokenizerError::File { file, line: None, why } => write!(f, "{file}: {why}"),
            TokenizerError::Encode(why) => write!(f, "the text cannot be encoded: {why}"),
        }
    }
}

impl std::error::Error for TokenizerError {}

/// Reads a file of a checkpoint by its name: its bytes, `None` if there is no such file, or why it cannot be read.
pub type ReadFile<'a> = &'a dyn Fn(&str) -> Result<Option<Vec<u8>>, String>;

const CONFIG: &str = "tokenizer_config.json";
/// Ids that `tiktoken.model` vocabularies keep for control tokens after the last rank.
const RESERVED_SLOTS: u32 = 256;

enum Backend {
    HuggingFace(Box<HuggingFace>),
    Tiktoken(Box<Tiktoken>),
}

/// A checkpoint's tokenizer. Immutable, and shared between threads behind one `Arc`.
pub struct Tokenizer {
    backend: Backend,
    vocabulary: Arc<Vocabulary>,
    controls: AddedTokens,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backend = match self.backend {
            Backend::HuggingFace(_) => huggingface::FILE,
            Backend::Tiktoken(_) => tiktoken::FILE,
        };
        f.debug_struct("Tokenizer")
            .field("backend", &backend)
            .field("vocab_size", &self.vocab_size())
            .finish()
    }
}

impl Tokenizer {
    /// Loads a checkpoint's tokenizer.
    ///
    /// `tokenizer.json` wins over `tiktoken.model`, because it states its own rules. `tokenizer_config.json` names
    /// the control tokens of the latter and may add some to the former. In a `tiktoken.model` vocabulary an id
    /// that lies between the last rank and the highest named control token, and has no name of its own, is called
    /// `<|reserved_token_ID|>`.
    pub fn load(read: ReadFile) -> Result<Tokenizer, TokenizerError> {
        let open = |file: &str| read(file).map_err(|why| TokenizerError::Read { file: file.to_owned(), why });
        let listed = match open(CONFIG)? {
            Some(bytes) => listed_tokens(&bytes)?,
            None => Vec::new(),
        };
        let mut vocabulary = Vocabulary::default();
        let (backend, mut added) = if let Some(file) = open(huggingface::FILE)? {
            let (backend, mut added) = HuggingFace::parse(&file, &mut vocabulary)?;
            let known: HashSet<String> = added.iter().map(|token| token.content.clone()).collect();
            let new = |token: &AddedToken| {
                !known.contains(&token.content)
                    && match backend.model_id(&token.content) {
                        Some(id) => id == token.id,
                        None => {
                            vocabulary.bytes(token.id).is_none() && added.iter().all(|a| a.id != token.id)
                        }
                    }
            };
            let more: Vec<AddedToken> = listed.into_iter().filter(new).collect();
            added.extend(more);
            (Backend::HuggingFace(Box::new(backend)), added)
        } else if let Some(file) = open(tiktoken::FILE)? {
            let backend = Tiktoken::parse(&file, |id, bytes| vocabulary.set(tiktoken::FILE, id, bytes))?;
            let added = with_reserved(listed, backend.len())?;
            (Backend::Tiktoken(Box::new(backend)), added)
        } else {
            return Err(TokenizerError::Missing);
        };
        for token in &added {
            vocabulary.set(CONFIG, token.id, token.content.as_bytes())?;
            vocabulary.mark(token.id, token.special, token.is_control());
        }
        added.retain(AddedToken::is_control);
        Ok(Tokenizer { backend, vocabulary: Arc::new(vocabulary), controls: AddedTokens::new(added)? })
    }

    /// Highest token id + 1. A model may have more embedding rows than this.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.size()
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, TokenizerError> {
        let segments = match specials {
            Specials::Parse => self.controls.split(text),
            Specials::Plain => Segment::whole(text),
        };
        self.encode_segments(text, &segments)
    }

    /// The ids of a rendered chat. Control tokens are recognised where no guard stands in them; guards are then
    /// removed, and the text between control tokens is encoded whole, so that guarding leaves no trace in how
    /// harmless text is cut into tokens.
    pub fn encode_prompt(&self, prompt: &RenderedPrompt) -> Result<Vec<u32>, TokenizerError> {
        let guarded = prompt.guarded_text();
        let segments = self.controls.split(guarded);
        let Some(guard) = prompt.guard().filter(|&guard| guarded.contains(guard)) else {
            return self.encode_segments(guarded, &segments);
        };
        let mut text = String::with_capacity(guarded.len());
        let mut moved = Vec::with_capacity(segments.len());
        for segment in segments {
            let start = text.len();
            text.extend(guarded[segment.start..segment.end].split(guard));
            if text.len() > start {
                moved.push(Segment { start, end: text.len(), id: segment.id });
            }
        }
        self.encode_segments(&text, &moved)
    }

    fn encode_segments(&self, text: &str, segments: &[Segment]) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 3 + segments.len());
        match &self.backend {
            Backend::HuggingFace(backend) => backend.encode(text, segments, &mut ids)?,
            Backend::Tiktoken(backend) => backend.encode(text, segments, &mut ids),
        }
        Ok(ids)
    }

    /// The exact bytes `id` stands for: often not valid UTF-8 by themselves.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.vocabulary.bytes(id)
    }

    /// Whether decoding with `skip_special` leaves `id` out.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.is_special(id)
    }

    /// Whether `id` is a control token, which text encoded as `Specials::Plain` never yields. Includes markup
    /// that decoding always shows, such as `<think>` or Kimi's tool-call tokens.
    pub fn is_control(&self, id: u32) -> bool {
        self.vocabulary.is_control(id)
    }

    /// The id of the control token spelt exactly `text`.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.controls.get(text).map(|token| token.id)
    }

    /// All control tokens by ascending id, with their strings.
    pub fn specials(&self) -> impl Iterator<Item = (u32, &str)> {
        self.controls.iter().map(|token| (token.id, token.content.as_str()))
    }

    /// The text of `ids`, taken as a whole text: lossless where it is valid UTF-8, U+FFFD where it is not. Unknown
    /// ids stand for nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let shown = ids.iter().filter(|&&id| !(skip_special && self.is_special(id)));
        let bytes: Vec<u8> = shown.filter_map(|&id| self.token_bytes(id)).flatten().copied().collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match text.strip_prefix(' ') {
            Some(rest) if self.vocabulary.strips_leading_space => rest.to_owned(),
            _ => text,
        }
    }

    /// A decoder for text that continues a prompt, one token at a time.
    pub fn decoder(&self, skip_special: bool) -> IncrementalDecoder {
        IncrementalDecoder::new(Arc::clone(&self.vocabulary), skip_special)
    }
}

/// The tokens that `tokenizer_config.json` lists under `added_tokens_decoder`.
fn listed_tokens(bytes: &[u8]) -> Result<Vec<AddedToken>, TokenizerError> {
    let fail = |why: String| TokenizerError::in_file(CONFIG, why);
    let config: Value = serde_json::from_slice(bytes).map_err(|error| fail(error.to_string()))?;
    let listed = match &config["added_tokens_decoder"] {
        Value::Null => return Ok(Vec::new()),
        Value::Object(listed) => listed,
        _ => return Err(fail("added_tokens_decoder is not an object".to_owned())),
    };
    let mut tokens = Vec::with_capacity(listed.len());
    for (key, token) in listed {
        let id = key.parse::<u32>().ok().filter(|&id| id <= MAX_ID);
        let id = id.ok_or_else(|| fail(format!("added_tokens_decoder: {key:?} is not a token id")))?;
        let content = token["content"].as_str().filter(|content| !content.is_empty());
        let content =
            content.ok_or_else(|| fail(format!("added_tokens_decoder: token {id} has no content")))?;
        tokens.push(AddedToken {
            id,
            content: content.to_owned(),
            special: token["special"] == true,
            lstrip: token["lstrip"] == true,
            rstrip: token["rstrip"] == true,
            single_word: token["single_word"] == true,
        });
    }
    Ok(tokens)
}

/// The control tokens of a `tiktoken.model` vocabulary of `ranks` tokens: those listed, and names for the gaps.
fn with_reserved(mut listed: Vec<AddedToken>, ranks: u32) -> Result<Vec<AddedToken>, TokenizerError> {
    let mut ids: HashSet<u32> = HashSet::new();
    for token in &listed {
        let why = match token.id {
            id if id < ranks => format!("control token {id} is also a rank of {}", tiktoken::FILE),
            id if !ids.insert(id) => format!("control token {id} is listed twice"),
            _ => continue,
        };
        return Err(TokenizerError::in_file(CONFIG, why));
    }
    let (Some(&lowest), Some(&highest)) = (ids.iter().min(), ids.iter().max()) else { return Ok(listed) };
    if lowest - ranks > RESERVED_SLOTS || highest - ranks > MAX_ID / 64 {
        let why = format!(
            "ends at rank {ranks}, but control tokens are {lowest} to {highest}; is the file complete?"
        );
        return Err(TokenizerError::in_file(tiktoken::FILE, why));
    }
    listed.extend((ranks..highest).filter(|id| !ids.contains(id)).map(|id| AddedToken {
        id,
        content: format!("<|reserved_token_{id}|>"),
        special: true,
        lstrip: false,
        rstrip: false,
        single_word: false,
    }));
    Ok(listed)
}
