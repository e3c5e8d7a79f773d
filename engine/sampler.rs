//! From logits to the next token.
//!
//! Owns the choice of one token for one request: bias, penalties, the filters, the random draw, and the
//! log-probabilities that are reported. Refuses to know tensors, text and the scheduler: it sees one row
//! of f32 logits and counts of ids, which is why a choice never depends on what else is in the batch.
//!
//! The order is vLLM's (its V1 sampler), so that a request means the same here and there:
//!
//! 1. logit bias; banned tokens become impossible;
//! 2. penalties: repetition over prompt and output, then frequency, then presence, both over the output;
//! 3. temperature 0: the lowest id among the largest logits, and nothing below applies;
//! 4. temperature;
//! 5. min-p, against the most likely token;
//! 6. top-k;
//! 7. top-p, as a share of the mass that min-p and top-k left;
//! 8. one draw from what remains.
//!
//! Where equal logits meet a limit, the lower id stays (vLLM keeps all that tie with the k-th). One
//! temperature differs: vLLM treats anything below 1e-5 as 0, here only 0 is greedy.
//!
//! **Reproducible draws.** The n-th sampled token uses the n-th output of SplitMix64 started at the
//! request's seed, and exponentials are computed here in f64 from additions and multiplications only: the
//! C library's `exp` differs in the last bit between platforms, which would move a draw now and then.
//! Sums run in a fixed order. Same logits and seed: same token, on every platform and in every release.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::request::{SamplingParams, SubmitError, TokenLogprobs};

/// Largest accepted temperature.
pub const MAX_TEMPERATURE: f32 = 100.0;
/// Largest accepted repetition penalty.
pub const MAX_REPETITION_PENALTY: f32 = 100.0;
/// Largest accepted magnitude of the presence and frequency penalties.
pub const MAX_PENALTY: f32 = 2.0;
/// Largest accepted magnitude of a logit bias.
pub const MAX_LOGIT_BIAS: f32 = 100.0;

/// Exponentials computed at a time.
const LANES: usize = 8;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Token id.
    pub id: u32,
    /// Logit after bias and penalties, before temperature.
    pub logit: f32,
    /// Probability relative to the most likely token, after temperature: 1 for that one.
    pub weight: f64,
}

impl Candidate {
    /// Ascending: most likely first, of equals the lower id. One integer, which sorts several times faster
    /// than a comparison of floats and ids. NaN never gets here.
    fn rank(&self) -> u64 {
        let bits = (self.logit + 0.0).to_bits();
        // Ascending bits for ascending floats, -0 made 0 above; then turned round.
        let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        u64::from(!ascending) << 32 | u64::from(self.id)
    }
}

/// Working memory for [`Sampler::sample`] and [`logprobs`]: 20 bytes per vocabulary entry, allocated
/// once and shared by all requests of one thread.
pub struct Scratch {
    logits: Vec<f32>,
    kept: Vec<Candidate>,
}

impl Scratch {
    /// Memory for rows of `vocab` logits.
    pub fn new(vocab: usize) -> Self {
        Self { logits: Vec::with_capacity(vocab), kept: Vec::with_capacity(vocab) }
    }

    /// What the last non-greedy [`Sampler::sample`] drew from. Empty after a greedy choice.
    pub fn kept(&self) -> &[Candidate] {
        &self.kept
    }
}

/// Counts of seen ids; exists only where a penalty is on.
struct Seen {
    /// 0 = never seen, else 1 + occurrences in the output. `[vocab]`
    marks: Vec<u32>,
    /// The ids with a mark, in order of appearance.
    ids: Vec<u32>,
}

impl Seen {
    fn mark(&mut self, id: u32, occurrences: u32) {
        let Some(mark) = self.marks.get_mut(id as usize) else { return };
        if *mark == 0 {
            *mark = 1;
            self.ids.push(id);
        }
        *mark = mark.saturating_add(occurrences);
    }
}

/// Chooses the tokens of one request.
pub struct Sampler {
    params: SamplingParams,
    vocab: usize,
    seed: u64,
    rng: SplitMix64,
    seen: Option<Seen>,
}

impl Sampler {
    /// A sampler over `vocab` logits. Without a seed in `params` one is drawn; see [`Sampler::seed`].
    ///
    /// # Errors
    /// As [`validate`].
    pub fn new(params: &SamplingParams, vocab: usize) -> Result<Self, SubmitError> {
        validate(params, vocab)?;
        let penalties = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        let seen = penalties.then(|| Seen { marks: vec![0; vocab], ids: Vec::with_capacity(vocab) });
        // The keys of `RandomState` come from the operating system.
        let seed = params.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        Ok(Self { params: params.clone(), vocab, seed, rng: SplitMix64(seed), seen })
    }

