//! Who may talk, how much and how slowly. Most of these are other servers' published vulnerabilities.

use std::io::{BufReader, Read, Write};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use moebius::server::{ApiKey, ServerError};
use serde_json::json;

use crate::client::{connect, exchange, get, post, post_bytes, read_answer, request};
use crate::script::{Mode, TestServer, wait_for};
use crate::{CHAT, COMPLETIONS, chat, completion};

fn post_head(headers: &str) -> Vec<u8> {
    format!("POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n").into_bytes()
}

#[test]
fn without_the_key_there_is_only_health() {
    let server =
        TestServer::with(Mode::Answer, |options| options.api_key = Some(ApiKey::from("sesame".to_owned())));
    // Every route, then what is none: a caller without the key must not learn which is which.
    let routes = [
        ("GET", "/version"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("GET", "/v1/models/other"),
        ("POST", CHAT),
        ("POST", COMPLETIONS),
        ("GET", CHAT),
        ("GET", "/"),
        ("GET", "/metrics"),
        ("POST", "/tokenize"),
        ("POST", "/invocations"),
        ("GET", "/healthz"),
        ("GET", "/health/"),
        ("GET", "//health"),
        ("OPTIONS", CHAT),
    ];
    for (method, path) in routes {
        for key in [
            "",
            "Authorization: Bearer wrong",
            "Authorization: sesame",
            "Authorization: Basic sesame",
            "Authorization: Bearer",
            "X-Api-Key: x",
        ] {
            let headers: &[&str] =
                if key.is_empty() { &["Content-Length: 0"] } else { &[key, "Content-Length: 0"] };
            let answer = request(server.address, method, path, headers);
            assert_eq!(
                (answer.status, &answer.error()["code"]),
                (401, &json!("invalid_api_key")),
                "{method} {path} {key}"
            );
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        }
    }
    assert_eq!(get(server.address, "/health").status, 200);
    for scheme in ["Bearer", "bearer"] {
        let answer =
            request(server.address, "GET", "/v1/models", &[&format!("Authorization: {scheme} sesame")]);
        assert_eq!(answer.status, 200);
    }
    assert!(server.script.requests.lock().unwrap().is_empty());
}

#[test]
fn a_public_address_needs_a_key() {
    let start = |change: &dyn Fn(&mut moebius::server::ServerOptions)| {
        let (_, state) = crate::script::state(Mode::Answer, change);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.expect("a port");
            moebius::server::serve(state, listener, async {}).await
        })
    };
    assert!(matches!(start(&|_| {}), Err(ServerError::PublicWithoutKey { .. })));
    assert!(matches!(
        start(&|options| options.api_key = Some(String::new().into())),
        Err(ServerError::BadApiKey)
    ));
    assert!(matches!(
        start(&|options| options.api_key = Some("a\nb".to_owned().into())),
        Err(ServerError::BadApiKey)
    ));
    assert!(start(&|options| options.api_key = Some("key".to_owned().into())).is_ok());
    assert!(start(&|options| options.insecure_no_auth = true).is_ok());
    let (_, state) = crate::script::state(Mode::Answer, |options| options.host = "0.0.0.0".into());
    assert!(
        matches!(moebius::server::run(state), Err(ServerError::PublicWithoutKey { .. })),
        "before listening"
    );
    let (_, state) = crate::script::state(Mode::Answer, |options| options.host = "256.0.0.1".into());
    assert!(matches!(moebius::server::run(state), Err(ServerError::Bind { .. })));
}

#[test]
fn other_sites_cannot_use_a_loopback_server() {
    let server = TestServer::with(Mode::Answer, |options| options.allowed_hosts = vec!["Box.lan".into()]);
    let port = server.address.port();
    for host in
        ["localhost".to_owned(), format!("127.0.0.1:{port}"), format!("[::1]:{port}"), "box.lan:80".into()]
    {
        assert_eq!(
            request(server.address, "GET", "/health", &[&format!("Host: {host}")]).status,
            200,
            "{host}"
        );
    }
    for host in ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.nip.io", ""] {
        let answer = request(server.address, "GET", "/v1/models", &[&format!("Host: {host}")]);
        assert_eq!((answer.status, &answer.error()["code"]), (403, &json!("host_not_allowed")), "{host}");
    }
    let raw = |head: &str| exchange(server.address, head.as_bytes()).status;
    assert_eq!(raw("GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"), 403, "no Host");
    assert_eq!(
        raw("GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"),
        403
    );
    assert_eq!(
        raw("GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"),
        403
    );
    // What a page of another origin can send without a preflight is no request here.
    for kind in ["", "Content-Type: text/plain\r\n", "Content-Type: application/x-www-form-urlencoded\r\n"] {
        let answer = exchange(server.address, &post_head(&format!("{kind}Content-Length: 0\r\n")));
        assert_eq!((answer.status, &answer.error()["code"]), (415, &json!("unsupported_media_type")));
    }
}

