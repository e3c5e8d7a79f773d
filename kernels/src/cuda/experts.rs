//! The feed-forward of routed experts: gate and up with the activation, then down, for pairs of a token and
//! an expert that were grouped ([`super::Group`]). `kernels/cuda/experts.cuh`; the reference is
//! [`crate::reference::ffn`].
//!
//! Inputs are planes of bf16 in the order that the format of the weights wants ([`ExpertFormat::order`]);
//! sums are f32. A pair's output has the same bits whatever the other pairs are, however they are cut into
//! units, and whichever [`Tiles`] compute it; [`Multiply::Wgmma`] gives the same bits in the emulator, and on
//! a device once a check there says so.

use super::buffer::Slice;
use super::device::Device;
use super::error::DeviceError;
use super::group::UNIT_LEN;
use super::image::Kernel;
use super::launch::Launch;
use super::rows::{Order, Planes, count};
use crate::experts::Activation;

/// Numbers of an expert in the table of addresses.
pub const EXPERT_LEN: usize = 9;

/// How an expert's weights are stored, as published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExpertFormat {
    /// bf16.
    Bf16,
    /// e4m3 codes with an f32 per block of 128 x 128.
    Fp8,
    /// `q + 8` in four bits, with a bf16 scale per 32 columns.
    Int4,
    /// e2m1 codes, with a power of two per 32 columns.
    Mxfp4,
}

impl ExpertFormat {
    /// The order of columns in the planes that are multiplied with such weights.
    pub fn order(self) -> Order {
        match self {
            Self::Bf16 | Self::Fp8 => Order::Natural,
            Self::Int4 | Self::Mxfp4 => Order::Nibble,
        }
    }

    /// Whether a weight may have rows of `columns` values.
    pub fn allows(self, columns: usize) -> bool {
        let unit = match self {
            Self::Bf16 | Self::Fp8 => 8,
            Self::Int4 | Self::Mxfp4 => 32,
        };
        columns > 0 && columns.is_multiple_of(unit)
    }

    /// Kernels of gate and up, and of down.
    fn kernels(self, variant: Variant) -> [Kernel; 2] {
        macro_rules! named {
            ($format:literal) => {
                match variant {
                    Variant::Few => named!($format, "few_1"),
                    Variant::Exact => named!($format, "few_3"),
                    Variant::Wide => named!($format, "wide"),
                    Variant::Wgmma => named!($format, "wgmma"),
                }
            };
            ($format:literal, $variant:literal) => {
                [
                    Kernel::new(concat!("experts_", $format), concat!("experts_up_", $format, "_", $variant)),
                    Kernel::new(
                        concat!("experts_", $format),
                        concat!("experts_down_", $format, "_", $variant),
                    ),
                ]
            };
        }
        match self {
            Self::Bf16 => named!("bf16"),
            Self::Fp8 => named!("fp8"),
            Self::Int4 => named!("int4"),
            Self::Mxfp4 => named!("mxfp4"),
        }
    }
}

/// How much a block computes: a matter of speed only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tiles {
    /// 64 rows of a weight, for units of few pairs: weights stream past.
    Few,
    /// 128 rows for units of up to 128 pairs. (With three planes, as `Few`.)
    Wide,
}

/// What multiplies in [`Tiles::Wide`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Multiply {
    /// A warp at a time: every device.
    Mma,
    /// A warp group at a time, from shared memory: compute capability 9.0 only.
    Wgmma,
}

#[derive(Clone, Copy)]
enum Variant {
    Few,
    Exact,
    Wide,
    Wgmma,
}

impl Variant {
    fn new(tiles: Tiles, multiply: Multiply, planes: usize, device: &Device, what: &str) -> Self {
        match (planes, tiles, multiply) {
            (1, Tiles::Few, _) => Self::Few,
            (3, ..) => Self::Exact,
            (1, Tiles::Wide, Multiply::Mma) => Self::Wide,
            (1, Tiles::Wide, Multiply::Wgmma) => {
                assert!(Multiply::Wgmma.is_possible(device), "{what}: wgmma on {}", device.info().name);
                Self::Wgmma
            }
            _ => panic!("{what}: {planes} planes; 1 and 3 are possible"),
        }
    }

    /// Threads of a block, its dynamic shared memory, and the rows of a weight that it takes. As in
    /// experts.cuh.
    fn shape(self) -> (u32, usize, usize) {
        match self {
            Self::Few => (128, (49 << 10) - 384, 64),
            Self::Exact => (128, (99 << 10) - 640, 64),
            Self::Wide => (256, (99 << 10) - 640, 128),
            Self::Wgmma => (256, (192 << 10) + 1024, 128),
        }
    }
}

