//! A runner's cache of numbers: the row of a position is the hash of all tokens up to it, so a row in the wrong place,
//! or of another text, is never mistaken for the right one.

use models::batch::{BlockKind, PAGE_TOKENS, Tables};
use moebius::scheduler::{Copy, Limits};

/// What nobody would write.
pub const GARBAGE: u64 = 0xdead_dead_dead_dead;

/// The blocks of one kind.
pub struct Rows {
    pub kind: BlockKind,
    pub window: Option<usize>,
    blocks: Vec<[u64; PAGE_TOKENS]>,
    /// How many running sequences may still read each block.
    pub readers: Vec<u32>,
}

impl Rows {
    /// Of each kind that there is.
    pub fn all(limits: &Limits) -> Vec<Self> {
        let rows = |kind, blocks, window| Self {
            kind,
            window,
            blocks: vec![[GARBAGE; PAGE_TOKENS]; blocks],
            readers: vec![0; blocks],
        };
        let mut all = vec![rows(BlockKind::Full, limits.blocks, None)];
        all.extend(limits.window.map(|(window, blocks)| rows(BlockKind::Window, blocks, Some(window))));
        all
    }

    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    pub fn table<'a>(&self, tables: &Tables<'a>) -> &'a [u32] {
        match self.kind {
            BlockKind::Full => tables.full,
            BlockKind::Window => tables.window,
        }
    }

    /// The first position that the token at `position` sees.
    pub fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The two kinds have different rows of the same text.
    fn row(&self, hash: u64) -> u64 {
        hash ^ u64::from(self.kind == BlockKind::Window)
    }

    /// Rows of the positions from `start` on.
    pub fn write(&mut self, table: &[u32], start: usize, hashes: &[u64]) {
        for (position, hash) in (start..).zip(hashes) {
            let block = table[position / PAGE_TOKENS];
            assert!(self.readers[block as usize] <= 1, "{:?} block {block} is written and shared", self.kind);
            let row = self.row(*hash);
            self.blocks[block as usize][position % PAGE_TOKENS] = row;
        }
    }

    /// Asserts that the positions from `start` on hold these rows.
    pub fn read(&self, table: &[u32], start: usize, hashes: &[u64]) {
        for (position, hash) in (start..).zip(hashes) {
            let block = table[position / PAGE_TOKENS];
            let found = self.blocks[block as usize][position % PAGE_TOKENS];
            assert_eq!(found, self.row(*hash), "{:?} block {block}, position {position}", self.kind);
        }
    }

    pub fn copy(&mut self, copy: &Copy) {
        let Copy { from, to, .. } = *copy;
        assert_ne!(from, to);
        assert_eq!(self.readers[to as usize], 1, "{:?} block {to} is copied to", self.kind);
        self.blocks[to as usize] = self.blocks[from as usize];
    }
}
