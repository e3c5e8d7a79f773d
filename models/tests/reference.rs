//! The reference runner against the golden cases, and against itself in other batches.

use std::path::{Path, PathBuf};
use std::time::Instant;

use kernels::attention::PAGE;
use models::reference::ReferenceRunner;
use models::{Batch, Capacity, Checkpoint, Model, NoProbe, Point, Probe, Runner, WantLogits};
use safetensors::SafeTensors;

const CASES: &[&str] = &[
    "deepseek_v2",
    "deepseek_v3_k2",
    "deepseek_v3_groups",
    "deepseek_v3_noq",
    "kimi_k2",
    "kimi_k2_fp8",
    "kimi_k2_int4",
    "kimi_k25_int4",
    "glm4_moe_lite",
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "glm4_moe",
    "minimax_m2",
    "gpt_oss_bf16",
    "gpt_oss_mxfp4",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
];
const CAPACITY: Capacity = Capacity::new(24, 1024, 128);

fn folder(case: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = ["../tests/golden", "../../shared/cases"].map(|place| root.join(place).join(case));
    let found = places.into_iter().find(|place| place.join("golden.safetensors").exists());
    if found.is_none() {
        println!("SKIP {case}: its golden files are not here");
    }
    found
}

fn runner(folder: &Path) -> ReferenceRunner {
    ReferenceRunner::new(Model::open(Checkpoint::open(folder).unwrap()).unwrap(), CAPACITY).unwrap()
}

fn run(runner: &mut ReferenceRunner, batch: &Batch, probe: &mut dyn Probe) -> Vec<f32> {
    let mut logits = vec![0.0; batch.logit_rows.len() * runner.config().vocab];
    runner.forward(batch, probe, &mut logits).unwrap();
    logits
}

/// One span on blocks `0 ..`.
fn span(tokens: &[u32], start: usize, want: WantLogits) -> Batch {
    let mut batch = Batch::default();
    let table: Vec<u32> = (0..(start + tokens.len()).div_ceil(PAGE) as u32).collect();
    batch.push(tokens, start, &table, want);
    batch
}

/// A 4-byte golden tensor.
fn golden<T>(file: &SafeTensors<'_>, name: &str, read: fn([u8; 4]) -> T) -> Vec<T> {
    file.tensor(name).unwrap().data().as_chunks().0.iter().map(|b| read(*b)).collect()
}

