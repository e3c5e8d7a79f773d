//! Attention over paged caches on the device. `kernels/cuda/mla.cu`, `gqa.cu` and `attention_f32.cu`; the
//! references are [`crate::reference::mla`] and [`crate::reference::gqa`].
//!
//! A context is cut into spans whose length depends on the query's own position, and spans are joined in ascending
//! order. Given a workspace, spans are computed side by side and joined by a second kernel; without one, a block
//! takes all spans of a row, joining as it goes. The numbers are the same to the last bit, so which one it is may
//! depend on anything: with few rows the first keeps all multiprocessors busy, with many the second writes less.
//!
//! Of bf16 and fp8 caches, queries are rounded to bf16 and so are the softmax's weights (each within 2^-9 of
//! itself; it is the rounded weights that are summed and divided by). Scores and all sums are f32. Of f32 caches
//! nothing is rounded, and nothing is fast.
//!
//! A row's position decides all that it reads: pages past it need not exist, and what they hold reaches nothing. One
//! thing is left to the caller: in a launch of several rows of a sequence, a key or value that is infinite or NaN
//! (of bf16; 8-bit rows hold neither) makes NaN of grouped-query rows before it, too.

use super::buffer::Slice;
use super::device::Device;
use super::error::DeviceError;
use super::image::Kernel;
use super::launch::Launch;
use super::rows::count;
use crate::attention::{CacheType, Mla, PAGE, RowShape};

const F32: Kernel = Kernel::new("attention_f32", "attention_f32");
const MERGE: Kernel = Kernel::new("attention_f32", "attention_merge");

/// Spans of the longest context, as in `attention.cuh`.
const MAX_SPANS: usize = 128;
/// Threads of a warp.
const WARP: usize = 32;
/// Heads, or rows, that make the 16 rows of a product's fragment.
const GROUP: usize = 16;
/// Groups of a block.
const GROUPS: usize = 4;
/// Bytes between rows in shared memory, so that eight rows lie in different banks.
const PADDING: usize = 16;

/// Where the rows of a launch stand. All but `context` is read by the device when it gets there.
#[derive(Clone, Copy)]
pub struct Places<'a> {
    /// `[rows]`: of each its position; one below zero is left out, and its output as it was. Positions up to its own
    /// must be in the cache.
    pub positions: Slice<'a, i32>,
    /// `[rows]`: which row of `tables` is its sequence's.
    pub sequences: Slice<'a, i32>,
    /// `[sequences, pages]`: pages of the cache by position / 64.
    pub tables: Slice<'a, i32>,
    /// Pages of a row of `tables`.
    pub pages: usize,
    /// More than any position of the launch; at most `64 * pages`.
    pub context: usize,
}

impl Places<'_> {
    fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Everything that both kinds of attention need.
    fn check(&self) {
        assert_eq!(self.sequences.len(), self.rows(), "attention: a sequence for each row");
        assert!(self.pages > 0 && self.tables.len().is_multiple_of(self.pages), "attention: tables");
        assert!(self.context <= self.pages * PAGE, "attention: context of more than the pages of a table");
    }
}

/// The most spans that a query sees of `context` positions through `window`.
fn most_spans(context: usize, window: Option<usize>) -> usize {
    let spans = match context {
        0..=16_384 => context.div_ceil(256),
        16_385..=65_536 => context.div_ceil(512).max(64),
        _ => MAX_SPANS,
    };
    // Of a window at any place, in the shortest of spans.
    window.map_or(spans, |window| spans.min((window - 1).div_ceil(256) + 1)).max(1)
}

/// f32 values with which the spans of `rows` rows are computed side by side.
fn workspace_len(rows: usize, spans: usize, heads: usize, value: usize) -> usize {
    if spans < 2 { 0 } else { rows * spans * heads * (value + 2) }
}

