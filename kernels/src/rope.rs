//! Rotary position embedding of one head vector.

/// Which two values make a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// `x[2j]` and `x[2j + 1]`: DeepSeek and Kimi latent attention.
    Interleaved,
    /// `x[j]` and `x[j + rotary_dim / 2]`: the others ("NeoX").
    Half,
}

/// Cosines and sines of `position * inv_freq[j]`, each times `attention_scale` (YaRN's concentration;
/// 1 elsewhere). The angle is an f32 product, as in the published implementations.
///
/// # Panics
/// If the three lengths differ.
pub fn fill_cos_sin(position: u32, inv_freq: &[f32], attention_scale: f32, cos: &mut [f32], sin: &mut [f32]) {
    assert_eq!((inv_freq.len(), inv_freq.len()), (cos.len(), sin.len()), "one cosine and sine per frequency");
    for ((frequency, cos), sin) in inv_freq.iter().zip(cos).zip(sin) {
        let angle = position as f32 * frequency;
        *cos = angle.cos() * attention_scale;
        *sin = angle.sin() * attention_scale;
    }
}

/// Rotates the first `2 * cos.len()` values of one head vector and leaves the rest: pair j by angle j,
/// (a, b) -> (a cos - b sin, b cos + a sin).
///
/// # Panics
/// If the head is shorter than the pairs, or there is not one sine per cosine.
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], style: Rotation) {
    assert_eq!(cos.len(), sin.len(), "one sine per cosine");
    let head = &mut head[..2 * cos.len()];
    match style {
        Rotation::Interleaved => {
            for ((pair, c), s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                let [a, b] = *pair;
                *pair = [a * c - b * s, b * c + a * s];
            }
        }
        Rotation::Half => {
            let (first, second) = head.split_at_mut(cos.len());
            for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
            }
        }
    }
}
