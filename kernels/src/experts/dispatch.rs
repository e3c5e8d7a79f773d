//! Grouping of (token, rank) pairs by expert, and the combine.

use super::gate_up::{BLOCK, GateUpProduct};
use super::{ExpertFfn, down_part};
use crate::format::{Matrix, Values};
use crate::matmul::{self, Input, Operand};
use crate::quantised::{Activations, PANEL, Precision, is_quantised};
use crate::rows::{Bands, Cut, Rows, RowsMut, for_each_part, for_each_part_of_two};
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
    /// With which weights of 4 or 8 bits are multiplied in integers, and bf16 in tiles where the processor has them.
    pub precision: Option<Precision>,
    /// Whether experts are stored in floats: then none is multiplied in integers, else none in tiles.
    pub floats: bool,
}

impl DispatchLimits {
    /// Bytes a [`Dispatch`] allocates: with P = tokens * top_k pairs, 4 P (hidden + inter) for outputs and
    /// activated rows, 12 P for the lists, 12 per expert and 4; and packed activations.
    pub fn bytes(&self) -> usize {
        let pairs = self.tokens * self.top_k;
        let widest = self.hidden.max(self.inter);
        let packed = self.precision.map(|p| Activations::bytes_for_experts(p, self.floats, pairs, widest));
        4 * pairs * (self.hidden + self.inter) + 12 * pairs + 12 * self.experts + 4 + packed.unwrap_or(0)
    }
}

/// Buffers of [`run_experts`], allocated once.
#[derive(Debug)]
pub struct Dispatch {
    limits: DispatchLimits,
    /// Pairs of every expert, then where the next pair of it goes. `[experts]`
    counts: Vec<u32>,
    /// Experts that have pairs, ascending. `[experts]`
    active: Vec<u32>,
    /// Place of the first pair of each, and last the number of pairs. `[experts + 1]`
    firsts: Vec<u32>,
    /// Token of every pair, grouped by expert. `[pairs]`
    tokens: Vec<u32>,
    /// Place of pair (token, rank) in the groups. `[pairs]`
    places: Vec<u32>,
    /// Activated rows, grouped. `[pairs, inter]`
    inner: Vec<f32>,
    /// Output rows, grouped. `[pairs, hidden]`
    outer: Vec<f32>,
    /// Packed rows of x of every pair, then packed activated rows.
    activations: Option<Activations>,
}

impl Dispatch {
    /// Allocates [`DispatchLimits::bytes`].
    pub fn new(limits: DispatchLimits) -> Self {
        let pairs = limits.tokens * limits.top_k;
        assert!(pairs > 0 && u32::try_from(pairs).is_ok(), "a dispatch of {pairs} pairs");
        Self {
            limits,
            counts: vec![0; limits.experts],
            active: vec![0; limits.experts],
            firsts: vec![0; limits.experts + 1],
            tokens: vec![0; pairs],
            places: vec![0; pairs],
            inner: vec![0.0; pairs * limits.inter],
            outer: vec![0.0; pairs * limits.hidden],
            activations: limits
                .precision
                .map(|p| Activations::for_experts(p, limits.floats, pairs, limits.hidden.max(limits.inter))),
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
                (self.active[active], self.firsts[active]) = (expert as u32, first);
                active += 1;
            }
            first += std::mem::replace(count, first);
        }
        self.firsts[active] = first;
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

/// An expert that every token takes, computed side by side with the routed ones.
pub struct SharedExpert<'a> {
    /// Its weights.
    pub ffn: ExpertFfn<'a>,
    /// For weights of 4 or 8 bits: room for `[tokens, hidden]` and `[tokens, inter]`.
    pub activations: Option<&'a mut Activations>,
    /// `[tokens, inter]` at least.
    pub inner: &'a mut [f32],
    /// `[tokens, hidden]` at least.
    pub outer: &'a mut [f32],
}

impl SharedExpert<'_> {
    fn reborrow(&mut self) -> SharedExpert<'_> {
        let Self { ffn, activations, inner, outer } = self;
        SharedExpert { ffn: *ffn, activations: activations.as_deref_mut(), inner, outer }
    }
}

