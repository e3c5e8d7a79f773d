//! Grouping of (token, rank) pairs by expert, and the combine.

use super::gate_up::GateUpProduct;
use super::{ExpertFfn, activated, down_product};
use crate::matmul::{self, Input};
use crate::rows::{Rows, RowsMut};
use crate::simd::{Isa, LANES, Lanes, Work};

/// What a [`Dispatch`] must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DispatchLimits {
    /// Tokens worked on at a time; a call with more takes them in turns of this many.
    pub tokens: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Number of experts.
    pub experts: usize,
    /// Width of the model, or of the latent that experts work in.
    pub hidden: usize,
    /// Greatest width between an expert's projections.
    pub inter: usize,
}

impl DispatchLimits {
    /// Bytes a [`Dispatch`] allocates: with P = tokens * top_k pairs, 4 P (hidden + inter) for outputs and
    /// activated rows, 12 P for the lists and 16 per expert.
    pub fn bytes(&self) -> usize {
        let pairs = self.tokens * self.top_k;
        4 * pairs * (self.hidden + self.inter) + 12 * pairs + 16 * self.experts
    }
}

/// Buffers of [`run_experts`], allocated once.
#[derive(Debug)]
pub struct Dispatch {
    limits: DispatchLimits,
    /// Pairs of every expert, then where the next pair of it goes. `[experts]`
    counts: Vec<u32>,
    /// Experts that have pairs, ascending. `[experts]`
    active: Vec<Active>,
    /// Token of every pair, grouped by expert. `[pairs]`
    tokens: Vec<u32>,
    /// Place of pair (token, rank) in the groups. `[pairs]`
    places: Vec<u32>,
    /// Activated rows, grouped. `[pairs, inter]`
    inner: Vec<f32>,
    /// Output rows, grouped. `[pairs, hidden]`
    outer: Vec<f32>,
}

/// One expert's pairs begin at place `first` of the groups.
#[derive(Clone, Copy, Debug, Default)]
struct Active {
    expert: u32,
    first: u32,
}

impl Dispatch {
    /// Allocates [`DispatchLimits::bytes`].
    pub fn new(limits: DispatchLimits) -> Self {
        let pairs = limits.tokens * limits.top_k;
        assert!(pairs > 0 && u32::try_from(pairs).is_ok(), "a dispatch of {pairs} pairs");
        Self {
            limits,
            counts: vec![0; limits.experts],
            active: vec![Active::default(); limits.experts],
            tokens: vec![0; pairs],
            places: vec![0; pairs],
            inner: vec![0.0; pairs * limits.inter],
            outer: vec![0.0; pairs * limits.hidden],
        }
    }

    /// The limits it was made for.
    pub fn limits(&self) -> DispatchLimits {
        self.limits
    }

    /// Groups pairs by expert with a stable counting sort; gives back how many experts are active.
    fn group(&mut self, ids: &[u32]) -> usize {
        self.counts.fill(0);
        for &id in ids {
            assert!((id as usize) < self.limits.experts, "expert {id} of {}", self.limits.experts);
            self.counts[id as usize] += 1;
        }
        let (mut first, mut active) = (0, 0);
        for (expert, count) in self.counts.iter_mut().enumerate() {
            if *count > 0 {
                self.active[active] = Active { expert: expert as u32, first };
                active += 1;
            }
            first += std::mem::replace(count, first);
        }
        for (pair, &id) in ids.iter().enumerate() {
            let place = &mut self.counts[id as usize];
            self.tokens[*place as usize] = (pair / self.limits.top_k) as u32;
            self.places[pair] = *place;
            *place += 1;
        }
        active
    }
}

/// Tokens and where they go.
#[derive(Clone, Copy, Debug)]
pub struct Routed<'a> {
    /// `[tokens, hidden]`.
    pub x: &'a [f32],
    /// Experts of every token. `[tokens, top_k]`
    pub ids: &'a [u32],
    /// Their weights. `[tokens, top_k]`
    pub weights: &'a [f32],
}

/// The routed experts: `out[t]` = the sum over ranks r, ascending, of `weights[t, r]` times expert
/// `ids[t, r]` of `x[t]`, from zero by fused multiply-add. `lookup` gives an expert's weights; it is called
/// several times for each, so it should be cheap. All experts have the same shape.
///
/// # Panics
/// If shapes differ from one another or from the limits of `dispatch`, or an id is out of range.
pub fn run_experts<'w>(
    isa: Isa,
    routed: Routed<'_>,
    lookup: &(dyn Fn(u32) -> ExpertFfn<'w> + Sync),
    dispatch: &mut Dispatch,
    out: &mut [f32],
) {
    let DispatchLimits { tokens, top_k, hidden, .. } = dispatch.limits;
    let count = routed.x.len() / hidden;
    assert_eq!(routed.x.len(), count * hidden, "x is [tokens, {hidden}]");
    assert_eq!(
        (routed.ids.len(), routed.weights.len()),
        (count * top_k, count * top_k),
        "top {top_k} of every token"
    );
    assert_eq!(out.len(), routed.x.len(), "output [tokens, {hidden}]");
    let pairs = routed.ids.chunks(tokens * top_k).zip(routed.weights.chunks(tokens * top_k));
    let rows = routed.x.chunks(tokens * hidden).zip(out.chunks_mut(tokens * hidden));
    for ((x, out), (ids, weights)) in rows.zip(pairs) {
        run_some(isa, Routed { x, ids, weights }, lookup, dispatch, out);
    }
}

