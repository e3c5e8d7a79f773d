//! Choices on the device against the same rules written plainly, with a sort and f64.

use kernels::cuda::{Adjust, Adjustment, Device, DeviceError, Penalties, Sample, Sampling};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::mock;

#[derive(Debug)]
struct Row {
    logits: Vec<f32>,
    /// Tokens that may be chosen.
    allowed: Vec<bool>,
    sampling: Sampling,
}

/// Tokens that may be drawn with their probabilities, by id; one if there is no draw.
fn candidates(row: &Row) -> Vec<(u32, f64)> {
    let logit = |id: usize| match (row.allowed[id], row.logits[id]) {
        (true, x) if !x.is_nan() => x,
        _ => f32::NEG_INFINITY,
    };
    let mut ids: Vec<usize> = (0..row.logits.len()).collect();
    ids.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)).then(a.cmp(&b)));
    let best = ids[0];
    if logit(best) == f32::NEG_INFINITY {
        return vec![(row.allowed.iter().position(|a| *a).unwrap_or(0) as u32, 1.0)];
    }
    if row.sampling.temperature == 0.0 || logit(best) == f32::INFINITY {
        return vec![(best as u32, 1.0)];
    }
    let Sampling { temperature, min_p, top_p, top_k, .. } = row.sampling;
    let weight = |id: usize| (f64::from(logit(id) - logit(best)) / f64::from(temperature)).exp();
    if top_k > 0 {
        ids.truncate(top_k as usize);
    }
    ids.retain(|&id| weight(id) >= f64::from(min_p).max(f64::powi(2.0, -40)));
    let total: f64 = ids.iter().map(|&id| weight(id)).sum();
    if top_p < 1.0 {
        let mut mass = 0.0;
        let kept = ids.iter().take_while(|&&id| {
            let before = mass;
            mass += weight(id);
            before == 0.0 || before < f64::from(top_p) * total
        });
        ids = kept.copied().collect();
    }
    let total: f64 = ids.iter().map(|&id| weight(id)).sum();
    ids.sort_unstable();
    ids.into_iter().map(|id| (id as u32, weight(id) / total)).collect()
}

/// Whether the token's interval of the cumulated probabilities holds the draw, up to rounding.
fn fits(row: &Row, token: u32) -> bool {
    const SLACK: f64 = 1e-5;
    let uniform = row.sampling.uniform as f64 / 2f64.powi(64);
    let mut before = 0.0;
    for (id, probability) in candidates(row) {
        if id == token {
            return before - SLACK <= uniform && uniform <= before + probability + SLACK;
        }
        before += probability;
    }
    false
}

fn log_probability(logits: &[f32], token: u32) -> f32 {
    let max = logits.iter().copied().filter(|x| !x.is_nan()).fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().filter(|x| !x.is_nan()).map(|&x| f64::from(x - max).exp()).sum();
    (f64::from(logits[token as usize] - max) - sum.ln()) as f32
}

fn mask_words(allowed: &[bool]) -> Vec<u32> {
    let word = |bits: &[bool]| bits.iter().enumerate().fold(0, |word, (i, &bit)| word | u32::from(bit) << i);
    allowed.chunks(32).map(word).collect()
}

/// The tokens of some rows and their log-probabilities.
fn choose(device: &Device, rows: &[Row], masked: bool) -> Result<(Vec<u32>, Vec<f32>), DeviceError> {
    let vocab = rows[0].logits.len();
    let logits = device.upload(&rows.iter().flat_map(|row| row.logits.clone()).collect::<Vec<_>>())?;
    let mask = device.upload(&rows.iter().flat_map(|row| mask_words(&row.allowed)).collect::<Vec<_>>())?;
    let sampling = device.upload(&rows.iter().map(|row| row.sampling).collect::<Vec<_>>())?;
    let (tokens, log_probabilities) = (device.alloc(rows.len())?, device.alloc(rows.len())?);
    let sample = Sample {
        logits: logits.all(),
        rows: rows.len(),
        vocab,
        mask: masked.then_some(mask.all()),
        sampling: sampling.all(),
        tokens: tokens.all(),
        log_probabilities: Some(log_probabilities.all()),
    };
    sample.launch(device)?;
    Ok((tokens.read()?, log_probabilities.read()?))
}

