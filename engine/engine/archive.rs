//! Between the loop and the disk: which blocks are on their way to it, and which from it. The disk itself is
//! [`BlockStore`]'s, on threads of its own; here blocks are only copied between its buffers and the runner's cache.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use models::Runner;
use models::batch::BlockKind;

use crate::blocks::BlockKey;
use crate::scheduler::{Restore, Restored, Scheduler, SequenceId};
use crate::store::{BlockStore, Loaded, StoreError, Use};

/// Longest time that an ending engine goes on handing out blocks to be saved.
const LAST_SAVES: Duration = Duration::from_secs(10);
/// Blocks that may wait to be saved; beyond, none are added.
const MOST_SAVES: usize = 1 << 16;

/// Where the prefix cache goes when it is not in memory.
#[derive(Clone, Debug)]
pub struct ArchiveOptions {
    /// A folder of its own.
    pub folder: PathBuf,
    /// Most bytes of its files.
    pub limit_bytes: u64,
}

/// A block to be saved.
struct Save {
    key: BlockKey,
    used: Use,
    depth: usize,
}

/// Blocks of a sequence on their way from the disk.
struct Ticket {
    sequence: SequenceId,
    blocks: Vec<Restored>,
}

/// The disk, as the loop sees it.
pub(super) struct Archive {
    store: BlockStore,
    full_bytes: usize,
    tickets: HashMap<u64, Ticket>,
    last_ticket: u64,
    to_save: VecDeque<Save>,
}

impl Archive {
    /// Opens the folder for a runner's blocks; `notify` hears of blocks that have come.
    pub(super) fn open(
        options: &ArchiveOptions,
        runner: &dyn Runner,
        notify: impl Fn(Loaded) + Send + 'static,
    ) -> Result<Self, StoreError> {
        let full_bytes = runner.block_bytes(BlockKind::Full);
        let bytes = full_bytes + runner.block_bytes(BlockKind::Window);
        let store = BlockStore::open(&options.folder, options.limit_bytes, bytes, notify)?;
        if let Some(notice) = store.notice() {
            tracing::warn!("{notice}");
        }
        let (tickets, to_save) = (HashMap::new(), VecDeque::new());
        Ok(Self { store, full_bytes, tickets, last_ticket: 0, to_save })
    }

    pub(super) fn secret(&self) -> [u8; 32] {
        *self.store.secret()
    }

    pub(super) fn contains(&self, key: BlockKey) -> bool {
        self.store.contains(key)
    }

    /// A chain of blocks is used, of which `found` were in the cache; what it publishes is to be saved as of now.
    pub(super) fn touch(&mut self, chain: &[BlockKey], found: usize) -> Use {
        let used = self.store.touch(chain);
        // What the disk had no time for when it was computed.
        for (depth, &key) in chain[..found].iter().enumerate() {
            if !self.store.contains(key) {
                self.queue(key, used, depth);
            }
        }
        used
    }

    /// Has blocks read.
    pub(super) fn restore(&mut self, restore: &Restore) {
        self.last_ticket += 1;
        let Restore { sequence, blocks } = restore.clone();
        self.store.load(self.last_ticket, blocks.iter().map(|block| block.key).collect());
        self.tickets.insert(self.last_ticket, Ticket { sequence, blocks });
    }

    /// The sequence no longer waits for its blocks, if it did.
    pub(super) fn forget(&mut self, sequence: SequenceId) {
        let Self { tickets, store, .. } = self;
        tickets.retain(|id, ticket| {
            let stays = ticket.sequence != sequence;
            if !stays {
                store.cancel(*id);
            }
            stays
        });
    }

    /// A block has come, or will not.
    pub(super) fn loaded(&mut self, loaded: Loaded, runner: &mut dyn Runner, scheduler: &mut Scheduler) {
        let Loaded { ticket, index, bytes } = loaded;
        let Some(Ticket { sequence, blocks }) = self.tickets.get(&ticket) else { return };
        let (sequence, count) = (*sequence, blocks.len());
        let Some(bytes) = bytes else {
            self.tickets.remove(&ticket);
            scheduler.restored(sequence, index);
            return;
        };
        let (full, window) = bytes.split_at(self.full_bytes);
        if let Some(id) = blocks[index].full {
            runner.write_block(BlockKind::Full, id, full);
        }
        if let Some(id) = blocks[index].window {
            runner.write_block(BlockKind::Window, id, window);
        }
        if index + 1 == count {
            self.tickets.remove(&ticket);
            scheduler.restored(sequence, count);
        }
    }

    /// A block at this depth of its chain is complete.
    pub(super) fn queue(&mut self, key: BlockKey, used: Use, depth: usize) {
        // Without its beginning a prefix is not found, so what came first stays.
        if self.store.is_writable() && self.to_save.len() < MOST_SAVES {
            self.to_save.push_back(Save { key, used, depth });
        }
    }

    /// Hands out blocks to be saved, as many as there are buffers for.
    pub(super) fn save(&mut self, runner: &dyn Runner, scheduler: &Scheduler) {
        while self.store.can_save() {
            let Some(Save { key, used, depth }) = self.to_save.pop_front() else { return };
            // What has been taken for something else meanwhile is lost to the disk.
            let Some((full, window)) = scheduler.locate(key) else { continue };
            self.store.save(key, used, depth, |bytes| {
                let (full_bytes, window_bytes) = bytes.split_at_mut(self.full_bytes);
                runner.read_block(BlockKind::Full, full, full_bytes);
                if let Some(window) = window {
                    runner.read_block(BlockKind::Window, window, window_bytes);
                }
            });
        }
    }

    pub(super) fn has_saves(&self) -> bool {
        !self.to_save.is_empty()
    }

    /// Saves what is left, for a while.
    pub(super) fn close(mut self, runner: &dyn Runner, scheduler: &Scheduler) {
        let begun = Instant::now();
        while self.has_saves() && begun.elapsed() < LAST_SAVES {
            self.save(runner, scheduler);
            std::thread::sleep(Duration::from_millis(1));
        }
        self.store.close();
    }
}
