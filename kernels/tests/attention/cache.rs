//! Paged caches of every type.

use crate::common::Random;
use kernels::Rows;
use kernels::attention::{CacheMut, CacheSlice, CacheType, PAGE, Pages, RowShape, write_rows};

pub const TYPES: [CacheType; 3] = [CacheType::F32, CacheType::Bf16, CacheType::Fp8];

/// A paged cache whose blocks lie in shuffled order among rows that belong to nobody: NaN, and as large as
/// codes and scales can be.
pub struct Cache {
    pub f32: Vec<f32>,
    bf16: Vec<u16>,
    fp8: Vec<u8>,
    kind: CacheType,
    shape: RowShape,
    pub table: Vec<u32>,
}

impl Cache {
    pub fn empty(random: &mut Random, kind: CacheType, positions: usize, shape: RowShape) -> Self {
        let pages = positions.div_ceil(PAGE);
        let mut table: Vec<u32> = (1..=pages as u32 + 1).collect();
        for i in (1..table.len()).rev() {
            table.swap(i, random.below(i + 1));
        }
        let rows = (pages + 2) * PAGE;
        let mut cache = Self { f32: vec![], bf16: vec![], fp8: vec![], kind, shape, table };
        match kind {
            CacheType::F32 => cache.f32 = vec![f32::NAN; rows * shape.values()],
            CacheType::Bf16 => cache.bf16 = vec![0x7fc0; rows * shape.values()],
            CacheType::Fp8 => cache.fp8 = vec![0x7e; rows * kind.row_bytes(shape)],
        }
        cache
    }

    pub fn random(random: &mut Random, kind: CacheType, positions: usize, shape: RowShape) -> Self {
        let mut cache = Self::empty(random, kind, positions, shape);
        let x = random.values(positions * shape.values());
        cache.write(0, &x);
        cache
    }

    /// Stores rows from a position on.
    pub fn write(&mut self, position: usize, x: &[f32]) {
        let row = self.shape.values();
        let slot = |p: usize| self.table[p / PAGE] * PAGE as u32 + (p % PAGE) as u32;
        let slots: Vec<u32> = (position..position + x.len() / row).map(slot).collect();
        let data = match self.kind {
            CacheType::F32 => CacheMut::F32(&mut self.f32),
            CacheType::Bf16 => CacheMut::Bf16(&mut self.bf16),
            CacheType::Fp8 => CacheMut::Fp8 { data: &mut self.fp8, shape: self.shape },
        };
        write_rows(data, row, &slots, Rows::new(x, row));
    }

    pub fn pages(&self) -> Pages<'_> {
        let data = match self.kind {
            CacheType::F32 => CacheSlice::F32(&self.f32),
            CacheType::Bf16 => CacheSlice::Bf16(&self.bf16),
            CacheType::Fp8 => CacheSlice::Fp8 { data: &self.fp8, shape: self.shape },
        };
        Pages { data, row: self.shape.values(), table: &self.table }
    }
}

/// Rows of latents, the rotated part of which stays plain.
pub fn latents(latent: usize, rope: usize) -> RowShape {
    RowShape { heads: 1, width: latent, plain: rope }
}

/// Rows of heads and nothing else.
pub fn heads(heads: usize, width: usize) -> RowShape {
    RowShape { heads, width, plain: 0 }
}
