//! The index of a checkpoint of several files, and what it may name.

use serde_json::{Value, json};

use crate::tiny::{self, Tiny};

const INDEX: &str = "model.safetensors.index.json";
const EMBEDDING: &str = "model.embed_tokens.weight";

#[test]
fn a_bad_index_is_refused() {
    let (folder, good) = Tiny::new(tiny::mixtral()).sharded();
    tiny::open(&folder).unwrap();
    folder.write("notes.txt", "x").write("text.safetensors", "this is no tensor file");
    let placed = |shard: Value| {
        let mut index = good.clone();
        let map = index["weight_map"].as_object_mut().unwrap();
        map.values_mut().filter(|name| **name == "b.safetensors").for_each(|name| *name = shard.clone());
        index.to_string()
    };
    let many: serde_json::Map<String, Value> =
        (0..5000).map(|i| (format!("t{i}"), format!("{i}.safetensors").into())).collect();
    let mut without = good.clone();
    without["weight_map"].as_object_mut().unwrap().remove(EMBEDDING);
    let mut more = good.clone();
    more["weight_map"]["model.more.weight"] = "a.safetensors".into();
    let cases = [
        (String::new(), "model.safetensors.index.json: EOF"),
        ("[]".into(), "has no weight_map"),
        ("5".into(), "has no weight_map"),
        ("{}".into(), "has no weight_map"),
        (r#"{"weight_map": []}"#.into(), "has no weight_map"),
        (r#"{"weight_map": {}}"#.into(), "is missing"),
        ("[".repeat(100_000), "recursion limit"),
        (json!({"weight_map": many}).to_string(), "names 5000 shards; the limit is 4096"),
        (placed(5.into()), ": its shard is not a file name"),
        (placed(Value::Null), ": its shard is not a file name"),
        (placed("c.safetensors".into()), "c.safetensors: is missing in"),
        (placed("text.safetensors".into()), "text.safetensors: header length"),
        (placed("notes.txt".into()), "shard \"notes.txt\" is not a .safetensors file"),
        (placed("config.json".into()), "shard \"config.json\" is not a .safetensors file"),
        (placed("/etc/passwd".into()), "shard \"/etc/passwd\" is not a .safetensors file"),
        (placed("/a.safetensors".into()), "\"/a.safetensors\": is not a plain file name"),
        (placed("../a.safetensors".into()), "\"../a.safetensors\": is not a plain file name"),
        (placed("x/../a.safetensors".into()), "is not a plain file name"),
        (placed("..\\a.safetensors".into()), "is not a plain file name"),
        (
            placed("a.safetensors\0.safetensors".into()),
            "\"a.safetensors\\0.safetensors\": is not a plain file name",
        ),
        (placed(format!("{}.safetensors", "a".repeat(5000)).into()), ".safetensors: "),
        (placed("".into()), "shard \"\" is not a .safetensors file"),
        (
            without.to_string(),
            "tensor model.embed_tokens.weight: is in a.safetensors, but the index does not place it there",
        ),
        (
            more.to_string(),
            "tensor model.more.weight: the index places it in a.safetensors, which does not hold it",
        ),
    ];
    for (index, words) in cases {
        folder.write(INDEX, &index);
        tiny::refused(&folder, &index[..index.len().min(300)], words);
    }
}

#[test]
fn a_tensor_in_two_files_is_refused() {
    let tiny = Tiny::new(tiny::mixtral());
    let (folder, good) = tiny.sharded();
    let at = tiny.tensors.len() / 2;
    assert_eq!(good["weight_map"][&tiny.tensors[0].0], "a.safetensors");
    let mut twice = tiny.tensors[at..].to_vec();
    twice.push(tiny.tensors[0].clone());
    folder.write("b.safetensors", tiny::shard(&twice));
    let words =
        format!("tensor {}: is in b.safetensors, but the index does not place it there", tiny.tensors[0].0);
    tiny::refused(&folder, "in two files", &words);
    // The same name twice in the index itself.
    let index =
        good.to_string().replacen('{', &format!(r#"{{"weight_map":{{"{EMBEDDING}":"b.safetensors"}},"#), 1);
    folder.write("b.safetensors", tiny::shard(&tiny.tensors[at..])).write(INDEX, index);
    tiny::open(&folder).unwrap();
}

#[test]
fn an_index_cut_at_any_byte_is_refused() {
    let (folder, good) = Tiny::new(tiny::mixtral()).sharded();
    let good = good.to_string();
    for end in 0..good.len() {
        folder.write(INDEX, &good[..end]);
        tiny::refused(&folder, &format!("cut at {end}"), "model.safetensors.index.json: ");
    }
}

#[test]
fn tensors_must_be_those_of_the_configuration() {
    let sound = Tiny::new(tiny::mixtral());
    let gate = "model.layers.0.block_sparse_moe.gate.weight";
    let expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight";
    type Change = fn(&mut Tiny);
    let cases: [(Change, &[&str]); 7] = [
        (
            |t| t.tensors.retain(|t| t.0 != "model.layers.0.block_sparse_moe.gate.weight"),
            &[gate, "is missing"],
        ),
        (|t| t.tensors.retain(|t| !t.0.ends_with("experts.1.w2.weight")), &[expert, "is missing"]),
        (
            |t| t.tensor("model.layers.0.block_sparse_moe.gate.weight").2 = vec![32, 2],
            &[gate, "has shape [32, 2], the configuration asks for [2, 32]"],
        ),
        (|t| t.tensor("model.norm.weight").2 = vec![32, 1], &["model.norm.weight", "has shape [32, 1]"]),
        (
            |t| {
                let tensor = t.tensor("model.layers.0.block_sparse_moe.gate.weight");
                (tensor.1, tensor.2) = (::safetensors::Dtype::I16, vec![2, 32]);
            },
            &[gate, "is I16, expected one of [F32, F16, BF16]"],
        ),
        (
            |t| t.tensors.push(("model.layers.0.extra".into(), ::safetensors::Dtype::U8, vec![1], vec![7])),
            &["model.layers.0.extra", "is unexpected"],
        ),
        (
            |t| {
                t.tensors.push((
                    "model.layers.1.mlp.gate_proj.weight".into(),
                    ::safetensors::Dtype::U8,
                    vec![1],
                    vec![7],
                ))
            },
            &["model.layers.1.mlp.gate_proj.weight", "is unexpected"],
        ),
    ];
    for (change, words) in cases {
        let mut tiny = sound.clone();
        change(&mut tiny);
        tiny::refuses(&tiny.folder(), words);
    }
}
