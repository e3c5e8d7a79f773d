//! Pairs of a token and an expert sorted by expert, and what experts gave brought back to the tokens.
//! `kernels/cuda/group.cu` and `finalize.cu`; the references are [`crate::reference::group`] and
//! [`crate::reference::finalize`].

use super::buffer::Slice;
use super::device::Device;
use super::error::DeviceError;
use super::image::Kernel;
use super::launch::Launch;
use super::ring::ExpertRing;
use super::rows::count;

const GROUP: Kernel = Kernel::new("group", "group");
const GROUP_COUNT: Kernel = Kernel::new("group", "group_count");
const GROUP_SCAN: Kernel = Kernel::new("group", "group_scan");
const GROUP_PLACE: Kernel = Kernel::new("group", "group_place");
const FINALIZE: Kernel = Kernel::new("finalize", "finalize");

const THREADS: u32 = 512;
const MOST_EXPERTS: usize = 512;
/// Pairs that one block sorts; more are cut into chunks.
const ONE_BLOCK: usize = 8192;
/// Pairs of a chunk, as in group.cu.
const CHUNK: usize = 2048;
/// Pairs of one call.
const MOST_PAIRS: usize = 1 << 20;
/// Columns that a block finalizes.
const FINALIZE_COLUMNS: usize = 128 * 4;

/// Numbers of a unit in a list: expert, first place in the order, pairs, and 0.
pub const UNIT_LEN: usize = 4;

/// The most units of `size` pairs that `pairs` pairs of `experts` experts make: every expert may have one that is
/// not full.
pub fn max_units(pairs: usize, experts: usize, size: usize) -> usize {
    pairs / size + experts.min(pairs)
}

/// A list of units to be made: an expert's pairs in parts of at most `size`, by expert.
#[derive(Clone, Copy)]
pub struct Units<'a> {
    /// Pairs of a unit.
    pub size: usize,
    /// `[max_units, UNIT_LEN]`, aligned to 16 bytes.
    pub list: Slice<'a, u32>,
}

/// Sorts pairs t * top_k + r by the expert of token t's rank r. Pairs of an expert stay in order. Pairs whose id is
/// not the number of an expert are left out.
pub struct Group<'a> {
    /// `[rows, top_k]`.
    pub ids: Slice<'a, i32>,
    /// How many of the rows are tokens and not padding; none: all.
    pub tokens: Option<Slice<'a, u32>>,
    /// Rows.
    pub rows: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Experts.
    pub experts: usize,
    /// `[rows * top_k]`: pairs by expert. Places past the last pair are left as they are.
    pub order: Slice<'a, i32>,
    /// `[experts + 1]`: where each expert's pairs start in the order, and their end.
    pub offsets: Slice<'a, i32>,
    /// Lists of units of one or two sizes.
    pub units: [Option<Units<'a>>; 2],
    /// `[2]`: how many units each list has.
    pub unit_counts: Slice<'a, u32>,
    /// [`Group::scratch_len`] values.
    pub scratch: Slice<'a, u32>,
    /// Where the counts are recorded for whoever profiles, and the number of the layer.
    pub ring: Option<(&'a ExpertRing, u32)>,
}

impl Group<'_> {
    /// Values of scratch for as many pairs of a token and an expert.
    pub fn scratch_len(pairs: usize, experts: usize) -> usize {
        if pairs <= ONE_BLOCK { 0 } else { pairs.div_ceil(CHUNK) * experts }
    }

    /// # Panics
    /// If a shape is wrong, or there are more than 512 experts or 2^20 pairs.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (rows, top_k, experts) = (self.rows, self.top_k, self.experts);
        let pairs = rows * top_k;
        assert!(
            top_k > 0 && experts > 0 && experts <= MOST_EXPERTS,
            "group: top {top_k} of {experts} experts"
        );
        assert!(pairs <= MOST_PAIRS, "group: {pairs} pairs; {MOST_PAIRS} are possible");
        assert!(
            self.ids.len() >= pairs && self.order.len() >= pairs,
            "group: ids and order of {pairs} pairs"
        );
        assert!(self.tokens.is_none_or(|tokens| !tokens.is_empty()), "group: number of tokens");
        assert!(self.offsets.len() > experts, "group: offsets of {experts} experts and the end");
        assert!(self.unit_counts.len() >= 2, "group: numbers of units");
        for units in self.units.iter().flatten() {
            assert!(units.size > 0 && units.list.address().is_multiple_of(16), "group: a list of units");
            let most = max_units(pairs, experts, units.size);
            assert!(units.list.len() >= most * UNIT_LEN, "group: room for {most} units");
        }
        assert!(self.scratch.len() >= Self::scratch_len(pairs, experts), "group: scratch of {pairs} pairs");
        if pairs <= ONE_BLOCK { self.in_one_block(device) } else { self.in_chunks(device, pairs) }
    }

    fn in_one_block(&self, device: &Device) -> Result<(), DeviceError> {
        let launch = self.over_pairs(device, GROUP, 1).arg(self.order).arg(self.offsets);
        // SAFETY: the arguments of group; everything has the sizes that were checked.
        unsafe { self.with_ring(self.with_units(launch)).run() }
    }

    fn in_chunks(&self, device: &Device, pairs: usize) -> Result<(), DeviceError> {
        let chunks = count(pairs.div_ceil(CHUNK));
        let counting = self.over_pairs(device, GROUP_COUNT, chunks).arg(self.scratch);
        // SAFETY: the arguments of group_count; the scratch has a count of every expert in every chunk.
        unsafe { counting.run()? };
        let scan = device.launch(GROUP_SCAN, 1, THREADS, 0).early();
        let scan =
            scan.arg(self.tokens).arg(count(self.rows)).arg(count(self.top_k)).arg(count(self.experts));
        let scan = scan.arg(self.scratch).arg(chunks).arg(self.offsets);
        // SAFETY: the arguments of group_scan; everything has the sizes that were checked.
        unsafe { self.with_ring(scan).run()? };
        let place = self.over_pairs(device, GROUP_PLACE, chunks).arg(self.scratch).arg(self.offsets);
        // SAFETY: the arguments of group_place; everything has the sizes that were checked.
        unsafe { self.with_units(place.arg(self.order)).run() }
    }

    fn over_pairs<'d>(&self, device: &'d Device, kernel: Kernel, blocks: u32) -> Launch<'d> {
        let launch = device.launch(kernel, blocks, THREADS, 0).early().arg(self.ids).arg(self.tokens);
        launch.arg(count(self.rows)).arg(count(self.top_k)).arg(count(self.experts))
    }

    fn with_units<'d>(&self, mut launch: Launch<'d>) -> Launch<'d> {
        for units in self.units {
            launch = launch.arg(units.map_or(0, |units| count(units.size)));
            launch = launch.arg(units.map(|units| units.list));
        }
        launch.arg(self.unit_counts)
    }

    fn with_ring<'d>(&self, launch: Launch<'d>) -> Launch<'d> {
        match self.ring {
            Some((ring, layer)) => launch.arg(ring.control()).arg(ring.entries()).arg(layer),
            None => launch.arg(0u64).arg(0u64).arg(0u32),
        }
    }
}

