//! The loop: one thread owns the runner, its cache and every sequence. Front ends talk to it through
//! [`Engine`](super::Engine) and hear back through each request's sink.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use models::batch::{BlockKind, PAGE_TOKENS};
use models::{Batch, NoProbe, Runner, WantLogits};

use super::archive::Archive;
use super::{Arrival, EngineOptions, Message, Shared};
use crate::prefix::PrefixHasher;
use crate::report::{Observer, StepReport};
use crate::request::{FinishReason, SubmitError};
use crate::sampler::Scratch;
use crate::scheduler::{Plan, Scheduler, SequenceId, Share};
use crate::sequence::Sequence;

/// How often blocks are handed to the disk while there is nothing else to do.
const SAVE_EVERY: Duration = Duration::from_millis(2);
/// Messages that are taken between two steps, beyond the first.
const MESSAGES: usize = 16;
/// How often callers whose request does not run are asked whether they still wait.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Everything the loop owns.
pub(super) struct State {
    runner: Box<dyn Runner>,
    options: EngineOptions,
    hasher: PrefixHasher,
    observer: Option<Observer>,
    shared: Arc<Shared>,
    messages: Receiver<Message>,
    /// The disk, if there is one.
    archive: Option<Archive>,
    scheduler: Scheduler,
    plan: Plan,
    /// Those that wait and those that run.
    sequences: BTreeMap<SequenceId, Sequence>,
    batch: Batch,
    logits: Vec<f32>,
    scratch: Scratch,
    /// When callers were last asked whether they still wait.
    asked: Instant,
}

impl State {
    pub(super) fn new(
        runner: Box<dyn Runner>,
        options: EngineOptions,
        hasher: PrefixHasher,
        (archive, observer): (Option<Archive>, Option<Observer>),
        (shared, messages): (Arc<Shared>, Receiver<Message>),
    ) -> Self {
        let vocab = runner.config().vocab;
        Self {
            runner,
            options,
            hasher,
            observer,
            shared,
            messages,
            archive,
            scheduler: Scheduler::new(options.limits()),
            plan: Plan::default(),
            sequences: BTreeMap::new(),
            batch: Batch::default(),
            logits: vec![0.0; options.running * vocab],
            scratch: Scratch::new(vocab),
            asked: Instant::now(),
        }
    }

    pub(super) fn run(&mut self) {
        let mut busy = false;
        while self.receive(busy) {
            self.ask_who_waits();
            busy = self.step();
            self.retire();
            if let Some(archive) = &mut self.archive {
                archive.save(&*self.runner, &self.scheduler);
            }
        }
        for sequence in self.sequences.values_mut() {
            if sequence.is_new() {
                sequence.fail(&SubmitError::Stopped.to_string());
            } else {
                sequence.finish(FinishReason::Cancelled);
            }
        }
        if let Some(archive) = self.archive.take() {
            archive.close(&*self.runner, &self.scheduler);
        }
    }

    /// Takes what has arrived; waits if there is nothing else to do. `false` at the end.
    fn receive(&mut self, busy: bool) -> bool {
        if !busy {
            let saves = self.archive.as_ref().is_some_and(Archive::has_saves);
            let message = match (saves, self.sequences.is_empty()) {
                (true, _) => self.messages.recv_timeout(SAVE_EVERY).ok(),
                (false, true) => Some(self.messages.recv().unwrap_or(Message::Stop)),
                (false, false) => self.messages.recv_timeout(ASK_EVERY).ok(),
            };
            if let Some(message) = message {
                self.take(message);
            }
        }
        // A bounded number: those who generate do not wait until all blocks of a long restore are copied.
        for message in self.messages.try_iter().take(MESSAGES).collect::<Vec<_>>() {
            self.take(message);
        }
        !self.shared.stopping.load(Ordering::Acquire)
    }

    fn take(&mut self, message: Message) {
        match (message, &mut self.archive) {
            (Message::Arrival(arrival), _) => self.add(*arrival),
            (Message::Loaded(loaded), Some(archive)) => {
                archive.loaded(loaded, &mut *self.runner, &mut self.scheduler);
            }
            (Message::Loaded(_), None) => {}
            (Message::Stop, _) => self.shared.stopping.store(true, Ordering::Release),
        }
    }

    fn add(&mut self, arrival: Arrival) {
        let Arrival { request, choices, keys, chain } = arrival;
        let prompt = request.prompt.len();
        let left = self.options.context - prompt;
        let max_tokens = request.max_tokens.map_or(left, |wanted| wanted.min(left));
        let id = self.scheduler.add(request.priority, prompt, keys);
        self.sequences.insert(id, Sequence::new(request, max_tokens, chain, choices));
    }

    /// Asks those who do not run, now and then, whether they are still there, so that callers who left do
    /// not fill the queue.
    fn ask_who_waits(&mut self) {
        if self.asked.elapsed() < ASK_EVERY {
            return;
        }
        self.asked = Instant::now();
        for (id, sequence) in &mut self.sequences {
            // Those who ran in the last step have just been told.
            if !self.plan.runs(*id) {
                sequence.say_progress(self.scheduler.progress(*id).0);
            }
        }
        self.retire();
    }

