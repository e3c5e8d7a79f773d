//! Keeps what users, tools and documents wrote from turning into control tokens.
//!
//! A template mixes its own markup with text from outside, and afterwards the two cannot be told apart. So before
//! rendering, a *guard* (a Unicode noncharacter that occurs nowhere in the input or the template) is put into
//! every string from outside wherever it could take part in a control token. The rendered text is then searched for
//! control tokens, and guards are removed from what lies between them (`Tokenizer::encode_prompt`).
//!
//! **Where guards go.** In a string S from outside:
//! 1. after every character that begins some control token, if it is punctuation (`<`, `[`); where a token
//!    begins with a letter or a digit, only if the token, or as much of it as S has left, follows;
//! 2. before the first character of S, also of S less its leading white space, if S begins with the end of some
//!    control token, or lies inside one entirely.
//!
//! **Why that is enough.** Let a control token T be found in the rendered text. If its first character came from
//! outside, the next character would be a guard (1), which is no part of T. So T begins in template text. If any
//! later character came from outside, take the first such: it begins a string S from outside, S begins with an
//! end of T or lies inside T, and a guard stands before it (2). So all of T is template text. Rule 1 guards
//! characters, not whole tokens, and therefore also holds when a template removes parts of S
//! (`replace`, `split`) or joins S to another string (for tokens that begin with a letter, which no published
//! chat format has, only when it leaves S whole).
//!
//! **What is left out.** `<think>` and `</think>` in the content of assistant messages stay as they are, because
//! templates take reasoning out of history by splitting on them; the positions behind them count as beginnings for
//! rule 2. Values of `role` and `type`, keys, and template variables are compared by templates with words, so a
//! plain word there is not guarded for lying inside a token: a template that prints `<|` + role + `|>` means it,
//! and callers accept known roles only. A template that cuts S at a place of its own choosing and prints
//! the rest right behind an unfinished control token would defeat rule 2; none is known.
//! Tokens of a single character cannot be guarded and are not control tokens (`tokenizer/added.rs`).

use std::collections::HashMap;

use serde_json::{Map, Value};

/// Tags that templates look for in assistant content.
const THINK_TAGS: [&str; 2] = ["<think>", "</think>"];
/// First of the 32 noncharacters from which guards are taken.
const FIRST_NONCHARACTER: u32 = 0xFDD0;

/// The strings that must not arise, prepared for searching.
#[derive(Debug, Default)]
pub(crate) struct Markers {
    /// Control tokens by first character.
    by_first: HashMap<char, Vec<String>>,
    /// All their proper endings by first character.
    endings: HashMap<char, Vec<String>>,
    /// Noncharacters that occur in them.
    used: u32,
}

/// What a string from outside is to the template.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Text,
    AssistantText,
    /// A role, a type, a key or a variable: compared with words.
    Word,
}

/// Bit n is set if U+FDD0 + n occurs in `text`.
pub(crate) fn noncharacters(text: &str) -> u32 {
    // All 32 begin with EF B7 in UTF-8, which few other characters do.
    if !text.as_bytes().contains(&0xEF) {
        return 0;
    }
    let bits =
        text.chars().filter_map(|c| (c as u32).checked_sub(FIRST_NONCHARACTER)).filter(|&bit| bit < 32);
    bits.fold(0, |mask, bit| mask | 1 << bit)
}

/// `noncharacters` of every string in `value`.
pub(crate) fn noncharacters_in(value: &Value) -> u32 {
    match value {
        Value::String(text) => noncharacters(text),
        Value::Array(items) => items.iter().fold(0, |mask, item| mask | noncharacters_in(item)),
        Value::Object(map) => {
            map.iter().fold(0, |mask, (k, v)| mask | noncharacters(k) | noncharacters_in(v))
        }
        _ => 0,
    }
}

/// A noncharacter whose bit in `used` is clear.
pub(crate) fn unused_noncharacter(used: u32) -> Option<char> {
    let bit = used.trailing_ones();
    if bit < 32 { char::from_u32(FIRST_NONCHARACTER + bit) } else { None }
}

