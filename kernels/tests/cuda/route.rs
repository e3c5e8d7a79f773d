//! The router against the host's: the same ids, and weights within 1e-6.

use kernels::cuda::{Buffer, Device, Route};
use kernels::route::{self, GroupRule, Groups, Normalise, RouterRule, Score};
use kernels::{Isa, reference};

use crate::common::{Random, assert_close_overall, bits};
use crate::mock;

const SCORES: [Score; 3] = [Score::Softmax, Score::Sigmoid, Score::SoftmaxOfChosen];

fn on_host(rule: &RouterRule, logits: &[f32], bias: Option<&[f32]>) -> (Vec<u32>, Vec<f32>) {
    let mut ids = vec![u32::MAX; rule.top_k];
    let mut weights = vec![f32::NAN; rule.top_k];
    let mut scratch = vec![f32::NAN; rule.scratch_len()];
    route::route(Isa::detect(), rule, logits, bias, &mut scratch, &mut ids, &mut weights);
    (ids, weights)
}

/// `[tokens, top_k]` ids and weights.
fn on_device(
    device: &Device,
    rule: RouterRule,
    logits: &[f32],
    bias: Option<&[f32]>,
) -> (Vec<u32>, Vec<f32>) {
    let tokens = logits.len() / rule.experts;
    let logits = device.upload(logits).unwrap();
    let bias = bias.map(|bias| device.upload(bias).unwrap());
    let (ids, weights) =
        (device.alloc::<i32>(tokens * rule.top_k).unwrap(), device.alloc(tokens * rule.top_k).unwrap());
    let route = Route {
        rule,
        logits: logits.all(),
        bias: bias.as_ref().map(Buffer::all),
        tokens,
        ids: ids.all(),
        weights: weights.all(),
    };
    route.launch(device).unwrap();
    (ids.read().unwrap().into_iter().map(|id| id as u32).collect(), weights.read().unwrap())
}

fn check(device: &Device, rule: RouterRule, logits: &[f32], bias: Option<&[f32]>) {
    let (ids, weights) = on_device(device, rule, logits, bias);
    let rows = ids.chunks(rule.top_k).zip(weights.chunks(rule.top_k));
    for (logits, (ids, weights)) in logits.chunks(rule.experts).zip(rows) {
        let (want_ids, want) = on_host(&rule, logits, bias);
        assert_eq!(ids, want_ids, "{rule:?}");
        for (got, want) in weights.iter().zip(&want) {
            let close = (got - want).abs() <= 1e-6 * want.abs().max(rule.scale);
            assert!(close || got.is_nan() && want.is_nan(), "{got} should be {want}: {rule:?}");
        }
    }
}

/// Whether no two values are so close that rounding could exchange them.
fn apart(mut values: Vec<f64>) -> bool {
    values.sort_by(f64::total_cmp);
    values.windows(2).all(|pair| pair[1] - pair[0] > 1e-6 * pair[1].abs().max(pair[0].abs()))
}

/// Logits of a token whose scores, with the bias, are apart, and so are the scores of groups.
fn clear_logits(random: &mut Random, rule: &RouterRule, bias: Option<&[f32]>) -> Vec<f32> {
    loop {
        let logits: Vec<f32> = (0..rule.experts).map(|_| random.value() * 4.0).collect();
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        let score = |logit: f32| match rule.score {
            Score::Softmax => f64::from(logit).exp() / sum,
            Score::Sigmoid => reference::sigmoid(f64::from(logit)),
            Score::SoftmaxOfChosen => f64::from(logit),
        };
        let mut choice: Vec<f64> = logits.iter().map(|logit| score(*logit)).collect();
        if let Some(bias) = bias {
            choice.iter_mut().zip(bias).for_each(|(choice, bias)| *choice += f64::from(*bias));
        }
        let size = rule.groups.map_or(rule.experts, |groups| rule.experts / groups.count);
        let of_groups = choice.chunks(size).map(|members| {
            let mut members = members.to_vec();
            members.sort_by(f64::total_cmp);
            members.iter().rev().take(2).sum()
        });
        if apart(of_groups.collect()) && apart(choice) {
            return logits;
        }
    }
}