/// The spans of each row if they are computed side by side.
fn side_by_side(places: &Places<'_>, workspace: Option<Slice<'_, f32>>, spans: usize, row: usize) -> bool {
    let wanted = places.rows() * spans * row;
    if let Some(workspace) = workspace {
        assert!(spans < 2 || workspace.len() >= wanted, "attention: workspace of {wanted} values");
    }
    workspace.is_some() && spans > 1
}

/// That all rows of a cache are there whole.
#[track_caller]
fn check_cache(cache: Slice<'_, u8>, kind: CacheType, shape: RowShape) {
    let page = PAGE * kind.row_bytes(shape);
    assert!(cache.len().is_multiple_of(page), "attention: a cache of pages of {page} bytes");
    assert!(cache.address().is_multiple_of(16), "attention: a cache that is not aligned to 16 bytes");
    let eights = shape.width.is_multiple_of(8) && shape.plain.is_multiple_of(8);
    assert!(eights && shape.width > 0, "attention: widths are multiples of eight");
}

/// Joins spans that were computed side by side.
struct Merge<'a> {
    places: Places<'a>,
    workspace: Slice<'a, f32>,
    spans: usize,
    heads: usize,
    value: usize,
    window: Option<usize>,
    sinks: Option<Slice<'a, f32>>,
    out: Slice<'a, f32>,
}

impl Merge<'_> {
    /// # Safety
    /// The workspace is what the kernel before left for the same rows.
    unsafe fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let grid = (count(self.places.rows()), count(self.heads));
        let threads = count(self.value.div_ceil(2 * WARP) * WARP);
        let launch = device.launch(MERGE, grid, threads, 0).early().arg(self.workspace);
        let launch = launch.arg(self.places.positions).arg(self.sinks).arg(self.out);
        let launch = launch.arg(count(self.spans)).arg(count(self.heads)).arg(count(self.value));
        // SAFETY: the arguments of attention_merge; the caller's promise.
        unsafe { launch.arg(count(self.window.unwrap_or(0))).run() }
    }
}

/// Absorbed latent attention: as [`crate::attention::mla_batch`], on the device.
pub struct LatentAttention<'a> {
    /// Heads and widths: multiples of eight, and either a latent of 512 with 64 rotated or up to 320 in all (f32
    /// caches: a latent of up to 512 with anything).
    pub shape: Mla,
    /// Where the rows stand.
    pub places: Places<'a>,
    /// `[rows, heads, latent + rope]`.
    pub queries: Slice<'a, f32>,
    /// Latents: pages of rows as [`CacheType::row_bytes`] says.
    pub cache: Slice<'a, u8>,
    /// What they are stored as.
    pub kind: CacheType,
    /// At least [`LatentAttention::workspace_len`] values, to compute spans side by side.
    pub workspace: Option<Slice<'a, f32>>,
    /// `[rows, heads, latent]`.
    pub out: Slice<'a, f32>,
}

