//! Tests that run again in a process of their own, with another build of the mock: a process loads one driver.

use std::collections::BTreeSet;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::compile::{self, Options};

const DEFINE: &str = "MOEBIUS_MOCK_DEFINE";
const SANITIZE: &str = "MOEBIUS_MOCK_SANITIZE";
/// Far more than any test takes, and all tests of a binary.
const PATIENCE: Duration = Duration::from_secs(1800);
/// Begins the lines by which a child says what it ran.
const RAN: &str = "the mock ran ";

/// What this process was asked to build.
pub fn options() -> Options {
    let defines = std::env::var(DEFINE).unwrap_or_default();
    let defines = defines.split(',').filter(|define| !define.is_empty()).map(String::from).collect();
    Options { defines, sanitize: is_sanitized() }
}

/// Whether this process is such a run: it does not start others.
pub fn is_child() -> bool {
    std::env::var_os(DEFINE).is_some() || is_sanitized()
}

/// All of `items`, but every `step`-th in a run with the address sanitizer, which takes several times as long and has
/// to see each kernel and the edges, not each shape.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn thinned<I: IntoIterator>(items: I, step: usize) -> std::iter::StepBy<I::IntoIter> {
    items.into_iter().step_by(if is_sanitized() { step } else { 1 })
}

/// Whether this process is a run with the address sanitizer.
pub fn is_sanitized() -> bool {
    std::env::var_os(SANITIZE).is_some()
}

/// Tells the process that started this one which kernels a test has run.
pub fn report(ran: &[String]) {
    if is_child() {
        ran.iter().for_each(|kernel| println!("{RAN}{kernel}"));
    }
}

struct Outcome {
    success: bool,
    output: String,
}

/// Runs tests of this binary again: those that `filter`, arguments of the test runner, chooses.
fn run(filter: &[&str], environment: &[(&str, String)]) -> Outcome {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(filter).args(["--nocapture", "--test-threads=1"]);
    command.envs(environment.iter().map(|(key, value)| (key, value)));
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).unwrap();
        text
    });
    let watch = std::thread::spawn(move || {
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return Some(status);
            }
            if start.elapsed() > PATIENCE {
                child.kill().unwrap();
                child.wait().unwrap();
                return None;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut text = Vec::new();
    stdout.read_to_end(&mut text).unwrap();
    text.extend(reader.join().unwrap());
    let output = String::from_utf8_lossy(&text).into_owned();
    let status = watch.join().unwrap().unwrap_or_else(|| panic!("{filter:?} did not end:\n{output}"));
    assert!(!output.contains(compile::FAILED), "{output}");
    assert!(!output.contains("running 0 tests"), "there is no test {filter:?}");
    Outcome { success: status.success(), output }
}

/// Runs the test of the full name `test` with the fault planted by the macro `define`, and panics if it passes.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn assert_caught(define: &str, test: &str) {
    if !can_rerun() {
        return;
    }
    let outcome = run(&[test, "--exact"], &[(DEFINE, define.into())]);
    assert!(!outcome.success, "{test} does not see {define}:\n{}", outcome.output);
    // A signal would also do: what is out of bounds may end a process.
    println!("{test} sees {define}");
}

/// Runs the test with a macro defined, and panics unless it fails with `words` in what it prints.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn assert_ends(define: &str, test: &str, words: &str) {
    if !can_rerun() {
        return;
    }
    let outcome = run(&[test, "--exact"], &[(DEFINE, define.into())]);
    assert!(!outcome.success && outcome.output.contains(words), "{test} with {define}:\n{}", outcome.output);
}

/// As [`assert_caught`], by the address sanitizer.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn assert_caught_sanitized(define: &str, test: &str) {
    let Some(mut environment) = sanitized() else { return };
    environment.push((DEFINE, define.into()));
    let outcome = run(&[test, "--exact"], &environment);
    let caught = !outcome.success && outcome.output.contains("ERROR: AddressSanitizer");
    assert!(caught, "the sanitizer does not see {define} in {test}:\n{}", outcome.output);
}

/// Runs all tests whose names contain `filter` with the address sanitizer in the mock and its kernels.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn rerun_sanitized(filter: &str) {
    let Some(environment) = sanitized() else { return };
    let outcome = run(&[filter], &environment);
    assert!(outcome.success, "under the address sanitizer:\n{}", outcome.output);
}

/// The same with all tests of this binary but those of the full names `without`. Gives back what they ran, as
/// [`super::Control::take_ran`] does; None where nothing can be run again.
#[allow(dead_code, reason = "not every test crate uses it")]
pub fn rerun_all_sanitized(without: &[&str]) -> Option<BTreeSet<String>> {
    let environment = sanitized()?;
    let mut filter = vec!["--exact"];
    filter.extend(without.iter().flat_map(|test| ["--skip", test]));
    let Outcome { success, output } = run(&filter, &environment);
    assert!(success, "under the address sanitizer:\n{output}");
    // The first line of a test comes after its name.
    let ran = output.lines().filter_map(|line| Some(line.split_once(RAN)?.1.to_owned()));
    Some(ran.collect())
}

fn can_rerun() -> bool {
    if super::on_real_device() || is_child() {
        return false;
    }
    match super::Control::load() {
        Ok(_) => true,
        Err(reason) => {
            super::skip(&reason);
            false
        }
    }
}

fn sanitized() -> Option<Vec<(&'static str, String)>> {
    if !can_rerun() {
        return None;
    }
    // The program is not built with the sanitizer, so its library has to come first.
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let output = Command::new(compiler).arg("-print-file-name=libasan.so").output().unwrap();
    let library = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !library.contains('/') {
        super::skip("the compiler has no address sanitizer");
        return None;
    }
    // The stacks of fibers are not the sanitizer's to move, and a test binary leaks by design.
    let settings = "detect_leaks=0:detect_stack_use_after_return=0";
    Some(vec![(SANITIZE, "1".into()), ("LD_PRELOAD", library), ("ASAN_OPTIONS", settings.into())])
}
