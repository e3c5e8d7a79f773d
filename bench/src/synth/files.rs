//! The folder: nothing under its final name until everything is there, and nothing left behind by a
//! run that failed.

use std::io;
use std::path::{Path, PathBuf};

use super::SynthError;

/// Follows the name of an unfinished file.
const PARTIAL: &str = ".partial";

/// An unfinished checkpoint; dropped before [`Folder::finish`], it takes its files away.
pub(crate) struct Folder {
    root: PathBuf,
    /// Whether this run made the folder.
    made: bool,
    /// Names of the files so far.
    files: Vec<String>,
    needed_bytes: u64,
}

/// Files of a checkpoint, which `force` replaces; nothing else is ever removed.
fn belongs(name: &str) -> bool {
    const SIDE: [&str; 9] = [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tiktoken.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
    ];
    let name = name.strip_suffix(PARTIAL).unwrap_or(name);
    SIDE.contains(&name) || (name.starts_with("model") && name.ends_with(".safetensors"))
}

impl Folder {
    /// Makes the folder, which must be empty unless `force`.
    pub fn new(root: &Path, force: bool, needed_bytes: u64) -> Result<Self, SynthError> {
        let fail = |error| SynthError::Io(root.to_owned(), error);
        let made = match std::fs::read_dir(root) {
            Ok(entries) => {
                let names: Vec<_> =
                    entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>().map_err(fail)?;
                if !names.is_empty() && !force {
                    return Err(SynthError::Occupied(root.to_owned()));
                }
                // Without its configuration the old checkpoint is none, wherever this stops.
                let mut old: Vec<&str> =
                    names.iter().filter_map(|name| name.to_str()).filter(|name| belongs(name)).collect();
                old.sort_by_key(|name| *name != "config.json");
                for name in old {
                    let path = root.join(name);
                    std::fs::remove_file(&path).map_err(|error| SynthError::Io(path, error))?;
                }
                false
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                std::fs::create_dir_all(root).map_err(fail)?;
                true
            }
            Err(error) => return Err(fail(error)),
        };
        Ok(Self { root: root.to_owned(), made, files: Vec::new(), needed_bytes })
    }

    /// Where to write the file `name` for now.
    pub fn partial(&mut self, name: &str) -> PathBuf {
        self.files.push(name.to_owned());
        self.root.join(format!("{name}{PARTIAL}"))
    }

    /// What a failure to write `path` means.
    pub fn failure(&self, path: &Path, error: io::Error) -> SynthError {
        let path = path.to_owned();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                SynthError::Full { path, needed_bytes: self.needed_bytes }
            }
            _ => SynthError::Io(path, error),
        }
    }

    /// Writes a small file.
    pub fn write(&mut self, name: &str, content: &[u8]) -> Result<(), SynthError> {
        let path = self.partial(name);
        std::fs::write(&path, content).map_err(|error| self.failure(&path, error))
    }

    /// Gives all files their names, in the order they were made.
    pub fn finish(mut self) -> Result<(), SynthError> {
        for name in std::mem::take(&mut self.files) {
            let (from, to) = (self.root.join(format!("{name}{PARTIAL}")), self.root.join(name));
            std::fs::rename(&from, &to).map_err(|error| SynthError::Io(to, error))?;
        }
        self.made = false;
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        for name in &self.files {
            let _ = std::fs::remove_file(self.root.join(format!("{name}{PARTIAL}")));
        }
        if self.made {
            let _ = std::fs::remove_dir(&self.root);
        }
    }
}
