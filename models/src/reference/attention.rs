//! Attention, plainly: rows gathered by block table, all scores at once, mask, softmax, sum. Latent
//! attention is materialised (keys and values of every position are projected from the latent on
//! every pass), the other form than the fast paths' absorbed one (`models-maths.md` 1.2).

use candle_core::{D, Device, Tensor};
use candle_nn::ops::softmax_last_dim;
use kernels::attention::{PAGE, RowShape};
use kernels::rope::Rotation;

use super::tensors::{Tensors, rms_norm, tensor, values};
use crate::batch::{Batch, SequenceSpan};
use crate::config::{Gqa, LayerSpec, Mla, QkNorm, Rope};
use crate::error::Result;
use crate::weights::{GqaWeights, MlaQueryWeights, MlaWeights};

/// Most scores held at once; queries beyond are taken in turns. No score depends on another query.
const SCORES: usize = 32 << 20;

/// The rows one layer caches: keys and values, or latent with rotated key.
pub(super) struct LayerCache {
    /// Per kind of row its width and the rows by slot `[slots, width]`.
    kinds: Vec<(usize, Vec<f32>)>,
}

impl LayerCache {
    /// Zeroed; the system gives memory to rows as they are first written.
    pub(super) fn new(layer: &LayerSpec, slots: usize) -> Self {
        let rows = |shape: &RowShape| (shape.values(), vec![0.0; slots * shape.values()]);
        Self { kinds: layer.cache_rows().shapes().iter().map(rows).collect() }
    }

    /// The values of a block, kind after kind.
    pub(super) fn block(&self, block: u32) -> impl Iterator<Item = &f32> {
        self.kinds
            .iter()
            .flat_map(move |(width, rows)| &rows[block as usize * PAGE * width..][..PAGE * width])
    }

    /// As [`LayerCache::block`], to write to.
    pub(super) fn block_mut(&mut self, block: u32) -> impl Iterator<Item = &mut f32> {
        self.kinds.iter_mut().flat_map(move |(width, rows)| {
            let len = PAGE * *width;
            &mut rows[block as usize * len..][..len]
        })
    }

    /// Writes one row per slot: `rows` is `[slots, width]`.
    fn write(&mut self, kind: usize, slots: &[u32], rows: &Tensor) -> Result<()> {
        let (width, cache) = &mut self.kinds[kind];
        for (&slot, row) in slots.iter().zip(values(rows)?.chunks_exact(*width)) {
            cache[slot as usize * *width..][..*width].copy_from_slice(row);
        }
        Ok(())
    }

    /// The rows of positions `0 .. count` of one sequence `[count, width]`.
    fn gather(&self, kind: usize, table: &[u32], count: usize) -> Result<Tensor> {
        let (width, cache) = &self.kinds[kind];
        let mut rows = Vec::with_capacity(count * width);
        for position in 0..count {
            let slot = table[position / PAGE] as usize * PAGE + position % PAGE;
            rows.extend_from_slice(&cache[slot * width..][..*width]);
        }
        Ok(Tensor::from_vec(rows, (count, *width), &Device::Cpu)?)
    }
}

