//! Tests of the store in real folders; `faults` makes the file system fail, `order` compares with a model.

mod faults;
mod hostile;
mod order;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::*;

/// Bytes of most blocks here: an odd number, smaller than the header.
const BLOCK: usize = 41;
const FILE: u64 = (HEADER_BYTES + BLOCK) as u64;

/// A folder that is removed in the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("moebius-store-{}-{number}", std::process::id()));
        fs::remove_dir_all(&path).ok();
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// The store's own folder, which is made by the store.
    fn dir(&self) -> PathBuf {
        self.0.join("cache")
    }

    fn block(&self, key: BlockKey) -> PathBuf {
        Folder { root: self.dir(), files: Arc::new(Disk) }.block(key)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// The bytes that the tests save under a key.
fn content(key: BlockKey, bytes: usize) -> Vec<u8> {
    let mut output = vec![0; bytes];
    blake3::Hasher::new().update(&key.0.to_le_bytes()).finalize_xof().fill(&mut output);
    output
}

/// Keys that fall into folders all over.
fn keys(count: usize) -> Vec<BlockKey> {
    let key = |n: usize| BlockKey((n as u128 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835));
    (0..count).map(key).collect()
}

/// A store with what it reports.
struct Tested {
    store: BlockStore,
    inbox: Receiver<Loaded>,
    tickets: u64,
}

impl Tested {
    fn open(scratch: &Scratch, limit_bytes: u64) -> Self {
        Self::open_in(Arc::new(Disk), scratch, limit_bytes).unwrap()
    }

    fn open_in(files: Arc<dyn Files>, scratch: &Scratch, limit_bytes: u64) -> Result<Self, StoreError> {
        let (sender, inbox) = channel();
        let notify = move |loaded| sender.send(loaded).unwrap_or_default();
        let store = BlockStore::open_in(files, &scratch.dir(), limit_bytes, BLOCK, notify)?;
        Ok(Self { store, inbox, tickets: 0 })
    }

    /// Saves one block of a chain with its bytes, and waits until it is written.
    fn save(&mut self, key: BlockKey, used: Use, depth: usize) -> bool {
        let called = self.store.save(key, used, depth, |bytes| bytes.copy_from_slice(&content(key, BLOCK)));
        self.store.settle();
        called
    }

    fn save_chain(&mut self, chain: &[BlockKey]) {
        let used = self.store.touch(chain);
        for (depth, &key) in chain.iter().enumerate() {
            self.save(key, used, depth);
        }
    }

    fn receive(&self) -> Loaded {
        self.inbox.recv_timeout(Duration::from_secs(20)).expect("a block is reported")
    }

    /// How many of these blocks come, in order, before one does not.
    fn load(&mut self, keys: &[BlockKey]) -> usize {
        self.tickets += 1;
        self.store.load(self.tickets, keys.to_vec());
        for (index, &key) in keys.iter().enumerate() {
            let loaded = self.receive();
            assert_eq!((loaded.ticket, loaded.index), (self.tickets, index));
            let Some(bytes) = loaded.bytes else { return index };
            assert_eq!(*bytes, content(key, BLOCK)[..], "the bytes that were saved");
        }
        keys.len()
    }

    fn held(&self, keys: &[BlockKey]) -> Vec<bool> {
        keys.iter().map(|&key| self.store.contains(key)).collect()
    }
}

/// A limit for so many blocks.
fn room_for(blocks: u64) -> u64 {
    SECRET_BYTES as u64 + blocks * FILE
}

/// Bytes of all files below a folder.
fn bytes_in(folder: &Path) -> u64 {
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => bytes_in(&entry.path()),
        found => found.map_or(0, |found| found.len()),
    };
    fs::read_dir(folder).map_or(0, |entries| entries.flatten().map(bytes).sum())
}

#[test]
fn blocks_come_back_after_a_restart() {
    let scratch = Scratch::new();
    let chain = keys(9);
    let mut first = Tested::open(&scratch, 1 << 20);
    assert_eq!(first.store.notice(), None);
    let secret = *first.store.secret();
    assert!(!first.store.contains(chain[0]));
    assert_eq!(first.load(&chain), 0);
    first.save_chain(&chain);
    assert_eq!(first.held(&chain), [true; 9]);
    assert!(!first.save(chain[3], first.store.last, 3), "it is there");
    assert_eq!(first.load(&chain), 9);
    let counters = first.store.counters();
    assert_eq!(
        counters,
        Counters { saved: 9, failed_saves: 0, loaded: 9, failed_loads: 1, bytes: room_for(9) }
    );
    assert_eq!(bytes_in(&scratch.dir()), room_for(9));
    first.store.close();

    let mut second = Tested::open(&scratch, 1 << 20);
    assert_eq!(*second.store.secret(), secret);
    assert_eq!(second.held(&chain), [true; 9]);
    assert_eq!(second.load(&chain), 9);
    assert_eq!(second.load(&[]), 0);
    assert_eq!(second.load(&chain[4..5]), 1);
    assert_eq!(second.store.counters().bytes, room_for(9));
}

#[test]
fn closing_writes_what_is_queued() {
    let scratch = Scratch::new();
    let chain = keys(MAX_BUFFERS);
    let mut first = Tested::open(&scratch, 1 << 20);
    let used = first.store.touch(&chain);
    for (depth, &key) in chain.iter().enumerate() {
        assert!(first.store.save(key, used, depth, |bytes| bytes.copy_from_slice(&content(key, BLOCK))));
    }
    drop(first);
    assert_eq!(Tested::open(&scratch, 1 << 20).load(&chain), MAX_BUFFERS);
}

