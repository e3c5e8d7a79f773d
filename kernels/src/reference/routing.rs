//! Pairs by expert, and planes of bf16.

use half::bf16;

/// Pairs by expert: the pairs of each in ascending order, and where each expert starts, with the end. Ids that are
/// not the number of an expert are left out.
pub fn group(ids: &[i32], experts: usize) -> (Vec<i32>, Vec<i32>) {
    let (mut order, mut offsets) = (Vec::new(), vec![0]);
    for expert in 0..experts {
        order.extend((0..ids.len()).filter(|&pair| ids[pair] == expert as i32).map(|pair| pair as i32));
        offsets.push(order.len() as i32);
    }
    (order, offsets)
}

/// Units of at most `size` pairs: expert, first place in the order, pairs, 0.
pub fn units(offsets: &[i32], size: usize) -> Vec<[u32; 4]> {
    let mut units = Vec::new();
    for (expert, ends) in offsets.windows(2).enumerate() {
        for first in (ends[0]..ends[1]).step_by(size) {
            units.push([expert as u32, first as u32, (ends[1] - first).min(size as i32) as u32, 0]);
        }
    }
    units
}

/// `[tokens, hidden]`: x + shared + the sum of weights `[tokens, top_k]` times out `[tokens, top_k, hidden]`.
pub fn finalize(
    x: Option<&[f32]>,
    shared: Option<&[f32]>,
    out: &[f32],
    weights: &[f32],
    (top_k, hidden): (usize, usize),
) -> Vec<f64> {
    let tokens = weights.len() / top_k;
    let at = |rows: Option<&[f32]>, i: usize| rows.map_or(0.0, |rows| f64::from(rows[i]));
    (0..tokens * hidden)
        .map(|i| {
            let (token, column) = (i / hidden, i % hidden);
            let pairs = token * top_k..(token + 1) * top_k;
            let routed = pairs.map(|pair| f64::from(weights[pair]) * f64::from(out[pair * hidden + column]));
            at(x, i) + at(shared, i) + routed.sum::<f64>()
        })
        .collect()
}

/// Planes of bf16 that add up to x: each is what those before it left, rounded.
pub fn planes(x: &[f32], count: usize) -> Vec<Vec<bf16>> {
    let mut rest: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    (0..count)
        .map(|_| {
            let plane: Vec<bf16> = rest.iter().map(|rest| bf16::from_f32(*rest as f32)).collect();
            rest.iter_mut().zip(&plane).for_each(|(rest, plane)| *rest -= f64::from(plane.to_f32()));
            plane
        })
        .collect()
}
