//! The feed-forward part, plainly: one expert after another, in ascending order.

use candle_core::Tensor;
use candle_nn::ops::{sigmoid, silu};
use kernels::experts::Activation;

use super::router::route;
use super::tensors::{Tensors, add_bias, tensor, values};
use crate::config::{Mlp, Moe};
use crate::error::Result;
use crate::weights::{ExpertWeights, GateUpWeights, MlpWeights, MoeWeights};

/// `down(activation(gate(x), up(x)))` of `x` `[tokens, hidden]`.
pub(super) fn mlp(spec: &Mlp, weights: &MlpWeights, x: &Tensor, tensors: &mut Tensors) -> Result<Tensor> {
    let gate = tensors.linear(x, &weights.gate)?;
    let up = tensors.linear(x, &weights.up)?;
    tensors.linear(&activate(spec.activation, &gate, &up)?, &weights.down)
}

/// The choice of one layer: experts `[tokens, top_k]`, ascending per token, and their weights.
pub(super) struct Routing {
    pub(super) ids: Vec<u32>,
    pub(super) weights: Vec<f32>,
}

/// Routes every token of `x` `[tokens, hidden]`.
pub(super) fn routing(
    spec: &Moe,
    weights: &MoeWeights,
    x: &Tensor,
    tensors: &mut Tensors,
) -> Result<Routing> {
    let logits = values(&tensors.linear(x, &weights.router)?)?;
    let mut routing = Routing { ids: Vec::new(), weights: Vec::new() };
    for logits in logits.chunks_exact(spec.rule.experts) {
        let (ids, chosen_weights) = route(&spec.rule, logits, weights.selection_bias.as_deref());
        routing.ids.extend(ids);
        routing.weights.extend(chosen_weights);
    }
    Ok(routing)
}

/// Weighted outputs of the chosen experts, added per token in ascending order of experts, plus the
/// shared expert's; `x` is `[tokens, hidden]`.
pub(super) fn moe(
    spec: &Moe,
    weights: &MoeWeights,
    routing: &Routing,
    x: &Tensor,
    tensors: &mut Tensors,
) -> Result<Tensor> {
    let (tokens, hidden) = x.dims2()?;
    let mut sum = vec![0.0; tokens * hidden];
    for (id, expert) in weights.experts.iter().enumerate() {
        let chosen = routing.ids.iter().enumerate().filter(|(_, chosen)| **chosen as usize == id);
        let pairs: Vec<usize> = chosen.map(|(pair, _)| pair).collect();
        if pairs.is_empty() {
            continue;
        }
        let rows: Vec<u32> = pairs.iter().map(|pair| (pair / spec.rule.top_k) as u32).collect();
        let index = Tensor::from_slice(&rows, rows.len(), x.device())?;
        let out = values(&run_expert(spec.activation, expert, &x.index_select(&index, 0)?, tensors)?)?;
        for ((pair, row), out) in pairs.into_iter().zip(rows).zip(out.chunks_exact(hidden)) {
            let sum = &mut sum[row as usize * hidden..][..hidden];
            sum.iter_mut().zip(out).for_each(|(sum, out)| *sum += routing.weights[pair] * out);
        }
    }
    let routed = tensor(&sum, (tokens, hidden))?;
    match (&spec.shared, &weights.shared) {
        (Some(spec), Some(weights)) => Ok((routed + mlp(spec, weights, x, tensors)?)?),
        _ => Ok(routed),
    }
}

/// One routed expert on its tokens `[n, hidden]`.
fn run_expert(
    activation: Activation,
    expert: &ExpertWeights,
    x: &Tensor,
    tensors: &mut Tensors,
) -> Result<Tensor> {
    // [n, inter] each; where they are stored as one matrix, even outputs are gate and odd ones up.
    let (gate, up) = match &expert.gate_up {
        GateUpWeights::Separate { gate, up } => {
            let (gate, up) = (tensors.product(x, gate)?, tensors.product(x, up)?);
            match &expert.gate_up_bias {
                None => (gate, up),
                Some(bias) => {
                    let every_other = |first: usize| bias[first..].iter().step_by(2).copied().collect();
                    let (gate_bias, up_bias): (Vec<f32>, Vec<f32>) = (every_other(0), every_other(1));
                    (add_bias(gate, Some(&gate_bias))?, add_bias(up, Some(&up_bias))?)
                }
            }
        }
        GateUpWeights::Interleaved(both) => {
            deinterleave(&add_bias(tensors.product(x, both)?, expert.gate_up_bias.as_deref())?)?
        }
        GateUpWeights::InterleavedTransposed(both) => {
            deinterleave(&add_bias(tensors.product_transposed(x, both)?, expert.gate_up_bias.as_deref())?)?
        }
    };
    let inner = activate(activation, &gate, &up)?;
    let down = match expert.down_transposed {
        true => tensors.product_transposed(&inner, &expert.down)?,
        false => tensors.product(&inner, &expert.down)?,
    };
    add_bias(down, expert.down_bias.as_deref())
}

/// Even and odd columns of `[n, 2 inter]`.
fn deinterleave(both: &Tensor) -> Result<(Tensor, Tensor)> {
    let (n, width) = both.dims2()?;
    let pairs = both.reshape((n, width / 2, 2))?;
    let part = |at| pairs.narrow(2, at, 1)?.squeeze(2)?.contiguous();
    Ok((part(0)?, part(1)?))
}

fn activate(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Ok(match activation {
        Activation::SiluGlu => (silu(gate)? * up)?,
        // `models-maths.md` section 6: gate is bounded above, up on both sides.
        Activation::ClampedSwiGlu { limit, alpha } => {
            let gate = gate.minimum(f64::from(limit))?;
            let up = up.clamp(-limit, limit)?;
            let gated = (&gate * sigmoid(&(&gate * f64::from(alpha))?)?)?;
            (gated * (up + 1.0)?)?
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_follow_their_formulas() {
        let gate = tensor(&[-2.0, 0.5, 9.0, -9.0], 4).unwrap();
        let up = tensor(&[1.0, -3.0, 8.0, -8.0], 4).unwrap();
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let silu_glu = |g: f64, u: f64| g * sigmoid(g) * u;
        let clamped = |g: f64, u: f64| {
            let (g, u) = (g.min(7.0), u.clamp(-7.0, 7.0));
            g * sigmoid(1.702 * g) * (u + 1.0)
        };
        let check = |activation, want: &dyn Fn(f64, f64) -> f64| {
            let got = values(&activate(activation, &gate, &up).unwrap()).unwrap();
            for ((got, g), u) in got.iter().zip(values(&gate).unwrap()).zip(values(&up).unwrap()) {
                let want = want(f64::from(g), f64::from(u));
                assert!((f64::from(*got) - want).abs() < 1e-5, "{activation:?}: {got} {want}");
            }
        };
        check(Activation::SiluGlu, &silu_glu);
        check(Activation::ClampedSwiGlu { limit: 7.0, alpha: 1.702 }, &clamped);
    }

    #[test]
    fn interleaved_columns_are_gate_and_up() {
        let (gate, up) =
            deinterleave(&tensor(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], (2, 4)).unwrap()).unwrap();
        assert_eq!(values(&gate).unwrap(), [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(values(&up).unwrap(), [1.0, 3.0, 5.0, 7.0]);
    }
}
