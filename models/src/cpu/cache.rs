//! The cache of one layer: rows by slot, 64 slots to a block.

use kernels::attention::{CacheMut, CacheSlice, CacheType, PAGE, Pages, write_rows};
use kernels::rows::Rows;

use crate::config::CacheRows;

/// One layer's cache: one store per kind of row the layer caches.
pub struct LayerCache {
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
    pub fn new(rows: CacheRows, slots: usize, cache_type: CacheType) -> Self {
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
    pub fn block_bytes(rows: CacheRows, cache_type: CacheType) -> usize {
        rows.total() * PAGE * cache_type.bytes()
    }

    /// Copies a block to the front of `out` and gives the rest of it.
    pub fn read_block<'a>(&self, block: u32, mut out: &'a mut [u8]) -> &'a mut [u8] {
        for store in &self.stores {
            let (bytes, rest) = out.split_at_mut(store.block_bytes());
            store.read_block(block, bytes);
            out = rest;
        }
        out
    }

    /// Fills a block from the front of `bytes` and gives the rest.
    pub fn write_block<'a>(&mut self, block: u32, mut bytes: &'a [u8]) -> &'a [u8] {
        for store in &mut self.stores {
            let (front, rest) = bytes.split_at(store.block_bytes());
            store.write_block(block, front);
            bytes = rest;
        }
        bytes
    }

    /// Makes block `to` a copy of `from`.
    pub fn copy_block(&mut self, from: u32, to: u32) {
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
    pub fn write(&mut self, slots: &[u32], rows: &[f32]) {
        let cache = match &mut self.values {
            Values::F32(values) => CacheMut::F32(values),
            Values::Bf16(values) => CacheMut::Bf16(values),
        };
        write_rows(cache, self.width, slots, Rows::new(rows, self.width));
    }

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
