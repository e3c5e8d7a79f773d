//! Which tokens of which sequences run in the next step, and in which blocks. Pure policy over integers: it sees no
//! tensor, no token and no text, and asks no clock.
//!
//! **Order.** Sequences stand in one order for good: that of their arrival, moved forward or back by their priority
//! ([`HEAD_START`] arrivals per level). A sequence that runs is never held up by a younger one; one that waits goes before all younger ones
//! that wait, except where a prefix it needs is being computed. So nobody starves.
//!
//! **A step.** Every sequence that is generating gets its one token. Then those who wait are admitted, while there are
//! places and blocks for their whole prompts. What is left of the step's budget is shared among the prompts, half
//! of it to the oldest, so a long prompt delays others by one chunk at most, and a short one does not wait for its end.
//! Priority orders who waits; it takes nothing from those who run.
//!
//! **Prefixes.** Blocks are found by the key of their content. A sequence starts behind the longest prefix that is in the
//! pool or in the archive (on disk). It claims the blocks that it will fill; one that would need a claimed block waits
//! for it instead of computing it again.
//!
//! **Pressure.** A sequence that finds no block takes those of the youngest, which goes back to where it waited: its full
//! blocks stay cached while nobody needs the room, and what is lost is computed again, to the same bits.

mod entry;

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use models::batch::{BlockKind, PAGE_TOKENS, Tables};

use crate::blocks::{BlockKey, BlockPool, Counts};
use entry::{Entry, Kind};

pub use entry::Restored;

/// Arrivals by which one level of priority moves a sequence.
pub const HEAD_START: i64 = 1000;
/// Levels go from minus this to this; lower goes first.
pub const MOST_PRIORITY: i32 = 1_000_000;

/// A sequence's place in the order; smaller goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    turn: i64,
    arrival: u64,
}

/// What a scheduler may hand out.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most tokens of one step; at least `running`.
    pub step_tokens: usize,
    /// Most sequences that hold blocks.
    pub running: usize,
    /// Blocks of layers that see everything.
    pub blocks: usize,
    /// Where the model has layers with windows: the widest window, and their blocks.
    pub window: Option<(usize, usize)>,
}

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Whose.
    pub sequence: SequenceId,
    /// Tokens to run, after those cached.
    pub tokens: usize,
}

/// A block to be copied before the step, because two sequences part in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Of which layers.
    pub kind: BlockKind,
    /// Source.
    pub from: u32,
    /// Destination.
    pub to: u32,
}

/// Blocks of a sequence that come from the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    /// Whose.
    pub sequence: SequenceId,
    /// In the order of its positions.
    pub blocks: Vec<Restored>,
}

/// What is to be done now. Emptied and filled by [`Scheduler::plan`].
#[derive(Debug, Default)]
pub struct Plan {
    /// Tokens to run.
    pub shares: Vec<Share>,
    /// To be copied first, in this order.
    copies: Vec<(SequenceId, Copy)>,
    /// To be read from the archive.
    pub restores: Vec<Restore>,
    /// Who stopped waiting, and how many of its tokens need not be computed.
    pub admitted: Vec<(SequenceId, usize)>,
    /// Who lost its blocks and waits again.
    pub preempted: Vec<SequenceId>,
    tokens: usize,
}

impl Plan {
    /// To be copied first, in this order.
    pub fn copies(&self) -> impl Iterator<Item = Copy> {
        self.copies.iter().map(|(_, copy)| *copy)
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.shares.is_empty() && self.admitted.is_empty() && self.preempted.is_empty()
    }

    /// Whether a sequence runs in this step.
    pub fn runs(&self, sequence: SequenceId) -> bool {
        self.shares.iter().any(|share| share.sequence == sequence)
    }

    fn clear(&mut self) {
        self.shares.clear();
        self.copies.clear();
        self.restores.clear();
        self.admitted.clear();
        self.preempted.clear();
        self.tokens = 0;
    }

