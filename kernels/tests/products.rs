//! Products in every format, on every instruction set, in every cut.

mod common;

use common::{FORMATS, Format, Random, Weight, assert_close, bits, in_pools};
use kernels::matmul::{
    Heads, dequantize_row, matmul, matmul_heads, matmul_rows, matmul_serial, matmul_transposed,
    matmul_transposed_heads, matmul_transposed_rows, matmul_transposed_serial,
};
use kernels::{Isa, Matrix, Rows, RowsMut, Values, reference};
use proptest::prelude::*;

/// f32 sums of K products in 32 lanes: (K / 32 + 6) half units in the last place of the sum of magnitudes.
fn tolerance(k: usize) -> f64 {
    (k as f64 / 32.0 + 6.0) * f64::from(f32::EPSILON)
}

fn shapes(format: Format) -> Vec<(usize, usize)> {
    let cols: &[usize] = if format.grouped() { &[32, 96, 1056] } else { &[1, 33, 144, 1100] };
    let rows = [1, 3, 129];
    rows.iter().flat_map(|&r| cols.iter().map(move |&c| (r, c))).collect()
}

fn magnitudes(x: &[f32]) -> Vec<f32> {
    x.iter().map(|v| v.abs()).collect()
}

fn owned(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn matmul_meets_the_reference_with_the_same_bits_everywhere() {
    let mut random = Random(1);
    for format in FORMATS {
        for (rows, cols) in shapes(format) {
            let weight = Weight::random(&mut random, format, rows, cols);
            let w = weight.matrix();
            let tokens = 7;
            let x = random.values(tokens * cols);
            let bias = random.values(rows);
            let what = format!("{format:?} [{rows}, {cols}]");

            let want = reference::matmul(&x, &w, Some(&bias));
            let size_bytes = owned(&magnitudes(&reference::dequantize(&w)));
            let size_weight = Matrix::new(Values::F32(&size_bytes), rows, cols);
            let size = reference::matmul(&magnitudes(&x), &size_weight, Some(&magnitudes(&bias)));

            let mut first: Option<Vec<u32>> = None;
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; tokens * rows];
                matmul(isa, &x, &w, Some(&bias), &mut out);
                assert_close(&out, &want, &size, tolerance(cols), &what);
                assert_eq!(first.get_or_insert_with(|| bits(&out)), &bits(&out), "{what} {isa:?}");
                for (t, x) in x.chunks_exact(cols).enumerate() {
                    let mut alone = vec![f32::NAN; rows];
                    matmul(isa, x, &w, Some(&bias), &mut alone);
                    assert_eq!(bits(&alone), bits(&out[t * rows..][..rows]), "{what} {isa:?} row {t} alone");
                }
            }
        }
    }
}

#[test]
fn transposed_meets_the_reference_with_the_same_bits_everywhere() {
    let mut random = Random(2);
    for format in FORMATS {
        for (rows, cols) in shapes(format) {
            let weight = Weight::random(&mut random, format, rows, cols);
            let w = weight.matrix();
            let tokens = 6;
            let x = random.values(tokens * rows);
            let bias = random.values(cols);
            let what = format!("{format:?} [{rows}, {cols}] transposed");

            let want = reference::matmul_transposed(&x, &w, Some(&bias));
            let size_bytes = owned(&magnitudes(&reference::dequantize(&w)));
            let size_weight = Matrix::new(Values::F32(&size_bytes), rows, cols);
            let size = reference::matmul_transposed(&magnitudes(&x), &size_weight, Some(&magnitudes(&bias)));

            let mut first: Option<Vec<u32>> = None;
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; tokens * cols];
                matmul_transposed(isa, &x, &w, Some(&bias), &mut out);
                assert_close(&out, &want, &size, rows as f64 * f64::from(f32::EPSILON), &what);
                assert_eq!(first.get_or_insert_with(|| bits(&out)), &bits(&out), "{what} {isa:?}");
                for (t, x) in x.chunks_exact(rows).enumerate() {
                    let mut alone = vec![f32::NAN; cols];
                    matmul_transposed(isa, x, &w, Some(&bias), &mut alone);
                    assert_eq!(bits(&alone), bits(&out[t * cols..][..cols]), "{what} {isa:?} row {t} alone");
                }
            }
        }
    }
}

