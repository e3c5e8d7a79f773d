//! One running generation: its tokens and what its caller has been told.

use std::sync::Arc;
use std::time::Instant;

use models::batch::PAGE_TOKENS;

use crate::blocks::BlockKey;
use crate::prefix::{PrefixChain, PrefixHasher};
use crate::request::{Event, FinishReason, Request, Sink, Summary};
use crate::sampler::{Sampler, Scratch, logprobs};
use crate::stop::StopMatcher;
use crate::store::Use;
use crate::tokenizer::IncrementalDecoder;

/// What each choice of a request needs besides it, made when it is accepted.
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

/// A generation; before its first token, all choices of a request.
pub struct Sequence {
    request: Arc<Request>,
    max_tokens: usize,
    /// Prompt and output.
    tokens: Vec<u32>,
    /// Behind the full blocks of `tokens`.
    chain: PrefixChain,
    parts: Parts,
    /// The other choices, until the prompt is read.
    siblings: Vec<Parts>,
    /// How many choices it began with.
    choices: usize,
    /// When its blocks were last used, as the archive counts; `None` before it runs, or without an archive.
    pub used: Option<Use>,
    done: bool,
    cached_tokens: Option<usize>,
    started: Option<Instant>,
    first_token: Option<Instant>,
    prefill_seconds: f64,
}

impl Sequence {
    /// A generation whose prompt is still to be read, for the first of `choices` and its siblings; `chain` stands behind
    /// the prompt's full blocks.
    pub fn new(request: Request, max_tokens: usize, chain: PrefixChain, mut choices: Vec<Parts>) -> Self {
        choices.iter_mut().for_each(|parts| parts.sampler.observe_prompt(&request.prompt));
        let parts = choices.remove(0);
        Self {
            max_tokens,
            tokens: request.prompt.clone(),
            chain,
            parts,
            choices: choices.len() + 1,
            used: None,
            siblings: choices,
            done: false,
            cached_tokens: None,
            started: None,
            first_token: None,
            prefill_seconds: 0.0,
            request: Arc::new(request),
        }
    }

    /// The other choices that still want to be answered, each a generation with the same tokens; the prompt has been read.
    pub fn take_siblings(&mut self) -> Vec<Self> {
        let siblings = std::mem::take(&mut self.siblings).into_iter();
        let sibling = |parts| Self {
            request: Arc::clone(&self.request),
            max_tokens: self.max_tokens,
            tokens: self.tokens.clone(),
            chain: self.chain.clone(),
            parts,
            siblings: Vec::new(),
            choices: 1,
            used: self.used,
            done: false,
            cached_tokens: self.cached_tokens,
            started: self.started,
            first_token: None,
            prefill_seconds: self.prefill_seconds,
        };
        siblings.map(sibling).collect()
    }

    /// Prompt and output.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    fn output(&self) -> &[u32] {
        &self.tokens[self.request.prompt.len()..]
    }

    /// It is over, for all its choices.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// How many choices it began with.
    pub fn choices(&self) -> usize {
        self.choices
    }

    /// Whether it has never run.
    pub fn is_new(&self) -> bool {
        self.cached_tokens.is_none()
    }

    /// It runs, and so many of its tokens come from the cache. (Again, if they could not be had from disk.)
    pub fn admitted(&mut self, cached_tokens: usize) {
        if self.started.is_none() {
            self.cached_tokens = Some(cached_tokens);
        }
    }

    /// It was part of a step that began at `begun`; `done` of its tokens have been read. Whether its callers still wait is
    /// found out on the way.
    pub fn advance(&mut self, done: usize, begun: Instant, seconds: f64) {
        self.started.get_or_insert(begun);
        if self.first_token.is_none() {
            self.prefill_seconds += seconds;
        }
        if self.first_token.is_none() || done < self.tokens.len() {
            self.say_progress(done);
        }
    }

    /// Tells the callers how far it is; those who are gone are forgotten.
    pub fn say_progress(&mut self, done: usize) {
        let total = self.tokens.len();
        let prompt_tokens = self.request.prompt.len();
        self.siblings.retain_mut(|parts| {
            let stays = (parts.sink)(Event::Prefill { done, total });
            if !stays {
                let summary = Summary::unstarted(FinishReason::Cancelled, prompt_tokens);
                (parts.sink)(Event::Finished { text: String::new(), summary });
            }
            stays
        });
        if !(self.parts.sink)(Event::Prefill { done, total }) {
            self.end(FinishReason::Cancelled);
            // Another choice takes the place of the first.
            if !self.siblings.is_empty() {
                self.parts = self.siblings.remove(0);
                self.done = false;
            }
        }
    }

    /// Chooses the next token and tells the caller; gives the key of the block that it fills, if it does.
    pub fn sample(
        &mut self,
        scratch: &mut Scratch,
        logits: &[f32],
        hasher: &PrefixHasher,
    ) -> Option<BlockKey> {
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
        if !(self.parts.sink)(Event::Token { id, text, logprobs }) {
            self.end(FinishReason::Cancelled);
        } else if stopped {
            self.end(FinishReason::Stop);
        } else if self.output().len() >= self.max_tokens {
            self.end(FinishReason::Length);
        }
        let full = self.tokens.len().is_multiple_of(PAGE_TOKENS);
        let block = full.then(|| &self.tokens[self.tokens.len() - PAGE_TOKENS..]);
        block.map(|tokens| hasher.extend(&mut self.chain, tokens)[0])
    }

    /// Ends the generation and tells every caller.
    pub fn finish(&mut self, reason: FinishReason) {
        self.end(reason);
        while !self.siblings.is_empty() {
            self.parts = self.siblings.remove(0);
            self.done = false;
            self.end(reason);
        }
    }

    fn end(&mut self, reason: FinishReason) {
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
            completion_tokens: self.output().len(),
            cached_tokens: self.cached_tokens.unwrap_or(0),
            queue_seconds: since(self.started),
            time_to_first_token_seconds: since(self.first_token),
            prefill_seconds: self.prefill_seconds,
            decode_seconds: self.first_token.map_or(0.0, |at| at.elapsed().as_secs_f64()),
            ..Summary::unstarted(reason, self.request.prompt.len())
        };
        (self.parts.sink)(Event::Finished { text, summary });
    }

    /// Ends the generation because the engine could not run it.
    pub fn fail(&mut self, message: &str) {
        if !self.done {
            self.done = true;
            for parts in std::iter::once(&mut self.parts).chain(&mut self.siblings) {
                (parts.sink)(Event::Failed(message.to_owned()));
            }
        }
    }
}
