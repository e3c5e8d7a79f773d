//! Products in tile registers: bit for bit the formula of the instruction, whatever the rows, threads and cuts.

mod common;

use common::{Format, Random, Weight, bits, in_pools};
use kernels::matmul::{matmul, matmul_with};
use kernels::quantised::{Activations, Precision};
use kernels::reference;
use kernels::{Isa, Rows, RowsMut};

const PRECISIONS: [Precision; 2] = [Precision::Int16, Precision::Int8];

/// Whether to go on.
fn have_tiles() -> bool {
    let present = Isa::available().contains(&Isa::Avx512Amx);
    if !present {
        eprintln!("SKIP: this processor has no AMX");
    }
    present
}

fn product(precision: Precision, x: &[f32], w: &Weight, bias: Option<&[f32]>) -> Vec<f32> {
    let tokens = x.len() / w.cols;
    let mut activations = Activations::new(Some(precision), tokens, w.cols);
    let mut out = vec![0.0; tokens * w.rows];
    let rows = RowsMut::new(&mut out, w.rows);
    matmul_with(Isa::Avx512Amx, Some(&mut activations), Rows::new(x, w.cols), &w.matrix(), bias, rows);
    out
}

fn nearest_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000)
}

/// One sum over the steps of 32 values: even and odd ones apart, then both.
fn plane(x: &[f32], w: &[f32]) -> f32 {
    let chain = |x: &[f32], w: &[f32], odd: usize| {
        let pairs = x.iter().zip(w).skip(odd).step_by(2);
        pairs.fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum))
    };
    x.chunks(32).zip(w.chunks(32)).fold(0.0, |sum, (x, w)| sum + (chain(x, w, 0) + chain(x, w, 1)))
}

fn expected(precision: Precision, x: &[f32], w: &[f32]) -> f32 {
    let upper: Vec<f32> = x.iter().map(|x| nearest_bf16(*x)).collect();
    let lower: Vec<f32> = x.iter().zip(&upper).map(|(x, upper)| nearest_bf16(x - upper)).collect();
    match precision {
        Precision::Int16 => plane(&upper, w) + plane(&lower, w),
        Precision::Int8 => plane(&upper, w),
    }
}

fn weights_of(w: &Weight) -> Vec<Vec<f32>> {
    let matrix = w.matrix();
    (0..w.rows).map(|r| (0..w.cols).map(|c| reference::value(&matrix, r, c)).collect()).collect()
}

fn check(tokens: usize, rows: usize, cols: usize) {
    let mut random = Random(tokens as u64 * 7 + rows as u64 * 131 + cols as u64);
    let w = Weight::random(&mut random, Format::Bf16, rows, cols);
    let x: Vec<f32> = (0..tokens * cols).map(|_| random.value()).collect();
    let bias: Vec<f32> = (0..rows).map(|_| random.value()).collect();
    let weights = weights_of(&w);
    for precision in PRECISIONS {
        let got = product(precision, &x, &w, Some(&bias));
        for (x, got) in x.chunks(cols).zip(got.chunks(rows)) {
            let want: Vec<f32> =
                weights.iter().zip(&bias).map(|(w, bias)| expected(precision, x, w) + bias).collect();
            assert_eq!(bits(got), bits(&want), "{precision:?}, {tokens} rows, weights {rows} x {cols}");
        }
    }
}

#[test]
fn products_are_their_formula() {
    if !have_tiles() {
        return;
    }
    for tokens in (1..=70).chain([127, 128, 129, 257, 300]) {
        check(tokens, 48, 64);
    }
    for rows in [1, 15, 16, 17, 31, 32, 33, 47, 64, 127, 128, 129, 140] {
        for cols in [32, 96, 520, 544, 1056] {
            for tokens in [1, 9, 70] {
                check(tokens, rows, cols);
            }
        }
    }
    for cols in [2, 8, 30, 34, 63, 100] {
        check(3, 33, cols);
        check(20, 17, cols);
    }
}

#[test]
fn a_row_is_the_same_alone_and_on_any_threads() {
    if !have_tiles() {
        return;
    }
    let (tokens, rows, cols) = (133, 1000, 736);
    let mut random = Random(3);
    let w = Weight::random(&mut random, Format::Bf16, rows, cols);
    let x: Vec<f32> = (0..tokens * cols).map(|_| random.value()).collect();
    for precision in PRECISIONS {
        let whole = product(precision, &x, &w, None);
        in_pools(|| {
            assert_eq!(bits(&product(precision, &x, &w, None)), bits(&whole));
        });
        for t in [0, 1, 63, 64, 132] {
            let alone = product(precision, &x[t * cols..][..cols], &w, None);
            assert_eq!(bits(&alone), bits(&whole[t * rows..][..rows]), "row {t}");
        }
    }
}

/// Two planes leave 2^-17 of every value, f32 2^-24 of every sum.
#[test]
fn two_planes_are_close_to_f32() {
    if !have_tiles() {
        return;
    }
    let (tokens, rows, cols) = (5, 64, 2048);
    let mut random = Random(5);
    let w = Weight::random(&mut random, Format::Bf16, rows, cols);
    let x: Vec<f32> = (0..tokens * cols).map(|_| random.value()).collect();
    let mut exact = vec![0.0; tokens * rows];
    matmul(Isa::Avx512Amx, &x, &w.matrix(), None, &mut exact);
    let weights = weights_of(&w);
    for (precision, part) in [(Precision::Int16, 2f32.powi(-17)), (Precision::Int8, 2f32.powi(-9))] {
        let got = product(precision, &x, &w, None);
        for t in 0..tokens {
            for r in 0..rows {
                let size: f32 = x[t * cols..].iter().zip(&weights[r]).map(|(x, w)| (x * w).abs()).sum();
                let (got, exact) = (got[t * rows + r], exact[t * rows + r]);
                assert!((got - exact).abs() <= size * (part + 1e-6), "{precision:?}: {got} for {exact}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_where_it_is() {
    if !have_tiles() {
        return;
    }
    let (tokens, rows, cols) = (20, 40, 96);
    let mut random = Random(9);
    let w = Weight::random(&mut random, Format::Bf16, rows, cols);
    let clean: Vec<f32> = (0..tokens * cols).map(|_| random.value()).collect();
    for precision in PRECISIONS {
        let want = product(precision, &clean, &w, None);
        for bad in [f32::NAN, f32::INFINITY, f32::from_bits(0x7F80_0001), f32::MAX] {
            let mut x = clean.clone();
            x[7 * cols + 5] = bad;
            let got = product(precision, &x, &w, None);
            for t in 0..tokens {
                let (got, want) = (&got[t * rows..][..rows], &want[t * rows..][..rows]);
                if t == 7 {
                    assert!(got.iter().all(|y| !y.is_finite() || y.abs() > 1e30), "{bad} is lost");
                } else {
                    assert_eq!(bits(got), bits(want), "row {t} beside {bad}");
                }
            }
        }
    }
}