    /// Runs a step; `false` if there was nothing to run.
    fn step(&mut self) -> bool {
        let begun = Instant::now();
        let mut report = StepReport::default();
        let archive = self.archive.as_ref();
        self.scheduler.plan(&|key| archive.is_some_and(|archive| archive.contains(key)), &mut self.plan);
        self.open_plan(&mut report);
        self.batch.clear();
        for share in &self.plan.shares {
            let (cached, known) = self.scheduler.progress(share.sequence);
            let end = cached + share.tokens;
            let want = if end == known { WantLogits::Last } else { WantLogits::None };
            let tokens = &self.sequences[&share.sequence].tokens()[cached..end];
            self.batch.push(tokens, cached, self.scheduler.tables(share.sequence), want);
            match known - cached {
                1 => report.decode_tokens += 1,
                _ => report.prefill_tokens += share.tokens,
            }
        }
        let planned = begun.elapsed();
        let ran = !self.plan.shares.is_empty();
        if ran {
            self.forward(begun, &mut report);
        }
        report.schedule_seconds += planned.as_secs_f64();
        if let Some(observer) = self.observer.as_mut().filter(|_| !self.plan.is_empty()) {
            (report.running, report.restoring) = self.scheduler.running();
            report.waiting = self.scheduler.waiting();
            report.full_blocks = self.scheduler.counts(BlockKind::Full);
            report.window_blocks = self.scheduler.counts(BlockKind::Window);
            observer(&report);
        }
        ran
    }

    /// What a plan asks for before its tokens run.
    fn open_plan(&mut self, report: &mut StepReport) {
        for (id, cached) in &self.plan.admitted {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            if sequence.is_new() {
                self.shared.waiting.fetch_sub(sequence.choices(), Ordering::AcqRel);
            }
            sequence.admitted(*cached);
            if let Some(archive) = &mut self.archive {
                sequence.used = Some(archive.touch(self.scheduler.keys(*id), cached / PAGE_TOKENS));
            }
            report.hit_tokens += cached;
            report.admitted_tokens += sequence.tokens().len();
        }
        report.preempted = self.plan.preempted.len();
        if let Some(archive) = &mut self.archive {
            self.plan.preempted.iter().for_each(|id| archive.forget(*id));
            self.plan.restores.iter().for_each(|restore| archive.restore(restore));
        }
        for copy in self.plan.copies() {
            self.runner.copy_block(copy.kind, copy.from, copy.to);
        }
    }

    fn forward(&mut self, begun: Instant, report: &mut StepReport) {
        let vocab = self.runner.config().vocab;
        let logits = &mut self.logits[..self.batch.logit_rows.len() * vocab];
        let forward = Instant::now();
        let result = self.runner.forward(&self.batch, &mut NoProbe, logits);
        report.forward_seconds = forward.elapsed().as_secs_f64();
        let seconds = begun.elapsed().as_secs_f64();
        let mut rows = logits.chunks_exact(vocab);
        for &Share { sequence: id, tokens } in &self.plan.shares {
            let sequence = self.sequences.get_mut(&id).expect("only known sequences run");
            if let Err(error) = &result {
                // Which sequence is at fault is not known; none of the batch has advanced.
                sequence.fail(&error.to_string());
                continue;
            }
            let books = Instant::now();
            let (used, archive) = (sequence.used, &mut self.archive);
            self.scheduler.ran(Share { sequence: id, tokens }, |depth, key| {
                if let (Some(archive), Some(used)) = (archive.as_mut(), used) {
                    archive.queue(key, used, depth);
                }
            });
            let (done, known) = self.scheduler.progress(id);
            report.schedule_seconds += books.elapsed().as_secs_f64();
            sequence.advance(done, begun, seconds);
            if done < known {
                continue;
            }
            let row = rows.next().expect("one row of logits per sequence that completes");
            if sequence.is_done() {
                continue;
            }
            let siblings: Vec<_> = sequence
                .take_siblings()
                .into_iter()
                .map(|sibling| (self.scheduler.fork(id), sibling))
                .collect();
            let key = sequence.sample(&mut self.scratch, row, &self.hasher);
            self.scheduler.extend(id, key);
            for (id, mut sibling) in siblings {
                let key = sibling.sample(&mut self.scratch, row, &self.hasher);
                self.scheduler.extend(id, key);
                self.sequences.insert(id, sibling);
            }
        }
    }

    /// Frees what belongs to generations that are over.
    fn retire(&mut self) {
        let Self { sequences, scheduler, shared, archive, .. } = self;
        sequences.retain(|id, sequence| {
            if sequence.is_done() {
                scheduler.remove(*id);
                if let Some(archive) = archive {
                    archive.forget(*id);
                }
                if sequence.is_new() {
                    shared.waiting.fetch_sub(sequence.choices(), Ordering::AcqRel);
                }
            }
            !sequence.is_done()
        });
    }
}
