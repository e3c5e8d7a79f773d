//! The loop: one thread owns the runner, its cache and every sequence. Front ends talk to it by
//! [`Generate::submit`] and hear back through each request's sink.
//!
//! A request is admitted once the blocks for its prompt and its whole output are free, so nothing
//! that was admitted can run out of memory later.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use models::batch::PAGE_TOKENS;
use models::{Batch, NoProbe, Runner, WantLogits};

use crate::blocks::BlockPool;
use crate::request::{Event, FinishReason, Generate, Request, Sink, SubmitError};
use crate::sampler::{Sampler, Scratch};
use crate::scheduler::{Progress, Share, schedule};
use crate::sequence::{Parts, Sequence, Step};
use crate::stop::StopMatcher;
use crate::tokenizer::Tokenizer;

/// How often waiting callers are asked whether they still wait.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Limits of an engine, fixed at start. The runner must have been made for them.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Longest prompt plus output, in tokens.
    pub context: usize,
    /// Cache blocks of the runner.
    pub blocks: usize,
    /// Most tokens of one step; a longer prompt is read in chunks of at most this.
    pub step_tokens: usize,
    /// Most requests running at a time; at most `step_tokens`.
    pub running: usize,
    /// Most requests waiting; one more is refused.
    pub waiting: usize,
}

impl EngineOptions {
    /// Room for `sequences` requests of `context` tokens each.
    pub fn new(context: usize, sequences: usize) -> Self {
        Self {
            context,
            blocks: sequences * context.div_ceil(PAGE_TOKENS),
            step_tokens: context.clamp(1, 512).max(sequences),
            running: sequences,
            waiting: 256,
        }
    }

    /// What the runner must be made for.
    pub fn capacity(&self) -> models::Capacity {
        models::Capacity { blocks: self.blocks, batch_tokens: self.step_tokens, logit_rows: self.running }
    }
}

struct Arrival {
    request: Request,
    parts: Parts,
}

/// A running engine. Dropping it ends its thread after the current step; generations that still
/// run are told so.
pub struct Engine {
    arrivals: Mutex<Option<Sender<Arrival>>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    options: EngineOptions,
    vocab: usize,
    tokenizer: Arc<Tokenizer>,
}

/// What the engine's thread and its callers both see.
struct Shared {
    waiting: AtomicUsize,
    stopping: AtomicBool,
}

impl Engine {
    /// Starts the loop on a worker of `pool`, whose threads the runner's kernels use.
    pub fn start(
        runner: Box<dyn Runner>,
        tokenizer: Arc<Tokenizer>,
        pool: Arc<rayon::ThreadPool>,
        options: EngineOptions,
    ) -> Self {
        assert!(options.running <= options.step_tokens, "every running request needs a place in a step");
        let (sender, receiver) = channel();
        let shared = Arc::new(Shared { waiting: AtomicUsize::new(0), stopping: AtomicBool::new(false) });
        let vocab = runner.config().vocab;
        let mut state = State {
            runner,
            options,
            shared: Arc::clone(&shared),
            arrivals: receiver,
            waiting: VecDeque::new(),
            running: Vec::with_capacity(options.running),
            pool: BlockPool::new(options.blocks),
            progress: Vec::with_capacity(options.running),
            shares: Vec::with_capacity(options.running),
            batch: Batch::default(),
            logits: vec![0.0; options.running * vocab],
            scratch: Scratch::new(vocab),
            asked: Instant::now(),
        };
        // Inside the pool, so that a step's parallel parts need no hand-over to it.
        let body = move || pool.install(|| state.run());
        let thread = std::thread::Builder::new().name("engine".into()).spawn(body);
        let thread = thread.expect("the system can start one thread");
        Self { arrivals: Mutex::new(Some(sender)), thread: Some(thread), shared, options, vocab, tokenizer }
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
        self.validate(&request)?;
        let parts = Parts {
            sampler: Sampler::new(&request.sampling, self.vocab)?,
            stop: StopMatcher::new(&request.stop.strings, request.stop.include_in_output)?,
            decoder: self.tokenizer.decoder(request.skip_special_tokens),
            sink,
            submitted: Instant::now(),
        };
        let limit = self.options.waiting;
        let arrivals = self.arrivals.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let sender = arrivals.as_ref().ok_or(SubmitError::Stopped)?;
        if self.shared.waiting.load(Ordering::Acquire) >= limit {
            return Err(SubmitError::QueueFull { limit });
        }
        self.shared.waiting.fetch_add(1, Ordering::AcqRel);
        sender.send(Arrival { request, parts }).map_err(|_| SubmitError::Stopped)
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
        let sender = self.arrivals.get_mut().map(Option::take);
        drop(sender);
        if let Some(thread) = self.thread.take() {
            // A panic of the loop has been reported by the panic hook already.
            let _ = thread.join();
        }
    }
}