    fn forget(&mut self, sequence: SequenceId) {
        self.shares.retain(|share| share.sequence != sequence);
        self.copies.retain(|(whose, _)| *whose != sequence);
        self.restores.retain(|restore| restore.sequence != sequence);
        self.tokens = self.shares.iter().map(|share| share.tokens).sum();
    }
}

/// What came of an attempt to admit.
enum Attempt {
    Admitted,
    /// Others may go first.
    Blocked,
    NoRoom,
}

/// The order of all sequences and the books of all blocks.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    /// Layers that see everything; then those with windows, if there are any.
    kinds: Vec<Kind>,
    waiting: BTreeMap<SequenceId, Entry>,
    running: BTreeMap<SequenceId, Entry>,
    /// Blocks that a running sequence will fill or is waiting for from the archive.
    claims: HashMap<BlockKey, SequenceId>,
    arrivals: u64,
    /// Room for a step's order.
    order: Vec<(SequenceId, usize)>,
}

impl Scheduler {
    /// An empty one.
    ///
    /// # Panics
    /// If not every running sequence could have a token of a step, or there are no blocks at all.
    pub fn new(limits: Limits) -> Self {
        assert!(
            limits.running > 0 && limits.running <= limits.step_tokens,
            "a token for everyone: {limits:?}"
        );
        let kind = |kind, blocks, window| Kind { kind, pool: BlockPool::new(blocks), window };
        let mut kinds = vec![kind(BlockKind::Full, limits.blocks, None)];
        kinds.extend(limits.window.map(|(window, blocks)| kind(BlockKind::Window, blocks, Some(window))));
        assert!(kinds.iter().all(|kind| kind.pool.total() > 0), "no blocks: {limits:?}");
        Self {
            limits,
            kinds,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            claims: HashMap::new(),
            arrivals: 0,
            order: Vec::with_capacity(limits.running),
        }
    }

    /// A sequence of `known` tokens whose full blocks have these keys, to wait for its turn. A lower `priority` goes first.
    pub fn add(&mut self, priority: i32, known: usize, keys: Vec<BlockKey>) -> SequenceId {
        assert!(known > 0, "a sequence has a token");
        let level = i64::from(priority.clamp(-MOST_PRIORITY, MOST_PRIORITY));
        let id = self.next_id(level * HEAD_START + self.arrivals as i64);
        self.waiting.insert(id, Entry::new(known, keys));
        id
    }

    fn next_id(&mut self, turn: i64) -> SequenceId {
        let arrival = self.arrivals;
        self.arrivals += 1;
        SequenceId { turn, arrival }
    }

    /// A second sequence of the same tokens, which continues from the same blocks; it waits if too many run.
    pub fn fork(&mut self, parent: SequenceId) -> SequenceId {
        let id = self.next_id(parent.turn);
        let Some(entry) = self.running.get(&parent) else { unreachable!("only a running sequence forks") };
        let mut child = Entry::new(entry.known, entry.keys.clone());
        if self.running.len() == self.limits.running {
            self.waiting.insert(id, child);
            return id;
        }
        (child.cached, child.tables) = (entry.cached, entry.tables.clone());
        for (kind, table) in self.kinds.iter_mut().zip(&child.tables) {
            table.ids[table.begin..].iter().for_each(|block| kind.pool.share(*block));
        }
        self.running.insert(id, child);
        id
    }

