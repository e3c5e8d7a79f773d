//! Experts on the device against plain sums in f64, which round where the kernels round; and against each
//! other, bit for bit.

use half::bf16;
use kernels::cuda::{
    Buffer, Device, ExpertAddress, ExpertFormat, ExpertsDown, ExpertsUp, GroupedPairs, Multiply, Order,
    Planes, Tiles, WeightAddress,
};
use kernels::experts::Activation;
use kernels::format::{FP8_BLOCK, GROUP, Matrix, Values};
use kernels::reference;

use crate::mock;

const FORMATS: [ExpertFormat; 4] =
    [ExpertFormat::Bf16, ExpertFormat::Fp8, ExpertFormat::Int4, ExpertFormat::Mxfp4];
const GPT_OSS: Activation = Activation::ClampedSwiGlu { limit: 7.0, alpha: 1.702 };

/// Numbers that look random and are the same everywhere.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// Between -1 and 1.
    fn signed(&mut self) -> f32 {
        self.next() as f32 / (1u32 << 30) as f32 - 1.0
    }

    fn signed_rows(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.signed()).collect()
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.next() as usize % (i + 1));
        }
    }
}

/// A weight on the host.
#[derive(Clone)]
struct Weight {
    format: ExpertFormat,
    rows: usize,
    columns: usize,
    codes: Vec<u8>,
    scales: Vec<u8>,
    bias: Option<Vec<f32>>,
}

impl Weight {
    fn new(
        numbers: &mut Numbers,
        format: ExpertFormat,
        (rows, columns): (usize, usize),
        biased: bool,
    ) -> Self {
        let values = rows * columns;
        let groups = rows * columns.div_ceil(GROUP);
        let mut bytes = |count: usize| -> Vec<u8> { (0..count).map(|_| numbers.next() as u8).collect() };
        let (codes, scales) = match format {
            ExpertFormat::Bf16 => {
                let values = numbers.signed_rows(values);
                (values.iter().flat_map(|v| bf16::from_f32(v * 0.2).to_le_bytes()).collect(), Vec::new())
            }
            ExpertFormat::Fp8 => {
                // No NaN among them.
                let codes = bytes(values).into_iter().map(|code| if code & 0x7f == 0x7f { 0 } else { code });
                let codes = codes.collect();
                let blocks = rows.div_ceil(FP8_BLOCK) * columns.div_ceil(FP8_BLOCK);
                let scales = numbers.signed_rows(blocks);
                (codes, scales.iter().flat_map(|v| (v * 0.002).to_le_bytes()).collect())
            }
            ExpertFormat::Int4 => {
                let codes = bytes(values / 2);
                let scales = numbers.signed_rows(groups);
                (codes, scales.iter().flat_map(|v| bf16::from_f32(v * 0.03).to_le_bytes()).collect())
            }
            ExpertFormat::Mxfp4 => {
                let codes = bytes(values / 2);
                (codes, bytes(groups).into_iter().map(|code| 120 + code % 6).collect())
            }
        };
        let bias = biased.then(|| numbers.signed_rows(rows));
        Self { format, rows, columns, codes, scales, bias }
    }

    fn matrix(&self) -> Matrix<'_> {
        let (codes, scales) = (&self.codes[..], &self.scales[..]);
        let values = match self.format {
            ExpertFormat::Bf16 => Values::Bf16(codes),
            ExpertFormat::Fp8 => Values::Fp8 { values: codes, scales },
            ExpertFormat::Int4 => Values::Int4 { packed: codes, scales },
            ExpertFormat::Mxfp4 => Values::Mxfp4 { blocks: codes, scales },
        };
        Matrix::new(values, self.rows, self.columns)
    }

    /// Rows of both by turns.
    fn interleaved(&self, other: &Self) -> Self {
        fn zip(a: &[u8], b: &[u8], rows: usize) -> Vec<u8> {
            let length = (a.len() / rows).max(1);
            a.chunks(length).zip(b.chunks(length)).flat_map(|(a, b)| [a, b].concat()).collect()
        }
        let biases = self.bias.as_ref().zip(other.bias.as_ref());
        Self {
            rows: 2 * self.rows,
            codes: zip(&self.codes, &other.codes, self.rows),
            scales: zip(&self.scales, &other.scales, self.rows),
            bias: biases.map(|(a, b)| a.iter().zip(b).flat_map(|(a, b)| [*a, *b]).collect()),
            ..*self
        }
    }

    /// Dot products of every row with x, and the sums of their magnitudes.
    fn times(&self, weights: &[f32], x: &[f64]) -> Vec<(f64, f64)> {
        let dot = |row: usize| {
            let products = x.iter().zip(&weights[row * self.columns..]).map(|(x, w)| x * f64::from(*w));
            let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[row]));
            products.fold((bias, bias.abs()), |(sum, all), p| (sum + p, all + p.abs()))
        };
        (0..self.rows).map(dot).collect()
    }
}

