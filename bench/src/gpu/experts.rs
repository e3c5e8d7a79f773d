//! Routed experts in INT4 with everything that a layer of them needs, made on the device from a seed.

use half::bf16;
use kernels::cuda::{
    Buffer, Device, DeviceError, ExpertAddress, ExpertFormat, ExpertsDown, ExpertsUp, Finalize, Group,
    GroupedPairs, Multiply, Order, Planes, Route, Slice, Split, Strided, Tiles, UNIT_LEN, Units,
    WeightAddress, check,
};
use kernels::experts::Activation;

use super::is_left_out;
use super::sizes::{GROUP, MoeShape};

/// Which kernels compute experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct How {
    pub tiles: Tiles,
    pub multiply: Multiply,
}

impl How {
    /// All that the device can and that are not left out.
    pub fn all(device: &Device) -> Vec<Self> {
        let all = [
            Self { tiles: Tiles::Few, multiply: Multiply::Mma },
            Self { tiles: Tiles::Wide, multiply: Multiply::Mma },
            Self { tiles: Tiles::Wide, multiply: Multiply::Wgmma },
        ];
        let wanted = |how: &Self| how.multiply != Multiply::Wgmma || !is_left_out("wgmma");
        all.into_iter().filter(|how| how.multiply.is_possible(device) && wanted(how)).collect()
    }

    pub fn name(self) -> &'static str {
        match (self.tiles, self.multiply) {
            (Tiles::Few, _) => "few",
            (Tiles::Wide, Multiply::Mma) => "wide",
            (Tiles::Wide, Multiply::Wgmma) => "wgmma",
        }
    }
}

/// Sizes of units that lists are made for.
const LISTS: [Tiles; 2] = [Tiles::Few, Tiles::Wide];

/// One of the three weights of all experts.
pub(super) struct Weight {
    codes: Buffer<u8>,
    scales: Buffer<bf16>,
    pub rows: usize,
    pub columns: usize,
}

impl Weight {
    fn new(
        device: &Device,
        experts: usize,
        (rows, columns): (usize, usize),
        seed: u64,
    ) -> Result<Self, DeviceError> {
        let values = experts * rows * columns;
        let (codes, scales) = (device.alloc(values / 2)?, device.alloc(values / GROUP)?);
        check::fill_codes(device, codes.all(), seed, false)?;
        // Sums over a row of values between -1 and 1 are then about 1.
        let scale = 0.3 / (columns as f32).sqrt();
        check::fill_bf16(device, scales.all(), seed + 1, (scale, scale * 0.5))?;
        Ok(Self { codes, scales, rows, columns })
    }

    /// Codes and scales of one expert.
    pub fn of(&self, expert: usize) -> (Slice<'_, u8>, Slice<'_, bf16>) {
        let values = self.rows * self.columns;
        let (codes, scales) = (values / 2, values / GROUP);
        let codes = self.codes.slice(expert * codes..(expert + 1) * codes);
        (codes, self.scales.slice(expert * scales..(expert + 1) * scales))
    }

    fn address(&self, expert: usize) -> WeightAddress {
        let (codes, scales) = self.of(expert);
        WeightAddress { codes: codes.address(), scales: scales.address(), bias: 0 }
    }
}

/// The experts of one layer.
pub(super) struct Layer {
    pub gate: Weight,
    pub up: Weight,
    pub down: Weight,
    table: Buffer<u64>,
}

impl Layer {
    pub fn new(device: &Device, shape: &MoeShape, seed: u64) -> Result<Self, DeviceError> {
        let MoeShape { hidden, inter, experts, .. } = *shape;
        let weight = |sizes, part: u64| Weight::new(device, experts, sizes, seed + 10 * part);
        let (gate, up) = (weight((inter, hidden), 0)?, weight((inter, hidden), 1)?);
        let down = weight((hidden, inter), 2)?;
        let address = |expert| ExpertAddress {
            gate: gate.address(expert),
            up: up.address(expert),
            down: down.address(expert),
        };
        let addresses: Vec<ExpertAddress> = (0..experts).map(address).collect();
        let table = device.upload(&ExpertAddress::table(&addresses))?;
        Ok(Self { gate, up, down, table })
    }
}

/// Which experts the tokens of a turn go to, and the lists made of that.
pub(super) struct Routed {
    pub logits: Buffer<f32>,
    pub ids: Buffer<i32>,
    pub weights: Buffer<f32>,
    pub order: Buffer<i32>,
    pub offsets: Buffer<i32>,
    lists: [Buffer<u32>; 2],
    pub unit_counts: Buffer<u32>,
    scratch: Buffer<u32>,
    shape: MoeShape,
}

impl Routed {
    /// For up to so many tokens.
    pub fn new(device: &Device, shape: &MoeShape, tokens: usize, seed: u64) -> Result<Self, DeviceError> {
        let pairs = tokens * shape.top_k;
        let logits = device.alloc(tokens * shape.experts)?;
        check::fill_f32(device, logits.all(), seed, 4.0)?;
        let list = |tiles: Tiles| device.alloc(shape.units(tokens, tiles.unit_size(1)) * UNIT_LEN);
        Ok(Self {
            logits,
            ids: device.zeroed(pairs)?,
            weights: device.zeroed(pairs)?,
            order: device.zeroed(pairs)?,
            offsets: device.zeroed(shape.experts + 1)?,
            lists: [list(LISTS[0])?, list(LISTS[1])?],
            unit_counts: device.zeroed(2)?,
            scratch: device.alloc(Group::scratch_len(pairs, shape.experts).max(1))?,
            shape: *shape,
        })
    }

