//! The prefix cache, preemption and choices change what a request costs, never what it says: tokens and
//! log-probabilities are compared bit for bit with those of the same request alone.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kernels::attention::CacheType;
use models::cpu::CpuRunner;
use models::{Checkpoint, Model, Numerics};
use moebius::engine::{ArchiveOptions, Engine, EngineOptions, EngineParts};
use moebius::prefix::identity;
use moebius::report::StepReport;
use moebius::request::{Event, Generate, Request, SamplingParams, StopRule, Summary};
use moebius::tokenizer::Tokenizer;

/// One of every kind of cache: latent with groups, latent with INT4 and FP8 weights, keys and values with and without
/// windows and sinks.
const CASES: [&str; 5] = ["deepseek_v3_groups", "kimi_k2_int4", "kimi_k2_fp8", "gpt_oss_mxfp4", "glm4_moe"];

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// An engine whose every step is added up.
struct Watched {
    engine: Engine,
    steps: Arc<Mutex<Vec<StepReport>>>,
    vocab: usize,
}

fn options(model: &Model, context: usize, running: usize) -> EngineOptions {
    EngineOptions::new(context, running, model.config.window())
}

fn start(name: &str, model: &Arc<Model>, numerics: Numerics, options: EngineOptions) -> Watched {
    start_with(name, model, numerics, options, None)
}

fn start_with(
    name: &str,
    model: &Arc<Model>,
    numerics: Numerics,
    options: EngineOptions,
    archive: Option<ArchiveOptions>,
) -> Watched {
    let read = |file: &str| Ok(std::fs::read(folder(name).join(file)).ok());
    let tokenizer = Arc::new(Tokenizer::load(&read).unwrap());
    let runner = CpuRunner::new(Arc::clone(model), numerics, options.capacity());
    let steps = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&steps);
    let parts = EngineParts {
        tokenizer,
        pool: Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap()),
        identity: identity(model, &runner, "test"),
        archive,
        runner: Box::new(runner),
        observer: Some(Box::new(move |step| seen.lock().unwrap().push(*step))),
    };
    Watched { engine: Engine::start(parts, options).unwrap(), steps, vocab: model.config.vocab }
}

fn open(name: &str) -> Arc<Model> {
    Model::open(Checkpoint::open(&folder(name)).unwrap()).unwrap()
}

/// What a generation said: ids, and bits of the chosen and of the best log-probabilities.
type Said = (Vec<u32>, Vec<u32>);

fn collect(events: &Receiver<Event>) -> (Said, Summary) {
    let (mut ids, mut bits) = (Vec::new(), Vec::new());
    for event in events {
        match event {
            Event::Prefill { .. } => {}
            Event::Token { id, logprobs, .. } => {
                let logprobs = logprobs.expect("asked for");
                ids.push(id);
                bits.push(logprobs.chosen.to_bits());
                bits.extend(logprobs.top.iter().map(|(_, logprob)| logprob.to_bits()));
            }
            Event::Finished { summary, .. } => return ((ids, bits), summary),
            Event::Failed(message) => panic!("{message}"),
        }
    }
    panic!("no end");
}

impl Watched {
    fn submit(&self, request: Request, choices: usize) -> Vec<Receiver<Event>> {
        let (sinks, receivers): (Vec<_>, Vec<_>) = (0..choices)
            .map(|_| {
                let (sender, receiver) = channel();
                let sink: moebius::request::Sink = Box::new(move |event| sender.send(event).is_ok());
                (sink, receiver)
            })
            .unzip();
        self.engine.submit_choices(request, sinks).unwrap();
        receivers
    }

    /// Ids of a prompt that begins with `shared` tokens that all prompts share.
    fn prompt(&self, seed: usize, shared: usize, length: usize) -> Vec<u32> {
        let id = |seed: usize, i: usize| ((i * 7919 + seed * 104_729 + i * i) % self.vocab) as u32;
        (0..length).map(|i| id(if i < shared { 0 } else { seed }, i)).collect()
    }

    fn sum(&self, of: impl Fn(&StepReport) -> usize) -> usize {
        self.steps.lock().unwrap().iter().map(of).sum()
    }

