//! Streams an answer: `cargo run --release --example generate -- [MODEL] [PROMPT]`.

use std::io::Write;

use moebius::error::Error;
use moebius::session::{Session, SessionOptions};

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| "demo".into());
    let prompt = args.next().unwrap_or_else(|| "JULIET:".into());

    let session = Session::open(&model, &SessionOptions::default())?;
    let answer = session.complete(&prompt, |text| {
        print!("{text}");
        let _ = std::io::stdout().flush();
    })?;
    println!();

    let summary = &answer.summary;
    eprintln!(
        "{} prompt tokens in {:.3} s, {} tokens in {:.3} s",
        summary.prompt_tokens, summary.prefill_seconds, summary.completion_tokens, summary.decode_seconds
    );
    Ok(())
}
