//! Routing, grouping and routed experts: against their references, plain products, and each other.

use half::bf16;
use kernels::cuda::{Buffer, Device, DeviceError, ExpertFormat, Multiply, Order, Slice, check};
use kernels::experts::Activation;
use kernels::reference::{self, activate};

use super::super::experts::{How, Layer, Routed, Rows, Weight, that_fit};
use super::super::sizes::{Checked, MoeShape};
use super::super::{Finding, Gpu, doing};
use super::words::{Compare, spread};
use super::{BF16, SUMS};
use crate::Error;
use crate::row::Times;
use crate::seeded::Seeded;

/// Pairs of a token and an expert whose every value is compared with plain sums.
const SAMPLED_PAIRS: usize = 12;
/// Tokens whose routing is compared.
const SAMPLED_TOKENS: usize = 64;

/// A layer, and rows for the largest check.
struct Bench<'a> {
    device: &'a Device,
    shape: MoeShape,
    layer: Layer,
    rows: Rows,
    /// The same x on the host: it has few bits, so that rounding changes nothing.
    x: Vec<f32>,
    compare: Compare<'a>,
    plain: Plain,
}

/// Where plain products of one pair go.
struct Plain {
    x: Buffer<f32>,
    want: Buffer<f64>,
    magnitudes: Buffer<f64>,
}

/// What some kernels gave.
struct Given {
    inner: Buffer<bf16>,
    out: Buffer<f32>,
}

pub(super) fn measure(gpu: &mut Gpu<'_>, checked: &Checked) -> Result<(), Error> {
    let device = gpu.device;
    let failed = |error| doing(format!("make a layer of {} experts", checked.name), error);
    let most = checked.expert_tokens.iter().copied().max().unwrap_or(1);
    // Two results beside the one that is being made.
    let others = 3 * Rows::bytes(&checked.moe, most) + most * checked.moe.experts * 4;
    let shape = that_fit(device, checked.moe, 1, others).map_err(failed)?;
    if shape.experts < checked.moe.experts {
        gpu.note(&format!("correctness: memory for {} of {} experts", shape.experts, checked.moe.experts));
    }
    let bench = Bench::new(device, shape, most).map_err(failed)?;
    for &tokens in &checked.expert_tokens {
        if gpu.has_time() {
            bench.tokens(gpu, &format!("gpu/check/{}/experts/t{tokens}", checked.name), tokens)?;
        }
    }
    Ok(())
}

impl<'a> Bench<'a> {
    fn new(device: &'a Device, shape: MoeShape, tokens: usize) -> Result<Self, DeviceError> {
        let layer = Layer::new(device, &shape, 50)?;
        let rows = Rows::new(device, &shape, tokens)?;
        let mut seeded = Seeded::new(51);
        let x: Vec<f32> =
            (0..tokens * shape.hidden).map(|_| (seeded.below(255) as f32 - 127.0) / 128.0).collect();
        rows.x.write(&x)?;
        rows.split(device, tokens)?;
        let widest = shape.hidden.max(shape.inter);
        let plain = Plain {
            x: device.alloc(widest)?,
            want: device.alloc(widest)?,
            magnitudes: device.alloc(widest)?,
        };
        Ok(Self { device, shape, layer, rows, x, compare: Compare::new(device)?, plain })
    }

    fn tokens(&self, gpu: &mut Gpu<'_>, name: &str, tokens: usize) -> Result<(), Error> {
        let device = self.device;
        let failed = |error| doing(name, error);
        let routed = Routed::new(device, &self.shape, tokens, 60 + tokens as u64).map_err(failed)?;
        self.routing(gpu, name, &routed, tokens)?;
        let pairs = spread(SAMPLED_PAIRS, tokens * self.shape.top_k);
        let mut first: Option<Given> = None;
        for how in How::all(device) {
            let name = format!("{name}/{}", how.name());
            let failed = |error| doing(&name, error);
            let (given, times) = self.run(gpu, &routed, tokens, how).map_err(failed)?;
            let (again, _) = self.run(gpu, &routed, tokens, how).map_err(failed)?;
            let mut findings = self.errors(&routed, &given, &pairs).map_err(failed)?;
            let repeated = self.differences(&given, &again).map_err(failed)?;
            findings.push(Finding::differences("differ_when_repeated", repeated));
            drop(again);
            let mut alone = 0;
            for token in spread(2, tokens) {
                alone += self.alone(&routed, &given, token, how).map_err(failed)?;
            }
            findings.push(Finding::differences("differ_when_alone", alone));
            if let Some(first) = &first {
                let count = self.differences(first, &given).map_err(failed)?;
                findings.push(match how.multiply {
                    Multiply::Mma => Finding::differences("differ_from_few", count),
                    // Warp groups need not add up as warps do.
                    Multiply::Wgmma => Finding::told("differ_from_few", count),
                });
            }
            gpu.checked(&name, times, &findings)?;
            first = first.or(Some(given));
        }
        let wrong = self.finalized(&routed, tokens).map_err(failed)?;
        let times = gpu.runs(2, || self.rows.finalize(device, &routed, tokens)).map_err(failed)?;
        let name = format!("{name}/finalize");
        gpu.checked(&name, times, &[Finding::differences("differ_from_chain", wrong)])
    }

