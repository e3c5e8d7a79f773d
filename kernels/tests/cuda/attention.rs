//! Attention on the device against the reference: one row at a time on what the kernels see, which is queries and
//! cached values rounded to bf16. What is left are the softmax's weights, each rounded to bf16 as well.

use kernels::attention::CacheType;
use kernels::cuda::Device;

use crate::common::Random;
use crate::mock;
use case::{Case, FORMS, Place, Shape, forms};

mod case;

/// Positions around the ends of tiles, pages and spans.
const LENGTHS: [usize; 18] =
    [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 511, 513, 1025];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// All rows at once, in every form: right, and the same.
fn check(
    device: &Device,
    random: &mut Random,
    shape: Shape,
    kind: CacheType,
    lengths: &[usize],
    places: &[Place],
) {
    let what = format!("{shape:?}, {kind:?}, lengths {lengths:?}");
    let case = Case::new(random, shape, kind, lengths, places);
    let out = case.run(device, FORMS[0]);
    case.check(&out, &what);
    for &form in &forms(shape)[1..] {
        assert!(bits(&case.run(device, form)) == bits(&out), "{what}: other bits as {form:?}");
    }
}

/// The last position of each length.
fn check_lengths(device: &Device, shape: Shape, kind: CacheType, lengths: &[usize]) {
    let places: Vec<Place> = lengths.iter().enumerate().map(|(i, &length)| (i, length as i32 - 1)).collect();
    check(device, &mut Random(7), shape, kind, lengths, &places);
}

const TYPES: [CacheType; 3] = [CacheType::F32, CacheType::Bf16, CacheType::Fp8];

#[test]
fn latents_of_every_length() {
    mock::in_every_order(|device| {
        for kind in TYPES {
            check_lengths(device, Shape::Latent { heads: 4, latent: 48, rope: 16 }, kind, &LENGTHS);
        }
    });
}

#[test]
fn latents_of_every_shape() {
    mock::on_device(|device| {
        for kind in TYPES {
            for (heads, latent, rope) in [(4, 144, 16), (1, 32, 8), (20, 64, 16), (17, 256, 64), (70, 8, 8)] {
                check_lengths(device, Shape::Latent { heads, latent, rope }, kind, &[70, 1]);
            }
            for (heads, lengths) in [(64, [280, 5]), (16, [33, 257]), (128, [40, 1])] {
                check_lengths(device, Shape::Latent { heads, latent: 512, rope: 64 }, kind, &lengths);
            }
        }
    });
}

/// Devices with less shared memory take another kernel.
#[test]
fn latents_in_little_shared_memory() {
    mock::on_device_like(mock::Gpu::RTX_4090, |device| {
        for kind in TYPES {
            check_lengths(device, Shape::Latent { heads: 64, latent: 512, rope: 64 }, kind, &[100, 270]);
        }
    });
}

#[test]
fn groups_of_every_length() {
    mock::in_every_order(|device| {
        for kind in TYPES {
            let shape =
                Shape::Grouped { heads: 4, kv_heads: 2, key: 32, value: 32, window: None, sinks: true };
            check_lengths(device, shape, kind, &LENGTHS[..17]);
        }
    });
}

#[test]
fn windows_of_every_length() {
    mock::on_device(|device| {
        for kind in TYPES {
            for window in [1, 3, 64, 100] {
                let (window, sinks) = (Some(window), window % 2 == 0);
                let shape = Shape::Grouped { heads: 8, kv_heads: 2, key: 32, value: 32, window, sinks };
                check_lengths(device, shape, kind, &LENGTHS[4..15]);
            }
        }
    });
}

