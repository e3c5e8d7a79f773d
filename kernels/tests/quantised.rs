//! Integer products: against f64, and the same bits whatever the rows, threads and instruction set.

mod common;

use common::{Format, Random, Weight, assert_close, bits, in_pools};
use kernels::matmul::matmul_with;
use kernels::quantised::{Activations, Precision};
use kernels::reference;
use kernels::{Isa, Rows, RowsMut};

const FORMATS: [Format; 3] = [Format::Int4, Format::Mxfp4, Format::Q8];
const PRECISIONS: [Precision; 2] = [Precision::Int16, Precision::Int8];

fn product(isa: Isa, precision: Precision, x: &[f32], w: &Weight, bias: Option<&[f32]>) -> Vec<f32> {
    let tokens = x.len() / w.cols;
    let mut activations = Activations::new(Some(precision), tokens, w.cols);
    let mut out = vec![0.0; tokens * w.rows];
    let rows = RowsMut::new(&mut out, w.rows);
    matmul_with(isa, Some(&mut activations), Rows::new(x, w.cols), &w.matrix(), bias, rows);
    out
}

/// What quantising costs at most: half a step of each group's greatest value against every weight of it.
fn reach(precision: Precision, x: &[f32], w: &Weight, t: usize, r: usize) -> f64 {
    let limit = if precision == Precision::Int16 { 32767.0 } else { 127.0 };
    let matrix = w.matrix();
    let x = &x[t * w.cols..][..w.cols];
    let groups = x.chunks(32).enumerate().map(|(g, x)| {
        let peak = x.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        let weights: f64 = (0..32).map(|j| f64::from(reference::value(&matrix, r, g * 32 + j)).abs()).sum();
        weights * f64::from(peak) * (0.5 / limit + 1e-6)
    });
    groups.sum::<f64>() + 1e-20
}

fn check(precision: Precision, format: Format, tokens: usize, rows: usize, cols: usize) {
    let mut random = Random(tokens as u64 * 7 + rows as u64 * 131 + cols as u64);
    let w = Weight::random(&mut random, format, rows, cols);
    let x: Vec<f32> = (0..tokens * cols).map(|_| random.value()).collect();
    let bias: Vec<f32> = (0..rows).map(|_| random.value()).collect();
    let got = product(Isa::detect(), precision, &x, &w, Some(&bias));
    let mut want = Vec::new();
    let mut size = Vec::new();
    for t in 0..tokens {
        for (r, bias) in bias.iter().enumerate() {
            let dot: f64 = (0..cols)
                .map(|c| f64::from(x[t * cols + c]) * f64::from(reference::value(&w.matrix(), r, c)))
                .sum();
            want.push(dot + f64::from(*bias));
            size.push(reach(precision, &x, &w, t, r) + want[want.len() - 1].abs() * 1e-6);
        }
    }
    assert_close(&got, &want, &size, 1.0, &format!("{format:?} {precision:?} {tokens}x{rows}x{cols}"));
    for isa in Isa::available() {
        let other = product(isa, precision, &x, &w, Some(&bias));
        assert_eq!(bits(&other), bits(&got), "{format:?} {precision:?} {tokens}x{rows}x{cols} on {isa:?}");
    }
    for t in 0..tokens {
        let alone = product(Isa::detect(), precision, &x[t * cols..][..cols], &w, Some(&bias));
        assert_eq!(bits(&alone), bits(&got[t * rows..][..rows]), "row {t} of {tokens} alone");
    }
}

#[test]
fn any_number_of_rows() {
    for precision in PRECISIONS {
        for format in FORMATS {
            for tokens in 1..=70 {
                check(precision, format, tokens, 37, 160);
            }
        }
    }
}

#[test]
fn shapes_that_are_not_whole_tiles() {
    for precision in PRECISIONS {
        for format in FORMATS {
            for rows in [1, 15, 16, 17, 31, 32, 33, 48, 70] {
                for cols in [32, 64, 96, 128, 1024, 1056, 2080] {
                    for tokens in [1, 3, 5] {
                        check(precision, format, tokens, rows, cols);
                    }
                }
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let mut random = Random(5);
    for format in FORMATS {
        let w = Weight::random(&mut random, format, 1111, 512);
        for tokens in [1, 2, 9, 130] {
            let x: Vec<f32> = (0..tokens * 512).map(|_| random.value()).collect();
            let all = in_pools(|| product(Isa::detect(), Precision::Int16, &x, &w, None));
            assert!(all.windows(2).all(|pair| bits(&pair[0]) == bits(&pair[1])), "{format:?} {tokens}");
        }
    }
}

#[test]
fn what_is_not_finite_stays_visible() {
    let mut random = Random(9);
    let w = Weight::random(&mut random, Format::Int4, 32, 64);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x: Vec<f32> = (0..64).map(|_| random.value()).collect();
        x[40] = bad;
        for isa in Isa::available() {
            assert!(
                product(isa, Precision::Int16, &x, &w, None).iter().all(|y| y.is_nan()),
                "{bad} on {isa:?}"
            );
        }
    }
    for tiny in [0.0, 1e-38, 1e-42] {
        let y = product(Isa::detect(), Precision::Int16, &[tiny; 64], &w, None);
        assert!(y.iter().all(|y| y.abs() < 1e-30), "{tiny}: {y:?}");
    }
}

/// Lines that reach into the row after them are read in place: nothing of that row may reach the sums.
#[test]
fn a_row_that_is_not_a_number_spoils_no_other() {
    let (rows, cols, bad) = (40, 96, 7);
    let packed = vec![0x5Au8; rows * cols / 2];
    let scale = |r: usize| if r == bad { half::bf16::NAN } else { half::bf16::from_f32(0.5) };
    let scales: Vec<u8> = (0..rows * cols / 32).flat_map(|i| scale(i / (cols / 32)).to_le_bytes()).collect();
    let w = kernels::Matrix::new(kernels::Values::Int4 { packed: &packed, scales: &scales }, rows, cols);
    for tokens in [1, 2, 3, 4, 9, 20] {
        let x: Vec<f32> = (0..tokens * cols).map(|i| (i % 13) as f32 - 6.0).collect();
        for (isa, precision) in Isa::available().into_iter().flat_map(|isa| PRECISIONS.map(|p| (isa, p))) {
            let mut activations = Activations::new(Some(precision), tokens, cols);
            let mut out = vec![0.0; tokens * rows];
            let x = Rows::new(&x, cols);
            matmul_with(isa, Some(&mut activations), x, &w, None, RowsMut::new(&mut out, rows));
            for (i, y) in out.iter().enumerate() {
                assert_eq!(y.is_nan(), i % rows == bad, "{isa:?} {precision:?} row {} of {tokens}", i % rows);
            }
        }
    }
}
