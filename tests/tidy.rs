//! The house rules that a compiler does not check.

use std::path::{Path, PathBuf};

/// Files that may hold `unsafe`, each with a safety comment at every block.
const UNSAFE_ALLOWED: &[&str] = &[
    "bench/src/ceilings/instructions.rs",
    "kernels/src/cuda/",
    "kernels/src/simd/",
    "kernels/src/rows.rs",
    "kernels/src/team.rs",
    "kernels/tests/allocations.rs",
    "kernels/tests/cuda/",
    "kernels/tests/mock/",
    "kernels/tests/cuda_faults.rs",
    "models/src/checkpoint/mod.rs",
    "tests/allocations.rs",
];
const MAX_FILE_LINES: usize = 600;
const MAX_ARCHITECTURE_LINES: usize = 200;
const MAX_EXAMPLE_LINES: usize = 60;
const MAX_REPOSITORY_BYTES: u64 = 60_000_000;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Files below the top-level folders of the house, relative to the root.
fn files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for folder in ["engine", "kernels", "models", "bench", "examples", "tests", "fuzz", ".ci"] {
        walk(&root().join(folder), &mut files);
    }
    let mut files: Vec<PathBuf> =
        files.into_iter().map(|path| path.strip_prefix(root()).unwrap().to_owned()).collect();
    files.sort();
    files
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if matches!(name, "target" | "build" | "__pycache__" | "corpus" | "artifacts") {
            continue;
        }
        if path.is_dir() {
            walk(&path, files);
        } else {
            files.push(path);
        }
    }
}

fn sources() -> impl Iterator<Item = (String, String)> {
    let is_source = |path: &PathBuf| path.extension().is_some_and(|e| e == "rs" || e == "py" || e == "sh");
    files().into_iter().filter(is_source).map(|path| {
        let text = std::fs::read_to_string(root().join(&path)).unwrap();
        (path.to_str().unwrap().to_owned(), text)
    })
}

#[test]
fn files_stay_small() {
    for (path, text) in sources() {
        let limit = if path.starts_with("models/src/arch/") {
            MAX_ARCHITECTURE_LINES
        } else if path.starts_with("examples/") {
            MAX_EXAMPLE_LINES
        } else {
            MAX_FILE_LINES
        };
        let lines = text.lines().count();
        assert!(lines <= limit, "{path} has {lines} lines; the limit is {limit}");
    }
}

#[test]
fn files_say_what_they_own() {
    for (path, text) in sources().filter(|(path, _)| path.ends_with(".rs")) {
        let first = text.lines().find(|line| !line.starts_with("#!")).unwrap_or_default();
        assert!(first.starts_with("//!"), "{path} does not open with what it is for");
    }
}

#[test]
fn unsafe_stays_where_it_is_allowed() {
    let keyword = concat!("uns", "afe");
    for (path, text) in sources().filter(|(path, _)| path.ends_with(".rs")) {
        let allowed = UNSAFE_ALLOWED.iter().any(|prefix| path.starts_with(prefix));
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let used = [format!("{keyword} {{"), format!("{keyword} fn"), format!("{keyword} impl")];
            let used = used.iter().any(|form| code.contains(form.as_str()));
            assert!(allowed || !used, "{path}:{}: {keyword} outside the allow-list", number + 1);
        }
    }
}

#[test]
fn http_stays_in_the_server_and_the_hub() {
    for (path, text) in sources().filter(|(path, _)| path.starts_with("engine/")) {
        let uses =
            |name: &str| text.contains(&format!("use {name}::")) || text.contains(&format!("{name}::Router"));
        assert!(!uses("axum") && !uses("hyper") || path.starts_with("engine/server/"), "{path} speaks HTTP");
        assert!(!uses("ureq") || path.starts_with("engine/hub"), "{path} downloads");
    }
}

#[test]
fn dependencies_run_one_way() {
    let forbidden = [
        ("kernels/src/", &["models::", "bench::", "moebius::", "candle"][..]),
        ("models/src/", &["bench::", "moebius::"][..]),
        ("bench/src/", &["moebius::"][..]),
    ];
    for (path, text) in sources() {
        let rules = forbidden.iter().filter(|(prefix, _)| path.starts_with(prefix));
        for name in rules.flat_map(|(_, names)| names.iter()) {
            assert!(!text.contains(&format!("use {name}")), "{path} uses {name}");
        }
        let candle = path.starts_with("models/src/reference") || !path.starts_with("models/src/");
        assert!(candle || !text.contains("use candle"), "{path}: candle belongs to the reference runner");
    }
}

#[test]
fn the_repository_stays_small() {
    let bytes: u64 = files().iter().map(|path| root().join(path).metadata().unwrap().len()).sum();
    assert!(bytes < MAX_REPOSITORY_BYTES, "{bytes} bytes");
}

#[test]
fn the_lock_file_stays_lean() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    for banned in ["openssl-sys", "aws-lc-sys", "cmake", "protoc"] {
        assert!(!lock.contains(&format!("name = \"{banned}\"")), "{banned} in the lock file");
    }
}
