//! The built-in model is the one its card describes: ids, text, logits and held-out loss as its
//! training script measured them in torch.

use models::{Checkpoint, Model, Numerics};
use moebius::loaded::Loaded;
use moebius::session::{RunnerKind, SessionOptions};
use moebius::tokenizer::Specials;
use moebius::trace::{KeepLogits, TraceOptions, Tracer};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("../models/demo/golden.json")).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn run(runner: RunnerKind, numerics: Numerics) -> SessionOptions {
    SessionOptions { runner, numerics: Some(numerics), ..SessionOptions::default() }
}

#[test]
fn text_encodes_and_decodes_as_in_training() {
    let (loaded, golden) = (Loaded::open("demo").unwrap(), golden());
    let prompt = golden["prompt"].as_str().unwrap();
    assert_eq!(loaded.tokenizer.encode(prompt, Specials::Plain).unwrap(), ids(&golden["prompt_ids"]));
    let greedy = ids(&golden["greedy_ids"]);
    assert_eq!(loaded.tokenizer.decode(&greedy, true), golden["greedy_text"].as_str().unwrap());
    for case in golden["tokenizer"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(loaded.tokenizer.encode(text, Specials::Plain).unwrap(), ids(&case["ids"]), "{text:?}");
    }
}

#[test]
fn both_runners_give_the_logits_of_training() {
    let golden = golden();
    let model = Loaded::open("demo").unwrap().model;
    let prompt = ids(&golden["prompt_ids"]);
    for runner in [RunnerKind::Cpu, RunnerKind::Reference] {
        let options = TraceOptions { greedy: 32, chunk: None, logits: KeepLogits::Last };
        let mut tracer =
            Tracer::new(&model, &run(runner, Numerics::Reference), options, prompt.len()).unwrap();
        let trace = tracer.trace(&prompt).unwrap();
        assert_eq!(trace.greedy_ids, ids(&golden["greedy_ids"]), "{runner:?}");
        for (ours, theirs) in trace.logits.iter().zip(golden["last_logits"].as_array().unwrap()) {
            let theirs = theirs.as_f64().unwrap();
            assert!((f64::from(*ours) - theirs).abs() < 1e-3, "{runner:?}: {ours} {theirs}");
        }
    }
}

/// The card's claim, on the chunks whose losses the script recorded, in the default numerics.
#[test]
fn held_out_loss_is_what_the_card_says() {
    let golden = golden();
    let model = Loaded::open("demo").unwrap().model;
    let held_out = &golden["held_out"];
    let expected: Vec<f64> =
        held_out["nats"].as_array().unwrap().iter().map(|nats| nats.as_f64().unwrap()).collect();
    let all = ids(&held_out["ids"]);
    let longest = all.len() / expected.len();
    let chunks = all.chunks_exact(longest);
    let vocab = model.config.vocab;
    let options = TraceOptions { greedy: 0, chunk: None, logits: KeepLogits::All };
    let mut tracer = Tracer::new(&model, &run(RunnerKind::Cpu, Numerics::Model), options, longest).unwrap();
    let mut used = vec![vec![false; 16]; model.config.layers.len()];
    for (chunk, expected) in chunks.zip(expected) {
        let trace = tracer.trace(chunk).unwrap();
        let rows = trace.logits.chunks_exact(vocab).zip(&chunk[1..]);
        let nats: f64 = rows
            .map(|(row, &next)| {
                let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
                sum.ln() - f64::from(row[next as usize])
            })
            .sum();
        assert!((nats / expected - 1.0).abs() < 0.01, "{nats} {expected}");
        for (layer, used) in trace.layers.iter().zip(&mut used) {
            layer.ids.iter().for_each(|&id| used[id as usize] = true);
        }
    }
    // Every expert of every layer but the first, which is dense.
    assert!(used[1..].iter().flatten().all(|used| *used));
}

#[test]
fn it_is_small_and_opens_from_its_folder_too() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let bytes: u64 =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= 12_000_000, "{bytes} bytes");
    let model = Model::open(Checkpoint::open(&folder).unwrap()).unwrap();
    assert_eq!(model.config.model_type, "kimi_k2");
}
