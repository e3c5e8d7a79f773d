//! The router on the device: [`crate::route`]'s rules, for all tokens at once. `kernels/cuda/route.cu`; the
//! reference is [`crate::reference::route`].

use super::buffer::Slice;
use super::device::Device;
use super::error::DeviceError;
use super::image::Kernel;
use super::rows::count;
use crate::route::{GroupRule, Groups, Normalise, RouterRule, Score};

const ROUTE: Kernel = Kernel::new("route", "route");

/// The most experts, chosen experts and groups that the kernel's warps have lanes for.
const MOST_EXPERTS: usize = 512;
const MOST_CHOSEN: usize = 32;
const MOST_GROUPS: usize = 32;
/// Tokens from which on blocks take several: fewer are spread over the device.
const MANY: usize = 512;

/// Routes tokens. Ids are ascending for each token.
pub struct Route<'a> {
    /// The rule.
    pub rule: RouterRule,
    /// `[tokens, experts]`.
    pub logits: Slice<'a, f32>,
    /// `[experts]`: added to the scores for the choice.
    pub bias: Option<Slice<'a, f32>>,
    /// Tokens.
    pub tokens: usize,
    /// `[tokens, top_k]`.
    pub ids: Slice<'a, i32>,
    /// `[tokens, top_k]`.
    pub weights: Slice<'a, f32>,
}

impl Route<'_> {
    /// # Panics
    /// If a shape is wrong, the rule cannot give `top_k` experts, or it is for more than 512 experts, 32 of them
    /// or 32 groups.
    pub fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let RouterRule { experts, top_k, score, groups, normalise, scale } = self.rule;
        let Groups { count: groups, keep, rule } =
            groups.unwrap_or(Groups { count: 1, keep: 1, rule: GroupRule::Max });
        assert!(experts <= MOST_EXPERTS, "route: {experts} experts; {MOST_EXPERTS} are possible");
        assert!(top_k > 0 && top_k <= MOST_CHOSEN.min(experts), "route: top {top_k} of {experts} experts");
        assert!(groups > 0 && groups <= MOST_GROUPS, "route: {groups} groups; {MOST_GROUPS} are possible");
        assert!(experts.is_multiple_of(groups) && keep <= groups, "route: {keep} of {groups} equal groups");
        assert!(keep * (experts / groups) >= top_k, "route: the groups kept hold too few experts");
        assert!(self.logits.len() >= self.tokens * experts, "route: one logit per expert");
        assert!(self.bias.is_none_or(|bias| bias.len() == experts), "route: one bias per expert");
        let chosen = self.tokens * top_k;
        assert!(self.ids.len() >= chosen && self.weights.len() >= chosen, "route: room for top-k");
        if self.tokens == 0 {
            return Ok(());
        }
        let warps = if self.tokens < MANY { 1 } else { 4 };
        let launch = device.launch(ROUTE, count(self.tokens.div_ceil(warps)), 32 * warps as u32, 0).early();
        let launch = launch.arg(self.logits).arg(self.bias).arg(count(self.tokens));
        let launch = launch.arg(count(experts)).arg(count(top_k)).arg(match score {
            Score::Softmax => 0,
            Score::Sigmoid => 1,
            Score::SoftmaxOfChosen => 2u32,
        });
        let launch = launch.arg(count(groups)).arg(count(keep)).arg(match rule {
            GroupRule::Max => 0,
            GroupRule::TopTwoSum => 1u32,
        });
        let (normalise, by) = match normalise {
            None => (0u32, 0.0),
            Some(Normalise::Epsilon(epsilon)) => (1, epsilon),
            Some(Normalise::Floor(floor)) => (2, floor),
        };
        let launch = launch.arg(normalise).arg(by).arg(scale).arg(self.ids).arg(self.weights);
        // SAFETY: the arguments of route; tokens have their logits, and room for what is chosen, as checked.
        unsafe { launch.run() }
    }
}
