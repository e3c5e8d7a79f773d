//! A model with a running engine: the short way in for the command line, examples and tests.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use kernels::attention::CacheType;
use models::cpu::CpuRunner;
use models::reference::ReferenceRunner;
use models::{Capacity, Model, Numerics, Runner};
use serde_json::json;

use crate::engine::{ArchiveOptions, Engine, EngineParts};
use crate::error::Error;
use crate::loaded::{DenseFormat, Loaded};
use crate::memory::{self, MemoryPlan, Weights, Wishes};
use crate::prefix;
use crate::report::Observer;
use crate::request::{Event, Generate, Request, Summary};
use crate::tokenizer::Specials;

/// Which implementation computes (`--runner`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RunnerKind {
    /// Plain candle operations in f32: slow, readable, the oracle.
    Reference,
    /// Our kernels on the host's cores.
    #[default]
    Cpu,
}

/// How to run a model; the default is the best this machine has.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// Threads of the kernels; `None` = one per core.
    pub threads: Option<usize>,
    /// `None` = `model` on the cpu runner; the reference runner always computes in f32.
    pub numerics: Option<Numerics>,
    /// Implementation.
    pub runner: RunnerKind,
    /// Longest prompt plus output; `None` = planned by what fits.
    pub context: Option<usize>,
    /// Requests that run at a time; 0 counts as 1.
    pub sequences: usize,
    /// Form of the float weights.
    pub dense: DenseFormat,
    /// Bytes of the KV pool; `None` = planned by what fits.
    pub kv_memory: Option<usize>,
    /// How cached values are stored; `None` = as the numerics say.
    pub kv_type: Option<CacheType>,
    /// Most tokens of a step, and so of a chunk of a prompt; `None` = 512.
    pub step_tokens: Option<usize>,
    /// Where cached prefixes outlive the engine; `None` = nowhere.
    pub archive: Option<ArchiveOptions>,
}

impl SessionOptions {
    /// The numerics in force.
    pub fn numerics(&self) -> Numerics {
        match self.runner {
            RunnerKind::Reference => Numerics::Reference,
            RunnerKind::Cpu => self.numerics.unwrap_or(Numerics::Model),
        }
    }

    /// What the memory plan is asked for.
    pub fn wishes(&self) -> Wishes {
        Wishes {
            context: self.context,
            kv_memory: self.kv_memory,
            cache_type: self.kv_type,
            sequences: self.sequences,
            step_tokens: self.step_tokens,
            store: self.archive.is_some(),
        }
    }

    /// The kernels' threads.
    ///
    /// # Errors
    /// If the system cannot start them.
    pub fn pool(&self) -> Result<Arc<rayon::ThreadPool>, Error> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.threads.unwrap_or(0));
        let pool = pool.thread_name(|index| format!("kernel-{index}")).build();
        pool.map(Arc::new).map_err(|error| Error::Unsupported(format!("cannot start threads: {error}")))
    }

    /// A runner of the chosen kind.
    ///
    /// # Errors
    /// If it cannot be made for the model.
    pub fn runner(&self, model: &Arc<Model>, capacity: Capacity) -> Result<Box<dyn Runner>, Error> {
        Ok(match self.runner {
            RunnerKind::Reference => Box::new(ReferenceRunner::new(Arc::clone(model), capacity)?),
            RunnerKind::Cpu => Box::new(CpuRunner::new(Arc::clone(model), self.numerics(), capacity)),
        })
    }
}

/// A loaded model and its engine.
pub struct Session {
    /// Model, tokenizer, template, defaults.
    pub loaded: Loaded,
    /// The engine.
    pub engine: Arc<Engine>,
    /// What it takes.
    pub plan: MemoryPlan,
    /// Longest prompt plus output.
    pub context: usize,
    /// Threads of the kernels.
    pub threads: usize,
    /// Name of the runner.
    pub runner: &'static str,
    /// The numerics in force, and what is coarser by request.
    pub numerics: String,
    /// From the start of loading to a running engine.
    pub load_seconds: f64,
}

/// A finished generation.
#[derive(Debug)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its ids, a stop token included.
    pub token_ids: Vec<u32>,
    /// Counts and times.
    pub summary: Summary,
}