/// Every number of rows of x up to more than are taken at once, over several panels and a tail.
#[test]
fn any_number_of_rows_gives_the_bits_of_one() {
    let mut random = Random(8);
    for (format, cols) in [(Format::Bf16, 3300), (Format::Fp8, 1570), (Format::Int4, 1600)] {
        let weight = Weight::random(&mut random, format, 11, cols);
        let w = weight.matrix();
        let x = random.values(70 * cols);
        let mut alone = vec![f32::NAN; 70 * 11];
        for (x, out) in x.chunks_exact(cols).zip(alone.chunks_exact_mut(11)) {
            matmul(Isa::Portable, x, &w, None, out);
        }
        for isa in Isa::available() {
            for tokens in 1..=70 {
                let mut out = vec![f32::NAN; tokens * 11];
                matmul(isa, &x[..tokens * cols], &w, None, &mut out);
                assert_eq!(bits(&out), bits(&alone[..tokens * 11]), "{format:?} {isa:?} {tokens} rows");
            }
        }
    }
}

/// The order of products with weights of bf16 or FP8 codes: chains of 32 columns, of each pair the second first; then the
/// scale of the block, where there is one.
fn by_groups(w: &[f32], x: &[f32], scales: Option<&[f32]>) -> f32 {
    let group = |w: &[f32], x: &[f32]| {
        let order = (0..32).map(|i| i ^ 1).filter(|&i| i < w.len());
        order.fold(0.0f32, |sum, i| w[i].mul_add(x[i], sum))
    };
    w.chunks(32).zip(x.chunks(32)).enumerate().fold(0.0, |sum, (g, (w, x))| match scales {
        Some(scales) => group(w, x).mul_add(scales[g / 4], sum),
        None => sum + group(w, x),
    })
}

/// The canonical order, as `simd` and `matmul` state it.
#[test]
fn sums_are_taken_in_the_written_order() {
    let mut random = Random(7);
    for format in FORMATS {
        for cols in if format.grouped() { [32, 800, 4096] } else { [17, 801, 4100] } {
            let weight = Weight::random(&mut random, format, 9, cols);
            let w = weight.matrix();
            let values = reference::dequantize(&w);
            let x = random.values(4 * cols);
            let mut out = vec![f32::NAN; 4 * 9];
            matmul(Isa::detect(), &x, &w, None, &mut out);
            let y = random.values(4 * 9);
            let mut out_transposed = vec![f32::NAN; 4 * cols];
            matmul_transposed(Isa::detect(), &y, &w, None, &mut out_transposed);
            for t in 0..4 {
                for r in 0..9 {
                    let mut lanes = [0.0f32; 32];
                    for k in 0..cols {
                        lanes[k % 32] = values[r * cols + k].mul_add(x[t * cols + k], lanes[k % 32]);
                    }
                    for half in [16, 8, 4, 2, 1] {
                        (0..half).for_each(|j| lanes[j] += lanes[j + half]);
                    }
                    let (here, x) = (r * cols..(r + 1) * cols, &x[t * cols..][..cols]);
                    let want = match w.values {
                        Values::Bf16(_) => by_groups(&values[here], x, None),
                        Values::Fp8 { values, scales } => {
                            let codes: Vec<f32> = values[here].iter().map(|&c| reference::e4m3(c)).collect();
                            let scales: Vec<f32> =
                                scales.as_chunks().0.iter().map(|&s| f32::from_le_bytes(s)).collect();
                            by_groups(&codes, x, Some(&scales))
                        }
                        _ => lanes[0],
                    };
                    assert_eq!(out[t * 9 + r].to_bits(), want.to_bits(), "{format:?} {cols}");
                }
                for j in 0..cols {
                    let sum = (0..9).fold(0.0f32, |sum, i| y[t * 9 + i].mul_add(values[i * cols + j], sum));
                    assert_eq!(out_transposed[t * cols + j].to_bits(), sum.to_bits(), "{format:?} {cols}");
                }
            }
        }
    }
}

