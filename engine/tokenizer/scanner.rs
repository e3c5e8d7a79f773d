//! Cuts text into the pieces that Kimi's byte-pair merging may not cross.
//!
//! The rule is an alternation of eight patterns, tried in order at each position:
//!
//! ```text
//! 1  [\p{Han}]+
//! 2  [^\r\n\p{L}\p{N}]?[U]*[L]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?      U = \p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M} less \p{Han}
//! 3  [^\r\n\p{L}\p{N}]?[U]+[L]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?      L = \p{Ll}\p{Lm}\p{Lo}\p{M} less \p{Han}
//! 4  \p{N}{1,3}
//! 5   ?[^\s\p{L}\p{N}]+[\r\n]*
//! 6  \s*[\r\n]+
//! 7  \s+(?!\S)
//! 8  \s+
//! ```
//!
//! It is written out by hand because a backtracking engine visits a long run once per position and gives up
//! beyond a limit; here every run is looked at a fixed number of times, whatever the text. A test compares it with
//! the patterns themselves. The character classes come from the regex crate's own Unicode tables.

use fancy_regex::Regex;

const HAN: u8 = 1;
const UPPER: u8 = 2;
const LOWER: u8 = 4;
const LETTER: u8 = 8;
const NUMBER: u8 = 16;
const SPACE: u8 = 32;
const NEWLINE: u8 = 64;

/// Class bits of every character.
pub(crate) struct Scanner {
    classes: Vec<u8>,
}

