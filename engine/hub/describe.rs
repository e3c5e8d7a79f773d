//! What describes a model without its weights: `config.json` and the index, from the cache or brought one by one.

use std::path::PathBuf;

use super::client::Client;
use super::{CONFIG, Fetcher, HubError, HubOptions, INDEX, Progress, place};

/// What describes a model, without its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Described {
    /// A folder of the cache with at least `config.json`.
    Folder(PathBuf),
    /// Two files of the cache, brought one by one.
    Files {
        /// `config.json`.
        config: PathBuf,
        /// The index of the weight files, if there are several.
        index: Option<PathBuf>,
    },
}

/// The files that describe `repo` (`org/name`) at `revision` (`None` = `main`): from the cache if they are there, else
/// downloaded. No weights are.
///
/// # Errors
/// [`HubError`].
pub fn describe(
    repo: &str,
    revision: Option<&str>,
    options: &HubOptions,
    progress: &mut dyn Progress,
) -> Result<Described, HubError> {
    let (revision, cache) = place(repo, revision, options)?;
    if let Some(folder) = cache.folder().filter(|folder| folder.join(CONFIG).is_file()) {
        return Ok(Described::Folder(folder));
    }
    let name = format!("{repo}@{revision}");
    if options.offline {
        let missing = format!("its {CONFIG} was never downloaded");
        return Err(HubError::Offline { repo: name, missing, cache: options.cache.clone() });
    }
    let client = Client::new(options)?;
    let listing = client.list(repo, revision, |text| progress.note(text))?;
    let mut fetcher = Fetcher { client, cache, name, repo, listing, done: 0, total: 0, progress };
    let indexed = fetcher.has_index()?;
    fetcher.expect([CONFIG].into_iter().chain(indexed.then_some(INDEX)));
    let config = fetcher.path(CONFIG)?;
    let index = if indexed { Some(fetcher.path(INDEX)?) } else { None };
    fetcher.progress.finish();
    Ok(Described::Files { config, index })
}
