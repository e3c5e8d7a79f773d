//! The thread that reads blocks, proves them and hands them over, in the order they were asked for.

use std::io;
use std::sync::Arc;

use super::Loaded;
use super::folder::Folder;
use super::format::is_sealed;
use super::shared::{Buffer, Job, Shared, wait};
use crate::blocks::BlockKey;

/// One block to load.
struct Next {
    ticket: u64,
    index: usize,
    key: BlockKey,
    /// Which file, and the buffer for it; `None` if there is none.
    source: Option<(u64, Vec<u8>)>,
}

/// Runs until the store closes.
pub(super) fn run(shared: &Arc<Shared>, folder: &Folder, notify: &dyn Fn(Loaded)) {
    while let Some(next) = next(shared) {
        let Next { ticket, index, key, source } = next;
        let bytes = source.and_then(|(born, mut file)| {
            let path = folder.block(key);
            let read = folder.files.read(&path, &mut file).and_then(|()| {
                let wrong = || io::Error::new(io::ErrorKind::InvalidData, "its contents are damaged");
                is_sealed(&file, key).then_some(()).ok_or_else(wrong)
            });
            match read {
                Ok(()) => Some(Buffer::new(file, Arc::clone(shared))),
                Err(error) => {
                    if give_up(shared, key, born, file, &error) {
                        tracing::warn!("{}: {error}; the block is computed again", path.display());
                    }
                    None
                }
            }
        });
        if is_wanted(shared, ticket, bytes.is_some()) {
            notify(Loaded { ticket, index, bytes });
        }
    }
}

/// Waits for a block to load and a buffer to load it into; `None` at the end.
fn next(shared: &Shared) -> Option<Next> {
    let mut state = shared.state();
    loop {
        if state.closing.is_some() {
            return None;
        }
        if state.current.as_ref().is_none_or(|current| current.next == current.keys.len()) {
            state.current = state.tickets.pop_front();
        }
        if let Some(current) = &state.current
            && let Some(&key) = current.keys.get(current.next)
        {
            let (ticket, index) = (current.id, current.next);
            let found = state.index.get(key).filter(|entry| entry.usable).map(|entry| entry.born);
            let source = match found {
                None => Some(None),
                Some(born) => state.free_to_load.pop().map(|file| Some((born, file))),
            };
            if let Some(source) = source {
                return Some(Next { ticket, index, key, source });
            }
        } else if state.current.is_some() {
            // A ticket for nothing.
            continue;
        }
        state = wait(&shared.to_reader, state);
    }
}

/// Gives the buffer back and sees to it that the file is not asked for again. Gives whether to warn.
fn give_up(shared: &Shared, key: BlockKey, born: u64, file: Vec<u8>, error: &io::Error) -> bool {
    let mut state = shared.state();
    state.free_to_load.push(file);
    // Only this very file: the writer may have put another in its place since.
    if !state.index.condemn(key, born) {
        return false;
    }
    if state.writable {
        state.jobs.push_back(Job::Discard { key });
        state.idle = false;
        shared.to_writer.notify_one();
    } else if let Some(entry) = state.index.take(key) {
        state.index.release(entry.file_bytes);
    }
    // Another process, or the user, may remove a file at any time.
    error.kind() != io::ErrorKind::NotFound && state.may_warn()
}

/// Counts the outcome and moves the ticket on, or ends it after a failure. False if it was cancelled.
fn is_wanted(shared: &Shared, ticket: u64, is_loaded: bool) -> bool {
    let mut state = shared.state();
    let Some(current) = state.current.as_mut().filter(|current| current.id == ticket) else { return false };
    current.next += 1;
    if is_loaded {
        state.counters.loaded += 1;
    } else {
        state.current = None;
        state.counters.failed_loads += 1;
    }
    true
}