impl Markers {
    pub fn new<'a>(controls: impl IntoIterator<Item = &'a str>) -> Markers {
        let mut markers = Markers::default();
        for token in controls {
            let Some(first) = token.chars().next() else { continue };
            markers.used |= noncharacters(token);
            markers.by_first.entry(first).or_default().push(token.to_owned());
            for (at, c) in token.char_indices().skip(1) {
                markers.endings.entry(c).or_default().push(token[at..].to_owned());
            }
        }
        for endings in markers.endings.values_mut() {
            endings.sort();
            endings.dedup();
        }
        markers
    }

    /// Noncharacters that occur in the control tokens themselves.
    pub fn used(&self) -> u32 {
        self.used
    }

    /// A message with guards in all its strings.
    pub fn message(&self, message: &Value, guard: char) -> Value {
        let Value::Object(fields) = message else { return self.value(message, Kind::Text, guard) };
        let is_assistant = fields.get("role").is_some_and(|role| role == "assistant");
        let field = |(key, value): (&String, &Value)| {
            let kind = if is_assistant && key == "content" { Kind::AssistantText } else { Kind::Text };
            (self.string(key, Kind::Word, guard), self.field(key, value, kind, guard))
        };
        Value::Object(fields.iter().map(field).collect())
    }

    /// Any other value from outside, such as a tool, with guards in all its strings.
    pub fn outside(&self, value: &Value, guard: char) -> Value {
        self.value(value, Kind::Text, guard)
    }

    /// Template variables with guards in all their strings.
    pub fn variables(&self, variables: &Map<String, Value>, guard: char) -> Map<String, Value> {
        let entry = |(key, value): (&String, &Value)| (key.clone(), self.value(value, Kind::Word, guard));
        variables.iter().map(entry).collect()
    }

    fn value(&self, value: &Value, kind: Kind, guard: char) -> Value {
        match value {
            Value::String(text) => Value::String(self.string(text, kind, guard)),
            Value::Array(items) => items.iter().map(|item| self.value(item, kind, guard)).collect(),
            Value::Object(map) => {
                let field = |(key, value): (&String, &Value)| {
                    (self.string(key, Kind::Word, guard), self.field(key, value, kind, guard))
                };
                Value::Object(map.iter().map(field).collect())
            }
            other => other.clone(),
        }
    }

    fn field(&self, key: &str, value: &Value, kind: Kind, guard: char) -> Value {
        let is_word = value.is_string() && matches!(key, "role" | "type");
        self.value(value, if is_word { Kind::Word } else { kind }, guard)
    }

    fn string(&self, text: &str, kind: Kind, guard: char) -> String {
        let mut out = String::with_capacity(text.len() + 8);
        let mut at_start = true;
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            if at_start && self.could_end_here(rest, kind) {
                out.push(guard);
            }
            at_start &= c.is_whitespace();
            if kind == Kind::AssistantText
                && let Some(tag) = THINK_TAGS.iter().find(|tag| rest.starts_with(**tag))
            {
                out.push_str(tag);
                rest = &rest[tag.len()..];
                at_start = true;
                continue;
            }
            out.push(c);
            if let Some(tokens) = self.by_first.get(&c) {
                let follows =
                    |token: &String| rest.starts_with(token.as_str()) || token.starts_with(rest.trim_end());
                if !(c.is_alphanumeric() || c.is_whitespace()) || tokens.iter().any(follows) {
                    out.push(guard);
                }
            }
            rest = &rest[c.len_utf8()..];
        }
        out
    }

    /// Rule 2: whether `text` begins with the end of a control token, or is inside one.
    fn could_end_here(&self, text: &str, kind: Kind) -> bool {
        let Some(endings) = text.chars().next().and_then(|c| self.endings.get(&c)) else { return false };
        let inside = text.trim_end();
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
        let may_be_inside = !inside.is_empty() && (kind != Kind::Word || !inside.chars().all(is_word));
        endings
            .iter()
            .any(|ending| text.starts_with(ending.as_str()) || (may_be_inside && ending.starts_with(inside)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const G: char = '\u{fdd0}';

    fn markers() -> Markers {
        Markers::new(["<|im_end|>", "<|im_user|>", "<think>", "</think>", "[BOS]", "]~b]", "EOT!"])
    }

    #[test]
    fn guards_stand_where_a_token_could_begin_or_end() {
        let guarded = |text: &str| markers().string(text, Kind::Text, '#');
        assert_eq!(guarded("plain text, 2 > 1"), "plain text, 2 > 1");
        assert_eq!(guarded("a<|im_end|>b"), "a<#|im_end|>b");
        assert_eq!(guarded("a<|im_"), "a<#|im_");
        assert_eq!(guarded("end|> x"), "#end|> x");
        assert_eq!(guarded(" \n_end|> x"), " \n#_end|> x");
        assert_eq!(guarded("im_end"), "#im_end");
        assert_eq!(guarded("E EOT EOT! EO"), "E EOT E#OT! E#O");
        assert_eq!(guarded("<think>x"), "<#think>x");
        assert_eq!(
            markers().string("<think>x</think>nd|>", Kind::AssistantText, '#'),
            "<think>x</think>#nd|>"
        );
        assert_eq!(markers().string("user", Kind::Word, '#'), "user");
    }

    #[test]
    fn structure_is_kept_and_strings_are_guarded_everywhere() {
        let message =
            json!({"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}], "n": 1, "<x": null});
        let want = json!({"role": "user", "content": [{"type": "text", "text": "<\u{fdd0}|im_end|>"}], "n": 1, "<\u{fdd0}x": null});
        assert_eq!(markers().message(&message, G), want);
        assert_eq!(noncharacters_in(&want), 1);
        assert_eq!(unused_noncharacter(0b111), Some('\u{fdd3}'));
        assert_eq!(unused_noncharacter(u32::MAX), None);
    }

    fn outside_text() -> impl Strategy<Value = String> {
        let part = prop::sample::select(vec![
            "<|im_end|>",
            "<|im_",
            "<|",
            "<",
            "|>",
            ">",
            "end|>",
            "im_end",
            "im_user",
            "|im_end|",
            "[",
            "BOS",
            "BOS]",
            "]",
            "~b]",
            "EOT",
            "!",
            "E",
            "OT!",
            "<think>",
            "</think>",
            "think>",
            " ",
            "\n",
            "a",
            "é",
        ]);
        prop::collection::vec(part, 0..5).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 20000, failure_persistence: None, ..ProptestConfig::default() })]
        /// Template text and outside text in any order, outside text perhaps trimmed or with parts taken out: a
        /// control token is found exactly where the template has it.
        #[test]
        fn tokens_lie_in_template_text(
            pieces in prop::collection::vec((any::<bool>(), outside_text(), 0u8..5), 0..8),
        ) {
            let markers = markers();
            let (mut text, mut template_only) = (String::new(), String::new());
            for (is_template, piece, change) in &pieces {
                if *is_template {
                    text.push_str(piece);
                    template_only.push_str(piece);
                } else {
                    let guarded = markers.string(piece, Kind::Text, G);
                    // Parts taken out: never right behind an unfinished token, nor from one that begins with a
                    // letter (the stated exceptions).
                    let cuts = matches!(change, 1 | 2);
                    if cuts && !piece.contains('E') {
                        text.push('\u{1}');
                        template_only.push('\u{1}');
                    }
                    let changed = match change {
                        1 | 2 if piece.contains('E') => guarded,
                        0 => guarded.trim().to_owned(),
                        1 => guarded.replace('a', ""),
                        2 => guarded.replace(' ', "").replace("im_", ""),
                        3 => guarded.to_lowercase(),
                        _ => guarded,
                    };
                    text.push_str(&changed);
                    // Outside text separates template text, as long as any is left.
                    if !changed.is_empty() {
                        template_only.push('\u{1}');
                    }
                }
            }
            let count = |text: &str| -> usize {
                markers.by_first.values().flatten().map(|token| text.matches(token.as_str()).count()).sum()
            };
            prop_assert_eq!(count(&text), count(&template_only), "{:?}", text);
        }
    }
}
