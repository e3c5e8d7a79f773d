//! Integer products beside what binds them: `cargo run --release -p moebius-kernels --example integer`.

use kernels::matmul::matmul_with;
use kernels::quantised::{Activations, Precision};
use kernels::{Isa, Matrix, Rows, RowsMut, Values};
use std::hint::black_box;
use std::time::Instant;

fn main() {
    let threads = std::env::args().nth(1).map_or(1, |n| n.parse().expect("threads"));
    let (rows, cols) = (4096, 7168);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        const COPIES: usize = 24;
        let packed: Vec<u8> =
            (0..COPIES * rows * cols / 2).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let scales: Vec<u8> =
            (0..COPIES * rows * cols / 16).map(|i| if i % 2 == 1 { 0x3c } else { 7 }).collect();
        let median = |v: &mut Vec<f64>| {
            v.sort_by(f64::total_cmp);
            v[v.len() / 2]
        };
        for precision in [Precision::Int16, Precision::Int8] {
            for m in [1, 2, 3, 4, 8, 11, 16, 43, 64] {
                let x: Vec<f32> = (0..m * cols).map(|i| (i % 97) as f32 - 48.0).collect();
                let mut activations = Activations::new(precision, m, cols);
                let mut out = vec![0.0; m * rows];
                let (mut t, mut r) = (vec![], vec![]);
                for i in 0..COPIES {
                    let p = &packed[i * rows * cols / 2..][..rows * cols / 2];
                    let s = &scales[i * rows * cols / 16..][..rows * cols / 16];
                    let w = Matrix::new(Values::Int4 { packed: p, scales: s }, rows, cols);
                    let start = Instant::now();
                    matmul_with(
                        Isa::detect(),
                        Some(&mut activations),
                        Rows::new(&x, cols),
                        &w,
                        None,
                        RowsMut::new(&mut out, rows),
                    );
                    t.push(start.elapsed().as_secs_f64());
                    let other = &packed[(i + COPIES / 2) % COPIES * rows * cols / 2..][..rows * cols / 2];
                    let start = Instant::now();
                    let parts = std::sync::Mutex::new(0u64);
                    kernels::team::run(threads, &|k| {
                        let part = &other[k * other.len() / threads..(k + 1) * other.len() / threads];
                        let s = part.as_chunks::<8>().0.iter().fold(0u64, |s, w| s ^ u64::from_le_bytes(*w));
                        *parts.lock().unwrap() ^= s;
                    });
                    black_box(parts);
                    r.push(other.len() as f64 / start.elapsed().as_secs_f64() / 1e9);
                }
                let (t, r) = (median(&mut t), median(&mut r));
                let bytes = (rows * cols) as f64 * 0.5625;
                println!(
                    "{precision:?} M={m}: {:.2} ms {:.1} GB/s (read {r:.1}: {:.2}) {:.0} GOP/s",
                    t * 1e3,
                    bytes / t / 1e9,
                    bytes / t / 1e9 / r,
                    2.0 * (m * rows * cols) as f64 / t / 1e9
                );
            }
        }
    });
}
