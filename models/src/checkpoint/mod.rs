//! A checkpoint as its maker published it: a folder whose tensors are mapped and read in place, or
//! the files embedded in the binary. Nothing is copied, converted or executed: pickles, `.py` files
//! and `auto_map` are never touched.

pub mod safetensors;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::safetensors::tensor::Dtype;
use serde_json::Value;

use crate::error::{Error, Result};
use safetensors::Entry;

/// Name of the file that says which shard holds a tensor.
const INDEX: &str = "model.safetensors.index.json";
/// Largest template or tokenizer file that is read.
const MAX_SIDE_FILE_BYTES: u64 = 256 << 20;
/// Largest index and largest other JSON; parsed, they take up to 40 times as much (K2's index has
/// 20 MB, its other files have less than 1).
const MAX_INDEX_BYTES: u64 = 64 << 20;
const MAX_JSON_BYTES: u64 = 8 << 20;
/// Most shards of one checkpoint (K2 has 62).
const MAX_SHARDS: usize = 4096;

/// Bytes of one tensor, borrowed from its mapped or embedded file and kept alive by it.
#[derive(Clone)]
pub struct Bytes {
    source: Arc<Source>,
    start: usize,
    len: usize,
}

enum Source {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl Bytes {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        let all: &[u8] = match &*self.source {
            Source::Mapped(map) => map,
            Source::Static(bytes) => bytes,
            Source::Owned(bytes) => bytes,
        };
        &all[self.start..self.start + self.len]
    }

    /// Bytes of our own.
    pub fn owned(bytes: Vec<u8>) -> Self {
        let len = bytes.len();
        Self { source: Arc::new(Source::Owned(bytes)), start: 0, len }
    }

    /// Tells the system that mapped bytes will not be needed again: they stop counting as resident. They can
    /// still be read.
    pub fn release(&self) {
        if let Source::Mapped(map) = &*self.source {
            // SAFETY: the map is of a file and read only: dropped pages are read again from the file.
            let advised = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, self.start, self.len)
            };
            // Advice: without it the pages go when memory is short.
            drop(advised);
        }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({})", self.len)
    }
}

/// One tensor of the checkpoint.
#[derive(Clone, Debug)]
pub struct TensorEntry {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Values, little endian.
    pub bytes: Bytes,
}

/// Where the files of a checkpoint are.
enum Files {
    Folder(PathBuf),
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// An open checkpoint.
pub struct Checkpoint {
    files: Files,
    config: Value,
    tensors: BTreeMap<String, TensorEntry>,
}

impl Checkpoint {
    /// Opens a folder.
    ///
    /// # Errors
    /// If `config.json` or the safetensors files are missing or broken.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_with(folder, &mut |_, _| ())
    }