    /// Routes and groups, and compares with the references.
    fn routing(&self, gpu: &mut Gpu<'_>, name: &str, routed: &Routed, tokens: usize) -> Result<(), Error> {
        let failed = |error| doing(name, error);
        let (device, shape) = (self.device, &self.shape);
        let times = gpu.runs(2, || routed.route(device, tokens)).map_err(failed)?;
        let logits = routed.logits.read().map_err(failed)?;
        let (ids, weights) = (routed.ids.read().map_err(failed)?, routed.weights.read().map_err(failed)?);
        let (mut wrong, mut worst) = (0, 0.0f64);
        for token in spread(SAMPLED_TOKENS, tokens) {
            let at = token * shape.top_k;
            let (want_ids, want) =
                reference::route(&shape.rule(), &logits[token * shape.experts..][..shape.experts], None);
            for rank in 0..shape.top_k {
                wrong += u32::from(ids[at + rank] != want_ids[rank] as i32);
                worst = worst.max((f64::from(weights[at + rank]) - want[rank]).abs());
            }
        }
        let findings = [Finding::differences("wrong_ids", wrong), Finding::error("error", worst, SUMS)];
        gpu.checked(&format!("{name}/route"), times, &findings)?;

        let times = gpu.runs(2, || routed.group(device, tokens)).map_err(failed)?;
        let (order, offsets) = reference::group(&ids, shape.experts);
        let differ = |got: Vec<i32>, want: Vec<i32>| {
            got.iter().zip(&want).filter(|(a, b)| a != b).count() as u32 + u32::from(got.len() != want.len())
        };
        let findings = [
            Finding::differences("wrong_order", differ(routed.order.read().map_err(failed)?, order)),
            Finding::differences("wrong_offsets", differ(routed.offsets.read().map_err(failed)?, offsets)),
        ];
        gpu.checked(&format!("{name}/group"), times, &findings)
    }

    /// Up and down, twice, into buffers of their own.
    fn run(
        &self,
        gpu: &Gpu<'_>,
        routed: &Routed,
        tokens: usize,
        how: How,
    ) -> Result<(Given, Times), DeviceError> {
        let (device, rows, of) = (self.device, &self.rows, (&self.layer, routed));
        rows.inner.zero()?;
        rows.out.zero()?;
        let times = gpu.runs(2, || {
            rows.up(device, of, tokens, how)?;
            rows.down(device, of, tokens, how)
        })?;
        let pairs = tokens * self.shape.top_k;
        let (inner, out) =
            (device.alloc(pairs * self.shape.inter)?, device.alloc(pairs * self.shape.hidden)?);
        inner.copy_from(rows.inner.slice(..inner.len()))?;
        out.copy_from(rows.out.slice(..out.len()))?;
        Ok((Given { inner, out }, times))
    }

    fn differences(&self, a: &Given, b: &Given) -> Result<u32, DeviceError> {
        let inner = self.compare.differences(a.inner.all().cast(), b.inner.all().cast())?;
        Ok(inner.saturating_add(self.compare.differences(a.out.all().cast(), b.out.all().cast())?))
    }

