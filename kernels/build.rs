//! Embeds the compiled CUDA kernels. Needs no CUDA: the PTX is committed, and this only checks that it was
//! compiled from the sources beside it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};

/// Set to 1 while kernels are being written: stale PTX is a warning then.
const STALE: &str = "MOEBIUS_CUDA_STALE";
/// The PTX that runs everywhere.
const GENERAL: &str = "80";

fn main() {
    let folder = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("cuda");
    println!("cargo::rerun-if-env-changed={STALE}");
    // The sources are named below, one by one: the emulator lies beside them. A new one comes with a new module.
    let module = folder.with_file_name("src").join("cuda.rs");
    for watched in [module, folder.join("ptx"), folder.join("build")] {
        if watched.exists() {
            println!("cargo::rerun-if-changed={}", watched.display());
        }
    }
    let mut names: Vec<String> =
        list(&folder).into_iter().filter_map(|name| name.strip_suffix(".cu").map(str::to_owned)).collect();
    names.sort();
    let manifest = fs::read_to_string(folder.join("ptx/manifest.json")).unwrap_or_default();
    let machine_code = fs::read_to_string(folder.join("build/manifest.json")).unwrap_or_default();
    let out = PathBuf::from(std::env::var("OUT_DIR").unwrap());
    let mut stale = Vec::new();
    let mut files = String::new();
    let mut sources = String::new();
    for name in &names {
        let source = read(&folder, &format!("{name}.cu"));
        let hash = source_hash(&folder, name);
        let known = entry(&format!("{name}.cu"), &hash);
        if !manifest.contains(&known) {
            stale.push(format!("{name}.cu"));
        }
        let code = folder.join(format!("build/kernels-{name}.fatbin"));
        let code = if machine_code.contains(&known) && code.exists() {
            format!("Some(include_bytes!({code:?}))")
        } else {
            "None".into()
        };
        writeln!(files, "File {{\nname: {name:?},\nmachine_code: {code},\nptx: &[").unwrap();
        for architecture in [GENERAL].into_iter().chain(own_architectures(&source)) {
            let file = format!("{name}.compute_{architecture}.ptx.gz");
            let committed = folder.join("ptx").join(&file);
            let text = decompress(&committed);
            if !manifest.contains(&entry(&file, &hex(Sha256::digest(&text).as_slice()))) {
                stale.push(file.clone());
            }
            let embedded = match placeholder(&source, &text, architecture) {
                Some(text) => {
                    let path = out.join(&file);
                    fs::write(&path, compress(&text)).unwrap();
                    path
                }
                None => committed,
            };
            writeln!(files, "({architecture:?}, include_bytes!({embedded:?})),").unwrap();
        }
        files += "] },\n";
        writeln!(sources, "({name:?}, {hash:?}),").unwrap();
    }
    let table = format!(
        "static FILES: &[File] = &[\n{files}];\n\
         #[cfg(test)]\nstatic SOURCES: Option<&[(&str, &str)]> = {};\n",
        if stale.is_empty() { format!("Some(&[\n{sources}])") } else { "None".into() }
    );
    fs::write(out.join("cuda_images.rs"), table).unwrap();
    report(&stale);
}

/// In the middle of an edit, where a kernel was never compiled: text in which the driver of an emulated device
/// finds its name. A real device would stop at once.
fn placeholder(source: &str, ptx: &str, architecture: &str) -> Option<String> {
    let names = source.lines().filter_map(|line| line.strip_prefix("EXPORT(")?.split(')').next());
    let names: Vec<&str> = names.collect();
    if names.iter().all(|name| ptx.contains(&format!(".entry {name}("))) {
        return None;
    }
    let head = format!(".version 8.7\n.target sm_{architecture}\n.address_size 64\n");
    let entries = names.iter().map(|name| format!(".visible .entry {name}()\n{{\ntrap;\n}}\n"));
    Some(entries.fold(head, |text, entry| text + &entry))
}

/// The text of a compressed file; empty, which no hash is, where there is none.
fn decompress(path: &Path) -> String {
    let mut text = String::new();
    match fs::File::open(path).and_then(|file| GzDecoder::new(file).read_to_string(&mut text)) {
        Ok(_) => text,
        Err(_) => String::new(),
    }
}

fn compress(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text.as_bytes()).and_then(|()| encoder.finish()).unwrap()
}

fn report(stale: &[String]) {
    if stale.is_empty() {
        return;
    }
    let advice = "run python3 kernels/cuda/compile.py ptx";
    let text =
        format!("not what kernels/cuda/ptx/manifest.json was made for: {}; {advice}", stale.join(", "));
    if std::env::var(STALE).is_ok_and(|value| value == "1") {
        println!("cargo::warning={text}");
    } else {
        println!("cargo::error={text}, or set {STALE}=1 in the middle of an edit");
    }
}

fn list(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// How the manifest says that a file has this hash.
fn entry(file: &str, hash: &str) -> String {
    format!("\"{file}\": \"{hash}\"")
}

fn own_architectures(source: &str) -> impl Iterator<Item = &str> {
    source.lines().find_map(|line| line.strip_prefix("// architectures: ")).unwrap_or("").split_whitespace()
}

/// SHA-256 of a .cu file and the .cuh files it includes, each with its name and length (as compile.py).
fn source_hash(folder: &Path, name: &str) -> String {
    let first = format!("{name}.cu");
    let mut headers = BTreeMap::new();
    let text = read(folder, &first);
    collect(folder, &text, &mut headers);
    let mut hasher = Sha256::new();
    for (name, text) in std::iter::once((&first, &text)).chain(&headers) {
        println!("cargo::rerun-if-changed={}", folder.join(name).display());
        hasher.update(format!("{name}\n{}\n", text.len()));
        hasher.update(text);
    }
    hex(hasher.finalize().as_slice())
}

fn read(folder: &Path, name: &str) -> String {
    let path = folder.join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn collect(folder: &Path, text: &str, headers: &mut BTreeMap<String, String>) {
    for line in text.lines() {
        let Some(rest) = line.trim_start().strip_prefix('#') else { continue };
        let Some(rest) = rest.trim_start().strip_prefix("include") else { continue };
        let name = rest.split('"').nth(1).unwrap_or("");
        if name.ends_with(".cuh") && !headers.contains_key(name) {
            let text = read(folder, name);
            headers.insert(name.to_owned(), text.clone());
            collect(folder, &text, headers);
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