/// Everything the loop owns.
struct State {
    runner: Box<dyn Runner>,
    options: EngineOptions,
    shared: Arc<Shared>,
    arrivals: Receiver<Arrival>,
    waiting: VecDeque<Arrival>,
    /// In order of admission.
    running: Vec<Sequence>,
    pool: BlockPool,
    progress: Vec<Progress>,
    shares: Vec<Share>,
    batch: Batch,
    logits: Vec<f32>,
    scratch: Scratch,
    /// When the waiting were last asked whether they still wait.
    asked: Instant,
}

impl State {
    fn run(&mut self) {
        while self.receive() {
            self.forget_gone();
            self.admit();
            self.step();
            self.retire();
        }
        for mut sequence in self.running.drain(..) {
            sequence.finish(FinishReason::Cancelled);
        }
        for mut arrival in self.waiting.drain(..).chain(self.arrivals.try_iter()) {
            (arrival.parts.sink)(Event::Failed(SubmitError::Stopped.to_string()));
        }
    }

    /// Takes what has arrived; waits if there is nothing else to do. `false` at the end.
    fn receive(&mut self) -> bool {
        if self.running.is_empty() && self.waiting.is_empty() {
            match self.arrivals.recv() {
                Ok(arrival) => self.waiting.push_back(arrival),
                Err(_) => return false,
            }
        }
        self.waiting.extend(self.arrivals.try_iter());
        !self.shared.stopping.load(Ordering::Acquire)
    }

    /// Asks those who wait, now and then, whether they are still there, so that callers who left do
    /// not fill the queue.
    fn forget_gone(&mut self) {
        if self.asked.elapsed() < ASK_EVERY {
            return;
        }
        self.asked = Instant::now();
        let before = self.waiting.len();
        self.waiting.retain_mut(|Arrival { request, parts }| {
            (parts.sink)(Event::Prefill { done: 0, total: request.prompt.len() })
        });
        self.shared.waiting.fetch_sub(before - self.waiting.len(), Ordering::AcqRel);
    }

    /// First come first served: a request that does not fit yet holds back those behind it.
    fn admit(&mut self) {
        while self.running.len() < self.options.running {
            let Some(arrival) = self.waiting.front() else { return };
            let prompt = arrival.request.prompt.len();
            let left = self.options.context - prompt;
            let max_tokens = arrival.request.max_tokens.map_or(left, |wanted| wanted.min(left));
            let Some(table) = self.pool.take(BlockPool::blocks_for(prompt + max_tokens)) else { return };
            let Some(Arrival { request, parts }) = self.waiting.pop_front() else { return };
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            self.running.push(Sequence::new(request, max_tokens, table, parts));
        }
    }

    fn step(&mut self) {
        self.progress.clear();
        self.progress.extend(self.running.iter().map(Sequence::progress));
        schedule(&self.progress, self.options.step_tokens, &mut self.shares);
        self.batch.clear();
        for share in &self.shares {
            let sequence = &self.running[share.sequence];
            let completes = sequence.progress().cached + share.tokens == sequence.progress().known;
            let want = if completes { WantLogits::Last } else { WantLogits::None };
            let (tokens, start, table) = sequence.next_tokens(share.tokens);
            self.batch.push(tokens, start, table, want);
        }
        let begun = Instant::now();
        let vocab = self.runner.config().vocab;
        let logits = &mut self.logits[..self.batch.logit_rows.len() * vocab];
        let result = self.runner.forward(&self.batch, &mut NoProbe, logits);
        let seconds = begun.elapsed().as_secs_f64();
        if let Err(error) = result {
            // Which sequence is at fault is not known; none of the batch has advanced.
            for share in &self.shares {
                self.running[share.sequence].fail(&error.to_string());
            }
            return;
        }
        let mut rows = logits.chunks_exact(vocab);
        for share in &self.shares {
            let sequence = &mut self.running[share.sequence];
            match sequence.advance(share.tokens, begun, seconds) {
                Step::PromptLeft => {}
                Step::Sample => {
                    let row = rows.next().expect("one row of logits per sequence that completes");
                    sequence.sample(&mut self.scratch, row);
                }
            }
        }
    }

    fn retire(&mut self) {
        let pool = &mut self.pool;
        self.running.retain_mut(|sequence| match sequence.take_table_if_done() {
            Some(table) => {
                pool.release(table);
                false
            }
            None => true,
        });
    }
}
