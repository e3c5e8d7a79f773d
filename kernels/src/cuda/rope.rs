//! Embeddings, rotations and cache rows on the device. `kernels/cuda/rope.cu`; the reference of rotations is
//! [`crate::reference::rotate`], and cached rows have the bytes of [`crate::attention::write_rows`].

use half::bf16;

use super::buffer::Slice;
use super::device::Device;
use super::error::DeviceError;
use super::image::Kernel;
use super::rows::{Strided, count};
use crate::attention::{CacheType, FP8_TILE, RowShape};
use crate::rope::{Rotation, fill_cos_sin};

const EMBED_BF16: Kernel = Kernel::new("rope", "embed_bf16");
const EMBED_F32: Kernel = Kernel::new("rope", "embed_f32");
const ROTATE: Kernel = Kernel::new("rope", "rotate");
const CACHE_F32: Kernel = Kernel::new("rope", "cache_f32");
const CACHE_BF16: Kernel = Kernel::new("rope", "cache_bf16");
const CACHE_FP8: Kernel = Kernel::new("rope", "cache_fp8");

const THREADS: u32 = 128;
/// Values that a thread handles.
const UNIT: usize = 8;

/// `[vocabulary, hidden]`.
#[derive(Clone, Copy)]
pub enum EmbeddingTable<'a> {
    /// bf16.
    Bf16(Slice<'a, bf16>),
    /// f32.
    F32(Slice<'a, f32>),
}

/// Rows of a table by id.
pub struct Embed<'a> {
    /// `[vocabulary, hidden]`.
    pub table: EmbeddingTable<'a>,
    /// `[tokens]`, each inside the table, as the device cannot check; one below zero gives a row of zeros.
    pub ids: Slice<'a, i32>,
    /// Values of a row.
    pub hidden: usize,
    /// `[tokens, hidden]`.
    pub out: Slice<'a, f32>,
}

impl Embed<'_> {
    /// # Panics
    /// If shapes differ.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (tokens, hidden) = (self.ids.len(), self.hidden);
        let table = match self.table {
            EmbeddingTable::Bf16(table) => table.len(),
            EmbeddingTable::F32(table) => table.len(),
        };
        assert!(hidden > 0 && table.is_multiple_of(hidden) && table > 0, "embedding: rows of the table");
        assert!(self.out.len() >= tokens * hidden, "embedding: room for {tokens} rows");
        if tokens == 0 {
            return Ok(());
        }
        let grid = (count(tokens), count(hidden.div_ceil(THREADS as usize * UNIT)));
        let launch = match self.table {
            EmbeddingTable::Bf16(table) => device.launch(EMBED_BF16, grid, THREADS, 0).arg(table),
            EmbeddingTable::F32(table) => device.launch(EMBED_F32, grid, THREADS, 0).arg(table),
        };
        let launch = launch.early().arg(self.ids).arg(count(hidden)).arg(self.out);
        // SAFETY: the arguments of both kernels; a row of the output for every id, and ids inside the table by the
        // caller's promise.
        unsafe { launch.run() }
    }
}

/// The table that [`Rotate`] takes, `[positions, inv_freq.len(), 2]`: cosine and sine of every angle, times the
/// attention scale.
pub fn rotation_table(inv_freq: &[f32], attention_scale: f32, positions: usize) -> Vec<f32> {
    let pairs = inv_freq.len();
    let (mut cos, mut sin) = (vec![0.0; pairs], vec![0.0; pairs]);
    let mut table = Vec::with_capacity(positions * pairs * 2);
    for position in 0..positions {
        fill_cos_sin(count(position), inv_freq, attention_scale, &mut cos, &mut sin);
        table.extend(cos.iter().zip(&sin).flat_map(|(cos, sin)| [*cos, *sin]));
    }
    table
}

/// The heads of a tensor of which some values are rotated.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    /// Rows that hold the heads, from the first value of the first head on.
    pub x: Strided<'a>,
    /// Heads of a row.
    pub count: usize,
    /// Values from one head to the next.
    pub stride: usize,
    /// Where in a head the rotated values start.
    pub offset: usize,
}

/// Rotates queries and keys in place by their positions.
pub struct Rotate<'a> {
    /// `[positions, dim / 2, 2]`: see [`rotation_table`].
    pub table: Slice<'a, f32>,
    /// `[rows]`, each inside the table, as the device cannot check; rows below zero are left as they are.
    pub positions: Slice<'a, i32>,
    /// Values of a head that are rotated.
    pub dim: usize,
    /// Which two make a pair.
    pub rotation: Rotation,
    /// The queries.
    pub queries: Option<Heads<'a>>,
    /// The keys.
    pub keys: Option<Heads<'a>>,
}

