//! Attention on the device against the reference: one row at a time on what the kernels see, which is queries and
//! cached values rounded to bf16. What is left are the softmax's weights, each rounded to bf16 as well.

use kernels::attention::CacheType;
use kernels::cuda::Device;

use crate::common::Random;
use crate::mock::{self, Turn};
use case::{Case, FORMS, Place, Shape, forms};

mod case;

/// Positions around the ends of tiles, pages and spans.
const LENGTHS: [usize; 18] =
    [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 511, 513, 1025];

/// The same in a run with the sanitizer.
const FEW_LENGTHS: [usize; 6] = [1, 63, 64, 65, 129, 257];

fn lengths() -> &'static [usize] {
    if mock::is_sanitized() { &FEW_LENGTHS } else { &LENGTHS }
}

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

/// The types that a shape of this number meets in an order of threads: over all orders each of them, at the cost of one.
fn types(turn: Turn, shape: usize) -> impl Iterator<Item = CacheType> {
    TYPES.into_iter().enumerate().filter(move |(i, _)| turn.has(shape + i)).map(|(_, kind)| kind)
}

#[test]
fn latents_of_every_length() {
    mock::in_every_order(|device| {
        for kind in TYPES {
            check_lengths(device, Shape::Latent { heads: 4, latent: 48, rope: 16 }, kind, lengths());
        }
    });
}

#[test]
fn latents_of_every_shape() {
    let small = [(4, 144, 16), (1, 32, 8), (20, 64, 16), (17, 256, 64), (70, 8, 8)];
    let published = [(16, [33, 257]), (64, [280, 5]), (128, [40, 1])];
    mock::by_turns(|device, turn| {
        for (i, (heads, latent, rope)) in mock::thinned(small.into_iter().enumerate(), 2) {
            for kind in types(turn, i) {
                check_lengths(device, Shape::Latent { heads, latent, rope }, kind, &[70, 1]);
            }
        }
        for (i, (heads, lengths)) in mock::thinned(published.into_iter().enumerate(), 3) {
            // One shape of three, so it takes all types.
            let kinds = if mock::is_sanitized() { TYPES.to_vec() } else { types(turn, i).collect() };
            for kind in kinds {
                check_lengths(device, Shape::Latent { heads, latent: 512, rope: 64 }, kind, &lengths);
            }
        }
    });
}

/// Devices with less shared memory take another kernel.
#[test]
fn latents_in_little_shared_memory() {
    mock::in_every_order_like(mock::Gpu::RTX_4090, |device| {
        for kind in TYPES {
            let lengths: Vec<usize> = mock::thinned([65, 270], 2).collect();
            check_lengths(device, Shape::Latent { heads: 64, latent: 512, rope: 64 }, kind, &lengths);
        }
    });
}

#[test]
fn groups_of_every_length() {
    mock::in_every_order(|device| {
        for kind in TYPES {
            let shape =
                Shape::Grouped { heads: 4, kv_heads: 2, key: 32, value: 32, window: None, sinks: true };
            check_lengths(device, shape, kind, lengths());
        }
    });
}

#[test]
fn windows_of_every_length() {
    let shape = |window: usize| {
        let (window, sinks) = (Some(window), window.is_multiple_of(2));
        Shape::Grouped { heads: 8, kv_heads: 2, key: 32, value: 32, window, sinks }
    };
    mock::by_turns(|device, turn| {
        for (i, window) in mock::thinned([1, 3, 64, 100].into_iter().enumerate(), 2) {
            for kind in types(turn, i) {
                check_lengths(device, shape(window), kind, lengths());
            }
        }
    });
}

