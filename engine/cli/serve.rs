//! `moebius serve`: the HTTP server for one model.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;

use super::{CacheArgs, ComputeArgs, DEMO, SamplingArgs};
use crate::error::Error;
use crate::request::Generate;
use crate::server::{self, ApiKey, AppState, ServerOptions};
use crate::session::{Session, SessionOptions};
use crate::tokenizer::Specials;

#[derive(Args)]
pub struct ServeArgs {
    /// Checkpoint folder, hub id `org/name[@revision]`, or `demo`
    #[arg(default_value = DEMO)]
    model: String,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 = any free one, printed at start
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// File that holds the API key asked of every caller
    #[arg(long)]
    api_key_file: Option<PathBuf>,
    /// Listen on a public address without a key
    #[arg(long)]
    insecure_no_auth: bool,
    /// Further value of the Host header to answer; may be repeated
    #[arg(long)]
    allowed_host: Vec<String>,
    /// The model's id in requests and answers [default: the name of its folder]
    #[arg(long)]
    served_model_name: Option<String>,
    /// Requests that run at a time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,
    /// Let special-token strings in messages become control tokens
    #[arg(long)]
    parse_content_specials: bool,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

pub fn run(args: &ServeArgs) -> Result<ExitCode, Error> {
    let api_key = args.api_key_file.as_deref().map(read_key).transpose()?;
    let options = args.cache.apply(&args.compute, args.compute.options());
    let options = SessionOptions { sequences: usize::from(args.parallel), ..options };
    let session = Session::open(&args.model, &options)?;
    eprintln!("{}", session.plan_line());
    let defaults = &session.loaded.defaults;
    let mut sampling = defaults.sampling.clone();
    args.sampling.apply_sampling(&mut sampling);
    let state = AppState {
        engine: Arc::clone(&session.engine) as Arc<dyn Generate>,
        tokenizer: Arc::clone(&session.loaded.tokenizer),
        template: session.loaded.template.clone(),
        options: ServerOptions {
            host: args.host.clone(),
            port: args.port,
            api_key,
            insecure_no_auth: args.insecure_no_auth,
            allowed_hosts: args.allowed_host.clone(),
            served_model_name: args.served_model_name.clone().unwrap_or_else(|| served_name(&args.model)),
            default_sampling: sampling,
            default_max_tokens: args.sampling.max_tokens.or(defaults.max_tokens),
            stop_token_ids: if args.sampling.ignore_eos {
                Vec::new()
            } else {
                defaults.stop_token_ids.clone()
            },
            content_specials: if args.parse_content_specials { Specials::Parse } else { Specials::Plain },
            ..ServerOptions::default()
        },
    };
    server::run(state).map_err(|error| Error::Unsupported(error.to_string()))?;
    Ok(ExitCode::SUCCESS)
}

/// A folder's own name; a hub id as it is.
fn served_name(model: &str) -> String {
    let path = std::path::Path::new(model);
    let folder = path.is_dir().then(|| path.canonicalize().ok()).flatten();
    let name = folder.as_deref().and_then(|path| path.file_name()).and_then(|name| name.to_str());
    name.unwrap_or(model).to_owned()
}

fn read_key(path: &std::path::Path) -> Result<ApiKey, Error> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::Io(path.display().to_string(), error))?;
    Ok(ApiKey::from(text.trim().to_owned()))
}
