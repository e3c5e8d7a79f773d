//! What a check of a device computes with: seeded values, plain products and attention, comparisons, streams.

use half::bf16;
use kernels::attention::{CacheSlice, Mla, PAGE, Pages, Queries};
use kernels::cuda::check::{
    PlainLatentAttention, PlainProduct, copy_vectors, count_differences, fill_bf16, fill_codes, fill_f32,
    multiply_forever, read_vectors, worst_error,
};
use kernels::cuda::{Device, ExpertFormat};
use kernels::{Values, reference};

use crate::common::{Format, Random, Weight};
use crate::mock::{self, Gpu};

/// In the middle of warps, blocks and rounds: the device below holds 2048 threads.
const COUNTS: [usize; 6] = [1, 31, 256, 257, 2049, 5000];

/// One multiprocessor: loops over what it does not hold at once are short.
fn in_every_order(body: impl FnMut(&Device)) {
    mock::in_every_order_like(Gpu::H100.with_multiprocessors(1), body);
}

fn hash(seed: u64, index: u64) -> u64 {
    Random(seed.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15))).next()
}

fn uniform(seed: u64, index: u64) -> f32 {
    ((hash(seed, index) >> 40) as i32 - (1 << 23)) as f32 / (1 << 23) as f32
}

#[test]
fn values_are_those_of_their_seed() {
    in_every_order(|device| {
        for count in COUNTS {
            let numbers = || 0..count as u64;
            let room = count + 3;
            let out = device.upload(&vec![9.0f32; room]).unwrap();
            fill_f32(device, out.slice(..count), 7, 0.5).unwrap();
            let mut want: Vec<f32> = numbers().map(|i| 0.5 * uniform(7, i)).collect();
            want.resize(room, 9.0);
            assert_eq!(out.read().unwrap(), want);

            let out = device.upload(&vec![bf16::ONE; room]).unwrap();
            fill_bf16(device, out.slice(..count), 8, (2.0, 0.25)).unwrap();
            let mut want: Vec<bf16> = numbers().map(|i| bf16::from_f32(2.0 + 0.25 * uniform(8, i))).collect();
            want.resize(room, bf16::ONE);
            assert_eq!(out.read().unwrap(), want);

            for e4m3 in [false, true] {
                let out = device.upload(&vec![77u8; room]).unwrap();
                fill_codes(device, out.slice(..count), 9, e4m3).unwrap();
                let code = |i| match (hash(9, i) >> 32) as u8 {
                    code if e4m3 && code & 0x7f == 0x7f => 0,
                    code => code,
                };
                let mut want: Vec<u8> = numbers().map(code).collect();
                want.resize(room, 77);
                assert_eq!(out.read().unwrap(), want);
            }
        }
    });
}

fn assert_near(got: &[f64], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let greatest = want.iter().fold(0.0f64, |most, value| most.max(value.abs()));
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-6 * greatest, "{what}: {got}, not {want}");
    }
}

#[test]
fn plain_products_are_the_references() {
    let formats = [
        (Format::Bf16, ExpertFormat::Bf16),
        (Format::Fp8, ExpertFormat::Fp8),
        (Format::Int4, ExpertFormat::Int4),
        (Format::Mxfp4, ExpertFormat::Mxfp4),
    ];
    in_every_order(|device| {
        let mut random = Random(111);
        for (kind, format) in formats {
            let (first_row, rows, columns, tokens) = (127, 5, 160, 3);
            let weight = Weight::random(&mut random, kind, first_row + rows, columns);
            let x = random.values(tokens * columns);
            let (codes, scales) = match weight.matrix().values {
                Values::Bf16(codes) => (codes, &[][..]),
                Values::Fp8 { values: codes, scales }
                | Values::Int4 { packed: codes, scales }
                | Values::Mxfp4 { blocks: codes, scales } => (codes, scales),
                _ => unreachable!("no format of experts"),
            };
            let codes = device.upload(codes).unwrap();
            let scales = (!scales.is_empty()).then(|| device.upload(scales).unwrap());
            let on_device = device.upload(&x).unwrap();
            let [out, magnitudes] = [(); 2].map(|()| device.alloc(tokens * rows).unwrap());
            let product = PlainProduct {
                x: on_device.all(),
                codes: codes.all(),
                scales: scales.as_ref().map(|scales| scales.all()),
                format,
                first_row,
                rows,
                columns,
                tokens,
                out: out.all(),
                magnitudes: magnitudes.all(),
            };
            product.launch(device).unwrap();
            let own = weight.matrix().slice(first_row, rows);
            assert_near(&out.read().unwrap(), &reference::matmul(&x, &own, None), &format!("{kind:?}"));
            let weights = reference::dequantize(&own);
            let terms = |x: &[f32], w: &[f32]| -> f64 {
                x.iter().zip(w).map(|(x, w)| (f64::from(*x) * f64::from(*w)).abs()).sum()
            };
            let want: Vec<f64> =
                x.chunks(columns).flat_map(|x| weights.chunks(columns).map(|w| terms(x, w))).collect();
            assert_near(&magnitudes.read().unwrap(), &want, &format!("magnitudes of {kind:?}"));
        }
    });
}