struct Expert {
    gate: Weight,
    up: Weight,
    down: Weight,
}

/// Experts, and pairs by expert.
struct Case {
    format: ExpertFormat,
    hidden: usize,
    inter: usize,
    planes: usize,
    top_k: usize,
    activation: Activation,
    interleaved: bool,
    experts: Vec<Expert>,
    x: Vec<f32>,
    order: Vec<i32>,
    offsets: Vec<i32>,
}

impl Case {
    /// An expert has as many pairs as `counts` says.
    fn new(format: ExpertFormat, (hidden, inter): (usize, usize), planes: usize, counts: &[usize]) -> Self {
        let mut numbers = Numbers((hidden * 1000 + inter * 10 + planes) as u64);
        let mut expert = || {
            let mut weight = |rows, columns| Weight::new(&mut numbers, format, (rows, columns), false);
            Expert { gate: weight(inter, hidden), up: weight(inter, hidden), down: weight(hidden, inter) }
        };
        let experts = counts.iter().map(|_| expert()).collect();
        let pairs: usize = counts.iter().sum();
        let top_k = 3;
        let mut order: Vec<i32> = (0..pairs as i32).collect();
        numbers.shuffle(&mut order);
        let mut offsets = vec![0];
        for count in counts {
            let first = offsets[offsets.len() - 1] as usize;
            order[first..first + count].sort();
            offsets.push((first + count) as i32);
        }
        let x = numbers.signed_rows(pairs.div_ceil(top_k) * hidden);
        let activation = Activation::SiluGlu;
        let interleaved = false;
        Self { format, hidden, inter, planes, top_k, activation, interleaved, experts, x, order, offsets }
    }

    /// As gpt-oss has it: limits, biases, gate and up by turns where the format allows it.
    fn gpt_oss(mut self) -> Self {
        let mut numbers = Numbers(7);
        self.activation = GPT_OSS;
        self.interleaved = self.format != ExpertFormat::Fp8;
        for expert in &mut self.experts {
            for weight in [&mut expert.gate, &mut expert.up, &mut expert.down] {
                // Large enough that limits matter.
                weight.bias = Some(numbers.signed_rows(weight.rows).iter().map(|b| b * 9.0).collect());
            }
        }
        self
    }

