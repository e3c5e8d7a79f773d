//! Where a model's files are: a folder, a `.gguf` file, the built-in model, or a repository on the hub
//! that is downloaded once into the cache all hub tools share.
//!
//! Owns the meaning of the command line's MODEL, the choice of files, and the promise that a snapshot is
//! either whole or absent. Refuses to know what is in the files, except the one list of shards in a
//! checkpoint's index: it never reads weights, and nothing it downloads is executed or unpacked. Only
//! `config`, tokenizer, template and safetensors files are fetched; `.bin`, `.pt`, `.pkl` and `.py` never.
//!
//! Everything a server says is checked before it is used: file names before anything is written, shard
//! names before they become paths, lengths and checksums before a file gets its name. This is the only
//! code in Moebius that opens a connection outwards, and it does so only for a model that the user named
//! and that is not complete in the cache.
//!
//! The `hf-hub` crate gives the cache its layout. Its transfers are not used, because (0.5.0) they send
//! the token on to the host a file is redirected to, name files by whatever `ETag` a server sends, append
//! to a partial file even where the server ignored the range, and check neither length nor checksum.
//!
//! Map: `options` reads the environment, `cache` knows the folders, `client` speaks HTTP and keeps the
//! token at home, `transfer` brings one file, `describe` what a model is without its weights, `progress` tells the user.

mod cache;
mod client;
mod describe;
mod error;
mod options;
mod progress;
mod transfer;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};

pub use describe::{Described, describe};
pub use error::HubError;
pub use options::{HubOptions, Token};
pub use progress::{Bar, Lines, Progress, to_stderr};

use cache::Content;
use client::Client;
use transfer::Target;

/// Longest accepted organisation or model name.
const MAX_NAME_BYTES: usize = 96;
/// Longest accepted revision.
const MAX_REVISION_BYTES: usize = 255;
/// Longest accepted path of a remote file, of one part of it, and most parts.
const MAX_PATH_BYTES: usize = 1024;
const MAX_PART_BYTES: usize = 255;
const MAX_DEPTH: usize = 16;
/// Most weight files of one checkpoint; the largest published ones have a few hundred.
const MAX_SHARDS: usize = 4096;
/// Largest index, and largest of every other file that is not weights.
const MAX_SMALL_FILE_BYTES: u64 = 256 << 20;

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const TOKENIZERS: [&str; 2] = ["tokenizer.json", "tiktoken.model"];
/// Fetched where the repository has them.
const OPTIONAL: [&str; 7] = [
    "generation_config.json",
    "tokenizer.json",
    "tiktoken.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
];

/// What the MODEL of the command line names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelRef {
    /// The built-in model.
    Demo,
    /// A checkpoint folder that exists.
    Folder(PathBuf),
    /// A `.gguf` file that exists.
    Gguf(PathBuf),
    /// A repository on the hub.
    Hub {
        /// `org/name`.
        repo: String,
        /// Branch, tag or commit; `None` = `main`.
        revision: Option<String>,
    },
}

impl ModelRef {
    /// Reads MODEL: a path that exists, else `demo`, else `org/name[@revision]`.
    ///
    /// # Errors
    /// [`HubError::NotAModel`] says what was tried.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let refuse = |reason: String| Err(HubError::NotAModel { given: text.to_owned(), reason });
        let path = Path::new(text);
        let gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if path.exists() {
            return if gguf {
                Ok(Self::Gguf(path.to_owned()))
            } else {
                refuse("it is a file, but neither a checkpoint folder nor a .gguf file".into())
            };
        }
        if text == "demo" {
            return Ok(Self::Demo);
        }
        if gguf || path.is_absolute() || text.starts_with(['.', '~', '\\']) {
            return refuse("there is no such file or folder".into());
        }
        let (repo, revision) = match text.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (text, None),
        };
        let checked = check_repo(repo).and_then(|()| revision.map_or(Ok(()), check_revision));
        match checked {
            Ok(()) => Ok(Self::Hub { repo: repo.to_owned(), revision: revision.map(str::to_owned) }),
            Err(reason) => refuse(format!(
                "there is no such file or folder, it is not `demo`, and it is not org/name[@revision]: {reason}"
            )),
        }
    }
}

