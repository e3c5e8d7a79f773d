//! The prefix cache on disk: blocks of the cache under their keys, across restarts, within a limit.
//!
//! Owns a folder, the order in which blocks leave it, and two threads: one reads, one writes. Refuses to know
//! what a block holds or how a key comes about. The engine's thread never waits for the disk here: it hands
//! buffers over, asks an index in memory, and is told when a block has come.
//!
//! A cache may forget but must not lie. Every byte that is handed over has been proved by its checksum, so a
//! crash, a full disk, a damaged or foreign file can make blocks be computed again and do nothing else. For
//! that reason nothing is written through to the disk either: what a power failure spoils fails its checksum.
//!
//! One process writes to a folder at a time; others load what was there when they started.

mod files;
mod folder;
mod format;
mod index;
mod reader;
mod shared;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

pub use shared::Buffer;

use crate::blocks::BlockKey;
use files::{Disk, Files};
use folder::{Folder, SECRET_BYTES, place_of};
use format::HEADER_BYTES;
use index::Index;
use shared::{Job, Running, Shared, State, Ticket};

/// Bytes of the buffers in each direction, and how many there are at least and at most.
const BUFFERS_BYTES: usize = 16 << 20;
/// A step of 512 tokens fills eight blocks or nine, and what cannot be handed out soon may lose its window blocks.
const MIN_BUFFERS: usize = 10;
const MAX_BUFFERS: usize = 64;

/// How long closing waits for queued blocks to be written.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// A block that has come, or did not.
#[derive(Debug)]
pub struct Loaded {
    /// Who asked for it.
    pub ticket: u64,
    /// Its index in the keys that were asked for.
    pub index: usize,
    /// Its bytes; `None` if they cannot be had, which ends the ticket.
    pub bytes: Option<Buffer>,
}

/// When a chain of blocks was used, from [`BlockStore::touch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use(u64);

impl Use {
    /// The place of a block in the order: the deeper in its chain, the sooner it goes.
    fn place(self, depth: usize) -> u64 {
        self.0.saturating_sub(depth as u64)
    }
}

/// What the store has done so far, and what it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Blocks written.
    pub saved: u64,
    /// Blocks that could not be written.
    pub failed_saves: u64,
    /// Blocks read and proved.
    pub loaded: u64,
    /// Tickets that ended with a block that could not be had.
    pub failed_loads: u64,
    /// Bytes of the store's files on the disk.
    pub bytes: u64,
}

/// Why a store cannot be opened.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum StoreError {
    /// Not one block fits.
    TooSmall { folder: PathBuf, limit_bytes: u64, needed_bytes: u64 },
    /// The folder cannot be made.
    Folder { path: PathBuf, source: io::Error },
    /// The secret can be neither read nor made.
    Secret { path: PathBuf, source: io::Error },
    /// The system gives no thread.
    Thread(io::Error),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooSmall { folder, limit_bytes, needed_bytes } => write!(
                f,
                "{}: a prefix cache of {limit_bytes} bytes holds no block of this model, which takes \
                 {needed_bytes} bytes; raise --kv-cache-size",
                folder.display()
            ),
            Self::Folder { path, source } => {
                write!(f, "{}: {source}; give --kv-cache-dir a folder that can be written", path.display())
            }
            Self::Secret { path, source } if source.kind() == io::ErrorKind::InvalidData => write!(
                f,
                "{}: this is not the secret of a prefix cache; remove it to start an empty one, or give \
                 --kv-cache-dir another folder",
                path.display()
            ),
            Self::Secret { path, source } => write!(
                f,
                "{}: {source}; without this file no block of the prefix cache can be found",
                path.display()
            ),
            Self::Thread(source) => write!(f, "the prefix cache gets no thread: {source}"),
        }
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Folder { source, .. } | Self::Secret { source, .. } | Self::Thread(source) => Some(source),
            Self::TooSmall { .. } => None,
        }
    }
}

/// Blocks in a folder. See the module's documentation.
pub struct BlockStore {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    secret: [u8; SECRET_BYTES],
    notice: Option<String>,
    last: Use,
}

impl fmt::Debug for BlockStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the secret.
        f.debug_struct("BlockStore").field("counters", &self.counters()).finish_non_exhaustive()
    }
}

impl BlockStore {
    /// Opens or makes the store in `folder`, whose files are never more than `limit_bytes` together. Files of
    /// blocks of other lengths count and leave like all others, so models can share a folder.
    ///
    /// `notify` is called on the store's own thread and must not wait for the thread that owns the store.
    ///
    /// # Errors
    /// If not one block fits, or there is no secret and none can be made. All other trouble is a
    /// [`notice`](Self::notice), and the store only loads.
    pub fn open(
        folder: &Path,
        limit_bytes: u64,
        block_bytes: usize,
        notify: impl Fn(Loaded) + Send + 'static,
    ) -> Result<Self, StoreError> {
        Self::open_in(Arc::new(Disk), folder, limit_bytes, block_bytes, notify)
    }

