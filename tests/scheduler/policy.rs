//! The policies, one at a time.

use std::collections::{BTreeMap, HashSet};

use models::batch::{BlockKind, PAGE_TOKENS};
use moebius::blocks::BlockKey;
use moebius::scheduler::{HEAD_START, Limits, Plan, Scheduler, SequenceId};

use super::text::{Text, mix};

/// A scheduler and an engine that runs whatever it is told.
struct Desk {
    scheduler: Scheduler,
    plan: Plan,
    texts: BTreeMap<SequenceId, Text>,
    disk: HashSet<BlockKey>,
}

fn desk(step_tokens: usize, running: usize, blocks: usize, window: Option<(usize, usize)>) -> Desk {
    let scheduler = Scheduler::new(Limits { step_tokens, running, blocks, window });
    Desk { scheduler, plan: Plan::default(), texts: BTreeMap::new(), disk: HashSet::new() }
}

/// The beginning of one of many texts.
fn story(name: u64, tokens: usize) -> Vec<u32> {
    (0..tokens as u64).map(|at| (mix(name, at) % 1000) as u32).collect()
}

impl Desk {
    fn add(&mut self, priority: i32, tokens: &[u32]) -> SequenceId {
        let text = Text::new(tokens);
        let id = self.scheduler.add(priority, text.len(), text.keys.clone());
        self.texts.insert(id, text);
        id
    }

    fn plan(&mut self) -> Vec<(SequenceId, usize)> {
        self.scheduler.plan(&|key| self.disk.contains(&key), &mut self.plan);
        self.plan.shares.iter().map(|share| (share.sequence, share.tokens)).collect()
    }

    /// What was planned has run: whose tokens are all cached gets one more.
    fn run(&mut self) {
        for share in &self.plan.shares {
            self.scheduler.ran(*share, |_, _| {});
            let (cached, known) = self.scheduler.progress(share.sequence);
            if cached == known {
                let key = self.texts.get_mut(&share.sequence).unwrap().push(0);
                self.scheduler.extend(share.sequence, key);
            }
        }
    }

    fn step(&mut self) -> Vec<(SequenceId, usize)> {
        let shares = self.plan();
        self.run();
        shares
    }
}

#[test]
fn those_who_generate_go_first_and_prompts_fill_the_rest_in_order() {
    let mut desk = desk(100, 4, 100, None);
    let a = desk.add(0, &story(1, 10));
    assert_eq!(desk.step(), [(a, 10)]);
    let (b, c) = (desk.add(0, &story(2, 150)), desk.add(0, &story(3, 60)));
    // Half to the older prompt, but a block at least; and all that the younger cannot use.
    assert_eq!(desk.step(), [(a, 1), (b, 64), (c, 35)]);
    assert_eq!(desk.step(), [(a, 1), (b, 74), (c, 25)]);
    assert_eq!(desk.step(), [(a, 1), (c, 1), (b, 12)]);
    assert_eq!(desk.step(), [(a, 1), (b, 1), (c, 1)]);
}

#[test]
fn a_step_spends_its_budget_and_no_more() {
    let mut desk = desk(3, 3, 100, None);
    for name in 0..4 {
        desk.add(0, &story(name, 10));
    }
    for _ in 0..30 {
        assert_eq!(desk.step().iter().map(|(_, tokens)| tokens).sum::<usize>(), 3);
    }
    assert_eq!((desk.scheduler.running(), desk.scheduler.waiting()), ((3, 0), 1));
}

#[test]
fn a_level_of_priority_is_a_head_start_and_not_forever() {
    let mut desk = desk(1, 1, 1, None);
    let late = desk.add(1, &[1]);
    let arrivals = HEAD_START as usize + 10;
    let others: Vec<_> = (0..arrivals).map(|_| desk.add(0, &[2])).collect();
    let urgent = desk.add(-1, &[3]);
    let order: Vec<_> = (0..arrivals + 2)
        .map(|_| {
            let shares = desk.step();
            let [(id, 1)] = shares[..] else { panic!("{shares:?}") };
            desk.scheduler.remove(id);
            id
        })
        .collect();
    let place = |id| order.iter().position(|other| *other == id).unwrap();
    // The urgent one came 11 arrivals too late to overtake everyone.
    assert_eq!(place(urgent), 11);
    assert_eq!(place(late), HEAD_START as usize);
    let rest: Vec<_> = order.into_iter().filter(|id| ![late, urgent].contains(id)).collect();
    assert_eq!(rest, others);
}