/// The routed experts: `out[t]` = the sum over ranks r, ascending, of `weights[t, r]` times expert
/// `ids[t, r]` of `x[t]`, from zero by fused multiply-add; then the
/// shared expert of `x[t]` is added. `lookup` gives an expert's weights; it is called
/// several times for each, so it should be cheap. All experts have the same shape.
///
/// # Panics
/// If shapes differ from one another or from the limits of `dispatch`, or an id is out of range.
pub fn run_experts<'w>(
    isa: Isa,
    routed: Routed<'_>,
    lookup: &(dyn Fn(u32) -> ExpertFfn<'w> + Sync),
    mut shared: Option<SharedExpert<'_>>,
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
        let shared = shared.as_mut().map(SharedExpert::reborrow);
        run_some(isa, Routed { x, ids, weights }, lookup, shared, dispatch, out);
    }
}

fn run_some<'w>(
    isa: Isa,
    routed: Routed<'_>,
    lookup: &(dyn Fn(u32) -> ExpertFfn<'w> + Sync),
    shared: Option<SharedExpert<'_>>,
    dispatch: &mut Dispatch,
    out: &mut [f32],
) {
    let active = dispatch.group(routed.ids);
    let DispatchLimits { top_k, hidden, .. } = dispatch.limits;
    let pairs = routed.ids.len();
    if pairs == 0 {
        return;
    }
    let (active, firsts) = (&dispatch.active[..active], &dispatch.firsts[..=active]);
    let example = lookup(active[0]);
    let inter = example.inter();
    assert!(inter <= dispatch.limits.inter, "experts of {inter}, buffers for {}", dispatch.limits.inter);
    let ffn = |band: usize| {
        let ffn = lookup(active[band]);
        ffn.check();
        assert_eq!((ffn.hidden(), ffn.inter()), (hidden, inter), "shape of expert {}", active[band]);
        ffn
    };
    let columns = |work: usize, width: usize, least: usize| {
        matmul::pieces(work * pairs, (1, active.len() * width.next_multiple_of(least)), (1, least))
            .1
            .min(width)
    };
    let (gate_up_work, down_work) = example.work();
    let mut activations = dispatch.activations.as_mut();
    // Which expert is the first must not matter: packed if any wants it, used by those that do.
    let packing = |weight: &dyn Fn(&ExpertFfn<'_>) -> bool| (0..active.len()).map(ffn).find(weight);
    let floats = dispatch.limits.floats;
    let packs = |w: &Matrix<'_>| if floats { matches!(w.values, Values::Bf16(_)) } else { is_quantised(w) };

    let x = Rows::new(routed.x, hidden);
    let tokens = &dispatch.tokens[..pairs];
    let inner = &mut dispatch.inner[..pairs * inter];
    let cut = columns(gate_up_work, inter, BLOCK);
    // All experts of a single token take the same row.
    let one = [0];
    let (picks, bands): (&[u32], _) =
        if x.count() == 1 { (&one, Bands::Every(1)) } else { (tokens, Bands::At(firsts)) };
    let packed = packing(&|ffn| packs(ffn.first()) && !ffn.gate_up_transposed()).and_then(|example| {
        let x = Input { x, picks: Some(picks) };
        activations.as_deref_mut()?.pack(isa, x, example.first(), bands)
    });
    // A shared expert takes part as one more band of each region.
    let (shared_ffn, shared_inner, shared_outer, mut shared_room) = match shared {
        Some(SharedExpert { ffn, activations, inner, outer }) => (Some(ffn), inner, outer, activations),
        None => (None, &mut [][..], &mut [][..], None),
    };
    let count = x.count();
    if let Some(ffn) = &shared_ffn {
        ffn.check();
        assert_eq!(ffn.hidden(), hidden, "width of the shared expert");
    }
    let shared_inter = shared_ffn.map_or(1, |ffn| ffn.inter());
    let shared_len = |width: usize| if shared_ffn.is_some() { count * width } else { 0 };
    let shared_inner = &mut shared_inner[..shared_len(shared_inter)];
    let shared_outer = &mut shared_outer[..shared_len(hidden)];
    let shared_cut = |work: usize, width: usize, least: usize| {
        let (rows, columns) = matmul::pieces(work * count, (count, width), (PANEL, least));
        (Bands::Every(rows.next_multiple_of(PANEL)), columns)
    };
    let (shared_gate_up, shared_down) = shared_ffn.map_or((0, 0), |ffn| ffn.work());

    let shared_x = shared_ffn
        .as_ref()
        .map(|ffn| Operand::packed_for(isa, Input::all(x), ffn.first(), shared_room.as_deref_mut()));
    let (shared_bands, shared_columns) = shared_cut(shared_gate_up, shared_inter, BLOCK);
    for_each_part_of_two(
        (
            Cut::new(RowsMut::new(inner, inter), Bands::At(firsts), cut),
            Cut::new(RowsMut::new(&mut *shared_inner, shared_inter), shared_bands, shared_columns),
        ),
        &|part| {
            let (first, count) = (part.first_row, part.rows.count());
            let x = Input { x, picks: Some(&tokens[first..][..count]) };
            let packed = packed.map(|packed| packed.rows_from(if picks.len() == 1 { 0 } else { first }));
            let x = Operand::new(x, packed);
            GateUpProduct { x, ffn: ffn(part.band), first: part.first_column, out: part.rows }.run(isa);
        },
        &|part| {
            let (Some(ffn), Some(x)) = (shared_ffn, shared_x) else { unreachable!("no rows without it") };
            let x = x.slice(part.first_row, part.rows.count());
            GateUpProduct { x, ffn, first: part.first_column, out: part.rows }.run(isa);
        },
    );
    let inner = Rows::new(inner, inter);
    let outer = &mut dispatch.outer[..pairs * hidden];
    let least = |ffn: &ExpertFfn<'_>| if ffn.down_transposed { matmul::MIN_COLUMNS } else { BLOCK };
    let cut = columns(down_work, hidden, least(&example));
    let packed = packing(&|ffn| packs(&ffn.down) && !ffn.down_transposed)
        .and_then(|example| activations?.pack(isa, Input::all(inner), &example.down, Bands::At(firsts)));
    let shared_inner = Rows::new(shared_inner, shared_inter);
    let shared_x = shared_ffn
        .as_ref()
        .map(|ffn| Operand::packed_for(isa, Input::all(shared_inner), &ffn.down, shared_room));
    let (shared_bands, shared_columns) =
        shared_cut(shared_down, hidden, shared_ffn.as_ref().map_or(1, least));
    for_each_part_of_two(
        (
            Cut::new(RowsMut::new(outer, hidden), Bands::At(firsts), cut),
            Cut::new(RowsMut::new(&mut *shared_outer, hidden), shared_bands, shared_columns),
        ),
        &|part| {
            let rows = Input::all(inner.slice(part.first_row, part.rows.count()));
            let x = Operand::new(rows, packed.map(|packed| packed.rows_from(part.first_row)));
            down_part(isa, x, &ffn(part.band), part.first_column, part.rows);
        },
        &|part| {
            let (Some(ffn), Some(x)) = (shared_ffn, shared_x) else { unreachable!("no rows without it") };
            let x = x.slice(part.first_row, part.rows.count());
            down_part(isa, x, &ffn, part.first_column, part.rows);
        },
    );
    let combine = Combine {
        outer,
        shared: shared_outer,
        places: &dispatch.places[..pairs],
        weights: routed.weights,
        top_k,
        hidden,
    };
    combine.run(isa, RowsMut::new(out, hidden));
}

/// Values below which combining stays on its thread.
const SMALL: usize = 64 * 1024;

/// Weighted sums of each token's output rows.
struct Combine<'a> {
    outer: &'a [f32],
    /// Outputs of the shared expert `[tokens, hidden]`, if there is one.
    shared: &'a [f32],
    places: &'a [u32],
    weights: &'a [f32],
    top_k: usize,
    hidden: usize,
}

impl Combine<'_> {
    /// One token per row of `out`.
    fn run(&self, isa: Isa, out: RowsMut<'_>) {
        let tokens = (SMALL / (self.top_k * self.hidden)).max(1);
        for_each_part(Cut::new(out, Bands::Every(tokens), self.hidden), &|mut part| {
            for t in 0..part.rows.count() {
                isa.run(CombineToken { combine: self, token: part.first_row + t, out: part.rows.row(t) });
            }
        });
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
        let Combine { outer, shared, places, weights, top_k, hidden } = *self.combine;
        let shared = (!shared.is_empty()).then(|| &shared[self.token * hidden..][..hidden]);
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
            if let Some(shared) = shared {
                let y = shared[c * LANES..].first_chunk().expect("whole chunks come before the tail");
                sum = l.add(sum, l.load(y));
            }
            l.store(sum, out);
        }
        let tail = hidden - rest.len();
        for (j, out) in rest.iter_mut().enumerate() {
            *out = places.iter().zip(weights).fold(0.0, |sum, (&place, &weight)| {
                weight.mul_add(outer[place as usize * hidden + tail + j], sum)
            });
            if let Some(shared) = shared {
                *out += shared[tail + j];
            }
        }
    }
}