/// Large enough that the product is cut over rows of w, and with few rows of w over rows of x.
#[test]
fn threads_and_cuts_change_nothing() {
    let mut random = Random(3);
    let isa = Isa::detect();
    for format in FORMATS {
        for (tokens, rows, cols) in [(1, 515, 544), (37, 259, 288), (300, 40, 1056)] {
            let weight = Weight::random(&mut random, format, rows, cols);
            let w = weight.matrix();
            let what = format!("{format:?} {tokens} x [{rows}, {cols}]");

            let x = random.values(tokens * cols);
            let mut serial = vec![f32::NAN; tokens * rows];
            matmul_serial(isa, Rows::new(&x, cols), &w, None, RowsMut::new(&mut serial, rows));
            for out in in_pools(|| {
                let mut out = vec![f32::NAN; tokens * rows];
                matmul(isa, &x, &w, None, &mut out);
                out
            }) {
                assert_eq!(bits(&serial), bits(&out), "{what}");
            }

            let x = random.values(tokens * rows);
            let mut serial = vec![f32::NAN; tokens * cols];
            matmul_transposed_serial(isa, Rows::new(&x, rows), &w, None, RowsMut::new(&mut serial, cols));
            for out in in_pools(|| {
                let mut out = vec![f32::NAN; tokens * cols];
                matmul_transposed(isa, &x, &w, None, &mut out);
                out
            }) {
                assert_eq!(bits(&serial), bits(&out), "{what} transposed");
            }
        }
    }
}

#[test]
fn slices_of_rows_keep_their_scales() {
    let mut random = Random(4);
    for format in FORMATS {
        let cols = if format.grouped() { 160 } else { 200 };
        let weight = Weight::random(&mut random, format, 300, cols);
        let whole = reference::dequantize(&weight.matrix());
        for (start, rows) in [(0, 300), (1, 130), (127, 2), (128, 172), (299, 1), (77, 0)] {
            let slice = weight.matrix().slice(start, rows);
            let again = slice.slice(rows / 2, rows - rows / 2);
            assert_eq!(bits(&reference::dequantize(&slice)), bits(&whole[start * cols..][..rows * cols]));
            let x = random.values(3 * cols);
            for isa in Isa::available() {
                let mut row = vec![f32::NAN; cols];
                for r in 0..again.rows {
                    dequantize_row(isa, &again, r, &mut row);
                    let at = (start + rows / 2 + r) * cols;
                    assert_eq!(bits(&row), bits(&whole[at..][..cols]), "{format:?} {isa:?} {start}+{r}");
                }
                let mut all = vec![f32::NAN; 3 * 300];
                matmul(isa, &x, &weight.matrix(), None, &mut all);
                let mut some = vec![f32::NAN; 3 * rows];
                if rows > 0 {
                    matmul(isa, &x, &slice, None, &mut some);
                }
                for t in 0..3 {
                    assert_eq!(bits(&some[t * rows..][..rows]), bits(&all[t * 300 + start..][..rows]));
                }
            }
        }
    }
}

