//! Token ids to text, as they arrive.
//!
//! A token is a byte string, not a piece of text: one character may span three tokens. The decoder therefore
//! holds back an incomplete UTF-8 sequence (at most 3 bytes) and hands out only whole characters. Bytes that can
//! never become a character turn into U+FFFD exactly where `String::from_utf8_lossy` of the whole output would
//! put it, so the streamed text and the text decoded at once are equal however the tokens were grouped.

use std::sync::Arc;

use super::vocabulary::Vocabulary;

/// Lossy UTF-8 over a stream of bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Utf8Stream {
    held: Vec<u8>,
}

impl Utf8Stream {
    /// Takes bytes in, appends the text they complete to `out`.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        if self.held.is_empty() {
            let used = take(bytes, out);
            self.held.extend_from_slice(&bytes[used..]);
        } else {
            self.held.extend_from_slice(bytes);
            let used = take(&self.held, out);
            self.held.drain(..used);
        }
    }

    /// Ends the stream: what is held can no longer become a character.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&String::from_utf8_lossy(&self.held));
        self.held.clear();
    }
}

/// Appends all complete characters (and U+FFFD for invalid bytes) to `out`; returns the bytes used, which is all
/// but an incomplete sequence at the end.
fn take(mut bytes: &[u8], out: &mut String) -> usize {
    let whole = bytes.len();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(text) => {
                out.push_str(text);
                return whole;
            }
            Err(error) => {
                let (valid, rest) = bytes.split_at(error.valid_up_to());
                out.push_str(std::str::from_utf8(valid).unwrap_or_default());
                let Some(invalid) = error.error_len() else { return whole - rest.len() };
                out.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[invalid..];
            }
        }
    }
}

/// Turns a stream of token ids into text, never cutting a character.
///
/// The first token keeps its leading space: generated text *continues* a prompt. Ids outside the vocabulary
/// stand for no bytes.
#[derive(Clone, Debug)]
pub struct IncrementalDecoder {
    vocabulary: Arc<Vocabulary>,
    stream: Utf8Stream,
    skip_special: bool,
}

impl IncrementalDecoder {
    pub(crate) fn new(vocabulary: Arc<Vocabulary>, skip_special: bool) -> IncrementalDecoder {
        IncrementalDecoder { vocabulary, stream: Utf8Stream::default(), skip_special }
    }

    /// Takes one token; returns the text it completes, often one word, sometimes nothing.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        self.push_into(id, &mut text);
        text
    }

    /// As `push`, appending to `text`.
    pub fn push_into(&mut self, id: u32, text: &mut String) {
        if self.skip_special && self.vocabulary.is_special(id) {
            return;
        }
        if let Some(bytes) = self.vocabulary.bytes(id) {
            self.stream.push(bytes, text);
        }
    }

    /// Ends the text: an incomplete character that was held back becomes U+FFFD. The decoder is then as new.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.stream.finish(&mut text);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_split_equals_lossy_of_the_whole(
            pieces in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..4),
                    prop::collection::vec(prop::sample::select(vec![0xe4u8, 0xb8, 0xad, 0xf0, 0x9f, 0x98, 0x80, 0xed, 0xa0, 0xc0, 0xff, b'a']), 0..6),
                    "\\PC{0,4}".prop_map(String::into_bytes),
                ],
                0..24,
            ),
        ) {
            let whole: Vec<u8> = pieces.concat();
            let mut stream = Utf8Stream::default();
            let mut text = String::new();
            for piece in &pieces {
                stream.push(piece, &mut text);
                prop_assert!(stream.held.len() <= 3);
            }
            stream.finish(&mut text);
            prop_assert_eq!(text, String::from_utf8_lossy(&whole));
        }
    }
}
