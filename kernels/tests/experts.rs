//! Expert feed-forward against the reference, and the same bits however it is grouped.

mod common;

use common::{FORMATS, Format, Random, Weight, assert_close_overall, bits, in_pools};
use kernels::experts::{
    Activation, Dispatch, DispatchLimits, ExpertFfn, GateUp, Routed, SharedExpert, ffn, ffn_scratch_len,
    run_experts,
};
use kernels::quantised::{Activations, Precision};
use kernels::{Isa, reference};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    Separate,
    Interleaved,
    Transposed,
}

struct Expert {
    gate: Weight,
    up: Weight,
    down: Weight,
    biases: Option<(Vec<f32>, Vec<f32>)>,
    layout: Layout,
    activation: Activation,
}

impl Expert {
    fn random(random: &mut Random, format: Format, layout: Layout, hidden: usize, inter: usize) -> Self {
        let (gate, down) = match layout {
            Layout::Separate => ((inter, hidden), (hidden, inter)),
            Layout::Interleaved => ((2 * inter, hidden), (hidden, inter)),
            Layout::Transposed => ((hidden, 2 * inter), (inter, hidden)),
        };
        let clamped = layout != Layout::Separate;
        Self {
            gate: Weight::random(random, format, gate.0, gate.1),
            up: Weight::random(random, format, inter, hidden),
            down: Weight::random(random, format, down.0, down.1),
            biases: clamped.then(|| (random.values(2 * inter), random.values(hidden))),
            layout,
            activation: if clamped {
                Activation::ClampedSwiGlu { limit: 0.7, alpha: 1.702 }
            } else {
                Activation::SiluGlu
            },
        }
    }

    fn ffn(&self) -> ExpertFfn<'_> {
        ExpertFfn {
            gate_up: match self.layout {
                Layout::Separate => GateUp::Separate { gate: self.gate.matrix(), up: self.up.matrix() },
                Layout::Interleaved => GateUp::Interleaved(self.gate.matrix()),
                Layout::Transposed => GateUp::InterleavedTransposed(self.gate.matrix()),
            },
            gate_up_bias: self.biases.as_ref().map(|b| &b.0[..]),
            down: self.down.matrix(),
            down_transposed: self.layout == Layout::Transposed,
            down_bias: self.biases.as_ref().map(|b| &b.1[..]),
            activation: self.activation,
        }
    }
}

/// In f32, in 16 and in 8 bits, and how far each may be from exact.
const PRECISIONS: [(Option<Precision>, f64); 3] =
    [(None, 1e-5), (Some(Precision::Int16), 1e-4), (Some(Precision::Int8), 0.05)];

const LAYOUTS: [Layout; 3] = [Layout::Separate, Layout::Interleaved, Layout::Transposed];

/// Distinct ascending experts, some of which many tokens want.
fn routing(random: &mut Random, tokens: usize, top_k: usize, experts: usize) -> (Vec<u32>, Vec<f32>) {
    let mut ids = vec![];
    for _ in 0..tokens {
        let mut mine: Vec<u32> = vec![];
        while mine.len() < top_k {
            let id = random.below(experts).min(random.below(experts)) as u32;
            if !mine.contains(&id) {
                mine.push(id);
            }
        }
        mine.sort_unstable();
        ids.extend(mine);
    }
    let weights = random.values(tokens * top_k);
    (ids, weights)
}