/// x\[t\] becomes x\[t\] + shared\[t\] + the sum of weights\[t, r\] * out\[t, r\], in that order, ranks ascending.
pub struct Finalize<'a> {
    /// `[rows, hidden]`.
    pub x: Slice<'a, f32>,
    /// Whether it is added onto what x holds; else x is only written.
    pub add: bool,
    /// `[rows, hidden]`: what the shared expert gave.
    pub shared: Option<Slice<'a, f32>>,
    /// `[rows, top_k, hidden]`: what the routed experts gave.
    pub out: Slice<'a, f32>,
    /// `[rows, top_k]`.
    pub weights: Slice<'a, f32>,
    /// How many of the rows are tokens; others are left as they are. None: all.
    pub tokens: Option<Slice<'a, u32>>,
    /// Rows.
    pub rows: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Values of a row.
    pub hidden: usize,
}

impl Finalize<'_> {
    /// # Panics
    /// If a shape is wrong.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let (rows, top_k, hidden) = (self.rows, self.top_k, self.hidden);
        assert!(self.x.len() >= rows * hidden, "finalize: x");
        assert!(self.shared.is_none_or(|shared| shared.len() >= rows * hidden), "finalize: shared");
        assert!(self.out.len() >= rows * top_k * hidden, "finalize: out");
        assert!(self.weights.len() >= rows * top_k, "finalize: weights");
        assert!(self.tokens.is_none_or(|tokens| !tokens.is_empty()), "finalize: number of tokens");
        if rows * hidden == 0 {
            return Ok(());
        }
        let grid = (count(rows), count(hidden.div_ceil(FINALIZE_COLUMNS)));
        let launch = device.launch(FINALIZE, grid, 128, 0).early();
        let launch = launch.arg(self.x).arg(u32::from(self.add)).arg(self.shared).arg(self.out);
        let launch = launch.arg(self.weights).arg(self.tokens).arg(count(hidden)).arg(count(top_k));
        // SAFETY: the arguments of finalize; all rows lie inside their slices, as checked.
        unsafe { launch.run() }
    }
}
