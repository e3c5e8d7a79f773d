//! The engine's loop: many requests at once give what each gives alone, and callers who leave free
//! what they held.

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use moebius::request::{Event, FinishReason, Generate, Request, SamplingParams, SubmitError};
use moebius::session::{Session, SessionOptions};

const PROMPTS: [&str; 6] = ["ROMEO:", "JULIET:", "KING RICHARD III:", "First Citizen:", "What, ho!", "O"];

fn session(sequences: usize, context: usize) -> Session {
    let options =
        SessionOptions { sequences, context: Some(context), threads: Some(2), ..Default::default() };
    Session::open("demo", &options).unwrap()
}

fn request(session: &Session, index: usize) -> Request {
    let mut request = session.loaded.request(session.prompt(PROMPTS[index]).unwrap());
    request.max_tokens = Some(20 + 7 * index);
    let seed = Some(index as u64);
    request.sampling = match index % 3 {
        0 => SamplingParams::greedy(),
        1 => SamplingParams { temperature: 0.9, top_p: 0.9, seed, ..SamplingParams::greedy() },
        _ => SamplingParams {
            temperature: 1.2,
            top_k: 40,
            presence_penalty: 0.5,
            seed,
            ..SamplingParams::greedy()
        },
    };
    request
}

fn submit(session: &Session, request: Request) -> Receiver<Event> {
    let (sender, receiver) = channel();
    session.engine.submit(request, Box::new(move |event| sender.send(event).is_ok())).unwrap();
    receiver
}

fn collect(events: Receiver<Event>) -> (String, Vec<u32>, FinishReason) {
    let (mut text, mut ids) = (String::new(), Vec::new());
    for event in events {
        match event {
            Event::Prefill { .. } => {}
            Event::Token { id, text: more, .. } => {
                ids.push(id);
                text.push_str(&more);
            }
            Event::Finished { text: more, summary } => {
                text.push_str(&more);
                assert_eq!(summary.completion_tokens, ids.len());
                return (text, ids, summary.reason);
            }
            Event::Failed(message) => panic!("{message}"),
        }
    }
    panic!("no end");
}

#[test]
fn requests_at_once_give_what_each_gives_alone() {
    let alone = session(1, 256);
    let expected: Vec<_> = (0..PROMPTS.len()).map(|i| collect(submit(&alone, request(&alone, i)))).collect();
    // Fewer places than requests, so that some wait and the mix changes as others end.
    let together = session(3, 256);
    let streams: Vec<_> = (0..PROMPTS.len()).map(|i| submit(&together, request(&together, i))).collect();
    for (stream, expected) in streams.into_iter().zip(expected) {
        assert_eq!(collect(stream), expected);
    }
}

#[test]
fn a_caller_who_leaves_frees_the_place() {
    let session = session(1, 2048);
    let endless = |session: &Session| {
        let mut request = request(session, 0);
        request.max_tokens = Some(2000);
        request.stop.token_ids.clear();
        request
    };
    let first = submit(&session, endless(&session));
    while !matches!(first.recv().unwrap(), Event::Token { .. }) {}
    // One runs, these wait; all leave, the waiting ones first.
    let waiting: Vec<_> = (0..5).map(|_| submit(&session, endless(&session))).collect();
    drop(waiting);
    drop(first);
    let begun = Instant::now();
    let (_, ids, reason) = collect(submit(&session, request(&session, 1)));
    assert_eq!((ids.len(), reason), (27, FinishReason::Length));
    assert!(begun.elapsed() < Duration::from_secs(20), "the place was not freed");
}

#[test]
fn refusals_say_why_and_leave_the_engine_running() {
    let session = session(1, 128);
    let refuse = |change: &dyn Fn(&mut Request)| {
        let mut request = request(&session, 0);
        change(&mut request);
        session.engine.submit(request, Box::new(|_| true)).unwrap_err()
    };
    assert_eq!(refuse(&|r| r.prompt.clear()), SubmitError::EmptyPrompt);
    let long = refuse(&|r| r.prompt = vec![1; 200]);
    assert!(matches!(long, SubmitError::ContextExceeded { prompt_tokens: 200, context: 128, .. }), "{long}");
    assert!(matches!(refuse(&|r| r.max_tokens = Some(usize::MAX)), SubmitError::ContextExceeded { .. }));
    assert!(matches!(refuse(&|r| r.prompt = vec![u32::MAX]), SubmitError::Invalid { param: "prompt", .. }));
    let hot = refuse(&|r| r.sampling.temperature = f32::NAN);
    assert!(matches!(hot, SubmitError::Invalid { param: "temperature", .. }), "{hot}");
    assert_eq!(collect(submit(&session, request(&session, 0))).1.len(), 20);
}

#[test]
fn a_stopping_engine_tells_everyone() {
    let session = session(1, 2048);
    let mut endless = request(&session, 0);
    endless.max_tokens = Some(2000);
    endless.stop.token_ids.clear();
    let running = submit(&session, endless.clone());
    while !matches!(running.recv().unwrap(), Event::Token { .. }) {}
    let waiting = submit(&session, endless);
    drop(session);
    let last = running.iter().last().unwrap();
    assert!(matches!(last, Event::Finished { summary, .. } if summary.reason == FinishReason::Cancelled));
    assert!(waiting.iter().any(|event| matches!(event, Event::Failed(_))));
}
