//! `config.json` and, after a NUL, `model.safetensors.index.json`.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use models::manifest::manifest;
use models::{Checkpoint, Model};

/// A folder with two shards beside which the files of an input are put; one input at a time.
fn folder() -> &'static Mutex<PathBuf> {
    static FOLDER: OnceLock<Mutex<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("moebius-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        let shard = |name: &str| {
            let header = format!(r#"{{"{name}":{{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}}}"#);
            [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 8]].concat()
        };
        std::fs::write(folder.join("a.safetensors"), shard("model.embed_tokens.weight")).expect("a file");
        std::fs::write(folder.join("b.safetensors"), shard("model.norm.weight")).expect("a file");
        Mutex::new(folder)
    })
}

fn open(folder: &Path) -> Result<(), models::Error> {
    Model::open(Checkpoint::open(folder)?).map(drop)
}

/// Whatever can be described can be listed or is refused; so are the files.
pub fn run(data: &[u8]) {
    let (config, index) = super::halves(data);
    if let Ok(value) = serde_json::from_slice(config)
        && let Ok(description) = models::arch::describe(&value)
        && let Ok(tensors) = manifest(&description, &|_| false)
    {
        assert!(tensors.len() > 2 && description.vocab > 0 && description.hidden > 0);
        let frequencies = description.layers.iter().flat_map(|layer| match &layer.mixer {
            models::config::Mixer::Gqa(gqa) => gqa.rope.iter(),
            models::config::Mixer::Mla(mla) => mla.rope.iter(),
        });
        assert!(frequencies.flat_map(|rope| &rope.inv_freq).all(|frequency| frequency.is_finite()));
    }
    let folder = folder().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    std::fs::write(folder.join("config.json"), config).expect("a file");
    std::fs::write(folder.join("model.safetensors.index.json"), index).expect("a file");
    // No input describes a model of these two tensors.
    assert!(open(&folder).is_err());
}

pub fn seeds() -> Vec<Vec<u8>> {
    let index = r#"{"metadata":{},"weight_map":{"model.embed_tokens.weight":"a.safetensors","model.norm.weight":"b.safetensors"}}"#;
    let configs = [
        r#"{"model_type":"mixtral","hidden_size":32,"intermediate_size":16,"max_position_embeddings":64,"num_attention_heads":2,"num_key_value_heads":1,"num_experts_per_tok":1,"num_hidden_layers":1,"num_local_experts":2,"rms_norm_eps":1e-5,"rope_theta":10000.0,"sliding_window":8,"vocab_size":260,"rope_scaling":{"type":"yarn","factor":4.0,"original_max_position_embeddings":32,"beta_fast":32,"mscale":1.0,"mscale_all_dim":1.0}}"#,
        r#"{"model_type":"kimi_k2","hidden_size":64,"intermediate_size":32,"moe_intermediate_size":32,"max_position_embeddings":64,"num_attention_heads":2,"num_experts_per_tok":2,"num_hidden_layers":2,"n_routed_experts":8,"n_group":4,"topk_group":2,"n_shared_experts":1,"first_k_dense_replace":1,"moe_layer_freq":1,"kv_lora_rank":32,"q_lora_rank":32,"qk_nope_head_dim":8,"qk_rope_head_dim":8,"v_head_dim":8,"scoring_func":"sigmoid","topk_method":"noaux_tc","norm_topk_prob":true,"routed_scaling_factor":2.5,"vocab_size":260,"quantization_config":{"quant_method":"compressed-tensors","format":"pack-quantized","ignore":["lm_head","re:.*self_attn.*","re:.*shared_experts.*","*mlp.down_proj"],"config_groups":{"group_0":{"targets":["Linear"],"weights":{"num_bits":4,"type":"int","symmetric":true,"strategy":"group","group_size":32,"actorder":null}}}}}"#,
        r#"{"model_type":"gpt_oss","hidden_size":32,"intermediate_size":32,"head_dim":8,"max_position_embeddings":64,"num_attention_heads":4,"num_key_value_heads":2,"num_experts_per_tok":2,"num_hidden_layers":2,"num_local_experts":4,"layer_types":["sliding_attention","full_attention"],"sliding_window":8,"swiglu_limit":7.0,"vocab_size":260,"quantization_config":{"quant_method":"mxfp4","modules_to_not_convert":["model.layers.*.self_attn"]},"rope_scaling":{"rope_type":"llama3","factor":8,"low_freq_factor":1,"high_freq_factor":4,"original_max_position_embeddings":32}}"#,
        r#"{"model_type":"hunyuan_v1_moe","hidden_size":16,"intermediate_size":8,"head_dim":8,"max_position_embeddings":64,"num_attention_heads":2,"num_experts":[4,2],"moe_topk":[1,2],"num_shared_expert":[1,1],"num_hidden_layers":2,"vocab_size":260,"rope_scaling":{"type":"dynamic","alpha":1000.0,"factor":1.0}}"#,
    ];
    configs.iter().map(|config| [config.as_bytes(), b"\0", index.as_bytes()].concat()).collect()
}