impl Scanner {
    /// Builds the table: a few class searches over a string of all assigned characters (about 20 ms).
    pub fn new() -> Scanner {
        let mut classes = vec![0u8; 0x11_0000];
        // Planes 4 to 13 are unassigned and 15, 16 private: none of these classes is there.
        let planes = [0u32..0x4_0000, 0xE_0000..0xF_0000];
        let all: String = planes.into_iter().flatten().filter_map(char::from_u32).collect();
        let table = [
            (HAN, r"\p{Han}+"),
            (UPPER, r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"),
            (LOWER, r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"),
            (LETTER, r"\p{L}+"),
            (NUMBER, r"\p{N}+"),
            (SPACE, r"\s+"),
            (NEWLINE, r"[\r\n]+"),
        ];
        for (bit, pattern) in table {
            let regex = Regex::new(pattern).expect("the class patterns are valid");
            for run in regex.find_iter(&all) {
                let run = run.expect("a class search does not backtrack");
                run.as_str().chars().for_each(|c| classes[c as usize] |= bit);
            }
        }
        Scanner { classes }
    }

    fn class(&self, c: char) -> u8 {
        self.classes[c as usize]
    }

    /// Class and length of the character at the start of `text`; `(0, 0)` at the end.
    fn first(&self, text: &str) -> (u8, usize) {
        text.chars().next().map_or((0, 0), |c| (self.class(c), c.len_utf8()))
    }

    /// Bytes of the longest prefix of `text` whose characters satisfy `wanted`.
    fn run(&self, text: &str, wanted: impl Fn(u8) -> bool) -> usize {
        text.char_indices().find(|&(_, c)| !wanted(self.class(c))).map_or(text.len(), |(at, _)| at)
    }

    /// Bytes of the first piece of `text`: 0 only if `text` is empty.
    pub fn piece(&self, text: &str) -> usize {
        let (class, length) = self.first(text);
        if length == 0 {
            return 0;
        }
        if class & HAN != 0 {
            return self.run(text, |c| c & HAN != 0);
        }
        if let Some(end) = self.word(text, class, length) {
            return end;
        }
        if class & NUMBER != 0 {
            return text
                .chars()
                .take(3)
                .take_while(|&c| self.class(c) & NUMBER != 0)
                .map(char::len_utf8)
                .sum();
        }
        let other = |c: u8| c & (SPACE | LETTER | NUMBER) == 0;
        let lead = usize::from(text.starts_with(' '));
        let marks = self.run(&text[lead..], other);
        if marks > 0 {
            let end = lead + marks;
            return end + self.run(&text[end..], |c| c & NEWLINE != 0);
        }
        let space = self.run(text, |c| c & SPACE != 0);
        if let Some(newline) = text[..space].rfind(['\r', '\n']) {
            return newline + 1;
        }
        if space == text.len() {
            return space;
        }
        // Leave the last space to the word that follows, unless it is the only one.
        let last = text[..space].chars().next_back().map_or(0, char::len_utf8);
        if space > last { space - last } else { space }
    }

    /// Patterns 2 and 3. `class` and `length` are of the first character.
    fn word(&self, text: &str, class: u8, length: usize) -> Option<usize> {
        let prefix = (class & (NEWLINE | LETTER | NUMBER) == 0).then_some(length);
        let starts = [prefix, Some(0)];
        let mut uppers = [0; 2];
        for (start, upper) in starts.iter().zip(&mut uppers) {
            let Some(start) = *start else { continue };
            *upper = self.run(&text[start..], |c| c & UPPER != 0);
            let body = &text[start..start + *upper];
            let lower = self.run(&text[start + *upper..], |c| c & LOWER != 0);
            if lower > 0 {
                return Some(contraction(text, start + *upper + lower));
            }
            // No lower-case letter follows: the last letter of the run that may count as one ends the word.
            if let Some((at, c)) = body.char_indices().rev().find(|&(_, c)| self.class(c) & LOWER != 0) {
                return Some(contraction(text, start + at + c.len_utf8()));
            }
        }
        for (start, upper) in starts.iter().zip(uppers) {
            if let (Some(start), true) = (*start, upper > 0) {
                return Some(contraction(text, start + upper));
            }
        }
        None
    }
}

/// `end`, or the end of an English contraction that stands there (`ſ` folds to `s`, as in the pattern).
fn contraction(text: &str, end: usize) -> usize {
    let mut rest = text[end..].chars();
    if rest.next() != Some('\'') {
        return end;
    }
    let fold = |c: Option<char>| c.map_or('\0', |c| if c == 'ſ' { 's' } else { c.to_ascii_lowercase() });
    let first = rest.next();
    let length = match (fold(first), fold(rest.next())) {
        ('s' | 't' | 'm' | 'd', _) => first.map_or(0, char::len_utf8),
        ('r' | 'v', 'e') | ('l', 'l') => 2,
        _ => return end,
    };
    end + 1 + length
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    const PATTERN: &str = concat!(
        r"[\p{Han}]+|",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    );
    static REGEX: LazyLock<Regex> = LazyLock::new(|| Regex::new(PATTERN).unwrap());
    static SCANNER: LazyLock<Scanner> = LazyLock::new(Scanner::new);

    fn pieces(mut text: &str) -> Vec<&str> {
        let mut out = Vec::new();
        while !text.is_empty() {
            let (piece, rest) = text.split_at(SCANNER.piece(text));
            assert!(!piece.is_empty());
            out.push(piece);
            text = rest;
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn agrees_with_the_patterns(
            text in prop::collection::vec(
                prop_oneof![
                    prop::sample::select(
                        " \t\r\n\u{a0}\u{3000}\u{85}aZéÉǅʰªあ中々〇⺀한ก\u{301}\u{e0100}0٣½Ⅷ'sSſTtRrEeVvmMlLdD!.-_<|>👍\u{fe0f}\u{200d}\u{fdd0}".chars().collect::<Vec<_>>()
                    ),
                    any::<char>(),
                ],
                0..24,
            ).prop_map(String::from_iter),
        ) {
            let want: Vec<&str> = REGEX.find_iter(&text).map(|m| m.unwrap().as_str()).collect();
            prop_assert_eq!(pieces(&text), want);
        }
    }

    #[test]
    fn every_character_alone_and_in_company() {
        for c in
            (0..0x11_0000u32).filter_map(char::from_u32).filter(|c| !('\u{40000}'..'\u{E0000}').contains(c))
        {
            let text = format!("A{c}a {c}1");
            let want: Vec<&str> = REGEX.find_iter(&text).map(|m| m.unwrap().as_str()).collect();
            assert_eq!(pieces(&text), want, "{c:?}");
        }
    }
}