fn run_some<'w>(
    isa: Isa,
    routed: Routed<'_>,
    lookup: &(dyn Fn(u32) -> ExpertFfn<'w> + Sync),
    dispatch: &mut Dispatch,
    out: &mut [f32],
) {
    let active = dispatch.group(routed.ids);
    let DispatchLimits { top_k, hidden, .. } = dispatch.limits;
    let active = &dispatch.active[..active];
    let example = lookup(active[0].expert);
    let inter = example.inter();
    assert!(inter <= dispatch.limits.inter, "experts of {inter}, buffers for {}", dispatch.limits.inter);
    let pairs = routed.ids.len();
    let region = Region { isa, lookup, hidden, inter, grains: (0, 0) };
    let (gate_up, down) = example.work();
    let region = Region { grains: (matmul::grain(gate_up * pairs), matmul::grain(down * pairs)), ..region };

    let inner = &mut dispatch.inner[..pairs * inter];
    let tokens = &dispatch.tokens[..pairs];
    region.gate_up(active, Rows::new(routed.x, hidden), tokens, RowsMut::new(inner, inter));
    let outer = &mut dispatch.outer[..pairs * hidden];
    region.down(active, Rows::new(inner, inter), RowsMut::new(outer, hidden));
    let combine =
        Combine { outer, places: &dispatch.places[..pairs], weights: routed.weights, top_k, hidden };
    combine.run(isa, 0, RowsMut::new(out, hidden));
}

/// What both regions need.
struct Region<'a, 'w> {
    isa: Isa,
    lookup: &'a (dyn Fn(u32) -> ExpertFfn<'w> + Sync),
    hidden: usize,
    inter: usize,
    /// Multiply-adds of a piece of gate and up, and of down.
    grains: (usize, usize),
}

impl Region<'_, '_> {
    fn ffn(&self, expert: u32) -> ExpertFfn<'_> {
        let ffn = (self.lookup)(expert);
        ffn.check();
        assert_eq!((ffn.hidden(), ffn.inter()), (self.hidden, self.inter), "shape of expert {expert}");
        ffn
    }

    /// `out` holds the rows of `active`, `tokens` their tokens.
    fn gate_up(&self, active: &[Active], x: Rows<'_>, tokens: &[u32], out: RowsMut<'_>) {
        if let [one] = active {
            let x = Input { x, picks: Some(tokens) };
            return activated(
                self.isa,
                self.grains.0,
                GateUpProduct { x, ffn: self.ffn(one.expert), first: 0, out },
            );
        }
        let (left, right) = active.split_at(active.len() / 2);
        let at = (right[0].first - left[0].first) as usize;
        let (out_left, out_right) = out.split_rows(at);
        let (tokens_left, tokens_right) = tokens.split_at(at);
        join(
            self.small(tokens.len(), 2, self.grains.0),
            || self.gate_up(left, x, tokens_left, out_left),
            || self.gate_up(right, x, tokens_right, out_right),
        );
    }

    /// `x` and `out` hold the rows of `active`.
    fn down(&self, active: &[Active], x: Rows<'_>, out: RowsMut<'_>) {
        if let [one] = active {
            return down_product(self.isa, self.grains.1, &self.ffn(one.expert), Input::all(x), out);
        }
        let (left, right) = active.split_at(active.len() / 2);
        let at = (right[0].first - left[0].first) as usize;
        let (out_left, out_right) = out.split_rows(at);
        let (x_left, x_right) = (x.slice(0, at), x.slice(at, x.count() - at));
        join(
            self.small(x.count(), 1, self.grains.1),
            || self.down(left, x_left, out_left),
            || self.down(right, x_right, out_right),
        );
    }

    fn small(&self, pairs: usize, projections: usize, grain: usize) -> bool {
        pairs * projections * self.hidden * self.inter <= grain
    }
}

/// Both, at once unless `serial`.
fn join(serial: bool, a: impl FnOnce() + Send, b: impl FnOnce() + Send) {
    if serial {
        a();
        b();
    } else {
        rayon::join(a, b);
    }
}

/// Values below which combining stays on its thread.
const SMALL: usize = 64 * 1024;

/// Weighted sums of each token's output rows.
struct Combine<'a> {
    outer: &'a [f32],
    places: &'a [u32],
    weights: &'a [f32],
    top_k: usize,
    hidden: usize,
}

impl Combine<'_> {
    /// Tokens from `first` on, one per row of `out`.
    fn run(&self, isa: Isa, first: usize, mut out: RowsMut<'_>) {
        let count = out.count();
        if count >= 2 && count * self.top_k * self.hidden >= SMALL {
            let (top, bottom) = out.split_rows(count / 2);
            rayon::join(|| self.run(isa, first, top), || self.run(isa, first + count / 2, bottom));
            return;
        }
        for t in 0..count {
            isa.run(CombineToken { combine: self, token: first + t, out: out.row(t) });
        }
    }
}

struct CombineToken<'a> {
    combine: &'a Combine<'a>,
    token: usize,
    out: &'a mut [f32],
}

impl Work for CombineToken<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Combine { outer, places, weights, top_k, hidden } = *self.combine;
        let (chunks, rest) = self.out.as_chunks_mut::<LANES>();
        let pairs = self.token * top_k..(self.token + 1) * top_k;
        let places = &places[pairs.clone()];
        let weights = &weights[pairs];
        for (c, out) in chunks.iter_mut().enumerate() {
            let mut sum = l.splat(0.0);
            for (&place, &weight) in places.iter().zip(weights) {
                let y = &outer[place as usize * hidden + c * LANES..];
                let y = y.first_chunk().expect("whole chunks come before the tail");
                sum = l.fma(l.splat(weight), l.load(y), sum);
            }
            l.store(sum, out);
        }
        let tail = hidden - rest.len();
        for (j, out) in rest.iter_mut().enumerate() {
            *out = places.iter().zip(weights).fold(0.0, |sum, (&place, &weight)| {
                weight.mul_add(outer[place as usize * hidden + tail + j], sum)
            });
        }
    }
}
