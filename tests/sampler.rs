//! Choice of tokens and stop strings: exact sets against a plain reference, exact numbers for what the
//! API defines, distributions for fixed seeds, and every value a broken model could produce.

use moebius::request::{SamplingParams, SubmitError};
use moebius::sampler::{Sampler, Scratch, logprobs, validate};
use moebius::stop::{MAX_STOP_BYTES, MAX_STOP_STRINGS, StopMatcher};
use proptest::prelude::*;

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;

fn params(change: impl FnOnce(&mut SamplingParams)) -> SamplingParams {
    let mut params = SamplingParams { temperature: 1.0, seed: Some(7), ..SamplingParams::greedy() };
    change(&mut params);
    params
}

fn greedy(change: impl FnOnce(&mut SamplingParams)) -> SamplingParams {
    params(|p| {
        p.temperature = 0.0;
        change(p);
    })
}

/// One choice by a new sampler, and what it was drawn from.
fn choose(params: &SamplingParams, logits: &[f32], banned: &[u32]) -> (u32, Vec<(u32, f32)>) {
    let mut scratch = Scratch::new(logits.len());
    let token = Sampler::new(params, logits.len()).unwrap().sample(&mut scratch, logits, banned);
    (token, scratch.kept().iter().map(|c| (c.id, c.logit)).collect())
}

fn refused(params: &SamplingParams, vocab: usize) -> &'static str {
    match (validate(params, vocab), Sampler::new(params, vocab).err()) {
        (Err(SubmitError::Invalid { param, message }), Some(_)) => {
            assert!(!message.is_empty());
            param
        }
        (other, _) => panic!("accepted: {params:?}: {other:?}"),
    }
}

#[test]
fn parameters_out_of_range_are_named() {
    type Set = fn(&mut SamplingParams, f32);
    let fields: [(&str, Set, &[f32], &[f32]); 6] = [
        ("temperature", |p, v| p.temperature = v, &[0.0, 2.0, 100.0], &[-0.1, 100.1]),
        ("top_p", |p, v| p.top_p = v, &[0.0, 0.5, 1.0], &[-0.1, 1.1]),
        ("min_p", |p, v| p.min_p = v, &[0.0, 0.5, 1.0], &[-0.1, 1.1]),
        ("repetition_penalty", |p, v| p.repetition_penalty = v, &[0.1, 1.0, 100.0], &[0.0, -1.0, 101.0]),
        ("presence_penalty", |p, v| p.presence_penalty = v, &[-2.0, 2.0], &[-2.1, 2.1]),
        ("frequency_penalty", |p, v| p.frequency_penalty = v, &[-2.0, 2.0], &[-2.1, 2.1]),
    ];
    for (name, set, good, bad) in fields {
        for &value in good {
            validate(&params(|p| set(p, value)), 8).unwrap();
        }
        for &value in bad.iter().chain(&[NAN, INF, -INF, f32::MAX, f32::MIN]) {
            assert_eq!(refused(&params(|p| set(p, value)), 8), name, "{value}");
        }
    }
    for bias in [vec![(8, 0.0)], vec![(u32::MAX, 1.0)], vec![(0, NAN)], vec![(0, 101.0)], vec![(0, 0.0); 9]] {
        assert_eq!(refused(&params(|p| p.logit_bias = bias), 8), "logit_bias");
    }
    validate(&params(|p| p.logit_bias = vec![(7, -100.0), (7, 100.0)]), 8).unwrap();
    validate(&params(|p| p.top_k = usize::MAX), 8).unwrap();
}

