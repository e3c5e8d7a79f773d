//! Norms, rotations, routing and exponentials.

mod common;

use common::{Random, assert_close, assert_close_overall, bits, in_pools};
use kernels::norm::{rms_norm, rms_norm_in_place, rms_norm_rows, rms_norm_rows_in_place};
use kernels::rope::{Rotation, fill_cos_sin, rotate};
use kernels::route::{GroupRule, Groups, Normalise, RouterRule, Score, route};
use kernels::{Isa, Rows, RowsMut, reference, simd};
use proptest::prelude::*;

#[test]
fn norms_meet_the_reference() {
    let mut random = Random(31);
    for width in [1, 31, 32, 33, 144, 7168] {
        let x = random.values(3 * width);
        let weight = random.values(width);
        for weight in [None, Some(&weight[..])] {
            let want = reference::rms_norm(&x, weight, 1e-6, width);
            let mut first: Option<Vec<u32>> = None;
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; x.len()];
                rms_norm(isa, &x, weight, 1e-6, width, &mut out);
                assert_close(&out, &want, &want.iter().map(|v| v.abs()).collect::<Vec<_>>(), 2e-6, "norm");
                assert_eq!(first.get_or_insert_with(|| bits(&out)), &bits(&out), "{isa:?} {width}");
                let mut in_place = x.clone();
                rms_norm_in_place(isa, &mut in_place, weight, 1e-6, width);
                assert_eq!(bits(&in_place), bits(&out));
            }
        }
    }
    let zeros = [0.0; 40];
    let mut out = [1.0; 40];
    rms_norm(Isa::detect(), &zeros, None, 1e-6, 40, &mut out);
    assert_eq!(out, zeros);
}

#[test]
fn strided_norms_and_threads() {
    let mut random = Random(32);
    let (rows, stride, width) = (300, 576, 512);
    let x = random.values(rows * stride);
    let weight = random.values(width);
    let isa = Isa::detect();
    let outs = in_pools(|| {
        let mut in_place = x.clone();
        let view = RowsMut::strided(&mut in_place, rows, stride, width);
        rms_norm_rows_in_place(isa, view, Some(&weight), 1e-6);
        let mut out = vec![0.0; rows * width];
        let view = Rows::strided(&x, rows, stride, width);
        rms_norm_rows(isa, view, Some(&weight), 1e-6, RowsMut::new(&mut out, width));
        (in_place, out)
    });
    for (in_place, out) in &outs {
        for t in 0..rows {
            let row = &x[t * stride..][..stride];
            let mut want = vec![0.0; width];
            rms_norm(isa, &row[..width], Some(&weight), 1e-6, width, &mut want);
            assert_eq!(bits(&in_place[t * stride..][..width]), bits(&want));
            assert_eq!(bits(&in_place[t * stride + width..][..stride - width]), bits(&row[width..]));
            assert_eq!(bits(&out[t * width..][..width]), bits(&want));
        }
    }
}

#[test]
fn rotations_meet_the_reference() {
    let mut random = Random(33);
    let inv_freq: Vec<f32> = (0..12).map(|i| 10_000f32.powf(-(i as f32) / 12.0)).collect();
    for position in [0, 1, 77, 40_000] {
        for attention_scale in [1.0, 1.346_573_6] {
            let (mut cos, mut sin) = ([0.0; 12], [0.0; 12]);
            fill_cos_sin(position, &inv_freq, attention_scale, &mut cos, &mut sin);
            let angles: Vec<f64> = inv_freq.iter().map(|f| f64::from(position as f32 * f)).collect();
            for style in [Rotation::Interleaved, Rotation::Half] {
                let head = random.values(30);
                let mut got = head.clone();
                rotate(&mut got, &cos, &sin, style);
                let mut want = reference::rotate(&head, &angles, style);
                want[..24].iter_mut().for_each(|v| *v *= f64::from(attention_scale));
                assert_close_overall(&got, &want, 1e-6, "rotation");
                assert_eq!(got[24..], head[24..], "the rest is left alone");
            }
        }
    }
}

