//! `tojson` as chat templates know it: Python's `json.dumps`, with its separators and number spelling, and without
//! the HTML escaping that Jinja's own filter adds.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::environment::MAX_OUTPUT_BYTES;

/// Nesting accepted, well under what a thread's stack allows.
const MAX_DEPTH: usize = 256;

struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// The filter. Takes `json.dumps` keywords: `ensure_ascii` (false here), `indent`, `separators`, `sort_keys`.
pub(crate) fn tojson(value: &Value, indent: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let indent = match options.get::<Option<Value>>("indent")?.or(indent) {
        None => None,
        Some(width) if width.is_none() || width.is_undefined() => None,
        Some(width) => match width.as_str() {
            Some(text) => Some(text.to_owned()),
            None => Some(" ".repeat(usize::try_from(width)?.min(64))),
        },
    };
    let separators = options.get::<Option<Value>>("separators")?.filter(|value| !value.is_none());
    let (item_separator, key_separator) = match separators {
        Some(pair) => {
            let at = |index: usize| pair.get_item_by_index(index).map(|text| text.to_string());
            (at(0)?, at(1)?)
        }
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let style = Style {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent,
        item_separator,
        key_separator,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut out = String::new();
    style.value(value, 0, &mut out)?;
    Ok(Value::from(out))
}

impl Style {
    fn value(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > MAX_DEPTH || out.len() > MAX_OUTPUT_BYTES {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: the value is too deep or too large",
            ));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => number(value, out),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list('[', ']', items.len(), depth, out, |at, out| {
                    self.value(&items[at], depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.list('{', '}', keys.len(), depth, out, |at, out| {
                    let key = &keys[at];
                    match key.kind() {
                        ValueKind::String => self.string(key.as_str().unwrap_or_default(), out),
                        ValueKind::None => out.push_str("\"null\""),
                        ValueKind::Bool => out.push_str(if key.is_true() { "\"true\"" } else { "\"false\"" }),
                        _ => {
                            out.push('"');
                            number(key, out);
                            out.push('"');
                        }
                    }
                    out.push_str(&self.key_separator);
                    self.value(&value.get_item(key)?, depth + 1, out)
                })?;
            }
            kind => {
                let why = format!("tojson: a value of type {kind} has no JSON form");
                return Err(Error::new(ErrorKind::InvalidOperation, why));
            }
        }
        Ok(())
    }

    fn list(
        &self,
        open: char,
        close: char,
        length: usize,
        depth: usize,
        out: &mut String,
        mut item: impl FnMut(usize, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for at in 0..length {
            if at > 0 {
                out.push_str(&self.item_separator);
            }
            self.new_line(depth + 1, out);
            item(at, out)?;
        }
        if length > 0 {
            self.new_line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\0'..='\u{1f}' => escape(c as u16, out),
                // Guards must stay characters, or they could not be taken out again.
                '\u{7f}'..
                    if self.ensure_ascii && c != '\u{7f}' && !('\u{fdd0}'..='\u{fdef}').contains(&c) =>
                {
                    c.encode_utf16(&mut [0; 2]).iter().for_each(|&unit| escape(unit, out));
                }
                _ => out.push(c),
            }
        }
        out.push('"');
    }
}

fn escape(unit: u16, out: &mut String) {
    let _ = write!(out, "\\u{unit:04x}");
}

/// A number as Python writes it.
fn number(value: &Value, out: &mut String) {
    if value.is_integer() {
        let _ = write!(out, "{value}");
        return;
    }
    let number = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    if number.is_nan() {
        out.push_str("NaN");
    } else if number.is_infinite() {
        out.push_str(if number > 0.0 { "Infinity" } else { "-Infinity" });
    } else {
        // The shortest digits that read back the same are the same in both languages; where the exponent starts
        // is not.
        let scientific = format!("{number:e}");
        let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        match exponent.parse::<i32>().unwrap_or(0) {
            -4..=15 => {
                let plain = format!("{number}");
                out.push_str(&plain);
                if !plain.contains('.') {
                    out.push_str(".0");
                }
            }
            exponent => {
                let sign = if exponent < 0 { '-' } else { '+' };
                let _ = write!(out, "{digits}e{sign}{:02}", exponent.abs());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context};

    #[test]
    fn json_as_python_writes_it() {
        let mut env = Environment::new();
        env.add_filter("tojson", super::tojson);
        let value: serde_json::Value = serde_json::from_str(
            r#"{"b": [1, 2.0, 1e-5, 1e16, 123456789.125, -0.0, 1e300], "a": "é\"\\\n\u0001<&'\ud83d\ude42", "e": [], "o": {}, "n": null, "t": true}"#,
        )
        .unwrap();
        let render = |expression: &str| {
            env.render_str(
                &format!("{{{{ v | {expression} }}}}"),
                context! { v => crate::template::environment::from_json(&value) },
            )
        };
        assert_eq!(
            render("tojson").unwrap(),
            "{\"b\": [1, 2.0, 1e-05, 1e+16, 123456789.125, -0.0, 1e+300], \"a\": \"é\\\"\\\\\\n\\u0001<&'🙂\", \"e\": [], \"o\": {}, \"n\": null, \"t\": true}"
        );
        let sorted = render("tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true)").unwrap();
        assert!(
            sorted.starts_with("{\"a\":\"\\u00e9\\\"\\\\\\n\\u0001<&'\\ud83d\\ude42\",\"b\":[1,2.0"),
            "{sorted}"
        );
        assert!(render("tojson(indent=2)").unwrap().contains("{\n  \"b\": [\n    1,\n    2.0,"));
        assert!(
            render("tojson(indent=2)")
                .unwrap()
                .ends_with("\"e\": [],\n  \"o\": {},\n  \"n\": null,\n  \"t\": true\n}")
        );
        assert!(render("tojson(colour=1)").is_err());
        assert!(env.render_str("{{ nothing | tojson }}", ()).is_err());
    }
}
