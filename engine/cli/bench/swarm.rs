//! `moebius bench serve`: a swarm of agents that share a long prefix and talk in rounds, on a whole engine. What the
//! prefix cache serves, what it costs, and whether every agent is told what it would be told alone.

use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bench::Sink as Rows;
use bench::row::{Row, Setting, Times};
use bench::seeded::Seeded;
use clap::Args;

use super::{RowsArgs, measured};
use crate::cli::{CacheArgs, ComputeArgs, DEMO, usage};
use crate::error::Error;
use crate::loaded::Loaded;
use crate::report::StepReport;
use crate::request::{Event, Generate, Request, SamplingParams, StopRule, Summary};
use crate::session::{Session, SessionOptions};

/// Longest wait for any event.
const SILENCE: Duration = Duration::from_secs(3600);

#[derive(Args)]
pub struct ServeArgs {
    /// Checkpoint folder, hub id `org/name[@revision]`, or `demo`
    #[arg(default_value = DEMO)]
    model: String,
    /// Agents that talk at the same time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    agents: u16,
    /// Tokens that all prompts begin with
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(0..=10_000_000))]
    shared: u32,
    /// Least tokens of an agent's own task
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    private_min: u32,
    /// Most tokens of an agent's own task
    #[arg(long, default_value_t = 80, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    private_max: u32,
    /// Calls of each agent, every one a continuation of the last
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Tokens an agent adds to every answer (what its tool said)
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    turn: u32,
    /// Tokens of every answer
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    answer: u32,
    /// Agents that are run alone too, and compared [default: all]
    #[arg(long)]
    alone: Option<u16>,
    /// Calls that share nothing, to compare times with
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    unshared: u16,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    rows: RowsArgs,
}

/// One agent: its conversation so far and what it was told.
struct Agent {
    /// Of all agents.
    number: usize,
    prompt: Vec<u32>,
    seeded: Seeded,
    salt: String,
    answers: Vec<u32>,
    calls: usize,
}

/// What all calls together saw.
#[derive(Default)]
struct Tally {
    calls: usize,
    prompt_tokens: usize,
    shareable_tokens: usize,
    cached_tokens: usize,
}

/// A running engine whose steps are added up.
struct Watched {
    session: Session,
    steps: Arc<Mutex<Vec<StepReport>>>,
}

impl Watched {
    fn start(args: &ServeArgs, sequences: usize) -> Result<Self, Error> {
        // One round more than there is, for the calls that share nothing.
        let rounds = u32::from(args.rounds) + 1;
        let longest = args.shared + args.private_max + rounds * (args.turn + args.answer);
        let options = args.cache.apply(&args.compute, args.compute.options());
        let context = options.context.unwrap_or(longest as usize);
        let options = SessionOptions { sequences, context: Some(context), ..options };
        let loaded = Loaded::open_with(&args.model, options.dense)?;
        let steps = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&steps);
        let observer = move |step: &StepReport| {
            seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(*step);
        };
        let session = Session::start_watched(loaded, &options, Some(Box::new(observer)))?;
        Ok(Self { session, steps })
    }

    fn steps(&self) -> Vec<StepReport> {
        self.steps.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    fn submit(
        &self,
        index: usize,
        agent: &Agent,
        answer: u32,
        events: &Sender<(usize, Event)>,
    ) -> Result<(), Error> {
        let seed = Some((agent.number * 1000 + agent.calls) as u64);
        let request = Request {
            prompt: agent.prompt.clone(),
            max_tokens: Some(answer as usize),
            sampling: SamplingParams { temperature: 1.0, seed, ..SamplingParams::greedy() },
            stop: StopRule::default(),
            logprobs: None,
            skip_special_tokens: true,
            priority: 0,
            cache_salt: agent.salt.clone(),
        };
        let events = events.clone();
        Ok(self.session.engine.submit(request, Box::new(move |event| events.send((index, event)).is_ok()))?)
    }

    /// Has agents talk, each as soon as it was answered, for `rounds` calls each.
    fn talk(&self, args: &ServeArgs, agents: &mut [Agent], rounds: usize) -> Result<Tally, Error> {
        let (sender, events): (_, Receiver<(usize, Event)>) = channel();
        let mut tally = Tally::default();
        for (index, agent) in agents.iter().enumerate() {
            self.submit(index, agent, args.answer, &sender)?;
        }
        let mut talking = agents.len();
        while talking > 0 {
            // An engine that has died says nothing more.
            let Ok((index, event)) = events.recv_timeout(SILENCE) else {
                return Err(Error::Unsupported("the engine has said nothing for an hour".into()));
            };
            let agent = &mut agents[index];
            match event {
                Event::Prefill { .. } => {}
                Event::Token { id, .. } => agent.answers.push(id),
                Event::Failed(message) => return Err(Error::Unsupported(message)),
                Event::Finished { summary, .. } => {
                    tally.add(&summary, agent, args);
                    agent.calls += 1;
                    let said = agent.answers.len() - summary.completion_tokens;
                    agent.prompt.extend_from_slice(&agent.answers[said..]);
                    if agent.calls == rounds {
                        talking -= 1;
                        continue;
                    }
                    let vocab = self.session.loaded.model.config.vocab;
                    agent.prompt.extend(agent.seeded.tokens(args.turn as usize, vocab));
                    self.submit(index, agent, args.answer, &sender)?;
                }
            }
        }
        Ok(tally)
    }
}

