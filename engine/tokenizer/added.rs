//! Added tokens: the strings a tokenizer recognises before any merging, and where they stand in a text.
//!
//! An added token is a *control token* unless it is nothing but white space (GPT-NeoX vocabularies list runs of
//! spaces that way): control tokens steer the model, so text that a user wrote must never become one, while
//! runs of spaces are ordinary text in every mode.
//!
//! Matching is leftmost-longest, as in the `tokenizers` crate, over a byte trie. Cost is the length of the text
//! plus, at each position that begins like a token, the length of the common prefix.

use super::TokenizerError;

/// May special-token strings in a text become control ids?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Specials {
    /// Their strings become their ids: for template markup and other trusted text.
    Parse,
    /// They are text like any other: for everything a user, a tool or a document wrote.
    #[default]
    Plain,
}

/// One entry of the tokenizer's added tokens.
#[derive(Clone, Debug)]
pub(crate) struct AddedToken {
    pub id: u32,
    pub content: String,
    /// Left out by a decoder that skips specials. `false` for markup that parsers read as text.
    pub special: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    pub single_word: bool,
}

impl AddedToken {
    /// Not mere white space: see the head of this file.
    pub fn is_control(&self) -> bool {
        !self.content.chars().all(char::is_whitespace)
    }
}

/// A stretch of a text: the bytes `start..end`, and the token they are if they are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub start: usize,
    pub end: usize,
    pub id: Option<u32>,
}

impl Segment {
    /// All of `text` as one stretch of plain text; none if it is empty.
    pub fn whole(text: &str) -> Vec<Segment> {
        if text.is_empty() { Vec::new() } else { vec![Segment { start: 0, end: text.len(), id: None }] }
    }
}

/// A set of added tokens that can be found in a text.
#[derive(Debug, Default)]
pub(crate) struct AddedTokens {
    tokens: Vec<AddedToken>,
    /// Children of each trie node, sorted by byte; node 0 is the root.
    nodes: Vec<Node>,
    begins: Vec<bool>,
}

#[derive(Debug, Default)]
struct Node {
    children: Vec<(u8, u32)>,
    token: Option<u32>,
}

/// Total bytes of added-token strings: beyond any vocabulary, and a bound on the trie.
const MAX_CONTENT_BYTES: usize = 8 << 20;

impl AddedTokens {
    pub fn new(mut tokens: Vec<AddedToken>) -> Result<AddedTokens, TokenizerError> {
        tokens.retain(|token| !token.content.is_empty());
        tokens.sort_by_key(|token| token.id);
        let total_bytes: usize = tokens.iter().map(|token| token.content.len()).sum();
        if total_bytes > MAX_CONTENT_BYTES {
            let why = format!("{total_bytes} bytes of added tokens; the limit is {MAX_CONTENT_BYTES}");
            return Err(TokenizerError::in_file("tokenizer_config.json", why));
        }
        let mut set =
            AddedTokens { tokens: Vec::new(), nodes: vec![Node::default()], begins: vec![false; 256] };
        for (index, token) in tokens.iter().enumerate() {
            let mut node = 0usize;
            set.begins[token.content.as_bytes()[0] as usize] = true;
            for &byte in token.content.as_bytes() {
                node = match set.nodes[node].children.binary_search_by_key(&byte, |child| child.0) {
                    Ok(at) => set.nodes[node].children[at].1 as usize,
                    Err(at) => {
                        let new = set.nodes.len();
                        set.nodes.push(Node::default());
                        set.nodes[node].children.insert(at, (byte, new as u32));
                        new
                    }
                };
            }
            // The same string twice: the lower id keeps it.
            set.nodes[node].token.get_or_insert(index as u32);
        }
        set.tokens = tokens;
        Ok(set)
    }

    pub fn iter(&self) -> impl Iterator<Item = &AddedToken> {
        self.tokens.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The token whose string is exactly `text`.
    pub fn get(&self, text: &str) -> Option<&AddedToken> {
        let (token, bytes) = self.longest_at(text.as_bytes())?;
        (bytes == text.len()).then_some(token)
    }

    /// The longest token that `bytes` begin with, and its length.
    fn longest_at(&self, bytes: &[u8]) -> Option<(&AddedToken, usize)> {
        let mut node = self.nodes.first()?;
        let mut best = None;
        for (depth, byte) in bytes.iter().enumerate() {
            let Ok(at) = node.children.binary_search_by_key(byte, |child| child.0) else { break };
            node = &self.nodes[node.children[at].1 as usize];
            if let Some(index) = node.token {
                best = Some((&self.tokens[index as usize], depth + 1));
            }
        }
        best
    }

    /// Cuts `text` at every token of the set. The segments cover the text, in order, and none is empty.
    pub fn split(&self, text: &str) -> Vec<Segment> {
        let bytes = text.as_bytes();
        let mut segments = Vec::new();
        let mut plain_start = 0;
        let mut at = 0;
        while !self.is_empty() && at < bytes.len() {
            if !self.begins[bytes[at] as usize] {
                at += 1;
                continue;
            }
            let Some((token, length)) = self.longest_at(&bytes[at..]) else {
                at += 1;
                continue;
            };
            let (mut start, mut end) = (at, at + length);
            at = end;
            if token.single_word && (ends_with_word(&text[..start]) || starts_with_word(&text[end..])) {
                continue;
            }
            if token.lstrip {
                start = plain_start + text[plain_start..start].trim_end().len();
            }
            if token.rstrip {
                end = text.len() - text[end..].trim_start().len();
                at = end;
            }
            if plain_start < start {
                segments.push(Segment { start: plain_start, end: start, id: None });
            }
            segments.push(Segment { start, end, id: Some(token.id) });
            plain_start = end;
        }
        if plain_start < text.len() {
            segments.push(Segment { start: plain_start, end: text.len(), id: None });
        }
        segments
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn ends_with_word(text: &str) -> bool {
    text.chars().next_back().is_some_and(is_word)
}

fn starts_with_word(text: &str) -> bool {
    text.chars().next().is_some_and(is_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, content: &str) -> AddedToken {
        let content = content.to_owned();
        AddedToken { id, content, special: true, lstrip: false, rstrip: false, single_word: false }
    }

    #[test]
    fn longest_match_wins_and_segments_cover_the_text() {
        let set = AddedTokens::new(vec![token(1, "<a>"), token(2, "<a><b>"), token(3, "[X]")]).unwrap();
        let text = "x<a><a><b>[X<[X]é";
        let found: Vec<_> = set.split(text).iter().map(|s| (&text[s.start..s.end], s.id)).collect();
        let want = [
            ("x", None),
            ("<a>", Some(1)),
            ("<a><b>", Some(2)),
            ("[X<", None),
            ("[X]", Some(3)),
            ("é", None),
        ];
        assert_eq!(found, want);
        assert_eq!(set.get("<a>").map(|t| t.id), Some(1));
        assert!(set.get("<a").is_none() && set.get("").is_none());
        assert!(set.split("").is_empty());
    }

    #[test]
    fn strips_and_single_words() {
        let both = AddedToken { lstrip: true, rstrip: true, ..token(1, "<m>") };
        let word = AddedToken { single_word: true, ..token(2, "it") };
        let set = AddedTokens::new(vec![both, word]).unwrap();
        let text = "a  <m> b bit it";
        let found: Vec<_> = set.split(text).iter().map(|s| (&text[s.start..s.end], s.id)).collect();
        assert_eq!(found, [("a", None), ("  <m> ", Some(1)), ("b bit ", None), ("it", Some(2))]);
    }
}
