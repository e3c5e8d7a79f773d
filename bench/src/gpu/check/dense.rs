//! Dense products against plain ones.

use kernels::cuda::{Buffer, Device, DeviceError, ExpertFormat, check};
use kernels::experts::Activation;
use kernels::reference::activate;

use super::super::dense::{Operands, Product, products};
use super::super::sizes::Checked;
use super::super::{Finding, Gpu, doing};
use super::words::Compare;
use super::{BF16, SUMS};
use crate::Error;

/// Outputs that a check compares at most.
const MOST_OUTPUTS: usize = 4 << 20;
/// Tokens of the pair, which is compared on the host.
const PAIR_TOKENS: usize = 8;

/// Plain results, and where to compare.
struct Bench<'a> {
    device: &'a Device,
    compare: Compare<'a>,
    x: Buffer<f32>,
    want: Buffer<f64>,
    magnitudes: Buffer<f64>,
    again: Buffer<f32>,
}

pub(super) fn measure(gpu: &mut Gpu<'_>, checked: &Checked) -> Result<(), Error> {
    let device = gpu.device;
    let failed = |error| doing("prepare dense products", error);
    let (inter, hidden) = (checked.moe.inter, checked.moe.hidden);
    let products = products(&checked.latent, &checked.moe, checked.vocab);
    let most = checked.dense_tokens.iter().copied().max().unwrap_or(1);
    let operands = Operands::new(device, &products, (inter, hidden), most, 0).map_err(failed)?;
    // As the kernels see it: bf16.
    let x: Vec<f32> = operands.x.read().map_err(failed)?.into_iter().map(f32::from).collect();
    let bench = || {
        Ok(Bench {
            device,
            compare: Compare::new(device)?,
            x: device.upload(&x)?,
            want: device.alloc(MOST_OUTPUTS.min(operands.out.len().max(most * inter)))?,
            magnitudes: device.alloc(MOST_OUTPUTS.min(operands.out.len().max(most * inter)))?,
            again: device.alloc(operands.out.len())?,
        })
    };
    let bench = bench().map_err(failed)?;
    for &tokens in &checked.dense_tokens {
        for &product in &products {
            if gpu.has_time() {
                let name = format!("gpu/check/{}/dense/{}/t{tokens}", checked.name, product.0);
                bench.product(gpu, &name, &operands, product, tokens)?;
            }
        }
        if gpu.has_time() {
            let name = format!("gpu/check/{}/dense/shared_pair/t{tokens}", checked.name);
            bench.pair(gpu, &name, &operands, (inter, hidden), tokens)?;
        }
    }
    Ok(())
}