/// The folder with the checkpoint of `repo` (`org/name`) at `revision` (`None` = `main`): from the cache
/// if it is complete there, without asking anyone unless [`HubOptions::refresh`] says so, else downloaded.
///
/// A download that was interrupted, also by the end of the process, goes on where it stopped. Files
/// appear in the snapshot's folder only when all of them are complete and checked.
///
/// # Errors
/// [`HubError`]; what was downloaded so far is kept for the next attempt, unless it was wrong.
pub fn fetch(
    repo: &str,
    revision: Option<&str>,
    options: &HubOptions,
    progress: &mut dyn Progress,
) -> Result<PathBuf, HubError> {
    let (revision, cache) = place(repo, revision, options)?;
    let missing = match cache.folder() {
        None => "this revision was never downloaded".to_owned(),
        Some(folder) => match missing(&folder) {
            None if options.offline || !options.refresh => return Ok(folder),
            None => String::new(),
            Some(missing) => missing,
        },
    };
    let name = format!("{repo}@{revision}");
    if options.offline {
        return Err(HubError::Offline { repo: name, missing, cache: options.cache.clone() });
    }
    let client = Client::new(options)?;
    let listing = match client.list(repo, revision, |text| progress.note(text)) {
        Ok(listing) => listing,
        Err(error) => {
            // Complete in the cache: the question was only whether there is something newer.
            let complete = missing.is_empty().then(|| cache.folder()).flatten();
            let Some(folder) = complete else { return Err(error) };
            progress.note(&format!("{error}; using the copy in the cache"));
            return Ok(folder);
        }
    };
    Fetcher { client, cache, name, repo, listing, done: 0, total: 0, progress }.run()
}

/// The revision, and where the cache has it; both names checked.
fn place<'a>(
    repo: &str,
    revision: Option<&'a str>,
    options: &HubOptions,
) -> Result<(&'a str, cache::Repo), HubError> {
    let revision = revision.unwrap_or("main");
    check_repo(repo)
        .and_then(|()| check_revision(revision))
        .map_err(|reason| HubError::NotAModel { given: format!("{repo}@{revision}"), reason })?;
    Ok((revision, cache::Repo::new(&options.cache, repo, revision)))
}

/// A file of the listing: what is known of it before it is asked for.
#[derive(Clone, Debug)]
struct Remote {
    size: Option<u64>,
    content: Option<Content>,
}

/// A repository's files at one commit, all names checked.
#[derive(Debug)]
struct Listing {
    commit: String,
    files: BTreeMap<String, Remote>,
}

struct Fetcher<'a> {
    client: Client,
    cache: cache::Repo,
    /// `org/name@revision`, for messages.
    name: String,
    repo: &'a str,
    listing: Listing,
    /// Bytes of the files that are complete, and of all that are known to be needed.
    done: u64,
    total: u64,
    progress: &'a mut dyn Progress,
}

