//! Grouping by expert against the plain reference: exactly, in all sizes, and with the faults that must be seen.

use kernels::cuda::{Buffer, Device, ExpertRing, Group, UNIT_LEN, Units, max_units};
use kernels::reference;

use crate::common::Random;
use crate::mock;

/// Stands where nothing was written.
const UNTOUCHED: i32 = -77;

struct Shape {
    experts: usize,
    top_k: usize,
    tokens: usize,
    padding: usize,
    sizes: [Option<usize>; 2],
}

impl Shape {
    fn new(experts: usize, top_k: usize, tokens: usize) -> Self {
        Self { experts, top_k, tokens, padding: 0, sizes: [Some(8), Some(64)] }
    }
}

fn check(device: &Device, shape: &Shape, ids: &[i32]) {
    let Shape { experts, top_k, tokens, padding, sizes } = *shape;
    let rows = tokens + padding;
    let pairs = rows * top_k;
    assert_eq!(ids.len(), pairs);
    let ids_on_device = device.upload(ids).unwrap();
    let count = device.upload(&[tokens as u32]).unwrap();
    let order = device.upload(&vec![UNTOUCHED; pairs]).unwrap();
    let offsets = device.upload(&vec![UNTOUCHED; experts + 1]).unwrap();
    let lists: [Option<Buffer<u32>>; 2] = sizes.map(|size| {
        size.map(|size| device.upload(&vec![u32::MAX; UNIT_LEN * max_units(pairs, experts, size)]).unwrap())
    });
    let unit_counts = device.zeroed(2).unwrap();
    let scratch = device.alloc(Group::scratch_len(pairs, experts)).unwrap();
    let units =
        [0, 1].map(|i| lists[i].as_ref().map(|list| Units { size: sizes[i].unwrap(), list: list.all() }));
    let group = Group {
        ids: ids_on_device.all(),
        tokens: (padding > 0).then(|| count.all()),
        rows,
        top_k,
        experts,
        order: order.all(),
        offsets: offsets.all(),
        units,
        unit_counts: unit_counts.all(),
        scratch: scratch.all(),
        ring: None,
    };
    group.launch(device).unwrap();
    let what = format!("{experts} experts, top {top_k}, {tokens} tokens, {padding} padding");
    let (want_order, want_offsets) = reference::group(&ids[..tokens * top_k], experts);
    assert_eq!(offsets.read().unwrap(), want_offsets, "{what}");
    let got = order.read().unwrap();
    let (places, rest) = got.split_at(want_order.len());
    assert_eq!(places, want_order, "{what}");
    assert!(rest.iter().all(|place| *place == UNTOUCHED), "{what}");
    let counts = unit_counts.read().unwrap();
    for ((size, list), count) in sizes.into_iter().zip(&lists).zip(counts) {
        let want: Vec<u32> = size.map_or(vec![], |size| reference::units(&want_offsets, size)).concat();
        assert_eq!(count as usize * UNIT_LEN, want.len(), "{what}, units of {size:?}");
        let Some(list) = list else { continue };
        let got = list.read().unwrap();
        assert_eq!(got[..want.len()], want, "{what}, units of {size:?}");
        assert!(got[want.len()..].iter().all(|value| *value == u32::MAX), "{what}");
    }
}

/// k different experts for each token, ascending, as the router gives them.
fn routed(random: &mut Random, experts: usize, top_k: usize, rows: usize) -> Vec<i32> {
    let mut ids = Vec::new();
    for _ in 0..rows {
        let mut chosen = std::collections::BTreeSet::new();
        while chosen.len() < top_k {
            chosen.insert(random.below(experts) as i32);
        }
        ids.extend(chosen);
    }
    ids
}

#[test]
fn pairs_are_in_order() {
    mock::in_every_order(|device| {
        let mut random = Random(91);
        for experts in mock::thinned([4, 8, 16, 60, 64, 128, 160, 256, 384, 512], 3) {
            for (i, tokens) in [1, 2, 5, 33, 64, 200].into_iter().enumerate() {
                for top_k in [[1, 4], [2, 6], [3, 8], [4, 16], [1, 8], [2, 8]][i] {
                    if top_k <= experts {
                        let ids = routed(&mut random, experts, top_k, tokens);
                        check(device, &Shape::new(experts, top_k, tokens), &ids);
                    }
                }
            }
        }
    });
}