    /// As [`Checkpoint::open`]; `progress` gets the shards that are mapped, and their number.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with(folder: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Self> {
        let root = folder.canonicalize().map_err(|error| Error::io(folder, error))?;
        Self::load(Files::Folder(root), progress)
    }

    /// Opens files embedded in the program, as pairs of name and content.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn embedded(files: &'static [(&'static str, &'static [u8])]) -> Result<Self> {
        Self::load(Files::Embedded(files), &mut |_, _| ())
    }

    fn load(files: Files, progress: &mut dyn FnMut(u64, u64)) -> Result<Self> {
        let mut checkpoint = Self { files, config: Value::Null, tensors: BTreeMap::new() };
        let config = checkpoint.json("config.json")?;
        checkpoint.config = config
            .ok_or_else(|| Error::format("config.json", format!("is missing in {}", checkpoint.place())))?;
        match checkpoint.json(INDEX)? {
            Some(index) => checkpoint.add_shards(&index, progress)?,
            None => checkpoint.add_shard("model.safetensors", None)?,
        }
        Ok(checkpoint)
    }

    /// `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.tensors
    }

    /// The folder, unless the files are embedded.
    pub fn folder(&self) -> Option<&Path> {
        match &self.files {
            Files::Folder(root) => Some(root),
            Files::Embedded(_) => None,
        }
    }

    /// The content of a side file (tokenizer, template, configuration); `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be read, is too large or no regular file, or is a link that leaves the folder.
    pub fn file(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        self.file_within(name, MAX_SIDE_FILE_BYTES)
    }

    fn file_within(&self, name: &str, limit: u64) -> Result<Option<Cow<'static, [u8]>>> {
        match &self.files {
            Files::Embedded(files) => {
                Ok(files.iter().find(|(key, _)| *key == name).map(|(_, bytes)| Cow::Borrowed(*bytes)))
            }
            Files::Folder(_) => {
                let Some(path) = self.path(name)? else { return Ok(None) };
                let size = path.metadata().map_err(|error| Error::io(&path, error))?.len();
                if size > limit {
                    return Err(Error::format(name, format!("has {size} bytes; the limit is {limit}")));
                }
                std::fs::read(&path)
                    .map(|bytes| Some(Cow::Owned(bytes)))
                    .map_err(|error| Error::io(&path, error))
            }
        }
    }

    /// A side file as JSON.
    ///
    /// # Errors
    /// As [`Checkpoint::file`], or if it is not JSON.
    pub fn json(&self, name: &str) -> Result<Option<Value>> {
        let limit = if name == INDEX { MAX_INDEX_BYTES } else { MAX_JSON_BYTES };
        let Some(bytes) = self.file_within(name, limit)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| Error::format(name, error.to_string()))
    }

    fn place(&self) -> String {
        match &self.files {
            Files::Folder(root) => root.display().to_string(),
            Files::Embedded(_) => "the built-in model".into(),
        }
    }

    /// The path of a file of the folder with links resolved; `None` if it does not exist.
    fn path(&self, name: &str) -> Result<Option<PathBuf>> {
        let Files::Folder(root) = &self.files else { return Ok(None) };
        let plain = !name.is_empty() && !name.contains(['/', '\\', '\0']) && name != "." && name != "..";
        if !plain {
            return Err(Error::format(format!("{name:?}"), "is not a plain file name"));
        }
        let path = root.join(name);
        let real = match path.canonicalize() {
            Ok(real) => real,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&path, error)),
        };
        let inside =
            real.parent() == Some(root) || hub_blobs(root).is_some_and(|blobs| real.starts_with(blobs));
        if !inside {
            return Err(Error::format(name, format!("is a link out of the folder, to {}", real.display())));
        }
        // Before it is opened: to open a pipe waits for a writer.
        if !real.metadata().map_err(|error| Error::io(&path, error))?.is_file() {
            return Err(Error::format(name, "is not a regular file"));
        }
        Ok(Some(real))
    }

    fn add_shards(&mut self, index: &Value, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let file = INDEX;
        let map = index.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| Error::format(file, "has no weight_map"))?;
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in map {
            let shard = shard.as_str().ok_or_else(|| {
                Error::format(file, format!("tensor {tensor}: its shard is not a file name"))
            })?;
            shards.entry(shard).or_default().push(tensor);
        }
        if shards.len() > MAX_SHARDS {
            return Err(Error::format(
                file,
                format!("names {} shards; the limit is {MAX_SHARDS}", shards.len()),
            ));
        }
        let total = shards.len() as u64;
        for (done, (shard, tensors)) in (0..).zip(shards) {
            progress(done, total);
            if !shard.ends_with(".safetensors") {
                return Err(Error::format(file, format!("shard {shard:?} is not a .safetensors file")));
            }
            self.add_shard(shard, Some(&tensors))?;
        }
        Ok(())
    }

    /// Maps one file and takes its tensors; `wanted` is what the index says is in it.
    fn add_shard(&mut self, name: &str, wanted: Option<&[&str]>) -> Result<()> {
        let source = Arc::new(self.source(name)?);
        let all: &[u8] = match &*source {
            Source::Mapped(map) => map,
            Source::Static(bytes) => bytes,
            Source::Owned(bytes) => bytes,
        };
        let entries = safetensors::parse(name, all)?;
        for tensor in wanted.unwrap_or_default() {
            if !entries.contains_key(*tensor) {
                return Err(Error::tensor(
                    *tensor,
                    format!("the index places it in {name}, which does not hold it"),
                ));
            }
        }
        if let Some(wanted) = wanted.filter(|wanted| wanted.len() < entries.len()) {
            let known: std::collections::HashSet<&str> = wanted.iter().copied().collect();
            if let Some(extra) = entries.keys().find(|name| !known.contains(name.as_str())) {
                return Err(Error::tensor(
                    extra,
                    format!("is in {name}, but the index does not place it there"),
                ));
            }
        }
        for (tensor, Entry { dtype, shape, start, len }) in entries {
            let bytes = Bytes { source: Arc::clone(&source), start, len };
            self.tensors.insert(tensor, TensorEntry { dtype, shape, bytes });
        }
        Ok(())
    }

    fn source(&self, name: &str) -> Result<Source> {
        let missing = || {
            let hint = "a model needs model.safetensors, or model.safetensors.index.json and every shard it \
                        names (.bin, .pt and other pickles are never read)";
            Error::format(name, format!("is missing in {}; {hint}", self.place()))
        };
        if matches!(self.files, Files::Embedded(_)) {
            return match self.file(name)? {
                Some(Cow::Borrowed(bytes)) => Ok(Source::Static(bytes)),
                _ => Err(missing()),
            };
        }
        let path = self.path(name)?.ok_or_else(missing)?;
        let file = File::open(&path).map_err(|error| Error::io(&path, error))?;
        map(&file).map(Source::Mapped).map_err(|error| Error::io(&path, error))
    }
}

/// In the hub's cache a snapshot's files are links into the repository's `blobs` folder.
fn hub_blobs(root: &Path) -> Option<PathBuf> {
    let snapshots = root.parent()?;
    let repo = snapshots.parent()?;
    let named = repo.file_name()?.to_str()?.starts_with("models--");
    (named && snapshots.file_name()? == "snapshots").then(|| repo.join("blobs"))
}

#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the map is read-only. Another process that truncates a checkpoint while it runs makes
    // reads fault; that is stated in the README, and no engine that maps files can exclude it.
    unsafe { memmap2::Mmap::map(file) }
}