impl LatentAttention<'_> {
    /// f32 values of workspace for `rows` rows of which none sees more than `context` positions; 0 where none is of
    /// use.
    pub fn workspace_len(shape: &Mla, rows: usize, context: usize) -> usize {
        workspace_len(rows, most_spans(context, None), shape.heads, shape.latent)
    }

    /// # Panics
    /// If shapes differ, or no kernel takes them.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let Mla { heads, latent, rope, scale } = self.shape;
        let (rows, width) = (self.places.rows(), latent + rope);
        self.places.check();
        let row_shape = RowShape { heads: 1, width: latent, plain: rope };
        check_cache(self.cache, self.kind, row_shape);
        assert!(self.queries.len() >= rows * heads * width, "latent attention: queries of {rows} rows");
        assert!(self.out.len() >= rows * heads * latent, "latent attention: room for {rows} rows");
        assert!(rope > 0 && latent <= 512, "latent attention: {latent} and {rope} wide");
        if rows * heads == 0 {
            return Ok(());
        }
        if self.kind == CacheType::F32 {
            let plain = Plain {
                places: self.places,
                queries: self.queries,
                caches: (self.cache, self.cache),
                heads: (heads, 1),
                widths: (width, latent),
                rows: (width, width),
                scale,
                window: None,
                sinks: None,
                out: self.out,
            };
            return plain.launch(device);
        }
        let form = MlaForm::of(device, &self.shape, self.kind);
        let spans = most_spans(self.places.context, None);
        let split = side_by_side(&self.places, self.workspace, spans, heads * (latent + 2));
        let groups = heads.div_ceil(GROUP).min(GROUPS);
        let threads = groups * 2 * WARP;
        let grid = (rows, heads.div_ceil(groups * GROUP), if split { spans } else { 1 });
        let grid = (count(grid.0), count(grid.1), count(grid.2));
        let shared = form.shared_bytes(threads, self.kind.row_bytes(row_shape));
        let launch = device.launch(form.kernel, grid, count(threads), shared).early();
        let launch = launch.arg(self.queries).arg(self.cache);
        let launch = place_arguments(launch, &self.places).arg(count(heads)).arg(count(latent));
        let launch = launch.arg(count(rope)).arg(scale).arg(self.out);
        let launch = launch.arg(self.workspace.filter(|_| split)).arg(count(spans));
        // SAFETY: the arguments of these kernels; slices are as long as their rows need, and tables name pages of
        // the cache by the caller's promise.
        unsafe { launch.run()? };
        let Some(workspace) = self.workspace.filter(|_| split) else { return Ok(()) };
        let (places, out) = (self.places, self.out);
        let merge = Merge { places, workspace, spans, heads, value: latent, window: None, sinks: None, out };
        // SAFETY: the kernel above has filled it.
        unsafe { merge.launch(device) }
    }
}

/// A kernel of `mla.cu` and what it was compiled for.
struct MlaForm {
    kernel: Kernel,
    /// Of the depth, 16 each, for one of two warps.
    steps: usize,
    stages: usize,
    /// Steps whose queries stay in shared memory.
    spare: usize,
    coded: bool,
}

impl MlaForm {
    const TILE: usize = 32;

    fn of(device: &Device, shape: &Mla, kind: CacheType) -> Self {
        let coded = kind == CacheType::Fp8;
        let form = |bf16, fp8, steps, stages, spare| {
            let kernel = Kernel::new("mla", if coded { fp8 } else { bf16 });
            Self { kernel, steps, stages, spare, coded }
        };
        let depth = shape.latent + shape.rope;
        if (shape.latent, shape.rope) != (512, 64) {
            assert!(depth <= 320, "latent attention: no kernel for {} + {}", shape.latent, shape.rope);
            return form("mla_bf16_narrow", "mla_fp8_narrow", 10, 2, 0);
        }
        let deep = form("mla_bf16", "mla_fp8", 18, 3, 6);
        let most = 2 * GROUPS * WARP;
        if deep.shared_bytes(most, kind.row_bytes(RowShape { heads: 1, width: 512, plain: 64 }))
            <= device.info().shared_bytes_per_block
        {
            return deep;
        }
        form("mla_bf16_two_stages", "mla_fp8_two_stages", 18, 2, if coded { 1 } else { 2 })
    }

    fn shared_bytes(&self, threads: usize, row_bytes: usize) -> usize {
        let tile = Self::TILE * (self.steps * 64 + PADDING);
        let tiles = if self.coded { tile + self.stages * Self::TILE * row_bytes } else { self.stages * tile };
        threads * (68 + 16 * self.spare) + tiles
    }
}

