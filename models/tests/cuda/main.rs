//! The CUDA kernels as whole decoder layers and whole models: on the mock driver, or with `MOEBIUS_CUDA=device` on
//! the machine's own device, against the reference runner and the golden cases.

mod chain;
#[path = "../../../kernels/tests/mock/mod.rs"]
mod mock;
mod ops;
mod weights;
mod widths;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chain::Chain;
use kernels::attention::CacheType;
use kernels::cuda::{Device, DeviceError};
use mock::{Fault, How, Kind};
use models::reference::ReferenceRunner;
use models::{Batch, Capacity, Checkpoint, Model, Point, Probe, Runner, WantLogits};
use safetensors::SafeTensors;

/// MLA and GQA, each with experts in every format; groups of experts, queries without a low rank, windows and
/// sinks, biases, norms of heads and of whole projections.
const CASES: [&str; 8] = [
    "kimi_k2_int4",
    "kimi_k2_fp8",
    "deepseek_v3_groups",
    "deepseek_v3_noq",
    "qwen3_moe",
    "gpt_oss_mxfp4",
    "glm4_moe",
    "minimax_m2",
];
/// f32 throughout: three planes of bf16 are the 24 bits of f32.
const EXACT: (usize, CacheType) = (3, CacheType::F32);
/// What models are published for.
const MODEL: (usize, CacheType) = (1, CacheType::Bf16);
/// Tolerances of the golden cases for an engine in f32.
const MAX_ABS: f32 = 1e-3;
const RELATIVE_L2: f64 = 1e-4;
/// Of one layer, from the same input: f32 sums in two orders.
const LAYER_L2: f64 = 1e-5;
const BLOCKS: usize = 3;

struct Case {
    model: Arc<Model>,
    folder: PathBuf,
}

impl Case {
    fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
        let model = Model::open(Checkpoint::open(&folder).unwrap()).unwrap();
        assert!(weights::supports(&model), "{name}");
        Self { model, folder }
    }

    fn golden<T>(&self, name: &str, read: fn([u8; 4]) -> T) -> Vec<T> {
        let bytes = std::fs::read(self.folder.join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        file.tensor(name).unwrap().data().as_chunks().0.iter().map(|b| read(*b)).collect()
    }

    fn prompt(&self, index: usize) -> Vec<u32> {
        self.golden(&format!("prompt{index}.input_ids"), u32::from_le_bytes)
    }
}

/// The residual stream before the first layer and after every layer.
#[derive(Default)]
struct Streams(Vec<Vec<f32>>);

impl Probe for Streams {
    fn wants(&self, _layer: usize, point: Point) -> bool {
        matches!(point, Point::Embedding | Point::LayerOut)
    }

    fn value(&mut self, _layer: usize, _point: Point, values: &[f32]) {
        self.0.push(values.to_vec());
    }
}

fn relative_l2(want: &[f32], got: &[f32]) -> f64 {
    assert_eq!(want.len(), got.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = want.iter().zip(got).map(|(a, b)| square(a - b)).sum();
    let relative = (difference / want.iter().map(|a| square(*a)).sum::<f64>()).sqrt();
    if relative.is_nan() { f64::INFINITY } else { relative }
}

fn max_abs(want: &[f32], got: &[f32]) -> f32 {
    let differences = want.iter().zip(got).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |most, x| if x.is_nan() { f32::INFINITY } else { most.max(x) })
}

/// Tokens of one sequence from a position on.
fn tokens(ids: &[u32], first: usize, sequence: usize) -> Vec<(u32, usize, usize)> {
    ids.iter().enumerate().map(|(i, id)| (*id, first + i, sequence)).collect()
}

/// The blocks of a sequence, not in order.
fn table() -> Vec<u32> {
    vec![1, 2, 0]
}

