//! The engine from outside: what it takes and how requests come in. Its loop is in `engine/state.rs`.
//!
//! A request that can never fit is refused at once. What is accepted runs to its end: under pressure it may lose its
//! cache blocks for a while ([`scheduler`](crate::scheduler)), never its place.

mod archive;
mod state;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use kernels::attention::CacheType;
use models::batch::PAGE_TOKENS;
use models::{Capacity, Runner};

use crate::blocks::BlockKey;
use crate::prefix::{PrefixChain, PrefixHasher};
use crate::report::Observer;
use crate::request::{Generate, Request, Sink, SubmitError};
use crate::sampler::Sampler;
use crate::scheduler::Limits;
use crate::sequence::Parts;
use crate::stop::StopMatcher;
use crate::store::{Loaded, StoreError};
use crate::tokenizer::Tokenizer;
use archive::Archive;
use state::State;

pub use archive::ArchiveOptions;

/// Limits of an engine, fixed at start. The runner must have been made for them.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Longest prompt plus output, in tokens.
    pub context: usize,
    /// Cache blocks of the runner, of layers that see everything; room for one request of `context` tokens at least.
    pub blocks: usize,
    /// Where the model has layers with windows: the widest window, and their blocks.
    pub window: Option<(usize, usize)>,
    /// How cached values are stored; `None` = as the numerics say.
    pub cache_type: Option<CacheType>,
    /// Most tokens of one step; a longer prompt is read in chunks of at most this.
    pub step_tokens: usize,
    /// Most requests running at a time; at most `step_tokens`.
    pub running: usize,
    /// Most requests waiting, each of several choices counted; one more is refused.
    pub waiting: usize,
}

impl EngineOptions {
    /// Room for `sequences` requests of `context` tokens each, of a model whose widest window is `window`.
    pub fn new(context: usize, sequences: usize, window: Option<usize>) -> Self {
        let step_tokens = context.clamp(1, 512).max(sequences);
        let blocks = sequences * context.div_ceil(PAGE_TOKENS);
        // The window, a chunk before it is passed on, and a block at either end that both reach into.
        let windowed = |window: usize| sequences * ((window + step_tokens).div_ceil(PAGE_TOKENS) + 2);
        Self {
            context,
            blocks,
            window: window.map(|window| (window, windowed(window).min(blocks).max(1))),
            cache_type: None,
            step_tokens,
            running: sequences,
            waiting: (2 * sequences).max(256),
        }
    }

    /// What the runner must be made for.
    pub fn capacity(&self) -> Capacity {
        Capacity {
            blocks: self.blocks,
            window_blocks: self.window.map_or(0, |(_, blocks)| blocks),
            cache_type: self.cache_type,
            batch_tokens: self.step_tokens,
            logit_rows: self.running,
        }
    }

    fn limits(&self) -> Limits {
        let Self { step_tokens, running, blocks, window, .. } = *self;
        Limits { step_tokens, running, blocks, window }
    }
}

/// What an engine runs with.
pub struct EngineParts {
    /// Made for the options' [`EngineOptions::capacity`].
    pub runner: Box<dyn Runner>,
    /// Of the model.
    pub tokenizer: Arc<Tokenizer>,
    /// Whose threads the runner's kernels use.
    pub pool: Arc<rayon::ThreadPool>,
    /// What cached content depends on besides tokens ([`identity`](crate::prefix::identity)).
    pub identity: [u8; 32],
    /// Where cached prefixes outlive the engine.
    pub archive: Option<ArchiveOptions>,
    /// Sees every step.
    pub observer: Option<Observer>,
}

/// What comes to the loop.
enum Message {
    Arrival(Box<Arrival>),
    /// A block from disk.
    Loaded(Loaded),
    /// The end.
    Stop,
}

/// A request that was accepted, on its way to the loop.
struct Arrival {
    request: Request,
    choices: Vec<Parts>,
    /// Of the prompt's full blocks, and the chain behind them.
    keys: Vec<BlockKey>,
    chain: PrefixChain,
}

/// A running engine. Dropping it ends its thread after the current step; generations that still
/// run are told so.
pub struct Engine {
    messages: Mutex<Option<Sender<Message>>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    options: EngineOptions,
    vocab: usize,
    tokenizer: Arc<Tokenizer>,
    hasher: PrefixHasher,
}

/// What the engine's thread and its callers both see.
struct Shared {
    /// Choices of requests that have not begun to run.
    waiting: AtomicUsize,
    stopping: AtomicBool,
}

impl Shared {
    /// Whether `count` more may wait: any number if nobody does.
    fn check_room(&self, count: usize, limit: usize) -> Result<(), SubmitError> {
        let waiting = self.waiting.load(Ordering::Acquire);
        if waiting > 0 && waiting + count > limit { Err(SubmitError::QueueFull { limit }) } else { Ok(()) }
    }
}