    /// A report of a step in which but one request of one token ran and used its one block: all else was given back.
    fn wait_idle(&self) -> StepReport {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            // A step's report comes before what ended in it is given back, so it takes another request to see it.
            let (said, _) = collect(&self.submit(request(vec![1], 1, "idle"), 1)[0]);
            assert_eq!(said.0.len(), 1);
            let last = *self.steps.lock().unwrap().last().unwrap();
            if last.running == 1 && last.waiting == 0 && last.full_blocks.used == 1 {
                return last;
            }
            assert!(Instant::now() < deadline, "not given back: {last:?}");
        }
    }
}

fn request(prompt: Vec<u32>, max_tokens: usize, salt: &str) -> Request {
    Request {
        prompt,
        max_tokens: Some(max_tokens),
        sampling: SamplingParams { temperature: 1.0, seed: Some(7), ..SamplingParams::greedy() },
        stop: StopRule::default(),
        logprobs: Some(3),
        skip_special_tokens: true,
        priority: 0,
        cache_salt: salt.to_owned(),
    }
}

/// Lengths and shared lengths around the edges of blocks; how many tokens to generate; how many choices.
const MIX: [(usize, usize, usize, usize); 12] = [
    (150, 130, 40, 1),
    (150, 130, 70, 3),
    (128, 128, 30, 1),
    (129, 128, 66, 2),
    (64, 64, 5, 1),
    (65, 64, 90, 1),
    (1, 1, 130, 1),
    (190, 64, 1, 1),
    (200, 150, 20, 2),
    (63, 63, 2, 4),
    (150, 130, 40, 1),
    (180, 0, 50, 1),
];

impl Watched {
    fn mixed(&self, index: usize, salt: &str) -> (Request, usize) {
        let (length, shared, max_tokens, choices) = MIX[index];
        let mut request = request(self.prompt(index + 1, shared, length), max_tokens, salt);
        request.priority = (index % 3) as i32 - 1;
        (request, choices)
    }
}

#[test]
fn any_mix_gives_what_each_gives_alone() {
    let modes =
        [(Numerics::Reference, None), (Numerics::Model, None), (Numerics::Model, Some(CacheType::Fp8))];
    for (name, (numerics, cache_type)) in CASES.into_iter().flat_map(|name| modes.map(|mode| (name, mode))) {
        let model = open(name);
        let alone = start(name, &model, numerics, EngineOptions { cache_type, ..options(&model, 320, 1) });
        let mut expected = Vec::new();
        for index in 0..MIX.len() {
            let (request, choices) = alone.mixed(index, "");
            let each = (0..choices).map(|choice| {
                // Its own salt: nothing is shared.
                let request = Request { cache_salt: format!("{index} {choice}"), ..request.choice(choice) };
                let (said, summary) = collect(&alone.submit(request, 1)[0]);
                assert_eq!(summary.cached_tokens, 0);
                said
            });
            expected.push(each.collect::<Vec<_>>());
        }
        // Plenty of room; barely room for one; few places.
        for (blocks, running, step_tokens) in [(100, 16, 64), (7, 6, 17), (9, 3, 300)] {
            let place = format!("{name} {numerics:?} {cache_type:?} {blocks} blocks, {running} running");
            let mut options = EngineOptions { cache_type, ..options(&model, 320, running) };
            (options.blocks, options.step_tokens) = (blocks, step_tokens);
            options.window = options.window.map(|(window, _)| (window, blocks));
            let together = start(name, &model, numerics, options);
            for round in 0..2 {
                let all: Vec<_> = (0..MIX.len())
                    .map(|index| {
                        let (request, choices) = together.mixed(index, "");
                        together.submit(request, choices)
                    })
                    .collect();
                for (index, (receivers, expected)) in all.iter().zip(&expected).enumerate() {
                    for (choice, (receiver, expected)) in receivers.iter().zip(expected).enumerate() {
                        let (said, _) = collect(receiver);
                        assert_eq!(
                            &said, expected,
                            "{place}: request {index}, choice {choice}, round {round}"
                        );
                    }
                }
            }
            assert!(together.sum(|step| step.hit_tokens) > 0, "{place}: nothing was found");
            assert_eq!(together.sum(|step| step.preempted) > 0, blocks == 7, "{place}");
            let last = together.wait_idle();
            let counts = last.full_blocks;
            assert_eq!(counts.free + counts.used + counts.cached, blocks, "{place}: {counts:?}");
        }
    }
}

