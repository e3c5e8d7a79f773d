//! Latent attention against plain sums over the same rows.

use half::bf16;
use kernels::attention::{CacheType, FP8_TILE, Mla};
use kernels::cuda::{Buffer, Device, DeviceError, LatentAttention, check};
use kernels::reference::e4m3;

use super::super::latent::{Cache, KINDS, row_shape};
use super::super::sizes::Checked;
use super::super::{Finding, Gpu, doing};
use super::BF16;
use super::words::Compare;
use crate::Error;

pub(super) fn measure(gpu: &mut Gpu<'_>, checked: &Checked) -> Result<(), Error> {
    for (kind, kind_name) in KINDS {
        for &context in &checked.contexts {
            if gpu.has_time() {
                let name = format!("gpu/check/{}/mla/{kind_name}/{context}", checked.name);
                one(gpu, checked, &name, kind, context)?;
            }
        }
    }
    Ok(())
}

/// Rows of two sequences, one of them at two positions.
fn one(
    gpu: &mut Gpu<'_>,
    checked: &Checked,
    name: &str,
    kind: CacheType,
    context: usize,
) -> Result<(), Error> {
    let device = gpu.device;
    let failed = |error| doing(name, error);
    let (shape, mla) = (checked.latent, checked.latent.sharp());
    let lengths = [context, context / 2 + 1];
    let cache = Cache::new(device, &shape, kind, &lengths, 41).map_err(failed)?;
    let rows = [(0usize, context - 1), (1, context / 2), (0, context / 3)];
    let positions: Vec<i32> = rows.iter().map(|row| row.1 as i32).collect();
    let sequences: Vec<i32> = rows.iter().map(|row| row.0 as i32).collect();
    let (positions, sequences) =
        (device.upload(&positions).map_err(failed)?, device.upload(&sequences).map_err(failed)?);
    let (query, result) = (shape.heads * shape.width(), shape.heads * shape.latent);
    let queries = device.alloc::<f32>(rows.len() * query).map_err(failed)?;
    check::fill_f32(device, queries.all(), 42, 1.0).map_err(failed)?;
    let out = device.zeroed::<f32>(rows.len() * result).map_err(failed)?;
    let again = device.zeroed::<f32>(rows.len() * result).map_err(failed)?;
    let workspace = LatentAttention::workspace_len(&mla, rows.len(), context).max(1);
    let workspace = device.alloc::<f32>(workspace).map_err(failed)?;
    let places = cache.places(positions.all(), sequences.all(), 0, context);
    let call = |out: &Buffer<f32>| {
        cache.attention(mla, places, (queries.all(), out.all()), &workspace).launch(device)
    };
    let times = gpu.runs(2, || call(&out)).map_err(failed)?;
    call(&again).map_err(failed)?;
    let compare = Compare::new(device).map_err(failed)?;
    let repeated = compare.differences(out.all().cast(), again.all().cast()).map_err(failed)?;
    // Each row alone; then without spans side by side.
    again.zero().map_err(failed)?;
    for (row, &(_, position)) in rows.iter().enumerate() {
        let places =
            cache.places(positions.slice(row..row + 1), sequences.slice(row..row + 1), 0, position + 1);
        let ends =
            (queries.slice(row * query..(row + 1) * query), again.slice(row * result..(row + 1) * result));
        let mut alone = cache.attention(mla, places, ends, &workspace);
        alone.workspace = alone.workspace.filter(|_| row != 1);
        alone.launch(device).map_err(failed)?;
    }
    let alone = compare.differences(out.all().cast(), again.all().cast()).map_err(failed)?;
    let mut worst = 0.0f64;
    for (sequence, &length) in lengths.iter().enumerate() {
        let seen = seen(device, &cache, sequence, length).map_err(failed)?;
        for row in (0..rows.len()).filter(|&row| rows[row].0 == sequence) {
            let plain = plain(device, mla, &queries, row, &seen, rows[row].1 + 1).map_err(failed)?;
            let got = out.slice(row * result..(row + 1) * result);
            worst = worst.max(compare.worst(got, plain.all(), None).map_err(failed)?);
        }
    }
    let findings = [
        // Values are up to 1, and the softmax's weights are rounded.
        Finding::error("error", worst, BF16),
        Finding::differences("differ_when_repeated", repeated),
        Finding::differences("differ_when_alone", alone),
    ];
    gpu.checked(name, times, &findings)
}

fn plain(
    device: &Device,
    shape: Mla,
    queries: &Buffer<f32>,
    row: usize,
    rows: &Buffer<bf16>,
    length: usize,
) -> Result<Buffer<f64>, DeviceError> {
    let query = shape.heads * (shape.latent + shape.rope);
    let scores = device.alloc(shape.heads * length)?;
    let out = device.alloc(shape.heads * shape.latent)?;
    check::PlainLatentAttention {
        query: queries.slice(row * query..(row + 1) * query),
        rows: rows.all(),
        length,
        shape,
        scores: scores.all(),
        out: out.all(),
    }
    .launch(device)?;
    Ok(out)
}

/// The rows of a sequence in order, as bf16: what the kernels multiply.
fn seen(device: &Device, cache: &Cache, sequence: usize, length: usize) -> Result<Buffer<bf16>, DeviceError> {
    let (shape, bytes) = (cache.shape, cache.bytes.read()?);
    let row_bytes = cache.kind.row_bytes(row_shape(&shape));
    let codes: Vec<f32> = (0..=255).map(e4m3).collect();
    let mut rows = Vec::with_capacity(length * shape.width());
    for position in 0..length {
        let row = &bytes[cache.slot(sequence, position) * row_bytes..][..row_bytes];
        let plain = match cache.kind {
            CacheType::Fp8 => {
                let (values, rest) = row.split_at(shape.latent);
                let (scales, plain) = rest.split_at(4 * shape.latent.div_ceil(FP8_TILE));
                let scales = scales.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four));
                for (tile, scale) in values.chunks(FP8_TILE).zip(scales) {
                    rows.extend(tile.iter().map(|&code| bf16::from_f32(codes[usize::from(code)] * scale)));
                }
                plain
            }
            _ => row,
        };
        rows.extend(plain.as_chunks().0.iter().map(|two| bf16::from_le_bytes(*two)));
    }
    device.upload(&rows)
}