impl Fetcher<'_> {
    fn run(mut self) -> Result<PathBuf, HubError> {
        let indexed = self.has_index()?;
        let mut names = vec![CONFIG];
        names.extend(OPTIONAL.iter().filter(|&&name| self.listing.files.contains_key(name)));
        self.expect(names.iter().copied().chain(indexed.then_some(INDEX)));
        let mut links = Vec::new();
        for name in names {
            links.push((name.to_owned(), self.file(name)?));
        }
        if indexed {
            let index = self.file(INDEX)?;
            let shards = self.shards(&index)?;
            self.expect(shards.iter().map(String::as_str));
            for shard in shards {
                let content = self.file(&shard)?;
                links.push((shard, content));
            }
            // Last: a snapshot without its index is not taken for a complete one.
            links.push((INDEX.to_owned(), index));
        } else {
            self.expect([SINGLE].into_iter());
            links.push((SINGLE.to_owned(), self.file(SINGLE)?));
        }
        let folder = self.cache.show(&self.listing.commit, &links, self.progress)?;
        self.progress.finish();
        Ok(folder)
    }

    /// Brings one file of the listing into the cache; where it is there.
    fn path(&mut self, name: &str) -> Result<PathBuf, HubError> {
        let content = self.file(name)?;
        Ok(self.cache.path(&self.listing.commit, name, &content))
    }

    fn unusable(&self, reason: String) -> HubError {
        HubError::Unusable { repo: self.name.clone(), reason }
    }

    /// Whether the weights are named by an index or are one file.
    fn has_index(&self) -> Result<bool, HubError> {
        let files = &self.listing.files;
        let any = |endings: &[&str]| files.keys().any(|name| endings.iter().any(|end| name.ends_with(end)));
        if !files.contains_key(CONFIG) {
            let gguf =
                if any(&[".gguf"]) { "; download one of its .gguf files and name that file" } else { "" };
            return Err(self.unusable(format!("it has no {CONFIG}{gguf}")));
        }
        if !files.contains_key(INDEX) && !files.contains_key(SINGLE) {
            let pickled = if any(&[".bin", ".pt", ".pth", ".pkl"]) {
                "; its .bin or .pt files can execute code when they are read and are never downloaded"
            } else {
                ""
            };
            return Err(self.unusable(format!("it has neither {INDEX} nor {SINGLE}{pickled}")));
        }
        Ok(files.contains_key(INDEX))
    }

    /// Adds files to the total.
    fn expect<'n>(&mut self, names: impl Iterator<Item = &'n str>) {
        let files = &self.listing.files;
        self.total += names.filter_map(|name| files[name].size).sum::<u64>();
        self.progress.total(self.total);
    }

    /// Brings one file of the listing into the cache's blobs.
    fn file(&mut self, name: &str) -> Result<Content, HubError> {
        let commit = &self.listing.commit;
        let remote = &self.listing.files[name];
        let url = self.client.file_url(self.repo, commit, name);
        let (content, size) = match (remote.content.clone(), remote.size) {
            (Some(content), Some(size)) => (content, size),
            _ => {
                let (content, size) = self.client.probe(&url, name, |text| self.progress.note(text))?;
                self.total += if remote.size.is_none() { size } else { 0 };
                self.progress.total(self.total);
                (content, size)
            }
        };
        if size > MAX_SMALL_FILE_BYTES && !name.ends_with(".safetensors") {
            return Err(self.unusable(format!("{name} has {size} bytes, which no such file needs")));
        }
        if !self.cache.has(commit, name, &content, size) {
            self.progress.file(name, size);
            let _lock = self.cache.lock(&content, self.progress)?;
            // Another process may have brought it while this one waited.
            if !self.cache.has(commit, name, &content, size) {
                let partial = self.cache.partial(&content);
                let target = Target { url: &url, name, partial: &partial, size, check: &content.check };
                transfer::download(&self.client, &target, self.done, self.progress)?;
                self.cache.complete(&content)?;
            }
        }
        self.done += size;
        self.progress.position(self.done);
        Ok(content)
    }

    /// The shards the downloaded index names, all of them in the listing.
    fn shards(&self, index: &Content) -> Result<Vec<String>, HubError> {
        let path = self.cache.path(&self.listing.commit, INDEX, index);
        let shards = read_index(&path).map_err(|reason| self.unusable(reason))?;
        match shards.iter().find(|&shard| !self.listing.files.contains_key(shard)) {
            Some(shard) => {
                Err(self.unusable(format!("{INDEX} names {shard}, which the repository does not have")))
            }
            None => Ok(shards),
        }
    }
}

/// What a snapshot folder lacks for a run; `None` = nothing.
fn missing(folder: &Path) -> Option<String> {
    let absent = |name: &str| !folder.join(name).is_file();
    if absent(CONFIG) {
        return Some(format!("{CONFIG} is missing"));
    }
    if TOKENIZERS.iter().all(|name| absent(name)) {
        return Some(format!("{} are both missing", TOKENIZERS.join(" and ")));
    }
    if !absent(INDEX) {
        return match read_index(&folder.join(INDEX)) {
            Err(reason) => Some(reason),
            Ok(shards) => {
                let missing: Vec<&String> = shards.iter().filter(|shard| absent(shard)).collect();
                missing.first().map(|first| {
                    format!("{} of {} weight files are missing, such as {first}", missing.len(), shards.len())
                })
            }
        };
    }
    absent(SINGLE).then(|| format!("{INDEX} and {SINGLE} are both missing"))
}

