//! One measured row: the form that every benchmark prints (JSON, table, CSV).

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::ceilings::Bound;
use crate::machine::Machine;

/// What a row's model column says where there is no model.
pub const NO_MODEL: &str = "-";

/// Seconds of some runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// The middle one; of an even number the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// How many.
    pub runs: usize,
}

impl Times {
    /// Of at least one run.
    ///
    /// # Panics
    /// If there is none.
    pub fn of(seconds: &[f64]) -> Self {
        let (min, max) = seconds.iter().fold((f64::INFINITY, 0.0f64), |(a, b), &s| (a.min(s), b.max(s)));
        Self { median: median(seconds.iter().copied()), min, max, runs: seconds.len() }
    }
}

/// The median; of an even number of values the mean of the two in the middle.
///
/// # Panics
/// If there is no value.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    assert!(!values.is_empty(), "the median of nothing");
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 }
}

/// The ceiling that binds a row, as measured beside it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// Which one.
    pub bound: Bound,
    /// Bytes or operations per second.
    pub value: f64,
    /// Least possible over measured time; the median over runs.
    pub share: f64,
}

/// What all rows of one command have in common.
#[derive(Clone, Debug)]
pub struct Setting {
    /// How exact; `reference` or `model`.
    pub numerics: String,
    /// Which implementation.
    pub runner: &'static str,
    /// Threads.
    pub threads: usize,
    /// As the user named it, or [`NO_MODEL`].
    pub model: String,
}

/// One measured row.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was measured, e.g. `decode/routed_experts`.
    pub name: String,
    /// Seconds of one call.
    pub times: Times,
    /// Bytes that one call must read.
    pub bytes: u64,
    /// Operations of one call; a multiply-add counts as two.
    pub operations: u64,
    /// The ceiling, where one applies.
    pub share: Option<Share>,
    /// Tokens per second, where it applies.
    pub tokens_per_second: Option<f64>,
    /// With what.
    pub setting: Setting,
    /// Further keys of the JSON object; `notes` of the CSV.
    pub more: Map<String, Value>,
}

/// The keys of every JSON row and the columns of the CSV, which adds `notes`.
pub const KEYS: [&str; 15] = [
    "name",
    "seconds_median",
    "seconds_min",
    "seconds_max",
    "runs",
    "bytes",
    "operations",
    "ceiling",
    "ceiling_value",
    "share_of_ceiling",
    "tokens_per_second",
    "numerics",
    "runner",
    "threads",
    "model",
];

impl Row {
    /// A row without a rate of tokens or further keys.
    pub fn new(
        name: impl Into<String>,
        times: Times,
        (bytes, operations): (u64, u64),
        share: Option<Share>,
        setting: &Setting,
    ) -> Self {
        Self {
            name: name.into(),
            times,
            bytes,
            operations,
            share,
            tokens_per_second: None,
            setting: setting.clone(),
            more: Map::new(),
        }
    }

