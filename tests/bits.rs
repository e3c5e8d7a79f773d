//! Promise 2: batching, threads and instruction sets change speed, never values.

use std::path::PathBuf;
use std::sync::Arc;

use kernels::simd::Isa;
use models::cpu::CpuRunner;
use models::{Batch, Capacity, Checkpoint, Model, NoProbe, Numerics, Runner, WantLogits};

const CASES: [&str; 6] =
    ["deepseek_v3_groups", "kimi_k2_int4", "kimi_k2_fp8", "gpt_oss_mxfp4", "gpt_oss_bf16", "glm4_moe"];

fn open(name: &str) -> Arc<Model> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    Model::open(Checkpoint::open(&folder).unwrap()).unwrap()
}

fn prompt(seed: u32, tokens: usize, vocab: usize) -> Vec<u32> {
    (0..tokens as u32).map(|i| (i * 7919 + seed * 104_729 + i * i) % vocab as u32).collect()
}

fn runner(model: &Arc<Model>, numerics: Numerics, isa: Isa) -> CpuRunner {
    let capacity = Capacity::new(16, 256, 256);
    CpuRunner::with_isa(Arc::clone(model), numerics, capacity, isa)
}

/// Logits of every position of one prompt, in bits.
fn alone(model: &Arc<Model>, numerics: Numerics, isa: Isa, threads: usize, prompt: &[u32]) -> Vec<u32> {
    let mut runner = runner(model, numerics, isa);
    let mut batch = Batch::default();
    let table: Vec<u32> = (0..4).collect();
    batch.push(prompt, 0, &table, WantLogits::All);
    let mut logits = vec![0.0; prompt.len() * model.config.vocab];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| runner.forward(&batch, &mut NoProbe, &mut logits)).unwrap();
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Numerics, and 8-bit copies of the float weights.
const MODES: [(Numerics, bool); 4] = [
    (Numerics::Reference, false),
    (Numerics::Model, false),
    (Numerics::Int8Activations, false),
    (Numerics::Model, true),
];

fn open_as(name: &str, q8: bool) -> Arc<Model> {
    if !q8 {
        return open(name);
    }
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    Model::open_q8::<models::Error>(Checkpoint::open(&folder).unwrap(), |_| Ok(())).unwrap()
}

#[test]
fn threads_and_instruction_sets_change_no_bit() {
    for (name, (numerics, q8)) in CASES.into_iter().flat_map(|name| MODES.map(|mode| (name, mode))) {
        let model = open_as(name, q8);
        let prompt = prompt(1, 90, model.config.vocab);
        let expected = alone(&model, numerics, Isa::detect(), 1, &prompt);
        for threads in [2, 3, 4] {
            let same = expected == alone(&model, numerics, Isa::detect(), threads, &prompt);
            assert!(same, "{name} {numerics:?} with {threads} threads");
        }
        // Tiles have their own order of sums, where activations are packed.
        let (tiles, others): (Vec<_>, Vec<_>) = Isa::available()
            .into_iter()
            .partition(|isa| *isa == Isa::Avx512Amx && numerics != Numerics::Reference);
        for kind in [tiles, others] {
            let mut first = None;
            for isa in kind {
                let logits = alone(&model, numerics, isa, 2, &prompt);
                assert!(isa != Isa::detect() || logits == expected, "{name} {numerics:?} on {isa:?}");
                assert!(
                    *first.get_or_insert_with(|| logits.clone()) == logits,
                    "{name} {numerics:?} on {isa:?}"
                );
            }
        }
    }
}

