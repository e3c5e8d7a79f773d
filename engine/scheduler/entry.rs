//! One sequence as the scheduler sees it: how many tokens are known and how many are cached, and its blocks.

use models::batch::{BlockKind, PAGE_TOKENS, Tables};

use super::{Copy, SequenceId};
use crate::blocks::{BlockKey, BlockPool};

/// Blocks of one kind of layer, and how far back these look.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) kind: BlockKind,
    pub(super) pool: BlockPool,
    pub(super) window: Option<usize>,
}

impl Kind {
    /// The first block that the token at `position`, or any after it, may read.
    pub(super) fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window) / PAGE_TOKENS)
    }

    /// Blocks to be taken until `known` tokens are cached, `cached` of which are, when a step runs at most `chunk`:
    /// blocks that a window has passed serve again.
    pub(super) fn missing(&self, cached: usize, known: usize, chunk: usize) -> usize {
        let missing = BlockPool::blocks_for(known) - BlockPool::blocks_for(cached);
        self.window.map_or(missing, |window| missing.min(BlockPool::blocks_for(window + chunk) + 1))
    }
}

/// The blocks of one sequence, of one kind, in the order of its positions.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    /// Those before `begin` have been given back; their entries mean nothing.
    pub(super) ids: Vec<u32>,
    pub(super) begin: usize,
}

impl Table {
    /// From the end, so that the end of a prefix is forgotten before its beginning.
    fn release(&mut self, pool: &mut BlockPool) {
        self.ids.drain(self.begin..).rev().for_each(|id| pool.release(id));
        self.ids.clear();
        self.begin = 0;
    }
}

/// A block that comes from the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Its content.
    pub key: BlockKey,
    /// Which block of the sequence it is.
    pub index: usize,
    /// Where its rows go, for each kind that lacks them.
    pub full: Option<u32>,
    /// As `full`.
    pub window: Option<u32>,
}

/// A sequence.
#[derive(Debug)]
pub(super) struct Entry {
    /// Keys of the blocks that the known tokens fill.
    pub(super) keys: Vec<BlockKey>,
    /// Prompt and output.
    pub(super) known: usize,
    /// Tokens whose rows are in the cache.
    pub(super) cached: usize,
    /// By the order of the scheduler's kinds.
    pub(super) tables: [Table; 2],
    /// What it waits for: a block that another sequence computes.
    pub(super) blocked_on: Option<BlockKey>,
    /// What is being read from the archive; runs again when it is there.
    pub(super) restoring: Vec<Restored>,
}

impl Entry {
    pub(super) fn new(known: usize, keys: Vec<BlockKey>) -> Self {
        assert_eq!(keys.len(), known / PAGE_TOKENS, "a key for every full block");
        let tables = Default::default();
        Self { keys, known, cached: 0, tables, blocked_on: None, restoring: Vec::new() }
    }

    pub(super) fn missing(&self) -> usize {
        self.known - self.cached
    }

    /// Blocks that can come from the cache: one token at least is run, to have its logits.
    pub(super) fn reusable(&self) -> usize {
        (self.known - 1) / PAGE_TOKENS
    }

    pub(super) fn tables(&self, kinds: usize) -> Tables<'_> {
        Tables { full: &self.tables[0].ids, window: &self.tables[kinds - 1].ids }
    }

    /// The partly filled block, if other sequences have it too, so that it cannot be written to.
    fn shared_tail(&self, table: &Table, pool: &BlockPool) -> Option<u32> {
        if self.cached.is_multiple_of(PAGE_TOKENS) {
            return None;
        }
        Some(table.ids[self.cached / PAGE_TOKENS]).filter(|id| pool.is_shared(*id))
    }

    /// For how many of the next `wanted` tokens there are blocks.
    pub(super) fn room(&self, kinds: &[Kind], wanted: usize) -> usize {
        let room = kinds.iter().zip(&self.tables).map(|(Kind { pool, .. }, table)| {
            let copied = usize::from(self.shared_tail(table, pool).is_some());
            match pool.available().checked_sub(copied) {
                Some(blocks) => (table.ids.len() + blocks) * PAGE_TOKENS - self.cached,
                None => 0,
            }
        });
        room.fold(wanted, usize::min)
    }

    /// Takes the blocks for the next `tokens`, for which there is room.
    pub(super) fn reserve(
        &mut self,
        id: SequenceId,
        kinds: &mut [Kind],
        tokens: usize,
        copies: &mut Vec<(SequenceId, Copy)>,
    ) {
        for (place, Kind { kind, pool, .. }) in kinds.iter_mut().enumerate() {
            let tail = self.shared_tail(&self.tables[place], pool);
            let ids = &mut self.tables[place].ids;
            let mut take = || pool.take().expect("there is room");
            if let Some(from) = tail {
                let to = take();
                ids[self.cached / PAGE_TOKENS] = to;
                copies.push((id, Copy { kind: *kind, from, to }));
                pool.release(from);
            }
            while ids.len() * PAGE_TOKENS < self.cached + tokens {
                ids.push(pool.take().expect("there is room"));
            }
        }
    }

    /// `tokens` more are cached: publishes the blocks they fill, as `published` hears, and gives back those behind
    /// the window.
    pub(super) fn advance(
        &mut self,
        kinds: &mut [Kind],
        tokens: usize,
        mut published: impl FnMut(usize, BlockKey),
    ) {
        let (before, after) = (self.cached / PAGE_TOKENS, (self.cached + tokens) / PAGE_TOKENS);
        self.cached += tokens;
        for (Kind { pool, .. }, table) in kinds.iter_mut().zip(&mut self.tables) {
            for index in before..after {
                table.ids[index] = pool.publish(table.ids[index], self.keys[index]);
            }
        }
        (before..after).for_each(|index| published(index, self.keys[index]));
        for (kind, table) in kinds.iter_mut().zip(&mut self.tables) {
            let first = kind.first(self.cached).min(table.ids.len());
            for id in &mut table.ids[table.begin.min(first)..first] {
                kind.pool.release(std::mem::take(id));
            }
            table.begin = table.begin.max(first);
        }
    }

    /// Gives all blocks back.
    pub(super) fn release(&mut self, kinds: &mut [Kind]) {
        for (kind, table) in kinds.iter_mut().zip(&mut self.tables) {
            table.release(&mut kind.pool);
        }
        self.cached = 0;
        self.restoring.clear();
    }
}