/// Grouped-query attention of `x` `[tokens, hidden]`, already normed.
pub(super) fn gqa(
    spec: &Gqa,
    weights: &GqaWeights,
    epsilon: f32,
    x: &Tensor,
    batch: &Batch,
    cache: &mut LayerCache,
    tensors: &mut Tensors,
) -> Result<Tensor> {
    let tokens = batch.tokens.len();
    let mut q = tensors.linear(x, &weights.q)?;
    let mut k = tensors.linear(x, &weights.k)?;
    let v = tensors.linear(x, &weights.v)?;

    let norm = |x: Tensor, weight: &Option<Vec<f32>>| match weight {
        Some(weight) => rms_norm(&x, weight, epsilon),
        None => Ok(x),
    };
    if matches!(spec.qk_norm, QkNorm::Whole { .. }) {
        (q, k) = (norm(q, &weights.q_norm)?, norm(k, &weights.k_norm)?);
    }
    q = q.reshape((tokens, spec.heads, spec.head_dim))?;
    k = k.reshape((tokens, spec.kv_heads, spec.head_dim))?;
    if matches!(spec.qk_norm, QkNorm::PerHead { .. }) {
        (q, k) = (norm(q, &weights.q_norm)?, norm(k, &weights.k_norm)?);
    }
    if let Some(rope) = &spec.rope {
        (q, k) = (rotate(&q, rope, &batch.positions)?, rotate(&k, rope, &batch.positions)?);
    }
    if matches!(spec.qk_norm, QkNorm::PerHeadAfterRope { .. }) {
        (q, k) = (norm(q, &weights.q_norm)?, norm(k, &weights.k_norm)?);
    }
    let places = batch.places(spec.block_kind());
    cache.write(0, &places.slots, &k)?;
    cache.write(1, &places.slots, &v)?;

    let rule = Rule { scale: spec.scale, window: spec.window, sinks: weights.sinks.as_deref() };
    let mut outputs = Vec::new();
    for span in &batch.sequences {
        let (start, end) = positions(batch, span);
        let q = q.narrow(0, span.first, span.tokens)?;
        let shape = (end, spec.kv_heads, spec.head_dim);
        let k = cache.gather(0, places.table(span), end)?.reshape(shape)?;
        let v = cache.gather(1, places.table(span), end)?.reshape(shape)?;
        outputs.push(attend(&q, &k, &v, &rule, start)?);
    }
    tensors.linear(&Tensor::cat(&outputs, 0)?, &weights.o)
}

/// Latent attention of `x` `[tokens, hidden]`, already normed.
pub(super) fn mla(
    spec: &Mla,
    weights: &MlaWeights,
    x: &Tensor,
    batch: &Batch,
    cache: &mut LayerCache,
    tensors: &mut Tensors,
) -> Result<Tensor> {
    let Mla { heads, nope_dim, rope_dim, value_dim, kv_rank, .. } = *spec;
    let tokens = batch.tokens.len();
    let rotated = |x: Tensor| match &spec.rope {
        Some(rope) => rotate(&x, rope, &batch.positions),
        None => Ok(x),
    };
    let q = match &weights.query {
        MlaQueryWeights::Direct(q) => tensors.linear(x, q)?,
        MlaQueryWeights::LowRank { a, norm, b } => {
            let low = rms_norm(&tensors.linear(x, a)?, norm, spec.latent_epsilon)?;
            tensors.linear(&low, b)?
        }
    };
    // Each head is [nope | rope].
    let q = q.reshape((tokens, heads, nope_dim + rope_dim))?;
    let q_rope = rotated(q.narrow(2, nope_dim, rope_dim)?)?;
    let q = Tensor::cat(&[&q.narrow(2, 0, nope_dim)?, &q_rope], 2)?;

    // [latent | key part that all heads share].
    let kv = tensors.linear(x, &weights.kv_a)?;
    let latent = rms_norm(&kv.narrow(1, 0, kv_rank)?, &weights.kv_norm, spec.latent_epsilon)?;
    let k_rope = rotated(kv.narrow(1, kv_rank, rope_dim)?.unsqueeze(1)?)?.squeeze(1)?;
    cache.write(0, &batch.full.slots, &Tensor::cat(&[&latent, &k_rope], 1)?)?;

    let rule = Rule { scale: spec.scale, window: None, sinks: None };
    let mut outputs = Vec::new();
    for span in &batch.sequences {
        let (start, end) = positions(batch, span);
        let rows = cache.gather(0, batch.full.table(span), end)?;
        // Per head rows [W_UK | W_UV]: [end, heads, nope + value].
        let latent = rows.narrow(1, 0, kv_rank)?.contiguous()?;
        let up = tensors.linear(&latent, &weights.kv_b)?.reshape((end, heads, nope_dim + value_dim))?;
        let k_rope = rows.narrow(1, kv_rank, rope_dim)?.unsqueeze(1)?.broadcast_as((end, heads, rope_dim))?;
        let k = Tensor::cat(&[up.narrow(2, 0, nope_dim)?, k_rope], 2)?;
        let v = up.narrow(2, nope_dim, value_dim)?;
        let q = q.narrow(0, span.first, span.tokens)?;
        outputs.push(attend(&q, &k, &v, &rule, start)?);
    }
    tensors.linear(&Tensor::cat(&outputs, 0)?, &weights.o)
}