    /// With one more key.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        let value = value.into();
        let value = if value.is_f64() { number(value.as_f64().unwrap_or(f64::NAN)) } else { value };
        self.more.insert(key.to_owned(), value);
        self
    }

    /// The values of [`KEYS`].
    fn values(&self) -> [Value; 15] {
        let Setting { numerics, runner, threads, model } = &self.setting;
        [
            json!(self.name),
            number(self.times.median),
            number(self.times.min),
            number(self.times.max),
            json!(self.times.runs),
            json!(self.bytes),
            json!(self.operations),
            json!(self.share.map(|share| share.bound.as_str())),
            self.share.map_or(Value::Null, |share| number(share.value)),
            self.share.map_or(Value::Null, |share| number(share.share)),
            self.tokens_per_second.map_or(Value::Null, number),
            json!(numerics),
            json!(runner),
            json!(threads),
            json!(model),
        ]
    }

    /// One JSON object: [`KEYS`], then what is in `more`.
    pub fn json(&self) -> Value {
        let pairs = KEYS.iter().map(|key| (*key).to_owned()).zip(self.values());
        Value::Object(pairs.chain(self.more.clone()).collect())
    }

    /// One line of the table whose head is [`table_head`].
    pub fn line(&self) -> String {
        let Times { median, min, max, runs } = self.times;
        let rate = |count: u64| if count == 0 { "-".into() } else { si(count as f64 / median) };
        let mut line = format!(
            "{:<34} {:>9} {:>9} {:>9} {runs:>4} {:>8} {:>8}",
            self.name,
            seconds(median),
            seconds(min),
            seconds(max),
            rate(self.bytes),
            rate(self.operations)
        );
        let _ = match self.share {
            Some(Share { bound, value, share }) => {
                write!(line, " {:>14} {:>8} {:>6.1} %", bound.as_str(), si(value), 100.0 * share)
            }
            None => write!(line, " {:>14} {:>8} {:>8}", "-", "-", "-"),
        };
        let _ = match self.tokens_per_second {
            Some(rate) => write!(line, " {rate:>9.2}"),
            None => write!(line, " {:>9}", "-"),
        };
        for (key, value) in &self.more {
            let _ = match value.as_f64().filter(|_| !value.is_i64() && !value.is_u64()) {
                Some(number) if number == 0.0 || (1e-3..1e6).contains(&number.abs()) => {
                    write!(line, "  {key} {number:.4}")
                }
                Some(number) => write!(line, "  {key} {number:.3e}"),
                None => write!(line, "  {key} {value}"),
            };
        }
        line
    }

    fn csv(&self) -> String {
        let mut fields: Vec<String> = self.values().iter().map(plain).collect();
        let notes: Vec<String> =
            self.more.iter().map(|(key, value)| format!("{key}={}", plain(value))).collect();
        fields.push(notes.join(" "));
        fields.iter().map(|field| quoted(field)).collect::<Vec<_>>().join(",")
    }
}

/// The head of the table.
pub fn table_head() -> String {
    format!(
        "{:<34} {:>9} {:>9} {:>9} {:>4} {:>8} {:>8} {:>14} {:>8} {:>8} {:>9}",
        "name", "median", "min", "max", "runs", "bytes/s", "ops/s", "ceiling", "per s", "share", "tokens/s"
    )
}

/// Appends rows to a CSV file: a head if the file is new, then, if there are rows, a comment line about
/// the machine and the rows.
///
/// # Errors
/// If the file cannot be written.
pub fn append_csv(path: &Path, machine: &Machine, rows: &[Row]) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    let mut text = String::new();
    if file.metadata()?.len() == 0 {
        let _ = writeln!(text, "{},notes", KEYS.join(","));
    }
    if !rows.is_empty() {
        let _ = writeln!(text, "# {}", machine.line());
    }
    for row in rows {
        let _ = writeln!(text, "{}", row.csv());
    }
    file.write_all(text.as_bytes())
}

/// Six digits: more than any clock here gives.
fn number(value: f64) -> Value {
    format!("{value:.5e}").parse::<f64>().map_or(Value::Null, Value::from)
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn quoted(field: &str) -> String {
    if field.contains(['"', ',', '\n']) {
        return format!("\"{}\"", field.replace('"', "\"\""));
    }
    field.to_owned()
}

/// A time for people.
fn seconds(value: f64) -> String {
    match value {
        _ if value >= 1.0 => format!("{value:.3} s"),
        _ if value >= 1e-3 => format!("{:.3} ms", value * 1e3),
        _ => format!("{:.3} us", value * 1e6),
    }
}

/// A rate for people.
fn si(value: f64) -> String {
    match value {
        _ if value >= 1e12 => format!("{:.2} T", value / 1e12),
        _ if value >= 1e9 => format!("{:.2} G", value / 1e9),
        _ if value >= 1e6 => format!("{:.2} M", value / 1e6),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_take_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(Times::of(&[2.0, 1.0]), Times { median: 1.5, min: 1.0, max: 2.0, runs: 2 });
    }

    #[test]
    fn fields_with_commas_are_quoted() {
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
        assert_eq!(quoted("plain"), "plain");
    }
}