#[test]
fn only_plain_json_objects_are_read() {
    let server = TestServer::start(Mode::Answer);
    let deep = |open: &str, close: &str| {
        format!("{{\"messages\":{}{}}}", open.repeat(10_000), close.repeat(10_000)).into_bytes()
    };
    let bodies: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"{".to_vec(),
        b"[]".to_vec(),
        b"null".to_vec(),
        b"{} {}".to_vec(),
        b"{\"temperature\": NaN}".to_vec(),
        b"{\"temperature\": Infinity}".to_vec(),
        b"{\"temperature\": 1e400}".to_vec(),
        b"{\"n\": 01}".to_vec(),
        b"{\"prompt\": \"\xff\"}".to_vec(),
        b"{\"prompt\": \"\\ud800\"}".to_vec(),
        b"\xef\xbb\xbf{}".to_vec(),
        deep("[", "]"),
        deep("{\"a\":", "}"),
        format!("{{\"metadata\": [{}0]}}", "0,".repeat(2 << 20)).into_bytes(),
    ];
    for body in bodies {
        let answer = exchange(server.address, &post_bytes(CHAT, &body));
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        assert_eq!((answer.status, &answer.error()["code"]), (400, &json!("invalid_json")), "{shown}");
    }
    for encoding in ["gzip", "deflate", "br", "zstd", "gzip, identity"] {
        let head = format!(
            "Content-Type: application/json\r\nContent-Encoding: {encoding}\r\nContent-Length: 2\r\n"
        );
        let answer = exchange(server.address, &[post_head(&head), b"{}".to_vec()].concat());
        assert_eq!(answer.status, 415, "{encoding}");
        answer.error();
    }
    let head = "Content-Type: Application/JSON; charset=utf-8\r\nContent-Encoding: identity\r\n";
    let body = chat(json!({})).to_string();
    let bytes = [post_head(&format!("{head}Content-Length: {}\r\n", body.len())), body.into_bytes()].concat();
    assert_eq!(exchange(server.address, &bytes).status, 200);
}

#[test]
fn bodies_are_bounded() {
    let server = TestServer::with(Mode::Answer, |options| options.max_body_bytes = 100_000);
    let flood = completion(json!({"prompt": "x".repeat(200_000)}));
    let answer = post(server.address, COMPLETIONS, &flood);
    assert_eq!((answer.status, &answer.error()["code"]), (413, &json!("request_too_large")));
    // Declared only; and not declared at all.
    let head = "Content-Type: application/json\r\nContent-Length: 99999999999\r\n";
    let started = Instant::now();
    assert_eq!(exchange(server.address, &post_head(head)).status, 413);
    assert!(started.elapsed() < Duration::from_secs(5));
    let mut chunked = post_head("Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n");
    for _ in 0..30 {
        chunked.extend(format!("2710\r\n{}\r\n", " ".repeat(10_000)).bytes());
    }
    assert_eq!(exchange(server.address, &chunked).status, 413);
    assert_eq!(post(server.address, COMPLETIONS, &completion(json!({}))).status, 200);
}

#[test]
fn bodies_are_bounded_together() {
    let server = TestServer::with(Mode::Answer, |options| options.max_body_bytes = 1 << 20);
    // Each is allowed by itself and never completes; what they hold is four of the largest.
    let head = post_head("Content-Type: application/json\r\nContent-Length: 1000000\r\n");
    let mut held: Vec<_> = (0..8).map(|_| connect(server.address)).collect();
    for socket in &mut held {
        let _ = socket.write_all(&[head.clone(), vec![b' '; 999_999]].concat());
    }
    let statuses = held.into_iter().filter_map(|mut socket| {
        socket.set_read_timeout(Some(Duration::from_secs(1))).expect("a socket option");
        let mut status = [0; 12];
        socket.read_exact(&mut status).is_ok().then(|| String::from_utf8_lossy(&status).into_owned())
    });
    let statuses: Vec<_> = statuses.collect();
    assert!(statuses.len() >= 3 && statuses.iter().all(|status| status == "HTTP/1.1 429"), "{statuses:?}");
    wait_for("room", || {
        post(server.address, COMPLETIONS, &completion(json!({"user": "x".repeat(900_000)}))).status == 200
    });
}

#[test]
fn headers_are_bounded() {
    let server = TestServer::start(Mode::Answer);
    let before = resident_bytes();
    for _ in 0..4 {
        let huge =
            format!("GET /health HTTP/1.1\r\nHost: localhost\r\nX-Huge: {}\r\n\r\n", "x".repeat(10 << 20));
        let mut socket = connect(server.address);
        // The server stops reading; what it says may be lost in the reset, but it must not take it all.
        if socket.write_all(huge.as_bytes()).is_ok() {
            let mut first = [0; 12];
            if socket.read_exact(&mut first).is_ok() {
                assert_eq!(&first, b"HTTP/1.1 431");
            }
        }
    }
    let many: String = (0..5000).map(|i| format!("X-{i}: 1\r\n")).collect();
    let answer =
        exchange(server.address, format!("GET /health HTTP/1.1\r\nHost: localhost\r\n{many}\r\n").as_bytes());
    assert_eq!(answer.status, 431);
    assert!(resident_bytes() < before + (64 << 20), "memory does not follow the caller's headers");
    assert_eq!(get(server.address, "/health").status, 200);
}