#[test]
fn a_feed_forward_meets_the_reference() {
    let mut random = Random(21);
    for format in FORMATS {
        for layout in LAYOUTS {
            for (hidden, inter) in [(32, 32), (96, 160), (33, 45)] {
                if format.grouped() && hidden % 32 != 0 {
                    continue;
                }
                let expert = Expert::random(&mut random, format, layout, hidden, inter);
                let tokens = 35;
                let x = random.values(tokens * hidden);
                let want = reference::ffn(&x, &expert.ffn());
                let what = format!("{format:?} {layout:?} [{hidden}, {inter}]");
                for (precision, tolerance) in PRECISIONS {
                    let mut room = precision.map(|p| Activations::new(Some(p), tokens, hidden.max(inter)));
                    let mut first: Option<Vec<u32>> = None;
                    for isa in Isa::available() {
                        let mut out = vec![f32::NAN; want.len()];
                        let mut scratch = vec![f32::NAN; ffn_scratch_len(tokens, inter)];
                        ffn(isa, &x, &expert.ffn(), room.as_mut(), &mut scratch, &mut out);
                        assert_close_overall(&out, &want, tolerance, &what);
                        // Tiles have their own order of sums.
                        if !(isa == Isa::Avx512Amx && format == Format::Bf16 && precision.is_some()) {
                            let first = first.get_or_insert_with(|| bits(&out));
                            assert!(*first == bits(&out), "{what} {isa:?}");
                        }
                        let mut alone = vec![f32::NAN; hidden];
                        let x = &x[33 * hidden..][..hidden];
                        ffn(isa, x, &expert.ffn(), room.as_mut(), &mut scratch, &mut alone);
                        assert_eq!(bits(&alone), bits(&out[33 * hidden..][..hidden]), "{what} {isa:?} alone");
                    }
                }
            }
        }
    }
}

#[test]
fn routed_experts_meet_the_reference() {
    let mut random = Random(22);
    let (experts, top_k, hidden, inter) = (9, 3, 64, 96);
    for format in FORMATS {
        for layout in LAYOUTS {
            let all: Vec<Expert> =
                (0..experts).map(|_| Expert::random(&mut random, format, layout, hidden, inter)).collect();
            let lookup = |id: u32| all[id as usize].ffn();
            let tokens = 13;
            let x = random.values(tokens * hidden);
            let (ids, weights) = routing(&mut random, tokens, top_k, experts);
            let routed = Routed { x: &x, ids: &ids, weights: &weights };
            let want = reference::run_experts(&routed, hidden, &lookup);
            for (precision, tolerance) in PRECISIONS {
                let mut firsts = [None, None];
                for isa in Isa::available() {
                    // Tiles have their own order of sums.
                    let tiles = isa == Isa::Avx512Amx && format == Format::Bf16 && precision.is_some();
                    // Room for all tokens, for some, and for one at a time.
                    for tokens in [20, 5, 1] {
                        let (inter, floats) = (inter + 8, !format.grouped());
                        let limits =
                            DispatchLimits { tokens, top_k, experts, hidden, inter, precision, floats };
                        let mut dispatch = Dispatch::new(limits);
                        let mut out = vec![f32::NAN; want.len()];
                        run_experts(isa, routed, &lookup, None, &mut dispatch, &mut out);
                        assert_close_overall(&out, &want, tolerance, &format!("{format:?} {layout:?}"));
                        let first = firsts[usize::from(tiles)].get_or_insert_with(|| bits(&out));
                        assert_eq!(first, &bits(&out), "{isa:?} {tokens}");
                    }
                }
            }
        }
    }
}

/// Large enough that both regions are cut, over experts and within them.
#[test]
fn threads_change_nothing() {
    let mut random = Random(23);
    let isa = Isa::detect();
    let (experts, top_k, hidden, inter) = (6, 2, 352, 320);
    for (format, layout) in [
        (Format::Int4, Layout::Separate),
        (Format::Mxfp4, Layout::Interleaved),
        (Format::Bf16, Layout::Transposed),
        (Format::Bf16, Layout::Separate),
    ] {
        let all: Vec<Expert> =
            (0..experts).map(|_| Expert::random(&mut random, format, layout, hidden, inter)).collect();
        for (tokens, precision) in [1, 90].into_iter().flat_map(|t| PRECISIONS.map(|(p, _)| (t, p))) {
            let x = random.values(tokens * hidden);
            let (ids, weights) = routing(&mut random, tokens, top_k, experts);
            let outs = in_pools(|| {
                let floats = !format.grouped();
                let limits = DispatchLimits { tokens, top_k, experts, hidden, inter, precision, floats };
                let mut dispatch = Dispatch::new(limits);
                let mut out = vec![f32::NAN; tokens * hidden];
                let routed = Routed { x: &x, ids: &ids, weights: &weights };
                run_experts(isa, routed, &|id| all[id as usize].ffn(), None, &mut dispatch, &mut out);
                let mut scratch = vec![f32::NAN; ffn_scratch_len(tokens, inter)];
                let mut shared = vec![f32::NAN; tokens * hidden];
                let mut room = precision.map(|p| Activations::new(Some(p), tokens, hidden.max(inter)));
                ffn(isa, &x, &all[0].ffn(), room.as_mut(), &mut scratch, &mut shared);
                (out, shared)
            });
            for (out, shared) in &outs {
                assert_eq!(bits(out), bits(&outs[0].0), "{format:?} {tokens}");
                assert_eq!(bits(shared), bits(&outs[0].1), "{format:?} {tokens}");
            }
        }
    }
}

