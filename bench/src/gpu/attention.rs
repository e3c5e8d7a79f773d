//! Times of latent attention, one query row for each sequence.

use kernels::attention::CacheType;
use kernels::cuda::{LatentAttention, check};

use super::latent::{Cache, KINDS, row_shape};
use super::sizes::{LatentShape, Sizes};
use super::{Gpu, doing};
use crate::Error;
use crate::ceilings::Work;

/// What a row over `context` positions must read, and compute.
pub(super) fn work(shape: &LatentShape, kind: CacheType, sequences: usize, context: usize) -> Work {
    let rows = sequences * context;
    let ends = 4 * sequences * shape.heads * (shape.width() + shape.latent);
    Work {
        bytes: (rows * kind.row_bytes(row_shape(shape)) + ends) as u64,
        operations: 2 * (shape.heads * (shape.width() + shape.latent) * rows) as u64,
    }
}

pub(super) fn measure(gpu: &mut Gpu<'_>, sizes: &Sizes) -> Result<(), Error> {
    for (kind, kind_name) in KINDS {
        for &context in &sizes.timed.contexts {
            for &sequences in &sizes.timed.sequences {
                if gpu.has_time() {
                    let name = format!("gpu/mla/{kind_name}/{context}x{sequences}");
                    one(gpu, sizes, &name, (kind, sequences, context))?;
                }
            }
        }
    }
    Ok(())
}

fn one(
    gpu: &mut Gpu<'_>,
    sizes: &Sizes,
    name: &str,
    (kind, sequences, context): (CacheType, usize, usize),
) -> Result<(), Error> {
    let (device, timed) = (gpu.device, &sizes.timed);
    let (shape, mla) = (timed.latent, timed.latent.sharp());
    let failed = |error| doing(format!("prepare {name}"), error);
    let work = work(&shape, kind, sequences, context);
    let turns = timed.turn_bytes.div_ceil(work.bytes as usize).clamp(1, 8 * timed.turns);
    let lengths = vec![context; turns * sequences];
    let cache = Cache::new(device, &shape, kind, &lengths, 11).map_err(failed)?;
    let queries = device.alloc::<f32>(sequences * shape.heads * shape.width()).map_err(failed)?;
    check::fill_f32(device, queries.all(), 12, 1.0).map_err(failed)?;
    let out = device.alloc::<f32>(sequences * shape.heads * shape.latent).map_err(failed)?;
    let positions = device.upload(&vec![context as i32 - 1; sequences]).map_err(failed)?;
    let numbers: Vec<i32> = (0..sequences as i32).collect();
    let numbers = device.upload(&numbers).map_err(failed)?;
    let workspace = LatentAttention::workspace_len(&mla, sequences, context);
    let workspace = device.alloc::<f32>(workspace.max(1)).map_err(failed)?;
    let launch = |turn: usize| {
        let places = cache.places(positions.all(), numbers.all(), turn * sequences, context);
        cache.attention(mla, places, (queries.all(), out.all()), &workspace).launch(device)
    };
    gpu.time(name, turns, work, launch).map(|_| ())
}
