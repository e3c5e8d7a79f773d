//! Embeddings, rotations against the f64 reference, and cached rows against the bytes of the host's cache.

use half::bf16;
use kernels::attention::{CacheMut, CacheType, RowShape, write_rows};
use kernels::cuda::{CacheWrite, Embed, EmbeddingTable, Heads, Rotate, Strided, WriteRows, rotation_table};
use kernels::reference;
use kernels::rope::Rotation;
use kernels::rows::Rows;

use crate::common::{Random, assert_close_overall, bits};
use crate::mock;

#[test]
fn embeddings_are_rows_of_the_table() {
    mock::in_every_order(|device| {
        let mut random = Random(61);
        for hidden in [1, 12, 32, 33, 1000, 2048] {
            let table = random.values(9 * hidden);
            let rounded: Vec<bf16> = table.iter().map(|value| bf16::from_f32(*value)).collect();
            let ids = [3, 0, 8, -1, 3];
            let (f32_table, bf16_table) = (device.upload(&table).unwrap(), device.upload(&rounded).unwrap());
            let ids_on_device = device.upload(&ids).unwrap();
            let exact: Vec<f32> = rounded.iter().map(|value| value.to_f32()).collect();
            for (on_device, table) in [
                (EmbeddingTable::F32(f32_table.all()), &table),
                (EmbeddingTable::Bf16(bf16_table.all()), &exact),
            ] {
                let out = device.alloc(ids.len() * hidden).unwrap();
                let embed = Embed { table: on_device, ids: ids_on_device.all(), hidden, out: out.all() };
                embed.launch(device).unwrap();
                let row = |id: i32| match id {
                    ..0 => vec![0.0; hidden],
                    id => table[id as usize * hidden..][..hidden].to_vec(),
                };
                let want: Vec<f32> = ids.into_iter().flat_map(row).collect();
                assert_eq!(bits(&out.read().unwrap()), bits(&want), "{hidden}");
            }
        }
    });
}

#[test]
fn rotations_meet_the_reference() {
    mock::in_every_order(|device| {
        let mut random = Random(62);
        let positions = [0, 5, -1, 499];
        // Pairs; heads of queries and keys, values of a head, and where in it the rotated ones are.
        for (pairs, heads, width, offset) in [
            (8, [4, 1], 16, 0),
            (32, [3, 1], 192, 128),
            (12, [5, 2], 30, 3),
            (1, [1, 1], 2, 0),
            (64, [2, 2], 128, 0),
        ] {
            let dim = 2 * pairs;
            let inv_freq: Vec<f32> = (0..pairs).map(|i| 10_000f32.powf(-(i as f32) / pairs as f32)).collect();
            let scale = 1.25;
            let table = device.upload(&rotation_table(&inv_freq, scale, 500)).unwrap();
            let positions_on_device = device.upload(&positions).unwrap();
            for rotation in [Rotation::Interleaved, Rotation::Half] {
                let strides = heads.map(|heads| heads * width + 5);
                let tensors = strides.map(|stride| random.values(positions.len() * stride));
                let buffers = [0, 1].map(|i| device.upload(&tensors[i]).unwrap());
                let on_device = [0, 1].map(|i| {
                    let x = Strided::new(&buffers[i], strides[i]);
                    Some(Heads { x, count: heads[i], stride: width, offset })
                });
                let rotate = Rotate {
                    table: table.all(),
                    positions: positions_on_device.all(),
                    dim,
                    rotation,
                    queries: on_device[0],
                    keys: on_device[1],
                };
                rotate.launch(device).unwrap();
                for i in [0, 1] {
                    let got = buffers[i].read().unwrap();
                    let mut want: Vec<f64> = tensors[i].iter().map(|value| f64::from(*value)).collect();
                    for (row, position) in
                        positions.iter().enumerate().filter(|(_, position)| **position >= 0)
                    {
                        let angles: Vec<f64> =
                            inv_freq.iter().map(|f| f64::from(*position as f32 * f)).collect();
                        for head in 0..heads[i] {
                            let at = row * strides[i] + head * width + offset;
                            let turned = reference::rotate(&tensors[i][at..at + dim], &angles, rotation);
                            let turned: Vec<f64> =
                                turned.iter().map(|value| value * f64::from(scale)).collect();
                            want[at..at + dim].copy_from_slice(&turned);
                        }
                    }
                    assert_close_overall(&got, &want, 5e-7, "rotation");
                    for (j, (got, before)) in got.iter().zip(&tensors[i]).enumerate() {
                        let (row, column) = (j / strides[i], j % strides[i]);
                        let in_head =
                            column < heads[i] * width && (offset..offset + dim).contains(&(column % width));
                        if !in_head || positions[row] < 0 {
                            assert_eq!(got.to_bits(), before.to_bits(), "the rest is left alone");
                        }
                    }

                    // One tensor without the other.
                    let alone = device.upload(&tensors[i]).unwrap();
                    let heads = Heads { x: Strided::new(&alone, strides[i]), ..on_device[i].unwrap() };
                    let (queries, keys) = if i == 0 { (Some(heads), None) } else { (None, Some(heads)) };
                    Rotate { queries, keys, ..rotate }.launch(device).unwrap();
                    assert_eq!(bits(&alone.read().unwrap()), bits(&got));
                }
            }
        }
    });
}

