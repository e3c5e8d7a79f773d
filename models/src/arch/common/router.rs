//! Routers and routed experts: the fields and names that most families share.

use kernels::experts::Activation;
use kernels::route::{GroupRule, Groups, Normalise, RouterRule, Score};

use super::Base;
use crate::config::{Experts, Moe};
use crate::error::{Error, Result};
use crate::fields::Fields;

/// Most experts of one layer; published models have up to 512.
const MAX_EXPERTS: usize = 4096;

/// Which router a family has, before its counts are known.
pub struct RouterKind {
    pub score: Score,
    pub groups: Option<Groups>,
    pub normalise: Option<Normalise>,
    pub scale: f64,
}

impl RouterKind {
    /// Softmax over all, top-k, optionally made to sum to 1.
    pub fn softmax(normalise: bool) -> Self {
        let normalise = normalise.then_some(Normalise::Epsilon(0.0));
        Self { score: Score::Softmax, groups: None, normalise, scale: 1.0 }
    }

    /// DeepSeek's fields: groups, `norm_topk_prob`, `routed_scaling_factor`.
    pub fn deepseek(fields: &Fields, score: Score, rule: GroupRule, normalised: bool) -> Result<Self> {
        let count = fields.size_or("n_group", 1)?;
        let keep = fields.size_or("topk_group", 1)?;
        if keep == 0 || keep > count {
            let message = format!("{keep} of {count} groups cannot be kept");
            return Err(Error::config(fields.path("topk_group"), message));
        }
        let normalise = fields.flag_or("norm_topk_prob", normalised)?;
        Ok(Self {
            score,
            groups: (count > keep).then_some(Groups { count, keep, rule }),
            normalise: normalise.then_some(Normalise::Epsilon(1e-20)),
            scale: fields.opt_number("routed_scaling_factor")?.unwrap_or(1.0),
        })
    }

    /// The rule for the counts that the fields `experts` and `top_k` hold.
    pub fn rule(self, fields: &Fields, experts: &str, top_k: &str) -> Result<RouterRule> {
        self.rule_of(fields, (experts, fields.size(experts)?), (top_k, fields.size(top_k)?))
    }

    /// The same for counts that were read already, with the names of their fields.
    pub fn rule_of(
        self,
        fields: &Fields,
        experts: (&str, usize),
        top_k: (&str, usize),
    ) -> Result<RouterRule> {
        let ((experts_field, experts), (top_k_field, top_k)) = (experts, top_k);
        if experts > MAX_EXPERTS {
            let message = format!("{experts} in a layer are over the limit of {MAX_EXPERTS}");
            return Err(Error::config(fields.path(experts_field), message));
        }
        if top_k == 0 || top_k > experts {
            let message = format!("{top_k} of {experts} experts cannot be chosen");
            return Err(Error::config(fields.path(top_k_field), message));
        }
        if let Some(groups) = &self.groups {
            let whole = groups.count > 0 && experts.is_multiple_of(groups.count);
            if !whole || groups.keep * (experts / groups.count) < top_k {
                let message = format!("{} groups of {experts} experts cannot give {top_k}", groups.count);
                return Err(Error::config(fields.path("n_group"), message));
            }
        }
        let Self { score, groups, normalise, scale } = self;
        Ok(RouterRule { experts, top_k, score, groups, normalise, scale: scale as f32 })
    }
}

/// Routed experts below `<layer>.<block>`: router `gate`, experts `experts.<e>.<names>`.
pub fn moe(base: &Base, block: &str, rule: RouterRule, intermediate: usize, names: [&'static str; 3]) -> Moe {
    let [gate, up, down] = names;
    Moe {
        router: base.linear(format!("{block}.gate"), rule.experts, base.hidden),
        selection_bias: None,
        rule,
        intermediate,
        experts: Experts::PerExpert { prefix: format!("{block}.experts"), gate, up, down },
        activation: Activation::SiluGlu,
        shared: None,
    }
}

/// Names of an expert's projections in most families.
pub const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
/// The same where gate, up and down are called w1, w3 and w2.
pub const W_NAMES: [&str; 3] = ["w1", "w3", "w2"];
