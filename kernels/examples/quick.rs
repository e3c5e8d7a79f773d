//! A quick look at speed, beside a plain read of the same memory:
//! `cargo run --release -p moebius-kernels --example quick [THREADS]`.
//!
//! Weights are 7168 x 2048, several copies in turn so that no cache holds them; times are the least of some
//! runs. On a machine that others use, believe the best of several calls.

use kernels::attention::{CacheSlice, Gqa, Mla, PAGE, Pages, Queries, gqa, mla};
use kernels::experts::{Activation, Dispatch, DispatchLimits, ExpertFfn, GateUp, Routed, run_experts};
use kernels::matmul::{matmul, matmul_transposed};
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
        let weights: Vec<u8> = (0..ROWS * COLS * 32).into_par_iter().map(byte).collect();
        let scales = vec![0x3c; ROWS * COLS / 16];
        let read = best(40, |run| {
            let sum = |part: &[u8]| {
                let words = part.as_chunks::<8>().0;
                words.iter().fold(0u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)))
            };
            let weights = &weights[run % 16 * ROWS * COLS * 2..][..ROWS * COLS * 2];
            black_box(weights.par_chunks(1 << 20).map(sum).reduce(|| 0, u64::wrapping_add));
        });
        println!("plain read: {:.1} GB/s", (ROWS * COLS * 2) as f64 / read / 1e9);
        for tokens in [1, 2, 4, 32, 128] {
            for format in ["f32", "bf16", "f16", "fp8", "int4", "mxfp4"] {
                product(format, tokens, &weights, &scales);
            }
        }
        for tokens in [1, 64] {
            experts(tokens, &weights, &scales);
            attention(tokens, 8192);
        }
    });
}

/// `copy` of a weight of `ROWS x COLS` in `format`, and its bytes.
fn weight<'a>(format: &str, copy: usize, weights: &'a [u8], scales: &'a [u8]) -> (Values<'a>, usize) {
    let bits = match format {
        "f32" => 32,
        "bf16" | "f16" => 16,
        "fp8" => 8,
        _ => 4,
    };
    let bytes = ROWS * COLS * bits / 8;
    let part = &weights[copy % (weights.len() / bytes) * bytes..][..bytes];
    let values = match format {
        "f32" => Values::F32(part),
        "bf16" => Values::Bf16(part),
        "f16" => Values::F16(part),
        "fp8" => Values::Fp8 { values: part, scales },
        "int4" => Values::Int4 { packed: part, scales },
        _ => Values::Mxfp4 { blocks: part, scales },
    };
    (values, bytes)
}

fn product(format: &str, tokens: usize, weights: &[u8], scales: &[u8]) {
    let x = input(tokens * ROWS);
    let mut out = vec![0.0; tokens * ROWS];
    let bytes = weight(format, 0, weights, scales).1;
    let runs = if tokens > 4 { 6 } else { 40 };
    let operations = 2 * tokens * ROWS * COLS;
    let seconds = best(runs, |run| {
        let w = Matrix::new(weight(format, run, weights, scales).0, ROWS, COLS);
        matmul(Isa::detect(), &x[..tokens * COLS], &w, None, black_box(&mut out));
    });
    report(&format!("{format} x {tokens}"), seconds, bytes, operations);
    let seconds = best(runs, |run| {
        let w = Matrix::new(weight(format, run, weights, scales).0, ROWS, COLS);
        matmul_transposed(Isa::detect(), &x, &w, None, black_box(&mut out[..tokens * COLS]));
    });
    report(&format!("{format} x {tokens} transposed"), seconds, bytes, operations);
}

/// Eight of 21 INT4 experts of 7168 x 2048 per token.
fn experts(tokens: usize, weights: &[u8], scales: &[u8]) {
    let (experts, top_k, hidden, inter) = (21, 8, ROWS, COLS);
    let matrix = |copy, rows, cols| Matrix::new(weight("int4", copy, weights, scales).0, rows, cols);
    let lookup = |id: u32| ExpertFfn {
        gate_up: GateUp::Separate {
            gate: matrix(3 * id as usize, inter, hidden),
            up: matrix(3 * id as usize + 1, inter, hidden),
        },
        gate_up_bias: None,
        down: matrix(3 * id as usize + 2, hidden, inter),
        down_transposed: false,
        down_bias: None,
        activation: Activation::SiluGlu,
    };
    let x = input(tokens * hidden);
    let gates = vec![0.125; tokens * top_k];
    let mut dispatch = Dispatch::new(DispatchLimits { tokens, top_k, experts, hidden, inter });
    let mut out = vec![0.0; tokens * hidden];
    let seconds = best(5, |run| {
        let ids: Vec<u32> = (0..tokens * top_k).map(|pair| ((pair + 8 * run) % experts) as u32).collect();
        let routed = Routed { x: &x, ids: &ids, weights: &gates };
        run_experts(Isa::detect(), routed, &lookup, &mut dispatch, black_box(&mut out));
    });
    let active = experts.min(tokens * top_k);
    let operations = 6 * tokens * top_k * hidden * inter;
    report(&format!("experts x {tokens}"), seconds, active * 3 * hidden * inter * 9 / 16, operations);
}

fn attention(tokens: usize, context: usize) {
    let row = 576;
    let cache = vec![0x3c80; context * row];
    let table: Vec<u32> = (0..(context / PAGE) as u32).collect();
    let pages = Pages { data: CacheSlice::Bf16(&cache), row, table: &table };
    let shape = Mla { heads: 64, latent: 512, rope: 64, scale: 0.1 };
    let x = input(tokens * 64 * row);
    let queries = Queries { rows: &x, first_position: context - tokens };
    let mut scratch = vec![0.0; shape.scratch_len(tokens, context)];
    let mut out = vec![0.0; tokens * 64 * 512];
    let seconds = best(3, |_| mla(Isa::detect(), &shape, queries, &pages, &mut scratch, black_box(&mut out)));
    let operations = 2 * tokens * 64 * context * (row + 512);
    report(&format!("mla x {tokens}, {context} positions"), seconds, context * row * 2, operations);

    let pages = Pages { row: 512, ..pages };
    let shape =
        Gqa { heads: 32, kv_heads: 4, head_dim: 128, value_dim: 128, scale: 0.1, window: None, sinks: None };
    let queries = Queries { rows: &x[..tokens * 32 * 128], first_position: context - tokens };
    let out = &mut out[..tokens * 32 * 128];
    let seconds =
        best(3, |_| gqa(Isa::detect(), &shape, queries, (&pages, &pages), &mut scratch, black_box(out)));
    let operations = 2 * tokens * 32 * context * 256;
    report(&format!("gqa x {tokens}, {context} positions"), seconds, context * 512 * 4, operations);
}

fn input(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect()
}

fn report(name: &str, seconds: f64, bytes: usize, operations: usize) {
    let (bytes, operations) = (bytes as f64 / seconds / 1e9, operations as f64 / seconds / 1e9);
    println!("{name:>24}: {:9.3} ms {bytes:6.1} GB/s {operations:7.1} GFLOP/s", seconds * 1e3);
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