    fn open_in(
        files: Arc<dyn Files>,
        root: &Path,
        limit_bytes: u64,
        block_bytes: usize,
        notify: impl Fn(Loaded) + Send + 'static,
    ) -> Result<Self, StoreError> {
        assert!(block_bytes > 0, "a block holds something");
        let file_bytes = Self::file_bytes(block_bytes);
        let needed_bytes = file_bytes + SECRET_BYTES as u64;
        if limit_bytes < needed_bytes {
            return Err(StoreError::TooSmall { folder: root.to_owned(), limit_bytes, needed_bytes });
        }
        let created = files.create_root(root);
        created.map_err(|source| StoreError::Folder { path: root.to_owned(), source })?;
        let folder = Folder { root: root.to_owned(), files };
        let secret = folder.secret()?;
        let (mut lock, mut trouble) = match folder.lock() {
            Ok(lock) => (Some(lock), None),
            Err(reason) => (None, Some(reason)),
        };

        let (found, unseen) = folder.survey(lock.is_some());
        let mut index = Index::new(limit_bytes, SECRET_BYTES as u64);
        let last = Use(found.iter().map(|block| block.place).max().unwrap_or(0));
        for block in found {
            index.reserve(block.file_bytes);
            index.insert(block.key, block.file_bytes, block.place, block.file_bytes == file_bytes);
        }
        if lock.is_some() {
            // What cannot be seen cannot be kept within the limit.
            trouble = unseen.or_else(|| shrink(&mut index, &folder).err());
            lock = lock.filter(|_| trouble.is_none());
        }
        let notice = trouble.map(|reason| {
            format!("{}: {reason}; the prefix cache loads blocks from there and saves none", root.display())
        });

        let buffers = |count| (0..count).map(|_| vec![0; HEADER_BYTES + block_bytes]).collect();
        let count = buffer_count(block_bytes);
        let shared = Arc::new(Shared::new(State {
            index,
            writable: lock.is_some(),
            jobs: VecDeque::new(),
            queued: HashMap::new(),
            moved: VecDeque::new(),
            tickets: VecDeque::new(),
            current: None,
            free_to_save: buffers(if lock.is_some() { count } else { 0 }),
            free_to_load: buffers(count),
            pause: 0,
            counters: Counters::default(),
            warned: None,
            closing: None,
            idle: lock.is_none(),
            running: 0,
        }));
        let mut store = Self { shared, threads: Vec::new(), secret, notice, last };
        store.start(folder, lock, notify)?;
        Ok(store)
    }

    fn start(
        &mut self,
        folder: Folder,
        lock: Option<File>,
        notify: impl Fn(Loaded) + Send + 'static,
    ) -> Result<(), StoreError> {
        if let Some(lock) = lock {
            let folder = folder.clone();
            self.spawn("kv-cache-write", move |shared| writer::run(shared, &folder, lock))?;
        }
        self.spawn("kv-cache-read", move |shared| reader::run(shared, &folder, &notify))
    }