    /// Decides the next step. `archived` says which blocks can be read from disk.
    pub fn plan(&mut self, archived: &dyn Fn(BlockKey) -> bool, plan: &mut Plan) {
        plan.clear();
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        let ready = self.running.iter().filter(|(_, entry)| entry.restoring.is_empty());
        order.extend(ready.map(|(id, entry)| (*id, entry.missing())));
        for &(id, missing) in order.iter().filter(|(_, missing)| *missing == 1) {
            self.give(id, missing, plan);
        }

        let mut after = None;
        while plan.tokens < self.limits.step_tokens && self.running.len() < self.limits.running {
            let begin = after.map_or(Bound::Unbounded, Bound::Excluded);
            let Some((&id, entry)) = self.waiting.range((begin, Bound::Unbounded)).next() else { break };
            after = Some(id);
            let blocked = entry.blocked_on.is_some_and(|key| self.claims.contains_key(&key));
            if !blocked && matches!(self.admit(id, archived, plan), Attempt::NoRoom) {
                break;
            }
        }

        // Prompts share what is left, those just admitted among them: the oldest gets half of it at least, and all that
        // the others have no use for.
        order.clear();
        let ready = self.running.iter().filter(|(_, entry)| entry.restoring.is_empty());
        let new = |id| plan.admitted.iter().any(|(other, _)| *other == id);
        let unread = ready.filter(|(id, entry)| entry.missing() > 1 || new(**id));
        order.extend(unread.map(|(id, entry)| (*id, entry.missing())));
        let mut later: usize = order.iter().map(|(_, missing)| missing).sum();
        for &(id, missing) in &order {
            let left = self.limits.step_tokens - plan.tokens;
            later -= missing;
            let most = left.saturating_sub(later).max(left.div_ceil(2)).max(PAGE_TOKENS);
            self.give(id, missing.min(most), plan);
        }
        self.order = order;
    }

    /// Tokens of a running sequence for this step: as many of `wanted` as there are budget and blocks for.
    fn give(&mut self, sequence: SequenceId, wanted: usize, plan: &mut Plan) {
        loop {
            let wanted = wanted.min(self.limits.step_tokens - plan.tokens);
            // It may have been the youngest when another needed blocks.
            let Some(entry) = self.running.get_mut(&sequence) else { return };
            let room = entry.room(&self.kinds, wanted);
            let youngest = *self.running.last_key_value().expect("one at least runs").0;
            if room < wanted && youngest != sequence {
                self.preempt(youngest, plan);
                continue;
            }
            // The youngest makes do with what there is; those before it will end, and leave their blocks.
            if room > 0 {
                let entry = self.running.get_mut(&sequence).expect("just seen");
                entry.reserve(sequence, &mut self.kinds, room, &mut plan.copies);
                plan.shares.push(Share { sequence, tokens: room });
                plan.tokens += room;
            }
            return;
        }
    }

    fn preempt(&mut self, sequence: SequenceId, plan: &mut Plan) {
        plan.forget(sequence);
        plan.preempted.push(sequence);
        self.park(sequence);
    }

    /// Back to where it waited, without its blocks.
    fn park(&mut self, sequence: SequenceId) {
        let Some(mut entry) = self.running.remove(&sequence) else { return };
        self.unclaim(&entry, sequence);
        entry.release(&mut self.kinds);
        entry.blocked_on = None;
        self.waiting.insert(sequence, entry);
    }

    fn unclaim(&mut self, entry: &Entry, sequence: SequenceId) {
        for key in &entry.keys {
            if self.claims.get(key) == Some(&sequence) {
                self.claims.remove(key);
            }
        }
    }

    /// Blocks of the longest prefix of which every part that is still read is in the pool or in the archive.
    fn longest_prefix(&self, entry: &Entry, archived: &dyn Fn(BlockKey) -> bool) -> usize {
        let keys = &entry.keys[..entry.reusable()];
        let has = |kind: &Kind, key| kind.pool.find(key).is_some() || archived(key);
        let full = &self.kinds[0];
        let mut blocks = keys.iter().position(|key| !has(full, *key)).unwrap_or(keys.len());
        if let Some(window) = self.kinds.get(1) {
            // A block that is missing inside the window ends every prefix whose window reaches it.
            while let Some(missing) =
                (window.first(blocks * PAGE_TOKENS)..blocks).rev().find(|index| !has(window, keys[*index]))
            {
                blocks = missing;
            }
        }
        blocks
    }