#[test]
fn a_limit_below_one_block_is_refused_with_the_numbers() {
    let scratch = Scratch::new();
    let error = Tested::open_in(Arc::new(Disk), &scratch, room_for(1) - 1).err().unwrap().to_string();
    assert!(error.contains("152 bytes") && error.contains("153 bytes"), "{error}");
    assert!(!scratch.dir().exists());
    Tested::open(&scratch, room_for(1)).save_chain(&keys(1));
    assert_eq!(Tested::open(&scratch, room_for(1)).load(&keys(1)), 1);
}

#[test]
fn a_smaller_limit_is_kept_from_the_start() {
    let scratch = Scratch::new();
    let chain = keys(8);
    Tested::open(&scratch, room_for(8)).save_chain(&chain);
    let mut store = Tested::open(&scratch, room_for(3) + 7);
    assert_eq!(bytes_in(&scratch.dir()), room_for(3));
    assert_eq!(store.load(&chain), 3, "the deepest blocks went");
}

#[test]
fn another_process_only_loads() {
    let scratch = Scratch::new();
    let chain = keys(4);
    let mut first = Tested::open(&scratch, room_for(4));
    first.save_chain(&chain[..3]);
    let mut second = Tested::open(&scratch, room_for(4));
    let notice = second.store.notice().unwrap();
    assert!(notice.contains("another process") && notice.contains("cache"), "{notice}");
    assert_eq!(second.store.secret(), first.store.secret());
    assert!(!second.store.can_save() && !second.save(chain[3], Use(1), 3));
    assert_eq!(second.load(&chain[..3]), 3);
    first.save(chain[3], first.store.last, 3);
    assert!(!second.store.contains(chain[3]), "it looked when it started");

    fs::remove_file(scratch.block(chain[1])).unwrap();
    fs::write(scratch.block(chain[2]), vec![0; FILE as usize]).unwrap();
    assert_eq!(second.load(&chain[..3]), 1);
    assert_eq!(second.load(&chain[2..3]), 0);
    assert_eq!(second.held(&chain), [true, false, false, false]);
    assert!(scratch.block(chain[2]).exists(), "it removes nothing");
    drop(first);
    drop(second);
    assert_eq!(Tested::open(&scratch, room_for(4)).store.notice(), None);
}

#[test]
fn all_who_start_at_once_agree() {
    for _ in 0..8 {
        let scratch = Scratch::new();
        let barrier = Barrier::new(12);
        let opened: Vec<([u8; 32], bool)> = std::thread::scope(|scope| {
            let open = || {
                barrier.wait();
                let opened = Tested::open(&scratch, 1 << 20);
                barrier.wait();
                (*opened.store.secret(), opened.store.can_save())
            };
            let threads: Vec<_> = (0..12).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(opened.iter().all(|(secret, _)| *secret == opened[0].0));
        assert_ne!(opened[0].0, [0; 32]);
        assert_eq!(opened.iter().filter(|(_, can_save)| *can_save).count(), 1);
        Tested::open(&scratch, 1 << 20);
        let names: Vec<_> = fs::read_dir(scratch.dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }
}

#[cfg(unix)]
#[test]
fn nobody_else_may_read() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    let key = keys(1)[0];
    Tested::open(&scratch, 1 << 20).save_chain(&[key]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&scratch.dir()), 0o700);
    assert_eq!(mode(&scratch.dir().join("secret")), 0o600);
    assert_eq!(mode(scratch.block(key).parent().unwrap()), 0o700);
    assert_eq!(mode(&scratch.block(key)), 0o600);
}

#[test]
fn loading_waits_for_buffers() {
    let scratch = Scratch::new();
    let chain = keys(MAX_BUFFERS + 3);
    let mut tested = Tested::open(&scratch, 1 << 20);
    tested.save_chain(&chain);
    tested.store.load(5, chain.clone());
    let mut held: Vec<Loaded> = (0..MAX_BUFFERS).map(|_| tested.receive()).collect();
    assert!(tested.inbox.recv_timeout(Duration::from_millis(50)).is_err(), "no buffer is left");
    held.pop();
    assert_eq!(tested.receive().index, MAX_BUFFERS);
    // Its buffer was dropped at once, and the next ones are.
    assert_eq!(tested.receive().index, MAX_BUFFERS + 1);
    assert_eq!(tested.receive().index, MAX_BUFFERS + 2);
    drop(tested);
    drop(held);
}

#[test]
fn cancelled_tickets_stop() {
    let scratch = Scratch::new();
    let chain = keys(MAX_BUFFERS + 3);
    let mut tested = Tested::open(&scratch, 1 << 20);
    tested.save_chain(&chain);
    tested.store.load(1, chain.clone());
    tested.store.load(2, chain.clone());
    tested.store.load(3, chain[..2].to_vec());
    let held: Vec<Loaded> = (0..MAX_BUFFERS).map(|_| tested.receive()).collect();
    tested.store.cancel(1);
    tested.store.cancel(2);
    tested.store.cancel(99);
    drop(held);
    let rest: Vec<(u64, usize)> = (0..2).map(|_| tested.receive()).map(|l| (l.ticket, l.index)).collect();
    assert_eq!(rest, [(3, 0), (3, 1)]);
    assert!(tested.inbox.try_recv().is_err());
}