    /// Worst errors over some pairs, with all of their values: of up by the tolerance, of down by magnitude.
    fn errors(&self, routed: &Routed, given: &Given, pairs: &[usize]) -> Result<Vec<Finding>, DeviceError> {
        let MoeShape { hidden, inter, top_k, .. } = self.shape;
        let (ids, order) = (routed.ids.read()?, routed.order.read()?);
        let (mut up_error, mut down_error) = (0.0f64, 0.0f64);
        for &pair in pairs {
            let (expert, token) = (ids[pair] as usize, pair / top_k);
            let place = order.iter().position(|&p| p as usize == pair).unwrap_or(0);
            let x = &self.x[token * hidden..][..hidden];
            let (gate, gate_magnitude) = self.plain(&self.layer.gate, expert, x)?;
            let (up, up_magnitude) = self.plain(&self.layer.up, expert, x)?;
            let stored = given.inner.slice(place * inter..(place + 1) * inter).read()?;
            let got: Vec<f32> =
                (0..inter).map(|column| stored[Order::Nibble.position(column)].to_f32()).collect();
            for i in 0..inter {
                let want = activate(Activation::SiluGlu, gate[i], up[i]);
                // The slope of silu is at most 1.1.
                let sums = SUMS * (1.1 * gate_magnitude[i] * up[i].abs() + up_magnitude[i] * gate[i].abs());
                let error = (f64::from(got[i]) - want).abs() / (want.abs() * BF16 + sums + 1e-30);
                up_error = up_error.max(if error.is_nan() { f64::INFINITY } else { error });
            }
            // Of what was stored: errors of up are not counted twice.
            self.plain_on_device(&self.layer.down, expert, &got)?;
            let out = given.out.slice(pair * hidden..(pair + 1) * hidden);
            let (want, magnitudes) = (self.plain.want.slice(..hidden), self.plain.magnitudes.slice(..hidden));
            down_error = down_error.max(self.compare.worst(out, want, Some(magnitudes))?);
        }
        Ok(vec![Finding::error("up_error", up_error, 1.0), Finding::error("down_error", down_error, SUMS)])
    }

    fn plain(&self, weight: &Weight, expert: usize, x: &[f32]) -> Result<(Vec<f64>, Vec<f64>), DeviceError> {
        let rows = self.plain_on_device(weight, expert, x)?;
        Ok((self.plain.want.slice(..rows).read()?, self.plain.magnitudes.slice(..rows).read()?))
    }

    fn plain_on_device(&self, weight: &Weight, expert: usize, x: &[f32]) -> Result<usize, DeviceError> {
        let on_device = self.plain.x.slice(..x.len());
        on_device.write(x)?;
        let (codes, scales) = weight.of(expert);
        check::PlainProduct {
            x: on_device,
            codes,
            scales: Some(scales.cast()),
            format: ExpertFormat::Int4,
            first_row: 0,
            rows: weight.rows,
            columns: weight.columns,
            tokens: 1,
            out: self.plain.want.all(),
            magnitudes: self.plain.magnitudes.all(),
        }
        .launch(self.device)?;
        Ok(weight.rows)
    }

    /// Words that differ when a token is computed alone.
    fn alone(&self, routed: &Routed, given: &Given, token: usize, how: How) -> Result<u32, DeviceError> {
        let (device, MoeShape { hidden, top_k, .. }) = (self.device, self.shape);
        let one = Rows::new(device, &self.shape, 1)?;
        let alone = Routed::new(device, &self.shape, 1, 1)?;
        one.x.copy_from(self.rows.x.slice(token * hidden..(token + 1) * hidden))?;
        one.split(device, 1)?;
        alone.ids.copy_from(routed.ids.slice(token * top_k..(token + 1) * top_k))?;
        alone.group(device, 1)?;
        one.up(device, (&self.layer, &alone), 1, how)?;
        one.down(device, (&self.layer, &alone), 1, how)?;
        let in_batch = given.out.slice(token * top_k * hidden..(token + 1) * top_k * hidden);
        self.compare.differences(in_batch.cast(), one.out.all().cast())
    }

    /// Values of some tokens' sums that are not those of a chain of f32 over the ranks.
    fn finalized(&self, routed: &Routed, tokens: usize) -> Result<u32, DeviceError> {
        let MoeShape { hidden, top_k, .. } = self.shape;
        self.rows.finalize(self.device, routed, tokens)?;
        let read = |values: Slice<'_, f32>, token: usize, width: usize| {
            values.slice(token * width..(token + 1) * width).read()
        };
        let mut wrong = 0;
        for token in spread(3, tokens) {
            let out = read(self.rows.out.all(), token, top_k * hidden)?;
            let weights = read(routed.weights.all(), token, top_k)?;
            let got = read(self.rows.sum.all(), token, hidden)?;
            for (column, value) in got.iter().enumerate() {
                let chain = (0..top_k)
                    .fold(0.0f32, |sum, rank| weights[rank].mul_add(out[rank * hidden + column], sum));
                wrong += u32::from(value.to_bits() != chain.to_bits());
            }
        }
        Ok(wrong)
    }
}
