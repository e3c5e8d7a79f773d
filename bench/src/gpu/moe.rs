//! Times of a layer of routed experts in INT4: the whole and each of its operations.

use super::experts::{How, Layer, Routed, Rows, that_fit};
use super::sizes::{MoeShape, Sizes};
use super::{Gpu, doing};
use crate::Error;
use crate::ceilings::Work;
use kernels::cuda::{Device, DeviceError, Tiles};

/// Pairs of an expert on average from which on wide tiles are tried, and up to which few are.
const TRY_WIDE: usize = 2;
const TRY_FEW: usize = 48;

/// What takes turns.
struct Turns {
    layers: Vec<Layer>,
    routed: Vec<Routed>,
}

impl Turns {
    fn of(&self, turn: usize) -> (&Layer, &Routed) {
        (&self.layers[turn % self.layers.len()], &self.routed[turn % self.routed.len()])
    }
}

/// Turns of a graph: a few milliseconds' worth, with routings of their own.
fn turns_of(most: usize, tokens: usize) -> usize {
    match tokens {
        0..=16 => most,
        17..=512 => most.div_ceil(2),
        _ => 2,
    }
}

pub(super) fn measure(gpu: &mut Gpu<'_>, sizes: &Sizes) -> Result<(), Error> {
    let (device, timed) = (gpu.device, &sizes.timed);
    let failed = |error| doing("make a layer of experts", error);
    let most = timed.batches.iter().copied().max().unwrap_or(1);
    let rows_bytes = Rows::bytes(&timed.moe, most);
    let others = rows_bytes + 2 * most * timed.moe.experts * 4 + (64 << 20).min(rows_bytes);
    let shape = that_fit(device, timed.moe, 1, others).map_err(failed)?;
    if shape.experts < timed.moe.experts {
        gpu.note(&format!(
            "timings: memory for {} of {} experts: rows of experts are of fewer",
            shape.experts, timed.moe.experts
        ));
    }
    let mut layers = vec![Layer::new(device, &shape, 100).map_err(failed)?];
    while layers.len() < timed.layers {
        let more = that_fit(device, timed.moe, 1, others).map_err(failed)?;
        if more.experts < shape.experts {
            gpu.note(&format!("timings: memory for {} of {} layers", layers.len(), timed.layers));
            break;
        }
        layers.push(Layer::new(device, &shape, 100 + 100 * layers.len() as u64).map_err(failed)?);
    }
    let rows = Rows::new(device, &shape, most).map_err(failed)?;
    let mut turns = Turns { layers, routed: Vec::new() };
    for &tokens in &timed.batches {
        let count = turns_of(timed.turns, tokens);
        // Made anew for every batch: the lists are as long as that asks for.
        turns.routed.clear();
        for turn in 0..count {
            let routed = Routed::new(device, &shape, tokens, 7000 + 31 * turn as u64).map_err(failed)?;
            turns.routed.push(routed);
        }
        batch(gpu, &shape, &turns, &rows, tokens)?;
    }
    Ok(())
}

/// Everything of one batch size.
fn batch(
    gpu: &mut Gpu<'_>,
    shape: &MoeShape,
    turns: &Turns,
    rows: &Rows,
    tokens: usize,
) -> Result<(), Error> {
    let device = gpu.device;
    let count = turns.routed.len();
    let failed = |error| doing(format!("route {tokens} tokens"), error);
    let mut distinct = 0;
    for routed in &turns.routed {
        routed.route(device, tokens).map_err(failed)?;
        routed.group(device, tokens).map_err(failed)?;
        distinct += routed.distinct().map_err(failed)?;
    }
    let distinct = distinct as f64 / count as f64;
    let weights = (distinct * shape.expert_bytes() as f64) as u64;
    let work = Work { bytes: weights + shape.activation_bytes(tokens), operations: shape.operations(tokens) };
    let each = (tokens * shape.top_k) as f64 / distinct.max(1.0);
    let name = format!("gpu/moe/int4/b{tokens}");
    let mut best: Option<(f64, How)> = None;
    for how in How::all(device) {
        let wide = how.tiles == Tiles::Wide;
        if (wide && each < TRY_WIDE as f64) || (!wide && each > TRY_FEW as f64) || !gpu.has_time() {
            continue;
        }
        let launch = |turn| layer(device, turns.of(turn), rows, tokens, how);
        let seconds = gpu.time_with(&format!("{name}/layer/{}", how.name()), count, work, launch, |row| {
            let seconds = row.times.median;
            row.with("experts", distinct)
                .with("of", shape.experts)
                .with("bytes_per_second", work.bytes as f64 / seconds)
                .with("operations_per_second", work.operations as f64 / seconds)
        })?;
        if best.is_none_or(|(least, _)| seconds < least) {
            best = Some((seconds, how));
        }
    }
    let Some((seconds, how)) = best else { return Ok(()) };
    if !gpu.has_time() {
        return Ok(());
    }
    parts(gpu, &name, shape, turns, rows, (tokens, how), (weights, seconds))
}

fn layer(
    device: &Device,
    of: (&Layer, &Routed),
    rows: &Rows,
    tokens: usize,
    how: How,
) -> Result<(), DeviceError> {
    of.1.route(device, tokens)?;
    of.1.group(device, tokens)?;
    rows.up(device, of, tokens, how)?;
    rows.down(device, of, tokens, how)?;
    rows.finalize(device, of.1, tokens)
}

/// Each operation alone, with what the others left.
#[allow(clippy::too_many_arguments, reason = "what a batch has made, handed on once")]
fn parts(
    gpu: &mut Gpu<'_>,
    name: &str,
    shape: &MoeShape,
    turns: &Turns,
    rows: &Rows,
    (tokens, how): (usize, How),
    (weights, layer_seconds): (u64, f64),
) -> Result<(), Error> {
    let (device, count) = (gpu.device, turns.routed.len());
    let (hidden, inter, top_k) = (shape.hidden, shape.inter, shape.top_k);
    let work = |bytes: usize| Work { bytes: bytes as u64, operations: 0 };
    let pairs = tokens * top_k;
    let product = |part: u64, bytes: usize, operations: u64| Work {
        bytes: weights * part / 3 + bytes as u64,
        operations: operations * part / 3,
    };
    let operations = shape.operations(tokens);
    let logits = work(4 * tokens * shape.experts + 8 * pairs);
    let mut sum =
        gpu.time(&format!("{name}/route"), count, logits, |turn| turns.of(turn).1.route(device, tokens))?;
    sum += gpu.time(&format!("{name}/group"), count, work(8 * pairs), |turn| {
        turns.of(turn).1.group(device, tokens)
    })?;
    let up = product(2, 2 * (tokens * hidden + pairs * inter), operations);
    sum += gpu.time(&format!("{name}/up"), count, up, |turn| rows.up(device, turns.of(turn), tokens, how))?;
    let down = product(1, pairs * (2 * inter + 4 * hidden), operations);
    sum += gpu
        .time(&format!("{name}/down"), count, down, |turn| rows.down(device, turns.of(turn), tokens, how))?;
    let finalize = work(4 * (pairs + tokens) * hidden);
    sum += gpu.time(&format!("{name}/finalize"), count, finalize, |turn| {
        rows.finalize(device, turns.of(turn).1, tokens)
    })?;
    gpu.note(&format!(
        "{name}: layer {:.1} us with {}, its operations alone {:.1} us",
        layer_seconds * 1e6,
        how.name(),
        sum * 1e6
    ));
    Ok(())
}
