//! Norms and planes against the f64 reference, and their bits whatever the strides, the batch and the outputs.

use half::bf16;
use kernels::cuda::{Buffer, Device, HeadNorm, Order, Planes, RmsNorm, Split, Strided};
use kernels::reference;

use crate::common::{Random, assert_close, bits};
use crate::mock;

const EPS: f32 = 1e-5;

/// Rows `stride` apart, from `offset` on, with NaN between them.
fn spread(rows: &[f32], width: usize, stride: usize, offset: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; offset + rows.len() / width * stride + 8];
    for (row, to) in rows.chunks(width).zip(out[offset..].chunks_mut(stride)) {
        to[..width].copy_from_slice(row);
    }
    out
}

fn gather(values: &[f32], rows: usize, width: usize, stride: usize, offset: usize) -> Vec<f32> {
    (0..rows).flat_map(|row| values[offset + row * stride..][..width].to_vec()).collect()
}

/// `[count, rows, width]` in an order, as the reference gives them.
fn expected_planes(x: &[f32], width: usize, count: usize, order: Order) -> Vec<bf16> {
    let mut out = Vec::new();
    for plane in reference::planes(x, count) {
        for row in plane.chunks(width) {
            let mut placed = vec![bf16::ZERO; width];
            row.iter().enumerate().for_each(|(column, value)| placed[order.position(column)] = *value);
            out.extend(placed);
        }
    }
    out
}

fn same_planes(got: &Buffer<bf16>, x: &[f32], width: usize, count: usize, order: Order) {
    let got: Vec<u16> = got.read().unwrap().iter().map(|value| value.to_bits()).collect();
    let want = expected_planes(x, width, count, order);
    let want: Vec<u16> = want.iter().map(|value| value.to_bits()).collect();
    assert_eq!(got, want, "{width} columns, {count} planes, {order:?}");
}

fn check_rows(device: &Device, random: &mut Random, rows: usize, width: usize, with_weight: bool) {
    let (x, delta, weight) = (random.values(rows * width), random.values(rows * width), random.values(width));
    let weight = with_weight.then_some(&weight[..]);
    let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
    let on_device = weight.map(|weight| device.upload(weight).unwrap());
    let (x, sum_of_x) = (device.upload(&x).unwrap(), device.alloc::<f32>(rows * width).unwrap());
    sum_of_x.copy_from(&x).unwrap();
    let delta = device.upload(&delta).unwrap();
    let out = device.alloc(rows * width).unwrap();
    let natural = device.alloc(3 * rows * width).unwrap();
    let nibble = width.is_multiple_of(32).then(|| device.alloc(3 * rows * width).unwrap());
    let norm = RmsNorm {
        x: Strided::new(&sum_of_x, width),
        delta: Some(Strided::new(&delta, width)),
        weight: on_device.as_ref().map(Buffer::all),
        eps: EPS,
        rows,
        width,
        out: Some(Strided::new(&out, width)),
        natural: Some(Planes::new(&natural, 3)),
        nibble: nibble.as_ref().map(|nibble| Planes::new(nibble, 3)),
    };
    norm.launch(device).unwrap();
    assert_eq!(bits(&sum_of_x.read().unwrap()), bits(&sum), "the sum is written back");
    let got = out.read().unwrap();
    let want = reference::rms_norm(&sum, weight, EPS, width);
    assert_close(&got, &want, &want.iter().map(|v| v.abs()).collect::<Vec<_>>(), 5e-7, "norm");
    same_planes(&natural, &got, width, 3, Order::Natural);
    if let Some(nibble) = &nibble {
        same_planes(nibble, &got, width, 3, Order::Nibble);
    }

    // In place, one row alone, without a delta, and from rows that are not aligned.
    let row = rows - 1;
    let in_place = device.upload(&spread(&sum[row * width..], width, width + 3, 1)).unwrap();
    let place = Strided::new(in_place.slice(1..), width + 3);
    let plane = device.alloc(width).unwrap();
    let alone = RmsNorm {
        x: place,
        delta: None,
        rows: 1,
        out: Some(place),
        natural: Some(Planes::new(&plane, 1)),
        nibble: None,
        ..norm
    };
    alone.launch(device).unwrap();
    let in_place = gather(&in_place.read().unwrap(), 1, width, width + 3, 1);
    assert_eq!(bits(&in_place), bits(&got[row * width..]), "{width} columns: alone and not aligned");
    same_planes(&plane, &got[row * width..], width, 1, Order::Natural);
}

#[test]
fn rows_meet_the_reference() {
    mock::in_every_order(|device| {
        let mut random = Random(51);
        for width in [1, 7, 32, 33, 64, 100, 144, 576, 1000, 1032, 2048] {
            for with_weight in [true, false] {
                check_rows(device, &mut random, 3, width, with_weight);
            }
        }
        // As wide as a block keeps, and wider: units that are not whole at the end.
        for width in [7168, 8192, 8224, 9001, 16_416] {
            check_rows(device, &mut random, 2, width, true);
        }
    });
}