#[test]
fn layers_match_the_reference_runner() {
    mock::on_device(|device| {
        // Under the sanitizer, which is slow, one of each kind of attention.
        for name in if mock::is_child() { vec![CASES[0], CASES[5]] } else { CASES.to_vec() } {
            let case = Case::open(name);
            let prompt = case.prompt(0);
            let mut streams = Streams::default();
            let mut batch = Batch::default();
            batch.push(&prompt, 0, &table(), WantLogits::None);
            let capacity = Capacity::new(BLOCKS, prompt.len(), 1);
            let mut runner = ReferenceRunner::new(case.model.clone(), capacity).unwrap();
            runner.forward(&batch, &mut streams, &mut []).unwrap();

            // Rows that are padding between and after must change nothing.
            let chain = Chain::new(device, &case.model, EXACT, (prompt.len() + 3, BLOCKS)).unwrap();
            chain.set(&tokens(&prompt, 0, 0), &[table()]).unwrap();
            for (layer, pair) in streams.0.windows(2).enumerate() {
                chain.set_stream(&pair[0]).unwrap();
                chain.layer(device, layer).unwrap();
                let got = chain.stream(pair[1].len()).unwrap();
                let relative = relative_l2(&pair[1], &got);
                println!("{name} layer {layer}: relative L2 {relative:.1e}");
                assert!(relative <= LAYER_L2, "{name} layer {layer}: {relative:.1e}");
            }
        }
    });
}

/// The same with threads in other orders, for one case of each kind of attention.
#[test]
fn layers_do_not_depend_on_the_order_of_threads() {
    let mut first: HashMap<(&str, usize), Vec<f32>> = HashMap::new();
    mock::in_every_order(|device| {
        for name in ["kimi_k2_int4", "gpt_oss_mxfp4"] {
            let case = Case::open(name);
            let ids = case.prompt(0);
            for numerics in [EXACT, MODEL] {
                let chain = Chain::new(device, &case.model, numerics, (ids.len() + 1, BLOCKS)).unwrap();
                let logits = logits_of(device, &chain, (&ids, ids.len()), None).unwrap();
                assert!(logits.iter().all(|x| x.is_finite()), "{name}");
                let known = first.entry((name, numerics.0)).or_insert_with(|| logits.clone());
                assert!(*known == logits, "{name} with {} planes: another order, other bits", numerics.0);
            }
        }
    });
}