#[test]
fn greedy_takes_the_lowest_id_of_the_largest() {
    for (logits, expected) in [
        (vec![1.0, 3.0, 3.0, 2.0], 1),
        (vec![NAN, -1.0, NAN, -1.0], 1),
        (vec![-INF, f32::MIN, -INF], 1),
        (vec![INF, 5.0, INF], 0),
        (vec![5.0, NAN, INF], 2),
        (vec![-INF; 5], 0),
        (vec![NAN; 40], 0),
        (vec![-0.0, 0.0], 0),
    ] {
        assert_eq!(choose(&greedy(|_| {}), &logits, &[]).0, expected, "{logits:?}");
    }
    let mut long = vec![0.0; 1000];
    for at in [999, 998, 500, 17, 16, 15] {
        long[at] = 1.0;
        assert_eq!(choose(&greedy(|_| {}), &long, &[]).0, at as u32);
    }
}

#[test]
fn broken_logits_have_a_defined_outcome() {
    for p in [
        params(|_| {}),
        params(|p| p.top_k = 2),
        params(|p| p.top_p = 0.5),
        params(|p| p.min_p = 0.1),
        params(|p| p.repetition_penalty = 2.0),
        greedy(|p| p.logit_bias = vec![(1, 3.0)]),
    ] {
        assert_eq!(choose(&p, &[NAN, -INF, NAN], &[]).0, 0);
        assert_eq!(choose(&p, &[NAN, -INF, NAN], &[0]).0, 1);
        assert_eq!(choose(&p, &[1.0, 2.0, 3.0], &[0, 1, 2]).0, 0, "all banned");
        assert_eq!(choose(&p, &[1.0, INF, INF], &[]).0, 1, "+inf wins");
        assert_eq!(choose(&p, &[1.0, INF, INF], &[1, 99, u32::MAX]).0, 2);
        assert_eq!(choose(&p, &[NAN, -INF, -3.0], &[]).0, 2, "the only one possible");
        assert_eq!(choose(&p, &[f32::MIN, f32::MAX, f32::MIN], &[]).0, 1);
    }
}

#[test]
fn banned_tokens_are_never_chosen() {
    let mut sampler = Sampler::new(&params(|p| p.temperature = 100.0), 4).unwrap();
    let mut scratch = Scratch::new(4);
    for _ in 0..500 {
        let token = sampler.sample(&mut scratch, &[9.0, 1.0, 9.0, 1.0], &[0, 2]);
        assert!(token == 1 || token == 3);
    }
    assert_eq!(choose(&greedy(|p| p.logit_bias = vec![(0, 100.0)]), &[1.0, 0.0], &[0]).0, 1);
}

#[test]
fn penalties_are_exact() {
    // Prompt 0 and 1; output 1, 3, 3. Values are sums of powers of two: every step is exact.
    let p = params(|p| {
        p.repetition_penalty = 2.0;
        p.frequency_penalty = 0.25;
        p.presence_penalty = 0.5;
        p.logit_bias = vec![(4, 1.5), (0, 1.0), (4, 0.5)];
    });
    let logits = [3.0, -2.0, 1.0, 8.0, 0.5, 0.0];
    let mut scratch = Scratch::new(6);
    let mut sampler = Sampler::new(&p, 6).unwrap();
    sampler.observe_prompt(&[0, 1, 0, 77, u32::MAX]);
    for forced in [1, 3, 3] {
        let others: Vec<u32> = (0..6).filter(|&id| id != forced).collect();
        assert_eq!(sampler.sample(&mut scratch, &logits, &others), forced);
    }
    sampler.sample(&mut scratch, &logits, &[]);
    let seen: Vec<f32> = scratch.kept().iter().map(|c| c.logit).collect();
    assert_eq!(seen, [2.0, -4.75, 1.0, 3.0, 2.5, 0.0]);
}

#[test]
fn presence_and_frequency_leave_the_prompt_alone() {
    let p = greedy(|p| {
        p.presence_penalty = 2.0;
        p.frequency_penalty = 2.0;
    });
    let mut sampler = Sampler::new(&p, 2).unwrap();
    let mut scratch = Scratch::new(2);
    sampler.observe_prompt(&[1, 1, 1]);
    assert_eq!(sampler.sample(&mut scratch, &[0.0, 1.0], &[]), 1);
    assert_eq!(sampler.sample(&mut scratch, &[0.0, 1.0], &[]), 0, "1 now has -3");
    assert_eq!(sampler.sample(&mut scratch, &[0.0, 1.0], &[]), 1, "0 now has -4");
}