#[test]
fn who_shares_a_prefix_waits_for_it_and_starts_behind_it() {
    let mut desk = desk(1000, 4, 100, None);
    let a = desk.add(0, &story(1, 300));
    let b = desk.add(0, &[story(1, 200), story(2, 100)].concat());
    let c = desk.add(0, &story(3, 50));
    assert_eq!(desk.step(), [(a, 300), (c, 50)], "others pass");
    assert_eq!(desk.step(), [(a, 1), (c, 1), (b, 300 - 192)]);
    assert_eq!(desk.plan.admitted, [(b, 192)]);
    let (a, b) = (desk.scheduler.tables(a).full, desk.scheduler.tables(b).full);
    assert_eq!(a[..3], b[..3]);
    assert_ne!(a[3], b[3]);
}

#[test]
fn who_waits_for_a_prefix_goes_on_when_the_other_leaves() {
    let mut desk = desk(64, 4, 100, None);
    let a = desk.add(0, &story(1, 300));
    let b = desk.add(0, &story(1, 290));
    assert_eq!(desk.step(), [(a, 64)]);
    desk.scheduler.remove(a);
    assert_eq!(desk.step(), [(b, 64)]);
    assert_eq!(desk.plan.admitted, [(b, 64)]);
}

#[test]
fn the_youngest_loses_its_blocks_and_comes_back() {
    let mut desk = desk(200, 2, 8, None);
    // One token longer, because it begins one step later: both fill their blocks in the same step.
    let (a, b) = (desk.add(0, &story(1, 150)), desk.add(0, &story(2, 151)));
    desk.step();
    let mut steps = 0;
    while desk.plan.preempted.is_empty() {
        assert!(steps < 200, "eight blocks are enough for ever");
        steps += 1;
        desk.step();
    }
    assert_eq!(desk.plan.preempted, [b]);
    assert_eq!(desk.plan.shares.iter().map(|share| share.sequence).collect::<Vec<_>>(), [a]);
    assert_eq!(desk.scheduler.progress(b).0, 0);
    assert!(!desk.scheduler.is_ready(b));
    desk.step();
    assert_eq!(desk.plan.admitted, [], "there is no room for it");
    desk.scheduler.remove(a);
    let known = desk.texts[&b].len();
    assert_eq!(desk.step(), [(b, known - 192)]);
    assert_eq!(desk.plan.admitted, [(b, 192)], "the end of its blocks went first");
}

#[test]
fn who_loses_its_blocks_loses_its_share_of_the_step() {
    let mut desk = desk(2, 2, 9, None);
    let b = desk.add(0, &story(1, 60));
    while desk.scheduler.progress(b).1 == 60 {
        desk.step();
    }
    // Older, and long: when it needs its fifth block, the other has five and was given its token already.
    let a = desk.add(-1, &story(2, 300));
    for _ in 0..256 {
        assert_eq!(desk.step(), [(b, 1), (a, 1)]);
    }
    assert_eq!(desk.step(), [(a, 2)]);
    assert_eq!(desk.plan.preempted, [b]);
}

#[test]
fn who_waits_for_the_disk_can_lose_its_blocks_too() {
    let mut desk = desk(500, 2, 7, None);
    let text = Text::new(&story(1, 200));
    desk.disk.extend(&text.keys);
    let a = desk.add(0, &story(2, 60));
    desk.step();
    let b = desk.add(0, &text.tokens);
    desk.step();
    assert_eq!(desk.plan.restores[0].blocks.len(), 3);
    while desk.plan.preempted.is_empty() {
        assert_eq!(desk.step(), [(a, 1)]);
    }
    assert_eq!(desk.scheduler.progress(a).0, 257, "five of seven blocks");
    desk.scheduler.remove(a);
    assert_eq!(desk.plan(), []);
    assert_eq!(desk.plan.restores[0].blocks.iter().map(|block| block.index).collect::<Vec<_>>(), [0, 1, 2]);
    desk.scheduler.restored(b, 3);
    assert_eq!(desk.step(), [(b, 8)]);
}

