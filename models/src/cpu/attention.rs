//! The mixers on the cpu runner, and the cache they write and read.

use kernels::attention::{BatchQueries, Gqa as GqaShape, Mla as MlaShape, Sequence, gqa_batch, mla_batch};
use kernels::matmul::{Heads, matmul_heads, matmul_transposed_heads};
use kernels::norm::{rms_norm_in_place, rms_norm_rows_in_place};
use kernels::rows::{Rows, RowsMut};

use super::cache::{LayerCache, Store};
use super::{Angles, Step};
use crate::batch::{Batch, Places};
use crate::config::{Gqa, Mixer, Mla, MlaQuery, ModelConfig, QkNorm};
use crate::runner::{Capacity, Component};
use crate::weights::{GqaWeights, MixerWeights, MlaQueryWeights, MlaWeights};

/// Buffers of the mixers, sized for the widest layer.
pub struct AttentionScratch {
    /// Queries `[tokens, heads * query width]`; for MLA with latent queries.
    query: Vec<f32>,
    /// MLA: projected queries `[tokens, heads * (nope + rope)]` and their low rank before that.
    projected: Vec<f32>,
    low_rank: Vec<f32>,
    /// New cache rows, `[tokens, width]`: keys or latents, then values.
    key: Vec<f32>,
    value: Vec<f32>,
    /// What attention gives `[tokens, heads * value width]`; for MLA in latent form.
    mixed: Vec<f32>,
    /// MLA: values per head `[tokens, heads * value]`.
    heads: Vec<f32>,
    /// Partial results of long contexts.
    spans: Vec<f32>,
}

/// Lengths of the buffers of [`AttentionScratch`], in their order.
#[derive(Clone, Copy, Default)]
struct Sizes([usize; 8]);

impl Sizes {
    fn of(config: &ModelConfig, capacity: &Capacity) -> Self {
        let tokens = capacity.batch_tokens;
        let context =
            config.max_positions.min(capacity.blocks.max(capacity.window_blocks) * kernels::attention::PAGE);
        let mut sizes = Self::default();
        for layer in &config.layers {
            let widths = match &layer.mixer {
                Mixer::Gqa(g) => {
                    let (q, kv) = (g.heads * g.head_dim, g.kv_heads * g.head_dim);
                    let spans = gqa_shape(g, None).scratch_len(tokens, context);
                    [tokens * q, 0, 0, tokens * kv, tokens * kv, tokens * q, 0, spans]
                }
                Mixer::Mla(m) => {
                    let row = m.kv_rank + m.rope_dim;
                    let rank = match &m.query {
                        MlaQuery::Direct(_) => 0,
                        MlaQuery::LowRank { a, .. } => a.rows,
                    };
                    [
                        tokens * m.heads * row,
                        tokens * m.heads * (m.nope_dim + m.rope_dim),
                        tokens * rank,
                        tokens * row,
                        0,
                        tokens * m.heads * m.kv_rank,
                        tokens * m.heads * m.value_dim,
                        mla_shape(m).scratch_len(tokens, context),
                    ]
                }
            };
            for (size, width) in sizes.0.iter_mut().zip(widths) {
                *size = (*size).max(width);
            }
        }
        sizes
    }
}

fn gqa_shape<'a>(gqa: &Gqa, sinks: Option<&'a [f32]>) -> GqaShape<'a> {
    let Gqa { heads, kv_heads, head_dim, scale, window, .. } = *gqa;
    GqaShape { heads, kv_heads, head_dim, value_dim: head_dim, scale, window, sinks }
}

fn mla_shape(mla: &Mla) -> MlaShape {
    MlaShape { heads: mla.heads, latent: mla.kv_rank, rope: mla.rope_dim, scale: mla.scale }
}

impl AttentionScratch {
    pub fn new(config: &ModelConfig, capacity: &Capacity) -> Self {
        let [query, projected, low_rank, key, value, mixed, heads, spans] =
            Sizes::of(config, capacity).0.map(|len| vec![0.0; len]);
        Self { query, projected, low_rank, key, value, mixed, heads, spans }
    }

