//! Products of which heads take a part of the weight each, and of gate and up with their activation.

use half::bf16;
use kernels::cuda::{
    Buffer, DenseGateUp, DenseHeads, DenseInput, DenseWorkspace, DenseWorkspaceSize, Device, Planes, Strided,
};
use kernels::experts::Activation;
use kernels::{Matrix, reference};

use super::{FORMATS, Input, Result, Uploaded, magnitudes, twice};
use crate::common::{Random, Weight, assert_close, bits};
use crate::mock;

/// A weight of which heads take rows, as `kv_b` of latent attention.
struct HeadCase {
    weight: Weight,
    first_row: usize,
    row_stride: usize,
    rows: usize,
    heads: usize,
    transposed: bool,
}

impl HeadCase {
    fn widths(&self) -> (usize, usize) {
        let (rows, cols) = (self.rows, self.weight.cols);
        if self.transposed { (rows, cols) } else { (cols, rows) }
    }

    fn run(&self, device: &Device, input: &Input) -> Result<Vec<f32>> {
        let (matrix, tokens, (columns, outputs)) = (self.weight.matrix(), input.len(), self.widths());
        let (x, uploaded) = (device.upload(&input.planes)?, Uploaded::new(device, &matrix)?);
        let out = device.upload(&vec![0.5; tokens * self.heads * (outputs + 2)])?;
        let empty = DenseWorkspace::new(device, DenseWorkspaceSize::default())?;
        let op = DenseHeads {
            x: DenseInput { planes: Planes::new(&x, input.count), stride: input.stride },
            x_head_stride: columns,
            tokens,
            weight: uploaded.weight(&matrix),
            first_row: self.first_row,
            row_stride: self.row_stride,
            rows: self.rows,
            heads: self.heads,
            transposed: self.transposed,
            out: Strided::new(&out, self.heads * (outputs + 2)),
            out_head_stride: outputs + 2,
            workspace: &empty,
        };
        twice(device, op.shape(), tokens, |workspace| DenseHeads { workspace, ..op }.launch(device))?;
        let out = out.read()?;
        let (own, beside): (Vec<_>, Vec<_>) =
            out.chunks(outputs + 2).map(|row| row.split_at(outputs)).unzip();
        assert!(beside.concat().iter().all(|value| *value == 0.5), "values beside the output");
        Ok(own.concat())
    }

    fn check(&self, got: &[f32], input: &Input, what: &str) {
        let (matrix, (columns, outputs)) = (self.weight.matrix(), self.widths());
        for (place, x) in input.sums.chunks_exact(columns).enumerate() {
            let own = matrix.slice(self.first_row + place % self.heads * self.row_stride, self.rows);
            let product = |x: &[f32], w: &Matrix<'_>| match self.transposed {
                true => reference::matmul_transposed(x, w, None),
                false => reference::matmul(x, w, None),
            };
            // No sum of magnitudes is larger than this.
            let size = x.iter().map(|x| f64::from(x.abs())).sum::<f64>() * greatest(&own) + 1e-3;
            let got = &got[place * outputs..][..outputs];
            assert_close(got, &product(x, &own), &vec![size; outputs], 1e-6, what);
        }
    }
}

fn greatest(matrix: &Matrix<'_>) -> f64 {
    reference::dequantize(matrix).iter().fold(0.0, |a, w| a.max(f64::from(w.abs())))
}

#[test]
fn heads_take_their_rows_both_ways() {
    mock::in_every_order(|device| {
        let mut random = Random(4);
        for format in FORMATS {
            for transposed in [false, true] {
                // Heads that blocks of scales do not end with; as in the published models; tiny.
                let shapes = [(3, 72, 136, 72), (2, 128, 256, 64), (3, 16, 32, 24)];
                for (heads, rows, row_stride, cols) in mock::thinned(shapes, 3) {
                    let first_row = row_stride - rows;
                    let weight = Weight::random(&mut random, format, heads * row_stride, cols);
                    let case = HeadCase { weight, first_row, row_stride, rows, heads, transposed };
                    let width = heads * case.widths().0;
                    let planes: &[usize] = if rows == 72 { &[1, 3] } else { &[1] };
                    for &planes in planes {
                        let what =
                            format!("{format:?} {rows} x {cols}, transposed: {transposed}, {planes} planes");
                        let input = Input::random(&mut random, 70, width, planes);
                        let all = case.run(device, &input).unwrap();
                        case.check(&all, &input, &what);
                        for count in [3, 20] {
                            let got = case.run(device, &input.rows(70 - count..70)).unwrap();
                            assert_eq!(bits(&got), bits(&all[all.len() / 70 * (70 - count)..]), "{what}");
                        }
                    }
                }
            }
        }
    });
}