fn relative_l2(want: &[f32], got: &[f32]) -> f64 {
    assert_eq!(want.len(), got.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = want.iter().zip(got).map(|(a, b)| square(a - b)).sum();
    (difference / want.iter().map(|a| square(*a)).sum::<f64>()).sqrt()
}

fn max_abs(want: &[f32], got: &[f32]) -> f32 {
    want.iter().zip(got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Residual stream after each layer, and routing by layer.
#[derive(Default)]
struct Trace {
    out: Vec<Vec<f32>>,
    routing: Vec<(usize, usize, Vec<u32>, Vec<f32>)>,
}

impl Probe for Trace {
    fn wants(&self, _layer: usize, point: Point) -> bool {
        point == Point::LayerOut
    }

    fn value(&mut self, _layer: usize, _point: Point, values: &[f32]) {
        self.out.push(values.to_vec());
    }

    fn routing(&mut self, layer: usize, top_k: usize, ids: &[u32], weights: &[f32]) {
        self.routing.push((layer, top_k, ids.to_vec(), weights.to_vec()));
    }
}

#[test]
fn golden_cases_are_met() {
    println!(
        "| case | logits rel. L2 | logits max abs | out_last rel. L2 | routing sets | weights max abs |"
    );
    for case in CASES {
        let Some(folder) = folder(case) else { continue };
        let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut runner = runner(&folder);
        let hidden = runner.config().hidden;
        let (mut worst_l2, mut worst_abs, mut worst_out, mut worst_weight) = (0f64, 0f32, 0f64, 0f32);
        let (mut pairs, mut agreeing) = (0, 0);
        for p in 0..3 {
            let tokens = golden(&file, &format!("prompt{p}.input_ids"), u32::from_le_bytes);
            let want = golden(&file, &format!("prompt{p}.logits"), f32::from_le_bytes);
            let wanted = if p == 2 { WantLogits::Last } else { WantLogits::All };
            let mut trace = Trace::default();
            let got = run(&mut runner, &span(&tokens, 0, wanted), &mut trace);
            worst_l2 = worst_l2.max(relative_l2(&want, &got));
            worst_abs = worst_abs.max(max_abs(&want, &got));
            for (layer, out) in trace.out.iter().enumerate() {
                let want = golden(&file, &format!("prompt{p}.layer{layer}.out_last"), f32::from_le_bytes);
                worst_out = worst_out.max(relative_l2(&want, &out[out.len() - hidden..]));
            }
            for (layer, top_k, ids, weights) in &trace.routing {
                let name = format!("prompt{p}.layer{layer}.topk");
                let want_ids = golden(&file, &format!("{name}_idx"), u32::from_le_bytes);
                let want_weights = golden(&file, &format!("{name}_weight"), f32::from_le_bytes);
                assert_eq!(ids.len(), want_ids.len());
                for at in (0..ids.len()).step_by(*top_k) {
                    let token = at..at + top_k;
                    pairs += 1;
                    if ids[token.clone()] == want_ids[token.clone()] {
                        agreeing += 1;
                        worst_weight =
                            worst_weight.max(max_abs(&want_weights[token.clone()], &weights[token]));
                    }
                }
            }
            greedy(
                &mut runner,
                &tokens,
                &got,
                &golden(&file, &format!("prompt{p}.greedy_ids"), u32::from_le_bytes),
            );
        }
        let share = f64::from(agreeing) / f64::from(pairs);
        println!(
            "| {case} | {worst_l2:.1e} | {worst_abs:.1e} | {worst_out:.1e} | {agreeing}/{pairs} | {worst_weight:.1e} |"
        );
        assert!(worst_l2 <= 1e-4 && worst_abs <= 1e-3 && worst_out <= 1e-4, "{case}");
        assert!(share >= 0.998 && worst_weight <= 1e-4, "{case}");
    }
}

/// Continues from the cache, one token at a time.
fn greedy(runner: &mut ReferenceRunner, prompt: &[u32], logits: &[f32], want: &[u32]) {
    let vocab = runner.config().vocab;
    let best = |row: &[f32]| (0..vocab).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as u32;
    let mut got = vec![best(&logits[logits.len() - vocab..])];
    while got.len() < want.len() {
        let batch = span(&got[got.len() - 1..], prompt.len() + got.len() - 1, WantLogits::Last);
        got.push(best(&run(runner, &batch, &mut NoProbe)));
    }
    assert_eq!(got, want);
}

#[test]
fn prefill_token_by_token_equals_prefill_at_once() {
    for case in ["kimi_k2_fp8", "gpt_oss_mxfp4"] {
        let Some(folder) = folder(case) else { continue };
        let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tokens = golden(&file, "prompt2.input_ids", u32::from_le_bytes);
        let want = golden(&file, "prompt2.logits", f32::from_le_bytes);
        let mut runner = runner(&folder);
        run(&mut runner, &span(&tokens, 0, WantLogits::Last), &mut NoProbe);
        let start = Instant::now();
        let mut got = Vec::new();
        for (at, token) in tokens.iter().enumerate() {
            got = run(&mut runner, &span(&[*token], at, WantLogits::Last), &mut NoProbe);
        }
        let each = start.elapsed().as_secs_f64() * 1e3 / tokens.len() as f64;
        println!("{case}: {} tokens one by one, {each:.2} ms each", tokens.len());
        assert!(relative_l2(&want, &got) <= 1e-4, "{case}");
    }
}

/// Three sequences in one batch, two of them continued, on interleaved blocks.
#[test]
fn a_batch_of_sequences_equals_each_alone() {
    for case in ["deepseek_v3_k2", "gpt_oss_mxfp4"] {
        let Some(folder) = folder(case) else { continue };
        let mut runner = runner(&folder);
        let prompts: [Vec<u32>; 3] = [(0..7).collect(), (50..180).collect(), (300..371).collect()];
        let tables: [&[u32]; 3] = [&[5], &[9, 2, 11], &[0, 3]];
        let cached = [0, 100, 70];
        let alone: Vec<Vec<f32>> =
            prompts.iter().map(|p| run(&mut runner, &span(p, 0, WantLogits::Last), &mut NoProbe)).collect();
        let mut batch = Batch::default();
        for at in 1..3 {
            batch.push(&prompts[at][..cached[at]], 0, tables[at], WantLogits::None);
        }
        run(&mut runner, &batch, &mut NoProbe);
        batch.clear();
        for at in 0..3 {
            batch.push(&prompts[at][cached[at]..], cached[at], tables[at], WantLogits::Last);
        }
        let together = run(&mut runner, &batch, &mut NoProbe);
        for (alone, together) in alone.iter().zip(together.chunks_exact(runner.config().vocab)) {
            assert!(relative_l2(alone, together) < 1e-5, "{case}: {}", relative_l2(alone, together));
        }
    }
}

#[test]
fn a_wrong_batch_is_an_error_and_leaves_the_cache() {
    let Some(folder) = folder("mixtral") else { return };
    let mut runner = runner(&folder);
    let vocab = runner.config().vocab;
    let continued = span(&[3], 5, WantLogits::Last);
    run(&mut runner, &span(&[1, 2, 3, 4, 5], 0, WantLogits::None), &mut NoProbe);
    let want = run(&mut runner, &continued, &mut NoProbe);

    let mut outside = Batch::default();
    outside.push(&[9, 9], 0, &[CAPACITY.blocks as u32], WantLogits::Last);
    let long = span(&vec![1; CAPACITY.batch_tokens + 1], 0, WantLogits::Last);
    for (batch, logits, named) in [
        (span(&[1, vocab as u32], 0, WantLogits::Last), vocab, "vocabulary"),
        (span(&[1, 2], 0, WantLogits::Last), vocab - 1, "do not fit"),
        (outside, vocab, "slot 1536"),
        (long, vocab, "1025 tokens"),
    ] {
        let error = runner.forward(&batch, &mut NoProbe, &mut vec![0.0; logits]).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    assert_eq!(run(&mut runner, &continued, &mut NoProbe), want);
}