#[test]
fn plain_attention_is_the_references() {
    in_every_order(|device| {
        let mut random = Random(112);
        let (heads, latent, rope) = (3, 40, 16);
        let width = latent + rope;
        let shape = Mla { heads, latent, rope, scale: 0.3 };
        for length in [1, 9, PAGE + 1, 300] {
            let rounded =
                |values: Vec<f32>| -> Vec<bf16> { values.into_iter().map(bf16::from_f32).collect() };
            let query: Vec<f32> =
                rounded(random.values(heads * width)).iter().map(|x| 2.0 * x.to_f32()).collect();
            let rows = rounded(random.values(length.next_multiple_of(PAGE) * width));
            let cached: Vec<u16> = rows.iter().map(|value| value.to_bits()).collect();
            let table: Vec<u32> = (0..length.div_ceil(PAGE) as u32).collect();
            let pages = Pages { data: CacheSlice::Bf16(&cached), row: width, table: &table };
            let queries = Queries { rows: &query, first_position: length - 1 };
            let (on_device, rows) = (device.upload(&query).unwrap(), device.upload(&rows).unwrap());
            let scores = device.alloc(heads * length).unwrap();
            let out = device.alloc(heads * latent).unwrap();
            let attention = PlainLatentAttention {
                query: on_device.all(),
                rows: rows.all(),
                length,
                shape,
                scores: scores.all(),
                out: out.all(),
            };
            attention.launch(device).unwrap();
            assert_near(
                &out.read().unwrap(),
                &reference::mla(&shape, queries, &pages),
                &format!("{length} rows"),
            );
        }
    });
}

#[test]
fn differences_are_found_wherever_they_are() {
    in_every_order(|device| {
        let (worst, different) = (device.alloc(1).unwrap(), device.alloc(1).unwrap());
        for count in COUNTS {
            let want: Vec<f64> = (0..count).map(|i| i as f64).collect();
            let mut got: Vec<f32> = want.iter().map(|value| *value as f32).collect();
            let first = device.upload(&got).unwrap();
            let wanted = device.upload(&want).unwrap();
            let magnitudes = device.upload(&vec![4.0f64; count]).unwrap();
            for place in [0, count / 2, count - 1] {
                let before = got[place];
                for (added, relative, plain) in
                    [(0.0, 0.0, 0.0), (-2.0, 0.5, 2.0), (f32::NAN, f32::INFINITY, f32::INFINITY)]
                {
                    got[place] = before + added;
                    let changed = device.upload(&got).unwrap();
                    let error = |magnitudes| {
                        worst_error(device, changed.all(), wanted.all(), magnitudes, worst.all()).unwrap()
                    };
                    assert_eq!(error(Some(magnitudes.all())), relative, "{place} of {count}");
                    assert_eq!(error(None), plain, "{place} of {count}");
                    let (a, b) = (first.all().cast(), changed.all().cast());
                    let counted = count_differences(device, a, b, different.all()).unwrap();
                    assert_eq!(counted, u32::from(added != 0.0), "{place} of {count}");
                }
                got[place] = before;
            }
        }
    });
}

#[test]
fn streams_touch_all_vectors_and_no_more() {
    in_every_order(|device| {
        for vectors in [1, 255, 2049, 9000] {
            let from: Vec<u32> = (0..4 * vectors as u32).collect();
            let source = device.upload(&from).unwrap();
            let to = device.upload(&vec![7; 4 * vectors + 4]).unwrap();
            copy_vectors(device, source.all(), to.slice(..4 * vectors)).unwrap();
            let want = [&from[..], &[7; 4]].concat();
            assert_eq!(to.read().unwrap(), want);
            // The pattern that is written is that of all words together.
            let never = device.zeroed(1).unwrap();
            read_vectors(device, source.all(), never.all()).unwrap();
            assert_eq!(never.read().unwrap(), [0]);
            let odd = device.upload(&vec![0x5EED_5EED; 4 * vectors]).unwrap();
            read_vectors(device, odd.all(), never.all()).unwrap();
            assert_eq!(never.read().unwrap(), [0x5EED_5EED]);
        }
    });
}

#[test]
fn operations_of_products_are_counted() {
    in_every_order(|device| {
        let out = device.upload(&[5.0f32]).unwrap();
        let [once, twice] = [1, 2].map(|rounds| multiply_forever(device, rounds, out.all()).unwrap());
        assert!(once > 0 && once.is_multiple_of(2 * 16 * 8 * 16));
        assert_eq!(twice, 2 * once);
        assert_eq!(out.read().unwrap(), [5.0], "no sum is the one that is written");
    });
}