#[test]
fn a_prompt_is_read_once() {
    let name = "kimi_k2_int4";
    let model = open(name);
    let watched = start(name, &model, Numerics::Model, options(&model, 512, 8));
    let ask = |salt: &str, choices| watched.submit(request(watched.prompt(1, 0, 300), 4, salt), choices);
    // At once: the others wait for the first and then read what is left, or share all of it.
    let (many, three) = ((0..4).map(|_| ask("a", 1)).collect::<Vec<_>>(), ask("b", 3));
    let cached: Vec<usize> = many.iter().map(|receivers| collect(&receivers[0]).1.cached_tokens).collect();
    assert_eq!(cached, [0, 256, 256, 256]);
    let cached: Vec<usize> = three.iter().map(|receiver| collect(receiver).1.cached_tokens).collect();
    assert_eq!(cached, [0, 0, 0], "another salt finds nothing");
    assert_eq!(watched.sum(|step| step.prefill_tokens), 2 * 300 + 3 * 44);
    // Later.
    assert_eq!(collect(&ask("a", 1)[0]).1.cached_tokens, 256);
    let longer = request(watched.prompt(1, 0, 321), 4, "a");
    assert_eq!(collect(&watched.submit(longer, 1)[0]).1.cached_tokens, 256);
    let whole = request(watched.prompt(1, 0, 256), 4, "a");
    assert_eq!(collect(&watched.submit(whole, 1)[0]).1.cached_tokens, 192, "one block gives the logits");
}

#[test]
fn a_conversation_finds_what_was_generated() {
    let name = "gpt_oss_mxfp4";
    let model = open(name);
    let watched = start(name, &model, Numerics::Model, options(&model, 1024, 2));
    let mut prompt = watched.prompt(1, 0, 70);
    for turn in 0..4 {
        let length = prompt.len();
        let (said, summary) = collect(&watched.submit(request(prompt.clone(), 100, ""), 1)[0]);
        // All full blocks of what the cache has seen: the last token of an answer is never run.
        let expected = if turn == 0 { 0 } else { (length - 30 - 1) / 64 * 64 };
        assert_eq!(summary.cached_tokens, expected, "turn {turn}");
        prompt.extend(said.0);
        prompt.extend(watched.prompt(turn + 2, 0, 30));
    }
}

#[test]
fn who_leaves_gives_back_and_hands_over() {
    let name = "glm4_moe";
    let model = open(name);
    let watched = start(name, &model, Numerics::Model, options(&model, 512, 4));
    // The first choice leaves while the prompt is read; the second is answered all the same.
    let prompt = watched.prompt(3, 0, 400);
    let alone = collect(&watched.submit(request(prompt.clone(), 10, "x").choice(1), 1)[0]).0;
    let mut choices = watched.submit(request(prompt, 10, "y"), 2);
    drop(choices.remove(0));
    assert_eq!(collect(&choices[0]).0, alone);
    // Everybody leaves.
    for index in 0..MIX.len() {
        let (request, choices) = watched.mixed(index, "z");
        drop(watched.submit(Request { max_tokens: Some(200), ..request }, choices));
    }
    watched.wait_idle();
}

/// A folder of a test's own, gone with it.
struct TempFolder(PathBuf);