#[test]
fn strides_do_not_matter() {
    mock::in_every_order(|device| {
        let mut random = Random(52);
        let (rows, width) = (3, 96);
        let x = random.values(rows * width);
        let weight = device.upload(&random.values(width)).unwrap();
        let outs: Vec<Vec<u32>> = [(96, 0), (100, 0), (100, 4), (101, 0), (97, 3)]
            .into_iter()
            .map(|(stride, offset)| {
                let spread = spread(&x, width, stride, offset);
                let values = device.upload(&spread).unwrap();
                let place = Strided::new(values.slice(offset..), stride);
                let norm = RmsNorm {
                    x: place,
                    delta: None,
                    weight: Some(weight.all()),
                    eps: EPS,
                    rows,
                    width,
                    out: Some(place),
                    natural: None,
                    nibble: None,
                };
                norm.launch(device).unwrap();
                let values = values.read().unwrap();
                let untouched = values.iter().zip(&spread).filter(|(_, before)| before.is_nan());
                assert!(untouched.into_iter().all(|(after, _)| after.is_nan()), "between the rows");
                bits(&gather(&values, rows, width, stride, offset))
            })
            .collect();
        assert!(outs.iter().all(|out| *out == outs[0]));
    });
}

#[test]
fn extremes() {
    mock::in_every_order(|device| {
        let x = [[0.0; 64], [1e-30; 64], [1e18; 64], [-3.0; 64]].concat();
        let buffer = device.upload(&x).unwrap();
        let norm = RmsNorm {
            x: Strided::new(&buffer, 64),
            delta: None,
            weight: None,
            eps: EPS,
            rows: 4,
            width: 64,
            out: Some(Strided::new(&buffer, 64)),
            natural: None,
            nibble: None,
        };
        norm.launch(device).unwrap();
        let want = reference::rms_norm(&x, None, EPS, 64);
        let size: Vec<f64> = want.iter().map(|v| v.abs()).collect();
        assert_close(&buffer.read().unwrap(), &want, &size, 5e-7, "norm");
        // Nothing to do is no error.
        RmsNorm { rows: 0, ..norm }.launch(device).unwrap();
    });
}

#[test]
fn heads_meet_the_reference() {
    mock::in_every_order(|device| {
        let mut random = Random(53);
        for width in [1, 16, 33, 64, 96, 128, 192, 512, 513, 700, 1024] {
            for (heads, gap, offset) in [(1, 0, 0), (3, 0, 0), (5, 8, 4), (2, 3, 1)] {
                let (rows, head_stride) = (3, width + gap);
                let stride = heads * head_stride + gap;
                let all = random.values(offset + rows * stride);
                let weight = random.values(width);
                let x = device.upload(&all).unwrap();
                let weights = device.upload(&weight).unwrap();
                let weight = (heads != 5).then_some(&weight[..]);
                let norm = HeadNorm {
                    x: Strided::new(x.slice(offset..), stride),
                    rows,
                    heads,
                    head_stride,
                    width,
                    weight: weight.map(|_| weights.all()),
                    eps: EPS,
                };
                norm.launch(device).unwrap();
                let got = x.read().unwrap();
                let mut want = all.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
                for row in 0..rows {
                    for head in 0..heads {
                        let at = offset + row * stride + head * head_stride;
                        let normed = reference::rms_norm(&all[at..at + width], weight, EPS, width);
                        want[at..at + width].copy_from_slice(&normed);
                    }
                }
                let size: Vec<f64> = want.iter().map(|v| v.abs()).collect();
                assert_close(&got, &want, &size, 5e-7, "heads");

                // The last head alone.
                let at = offset + (rows - 1) * stride + (heads - 1) * head_stride;
                let alone = device.upload(&all[at..at + width]).unwrap();
                let norm = HeadNorm { x: Strided::new(&alone, width), rows: 1, heads: 1, ..norm };
                norm.launch(device).unwrap();
                assert_eq!(bits(&alone.read().unwrap()), bits(&got[at..at + width]), "{width} columns alone");
            }
        }
    });
}

#[test]
fn splits_add_up() {
    mock::in_every_order(|device| {
        let mut random = Random(54);
        for (width, stride, offset) in
            [(32, 32, 0), (64, 70, 0), (64, 72, 8), (160, 160, 3), (33, 33, 0), (5, 9, 1), (2080, 2080, 0)]
        {
            let rows = 3;
            let mut x = random.values(rows * width);
            x[0] = 0.0;
            x[1] = 1e-30;
            x[2] = -2.5e30;
            let values = device.upload(&spread(&x, width, stride, offset)).unwrap();
            for count in [1, 3] {
                let natural = device.alloc(count * rows * width).unwrap();
                let nibble = width.is_multiple_of(32).then(|| device.alloc(count * rows * width).unwrap());
                let split = Split {
                    x: Strided::new(values.slice(offset..), stride),
                    rows,
                    width,
                    natural: Some(Planes::new(&natural, count)),
                    nibble: nibble.as_ref().map(|nibble| Planes::new(nibble, count)),
                };
                split.launch(device).unwrap();
                same_planes(&natural, &x, width, count, Order::Natural);
                if let Some(nibble) = &nibble {
                    same_planes(nibble, &x, width, count, Order::Nibble);
                    // One order at a time gives the same.
                    let again = device.zeroed(count * rows * width).unwrap();
                    Split { natural: None, nibble: Some(Planes::new(&again, count)), ..split }
                        .launch(device)
                        .unwrap();
                    same_planes(&again, &x, width, count, Order::Nibble);
                }
                if count == 3 {
                    let planes = natural.read().unwrap();
                    for (i, x) in x.iter().enumerate() {
                        let sum: f64 =
                            planes.iter().skip(i).step_by(rows * width).map(|v| f64::from(v.to_f32())).sum();
                        assert_eq!(sum, f64::from(*x), "three planes hold f32");
                    }
                }
            }
        }
    });
}