    fn run(&self, device: &Device, how: How) -> Outcome {
        let mut kept = Vec::new();
        let mut addresses = Vec::new();
        for expert in &self.experts {
            let mut upload = |weight: &Weight| upload(device, &mut kept, weight);
            let down = upload(&expert.down);
            addresses.push(if self.interleaved {
                let both = upload(&expert.gate.interleaved(&expert.up));
                ExpertAddress::interleaved(self.format, self.hidden, both, down)
            } else {
                ExpertAddress { gate: upload(&expert.gate), up: upload(&expert.up), down }
            });
        }
        let experts = device.upload(&ExpertAddress::table(&addresses)).unwrap();
        let tokens = self.x.len() / self.hidden;
        // The last token need not have all of its pairs.
        let pairs = tokens * self.top_k;
        let mut order = self.order.clone();
        order.resize(pairs, -1);
        let order = device.upload(&order).unwrap();
        let units = reference::units(&self.offsets, how.unit);
        // More room than there are units, as in a launch that does not know how many there will be.
        let mut list = units.concat();
        list.resize(list.len() + 8, u32::MAX);
        let (list, unit_count) =
            (device.upload(&list).unwrap(), device.upload(&[units.len() as u32]).unwrap());
        let x = device.upload(&self.plane_rows(&self.x, self.hidden)).unwrap();
        let inner_stride = pairs * self.inter + 8;
        let inner = device.alloc::<bf16>(inner_stride * self.planes).unwrap();
        let out = device.alloc::<f32>(pairs * self.hidden).unwrap();
        let grouped = GroupedPairs {
            experts: experts.all(),
            order: order.all(),
            units: list.all(),
            unit_count: unit_count.all(),
            format: self.format,
            tiles: how.tiles,
            multiply: how.multiply,
            hidden: self.hidden,
            inter: self.inter,
        };
        let inner_planes = Planes::new(&inner, self.planes);
        let up = ExpertsUp {
            pairs: grouped,
            x: Planes::new(&x, self.planes),
            tokens,
            top_k: self.top_k,
            inner: inner_planes,
            inner_order: self.format.order(),
            activation: self.activation,
            interleaved: self.interleaved,
        };
        up.launch(device).unwrap();
        ExpertsDown { pairs: grouped, inner: inner_planes, count: pairs, out: out.all() }
            .launch(device)
            .unwrap();
        Outcome { inner: inner.read().unwrap(), inner_stride, out: out.read().unwrap() }
    }

    /// Planes of rows, in the order of the format.
    fn plane_rows(&self, rows: &[f32], width: usize) -> Vec<bf16> {
        let order = self.format.order();
        let mut all = Vec::new();
        for plane in reference::planes(rows, self.planes) {
            for row in plane.chunks(width) {
                let mut ordered = vec![bf16::ZERO; width];
                row.iter().enumerate().for_each(|(column, value)| ordered[order.position(column)] = *value);
                all.extend(ordered);
            }
        }
        all
    }

    /// What x and inner are when planes have rounded them.
    fn rounded(&self, row: &[f32]) -> Vec<f64> {
        let planes = reference::planes(row, self.planes);
        (0..row.len()).map(|i| planes.iter().map(|plane| plane[i].to_f64()).sum()).collect()
    }

    fn inner_row(&self, outcome: &Outcome, place: usize) -> Vec<f64> {
        let order = self.format.order();
        let value = |column| -> f64 {
            let at = place * self.inter + order.position(column);
            (0..self.planes).map(|plane| outcome.inner[plane * outcome.inner_stride + at].to_f64()).sum()
        };
        (0..self.inter).map(value).collect()
    }

    fn check(&self, outcome: &Outcome) {
        for (e, expert) in self.experts.iter().enumerate() {
            let weights = [&expert.gate, &expert.up, &expert.down];
            let [gate, up, down] = weights.map(|weight| reference::dequantize(&weight.matrix()));
            for place in self.offsets[e] as usize..self.offsets[e + 1] as usize {
                let pair = self.order[place] as usize;
                let x = self.rounded(&self.x[pair / self.top_k * self.hidden..][..self.hidden]);
                let inner = self.inner_row(outcome, place);
                let (gates, ups) = (expert.gate.times(&gate, &x), expert.up.times(&up, &x));
                for (r, (gate, up)) in gates.iter().zip(&ups).enumerate() {
                    let expected = reference::activate(self.activation, gate.0, up.0);
                    // Slopes of the activation are below 1.2 and the other factor.
                    let magnitude = gate.1 * 1.2 * (up.0.abs() + 1.0) + up.1 * (gate.0.abs() + 1.0);
                    let rounding = expected.abs() * if self.planes == 1 { 1.0 / 256.0 } else { 1e-7 };
                    self.close(inner[r], expected, 1e-6 * magnitude + rounding, ("inner", place, r));
                }
                for (h, (expected, magnitude)) in expert.down.times(&down, &inner).into_iter().enumerate() {
                    let value = f64::from(outcome.out[pair * self.hidden + h]);
                    self.close(value, expected, 1e-6 * magnitude, ("out", pair, h));
                }
            }
        }
    }