impl TempFolder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("moebius-cache-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Self(path)
    }

    fn archive(&self) -> Option<ArchiveOptions> {
        Some(ArchiveOptions { folder: self.0.clone(), limit_bytes: 1 << 30 })
    }

    /// The files of blocks.
    fn blocks(&self) -> Vec<PathBuf> {
        let entries = |path: &std::path::Path| {
            std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
        };
        let folders = entries(&self.0).into_iter().filter(|path| path.is_dir());
        folders.flat_map(|folder| entries(&folder)).collect()
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_restart_finds_what_was_saved_and_trusts_no_damage() {
    for name in CASES {
        let model = open(name);
        let folder = TempFolder::new(name);
        let start = || start_with(name, &model, Numerics::Model, options(&model, 512, 2), folder.archive());
        let ask = |watched: &Watched, length: usize| {
            collect(&watched.submit(request(watched.prompt(1, 0, length), 8, "a"), 1)[0])
        };
        let cold = start();
        let (expected, summary) = ask(&cold, 300);
        assert_eq!(summary.cached_tokens, 0);
        drop(cold);
        assert_eq!(folder.blocks().len(), 4, "{name}: an engine that ends saves what it has");

        let warm = start();
        let (said, summary) = ask(&warm, 300);
        assert_eq!((said, summary.cached_tokens), (expected.clone(), 256), "{name}");
        let (_, summary) = ask(&warm, 200);
        assert_eq!(summary.cached_tokens, 192, "{name}: from memory now");
        drop(warm);

        // The third block is damaged: the first two serve, and it is computed and saved again.
        let mut blocks = folder.blocks();
        // Of one chain the deepest is marked as the oldest.
        blocks.sort_by_key(|path| path.metadata().unwrap().modified().unwrap());
        let mut bytes = std::fs::read(&blocks[1]).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&blocks[1], bytes).unwrap();
        let wary = start();
        let (said, summary) = ask(&wary, 300);
        assert_eq!((said, summary.cached_tokens), (expected.clone(), 128), "{name}: damage is not trusted");
        drop(wary);
        let healed = start();
        let (said, summary) = ask(&healed, 300);
        assert_eq!((said, summary.cached_tokens), (expected, 256), "{name}");
    }
}

#[test]
fn what_memory_had_no_room_for_comes_back_from_disk() {
    for name in ["kimi_k2_int4", "gpt_oss_mxfp4"] {
        let model = open(name);
        let folder = TempFolder::new(&format!("small-{name}"));
        let mut options = options(&model, 384, 2);
        (options.blocks, options.window) = (6, options.window.map(|(window, _)| (window, 6)));
        let watched = start_with(name, &model, Numerics::Model, options, folder.archive());
        let ask = |seed| watched.submit(request(watched.prompt(seed, 0, 300), 8, ""), 1).remove(0);
        let expected: Vec<Said> = (0..4).map(|seed| collect(&ask(seed)).0).collect();
        // One leaves while its blocks are on their way.
        drop(ask(0));
        let mut hits = 0;
        for round in 0..3 {
            for (seed, expected) in expected.iter().enumerate() {
                let (said, summary) = collect(&ask(seed));
                assert_eq!(&said, expected, "{name}: prompt {seed}, round {round}");
                hits += summary.cached_tokens;
            }
        }
        // Memory holds one prompt; a block may be gone before the disk had time for it.
        assert!(hits >= 8 * 256, "{name}: {hits} tokens");
        assert!(watched.sum(|step| step.restoring) > 0);
    }
}

/// A small generator, so that traffic can be replayed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % end
    }
}

#[test]
fn random_traffic_is_answered_as_if_each_request_were_alone() {
    let (mut preempted, mut restoring) = (0, 0);
    for (name, cache_type) in
        [("kimi_k2_int4", None), ("gpt_oss_mxfp4", None), ("kimi_k2_int4", Some(CacheType::Fp8))]
    {
        let model = open(name);
        let folder = TempFolder::new(&format!("traffic-{name}-{cache_type:?}"));
        let one = EngineOptions { cache_type, ..options(&model, 512, 1) };
        let alone = start(name, &model, Numerics::Model, one);
        let mut few = EngineOptions { cache_type, step_tokens: 96, ..options(&model, 512, 5) };
        (few.blocks, few.window) = (12, few.window.map(|(window, _)| (window, 12)));
        let together = start_with(name, &model, Numerics::Model, few, folder.archive());
        let mut random = Random(name.len() as u64);
        let (mut waiting, mut compared) = (Vec::new(), 0);
        for index in 0..120 {
            let (length, shared) = (1 + random.below(400), random.below(400));
            let ask = Request {
                priority: random.below(3) as i32,
                ..request(together.prompt(random.below(6), shared, length), 1 + random.below(60), "")
            };
            let mut receivers = together.submit(ask.clone(), 1 + random.below(3));
            // Some leave at once, some later, some of several choices only.
            if random.below(4) == 0 {
                receivers.truncate(random.below(receivers.len() + 1));
            }
            waiting.push((index, ask, receivers));
            while waiting.len() > 8 || (index == 119 && !waiting.is_empty()) {
                let (index, ask, receivers) = waiting.remove(random.below(waiting.len()));
                let left = random.below(6) == 0;
                for (choice, receiver) in receivers.into_iter().enumerate().filter(|_| !left) {
                    let salt = format!("{index} {choice}");
                    let expected = Request { cache_salt: salt, ..ask.choice(choice) };
                    let expected = collect(&alone.submit(expected, 1)[0]).0;
                    assert_eq!(collect(&receiver).0, expected, "{name}: request {index}, choice {choice}");
                    compared += 1;
                }
            }
        }
        assert!(compared > 100, "{compared} answers");
        preempted += together.sum(|step| step.preempted);
        restoring += together.sum(|step| step.restoring);
        together.wait_idle();
    }
    assert!(preempted > 0 && restoring > 0, "{preempted} preempted, {restoring} steps with restores");
}