    fn admit(&mut self, id: SequenceId, archived: &dyn Fn(BlockKey) -> bool, plan: &mut Plan) -> Attempt {
        let entry = &self.waiting[&id];
        let blocks = self.longest_prefix(entry, archived);
        let tokens = blocks * PAGE_TOKENS;
        // What another computes, or reads from the archive, is waited for instead of doing it again.
        let lacks = |kind: &Kind, index, key| index >= kind.first(tokens) && kind.pool.find(key).is_none();
        let awaited = entry.keys[..entry.reusable()].iter().enumerate().find(|&(index, key)| {
            let needed =
                index == blocks || index < blocks && self.kinds.iter().any(|kind| lacks(kind, index, *key));
            needed && self.claims.contains_key(key)
        });
        if let Some((_, &key)) = awaited {
            self.waiting.get_mut(&id).expect("just seen").blocked_on = Some(key);
            return Attempt::Blocked;
        }
        if !self.running.is_empty() && !self.has_room(entry, blocks) {
            return Attempt::NoRoom;
        }
        let mut entry = self.waiting.remove(&id).expect("just seen");
        entry.blocked_on = None;
        // What is found is held before anything is taken, which could be what was found.
        for (kind, table) in self.kinds.iter_mut().zip(&mut entry.tables) {
            table.begin = kind.first(tokens);
            table.ids = vec![0; blocks];
            for index in table.begin..blocks {
                match kind.pool.find(entry.keys[index]) {
                    Some(found) => {
                        kind.pool.take_found(found);
                        table.ids[index] = found;
                    }
                    None => table.ids[index] = u32::MAX,
                }
            }
        }
        for index in 0..blocks {
            let mut lacking = [None; 2];
            for ((kind, table), lacking) in self.kinds.iter_mut().zip(&mut entry.tables).zip(&mut lacking) {
                if index >= table.begin && table.ids[index] == u32::MAX {
                    table.ids[index] = kind.pool.take().expect("there is room");
                    *lacking = Some(table.ids[index]);
                }
            }
            let [full, window] = lacking;
            if full.is_some() || window.is_some() {
                entry.restoring.push(Restored { key: entry.keys[index], index, full, window });
            }
        }
        let restored = entry.restoring.iter().map(|block| block.key);
        for key in restored.chain(entry.keys[blocks..].iter().copied()) {
            self.claims.entry(key).or_insert(id);
        }
        entry.cached = tokens;
        plan.admitted.push((id, tokens));
        if !entry.restoring.is_empty() {
            plan.restores.push(Restore { sequence: id, blocks: entry.restoring.clone() });
        }
        self.running.insert(id, entry);
        Attempt::Admitted
    }

    /// Whether a sequence that starts behind `blocks` cached ones can be run to the end of what is known of it beside
    /// those that run, with a block for each of them to go on.
    fn has_room(&self, entry: &Entry, blocks: usize) -> bool {
        let (chunk, tokens) = (self.limits.step_tokens, blocks * PAGE_TOKENS);
        self.kinds.iter().all(|kind| {
            let missing = |cached, known| kind.missing(cached, known, chunk);
            let others: usize =
                self.running.values().map(|entry| missing(entry.cached, entry.known) + 1).sum();
            // Blocks that are found cached can no longer be taken; blocks of the archive have to be.
            let found = |key: &BlockKey| kind.pool.find(*key).is_none_or(|id| kind.pool.is_cached(id));
            let held =
                entry.keys[kind.first(tokens).min(blocks)..blocks].iter().filter(|key| found(key)).count();
            kind.pool.available() > held + missing(tokens, entry.known) + others
        })
    }