pub struct PairCase {
    pub gate: Weight,
    pub up: Weight,
    pub bias: Option<Vec<f32>>,
    pub activation: Activation,
}

impl PairCase {
    /// Planes `[count][tokens][rows]`.
    pub fn run(&self, device: &Device, input: &Input) -> Result<Vec<bf16>> {
        let (gate_matrix, up_matrix, tokens) = (self.gate.matrix(), self.up.matrix(), input.len());
        let (gate, up) = (Uploaded::new(device, &gate_matrix)?, Uploaded::new(device, &up_matrix)?);
        let x = device.upload(&input.planes)?;
        let bias = self.bias.as_ref().map(|bias| device.upload(bias)).transpose()?;
        let (rows, stride) = (gate_matrix.rows, gate_matrix.rows + 5);
        let out = device.upload(&vec![bf16::NEG_ONE; input.count * tokens * stride])?;
        let empty = DenseWorkspace::new(device, DenseWorkspaceSize::default())?;
        let op = DenseGateUp {
            x: DenseInput { planes: Planes::new(&x, input.count), stride: input.stride },
            tokens,
            gate: gate.weight(&gate_matrix),
            up: up.weight(&up_matrix),
            bias: bias.as_ref().map(Buffer::all),
            activation: self.activation,
            out: Planes::new(&out, input.count),
            out_stride: stride,
            workspace: &empty,
        };
        twice(device, op.shape(), tokens, |workspace| DenseGateUp { workspace, ..op }.launch(device))?;
        let out = out.read()?;
        let (own, beside): (Vec<_>, Vec<_>) = out.chunks(stride).map(|row| row.split_at(rows)).unzip();
        assert!(beside.concat().iter().all(|value| *value == bf16::NEG_ONE), "values beside the output");
        Ok(own.concat())
    }

    fn check(&self, got: &[bf16], input: &Input, what: &str) {
        let rows = self.gate.rows;
        let biases =
            |first| self.bias.as_ref().map(|b| b.iter().skip(first).step_by(2).copied().collect::<Vec<_>>());
        let side = |weight: &Weight, first| {
            let bias = biases(first);
            reference::matmul(&input.sums, &weight.matrix(), bias.as_deref())
        };
        let size = |weight: &Weight| magnitudes(&input.sums, &weight.matrix());
        let (gates, ups) = (side(&self.gate, 0), side(&self.up, 1));
        let (gate_sizes, up_sizes) = (size(&self.gate), size(&self.up));
        let plane = input.len() * rows;
        for i in 0..plane {
            let value: f64 = (0..input.count).map(|p| f64::from(got[p * plane + i].to_f32())).sum();
            let want = reference::activate(self.activation, gates[i], ups[i]);
            // The derivatives of the activation are at most about 1.1 times the other side, and 1.
            let sums = 3e-6 * (gate_sizes[i] * (up_sizes[i] + 1.0) + up_sizes[i] * gate_sizes[i]);
            let rounding = if input.count == 1 { want.abs() / 256.0 } else { 0.0 };
            assert!((value - want).abs() <= sums + rounding, "{what}: [{i}] is {value}, should be {want}");
        }
    }
}

#[test]
fn gate_and_up_share_blocks_and_are_activated() {
    mock::in_every_order(|device| {
        let mut random = Random(5);
        let clamped = Activation::ClampedSwiGlu { limit: 1.5, alpha: 1.702 };
        for format in FORMATS {
            let cases = [(1, Activation::SiluGlu), (3, clamped), (3, Activation::SiluGlu), (1, clamped)];
            for (planes, activation) in mock::thinned(cases, 2) {
                let (rows, cols) = (45, 392);
                let bias = (planes == 1).then(|| random.values(2 * rows));
                let gate = Weight::random(&mut random, format, rows, cols);
                let up = Weight::random(&mut random, format, rows, cols);
                let case = PairCase { gate, up, bias, activation };
                let what = format!("{format:?}, {planes} planes, {activation:?}");
                let input = Input::random(&mut random, 66, cols, planes);
                let all = case.run(device, &input).unwrap();
                case.check(&all, &input, &what);
                for count in [1, 17, 64] {
                    let got = case.run(device, &input.rows(66 - count..66)).unwrap();
                    for (plane, got) in got.chunks(count * rows).enumerate() {
                        let first = (plane * 66 + 66 - count) * rows;
                        assert_eq!(got, &all[first..][..count * rows], "{what}, {count} tokens");
                    }
                }
            }
        }
    });
}
