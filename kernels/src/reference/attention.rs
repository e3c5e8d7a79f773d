//! Attention, one query and one key at a time.

use super::e4m3;
use crate::attention::{CacheSlice, CacheType, FP8_TILE, Gqa, Mla, PAGE, Pages, Queries, RowShape};
use half::bf16;

/// The cache row of a position as f32.
pub fn cached_row(pages: &Pages<'_>, position: usize) -> Vec<f32> {
    let index = pages.table[position / PAGE] as usize * PAGE + position % PAGE;
    let at = index * pages.row;
    match pages.data {
        CacheSlice::F32(data) => data[at..][..pages.row].to_vec(),
        CacheSlice::Bf16(data) => {
            data[at..][..pages.row].iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect()
        }
        CacheSlice::Fp8 { data, shape } => fp8_row(shape, &data[index * CacheType::Fp8.row_bytes(shape)..]),
    }
}

/// Codes times scales, then the plain values.
fn fp8_row(shape: RowShape, bytes: &[u8]) -> Vec<f32> {
    let RowShape { heads, width, plain } = shape;
    let (tiles, codes) = (width.div_ceil(FP8_TILE), heads * width);
    let scale = |head: usize, column: usize| {
        let at = codes + 4 * (head * tiles + column / FP8_TILE);
        f32::from_le_bytes(bytes[at..][..4].try_into().expect("4 bytes"))
    };
    let after = codes + 4 * heads * tiles;
    let coded = (0..codes).map(|at| e4m3(bytes[at]) * scale(at / width, at % width));
    let plain = bytes[after..][..2 * plain].chunks(2);
    coded.chain(plain.map(|two| bf16::from_le_bytes([two[0], two[1]]).to_f32())).collect()
}

/// `[tokens, heads * value_dim]`.
pub fn gqa(shape: &Gqa<'_>, queries: Queries<'_>, keys: &Pages<'_>, values: &Pages<'_>) -> Vec<f64> {
    let per = shape.heads / shape.kv_heads;
    let tokens = queries.rows.len() / (shape.heads * shape.head_dim);
    let begin_of = |position: usize| shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
    let first = begin_of(queries.first_position);
    // Rows once for all heads and tokens: what reads 8-bit codes by definition is slow.
    let rows = |pages: &Pages<'_>| -> Vec<f32> {
        (first..queries.first_position + tokens).flat_map(|j| cached_row(pages, j)).collect()
    };
    let (key_rows, value_rows) = (rows(keys), rows(values));
    let mut out = Vec::new();
    for (t, query) in queries.rows.chunks_exact(shape.heads * shape.head_dim).enumerate() {
        let position = queries.first_position + t;
        let begin = begin_of(position);
        for (h, query) in query.chunks_exact(shape.head_dim).enumerate() {
            let mut scores: Vec<f64> = (begin..=position)
                .map(|j| {
                    let key =
                        &key_rows[(j - first) * keys.row + h / per * shape.head_dim..][..shape.head_dim];
                    let dot: f64 = query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    dot * f64::from(shape.scale)
                })
                .collect();
            scores.extend(shape.sinks.map(|s| f64::from(s[h])));
            let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - peak).exp()).sum();
            let mut row = vec![0.0; shape.value_dim];
            for (j, score) in (begin..=position).zip(&scores) {
                let value =
                    &value_rows[(j - first) * values.row + h / per * shape.value_dim..][..shape.value_dim];
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
