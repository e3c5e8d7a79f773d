//! Enforced after: a server whose pool is filled again and again takes no more memory than its plan says, measured in a
//! process of its own.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use bench::synth::{Options, Recipe, write};
use serde_json::{Value, json};

use super::client::post;
use super::command::plan;
use super::{MIB, Temp, case};

/// What a process takes besides, that no plan counts: threads, connections, the allocator's slack, pages of the program
/// itself that are read for the first time.
const SLACK: usize = 10 * MIB;

struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    fn start(model: &str, args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_moebius"))
            .args(["serve", model, "--port", "0", "--threads", "2", "--served-model-name", "m"])
            .args(args)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut lines = lines.map(|line| line.unwrap());
        let listening = lines.find_map(|line| line.strip_prefix("listening on http://").map(str::to_owned));
        let address = listening.expect("the server says where it listens").parse().unwrap();
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    fn peak_bytes(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().strip_suffix("kB").unwrap().trim().parse::<usize>().unwrap() * 1024
    }

    /// Completes different prompts, some at a time.
    fn complete(&self, requests: usize, characters: usize) {
        std::thread::scope(|scope| {
            for lane in 0..4 {
                scope.spawn(move || {
                    for number in (lane..requests).step_by(4) {
                        let prompt = format!("{number} ").repeat(characters);
                        let prompt = &prompt[..characters];
                        let body =
                            json!({"model": "m", "prompt": prompt, "max_tokens": 2, "ignore_eos": true});
                        let answer = post(self.address, "/v1/completions", &body);
                        assert_eq!(answer.status, 200, "{}", answer.text());
                    }
                });
            }
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Fills the pool of `model` more than once; gives the growth since the start, and the plan.
fn grown(model: &str, args: &[&str], (requests, characters): (usize, usize)) -> (usize, Value) {
    let planned = plan(&[&[model], args].concat());
    let server = Server::start(model, args);
    let idle = server.peak_bytes();
    server.complete(requests, characters);
    (server.peak_bytes() - idle, planned)
}

fn bytes(planned: &Value, part: &str, name: &str) -> usize {
    planned[part][name].as_u64().unwrap() as usize
}

#[track_caller]
fn is_within(growth: usize, planned: &Value) {
    let required = bytes(planned, "memory", "required_bytes");
    let all = required + bytes(planned, "weights", "mapped_bytes");
    assert!(growth <= all + all / 20 + SLACK, "grew by {growth}, planned {all}: {planned}");
}

#[test]
fn small_pools_are_filled_and_nothing_grows_past_the_plan() {
    // 4 blocks; every prompt takes at least one, and does not come twice.
    let (growth, planned) =
        grown("demo", &["--kv-memory", "256KiB", "--context", "128", "--parallel", "4"], (8, 60));
    assert_eq!(planned["kv"]["pool_tokens"], 4 * 64);
    is_within(growth, &planned);
    let args = ["--kv-memory", "300KiB", "--context", "128", "--parallel", "4"];
    let (growth, planned) = grown(&case("gpt_oss_mxfp4"), &args, (8, 60));
    is_within(growth, &planned);
}

/// A cache that is large against all else: its growth is the pool's.
#[test]
fn a_full_pool_is_as_large_as_planned() {
    let temp = Temp::new("wide");
    let config = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": false,
        "decoder_sparse_step": 1, "head_dim": 256, "hidden_size": 32, "intermediate_size": 64,
        "max_position_embeddings": 4096, "max_window_layers": 4, "mlp_only_layers": [],
        "moe_intermediate_size": 32, "norm_topk_prob": true, "num_attention_heads": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 4, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.001, "sliding_window": null, "use_sliding_window": false,
        "vocab_size": 512, "hidden_act": "silu", "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    });
    let recipe = Recipe::new("wide", config, None).unwrap();
    let folder = temp.0.join("model");
    write(&recipe, &folder, &Options::default(), &mut |_, _| true).unwrap();
    // 64 KiB per token: 4 MiB per block.
    let args = ["--kv-memory", "32MiB", "--context", "80", "--kv-type", "f32", "--parallel", "2"];
    let (growth, planned) = grown(folder.to_str().unwrap(), &args, (9, 70));
    assert_eq!(
        (&planned["kv"]["pool_tokens"], &planned["kv"]["bytes_per_token"]),
        (&json!(8 * 64), &json!(65_536))
    );
    is_within(growth, &planned);
    let pool = bytes(&planned, "kv", "pool_bytes");
    // The last page of a prompt's second block holds few tokens; all blocks are used in turn.
    assert!(growth >= pool / 2, "grew by {growth}, a pool of {pool}");
}