impl Session {
    /// Opens a model by name and starts an engine for it.
    ///
    /// # Errors
    /// If the model cannot be opened, or the machine cannot hold the plan.
    pub fn open(name: &str, options: &SessionOptions) -> Result<Self, Error> {
        let begun = Instant::now();
        let mut session = Self::start(Loaded::open_with(name, options.dense)?, options)?;
        session.load_seconds = begun.elapsed().as_secs_f64();
        Ok(session)
    }

    /// Starts an engine for a loaded model.
    ///
    /// # Errors
    /// If the machine cannot hold the plan, or the archive cannot be opened.
    pub fn start(loaded: Loaded, options: &SessionOptions) -> Result<Self, Error> {
        Self::start_watched(loaded, options, None)
    }

    /// [`Session::start`] with somebody who sees every step.
    ///
    /// # Errors
    /// As [`Session::start`].
    pub fn start_watched(
        loaded: Loaded,
        options: &SessionOptions,
        observer: Option<Observer>,
    ) -> Result<Self, Error> {
        let begun = Instant::now();
        let model = &loaded.model;
        let weights = Weights::of(model);
        let (limits, plan) = memory::fit(&model.config, weights, options.numerics(), &options.wishes())?;
        let pool = options.pool()?;
        let threads = pool.current_num_threads();
        let runner = options.runner(model, limits.capacity())?;
        let cache_type = limits.cache_type.unwrap_or(runner.numerics().cache_type());
        let name = runner.name();
        let numerics = model.numerics_label(runner.numerics()) + memory::cache_type_label(cache_type);
        let identity = prefix::identity(model, &*runner, &format!("{cache_type:?}"));
        let parts = EngineParts {
            runner,
            tokenizer: Arc::clone(&loaded.tokenizer),
            pool,
            identity,
            archive: options.archive.clone(),
            observer,
        };
        let engine = Engine::start(parts, limits)?;
        Ok(Self {
            engine: Arc::new(engine),
            plan,
            context: limits.context,
            threads,
            runner: name,
            numerics,
            load_seconds: begun.elapsed().as_secs_f64(),
            loaded,
        })
    }

    /// What the model takes, in one line for the start.
    pub fn plan_line(&self) -> String {
        format!("{}: context {} tokens; {}", self.loaded.name, self.context, self.plan)
    }

    /// Ids for a prompt: in chat form if the model has one, else the plain text.
    ///
    /// # Errors
    /// If the template refuses.
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>, Error> {
        if self.loaded.template.is_some() {
            let messages = [json!({"role": "user", "content": text})];
            return self.loaded.chat_prompt(&messages, Specials::Plain);
        }
        Ok(self.loaded.tokenizer.encode(text, Specials::Parse)?)
    }

    /// Answers a prompt with the model's defaults; `each` gets the text as it comes.
    ///
    /// # Errors
    /// If the request is refused or the engine fails.
    pub fn complete(&self, prompt: &str, mut each: impl FnMut(&str)) -> Result<Answer, Error> {
        let request = self.loaded.request(self.prompt(prompt)?);
        self.generate(request, |event| {
            if let Event::Token { text, .. } | Event::Finished { text, .. } = event {
                each(text);
            }
            true
        })
    }

    /// Runs a request; `each` sees every event and ends the generation with `false`.
    ///
    /// # Errors
    /// If the request is refused or the engine fails.
    pub fn generate(&self, request: Request, mut each: impl FnMut(&Event) -> bool) -> Result<Answer, Error> {
        let (sender, receiver) = channel();
        let cancelled = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let flag = Arc::clone(&cancelled);
        let sink =
            move |event| sender.send(event).is_ok() && !flag.load(std::sync::atomic::Ordering::Relaxed);
        self.engine.submit(request, Box::new(sink))?;
        let (mut text, mut token_ids) = (String::new(), Vec::new());
        for event in receiver {
            if !each(&event) {
                cancelled.store(true, std::sync::atomic::Ordering::Relaxed);
            }
            match event {
                Event::Prefill { .. } => {}
                Event::Token { id, text: more, .. } => {
                    token_ids.push(id);
                    text.push_str(&more);
                }
                Event::Finished { text: more, summary } => {
                    text.push_str(&more);
                    return Ok(Answer { text, token_ids, summary });
                }
                Event::Failed(message) => return Err(Error::Unsupported(message)),
            }
        }
        Err(Error::Submit(crate::request::SubmitError::Stopped))
    }
}