    fn close(&self, value: f64, expected: f64, tolerance: f64, (what, row, column): (&str, usize, usize)) {
        let Self { format, hidden, inter, planes, .. } = self;
        assert!(
            (value - expected).abs() <= tolerance || value.is_nan() && expected.is_nan(),
            "{format:?} {hidden} x {inter}, {planes} planes: {what} {row}, {column}: {value}, not {expected}"
        );
    }
}

/// One way to compute it.
#[derive(Clone, Copy, Debug)]
struct How {
    tiles: Tiles,
    multiply: Multiply,
    unit: usize,
}

const FEW: How = How { tiles: Tiles::Few, multiply: Multiply::Mma, unit: 64 };
const WIDE: How = How { tiles: Tiles::Wide, multiply: Multiply::Mma, unit: 128 };
const WGMMA: How = How { tiles: Tiles::Wide, multiply: Multiply::Wgmma, unit: 128 };
const ALL: [How; 3] = [FEW, WIDE, WGMMA];

struct Outcome {
    inner: Vec<bf16>,
    inner_stride: usize,
    out: Vec<f32>,
}

impl Outcome {
    fn bits(&self, case: &Case) -> (Vec<u16>, Vec<u32>) {
        let used = case.order.len() * case.inter;
        let planes = self.inner.chunks(self.inner_stride).flat_map(|plane| &plane[..used]);
        let out = case.order.iter().flat_map(|&pair| &self.out[pair as usize * case.hidden..][..case.hidden]);
        (planes.map(|v| v.to_bits()).collect(), out.map(|v| v.to_bits()).collect())
    }
}

fn upload(device: &Device, kept: &mut Vec<Buffer<u8>>, weight: &Weight) -> WeightAddress {
    let mut put = |bytes: &[u8]| {
        if bytes.is_empty() {
            return 0;
        }
        kept.push(device.upload(bytes).unwrap());
        kept[kept.len() - 1].address()
    };
    let bias: Option<Vec<u8>> =
        weight.bias.as_ref().map(|bias| bias.iter().flat_map(|b| b.to_le_bytes()).collect());
    WeightAddress {
        codes: put(&weight.codes),
        scales: put(&weight.scales),
        bias: put(&bias.unwrap_or_default()),
    }
}

/// Shapes whose last tiles are partial in every way that a format allows.
fn shapes(format: ExpertFormat) -> &'static [(usize, usize)] {
    match format.order() {
        Order::Natural => &[(32, 24), (96, 40), (72, 200), (256, 136), (512, 72)],
        Order::Nibble => &[(32, 32), (64, 96), (96, 160), (352, 32), (512, 96), (256, 288)],
    }
}

#[test]
fn int4_is_right_in_every_order() {
    mock::in_every_order(|device| {
        let case = Case::new(ExpertFormat::Int4, (256, 64), 1, &[1, 5, 0, 12]);
        for how in ALL {
            case.check(&case.run(device, how));
        }
    });
}

#[test]
fn other_formats_are_right_in_every_order() {
    mock::in_every_order(|device| {
        for (format, shape) in FORMATS.into_iter().zip([(136, 72), (264, 136), (96, 64), (288, 32)]) {
            let case = Case::new(format, shape, 1, &[9, 1]).gpt_oss();
            for how in ALL {
                case.check(&case.run(device, how));
            }
            let case = Case { planes: 3, ..case };
            case.check(&case.run(device, FEW));
        }
    });
}

#[test]
fn every_format_is_right_in_every_shape() {
    mock::in_every_order(|device| {
        for format in FORMATS {
            for (i, shape) in mock::thinned(shapes(format).iter().enumerate(), 3) {
                for planes in [1, 3] {
                    let counts: &[usize] = if i == 2 { &[17, 0, 9, 2] } else { &[1, 0, 7] };
                    let case = Case::new(format, *shape, planes, counts);
                    case.check(&case.run(device, FEW));
                    let case = case.gpt_oss();
                    case.check(&case.run(device, FEW));
                }
            }
        }
    });
}