#[test]
fn groups_of_every_shape() {
    let ratios = [(4, 4), (6, 2), (8, 2), (8, 1), (12, 1), (24, 2), (40, 1), (72, 1)];
    let widths = [(16, 16), (64, 64), (128, 128), (72, 40), (8, 24), (192, 128), (256, 256)];
    mock::on_device(|device| {
        for kind in TYPES {
            for (i, (heads, kv_heads)) in ratios.into_iter().enumerate() {
                let (key, value) = widths[i % widths.len()];
                let shape = Shape::Grouped { heads, kv_heads, key, value, window: None, sinks: i % 2 == 0 };
                check_lengths(device, shape, kind, &[70, 3, 129]);
            }
            for (key, value) in widths {
                let shape =
                    Shape::Grouped { heads: 8, kv_heads: 2, key, value, window: Some(50), sinks: false };
                check_lengths(device, shape, kind, &[260]);
            }
        }
    });
}

/// A row is what it is, alone, among others, and in prompts cut anywhere.
#[test]
fn rows_do_not_know_each_other() {
    let shapes = [
        Shape::Latent { heads: 4, latent: 48, rope: 16 },
        Shape::Grouped { heads: 6, kv_heads: 2, key: 32, value: 32, window: None, sinks: false },
        Shape::Grouped { heads: 8, kv_heads: 2, key: 32, value: 32, window: Some(32), sinks: true },
        Shape::Grouped { heads: 12, kv_heads: 1, key: 128, value: 128, window: Some(40), sinks: false },
    ];
    // A prompt over the end of a span, single tokens of other sequences among padding, and another prompt.
    let mut places: Vec<Place> = (230..290).map(|position| (1, position)).collect();
    places.extend([(0, 99), (0, -1), (2, 0), (3, 260), (0, -1)]);
    places.extend((0..20).map(|position| (4, position)));
    let lengths = [100, 290, 1, 261, 20];
    mock::on_device(|device| {
        for (shape, kind) in shapes.iter().flat_map(|&shape| TYPES.map(|kind| (shape, kind))) {
            let case = Case::new(&mut Random(3), shape, kind, &lengths, &places);
            let out = case.run(device, FORMS[0]);
            case.check(&out, &format!("{shape:?}, {kind:?}"));
            let width = shape.widths().1;
            for (i, cuts) in
                [vec![0, 1, 8, 30, 59, 63, 65, 85], (57..68).collect::<Vec<_>>()].iter().enumerate()
            {
                for (j, ends) in cuts.windows(2).enumerate() {
                    let (some, queries) = case.rows(ends[0], ends[1]);
                    let form = forms(shape)[(i + j) % forms(shape).len()];
                    let part = case.run_rows(device, &some, &queries, form);
                    let same = bits(&part) == bits(&out[ends[0] * width..ends[1] * width]);
                    assert!(same, "{shape:?}, {kind:?}: rows {ends:?} as {form:?} have other bits");
                }
            }
        }
    });
}

/// Positions of all lengths of spans.
#[test]
fn contexts_of_many_spans() {
    let shape = Shape::Grouped { heads: 1, kv_heads: 1, key: 8, value: 8, window: None, sinks: true };
    mock::on_device(|device| {
        check_lengths(device, shape, CacheType::Bf16, &[16_385, 65_537]);
        let shape = Shape::Latent { heads: 1, latent: 16, rope: 8 };
        check_lengths(device, shape, CacheType::Fp8, &[16_385]);
    });
}

/// The check of a fault must itself be short.
#[test]
fn pages_and_barriers() {
    mock::in_every_order(|device| {
        check_lengths(device, Shape::Latent { heads: 4, latent: 48, rope: 16 }, CacheType::Bf16, &[130]);
        let shape = Shape::Grouped { heads: 4, kv_heads: 2, key: 32, value: 32, window: None, sinks: false };
        check_lengths(device, shape, CacheType::Bf16, &[130]);
    });
}

#[test]
fn a_missing_barrier_is_seen() {
    mock::assert_caught("FAULT_NO_BARRIER", "attention::pages_and_barriers");
}

#[test]
fn the_page_beside_the_right_one_is_seen() {
    mock::assert_caught("FAULT_PAGE", "attention::pages_and_barriers");
}

#[test]
fn attention_stays_in_its_memory() {
    if !mock::is_child() {
        mock::rerun_sanitized("attention::pages_and_barriers");
    }
}
