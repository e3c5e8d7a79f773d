//! The thread that writes and removes blocks: the only one that changes the folder after the start.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::folder::{Folder, time_of};
use super::format::seal;
use super::index::Room;
use super::shared::{Job, PAUSE_SAVES, Shared, wait};
use crate::blocks::BlockKey;

/// What became of a save.
enum Outcome {
    Saved,
    /// All that is there has been used since.
    Refused,
}

/// A failure, with the file it concerns.
type Failure = (PathBuf, io::Error);

/// What there is to do.
enum Work {
    Job(Job),
    SetTime(BlockKey, u64),
}

pub(super) struct Writer<'a> {
    shared: &'a Shared,
    folder: &'a Folder,
    /// Begun, failed and not removable; its bytes are still counted.
    leftover: Option<(PathBuf, u64)>,
}

/// Runs until the store closes and the queued blocks are written. Holds the lock of the folder as long.
pub(super) fn run(shared: &Shared, folder: &Folder, lock: File) {
    let mut writer = Writer { shared, folder, leftover: None };
    while let Some(work) = writer.next() {
        match work {
            Work::Job(Job::Save { key, file }) => writer.save(key, file),
            Work::Job(Job::Discard { key }) => writer.discard(key),
            // Only the order after a restart depends on it.
            Work::SetTime(key, place) => {
                folder.files.set_modified(&folder.block(key), time_of(place)).ok();
            }
        }
    }
    drop(lock);
}

impl Writer<'_> {
    fn next(&self) -> Option<Work> {
        let mut state = self.shared.state();
        loop {
            if state.closing.is_some_and(|end| Instant::now() >= end) {
                return None;
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some(Work::Job(job));
            }
            while let Some(key) = state.moved.pop_front() {
                if let Some(place) = state.index.settle(key) {
                    return Some(Work::SetTime(key, place));
                }
            }
            if state.closing.is_some() {
                return None;
            }
            state.idle = true;
            self.shared.to_owner.notify_all();
            state = wait(&self.shared.to_writer, state);
        }
    }

    fn save(&mut self, key: BlockKey, mut file: Vec<u8>) {
        seal(&mut file, key);
        let result = self.write(key, &file);
        let mut state = self.shared.state();
        state.free_to_save.push(file);
        state.queued.remove(&key);
        match result {
            Ok(Outcome::Saved) => state.counters.saved += 1,
            Ok(Outcome::Refused) => {}
            Err((path, error)) => {
                state.counters.failed_saves += 1;
                state.pause = PAUSE_SAVES;
                let warn = state.may_warn();
                drop(state);
                if warn {
                    tracing::warn!(
                        "{}: {error}; blocks of the prefix cache are not saved for a while",
                        path.display()
                    );
                }
            }
        }
    }

    fn write(&mut self, key: BlockKey, file: &[u8]) -> Result<Outcome, Failure> {
        if let Some((path, bytes)) = &self.leftover {
            if let Err(error) = self.remove_file(path) {
                return Err((path.clone(), error));
            }
            self.shared.state().index.release(*bytes);
            self.leftover = None;
        }
        let file_bytes = file.len() as u64;
        let place = loop {
            let mut state = self.shared.state();
            // Looked up every time: a use may have raised it.
            let place = state.queued.get(&key).copied().unwrap_or_default();
            match state.index.room(key, file_bytes, place) {
                Room::Enough => {
                    state.index.reserve(file_bytes);
                    break place;
                }
                Room::Refused => return Ok(Outcome::Refused),
                Room::Remove(victim) => {
                    drop(state);
                    self.remove(victim)?;
                }
            }
        };
        if let Err(failure) = self.put(key, file, place) {
            if self.leftover.is_none() {
                self.shared.state().index.release(file_bytes);
            }
            return Err(failure);
        }
        let mut state = self.shared.state();
        state.index.insert(key, file_bytes, place, true);
        // It may have been raised while it was being written.
        if let Some(&place) = state.queued.get(&key)
            && state.index.raise(key, place)
        {
            state.moved.push_back(key);
        }
        Ok(Outcome::Saved)
    }

    /// Writes a file beside its place and moves it there, so that a whole file or none has the name.
    fn put(&mut self, key: BlockKey, file: &[u8], place: u64) -> Result<(), Failure> {
        let (parent, part, block) = (self.folder.parent(key), self.folder.part(key), self.folder.block(key));
        let files = &self.folder.files;
        files.create_folder(&parent).map_err(|error| (parent, error))?;
        // Whatever has this name is no block on its way: there is one writer.
        self.remove_file(&part).map_err(|error| (part.clone(), error))?;
        let written = files.write(&part, file, time_of(place)).map_err(|error| (part.clone(), error));
        let moved = written.and_then(|()| files.rename(&part, &block).map_err(|error| (block, error)));
        if moved.is_err() && self.remove_file(&part).is_err() {
            self.leftover = Some((part, file.len() as u64));
        }
        moved
    }

    /// Sees to it that nothing has this name.
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        match self.folder.files.remove(path) {
            // No such folder is as good as no such file.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(())
            }
            result => result,
        }
    }

    /// Removes a block. It leaves the index first, so that nobody asks for it, and its bytes last.
    fn remove(&self, key: BlockKey) -> Result<(), Failure> {
        let Some(entry) = self.shared.state().index.take(key) else { return Ok(()) };
        let path = self.folder.block(key);
        let removed = self.remove_file(&path);
        let mut state = self.shared.state();
        match removed {
            Ok(()) => {
                state.index.release(entry.file_bytes);
                Ok(())
            }
            Err(error) => {
                state.index.put_back(key, entry);
                Err((path, error))
            }
        }
    }

    /// Removes a file that failed to load. Jobs run in turn, so it is not yet one that was saved since.
    fn discard(&self, key: BlockKey) {
        if let Err((path, error)) = self.remove(key) {
            // It stays counted and unused, and goes when room is needed.
            if self.shared.state().may_warn() {
                tracing::warn!("{}: {error}", path.display());
            }
        }
    }
}