/// Grouped-query attention: as [`crate::attention::gqa_batch`], on the device.
pub struct GroupedAttention<'a> {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head h uses `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a query or key head: a multiple of eight, up to 256.
    pub head_dim: usize,
    /// Width of a value head: a multiple of eight, up to 256.
    pub value_dim: usize,
    /// Multiplied into every score.
    pub scale: f32,
    /// With a window w, the query at position i sees positions j with i - w < j <= i. Pages that no row sees need
    /// not be named by the tables.
    pub window: Option<usize>,
    /// `[heads]`: a logit that takes part in the softmax and has no value.
    pub sinks: Option<Slice<'a, f32>>,
    /// Where the rows stand.
    pub places: Places<'a>,
    /// Whether rows of a sequence follow one another, as a prompt's do: for speed, not for what comes out.
    pub prompt: bool,
    /// `[rows, heads, head_dim]`.
    pub queries: Slice<'a, f32>,
    /// Pages of rows as [`CacheType::row_bytes`] says.
    pub keys: Slice<'a, u8>,
    /// Of the same pages.
    pub values: Slice<'a, u8>,
    /// What both are stored as.
    pub kind: CacheType,
    /// At least [`GroupedAttention::workspace_len`] values, to compute spans side by side.
    pub workspace: Option<Slice<'a, f32>>,
    /// `[rows, heads, value_dim]`.
    pub out: Slice<'a, f32>,
}

impl GroupedAttention<'_> {
    /// f32 values of workspace for `rows` rows of which none sees more than `context` positions; 0 where none is of
    /// use.
    pub fn workspace_len(&self, rows: usize, context: usize) -> usize {
        workspace_len(rows, most_spans(context, self.window), self.heads, self.value_dim)
    }

    /// # Panics
    /// If shapes differ, or no kernel takes them.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let Self { heads, kv_heads, head_dim, value_dim, scale, window, .. } = *self;
        let rows = self.places.rows();
        self.places.check();
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "grouped attention: query heads per key head"
        );
        assert!(head_dim.max(value_dim) <= 256, "grouped attention: heads of {head_dim} and {value_dim}");
        assert!(window != Some(0), "grouped attention: a window of nothing");
        assert!(self.sinks.is_none_or(|sinks| sinks.len() >= heads), "grouped attention: one sink per head");
        check_cache(self.keys, self.kind, RowShape { heads: kv_heads, width: head_dim, plain: 0 });
        check_cache(self.values, self.kind, RowShape { heads: kv_heads, width: value_dim, plain: 0 });
        assert!(self.queries.len() >= rows * heads * head_dim, "grouped attention: queries of {rows} rows");
        assert!(self.out.len() >= rows * heads * value_dim, "grouped attention: room for {rows} rows");
        if rows * heads == 0 {
            return Ok(());
        }
        if self.kind == CacheType::F32 {
            let plain = Plain {
                places: self.places,
                queries: self.queries,
                caches: (self.keys, self.values),
                heads: (heads, kv_heads),
                widths: (head_dim, value_dim),
                rows: (kv_heads * head_dim, kv_heads * value_dim),
                scale,
                window,
                sinks: self.sinks,
                out: self.out,
            };
            return plain.launch(device);
        }
        let form = GqaForm::of(head_dim.max(value_dim), self.prompt, self.kind);
        let spans = most_spans(self.places.context, window);
        let split = side_by_side(&self.places, self.workspace, spans, heads * (value_dim + 2));
        let per = heads / kv_heads;
        let block_heads = per.min(form.groups * GROUP);
        let tokens = if self.prompt { (form.groups * GROUP / block_heads).min(rows) } else { 1 };
        // The tokens of a block may touch one span more than each of them does.
        let deep = if split { spans + usize::from(tokens > 1) } else { 1 };
        let grid = (count(rows.div_ceil(tokens)), count(kv_heads * per.div_ceil(block_heads)), count(deep));
        let launch = device.launch(form.kernel, grid, count(form.threads()), form.shared_bytes()).early();
        let launch = launch.arg(self.queries).arg(self.keys).arg(self.values);
        let launch = place_arguments(launch, &self.places).arg(count(rows)).arg(count(tokens));
        let launch = launch.arg(count(heads)).arg(count(kv_heads)).arg(count(head_dim)).arg(count(value_dim));
        let launch = launch.arg(scale).arg(count(window.unwrap_or(0))).arg(self.sinks).arg(self.out);
        let launch = launch.arg(self.workspace.filter(|_| split)).arg(count(spans));
        // SAFETY: the arguments of these kernels; slices are as long as their rows need, and tables name pages of
        // the caches by the caller's promise.
        unsafe { launch.run()? };
        let Some(workspace) = self.workspace.filter(|_| split) else { return Ok(()) };
        let (places, sinks, out) = (self.places, self.sinks, self.out);
        let merge = Merge { places, workspace, spans, heads, value: value_dim, window, sinks, out };
        // SAFETY: the kernel above has filled it.
        unsafe { merge.launch(device) }
    }
}