#[test]
fn a_model_in_bf16_stays_within_the_envelope_of_its_case() {
    mock::on_device(|device| {
        for name in ["kimi_k2_int4", "kimi_k2_fp8", "qwen3_moe", "gpt_oss_mxfp4"] {
            let case = Case::open(name);
            let json = std::fs::read_to_string(case.folder.join("golden.json")).unwrap();
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            let recorded = &json["prompts"][0];
            let (prompt, greedy) = (case.prompt(0), case.golden("prompt0.greedy_ids", u32::from_le_bytes));
            // Teacher-forced: the logits that choose each of the golden tokens, in f32 and in bf16.
            let ids: Vec<u32> = prompt.iter().chain(&greedy[..greedy.len() - 1]).copied().collect();
            let vocab = case.model.config.vocab;
            let run = |numerics| {
                let chain = Chain::new(device, &case.model, numerics, (ids.len(), BLOCKS)).unwrap();
                let logits = logits_of(device, &chain, (&ids, ids.len()), None).unwrap();
                logits[(prompt.len() - 1) * vocab..].to_vec()
            };
            let (want, got) = (run(EXACT), run(MODEL));
            let relative = relative_l2(&want, &got);
            let top = |row: &[f32]| (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
            let agree =
                got.chunks_exact(vocab).zip(&greedy).filter(|(row, token)| top(row) == **token).count();
            let recorded_l2 = recorded["bf16_rel_l2"].as_f64().unwrap();
            let recorded_agree = recorded["bf16_agree"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|x| x.as_bool() == Some(true))
                .count();
            println!(
                "{name}: relative L2 {relative:.3} ({recorded_l2:.3}), {agree} of 32 ({recorded_agree})"
            );
            assert!(relative <= (2.0 * recorded_l2).max(recorded_l2 + 0.02), "{name}: {relative}");
            assert!(agree + 4 >= recorded_agree, "{name}: {agree} of {recorded_agree}");
        }
    });
}

/// What a step of a model computes, in short.
fn program(device: &Device) -> Result<u64, DeviceError> {
    let case = Case::open("qwen3_moe");
    let chain = Chain::new(device, &case.model, MODEL, (2, BLOCKS))?;
    chain.set(&tokens(&case.prompt(0)[..2], 0, 0), &[table()])?;
    let graph = device.capture(|| chain.step(device))?;
    graph.launch()?;
    let logits = chain.logits.read()?;
    Ok(logits.iter().fold(0, |hash: u64, x| hash.rotate_left(5) ^ u64::from(x.to_bits())))
}

/// Allocation failures, launch failures, sticky errors and lost devices at every tenth call.
#[test]
fn whatever_fails_in_a_model_is_an_error() {
    // Of CUresult.
    const OUT_OF_MEMORY: u32 = 2;
    const ECC_UNCORRECTABLE: u32 = 214;
    const ILLEGAL_ADDRESS: u32 = 700;
    const LAUNCH_FAILED: u32 = 719;
    for (kind, result, how) in [
        (Kind::Allocation, OUT_OF_MEMORY, How::Once),
        (Kind::Launch, LAUNCH_FAILED, How::Once),
        (Kind::Any, ILLEGAL_ADDRESS, How::Forever),
        (Kind::Any, ECC_UNCORRECTABLE, How::Forever),
    ] {
        mock::for_every_call(Fault { kind, result, how }, 10, program);
    }
}

#[test]
fn everything_holds_under_the_address_sanitizer() {
    if !mock::is_child() {
        mock::rerun_sanitized("layers_match_the_reference_runner");
    }
}

#[test]
fn models_meet_the_golden_cases() {
    mock::on_device(|device| {
        for name in CASES {
            let case = Case::open(name);
            let (prompt, vocab) = (case.prompt(0), case.model.config.vocab);
            let want = case.golden("prompt0.logits", f32::from_le_bytes);
            let greedy = case.golden("prompt0.greedy_ids", u32::from_le_bytes);
            // The prompt in two chunks, then a token at a time by one captured graph.
            let chain = Chain::new(device, &case.model, EXACT, (4, BLOCKS)).unwrap();
            let mut got = Vec::new();
            for (i, chunk) in prompt.chunks(4).enumerate() {
                chain.set(&tokens(chunk, 4 * i, 0), &[table()]).unwrap();
                chain.step(device).unwrap();
                got.extend(chain.logits.slice(..chunk.len() * vocab).read().unwrap());
            }
            let (largest, relative) = (max_abs(&want, &got), relative_l2(&want, &got));
            println!("{name}: logits {largest:.1e}, relative L2 {relative:.1e}");
            assert!(largest <= MAX_ABS && relative <= RELATIVE_L2, "{name}: {largest:.1e} {relative:.1e}");

            let graph = device.capture(|| chain.step(device)).unwrap();
            let mut logits = got[got.len() - vocab..].to_vec();
            for (step, want) in greedy.iter().take(6).enumerate() {
                let token = (0..vocab).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
                assert_eq!(token, *want, "{name}: greedy token {step}");
                chain.set(&tokens(&[token], prompt.len() + step, 0), &[table()]).unwrap();
                graph.launch().unwrap();
                logits = chain.logits.slice(..vocab).read().unwrap();
            }
        }
    });
}

/// Logits of every token of a sequence, computed in steps of `rows` rows together with `others`.
fn logits_of(
    device: &Device,
    chain: &Chain<'_>,
    (ids, chunk): (&[u32], usize),
    other: Option<&[u32]>,
) -> Result<Vec<f32>, DeviceError> {
    let vocab = chain.vocab();
    let mut got = Vec::new();
    for (i, part) in ids.chunks(chunk).enumerate() {
        // The other sequence's tokens come first, so that rows and units move.
        let mut rows = Vec::new();
        if let Some(other) = other {
            rows.extend(tokens(&other[i.min(other.len() - 1)..][..1], i, 1));
        }
        let first = rows.len();
        rows.extend(tokens(part, i * chunk, 0));
        chain.set(&rows, &[vec![1, 2], vec![0]])?;
        chain.step(device)?;
        got.extend(chain.logits.slice(first * vocab..rows.len() * vocab).read()?);
    }
    Ok(got)
}

#[test]
fn a_token_has_the_same_bits_in_any_batch() {
    mock::on_device(|device| {
        for name in ["kimi_k2_int4", "gpt_oss_mxfp4"] {
            let case = Case::open(name);
            let (ids, other) = (case.prompt(0), case.prompt(1));
            let run = |rows: usize, chunk: usize, other: Option<&[u32]>| {
                let chain = Chain::new(device, &case.model, MODEL, (rows, BLOCKS)).unwrap();
                let logits = logits_of(device, &chain, (&ids, chunk), other).unwrap();
                logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            let alone = run(1, 1, None);
            assert!(run(5, 5, None) == alone, "{name}: in chunks of 5");
            assert!(run(17, 16, None) == alone, "{name}: at once");
            assert!(run(9, 3, Some(&other)) == alone, "{name}: beside another sequence");
        }
    });
}