#[test]
fn few_experts_get_all() {
    mock::in_every_order(|device| {
        let mut random = Random(92);
        for experts in [4, 60, 512] {
            for tokens in [1, 33, 500] {
                let top_k = 2;
                let shape = Shape { padding: 5, ..Shape::new(experts, top_k, tokens) };
                let pairs = (tokens + 5) * top_k;
                // All to one; to the last; to two far apart; some to nobody.
                check(device, &shape, &vec![1; pairs]);
                check(device, &shape, &vec![experts as i32 - 1; pairs]);
                let two: Vec<i32> =
                    (0..pairs).map(|pair| if pair % 3 == 0 { 0 } else { experts as i32 - 2 }).collect();
                check(device, &shape, &two);
                let some: Vec<i32> = (0..pairs).map(|_| random.below(experts + 2) as i32 - 1).collect();
                check(device, &shape, &some);
                check(device, &shape, &vec![-1; pairs]);
            }
        }
    });
}

#[test]
fn unit_sizes_are_free() {
    mock::in_every_order(|device| {
        let mut random = Random(93);
        let (experts, top_k, tokens) = (16, 4, 150);
        let ids = routed(&mut random, experts, top_k, tokens);
        for sizes in
            [[None, None], [Some(16), None], [None, Some(32)], [Some(1), Some(7)], [Some(4096), Some(128)]]
        {
            check(device, &Shape { sizes, ..Shape::new(experts, top_k, tokens) }, &ids);
        }
        // Of all rows none is a token.
        let shape = Shape { padding: 4, ..Shape::new(experts, top_k, 0) };
        check(device, &shape, &ids[..4 * top_k]);
    });
}

#[test]
fn many_pairs_are_sorted_by_several_blocks() {
    mock::in_every_order(|device| {
        let mut random = Random(94);
        for (experts, top_k, tokens, padding) in [
            (384, 8, 1024, 0),
            (384, 8, 1025, 0),
            (60, 8, 1500, 0),
            (512, 16, 1500, 7),
            (8, 6, 1300, 300),
            (4, 4, 100, 3000),
        ] {
            let shape = Shape { padding, ..Shape::new(experts, top_k, tokens) };
            let ids = if experts < top_k * 2 {
                (0..(tokens + padding) * top_k).map(|_| random.below(experts + 1) as i32 - 1).collect()
            } else {
                routed(&mut random, experts, top_k, tokens + padding)
            };
            check(device, &shape, &ids);
        }
        check(device, &Shape::new(256, 4, 3000), &vec![255; 12_000]);
    });
}

/// As a step does: counts that change, in a graph that was captured once.
#[test]
fn a_graph_follows_the_number_of_tokens() {
    mock::in_every_order(|device| {
        let mut random = Random(95);
        let (experts, top_k, rows) = (64, 4, 40);
        let ids = device.upload(&routed(&mut random, experts, top_k, rows)).unwrap();
        let tokens = device.upload(&[0]).unwrap();
        let order = device.alloc(rows * top_k).unwrap();
        let offsets = device.alloc(experts + 1).unwrap();
        let unit_counts = device.zeroed(2).unwrap();
        let scratch = device.alloc(0).unwrap();
        let mut ring = ExpertRing::new(device, 8).unwrap();
        let group = Group {
            ids: ids.all(),
            tokens: Some(tokens.all()),
            rows,
            top_k,
            experts,
            order: order.all(),
            offsets: offsets.all(),
            units: [None, None],
            unit_counts: unit_counts.all(),
            scratch: scratch.all(),
            ring: Some((&ring, 9)),
        };
        let graph = device.capture(|| group.launch(device)).unwrap();
        for count in [3, 40, 0, 17] {
            let fresh = routed(&mut random, experts, top_k, rows);
            ids.write(&fresh).unwrap();
            tokens.write(&[count as u32]).unwrap();
            graph.launch().unwrap();
            let (want_order, want_offsets) = reference::group(&fresh[..count * top_k], experts);
            assert_eq!(offsets.read().unwrap(), want_offsets);
            assert_eq!(order.read().unwrap()[..want_order.len()], want_order);
        }
        let tokens: Vec<u32> = ring.read_new().groupings.iter().map(|grouping| grouping.tokens).collect();
        assert_eq!(tokens, [3, 40, 0, 17]);
    });
}

#[test]
fn a_missing_barrier_is_caught() {
    mock::assert_caught("FAULT_NO_BARRIER", "group::pairs_are_in_order");
}

#[test]
fn a_write_out_of_bounds_is_caught() {
    mock::assert_caught("FAULT_OUT_OF_BOUNDS", "group::pairs_are_in_order");
    mock::assert_caught_sanitized("FAULT_OUT_OF_BOUNDS", "group::pairs_are_in_order");
}
