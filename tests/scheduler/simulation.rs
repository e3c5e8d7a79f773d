//! Plays the engine and its runner around a scheduler: requests come, fork, end and are given up; blocks are
//! written, copied, kept on a disk and read from it; forward passes fail. Everything follows from a seed.

use std::collections::{BTreeMap, HashMap};

use models::batch::PAGE_TOKENS;
use moebius::blocks::BlockKey;
use moebius::scheduler::{Limits, Plan, Restored, Scheduler, SequenceId, Share};

use super::memory::{GARBAGE, Rows};
use super::stats::Stats;
use super::text::{Library, Rng, Text};

/// Steps between two looks at every published block.
const LOOK_EVERY: usize = 32;

/// Most sequences at a time, but for forks.
const QUEUE: usize = 40;

/// What happens how often (per thousand chances) and what there is room for.
#[derive(Debug)]
pub struct Config {
    /// Most tokens of a sequence.
    pub context: usize,
    pub limits: Limits,
    arrivals: usize,
    /// Most requests that come at once.
    burst: usize,
    cancels: usize,
    failures: usize,
    /// Forks of sequences that generate already.
    late_forks: usize,
    /// Most blocks on disk.
    archive: usize,
    pub load_steps: usize,
    load_failures: usize,
}

impl Config {
    fn draw(rng: &mut Rng) -> Self {
        let context: usize = rng.pick(&[64, 65, 200, 333, 640, 640, 1000, 1000]);
        let running = rng.pick(&[1, 2, 4, 8, 12, 20]);
        let step_tokens = running + rng.pick(&[0, 1, 7, 63, 64, 100, 256, 512]);
        let need = context.div_ceil(PAGE_TOKENS);
        // From what one request needs to plenty for all.
        let blocks = |need: usize, rng: &mut Rng| {
            need + rng.pick(&[0, 1, 4, need, 2 * need, 4 * need, running * need, 2 * running * need])
        };
        let full = blocks(need, rng);
        let window = rng.chance(500).then(|| {
            let window = rng.pick(&[1, 2, 63, 64, 65, 127, 200]);
            (window, blocks(need.min((window + 62) / PAGE_TOKENS + 1), rng))
        });
        Self {
            context,
            limits: Limits { step_tokens, running, blocks: full, window },
            arrivals: rng.pick(&[50, 100, 300, 700]),
            burst: rng.pick(&[1, 2, 10]),
            cancels: rng.pick(&[0, 10, 50, 200]),
            failures: rng.pick(&[0, 0, 3, 20]),
            late_forks: rng.pick(&[0, 0, 5, 20]),
            archive: rng.pick(&[0, 60, 300, 300]),
            load_steps: rng.pick(&[1, 5, 20]),
            load_failures: rng.pick(&[0, 100, 400]),
        }
    }
}

/// A sequence as the engine sees it.
pub struct Live {
    pub text: Text,
    /// Tokens of prompt and output.
    limit: usize,
    siblings: usize,
    done: bool,
    pub load: Option<Load>,
}

/// What is being read from disk.
pub struct Load {
    steps: usize,
    pub blocks: Vec<Restored>,
}

/// What was published, on disk.
#[derive(Default)]
struct Archive {
    keys: Vec<BlockKey>,
    places: HashMap<BlockKey, usize>,
}

impl Archive {
    fn insert(&mut self, key: BlockKey) {
        self.places.entry(key).or_insert_with(|| {
            self.keys.push(key);
            self.keys.len() - 1
        });
    }

    fn remove(&mut self, key: BlockKey) {
        let Some(place) = self.places.remove(&key) else { return };
        self.keys.swap_remove(place);
        if let Some(moved) = self.keys.get(place) {
            self.places.insert(*moved, place);
        }
    }
}

/// Says which run failed, and where.
struct Replay {
    seed: u64,
    step: usize,
}

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {} failed in step {}", self.seed, self.step);
        }
    }
}

