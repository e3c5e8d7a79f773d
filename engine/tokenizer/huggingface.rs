//! `tokenizer.json`, through the `tokenizers` crate.
//!
//! The crate's normaliser, pre-tokeniser and model are used as they are. Added tokens are matched here instead
//! (`added.rs`), because the crate offers no way to encode text in which *no* control token is recognised:
//! its switch spares only tokens marked special, and `<think>` or `<tool_call>` usually are not.
//! One difference remains: a control token listed as `normalized` is matched in the raw text.
//!
//! Cost is near-linear in the text: the crate merges with a heap, and its regular expressions are searched by
//! automata except for the one look-ahead, which steps back once.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::Value;
use tokenizers::normalizer::Range;
use tokenizers::{
    Model, ModelWrapper, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer, PreTokenizerWrapper, Token,
};

use super::TokenizerError;
use super::added::{AddedToken, AddedTokens, Segment};
use super::vocabulary::{MAX_ID, Vocabulary};

/// The file's name.
pub(crate) const FILE: &str = "tokenizer.json";
/// Larger than any published file (the largest are near 35 MB).
const MAX_FILE_BYTES: usize = 512 << 20;

/// A loaded `tokenizer.json`.
pub(crate) struct HuggingFace {
    inner: tokenizers::Tokenizer,
    /// The pre-tokeniser for text after a special token, where it differs: some put a space only before the very
    /// first word.
    continuing: Option<PreTokenizerWrapper>,
    /// Added tokens that are ordinary text: runs of spaces.
    text_tokens: AddedTokens,
}

/// How a token's string stands for bytes.
#[derive(Clone, Copy, PartialEq)]
enum Spelling {
    /// Every byte is one printable character (GPT-2's table).
    ByteLevel,
    /// `▁` is a space and `<0xE4>` one byte (SentencePiece).
    Metaspace,
    /// The string itself.
    Verbatim,
}

impl HuggingFace {
    /// Reads the file; also returns all added tokens and fills `vocabulary`.
    pub fn parse(
        file: &[u8],
        vocabulary: &mut Vocabulary,
    ) -> Result<(HuggingFace, Vec<AddedToken>), TokenizerError> {
        let fail = |why: String| TokenizerError::in_file(FILE, why);
        if file.len() > MAX_FILE_BYTES {
            return Err(fail(format!("{} bytes; the limit is {MAX_FILE_BYTES}", file.len())));
        }
        // The crate asserts some things about its input instead of returning errors.
        let inner = guarded(|| tokenizers::Tokenizer::from_bytes(file)).map_err(fail)?;
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some_and(|dropout| dropout > 0.0)
        {
            return Err(fail("model.dropout makes encoding random; set it to null".to_owned()));
        }
        let added: Vec<AddedToken> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .map(|(id, token)| AddedToken {
                id,
                content: token.content,
                special: token.special,
                lstrip: token.lstrip,
                rstrip: token.rstrip,
                single_word: token.single_word,
            })
            .collect();
        let text_tokens = added.iter().filter(|token| !token.is_control()).cloned().collect();
        let text_tokens = AddedTokens::new(text_tokens)?;

        let describe = |part: Result<Value, serde_json::Error>| part.map_err(|error| fail(error.to_string()));
        let decoder = describe(serde_json::to_value(inner.get_decoder()))?;
        let normalizer = describe(serde_json::to_value(inner.get_normalizer()))?;
        let mut pre_tokenizer = describe(serde_json::to_value(inner.get_pre_tokenizer()))?;
        let spelling = spelling(inner.get_model(), &decoder, &normalizer, &pre_tokenizer);
        for (token, id) in inner.get_vocab(false) {
            if id > MAX_ID {
                return Err(fail(format!("token id {id} is above the limit of {MAX_ID}")));
            }
            vocabulary.set(FILE, id, &token_bytes(&token, spelling))?;
        }
        vocabulary.strips_leading_space = spelling == Spelling::Metaspace && strips_leading_space(&decoder);
        let continuing = match never_prepend(&mut pre_tokenizer) {
            true => Some(serde_json::from_value(pre_tokenizer).map_err(|error| fail(error.to_string()))?),
            false => None,
        };
        Ok((HuggingFace { inner, continuing, text_tokens }, added))
    }

    /// Appends the ids of `text`, cut into `segments`, to `ids`.
    pub fn encode(&self, text: &str, segments: &[Segment], ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        for segment in segments {
            match segment.id {
                Some(id) => ids.push(id),
                None => {
                    let piece = &text[segment.start..segment.end];
                    guarded(|| self.encode_piece(piece, segment.start == 0, ids))
                        .map_err(TokenizerError::Encode)?;
                }
            }
        }
        Ok(())
    }