#[test]
fn strided_rows_leave_the_gaps_alone() {
    let mut random = Random(5);
    let weight = Weight::random(&mut random, Format::Bf16, 70, 96);
    let w = weight.matrix();
    let (x, x_in) = (random.values(5 * 110), random.values(5 * 110));
    for isa in Isa::available() {
        let packed: Vec<f32> = (0..5).flat_map(|t| x[t * 110..][..96].to_vec()).collect();
        let mut want = vec![0.0; 5 * 70];
        matmul(isa, &packed, &w, None, &mut want);
        let mut out = vec![7.0; 4 * 83 + 70];
        matmul_rows(isa, Rows::strided(&x, 5, 110, 96), &w, None, RowsMut::strided(&mut out, 5, 83, 70));
        for (t, row) in out.chunks(83).enumerate() {
            assert_eq!(bits(&row[..70]), bits(&want[t * 70..][..70]));
            assert!(row[70..].iter().all(|v| *v == 7.0));
        }

        let packed: Vec<f32> = (0..5).flat_map(|t| x_in[t * 110..][..70].to_vec()).collect();
        let mut want = vec![0.0; 5 * 96];
        matmul_transposed(isa, &packed, &w, None, &mut want);
        let mut out = vec![7.0; 5 * 100];
        let rows = Rows::strided(&x_in, 5, 110, 70);
        matmul_transposed_rows(isa, rows, &w, None, RowsMut::strided(&mut out, 5, 100, 96));
        for (t, row) in out.chunks(100).enumerate() {
            assert_eq!(bits(&row[..96]), bits(&want[t * 96..][..96]));
            assert!(row[96..].iter().all(|v| *v == 7.0));
        }
    }
}

/// W_UK and W_UV of latent attention: [heads * (nope + value), latent], with room for the rotated part
/// in the queries before and after.
#[test]
fn per_head_products() {
    let mut random = Random(6);
    let (tokens, heads, nope, value, latent, rope) = (3, 5, 24, 40, 64, 16);
    for format in FORMATS {
        let weight = Weight::random(&mut random, format, heads * (nope + value), latent);
        let x = random.values(tokens * heads * (nope + rope));
        let isa = Isa::detect();
        let up_key = weight.matrix().slice(0, nope);
        let steps =
            Heads { count: heads, x_step: nope + rope, w_step: nope + value, out_step: latent + rope };
        let mut absorbed = vec![7.0; tokens * heads * (latent + rope)];
        let width = heads * (latent + rope);
        let queries = Rows::new(&x, heads * (nope + rope));
        matmul_transposed_heads(isa, &steps, queries, &up_key, RowsMut::new(&mut absorbed, width));

        let up_value = weight.matrix().slice(nope, value);
        let steps = Heads { count: heads, x_step: latent + rope, w_step: nope + value, out_step: value };
        let mut out = vec![7.0; tokens * heads * value];
        matmul_heads(
            isa,
            &steps,
            Rows::new(&absorbed, width),
            &up_value,
            RowsMut::new(&mut out, heads * value),
        );

        for t in 0..tokens {
            for h in 0..heads {
                let query = &x[(t * heads + h) * (nope + rope)..][..nope];
                let mut want = vec![0.0; latent];
                let w = weight.matrix().slice(h * (nope + value), nope);
                matmul_transposed(isa, query, &w, None, &mut want);
                let got = &absorbed[(t * heads + h) * (latent + rope)..][..latent + rope];
                assert_eq!(bits(&got[..latent]), bits(&want), "{format:?} {t} {h}");
                assert!(got[latent..].iter().all(|v| *v == 7.0));

                let w = weight.matrix().slice(h * (nope + value) + nope, value);
                let mut want = vec![0.0; value];
                matmul(isa, &got[..latent], &w, None, &mut want);
                assert_eq!(bits(&out[(t * heads + h) * value..][..value]), bits(&want), "{format:?} {t} {h}");
            }
        }
    }
}