impl Rotate<'_> {
    /// # Panics
    /// If shapes differ.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (rows, dim) = (self.positions.len(), self.dim);
        assert!(dim > 0 && dim.is_multiple_of(2) && self.table.len().is_multiple_of(dim), "rotation: table");
        let mut all = 0;
        for heads in [self.queries, self.keys].into_iter().flatten() {
            assert!(heads.offset + dim <= heads.stride || heads.count <= 1, "rotation: heads overlap");
            let row = heads.count.saturating_sub(1) * heads.stride + heads.offset + dim;
            heads.x.check(rows, if heads.count == 0 { 0 } else { row }, "rotation: heads");
            all += heads.count;
        }
        if rows * all == 0 {
            return Ok(());
        }
        let grid = (count(rows), count((all * dim / 2).div_ceil(THREADS as usize)));
        let mut launch = device.launch(ROTATE, grid, THREADS, 0).early();
        for heads in [self.queries, self.keys] {
            launch = launch.arg(heads.map(|heads| heads.x.values));
            launch = launch.arg(heads.map_or(0, |heads| heads.x.stride as u64));
            for value in [heads.map(|h| h.count), heads.map(|h| h.stride), heads.map(|h| h.offset)] {
                launch = launch.arg(count(value.unwrap_or(0)));
            }
        }
        let interleaved = u32::from(self.rotation == Rotation::Interleaved);
        let launch = launch.arg(self.table).arg(self.positions).arg(count(dim)).arg(interleaved);
        // SAFETY: the arguments of rotate; all heads lie inside their slices, as checked, and positions inside the
        // table by the caller's promise.
        unsafe { launch.run() }
    }
}

/// Rows and the cache that they go to.
#[derive(Clone, Copy)]
pub struct CacheWrite<'a> {
    /// `[rows, shape.values()]`.
    pub x: Strided<'a>,
    /// `[cached rows, row_bytes]`, as [`CacheType::row_bytes`] says.
    pub cache: Slice<'a, u8>,
}

/// Stores rows in caches at slots, such as keys and values, or latents alone.
pub struct WriteRows<'a> {
    /// `[rows]`: the cached row of each, inside the cache, as the device cannot check; a row whose slot is below
    /// zero is left out.
    pub slots: Slice<'a, i32>,
    /// What values are stored as.
    pub kind: CacheType,
    /// Of a row of either cache.
    pub shape: RowShape,
    /// The rows.
    pub rows: CacheWrite<'a>,
    /// More rows, with the same slots and as far apart, for a second cache.
    pub other_rows: Option<CacheWrite<'a>>,
}

impl WriteRows<'_> {
    /// # Panics
    /// If shapes differ.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (rows, values) = (self.slots.len(), self.shape.values());
        let row_bytes = self.kind.row_bytes(self.shape);
        for write in [Some(self.rows), self.other_rows].into_iter().flatten() {
            write.x.check(rows, values, "cache rows");
            assert!(
                write.cache.len().is_multiple_of(row_bytes.max(1)),
                "a cache of rows of {row_bytes} bytes"
            );
            assert_eq!(write.x.stride, self.rows.x.stride, "both kinds of rows are as far apart");
            let size = match self.kind {
                CacheType::F32 => 4,
                CacheType::Bf16 => 2,
                CacheType::Fp8 => 1,
            };
            assert!(write.cache.address().is_multiple_of(size), "a cache that is not aligned");
        }
        if rows * values == 0 {
            return Ok(());
        }
        let tensors = 1 + u32::from(self.other_rows.is_some());
        let (kernel, parts) = match self.kind {
            CacheType::F32 => (CACHE_F32, values.div_ceil(THREADS as usize * UNIT)),
            CacheType::Bf16 => (CACHE_BF16, values.div_ceil(THREADS as usize * UNIT)),
            // A warp per tile.
            CacheType::Fp8 => {
                let tiles = self.shape.heads * self.shape.width.div_ceil(FP8_TILE);
                (CACHE_FP8, (tiles + self.shape.plain.div_ceil(FP8_TILE)).div_ceil(THREADS as usize / 32))
            }
        };
        let launch = device.launch(kernel, (count(rows), count(parts), tensors), THREADS, 0).early();
        let launch = launch.arg(self.rows.x.values).arg(self.other_rows.map(|other| other.x.values));
        let launch = launch.arg(self.rows.x.stride as u64);
        let launch = match self.kind {
            CacheType::F32 | CacheType::Bf16 => launch.arg(count(values)),
            CacheType::Fp8 => {
                let shape = self.shape;
                launch.arg(count(shape.heads)).arg(count(shape.width)).arg(count(shape.plain))
            }
        };
        let launch = launch.arg(self.rows.cache).arg(self.other_rows.map(|other| other.cache));
        // SAFETY: the arguments of the three kernels; rows lie inside their slices, as checked, and slots inside
        // the caches by the caller's promise.
        unsafe { launch.arg(self.slots).run() }
    }
}
