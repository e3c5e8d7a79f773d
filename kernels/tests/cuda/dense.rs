//! Dense products on the device: against f64, and that a token has the same bits whatever stands beside it.

mod parts;

use half::bf16;
use kernels::cuda::{
    Buffer, Dense, DenseInput, DenseShape, DenseValues, DenseWeight, DenseWorkspace, DenseWorkspaceSize,
    Device, DeviceError, Planes, Strided, VendorProducts,
};
use kernels::experts::Activation;
use kernels::{Matrix, Values, reference};

use self::parts::PairCase;
use crate::common::{Format, Random, Weight, assert_close, bits};
use crate::mock::{self, Gpu};

type Result<T = ()> = std::result::Result<T, DeviceError>;

/// Every tile shape and its edges: of each three, which stand for the three orders of threads.
const COUNTS: [usize; 15] = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129];
const FORMATS: [Format; 2] = [Format::Bf16, Format::Fp8];

/// A weight's bytes on the device.
enum Uploaded {
    Bf16(Buffer<u8>),
    Fp8(Buffer<u8>, Buffer<f32>),
}

impl Uploaded {
    fn new(device: &Device, matrix: &Matrix<'_>) -> Result<Self> {
        let float = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
        Ok(match matrix.values {
            Values::Bf16(bytes) => Self::Bf16(device.upload(bytes)?),
            Values::Fp8 { values, scales } => {
                let scales: Vec<f32> = scales.chunks_exact(4).map(float).collect();
                Self::Fp8(device.upload(values)?, device.upload(&scales)?)
            }
            _ => panic!("no dense format"),
        })
    }

    fn weight(&self, matrix: &Matrix<'_>) -> DenseWeight<'_> {
        let values = match self {
            Self::Bf16(bytes) => DenseValues::Bf16(bytes.all().cast()),
            Self::Fp8(codes, scales) => DenseValues::Fp8 { codes: codes.all(), scales: scales.all() },
        };
        DenseWeight { values, rows: matrix.rows, cols: matrix.cols }
    }
}

/// Rows of x, each with a few values after it that no product may read, as planes and as what these add up to.
struct Input {
    planes: Vec<bf16>,
    count: usize,
    width: usize,
    stride: usize,
    sums: Vec<f32>,
}

impl Input {
    fn new(x: &[f32], width: usize, count: usize) -> Self {
        let (rows, stride) = (x.len() / width, width + 8);
        let mut planes = vec![bf16::NAN; count * rows * stride];
        let mut sums = x.to_vec();
        for (i, x) in x.iter().enumerate() {
            let mut rest = *x;
            for plane in 0..count {
                let part = bf16::from_f32(rest);
                planes[(plane * rows + i / width) * stride + i % width] = part;
                rest -= part.to_f32();
            }
            sums[i] -= rest;
        }
        Self { planes, count, width, stride, sums }
    }

    fn random(random: &mut Random, rows: usize, width: usize, count: usize) -> Self {
        Self::new(&random.values(rows * width), width, count)
    }

    /// Some of its rows.
    fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        let x = &self.sums[rows.start * self.width..rows.end * self.width];
        Self::new(x, self.width, self.count)
    }

    fn len(&self) -> usize {
        self.sums.len() / self.width
    }
}

/// Runs `launch` with a workspace, twice if nothing is added up, because the first must leave it as it was.
fn twice(
    device: &Device,
    shape: DenseShape,
    tokens: usize,
    launch: impl Fn(&DenseWorkspace) -> Result,
) -> Result {
    let size = shape.workspace_size(tokens, device.info().multiprocessors);
    let workspace = DenseWorkspace::new(device, size)?;
    launch(&workspace)?;
    launch(&workspace)
}

/// A product over all options of it.
struct Case {
    weight: Weight,
    bias: Option<Vec<f32>>,
    /// What is in the output at first, and whether the product is added to it.
    before: f32,
    add: bool,
}