/// The published first outputs of SplitMix64 for this seed. With 1024 equal logits a draw is its top bits.
#[test]
fn draws_follow_splitmix64() {
    let outputs: [u64; 5] = [
        6_457_827_717_110_365_317,
        3_203_168_211_198_807_973,
        9_817_491_932_198_370_423,
        4_593_380_528_125_082_431,
        16_408_922_859_458_223_821,
    ];
    for change in [(|_| {}) as fn(&mut SamplingParams), |p| p.min_p = 0.5, |p| p.temperature = 0.01] {
        let mut p = params(change);
        p.seed = Some(1_234_567);
        let mut sampler = Sampler::new(&p, 1024).unwrap();
        let mut scratch = Scratch::new(1024);
        for output in outputs {
            assert_eq!(sampler.sample(&mut scratch, &[0.5; 1024], &[]), (output >> 54) as u32);
        }
    }
}

#[test]
fn a_forced_choice_uses_its_draw() {
    let logits: Vec<f32> = (0..50).map(|i| (i as f32).sin()).collect();
    let mut certain = vec![0.0; 50];
    certain[3] = INF;
    let mut scratch = Scratch::new(50);
    let mut run = |first: &[f32]| {
        let mut sampler = Sampler::new(&params(|_| {}), 50).unwrap();
        sampler.sample(&mut scratch, first, &[]);
        (0..20).map(|_| sampler.sample(&mut scratch, &logits, &[])).collect::<Vec<_>>()
    };
    assert_eq!(run(&logits), run(&certain));
    assert_eq!(run(&logits), run(&[NAN; 50]));
}

#[test]
fn an_unseeded_sampler_can_be_repeated() {
    let p = params(|p| p.seed = None);
    let first = Sampler::new(&p, 4).unwrap().seed();
    assert_ne!(first, Sampler::new(&p, 4).unwrap().seed());
    assert_eq!(Sampler::new(&params(|p| p.seed = Some(first)), 4).unwrap().seed(), first);
}

/// Pearson's statistic of 20,000 draws; below the 99.99 % point of chi-square with 9 degrees of freedom.
#[test]
fn draws_have_the_right_distribution() {
    let logits: Vec<f32> = (0..10).map(|i| ((i * 7) % 10) as f32 * 0.3 - 1.0).collect();
    for (seed, temperature) in [(1, 1.0), (2, 0.5), (3, 2.0), (u64::MAX, 1.0), (0, 10.0)] {
        let p = params(|p| (p.seed, p.temperature) = (Some(seed), temperature));
        let mut sampler = Sampler::new(&p, 10).unwrap();
        let mut scratch = Scratch::new(10);
        let mut counts = [0.0; 10];
        for _ in 0..20_000 {
            counts[sampler.sample(&mut scratch, &logits, &[]) as usize] += 1.0;
        }
        let weights: Vec<f64> =
            logits.iter().map(|&l| (f64::from(l) / f64::from(temperature)).exp()).collect();
        let total: f64 = weights.iter().sum();
        let statistic: f64 = std::iter::zip(counts, weights)
            .map(|(count, w)| (count - 20_000.0 * w / total, 20_000.0 * w / total))
            .map(|(off, expected)| off * off / expected)
            .sum();
        assert!(statistic < 33.7, "seed {seed}, temperature {temperature}: {statistic}");
    }
}

