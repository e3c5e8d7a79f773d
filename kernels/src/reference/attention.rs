//! Attention, one query and one key at a time.

use crate::attention::{CacheSlice, Gqa, Mla, PAGE, Pages, Queries};
use half::bf16;

/// The cache row of a position as f32.
pub fn cached_row(pages: &Pages<'_>, position: usize) -> Vec<f32> {
    let at = (pages.table[position / PAGE] as usize * PAGE + position % PAGE) * pages.row;
    match pages.data {
        CacheSlice::F32(data) => data[at..][..pages.row].to_vec(),
        CacheSlice::Bf16(data) => {
            data[at..][..pages.row].iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect()
        }
    }
}

/// `[tokens, heads * value_dim]`.
pub fn gqa(shape: &Gqa<'_>, queries: Queries<'_>, keys: &Pages<'_>, values: &Pages<'_>) -> Vec<f64> {
    let per = shape.heads / shape.kv_heads;
    let mut out = Vec::new();
    for (t, query) in queries.rows.chunks_exact(shape.heads * shape.head_dim).enumerate() {
        let position = queries.first_position + t;
        let begin = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
        for (h, query) in query.chunks_exact(shape.head_dim).enumerate() {
            let mut scores: Vec<f64> = (begin..=position)
                .map(|j| {
                    let key = &cached_row(keys, j)[h / per * shape.head_dim..][..shape.head_dim];
                    let dot: f64 = query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    dot * f64::from(shape.scale)
                })
                .collect();
            scores.extend(shape.sinks.map(|s| f64::from(s[h])));
            let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - peak).exp()).sum();
            let mut row = vec![0.0; shape.value_dim];
            for (j, score) in (begin..=position).zip(&scores) {
                let value = &cached_row(values, j)[h / per * shape.value_dim..][..shape.value_dim];
                row.iter_mut().zip(value).for_each(|(o, v)| *o += (score - peak).exp() / sum * f64::from(*v));
            }
            out.extend(row);
        }
    }
    out
}

/// `[tokens, heads * latent]`.
pub fn mla(shape: &Mla, queries: Queries<'_>, cache: &Pages<'_>) -> Vec<f64> {
    let gqa_shape = Gqa {
        heads: shape.heads,
        kv_heads: 1,
        head_dim: shape.latent + shape.rope,
        value_dim: shape.latent,
        scale: shape.scale,
        window: None,
        sinks: None,
    };
    gqa(&gqa_shape, queries, cache, cache)
}
