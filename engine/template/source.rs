//! Small changes made to a template's source before it is compiled.
//!
//! - Line ends become `\n`, as Jinja2 has it.
//! - `{% generation %}` blocks, which mark what a model wrote for training, become plain blocks.
//! - Every value that a template gives a name (`set`, `with`, the variables of a loop, the arguments of a macro or a
//!   call block) passes through a filter that bounds its size and depth; see `environment.rs`.
//!
//! Only block tags are touched, and white-space control (`-`, `+`) stays with the text it faces.

use std::fmt::Write;

/// Name of the filter that bounds a value.
pub(crate) const BOUND_FILTER: &str = "moebius_bounded";

/// Returns `source` with the changes made. A source that is not well-formed comes back as it is from the point where
/// it stops making sense, for the compiler to complain about.
pub(crate) fn prepare(source: &str) -> String {
    let mut out = String::with_capacity(source.len() + source.len() / 8);
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut rest = source.as_str();
    let mut raw = false;
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = match tag.as_bytes().get(1) {
            Some(b'#') if !raw => tag.find("#}").map(|at| at + 2),
            Some(b'{') if !raw => tag_end(tag, "}}"),
            Some(b'%') => tag_end(tag, "%}"),
            _ => Some(1),
        };
        let Some(end) = end else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        rest = after;
        if !tag.starts_with("{%") {
            out.push_str(tag);
            continue;
        }
        let inner = &tag[2..tag.len() - 2];
        let (open, inner) = split_control(inner, true);
        let (close, inner) = split_control(inner, false);
        let inner = inner.trim();
        let (word, arguments) =
            inner.split_at(inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len()));
        raw = if raw { word != "endraw" } else { word == "raw" };
        let replaced = match word {
            _ if raw => None,
            "generation" => Some("if true".to_owned()),
            "endgeneration" => Some("endif".to_owned()),
            "set" => Some(bounded_set(arguments)),
            "macro" | "call" | "for" | "with" => names(word, arguments)
                .map(|names| format!("{inner} %}}{{% set {BOUND_FILTER}_ = [{names}] | {BOUND_FILTER}")),
            _ => None,
        };
        match replaced {
            Some(inner) => {
                let _ = write!(out, "{{%{open} {inner} {close}%}}");
            }
            None => out.push_str(tag),
        }
    }
    out.push_str(rest);
    out
}

/// Takes a `-` or `+` off the front or the back of a tag's inside.
fn split_control(inner: &str, front: bool) -> (&str, &str) {
    let control = ['-', '+'];
    match front {
        true if inner.starts_with(control) => inner.split_at(1),
        false if inner.ends_with(control) => {
            let (inner, control) = inner.split_at(inner.len() - 1);
            (control, inner)
        }
        _ => ("", inner),
    }
}

/// Where a tag ends, past its closing `close`, which inside of strings does not count.
fn tag_end(tag: &str, close: &str) -> Option<usize> {
    let bytes = tag.as_bytes();
    let mut quote = None;
    let mut depth = 0usize;
    let mut at = 2;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(open), byte) if byte == open => quote = None,
            (Some(_), _) => {}
            (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
            // The braces of a map inside `{{ }}`.
            (None, b'{') => depth += 1,
            (None, b'}') if depth > 0 => depth -= 1,
            (None, _) if bytes[at..].starts_with(close.as_bytes()) => return Some(at + 2),
            _ => {}
        }
        at += 1;
    }
    None
}

/// Byte offsets at which `wanted` holds for a character outside strings and brackets.
fn top_level(text: &str, wanted: impl Fn(&str) -> bool) -> Vec<usize> {
    let mut found = Vec::new();
    let (mut quote, mut escaped, mut depth) = (None, false, 0i32);
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(open), c) if c == open => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, '(' | '[' | '{') => depth += 1,
            (None, ')' | ']' | '}') => depth -= 1,
            (None, _) if depth == 0 && wanted(&text[at..]) => found.push(at),
            _ => {}
        }
    }
    found
}

