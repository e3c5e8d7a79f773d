//! Random numbers, and texts that often begin alike.

use models::batch::PAGE_TOKENS;
use moebius::blocks::BlockKey;

const VOCAB: u64 = 50;
/// Finished texts that later prompts may continue.
const REMEMBERED: usize = 8;

/// Stirs two numbers into one.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z =
        (a ^ b.rotate_left(32).wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The same numbers for the same seed, on every machine.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(mix(seed, 1))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0, 0)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// True `per_mille` times in a thousand.
    pub fn chance(&mut self, per_mille: usize) -> bool {
        self.below(1000) < per_mille
    }

    pub fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }
}

/// Tokens, with a hash of every prefix and the key of every full block.
#[derive(Clone, Default)]
pub struct Text {
    pub tokens: Vec<u32>,
    /// Of the tokens up to and including each: what a layer's row stands for.
    pub hashes: Vec<u64>,
    pub keys: Vec<BlockKey>,
}

impl Text {
    pub fn new(tokens: &[u32]) -> Self {
        let mut text = Self::default();
        for token in tokens {
            text.push(*token);
        }
        text
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The key of the block that the token fills, if it does.
    pub fn push(&mut self, token: u32) -> Option<BlockKey> {
        let hash = mix(self.hashes.last().copied().unwrap_or(7), u64::from(token));
        self.tokens.push(token);
        self.hashes.push(hash);
        let full = self.len().is_multiple_of(PAGE_TOKENS);
        let key = full.then(|| BlockKey(u128::from(hash) << 64 | u128::from(mix(hash, 3))));
        self.keys.extend(key);
        key
    }

    /// Half of the time what any copy of this text would choose, so that forks part late or never.
    pub fn choose(&self, rng: &mut Rng) -> u32 {
        let greedy = self.hashes.last().expect("a text has a token") % VOCAB;
        if rng.chance(700) { greedy as u32 } else { rng.below(3) as u32 }
    }
}

/// Where prompts come from: a few trees of common beginnings, and what was said before.
pub struct Library {
    seed: u64,
    trees: usize,
    said: Vec<Vec<u32>>,
}

impl Library {
    pub fn new(seed: u64, trees: usize) -> Self {
        Self { seed, trees, said: Vec::new() }
    }

    /// A text that is over; a later prompt may go on from it.
    pub fn remember(&mut self, tokens: &[u32], rng: &mut Rng) {
        if self.said.len() == REMEMBERED {
            self.said.swap_remove(rng.below(REMEMBERED));
        }
        self.said.push(tokens.to_vec());
    }

    /// One to `longest` tokens.
    pub fn prompt(&self, longest: usize, rng: &mut Rng) -> Vec<u32> {
        let mut length = 1 + rng.below(longest);
        if rng.chance(300) && longest >= PAGE_TOKENS {
            // Around the end of a block.
            length =
                (length.div_ceil(PAGE_TOKENS) * PAGE_TOKENS + rng.below(3)).saturating_sub(1).min(longest);
        }
        let mut tokens = Vec::new();
        if rng.chance(300) && !self.said.is_empty() {
            tokens.clone_from(&self.said[rng.below(self.said.len())]);
        }
        let mut path = mix(self.seed, rng.below(self.trees) as u64);
        while tokens.len() < length {
            let branch = rng.below(8).saturating_sub(5);
            path = mix(path, branch as u64);
            let segment = 16 + path % 160;
            tokens.extend((0..segment).map(|at| (mix(path, at + 100) % VOCAB) as u32));
        }
        tokens.truncate(length);
        tokens
    }
}
