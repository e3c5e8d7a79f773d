//! Caches of latents with shuffled pages, made on the device from a seed.

use kernels::attention::{CacheType, Mla, PAGE, RowShape};
use kernels::cuda::{
    Buffer, CacheWrite, Device, DeviceError, LatentAttention, Places, Slice, Strided, WriteRows, check,
};

use super::sizes::LatentShape;
use crate::seeded::Seeded;

/// Rows that are made at once.
const CHUNK: usize = 16 << 10;

/// The kinds that are fast.
pub(super) const KINDS: [(CacheType, &str); 2] = [(CacheType::Bf16, "bf16"), (CacheType::Fp8, "fp8")];

pub(super) fn row_shape(shape: &LatentShape) -> RowShape {
    RowShape { heads: 1, width: shape.latent, plain: shape.rope }
}

/// The cache of some sequences.
pub(super) struct Cache {
    pub bytes: Buffer<u8>,
    pub kind: CacheType,
    pub shape: LatentShape,
    /// Pages of each sequence.
    tables: Vec<Vec<i32>>,
    /// The same in rows of `pages`.
    on_device: Buffer<i32>,
    pages: usize,
}

impl Cache {
    /// Of sequences of these lengths, whose rows are values between -1 and 1.
    pub fn new(
        device: &Device,
        shape: &LatentShape,
        kind: CacheType,
        lengths: &[usize],
        seed: u64,
    ) -> Result<Self, DeviceError> {
        let all: usize = lengths.iter().map(|length| length.div_ceil(PAGE)).sum();
        // A page that nobody has.
        let mut unused: Vec<i32> = (0..=all as i32).collect();
        let mut seeded = Seeded::new(seed);
        for i in (1..unused.len()).rev() {
            unused.swap(i, seeded.below(i + 1) as usize);
        }
        let mut unused = unused.into_iter();
        let mut take = |length: &usize| unused.by_ref().take(length.div_ceil(PAGE)).collect();
        let tables: Vec<Vec<i32>> = lengths.iter().map(&mut take).collect();
        let pages = tables.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let rows = |table: &Vec<i32>| [&table[..], &vec![0; pages - table.len()]].concat();
        let on_device = device.upload(&tables.iter().flat_map(rows).collect::<Vec<i32>>())?;
        let bytes = (all + 1) * PAGE * kind.row_bytes(row_shape(shape));
        // What nobody writes is NaN.
        let bytes = device.upload(&vec![0xff; bytes])?;
        let cache = Self { bytes, kind, shape: *shape, tables, on_device, pages };
        cache.write(device, lengths, seed)?;
        Ok(cache)
    }

    fn write(&self, device: &Device, lengths: &[usize], seed: u64) -> Result<(), DeviceError> {
        let width = self.shape.width();
        let x = device.alloc::<f32>(CHUNK.min(lengths.iter().copied().max().unwrap_or(0)) * width)?;
        for (sequence, &length) in lengths.iter().enumerate() {
            for first in (0..length).step_by(CHUNK) {
                let rows = CHUNK.min(length - first);
                let seed = seed ^ (sequence as u64) << 40 ^ (first as u64) << 8;
                check::fill_f32(device, x.slice(..rows * width), seed, 1.0)?;
                let slots: Vec<i32> = (first..first + rows).map(|p| self.slot(sequence, p) as i32).collect();
                let slots = device.upload(&slots)?;
                WriteRows {
                    slots: slots.all(),
                    kind: self.kind,
                    shape: row_shape(&self.shape),
                    rows: CacheWrite { x: Strided::new(&x, width), cache: self.bytes.all() },
                    other_rows: None,
                }
                .launch(device)?;
            }
        }
        Ok(())
    }

    /// The row of a position.
    pub fn slot(&self, sequence: usize, position: usize) -> usize {
        self.tables[sequence][position / PAGE] as usize * PAGE + position % PAGE
    }

    /// Attention of rows at `positions` of `sequences`, which count from `first`.
    pub fn places<'a>(
        &'a self,
        positions: Slice<'a, i32>,
        sequences: Slice<'a, i32>,
        first: usize,
        context: usize,
    ) -> Places<'a> {
        let tables = self.on_device.slice(first * self.pages..);
        Places { positions, sequences, tables, pages: self.pages, context }
    }

    /// Sequence, position, context: one call.
    pub fn attention<'a>(
        &'a self,
        shape: Mla,
        places: Places<'a>,
        (queries, out): (Slice<'a, f32>, Slice<'a, f32>),
        workspace: &'a Buffer<f32>,
    ) -> LatentAttention<'a> {
        let (cache, kind) = (self.bytes.all(), self.kind);
        LatentAttention { shape, places, queries, cache, kind, workspace: Some(workspace.all()), out }
    }
}
