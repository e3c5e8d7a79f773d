//! A file system that fails: at every call, once and for good, with half of a file written.

use std::fs::TryLockError;
use std::sync::Mutex;

use super::files::Listed;
use super::*;

/// Answers for a call, given its number and name; an error takes the place of the call.
type Rule = dyn Fn(usize, &'static str) -> io::Result<()> + Send + Sync;

/// The real file system, where `rule` lets it.
struct Faulty {
    calls: AtomicUsize,
    rule: Box<Rule>,
}

impl Faulty {
    fn new(rule: impl Fn(usize, &'static str) -> io::Result<()> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { calls: AtomicUsize::new(0), rule: Box::new(rule) })
    }

    fn ask(&self, name: &'static str) -> io::Result<()> {
        (self.rule)(self.calls.fetch_add(1, Ordering::SeqCst), name)
    }
}

impl Files for Faulty {
    fn create_root(&self, path: &Path) -> io::Result<()> {
        self.ask("create_root").and_then(|()| Disk.create_root(path))
    }

    fn create_folder(&self, path: &Path) -> io::Result<()> {
        self.ask("create_folder").and_then(|()| Disk.create_folder(path))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Listed>> {
        self.ask("list").and_then(|()| Disk.list(path))
    }

    fn read(&self, path: &Path, into: &mut [u8]) -> io::Result<()> {
        self.ask("read").and_then(|()| Disk.read(path, into))
    }

    fn write(&self, path: &Path, bytes: &[u8], modified: SystemTime) -> io::Result<()> {
        self.ask("write").inspect_err(|_| {
            Disk.write(path, &bytes[..bytes.len() / 2], modified).ok();
        })?;
        Disk.write(path, bytes, modified)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.ask("rename").and_then(|()| Disk.rename(from, to))
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.ask("link").and_then(|()| Disk.link(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.ask("remove").and_then(|()| Disk.remove(path))
    }

    fn set_modified(&self, path: &Path, modified: SystemTime) -> io::Result<()> {
        self.ask("set_modified").and_then(|()| Disk.set_modified(path, modified))
    }

    fn lock(&self, path: &Path) -> Result<File, TryLockError> {
        self.ask("lock").map_err(TryLockError::Error).and_then(|()| Disk.lock(path))
    }
}

fn full() -> io::Error {
    io::ErrorKind::StorageFull.into()
}

/// Two chains into a store of four blocks: making room, replacing a damaged file, loading.
fn scenario(scratch: &Scratch, files: Arc<dyn Files>) {
    let keys = keys(7);
    let Ok(mut tested) = Tested::open_in(files, scratch, room_for(4)) else { return };
    tested.save_chain(&keys[..3]);
    fs::write(scratch.block(keys[1]), b"damaged").ok();
    tested.load(&keys[..3]);
    tested.save_chain(&keys[3..]);
    tested.load(&keys[3..]);
}

/// After whatever happened, a healthy store keeps its limit, tells the truth and works.
fn is_healthy(scratch: &Scratch, context: &str) {
    assert!(bytes_in(&scratch.dir()) <= room_for(4), "{context}");
    // Half a secret cannot be told from a spoilt one; it says so and is removed by hand.
    let secret = scratch.dir().join("secret");
    if fs::metadata(&secret).is_ok_and(|found| found.len() < 32) {
        fs::remove_file(&secret).unwrap();
    }
    let mut tested = Tested::open(scratch, room_for(4));
    assert_eq!(tested.store.notice(), None, "{context}");
    for key in keys(7) {
        let is_damaged = fs::read(scratch.block(key)).is_ok_and(|bytes| bytes == b"damaged");
        assert!(!is_damaged || !tested.store.contains(key), "{context}");
        let held = tested.store.contains(key);
        assert_eq!(tested.load(&[key]), usize::from(held), "{context}");
    }
    let fresh = keys(11).split_off(7);
    tested.save_chain(&fresh);
    assert_eq!(tested.load(&fresh), 4, "{context}");
    assert_eq!(bytes_in(&scratch.dir()), room_for(4), "{context}");
}

#[test]
fn a_failure_of_any_call_costs_a_block_at_most() {
    let kinds = [
        (io::ErrorKind::StorageFull, false),
        (io::ErrorKind::StorageFull, true),
        (io::ErrorKind::PermissionDenied, true),
        (io::ErrorKind::NotFound, false),
    ];
    for (kind, lasting) in kinds {
        let mut failing = 0;
        loop {
            let scratch = Scratch::new();
            let files = Faulty::new(move |call, name| {
                let fails = call == failing || lasting && call > failing;
                // That a file is gone is not said of one that is there.
                let is_lie = name == "remove" && kind == io::ErrorKind::NotFound;
                if fails && !is_lie { Err(kind.into()) } else { Ok(()) }
            });
            scenario(&scratch, files.clone());
            is_healthy(&scratch, &format!("{kind:?} at call {failing}, lasting: {lasting}"));
            if files.calls.load(Ordering::SeqCst) <= failing {
                break;
            }
            failing += 1;
        }
        assert!(failing > 40, "{failing} calls were tried");
    }
}

#[test]
fn the_limit_holds_between_any_two_calls() {
    for failing in (0..70).step_by(3) {
        let scratch = Scratch::new();
        let dir = scratch.dir();
        let most = Arc::new(Mutex::new(0));
        let seen = Arc::clone(&most);
        let files = Faulty::new(move |call, name| {
            let mut most = seen.lock().unwrap();
            *most = bytes_in(&dir).max(*most);
            let fails =
                call >= failing && (call - failing) % 5 < 2 && matches!(name, "write" | "remove" | "rename");
            if fails { Err(full()) } else { Ok(()) }
        });
        let keys = keys(300);
        let Ok(mut tested) = Tested::open_in(files, &scratch, room_for(4)) else { continue };
        for chain in keys.chunks(6) {
            tested.save_chain(chain);
        }
        drop(tested);
        assert!(
            *most.lock().unwrap() <= room_for(4),
            "{} bytes, failing from {failing}",
            most.lock().unwrap()
        );
    }
}

#[test]
fn a_full_disk_pauses_saving_and_nothing_else() {
    let scratch = Scratch::new();
    let keys = keys(4);
    let is_full = Arc::new(Mutex::new(false));
    let seen = Arc::clone(&is_full);
    let files = Faulty::new(
        move |_, name| {
            if *seen.lock().unwrap() && name == "write" { Err(full()) } else { Ok(()) }
        },
    );
    let mut tested = Tested::open_in(files, &scratch, 1 << 20).unwrap();
    tested.save_chain(&keys[..2]);
    *is_full.lock().unwrap() = true;
    let used = tested.store.touch(&keys);
    assert!(tested.save(keys[2], used, 2));
    for _ in 0..64 {
        assert!(tested.store.can_save());
        assert!(!tested.save(keys[2], used, 2));
    }
    assert_eq!(tested.load(&keys), 2);
    assert!(tested.save(keys[2], used, 2), "it tries again");
    assert_eq!(tested.store.counters().failed_saves, 2);
    *is_full.lock().unwrap() = false;
    assert_eq!((0..70).position(|_| tested.save(keys[2], used, 2)), Some(64));
    assert_eq!(tested.load(&keys), 3);
    assert_eq!(tested.store.counters().bytes, bytes_in(&scratch.dir()));
}

#[test]
fn a_disk_that_stands_still_stops_nobody() {
    let scratch = Scratch::new();
    let chain = keys(MAX_BUFFERS + 1);
    let gate = Arc::new(Mutex::new(()));
    let closed = Arc::clone(&gate);
    let files = Faulty::new(move |_, name| {
        if name == "create_folder" {
            drop(closed.lock().unwrap());
        }
        Ok(())
    });
    let mut tested = Tested::open_in(files, &scratch, 1 << 20).unwrap();
    let held = gate.lock().unwrap();
    let used = tested.store.touch(&chain);
    let mut fill = |key: BlockKey, depth| {
        tested.store.save(key, used, depth, |bytes| bytes.copy_from_slice(&content(key, BLOCK)))
    };
    for (depth, &key) in chain[..MAX_BUFFERS].iter().enumerate() {
        assert!(fill(key, depth));
        assert!(!fill(key, depth), "it is under way");
    }
    assert!(!fill(chain[MAX_BUFFERS], MAX_BUFFERS));
    assert!(!tested.store.can_save());
    assert!(!tested.store.contains(chain[0]));
    assert_eq!(tested.load(&chain), 0);
    drop(held);
    tested.store.settle();
    assert!(tested.store.can_save());
    assert_eq!(tested.load(&chain), MAX_BUFFERS);
}

#[test]
fn a_use_counts_while_blocks_are_being_written() {
    let scratch = Scratch::new();
    let keys = keys(4);
    let gate = Arc::new(Barrier::new(2));
    let closed = Arc::clone(&gate);
    let renames = AtomicUsize::new(0);
    let files = Faulty::new(move |_, name| {
        if name == "rename" && renames.fetch_add(1, Ordering::SeqCst) == 0 {
            closed.wait();
            closed.wait();
        }
        Ok(())
    });
    let mut tested = Tested::open_in(files, &scratch, room_for(3)).unwrap();
    let uses = [(); 3].map(|()| tested.store.touch(&[]));
    for (&key, used) in keys.iter().zip(uses) {
        assert!(tested.store.save(key, used, 0, |bytes| bytes.copy_from_slice(&content(key, BLOCK))));
    }
    // The first is about to get its name, and the second waits for its turn.
    gate.wait();
    tested.store.touch(&keys[..2]);
    gate.wait();
    tested.store.settle();
    tested.save_chain(&keys[3..]);
    assert_eq!(tested.held(&keys), [true, true, false, true]);
    drop(tested);
    // The same order after a restart, by the times of the files.
    let tested = Tested::open(&scratch, room_for(2));
    assert_eq!(tested.held(&keys), [true, false, false, true]);
}

#[test]
fn a_block_saved_again_while_it_failed_to_load_stays() {
    let scratch = Scratch::new();
    let keys = keys(2);
    let gate = Arc::new(Barrier::new(2));
    let closed = Arc::clone(&gate);
    let reads = AtomicUsize::new(0);
    let files = Faulty::new(move |_, name| {
        // The first reads make and read the secret.
        if name == "read" && reads.fetch_add(1, Ordering::SeqCst) == 2 {
            closed.wait();
            closed.wait();
            return Err(io::Error::other("a bad sector"));
        }
        Ok(())
    });
    let mut tested = Tested::open_in(files, &scratch, room_for(1)).unwrap();
    tested.save_chain(&keys[..1]);
    tested.store.load(7, keys[..1].to_vec());
    gate.wait();
    tested.save_chain(&keys[1..]);
    tested.save_chain(&keys[..1]);
    gate.wait();
    assert!(tested.receive().bytes.is_none());
    tested.store.settle();
    assert!(tested.store.contains(keys[0]), "the new file is another one");
    assert_eq!(tested.load(&keys[..1]), 1);
}

#[test]
fn without_the_right_to_write_blocks_are_loaded() {
    let scratch = Scratch::new();
    let keys = keys(3);
    Tested::open(&scratch, room_for(3)).save_chain(&keys);
    for denied in [&["lock", "write", "remove"][..], &["write"], &["lock"]] {
        let files = Faulty::new(|_, name| {
            if denied.contains(&name) { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
        });
        let mut tested = Tested::open_in(files, &scratch, room_for(3)).unwrap();
        assert!(tested.store.notice().unwrap().contains("denied"));
        assert!(!tested.store.can_save());
        assert_eq!(tested.load(&keys), 3);
    }
    // What is over the limit and cannot be removed.
    let files = Faulty::new(|call, name| {
        if name == "remove" && call > 4 { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    });
    let mut tested = Tested::open_in(files, &scratch, room_for(1)).unwrap();
    assert!(tested.store.notice().unwrap().contains(".kv"));
    assert_eq!(tested.load(&keys), 3);
}

#[cfg(unix)]
#[test]
fn a_folder_without_the_right_to_write_is_only_read() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    let keys = keys(2);
    Tested::open(&scratch, 1 << 20).save_chain(&keys);
    let set = |mode| fs::set_permissions(scratch.dir(), fs::Permissions::from_mode(mode)).unwrap();
    set(0o500);
    if fs::write(scratch.dir().join("probe"), b"").is_ok() {
        println!("SKIP: this user may write everywhere");
    } else {
        let mut tested = Tested::open(&scratch, 1 << 20);
        assert!(tested.store.notice().is_some());
        assert_eq!(tested.load(&keys), 2);
    }
    set(0o700);
}

#[test]
fn secrets_agree_where_files_cannot_be_linked() {
    for _ in 0..20 {
        let scratch = Scratch::new();
        let barrier = Barrier::new(8);
        let open = || {
            let files =
                Faulty::new(
                    |_, name| {
                        if name == "link" { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
                    },
                );
            barrier.wait();
            *Tested::open_in(files, &scratch, 1 << 20).unwrap().store.secret()
        };
        let secrets: Vec<[u8; 32]> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(secrets.iter().all(|secret| *secret == secrets[0]));
    }
}
