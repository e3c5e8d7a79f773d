//! What the store asks of a file system, behind a trait so that tests can make it fail.
//!
//! Every operation takes care of what may stand under a name: nothing follows a link, opens what is not a
//! plain file, or reads more than was asked for.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::SystemTime;

/// What stands under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Folder,
    /// A link, a pipe, a device.
    Other,
}

/// One name in a folder.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) name: OsString,
    pub(super) kind: Kind,
    pub(super) bytes: u64,
    pub(super) modified: SystemTime,
}

pub(super) trait Files: Send + Sync {
    /// Makes the folder and those above it, for this user only; one that is there may be a link to one.
    fn create_root(&self, path: &Path) -> io::Result<()>;
    /// Makes one folder for this user only. One that is there must be a real one.
    fn create_folder(&self, path: &Path) -> io::Result<()>;
    /// What stands in a folder; what vanishes meanwhile is left out.
    fn list(&self, path: &Path) -> io::Result<Vec<Listed>>;
    /// Reads a plain file of exactly `into`'s length; another length is `InvalidData`.
    fn read(&self, path: &Path, into: &mut [u8]) -> io::Result<()>;
    /// Writes a file that must not be there yet, for this user only.
    fn write(&self, path: &Path, bytes: &[u8], modified: SystemTime) -> io::Result<()>;
    /// Has the disk keep a file's bytes. Blocks do without, since a checksum tells; a secret has none.
    fn sync(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
    /// Gives a file another name, in place of what may stand there.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Gives a file a second name, which must not be there yet.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a name that is not a folder's.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Sets the time of a plain file.
    fn set_modified(&self, path: &Path, modified: SystemTime) -> io::Result<()>;
    /// Opens or makes a plain file and locks it; dropping the file gives the lock back.
    fn lock(&self, path: &Path) -> Result<File, TryLockError>;
}

/// The real file system.
pub(super) struct Disk;

impl Files for Disk {
    fn create_root(&self, path: &Path) -> io::Result<()> {
        private_folder().recursive(true).create(path)
    }

    fn create_folder(&self, path: &Path) -> io::Result<()> {
        match private_folder().create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if fs::symlink_metadata(path)?.is_dir() { Ok(()) } else { Err(error) }
            }
            result => result,
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Listed>> {
        let listed = fs::read_dir(path)?.filter_map(|entry| {
            let listed = entry.and_then(|entry| {
                let found = entry.metadata()?;
                let kind = match found.file_type() {
                    kind if kind.is_file() => Kind::File,
                    kind if kind.is_dir() => Kind::Folder,
                    _ => Kind::Other,
                };
                // A system without times has no order across restarts, and nothing else is lost.
                let modified = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                Ok(Listed { name: entry.file_name(), kind, bytes: found.len(), modified })
            });
            match listed {
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                listed => Some(listed),
            }
        });
        listed.collect()
    }

    fn read(&self, path: &Path, into: &mut [u8]) -> io::Result<()> {
        let mut file = open_plain(path, File::options().read(true))?;
        if file.metadata()?.len() != into.len() as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        file.read_exact(into)
    }

    fn write(&self, path: &Path, bytes: &[u8], modified: SystemTime) -> io::Result<()> {
        let mut options = File::options();
        options.write(true).create_new(true);
        private_file(&mut options);
        let mut file = options.open(path)?;
        file.write_all(bytes)?;
        // The time is an order and no more; some file systems keep none.
        file.set_modified(modified).ok();
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn set_modified(&self, path: &Path, modified: SystemTime) -> io::Result<()> {
        open_plain(path, File::options().write(true))?.set_modified(modified)
    }

    fn lock(&self, path: &Path) -> Result<File, TryLockError> {
        if fs::symlink_metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(TryLockError::Error(not_plain()));
        }
        let mut options = File::options();
        options.write(true).create(true).truncate(false);
        private_file(&mut options);
        let file = options.open(path).map_err(TryLockError::Error)?;
        file.try_lock().map(|()| file)
    }
}

/// Opens what is a plain file: a pipe would wait for its other end, a link could lead anywhere.
fn open_plain(path: &Path, options: &fs::OpenOptions) -> io::Result<File> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(not_plain());
    }
    options.open(path)
}

fn not_plain() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is not a plain file")
}

fn private_folder() -> DirBuilder {
    #[allow(unused_mut)]
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder
}

fn private_file(options: &mut fs::OpenOptions) {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    #[cfg(not(unix))]
    let _ = options;
}