impl Case {
    fn new(random: &mut Random, format: Format, (rows, cols): (usize, usize), bias: bool) -> Self {
        let bias = bias.then(|| random.values(rows));
        Self { weight: Weight::random(random, format, rows, cols), bias, before: 0.25, add: false }
    }

    fn run(&self, device: &Device, input: &Input) -> Result<Vec<f32>> {
        let (matrix, tokens) = (self.weight.matrix(), input.len());
        let stride = matrix.rows + 3;
        let (x, uploaded) = (device.upload(&input.planes)?, Uploaded::new(device, &matrix)?);
        let bias = self.bias.as_ref().map(|bias| device.upload(bias)).transpose()?;
        let out = device.upload(&vec![self.before; tokens * stride])?;
        let weight = uploaded.weight(&matrix);
        let x = DenseInput { planes: Planes::new(&x, input.count), stride: input.stride };
        let empty = DenseWorkspace::new(device, DenseWorkspaceSize::default())?;
        let (bias, out_rows) = (bias.as_ref().map(Buffer::all), Strided::new(&out, stride));
        let op = Dense { x, tokens, weight, bias, out: out_rows, add: self.add, workspace: &empty };
        twice(device, op.shape(), tokens, |workspace| {
            if self.add {
                out.write(&vec![self.before; tokens * stride])?;
            }
            Dense { workspace, ..op }.launch(device)
        })?;
        let out = out.read()?;
        let (own, beside): (Vec<_>, Vec<_>) = out.chunks(stride).map(|row| row.split_at(matrix.rows)).unzip();
        assert!(beside.concat().iter().all(|value| *value == self.before), "values beside the output");
        Ok(own.concat())
    }

    fn check(&self, got: &[f32], input: &Input, what: &str) {
        let matrix = self.weight.matrix();
        let mut want = reference::matmul(&input.sums, &matrix, self.bias.as_deref());
        if self.add {
            want.iter_mut().for_each(|want| *want += f64::from(self.before));
        }
        assert_close(got, &want, &magnitudes(&input.sums, &matrix), 1e-6, what);
    }
}

/// Sums of magnitudes, and one for bias and what was there.
fn magnitudes(x: &[f32], matrix: &Matrix<'_>) -> Vec<f64> {
    let weights = reference::dequantize(matrix);
    let dot = |x: &[f32], w: &[f32]| -> f64 { x.iter().zip(w).map(|(a, b)| f64::from((a * b).abs())).sum() };
    let rows = |x| weights.chunks_exact(matrix.cols).map(move |w| 1.0 + dot(x, w));
    x.chunks_exact(matrix.cols).flat_map(rows).collect()
}

#[test]
fn dense_products_match_in_f64() {
    mock::in_every_order(|device| {
        let mut random = Random(1);
        for format in FORMATS {
            for (planes, tokens) in mock::thinned([(1, 5), (3, 5), (1, 40), (3, 34), (1, 70)], 3) {
                let shapes = [((70, 264), true, false), ((33, 16), false, true), ((8, 2600), true, true)];
                for (shape, bias, add) in mock::thinned(shapes, 2) {
                    let case = Case { add, ..Case::new(&mut random, format, shape, bias) };
                    let input = Input::random(&mut random, tokens, shape.1, planes);
                    let got = case.run(device, &input).unwrap();
                    case.check(
                        &got,
                        &input,
                        &format!("{format:?} {shape:?}, {planes} planes, {tokens} tokens"),
                    );
                }
            }
        }
    });
}