fn rows() -> impl Strategy<Value = Vec<Row>> {
    let logit = prop_oneof![
        8 => -12f32..12.0,
        // Ties, and what may not be drawn.
        2 => (-3i8..3).prop_map(f32::from),
        1 => Just(f32::NEG_INFINITY),
        1 => Just(f32::NAN),
    ];
    let off = |value: f32| prop_oneof![Just(value), 0f32..1.0];
    let sampling = (prop_oneof![Just(0.0), 0.05f32..3.0], off(0.0), off(1.0), 0u32..60, any::<u64>());
    (1usize..4, prop_oneof![Just(1usize), 2usize..70, 500usize..1100]).prop_flat_map(move |(count, vocab)| {
        let row = (
            proptest::collection::vec(logit.clone(), vocab),
            proptest::collection::vec(proptest::bool::weighted(0.9), vocab),
            sampling.clone(),
        );
        let row = row.prop_map(|(logits, allowed, (temperature, min_p, top_p, top_k, uniform))| {
            // Where rounding decides what is kept, two rights differ: limits away from the exact values.
            let sampling = Sampling { temperature, min_p: min_p * 0.3, top_p, top_k, uniform };
            Row { logits, allowed, sampling }
        });
        proptest::collection::vec(row, count)
    })
}

#[test]
fn choices_follow_the_rules() {
    let mut runner = TestRunner::new(ProptestConfig { cases: 60, ..Default::default() });
    mock::in_every_order(|device| {
        let outcome = runner.run(&rows(), |rows| {
            let (tokens, log_probabilities) = choose(device, &rows, true).unwrap();
            for ((row, &token), &got) in rows.iter().zip(&tokens).zip(&log_probabilities) {
                prop_assert!(fits(row, token), "{token} of {:?}", candidates(row));
                let want = log_probability(&row.logits, token);
                let same = if want.is_finite() { (want - got).abs() < 1e-4 } else { !got.is_finite() };
                prop_assert!(same, "{want} {got}");
            }
            Ok(())
        });
        outcome.unwrap();
    });
}

#[test]
fn special_rows() {
    mock::in_every_order(|device| {
        let draw = Sampling { temperature: 1.0, min_p: 0.0, top_p: 1.0, top_k: 0, uniform: u64::MAX };
        let row = |logits: &[f32], allowed: &[bool], sampling| Row {
            logits: logits.to_vec(),
            allowed: allowed.to_vec(),
            sampling,
        };
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let rows = [
            row(&[1.0, 5.0, 5.0, nan], &[true; 4], Sampling::GREEDY),
            row(&[-inf, nan, -inf, -inf], &[false, false, true, true], draw),
            row(&[nan; 4], &[false; 4], draw),
            row(&[0.0, inf, inf, 1.0], &[true; 4], draw),
            row(&[0.0, inf, 2.0, 1.0], &[true, false, true, true], Sampling::GREEDY),
            row(&[0.0, 0.0, 0.0, 0.0], &[true; 4], draw),
            row(&[0.0, 0.0, 0.0, 0.0], &[true; 4], Sampling { uniform: 0, ..draw }),
            row(&[0.0, 0.0, 0.0, 0.0], &[true; 4], Sampling { top_k: 2, ..draw }),
            row(&[3.0, 0.0, 0.0, 2.9], &[true; 4], Sampling { temperature: 1e-40, ..draw }),
        ];
        let (tokens, log_probabilities) = choose(device, &rows, true).unwrap();
        assert_eq!(tokens, [1, 2, 0, 1, 2, 3, 0, 1, 0]);
        assert_eq!(log_probabilities[1], -inf);
        assert!((log_probabilities[3] - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(log_probabilities[4], -inf);
        // Without a mask the same rows are free to choose.
        let (tokens, _) = choose(device, &rows[4..5], false).unwrap();
        assert_eq!(tokens, [1]);
    });
}

#[test]
fn adjustments_are_those_of_the_engine() {
    mock::in_every_order(|device| {
        let logits = device.upload(&[1.0f32, -2.0, 3.0, 0.5, 1.0, -2.0, 3.0, 0.5]).unwrap();
        let adjustments = [
            Adjustment { row: 0, token: 0, bias: 0.0, seen: 1 },
            Adjustment { row: 0, token: 1, bias: 1.0, seen: 3 },
            Adjustment { row: 1, token: 2, bias: -100.0, seen: 0 },
        ];
        let penalties = [
            Penalties { repetition: 2.0, frequency: 0.5, presence: 0.25 },
            Penalties { repetition: 9.0, frequency: 9.0, presence: 9.0 },
        ];
        let on_device = device.upload(&adjustments).unwrap();
        let penalties = device.upload(&penalties).unwrap();
        let adjust = Adjust {
            logits: logits.all(),
            vocab: 4,
            adjustments: &adjustments,
            on_device: on_device.all(),
            penalties: penalties.all(),
        };
        adjust.launch(device).unwrap();
        let want = [0.5, -2.0 - 0.5 * 2.0 - 0.25, 3.0, 0.5, 1.0, -2.0, -97.0, 0.5];
        assert_eq!(logits.read().unwrap(), want);
    });
}
