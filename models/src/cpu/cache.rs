//! The cache of all layers: rows by slot, 64 slots to a block.

use kernels::attention::{CacheMut, CacheSlice, CacheType, PAGE, Pages, RowShape, write_rows};
use kernels::rows::Rows;

use crate::batch::BlockKind;
use crate::config::{CacheRows, ModelConfig};
use crate::runner::{Capacity, Numerics};

/// The cache of a model's layers. Blocks of layers with and without windows are counted apart.
pub struct KvCache {
    layers: Vec<(BlockKind, LayerCache)>,
}

impl KvCache {
    /// Zeroed; the system gives memory to rows as they are first written.
    pub fn new(config: &ModelConfig, numerics: Numerics, capacity: &Capacity) -> Self {
        let cache_type = cache_type(numerics, capacity);
        let layers = config.layers.iter().map(|layer| {
            let kind = layer.block_kind();
            (kind, LayerCache::new(layer.cache_rows(), capacity.blocks_of(kind) * PAGE, cache_type))
        });
        Self { layers: layers.collect() }
    }

    /// Bytes of [`KvCache::new`].
    pub fn bytes(config: &ModelConfig, numerics: Numerics, capacity: &Capacity) -> usize {
        let kinds = [BlockKind::Full, BlockKind::Window];
        let bytes = |kind| Self::block_bytes(config, numerics, capacity, kind) * capacity.blocks_of(kind);
        kinds.into_iter().map(bytes).sum()
    }

    /// Bytes of one block of all layers of a kind.
    pub fn block_bytes(
        config: &ModelConfig,
        numerics: Numerics,
        capacity: &Capacity,
        kind: BlockKind,
    ) -> usize {
        config.cache_bytes_per_token(kind, cache_type(numerics, capacity)) * PAGE
    }

    /// The cache of a layer.
    pub fn layer(&self, index: usize) -> &LayerCache {
        &self.layers[index].1
    }

    /// As [`KvCache::layer`], to write to.
    pub fn layer_mut(&mut self, index: usize) -> &mut LayerCache {
        &mut self.layers[index].1
    }

    fn of_mut(&mut self, kind: BlockKind) -> impl Iterator<Item = &mut LayerCache> {
        self.layers.iter_mut().filter(move |(other, _)| *other == kind).map(|(_, cache)| cache)
    }

    /// As [`Runner::read_block`](crate::Runner::read_block).
    pub fn read_block(&self, kind: BlockKind, block: u32, mut out: &mut [u8]) {
        for (_, cache) in self.layers.iter().filter(|(other, _)| *other == kind) {
            out = cache.read_block(block, out);
        }
        assert!(out.is_empty(), "{} bytes more than a block", out.len());
    }

    /// As [`Runner::write_block`](crate::Runner::write_block).
    pub fn write_block(&mut self, kind: BlockKind, block: u32, mut bytes: &[u8]) {
        for cache in self.of_mut(kind) {
            bytes = cache.write_block(block, bytes);
        }
        assert!(bytes.is_empty(), "{} bytes more than a block", bytes.len());
    }

    /// As [`Runner::copy_block`](crate::Runner::copy_block).
    pub fn copy_block(&mut self, kind: BlockKind, from: u32, to: u32) {
        self.of_mut(kind).for_each(|cache| cache.copy_block(from, to));
    }
}

fn cache_type(numerics: Numerics, capacity: &Capacity) -> CacheType {
    capacity.cache_type.unwrap_or(numerics.cache_type())
}

/// One layer's cache: one store per kind of row the layer caches.
pub struct LayerCache {
    /// Latents; or keys, then values.
    pub stores: Vec<Store>,
}

/// Rows of one shape by slot. Zeroed memory is not resident before it is written.
pub struct Store {
    shape: RowShape,
    values: Values,
}

enum Values {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
    Fp8(Vec<u8>),
}

impl LayerCache {
    fn new(rows: CacheRows, slots: usize, cache_type: CacheType) -> Self {
        let store = |&shape: &RowShape| Store {
            shape,
            values: match cache_type {
                CacheType::F32 => Values::F32(vec![0.0; slots * shape.values()]),
                CacheType::Bf16 => Values::Bf16(vec![0; slots * shape.values()]),
                CacheType::Fp8 => Values::Fp8(vec![0; slots * cache_type.row_bytes(shape)]),
            },
        };
        Self { stores: rows.shapes().iter().map(store).collect() }
    }

