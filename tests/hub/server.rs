//! A hub on the loopback device, a checkpoint to serve, and a cache to put it in.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moebius::hub::{HubError, HubOptions, fetch};
use serde_json::json;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

impl Asked {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

#[derive(Clone, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Sends this many bytes of the body, then closes.
    pub cut: Option<usize>,
    pub no_length: bool,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }
}

pub type Handler = dyn Fn(&Asked) -> Reply + Send + Sync;

pub struct Server {
    pub url: String,
    pub log: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    pub fn new(handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let handler: Arc<Handler> = Arc::new(handler);
        let seen = log.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (handler, seen) = (handler.clone(), seen.clone());
                std::thread::spawn(move || serve(stream, &*handler, &seen));
            }
        });
        Self { url, log }
    }

    /// The requests so far, which are forgotten.
    pub fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

pub fn serve(stream: TcpStream, handler: &Handler, log: &Mutex<Vec<Asked>>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line.ok()?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let asked = Asked { path, headers };
    log.lock().unwrap().push(asked.clone());
    let reply = handler(&asked);
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", reply.status);
    if !reply.no_length {
        head += &format!("content-length: {}\r\n", reply.body.len());
    }
    reply.headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    let mut stream = stream;
    stream.write_all((head + "\r\n").as_bytes()).ok()?;
    stream.write_all(&reply.body[..reply.cut.unwrap_or(reply.body.len())]).ok()?;
    // Closed in order, or the bytes sent may be lost to a reset.
    stream.shutdown(std::net::Shutdown::Write).ok()?;
    stream.read_to_end(&mut Vec::new()).ok()?;
    Some(())
}

pub fn hex(digest: ring::digest::Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(ring::digest::digest(&ring::digest::SHA256, bytes))
}

pub fn git_blob(bytes: &[u8]) -> String {
    let object = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hex(ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, &object))
}

pub type Files = BTreeMap<String, Vec<u8>>;

/// A checkpoint of two shards among files nobody should ask for.
pub fn checkpoint() -> Files {
    let index = json!({"metadata": {"total_size": 1}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}});
    let shard = |seed: u8| {
        (0..2_500_000u32).map(|i| (i as u8).wrapping_mul(seed) ^ (i >> 9) as u8).collect::<Vec<u8>>()
    };
    let mut files = Files::new();
    for (name, bytes) in [
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{\"model\": 1}".to_vec()),
        ("chat_template.jinja", b"{{ x }}".to_vec()),
        ("generation_config.json", Vec::new()),
        ("model.safetensors.index.json", index.to_string().into_bytes()),
        (SHARDS[0], shard(3)),
        (SHARDS[1], shard(7)),
        (".gitattributes", b"x".to_vec()),
        ("README.md", b"x".to_vec()),
        ("modeling_evil.py", b"x".to_vec()),
        ("pytorch_model.bin", b"x".to_vec()),
        ("model-00003-of-00003.safetensors", b"not in the index".to_vec()),
        ("original/config.json", b"x".to_vec()),
    ] {
        files.insert(name.to_owned(), bytes);
    }
    files
}

pub fn listing(files: &Files) -> String {
    let siblings: Vec<_> = files
        .iter()
        .map(|(name, bytes)| {
            let mut entry = json!({"rfilename": name, "size": bytes.len(), "blobId": git_blob(bytes)});
            if name.ends_with(".safetensors") {
                entry["lfs"] = json!({"sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 134});
                entry["blobId"] = json!(git_blob(b"pointer"));
            }
            entry
        })
        .collect();
    json!({"id": "org/name", "sha": COMMIT, "siblings": siblings, "tags": []}).to_string()
}

pub fn ranged(asked: &Asked, bytes: &[u8]) -> Reply {
    match asked.header("range") {
        None => Reply::new(200, bytes),
        Some(range) => {
            let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
            let from: usize = from.parse().unwrap();
            let to = to.parse().map_or(bytes.len(), |last: usize| (last + 1).min(bytes.len()));
            if from >= bytes.len() {
                return Reply::new(416, "").with("content-range", format!("bytes */{}", bytes.len()));
            }
            let value = format!("bytes {from}-{}/{}", to - 1, bytes.len());
            Reply::new(206, &bytes[from..to]).with("content-range", value)
        }
    }
}

/// What the real hub answers.
pub fn answer(files: &Files, asked: &Asked) -> Reply {
    if asked.path == "/api/models/org/name/revision/main?blobs=true" {
        return Reply::new(200, listing(files));
    }
    let name = asked.path.strip_prefix(&format!("/org/name/resolve/{COMMIT}/"));
    match name.and_then(|name| files.get(name)) {
        Some(bytes) => ranged(asked, bytes),
        None => Reply::new(404, "").with("x-error-code", "EntryNotFound"),
    }
}

pub fn hub(files: Files) -> Server {
    Server::new(move |asked| answer(&files, asked))
}

/// The hub, but for the first shard, whose answers are `odd`'s.
pub fn odd_shard(odd: impl Fn(&Asked, &[u8]) -> Reply + Send + Sync + 'static) -> Server {
    let files = checkpoint();
    Server::new(move |asked| {
        if asked.path.ends_with(SHARDS[0]) { odd(asked, &files[SHARDS[0]]) } else { answer(&files, asked) }
    })
}

pub struct Cache(pub PathBuf);

impl Cache {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let unique = format!("moebius-hub-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(unique);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn options(&self, server: &Server) -> HubOptions {
        let mut options = HubOptions::new(&self.0);
        options.endpoint = server.url.clone();
        options.backoff = Duration::from_millis(1);
        options.retries = 2;
        options.timeout = Duration::from_secs(10);
        options
    }

    pub fn get(&self, server: &Server) -> Result<PathBuf, HubError> {
        fetch("org/name", None, &self.options(server), &mut ())
    }

    pub fn root(&self) -> PathBuf {
        self.0.join("models--org--name")
    }

    pub fn partial(&self) -> PathBuf {
        self.root().join("blobs").join(sha256(&checkpoint()[SHARDS[0]]) + ".incomplete")
    }

    pub fn put_partial(&self, bytes: &[u8]) {
        fs::create_dir_all(self.root().join("blobs")).unwrap();
        fs::write(self.partial(), bytes).unwrap();
    }

    pub fn nothing_shown(&self) -> bool {
        !self.root().join("snapshots").exists() && !self.root().join("refs").exists()
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn is_whole(folder: &Path) {
    let files = checkpoint();
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let wanted = ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"];
    let mut expected: Vec<&str> =
        wanted.into_iter().chain(SHARDS).chain(["model.safetensors.index.json"]).collect();
    expected.sort_unstable();
    assert_eq!(names, expected);
    for name in names {
        assert!(fs::read(folder.join(&name)).unwrap() == files[&name], "{name}");
    }
}

impl Server {
    pub fn take_count(&self, name: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|asked| asked.path.ends_with(&format!("/{name}"))).count()
    }
}
