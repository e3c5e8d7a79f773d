//! `moebius run`: one answer, streamed, with its statistics.

use std::io::{IsTerminal, Read};
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{CacheArgs, ComputeArgs, DEMO, SamplingArgs, chat, interrupt, print, usage};
use crate::error::Error;
use crate::memory::{Bytes, peak_resident_bytes};
use crate::progress::{Progress, Unit};
use crate::request::{Event, Summary};
use crate::session::{Answer, Session, SessionOptions};
use crate::tokenizer::Specials;

/// What the built-in model continues when it is asked for nothing.
const DEMO_PROMPT: &str = "ROMEO:";
/// Longest prompt read from standard input.
const MAX_PROMPT_BYTES: u64 = 64 << 20;

#[derive(Args)]
pub struct RunArgs {
    /// Checkpoint folder, hub id `org/name[@revision]`, or `demo`
    #[arg(default_value = DEMO)]
    model: String,
    /// What to answer; read from standard input if that is no terminal
    prompt: Option<String>,
    /// Continue the prompt as plain text, without the model's chat form
    #[arg(long)]
    raw: bool,
    /// System message
    #[arg(long)]
    system: Option<String>,
    /// Let special-token strings in messages become control tokens
    #[arg(long)]
    parse_content_specials: bool,
    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// How messages become prompts.
#[derive(Clone)]
pub struct PromptForm {
    /// Continue plain text.
    pub raw: bool,
    /// First message.
    pub system: Option<String>,
    /// Whether content may hold control tokens.
    pub content_specials: Specials,
}

impl RunArgs {
    fn form(&self) -> PromptForm {
        let content_specials = if self.parse_content_specials { Specials::Parse } else { Specials::Plain };
        PromptForm { raw: self.raw, system: self.system.clone(), content_specials }
    }
}

/// `moebius` alone: the built-in model shows itself, then chats if there is somebody to chat with.
pub fn demo() -> Result<ExitCode, Error> {
    let session = Session::open(DEMO, &SessionOptions::default())?;
    interrupt::install();
    print(&format!("{DEMO_PROMPT}\n"))?;
    let request = session.loaded.request(session.prompt(DEMO_PROMPT)?);
    let answer = stream(&session, request, true)?;
    print("\n")?;
    statistics(&session, &answer.summary);
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() && !interrupt::take() {
        eprintln!("This is the built-in model; `moebius run FOLDER` runs another. Say something:");
        let form = PromptForm { raw: false, system: None, content_specials: Specials::Plain };
        return chat::chat(&session, &form, &SamplingArgs::default());
    }
    Ok(ExitCode::SUCCESS)
}

/// `moebius run`.
pub fn run(args: &RunArgs) -> Result<ExitCode, Error> {
    let options = args.cache.apply(&args.compute, args.compute.options());
    let interactive = args.prompt.is_none() && std::io::stdin().is_terminal();
    if interactive && args.json {
        return Ok(usage("--json needs a PROMPT"));
    }
    let mut prompt = args.prompt.clone();
    if prompt.is_none() && !interactive {
        let piped = read_stdin()?;
        prompt =
            if piped.is_empty() && args.model == DEMO { Some(DEMO_PROMPT.to_owned()) } else { Some(piped) };
    }
    if prompt.as_deref().is_some_and(str::is_empty) {
        return Ok(usage("the prompt is empty"));
    }

    let session = Session::open(&args.model, &options)?;
    eprintln!("{}", session.plan_line());
    interrupt::install();
    let Some(prompt) = prompt else { return chat::chat(&session, &args.form(), &args.sampling) };

    let ids = prompt_ids(&session, &args.form(), &prompt)?;
    let mut request = session.loaded.request(ids);
    request.max_tokens = request.max_tokens.map(|n| n.min(room(&session, request.prompt.len())));
    args.sampling.apply(&mut request);
    let answer = stream(&session, request, !args.json)?;
    if args.json {
        print(&format!("{}\n", result(&session, &answer)))?;
    } else {
        print("\n")?;
        statistics(&session, &answer.summary);
    }
    Ok(ExitCode::SUCCESS)
}

/// Tokens the context leaves after a prompt; at least 1, so that a prompt that fills it is an error
/// that names the context rather than a limit of 0.
fn room(session: &Session, prompt_tokens: usize) -> usize {
    session.context.saturating_sub(prompt_tokens).max(1)
}

fn prompt_ids(session: &Session, form: &PromptForm, prompt: &str) -> Result<Vec<u32>, Error> {
    if form.raw || session.loaded.template.is_none() {
        if !form.raw {
            eprintln!("{} has no chat template; continuing plain text", session.loaded.name);
        }
        return Ok(session.loaded.tokenizer.encode(prompt, Specials::Parse)?);
    }
    let mut messages = Vec::new();
    messages.extend(form.system.as_ref().map(|system| json!({"role": "system", "content": system})));
    messages.push(json!({"role": "user", "content": prompt}));
    session.loaded.chat_prompt(&messages, form.content_specials)
}

fn read_stdin() -> Result<String, Error> {
    let mut text = String::new();
    let read = std::io::stdin().take(MAX_PROMPT_BYTES + 1).read_to_string(&mut text);
    read.map_err(|error| Error::Io("standard input".into(), error))?;
    if text.len() as u64 > MAX_PROMPT_BYTES {
        return Err(Error::Unsupported(format!("the prompt is longer than {MAX_PROMPT_BYTES} bytes")));
    }
    Ok(text)
}

/// Runs a request, streaming its text if asked; Ctrl-C ends it.
pub fn stream(session: &Session, request: crate::request::Request, show: bool) -> Result<Answer, Error> {
    let mut progress = Progress::new("reading the prompt", Unit::Tokens);
    let mut failed = None;
    let answer = session.generate(request, |event| {
        match event {
            Event::Prefill { done, total } => progress.set(*done as u64, *total as u64),
            Event::Token { text, .. } | Event::Finished { text, .. } => {
                progress.clear();
                if show && failed.is_none() {
                    failed = print(text).err();
                }
            }
            Event::Failed(_) => {}
        }
        failed.is_none() && !interrupt::asked()
    })?;
    failed.map_or(Ok(answer), Err)
}

/// Rates of a generation: prompt tokens and generated tokens per second.
fn rates(summary: &Summary) -> (f64, f64) {
    let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    // The first token comes out of the last step of the prompt.
    let decoded = summary.completion_tokens.saturating_sub(1);
    (rate(summary.prompt_tokens, summary.prefill_seconds), rate(decoded, summary.decode_seconds))
}

/// One line of statistics on stderr.
pub fn statistics(session: &Session, summary: &Summary) {
    let (prefill, decode) = rates(summary);
    eprintln!(
        "[{} prompt tokens, {prefill:.1}/s; {} tokens, {decode:.1}/s; first after {:.2} s; loaded in {:.2} s; \
         peak memory {}; {} runner, {} numerics, {} threads; ended by {}]",
        summary.prompt_tokens,
        summary.completion_tokens,
        summary.time_to_first_token_seconds,
        session.load_seconds,
        Bytes(peak_resident_bytes()),
        session.runner,
        session.numerics,
        session.threads,
        summary.reason.as_str(),
    );
}

/// The object of `run --json`.
fn result(session: &Session, answer: &Answer) -> serde_json::Value {
    let summary = &answer.summary;
    let (prefill, decode) = rates(summary);
    json!({
        "text": answer.text,
        "token_ids": answer.token_ids,
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
        "finish_reason": summary.reason.as_str(),
        "load_seconds": session.load_seconds,
        "time_to_first_token_seconds": summary.time_to_first_token_seconds,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "peak_rss_bytes": peak_resident_bytes(),
        "numerics": session.numerics,
        "runner": session.runner,
        "threads": session.threads,
    })
}
