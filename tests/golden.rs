//! Every supported family against the outputs of its reference implementation (`tests/golden`), on
//! both runners: logits, routing, residual stream and greedy continuation, prompts whole and in
//! chunks.

use std::path::PathBuf;
use std::sync::Arc;

use models::{Checkpoint, Model, Numerics};
use moebius::session::{RunnerKind, SessionOptions};
use moebius::trace::{KeepLogits, PromptTrace, TraceOptions, Tracer};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::Value;

/// Tolerances of the golden cases' README for an engine in f32.
const MAX_ABS: f64 = 1e-3;
const RELATIVE_L2: f64 = 1e-4;
const ROUTING_AGREEMENT: f64 = 0.998;
const WEIGHT_ABS: f32 = 1e-4;
const GREEDY: usize = 32;
const PROMPTS: usize = 3;

struct Case {
    model: Arc<Model>,
    golden: Vec<u8>,
    json: Value,
}

impl Case {
    fn open(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let model = Model::open(Checkpoint::open(&folder).unwrap()).unwrap();
        let golden = std::fs::read(folder.join("golden.safetensors")).unwrap();
        let json = serde_json::from_slice(&std::fs::read(folder.join("golden.json")).unwrap()).unwrap();
        Self { model, golden, json }
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let tensors = SafeTensors::deserialize(&self.golden).unwrap();
        let tensor = tensors.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
        Some(tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    fn ids(&self, name: &str) -> Option<Vec<u32>> {
        let tensors = SafeTensors::deserialize(&self.golden).unwrap();
        let tensor = tensors.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), Dtype::I32, "{name}");
        Some(tensor.data().as_chunks().0.iter().map(|b| i32::from_le_bytes(*b) as u32).collect())
    }

    fn prompt(&self, index: usize) -> Vec<u32> {
        self.ids(&format!("prompt{index}.input_ids")).unwrap()
    }

    fn trace(&self, run: &SessionOptions, chunk: Option<usize>, prompt: &[u32]) -> PromptTrace {
        let options = TraceOptions { greedy: GREEDY, chunk, logits: KeepLogits::All };
        Tracer::new(&self.model, run, options, prompt.len()).unwrap().trace(prompt).unwrap()
    }
}

/// Largest absolute difference, and the Euclidean norm of the difference over that of `a`.
fn distance(a: &[f32], b: &[f32]) -> (f64, f64) {
    assert_eq!(a.len(), b.len());
    let (mut largest, mut difference, mut norm) = (0f64, 0f64, 0f64);
    for (&a, &b) in a.iter().zip(b) {
        let (a, d) = (f64::from(a), f64::from(a) - f64::from(b));
        largest = if d.is_nan() { f64::INFINITY } else { largest.max(d.abs()) };
        difference += d * d;
        norm += a * a;
    }
    (largest, (difference / norm).sqrt())
}

fn assert_golden(case: &Case, index: usize, trace: &PromptTrace, what: &str) {
    let name = |part: &str| format!("prompt{index}.{part}");
    let golden = case.floats(&name("logits")).unwrap();
    let ours = &trace.logits[trace.logits.len() - golden.len()..];
    let (largest, relative) = distance(&golden, ours);
    assert!(largest <= MAX_ABS && relative <= RELATIVE_L2, "{what}: logits {largest:.1e} {relative:.1e}");
    assert_eq!(trace.greedy_ids, case.ids(&name("greedy_ids")).unwrap(), "{what}: greedy");

    let (mut pairs, mut agree) = (0, 0);
    for (l, layer) in trace.layers.iter().enumerate() {
        let out = case.floats(&name(&format!("layer{l}.out_last"))).unwrap();
        let (_, relative) = distance(&out, &layer.out_last);
        assert!(relative <= RELATIVE_L2, "{what}: layer {l} out_last {relative:.1e}");
        let golden_ids = case.ids(&name(&format!("layer{l}.topk_idx")));
        assert_eq!(golden_ids.is_some(), layer.top_k > 0, "{what}: layer {l} has experts");
        let Some(golden_ids) = golden_ids else { continue };
        let golden_weights = case.floats(&name(&format!("layer{l}.topk_weight"))).unwrap();
        assert_eq!(golden_ids.len(), layer.ids.len(), "{what}: layer {l} routing");
        for token in 0..golden_ids.len() / layer.top_k {
            let row = token * layer.top_k..(token + 1) * layer.top_k;
            pairs += 1;
            if golden_ids[row.clone()] == layer.ids[row.clone()] {
                agree += 1;
                for (a, b) in golden_weights[row.clone()].iter().zip(&layer.weights[row]) {
                    assert!((a - b).abs() <= WEIGHT_ABS, "{what}: layer {l} token {token}: {a} {b}");
                }
            }
        }
    }
    assert!(f64::from(agree) >= ROUTING_AGREEMENT * f64::from(pairs), "{what}: {agree} of {pairs} sets");
}