#[test]
fn ten_thousand_may_wait_and_one_more_is_refused() {
    let name = "glm4_moe";
    let model = open(name);
    let options = EngineOptions { waiting: 10_000, ..options(&model, 512, 8) };
    let watched = start(name, &model, Numerics::Model, options);
    // While this runs nobody else's turn comes before its chunk is done.
    let (sender, receiver) = channel();
    let (mut accepted, mut refused) = (0, 0);
    for index in 0..12_000 {
        let sender = sender.clone();
        let ask = request(vec![index % 50 + 1, 3], 1, "");
        let sink: moebius::request::Sink = Box::new(move |event| match event {
            Event::Finished { .. } => sender.send(true).is_ok(),
            Event::Failed(_) => sender.send(false).is_ok(),
            _ => true,
        });
        match watched.engine.submit(ask, sink) {
            Ok(()) => accepted += 1,
            Err(error) => {
                assert_eq!(error, moebius::request::SubmitError::QueueFull { limit: 10_000 });
                refused += 1;
            }
        }
    }
    drop(sender);
    assert!(accepted >= 10_000, "{accepted} accepted, {refused} refused");
    assert_eq!(receiver.iter().filter(|done| *done).count(), accepted);
    watched.wait_idle();
}

#[test]
fn two_engines_share_a_folder_and_a_folder_that_cannot_be_is_said() {
    let name = "kimi_k2_int4";
    let model = open(name);
    let folder = TempFolder::new("two");
    let start = || start_with(name, &model, Numerics::Model, options(&model, 512, 2), folder.archive());
    let ask = |watched: &Watched, seed| {
        collect(&watched.submit(request(watched.prompt(seed, 0, 300), 8, ""), 1)[0])
    };
    let first = start();
    let (expected, _) = ask(&first, 1);
    let deadline = Instant::now() + Duration::from_secs(20);
    while folder.blocks().iter().filter(|path| path.extension().is_some_and(|end| end == "kv")).count() < 4 {
        assert!(Instant::now() < deadline, "blocks are saved while the engine runs: {:?}", folder.blocks());
        std::thread::sleep(Duration::from_millis(5));
    }
    // The second only reads, beside the first, which goes on writing.
    let second = start();
    let (other, _) = ask(&first, 2);
    let (said, summary) = ask(&second, 1);
    assert_eq!((said, summary.cached_tokens), (expected, 256));
    assert_eq!(ask(&second, 2).0, other);
    drop(second);
    assert_eq!(ask(&first, 2).0, other);

    let file = folder.0.join("file");
    std::fs::write(&file, b"not a folder").unwrap();
    let runner = CpuRunner::new(Arc::clone(&model), Numerics::Model, options(&model, 512, 1).capacity());
    let read = |file: &str| Ok(std::fs::read(self::folder(name).join(file)).ok());
    let parts = EngineParts {
        tokenizer: Arc::new(Tokenizer::load(&read).unwrap()),
        pool: Arc::new(rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap()),
        identity: [0; 32],
        archive: Some(ArchiveOptions { folder: file.join("cache"), limit_bytes: 1 << 20 }),
        runner: Box::new(runner),
        observer: None,
    };
    let error = Engine::start(parts, options(&model, 512, 1)).err().expect("no folder can be there");
    assert!(error.to_string().contains("file/cache"), "{error}");
}
