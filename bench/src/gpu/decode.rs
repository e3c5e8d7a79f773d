//! A decode layer, latent attention and routed experts with a shared one, as one graph: its time beside the sum of
//! its operations' times, and what it costs the host to ask for it.

mod steps;

use std::time::Instant;

use super::experts::that_fit;
use super::sizes::Sizes;
use super::{Gpu, attention, doing};
use crate::Error;
use crate::ceilings::Work;
use crate::row::{Row, Times};
use kernels::attention::CacheType;
use steps::{Layer, STEPS};

/// Layers of the graph that stands for a step.
const LAYERS: usize = 8;
/// Layers with weights of their own, which take turns: no cache holds even their smallest products.
const WEIGHTS: usize = 4;
/// Memory for what is not a routed expert, of each.
const OTHERS_BYTES: usize = 1 << 30;

pub(super) fn measure(gpu: &mut Gpu<'_>, sizes: &Sizes) -> Result<(), Error> {
    let timed = &sizes.timed;
    for &tokens in &timed.layer_batches {
        if !gpu.has_time() {
            continue;
        }
        let name = format!("gpu/layer/b{tokens}x{}", timed.layer_context);
        let failed = |error| doing(format!("make {name}"), error);
        let others = WEIGHTS * OTHERS_BYTES;
        let shape = that_fit(gpu.device, timed.moe, WEIGHTS, others).map_err(failed)?;
        let layers = (0..WEIGHTS).map(|_| Layer::new(gpu.device, timed, shape, tokens));
        let layers: Vec<Layer> = layers.collect::<Result<_, _>>().map_err(failed)?;
        one(gpu, sizes, &name, &layers, tokens)?;
    }
    Ok(())
}

fn one(gpu: &mut Gpu<'_>, sizes: &Sizes, name: &str, layers: &[Layer], tokens: usize) -> Result<(), Error> {
    let (device, timed) = (gpu.device, &sizes.timed);
    let failed = |error| doing(format!("time {name}"), error);
    let of = |turn: usize| &layers[turn % layers.len()];
    let all = |turn| STEPS.iter().try_for_each(|step| of(turn).run(device, step));
    // Once, so that there are pairs to ask about.
    (0..layers.len()).try_for_each(all).map_err(failed)?;
    let mut distinct = 0;
    for layer in layers {
        distinct += layer.routed.distinct().map_err(failed)?;
    }
    let distinct = distinct as f64 / layers.len() as f64;
    let (moe, dense) = (layers[0].moe, layers[0].dense_values());
    let cached = attention::work(&timed.latent, CacheType::Bf16, tokens, timed.layer_context);
    let work = Work {
        bytes: (distinct * moe.expert_bytes() as f64) as u64
            + moe.activation_bytes(tokens)
            + 2 * dense as u64
            + cached.bytes,
        operations: moe.operations(tokens) + 2 * (dense * tokens) as u64 + cached.operations,
    };
    let mut sum = 0.0;
    for step in STEPS {
        if !gpu.has_time() {
            return Ok(());
        }
        let turn = gpu.replay(LAYERS, |turn| of(turn).run(device, step)).map_err(failed)?;
        gpu.row(Row::new(format!("{name}/{step}"), turn.times, (0, 0), None, &gpu.setting))?;
        sum += turn.times.median;
    }
    let seconds = gpu.time_with(name, LAYERS, work, all, |row| {
        let graph = row.times.median;
        row.with("kernels", STEPS.len())
            .with("sum_of_kernels_seconds", sum)
            .with("share_of_gaps", 1.0 - sum / graph)
            .with("experts", distinct)
    })?;
    // A step as an engine takes it: one launch, then the wait for its result.
    let graph = device.capture(|| (0..LAYERS).try_for_each(all)).map_err(failed)?;
    let mut walls = Vec::new();
    for _ in 0..gpu.runs {
        let begun = Instant::now();
        graph.launch().and_then(|()| device.synchronize()).map_err(failed)?;
        walls.push(begun.elapsed().as_secs_f64());
    }
    let times = Times::of(&walls);
    let on_device = seconds * LAYERS as f64;
    let row = Row::new(format!("{name}/step"), times, (0, 0), None, &gpu.setting);
    let row = row.with("layers", LAYERS).with("device_seconds", on_device);
    gpu.row(row.with("graph_overhead", times.median / on_device - 1.0))
}