impl Engine {
    /// Starts the loop on a worker of the pool.
    ///
    /// # Errors
    /// If the archive cannot be opened.
    ///
    /// # Panics
    /// If the options are not consistent.
    pub fn start(parts: EngineParts, options: EngineOptions) -> Result<Self, StoreError> {
        let EngineParts { runner, tokenizer, pool, identity, archive, observer } = parts;
        assert!(options.context <= options.blocks * PAGE_TOKENS, "one request fits: {options:?}");
        let windows = options.window.map(|(window, blocks)| (window.div_ceil(PAGE_TOKENS) + 2, blocks));
        let fits = windows.is_none_or(|(needed, blocks)| blocks >= needed.min(options.blocks));
        assert!(fits, "one request's windows fit: {options:?}");
        let (sender, receiver) = channel();
        let loaded = sender.clone();
        // A loop that has ended needs no block.
        let notify = move |block| drop(loaded.send(Message::Loaded(block)));
        let archive = archive.map(|options| Archive::open(&options, &*runner, notify)).transpose()?;
        let hasher = match &archive {
            Some(archive) => PrefixHasher::new(archive.secret(), identity),
            None => PrefixHasher::random(identity),
        };
        let shared = Arc::new(Shared { waiting: AtomicUsize::new(0), stopping: AtomicBool::new(false) });
        let vocab = runner.config().vocab;
        let loop_shared = Arc::clone(&shared);
        let mut state =
            State::new(runner, options, hasher.clone(), (archive, observer), (loop_shared, receiver));
        // Inside the pool, so that a step's parallel parts need no hand-over to it.
        let body = move || pool.install(|| state.run());
        let thread = std::thread::Builder::new().name("engine".into()).spawn(body);
        let thread = Some(thread.expect("the system can start one thread"));
        let messages = Mutex::new(Some(sender));
        Ok(Self { messages, thread, shared, options, vocab, tokenizer, hasher })
    }

    fn validate(&self, request: &Request) -> Result<(), SubmitError> {
        let prompt_tokens = request.prompt.len();
        if prompt_tokens == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= self.vocab) {
            let message = format!("token {id} is outside the vocabulary of {}", self.vocab);
            return Err(SubmitError::Invalid { param: "prompt", message });
        }
        let context = self.options.context;
        let max_tokens = request.max_tokens.unwrap_or(1);
        if max_tokens == 0 {
            let message = "must be at least 1".to_owned();
            return Err(SubmitError::Invalid { param: "max_tokens", message });
        }
        if prompt_tokens.saturating_add(max_tokens) > context {
            return Err(SubmitError::ContextExceeded { prompt_tokens, max_tokens, context });
        }
        Ok(())
    }
}

impl Generate for Engine {
    fn submit(&self, request: Request, sink: Sink) -> Result<(), SubmitError> {
        self.submit_choices(request, vec![sink])
    }

    fn submit_choices(&self, request: Request, sinks: Vec<Sink>) -> Result<(), SubmitError> {
        self.validate(&request)?;
        let (count, limit) = (sinks.len(), self.options.waiting);
        if count == 0 {
            return Ok(());
        }
        // Before the work on the prompt, and again after it: a flood is refused at once.
        self.shared.check_room(count, limit)?;
        let submitted = Instant::now();
        let parts = |(choice, sink)| {
            let stop = StopMatcher::new(&request.stop.strings, request.stop.include_in_output)?;
            let sampler = Sampler::new(&request.choice_sampling(choice), self.vocab)?;
            let decoder = self.tokenizer.decoder(request.skip_special_tokens);
            Ok(Parts { sampler, stop, decoder, sink, submitted })
        };
        let choices = sinks.into_iter().enumerate().map(parts).collect::<Result<Vec<_>, SubmitError>>()?;
        let mut chain = self.hasher.chain(&request.cache_salt);
        let keys = self.hasher.extend(&mut chain, &request.prompt);
        let messages = self.messages.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let sender = messages.as_ref().ok_or(SubmitError::Stopped)?;
        self.shared.check_room(count, limit)?;
        self.shared.waiting.fetch_add(count, Ordering::AcqRel);
        let arrival = Box::new(Arrival { request, choices, keys, chain });
        sender.send(Message::Arrival(arrival)).map_err(|_| {
            self.shared.waiting.fetch_sub(count, Ordering::AcqRel);
            SubmitError::Stopped
        })
    }

    fn context(&self) -> usize {
        self.options.context
    }

    fn vocab(&self) -> usize {
        self.vocab
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        // The archive keeps a sender, so the loop does not end by this alone.
        if let Ok(sender) = self.messages.get_mut() {
            drop(sender.take().map(|sender| sender.send(Message::Stop)));
        }
        if let Some(thread) = self.thread.take() {
            // A panic of the loop has been reported by the panic hook already.
            let _ = thread.join();
        }
    }
}