impl Tiles {
    /// Pairs of a unit that make the best of such tiles. A unit of more is taken in parts.
    pub fn unit_size(self, planes: usize) -> usize {
        match (self, planes) {
            (_, 3) => 32,
            (Self::Few, _) => 64,
            (Self::Wide, _) => 128,
        }
    }
}

impl Multiply {
    /// Whether the device can.
    pub fn is_possible(self, device: &Device) -> bool {
        self == Self::Mma || device.info().compute_capability == (9, 0)
    }
}

/// Device addresses of a weight `[rows, columns]` in its format.
#[derive(Clone, Copy, Debug, Default)]
pub struct WeightAddress {
    /// The codes, aligned to 16 bytes.
    pub codes: u64,
    /// The scales, aligned to 4 bytes; of bf16 there are none.
    pub scales: u64,
    /// f32 per row, or 0.
    pub bias: u64,
}

/// Device addresses of an expert.
#[derive(Clone, Copy, Debug)]
pub struct ExpertAddress {
    /// Gate, `[inter, hidden]`.
    pub gate: WeightAddress,
    /// Up, `[inter, hidden]`.
    pub up: WeightAddress,
    /// Down, `[hidden, inter]`.
    pub down: WeightAddress,
}

impl ExpertAddress {
    /// The rows of the table of such experts.
    pub fn table(experts: &[Self]) -> Vec<u64> {
        let weight = |weight: &WeightAddress| [weight.codes, weight.scales, weight.bias];
        experts.iter().flat_map(|expert| [&expert.gate, &expert.up, &expert.down]).flat_map(weight).collect()
    }

    /// Of an expert whose gate and up are the even and the odd rows of one weight `gate_up`, with `hidden`
    /// columns and a bias for every row.
    ///
    /// # Panics
    /// In FP8, whose scales belong to blocks of rows.
    pub fn interleaved(
        format: ExpertFormat,
        hidden: usize,
        gate_up: WeightAddress,
        down: WeightAddress,
    ) -> Self {
        let (codes, scales) = match format {
            ExpertFormat::Bf16 => (2 * hidden, 0),
            ExpertFormat::Fp8 => panic!("gate and up by turns in FP8"),
            ExpertFormat::Int4 => (hidden / 2, hidden / 32 * 2),
            ExpertFormat::Mxfp4 => (hidden / 2, hidden / 32),
        };
        let later = |address: u64, bytes: usize| if address == 0 { 0 } else { address + bytes as u64 };
        let up = WeightAddress {
            codes: later(gate_up.codes, codes),
            scales: later(gate_up.scales, scales),
            bias: later(gate_up.bias, 4),
        };
        Self { gate: gate_up, up, down }
    }
}

/// Experts and the pairs that were grouped for them.
#[derive(Clone, Copy)]
pub struct GroupedPairs<'a> {
    /// `[experts, EXPERT_LEN]`: [`ExpertAddress::table`].
    pub experts: Slice<'a, u64>,
    /// Pairs token * top_k + rank by expert.
    pub order: Slice<'a, i32>,
    /// `[most, UNIT_LEN]`, aligned to 16 bytes.
    pub units: Slice<'a, u32>,
    /// `[1]`: how many units there are.
    pub unit_count: Slice<'a, u32>,
    /// How weights are stored.
    pub format: ExpertFormat,
    /// How much a block computes.
    pub tiles: Tiles,
    /// What multiplies.
    pub multiply: Multiply,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width between the projections.
    pub inter: usize,
}

