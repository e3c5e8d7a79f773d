//! The Jinja dialect that published chat templates are written in, and the limits a template runs under.
//!
//! The dialect is that of `transformers`: Jinja2 with `trim_blocks`, `lstrip_blocks`, loop controls and Python's
//! methods on strings and maps, plus `raise_exception`, `strftime_now` and `tojson`. There is no Python behind it,
//! no file access and no other template to include.
//!
//! A template comes from a downloaded checkpoint, so it may be hostile. It is stopped by fuel (steps), by the clock
//! where it assigns or writes, by recursion depth, by the size of what it writes and of what it keeps in a variable.

use std::fmt;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::source::{BOUND_FILTER, prepare};
use super::{TemplateError, json};

/// Largest template source accepted; published ones stay under 50 kB.
pub(crate) const MAX_SOURCE_BYTES: usize = 128 << 10;
/// Largest rendered text, and largest string a template may keep.
pub(crate) const MAX_OUTPUT_BYTES: usize = 32 << 20;
/// Steps a template may take. A long tool conversation takes some hundred thousand; all of them, about a second.
const FUEL: u64 = 5_000_000;
/// Time a template may take. Only reached by steps that are each slow.
const MAX_TIME: Duration = Duration::from_secs(3);
/// Nesting of a value a template keeps. Requests nest up to 128 deep.
const MAX_DEPTH: usize = 160;
/// Values looked at, in one render, to find out how large and deep they are.
const MAX_VISITS: usize = 10_000_000;
/// Stack of the thread a template is compiled and rendered on: one expression may be nested, and may nest a value,
/// as deeply as its source is long, and the engine works through both recursively. Only what is used is ever
/// backed by memory.
const STACK_BYTES: usize = 256 << 20;
/// Nesting of calls, in the engine's units (a macro call costs four or more).
const MAX_RECURSION: usize = 250;

/// An environment with the given templates in it.
pub(crate) fn build(templates: &[(String, String)]) -> Result<Environment<'static>, String> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|error| describe(&error))?);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(MAX_RECURSION);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_filter("tojson", json::tojson);
    // The engine would also iterate over `none`, as over an empty list.
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    env.add_filter(BOUND_FILTER, bounded);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    for (name, source) in templates {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(format!("template of {} bytes; the limit is {MAX_SOURCE_BYTES}", source.len()));
        }
        let compiled = on_deep_stack(|| env.add_template_owned(name.clone(), prepare(source)))?;
        compiled.map_err(|error| describe(&error))?;
    }
    Ok(env)
}

/// A JSON value as templates see it.
pub(crate) fn from_json(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(yes) => Value::from(*yes),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text),
        serde_json::Value::Array(items) => items.iter().map(from_json).collect(),
        serde_json::Value::Object(map) => from_json_map(map),
    }
}

/// A JSON object as templates see it, in its own order.
pub(crate) fn from_json_map(map: &serde_json::Map<String, serde_json::Value>) -> Value {
    Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), from_json(value))))
}

/// Renders `name` with `context`.
pub(crate) fn render(env: &Environment, name: &str, context: Value) -> Result<String, TemplateError> {
    on_deep_stack(|| render_here(env, name, context)).unwrap_or_else(|why| Err(TemplateError::Render(why)))
}

/// Runs `job` on a thread with a stack deep enough for anything a template of accepted size can nest.
fn on_deep_stack<T: Send>(job: impl FnOnce() -> T + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("template".to_owned()).stack_size(STACK_BYTES);
        let running =
            thread.spawn_scoped(scope, job).map_err(|error| format!("no thread to run on: {error}"))?;
        running.join().map_err(|_| "the template engine panicked".to_owned())
    })
}

fn render_here(env: &Environment, name: &str, context: Value) -> Result<String, TemplateError> {
    let template = env.get_template(name).map_err(|error| failure(&error))?;
    let mut output = Output { bytes: Vec::new(), deadline: Instant::now() + MAX_TIME, exceeded: None };
    let result = template.render_captured_to(context, &mut output).map(|_| ());
    match (output.exceeded, result) {
        (Some(limit), _) => Err(TemplateError::Limit(limit.to_owned())),
        (None, Err(error)) => Err(failure(&error)),
        (None, Ok(())) => String::from_utf8(output.bytes)
            .map_err(|_| TemplateError::Render("the template wrote bytes that are not text".to_owned())),
    }
}

