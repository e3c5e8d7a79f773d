//! The ring of what was grouped: what it holds, that it wraps around, and that it can be turned off.

use kernels::cuda::{Device, ExpertRing, Group};
use kernels::reference;

use crate::common::Random;
use crate::mock;

const EXPERTS: usize = 13;
const TOP_K: usize = 4;

/// Groups random pairs of `rows` tokens; gives back the pairs of each expert.
fn group(device: &Device, random: &mut Random, rows: usize, ring: &ExpertRing, layer: u32) -> Vec<u16> {
    let ids: Vec<i32> = (0..rows * TOP_K).map(|_| random.below(EXPERTS) as i32).collect();
    let ids_on_device = device.upload(&ids).unwrap();
    let order = device.alloc(ids.len()).unwrap();
    let offsets = device.alloc(EXPERTS + 1).unwrap();
    let unit_counts = device.alloc(2).unwrap();
    let scratch = device.alloc(Group::scratch_len(ids.len(), EXPERTS)).unwrap();
    let group = Group {
        ids: ids_on_device.all(),
        tokens: None,
        rows,
        top_k: TOP_K,
        experts: EXPERTS,
        order: order.all(),
        offsets: offsets.all(),
        units: [None, None],
        unit_counts: unit_counts.all(),
        scratch: scratch.all(),
        ring: Some((ring, layer)),
    };
    group.launch(device).unwrap();
    device.synchronize().unwrap();
    reference::group(&ids, EXPERTS).1.windows(2).map(|ends| (ends[1] - ends[0]) as u16).collect()
}

#[test]
fn the_host_reads_what_was_grouped() {
    mock::in_every_order(|device| {
        let mut random = Random(101);
        let mut ring = ExpertRing::new(device, 3).unwrap();
        assert_eq!(ring.read_new(), Default::default());
        let mut number = 0;
        // Few and many pairs, which go different ways; more groupings than the ring holds.
        for (sizes, lost) in
            [(vec![5, 1], 0), (vec![2500], 0), (vec![1, 2, 3, 4, 5, 6, 7], 4), (vec![3, 2100, 9], 0)]
        {
            let mut counts = Vec::new();
            for rows in &sizes {
                counts.push(group(device, &mut random, *rows, &ring, *rows as u32 + 100));
            }
            let news = ring.read_new();
            assert_eq!(news.lost, lost);
            number += lost;
            assert_eq!(news.groupings.len(), sizes.len() - lost as usize);
            let kept = sizes.iter().zip(&counts).skip(lost as usize);
            for (grouping, (rows, counts)) in news.groupings.iter().zip(kept) {
                number += 1;
                assert_eq!(grouping.number, number);
                assert_eq!((grouping.layer, grouping.tokens), (*rows as u32 + 100, *rows as u32));
                assert_eq!(grouping.counts, *counts);
            }
            assert_eq!(ring.read_new(), Default::default());
        }
    });
}

#[test]
fn a_ring_that_is_off_records_nothing() {
    mock::in_every_order(|device| {
        let mut random = Random(102);
        let mut ring = ExpertRing::new(device, 4).unwrap();
        group(device, &mut random, 3, &ring, 0);
        ring.set_on(false).unwrap();
        group(device, &mut random, 3, &ring, 1);
        ring.set_on(true).unwrap();
        group(device, &mut random, 3, &ring, 2);
        let layers: Vec<u32> = ring.read_new().groupings.iter().map(|grouping| grouping.layer).collect();
        assert_eq!(layers, [0, 2]);
    });
}

/// More pairs of an expert than an entry can say.
#[test]
fn counts_stop_at_their_greatest() {
    mock::in_every_order(|device| {
        let mut ring = ExpertRing::new(device, 1).unwrap();
        let rows = 70_000;
        let ids = device.zeroed::<i32>(rows).unwrap();
        let order = device.alloc(rows).unwrap();
        let (offsets, unit_counts) = (device.alloc(2).unwrap(), device.alloc(2).unwrap());
        let scratch = device.alloc(Group::scratch_len(rows, 1)).unwrap();
        let group = Group {
            ids: ids.all(),
            tokens: None,
            rows,
            top_k: 1,
            experts: 1,
            order: order.all(),
            offsets: offsets.all(),
            units: [None, None],
            unit_counts: unit_counts.all(),
            scratch: scratch.all(),
            ring: Some((&ring, 0)),
        };
        group.launch(device).unwrap();
        assert_eq!(offsets.read().unwrap(), [0, rows as i32]);
        assert_eq!(ring.read_new().groupings[0].counts, [u16::MAX]);
    });
}
