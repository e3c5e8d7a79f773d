//! Every operation again, plainly and in f64: what the others are tested against.
//!
//! Nothing here is fast, shares code with what it checks, or minds allocating.

mod attention;
mod routing;

pub use attention::{cached_row, gqa, mla};
pub use routing::{finalize, group, planes, units};

use crate::experts::{Activation, ExpertFfn, GateUp, Routed};
use crate::format::{FP8_BLOCK, GROUP, Matrix, Values};
use crate::rope::Rotation;
use crate::route::{GroupRule, Normalise, RouterRule, Score};
use half::{bf16, f16};

/// The value at (row, col) of `w` as f32: its code times its scale, rounded once.
pub fn value(w: &Matrix<'_>, row: usize, col: usize) -> f32 {
    assert!(row < w.rows && col < w.cols);
    let row = w.first_row + row;
    let at = row * w.cols + col;
    let nibble = |bytes: &[u8]| if at.is_multiple_of(2) { bytes[at / 2] & 15 } else { bytes[at / 2] >> 4 };
    match w.values {
        Values::F32(b) => f32::from_le_bytes(b[4 * at..][..4].try_into().expect("4 bytes")),
        Values::F16(b) => f16::from_le_bytes([b[2 * at], b[2 * at + 1]]).to_f32(),
        Values::Bf16(b) => bf16::from_le_bytes([b[2 * at], b[2 * at + 1]]).to_f32(),
        Values::Fp8 { values, scales } => {
            let block = row / FP8_BLOCK * w.cols.div_ceil(FP8_BLOCK) + col / FP8_BLOCK;
            e4m3(values[at]) * f32::from_le_bytes(scales[4 * block..][..4].try_into().expect("4 bytes"))
        }
        Values::Int4 { packed, scales } => {
            let group = at / GROUP;
            let scale = bf16::from_le_bytes([scales[2 * group], scales[2 * group + 1]]).to_f32();
            (f32::from(nibble(packed)) - 8.0) * scale
        }
        Values::Q8 { codes, scales } => {
            let group = at / GROUP;
            let scale = bf16::from_le_bytes([scales[2 * group], scales[2 * group + 1]]).to_f32();
            (f32::from(codes[at]) - 128.0) * scale
        }
        Values::Mxfp4 { blocks, scales } => e2m1(nibble(blocks)) * e8m0(scales[at / GROUP]),
    }
}

/// e4m3fn by definition: (-1)^s * 2^(e-7) * (1 + m/8), or 2^-6 * m/8 where e is 0.
pub fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    (if code & 0x80 == 0 { magnitude } else { -magnitude }) as f32
}

/// e2m1 by definition: (-1)^s * 2^(e-1) * (1 + m/2), or m/2 where e is 0.
pub fn e2m1(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 1 & 3), f64::from(code & 1));
    let magnitude =
        if exponent == 0 { mantissa / 2.0 } else { (1.0 + mantissa / 2.0) * 2f64.powi(exponent - 1) };
    (if code & 8 == 0 { magnitude } else { -magnitude }) as f32
}

/// 2^(code - 127); 255 is NaN.
pub fn e8m0(code: u8) -> f32 {
    if code == 255 { f32::NAN } else { 2f64.powi(i32::from(code) - 127) as f32 }
}

/// All of `w`, row after row.
pub fn dequantize(w: &Matrix<'_>) -> Vec<f32> {
    (0..w.rows).flat_map(|r| (0..w.cols).map(move |c| value(w, r, c))).collect()
}

/// `[tokens, w.rows]`.
pub fn matmul(x: &[f32], w: &Matrix<'_>, bias: Option<&[f32]>) -> Vec<f64> {
    let weights = dequantize(w);
    let mut out = Vec::new();
    for x in x.chunks_exact(w.cols) {
        for r in 0..w.rows {
            let row = &weights[r * w.cols..][..w.cols];
            let dot: f64 = x.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            out.push(dot + bias.map_or(0.0, |b| f64::from(b[r])));
        }
    }
    out
}

/// `[tokens, w.cols]` for `w` stored `[in, out]`.
pub fn matmul_transposed(x: &[f32], w: &Matrix<'_>, bias: Option<&[f32]>) -> Vec<f64> {
    let weights = dequantize(w);
    let mut out = Vec::new();
    for x in x.chunks_exact(w.rows) {
        for j in 0..w.cols {
            let dot: f64 =
                x.iter().enumerate().map(|(i, x)| f64::from(*x) * f64::from(weights[i * w.cols + j])).sum();
            out.push(dot + bias.map_or(0.0, |b| f64::from(b[j])));
        }
    }
    out
}

/// Rows of `width`.
pub fn rms_norm(x: &[f32], weight: Option<&[f32]>, eps: f32, width: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for row in x.chunks_exact(width) {
        let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        out.extend(
            row.iter()
                .enumerate()
                .map(|(i, v)| f64::from(*v) * scale * weight.map_or(1.0, |w| f64::from(w[i]))),
        );
    }
    out
}

/// One head, by angles.
pub fn rotate(head: &[f32], angles: &[f64], style: Rotation) -> Vec<f64> {
    let mut out: Vec<f64> = head.iter().map(|v| f64::from(*v)).collect();
    for (j, angle) in angles.iter().enumerate() {
        let (a, b) = match style {
            Rotation::Interleaved => (2 * j, 2 * j + 1),
            Rotation::Half => (j, j + angles.len()),
        };
        let (x, y) = (out[a], out[b]);
        (out[a], out[b]) = (x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin());
    }
    out
}

