//! What must hold in every step of a simulation.

use std::collections::{BTreeMap, HashSet};

use models::batch::PAGE_TOKENS;
use moebius::blocks::BlockKey;
use moebius::scheduler::{SequenceId, Share};

use super::simulation::Simulation;

impl Simulation {
    /// Who holds blocks.
    fn running(&self) -> impl Iterator<Item = SequenceId> {
        let runs = |id: &SequenceId| self.scheduler.is_ready(*id) || self.lives[id].load.is_some();
        self.lives.keys().copied().filter(runs)
    }

    /// Counts who may read each block, and that these are all that the scheduler thinks are in use.
    pub fn count_readers(&mut self) {
        let running: Vec<_> = self.running().collect();
        let loading = running.iter().filter(|id| self.lives[id].load.is_some()).count();
        assert_eq!(self.scheduler.running(), (running.len(), loading));
        assert_eq!(self.scheduler.waiting(), self.lives.len() - running.len());
        assert!(running.len() <= self.config.limits.running);
        for kind in &mut self.kinds {
            kind.readers.fill(0);
            for &id in &running {
                let cached = self.scheduler.progress(id).0;
                let table = kind.table(&self.scheduler.tables(id));
                let first = (kind.first_seen(cached) / PAGE_TOKENS).min(table.len());
                let blocks: HashSet<_> = table[first..].iter().copied().collect();
                assert_eq!(blocks.len(), table.len() - first, "a block twice in one table");
                blocks.into_iter().for_each(|block| kind.readers[block as usize] += 1);
            }
            let counts = self.scheduler.counts(kind.kind);
            assert_eq!(counts.free + counts.used + counts.cached, kind.total(), "{counts:?}");
            let used = kind.readers.iter().filter(|readers| **readers > 0).count();
            assert_eq!(counts.used, used, "{:?} {counts:?}", kind.kind);
        }
    }

    /// Before the step runs.
    pub fn check_plan(&mut self) {
        let tokens: usize = self.plan.shares.iter().map(|share| share.tokens).sum();
        assert!(tokens <= self.config.limits.step_tokens);
        let shares: BTreeMap<_, _> =
            self.plan.shares.iter().map(|share| (share.sequence, share.tokens)).collect();
        assert_eq!(shares.len(), self.plan.shares.len(), "one share per sequence");
        for (&id, &tokens) in &shares {
            assert!(tokens > 0 && self.scheduler.is_ready(id));
            let (cached, known) = self.scheduler.progress(id);
            assert!(cached + tokens <= known);
            let blocks = (cached + tokens).div_ceil(PAGE_TOKENS);
            for kind in &self.kinds {
                assert_eq!(kind.table(&self.scheduler.tables(id)).len(), blocks, "{:?}", kind.kind);
            }
        }
        self.check_order(&shares, tokens);
        self.check_admitted();
        self.check_nothing_twice(&shares);
    }

    /// Tokens of those that generate come first, then prompts by age, those admitted among them; all get what they want
    /// while there is any of it. (Where the youngest finds no block, its part of the step stays unused.)
    fn check_order(&mut self, shares: &BTreeMap<SequenceId, usize>, tokens: usize) {
        let admitted: HashSet<_> = self.plan.admitted.iter().map(|(id, _)| *id).collect();
        let missing = |id| {
            let (cached, known) = self.scheduler.progress(id);
            known - cached
        };
        let place = |share: &Share| {
            let id = share.sequence;
            (admitted.contains(&id) || missing(id) > 1, id)
        };
        assert!(self.plan.shares.is_sorted_by_key(place), "{:?}", self.plan.shares);

        let ready: Vec<_> = self.running().filter(|id| self.scheduler.is_ready(*id)).collect();
        let youngest = self.running().last();
        let short = |id: SequenceId| shares.get(&id).copied().unwrap_or(0) < missing(id);
        let pressed = youngest.is_some_and(short) || !self.plan.preempted.is_empty();
        for &id in &ready {
            let given = shares.get(&id).copied().unwrap_or(0);
            let prompt = admitted.contains(&id) || missing(id) > 1;
            let spent = prompt && tokens == self.config.limits.step_tokens;
            let part = prompt && pressed && given > 0;
            assert!(
                given == missing(id) || spent || part || Some(id) == youngest,
                "{id:?} got {given} tokens"
            );
        }
        if let Some(oldest) = self.running().next() {
            assert!(
                !self.scheduler.is_ready(oldest) || shares.contains_key(&oldest),
                "the oldest stands still"
            );
        }
        let moves =
            !shares.is_empty() || self.running().next().is_some_and(|id| !self.scheduler.is_ready(id));
        assert!(moves || self.lives.is_empty(), "nobody moves");
        let youngest_kept = self.running().filter(|id| !admitted.contains(id)).last();
        assert!(self.plan.preempted.iter().all(|id| Some(*id) > youngest_kept), "the youngest go first");
    }