/// Rows with all kinds of values: ordinary ones, zeros, tiny and huge ones, infinities, NaN of both signs.
fn awkward_rows(random: &mut Random, rows: usize, width: usize) -> Vec<f32> {
    let mut x = random.values(rows * width);
    let special = [
        f32::NAN,
        -f32::NAN,
        f32::from_bits(0x7f80_0001),
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        -f32::from_bits(77),
        -0.0,
        448.0,
        1.0 + f32::EPSILON,
        1.003_906_3,
    ];
    for (row, x) in x.chunks_mut(width).enumerate() {
        match row % 6 {
            0 => {}
            1 => x.iter_mut().for_each(|v| *v *= 1e-3),
            2 => x
                .iter_mut()
                .for_each(|v| *v = if *v > 0.9 { special[(v.to_bits() % 13) as usize] } else { *v }),
            3 => x.iter_mut().enumerate().for_each(|(i, v)| *v = special[i % special.len()]),
            4 => x.fill(if row % 4 == 0 { 0.0 } else { -0.0 }),
            _ => {
                x.iter_mut().enumerate().for_each(|(i, v)| *v *= 1e-38 * if i % 130 == 0 { 0.1 } else { 1.0 })
            }
        }
    }
    // A tile of nothing that is finite.
    let last = &mut x[(rows - 1) * width..];
    last.iter_mut().enumerate().for_each(|(i, v)| *v = [f32::NAN, f32::INFINITY][i % 2]);
    x
}

/// What the host writes over a cache of `cached` rows of a pattern.
fn host_bytes(kind: CacheType, shape: RowShape, cached: usize, slots: &[i32], x: &[f32]) -> Vec<u8> {
    let kept: Vec<usize> = (0..slots.len()).filter(|&row| slots[row] >= 0).collect();
    let slots: Vec<u32> = kept.iter().map(|&row| slots[row] as u32).collect();
    let values = shape.values();
    let rows: Vec<f32> = kept.iter().flat_map(|&row| x[row * values..][..values].to_vec()).collect();
    let rows = Rows::new(&rows, values);
    match kind {
        CacheType::F32 => {
            let mut data = vec![f32::from_bits(0x5a5a_5a5a); cached * values];
            write_rows(CacheMut::F32(&mut data), values, &slots, rows);
            data.iter().flat_map(|value| value.to_le_bytes()).collect()
        }
        CacheType::Bf16 => {
            let mut data = vec![0x5a5a; cached * values];
            write_rows(CacheMut::Bf16(&mut data), values, &slots, rows);
            data.iter().flat_map(|value| value.to_le_bytes()).collect()
        }
        CacheType::Fp8 => {
            let mut data = vec![0x5a; cached * kind.row_bytes(shape)];
            write_rows(CacheMut::Fp8 { data: &mut data, shape }, values, &slots, rows);
            data
        }
    }
}

#[test]
fn cached_rows_have_the_bytes_of_the_host() {
    mock::in_every_order(|device| {
        let mut random = Random(63);
        let slots = [9, 0, -1, 4, 5, 13, 2, -1, 11, 12, 3, 1, 8];
        for (heads, width, plain) in
            [(1, 512, 64), (8, 128, 0), (2, 48, 0), (3, 200, 5), (1, 16, 3), (2, 129, 130)]
        {
            let shape = RowShape { heads, width, plain };
            let values = shape.values();
            for (kind, gap) in [CacheType::F32, CacheType::Bf16, CacheType::Fp8]
                .map(|kind| (kind, 0))
                .into_iter()
                .chain([(CacheType::Fp8, 8), (CacheType::Bf16, 3)])
            {
                let rows = [0, 1].map(|_| awkward_rows(&mut random, slots.len(), values));
                let stride = values + gap;
                let spread = |rows: &[f32]| -> Vec<f32> {
                    rows.chunks(values).flat_map(|row| [row, &vec![f32::NAN; gap]].concat()).collect()
                };
                let on_device = [0, 1].map(|i| device.upload(&spread(&rows[i])).unwrap());
                let slots_on_device = device.upload(&slots).unwrap();
                let pattern = vec![0x5a; 14 * kind.row_bytes(shape)];
                let caches = [0, 1].map(|_| device.upload(&pattern).unwrap());
                let write =
                    |i: usize| CacheWrite { x: Strided::new(&on_device[i], stride), cache: caches[i].all() };
                let both = WriteRows {
                    slots: slots_on_device.all(),
                    kind,
                    shape,
                    rows: write(0),
                    other_rows: Some(write(1)),
                };
                both.launch(device).unwrap();
                for i in [0, 1] {
                    let want = host_bytes(kind, shape, 14, &slots, &rows[i]);
                    let got = caches[i].read().unwrap();
                    let different = got.iter().zip(&want).position(|(a, b)| a != b);
                    assert_eq!(different, None, "{kind:?} {shape:?}, cache {i}");
                    caches[i].write(&pattern).unwrap();
                }
                // One without the other.
                WriteRows { rows: write(1), other_rows: None, ..both }.launch(device).unwrap();
                assert_eq!(caches[1].read().unwrap(), host_bytes(kind, shape, 14, &slots, &rows[1]));
                assert_eq!(caches[0].read().unwrap(), pattern);
            }
        }
    });
}