/// The experts of one token, ascending, and their weights. Logits are numbers.
pub fn route(rule: &RouterRule, logits: &[f32], bias: Option<&[f32]>) -> (Vec<u32>, Vec<f64>) {
    let logits: Vec<f64> = logits.iter().map(|v| f64::from(*v)).collect();
    let score = match rule.score {
        Score::Softmax => softmax(&logits),
        Score::Sigmoid => logits.iter().map(|x| sigmoid(*x)).collect(),
        Score::SoftmaxOfChosen => logits.clone(),
    };
    let mut choice: Vec<f64> =
        score.iter().enumerate().map(|(e, s)| s + bias.map_or(0.0, |b| f64::from(b[e]))).collect();
    if let Some(groups) = rule.groups {
        let size = rule.experts / groups.count;
        let group_score: Vec<f64> = choice
            .chunks(size)
            .map(|members| {
                let best: Vec<f64> = best(members, 2.min(size)).into_iter().map(|e| members[e]).collect();
                match groups.rule {
                    GroupRule::Max => best[0],
                    GroupRule::TopTwoSum => best.iter().sum(),
                }
            })
            .collect();
        let kept = best(&group_score, groups.keep);
        for (e, choice) in choice.iter_mut().enumerate() {
            if !kept.contains(&(e / size)) {
                *choice = f64::NEG_INFINITY;
            }
        }
    }
    let mut ids = best(&choice, rule.top_k);
    ids.sort();
    let mut weights: Vec<f64> = ids.iter().map(|&e| score[e]).collect();
    if rule.score == Score::SoftmaxOfChosen {
        weights = softmax(&weights);
    }
    let sum: f64 = weights.iter().sum();
    let divisor = match rule.normalise {
        None => 1.0,
        Some(Normalise::Epsilon(epsilon)) => sum + f64::from(epsilon),
        Some(Normalise::Floor(floor)) => sum.max(f64::from(floor)),
    };
    weights.iter_mut().for_each(|w| *w = *w / divisor * f64::from(rule.scale));
    (ids.into_iter().map(|e| e as u32).collect(), weights)
}

/// Indices of the k greatest, greatest first, the lower index first among equals.
fn best(values: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    order.truncate(k);
    order
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let peak = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|v| (v - peak).exp()).sum();
    x.iter().map(|v| (v - peak).exp() / sum).collect()
}

/// 1 / (1 + e^-x).
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Gate and up to what the down projection takes.
pub fn activate(activation: Activation, gate: f64, up: f64) -> f64 {
    match activation {
        Activation::SiluGlu => gate * sigmoid(gate) * up,
        Activation::ClampedSwiGlu { limit, alpha } => {
            let limit = f64::from(limit);
            let gate = gate.min(limit);
            gate * sigmoid(f64::from(alpha) * gate) * (up.clamp(-limit, limit) + 1.0)
        }
    }
}

/// Every row of x through one feed-forward.
pub fn ffn(x: &[f32], ffn: &ExpertFfn<'_>) -> Vec<f64> {
    let (hidden, inter) = (ffn.hidden(), ffn.inter());
    let mut out = Vec::new();
    for x in x.chunks_exact(hidden) {
        let mut pairs = match ffn.gate_up {
            GateUp::Separate { gate, up } => {
                let (gate, up) = (matmul(x, &gate, None), matmul(x, &up, None));
                gate.into_iter().zip(up).flat_map(|(g, u)| [g, u]).collect()
            }
            GateUp::Interleaved(w) => matmul(x, &w, None),
            GateUp::InterleavedTransposed(w) => matmul_transposed(x, &w, None),
        };
        if let Some(bias) = ffn.gate_up_bias {
            pairs.iter_mut().zip(bias).for_each(|(p, b)| *p += f64::from(*b));
        }
        let inner: Vec<f64> = pairs.chunks_exact(2).map(|p| activate(ffn.activation, p[0], p[1])).collect();
        for h in 0..hidden {
            let weight =
                |i| if ffn.down_transposed { value(&ffn.down, i, h) } else { value(&ffn.down, h, i) };
            let dot: f64 = (0..inter).map(|i| inner[i] * f64::from(weight(i))).sum();
            out.push(dot + ffn.down_bias.map_or(0.0, |b| f64::from(b[h])));
        }
    }
    out
}

/// Routed experts, token by token.
pub fn run_experts<'w>(
    routed: &Routed<'_>,
    hidden: usize,
    lookup: &dyn Fn(u32) -> ExpertFfn<'w>,
) -> Vec<f64> {
    let tokens = routed.x.len() / hidden;
    let top_k = routed.ids.len() / tokens.max(1);
    let mut out = vec![0.0; routed.x.len()];
    for t in 0..tokens {
        let (x, out) = (&routed.x[t * hidden..][..hidden], &mut out[t * hidden..][..hidden]);
        for pair in t * top_k..(t + 1) * top_k {
            let y = ffn(x, &lookup(routed.ids[pair]));
            out.iter_mut().zip(y).for_each(|(o, y)| *o += f64::from(routed.weights[pair]) * y);
        }
    }
    out
}