    fn encode_piece(&self, piece: &str, first: bool, ids: &mut Vec<u32>) -> tokenizers::Result<()> {
        let mut pieces = PreTokenizedString::from(piece);
        let normalizer = self.inner.get_normalizer();
        if normalizer.is_some() || !self.text_tokens.is_empty() {
            pieces.split(|_, mut text| {
                if let Some(normalizer) = normalizer {
                    normalizer.normalize(&mut text)?;
                }
                self.split_text_tokens(text)
            })?;
        }
        let pre_tokenizer = match &self.continuing {
            Some(continuing) if !first => Some(continuing),
            _ => self.inner.get_pre_tokenizer(),
        };
        if let Some(pre_tokenizer) = pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        let model = self.inner.get_model();
        for (piece, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => ids.extend(model.tokenize(piece)?.iter().map(|token| token.id)),
            }
        }
        Ok(())
    }

    fn split_text_tokens(
        &self,
        text: NormalizedString,
    ) -> tokenizers::Result<Vec<(NormalizedString, Option<Vec<Token>>)>> {
        if self.text_tokens.is_empty() {
            return Ok(vec![(text, None)]);
        }
        let slice = |segment: &Segment| {
            let piece = text
                .slice(Range::Normalized(segment.start..segment.end))
                .ok_or("a cut inside a character")?;
            let token = segment.id.map(|id| vec![Token::new(id, String::new(), (0, 0))]);
            Ok((piece, token))
        };
        self.text_tokens.split(text.get()).iter().map(slice).collect()
    }

    /// The id of a string in the model's own vocabulary.
    pub fn model_id(&self, token: &str) -> Option<u32> {
        self.inner.get_model().token_to_id(token)
    }
}

/// Runs a call into the crate; a panic in there becomes an error.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(format!("the tokenizers crate panicked: {text}"))
        }
    }
}

fn spelling(model: &ModelWrapper, decoder: &Value, normalizer: &Value, pre_tokenizer: &Value) -> Spelling {
    let anywhere = |wanted: &dyn Fn(&Value) -> bool| {
        [decoder, normalizer, pre_tokenizer].into_iter().any(|part| contains(part, wanted))
    };
    let is = |name: &'static str| move |part: &Value| part["type"] == name;
    if anywhere(&is("ByteLevel")) {
        return Spelling::ByteLevel;
    }
    let byte_fallback = matches!(model, ModelWrapper::BPE(bpe) if bpe.byte_fallback);
    let replaces = |part: &Value| {
        part["type"] == "Replace" && (part["content"] == "▁" || part["pattern"]["String"] == "▁")
    };
    if byte_fallback || anywhere(&is("Metaspace")) || anywhere(&is("ByteFallback")) || anywhere(&replaces) {
        return Spelling::Metaspace;
    }
    Spelling::Verbatim
}

/// Whether `wanted` holds for `part` or for anything in a sequence under it.
fn contains(part: &Value, wanted: &dyn Fn(&Value) -> bool) -> bool {
    let below =
        |name: &str| part[name].as_array().is_some_and(|list| list.iter().any(|item| contains(item, wanted)));
    wanted(part) || below("decoders") || below("normalizers") || below("pretokenizers")
}

fn strips_leading_space(decoder: &Value) -> bool {
    contains(decoder, &|part| match part["type"].as_str() {
        Some("Strip") => part["content"] == " " && part["start"].as_u64() > Some(0),
        Some("Metaspace") => part["prepend_scheme"] != "never",
        _ => false,
    })
}

/// Turns `prepend_scheme: first` into `never`; whether there was any.
fn never_prepend(part: &mut Value) -> bool {
    let mut changed = false;
    if part["type"] == "Metaspace" && part["prepend_scheme"] == "first" {
        part["prepend_scheme"] = "never".into();
        changed = true;
    }
    for item in part.get_mut("pretokenizers").and_then(Value::as_array_mut).into_iter().flatten() {
        changed |= never_prepend(item);
    }
    changed
}

fn token_bytes(token: &str, spelling: Spelling) -> Vec<u8> {
    match spelling {
        Spelling::ByteLevel => {
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            bytes.unwrap_or_else(|| token.as_bytes().to_vec())
        }
        Spelling::Metaspace => match hex_byte(token) {
            Some(byte) => vec![byte],
            None => token.replace('▁', " ").into_bytes(),
        },
        Spelling::Verbatim => token.as_bytes().to_vec(),
    }
}

/// `<0xE4>` is the byte 0xE4.
fn hex_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 { None } else { u8::from_str_radix(digits, 16).ok() }
}

/// GPT-2's table backwards: printable bytes stand for themselves, the other 68 in order for U+0100 and on.
fn byte_of(c: char) -> Option<u8> {
    let plain = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match c as u32 {
        code @ 0..=0xff if plain(code as u8) => Some(code as u8),
        code @ 0x100..=0x143 => (0..=255u8).filter(|&byte| !plain(byte)).nth(code as usize - 0x100),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings() {
        assert_eq!(token_bytes("Ġé", Spelling::ByteLevel), [b' ', 0xe9]);
        assert_eq!(token_bytes("ĊĀł", Spelling::ByteLevel), [b'\n', 0, 0xa0]);
        assert_eq!(token_bytes("｜x", Spelling::ByteLevel), "｜x".as_bytes());
        assert_eq!(token_bytes("▁a", Spelling::Metaspace), b" a");
        assert_eq!(token_bytes("<0xE4>", Spelling::Metaspace), [0xe4]);
        let all: Vec<u8> = (0..0x144).filter_map(char::from_u32).filter_map(byte_of).collect();
        let mut sorted = all.clone();
        sorted.sort();
        assert_eq!(sorted, (0..=255).collect::<Vec<u8>>());
    }
}