/// Prompts in chunks of 1, 7, 64 and whole, then batches of 1, 2, 7 and 16 sequences that decode together: the
/// logits of every position are those of the whole prompt alone.
#[test]
fn chunks_and_batches_change_no_bit() {
    const SEQUENCES: usize = 16;
    const DECODED: usize = 3;
    for (name, (numerics, q8)) in CASES.into_iter().flat_map(|name| MODES.map(|mode| (name, mode))) {
        let model = open_as(name, q8);
        let vocab = model.config.vocab;
        let prompts: Vec<Vec<u32>> =
            (0..SEQUENCES).map(|s| prompt(s as u32, if s == 0 { 90 } else { 9 + s }, vocab)).collect();
        let expected: Vec<Vec<u32>> =
            prompts.iter().map(|p| alone(&model, numerics, Isa::detect(), 2, p)).collect();
        for chunk in [1, 7, 64, 90] {
            let mut runner = runner(&model, numerics, Isa::detect());
            let mut logits = Vec::new();
            for (i, tokens) in prompts[0].chunks(chunk).enumerate() {
                let mut batch = Batch::default();
                batch.push(tokens, i * chunk, &[5, 2], WantLogits::All);
                let mut rows = vec![0.0; tokens.len() * vocab];
                runner.forward(&batch, &mut NoProbe, &mut rows).unwrap();
                logits.extend(rows.iter().map(|x| x.to_bits()));
            }
            assert!(logits == expected[0], "{name} {numerics:?} in chunks of {chunk}");
        }
        for sequences in [1, 2, 7, SEQUENCES] {
            let capacity = Capacity::new(SEQUENCES + 1, 512, SEQUENCES);
            let mut runner = CpuRunner::new(Arc::clone(&model), numerics, capacity);
            // Sequence 0 has two blocks, each other one of its own, none in order.
            let first = SEQUENCES as u32;
            let tables: Vec<Vec<u32>> = (0..sequences as u32)
                .map(|s| if s == 0 { vec![first, 0] } else { vec![first - s] })
                .collect();
            let (prompts, expected) = (&prompts[..sequences], &expected[..sequences]);
            let mut batch = Batch::default();
            for (prompt, table) in prompts.iter().zip(&tables) {
                batch.push(&prompt[..prompt.len() - DECODED], 0, table, WantLogits::None);
            }
            runner.forward(&batch, &mut NoProbe, &mut []).unwrap();
            for left in (1..=DECODED).rev() {
                batch.clear();
                for (prompt, table) in prompts.iter().zip(&tables) {
                    let at = prompt.len() - left;
                    batch.push(&prompt[at..at + 1], at, table, WantLogits::Last);
                }
                let mut logits = vec![0.0; tables.len() * vocab];
                runner.forward(&batch, &mut NoProbe, &mut logits).unwrap();
                for (s, row) in logits.chunks_exact(vocab).enumerate() {
                    let at = (prompts[s].len() - left) * vocab;
                    let same = row.iter().zip(&expected[s][at..]).all(|(a, b)| a.to_bits() == *b);
                    assert!(same, "{name} {numerics:?}: sequence {s} of {sequences}");
                }
            }
        }
    }
}

/// Three sequences of different lengths advance together, in uneven chunks and on interleaved
/// blocks; each must see what it would see alone.
#[test]
fn a_batch_changes_no_bit() {
    for name in CASES {
        let model = open(name);
        let vocab = model.config.vocab;
        let prompts = [prompt(1, 70, vocab), prompt(2, 130, vocab), prompt(3, 33, vocab)];
        let tables: [&[u32]; 3] = [&[11, 3], &[0, 9, 4], &[7]];
        let chunks: [&[usize]; 3] = [&[1, 40, 29], &[64, 1, 65], &[30, 2, 1]];
        let mut runner = runner(&model, Numerics::Model, Isa::detect());
        let mut together = vec![Vec::new(); 3];
        let mut starts = [0; 3];
        #[expect(clippy::needless_range_loop, reason = "rounds run over three lists at once")]
        for round in 0..3 {
            let mut batch = Batch::default();
            for s in 0..3 {
                let end = starts[s] + chunks[s][round];
                batch.push(&prompts[s][starts[s]..end], starts[s], tables[s], WantLogits::All);
                starts[s] = end;
            }
            let mut logits = vec![0.0; batch.tokens.len() * vocab];
            runner.forward(&batch, &mut NoProbe, &mut logits).unwrap();
            let mut rows = logits.chunks_exact(vocab);
            for s in 0..3 {
                for row in rows.by_ref().take(chunks[s][round]) {
                    together[s].extend(row.iter().map(|x| x.to_bits()));
                }
            }
        }
        for s in 0..3 {
            let expected = alone(&model, Numerics::Model, Isa::detect(), 2, &prompts[s]);
            assert!(expected == together[s], "{name}, sequence {s}");
        }
    }
}

#[test]
fn a_wrong_batch_is_an_error_and_leaves_the_cache() {
    let model = open("kimi_k2");
    let vocab = model.config.vocab;
    let mut runner = runner(&model, Numerics::Reference, Isa::detect());
    let mut logits = vec![0.0; vocab];
    let mut forward = |tokens: &[u32], start: usize, table: &[u32], logits: &mut [f32]| {
        let mut batch = Batch::default();
        batch.push(tokens, start, table, WantLogits::Last);
        runner.forward(&batch, &mut NoProbe, logits).map_err(|error| error.to_string())
    };
    forward(&[1, 2, 3], 0, &[0], &mut logits).unwrap();
    let error = forward(&[vocab as u32], 3, &[0], &mut logits).unwrap_err();
    assert!(error.contains("vocabulary"), "{error}");
    let error = forward(&[1], 0, &[16], &mut logits).unwrap_err();
    assert!(error.contains("slot"), "{error}");
    let error = forward(&vec![1; 257], 0, &[0, 1, 2, 3, 4], &mut logits).unwrap_err();
    assert!(error.contains("257"), "{error}");
    let error = forward(&[1], 3, &[0], &mut [0.0; 3]).unwrap_err();
    assert!(error.contains("logits"), "{error}");
    let after = {
        forward(&[4], 3, &[0], &mut logits).unwrap();
        logits.clone()
    };
    let expected = alone(&model, Numerics::Reference, Isa::detect(), 1, &[1, 2, 3, 4]);
    let last = &expected[expected.len() - vocab..];
    assert!(after.iter().zip(last).all(|(a, b)| a.to_bits() == *b));
}
