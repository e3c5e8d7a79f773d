//! HTTP by hand, so that what is on the wire is what is tested.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// An answer as it came.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("answers are UTF-8")
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.text()))
    }

    /// The `error` object, after checking its shape.
    #[track_caller]
    pub fn error(&self) -> Value {
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:?}");
        let error = self.json()["error"].clone();
        let keys: Vec<&String> = error.as_object().expect("an error object").keys().collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
        assert!(error["type"].is_string() && error["code"].is_string());
        error
    }

    /// The `data` of every event, the framing checked.
    #[track_caller]
    pub fn events(&self) -> Vec<String> {
        let text = self.text();
        assert!(text.ends_with("\n\n"), "{text:?}");
        let events = text.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
        events
            .map(|event| {
                assert!(!event.contains('\n'), "one line per event: {event:?}");
                event.strip_prefix("data: ").expect("only data events").to_owned()
            })
            .collect()
    }

    /// The chunks of a stream that ended as it should.
    #[track_caller]
    pub fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).expect("chunks are JSON")).collect()
    }
}

pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the server accepts");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket option");
    stream.set_write_timeout(Some(Duration::from_secs(20))).expect("a socket option");
    stream.set_nodelay(true).expect("a socket option");
    stream
}

/// The head and body of a POST with JSON.
pub fn post_bytes(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

pub fn post(address: SocketAddr, path: &str, body: &Value) -> Answer {
    exchange(address, &post_bytes(path, body.to_string().as_bytes()))
}

pub fn get(address: SocketAddr, path: &str) -> Answer {
    request(address, "GET", path, &[])
}

/// A request without a body.
pub fn request(address: SocketAddr, method: &str, path: &str, headers: &[&str]) -> Answer {
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    for header in headers {
        head.push_str(header);
        head.push_str("\r\n");
    }
    if !headers.iter().any(|header| header.starts_with("Host:")) {
        head.push_str("Host: localhost\r\n");
    }
    head.push_str("\r\n");
    exchange(address, head.as_bytes())
}

/// Sends bytes and reads one answer. What cannot be sent any more is not an error: the answer tells.
pub fn exchange(address: SocketAddr, bytes: &[u8]) -> Answer {
    let mut stream = connect(address);
    let _ = stream.write_all(bytes);
    read_answer(&mut BufReader::new(stream))
}

/// Reads a head.
pub fn read_head(reader: &mut impl BufRead) -> Answer {
    let mut line = String::new();
    reader.read_line(&mut line).expect("a status line");
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.unwrap_or_else(|| panic!("not a status line: {line:?}"));
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line).expect("a header");
        match line.trim_end().split_once(": ") {
            Some((key, value)) => headers.push((key.to_owned(), value.to_owned())),
            None => return Answer { status, headers, body: Vec::new() },
        }
    }
}

pub fn read_answer(reader: &mut impl BufRead) -> Answer {
    let mut answer = read_head(reader);
    if answer.header("transfer-encoding") == Some("chunked") {
        while let Some(chunk) = read_chunk(reader) {
            answer.body.extend(chunk);
        }
    } else if let Some(length) = answer.header("content-length").and_then(|length| length.parse().ok()) {
        answer.body = vec![0; length];
        reader.read_exact(&mut answer.body).expect("the declared length");
    }
    answer
}

/// `None` after the last one.
pub fn read_chunk(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line).expect("a chunk size");
    let size =
        usize::from_str_radix(line.trim_end(), 16).unwrap_or_else(|_| panic!("a chunk size: {line:?}"));
    let mut chunk = vec![0; size + 2];
    reader.read_exact(&mut chunk).expect("a chunk");
    chunk.truncate(size);
    (size > 0).then_some(chunk)
}