impl Tally {
    /// What an earlier call had already: the shared beginning, for all but the first; of later rounds all that the last
    /// one read and said, but its last token, which no model ever read.
    fn add(&mut self, summary: &Summary, agent: &Agent, args: &ServeArgs) {
        let new = (args.turn + 1) as usize;
        self.shareable_tokens += match (agent.calls, agent.number) {
            (0, 0) => 0,
            (0, _) => args.shared as usize,
            _ => summary.prompt_tokens - new,
        };
        self.calls += 1;
        self.prompt_tokens += summary.prompt_tokens;
        self.cached_tokens += summary.cached_tokens;
    }
}

fn agents(args: &ServeArgs, vocab: usize, salt: impl Fn(usize) -> String) -> Vec<Agent> {
    let shared = Seeded::new(1).tokens(args.shared as usize, vocab);
    let spread = args.private_max.saturating_sub(args.private_min) as usize + 1;
    let agent = |index: usize| {
        let mut seeded = Seeded::new(index as u64 + 2);
        let private = args.private_min as usize + seeded.below(spread) as usize;
        let mut prompt = shared.clone();
        prompt.extend(seeded.tokens(private, vocab));
        Agent { number: index, prompt, seeded, salt: salt(index), answers: Vec::new(), calls: 0 }
    };
    (0..usize::from(args.agents)).map(agent).collect()
}

pub fn run(args: &ServeArgs) -> Result<ExitCode, Error> {
    if args.private_max < args.private_min {
        return Ok(usage("--private-max is less than --private-min"));
    }
    let (count, rounds) = (usize::from(args.agents), usize::from(args.rounds));
    let watched = Watched::start(args, count)?;
    eprintln!("{}: context {} tokens; {}", args.model, watched.session.context, watched.session.plan);
    let vocab = watched.session.loaded.model.config.vocab;
    let setting = Setting {
        numerics: watched.session.numerics.clone(),
        runner: watched.session.runner,
        threads: watched.session.threads,
        model: args.model.clone(),
    };

    let mut swarm = agents(args, vocab, |_| String::new());
    let begun = Instant::now();
    let tally = watched.talk(args, &mut swarm, rounds)?;
    let seconds = begun.elapsed().as_secs_f64();
    let steps = watched.steps();

    // Alone: every agent a tenant of its own, one after another.
    let alone = args.alone.map_or(count, usize::from).min(count);
    let every = count.div_ceil(alone.max(1));
    let mut lonely = agents(args, vocab, |index| format!("alone {index}"));
    let (mut compared, mut equal) = (0, 0);
    for index in (0..count).step_by(every) {
        watched.talk(args, &mut lonely[index..=index], rounds)?;
        compared += 1;
        equal += usize::from(lonely[index].answers == swarm[index].answers);
    }
    // The calls of the round in the middle, with nothing to share.
    let unshared: Vec<f64> = (0..usize::from(args.unshared))
        .map(|index| {
            let mut agent = agents(args, vocab, |_| format!("unshared {index}")).swap_remove(index % count);
            let middle = (args.turn + args.answer) as usize * rounds / 2;
            agent.prompt.extend(agent.seeded.tokens(middle, vocab));
            let begun = Instant::now();
            watched.talk(args, &mut [agent], 1)?;
            Ok(begun.elapsed().as_secs_f64())
        })
        .collect::<Result<_, Error>>()?;
    let unshared = Times::of(&unshared);

    let unique = args.shared as usize
        + swarm.iter().map(|agent| agent.prompt.len() - args.shared as usize).sum::<usize>();
    let kept = steps.iter().map(|step| step.full_blocks.used + step.full_blocks.cached).max().unwrap_or(0);
    // Steps in which nearly all run at once.
    let busy: Vec<_> = steps.iter().filter(|step| step.running * 10 >= count * 9).collect();
    let (schedule, all) = busy.iter().fold((0.0, 0.0), |(schedule, all), step| {
        (schedule + step.schedule_seconds, all + step.schedule_seconds + step.forward_seconds)
    });
    let per_call = seconds / tally.calls as f64;
    let row = Row::new("serve/swarm_call", Times::of(&[per_call]), (0, 0), None, &setting)
        .with("agents", count)
        .with("calls", tally.calls)
        .with("prompt_tokens", tally.prompt_tokens)
        .with("shareable_tokens", tally.shareable_tokens)
        .with("served_of_shareable", tally.cached_tokens as f64 / tally.shareable_tokens.max(1) as f64)
        .with("unique_tokens", unique)
        .with("kept_of_unique", (kept * models::batch::PAGE_TOKENS) as f64 / unique as f64)
        .with("compared_alone", compared)
        .with("equal_alone", equal)
        .with("time_of_unshared", per_call / unshared.median)
        .with("schedule_share", if all > 0.0 { schedule / all } else { 0.0 })
        .with("steps_with_nearly_all_running", busy.len())
        .with("most_running", steps.iter().map(|step| step.running).max().unwrap_or(0))
        .with("preempted", steps.iter().map(|step| step.preempted).sum::<usize>());
    let code = measured(&args.rows, |sink| {
        sink.row(row)?;
        Ok(sink.row(Row::new("serve/unshared_call", unshared, (0, 0), None, &setting))?)
    })?;
    if equal < compared {
        let message =
            format!("{} of {compared} agents were told something else than alone", compared - equal);
        return Err(Error::Unsupported(message));
    }
    Ok(code)
}