#[test]
fn ids_are_those_of_the_host() {
    mock::in_every_order(|device| {
        let mut random = Random(71);
        let normalise = [None, Some(Normalise::Epsilon(1e-20)), Some(Normalise::Floor(6.1e-5))];
        let mut turn = 0;
        for experts in mock::thinned([4, 8, 16, 60, 64, 128, 160, 256, 384, 512], 3) {
            for score in SCORES {
                for groups in [None, Some((4, 2)), Some((2, 1)), Some((20, 7)), Some((8, 4)), Some((32, 32))]
                {
                    if groups.is_some_and(|(count, _)| experts % count != 0) {
                        continue;
                    }
                    let groups = groups.map(|(count, keep)| {
                        let rule = if turn % 2 == 0 { GroupRule::TopTwoSum } else { GroupRule::Max };
                        Groups { count, keep, rule }
                    });
                    turn += 1;
                    let room = groups.map_or(experts, |groups| experts / groups.count * groups.keep);
                    let top_k = [1, 2, 4, 6, 8, 16][turn % 6].min(room);
                    let normalise = normalise[turn % 3];
                    let rule = RouterRule { experts, top_k, score, groups, normalise, scale: 2.5 };
                    let bias = random.values(experts);
                    let bias = (turn % 5 != 0).then_some(&bias[..]);
                    let tokens = [1, 3, 5][turn % 3];
                    let logits: Vec<f32> =
                        (0..tokens).flat_map(|_| clear_logits(&mut random, &rule, bias)).collect();
                    check(device, rule, &logits, bias);
                }
            }
        }
    });
}

#[test]
fn weights_meet_the_reference() {
    mock::in_every_order(|device| {
        let mut random = Random(72);
        for score in SCORES {
            let groups = Some(Groups { count: 8, keep: 4, rule: GroupRule::TopTwoSum });
            let normalise = Some(Normalise::Epsilon(1e-20));
            let rule = RouterRule { experts: 384, top_k: 8, score, groups, normalise, scale: 2.827 };
            let bias = random.values(384);
            let logits = clear_logits(&mut random, &rule, Some(&bias));
            let (ids, weights) = on_device(device, rule, &logits, Some(&bias));
            let (want_ids, want) = reference::route(&rule, &logits, Some(&bias));
            assert_eq!(ids, want_ids);
            assert_close_overall(&weights, &want, 1e-6, "weights");
        }
    });
}

/// Ties go to the lower index, groups' too; NaN is below everything; infinities are values like others.
#[test]
fn ties_and_what_is_not_a_number() {
    mock::in_every_order(|device| {
        let mut random = Random(73);
        let special = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -0.0, 0.0, 1.0];
        for experts in [8, 64, 160, 512] {
            for score in SCORES {
                for groups in [None, Some(GroupRule::Max), Some(GroupRule::TopTwoSum)] {
                    let groups = groups.map(|rule| Groups { count: 4, keep: 2, rule });
                    let top_k = 4;
                    let rule = RouterRule { experts, top_k, score, groups, normalise: None, scale: 1.0 };
                    let few = |random: &mut Random| [0.0, 0.25, 0.5][random.below(3)];
                    check(device, rule, &vec![0.25; experts], None);
                    check(device, rule, &vec![f32::NAN; experts], None);
                    check(device, rule, &vec![f32::NEG_INFINITY; experts], None);
                    for _ in 0..3 {
                        let logits: Vec<f32> = (0..experts).map(|_| few(&mut random)).collect();
                        let bias: Vec<f32> = (0..experts).map(|_| few(&mut random) - 8.0).collect();
                        check(device, rule, &logits, None);
                        check(device, rule, &logits, Some(&bias));
                        let logits: Vec<f32> = logits
                            .iter()
                            .map(|logit| match random.below(3) {
                                0 => special[random.below(special.len())],
                                _ => *logit,
                            })
                            .collect();
                        check(device, rule, &logits, None);
                        let bias: Vec<f32> = (0..experts).map(|_| special[random.below(6)]).collect();
                        check(device, rule, &vec![0.5; experts], Some(&bias));
                    }
                }
            }
        }
    });
}

#[test]
fn a_token_routes_the_same_alone_and_among_many() {
    mock::in_every_order(|device| {
        let mut random = Random(74);
        let normalise = Some(Normalise::Epsilon(1e-20));
        let rule =
            RouterRule { experts: 60, top_k: 6, score: Score::Softmax, groups: None, normalise, scale: 1.0 };
        let logits = random.values(515 * 60);
        let (ids, weights) = on_device(device, rule, &logits, None);
        for token in [0, 1, 257, 514] {
            let alone = on_device(device, rule, &logits[token * 60..][..60], None);
            assert_eq!(alone.0, ids[token * 6..][..6]);
            assert_eq!(bits(&alone.1), bits(&weights[token * 6..][..6]));
        }
    });
}
