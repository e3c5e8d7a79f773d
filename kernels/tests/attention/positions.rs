//! Rotations over the whole range of positions, with YaRN's frequencies.

use kernels::rope::{Rotation, fill_cos_sin, rotate};

/// Positions of a context of 262,144 tokens.
const POSITIONS: u32 = 1 << 18;

/// YaRN's frequencies of 64 rotated values: base 50,000, 4096 positions before scaling, beta 1 and 1 as in Kimi
/// K2 (so the ramp is a step between frequencies 19 and 20).
fn frequencies(factor: f64) -> Vec<f32> {
    let (dim, base, original) = (64.0, 50_000f64, 4096.0);
    let correction =
        |beta: f64| dim * (original / (beta * 2.0 * std::f64::consts::PI)).ln() / (2.0 * base.ln());
    let (low, high) = (correction(1.0).floor(), correction(1.0).ceil());
    let frequency = |i: usize| {
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        base.powf(-2.0 * i as f64 / dim) * ((1.0 - ramp) + ramp / factor)
    };
    (0..32).map(|i| frequency(i) as f32).collect()
}

#[test]
fn frequencies_are_the_published_ones() {
    let golden = [
        (32.0, [0.017293633, 0.004472136, 0.0016217599, 3.6140468e-05, 8.7644129e-07]),
        (64.0, [0.017293633, 0.004472136, 0.0016217599, 1.8070234e-05, 4.3822065e-07]),
    ];
    for (factor, golden) in golden {
        let frequencies = frequencies(factor);
        for (i, want) in [12, 16, 19, 20, 31].into_iter().zip(golden) {
            let error = (f64::from(frequencies[i]) - want).abs();
            assert!(error < 1e-7 * want, "frequency {i} of factor {factor}: {}", frequencies[i]);
        }
    }
}

/// The angle is an f32 product, as where the checkpoints were made: off by at most 2^-24 of itself, which at
/// position 262,143 is up to 2^-7 for the fastest frequencies (and nothing for the very fastest, 1). Cosine and
/// sine add an f32 rounding.
#[test]
fn angles_are_off_by_an_f32_rounding_at_every_position() {
    let frequencies = frequencies(32.0);
    let (mut cos, mut sin) = ([0.0; 32], [0.0; 32]);
    let (mut worst, mut worst_slow) = (0f64, 0f64);
    for position in 0..POSITIONS {
        fill_cos_sin(position, &frequencies, 1.0, &mut cos, &mut sin);
        for (i, (&frequency, (&c, &s))) in frequencies.iter().zip(cos.iter().zip(&sin)).enumerate() {
            let angle = f64::from(position) * f64::from(frequency);
            let bound = angle / f64::from(1 << 24) + f64::from(f32::EPSILON);
            let error = (f64::from(c) - angle.cos()).abs().max((f64::from(s) - angle.sin()).abs());
            assert!(error <= bound, "frequency {i} at {position}: {error}, should be below {bound}");
            worst = worst.max(error);
            if i >= 20 {
                worst_slow = worst_slow.max(error);
            }
        }
    }
    assert!(worst < 1.0 / 128.0, "{worst}");
    // The frequencies that YaRN slows down carry distance, and turn less than ten radians over all positions.
    assert!(worst_slow < 1e-6, "{worst_slow}");
}

/// Rotated by its angle, a pair keeps its length and its angle to another rotated pair, at both ends.
#[test]
fn far_pairs_turn_like_near_ones() {
    let frequencies = frequencies(32.0);
    let x: Vec<f32> = (0..64).map(|i| (i as f32 * 0.7).sin() + 0.1).collect();
    for position in [0, 1, 4095, 131_072, POSITIONS - 1] {
        let (mut cos, mut sin) = ([0.0; 32], [0.0; 32]);
        fill_cos_sin(position, &frequencies, 1.0, &mut cos, &mut sin);
        for style in [Rotation::Interleaved, Rotation::Half] {
            let mut turned = x.clone();
            rotate(&mut turned, &cos, &sin, style);
            for (j, &frequency) in frequencies.iter().enumerate() {
                let (a, b) = match style {
                    Rotation::Interleaved => (2 * j, 2 * j + 1),
                    Rotation::Half => (j, j + 32),
                };
                let (p, q) = (f64::from(x[a]), f64::from(x[b]));
                let angle = f64::from(position) * f64::from(frequency);
                let bound = 3.0 * (angle / f64::from(1 << 24) + f64::from(f32::EPSILON));
                let want = (p * angle.cos() - q * angle.sin(), q * angle.cos() + p * angle.sin());
                let error = (f64::from(turned[a]) - want.0).abs().max((f64::from(turned[b]) - want.1).abs());
                assert!(error <= bound, "pair {j} at {position}: {error}");
                let length = f64::from(turned[a]).hypot(f64::from(turned[b]));
                assert!((length - p.hypot(q)).abs() < 1e-6, "pair {j} at {position} changed its length");
            }
        }
    }
}
