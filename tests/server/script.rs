//! An engine that says what it is told to, and a server around it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use moebius::request::{Event, FinishReason, Generate, Request, Sink, SubmitError, Summary, TokenLogprobs};
use moebius::server::{AppState, ServerError, ServerOptions, serve};
use moebius::template::ChatTemplate;
use moebius::tokenizer::{Specials, Tokenizer};
use tokio::sync::oneshot;

/// What every answer says: characters of one to four bytes, which the byte-level tokenizer cuts apart.
pub const TEXT: &str = "Grüße, 世界! 🦀 ok";
/// `<|im_end|>` of the fixture.
pub const EOS: u32 = 708;
const CASE: &str = "kimi_k2_int4";

/// What happens to a request.
#[derive(Clone, Debug)]
pub enum Mode {
    /// `TEXT`, then the stop token.
    Answer,
    /// Reads its prompt for ever.
    Stall,
    /// One token per pause, without end.
    Drip(Duration),
    /// Tokens without end, as fast as they are taken.
    Flood,
    /// This many tokens, then a failure.
    Fail(usize),
    /// One token, then the sink is dropped without a word.
    Vanish,
    /// One token, then cancelled from inside.
    Cancel,
    /// Not accepted.
    Refuse(SubmitError),
    /// The first of these is accepted and stalls; the rest finds a full queue.
    OnlyOne,
}

/// The scripted engine.
pub struct Script {
    pub mode: Mutex<Mode>,
    pub requests: Mutex<Vec<Request>>,
    /// Requests without an end.
    pub running: Arc<AtomicUsize>,
    /// Requests whose sink said that nobody listens.
    pub cancelled: Arc<AtomicUsize>,
    /// Tokens of all requests.
    pub said: Arc<AtomicUsize>,
    pub tokenizer: Arc<Tokenizer>,
    context: usize,
}

impl Script {
    pub fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }

    pub fn last(&self) -> Request {
        self.requests.lock().unwrap().last().expect("a request was submitted").clone()
    }

    /// Waits until nothing runs.
    pub fn wait_idle(&self) {
        wait_for("an idle engine", || self.running.load(Ordering::SeqCst) == 0);
    }
}