const LIMITS: DispatchLimits =
    DispatchLimits { tokens: 4, top_k: 2, experts: 3, hidden: 8, inter: 8, precision: None, floats: false };

#[test]
fn no_token_is_no_work() {
    let limits = LIMITS;
    let routed = Routed { x: &[], ids: &[], weights: &[] };
    run_experts(Isa::Portable, routed, &|_| unreachable!(), None, &mut Dispatch::new(limits), &mut []);
}

#[test]
#[should_panic(expected = "expert 3 of 3")]
fn an_unknown_expert_is_refused() {
    let limits = DispatchLimits { hidden: 1, ..LIMITS };
    let routed = Routed { x: &[1.0], ids: &[0, 3], weights: &[0.5, 0.5] };
    run_experts(Isa::Portable, routed, &|_| unreachable!(), None, &mut Dispatch::new(limits), &mut [0.0]);
}

/// Side by side with the routed experts it gives what it gives alone, whatever its format.
#[test]
fn a_shared_expert_is_added_last() {
    let mut random = Random(24);
    let (experts, top_k, hidden, inter) = (5, 2, 160, 96);
    for (format, precision) in [
        (Format::Bf16, None),
        (Format::Bf16, Some(Precision::Int16)),
        (Format::Q8, Some(Precision::Int16)),
        (Format::Int4, Some(Precision::Int8)),
    ] {
        let mut expert = |format, inter| Expert::random(&mut random, format, Layout::Separate, hidden, inter);
        let all: Vec<Expert> = (0..experts).map(|_| expert(Format::Int4, inter)).collect();
        let shared = expert(format, 224);
        let lookup = |id: u32| all[id as usize].ffn();
        for tokens in [1, 7, 70] {
            let x = random.values(tokens * hidden);
            let (ids, weights) = routing(&mut random, tokens, top_k, experts);
            let routed = Routed { x: &x, ids: &ids, weights: &weights };
            let floats = false;
            let limits = DispatchLimits { tokens: 40, top_k, experts, hidden, inter, precision, floats };
            let (mut inner, mut outer) = (vec![0.0; tokens * 224], vec![0.0; tokens * hidden]);
            let mut room = precision.map(|p| Activations::new(Some(p), tokens, 224));
            let mut want = vec![f32::NAN; tokens * hidden];
            let isa = Isa::detect();
            run_experts(isa, routed, &lookup, None, &mut Dispatch::new(limits), &mut want);
            ffn(isa, &x, &shared.ffn(), room.as_mut(), &mut inner, &mut outer);
            want.iter_mut().zip(&outer).for_each(|(want, y)| *want += y);
            let outs = in_pools(|| {
                let (mut inner, mut outer) = (inner.clone(), vec![f32::NAN; outer.len()]);
                let mut room = precision.map(|p| Activations::new(Some(p), tokens, 224));
                let activations = room.as_mut();
                let shared =
                    SharedExpert { ffn: shared.ffn(), activations, inner: &mut inner, outer: &mut outer };
                let mut out = vec![f32::NAN; tokens * hidden];
                run_experts(isa, routed, &lookup, Some(shared), &mut Dispatch::new(limits), &mut out);
                out
            });
            for out in outs {
                assert_eq!(bits(&out), bits(&want), "{format:?} {precision:?} {tokens}");
            }
        }
    }
}