/// First position of a span's new tokens, and the positions there are after them.
fn positions(batch: &Batch, span: &SequenceSpan) -> (usize, usize) {
    let start = batch.positions[span.first] as usize;
    (start, start + span.tokens)
}

/// What decides the weights of one layer's attention beside queries and keys.
struct Rule<'a> {
    scale: f32,
    window: Option<usize>,
    sinks: Option<&'a [f32]>,
}

/// Queries `[n, heads, width]` at positions `start ..` over keys `[m, kv_heads, width]` and values
/// `[m, kv_heads, value width]` of positions `0 ..`; the result is `[n, heads * value width]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, rule: &Rule<'_>, start: usize) -> Result<Tensor> {
    let (n, heads, width) = q.dims3()?;
    let (m, kv_heads, value_width) = v.dims3()?;
    // Query heads h * group .. (h + 1) * group share key head h.
    let group = heads / kv_heads;
    let k = k.permute((1, 2, 0))?; // [kv_heads, width, m]
    let v = v.transpose(0, 1)?; // [kv_heads, m, value width]
    let step = (SCORES / (heads * m)).clamp(1, n);
    let mut outputs = Vec::new();
    for first in (0..n).step_by(step) {
        let rows = step.min(n - first);
        let q = q.narrow(0, first, rows)?.reshape((rows, kv_heads, group, width))?;
        let q = q.permute((1, 2, 0, 3))?.reshape((kv_heads, group * rows, width))?;
        let scores = (q.matmul(&k)? * f64::from(rule.scale))?.reshape((heads, rows, m))?;
        let scores = scores.broadcast_add(&mask(start + first, rows, m, rule.window)?)?;
        let weights = softmax(&scores, rule.sinks)?.reshape((kv_heads, group * rows, m))?;
        let out = weights.matmul(&v)?.reshape((kv_heads, group, rows, value_width))?;
        outputs.push(out.permute((2, 0, 1, 3))?.reshape((rows, heads * value_width))?);
    }
    Ok(Tensor::cat(&outputs, 0)?)
}

/// Softmax of `[heads, rows, m]` over m; a head's sink joins the sum and has no value.
fn softmax(scores: &Tensor, sinks: Option<&[f32]>) -> Result<Tensor> {
    let Some(sinks) = sinks else { return Ok(softmax_last_dim(scores)?) };
    let (heads, rows, m) = scores.dims3()?;
    let column = tensor(sinks, (heads, 1, 1))?.broadcast_as((heads, rows, 1))?;
    let weights = softmax_last_dim(&Tensor::cat(&[scores, &column.contiguous()?], D::Minus1)?)?;
    Ok(weights.narrow(2, 0, m)?.contiguous()?)
}

/// `[rows, m]`: 0 where the query at position `start + row` sees key `j`, minus infinity elsewhere.
fn mask(start: usize, rows: usize, m: usize, window: Option<usize>) -> Result<Tensor> {
    let mut mask = vec![f32::NEG_INFINITY; rows * m];
    for (row, mask) in mask.chunks_exact_mut(m).enumerate() {
        let position = start + row;
        let oldest = window.map_or(0, |window| (position + 1).saturating_sub(window));
        mask[oldest..=position].fill(0.0);
    }
    Ok(Tensor::from_vec(mask, (rows, m), &Device::Cpu)?)
}

