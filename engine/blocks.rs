//! A pool of cache blocks by id: which are free, which are in use and by how many, and which are kept because what
//! they hold may be asked for again. It knows no tensor, no token and no request.
//!
//! A block's life: [`take`](BlockPool::take) gives it to one owner; [`share`](BlockPool::share) adds owners;
//! [`publish`](BlockPool::publish) says by which key its content can be found; when the last owner gives it back
//! ([`release`](BlockPool::release)) it is *cached* if it was published, else free. A cached block is found again by
//! its key, or taken for something else when no block is free: the one released longest ago first. Owners
//! release a sequence's blocks from its end, so the end of a prefix always goes before its beginning.

use std::collections::HashMap;

use models::batch::PAGE_TOKENS;

/// Names the content of a block: the tokens in it and all before it, for one model, numerics and tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey(pub u128);

/// No block: the end of a list.
const NONE: u32 = u32::MAX;

/// How many blocks are in which state; they add up to the pool's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Hold nothing of use.
    pub free: usize,
    /// Owned by at least one sequence.
    pub used: usize,
    /// Owned by none and kept for their content.
    pub cached: usize,
}

#[derive(Clone, Debug)]
struct Block {
    owners: u32,
    key: Option<BlockKey>,
    /// Neighbours in the list of cached blocks, by time of release.
    older: u32,
    newer: u32,
}

/// The blocks of a runner's cache, of one kind.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    by_key: HashMap<BlockKey, u32>,
    free: Vec<u32>,
    oldest: u32,
    newest: u32,
    cached: usize,
}

impl BlockPool {
    /// A pool of the ids below `total`, all free.
    pub fn new(total: usize) -> Self {
        let block = Block { owners: 0, key: None, older: NONE, newer: NONE };
        Self {
            blocks: vec![block; total],
            by_key: HashMap::new(),
            free: (0..total as u32).rev().collect(),
            oldest: NONE,
            newest: NONE,
            cached: 0,
        }
    }

    /// Blocks that hold so many tokens.
    pub fn blocks_for(tokens: usize) -> usize {
        tokens.div_ceil(PAGE_TOKENS)
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// How many blocks are in which state.
    pub fn counts(&self) -> Counts {
        let (free, cached) = (self.free.len(), self.cached);
        Counts { free, used: self.blocks.len() - free - cached, cached }
    }

    /// Blocks that can be taken.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached
    }

    /// A block for one owner, if any can be had. What it held before is forgotten.
    pub fn take(&mut self) -> Option<u32> {
        let id = match self.free.pop() {
            Some(id) => id,
            None if self.oldest == NONE => return None,
            None => {
                let id = self.oldest;
                self.unlink(id);
                if let Some(key) = self.blocks[id as usize].key.take() {
                    self.by_key.remove(&key);
                }
                id
            }
        };
        self.blocks[id as usize].owners = 1;
        Some(id)
    }

    /// One more owner of a block that has one.
    pub fn share(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        assert!(block.owners > 0, "block {id} has no owner");
        block.owners += 1;
    }

    /// Whether the block has other owners besides one.
    pub fn is_shared(&self, id: u32) -> bool {
        self.blocks[id as usize].owners > 1
    }

    /// The block of this content, if there is one.
    pub fn find(&self, key: BlockKey) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// One more owner for the block of this content; whether it was merely cached.
    pub fn take_found(&mut self, id: u32) -> bool {
        let was_cached = self.blocks[id as usize].owners == 0;
        if was_cached {
            self.unlink(id);
        }
        self.blocks[id as usize].owners += 1;
        was_cached
    }

    /// Whether a block that was found is owned by none.
    pub fn is_cached(&self, id: u32) -> bool {
        self.blocks[id as usize].owners == 0
    }

    /// An owner gives the block back.
    pub fn release(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        assert!(block.owners > 0, "block {id} is given back twice");
        block.owners -= 1;
        if block.owners == 0 {
            match block.key {
                Some(_) => self.link_newest(id),
                None => self.free.push(id),
            }
        }
    }

    /// The block, owned by the caller, holds the content of this key and will not change. Where another block
    /// already does, the caller gets that one in exchange: what counts is the id that comes back.
    pub fn publish(&mut self, id: u32, key: BlockKey) -> u32 {
        match self.find(key) {
            Some(known) if known == id => id,
            Some(known) => {
                self.take_found(known);
                self.release(id);
                known
            }
            None => {
                let block = &mut self.blocks[id as usize];
                assert!(block.owners > 0 && block.key.is_none(), "block {id} is not its caller's to publish");
                block.key = Some(key);
                self.by_key.insert(key, id);
                id
            }
        }
    }

    fn link_newest(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        (block.older, block.newer) = (self.newest, NONE);
        match self.newest {
            NONE => self.oldest = id,
            newest => self.blocks[newest as usize].newer = id,
        }
        self.newest = id;
        self.cached += 1;
    }

