//! Products beside what binds them: `cargo run --release -p moebius-kernels --example integer [THREADS]`.

use kernels::matmul::matmul_with;
use kernels::quantised::{Activations, Precision};
use kernels::{Isa, Matrix, Rows, RowsMut, Values};
use std::hint::black_box;
use std::time::Instant;

fn main() {
    let threads: usize = std::env::args().nth(1).map_or(1, |n| n.parse().expect("threads"));
    let only: Option<usize> = std::env::args().nth(2).map(|n| n.parse().unwrap());
    let cols = 7168;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let bytes: Vec<u8> = (0..400 << 20).map(|i: usize| if i % 2 == 1 { 0x3c } else { (i.wrapping_mul(2_654_435_761) >> 13) as u8 }).collect();
        let scales: Vec<u8> = (0..50 << 20).map(|i| if i % 2 == 1 { 0x3c } else { 7 }).collect();
        let median = |v: &mut Vec<f64>| { v.sort_by(f64::total_cmp); v[v.len() / 2] };
        for kind in ["int16", "int8", "bf16"] {
            for m in [1, 2, 4] {
                if only.is_some_and(|o| o != m) { continue }
                let rows = if kind == "bf16" { 1024 } else { 4096 };
                let x: Vec<f32> = (0..m * cols).map(|i| (i % 97) as f32 - 48.0).collect();
                let mut room = match kind { "int16" => Some(Activations::new(Some(Precision::Int16), m, cols)), "int8" => Some(Activations::new(Some(Precision::Int8), m, cols)), _ => Some(Activations::new(None, m, cols)) };
                let mut out = vec![0.0; m * rows];
                let (mut t, mut r) = (vec![], vec![]);
                let size = if kind == "bf16" { rows * cols * 2 } else { rows * cols / 2 };
                let copies = bytes.len() / size;
                for i in 0..copies {
                    let p = &bytes[i * size..][..size];
                    let values = if kind == "bf16" { Values::Bf16(p) } else { Values::Int4 { packed: p, scales: &scales[i % 20 * rows * cols / 16..][..rows * cols / 16] } };
                    let w = Matrix::new(values, rows, cols);
                    let start = Instant::now();
                    matmul_with(Isa::detect(), room.as_mut(), Rows::new(&x, cols), &w, None, RowsMut::new(&mut out, rows));
                    t.push(start.elapsed().as_secs_f64());
                    let other = &bytes[(i + copies / 2) % copies * size..][..size];
                    let start = Instant::now();
                    let parts = std::sync::Mutex::new(0u64);
                    kernels::team::run(threads, &|k| {
                        let part = &other[k * other.len() / threads..(k + 1) * other.len() / threads];
                        // Four streams at a time.
                        let q = part.len() / 4 / 8 * 8;
                        let mut s = [0u64; 4];
                        for o in (0..q).step_by(64) {
                            for j in 0..4 {
                                for w in part[j * q + o..][..64].as_chunks::<8>().0 { s[j] ^= u64::from_le_bytes(*w); }
                            }
                        }
                        *parts.lock().unwrap() ^= s[0] ^ s[1] ^ s[2] ^ s[3];
                    });
                    black_box(parts);
                    r.push(other.len() as f64 / start.elapsed().as_secs_f64() / 1e9);
                }
                let (t, r) = (median(&mut t), median(&mut r));
                let bytes = size as f64 * if kind == "bf16" { 1.0 } else { 1.125 };
                println!("{kind} M={m}: {:.2} ms {:.1} GB/s (read {r:.1}: {:.2}) {:.0} GOP/s", t * 1e3, bytes / t / 1e9, bytes / t / 1e9 / r, 2.0 * (m * rows * cols) as f64 / t / 1e9);
            }
        }
    });
}