    pub fn route(&self, device: &Device, tokens: usize) -> Result<(), DeviceError> {
        let Self { logits, ids, weights, shape, .. } = self;
        let (rule, pairs) = (shape.rule(), tokens * shape.top_k);
        let (ids, weights) = (ids.slice(..pairs), weights.slice(..pairs));
        Route { rule, logits: logits.slice(..tokens * shape.experts), bias: None, tokens, ids, weights }
            .launch(device)
    }

    pub fn group(&self, device: &Device, tokens: usize) -> Result<(), DeviceError> {
        let units = [0, 1].map(|i| Some(Units { size: LISTS[i].unit_size(1), list: self.list(i, tokens) }));
        Group {
            ids: self.ids.all(),
            tokens: None,
            rows: tokens,
            top_k: self.shape.top_k,
            experts: self.shape.experts,
            order: self.order.all(),
            offsets: self.offsets.all(),
            units,
            unit_counts: self.unit_counts.all(),
            scratch: self.scratch.all(),
            ring: None,
        }
        .launch(device)
    }

    /// As long as so many tokens may make it: the grids of kernels follow from that.
    fn list(&self, list: usize, tokens: usize) -> Slice<'_, u32> {
        let most = self.shape.units(tokens, LISTS[list].unit_size(1));
        self.lists[list].slice(..most * UNIT_LEN)
    }

    /// Experts that have any pair. Waits for the device.
    pub fn distinct(&self) -> Result<usize, DeviceError> {
        Ok(self.offsets.read()?.windows(2).filter(|ends| ends[0] < ends[1]).count())
    }

    pub fn pairs<'a>(&'a self, layer: &'a Layer, tokens: usize, how: How) -> GroupedPairs<'a> {
        let list = usize::from(how.tiles == Tiles::Wide);
        GroupedPairs {
            experts: layer.table.all(),
            order: self.order.all(),
            units: self.list(list, tokens),
            unit_count: self.unit_counts.slice(list..list + 1),
            format: ExpertFormat::Int4,
            tiles: how.tiles,
            multiply: how.multiply,
            hidden: self.shape.hidden,
            inter: self.shape.inter,
        }
    }
}

/// What experts take and give, for up to so many tokens.
pub(super) struct Rows {
    /// `[tokens, hidden]`.
    pub x: Buffer<f32>,
    /// The same rounded, in nibble order.
    pub planes: Buffer<bf16>,
    /// `[tokens * top_k, inter]` in nibble order.
    pub inner: Buffer<bf16>,
    /// `[tokens * top_k, hidden]`.
    pub out: Buffer<f32>,
    /// `[tokens, hidden]`.
    pub sum: Buffer<f32>,
    shape: MoeShape,
}

impl Rows {
    pub fn new(device: &Device, shape: &MoeShape, tokens: usize) -> Result<Self, DeviceError> {
        let pairs = tokens * shape.top_k;
        let rows = Self {
            x: device.alloc(tokens * shape.hidden)?,
            planes: device.alloc(tokens * shape.hidden)?,
            inner: device.alloc(pairs * shape.inter)?,
            out: device.alloc(pairs * shape.hidden)?,
            sum: device.zeroed(tokens * shape.hidden)?,
            shape: *shape,
        };
        check::fill_f32(device, rows.x.all(), 3, 1.0)?;
        rows.split(device, tokens)?;
        Ok(rows)
    }

    /// Bytes of all that for so many tokens.
    pub fn bytes(shape: &MoeShape, tokens: usize) -> usize {
        tokens * (10 * shape.hidden + shape.top_k * (2 * shape.inter + 4 * shape.hidden))
    }

    /// Rounds x.
    pub fn split(&self, device: &Device, tokens: usize) -> Result<(), DeviceError> {
        let width = self.shape.hidden;
        let nibble = Some(Planes::new(&self.planes, 1));
        Split { x: Strided::new(&self.x, width), rows: tokens, width, natural: None, nibble }.launch(device)
    }

    pub fn up(
        &self,
        device: &Device,
        (layer, routed): (&Layer, &Routed),
        tokens: usize,
        how: How,
    ) -> Result<(), DeviceError> {
        ExpertsUp {
            pairs: routed.pairs(layer, tokens, how),
            x: Planes::new(self.planes.slice(..tokens * self.shape.hidden), 1),
            tokens,
            top_k: self.shape.top_k,
            inner: Planes::new(&self.inner, 1),
            inner_order: Order::Nibble,
            activation: Activation::SiluGlu,
            interleaved: false,
        }
        .launch(device)
    }

    pub fn down(
        &self,
        device: &Device,
        (layer, routed): (&Layer, &Routed),
        tokens: usize,
        how: How,
    ) -> Result<(), DeviceError> {
        ExpertsDown {
            pairs: routed.pairs(layer, tokens, how),
            inner: Planes::new(&self.inner, 1),
            count: tokens * self.shape.top_k,
            out: self.out.all(),
        }
        .launch(device)
    }

    pub fn finalize(&self, device: &Device, routed: &Routed, tokens: usize) -> Result<(), DeviceError> {
        Finalize {
            x: self.sum.all(),
            add: false,
            shared: None,
            out: self.out.all(),
            weights: routed.weights.all(),
            tokens: None,
            rows: tokens,
            top_k: self.shape.top_k,
            hidden: self.shape.hidden,
        }
        .launch(device)
    }
}

/// Layers of as many experts as fit beside `others` bytes, at least as many as a token takes.
pub(super) fn that_fit(
    device: &Device,
    shape: MoeShape,
    layers: usize,
    others: usize,
) -> Result<MoeShape, DeviceError> {
    let free = device.memory()?.free_bytes;
    // A part stays free for the driver.
    let room = (free - free / 16).saturating_sub(others) / layers / shape.expert_bytes();
    Ok(MoeShape { experts: room.clamp(shape.top_k, shape.experts), ..shape })
}