    /// The seed in use: asking again with it gives the same tokens.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Counts prompt tokens for the repetition penalty. Ids outside the vocabulary are ignored.
    pub fn observe_prompt(&mut self, tokens: &[u32]) {
        if let Some(seen) = &mut self.seen {
            tokens.iter().for_each(|&id| seen.mark(id, 0));
        }
    }

    /// Chooses a token from `logits` (`[vocab]`), never one in `banned` while another exists, and
    /// counts it as output.
    ///
    /// NaN counts as -inf. `+inf` wins, the lowest id first. With nothing above -inf the answer is the
    /// lowest id that is not banned. Allocates nothing once `scratch` has its size.
    ///
    /// # Panics
    /// When `logits` has not `vocab` entries.
    pub fn sample(&mut self, scratch: &mut Scratch, logits: &[f32], banned: &[u32]) -> u32 {
        assert_eq!(logits.len(), self.vocab, "one logit for each vocabulary entry");
        scratch.kept.clear();
        // Drawn even where the choice is forced, so that token n always uses output n.
        let uniform = (self.params.temperature > 0.0).then(|| self.rng.uniform());
        let untouched = self.params.logit_bias.is_empty()
            && banned.is_empty()
            && self.seen.as_ref().is_none_or(|seen| seen.ids.is_empty());
        let token = if uniform.is_none() && untouched {
            largest(logits).0
        } else {
            self.adjust(scratch, logits, banned);
            match (largest(&scratch.logits), uniform) {
                ((_, f32::NEG_INFINITY), _) => lowest_allowed(self.vocab, banned),
                ((id, f32::INFINITY), _) | ((id, _), None) => id,
                ((_, max), Some(uniform)) => {
                    self.filter(scratch, max);
                    draw(&scratch.kept, uniform)
                }
            }
        };
        if let Some(seen) = &mut self.seen {
            seen.mark(token, 1);
        }
        token
    }

