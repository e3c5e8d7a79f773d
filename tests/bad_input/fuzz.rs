//! The fuzz targets on mutated seeds: the same inputs every time, so that a failure can be looked at.

use std::time::{Duration, Instant};

#[path = "../../fuzz/src/lib.rs"]
mod targets;

/// Seeds and what may be spliced into them.
const WORDS: &[&str] = &[
    "null",
    "true",
    "-1",
    "0",
    "1",
    "2147483648",
    "9223372036854775808",
    "18446744073709551616",
    "1e300",
    "1e-300",
    "\"\"",
    "[]",
    "{}",
    "[",
    "{",
    "}",
    "]",
    "\"",
    "\\u0000",
    "\\ud800",
    "NaN",
    ",",
    ":",
    "../",
    "re:(a*)*",
    "{{",
    "}}",
    "{%",
    "%}",
    "{% for x in messages %}",
    "range(99999)",
    "\u{fdd0}",
    "🦀",
    "<|im_end|>",
];

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        let at = self.below(bytes.len() + 1);
        let end = (at + self.below(16)).min(bytes.len());
        match self.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            1 if at < bytes.len() => bytes[at] = self.below(256) as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let again = bytes[at..end].repeat(1 + self.below(40));
                bytes.splice(at..at, again);
            }
            5 => {
                let from = self.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            6 if bytes.get(at..).is_some_and(|rest| rest.iter().any(u8::is_ascii_digit)) => {
                // Another number in the place of one.
                let first = at + bytes[at..].iter().position(u8::is_ascii_digit).unwrap_or(0);
                let digits = bytes[first..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                bytes.splice(first..first + digits, WORDS[self.below(11)].bytes());
            }
            _ => drop(bytes.splice(at..end, WORDS[self.below(WORDS.len())].bytes())),
        }
    }
}

/// Runs a target on its seeds and on mutations of them, for so many inputs or until the time is up.
fn feed(name: &str, inputs: usize) {
    let (_, run, seeds) = *targets::TARGETS.iter().find(|target| target.0 == name).expect("a target");
    let seeds = seeds();
    seeds.iter().for_each(|seed| run(seed));
    let mut random = Random(0x5eed);
    let begun = Instant::now();
    let mut slowest = Duration::ZERO;
    let mut done = 0;
    while done < inputs && begun.elapsed() < Duration::from_secs(4) {
        let mut input = seeds[random.below(seeds.len())].clone();
        for _ in 0..1 + random.below(4) {
            let other = random.below(seeds.len());
            random.mutate(&mut input, &seeds[other]);
        }
        let before = Instant::now();
        let shown = Shown(name, &input);
        run(&input);
        std::mem::forget(shown);
        slowest = slowest.max(before.elapsed());
        done += 1;
    }
    println!("{name}: {done} inputs in {:.1} s, the slowest {slowest:?}", begun.elapsed().as_secs_f64());
    assert!(slowest < Duration::from_secs(10), "{name}: an input takes {slowest:?}");
}

/// Shows the input when the target panics.
struct Shown<'a>(&'a str, &'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        println!("{} on {}", self.0, self.1.escape_ascii());
    }
}

#[test]
fn safetensors_header() {
    feed("safetensors_header", 20_000);
}

#[test]
fn index_and_config() {
    feed("index_and_config", 1_500);
}

#[test]
fn tokenizer_files() {
    feed("tokenizer_files", 300);
}

#[test]
fn chat_template() {
    feed("chat_template", 2_000);
}

#[cfg(feature = "server")]
#[test]
fn http_body() {
    feed("http_body", 3_000);
}
