//! The store's folder: what its names mean, and what is found there at start.
//!
//! ```text
//! secret                32 random bytes, made once
//! lock                  held by the process that may write
//! ab/ab01….kv           a block; its name is its key in 32 hexadecimal digits
//! ab/ab01….part         a block on its way; with `draft.….part` all that a crash can leave behind
//! ```
//!
//! Any other name belongs to somebody else and is neither touched nor counted.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::rand::{SecureRandom, SystemRandom};

use super::StoreError;
use super::files::{Files, Kind, Listed};
use super::format::HEADER_BYTES;
use crate::blocks::BlockKey;

/// Bytes of the secret: the key of a keyed hash.
pub(super) const SECRET_BYTES: usize = 32;

/// A clock may differ a little from the one by which a file got its time.
const CLOCK_SLACK: Duration = Duration::from_secs(60);

/// Attempts to agree on a secret with others who start now.
const SECRET_ATTEMPTS: usize = 25;

/// Attempts to take the lock. A program just started by the process that had it keeps it for a moment: it has
/// a copy of every open file until it runs.
const LOCK_ATTEMPTS: usize = 5;

/// Between two attempts.
const SHORT_WAIT: Duration = Duration::from_millis(10);

/// Paths, and the file system they are in.
#[derive(Clone)]
pub(super) struct Folder {
    pub(super) root: PathBuf,
    pub(super) files: Arc<dyn Files>,
}

/// A block's file at start.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) key: BlockKey,
    pub(super) file_bytes: u64,
    pub(super) place: u64,
}

/// What one look through the folder gave.
#[derive(Default)]
struct Survey {
    blocks: Vec<(Listed, BlockKey)>,
    /// What a crash left behind.
    leftovers: Vec<PathBuf>,
}

impl Folder {
    /// The folder of a block.
    pub(super) fn parent(&self, key: BlockKey) -> PathBuf {
        self.root.join(format!("{:02x}", key.0 >> 120))
    }

    /// Where a block stands.
    pub(super) fn block(&self, key: BlockKey) -> PathBuf {
        self.parent(key).join(format!("{:032x}.kv", key.0))
    }

    /// Where a block is written before it gets its name.
    pub(super) fn part(&self, key: BlockKey) -> PathBuf {
        self.parent(key).join(format!("{:032x}.part", key.0))
    }

    fn draft(&self) -> io::Result<PathBuf> {
        let name = u64::from_le_bytes(random()?);
        Ok(self.root.join(format!("draft.{name:016x}.part")))
    }