impl GroupedPairs<'_> {
    #[track_caller]
    fn check(&self, planes: Planes<'_>, rows: usize, columns: usize, outputs: usize, what: &str) {
        assert!(self.format.allows(columns), "{what}: {columns} columns in {:?}", self.format);
        assert!(outputs.is_multiple_of(8), "{what}: {outputs} outputs");
        planes.check(rows, columns, self.format.order(), what);
        assert!(self.experts.len().is_multiple_of(EXPERT_LEN), "{what}: table of experts");
        assert!(self.units.len().is_multiple_of(UNIT_LEN), "{what}: list of units");
        assert!(self.units.address().is_multiple_of(16), "{what}: list of units that is not aligned");
        assert!(!self.unit_count.is_empty(), "{what}: number of units");
        // Items are counted in 32 bits, with room for a step past the last.
        let items = self.units.len() / UNIT_LEN * outputs;
        assert!(i32::try_from(items).is_ok(), "{what}: {items} rows of units");
    }

    /// One of the two products: as many blocks as the device holds, or as there may be items.
    fn launch<'d>(
        &self,
        device: &'d Device,
        down: bool,
        planes: Planes<'_>,
    ) -> Result<Option<Launch<'d>>, DeviceError> {
        let (what, rows) =
            if down { ("experts: down", self.hidden) } else { ("experts: up", 2 * self.inter) };
        let variant = Variant::new(self.tiles, self.multiply, planes.count, device, what);
        let kernel = self.format.kernels(variant)[usize::from(down)];
        let (threads, shared_bytes, tile_rows) = variant.shape();
        let items = self.units.len() / UNIT_LEN * rows.div_ceil(tile_rows);
        if items == 0 {
            return Ok(None);
        }
        let blocks = device.residency(kernel, threads, shared_bytes)?.blocks.clamp(1, count(items));
        let launch = device.launch(kernel, blocks, threads, shared_bytes).early();
        let launch = launch.arg(self.experts).arg(self.order).arg(self.units).arg(self.unit_count);
        Ok(Some(launch.arg(planes.values).arg(planes.stride as u64)))
    }
}

/// Gate and up with the activation: `x` of each pair's token to `inner` of its place in the order.
pub struct ExpertsUp<'a> {
    /// Experts and pairs.
    pub pairs: GroupedPairs<'a>,
    /// `[planes][tokens, hidden]` in the format's order.
    pub x: Planes<'a>,
    /// Rows of x.
    pub tokens: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// `[planes][tokens * top_k, inter]` in the order that down's format wants.
    pub inner: Planes<'a>,
    /// That order.
    pub inner_order: Order,
    /// What is done with gate and up.
    pub activation: Activation,
    /// Whether gate and up are rows of one weight by turns ([`ExpertAddress::interleaved`]).
    pub interleaved: bool,
}

impl ExpertsUp<'_> {
    /// # Panics
    /// If a shape is wrong, or the device cannot multiply so.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let GroupedPairs { hidden, inter, format, order, .. } = self.pairs;
        let what = "experts: up";
        let pairs = self.tokens * self.top_k;
        self.pairs.check(self.x, self.tokens, hidden, inter, what);
        self.inner.check(pairs, inter, self.inner_order, what);
        assert_eq!(self.x.count, self.inner.count, "{what}: planes in and out");
        assert!(self.top_k > 0 && order.len() >= pairs, "{what}: order of {pairs} pairs");
        assert!(!self.interleaved || format != ExpertFormat::Fp8, "{what}: gate and up by turns in FP8");
        let Some(launch) = self.pairs.launch(device, false, self.x)? else { return Ok(()) };
        let (clamped, limit, alpha) = match self.activation {
            Activation::SiluGlu => (0u32, 0.0, 0.0),
            Activation::ClampedSwiGlu { limit, alpha } => (1, limit, alpha),
        };
        let launch = launch.arg(self.inner.values).arg(self.inner.stride as u64);
        let launch = launch.arg(count(hidden)).arg(count(inter)).arg(count(self.top_k));
        let launch = launch.arg(1 + u32::from(self.interleaved));
        let launch = launch.arg(u32::from(self.inner_order == Order::Nibble));
        let launch = launch.arg(clamped).arg(limit).arg(alpha);
        // SAFETY: the arguments of experts_up; planes have the sizes that were checked. That units, order and
        // addresses stay inside them is the caller's part: `Group` makes the first two.
        unsafe { launch.run() }
    }
}

/// Down: `inner` of each place in the order to `out` of its pair.
pub struct ExpertsDown<'a> {
    /// Experts and pairs.
    pub pairs: GroupedPairs<'a>,
    /// `[planes][count, inter]` in the format's order.
    pub inner: Planes<'a>,
    /// Pairs at most.
    pub count: usize,
    /// `[count, hidden]`, by pair.
    pub out: Slice<'a, f32>,
}

impl ExpertsDown<'_> {
    /// # Panics
    /// If a shape is wrong, or the device cannot multiply so.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let GroupedPairs { hidden, inter, order, .. } = self.pairs;
        let what = "experts: down";
        self.pairs.check(self.inner, self.count, inter, hidden, what);
        assert!(order.len() >= self.count, "{what}: order of {} pairs", self.count);
        assert!(self.out.len() >= self.count * hidden, "{what}: out of {} pairs", self.count);
        let Some(launch) = self.pairs.launch(device, true, self.inner)? else { return Ok(()) };
        // SAFETY: the arguments of experts_down; as for experts_up.
        unsafe { launch.arg(self.out).arg(count(hidden)).arg(count(inter)).run() }
    }
}