#[test]
fn equal_logits_at_a_limit_keep_the_lower_ids() {
    let equal = [1.0; 10];
    let ids = |p: &SamplingParams| choose(p, &equal, &[]).1.iter().map(|c| c.0).collect::<Vec<_>>();
    assert_eq!(ids(&params(|p| p.top_k = 3)), [0, 1, 2]);
    assert_eq!(ids(&params(|p| p.top_p = 0.5)), [0, 1, 2, 3, 4]);
    assert_eq!(ids(&params(|p| p.top_p = 0.0)), [0]);
    assert_eq!(ids(&params(|p| p.min_p = 1.0)), (0..10).collect::<Vec<_>>());
    assert_eq!(ids(&params(|p| (p.top_k, p.top_p) = (4, 0.5))), [0, 1]);
}

/// What the parameters leave, by full sorts and the C library's `exp`; `None` when rounding decides.
fn reference(p: &SamplingParams, logits: &[f32]) -> Option<Vec<u32>> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut left: Vec<(u32, f32, f64)> = Vec::new();
    for (id, &logit) in (0..).zip(logits) {
        let weight = ((f64::from(logit) - f64::from(max)) / f64::from(p.temperature)).exp();
        if (weight - f64::from(p.min_p)).abs() < 1e-12 && weight != 1.0 {
            return None;
        }
        if weight >= f64::from(p.min_p) && weight > 1e-300 {
            left.push((id, logit, weight));
        }
    }
    left.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if p.top_k > 0 {
        left.truncate(p.top_k);
    }
    if p.top_p < 1.0 {
        let mass = f64::from(p.top_p) * left.iter().map(|c| c.2).sum::<f64>();
        let mut sum = 0.0;
        let mut end = 0;
        while end < left.len() && (sum < mass || end == 0) {
            sum += left[end].2;
            end += 1;
            if (sum - mass).abs() < 1e-9 * mass {
                return None;
            }
        }
        left.truncate(end);
    }
    let mut ids: Vec<u32> = left.iter().map(|c| c.0).collect();
    ids.sort_unstable();
    Some(ids)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// The kept set, the weights and the drawn token, over small and large rows, with ties and gaps.
    #[test]
    fn filters_match_a_full_sort(
        logits in prop_oneof![
            prop::collection::vec(-20.0f32..20.0, 1..60),
            prop::collection::vec((-12i8..12).prop_map(f32::from), 1..400),
            prop::collection::vec(prop_oneof![9 => -8.0f32..8.0, 1 => Just(f32::NEG_INFINITY)], 1..3000),
        ],
        temperature in prop_oneof![Just(1.0f32), 0.05f32..5.0],
        top_k in prop_oneof![Just(0usize), 1usize..70, 1usize..4000],
        top_p in prop_oneof![Just(1.0f32), 0.0f32..1.0, 0.98f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0, 0.0f32..0.01],
        seed: u64,
    ) {
        prop_assume!(logits.iter().any(|l| l.is_finite()));
        let p = params(|p| {
            (p.temperature, p.top_k, p.top_p, p.min_p) = (temperature, top_k, top_p, min_p);
            p.seed = Some(seed);
        });
        let expected = reference(&p, &logits);
        prop_assume!(expected.is_some());
        let mut scratch = Scratch::new(logits.len());
        let token = Sampler::new(&p, logits.len()).unwrap().sample(&mut scratch, &logits, &[]);
        let mut kept: Vec<u32> = scratch.kept().iter().map(|c| c.id).collect();
        prop_assert!(kept.contains(&token));
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for c in scratch.kept() {
            let weight = ((f64::from(c.logit) - f64::from(max)) / f64::from(temperature)).exp();
            prop_assert!((c.weight - weight).abs() <= 1e-15 * weight, "{} for {weight}", c.weight);
        }
        kept.sort_unstable();
        prop_assert_eq!(kept, expected.unwrap());
    }

    #[test]
    fn any_bits_are_survived(
        bits in prop::collection::vec(any::<u32>(), 1..100),
        temperature in 0.0f32..100.0, top_k in 0usize..100, top_p in 0.0f32..=1.0, min_p in 0.0f32..=1.0,
        banned in prop::collection::vec(0u32..110, 0..5),
    ) {
        let logits: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
        let p = params(|p| {
            (p.temperature, p.top_k, p.top_p, p.min_p) = (temperature, top_k, top_p, min_p);
            p.repetition_penalty = 1.5;
            p.frequency_penalty = -2.0;
        });
        let mut sampler = Sampler::new(&p, logits.len()).unwrap();
        let mut scratch = Scratch::new(logits.len());
        for _ in 0..4 {
            let token = sampler.sample(&mut scratch, &logits, &banned);
            prop_assert!((token as usize) < logits.len());
            prop_assert!(!banned.contains(&token) || (0..logits.len() as u32).all(|id| banned.contains(&id)));
            let reported = logprobs(&mut scratch, &logits, token, 5);
            prop_assert!(!reported.chosen.is_nan() && reported.chosen <= 0.0);
            prop_assert!(reported.top.iter().all(|t| !t.1.is_nan() && t.1 <= 0.0));
        }
    }

    #[test]
    fn logprobs_match_a_full_sort(
        logits in prop::collection::vec(prop_oneof![-30.0f32..30.0, (-4i8..4).prop_map(f32::from)], 1..2000),
        n in 0usize..25,
    ) {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        let log_sum = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
        let chosen = order[order.len() / 2];
        let reported = logprobs(&mut Scratch::new(logits.len()), &logits, chosen, n);
        let ids: Vec<u32> = reported.top.iter().map(|t| t.0).collect();
        prop_assert_eq!(&ids, &order[..n.min(order.len())]);
        for (id, value) in reported.top.into_iter().chain([(chosen, reported.chosen)]) {
            let expected = (f64::from(logits[id as usize]) - log_sum) as f32;
            prop_assert!((value - expected).abs() <= 2.0 * f32::EPSILON * expected.abs().max(1e-6));
        }
    }
}

