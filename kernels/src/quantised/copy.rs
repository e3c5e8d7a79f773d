//! 8-bit copies of float weights.

use half::bf16;

use crate::format::{GROUP, Matrix};
use crate::matmul::dequantize_row;
use crate::rows::{Bands, Cut, RowsMut, for_each_part};
use crate::simd::Isa;

/// Rows copied by one task.
const ROWS: usize = 64;

/// Codes `[rows, cols]` and bf16 scales `[rows, cols / 32]` of [`crate::Values::Q8`]: a group's scale is the least
/// bf16 not below its greatest magnitude over 127, every code the nearest. Values that are not finite make their
/// group's scale NaN.
///
/// # Panics
/// If columns are not whole groups.
pub fn to_q8(isa: Isa, w: &Matrix<'_>) -> (Vec<u8>, Vec<u8>) {
    assert!(w.cols.is_multiple_of(GROUP), "{} columns are not whole groups of {GROUP}", w.cols);
    // Codes, then scales, so that one task owns both of a row.
    let (codes, scales) = (w.cols, w.cols / GROUP * 2);
    let (mut all_codes, mut all_scales) = (vec![0u8; w.rows * codes], vec![0u8; w.rows * scales]);
    if w.rows == 0 || w.cols == 0 {
        return (all_codes, all_scales);
    }
    let scale_rows = std::sync::Mutex::new(&mut all_scales[..]);
    for_each_part(Cut::new(RowsMut::new(&mut all_codes, codes), Bands::Every(ROWS), codes), &|mut part| {
        let mut row = vec![0.0; w.cols];
        let mut part_scales = Vec::with_capacity(part.rows.count() * scales);
        for r in 0..part.rows.count() {
            dequantize_row(isa, w, part.first_row + r, &mut row);
            for (values, codes) in row.chunks_exact(GROUP).zip(part.rows.row(r).chunks_exact_mut(GROUP)) {
                part_scales.extend(group(values, codes).to_le_bytes());
            }
        }
        let mut out = scale_rows.lock().expect("no task panics while it copies");
        out[part.first_row * scales..][..part_scales.len()].copy_from_slice(&part_scales);
    });
    (all_codes, all_scales)
}

fn group(values: &[f32], codes: &mut [u8]) -> bf16 {
    let peak = values.iter().fold(0.0f32, |peak, v| if v.is_finite() { peak.max(v.abs()) } else { f32::NAN });
    if peak.is_nan() || values.iter().any(|v| !v.is_finite()) {
        codes.fill(128);
        return bf16::NAN;
    }
    let nearest = bf16::from_f32(peak / 127.0);
    let scale =
        if nearest.to_f32() * 127.0 < peak { bf16::from_bits(nearest.to_bits() + 1) } else { nearest };
    for (v, code) in values.iter().zip(codes) {
        let q = if scale.to_f32() > 0.0 {
            (v / scale.to_f32()).round_ties_even().clamp(-127.0, 127.0)
        } else {
            0.0
        };
        *code = (q + 128.0) as u8;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Values;

    #[test]
    fn every_value_is_within_half_a_step() {
        let values: Vec<f32> =
            (0..70 * 96).map(|i| ((i * 7919 % 1013) as f32 - 500.0) * 1e-3 * (1 + i % 5) as f32).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let (codes, scales) = to_q8(Isa::detect(), &Matrix::new(Values::F32(&bytes), 70, 96));
        let copy = Matrix::new(Values::Q8 { codes: &codes, scales: &scales }, 70, 96);
        for (i, v) in values.iter().enumerate() {
            let group = &values[i / 32 * 32..][..32];
            let peak = group.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            let error = (crate::reference::value(&copy, i / 96, i % 96) - v).abs();
            assert!(error <= peak / 127.0 * 0.51, "{v} is off by {error}, of {peak}");
        }
    }

    #[test]
    fn what_is_not_finite_stays_visible() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = [1.0f32; 64];
            values[40] = bad;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let (codes, scales) = to_q8(Isa::detect(), &Matrix::new(Values::F32(&bytes), 1, 64));
            let copy = Matrix::new(Values::Q8 { codes: &codes, scales: &scales }, 1, 64);
            assert!(crate::reference::value(&copy, 0, 50).is_nan());
            assert!((crate::reference::value(&copy, 0, 3) - 1.0).abs() < 0.01);
        }
    }
}
