//! Moebius runs open-weight mixture-of-experts models from the files their makers publish.
//!
//! # Map
//! A request's way: [`server`] or `cli/` make a [`request::Request`]; [`engine::Engine`] admits it and
//! asks [`scheduler`] which tokens run next; the batch goes to a [`models::Runner`]; [`sampler`] turns
//! logits into a token and [`tokenizer`] into text, which goes to the request's sink.
//!
//! [`loaded::Loaded`] is a model with everything that belongs to it; [`memory`] plans every byte before
//! it is loaded; [`hub`] finds and downloads files. See `ARCHITECTURE.md`.
//!
//! # Example
//! ```no_run
//! let session = moebius::session::Session::open("demo", &Default::default())?;
//! let answer = session.complete("ROMEO:", |text| print!("{text}"))?;
//! println!("\n{} tokens", answer.summary.completion_tokens);
//! # Ok::<(), moebius::error::Error>(())
//! ```

pub mod blocks;
pub mod cli;
pub mod engine;
pub mod error;
pub mod hub;
pub mod loaded;
pub mod memory;
pub mod prefix;
pub mod progress;
pub mod report;
pub mod request;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
#[cfg(feature = "server")]
pub mod server;
pub mod session;
pub mod stop;
pub mod store;
pub mod template;
pub mod tokenizer;
pub mod trace;