#[test]
fn logprobs_of_known_rows() {
    let mut scratch = Scratch::new(4);
    let half = logprobs(&mut scratch, &[0.0, 0.0, -INF, NAN], 1, 4);
    let ln2 = std::f32::consts::LN_2;
    assert_eq!((half.chosen, &half.top[..2]), (-ln2, &[(0, -ln2), (1, -ln2)][..]));
    assert_eq!(half.top[2], (2, -INF));
    assert_eq!(logprobs(&mut scratch, &[1e30, -1e30], 0, 0).chosen, 0.0);
    assert_eq!(logprobs(&mut scratch, &[INF, 0.0, INF], 2, 1).top, [(0, -ln2)]);
    assert_eq!(logprobs(&mut scratch, &[NAN, -INF], 0, 1).chosen, -INF);
    assert_eq!(logprobs(&mut scratch, &[1.0, 2.0], 9, 1).chosen, -INF);
    // A large row: no accumulation in f32 would get this right.
    let flat = logprobs(&mut scratch, &vec![-5.0; 160_000], 159_999, 1);
    assert_eq!(flat.chosen, -(160_000f64.ln()) as f32);
}

// Stop strings.

fn run(stops: &[&str], pieces: &[&str], include: bool) -> (String, bool) {
    let mut matcher = StopMatcher::new(stops, include).unwrap();
    let mut text = String::new();
    for piece in pieces {
        let pushed = matcher.push(piece);
        text += &pushed.emit;
        if pushed.matched {
            assert_eq!(matcher.finish(), "");
            let after = matcher.push("more");
            assert!(after.matched && after.emit.is_empty());
            return (text, true);
        }
    }
    text += &matcher.finish();
    (text, false)
}

/// The definition: the stop string complete soonest, the longest of those.
fn cut(stops: &[&str], text: &str, include: bool) -> (String, bool) {
    for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
        let longest = stops.iter().filter(|stop| text[..end].ends_with(**stop)).map(|stop| stop.len()).max();
        if let Some(length) = longest {
            return (text[..if include { end } else { end - length }].to_owned(), true);
        }
    }
    (text.to_owned(), false)
}

