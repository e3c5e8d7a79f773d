//! The folders of the hub cache, as every hub tool lays them out:
//!
//! ```text
//! models--org--name/blobs/<etag>                 contents, each once
//!                   blobs/<etag>.incomplete      what came so far
//!                   refs/main                    the commit a branch or tag stood at
//!                   snapshots/<commit>/<file>    links to blobs
//! .locks/models--org--name/<etag>.lock           held while a blob is written
//! ```
//!
//! Owns these paths, the locks, and the order of steps by which nothing half-written is ever seen: a blob
//! gets its name when it is complete, a link when its blob has one, the ref when all links are there.
//! Refuses to know servers. Partial files and locks are where the Python client has them, so that one
//! tool goes on with what the other began.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hf_hub::{Cache, CacheRepo, RepoType};

use super::{HubError, Progress};

/// How long another process may hold a lock without bytes arriving.
const LOCK_STALL: Duration = Duration::from_secs(300);

/// How a file's bytes are proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// SHA-256 of the contents, lower-case hex: what the hub's large files have.
    Sha256(String),
    /// SHA-1 of `blob <length>\0` and the contents, lower-case hex: git's name of a small file.
    GitBlob(String),
    /// Only the length is known.
    Length,
}

/// Which contents a file has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    /// Name of the blob.
    etag: String,
    pub(super) check: Check,
}

impl Content {
    /// Contents named by a server; `None` if that cannot be a file name.
    pub(super) fn new(etag: &str, check: impl FnOnce(String) -> Check) -> Option<Self> {
        let plain = etag.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        ((1..=128).contains(&etag.len()) && plain)
            .then(|| Self { etag: etag.to_owned(), check: check(etag.to_ascii_lowercase()) })
    }
}

/// Whether `text` is `digits` hexadecimal digits.
pub(super) fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether `text` can be a commit: what a folder under `snapshots` may be called.
pub(super) fn is_commit(text: &str) -> bool {
    (7..=64).contains(&text.len()) && is_hex(text, text.len())
}

/// One repository's folders, at one revision.
pub(super) struct Repo {
    root: PathBuf,
    locks: PathBuf,
    revision: String,
    layout: CacheRepo,
}

impl Repo {
    /// `repo` and `revision` have been checked; nothing is created.
    pub(super) fn new(cache: &Path, repo: &str, revision: &str) -> Self {
        let id = hf_hub::Repo::with_revision(repo.to_owned(), RepoType::Model, revision.to_owned());
        let folder = id.folder_name();
        Self {
            root: cache.join(&folder),
            locks: cache.join(".locks").join(folder),
            revision: revision.to_owned(),
            layout: Cache::new(cache.to_owned()).repo(id),
        }
    }

    /// The snapshot of the revision, if there is one.
    pub(super) fn folder(&self) -> Option<PathBuf> {
        let named = fs::read_to_string(self.root.join("refs").join(&self.revision)).ok();
        let named = named.as_deref().map(str::trim).filter(|commit| is_commit(commit));
        let pinned = is_commit(&self.revision).then_some(self.revision.as_str());
        named.into_iter().chain(pinned).map(|commit| self.snapshot(commit)).find(|folder| folder.is_dir())
    }

    /// The folder of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit)
    }

    fn blob(&self, content: &Content) -> PathBuf {
        self.layout.blob_path(&content.etag)
    }

    /// Where the bytes that have come so far are.
    pub(super) fn partial(&self, content: &Content) -> PathBuf {
        self.root.join("blobs").join(format!("{}.incomplete", content.etag))
    }

    /// Where the contents are, or will be: the blob, or on a disk without links the snapshot's file.
    pub(super) fn path(&self, commit: &str, name: &str, content: &Content) -> PathBuf {
        let blob = self.blob(content);
        if blob.is_file() { blob } else { self.snapshot(commit).join(name) }
    }

    /// Whether the contents are there. Bytes were proved before they got their name.
    pub(super) fn has(&self, commit: &str, name: &str, content: &Content, size: u64) -> bool {
        fs::metadata(self.path(commit, name, content))
            .is_ok_and(|found| found.is_file() && found.len() == size)
    }

    /// Waits for the right to write the contents; dropping the file gives it back.
    pub(super) fn lock(&self, content: &Content, progress: &mut dyn Progress) -> Result<File, HubError> {
        self.lock_named(&content.etag, &self.partial(content), progress)
    }

    /// Makes the folders and waits for a lock, as long as `watched` grows.
    fn lock_named(&self, name: &str, watched: &Path, progress: &mut dyn Progress) -> Result<File, HubError> {
        for folder in [&self.root.join("blobs"), &self.locks] {
            fs::create_dir_all(folder).map_err(|e| HubError::io(folder, e))?;
        }
        let path = self.locks.join(format!("{name}.lock"));
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|e| HubError::io(&path, e))?;
        let bytes = || fs::metadata(watched).map_or(0, |found| found.len());
        let mut seen = bytes();
        let mut moved: Option<Instant> = None;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {}
                // Some network file systems have no locks; the checksum catches what they would prevent.
                Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                    return Ok(file);
                }
                Err(TryLockError::Error(error)) => return Err(HubError::io(&path, error)),
            }
            if moved.is_none() {
                progress.note("another process is downloading this model; waiting for it");
            }
            let since = *moved.get_or_insert_with(Instant::now);
            let now = bytes();
            if now != seen {
                (seen, moved) = (now, Some(Instant::now()));
            } else if since.elapsed() > LOCK_STALL {
                return Err(HubError::Locked { path });
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Gives a proved partial file its name.
    pub(super) fn complete(&self, content: &Content) -> Result<(), HubError> {
        let blob = self.blob(content);
        fs::rename(self.partial(content), &blob).map_err(|e| HubError::io(&blob, e))
    }

    /// Shows `files`, which are plain names, in the snapshot of `commit` in this order, and then notes
    /// that the revision stands there.
    pub(super) fn show(
        &self,
        commit: &str,
        files: &[(String, Content)],
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, HubError> {
        let folder = self.snapshot(commit);
        let _lock = self.lock_named("snapshots", &folder, progress)?;
        fs::create_dir_all(&folder).map_err(|e| HubError::io(&folder, e))?;
        for (name, content) in files {
            let shown = folder.join(name);
            self.link(&shown, content).map_err(|e| HubError::io(&shown, e))?;
        }
        self.set_revision(commit)?;
        Ok(folder)
    }

    fn link(&self, shown: &Path, content: &Content) -> io::Result<()> {
        let blob = self.blob(content);
        let target = Path::new("..").join("..").join("blobs").join(&content.etag);
        match fs::symlink_metadata(shown) {
            Ok(found) if found.is_symlink() && fs::read_link(shown)? == target => return Ok(()),
            // On a disk without links the contents are here, and the blob is not.
            Ok(found) if found.is_file() && !blob.exists() => return Ok(()),
            Ok(_) => fs::remove_file(shown)?,
            Err(_) => {}
        }
        symlink(&target, shown).or_else(|_| fs::hard_link(&blob, shown)).or_else(|_| fs::rename(&blob, shown))
    }

    /// Notes which commit the revision stands at.
    fn set_revision(&self, commit: &str) -> Result<(), HubError> {
        if self.revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(&self.revision);
        let failed = |error| HubError::io(&path, error);
        fs::create_dir_all(path.parent().unwrap_or(&self.root)).map_err(failed)?;
        let draft = self.root.join(format!(".ref-{}", std::process::id()));
        fs::write(&draft, commit).and_then(|()| fs::rename(&draft, &path)).map_err(failed)
    }
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_target: &Path, _link: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
