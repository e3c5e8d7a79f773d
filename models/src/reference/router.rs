//! The router, plainly: one token's logits to its experts and their weights, in f32
//! (`models-maths.md` section 3). Independent of `kernels::route`, whose rule it executes.

use kernels::route::{GroupRule, Groups, Normalise, RouterRule, Score};

/// Chosen experts `[top_k]`, ascending, and their weights in the same order.
///
/// The selection bias `[experts]` decides who is chosen and never enters a weight.
pub(super) fn route(rule: &RouterRule, logits: &[f32], bias: Option<&[f32]>) -> (Vec<u32>, Vec<f32>) {
    let scores = match rule.score {
        Score::Softmax => softmax(logits),
        Score::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Score::SoftmaxOfChosen => logits.to_vec(),
    };
    let biased: Vec<f32> = match bias {
        Some(bias) => scores.iter().zip(bias).map(|(score, bias)| score + bias).collect(),
        None => scores.clone(),
    };
    let candidates = match &rule.groups {
        Some(groups) => members_of_best_groups(groups, &biased),
        None => (0..rule.experts).collect(),
    };
    let mut chosen = best(&biased, candidates, rule.top_k);
    chosen.sort_unstable();

    let mut weights: Vec<f32> = chosen.iter().map(|&expert| scores[expert]).collect();
    if rule.score == Score::SoftmaxOfChosen {
        weights = softmax(&weights);
    }
    if let Some(normalise) = rule.normalise {
        let sum: f32 = weights.iter().sum();
        let divisor = match normalise {
            Normalise::Epsilon(epsilon) => sum + epsilon,
            Normalise::Floor(floor) => sum.max(floor),
        };
        weights.iter_mut().for_each(|weight| *weight /= divisor);
    }
    weights.iter_mut().for_each(|weight| *weight *= rule.scale);
    (chosen.into_iter().map(|expert| expert as u32).collect(), weights)
}

/// The experts of the groups whose scores are best.
fn members_of_best_groups(groups: &Groups, biased: &[f32]) -> Vec<usize> {
    let size = biased.len() / groups.count;
    let of_group = |group: usize| group * size..(group + 1) * size;
    let group_scores: Vec<f32> = (0..groups.count)
        .map(|group| {
            let taken = match groups.rule {
                GroupRule::Max => 1,
                GroupRule::TopTwoSum => 2,
            };
            best(biased, of_group(group).collect(), taken).into_iter().map(|expert| biased[expert]).sum()
        })
        .collect();
    best(&group_scores, (0..groups.count).collect(), groups.keep).into_iter().flat_map(of_group).collect()
}

/// The `count` candidates of highest score, best first; ties go to the lowest index, and NaN scores
/// below everything.
fn best(scores: &[f32], mut candidates: Vec<usize>, count: usize) -> Vec<usize> {
    candidates.sort_unstable_by(|&a, &b| {
        let (x, y) = (scores[a], scores[b]);
        let descending = y.partial_cmp(&x).unwrap_or_else(|| x.is_nan().cmp(&y.is_nan()));
        descending.then(a.cmp(&b))
    });
    candidates.truncate(count);
    candidates
}

fn softmax(x: &[f32]) -> Vec<f32> {
    let peak = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = x.iter().map(|x| (x - peak).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: RouterRule =
        RouterRule { experts: 4, top_k: 2, score: Score::Softmax, groups: None, normalise: None, scale: 1.0 };

    fn close(got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn softmax_weights_are_raw_renormalised_or_of_the_chosen() {
        let logits = [1.0, 3.0, 0.0, 2.0];
        let all: f64 = (0..4).map(|x| f64::from(x).exp()).sum();
        let (one, two) = (3f64.exp(), 2f64.exp());
        let (ids, weights) = route(&PLAIN, &logits, None);
        assert_eq!(ids, [1, 3]);
        close(&weights, &[one / all, two / all]);
        let renormalised = RouterRule { normalise: Some(Normalise::Epsilon(1e-20)), scale: 2.0, ..PLAIN };
        close(&route(&renormalised, &logits, None).1, &[2.0 * one / (one + two), 2.0 * two / (one + two)]);
        let chosen = RouterRule { score: Score::SoftmaxOfChosen, ..PLAIN };
        close(&route(&chosen, &logits, None).1, &[one / (one + two), two / (one + two)]);
        let floored = RouterRule { normalise: Some(Normalise::Floor(4.0)), ..PLAIN };
        close(&route(&floored, &logits, None).1, &[one / all / 4.0, two / all / 4.0]);
    }

    #[test]
    fn the_bias_selects_and_never_weighs() {
        let rule = RouterRule { score: Score::Sigmoid, ..PLAIN };
        let (ids, weights) = route(&rule, &[0.0, 1.0, 2.0, -1.0], Some(&[0.0, -1.0, 0.0, 9.0]));
        assert_eq!(ids, [2, 3]);
        close(&weights, &[1.0 / (1.0 + (-2f64).exp()), 1.0 / (1.0 + 1f64.exp())]);
    }

    /// Biased scores: [.5 .4] [.9 .0] [.3 .3] [-9 -9]; the sum of two prefers groups 0 and 1, and with
    /// all scores of the kept groups negative a masked zero would win.
    #[test]
    fn groups_limit_the_choice() {
        let rule = |rule, keep| RouterRule {
            experts: 8,
            score: Score::SoftmaxOfChosen,
            groups: Some(Groups { count: 4, keep, rule }),
            ..PLAIN
        };
        let scores = [0.5, 0.4, 0.9, 0.0, 0.3, 0.3, -9.0, -9.0];
        assert_eq!(route(&rule(GroupRule::TopTwoSum, 1), &scores, None).0, [0, 1]);
        assert_eq!(route(&rule(GroupRule::Max, 1), &scores, None).0, [2, 3]);
        assert_eq!(route(&rule(GroupRule::TopTwoSum, 2), &scores, None).0, [0, 2]);
        let low = scores.map(|score| score - 20.0);
        assert_eq!(route(&rule(GroupRule::TopTwoSum, 1), &low, None).0, [0, 1]);
    }

    #[test]
    fn ties_go_to_the_lowest_index_and_nan_comes_last() {
        assert_eq!(route(&PLAIN, &[1.0; 4], None).0, [0, 1]);
        let rule = RouterRule { score: Score::SoftmaxOfChosen, ..PLAIN };
        assert_eq!(route(&rule, &[f32::NAN, f32::NEG_INFINITY, 0.0, f32::NAN], None).0, [1, 2]);
        assert_eq!(route(&rule, &[f32::NAN; 4], None).0, [0, 1]);
        let grouped = RouterRule { groups: Some(Groups { count: 2, keep: 1, rule: GroupRule::Max }), ..rule };
        assert_eq!(route(&grouped, &[f32::NAN, f32::NAN, 0.0, f32::NAN], None).0, [2, 3]);
    }
}
