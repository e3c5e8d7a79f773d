//! Several prompts at once through one engine; each answer is what it would be alone.
//!
//! `cargo run --release --example batch -- [MODEL]`

use std::sync::mpsc::channel;

use moebius::error::Error;
use moebius::request::{Event, Generate};
use moebius::session::{Session, SessionOptions};

const PROMPTS: [&str; 4] = ["ROMEO:", "JULIET:", "First Citizen:", "What is a man"];

fn main() -> Result<(), Error> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "demo".into());
    let options = SessionOptions { sequences: PROMPTS.len(), ..SessionOptions::default() };
    let session = Session::open(&model, &options)?;

    let (sender, events) = channel();
    for (index, prompt) in PROMPTS.iter().enumerate() {
        let mut request = session.loaded.request(session.prompt(prompt)?);
        request.sampling.seed = Some(7);
        request.max_tokens = Some(48);
        let sender = sender.clone();
        session.engine.submit(request, Box::new(move |event| sender.send((index, event)).is_ok()))?;
    }
    drop(sender);

    let mut answers = vec![String::new(); PROMPTS.len()];
    for (index, event) in events {
        match event {
            Event::Token { text, .. } => answers[index].push_str(&text),
            Event::Finished { text, summary } => {
                answers[index].push_str(&text);
                eprintln!("{}: {} tokens", PROMPTS[index], summary.completion_tokens);
            }
            Event::Failed(message) => return Err(Error::Unsupported(message)),
            Event::Prefill { .. } => {}
        }
    }
    for (prompt, answer) in PROMPTS.iter().zip(&answers) {
        println!("--- {prompt}\n{answer}");
        let alone = SessionOptions::default();
        let mut request = session.loaded.request(session.prompt(prompt)?);
        request.sampling.seed = Some(7);
        request.max_tokens = Some(48);
        let alone = Session::open(&model, &alone)?.generate(request, |_| true)?;
        assert_eq!(alone.text, *answer, "the batch changed an answer");
    }
    Ok(())
}