    /// Copies a block to the front of `out` and gives the rest of it.
    fn read_block<'a>(&self, block: u32, mut out: &'a mut [u8]) -> &'a mut [u8] {
        for store in &self.stores {
            let (bytes, rest) = out.split_at_mut(store.block_bytes());
            store.read_block(block, bytes);
            out = rest;
        }
        out
    }

    /// Fills a block from the front of `bytes` and gives the rest.
    fn write_block<'a>(&mut self, block: u32, mut bytes: &'a [u8]) -> &'a [u8] {
        for store in &mut self.stores {
            let (front, rest) = bytes.split_at(store.block_bytes());
            store.write_block(block, front);
            bytes = rest;
        }
        bytes
    }

    /// Makes block `to` a copy of `from`.
    fn copy_block(&mut self, from: u32, to: u32) {
        for store in &mut self.stores {
            let len = store.block_values();
            let (from, to) = (from as usize * len, to as usize * len);
            match &mut store.values {
                Values::F32(values) => values.copy_within(from..from + len, to),
                Values::Bf16(values) => values.copy_within(from..from + len, to),
                Values::Fp8(bytes) => bytes.copy_within(from..from + len, to),
            }
        }
    }
}

impl Store {
    /// Writes rows `[slots, values]` to slots.
    pub fn write(&mut self, slots: &[u32], rows: &[f32]) {
        let shape = self.shape;
        let cache = match &mut self.values {
            Values::F32(values) => CacheMut::F32(values),
            Values::Bf16(values) => CacheMut::Bf16(values),
            Values::Fp8(data) => CacheMut::Fp8 { data, shape },
        };
        write_rows(cache, shape.values(), slots, Rows::new(rows, shape.values()));
    }

    /// The rows of a sequence with this block table.
    pub fn pages<'a>(&'a self, table: &'a [u32]) -> Pages<'a> {
        let shape = self.shape;
        let data = match &self.values {
            Values::F32(values) => CacheSlice::F32(values),
            Values::Bf16(values) => CacheSlice::Bf16(values),
            Values::Fp8(data) => CacheSlice::Fp8 { data, shape },
        };
        Pages { data, row: shape.values(), table }
    }

    fn cache_type(&self) -> CacheType {
        match self.values {
            Values::F32(_) => CacheType::F32,
            Values::Bf16(_) => CacheType::Bf16,
            Values::Fp8(_) => CacheType::Fp8,
        }
    }

    fn block_bytes(&self) -> usize {
        PAGE * self.cache_type().row_bytes(self.shape)
    }

    /// Elements of the vector that a block takes.
    fn block_values(&self) -> usize {
        match self.values {
            Values::F32(_) | Values::Bf16(_) => PAGE * self.shape.values(),
            Values::Fp8(_) => self.block_bytes(),
        }
    }

    fn read_block(&self, block: u32, out: &mut [u8]) {
        let len = self.block_values();
        let first = block as usize * len;
        match &self.values {
            Values::F32(values) => put(&values[first..][..len], out, f32::to_le_bytes),
            Values::Bf16(values) => put(&values[first..][..len], out, u16::to_le_bytes),
            Values::Fp8(bytes) => out.copy_from_slice(&bytes[first..][..len]),
        }
    }

    fn write_block(&mut self, block: u32, bytes: &[u8]) {
        let len = self.block_values();
        let first = block as usize * len;
        match &mut self.values {
            Values::F32(values) => take(&mut values[first..][..len], bytes, f32::from_le_bytes),
            Values::Bf16(values) => take(&mut values[first..][..len], bytes, u16::from_le_bytes),
            Values::Fp8(values) => values[first..][..len].copy_from_slice(bytes),
        }
    }
}

/// Little endian, so that a block means the same on every machine.
fn put<T: Copy, const N: usize>(values: &[T], out: &mut [u8], bytes: fn(T) -> [u8; N]) {
    for (out, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
        *out = bytes(*value);
    }
}

fn take<T, const N: usize>(values: &mut [T], bytes: &[u8], value: fn([u8; N]) -> T) {
    for (out, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
        *out = value(*bytes);
    }
}
