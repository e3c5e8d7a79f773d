//! Builds the mock driver from the kernels' sources with the machine's C++ compiler. Objects are kept by the hash
//! of what they are made from, so that a test run compiles what has changed and a mutation recompiles one file.

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Begins the message of a build that failed: no other failure may be taken for a caught fault.
pub const FAILED: &str = "the mock driver does not compile";

/// What is built beside the sources as they are.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Macros that plant faults.
    pub defines: Vec<String>,
    /// With the address sanitizer.
    pub sanitize: bool,
}

/// A folder with the mock driver as `libcuda.so.1` and `libcuda.so`; or why this machine cannot build it.
///
/// Loaders look for either name. The second is an empty library that needs the first, because a library has one
/// name by which the system's loader knows it again.
pub fn library_folder(options: &Options) -> Result<PathBuf, String> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err("the emulator is written for x86-64 Linux".into());
    }
    let compiler = Compiler::find(options)?;
    let cuda = sources_folder();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mock-cuda");
    fs::create_dir_all(&cache).unwrap();
    // Test binaries run at the same time: one builds, the others wait and find it built.
    let lock = File::create(cache.join("lock")).unwrap();
    lock.lock().unwrap();

    let headers = read_all(&cuda, &["h", "cuh"]);
    let sources = read_all(&cuda, &["cu", "cpp"]);
    let objects: Vec<Object> =
        sources.iter().map(|(path, text)| compiler.object(path, text, &headers, options, &cache)).collect();
    let folder = cache.join(hash(&objects.iter().map(|object| &object.path).collect::<Vec<_>>()));
    if !folder.join("libcuda.so").exists() {
        let missing = objects.iter().filter(|object| !object.path.exists());
        let queue = Mutex::new(missing.collect::<Vec<_>>());
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while let Some(object) = { queue.lock().unwrap().pop() } {
                        compiler.compile(object, &cuda);
                    }
                });
            }
        });
        compiler.link(&objects, &folder);
    }
    Ok(folder)
}

/// `kernels/cuda`, from whichever crate of the workspace includes this module.
fn sources_folder() -> PathBuf {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let candidates =
        crate_folder.ancestors().flat_map(|folder| [folder.join("cuda"), folder.join("kernels/cuda")]);
    candidates.into_iter().find(|folder| folder.join("emulator/driver.cpp").exists()).expect("kernels/cuda")
}

/// Files of `folder` and its emulator with one of the extensions, in the order of their names, and their text.
fn read_all(folder: &Path, extensions: &[&str]) -> Vec<(PathBuf, String)> {
    let folders = [folder.to_owned(), folder.join("emulator")];
    let entries = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap());
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| extensions.iter().any(|extension| path.extension().is_some_and(|e| e == *extension)));
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read_to_string(&path).unwrap())).collect()
}

/// The texts of what `text` includes of `headers`, and what these include in turn.
fn included<'a>(text: &'a str, headers: &'a [(PathBuf, String)]) -> Vec<&'a str> {
    let mut found: Vec<&(PathBuf, String)> = Vec::new();
    let mut texts = vec![text];
    while let Some(text) = texts.pop() {
        let names =
            text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'));
        for name in names {
            let header = headers.iter().find(|(path, _)| path.ends_with(name)).expect(name);
            if !found.contains(&header) {
                found.push(header);
                texts.push(&header.1);
            }
        }
    }
    found.sort();
    found.into_iter().map(|(_, text)| text.as_str()).collect()
}