    /// Reads the secret, or makes it. Of many processes that start at once one makes it for all.
    pub(super) fn secret(&self) -> Result<[u8; SECRET_BYTES], StoreError> {
        let path = self.root.join("secret");
        let failed = |source| StoreError::Secret { path: path.clone(), source };
        let mut secret = [0; SECRET_BYTES];
        let mut last = io::ErrorKind::NotFound.into();
        for _ in 0..SECRET_ATTEMPTS {
            match self.files.read(&path, &mut secret) {
                // A file of zeros is what a power failure can leave, and no secret.
                Ok(()) if secret == [0; SECRET_BYTES] => {
                    return Err(failed(io::ErrorKind::InvalidData.into()));
                }
                Ok(()) => return Ok(secret),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.make_secret(&path).map_err(failed)?;
                }
                // Another process may be in the middle of writing it, where files cannot be linked.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    last = error;
                    std::thread::sleep(SHORT_WAIT);
                }
                Err(error) => return Err(failed(error)),
            }
        }
        Err(failed(last))
    }

    /// Makes a secret, unless another process is faster. A second name for a complete file appears at once
    /// and never in place of another, which neither writing nor renaming could promise.
    fn make_secret(&self, path: &Path) -> io::Result<()> {
        let secret: [u8; SECRET_BYTES] = random()?;
        let now = SystemTime::now();
        let draft = self.draft()?;
        let linked = self.files.write(&draft, &secret, now);
        let linked =
            linked.and_then(|()| self.files.sync(&draft)).and_then(|()| self.files.link(&draft, path));
        let faster = |error: &io::Error| {
            // The draft is not found when the process that holds the lock has tidied up.
            matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound)
        };
        let made = match linked {
            Err(error) if faster(&error) => Ok(()),
            Err(error) if is_full(&error) => Err(error),
            Err(_) => match self.files.write(path, &secret, now) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                written => written,
            },
            Ok(()) => Ok(()),
        };
        self.files.remove(&draft).ok();
        made
    }

    /// Takes the right to write, or says why this process has none.
    pub(super) fn lock(&self) -> Result<File, String> {
        let path = self.root.join("lock");
        let mut attempts = 1;
        let lock = loop {
            match self.files.lock(&path) {
                Ok(lock) => break lock,
                Err(TryLockError::WouldBlock) if attempts < LOCK_ATTEMPTS => {
                    attempts += 1;
                    std::thread::sleep(SHORT_WAIT);
                }
                Err(TryLockError::WouldBlock) => return Err("another process saves blocks there".to_owned()),
                Err(TryLockError::Error(error)) => return Err(format!("{}: {error}", path.display())),
            }
        };
        // A lock file that can be opened says little about the folder.
        let draft = self.draft().map_err(|error| error.to_string())?;
        let probed = self.files.write(&draft, &[], SystemTime::now());
        self.files.remove(&draft).ok();
        match probed {
            // Room may come; a right will not.
            Err(error) if !is_full(&error) => Err(format!("{}: {error}", draft.display())),
            _ => Ok(lock),
        }
    }

    /// The blocks that are there. With the right to write, removes what a crash left and what can be no
    /// block. The second value says what went wrong; what could be seen is given all the same.
    pub(super) fn survey(&self, writable: bool) -> (Vec<Found>, Option<String>) {
        let mut survey = Survey::default();
        let mut trouble = self.look(&mut survey).err();
        if writable {
            for path in survey.leftovers {
                match self.files.remove(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        trouble = Some(format!("{}: {error}", path.display()));
                    }
                    _ => {}
                }
            }
        }
        (places(survey.blocks, SystemTime::now()), trouble)
    }

    fn look(&self, survey: &mut Survey) -> Result<(), String> {
        let list =
            |path: &Path| self.files.list(path).map_err(|error| format!("{}: {error}", path.display()));
        let mut result = Ok(());
        for listed in list(&self.root)? {
            let Some(name) = listed.name.to_str() else { continue };
            let path = self.root.join(name);
            if listed.kind == Kind::File && is_draft(name) {
                survey.leftovers.push(path);
            } else if listed.kind == Kind::Folder && is_hex(name, 2) {
                match list(&path) {
                    Ok(inside) => sort_out(inside, name, &path, survey),
                    Err(error) => result = Err(error),
                }
            }
        }
        result
    }
}

/// Whether no room is left, which may change.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The time that stands for a place.
pub(super) fn time_of(place: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(place)
}

/// The place that a time stands for; the lowest before 1970.
pub(super) fn place_of(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| io::Error::other("the system gives no random numbers"))?;
    Ok(bytes)
}

/// Whether `text` is `digits` lower-case hexadecimal digits.
fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_draft(name: &str) -> bool {
    let middle = name.strip_prefix("draft.").and_then(|name| name.strip_suffix(".part"));
    middle.is_some_and(|middle| is_hex(middle, 16))
}

/// Puts the names in the folder `start` where they belong.
fn sort_out(inside: Vec<Listed>, start: &str, folder: &Path, survey: &mut Survey) {
    for listed in inside.into_iter().filter(|listed| listed.kind == Kind::File) {
        let Some((stem, extension)) = listed.name.to_str().and_then(|name| name.rsplit_once('.')) else {
            continue;
        };
        if !is_hex(stem, 32) || !stem.starts_with(start) {
            continue;
        }
        let key = u128::from_str_radix(stem, 16).map(BlockKey).expect("hexadecimal digits");
        match extension {
            "part" => survey.leftovers.push(folder.join(&listed.name)),
            // Bytes decide what goes, so a file of none would stay for ever.
            "kv" if listed.bytes <= HEADER_BYTES as u64 => survey.leftovers.push(folder.join(&listed.name)),
            "kv" => survey.blocks.push((listed, key)),
            _ => {}
        }
    }
}

/// The order in which the blocks were used, by their times. A time in the future is a clock's mistake: such
/// files come first, in their own order, because otherwise they would outlive all others.
fn places(blocks: Vec<(Listed, BlockKey)>, now: SystemTime) -> Vec<Found> {
    let latest = place_of(now + CLOCK_SLACK);
    let found = |(listed, key): (Listed, BlockKey)| Found {
        key,
        file_bytes: listed.bytes,
        place: place_of(listed.modified),
    };
    let mut found: Vec<Found> = blocks.into_iter().map(found).collect();
    found.sort_by_key(|found| (found.place <= latest, found.place, found.key));
    let wrong = found.iter_mut().take_while(|found| found.place > latest);
    wrong.enumerate().for_each(|(n, found)| found.place = n as u64);
    found
}