#[test]
fn groups_of_every_shape() {
    let ratios = [(4, 4), (6, 2), (8, 2), (8, 1), (12, 1), (24, 2), (40, 1), (72, 1)];
    let widths = [(16, 16), (64, 64), (128, 128), (72, 40), (8, 24), (192, 128), (256, 256)];
    mock::by_turns(|device, turn| {
        for (i, (heads, kv_heads)) in mock::thinned(ratios.into_iter().enumerate(), 3) {
            let (key, value) = widths[i % widths.len()];
            let shape = Shape::Grouped { heads, kv_heads, key, value, window: None, sinks: i % 2 == 0 };
            for kind in types(turn, i + 2) {
                check_lengths(device, shape, kind, &[70, 3, 129]);
            }
        }
        for (i, (key, value)) in widths.into_iter().enumerate() {
            let shape = Shape::Grouped { heads: 8, kv_heads: 2, key, value, window: Some(50), sinks: false };
            let lengths = if mock::is_sanitized() { [65] } else { [260] };
            for kind in types(turn, i + 1) {
                check_lengths(device, shape, kind, &lengths);
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
    let (prompt, cuts) = match mock::is_sanitized() {
        false => (230..290, vec![vec![0, 1, 8, 30, 59, 63, 65, 85], (57..68).collect()]),
        true => (250..262, vec![vec![0, 1, 8, 11, 15, 17, 37]]),
    };
    let mut places: Vec<Place> = prompt.map(|position| (1, position)).collect();
    places.extend([(0, 99), (0, -1), (2, 0), (3, 260), (0, -1)]);
    places.extend((0..20).map(|position| (4, position)));
    let lengths = [100, 290, 1, 261, 20];
    mock::by_turns(|device, turn| {
        let cases = shapes
            .into_iter()
            .enumerate()
            .flat_map(|(i, shape)| types(turn, i).map(move |kind| (shape, kind)));
        for (shape, kind) in mock::thinned(cases, 2) {
            let case = Case::new(&mut Random(3), shape, kind, &lengths, &places);
            let out = case.run(device, FORMS[0]);
            case.check(&out, &format!("{shape:?}, {kind:?}"));
            let width = shape.widths().1;
            for (i, cuts) in cuts.iter().enumerate() {
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

/// Positions of all lengths of spans. The longest, whose blocks are no others, once and without the sanitizer.
#[test]
fn contexts_of_many_spans() {
    let grouped = Shape::Grouped { heads: 1, kv_heads: 1, key: 8, value: 8, window: None, sinks: true };
    let latent = Shape::Latent { heads: 1, latent: 16, rope: 8 };
    let length = if mock::is_sanitized() { 2049 } else { 16_385 };
    mock::in_every_order(|device| {
        check_lengths(device, grouped, CacheType::Bf16, &[length]);
        check_lengths(device, latent, CacheType::Fp8, &[length]);
    });
    if !mock::is_sanitized() {
        mock::on_device(|device| check_lengths(device, grouped, CacheType::Bf16, &[65_537]));
    }
}

/// A value in a prompt that is no finite number is seen by the tokens whose window holds it and hurts no other, though
/// these share a tile with it.
#[test]
fn what_is_not_finite_stays_where_it_is_seen() {
    let shapes = [
        Shape::Latent { heads: 4, latent: 48, rope: 16 },
        Shape::Grouped { heads: 6, kv_heads: 2, key: 32, value: 32, window: None, sinks: false },
        Shape::Grouped { heads: 8, kv_heads: 2, key: 72, value: 40, window: Some(32), sinks: true },
        Shape::Grouped { heads: 4, kv_heads: 4, key: 192, value: 128, window: Some(7), sinks: false },
    ];
    let bad = [6, 250];
    let places: Vec<Place> =
        (230..290).map(|position| (1, position)).chain((0..20).map(|position| (0, position))).collect();
    mock::by_turns(|device, turn| {
        for (number, (shape, code)) in shapes
            .into_iter()
            .flat_map(|shape| [0x7F80, 0xFF80, 0x7FC0].map(|code| (shape, code)))
            .enumerate()
        {
            if !turn.has(number + number / 3) {
                continue;
            }
            let mut case = Case::new(&mut Random(3), shape, CacheType::Bf16, &[100, 290], &places);
            let clean = bits(&case.run(device, FORMS[0]));
            bad.iter().enumerate().for_each(|(sequence, &position)| case.spoil(sequence, position, code));
            let (width, window) = (shape.widths().1, shape.window().unwrap_or(usize::MAX));
            for &form in forms(shape) {
                let out = case.run(device, form);
                for (i, &(sequence, position)) in places.iter().enumerate() {
                    let what =
                        format!("{shape:?} {form:?} {code:x}: sequence {sequence}, position {position}");
                    let (got, back) = (&out[i * width..][..width], position as usize);
                    if back >= bad[sequence] && back - bad[sequence] < window {
                        assert!(got.iter().any(|x| !x.is_finite()), "{what} does not show it");
                    } else {
                        assert!(bits(got) == clean[i * width..][..width], "{what} is hurt");
                    }
                }
            }
        }
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