pub struct Simulation {
    replay: Replay,
    rng: Rng,
    pub config: Config,
    pub scheduler: Scheduler,
    pub plan: Plan,
    pub kinds: Vec<Rows>,
    pub lives: BTreeMap<SequenceId, Live>,
    library: Library,
    archive: Archive,
    /// The rows of every block that was ever published.
    published: BTreeMap<BlockKey, Vec<u64>>,
    /// The oldest sequence, how far it was, and since how many steps.
    pub oldest: Option<(SequenceId, usize, usize)>,
    pub stats: Stats,
}

impl Simulation {
    /// Runs `steps` of arrivals, and then as many as it takes until nobody is left.
    pub fn run(seed: u64, steps: usize) -> Stats {
        let mut rng = Rng::new(seed);
        let config = Config::draw(&mut rng);
        let library = Library::new(rng.next(), 1 + rng.below(3));
        let mut simulation = Self {
            replay: Replay { seed, step: 0 },
            rng,
            scheduler: Scheduler::new(config.limits),
            plan: Plan::default(),
            kinds: Rows::all(&config.limits),
            config,
            lives: BTreeMap::new(),
            library,
            archive: Archive::default(),
            published: BTreeMap::new(),
            oldest: None,
            stats: Stats::default(),
        };
        for _ in 0..steps {
            simulation.arrivals();
            simulation.cancellations();
            simulation.step();
        }
        (simulation.config.failures, simulation.config.late_forks) = (0, 0);
        let tokens: usize = simulation.lives.values().map(|live| live.limit * (1 + live.siblings)).sum();
        for _ in 0..2 * tokens + 100 * simulation.lives.len() {
            if simulation.lives.is_empty() {
                break;
            }
            simulation.step();
        }
        simulation.check_end();
        simulation.stats
    }

