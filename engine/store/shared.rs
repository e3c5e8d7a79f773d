//! What the engine's thread and the store's two threads share: one state behind one lock.
//!
//! Nobody holds the lock while a file is read, written, removed or summed, so the engine's thread waits
//! for no disk.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Counters;
use super::format::HEADER_BYTES;
use super::index::Index;
use crate::blocks::BlockKey;

/// Saves that are skipped after one failed: a full disk is not asked again for every block.
pub(super) const PAUSE_SAVES: u32 = 64;

/// Least time between two warnings.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Work of the writing thread.
pub(super) enum Job {
    /// Write a block; `file` holds its payload behind the header's place.
    Save { key: BlockKey, file: Vec<u8> },
    /// Remove a file that does not hold its block.
    Discard { key: BlockKey },
}

/// Blocks that were asked for, and how far they have come.
pub(super) struct Ticket {
    pub(super) id: u64,
    pub(super) keys: Vec<BlockKey>,
    pub(super) next: usize,
}

pub(super) struct State {
    pub(super) index: Index,
    /// Whether this process may write.
    pub(super) writable: bool,
    pub(super) jobs: VecDeque<Job>,
    /// Places of the blocks that wait to be written or are being written.
    pub(super) queued: HashMap<BlockKey, u64>,
    /// Files whose times are to be set when there is nothing else to do.
    pub(super) moved: VecDeque<BlockKey>,
    pub(super) tickets: VecDeque<Ticket>,
    pub(super) current: Option<Ticket>,
    pub(super) free_to_save: Vec<Vec<u8>>,
    pub(super) free_to_load: Vec<Vec<u8>>,
    /// Saves still to be skipped.
    pub(super) pause: u32,
    pub(super) counters: Counters,
    pub(super) warned: Option<Instant>,
    /// When the threads must have ended, once they are to end.
    pub(super) closing: Option<Instant>,
    /// Whether the writing thread has nothing left to do.
    pub(super) idle: bool,
    /// Threads that have not ended.
    pub(super) running: usize,
}

impl State {
    /// Whether a warning is due, which then counts as given.
    pub(super) fn may_warn(&mut self) -> bool {
        let due = self.warned.is_none_or(|warned| warned.elapsed() >= WARNING_INTERVAL);
        if due {
            self.warned = Some(Instant::now());
        }
        due
    }
}

pub(super) struct Shared {
    state: Mutex<State>,
    /// Told about jobs, moved files and the end.
    pub(super) to_writer: Condvar,
    /// Told about tickets, returned buffers and the end.
    pub(super) to_reader: Condvar,
    /// Told when the writing thread has nothing left to do, and when a thread ends.
    pub(super) to_owner: Condvar,
}

impl Shared {
    pub(super) fn new(state: State) -> Self {
        Self {
            state: Mutex::new(state),
            to_writer: Condvar::new(),
            to_reader: Condvar::new(),
            to_owner: Condvar::new(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with the store's lock")
    }
}

/// Held by a thread for as long as it runs.
pub(super) struct Running(pub(super) Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        // A thread that panicked has ended too.
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running -= 1;
        self.0.to_owner.notify_all();
    }
}

/// Waits on `condvar`, with the lock given up meanwhile.
pub(super) fn wait<'a>(condvar: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condvar.wait(state).expect("nobody panics with the store's lock")
}

/// The bytes of a loaded block. Dropping them lets the store load another one, so whoever keeps them keeps
/// it waiting.
pub struct Buffer {
    file: Vec<u8>,
    shared: Arc<Shared>,
}

impl Buffer {
    pub(super) fn new(file: Vec<u8>, shared: Arc<Shared>) -> Self {
        Self { file, shared }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.file[HEADER_BYTES..]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.shared.state().free_to_load.push(std::mem::take(&mut self.file));
        self.shared.to_reader.notify_one();
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len())
    }
}
