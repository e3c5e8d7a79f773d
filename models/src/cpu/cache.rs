//! The cache of all layers: rows by slot, 64 slots to a block.

use kernels::attention::{CacheMut, CacheSlice, CacheType, PAGE, Pages, write_rows};
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
        let cache_type = cache_type(numerics, capacity);
        let layers = config.layers.iter().filter(|layer| layer.block_kind() == kind);
        layers.map(|layer| LayerCache::block_bytes(layer.cache_rows(), cache_type)).sum()
    }

    /// The cache of a layer.
    pub fn layer(&self, index: usize) -> &LayerCache {
        &self.layers[index].1
    }

    pub(super) fn layer_mut(&mut self, index: usize) -> &mut LayerCache {
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

/// Rows of `width` values by slot. Zeroed memory is not resident before it is written.
pub struct Store {
    width: usize,
    values: Values,
}

enum Values {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
}

impl LayerCache {
    fn new(rows: CacheRows, slots: usize, cache_type: CacheType) -> Self {
        let store = |&width: &usize| Store {
            width,
            values: match cache_type {
                CacheType::F32 => Values::F32(vec![0.0; slots * width]),
                CacheType::Bf16 => Values::Bf16(vec![0; slots * width]),
            },
        };
        Self { stores: rows.widths().iter().map(store).collect() }
    }

    /// Bytes of one block of such a cache.
    fn block_bytes(rows: CacheRows, cache_type: CacheType) -> usize {
        rows.total() * PAGE * cache_type.bytes()
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
            let len = PAGE * store.width;
            let (from, to) = (from as usize * len, to as usize * len);
            match &mut store.values {
                Values::F32(values) => values.copy_within(from..from + len, to),
                Values::Bf16(values) => values.copy_within(from..from + len, to),
            }
        }
    }
}

impl Store {
    /// Writes rows to slots.
    pub(super) fn write(&mut self, slots: &[u32], rows: &[f32]) {
        let cache = match &mut self.values {
            Values::F32(values) => CacheMut::F32(values),
            Values::Bf16(values) => CacheMut::Bf16(values),
        };
        write_rows(cache, self.width, slots, Rows::new(rows, self.width));
    }

    /// The rows of a sequence with this block table.
    pub fn pages<'a>(&'a self, table: &'a [u32]) -> Pages<'a> {
        let data = match &self.values {
            Values::F32(values) => CacheSlice::F32(values),
            Values::Bf16(values) => CacheSlice::Bf16(values),
        };
        Pages { data, row: self.width, table }
    }

    fn block_bytes(&self) -> usize {
        let value = match self.values {
            Values::F32(_) => 4,
            Values::Bf16(_) => 2,
        };
        PAGE * self.width * value
    }

    fn read_block(&self, block: u32, out: &mut [u8]) {
        let len = PAGE * self.width;
        let first = block as usize * len;
        match &self.values {
            Values::F32(values) => put(&values[first..][..len], out, f32::to_le_bytes),
            Values::Bf16(values) => put(&values[first..][..len], out, u16::to_le_bytes),
        }
    }

    fn write_block(&mut self, block: u32, bytes: &[u8]) {
        let len = PAGE * self.width;
        let first = block as usize * len;
        match &mut self.values {
            Values::F32(values) => take(&mut values[first..][..len], bytes, f32::from_le_bytes),
            Values::Bf16(values) => take(&mut values[first..][..len], bytes, u16::from_le_bytes),
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
