//! The byte strings behind token ids: what decoding, constrained sampling and stop strings read.
//!
//! One flat buffer for the whole vocabulary, so that a decoder shares it by a pointer and looks an id up without
//! hashing. It knows nothing of encoding.

use super::TokenizerError;

/// Highest token id accepted, a bound on what a hostile file can make us allocate: four million entries, sixteen
/// times the largest published vocabulary.
pub(crate) const MAX_ID: u32 = (1 << 22) - 1;
/// Total bytes of all tokens.
const MAX_TOTAL_BYTES: usize = 1 << 30;

const KNOWN: u8 = 1;
const SPECIAL: u8 = 2;
const CONTROL: u8 = 4;

/// Exact bytes and kind of every token id.
#[derive(Debug, Default)]
pub(crate) struct Vocabulary {
    bytes: Vec<u8>,
    /// `(start, length)` in `bytes`, by id.
    spans: Vec<(u32, u32)>,
    flags: Vec<u8>,
    /// SentencePiece puts a space before the first word of a text; decoding a whole text takes it off again.
    pub strips_leading_space: bool,
}

impl Vocabulary {
    /// Sets the bytes of `id`; a later call for the same id wins.
    pub fn set(&mut self, file: &str, id: u32, bytes: &[u8]) -> Result<(), TokenizerError> {
        if id > MAX_ID {
            return Err(TokenizerError::in_file(
                file,
                format!("token id {id} is above the limit of {MAX_ID}"),
            ));
        }
        if self.bytes.len() + bytes.len() > MAX_TOTAL_BYTES {
            return Err(TokenizerError::in_file(
                file,
                format!("tokens longer than {MAX_TOTAL_BYTES} bytes in all"),
            ));
        }
        let at = id as usize;
        if self.spans.len() <= at {
            self.spans.resize(at + 1, (0, 0));
            self.flags.resize(at + 1, 0);
        }
        self.spans[at] = (self.bytes.len() as u32, bytes.len() as u32);
        self.flags[at] |= KNOWN;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Marks `id`, already set, as an added token.
    pub fn mark(&mut self, id: u32, special: bool, control: bool) {
        let flags = &mut self.flags[id as usize];
        *flags |= if special { SPECIAL } else { 0 } | if control { CONTROL } else { 0 };
    }

    /// Highest id + 1.
    pub fn size(&self) -> usize {
        self.spans.len()
    }

    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        if self.flag(id) & KNOWN == 0 {
            return None;
        }
        let (start, length) = self.spans[id as usize];
        Some(&self.bytes[start as usize..(start + length) as usize])
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.flag(id) & SPECIAL != 0
    }

    pub fn is_control(&self, id: u32) -> bool {
        self.flag(id) & CONTROL != 0
    }

    fn flag(&self, id: u32) -> u8 {
        self.flags.get(id as usize).copied().unwrap_or(0)
    }
}
