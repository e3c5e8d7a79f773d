//! A conversation on the terminal: history, `/reset`, `/exit`; Ctrl-C stops the answer.

use std::io::{BufRead, Write};
use std::process::ExitCode;

use serde_json::{Value, json};

use super::run::{PromptForm, statistics, stream};
use super::{SamplingArgs, interrupt, print};
use crate::error::Error;
use crate::session::Session;
use crate::tokenizer::Specials;

/// Talks until the input ends or the user leaves.
pub fn chat(session: &Session, form: &PromptForm, sampling: &SamplingArgs) -> Result<ExitCode, Error> {
    eprintln!("/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer");
    let raw = form.raw || session.loaded.template.is_none();
    let mut history = History::new(form.clone(), raw);
    let mut input = std::io::stdin().lock();
    loop {
        eprint!("> ");
        let _ = std::io::stderr().flush();
        let mut line = String::new();
        match input.read_line(&mut line) {
            Ok(0) => return Ok(ExitCode::SUCCESS),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::Io("standard input".into(), error)),
        }
        if interrupt::take() {
            eprintln!("(/exit leaves)");
        }
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => return Ok(ExitCode::SUCCESS),
            "/reset" => {
                history = History::new(form.clone(), raw);
                eprintln!("forgotten");
                continue;
            }
            text => history.push("user", text),
        }
        // A question that cannot be answered is taken back; the conversation goes on.
        match answer(session, &history, sampling) {
            Ok(text) => history.push("assistant", &text),
            Err(error) => {
                eprintln!("error: {error}");
                history.pop();
            }
        }
        interrupt::take();
    }
}

fn answer(session: &Session, history: &History, sampling: &SamplingArgs) -> Result<String, Error> {
    let mut request = session.loaded.request(history.ids(session)?);
    let room = session.context.saturating_sub(request.prompt.len()).max(1);
    sampling.apply(&mut request);
    request.max_tokens = request.max_tokens.map(|n| n.min(room));
    let answer = stream(session, request, true)?;
    print("\n")?;
    statistics(session, &answer.summary);
    Ok(answer.text)
}

/// What was said so far.
struct History {
    form: PromptForm,
    raw: bool,
    messages: Vec<Value>,
}

impl History {
    fn new(form: PromptForm, raw: bool) -> Self {
        let system = form.system.as_ref().map(|system| json!({"role": "system", "content": system}));
        Self { messages: system.into_iter().collect(), form, raw }
    }

    fn push(&mut self, role: &str, content: &str) {
        self.messages.push(json!({"role": role, "content": content}));
    }

    fn pop(&mut self) {
        self.messages.pop();
    }

    fn ids(&self, session: &Session) -> Result<Vec<u32>, Error> {
        if !self.raw {
            return session.loaded.chat_prompt(&self.messages, self.form.content_specials);
        }
        let lines = self.messages.iter().filter_map(|message| message["content"].as_str());
        let text = lines.collect::<Vec<_>>().join("\n");
        Ok(session.loaded.tokenizer.encode(&text, Specials::Parse)?)
    }
}
