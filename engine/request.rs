//! What a caller asks of the engine and what it gets back: plain data, no tensors, no HTTP.

use std::fmt;

/// How the next token is chosen from the logits. The neutral value of each field switches it off.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 = greedy (the lowest id of the largest logits).
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 = all.
    pub top_k: usize,
    /// Keep the smallest set whose probability reaches this; 1 = all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0 = none.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 = off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output; 0 = off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output; 0 = off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, same prompt, same model and numerics: same tokens. `None` = drawn at random.
    pub seed: Option<u64>,
}

impl SamplingParams {
    /// Greedy decoding.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// When a generation ends before its token limit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StopRule {
    /// Ids that end the generation; not part of the text. Empty with `ignore_eos`.
    pub token_ids: Vec<u32>,
    /// Texts that end the generation; cut from the text unless `include_in_output`.
    pub strings: Vec<String>,
    /// Keep the stop string (not the stop token) in the text.
    pub include_in_output: bool,
    /// Stop tokens are not chosen before this many tokens.
    pub min_tokens: usize,
}

/// One generation to run.
#[derive(Clone, Debug)]
pub struct Request {
    /// Prompt ids; at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to generate; `None` = what the context leaves.
    pub max_tokens: Option<usize>,
    /// Choice of tokens.
    pub sampling: SamplingParams,
    /// End of the generation.
    pub stop: StopRule,
    /// `Some(n)`: with each token its log-probability and the n most likely ones.
    pub logprobs: Option<usize>,
    /// Control tokens in the output are left out of the text.
    pub skip_special_tokens: bool,
    /// Lower goes first; 0 is usual. A level is worth [`HEAD_START`](crate::scheduler::HEAD_START) arrivals.
    pub priority: i32,
    /// Cached prefixes are shared among requests of the same salt only: whoever has another cannot even learn from
    /// the time it takes that a prompt was seen before.
    pub cache_salt: String,
}

impl Request {
    /// The same request for its i-th choice.
    pub fn choice(&self, index: usize) -> Self {
        Self { sampling: self.choice_sampling(index), ..self.clone() }
    }

    /// How the i-th choice chooses its tokens.
    pub fn choice_sampling(&self, index: usize) -> SamplingParams {
        let seed = self.sampling.seed.map(|seed| seed.wrapping_add(index as u64));
        SamplingParams { seed, ..self.sampling.clone() }
    }
}

/// Natural logarithms of probabilities under the unmodified logits.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token or stop string.
    Stop,
    /// The token limit or the end of the context.
    Length,
    /// The caller went away or asked.
    Cancelled,
}

impl FinishReason {
    /// The name used in `run --json` and by the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Counts and times of a finished generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Why it ended.
    pub reason: FinishReason,
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Of these, tokens that came from the cache when the request began to run.
    pub cached_tokens: usize,
    /// Generated tokens, the stop token included.
    pub completion_tokens: usize,
    /// From submission to the first step that served it.
    pub queue_seconds: f64,
    /// From submission to the first token.
    pub time_to_first_token_seconds: f64,
    /// Time of the steps that read the prompt.
    pub prefill_seconds: f64,
    /// From the first token to the last.
    pub decode_seconds: f64,
}

impl Summary {
    /// Of a generation that has done nothing.
    pub fn unstarted(reason: FinishReason, prompt_tokens: usize) -> Self {
        Self {
            reason,
            prompt_tokens,
            cached_tokens: 0,
            completion_tokens: 0,
            queue_seconds: 0.0,
            time_to_first_token_seconds: 0.0,
            prefill_seconds: 0.0,
            decode_seconds: 0.0,
        }
    }
}

/// What a request's sink receives: any `Prefill`, any `Token`, one of the last two. (After a token `Prefill` comes again
/// only where the request gave way to others and reads anew what it had.)
#[derive(Clone, Debug)]
pub enum Event {
    /// Progress on what is to be read before the next token; also sent now and then while the request waits.
    Prefill {
        /// Tokens read so far.
        done: usize,
        /// Tokens of the prompt, and of the output where that is read anew.
        total: usize,
    },
    /// One generated token. `text` is what became printable by it: whole UTF-8 characters, possibly
    /// none, held back while it may be the beginning of a stop string.
    Token {
        /// Its id.
        id: u32,
        /// New text.
        text: String,
        /// If asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The end.
    Finished {
        /// What was still held back.
        text: String,
        /// Counts and times.
        summary: Summary,
    },
    /// The engine failed on this request.
    Failed(String),
}

/// Why a request was not accepted. The engine is unchanged.
#[derive(Clone, Debug, PartialEq)]
pub enum SubmitError {
    /// No prompt token.
    EmptyPrompt,
    /// Prompt (plus the demanded tokens) exceed the context.
    ContextExceeded {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens asked for, at least 1.
        max_tokens: usize,
        /// What there is.
        context: usize,
    },
    /// A field is out of range.
    Invalid {
        /// The field, as the API names it.
        param: &'static str,
        /// What is wrong.
        message: String,
    },
    /// The waiting queue is full.
    QueueFull {
        /// Requests that may wait.
        limit: usize,
    },
    /// The engine is stopping or has failed.
    Stopped,
}

impl fmt::Display for SubmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EmptyPrompt => write!(f, "the prompt has no tokens"),
            Self::ContextExceeded { prompt_tokens, max_tokens, context } => write!(
                f,
                "the context is {context} tokens, but {prompt_tokens} prompt tokens and {max_tokens} tokens to generate were asked for"
            ),
            Self::Invalid { param, message } => write!(f, "{param}: {message}"),
            Self::QueueFull { limit } => write!(f, "{limit} requests are already waiting"),
            Self::Stopped => write!(f, "the engine has stopped"),
        }
    }
}

impl std::error::Error for SubmitError {}

/// Receives a request's events on the engine's thread; must not block. `false` cancels.
pub type Sink = Box<dyn FnMut(Event) -> bool + Send>;

/// The one seam between front ends and the engine; tests put a scripted one here.
pub trait Generate: Send + Sync {
    /// Queues a request.
    ///
    /// # Errors
    /// [`SubmitError`], before anything is generated.
    fn submit(&self, request: Request, sink: Sink) -> Result<(), SubmitError>;

    /// Queues one generation per sink for the same prompt. Choice i is drawn with the seed plus i. (An engine reads
    /// the prompt once for all of them.)
    ///
    /// # Errors
    /// [`SubmitError`]; sinks that were accepted before it still get their events.
    fn submit_choices(&self, request: Request, sinks: Vec<Sink>) -> Result<(), SubmitError> {
        sinks.into_iter().enumerate().try_for_each(|(choice, sink)| self.submit(request.choice(choice), sink))
    }

    /// Longest prompt plus output, in tokens.
    fn context(&self) -> usize;

    /// Size of the logits.
    fn vocab(&self) -> usize;
}