/// Rotates the first `rope.dim` values of every head of `x` `[tokens, heads, width]`: pair j by the
/// angle `position * inv_freq[j]`, `(a, b) -> (a cos - b sin, b cos + a sin)`.
fn rotate(x: &Tensor, rope: &Rope, positions: &[u32]) -> Result<Tensor> {
    let (tokens, heads, width) = x.dims3()?;
    let pairs = rope.dim / 2;
    let table = |of: fn(f32) -> f32| {
        let angles = positions.iter().flat_map(|&p| rope.inv_freq.iter().map(move |f| p as f32 * f));
        let table: Vec<f32> = angles.map(|angle| of(angle) * rope.attention_scale).collect();
        tensor(&table, (tokens, 1, pairs))
    };
    let (cos, sin) = (table(f32::cos)?, table(f32::sin)?);
    let (a, b) = match rope.rotation {
        Rotation::Half => (x.narrow(2, 0, pairs)?, x.narrow(2, pairs, pairs)?),
        Rotation::Interleaved => {
            let x = x.narrow(2, 0, rope.dim)?.reshape((tokens, heads, pairs, 2))?;
            (x.narrow(3, 0, 1)?.squeeze(3)?, x.narrow(3, 1, 1)?.squeeze(3)?)
        }
    };
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let rotated = match rope.rotation {
        Rotation::Half => Tensor::cat(&[&first, &second], 2)?,
        Rotation::Interleaved => Tensor::stack(&[&first, &second], 3)?.reshape((tokens, heads, rope.dim))?,
    };
    if rope.dim == width {
        return Ok(rotated);
    }
    Ok(Tensor::cat(&[&rotated, &x.narrow(2, rope.dim, width - rope.dim)?], 2)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both pairings against complex multiplication in f64; the tail stays.
    #[test]
    fn a_rotation_multiplies_pairs_by_a_phase() {
        let x: Vec<f32> = (0..2 * 3 * 6).map(|i| (i as f32 * 0.7).sin()).collect();
        let positions = [5, 1000];
        for rotation in [Rotation::Half, Rotation::Interleaved] {
            let rope = Rope { dim: 4, rotation, inv_freq: vec![1.0, 0.01], attention_scale: 1.5 };
            let got = values(&rotate(&tensor(&x, (2, 3, 6)).unwrap(), &rope, &positions).unwrap()).unwrap();
            for (head, (got, x)) in got.chunks_exact(6).zip(x.chunks_exact(6)).enumerate() {
                for j in 0..2 {
                    let (a, b) = match rotation {
                        Rotation::Half => (j, j + 2),
                        Rotation::Interleaved => (2 * j, 2 * j + 1),
                    };
                    let angle = f64::from(positions[head / 3]) * [1.0, 0.01][j];
                    let (sin, cos) = angle.sin_cos();
                    let want = f64::from(x[a]) * cos - f64::from(x[b]) * sin;
                    assert!((f64::from(got[a]) - 1.5 * want).abs() < 1e-5, "{rotation:?} {head} {j}");
                    let want = f64::from(x[b]) * cos + f64::from(x[a]) * sin;
                    assert!((f64::from(got[b]) - 1.5 * want).abs() < 1e-5, "{rotation:?} {head} {j}");
                }
                assert_eq!(got[4..], x[4..]);
            }
        }
    }

    #[test]
    fn the_mask_is_causal_and_windowed() {
        let seen = |window| -> Vec<u8> {
            let mask = values(&mask(2, 2, 4, window).unwrap()).unwrap();
            mask.into_iter().map(|m| u8::from(m == 0.0)).collect()
        };
        assert_eq!(seen(None), [1, 1, 1, 0, 1, 1, 1, 1]);
        assert_eq!(seen(Some(2)), [0, 1, 1, 0, 0, 0, 1, 1]);
    }

    /// Equal scores: m keys and a sink of the same logit share the weight in m + 1 parts.
    #[test]
    fn a_sink_takes_its_share() {
        let scores = tensor(&[0.0; 6], (2, 1, 3)).unwrap();
        let weights = values(&softmax(&scores, Some(&[0.0, f32::NEG_INFINITY])).unwrap()).unwrap();
        for (got, want) in weights.into_iter().zip([0.25, 0.25, 0.25, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
    }
}