#[test]
fn nan_and_infinity_reach_the_output_and_no_further() {
    let mut bytes = owned(&[1.0; 3 * 40]);
    bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    bytes[4 * (40 + 39)..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let w = Matrix::new(Values::F32(&bytes), 3, 40);
    for isa in Isa::available() {
        for tokens in [1, 5] {
            let mut out = vec![0.0; tokens * 3];
            matmul(isa, &vec![1.0; tokens * 40], &w, None, &mut out);
            for row in out.chunks_exact(3) {
                assert!(row[0].is_nan() && row[1] == f32::INFINITY && row[2] == 40.0, "{isa:?} {row:?}");
            }
        }
    }
}

/// An infinite block scale must not turn the missing lanes of a tail into 0 * infinity.
#[test]
fn a_tail_has_no_missing_lanes() {
    let values = [0x38; 3];
    let scales = f32::INFINITY.to_le_bytes();
    let w = Matrix::new(Values::Fp8 { values: &values, scales: &scales }, 1, 3);
    for isa in Isa::available() {
        for tokens in [1, 4] {
            let mut out = vec![0.0; tokens];
            matmul(isa, &vec![1.0; tokens * 3], &w, None, &mut out);
            assert!(out.iter().all(|v| *v == f32::INFINITY), "{isa:?} {out:?}");
            let mut out = vec![0.0; tokens * 3];
            matmul_transposed(isa, &vec![1.0; tokens], &w, None, &mut out);
            assert!(out.iter().all(|v| *v == f32::INFINITY), "{isa:?} {out:?}");
        }
    }
}

#[test]
fn an_empty_input_is_no_work() {
    let w = Matrix::new(Values::F32(&[]), 0, 8);
    let isa = Isa::detect();
    matmul_rows(isa, Rows::strided(&[], 0, 8, 8), &w, None, RowsMut::strided(&mut [], 0, 1, 0));
}

#[test]
#[should_panic(expected = "columns of x and of the weight")]
fn a_wrong_width_is_refused() {
    let bytes = owned(&[1.0; 12]);
    let w = Matrix::new(Values::F32(&bytes), 3, 4);
    matmul_rows(Isa::Portable, Rows::new(&[0.0; 5], 5), &w, None, RowsMut::new(&mut [0.0; 3], 3));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_shape(seed: u64, format in 0..6usize, tokens in 1..70usize, rows in 1..80usize, cols in 1..300usize) {
        let mut random = Random(seed);
        let format = FORMATS[format];
        let cols = if format.grouped() { cols.next_multiple_of(32) } else { cols };
        let weight = Weight::random(&mut random, format, rows, cols);
        let w = weight.matrix();
        let x = random.values(tokens * cols);
        let want = reference::matmul(&x, &w, None);
        let size: Vec<f64> = vec![cols as f64 * 8.0; want.len()];
        let mut out = vec![f32::NAN; tokens * rows];
        matmul(Isa::detect(), &x, &w, None, &mut out);
        assert_close(&out, &want, &size, tolerance(cols), "random shape");
        let picked = random.below(tokens);
        let mut alone = vec![f32::NAN; rows];
        matmul(Isa::detect(), &x[picked * cols..][..cols], &w, None, &mut alone);
        prop_assert_eq!(bits(&alone), bits(&out[picked * rows..][..rows]));
    }
}

#[test]
#[should_panic(expected = "scales of 2 blocks")]
fn missing_scales_are_refused() {
    let values = Values::Fp8 { values: &[0x38; 129 * 4], scales: &[0; 4] };
    let mut out = [0.0; 129];
    matmul(Isa::detect(), &[1.0; 4], &Matrix::new(values, 129, 4), None, &mut out);
}

/// Few rows of x look codes up, many widen them; each code is what it is by definition.
#[test]
fn every_fp8_code_is_multiplied_exactly() {
    let values: Vec<u8> = (0..=255).collect();
    let scales: Vec<u8> = [1.0f32, -0.037].iter().flat_map(|scale| scale.to_le_bytes()).collect();
    let w = Matrix::new(Values::Fp8 { values: &values, scales: &scales }, 256, 1);
    for isa in Isa::available() {
        for tokens in [1, 4, 5, 17, 64] {
            let mut out = vec![0.0; tokens * 256];
            matmul(isa, &vec![1.0; tokens], &w, None, &mut out);
            for (at, out) in out.iter().enumerate() {
                let (code, scale) = (values[at % 256], [1.0, -0.037][at % 256 / 128]);
                let want = reference::e4m3(code) * scale;
                assert!(*out == want || out.is_nan() && want.is_nan(), "{isa:?} {tokens} {code:x}: {out}");
            }
        }
    }
}