/// The names of the shards in an index, checked; the tensors' names are passed over.
fn read_index(path: &Path) -> Result<Vec<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Shards,
    }
    struct Shards(BTreeSet<String>);
    impl<'de> Deserialize<'de> for Shards {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Values;
            impl<'de> Visitor<'de> for Values {
                type Value = Shards;

                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("tensor names with their file names")
                }

                fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shards, A::Error> {
                    let mut shards = BTreeSet::new();
                    while let Some((IgnoredAny, shard)) = map.next_entry::<IgnoredAny, String>()? {
                        if !shards.contains(&shard) {
                            check_shard(&shard).map_err(A::Error::custom)?;
                            shards.insert(shard);
                        }
                        if shards.len() > MAX_SHARDS {
                            return Err(A::Error::custom(format!("more than {MAX_SHARDS} weight files")));
                        }
                    }
                    Ok(Shards(shards))
                }
            }
            deserializer.deserialize_map(Values)
        }
    }

    let read = || -> Result<Index, String> {
        let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
        let bytes = file.metadata().map_err(|e| e.to_string())?.len();
        if bytes > MAX_SMALL_FILE_BYTES {
            return Err(format!("{bytes} bytes are more than an index needs"));
        }
        serde_json::from_reader(std::io::BufReader::new(file)).map_err(|e| e.to_string())
    };
    let shards = read().map_err(|reason| format!("{INDEX}: {reason}"))?.weight_map.0;
    if shards.is_empty() {
        return Err(format!("{INDEX} names no weight files"));
    }
    Ok(shards.into_iter().collect())
}

/// A shard's name is a plain file name in the checkpoint's own folder.
fn check_shard(name: &str) -> Result<(), String> {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if plain && name.ends_with(".safetensors") && !name.starts_with('.') && name.len() <= MAX_PART_BYTES {
        Ok(())
    } else {
        Err(format!("{name:?} is not the name of a .safetensors file in the same folder"))
    }
}

/// Refuses names that could leave the folder they belong to, on any system, decoded once or not at all.
///
/// Hidden files and folders pass: repositories have `.gitattributes`, and none is ever fetched.
fn check_remote_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > MAX_PATH_BYTES {
        return Err("its length");
    }
    if name.chars().any(|c| c.is_control() || c == '\\' || c == '%') {
        return Err("a control character, `\\` or `%`");
    }
    if name.split('/').count() > MAX_DEPTH {
        return Err("its depth");
    }
    for part in name.split('/') {
        let bytes = part.as_bytes();
        match part {
            "" => return Err("an empty part or a leading `/`"),
            "." | ".." => return Err("a `.` or `..` part"),
            _ if part.len() > MAX_PART_BYTES => return Err("the length of a part"),
            _ if bytes.get(1) == Some(&b':') && bytes[0].is_ascii_alphabetic() => {
                return Err("a drive letter");
            }
            _ => {}
        }
    }
    Ok(())
}

/// `org/name` as the hub allows it.
fn check_repo(repo: &str) -> Result<(), String> {
    let parts: Vec<&str> = repo.split('/').collect();
    if parts.len() != 2 {
        return Err("there must be exactly one `/`".into());
    }
    for part in parts {
        if part.is_empty() || part.len() > MAX_NAME_BYTES {
            return Err(format!("organisation and name have 1 to {MAX_NAME_BYTES} characters"));
        }
        if !part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
            return Err("only letters, digits, `-`, `_` and `.` are allowed".into());
        }
        // `--` stands for `/` in the cache's folder names.
        if part.starts_with(['.', '-']) || part.contains("..") || part.contains("--") {
            return Err("no part may begin with `.` or `-`, or contain `..` or `--`".into());
        }
    }
    Ok(())
}

/// A branch, tag, commit or `refs/pr/N`.
fn check_revision(revision: &str) -> Result<(), String> {
    let ok = revision.len() <= MAX_REVISION_BYTES
        && revision.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with(['.', '-'])
                && !part.contains("..")
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
        });
    if ok { Ok(()) } else { Err(format!("{revision:?} is not a branch, tag or commit")) }
}