    /// Bytes of all buffers.
    pub fn bytes(config: &ModelConfig, capacity: &Capacity) -> usize {
        4 * Sizes::of(config, capacity).0.iter().sum::<usize>()
    }

    /// `out = mixer(x)`, both `[tokens, hidden]`; writes the new rows of `cache`.
    pub fn run(&mut self, step: &mut Step<'_>, cache: &mut LayerCache, x: &[f32], out: &mut [f32]) {
        step.enter(Component::AttentionProjections);
        match (&step.layer.mixer, &step.weights.mixer) {
            (Mixer::Gqa(gqa), MixerWeights::Gqa(weights)) => self.gqa(step, (gqa, weights), cache, x, out),
            (Mixer::Mla(mla), MixerWeights::Mla(weights)) => self.mla(step, (mla, weights), cache, x, out),
            _ => unreachable!("weights are loaded from the same description"),
        }
    }

    fn gqa(
        &mut self,
        step: &mut Step<'_>,
        (spec, weights): (&Gqa, &GqaWeights),
        cache: &mut LayerCache,
        x: &[f32],
        out: &mut [f32],
    ) {
        let isa = step.isa;
        let tokens = step.batch.tokens.len();
        let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let query = &mut self.query[..tokens * q_width];
        let key = &mut self.key[..tokens * kv_width];
        let value = &mut self.value[..tokens * kv_width];
        step.linear(x, &weights.q, query);
        step.linear(x, &weights.k, key);
        step.linear(x, &weights.v, value);

        step.enter(Component::Other);
        let epsilon = step.config.norm_epsilon;
        let mut norm = |q_width: usize, k_width: usize| {
            rms_norm_in_place(isa, query, weights.q_norm.as_deref(), epsilon, q_width);
            rms_norm_in_place(isa, key, weights.k_norm.as_deref(), epsilon, k_width);
        };
        match spec.qk_norm {
            QkNorm::PerHead { .. } => norm(spec.head_dim, spec.head_dim),
            QkNorm::Whole { .. } => norm(q_width, kv_width),
            QkNorm::None | QkNorm::PerHeadAfterRope { .. } => {}
        }
        if let Some(angles) = step.angles {
            rotate_heads(&angles, query, q_width, spec.head_dim);
            rotate_heads(&angles, key, kv_width, spec.head_dim);
        }
        if let QkNorm::PerHeadAfterRope { .. } = spec.qk_norm {
            rms_norm_in_place(isa, query, weights.q_norm.as_deref(), epsilon, spec.head_dim);
            rms_norm_in_place(isa, key, weights.k_norm.as_deref(), epsilon, spec.head_dim);
        }

        let [keys, values] = &mut cache.stores[..] else { unreachable!("keys and values") };
        let places = step.batch.places(spec.block_kind());
        keys.write(&places.slots, key);
        values.write(&places.slots, value);
        let shape = gqa_shape(spec, weights.sinks.as_deref());
        let mixed = &mut self.mixed[..tokens * q_width];
        step.enter(Component::Attention);
        let batch = step.batch;
        let sequence = |index| sequence(batch, places, index, (keys, values));
        let queries = BatchQueries { rows: query, count: batch.sequences.len(), sequence: &sequence };
        gqa_batch(isa, &shape, queries, &mut self.spans, mixed);
        step.enter(Component::AttentionProjections);
        step.linear(mixed, &weights.o, out);
    }