    fn spawn(
        &mut self,
        name: &str,
        run: impl FnOnce(&Arc<Shared>) + Send + 'static,
    ) -> Result<(), StoreError> {
        self.shared.state().running += 1;
        let running = Running(Arc::clone(&self.shared));
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || run(&running.0));
        self.threads.push(thread.map_err(StoreError::Thread)?);
        Ok(())
    }

    /// Bytes of the buffers between the engine and the disk, for blocks of `block_bytes`.
    pub fn staging_bytes(block_bytes: usize) -> u64 {
        2 * buffer_count(block_bytes) as u64 * Self::file_bytes(block_bytes)
    }

    /// Bytes that a block of `block_bytes` takes on the disk.
    pub fn file_bytes(block_bytes: usize) -> u64 {
        (HEADER_BYTES + block_bytes) as u64
    }

    /// 32 random bytes that belong to this folder and are the same for everyone who opens it.
    pub fn secret(&self) -> &[u8; 32] {
        &self.secret
    }

    /// Why blocks are only loaded and not saved, for the user; `None` if all is well.
    pub fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }

    /// Whether this process may write to the folder.
    pub fn is_writable(&self) -> bool {
        self.notice.is_none()
    }

    /// What was done so far.
    pub fn counters(&self) -> Counters {
        let state = self.shared.state();
        Counters { bytes: state.index.bytes(), ..state.counters }
    }

    /// Whether the block is on the disk. Asks memory only; loading may still fail.
    pub fn contains(&self, key: BlockKey) -> bool {
        self.shared.state().index.get(key).is_some_and(|entry| entry.usable)
    }

    /// Whether a buffer is free to save a block.
    pub fn can_save(&self) -> bool {
        !self.shared.state().free_to_save.is_empty()
    }

    /// Notes that a chain of blocks is used, given from its root, whether or not they are all on the disk.
    /// Blocks whose last use is longest ago go first, and of one chain the deepest.
    pub fn touch(&mut self, chain: &[BlockKey]) -> Use {
        // Never the same and never back, whatever the clock does.
        let used = Use(place_of(SystemTime::now()).max(self.last.0 + 1));
        self.last = used;
        let mut state = self.shared.state();
        let state = &mut *state;
        for (depth, &key) in chain.iter().enumerate() {
            let place = used.place(depth);
            if state.index.raise(key, place) && state.writable {
                state.moved.push_back(key);
                state.idle = false;
            }
            if let Some(queued) = state.queued.get_mut(&key) {
                *queued = place.max(*queued);
            }
        }
        if !state.moved.is_empty() {
            self.shared.to_writer.notify_one();
        }
        used
    }

    /// Has a block written: the one at `depth` (0 is the root) of a chain that was last used at `used`. `fill`
    /// gets as many bytes as a block has, with anything in them, and runs at once. Gives whether it was called:
    /// not if the block is there or under way, if no buffer is free, for a while after a failure, or if the
    /// store only loads. A block that has been used longer ago than everything on a full disk is not kept.
    pub fn save(&mut self, key: BlockKey, used: Use, depth: usize, fill: impl FnOnce(&mut [u8])) -> bool {
        let mut state = self.shared.state();
        let is_there =
            state.index.get(key).is_some_and(|entry| entry.usable) || state.queued.contains_key(&key);
        if is_there || !state.writable {
            return false;
        }
        if state.pause > 0 {
            state.pause -= 1;
            return false;
        }
        let Some(mut file) = state.free_to_save.pop() else { return false };
        drop(state);
        fill(&mut file[HEADER_BYTES..]);
        let mut state = self.shared.state();
        state.queued.insert(key, used.place(depth));
        state.jobs.push_back(Job::Save { key, file });
        state.idle = false;
        self.shared.to_writer.notify_one();
        true
    }

    /// Has blocks read in this order. Each is reported under `ticket` and its index; the first that cannot be
    /// had is the last one reported. Blocks are loaded as buffers are dropped. The caller bounds the number of
    /// tickets and does not use the same one twice at a time.
    pub fn load(&mut self, ticket: u64, keys: Vec<BlockKey>) {
        self.shared.state().tickets.push_back(Ticket { id: ticket, keys, next: 0 });
        self.shared.to_reader.notify_one();
    }

    /// Forgets a ticket. A block that was already on its way may still be reported.
    pub fn cancel(&mut self, ticket: u64) {
        let mut state = self.shared.state();
        state.tickets.retain(|waiting| waiting.id != ticket);
        if state.current.as_ref().is_some_and(|current| current.id == ticket) {
            state.current = None;
        }
        self.shared.to_reader.notify_one();
    }

    /// Writes what is queued, for at most a few seconds, and ends. Dropping does the same.
    pub fn close(self) {}

    /// Waits until everything queued is written.
    #[cfg(test)]
    fn settle(&self) {
        let mut state = self.shared.state();
        while !state.idle {
            state = shared::wait(&self.shared.to_owner, state);
        }
    }
}

impl Drop for BlockStore {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.closing = Some(Instant::now() + CLOSE_LIMIT);
        self.shared.to_writer.notify_all();
        self.shared.to_reader.notify_all();
        // A little longer than the threads have, for the file one of them is at.
        let limit = CLOSE_LIMIT + Duration::from_millis(500);
        let ended = self.shared.to_owner.wait_timeout_while(state, limit, |state| state.running > 0);
        // A thread that hangs in the file system keeps what it needs and is left to itself.
        if ended.is_ok_and(|(_, timeout)| !timeout.timed_out()) {
            for thread in self.threads.drain(..) {
                thread.join().ok();
            }
        }
    }
}

fn buffer_count(block_bytes: usize) -> usize {
    (BUFFERS_BYTES / block_bytes).clamp(MIN_BUFFERS, MAX_BUFFERS)
}

/// Removes blocks until the limit, which may be another one than last time, is kept.
fn shrink(index: &mut Index, folder: &Folder) -> Result<(), String> {
    while index.is_over_limit() {
        let Some(key) = index.lowest() else { break };
        let path = folder.block(key);
        match folder.files.remove(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(format!("{}: {error}", path.display()));
            }
            _ => {}
        }
        let entry = index.take(key).expect("it was found just now");
        index.release(entry.file_bytes);
    }
    Ok(())
}