/// Any number of rows for one expert: what a token gets does not depend on how many others go there.
#[test]
fn a_token_is_the_same_alone_and_among_many() {
    let mut random = Random(25);
    let (isa, hidden, inter) = (Isa::detect(), 136, 72);
    let counts = [1, 2, 5, 15, 16, 17, 20, 31, 32, 33, 47, 63, 64, 65, 70, 80, 81, 130, 0, 3];
    let mut ids: Vec<u32> = (0..).zip(counts).flat_map(|(id, count)| vec![id; count]).collect();
    // Not in the order of experts.
    for i in (1..ids.len()).rev() {
        ids.swap(i, random.below(i + 1));
    }
    let (tokens, experts) = (ids.len(), counts.len());
    let x = random.values(tokens * hidden);
    let weights = vec![1.0; tokens];
    for (format, layout) in [Layout::Separate, Layout::Interleaved].map(|layout| (Format::Bf16, layout)) {
        let all: Vec<Expert> =
            (0..experts).map(|_| Expert::random(&mut random, format, layout, hidden, inter)).collect();
        for (precision, _) in PRECISIONS {
            let limits = DispatchLimits { tokens, top_k: 1, experts, hidden, inter, precision, floats: true };
            let mut out = vec![f32::NAN; tokens * hidden];
            let routed = Routed { x: &x, ids: &ids, weights: &weights };
            run_experts(
                isa,
                routed,
                &|id| all[id as usize].ffn(),
                None,
                &mut Dispatch::new(limits),
                &mut out,
            );
            let mut room = precision.map(|p| Activations::new(Some(p), 1, hidden));
            let mut scratch = vec![f32::NAN; ffn_scratch_len(1, inter)];
            for (t, (x, out)) in x.chunks(hidden).zip(out.chunks(hidden)).enumerate() {
                let expert = all[ids[t] as usize].ffn();
                let mut alone = vec![f32::NAN; hidden];
                ffn(isa, x, &expert, room.as_mut(), &mut scratch, &mut alone);
                assert_eq!(
                    bits(out),
                    bits(&alone),
                    "{layout:?} {precision:?}, token {t} of expert {}",
                    ids[t]
                );
            }
        }
    }
}

/// Of two formats in one layer: how an expert is multiplied does not depend on which others are active.
#[test]
fn experts_of_two_formats_change_nothing_for_one_another() {
    let mut random = Random(26);
    let (isa, experts, hidden, inter, tokens) = (Isa::detect(), 6, 96, 64, 40);
    // The first expert that is active is of either format.
    let [mut int4, mut bf16] = [Format::Int4, Format::Bf16].map(|format| {
        let expert = || Expert::random(&mut random, format, Layout::Separate, hidden, inter);
        std::iter::repeat_with(expert).take(experts / 2).collect::<Vec<_>>()
    });
    let all: Vec<Expert> = [int4.pop(), bf16.pop(), bf16.pop(), int4.pop(), int4.pop(), bf16.pop()]
        .into_iter()
        .flatten()
        .collect();
    let x = random.values(tokens * hidden);
    let ids: Vec<u32> = (0..tokens).map(|_| random.below(experts) as u32).collect();
    for ((precision, _), floats) in PRECISIONS.into_iter().flat_map(|p| [(p, false), (p, true)]) {
        let limits = DispatchLimits { tokens, top_k: 1, experts, hidden, inter, precision, floats };
        let run = |x: &[f32], ids: &[u32]| {
            let mut out = vec![f32::NAN; x.len()];
            let routed = Routed { x, ids, weights: &vec![1.0; ids.len()] };
            run_experts(
                isa,
                routed,
                &|id| all[id as usize].ffn(),
                None,
                &mut Dispatch::new(limits),
                &mut out,
            );
            bits(&out)
        };
        for first in [0, 1] {
            let ids: Vec<u32> = ids.iter().map(|id| *id.max(&first)).collect();
            let together = run(&x, &ids);
            for (t, out) in together.chunks(hidden).enumerate() {
                let alone = run(&x[t * hidden..][..hidden], &ids[t..=t]);
                assert_eq!(out, alone, "{precision:?} floats {floats}, token {t} of expert {}", ids[t]);
            }
        }
    }
}