/// Where the rendered text goes; refuses to grow without end.
struct Output {
    bytes: Vec<u8>,
    deadline: Instant,
    exceeded: Option<&'static str>,
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT_BYTES {
            self.exceeded = Some("the template writes more than 32 MiB");
        } else if Instant::now() > self.deadline {
            self.exceeded = Some(TOO_LONG);
        }
        match self.exceeded {
            Some(limit) => Err(io::Error::other(limit)),
            None => {
                self.bytes.extend_from_slice(bytes);
                Ok(bytes.len())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const TOO_LONG: &str = "the template runs for more than 3 seconds";

/// What a render may still spend; kept in its state.
struct Allowance {
    deadline: Instant,
    visits: usize,
}

/// A limit was reached, or the template raised; carried inside the engine's own error.
#[derive(Debug)]
struct Stop {
    text: String,
    raised: bool,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Stop {}

fn stop(text: impl Into<String>, raised: bool) -> Error {
    let text = text.into();
    Error::new(ErrorKind::InvalidOperation, text.clone()).with_source(Stop { text, raised })
}

/// Put by `source::prepare` wherever a template names a value. A variable must not grow without end, as it would by
/// doubling in a loop, nor nest without end: neither costs fuel to speak of.
fn bounded(state: &mut State, value: Value) -> Result<Value, Error> {
    let fresh = || Allowance { deadline: Instant::now() + MAX_TIME, visits: MAX_VISITS };
    let allowance = state.get_or_insert_extension_with(fresh);
    if Instant::now() > allowance.deadline {
        return Err(stop(TOO_LONG, false));
    }
    let mut budget_bytes = MAX_OUTPUT_BYTES;
    match within(&value, &mut budget_bytes, &mut allowance.visits, 0) {
        Ok(()) => Ok(value),
        Err(why) => Err(stop(why, false)),
    }
}

/// Takes the size of `value` out of the budget.
fn within(
    value: &Value,
    budget_bytes: &mut usize,
    visits: &mut usize,
    depth: usize,
) -> Result<(), &'static str> {
    if depth > MAX_DEPTH {
        return Err("the template nests a value more than 160 deep");
    }
    *visits = visits.checked_sub(1).ok_or("the template handles too many values")?;
    let size = value.as_str().map_or(1, str::len);
    *budget_bytes = budget_bytes.checked_sub(size).ok_or("the template keeps a value of more than 32 MiB")?;
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let mut items = value.try_iter().into_iter().flatten();
            items.try_for_each(|item| within(&item, budget_bytes, visits, depth + 1))
        }
        ValueKind::Map => {
            let mut keys = value.try_iter().into_iter().flatten();
            keys.try_for_each(|key| {
                let item = value.get_item(&key).unwrap_or_default();
                within(&key, budget_bytes, visits, depth + 1)?;
                within(&item, budget_bytes, visits, depth + 1)
            })
        }
        _ => Ok(()),
    }
}

fn raise_exception(text: String) -> Result<Value, Error> {
    Err(stop(text, true))
}

/// What the user is told of an engine error: kind, detail, line.
fn describe(error: &Error) -> String {
    let mut text = error.kind().to_string();
    if let Some(detail) = error.detail() {
        text.push_str(": ");
        text.push_str(detail);
    }
    if let Some(line) = error.line() {
        text.push_str(&format!(" (line {line})"));
    }
    text
}

fn failure(error: &Error) -> TemplateError {
    let mut at: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut deepest = error;
    while let Some(cause) = at {
        if let Some(stop) = cause.downcast_ref::<Stop>() {
            let text = stop.text.clone();
            return if stop.raised { TemplateError::Raised(text) } else { TemplateError::Limit(text) };
        }
        if let Some(engine) = cause.downcast_ref::<Error>() {
            if engine.kind() == ErrorKind::OutOfFuel {
                return TemplateError::Limit(format!("the template takes more than {FUEL} steps"));
            }
            deepest = engine;
        }
        at = cause.source();
    }
    TemplateError::Render(describe(deepest))
}

/// `strftime_now(format)`: the time now, in UTC.
fn strftime_now(args: &[Value]) -> Result<String, Error> {
    let (format,): (&str,) = from_args(args)?;
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Ok(strftime(format, seconds))
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Python's `strftime` in the C locale, for the directives templates use; others stay as they stand.
fn strftime(format: &str, unix_seconds: u64) -> String {
    let (days, second) = (unix_seconds / 86_400, unix_seconds % 86_400);
    // Civil date from days, after Howard Hinnant, "chrono-compatible low-level date algorithms".
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize - 1];
    let of_year = before + day + u64::from(leap && month > 2);
    let (hour, minute, weekday) = (second / 3600, second / 60 % 60, (days + 4) % 7);
    let half_hour = if hour % 12 == 0 { 12 } else { hour % 12 };

    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = rest.next();
        let unpadded = directive == Some('-');
        let directive = if unpadded { rest.next() } else { directive };
        let number = |value: u64, width: usize| {
            if unpadded { value.to_string() } else { format!("{value:0width$}") }
        };
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('B') => MONTHS[month as usize - 1].to_owned(),
            Some('b' | 'h') => MONTHS[month as usize - 1][..3].to_owned(),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(of_year, 3),
            Some('A') => DAYS[weekday as usize].to_owned(),
            Some('a') => DAYS[weekday as usize][..3].to_owned(),
            Some('w') => weekday.to_string(),
            Some('H') => number(hour, 2),
            Some('I') => number(half_hour, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second % 60, 2),
            Some('p') => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{}{other}", if unpadded { "-" } else { "" }),
            None => "%".to_owned(),
        };
        out.push_str(&text);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(
            strftime("%d %b %Y, %A %-d %j %H:%M:%S", 1_709_164_800),
            "29 Feb 2024, Thursday 29 060 00:00:00"
        );
        assert_eq!(strftime("%Y-%m-%d %I %p %y%%", 1_735_689_599), "2024-12-31 11 PM 24%");
        assert_eq!(strftime("%F %q %", 0), "1970-01-01 %q %");
    }
}
