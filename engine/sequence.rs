//! One running generation: its tokens, its blocks and what its caller has been told.

use std::time::Instant;

use crate::blocks::BlockTable;
use crate::request::{Event, FinishReason, Request, Sink, Summary};
use crate::sampler::{Sampler, Scratch, logprobs};
use crate::scheduler::Progress;
use crate::stop::StopMatcher;
use crate::tokenizer::IncrementalDecoder;

/// What comes after a sequence's share of a step.
pub enum Step {
    /// More of the prompt.
    PromptLeft,
    /// A token is to be chosen.
    Sample,
}

/// What a request needs besides itself, made when it is accepted.
pub struct Parts {
    /// Chooses its tokens.
    pub sampler: Sampler,
    /// Ends its text.
    pub stop: StopMatcher,
    /// Makes text of its tokens.
    pub decoder: IncrementalDecoder,
    /// Hears of it.
    pub sink: Sink,
    /// When it was accepted.
    pub submitted: Instant,
}

/// A generation that holds cache blocks.
pub struct Sequence {
    request: Request,
    max_tokens: usize,
    /// Prompt and output.
    tokens: Vec<u32>,
    cached: usize,
    table: Option<BlockTable>,
    parts: Parts,
    done: bool,
    started: Option<Instant>,
    first_token: Option<Instant>,
    prefill_seconds: f64,
}

impl Sequence {
    /// A generation whose prompt is still to be read; `table` has room for `max_tokens` more.
    pub fn new(request: Request, max_tokens: usize, table: BlockTable, mut parts: Parts) -> Self {
        let mut tokens = Vec::with_capacity(request.prompt.len() + max_tokens);
        tokens.extend_from_slice(&request.prompt);
        parts.sampler.observe_prompt(&request.prompt);
        Self {
            max_tokens,
            tokens,
            cached: 0,
            table: Some(table),
            parts,
            done: false,
            started: None,
            first_token: None,
            prefill_seconds: 0.0,
            request,
        }
    }

    /// What the scheduler needs to know.
    pub fn progress(&self) -> Progress {
        Progress { cached: self.cached, known: self.tokens.len() }
    }

    /// The next `count` tokens to run, how many are cached before them, and the blocks.
    pub fn next_tokens(&self, count: usize) -> (&[u32], usize, &[u32]) {
        let table = self.table.as_ref().expect("a running sequence holds blocks");
        (&self.tokens[self.cached..self.cached + count], self.cached, table.ids())
    }

    fn output(&self) -> &[u32] {
        &self.tokens[self.request.prompt.len()..]
    }

    /// `count` tokens have been run by a step that began at `begun`.
    pub fn advance(&mut self, count: usize, begun: Instant, seconds: f64) -> Step {
        self.started.get_or_insert(begun);
        self.cached += count;
        if self.first_token.is_none() {
            self.prefill_seconds += seconds;
            let (done, total) = (self.cached, self.request.prompt.len());
            self.send(Event::Prefill { done, total });
        }
        if self.cached < self.tokens.len() { Step::PromptLeft } else { Step::Sample }
    }

    /// Chooses the next token and tells the caller.
    pub fn sample(&mut self, scratch: &mut Scratch, logits: &[f32]) {
        if self.done {
            return;
        }
        let rule = &self.request.stop;
        let banned: &[u32] = if self.output().len() < rule.min_tokens { &rule.token_ids } else { &[] };
        let id = self.parts.sampler.sample(scratch, logits, banned);
        self.tokens.push(id);
        self.first_token.get_or_insert_with(Instant::now);

        let logprobs = self.request.logprobs.map(|top| logprobs(scratch, logits, id, top));
        let is_stop = self.request.stop.token_ids.contains(&id);
        let (mut text, mut stopped) = (String::new(), is_stop);
        if !is_stop {
            let pushed = self.parts.stop.push(&self.parts.decoder.push(id));
            text = pushed.emit;
            stopped = pushed.matched;
        }
        self.send(Event::Token { id, text, logprobs });
        if stopped {
            self.finish(FinishReason::Stop);
        } else if self.output().len() >= self.max_tokens {
            self.finish(FinishReason::Length);
        }
    }

    fn send(&mut self, event: Event) {
        if !self.done && !(self.parts.sink)(event) {
            self.finish(FinishReason::Cancelled);
        }
    }

    /// Ends the generation and tells the caller.
    pub fn finish(&mut self, reason: FinishReason) {
        if self.done {
            return;
        }
        self.done = true;
        // What was held back goes out; after a stop string nothing is left.
        let Parts { stop, decoder, .. } = &mut self.parts;
        let mut text = stop.push(&decoder.finish()).emit;
        text.push_str(&stop.finish());
        let since = |at: Option<Instant>| at.map_or(0.0, |at| (at - self.parts.submitted).as_secs_f64());
        let summary = Summary {
            reason,
            prompt_tokens: self.request.prompt.len(),
            completion_tokens: self.output().len(),
            queue_seconds: since(self.started),
            time_to_first_token_seconds: since(self.first_token),
            prefill_seconds: self.prefill_seconds,
            decode_seconds: self.first_token.map_or(0.0, |at| at.elapsed().as_secs_f64()),
        };
        (self.parts.sink)(Event::Finished { text, summary });
    }

    /// Ends the generation because the engine could not run it.
    pub fn fail(&mut self, message: &str) {
        if !self.done {
            self.done = true;
            (self.parts.sink)(Event::Failed(message.to_owned()));
        }
    }

    /// Gives up the blocks if the generation has ended.
    pub fn take_table_if_done(&mut self) -> Option<BlockTable> {
        if self.done { self.table.take() } else { None }
    }
}