impl Bench<'_> {
    fn product(
        &self,
        gpu: &mut Gpu<'_>,
        name: &str,
        operands: &Operands,
        product: Product,
        tokens: usize,
    ) -> Result<(), Error> {
        let failed = |error| doing(name, error);
        let Self { device, compare, again, .. } = self;
        let (_, rows, _) = product;
        let (out, again) = (operands.out.slice(..tokens * rows), again.slice(..tokens * rows));
        out.zero().and_then(|()| again.zero()).map_err(failed)?;
        let once = || operands.product(product, (0, tokens), 0, out).launch(device);
        let times = gpu.runs(2, once).map_err(failed)?;
        operands.product(product, (0, tokens), 0, again).launch(device).map_err(failed)?;
        let repeated = compare.differences(out.cast(), again.cast()).map_err(failed)?;
        let error = self.worst(operands, product, tokens).map_err(failed)?;
        // The last token alone.
        let last = tokens - 1;
        let alone = again.slice(..rows);
        operands.product(product, (last, 1), 0, alone).launch(device).map_err(failed)?;
        let in_batch = out.slice(last * rows..);
        let alone = compare.differences(in_batch.cast(), alone.cast()).map_err(failed)?;
        let findings = [
            Finding::error("error", error, SUMS),
            Finding::differences("differ_when_repeated", repeated),
            Finding::differences("differ_when_alone", alone),
        ];
        gpu.checked(name, times, &findings)
    }

    /// Of as many outputs as there is room for.
    fn worst(&self, operands: &Operands, product: Product, tokens: usize) -> Result<f64, DeviceError> {
        let (_, rows, columns) = product;
        let mut worst = 0.0f64;
        // Tokens from the end, where tiles are not full.
        let tokens_checked = (MOST_OUTPUTS / rows).clamp(1, tokens);
        let first = tokens - tokens_checked;
        for first in [0, first] {
            self.plain((first, tokens_checked), 0, (rows, columns), operands)?;
            let outputs = tokens_checked * rows;
            let got = operands.out.slice(first * rows..first * rows + outputs);
            let (want, magnitudes) = (self.want.slice(..outputs), self.magnitudes.slice(..outputs));
            worst = worst.max(self.compare.worst(got, want, Some(magnitudes))?);
            if tokens_checked == tokens {
                break;
            }
        }
        Ok(worst)
    }

    fn plain(
        &self,
        (first, tokens): (usize, usize),
        at: usize,
        (rows, columns): (usize, usize),
        operands: &Operands,
    ) -> Result<(), DeviceError> {
        check::PlainProduct {
            x: self.x.slice(first * columns..(first + tokens) * columns),
            codes: operands.weights.slice(at..).cast(),
            scales: None,
            format: ExpertFormat::Bf16,
            first_row: 0,
            rows,
            columns,
            tokens,
            out: self.want.all(),
            magnitudes: self.magnitudes.all(),
        }
        .launch(self.device)
    }

    /// Of the sums of gate and up the activation is taken here.
    fn pair(
        &self,
        gpu: &mut Gpu<'_>,
        name: &str,
        operands: &Operands,
        (inter, hidden): (usize, usize),
        tokens: usize,
    ) -> Result<(), Error> {
        let failed = |error| doing(name, error);
        let checked = tokens.min(PAIR_TOKENS).min((MOST_OUTPUTS / inter).max(1));
        let first = tokens - checked;
        operands.planes.zero().map_err(failed)?;
        let once = || operands.pair((inter, hidden), (0, tokens), 0).launch(self.device);
        let times = gpu.runs(2, once).map_err(failed)?;
        let got = operands.planes.slice(..tokens * inter).read().map_err(failed)?;
        once().map_err(failed)?;
        let again = operands.planes.slice(..tokens * inter).read().map_err(failed)?;
        let repeated = got.iter().zip(&again).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        let last = tokens - 1;
        operands.pair((inter, hidden), (last, 1), 0).launch(self.device).map_err(failed)?;
        let alone = operands.planes.slice(..inter).read().map_err(failed)?;
        let alone = alone.iter().zip(&got[last * inter..]).filter(|(a, b)| a.to_bits() != b.to_bits());
        let alone = alone.count();
        let outputs = checked * inter;
        let plain = |at| {
            self.plain((first, checked), at, (inter, hidden), operands)?;
            Ok((self.want.slice(..outputs).read()?, self.magnitudes.slice(..outputs).read()?))
        };
        let (gate, gate_magnitude) = plain(0).map_err(failed)?;
        let (up, up_magnitude) = plain(inter * hidden).map_err(failed)?;
        let got = &got[first * inter..];
        let error = (0..outputs).map(|i| {
            let want = activate(Activation::SiluGlu, gate[i], up[i]);
            // The slope of silu is at most 1.1.
            let sums = SUMS * (1.1 * gate_magnitude[i] * up[i].abs() + up_magnitude[i] * gate[i].abs());
            let error = (f64::from(got[i]) - want).abs() / (want.abs() * BF16 + sums + 1e-30);
            if error.is_nan() { f64::INFINITY } else { error }
        });
        let findings = [
            Finding::error("error", error.fold(0.0, f64::max), 1.0),
            Finding::differences("differ_when_repeated", repeated as u32),
            Finding::differences("differ_when_alone", alone as u32),
        ];
        gpu.checked(name, times, &findings)
    }
}