#[test]
fn a_dense_token_has_the_same_bits_in_every_batch() {
    mock::by_turns(|device, turn| {
        let mut random = Random(2);
        for format in FORMATS {
            for planes in [1, 3] {
                // One piece; and several, the last of them shorter.
                for shape in mock::thinned([(130, 200), (72, 904)], 2) {
                    let case = Case { add: true, ..Case::new(&mut random, format, shape, true) };
                    let input = Input::random(&mut random, 130, shape.1, planes);
                    let all = case.run(device, &input).unwrap();
                    for (_, count) in COUNTS.into_iter().enumerate().filter(|(i, _)| turn.has(*i)) {
                        let first = 130 - count;
                        let got = case.run(device, &input.rows(first..130)).unwrap();
                        let what = format!("{format:?}, {planes} planes, {count} tokens of {shape:?}");
                        assert_eq!(bits(&got), bits(&all[first * shape.0..]), "{what}");
                    }
                }
            }
        }
    });
}

#[test]
fn a_dense_token_has_the_same_bits_on_a_device_of_any_size() {
    let mut seen = Vec::new();
    // With two multiprocessors the blocks for many tokens take all pieces; with more they share them.
    for gpu in [Gpu::H100, Gpu::H100.with_multiprocessors(2)] {
        mock::in_every_order_like(gpu, |device| {
            let mut random = Random(8);
            let mut all: Vec<u32> = Vec::new();
            for format in mock::thinned(FORMATS, 2) {
                for (planes, tokens) in mock::thinned([(1, 70), (3, 34)], 2) {
                    let input = Input::random(&mut random, tokens, 904, planes);
                    let case = Case::new(&mut random, format, (72, 904), true);
                    all.extend(bits(&case.run(device, &input).unwrap()));
                    let [gate, up] = [(); 2].map(|()| Weight::random(&mut random, format, 45, 904));
                    let pair = PairCase { gate, up, bias: None, activation: Activation::SiluGlu };
                    let out = pair.run(device, &input).unwrap();
                    all.extend(out.iter().map(|value| u32::from(value.to_bits())));
                }
            }
            seen.push(all);
        });
    }
    assert!(seen.iter().all(|all| *all == seen[0]));
}

#[test]
fn not_a_number_stays_with_its_row_and_token() {
    mock::in_every_order(|device| {
        let (rows, cols, tokens) = (70, 392, 66);
        for format in FORMATS {
            let mut random = Random(3);
            let weight = Weight::random(&mut random, format, rows, cols);
            let mut bytes = weight.matrix();
            let mut values = match bytes.values {
                Values::Bf16(values) | Values::Fp8 { values, .. } => values.to_vec(),
                _ => unreachable!(),
            };
            // Weight (20, 390), whose row has no other.
            match &mut bytes.values {
                Values::Bf16(own) => {
                    values[2 * (20 * cols + 390)..][..2].copy_from_slice(&bf16::NAN.to_le_bytes());
                    *own = &values;
                }
                Values::Fp8 { values: own, .. } => {
                    values[20 * cols + 390] = 0xff;
                    *own = &values;
                }
                _ => unreachable!(),
            }
            let mut x = random.values(tokens * cols);
            x[3 * cols + 5] = f32::NAN;
            let input = Input::new(&x, cols, 1);
            for count in [5, tokens] {
                let x = device.upload(&input.rows(0..count).planes).unwrap();
                let uploaded = Uploaded::new(device, &bytes).unwrap();
                let out = device.zeroed(count * rows).unwrap();
                let x = DenseInput { planes: Planes::new(&x, 1), stride: cols + 8 };
                let empty = DenseWorkspace::new(device, DenseWorkspaceSize::default()).unwrap();
                let op = Dense {
                    x,
                    tokens: count,
                    weight: uploaded.weight(&bytes),
                    bias: None,
                    out: Strided::new(&out, rows),
                    add: false,
                    workspace: &empty,
                };
                twice(device, op.shape(), count, |workspace| Dense { workspace, ..op }.launch(device))
                    .unwrap();
                for (i, value) in out.read().unwrap().into_iter().enumerate() {
                    let expected = i / rows == 3 || i % rows == 20;
                    assert_eq!(value.is_nan(), expected, "{format:?}: token {}, row {}", i / rows, i % rows);
                }
            }
        }
    });
}

