//! Dense products of K2's shapes: their times.

use half::bf16;
use kernels::cuda::{
    Buffer, Dense, DenseFormat, DenseGateUp, DenseInput, DenseLayout, DenseShape, DenseValues, DenseWeight,
    DenseWorkspace, DenseWorkspaceSize, Device, DeviceError, Planes, Slice, Strided, check,
};
use kernels::experts::Activation;

use super::sizes::{LatentShape, MoeShape, Sizes};
use super::{Gpu, doing};
use crate::Error;
use crate::ceilings::Work;

/// Rows and columns of a weight, and the product's name.
pub(super) type Product = (&'static str, usize, usize);

/// The dense products of a layer, and the head.
pub(super) fn products(latent: &LatentShape, moe: &MoeShape, vocab: usize) -> Vec<Product> {
    vec![
        ("q_a", latent.query_rank, moe.hidden),
        ("kv_a", latent.width(), moe.hidden),
        ("q_b", latent.heads * (latent.nope + latent.rope), latent.query_rank),
        ("o", moe.hidden, latent.heads * latent.value),
        ("router", moe.experts, moe.hidden),
        ("shared_down", moe.hidden, moe.inter),
        ("head", vocab, moe.hidden),
    ]
}

/// The shape of a bf16 product.
pub(super) fn shape_of(layout: DenseLayout, rows: usize, columns: usize) -> DenseShape {
    DenseShape { format: DenseFormat::Bf16, layout, rows, columns, heads: 1, planes: 1 }
}

/// A bf16 weight that begins where the slice does.
pub(super) fn weight(values: Slice<'_, bf16>, rows: usize, cols: usize) -> DenseWeight<'_> {
    DenseWeight { values: DenseValues::Bf16(values.slice(..rows * cols)), rows, cols }
}

/// Weights, inputs and outputs that are enough for all of them.
pub(super) struct Operands {
    pub weights: Buffer<bf16>,
    pub x: Buffer<bf16>,
    pub out: Buffer<f32>,
    pub planes: Buffer<bf16>,
    pub workspace: DenseWorkspace,
}

impl Operands {
    pub fn new(
        device: &Device,
        products: &[Product],
        (inter, hidden): (usize, usize),
        tokens: usize,
        weights: usize,
    ) -> Result<Self, DeviceError> {
        let most = |f: fn(&Product) -> usize| products.iter().map(f).max().unwrap_or(0);
        let multiprocessors = device.info().multiprocessors;
        let pair = shape_of(DenseLayout::GateUp, inter, hidden).workspace_size(tokens, multiprocessors);
        let sizes = products.iter().map(|&(_, rows, columns)| {
            shape_of(DenseLayout::Rows, rows, columns).workspace_size(tokens, multiprocessors)
        });
        let workspace = sizes.fold(pair, DenseWorkspaceSize::max);
        let largest = most(|&(_, rows, columns)| rows * columns).max(2 * inter * hidden);
        let operands = Self {
            weights: device.alloc(largest.max(weights))?,
            x: device.alloc(tokens * most(|&(_, _, columns)| columns).max(hidden))?,
            out: device.alloc(tokens * most(|&(_, rows, _)| rows))?,
            planes: device.alloc(tokens * inter)?,
            workspace: DenseWorkspace::new(device, workspace)?,
        };
        check::fill_bf16(device, operands.weights.all(), 21, (0.0, 0.02))?;
        check::fill_bf16(device, operands.x.all(), 22, (0.0, 1.0))?;
        Ok(operands)
    }

    /// Of `tokens` rows of x from `first` on, to rows of `out`, with the weight that begins at `at`.
    pub fn product<'a>(
        &'a self,
        (_, rows, columns): Product,
        (first, tokens): (usize, usize),
        at: usize,
        out: Slice<'a, f32>,
    ) -> Dense<'a> {
        let x = self.x.slice(first * columns..(first + tokens) * columns);
        Dense {
            x: DenseInput::new(Planes::new(x, 1), columns),
            tokens,
            weight: weight(self.weights.slice(at..), rows, columns),
            bias: None,
            out: Strided::new(out, rows),
            add: false,
            workspace: &self.workspace,
        }
    }

    /// Gate and up of the shared expert, which begin at `at`.
    pub fn pair(
        &self,
        (inter, hidden): (usize, usize),
        (first, tokens): (usize, usize),
        at: usize,
    ) -> DenseGateUp<'_> {
        let x = self.x.slice(first * hidden..(first + tokens) * hidden);
        DenseGateUp {
            x: DenseInput::new(Planes::new(x, 1), hidden),
            tokens,
            gate: weight(self.weights.slice(at..), inter, hidden),
            up: weight(self.weights.slice(at + inter * hidden..), inter, hidden),
            bias: None,
            activation: Activation::SiluGlu,
            out: Planes::new(&self.planes, 1),
            out_stride: inter,
            workspace: &self.workspace,
        }
    }
}

pub(super) fn measure(gpu: &mut Gpu<'_>, sizes: &Sizes) -> Result<(), Error> {
    let (device, timed) = (gpu.device, &sizes.timed);
    let (inter, hidden) = (timed.moe.inter, timed.moe.hidden);
    let products = products(&timed.latent, &timed.moe, timed.vocab);
    let most = timed.dense_tokens.iter().copied().max().unwrap_or(1);
    let operands = Operands::new(device, &products, (inter, hidden), most, timed.turn_bytes / 2);
    let operands = operands.map_err(|error| doing("make dense weights", error))?;
    let turns_of = |values: usize| (operands.weights.len() / values).clamp(1, 8 * timed.turns);
    let work = |weights: usize, tokens: usize, inputs: usize, outputs: usize| Work {
        bytes: (2 * weights + tokens * (2 * inputs + outputs)) as u64,
        operations: 2 * (tokens * weights) as u64,
    };
    for &tokens in &timed.dense_tokens {
        for &product in &products {
            let (name, rows, columns) = product;
            if !gpu.has_time() {
                continue;
            }
            let values = rows * columns;
            let launch = |turn: usize| {
                let out = operands.out.slice(..tokens * rows);
                operands.product(product, (0, tokens), turn * values, out).launch(device)
            };
            let work = work(values, tokens, columns, 4 * rows);
            gpu.time(&format!("gpu/dense/bf16/{name}/t{tokens}"), turns_of(values), work, launch)?;
        }
        if !gpu.has_time() {
            continue;
        }
        let values = 2 * inter * hidden;
        let launch = |turn: usize| operands.pair((inter, hidden), (0, tokens), turn * values).launch(device);
        let work = work(values, tokens, hidden, 2 * inter);
        gpu.time(&format!("gpu/dense/bf16/shared_pair/t{tokens}"), turns_of(values), work, launch)?;
    }
    Ok(())
}