    fn mla(
        &mut self,
        step: &mut Step<'_>,
        (spec, weights): (&Mla, &MlaWeights),
        cache: &mut LayerCache,
        x: &[f32],
        out: &mut [f32],
    ) {
        let isa = step.isa;
        let tokens = step.batch.tokens.len();
        let (heads, rank, row) = (spec.heads, spec.kv_rank, spec.kv_rank + spec.rope_dim);
        let head_width = spec.nope_dim + spec.rope_dim;
        let projected = &mut self.projected[..tokens * heads * head_width];
        match &weights.query {
            MlaQueryWeights::Direct(q) => step.linear(x, q, projected),
            MlaQueryWeights::LowRank { a, norm, b } => {
                let width = a.weight.rows();
                let low_rank = &mut self.low_rank[..tokens * width];
                step.linear(x, a, low_rank);
                rms_norm_in_place(isa, low_rank, Some(norm), spec.latent_epsilon, width);
                step.linear(low_rank, b, projected);
            }
        }
        // The new cache rows: latent, normed, then the key part that all heads share, rotated.
        let key = &mut self.key[..tokens * row];
        step.linear(x, &weights.kv_a, key);
        step.enter(Component::Other);
        let latent = RowsMut::strided(key, tokens, row, rank);
        rms_norm_rows_in_place(isa, latent, Some(&weights.kv_norm), spec.latent_epsilon);
        if let Some(angles) = step.angles {
            for (token, key) in key.chunks_exact_mut(row).enumerate() {
                angles.rotate(token, &mut key[rank..]);
            }
        }
        let [latents] = &mut cache.stores[..] else { unreachable!("latents only") };
        let places = &step.batch.full;
        latents.write(&places.slots, key);

        // Absorbed queries: per head `[q_nope W_UK | rotated q_rope]`.
        let query = &mut self.query[..tokens * heads * row];
        let kv_b = weights.kv_b.weight.view();
        let w_step = spec.nope_dim + spec.value_dim;
        let w_uk = Heads { count: heads, x_step: head_width, w_step, out_step: row };
        let nope = Rows::new(projected, heads * head_width);
        let absorbed = RowsMut::new(query, heads * row);
        step.enter(Component::AttentionProjections);
        matmul_transposed_heads(isa, &w_uk, nope, &kv_b.slice(0, spec.nope_dim), absorbed);
        step.enter(Component::Other);
        let pairs = query.chunks_exact_mut(row).zip(projected.chunks_exact(head_width));
        for (index, (query, projected)) in pairs.enumerate() {
            query[rank..].copy_from_slice(&projected[spec.nope_dim..]);
            if let Some(angles) = step.angles {
                angles.rotate(index / heads, &mut query[rank..]);
            }
        }

        let mixed = &mut self.mixed[..tokens * heads * rank];
        step.enter(Component::Attention);
        let batch = step.batch;
        let sequence = |index| sequence(batch, places, index, (latents, latents));
        let queries = BatchQueries { rows: query, count: batch.sequences.len(), sequence: &sequence };
        mla_batch(isa, &mla_shape(spec), queries, &mut self.spans, mixed);
        step.enter(Component::AttentionProjections);
        let values = &mut self.heads[..tokens * heads * spec.value_dim];
        let w_uv = Heads { count: heads, x_step: rank, w_step, out_step: spec.value_dim };
        let rows = RowsMut::new(values, heads * spec.value_dim);
        matmul_heads(
            isa,
            &w_uv,
            Rows::new(mixed, heads * rank),
            &kv_b.slice(spec.nope_dim, spec.value_dim),
            rows,
        );
        step.linear(values, &weights.o, out);
    }
}

/// Where a sequence's queries are, and what they see.
fn sequence<'a>(
    batch: &Batch,
    places: &'a Places,
    index: usize,
    (keys, values): (&'a Store, &'a Store),
) -> Sequence<'a> {
    let span = &batch.sequences[index];
    let table = places.table(span);
    Sequence {
        first: span.first,
        tokens: span.tokens,
        first_position: batch.positions[span.first] as usize,
        keys: keys.pages(table),
        values: values.pages(table),
    }
}

fn rotate_heads(angles: &Angles, rows: &mut [f32], width: usize, head_dim: usize) {
    for (token, row) in rows.chunks_exact_mut(width).enumerate() {
        for head in row.chunks_exact_mut(head_dim) {
            angles.rotate(token, head);
        }
    }
}