#[test]
fn dense_products_replay_as_a_graph() {
    mock::in_every_order(|device| {
        let mut random = Random(6);
        let weight = Weight::random(&mut random, Format::Bf16, 40, 600);
        let (matrix, inputs) = (weight.matrix(), [1, 2].map(|_| Input::random(&mut random, 3, 600, 1)));
        let uploaded = Uploaded::new(device, &matrix).unwrap();
        let x = device.upload(&inputs[0].planes).unwrap();
        let out = device.zeroed(3 * 40).unwrap();
        let empty = DenseWorkspace::new(device, DenseWorkspaceSize::default()).unwrap();
        let op = Dense {
            x: DenseInput { planes: Planes::new(&x, 1), stride: 608 },
            tokens: 3,
            weight: uploaded.weight(&matrix),
            bias: None,
            out: Strided::new(&out, 40),
            add: false,
            workspace: &empty,
        };
        let size = op.shape().workspace_size(3, device.info().multiprocessors);
        assert!(size.counters > 0, "k is cut");
        let workspace = DenseWorkspace::new(device, size).unwrap();
        let graph = device.capture(|| Dense { workspace: &workspace, ..op }.launch(device)).unwrap();
        for input in &inputs {
            x.write(&input.planes).unwrap();
            graph.launch().unwrap();
            let want = reference::matmul(&input.sums, &matrix, None);
            assert_close(&out.read().unwrap(), &want, &magnitudes(&input.sums, &matrix), 1e-6, "replayed");
        }
    });
}

#[test]
fn the_vendors_products_are_close_or_say_that_they_are_absent() {
    mock::on_device(|device| {
        let vendor = match VendorProducts::open(device) {
            Ok(vendor) if mock::on_real_device() => vendor,
            // A library that is installed cannot work with the mock's driver, whatever it returns.
            Ok(_) => return println!("SKIP: cuBLASLt needs a device"),
            Err(error) => {
                let absent = error.to_string().contains("there is no library libcublasLt.so.12");
                assert!(absent || !mock::on_real_device(), "{error}");
                return println!("SKIP: {error}");
            }
        };
        let mut random = Random(7);
        let (rows, cols, tokens, stride) = (136, 512, 70, 144);
        let weight = Weight::random(&mut random, Format::Bf16, rows, cols);
        let (matrix, input) = (weight.matrix(), Input::random(&mut random, tokens, cols, 1));
        let (x, uploaded) = (device.upload(&input.planes).unwrap(), Uploaded::new(device, &matrix).unwrap());
        let bias = random.values(rows);
        let uploaded_bias = device.upload(&bias).unwrap();
        let empty = DenseWorkspace::new(device, DenseWorkspaceSize::default()).unwrap();
        let out = device.zeroed(tokens * stride).unwrap();
        let op = Dense {
            x: DenseInput { planes: Planes::new(&x, 1), stride: input.stride },
            tokens,
            weight: uploaded.weight(&matrix),
            bias: Some(uploaded_bias.all()),
            out: Strided::new(&out, stride),
            add: false,
            workspace: &empty,
        };
        vendor.launch(device, &op).unwrap();
        vendor.launch(device, &Dense { bias: None, add: true, ..op }).unwrap();
        let want = reference::matmul(&input.sums, &matrix, None);
        let size = magnitudes(&input.sums, &matrix);
        for (t, row) in out.read().unwrap().chunks(stride).enumerate() {
            let want: Vec<f64> = (0..rows).map(|r| 2.0 * want[t * rows + r] + f64::from(bias[r])).collect();
            assert_close(&row[..rows], &want, &size[t * rows..][..rows], 4e-6, "cuBLASLt");
        }
        assert!(vendor.launch(device, &Dense { tokens: 64, ..op }).is_err(), "few tokens");
    });
}