/// 0 where the system does not say; other tests of this process are part of it.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

#[test]
fn slow_senders_are_let_go() {
    let server = TestServer::with(Mode::Answer, |options| {
        options.timeouts.header = Duration::from_millis(200);
        options.timeouts.body_idle = Duration::from_millis(200);
        options.timeouts.body_total = Duration::from_millis(800);
    });
    for sent in [&b""[..], b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: loc"] {
        let mut socket = connect(server.address);
        socket.write_all(sent).expect("sent");
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
        assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"), "{rest:?}");
    }
    let head = post_head("Content-Type: application/json\r\nContent-Length: 1000\r\n");
    let stopped = exchange(server.address, &[head.clone(), b"{".to_vec()].concat());
    assert_eq!((stopped.status, &stopped.error()["code"]), (408, &json!("request_timeout")));
    // A byte now and then does not help either.
    let mut socket = connect(server.address);
    socket.write_all(&head).expect("sent");
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(10) && socket.write_all(b" ").is_ok() {
        std::thread::sleep(Duration::from_millis(50));
        socket.set_nonblocking(true).expect("a socket option");
        let arrived = socket.peek(&mut [0]).is_ok();
        socket.set_nonblocking(false).expect("a socket option");
        if arrived {
            break;
        }
    }
    assert_eq!(read_answer(&mut BufReader::new(socket)).status, 408);
}

#[test]
fn a_reader_who_stops_reading_is_given_up() {
    let server =
        TestServer::with(Mode::Flood, |options| options.timeouts.write_stall = Duration::from_millis(300));
    // Faster than any reader, and at a pace at which only the time without reading tells.
    for (mode, most) in [(Mode::Flood, usize::MAX), (Mode::Drip(Duration::from_micros(10)), 60_000)] {
        server.script.set(mode.clone());
        let (said, before) = (&server.script.said, server.script.cancelled.load(Ordering::SeqCst));
        said.store(0, Ordering::SeqCst);
        let mut socket = connect(server.address);
        let body = chat(json!({"stream": true, "logprobs": true, "top_logprobs": 20})).to_string();
        socket.write_all(&post_bytes(CHAT, body.as_bytes())).expect("sent");
        wait_for("the end", || server.script.cancelled.load(Ordering::SeqCst) > before);
        let said = said.load(Ordering::SeqCst);
        assert!(said < most, "{mode:?}: {said} tokens for nobody");
    }
}

#[test]
fn requests_at_one_time_are_bounded() {
    let server = TestServer::with(Mode::Stall, |options| options.max_concurrent_requests = 2);
    let hold = || {
        let mut socket = connect(server.address);
        socket.write_all(&post_bytes(CHAT, chat(json!({})).to_string().as_bytes())).expect("sent");
        socket
    };
    let held = [hold(), hold()];
    wait_for("both", || server.script.running.load(Ordering::SeqCst) == 2);
    let answer = post(server.address, CHAT, &chat(json!({})));
    assert_eq!((answer.status, &answer.error()["code"]), (429, &json!("queue_full")));
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!(get(server.address, "/health").status, 200, "the rest of the server goes on");
    drop(held);
    server.script.wait_idle();
    server.script.set(Mode::Answer);
    wait_for("room", || post(server.address, CHAT, &chat(json!({}))).status == 200);
}

#[test]
fn a_thousand_callers_who_hang_up_leave_nothing() {
    let server = TestServer::start(Mode::Stall);
    let bytes =
        [false, true].map(|stream| post_bytes(CHAT, chat(json!({"stream": stream})).to_string().as_bytes()));
    let submitted = || server.script.requests.lock().unwrap().len();
    for round in 0..1000 {
        let (mut socket, bytes, before) = (connect(server.address), &bytes[round % 2], submitted());
        // Some leave in the middle of their own words, some at once, and some while they are served.
        let sent = if round % 5 == 0 { bytes.len() / 2 } else { bytes.len() };
        socket.write_all(&bytes[..sent]).expect("sent");
        if round % 5 < 3 && sent == bytes.len() {
            wait_for("the engine", || submitted() > before);
        }
    }
    server.script.wait_idle();
    wait_for("every sink", || server.script.cancelled.load(Ordering::SeqCst) == submitted());
    assert!(submitted() >= 400);
    server.script.set(Mode::Answer);
    wait_for("room", || post(server.address, CHAT, &chat(json!({}))).status == 200);
    server.script.wait_idle();
}