/// A kernel of `gqa.cu` and what it was compiled for.
struct GqaForm {
    kernel: Kernel,
    width: usize,
    /// Warps that share 16 rows, and how often there are 16.
    warps: usize,
    groups: usize,
    coded: bool,
}

impl GqaForm {
    fn of(width: usize, prompt: bool, kind: CacheType) -> Self {
        let coded = kind == CacheType::Fp8;
        let (width, names) = match width {
            0..=64 => (64, [["gqa_bf16_64_single", "gqa_bf16_64"], ["gqa_fp8_64_single", "gqa_fp8_64"]]),
            65..=128 => {
                (128, [["gqa_bf16_128_single", "gqa_bf16_128"], ["gqa_fp8_128_single", "gqa_fp8_128"]])
            }
            _ => (256, [["gqa_bf16_256_single", "gqa_bf16_256"], ["gqa_fp8_256_single", "gqa_fp8_256"]]),
        };
        let kernel = Kernel::new("gqa", names[usize::from(coded)][usize::from(prompt)]);
        let warps = match (width, prompt) {
            (256, _) => 2,
            (_, false) => 4,
            (_, true) => 1,
        };
        Self { kernel, width, warps, groups: if prompt { GROUPS } else { 1 }, coded }
    }

    fn threads(&self) -> usize {
        self.warps * self.groups * WARP
    }

    fn shared_bytes(&self) -> usize {
        let tile = if self.width <= 128 { 64 } else { 32 };
        let scores = if self.warps > 1 { self.groups * tile * GROUP * size_of::<f32>() } else { 0 };
        let both = 2 * tile * (2 * self.width + PADDING);
        scores + if self.coded { both + 4 * tile * (self.width + PADDING) } else { 2 * both }
    }
}

/// Attention of f32 caches.
struct Plain<'a> {
    places: Places<'a>,
    queries: Slice<'a, f32>,
    /// Keys and values.
    caches: (Slice<'a, u8>, Slice<'a, u8>),
    /// Of queries, and of keys.
    heads: (usize, usize),
    /// Of keys, and of values.
    widths: (usize, usize),
    /// Values of a row of either cache.
    rows: (usize, usize),
    scale: f32,
    window: Option<usize>,
    sinks: Option<Slice<'a, f32>>,
    out: Slice<'a, f32>,
}

impl Plain<'_> {
    fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let warps = 4;
        let grid = (count(self.places.rows()), count(self.heads.0.div_ceil(warps)));
        let launch = device.launch(F32, grid, count(warps * WARP), 0).early();
        let launch = launch.arg(self.queries).arg(self.caches.0).arg(self.caches.1);
        let launch = place_arguments(launch, &self.places).arg(count(self.heads.0)).arg(count(self.heads.1));
        let launch = launch.arg(count(self.widths.0)).arg(count(self.widths.1));
        let launch = launch.arg(count(self.rows.0)).arg(count(self.rows.1)).arg(self.scale);
        let launch = launch.arg(count(self.window.unwrap_or(0))).arg(self.sinks).arg(self.out);
        // SAFETY: the arguments of attention_f32; slices are as long as their rows need, and tables name pages of
        // the caches by the caller's promise.
        unsafe { launch.run() }
    }
}

/// Positions, sequences, tables and the width of these.
fn place_arguments<'d>(launch: Launch<'d>, places: &Places<'_>) -> Launch<'d> {
    launch.arg(places.positions).arg(places.sequences).arg(places.tables).arg(count(places.pages))
}