#[test]
fn forks_share_the_prompt_and_all_but_the_last_copy_its_end() {
    let mut desk = desk(200, 4, 20, None);
    let a = desk.add(0, &story(1, 100));
    desk.plan();
    desk.scheduler.ran(desk.plan.shares[0], |_, _| {});
    let all = [a, desk.scheduler.fork(a), desk.scheduler.fork(a)];
    all.iter().for_each(|id| desk.scheduler.extend(*id, None));
    let used = |desk: &Desk| desk.scheduler.counts(BlockKind::Full).used;
    assert_eq!(used(&desk), 2);
    let shared = desk.scheduler.tables(a).full.to_vec();
    assert_eq!(desk.plan(), all.map(|id| (id, 1)));
    let copies: Vec<_> = desk.plan.copies().collect();
    assert_eq!(copies.iter().map(|copy| copy.from).collect::<Vec<_>>(), [shared[1]; 2]);
    assert_eq!(used(&desk), 1 + 3);
    let tables = all.map(|id| desk.scheduler.tables(id).full);
    assert_eq!(tables.map(|table| table[0]), [shared[0]; 3]);
    assert_eq!(tables.map(|table| table[1]), [copies[0].to, copies[1].to, shared[1]]);
}

#[test]
fn blocks_come_back_when_the_window_has_passed_them() {
    let mut desk = desk(64, 1, 20, Some((64, 3)));
    let a = desk.add(0, &story(1, 640));
    for blocks in 1..=10 {
        assert_eq!(desk.step(), [(a, 64)]);
        assert_eq!(desk.scheduler.counts(BlockKind::Full).used, blocks);
        // The next token sees 63 rows of the last block.
        assert_eq!(desk.scheduler.counts(BlockKind::Window).used, 1);
    }
}

#[test]
fn what_the_disk_cannot_give_is_computed() {
    let mut desk = desk(500, 4, 20, None);
    let text = Text::new(&story(1, 200));
    desk.disk.extend(&text.keys);
    let a = desk.add(0, &text.tokens);
    assert_eq!(desk.plan(), []);
    assert_eq!(desk.plan.admitted, [(a, 192)]);
    assert_eq!(desk.plan.restores[0].blocks.len(), 3);
    assert_eq!(desk.scheduler.running(), (1, 1));
    assert_eq!(desk.plan(), [], "it waits for the disk");
    desk.disk.remove(&text.keys[1]);
    desk.scheduler.restored(a, 1);
    assert!(!desk.scheduler.is_ready(a));
    assert_eq!(desk.step(), [(a, 200 - 64)]);
    assert_eq!((&desk.plan.admitted[..], &desk.plan.restores[..]), (&[(a, 64)][..], &[][..]));
}

#[test]
fn what_the_disk_reads_for_one_is_not_read_again_for_another() {
    let mut desk = desk(500, 4, 20, None);
    let text = Text::new(&story(1, 128));
    desk.disk.extend(&text.keys);
    let a = desk.add(0, &[story(1, 128), story(2, 10)].concat());
    let b = desk.add(0, &[story(1, 128), story(3, 10)].concat());
    assert_eq!(desk.plan(), []);
    assert_eq!(desk.plan.restores.iter().map(|restore| restore.sequence).collect::<Vec<_>>(), [a]);
    let c = desk.add(0, &story(4, 10));
    assert_eq!(desk.step(), [(c, 10)], "others pass");
    desk.scheduler.restored(a, 2);
    assert_eq!(desk.step(), [(c, 1), (a, 10), (b, 10)]);
}

/// A text of six blocks, of which the window's pool has kept the last three.
#[test]
fn a_prefix_needs_only_what_its_window_still_sees() {
    for (blocks, on_disk, expected) in
        [(1, None, 0), (2, None, 0), (3, None, 0), (4, None, 4), (5, None, 5), (6, None, 6), (3, Some(2), 3)]
    {
        let mut desk = desk(64, 1, 20, Some((65, 4)));
        let a = desk.add(0, &story(1, 400));
        for _ in 0..7 {
            desk.step();
        }
        let text = desk.texts[&a].clone();
        desk.scheduler.remove(a);
        desk.disk.extend(on_disk.map(|index: usize| text.keys[index]));
        let b = desk.add(0, &text.tokens[..blocks * PAGE_TOKENS + 1]);
        desk.plan();
        assert_eq!(desk.plan.admitted, [(b, expected * PAGE_TOKENS)], "{blocks} blocks");
        let restored = desk.plan.restores.iter().flat_map(|restore| &restore.blocks);
        let restored: Vec<_> =
            restored.map(|block| (block.index, block.full.is_some(), block.window.is_some())).collect();
        assert_eq!(restored, on_disk.map(|index| (index, false, true)).into_iter().collect::<Vec<_>>());
    }
}
