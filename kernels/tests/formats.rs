//! Every code of every format, exactly.

mod common;

use common::bits;
use kernels::matmul::dequantize_row;
use kernels::{Isa, Matrix, Values, reference};

/// Every row of `w` on every instruction set, against `want`.
#[track_caller]
fn check(w: &Matrix<'_>, want: &[f32]) {
    assert_eq!(bits(&reference::dequantize(w)), bits(want), "reference");
    for isa in Isa::available() {
        let mut row = vec![0.0; w.cols];
        for r in 0..w.rows {
            dequantize_row(isa, w, r, &mut row);
            assert_eq!(bits(&row), bits(&want[r * w.cols..][..w.cols]), "{isa:?} row {r}");
        }
    }
}

#[test]
fn all_halves() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let want: Vec<f32> = (0..=u16::MAX)
        .map(|code| {
            let (exponent, mantissa) = (i32::from(code >> 10 & 31), f64::from(code & 1023));
            let magnitude = match exponent {
                0 => mantissa * 2f64.powi(-24),
                31 if mantissa == 0.0 => f64::INFINITY,
                31 => f64::NAN,
                _ => (1.0 + mantissa / 1024.0) * 2f64.powi(exponent - 15),
            };
            (if code >> 15 == 0 { magnitude } else { -magnitude }) as f32
        })
        .collect();
    check(&Matrix::new(Values::F16(&bytes), 16, 4096), &want);
}

#[test]
fn all_bf16() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let want: Vec<f32> = (0..=u16::MAX).map(|code| f32::from_bits(u32::from(code) << 16)).collect();
    check(&Matrix::new(Values::Bf16(&bytes), 16, 4096), &want);
}

#[test]
fn all_fp8_codes_with_odd_scales() {
    let values: Vec<u8> = (0..=255).collect();
    for scale in [1.0, -0.037, 1e-38, 3e38, f32::from_bits(1), f32::INFINITY, f32::NAN, 0.0] {
        let scales: Vec<u8> = [scale, scale].iter().flat_map(|s: &f32| s.to_le_bytes()).collect();
        let want: Vec<f32> = (0..=255).map(|code| reference::e4m3(code) * scale).collect();
        check(&Matrix::new(Values::Fp8 { values: &values, scales: &scales }, 1, 256), &want);
    }
    assert_eq!(reference::e4m3(0x7e), 448.0);
    assert_eq!(reference::e4m3(0x01), 2f32.powi(-9));
    assert_eq!(reference::e4m3(0x38), 1.0);
    assert!(reference::e4m3(0x7f).is_nan() && reference::e4m3(0xff).is_nan());
}

#[test]
fn fp8_blocks_are_partial_at_the_edges() {
    let (rows, cols) = (130, 150);
    let values = vec![0x38; rows * cols];
    let scales: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|s| s.to_le_bytes()).collect();
    let want: Vec<f32> = (0..rows * cols)
        .map(|at| (1 + usize::from(at % cols >= 128) + 2 * usize::from(at / cols >= 128)) as f32)
        .collect();
    let w = Matrix::new(Values::Fp8 { values: &values, scales: &scales }, rows, cols);
    check(&w, &want);
    check(&w.slice(100, 30), &want[100 * cols..]);
}

#[test]
fn all_int4_codes_with_odd_scales() {
    let packed: Vec<u8> = (0..16).map(|i| (2 * i % 16) | (2 * i % 16 + 1) << 4).collect();
    for bits in [0x3f80u16, 0xbc4d, 0x0001, 0x8003, 0x7f7f, 0x7f80, 0x7fc0, 0x0000] {
        let scale = f32::from_bits(u32::from(bits) << 16);
        let want: Vec<f32> = (0..32).map(|i| ((i % 16) as f32 - 8.0) * scale).collect();
        check(&Matrix::new(Values::Int4 { packed: &packed, scales: &bits.to_le_bytes() }, 1, 32), &want);
    }
}

#[test]
fn all_mxfp4_codes_with_all_scales() {
    let codes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
    let blocks: Vec<u8> = (0..16).map(|i| (2 * i % 16) | (2 * i % 16 + 1) << 4).collect();
    for s in 0..=255u8 {
        let scale = if s == 255 { f64::NAN } else { 2f64.powi(i32::from(s) - 127) };
        let want: Vec<f32> = (0..32).map(|i| (codes[i % 16] * scale) as f32).collect();
        check(&Matrix::new(Values::Mxfp4 { blocks: &blocks, scales: &[s] }, 1, 32), &want);
    }
    for (code, value) in codes.iter().enumerate() {
        assert_eq!(f64::from(reference::e2m1(code as u8)).to_bits(), value.to_bits());
    }
}

#[test]
fn nibbles_are_low_first() {
    let mut packed = [0x88; 16];
    packed[0] = 0xF9;
    let want: Vec<f32> = [1.0, 7.0].into_iter().chain([0.0; 30]).collect();
    let scales = half::bf16::ONE.to_le_bytes();
    check(&Matrix::new(Values::Int4 { packed: &packed, scales: &scales }, 1, 32), &want);
}