    fn unlink(&mut self, id: u32) {
        let Block { older, newer, .. } = self.blocks[id as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.cached -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn blocks_are_taken_once_and_come_back() {
        let mut pool = BlockPool::new(3);
        let ids = [pool.take().unwrap(), pool.take().unwrap(), pool.take().unwrap()];
        let mut sorted = ids;
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2]);
        assert_eq!(pool.take(), None);
        pool.publish(ids[0], BlockKey(7));
        pool.share(ids[0]);
        pool.release(ids[0]);
        assert_eq!(pool.counts(), Counts { free: 0, used: 3, cached: 0 });
        ids.iter().for_each(|id| pool.release(*id));
        assert_eq!(pool.counts(), Counts { free: 2, used: 0, cached: 1 });
        assert_eq!(pool.find(BlockKey(7)), Some(ids[0]));
    }

    #[test]
    fn what_was_released_first_goes_first() {
        let mut pool = BlockPool::new(3);
        let ids: Vec<u32> = (0..3).map(|_| pool.take().unwrap()).collect();
        for (key, id) in ids.iter().enumerate() {
            pool.publish(*id, BlockKey(key as u128));
        }
        for id in [ids[2], ids[0], ids[1]] {
            pool.release(id);
        }
        let found = pool.find(BlockKey(2)).unwrap();
        pool.take_found(found);
        pool.release(found);
        assert_eq!(pool.take(), Some(ids[0]));
        assert_eq!(pool.find(BlockKey(0)), None, "its content is gone");
        assert_eq!(pool.take(), Some(ids[1]));
        assert_eq!(pool.take(), Some(ids[2]));
    }

    #[test]
    fn the_same_content_is_kept_once() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        assert_eq!(pool.publish(a, BlockKey(1)), a);
        assert_eq!(pool.publish(b, BlockKey(1)), a);
        assert_eq!(pool.counts(), Counts { free: 1, used: 1, cached: 0 });
        pool.release(a);
        pool.release(a);
        assert_eq!(pool.counts(), Counts { free: 1, used: 0, cached: 1 });
    }

    proptest! {
        /// Against a plain model: owners per block, and a list of cached blocks in order of release.
        #[test]
        fn any_sequence_of_calls_keeps_the_books(calls in prop::collection::vec((0u8..5, any::<u8>()), 1..400)) {
            let mut pool = BlockPool::new(6);
            let mut owned: Vec<u32> = Vec::new();
            let mut cached: Vec<u32> = Vec::new();
            let mut keys: HashMap<u32, BlockKey> = HashMap::new();
            for (call, pick) in calls {
                let key = BlockKey(u128::from(pick % 8));
                let any = (!owned.is_empty()).then(|| usize::from(pick) % owned.len().max(1));
                match (call, any) {
                    (0, _) => match pool.take() {
                        Some(id) => {
                            if let Some(place) = cached.iter().position(|other| *other == id) {
                                prop_assert_eq!(place, 0, "the oldest goes");
                                prop_assert_eq!(owned.iter().collect::<std::collections::HashSet<_>>().len() + cached.len(), 6);
                                cached.remove(0);
                                keys.remove(&id);
                            }
                            prop_assert!(!owned.contains(&id) && !keys.contains_key(&id));
                            owned.push(id);
                        }
                        None => prop_assert!(cached.is_empty()),
                    },
                    (1, Some(at)) => {
                        pool.share(owned[at]);
                        owned.push(owned[at]);
                    }
                    (2, Some(at)) => {
                        let id = owned.swap_remove(at);
                        pool.release(id);
                        if !owned.contains(&id) && keys.contains_key(&id) {
                            cached.push(id);
                        }
                    }
                    (3, Some(at)) if !keys.contains_key(&owned[at]) && !pool.is_shared(owned[at]) => {
                        let known = keys.iter().find(|(_, other)| **other == key).map(|(id, _)| *id);
                        let id = pool.publish(owned[at], key);
                        prop_assert_eq!(id, known.unwrap_or(owned[at]));
                        cached.retain(|other| *other != id);
                        owned[at] = id;
                        keys.insert(id, key);
                    }
                    (4, _) => {
                        let known = keys.iter().find(|(_, other)| **other == key).map(|(id, _)| *id);
                        prop_assert_eq!(pool.find(key), known);
                        if let Some(id) = known {
                            prop_assert_eq!(pool.take_found(id), !owned.contains(&id));
                            cached.retain(|other| *other != id);
                            owned.push(id);
                        }
                    }
                    _ => {}
                }
                let used = owned.iter().collect::<std::collections::HashSet<_>>().len();
                let counts = Counts { free: 6 - used - cached.len(), used, cached: cached.len() };
                prop_assert_eq!(pool.counts(), counts);
            }
        }
    }
}