fn reference_numerics(name: &str, runner: RunnerKind) {
    let case = Case::open(name);
    let run = SessionOptions {
        runner,
        numerics: Some(Numerics::Reference),
        threads: Some(2),
        ..Default::default()
    };
    for index in 0..PROMPTS {
        let prompt = case.prompt(index);
        let mut whole: Option<PromptTrace> = None;
        for chunk in [None, Some(1), Some(7), Some(64)] {
            let what = format!("{name} on {runner:?}, prompt {index}, chunk {chunk:?}");
            let trace = case.trace(&run, chunk, &prompt);
            assert_golden(&case, index, &trace, &what);
            if runner == RunnerKind::Cpu {
                // Promise 2: a prompt gives the same bits whole and in chunks.
                let whole = whole.get_or_insert_with(|| trace.clone());
                let same = whole.logits.iter().zip(&trace.logits).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{what}: other bits than whole");
            }
        }
    }
}

/// Within the envelope that bf16 arithmetic itself causes, as recorded with the goldens: the
/// greedy continuation is forced, and its 32 rows of logits are compared with f32's.
fn model_numerics(name: &str) {
    let case = Case::open(name);
    for index in 0..PROMPTS {
        let recorded = &case.json["prompts"][index];
        let bf16 = recorded["bf16_rel_l2"].as_f64().unwrap();
        let agreed = recorded["bf16_agree"].as_array().unwrap().iter().filter(|v| **v == 1).count();
        let greedy = case.ids(&format!("prompt{index}.greedy_ids")).unwrap();
        let mut forced = case.prompt(index);
        forced.extend_from_slice(&greedy[..GREEDY - 1]);
        let rows = |numerics| {
            let run = SessionOptions { numerics: Some(numerics), threads: Some(2), ..Default::default() };
            let options = TraceOptions { greedy: 0, chunk: None, logits: KeepLogits::All };
            let trace = Tracer::new(&case.model, &run, options, forced.len()).unwrap().trace(&forced);
            let logits = trace.unwrap().logits;
            logits[logits.len() - GREEDY * case.model.config.vocab..].to_vec()
        };
        let (exact, model) = (rows(Numerics::Reference), rows(Numerics::Model));
        let (_, relative) = distance(&exact, &model);
        let limit = (2.0 * bf16).max(bf16 + 0.02);
        assert!(relative <= limit, "{name} prompt {index}: {relative:.3}, limit {limit:.3}");
        let best = |row: &[f32]| (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        let vocab = case.model.config.vocab;
        let agree =
            model.chunks_exact(vocab).zip(&greedy).filter(|(row, id)| best(row) == **id as usize).count();
        assert!(agree + 4 >= agreed, "{name} prompt {index}: {agree} of 32 agree, bf16 {agreed}");
        assert_ne!(exact, model, "{name} prompt {index}: model numerics change nothing");
    }
}

macro_rules! cases {
    ($($name:ident,)*) => {
        mod cpu {
            $(#[test] fn $name() { super::reference_numerics(stringify!($name), super::RunnerKind::Cpu); })*
        }
        mod reference {
            $(#[test] fn $name() { super::reference_numerics(stringify!($name), super::RunnerKind::Reference); })*
        }
        mod bf16 {
            $(#[test] fn $name() { super::model_numerics(stringify!($name)); })*
        }
    };
}

cases! {
    deepseek_v2,
    deepseek_v3_groups,
    deepseek_v3_k2,
    deepseek_v3_noq,
    ernie4_5_moe,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss_bf16,
    gpt_oss_mxfp4,
    hunyuan_v1_moe,
    kimi_k2,
    kimi_k25_int4,
    kimi_k2_fp8,
    kimi_k2_int4,
    minimax_m2,
    mixtral,
    olmoe,
    qwen3_moe,
}