    /// Steps 1 and 2, into `scratch.logits`.
    fn adjust(&self, scratch: &mut Scratch, logits: &[f32], banned: &[u32]) {
        let row = &mut scratch.logits;
        row.clear();
        row.extend(logits.iter().map(|&l| if l.is_nan() { f32::NEG_INFINITY } else { l }));
        for &(id, bias) in &self.params.logit_bias {
            row[id as usize] += bias;
        }
        if let Some(seen) = &self.seen {
            let SamplingParams { repetition_penalty, frequency_penalty, presence_penalty, .. } = self.params;
            for &id in &seen.ids {
                let logit = &mut row[id as usize];
                *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
                let occurrences = seen.marks[id as usize] - 1;
                if occurrences > 0 {
                    *logit -= frequency_penalty * occurrences as f32;
                    *logit -= presence_penalty;
                }
            }
        }
        for &id in banned {
            if let Some(logit) = row.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// Steps 4 to 7, into `scratch.kept`: most likely first if top-k or top-p is on, else by id.
    fn filter(&self, scratch: &mut Scratch, max: f32) {
        let Scratch { logits, kept } = scratch;
        let weigh = Weigher { max: f64::from(max), temperature: f64::from(self.params.temperature) };
        let min_weight = f64::from(self.params.min_p).max(f64::MIN_POSITIVE);
        let sorted = self.params.top_k > 0 && self.params.top_k < logits.len();
        let mut total = 0.0;
        if sorted {
            most_likely(logits, self.params.top_k, kept);
            kept.iter_mut().for_each(|c| c.weight = weigh.weight(c.logit));
            // min-p cuts a tail of the sorted list, as top-k does: their order changes nothing.
            let end = kept.iter().position(|c| c.weight < min_weight).unwrap_or(kept.len());
            kept.truncate(end);
            total = kept.iter().map(|c| c.weight).sum();
        } else {
            // A little below the exact limit, to spare most exponentials; the weight decides.
            let floor = f64::from(max) + weigh.temperature * (min_weight.ln() - 1e-3);
            for (ids, chunk) in (0..).step_by(LANES).zip(logits.chunks(LANES)) {
                if !chunk.iter().any(|&l| f64::from(l) >= floor) {
                    continue;
                }
                let weights = weigh.weights(chunk);
                for ((id, &logit), weight) in (ids..).zip(chunk).zip(weights) {
                    if weight >= min_weight {
                        kept.push(Candidate { id, logit, weight });
                        total += weight;
                    }
                }
            }
        }
        if self.params.top_p < 1.0 {
            let mass = f64::from(self.params.top_p) * total;
            if !sorted {
                // All tokens below this together weigh less than half of what top-p leaves out, so
                // none of them can be in the set, rounding included.
                let floor = 0.5 * (total - mass) / kept.len() as f64;
                kept.retain(|c| c.weight >= floor);
            }
            nucleus(kept, mass, sorted);
        }
    }
}

/// Checks the parameters for a vocabulary of `vocab` ids.
///
/// # Errors
/// [`SubmitError::Invalid`] names the parameter and what is allowed.
pub fn validate(params: &SamplingParams, vocab: usize) -> Result<(), SubmitError> {
    let invalid = |param, message| Err(SubmitError::Invalid { param, message });
    // Comparisons with NaN are false, so a range check refuses it too.
    for (param, value, low, high) in [
        ("temperature", params.temperature, 0.0, MAX_TEMPERATURE),
        ("top_p", params.top_p, 0.0, 1.0),
        ("min_p", params.min_p, 0.0, 1.0),
        ("repetition_penalty", params.repetition_penalty, f32::MIN_POSITIVE, MAX_REPETITION_PENALTY),
        ("presence_penalty", params.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
        ("frequency_penalty", params.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
    ] {
        if !(low..=high).contains(&value) {
            let from = if low == f32::MIN_POSITIVE { "above 0".to_owned() } else { format!("from {low}") };
            return invalid(param, format!("{value} is not {from} up to {high}"));
        }
    }
    if params.logit_bias.len() > vocab {
        let given = params.logit_bias.len();
        return invalid("logit_bias", format!("{given} entries for a vocabulary of {vocab} tokens"));
    }
    for &(id, bias) in &params.logit_bias {
        if id as usize >= vocab {
            return invalid("logit_bias", format!("token {id} is not in the vocabulary of {vocab} tokens"));
        }
        if !(-MAX_LOGIT_BIAS..=MAX_LOGIT_BIAS).contains(&bias) {
            let message =
                format!("{bias} for token {id} is not from -{MAX_LOGIT_BIAS} up to {MAX_LOGIT_BIAS}");
            return invalid("logit_bias", message);
        }
    }
    Ok(())
}

/// Log-probabilities of `chosen` and of the `n` most likely tokens (of equals the lower id first) under
/// the unmodified `logits`: `logit - ln(sum of exp(logits))`, in f64.
///
/// NaN counts as -inf. Where some logits are `+inf`, they share all probability. With nothing above -inf,
/// and for a `chosen` outside the row, the answer is -inf.
pub fn logprobs(scratch: &mut Scratch, logits: &[f32], chosen: u32, n: usize) -> TokenLogprobs {
    let (_, max) = largest(logits);
    let infinite = max.is_infinite();
    let weigh = Weigher { max: f64::from(max), temperature: 1.0 };
    let sum: f64 = if infinite {
        logits.iter().filter(|&&l| l == max).count() as f64
    } else {
        logits.chunks(LANES).flat_map(|chunk| weigh.weights(chunk)).sum()
    };
    let log_sum = sum.ln();
    let log_probability = |logit: f32| {
        if infinite {
            if logit == max && max > 0.0 { -log_sum as f32 } else { f32::NEG_INFINITY }
        } else if logit.is_nan() {
            f32::NEG_INFINITY
        } else {
            (f64::from(logit) - f64::from(max) - log_sum) as f32
        }
    };
    most_likely(logits, n, &mut scratch.kept);
    let top = scratch.kept.iter().map(|c| (c.id, log_probability(c.logit))).collect();
    scratch.kept.clear();
    let chosen = logits.get(chosen as usize).map_or(f32::NEG_INFINITY, |&logit| log_probability(logit));
    TokenLogprobs { chosen, top }
}

/// The largest logit and the lowest id that has it; NaN counts as -inf. (0, -inf) if there is none.
fn largest(logits: &[f32]) -> (u32, f32) {
    // Two passes without a dependency between the lanes: several times faster than one that carries the id.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = logits.as_chunks::<16>();
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &l| if l > max { l } else { max });
    if max == f32::NEG_INFINITY {
        return (0, max);
    }
    (logits.iter().position(|&l| l == max).unwrap_or(0) as u32, max)
}

fn lowest_allowed(vocab: usize, banned: &[u32]) -> u32 {
    (0..vocab as u32).find(|id| !banned.contains(id)).unwrap_or(0)
}

/// The `k` largest logits into `kept`, most likely first, weights unset; NaN counts as -inf.
///
/// Keeps up to 4k of those seen and, whenever that is full, the k best of them; everything not above the
/// k-th best so far is passed over with one comparison, which on real rows is nearly everything.
fn most_likely(logits: &[f32], k: usize, kept: &mut Vec<Candidate>) {
    kept.clear();
    let k = k.min(logits.len());
    if k == 0 {
        return;
    }
    let room = k.saturating_mul(4).clamp(64.min(logits.len()), logits.len());
    let mut floor = None;
    for (id, &logit) in (0..).zip(logits) {
        // Ids ascend, so one that equals the k-th best comes after it.
        if floor.is_some_and(|floor| logit <= floor) {
            continue;
        }
        let logit = if logit.is_nan() { f32::NEG_INFINITY } else { logit };
        if floor.is_some_and(|floor| logit <= floor) {
            continue;
        }
        kept.push(Candidate { id, logit, weight: 0.0 });
        if kept.len() == room && room > k {
            kept.select_nth_unstable_by_key(k - 1, Candidate::rank);
            kept.truncate(k);
            floor = Some(kept[k - 1].logit);
        }
    }
    if kept.len() > k {
        kept.select_nth_unstable_by_key(k - 1, Candidate::rank);
        kept.truncate(k);
    }
    kept.sort_unstable_by_key(Candidate::rank);
}

/// Keeps the most likely candidates until their weights reach `mass`, at least one.
fn nucleus(kept: &mut Vec<Candidate>, mass: f64, sorted: bool) {
    let mut sum = 0.0;
    let mut done = 0;
    // Sorts no more than eight times what is kept: the first candidates, then eight times as many, …
    let mut step = if sorted { kept.len() } else { 64 };
    while done < kept.len() {
        let rest = &mut kept[done..];
        let end = step.min(rest.len());
        if !sorted {
            if end < rest.len() {
                rest.select_nth_unstable_by_key(end - 1, Candidate::rank);
            }
            rest[..end].sort_unstable_by_key(Candidate::rank);
        }
        for (at, candidate) in rest[..end].iter().enumerate() {
            sum += candidate.weight;
            if sum >= mass {
                kept.truncate(done + at + 1);
                return;
            }
        }
        done += end;
        step *= 8;
    }
}

/// The candidate whose share of the weights, laid end to end, holds the point `uniform` of [0, 1).
fn draw(kept: &[Candidate], uniform: f64) -> u32 {
    let total: f64 = kept.iter().map(|c| c.weight).sum();
    let point = uniform * total;
    let mut sum = 0.0;
    for candidate in kept {
        sum += candidate.weight;
        if sum > point {
            return candidate.id;
        }
    }
    // Only rounding of `point` up to the whole sum gets here.
    kept.last().map_or(0, |c| c.id)
}

/// Weights relative to the largest logit, after temperature.
struct Weigher {
    max: f64,
    temperature: f64,
}

impl Weigher {
    /// Of up to `LANES` logits, 0 where there is none: independent, so the compiler vectorises them.
    fn weights(&self, logits: &[f32]) -> [f64; LANES] {
        let mut row = [f32::NEG_INFINITY; LANES];
        row[..logits.len()].copy_from_slice(logits);
        row.map(|logit| self.weight(logit))
    }

    /// `exp((logit - max) / temperature)`; 0 for -inf and NaN.
    fn weight(&self, logit: f32) -> f64 {
        exp((f64::from(logit) - self.max) / self.temperature)
    }
}

/// e^x for x <= 0, 0 below -708 and for NaN; within 2 ulp, from operations that IEEE 754 fixes.
fn exp(x: f64) -> f64 {
    // Adding this rounds to an integer and leaves it in the low bits.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    // 1/n!, n = 13 down to 0: the rest of the series is below 5e-18 where |r| <= ln(2)/2.
    const SERIES: [f64; 14] = [
        1.0 / 6_227_020_800.0,
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    let inside = x >= -708.0;
    let x = if inside { x } else { 0.0 };
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    let r = (x - k * LN2_HIGH) - k * LN2_LOW;
    let mut e = SERIES[0];
    for term in &SERIES[1..] {
        e = e * r + term;
    }
    // The low bits of `shifted` are k in two's complement; k >= -1022 keeps the exponent normal.
    let scaled = f64::from_bits(e.to_bits().wrapping_add(shifted.to_bits() << 52));
    if inside { scaled } else { 0.0 }
}

/// Steele, Lea and Flood's generator, with the constants of `java.util.SplittableRandom`.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1), all 53 bits.
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}