/// `set NAME = VALUE`, or the block form `set NAME`, with the value bounded.
fn bounded_set(arguments: &str) -> String {
    match top_level(arguments, |rest| rest.starts_with('=')).first() {
        Some(&at) => {
            let (name, value) = arguments.split_at(at);
            format!("set{name}= ({}) | {BOUND_FILTER}", value[1..].trim())
        }
        None => format!("set{arguments} | {BOUND_FILTER}"),
    }
}

/// The names that a tag binds, as a list: the parameters in `macro NAME(a, b=1)` and `call(a) ...`, the targets of
/// `for a, b in ...`, those of `with a=1, b=2`. `None` if there are none, or if the tag is not well-formed.
fn names(word: &str, arguments: &str) -> Option<String> {
    let list = match word {
        "for" => arguments.split_once(" in ")?.0.trim(),
        "with" => arguments,
        "macro" => arguments.split_once('(')?.1.trim_end().strip_suffix(')')?,
        _ => {
            let list = arguments.trim_start().strip_prefix('(')?;
            let close = top_level_close(list)?;
            &list[..close]
        }
    };
    let list = if word == "for" { list.trim_matches(['(', ')']) } else { list };
    let mut ends = top_level(list, |rest| rest.starts_with(','));
    ends.push(list.len());
    let mut start = 0;
    let mut names = Vec::new();
    for end in ends {
        let name = list[start..end]
            .split('=')
            .next()
            .unwrap_or_default()
            .trim_matches(['(', ')', ' ', '\n', '\t', '\r']);
        if name.contains(|c: char| !c.is_alphanumeric() && c != '_') {
            return None;
        }
        if !name.is_empty() {
            names.push(name);
        }
        start = (end + 1).min(list.len());
    }
    if names.is_empty() { None } else { Some(names.join(", ")) }
}

/// Where the bracket that was open before `text` closes.
fn top_level_close(text: &str) -> Option<usize> {
    let (mut quote, mut depth) = (None, 0i32);
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, '(' | '[' | '{') => depth += 1,
            (None, ')') if depth == 0 => return Some(at),
            (None, ')' | ']' | '}') => depth -= 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::prepare;

    #[test]
    fn tags_are_rewritten_and_text_is_not() {
        let unchanged = [
            "",
            "{",
            "{{ a }}",
            "{% if a == 'set x = 1 %}' %}x{% endif %}",
            "{# {% set x = 1 %} #}",
            "{% raw %}{% set x = 1 %}{% endraw %}",
            "{{ {'a': {'b': 1}} }} {% if x in y %}",
            "{% set x = 'unterminated",
            "set x = 1",
            "{{ '{% set x = 1 %}' }}",
            "{% macro f() %}",
            "{% call f(x) %}",
            "{% for %}",
        ];
        assert_eq!(prepare("a\r\nb\rc"), "a\nb\nc");
        for source in unchanged {
            assert_eq!(prepare(source), source);
        }
        assert_eq!(prepare("{%- set x = a == b -%}"), "{%- set x = (a == b) | moebius_bounded -%}");
        assert_eq!(prepare("{% set a, b = 1, 2 %}"), "{% set a, b = (1, 2) | moebius_bounded %}");
        assert_eq!(prepare("{% set x|upper %}"), "{% set x|upper | moebius_bounded %}");
        assert_eq!(
            prepare("{% set ns.a = ns.a ~ '=%}' %}"),
            "{% set ns.a = (ns.a ~ '=%}') | moebius_bounded %}"
        );
        assert_eq!(prepare("{%- generation -%}a{% endgeneration %}"), "{%- if true -%}a{% endif %}");
        let bound = |names: &str| format!(" %}}{{% set moebius_bounded_ = [{names}] | moebius_bounded ");
        for (tag, names) in [
            ("macro f(a, b={'x': ',='})", "a, b"),
            ("for k, v in x.items() if k", "k, v"),
            ("for (k, v) in x", "k, v"),
            ("with a = 1, b = f(2, 3)", "a, b"),
            ("call(a, b=')') f(x)", "a, b"),
        ] {
            assert_eq!(prepare(&format!("{{%- {tag} -%}} x")), format!("{{%- {tag}{}-%}} x", bound(names)));
        }
    }
}