    /// Those admitted found what they start behind, and passed only those who wait for others' blocks.
    fn check_admitted(&mut self) {
        for &(id, cached) in &self.plan.admitted {
            let (now, known) = self.scheduler.progress(id);
            assert!(now == cached && cached < known && cached.is_multiple_of(PAGE_TOKENS));
        }
        let running: Vec<_> = self.running().collect();
        let Some((last, _)) = self.plan.admitted.last() else { return };
        if !self.plan.preempted.is_empty() {
            return;
        }
        let mut coming: HashSet<BlockKey> = HashSet::new();
        for id in &running {
            let live = &self.lives[id];
            coming.extend(&live.text.keys[self.scheduler.progress(*id).0 / PAGE_TOKENS..]);
            coming.extend(live.load.iter().flat_map(|load| &load.blocks).map(|block| &block.key));
        }
        let mut passed = 0;
        for (id, live) in self.lives.range(..last).filter(|(id, _)| running.binary_search(id).is_err()) {
            assert!(live.text.keys.iter().any(|key| coming.contains(key)), "{id:?} was passed");
            passed += 1;
        }
        self.stats.passed += usize::from(passed > 0);
    }

    /// No block is computed for two prompts, or read from disk for two sequences, at the same time.
    fn check_nothing_twice(&self, shares: &BTreeMap<SequenceId, usize>) {
        let mut computed = HashSet::new();
        for (&id, &tokens) in shares {
            let (cached, known) = self.scheduler.progress(id);
            // The block of the last token that is known has to be run in any case, for its logits.
            let end = (cached + tokens).div_ceil(PAGE_TOKENS).min((known - 1) / PAGE_TOKENS);
            if known - cached > 1 {
                for index in cached / PAGE_TOKENS..end {
                    let key = self.lives[&id].text.keys[index];
                    assert!(computed.insert(key), "block {index} of {id:?} is computed twice");
                }
            }
        }
        let mut read = HashSet::new();
        for (id, load) in self.lives.iter().filter_map(|(id, live)| Some((id, live.load.as_ref()?))) {
            for block in &load.blocks {
                assert!(read.insert(block.key), "block {} of {id:?} is read twice", block.index);
                assert!(!computed.contains(&block.key), "block {} of {id:?} is also computed", block.index);
            }
        }
    }

    /// Nobody starves: the oldest of all moves. While it waits for its first block, at worst all that run have to end.
    pub fn check_oldest(&mut self) {
        let Some(&id) = self.lives.keys().next() else {
            self.oldest = None;
            return;
        };
        let cached = self.scheduler.progress(id).0;
        let since = match self.oldest {
            Some((oldest, was, since)) if (oldest, was) == (id, cached) => since + 1,
            _ => 0,
        };
        self.oldest = Some((id, cached, since));
        self.stats.longest_wait = self.stats.longest_wait.max(since);
        let bound = self.config.limits.running * (self.config.context + self.config.load_steps);
        assert!(since <= bound, "{id:?} waits since {since} steps, at {cached} tokens");
    }

    /// Everything ended as it should, and nothing is held.
    pub fn check_end(&mut self) {
        assert!(self.lives.is_empty(), "{} never end", self.lives.len());
        assert_eq!(self.stats.ended(), self.stats.requests + self.stats.forks);
        assert_eq!((self.scheduler.running(), self.scheduler.waiting()), ((0, 0), 0));
        self.kinds.iter().for_each(|kind| assert_eq!(self.scheduler.counts(kind.kind).used, 0));
    }
}
