//! Seconds of one product, beside a plain read of the same bytes: `cargo run --release --example quick`.
//!
//! Weights are 7168 x 2048, several copies in turn so that no cache holds them.

use kernels::matmul::matmul;
use kernels::{Isa, Matrix, Values};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

const ROWS: usize = 7168;
const COLS: usize = 2048;

fn main() {
    let threads = std::env::args().nth(1).map_or(2, |n| n.parse().expect("a number of threads"));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    pool.install(|| {
        println!("{threads} threads, {:?}", Isa::detect());
        // The upper byte of every second word is that of a value near 1, in f32, f16 and bf16 alike: subnormal
        // weights would be slow, and are rare.
        let byte =
            |i: usize| if i % 2 == 1 { 0x3c } else { (i.wrapping_mul(2_654_435_761) >> 13) as u8 & 0xbf };
        let weights: Vec<u8> = (0..ROWS * COLS * 8).map(byte).collect();
        let scales = vec![0x3c; ROWS * COLS / 16];
        let read = best(8, |_| {
            let sum: u64 = weights
                .par_chunks(1 << 20)
                .map(|part| {
                    part.as_chunks::<8>().0.iter().fold(0u64, |s, b| s.wrapping_add(u64::from_le_bytes(*b)))
                })
                .sum();
            black_box(sum);
        });
        println!("plain read: {:.1} GB/s", weights.len() as f64 / read / 1e9);
        for tokens in [1, 2, 4, 8, 32, 128] {
            for (name, bits) in
                [("f32", 32), ("bf16", 16), ("f16", 16), ("fp8", 8), ("int4", 4), ("mxfp4", 4)]
            {
                row(name, bits, tokens, &weights, &scales);
            }
        }
    });
}

fn row(name: &str, bits: usize, tokens: usize, weights: &[u8], scales: &[u8]) {
    let bytes = ROWS * COLS * bits / 8;
    let copies = weights.len() / bytes;
    let x: Vec<f32> = (0..tokens * COLS).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect();
    let mut out = vec![0.0; tokens * ROWS];
    let seconds = best(3.max(copies.min(16)), |run| {
        let part = &weights[run % copies * bytes..][..bytes];
        let values = match name {
            "f32" => Values::F32(part),
            "bf16" => Values::Bf16(part),
            "f16" => Values::F16(part),
            "fp8" => Values::Fp8 { values: part, scales },
            "int4" => Values::Int4 { packed: part, scales },
            _ => Values::Mxfp4 { blocks: part, scales },
        };
        matmul(Isa::detect(), &x, &Matrix::new(values, ROWS, COLS), None, &mut out);
        black_box(&out);
    });
    println!(
        "{name:>6} x {tokens:>3}: {:8.3} ms {:6.1} GB/s {:7.1} GFLOP/s",
        seconds * 1e3,
        bytes as f64 / seconds / 1e9,
        2.0 * (tokens * ROWS * COLS) as f64 / seconds / 1e9
    );
}

/// The least seconds of some runs, the first aside.
fn best(runs: usize, mut f: impl FnMut(usize)) -> f64 {
    f(0);
    (1..=runs)
        .map(|run| {
            let start = Instant::now();
            f(run);
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}
