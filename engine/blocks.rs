//! Cache blocks as numbers: who holds which. Knows no tensor.

use models::batch::PAGE_TOKENS;

/// Hands out block ids; every block is free or held by one sequence.
pub struct BlockPool {
    free: Vec<u32>,
    total: usize,
}

impl BlockPool {
    /// A pool of `total` free blocks.
    pub fn new(total: usize) -> Self {
        // Popped from the end, so the lowest ids go first and memory is touched from its beginning.
        Self { free: (0..total as u32).rev().collect(), total }
    }

    /// Blocks that hold `tokens` positions.
    pub fn blocks_for(tokens: usize) -> usize {
        tokens.div_ceil(PAGE_TOKENS)
    }

    /// Blocks nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes `count` blocks, or none if there are not as many.
    pub fn take(&mut self, count: usize) -> Option<BlockTable> {
        (count <= self.free.len()).then(|| BlockTable(self.free.split_off(self.free.len() - count)))
    }

    /// Takes a table back.
    pub fn release(&mut self, table: BlockTable) {
        self.free.extend(table.0);
        assert!(self.free.len() <= self.total, "a block was released twice");
    }
}

/// The blocks of one sequence, in the order of its positions.
#[derive(Debug)]
pub struct BlockTable(Vec<u32>);

impl BlockTable {
    /// Block ids.
    pub fn ids(&self) -> &[u32] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_taken_once_and_come_back() {
        let mut pool = BlockPool::new(4);
        let first = pool.take(3).unwrap();
        assert!(pool.take(2).is_none());
        let second = pool.take(1).unwrap();
        let mut ids = [first.ids(), second.ids()].concat();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2, 3]);
        pool.release(first);
        pool.release(second);
        assert_eq!(pool.free(), 4);
        assert_eq!(BlockPool::blocks_for(0), 0);
        assert_eq!(BlockPool::blocks_for(64), 1);
        assert_eq!(BlockPool::blocks_for(65), 2);
    }
}
