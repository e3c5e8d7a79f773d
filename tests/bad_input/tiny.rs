//! A really small checkpoint, made here, and the program run on it under limits.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use models::manifest::{TensorSpec, manifest};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// Longest any command may take; all of them take a fraction of a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Address space of a command that must fail early: the program, its threads and nothing of the size that a hostile
/// number asks for.
const ADDRESS_SPACE_KIB: usize = 1 << 20;

/// A folder that goes away with its owner.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("moebius-bad-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path.canonicalize().unwrap())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Self {
        std::fs::write(self.0.join(name), bytes).unwrap();
        self
    }

    pub fn remove(&self, name: &str) -> &Self {
        std::fs::remove_file(self.0.join(name)).unwrap();
        self
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// One tensor of a file.
pub type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// A checkpoint in memory.
#[derive(Clone)]
pub struct Tiny {
    pub config: Value,
    pub tensors: Vec<Tensor>,
}

/// Mixtral with one layer of two experts and a vocabulary of single bytes.
pub fn mixtral() -> Value {
    json!({
        "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 16, "max_position_embeddings": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 1, "num_hidden_layers": 1,
        "num_local_experts": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "vocab_size": 260
    })
}

impl Tiny {
    /// All tensors that `config` asks for, with small values.
    pub fn new(config: Value) -> Self {
        let description = models::arch::describe(&config).unwrap();
        let specs = manifest(&description, &|_| false).unwrap();
        let mut tensors: Vec<Tensor> =
            specs.into_iter().enumerate().map(|(seed, spec)| values(seed as u32, spec)).collect();
        // What an INT4 weight says of its shape: beside `[rows, cols / 8]` of its packed values.
        for at in 0..tensors.len() {
            if let Some(name) = tensors[at].0.strip_suffix("_shape").map(|name| format!("{name}_packed")) {
                let packed = &tensors.iter().find(|tensor| tensor.0 == name).expect("packed values").2;
                let shape = [packed[0] as i32, 8 * packed[1] as i32];
                tensors[at].3 = shape.iter().flat_map(|n| n.to_le_bytes()).collect();
            }
        }
        Self { config, tensors }
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).expect("the tensor exists")
    }

    pub fn shard(&self) -> Vec<u8> {
        shard(&self.tensors)
    }

    /// The checkpoint as one file, with a tokenizer.
    pub fn folder(&self) -> Folder {
        let folder = Folder::new();
        folder.write("model.safetensors", self.shard());
        folder.write("config.json", self.config.to_string());
        folder.write("tokenizer.json", single_bytes());
        folder
    }

    /// The checkpoint as two files and an index, which comes back too.
    pub fn sharded(&self) -> (Folder, Value) {
        let folder = self.folder();
        folder.remove("model.safetensors");
        let (first, second) = self.tensors.split_at(self.tensors.len() / 2);
        let mut map = serde_json::Map::new();
        for (name, tensors) in [("a.safetensors", first), ("b.safetensors", second)] {
            folder.write(name, shard(tensors));
            map.extend(tensors.iter().map(|tensor| (tensor.0.clone(), name.into())));
        }
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        folder.write("model.safetensors.index.json", index.to_string());
        (folder, index)
    }
}

pub fn shard(tensors: &[Tensor]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    ::safetensors::serialize(views, None).unwrap()
}

/// A `tokenizer.json` of the 256 single bytes, each spelt as byte-level vocabularies spell it.
pub fn single_bytes() -> String {
    let plain = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let shifted = (0..256).filter(|byte| !plain(byte)).zip(256..);
    let spelt = (0..256).filter(plain).map(|byte| (byte, byte)).chain(shifted);
    let entry = |(byte, point): (u32, u32)| (char::from_u32(point).unwrap().to_string(), byte.into());
    let vocabulary: serde_json::Map<String, Value> = spelt.map(entry).collect();
    let level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let model = json!({"type": "BPE", "vocab": vocabulary, "merges": []});
    json!({"pre_tokenizer": level, "decoder": level, "model": model}).to_string()
}

