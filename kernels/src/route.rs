//! The router: from the logits of one token to its k experts and their weights, in f32.
//!
//! The bias takes part in the choice only. Of equal scores the lowest index wins; NaN scores below
//! everything. The chosen experts are written in ascending order, which is the order in which
//! `experts` adds their outputs.

use crate::rows::{Rows, RowsMut, for_each_row_of_three};
use crate::simd::{self, Isa};

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Logistic function of each logit.
    Sigmoid,
    /// The choice is by logit; the weights are a softmax over the chosen logits (gpt-oss).
    SoftmaxOfChosen,
}

/// The score of a group of experts, from the biased scores of its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupRule {
    /// The best member (DeepSeek-V2).
    Max,
    /// The sum of the best two (DeepSeek-V3).
    TopTwoSum,
}

/// Experts are in `count` equal groups of which the best `keep` may be chosen from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups; divides the number of experts.
    pub count: usize,
    /// Groups kept.
    pub keep: usize,
    /// How groups are scored.
    pub rule: GroupRule,
}

/// Division of the weights by their sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Normalise {
    /// By sum + epsilon.
    Epsilon(f32),
    /// By max(sum, floor).
    Floor(f32),
}

/// One router.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterRule {
    /// Number of experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// How logits become scores.
    pub score: Score,
    /// Group limit, if any.
    pub groups: Option<Groups>,
    /// Normalisation, if any.
    pub normalise: Option<Normalise>,
    /// Multiplied into the weights last.
    pub scale: f32,
}

impl RouterRule {
    /// f32 values of scratch that [`route`] needs.
    pub fn scratch_len(&self) -> usize {
        2 * self.experts + self.groups.map_or(0, |g| g.count)
    }
}

/// Tokens routed by one task.
const ROUTED: usize = 8;

/// [`route`] of every token: `logits` is `[tokens, experts]`, `ids` and `weights` are `[tokens, top_k]`, scratch has
/// [`RouterRule::scratch_len`] values for each.
///
/// # Panics
/// As [`route`].
pub fn route_rows(
    isa: Isa,
    rule: &RouterRule,
    logits: &[f32],
    bias: Option<&[f32]>,
    scratch: &mut [f32],
    (ids, weights): (&mut [u32], &mut [f32]),
) {
    let logits = Rows::new(logits, rule.experts);
    let (tokens, scratch_len) = (logits.count(), rule.scratch_len());
    let scratch = RowsMut::new(&mut scratch[..tokens * scratch_len], scratch_len);
    let rows = (scratch, RowsMut::new(ids, rule.top_k), RowsMut::new(weights, rule.top_k));
    for_each_row_of_three(ROUTED, rows, &|token, scratch, ids, weights| {
        route(isa, rule, logits.row(token), bias, scratch, ids, weights);
    });
}

/// Routes one token: `logits` is `[experts]`, `bias` too; `ids` and `weights` are `[top_k]`.
///
/// # Panics
/// If a shape is wrong, or the rule cannot give `top_k` experts.
pub fn route(
    isa: Isa,
    rule: &RouterRule,
    logits: &[f32],
    bias: Option<&[f32]>,
    scratch: &mut [f32],
    ids: &mut [u32],
    weights: &mut [f32],
) {
    let experts = rule.experts;
    assert_eq!(logits.len(), experts, "one logit per expert");
    assert!(bias.is_none_or(|b| b.len() == experts), "one bias per expert");
    assert_eq!((ids.len(), weights.len()), (rule.top_k, rule.top_k), "room for top-k");
    assert!(rule.top_k <= experts, "top {} of {experts} experts", rule.top_k);
    let (score, scratch) = scratch[..rule.scratch_len()].split_at_mut(experts);
    let (choice, groups) = scratch.split_at_mut(experts);

    score.copy_from_slice(logits);
    match rule.score {
        Score::Softmax => softmax(isa, score),
        Score::Sigmoid => simd::sigmoid_in_place(isa, score),
        Score::SoftmaxOfChosen => {}
    }
    choice.copy_from_slice(score);
    if let Some(bias) = bias {
        choice.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
    }

    match rule.groups {
        None => choose(choice, 0..experts, 0, ids),
        Some(limit) => choose_in_groups(&limit, choice, groups, ids),
    }
    ids.sort_unstable();

    for (weight, &id) in weights.iter_mut().zip(&*ids) {
        *weight = score[id as usize];
    }
    if rule.score == Score::SoftmaxOfChosen {
        softmax(isa, weights);
    }
    if let Some(normalise) = rule.normalise {
        let sum: f32 = weights.iter().sum();
        let divisor = match normalise {
            Normalise::Epsilon(epsilon) => sum + epsilon,
            Normalise::Floor(floor) => sum.max(floor),
        };
        weights.iter_mut().for_each(|w| *w /= divisor);
    }
    weights.iter_mut().for_each(|w| *w *= rule.scale);
}

fn softmax(isa: Isa, x: &mut [f32]) {
    let peak = simd::max(isa, x);
    simd::exp_in_place(isa, peak, x);
    let sum = simd::sum(isa, x);
    x.iter_mut().for_each(|v| *v /= sum);
}

/// Inserts the members into `best`, whose first `filled` entries are in descending order of `value`;
/// gives back how many are filled.
fn choose_from(value: &[f32], members: std::ops::Range<usize>, mut filled: usize, best: &mut [u32]) -> usize {
    // NaN is below everything, and members come in ascending order: only a greater value passes.
    let greater = |a: f32, b: f32| a > b || (b.is_nan() && !a.is_nan());
    for member in members {
        let mut at = filled;
        while at > 0 && greater(value[member], value[best[at - 1] as usize]) {
            at -= 1;
        }
        if at == best.len() {
            continue;
        }
        filled = (filled + 1).min(best.len());
        best.copy_within(at..filled - 1, at + 1);
        best[at] = member as u32;
    }
    filled
}

fn choose(value: &[f32], members: std::ops::Range<usize>, filled: usize, best: &mut [u32]) {
    let filled = choose_from(value, members, filled, best);
    assert_eq!(filled, best.len(), "experts to choose from");
}

fn choose_in_groups(limit: &Groups, choice: &[f32], groups: &mut [f32], ids: &mut [u32]) {
    assert!(limit.count > 0 && choice.len().is_multiple_of(limit.count), "equal groups of experts");
    assert!(limit.keep <= limit.count, "{} of {} groups", limit.keep, limit.count);
    let size = choice.len() / limit.count;
    for (group, members) in groups.iter_mut().zip(choice.chunks_exact(size)) {
        let mut best = [0; 2];
        let wanted = match limit.rule {
            GroupRule::Max => 1,
            GroupRule::TopTwoSum => size.min(2),
        };
        choose(members, 0..size, 0, &mut best[..wanted]);
        *group = best[..wanted].iter().map(|&m| members[m as usize]).sum();
    }
    let mut filled = 0;
    for group in 0..limit.count {
        let better = (0..limit.count).filter(|&other| ahead(groups, other, group)).count();
        if better < limit.keep {
            filled = choose_from(choice, group * size..(group + 1) * size, filled, ids);
        }
    }
    assert_eq!(filled, ids.len(), "the groups kept hold too few experts");
}

/// Whether group `a` is chosen before group `b`.
fn ahead(score: &[f32], a: usize, b: usize) -> bool {
    let (x, y) = (score[a], score[b]);
    match (x.is_nan(), y.is_nan()) {
        (true, true) => a < b,
        (true, false) => false,
        (false, true) => true,
        (false, false) => x > y || (x == y && a < b),
    }
}
