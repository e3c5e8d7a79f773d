//! Weights that are no numbers, and quantised weights that contradict themselves.

use safetensors::tensor::Dtype;

use crate::config::golden;
use crate::tiny::{self, Ended, Tiny};

/// A NaN and an infinity of a stored type, little endian.
fn not_finite(name: &str, dtype: Dtype) -> Vec<Vec<u8>> {
    match dtype {
        Dtype::F32 => vec![f32::NAN.to_le_bytes().into(), f32::NEG_INFINITY.to_le_bytes().into()],
        Dtype::BF16 => vec![0x7fc0u16.to_le_bytes().into(), 0xff80u16.to_le_bytes().into()],
        Dtype::F8_E4M3 => vec![vec![0x7f], vec![0xff]],
        Dtype::U8 if name.ends_with("_scales") => vec![vec![255]],
        _ => vec![],
    }
}

fn run(place: &str, runner: &str) -> Ended {
    let arguments = ["run", place, "Hello", "--raw", "--max-tokens", "2", "--ignore-eos", "--runner", runner];
    tiny::moebius_unlimited(
        &[&arguments[..], &["--seed", "1", "--temperature", "0.7", "--threads", "1"]].concat(),
    )
}

/// `check` names the tensor; `run` gives some text, the same each time.
#[test]
fn weights_that_are_no_numbers_are_named_and_run() {
    // The first of each is one that every token meets.
    #[rustfmt::skip]
    let cases: [(&str, &[&str]); 7] = [
        ("mixtral", &["model.norm.weight", "gate.weight", "experts.0.w1.weight", "embed_tokens.weight", "lm_head.weight"]),
        ("qwen3_moe", &["self_attn.q_norm.weight", "self_attn.k_proj.weight"]),
        ("kimi_k2_fp8", &["kv_a_layernorm.weight", "experts.0.gate_proj.weight", "experts.0.down_proj.weight_scale_inv", "e_score_correction_bias"]),
        ("kimi_k2_int4", &["kv_b_proj.weight", "experts.0.up_proj.weight_scale"]),
        ("deepseek_v3_groups", &["gate.weight", "e_score_correction_bias"]),
        ("gpt_oss_mxfp4", &["sinks", "gate_up_proj_scales", "down_proj_bias", "router.bias"]),
        ("gpt_oss_bf16", &["self_attn.q_proj.bias", "experts.down_proj"]),
    ];
    for (case, parts) in cases {
        let mut config = golden(case);
        config["vocab_size"] = 300.into();
        config["num_hidden_layers"] = 2.into();
        config.as_object_mut().unwrap().remove("layer_types");
        let sound = Tiny::new(config);
        let mut checked = false;
        for part in parts {
            let of = |tensor: &&tiny::Tensor| tensor.0.ends_with(part);
            let (name, dtype, ..) =
                sound.tensors.iter().rfind(of).unwrap_or_else(|| panic!("{case} has no {part}"));
            for value in not_finite(name, *dtype) {
                let mut poisoned = sound.clone();
                // All of a part, so that no prompt goes around it.
                let bytes = &mut poisoned.tensor(name).3;
                bytes.chunks_exact_mut(value.len()).for_each(|chunk| chunk.copy_from_slice(&value));
                let folder = poisoned.folder();
                let place = folder.path().to_str().unwrap();
                let scanned = models::check::scan_weights(
                    &models::Model::open(models::Checkpoint::open(folder.path()).unwrap()).unwrap(),
                );
                assert!(scanned.unwrap_err().to_string().contains(name), "{case}: {name}");
                for runner in ["cpu", "reference"] {
                    let (first, second) = (run(place, runner), run(place, runner));
                    assert_eq!(
                        first.succeeds().stdout,
                        second.succeeds().stdout,
                        "{case}: {name} on {runner}"
                    );
                }
                if part == &parts[0] && !std::mem::replace(&mut checked, true) {
                    let check = |more: &[&str]| tiny::moebius_unlimited(&[&["check", place], more].concat());
                    check(&[]).fails(1, &[name, "hold NaN or infinity"]);
                    // Without the scan the comparison finds it.
                    check(&["--skip-scan"]).fails(1, &["layer ", "NaN"]);
                }
            }
        }
    }
}

#[test]
fn quantised_weights_must_agree_with_themselves() {
    type Change = fn(&mut tiny::Tensor);
    let cases: [(&str, &str, Change, &str); 11] = [
        (
            "kimi_k2_int4",
            "experts.1.down_proj.weight_shape",
            |t| t.3[0] = 1,
            "says [1, 64], the configuration [128, 64]",
        ),
        ("kimi_k2_int4", "experts.1.down_proj.weight_shape", |t| t.3[7] = 0x80, "says [128, -2147483584]"),
        (
            "kimi_k2_int4",
            "experts.1.down_proj.weight_shape",
            |t| (t.2, t.3) = (vec![1], vec![0; 4]),
            "has shape [1], the configuration asks for [2]",
        ),
        (
            "kimi_k2_int4",
            "experts.1.down_proj.weight_shape",
            |t| (t.1, t.2, t.3) = (Dtype::I64, vec![2], vec![255; 16]),
            "says [-1, -1]",
        ),
        (
            "kimi_k2_int4",
            "experts.1.down_proj.weight_shape",
            |t| t.1 = Dtype::F32,
            "is F32, expected one of [I64, I32]",
        ),
        (
            "kimi_k2_int4",
            "experts.1.down_proj.weight_scale",
            |t| t.2.reverse(),
            "has shape [2, 128], the configuration asks for [128, 2]",
        ),
        (
            "kimi_k2_int4",
            "experts.1.down_proj.weight_scale",
            |t| t.1 = Dtype::F16,
            "is F16, expected one of [BF16]",
        ),
        (
            "kimi_k2_int4",
            "experts.1.down_proj.weight_packed",
            |t| t.2 = vec![64, 16],
            "has shape [64, 16], the configuration asks for [128, 8]",
        ),
        (
            "kimi_k2_fp8",
            "kv_b_proj.weight_scale_inv",
            |t| (t.2, t.3) = (vec![1], vec![0; 4]),
            "has shape [1], the configuration asks for [",
        ),
        (
            "kimi_k2_fp8",
            "kv_b_proj.weight",
            |t| t.1 = Dtype::F8_E5M2,
            "is F8_E5M2, expected one of [F8_E4M3]",
        ),
        ("gpt_oss_mxfp4", "down_proj_scales", |t| (t.2[0], t.2[1]) = (t.2[1], t.2[0]), "has shape ["),
    ];
    for (case, part, change, words) in cases {
        let mut tiny = Tiny::new(golden(case));
        let tensor = tiny.tensors.iter_mut().rfind(|tensor| tensor.0.ends_with(part)).unwrap();
        change(tensor);
        let name = tensor.0.clone();
        tiny::refused(&tiny.folder(), &format!("{case}: {name}"), &format!("tensor {name}: {words}"));
    }
}