    /// The step has run these tokens of a sequence; `published` hears of the blocks they filled: which of the
    /// sequence's, and their keys.
    pub fn ran(&mut self, share: Share, mut published: impl FnMut(usize, BlockKey)) {
        let Some(entry) = self.running.get_mut(&share.sequence) else { return };
        let claims = &mut self.claims;
        entry.advance(&mut self.kinds, share.tokens, |index, key| {
            if claims.get(&key) == Some(&share.sequence) {
                claims.remove(&key);
            }
            published(index, key);
        });
    }

    /// One more token of a sequence is known; `key` is that of the block it fills, if it does.
    pub fn extend(&mut self, sequence: SequenceId, key: Option<BlockKey>) {
        let entry = match self.running.get_mut(&sequence) {
            Some(entry) => entry,
            None => self.waiting.get_mut(&sequence).expect("a sequence that was added"),
        };
        entry.known += 1;
        entry.keys.extend(key);
        assert_eq!(entry.keys.len(), entry.known / PAGE_TOKENS, "a key for every full block");
    }

    /// The first `loaded` of a sequence's [`Restore`] are in their blocks. If that is not all of them, the rest cannot
    /// be had: the sequence waits again, for another plan.
    pub fn restored(&mut self, sequence: SequenceId, loaded: usize) {
        let Some(entry) = self.running.get_mut(&sequence) else { return };
        let restoring = std::mem::take(&mut entry.restoring);
        for block in &restoring[..loaded] {
            for ((kind, table), lacked) in
                self.kinds.iter_mut().zip(&mut entry.tables).zip([block.full, block.window])
            {
                if let Some(id) = lacked {
                    table.ids[block.index] = kind.pool.publish(id, block.key);
                }
            }
            if self.claims.get(&block.key) == Some(&sequence) {
                self.claims.remove(&block.key);
            }
        }
        if loaded < restoring.len() {
            self.park(sequence);
        }
    }

    /// The sequence is over, wherever it stood. Its blocks are free, or cached.
    pub fn remove(&mut self, sequence: SequenceId) {
        self.park(sequence);
        self.waiting.remove(&sequence);
    }

    /// The blocks of a running sequence.
    pub fn tables(&self, sequence: SequenceId) -> Tables<'_> {
        self.running[&sequence].tables(self.kinds.len())
    }

    /// The keys of the blocks that the known tokens of a sequence fill.
    pub fn keys(&self, sequence: SequenceId) -> &[BlockKey] {
        let entry = self.running.get(&sequence).or_else(|| self.waiting.get(&sequence));
        entry.map_or(&[], |entry| &entry.keys)
    }

    /// How many tokens of a sequence are cached, and how many are known.
    pub fn progress(&self, sequence: SequenceId) -> (usize, usize) {
        let entry = self.running.get(&sequence).or_else(|| self.waiting.get(&sequence));
        entry.map_or((0, 0), |entry| (entry.cached, entry.known))
    }

    /// Whether a sequence runs, and waits for nothing.
    pub fn is_ready(&self, sequence: SequenceId) -> bool {
        self.running.get(&sequence).is_some_and(|entry| entry.restoring.is_empty())
    }

    /// Where the content of a key is, for all kinds, if it is anywhere.
    pub fn locate(&self, key: BlockKey) -> Option<(u32, Option<u32>)> {
        let full = self.kinds[0].pool.find(key)?;
        match self.kinds.get(1) {
            Some(kind) => kind.pool.find(key).map(|window| (full, Some(window))),
            None => Some((full, None)),
        }
    }

    /// Sequences that hold blocks, and of these those that wait for the archive.
    pub fn running(&self) -> (usize, usize) {
        let restoring = self.running.values().filter(|entry| !entry.restoring.is_empty()).count();
        (self.running.len(), restoring)
    }

    /// Sequences that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The books of a kind of blocks; zeros where the model has none of it.
    pub fn counts(&self, kind: BlockKind) -> Counts {
        let found = self.kinds.iter().find(|other| other.kind == kind);
        found.map_or(Counts::default(), |kind| kind.pool.counts())
    }
}