#[test]
fn stop_strings_by_example() {
    let cases: [(&[&str], &[&str], &str, bool); 12] = [
        (&[], &["as", " it is"], "as it is", false),
        (&["END"], &["xE", "N", "D y"], "x", true),
        (&["END"], &["xE", "NX END"], "xENX ", true),
        (&["END"], &["xEN"], "xEN", false),
        (&["END"], &["EEEND"], "EE", true),
        (&["abcd", "bc"], &["abcd"], "a", true),
        (&["bc", "abc"], &["xabc"], "x", true),
        (&["\n\n"], &["a\n", "b\n", "\nc"], "a\nb", true),
        (&["é"], &["è", "é"], "è", true),
        (&["🙂🙂"], &["🙂", "🙃🙂", "🙂"], "🙂🙃", true),
        (&["ab", "abab"], &["abab"], "", true),
        (&["aab"], &["aaaaab"], "aaa", true),
    ];
    for (stops, pieces, expected, matched) in cases {
        assert_eq!(run(stops, pieces, false), (expected.to_owned(), matched), "{stops:?} in {pieces:?}");
    }
    assert_eq!(run(&["END"], &["xE", "ND y"], true), ("xEND".to_owned(), true));
}

#[test]
fn only_what_may_become_a_stop_string_is_held_back() {
    let mut matcher = StopMatcher::new(&["</s>", "stop"], false).unwrap();
    for (piece, emit, held) in
        [("a<", "a", 1), ("/", "", 2), ("st", "</", 2), ("o", "", 3), ("x<", "stox", 1), ("y", "<y", 0)]
    {
        let pushed = matcher.push(piece);
        assert_eq!((pushed.emit.as_str(), matcher.held_bytes(), pushed.matched), (emit, held, false));
    }
}

#[test]
fn stop_strings_have_limits() {
    let many = vec!["a"; MAX_STOP_STRINGS + 1];
    let long = "é".repeat(MAX_STOP_BYTES / 2 + 1);
    for stops in [&many[..], &[""], &["a", ""], &[long.as_str()]] {
        let refused = StopMatcher::new(stops, false).err();
        assert!(matches!(refused, Some(SubmitError::Invalid { param: "stop", .. })));
    }
    assert!(StopMatcher::new(&many[1..], false).is_ok());
}

/// 64 stop strings of 1 KiB that all nearly match everywhere: searching each at each byte would be
/// 10^11 comparisons.
#[test]
fn matching_is_linear() {
    let stops: Vec<String> =
        (0..MAX_STOP_STRINGS).map(|i| "a".repeat(MAX_STOP_BYTES - 4 - i) + "é" + &i.to_string()).collect();
    let text = "a".repeat(2_000_000);
    let start = std::time::Instant::now();
    for piece_bytes in [1, 7, 2_000_000] {
        let mut matcher = StopMatcher::new(&stops, false).unwrap();
        let mut emitted = 0;
        for at in (0..text.len()).step_by(piece_bytes) {
            let pushed = matcher.push(&text[at..(at + piece_bytes).min(text.len())]);
            emitted += pushed.emit.len();
            assert!(!pushed.matched);
        }
        assert_eq!(matcher.held_bytes(), MAX_STOP_BYTES - 4);
        assert_eq!(emitted + matcher.finish().len(), text.len());
    }
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn pieces_do_not_matter(
        stops in prop::collection::vec("[ab]{1,5}|[aé🙂\u{301}]{1,4}", 0..5),
        text in "[abé🙂\u{301}]{0,40}",
        sizes in prop::collection::vec(1usize..6, 40),
        include: bool,
    ) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let mut pieces = Vec::new();
        let mut rest = text.as_str();
        for size in sizes {
            let end = rest.char_indices().nth(size).map_or(rest.len(), |(at, _)| at);
            pieces.push(&rest[..end]);
            rest = &rest[end..];
        }
        prop_assert_eq!(run(&stops, &pieces, include), cut(&stops, &text, include));
    }
}
