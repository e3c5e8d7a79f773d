//! Which blocks stay: chains from their roots, the longest used first, also after a restart.

use proptest::prelude::*;

use super::*;

#[test]
fn a_chain_longer_than_the_store_keeps_its_beginning() {
    let scratch = Scratch::new();
    let chain = keys(9);
    let mut tested = Tested::open(&scratch, room_for(4));
    tested.save_chain(&chain);
    assert_eq!(tested.load(&chain), 4);
    assert_eq!(bytes_in(&scratch.dir()), room_for(4));
    assert_eq!(tested.store.counters().failed_saves, 0);
}

#[test]
fn the_end_of_the_chain_used_longest_ago_goes_first() {
    let scratch = Scratch::new();
    let keys = keys(12);
    let (old, new, more) = (&keys[..4], &keys[4..8], &keys[8..]);
    let mut tested = Tested::open(&scratch, room_for(8));
    tested.save_chain(new);
    tested.save_chain(old);
    tested.store.touch(new);
    for step in 0..4 {
        // The order must outlive the process at every step.
        drop(tested);
        tested = Tested::open(&scratch, room_for(8));
        let used = tested.store.touch(&more[..step]);
        assert!(tested.save(more[step], used, step));
        assert_eq!(tested.held(new), [true; 4]);
        assert_eq!(tested.held(old), [0, 1, 2, 3].map(|depth| depth < 3 - step));
    }
}

#[test]
fn wrong_clocks_change_the_order_only() {
    let scratch = Scratch::new();
    let chain = keys(6);
    Tested::open(&scratch, room_for(6)).save_chain(&chain[..5]);
    let set = |key, time| {
        File::options().write(true).open(scratch.block(key)).unwrap().set_modified(time).unwrap();
    };
    let now = SystemTime::now();
    set(chain[0], now + Duration::from_secs(50 * 365 * 86400));
    set(chain[1], SystemTime::UNIX_EPOCH);
    set(chain[2], SystemTime::UNIX_EPOCH - Duration::from_secs(86400));
    set(chain[3], now);
    set(chain[4], now);
    let mut tested = Tested::open(&scratch, room_for(5));
    assert_eq!(tested.load(&chain[..5]), 5);
    let used = tested.store.touch(&chain[3..5]);
    assert!(tested.save(chain[5], used, 2));
    assert!(tested.store.last.0 <= place_of(SystemTime::now()) + 1_000_000, "no use is in the far future");
    assert_eq!(tested.held(&chain).iter().filter(|&&held| held).count(), 5);
    assert_eq!(tested.held(&chain[3..]), [true; 3]);
    assert_eq!(bytes_in(&scratch.dir()), room_for(5));
}

#[test]
fn no_two_uses_are_the_same() {
    let mut tested = Tested::open(&Scratch::new(), 1 << 20);
    let mut last = tested.store.touch(&[]);
    for _ in 0..10_000 {
        let used = tested.store.touch(&[]);
        assert!(used > last);
        last = used;
    }
}

/// The store as a list: the block with the lowest place goes.
#[derive(Default)]
struct Model {
    places: Vec<(u64, BlockKey)>,
}

impl Model {
    fn touch(&mut self, chain: &[BlockKey], used: Use) {
        for (depth, key) in chain.iter().enumerate() {
            self.places
                .iter_mut()
                .filter(|(_, held)| held == key)
                .for_each(|(place, _)| *place = used.place(depth));
        }
    }

    fn save(&mut self, key: BlockKey, place: u64, capacity: usize) {
        if !self.places.iter().any(|&(_, held)| held == key) {
            self.places.push((place, key));
        }
        self.places.sort_unstable();
        if self.places.len() > capacity {
            self.places.remove(0);
        }
    }
}

/// A tree of chains: a block's children have the next numbers, so chains share their beginnings.
fn chain_to(tree: &[BlockKey], mut number: usize) -> Vec<BlockKey> {
    let mut chain = vec![tree[number]];
    while number > 0 {
        number = (number - 1) / 2;
        chain.insert(0, tree[number]);
    }
    chain
}

#[derive(Clone, Debug)]
enum Step {
    Use(usize),
    Load(usize),
    Damage(usize),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..31usize).prop_map(Step::Use),
        2 => (0..31usize).prop_map(Step::Load),
        1 => (0..31usize).prop_map(Step::Damage),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_uses_is_as_in_the_model(capacity in 1..9usize, steps in prop::collection::vec(step(), 1..30)) {
        let scratch = Scratch::new();
        let tree = keys(31);
        let limit = room_for(capacity as u64) + FILE / 2;
        let mut tested = Tested::open(&scratch, limit);
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Use(number) => {
                    let chain = chain_to(&tree, number);
                    let used = tested.store.touch(&chain);
                    model.touch(&chain, used);
                    for (depth, &key) in chain.iter().enumerate() {
                        tested.save(key, used, depth);
                        model.save(key, used.place(depth), capacity);
                    }
                }
                Step::Load(number) => {
                    let chain = chain_to(&tree, number);
                    let held = |key: &&BlockKey| model.places.iter().any(|(_, held)| held == *key);
                    prop_assert_eq!(tested.load(&chain), chain.iter().take_while(held).count());
                }
                Step::Damage(number) => {
                    let key = tree[number];
                    if tested.store.contains(key) {
                        fs::write(scratch.block(key), b"x").unwrap();
                        prop_assert_eq!(tested.load(&[key]), 0);
                        tested.store.settle();
                        prop_assert!(!scratch.block(key).exists());
                        model.places.retain(|&(_, held)| held != key);
                    }
                }
                Step::Restart => {
                    drop(tested);
                    tested = Tested::open(&scratch, limit);
                }
            }
            for &key in &tree {
                let held = model.places.iter().any(|&(_, held)| held == key);
                prop_assert_eq!(tested.store.contains(key), held);
            }
            prop_assert!(bytes_in(&scratch.dir()) <= limit);
            prop_assert_eq!(bytes_in(&scratch.dir()), tested.store.counters().bytes);
        }
    }
}