#[test]
fn what_is_not_a_number_stays_in_its_row() {
    mock::in_every_order(|device| {
        for how in ALL {
            for format in [ExpertFormat::Fp8, ExpertFormat::Mxfp4] {
                let case = || Case::new(format, (160, 96), 1, &[3, 2]);
                let plant = |weight: &mut Weight, row: usize, column: usize| match format {
                    ExpertFormat::Fp8 => {
                        weight.codes[row * weight.columns + column] = 0x7f | (row as u8) << 7
                    }
                    _ => weight.scales[row * weight.columns / GROUP + column / GROUP] = 255,
                };
                let mut gate = case();
                plant(&mut gate.experts[1].gate, 41, 159);
                let outcome = gate.run(device, how);
                gate.check(&outcome);
                assert!(gate.inner_row(&outcome, 4)[41].is_nan());
                let mut down = case();
                plant(&mut down.experts[0].down, 8, 3);
                plant(&mut down.experts[1].down, 159, 90);
                let outcome = down.run(device, how);
                down.check(&outcome);
                assert_eq!(outcome.out.iter().filter(|value| value.is_nan()).count(), 5 + down.hidden);
            }
        }
    });
}

#[test]
fn a_missing_wait_shows() {
    mock::assert_caught("FAULT_NO_COPY_WAIT", "experts::int4_is_right_in_every_order");
}

#[test]
fn a_wrong_fragment_shows() {
    mock::assert_caught("FAULT_FRAGMENT_INDEX", "experts::int4_is_right_in_every_order");
}

#[test]
fn a_missing_wait_for_products_shows() {
    mock::assert_caught("FAULT_NO_WGMMA_WAIT", "experts::int4_is_right_in_every_order");
}

#[test]
fn every_kernel_gives_the_same_bits() {
    // Of every number of columns; more in a unit than a block takes at once.
    let units = |how: How, units: &[usize]| units.iter().map(|&unit| How { unit, ..how }).collect::<Vec<_>>();
    let all = [units(FEW, &[1, 12, 31, 200]), units(WIDE, &[128, 50]), units(WGMMA, &[50, 128])].concat();
    let counts: &[usize] =
        if mock::is_sanitized() { &[0, 1, 9, 65] } else { &[0, 1, 2, 7, 8, 9, 17, 64, 65, 130] };
    mock::by_turns(|device, turn| {
        for (i, format) in FORMATS.into_iter().enumerate() {
            let shape = if format.order() == Order::Natural { (328, 40) } else { (288, 64) };
            let case = Case::new(format, shape, 1, counts).gpt_oss();
            let first = case.run(device, FEW);
            case.check(&first);
            let expected = first.bits(&case);
            for (_, how) in all.iter().enumerate().filter(|(j, _)| turn.has(i + j)) {
                assert!(case.run(device, *how).bits(&case) == expected, "{format:?} {how:?}");
            }
            if turn.has(i) {
                let case = Case { planes: 3, ..case };
                let expected = case.run(device, FEW).bits(&case);
                for how in [How { unit: 5, ..FEW }, WIDE] {
                    assert!(case.run(device, how).bits(&case) == expected, "{format:?}, 3 planes: {how:?}");
                }
            }
        }
    });
}

#[test]
fn blocks_take_more_than_one_item() {
    // Of which few are resident at once.
    mock::in_every_order_like(mock::Gpu::H100.with_multiprocessors(4), |device| {
        let case = Case::new(ExpertFormat::Int4, (64, 64), 1, &[0, 40, 1]);
        let expected = case.run(device, FEW);
        case.check(&expected);
        for how in ALL {
            let how = How { unit: 1, ..how };
            assert!(case.run(device, how).bits(&case) == expected.bits(&case), "{how:?}");
        }
        // And none at all.
        let case = Case { offsets: vec![0; 4], ..case };
        case.run(device, FEW);
    });
}