fn rule(score: Score, groups: Option<Groups>, normalise: Option<Normalise>) -> RouterRule {
    RouterRule { experts: 32, top_k: 6, score, groups, normalise, scale: 2.5 }
}

fn routed(isa: Isa, rule: &RouterRule, logits: &[f32], bias: Option<&[f32]>) -> (Vec<u32>, Vec<f32>) {
    let mut ids = vec![u32::MAX; rule.top_k];
    let mut weights = vec![f32::NAN; rule.top_k];
    let mut scratch = vec![f32::NAN; rule.scratch_len()];
    route(isa, rule, logits, bias, &mut scratch, &mut ids, &mut weights);
    (ids, weights)
}

#[test]
fn routing_meets_the_reference() {
    let mut random = Random(34);
    let groups = [
        None,
        Some(Groups { count: 8, keep: 4, rule: GroupRule::TopTwoSum }),
        Some(Groups { count: 4, keep: 2, rule: GroupRule::Max }),
    ];
    let normalise = [None, Some(Normalise::Epsilon(1e-20)), Some(Normalise::Floor(6.1e-5))];
    for score in [Score::Softmax, Score::Sigmoid, Score::SoftmaxOfChosen] {
        for groups in groups {
            for normalise in normalise {
                let rule = rule(score, groups, normalise);
                for _ in 0..20 {
                    let logits: Vec<f32> = (0..32).map(|_| random.value() * 4.0).collect();
                    let bias = random.values(32);
                    for bias in [None, Some(&bias[..])] {
                        let (want_ids, want) = reference::route(&rule, &logits, bias);
                        let mut first: Option<Vec<u32>> = None;
                        for isa in Isa::available() {
                            let (ids, weights) = routed(isa, &rule, &logits, bias);
                            assert_eq!(ids, want_ids, "{rule:?}");
                            assert_close_overall(&weights, &want, 1e-6, "weights");
                            assert_eq!(first.get_or_insert_with(|| bits(&weights)), &bits(&weights));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn ties_go_to_the_lowest_index() {
    let grouped = Some(Groups { count: 4, keep: 2, rule: GroupRule::TopTwoSum });
    for score in [Score::Softmax, Score::Sigmoid, Score::SoftmaxOfChosen] {
        for groups in [None, grouped] {
            let (ids, _) = routed(Isa::detect(), &rule(score, groups, None), &[0.25; 32], None);
            assert_eq!(ids, [0, 1, 2, 3, 4, 5]);
        }
    }
    let mut logits = [0.0; 32];
    logits[31] = 1.0;
    let (ids, _) = routed(Isa::detect(), &rule(Score::Sigmoid, None, None), &logits, None);
    assert_eq!(ids, [0, 1, 2, 3, 4, 31]);
}

/// A biased score of less than zero must not lose to experts of groups that were not kept.
#[test]
fn negative_scores_stay_in_their_groups() {
    let mut bias = [-5.0; 32];
    bias[..8].fill(-2.0);
    let limit = Some(Groups { count: 4, keep: 1, rule: GroupRule::TopTwoSum });
    let (ids, _) = routed(Isa::detect(), &rule(Score::Sigmoid, limit, None), &[0.0; 32], Some(&bias));
    assert_eq!(ids, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn weights_of_zero_sum_are_normalised_as_told() {
    let logits = [-1e4; 32];
    let (_, weights) =
        routed(Isa::detect(), &rule(Score::Sigmoid, None, Some(Normalise::Epsilon(1e-20))), &logits, None);
    assert_eq!(weights, [0.0; 6]);
    let (_, weights) =
        routed(Isa::detect(), &rule(Score::Sigmoid, None, Some(Normalise::Floor(6.1e-5))), &logits, None);
    assert_eq!(weights, [0.0; 6]);
}

proptest! {
    /// Whatever the logits, infinities and NaN among them: k distinct ids in range, ascending.
    #[test]
    fn any_logits(seed: u64, score in 0..3usize, grouped: bool) {
        let mut random = Random(seed);
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 0.0, -0.0];
        let mut draw = || if random.below(3) == 0 { odd[random.below(6)] } else { random.value() };
        let logits: Vec<f32> = (0..32).map(|_| draw()).collect();
        let bias: Vec<f32> = (0..32).map(|_| draw()).collect();
        let score = [Score::Softmax, Score::Sigmoid, Score::SoftmaxOfChosen][score];
        let groups = grouped.then_some(Groups { count: 8, keep: 3, rule: GroupRule::TopTwoSum });
        let rule = rule(score, groups, Some(Normalise::Epsilon(1e-20)));
        let mut first: Option<Vec<u32>> = None;
        for isa in Isa::available() {
            let (ids, _) = routed(isa, &rule, &logits, Some(&bias));
            prop_assert!(ids.windows(2).all(|w| w[0] < w[1]) && ids[5] < 32, "{ids:?}");
            prop_assert_eq!(first.get_or_insert_with(|| ids.clone()), &ids);
        }
    }
}

#[test]
fn nan_comes_last() {
    let mut logits = [f32::NAN; 32];
    for (i, logit) in logits.iter_mut().enumerate().skip(20).take(5) {
        *logit = -(i as f32);
    }
    let (ids, _) = routed(Isa::detect(), &rule(Score::Sigmoid, None, None), &logits, None);
    assert_eq!(ids, [0, 20, 21, 22, 23, 24]);
}

/// Distance in units in the last place of the nearest f32 (subnormal spacing below 2^-126).
fn ulps(got: f32, want: f64) -> f64 {
    let nearest = (want as f32).abs();
    let next = f32::from_bits(nearest.to_bits() + 1);
    (f64::from(got) - want).abs() / (f64::from(next) - f64::from(nearest))
}

#[test]
fn exponentials_are_within_two_units() {
    let mut worst = 0.0f64;
    // Every 2,999th f32 of either sign, and around the ends.
    let samples = (0..0x7f80_0000u32).step_by(2999).flat_map(|b| [f32::from_bits(b), -f32::from_bits(b)]);
    let ends = (0..2000).flat_map(|i| [88.7 + i as f32 * 2e-5, -87.3 - i as f32 * 1e-2]);
    let x: Vec<f32> = samples.chain(ends).collect();
    let mut first: Option<Vec<u32>> = None;
    for isa in Isa::available() {
        let mut y = x.clone();
        simd::exp_in_place(isa, 0.0, &mut y);
        for (x, y) in x.iter().zip(&y) {
            let want = f64::from(*x).exp();
            if want > f64::from(f32::MAX) {
                assert_eq!(*y, f32::INFINITY, "{x}");
            } else {
                worst = worst.max(ulps(*y, want));
            }
        }
        assert_eq!(first.get_or_insert_with(|| bits(&y)), &bits(&y), "{isa:?}");
        let mut odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0];
        simd::exp_in_place(isa, 0.0, &mut odd);
        assert!(odd[0].is_nan());
        assert_eq!(odd[1..], [f32::INFINITY, 0.0, 1.0, 1.0]);
    }
    assert!(worst < 1.5, "{worst} units");

    let mut y = x.clone();
    simd::sigmoid_in_place(Isa::detect(), &mut y);
    for (x, y) in x.iter().zip(&y).filter(|(x, _)| **x > -87.0) {
        assert!(ulps(*y, reference::sigmoid(f64::from(*x))) < 4.0, "sigmoid({x}) = {y}");
    }
}

#[test]
fn sums_and_maxima() {
    let mut random = Random(36);
    for n in [0, 1, 31, 32, 33, 1000] {
        let x = random.values(n);
        let want: f64 = x.iter().map(|v| f64::from(*v)).sum();
        let greatest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut first = None;
        for isa in Isa::available() {
            let sum = simd::sum(isa, &x);
            assert!((f64::from(sum) - want).abs() < 1e-5 * n.max(1) as f64);
            assert_eq!(*first.get_or_insert(sum.to_bits()), sum.to_bits());
            assert_eq!(simd::max(isa, &x), greatest);
        }
    }
}