    fn arrivals(&mut self) {
        let Self { rng, config, .. } = self;
        let mut coming = if rng.chance(config.arrivals) { 1 + rng.below(config.burst) } else { 0 };
        while coming > 0 && self.lives.len() < QUEUE {
            coming -= 1;
            let prompt = self.library.prompt(config.context - 1, rng);
            let left = config.context - prompt.len();
            let longest = left.min(rng.pick(&[3, 3, 3, 3, 3, 30, 30, 30, 30, left]));
            let limit = prompt.len() + 1 + rng.below(longest);
            let siblings = rng.pick(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3]);
            let priority = rng.pick(&[0, 0, 0, 0, 0, 0, 1, -1]);
            let text = Text::new(&prompt);
            let id = self.scheduler.add(priority, text.len(), text.keys.clone());
            self.stats.requests += 1;
            self.lives.insert(id, Live { text, limit, siblings, done: false, load: None });
        }
    }

    fn cancellations(&mut self) {
        let Self { rng, config, .. } = self;
        let loading = rng.chance(500);
        let choice: Vec<_> = self.lives.iter().filter(|(_, live)| !loading || live.load.is_some()).collect();
        if choice.is_empty() || !rng.chance(config.cancels) {
            return;
        }
        let (&id, live) = choice[rng.below(choice.len())];
        let (cached, known) = self.scheduler.progress(id);
        match (self.scheduler.is_ready(id), live.load.is_some()) {
            (true, _) if known - cached > 1 => self.stats.cancelled_in_prompt += 1,
            (true, _) => self.stats.cancelled_in_output += 1,
            (_, true) => self.stats.cancelled_loading += 1,
            _ => self.stats.cancelled_waiting += 1,
        }
        self.remove(id);
    }

    /// Whatever was being read for it is never put into its blocks.
    fn remove(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        self.lives.remove(&id);
    }

    fn step(&mut self) {
        self.replay.step += 1;
        self.stats.steps += 1;
        self.loads();
        let Self { scheduler, archive, plan, .. } = self;
        scheduler.plan(&|key| archive.places.contains_key(&key), plan);
        self.open_plan();
        self.count_readers();
        self.check_plan();
        for copy in self.plan.copies() {
            let kind = self.kinds.iter_mut().find(|kind| kind.kind == copy.kind);
            kind.expect("a kind that there is").copy(&copy);
            self.stats.copies += 1;
        }
        if self.rng.chance(self.config.failures) {
            self.fail();
        } else {
            self.forward();
        }
        self.check_oldest();
        let over: Vec<_> = self.lives.iter().filter(|(_, live)| live.done).map(|(id, _)| *id).collect();
        for id in over {
            let live = &self.lives[&id];
            assert_eq!(live.text.len(), live.limit);
            self.library.remember(&live.text.tokens, &mut self.rng);
            self.stats.finished += 1;
            self.remove(id);
        }
        self.count_readers();
        if self.stats.steps.is_multiple_of(LOOK_EVERY) {
            self.check_published();
        }
    }

    /// What the disk has read meanwhile.
    fn loads(&mut self) {
        while self.archive.keys.len() > self.config.archive
            || (self.archive.keys.len() > 1 && self.rng.chance(30))
        {
            self.archive.remove(self.archive.keys[self.rng.below(self.archive.keys.len())]);
        }
        let mut ready = Vec::new();
        for (id, live) in &mut self.lives {
            if let Some(load) = &mut live.load {
                load.steps -= 1;
                ready.extend((load.steps == 0).then_some(*id));
            }
        }
        for id in ready {
            let blocks = self.lives.get_mut(&id).and_then(|live| live.load.take()).expect("just seen").blocks;
            if self.rng.chance(self.config.load_failures) {
                self.archive.remove(blocks[self.rng.below(blocks.len())].key);
            }
            let mut loaded = 0;
            for block in &blocks {
                let good = self.archive.places.contains_key(&block.key);
                for (kind, to) in self.kinds.iter_mut().zip([block.full, block.window]) {
                    let Some(to) = to else { continue };
                    let rows = if good { &self.published[&block.key] } else { &vec![GARBAGE; PAGE_TOKENS] };
                    kind.write(&[to], 0, rows);
                }
                if !good {
                    break;
                }
                loaded += 1;
            }
            self.stats.restored += loaded;
            self.stats.restores_failed += usize::from(loaded < blocks.len());
            self.scheduler.restored(id, loaded);
            assert_eq!(self.scheduler.is_ready(id), loaded == blocks.len());
        }
    }

    fn open_plan(&mut self) {
        let Self { plan, lives, .. } = self;
        for id in &plan.preempted {
            lives.get_mut(id).expect("a sequence that is there").load = None;
            self.stats.preempted += 1;
        }
        for (_, cached) in &plan.admitted {
            self.stats.admitted += 1;
            self.stats.hits += usize::from(*cached > 0);
            self.stats.hit_tokens += cached;
        }
        for restore in &plan.restores {
            let live = lives.get_mut(&restore.sequence).expect("a sequence that is there");
            assert!(live.load.is_none() && !restore.blocks.is_empty());
            let steps = 1 + self.rng.below(self.config.load_steps);
            live.load = Some(Load { steps, blocks: restore.blocks.clone() });
        }
    }

    /// Nobody knows what a forward pass that failed has written.
    fn fail(&mut self) {
        self.stats.failures += 1;
        let shares = std::mem::take(&mut self.plan.shares);
        for Share { sequence, tokens } in shares {
            let cached = self.scheduler.progress(sequence).0;
            for kind in &mut self.kinds {
                let table = kind.table(&self.scheduler.tables(sequence));
                kind.write(table, cached, &vec![GARBAGE; tokens]);
            }
            self.stats.failed += 1;
            self.remove(sequence);
        }
    }

    fn forward(&mut self) {
        let shares = std::mem::take(&mut self.plan.shares);
        for &Share { sequence, tokens } in &shares {
            let cached = self.scheduler.progress(sequence).0;
            let hashes = &self.lives[&sequence].text.hashes[cached..cached + tokens];
            for kind in &mut self.kinds {
                kind.write(kind.table(&self.scheduler.tables(sequence)), cached, hashes);
            }
        }
        // Rows that one share writes over another's are found too.
        for &Share { sequence, tokens } in &shares {
            let cached = self.scheduler.progress(sequence).0;
            let hashes = &self.lives[&sequence].text.hashes;
            for kind in &self.kinds {
                let first = kind.first_seen(cached);
                kind.read(
                    kind.table(&self.scheduler.tables(sequence)),
                    first,
                    &hashes[first..cached + tokens],
                );
            }
        }
        for share in shares {
            self.stats.tokens += share.tokens;
            self.ran(share);
        }
    }

    fn ran(&mut self, share: Share) {
        let id = share.sequence;
        let (cached, known) = self.scheduler.progress(id);
        let done = cached + share.tokens;
        let mut heard = Vec::new();
        self.scheduler.ran(share, |_, key| heard.push(key));
        assert_eq!(self.scheduler.progress(id), (done, known));
        let live = self.lives.get_mut(&id).expect("only known sequences run");
        let filled = cached / PAGE_TOKENS..done / PAGE_TOKENS;
        assert_eq!(heard, live.text.keys[filled.clone()]);
        for (key, index) in heard.into_iter().zip(filled) {
            let rows = &live.text.hashes[index * PAGE_TOKENS..][..PAGE_TOKENS];
            let (full, window) = self.scheduler.locate(key).expect("what was just published");
            for (kind, block) in self.kinds.iter().zip([Some(full), window]) {
                let block = block.expect("a block of every kind");
                kind.read(&[block], 0, rows);
                // The same content is kept once; what the window has passed is not kept here at all.
                if index >= kind.first_seen(done) / PAGE_TOKENS {
                    assert_eq!(kind.table(&self.scheduler.tables(id))[index], block);
                }
            }
            self.published.entry(key).or_insert_with(|| rows.to_vec());
            if self.config.archive > 0 && self.rng.chance(800) {
                self.archive.insert(key);
            }
        }
        if done < known || live.done {
            return;
        }
        let mut forks = std::mem::take(&mut live.siblings);
        if self.lives.len() < QUEUE {
            forks += usize::from(self.rng.chance(self.config.late_forks));
        }
        let children: Vec<_> = (0..forks).map(|_| self.fork(id)).collect();
        for id in std::iter::once(id).chain(children) {
            let live = self.lives.get_mut(&id).expect("a sequence that is there");
            let key = live.text.push(live.text.choose(&mut self.rng));
            live.done = live.text.len() == live.limit;
            self.scheduler.extend(id, key);
        }
    }

    fn fork(&mut self, parent: SequenceId) -> SequenceId {
        self.stats.forks += 1;
        let free = self.scheduler.running().0 < self.config.limits.running;
        let id = self.scheduler.fork(parent);
        assert_eq!(self.scheduler.is_ready(id), free);
        if free {
            let (parent, child) = (self.scheduler.tables(parent), self.scheduler.tables(id));
            assert_eq!((parent.full, parent.window), (child.full, child.window));
        }
        let Live { text, limit, .. } = &self.lives[&parent];
        let child = Live { text: text.clone(), limit: *limit, siblings: 0, done: false, load: None };
        self.lives.insert(id, child);
        id
    }

    /// What can be found by its key is what the key says.
    fn check_published(&self) {
        for (key, rows) in &self.published {
            if let Some((full, window)) = self.scheduler.locate(*key) {
                for (kind, block) in self.kinds.iter().zip([Some(full), window]) {
                    kind.read(&[block.expect("a block of every kind")], 0, rows);
                }
            }
        }
    }
}
