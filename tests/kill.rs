//! A server is killed at random moments under load, again and again, on one folder of cached prefixes. Whatever the last
//! one left there, the next one answers as if it had never been.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

/// The built-in model's prompts: prefixes shared by some, several blocks long.
fn prompt(index: usize) -> Vec<u32> {
    let family = index % 4;
    let token = |i: usize| {
        let seed = if i < 200 { family } else { index };
        (i * 131 + seed * 977 + i * i * 3) as u32 % 200
    };
    (0..300 + 40 * (index % 5)).map(token).collect()
}

const PROMPTS: usize = 10;

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(folder: Option<&Path>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moebius"));
        command.args([
            "serve",
            "demo",
            "--port",
            "0",
            "--context",
            "1024",
            "--parallel",
            "3",
            "--threads",
            "2",
        ]);
        if let Some(folder) = folder {
            command.arg("--kv-cache-dir").arg(folder).args(["--kv-cache-size", "8MiB"]);
        }
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("a server says where it listens").unwrap();
            if let Some(address) = line.strip_prefix("listening on http://") {
                break address.to_owned();
            }
        };
        // So that it never waits for us to read.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    fn ask(&self, index: usize) -> Option<(String, usize)> {
        ask(&self.address, index)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The text and how many prompt tokens came from the cache; `None` if the server went away meanwhile.
fn ask(address: &str, index: usize) -> Option<(String, usize)> {
    let body =
        json!({"prompt": prompt(index), "max_tokens": 24, "temperature": 0, "ignore_eos": true}).to_string();
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(60))).ok()?;
    let head = "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nContent-Type: application/json";
    write!(stream, "{head}\r\nHost: {address}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8(answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
    let answer: Value = serde_json::from_str(body).ok()?;
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    Some((answer["choices"][0]["text"].as_str().unwrap().to_owned(), cached as usize))
}

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn kills(count: usize) {
    let folder = Folder(std::env::temp_dir().join(format!("moebius-kill-{count}-{}", std::process::id())));
    let clean = Server::start(None);
    let expected: Vec<String> = (0..PROMPTS).map(|index| clean.ask(index).unwrap().0).collect();
    drop(clean);
    let (mut random, mut restored) = (0x9E37_79B9_u64, 0);
    for kill in 0..count {
        let mut server = Server::start(Some(&folder.0));
        // After a kill: some prompt is answered as ever, whether its blocks were found or not.
        let (text, cached) = server.ask(kill % PROMPTS).unwrap();
        assert_eq!(text, expected[kill % PROMPTS], "after {kill} kills");
        restored += usize::from(cached > 0);
        // Load, and the end of it at some moment.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let wait = Duration::from_millis((random >> 33) % 120);
        let (stop, asked) = (AtomicBool::new(false), AtomicUsize::new(kill));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let index = asked.fetch_add(1, Ordering::Relaxed) % PROMPTS;
                        if let Some((text, _)) = ask(&server.address, index) {
                            assert_eq!(text, expected[index], "before kill {kill}");
                        }
                    }
                });
            }
            std::thread::sleep(wait);
            // SIGKILL on Unix.
            server.child.kill().unwrap();
            stop.store(true, Ordering::Relaxed);
        });
        server.child.wait().unwrap();
    }
    println!("{restored} of {count} restarts began with blocks from disk");
    assert!(restored > 0 && restored * 2 + 10 > count, "blocks are found after kills: {restored} of {count}");
    let server = Server::start(Some(&folder.0));
    for (index, expected) in expected.iter().enumerate() {
        assert_eq!(&server.ask(index).unwrap().0, expected, "after all kills");
    }
}

#[test]
fn a_killed_server_leaves_nothing_that_changes_an_answer() {
    kills(6);
}

#[test]
#[ignore = "half a minute; the everyday test kills six times"]
fn fifty_kills() {
    kills(50);
}