/// Waits for what must come soon.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Generate for Script {
    fn submit(&self, request: Request, sink: Sink) -> Result<(), SubmitError> {
        let mut mode = self.mode.lock().unwrap().clone();
        match mode {
            Mode::Refuse(error) => return Err(error),
            Mode::OnlyOne if self.running.load(Ordering::SeqCst) > 0 => {
                return Err(SubmitError::QueueFull { limit: 1 });
            }
            Mode::OnlyOne => mode = Mode::Stall,
            _ => {}
        }
        self.requests.lock().unwrap().push(request.clone());
        self.running.fetch_add(1, Ordering::SeqCst);
        let (running, cancelled) = (Arc::clone(&self.running), Arc::clone(&self.cancelled));
        let (said, tokenizer) = (Arc::clone(&self.said), Arc::clone(&self.tokenizer));
        std::thread::spawn(move || {
            if play(&mode, &request, sink, &tokenizer, &said).is_none() {
                cancelled.fetch_add(1, Ordering::SeqCst);
            }
            running.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(())
    }

    fn context(&self) -> usize {
        self.context
    }

    fn vocab(&self) -> usize {
        self.tokenizer.vocab_size()
    }
}

/// `None` if the sink cancelled.
fn play(
    mode: &Mode,
    request: &Request,
    mut sink: Sink,
    tokenizer: &Tokenizer,
    said: &AtomicUsize,
) -> Option<()> {
    let mut sent = 0;
    let mut decoder = tokenizer.decoder(request.skip_special_tokens);
    let script = tokenizer.encode(TEXT, Specials::Plain).expect("the text can be encoded");
    let mut say = |sink: &mut Sink, id: u32| {
        sent += 1;
        said.fetch_add(1, Ordering::SeqCst);
        let text = if request.stop.token_ids.contains(&id) { String::new() } else { decoder.push(id) };
        let logprobs = request.logprobs.map(|top| TokenLogprobs {
            chosen: -0.5,
            top: (0..top as u32)
                .map(|rank| {
                    ((id + rank) % 256, if rank > 1 { f32::NEG_INFINITY } else { -0.5 - rank as f32 })
                })
                .collect(),
        });
        sink(Event::Token { id, text, logprobs }).then_some(())
    };
    let total = request.prompt.len();
    sink(Event::Prefill { done: total, total }).then_some(())?;
    let limit = request.max_tokens.unwrap_or(usize::MAX);
    let mut reason = FinishReason::Length;
    let mut endless = script.iter().copied().cycle();
    match mode {
        Mode::Answer => {
            for &id in script.iter().take(limit) {
                say(&mut sink, id)?;
            }
            if limit > script.len()
                && let Some(&stop) = request.stop.token_ids.first()
            {
                say(&mut sink, stop)?;
                reason = FinishReason::Stop;
            }
        }
        Mode::Stall | Mode::OnlyOne | Mode::Refuse(_) => loop {
            std::thread::sleep(Duration::from_millis(2));
            sink(Event::Prefill { done: 1, total }).then_some(())?;
        },
        Mode::Drip(pause) => loop {
            std::thread::sleep(*pause);
            say(&mut sink, endless.next()?)?;
        },
        Mode::Flood => loop {
            say(&mut sink, endless.next()?)?;
        },
        Mode::Fail(after) => {
            for id in endless.take(*after) {
                say(&mut sink, id)?;
            }
            sink(Event::Failed("/secret/path: expert 412 of layer 37 is corrupt".into()));
            return Some(());
        }
        Mode::Vanish => {
            say(&mut sink, script[0])?;
            return Some(());
        }
        Mode::Cancel => {
            say(&mut sink, script[0])?;
            reason = FinishReason::Cancelled;
        }
    }
    let completion_tokens = sent;
    let summary = Summary {
        reason,
        prompt_tokens: total,
        cached_tokens: 0,
        completion_tokens,
        queue_seconds: 0.0,
        time_to_first_token_seconds: 0.0,
        prefill_seconds: 0.0,
        decode_seconds: 0.0,
    };
    sink(Event::Finished { text: decoder.finish(), summary });
    Some(())
}

/// A server of its own for a test; stops when dropped.
pub struct TestServer {
    pub address: SocketAddr,
    pub script: Arc<Script>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<Result<(), ServerError>>>,
}

impl TestServer {
    pub fn start(mode: Mode) -> Self {
        Self::with(mode, |_| {})
    }

    pub fn with(mode: Mode, change: impl FnOnce(&mut ServerOptions)) -> Self {
        let (script, state) = state(mode, change);
        Self::serving(script, state)
    }

    pub fn serving(script: Arc<Script>, state: AppState) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a socket option");
        let address = listener.local_addr().expect("an address");
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                let stopped = async {
                    let _ = stopped.await;
                };
                serve(state, listener, stopped).await
            })
        });
        Self { address, script, stop: Some(stop), thread: Some(thread) }
    }

    /// Asks for the end and waits for it.
    pub fn stop(&mut self) -> Result<(), ServerError> {
        drop(self.stop.take());
        self.thread.take().map_or(Ok(()), |thread| thread.join().expect("the server does not panic"))
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let result = self.stop();
        assert!(std::thread::panicking() || result.is_ok(), "{result:?}");
    }
}

/// What a server over the fixture serves.
pub fn state(mode: Mode, change: impl FnOnce(&mut ServerOptions)) -> (Arc<Script>, AppState) {
    let read = |file: &str| match std::fs::read(case_folder().join(file)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    };
    let tokenizer = Tokenizer::load(&read).expect("the fixture's tokenizer");
    let template = ChatTemplate::load(&read, tokenizer.specials().map(|(_, text)| text))
        .expect("the fixture's template");
    let tokenizer = Arc::new(tokenizer);
    let mut options = ServerOptions {
        served_model_name: "org/tiny".into(),
        model_aliases: vec!["tiny".into()],
        stop_token_ids: vec![EOS],
        ..ServerOptions::default()
    };
    change(&mut options);
    let script = Arc::new(Script {
        mode: Mutex::new(mode),
        requests: Mutex::default(),
        running: Arc::default(),
        cancelled: Arc::default(),
        said: Arc::default(),
        tokenizer: Arc::clone(&tokenizer),
        context: 4096,
    });
    let engine = Arc::clone(&script) as Arc<dyn Generate>;
    (script, AppState { engine, tokenizer, template: template.map(Arc::new), options })
}

fn case_folder() -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let places = [root.join("tests/golden").join(CASE), root.join("../shared/cases").join(CASE)];
    places.into_iter().find(|place| place.is_dir()).expect("tests/golden has the fixture")
}