fn values(seed: u32, spec: TensorSpec) -> Tensor {
    let dtype = *spec.dtypes.last().expect("a type");
    let elements: usize = spec.shape.iter().product();
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let number = |random: u32| (random % 2001) as f32 / 10_000.0 - 0.1;
    let bytes = match dtype {
        Dtype::F32 => (0..elements).flat_map(|_| number(next()).to_le_bytes()).collect(),
        Dtype::BF16 => {
            (0..elements).flat_map(|_| ((number(next()).to_bits() >> 16) as u16).to_le_bytes()).collect()
        }
        Dtype::I32 => (0..elements).flat_map(|_| next().to_le_bytes()).collect(),
        Dtype::U8 if spec.name.ends_with("_scales") => {
            (0..elements).map(|_| 118 + (next() % 6) as u8).collect()
        }
        // Not the NaN of e4m3.
        _ => (0..elements).map(|_| (next() & 0xbf) as u8).collect(),
    };
    (spec.name, dtype, spec.shape, bytes)
}

/// How a command ended.
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    command: String,
}

/// Runs the program with no input and little address space.
pub fn moebius(arguments: &[&str]) -> Ended {
    limited(arguments, Some(ADDRESS_SPACE_KIB))
}

/// Runs the program with no input.
pub fn moebius_unlimited(arguments: &[&str]) -> Ended {
    limited(arguments, None)
}

fn limited(arguments: &[&str], address_space_kib: Option<usize>) -> Ended {
    let program = env!("CARGO_BIN_EXE_moebius");
    let mut command = match address_space_kib {
        Some(kib) if cfg!(target_os = "linux") => {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("ulimit -v {kib}; exec \"$0\" \"$@\""), program]);
            shell
        }
        _ => Command::new(program),
    };
    command.args(arguments).env_remove("MOEBIUS_LOG").env("HF_HUB_OFFLINE", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let pipes = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let readers = [
        std::thread::spawn(move || std::io::read_to_string(pipes.0).unwrap_or_default()),
        std::thread::spawn(move || std::io::read_to_string(pipes.1).unwrap_or_default()),
    ];
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("moebius {arguments:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let [stdout, stderr] = readers.map(|reader| reader.join().unwrap());
    let ended = Ended { code: status.code(), stdout, stderr, command: arguments.join(" ") };
    assert!(!ended.stderr.contains("panicked"), "{}: {}", ended.command, ended.stderr);
    ended
}

impl Ended {
    /// The command failed with `code`, and its message has these words.
    pub fn fails(&self, code: i32, words: &[&str]) {
        let Self { command, stderr, .. } = self;
        assert_eq!(self.code, Some(code), "{command}: {stderr}");
        assert!(stderr.len() < 4000, "{command}: a message of {} bytes", stderr.len());
        for word in words {
            assert!(stderr.contains(word), "{command}: no {word:?} in {stderr}");
        }
    }

    pub fn succeeds(&self) -> &Self {
        assert_eq!(self.code, Some(0), "{}: {}", self.command, self.stderr);
        self
    }
}

/// The message with which the program refuses a folder.
pub fn refuses(folder: &Folder, words: &[&str]) {
    moebius(&["inspect", folder.path().to_str().unwrap()]).fails(1, words);
}

/// Opens a folder as a model; the error as its message.
pub fn open(folder: &Folder) -> Result<(), String> {
    let checkpoint = models::Checkpoint::open(folder.path()).map_err(|error| error.to_string())?;
    models::Model::open(checkpoint).map(drop).map_err(|error| error.to_string())
}

/// Opening a folder fails, and the message has `words`.
pub fn refused(folder: &Folder, what: &str, words: &str) {
    match open(folder) {
        Err(message) => assert!(message.contains(words), "{what}: no {words:?} in {message:?}"),
        Ok(()) => panic!("{what}: it opens"),
    }
}