fn hash(what: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// A kernel file as it is compiled. All kernels become one library, and helpers of two files may share a name: in a
/// namespace without one they stay their file's own. What they include is everybody's and stands before it, with
/// the macros that say how it is read.
fn wrapped(source: &Path, text: &str) -> String {
    let last = text.lines().enumerate().filter(|(_, line)| line.starts_with("#include")).last();
    let head = text.lines().take(last.map_or(0, |(index, _)| index + 1)).filter(|line| line.starts_with('#'));
    let head: String = head.flat_map(|line| [line, "\n"]).collect();
    format!("{head}namespace {{\n#include {source:?}\n}}\n")
}

struct Compiler {
    command: String,
    /// What it calls itself: objects of another version are not mixed in.
    version: String,
    flags: Vec<String>,
}

struct Object {
    path: PathBuf,
    source: PathBuf,
    defines: Vec<String>,
}

impl Compiler {
    fn find(options: &Options) -> Result<Self, String> {
        let command = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let version = match Command::new(&command).arg("--version").output() {
            Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
            _ => return Err(format!("there is no C++ compiler `{command}`")),
        };
        // Contraction would round sums of products in other places than the kernels say.
        let flags = "-std=c++17 -fPIC -pthread -fvisibility=hidden -ffp-contract=off";
        let mut flags: Vec<String> = flags.split(' ').map(String::from).collect();
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            flags.extend(["-mavx2".into(), "-mfma".into()]);
        }
        if options.sanitize {
            // What it adds takes a compiler twice as long at the next level, and gains little there.
            flags.extend(["-O1".into(), "-fsanitize=address".into(), "-g1".into()]);
        } else {
            flags.push("-O2".into());
        }
        Ok(Self { command, version, flags })
    }

    fn object(
        &self,
        source: &Path,
        text: &str,
        headers: &[(PathBuf, String)],
        options: &Options,
        cache: &Path,
    ) -> Object {
        let headers = included(text, headers);
        // Files that do not know a macro are the same with it.
        let knows = |define: &&String| {
            text.contains(define.as_str()) || headers.iter().any(|header| header.contains(define.as_str()))
        };
        let defines: Vec<String> = options.defines.iter().filter(knows).cloned().collect();
        let wrapped = wrapped(source, text);
        let made_from = hash(&(&self.command, &self.version, &self.flags, &defines, headers, text, wrapped));
        let name = source.file_stem().unwrap().to_str().unwrap();
        Object { path: cache.join(format!("{name}-{made_from}.o")), source: source.to_owned(), defines }
    }

    fn compile(&self, object: &Object, include: &Path) {
        let defines = object.defines.iter().map(|define| format!("-D{define}"));
        let mut command = Command::new(&self.command);
        command.args(&self.flags).args(defines).arg("-I").arg(include);
        if object.source.extension().is_some_and(|extension| extension == "cu") {
            let text = fs::read_to_string(&object.source).unwrap();
            let wrapper = object.path.with_extension("cpp");
            fs::write(&wrapper, wrapped(&object.source, &text)).unwrap();
            command.arg("-c").arg(&wrapper);
        } else {
            command.arg("-c").arg(&object.source);
        }
        self.run(&mut command, &object.path);
    }

    fn link(&self, objects: &[Object], folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        let driver = folder.join("libcuda.so.1");
        let mut command = Command::new(&self.command);
        command.args(&self.flags).args(["-shared", "-Wl,-soname,libcuda.so.1"]);
        self.run(command.args(objects.iter().map(|object| &object.path)), &driver);
        let mut command = Command::new(&self.command);
        command.args(&self.flags).args(["-shared", "-Wl,-soname,libcuda.so", "-Wl,--no-as-needed"]);
        self.run(command.arg(&driver), &folder.join("libcuda.so"));
    }

    /// Runs the command; what it makes appears under its name when it is whole.
    fn run(&self, command: &mut Command, makes: &Path) {
        let unfinished = makes.with_extension("unfinished");
        // The sanitizer stands before this process's libraries; the compiler would be slow with it.
        let output = command.env_remove("LD_PRELOAD").arg("-o").arg(&unfinished).output().unwrap();
        let messages = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{FAILED}: {command:?}\n{messages}");
        fs::rename(&unfinished, makes).unwrap();
    }
}
