//! One file from the hub to the disk.
//!
//! Owns the bytes on the way: where a partial file goes on, how many may come, what they must add up to.
//! Refuses to know what a file is for and where it will be shown. The partial file is kept whenever its
//! bytes may be right, and removed whenever they are known to be wrong.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

use super::cache::Check;
use super::client::{Client, Failure, broken};
use super::{HubError, Progress};

/// Bytes read and written at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A file to bring.
pub(super) struct Target<'a> {
    pub(super) url: &'a str,
    /// For messages.
    pub(super) name: &'a str,
    /// Where the bytes are collected; what is there already is continued.
    pub(super) partial: &'a Path,
    pub(super) size: u64,
    pub(super) check: &'a Check,
}

/// Brings `target` completely into its partial file, proves it and writes it through to the disk.
/// `before` is the position of its first byte in the whole download, for `progress`.
pub(super) fn download(
    client: &Client,
    target: &Target<'_>,
    before: u64,
    progress: &mut dyn Progress,
) -> Result<(), HubError> {
    let mut transfer = Transfer::open(target)?;
    let resumed = transfer.have > 0;
    transfer.bring(client, before, progress)?;
    if !transfer.is_right() && resumed {
        progress.note(&format!("{}: the partial file was wrong; starting again", target.name));
        transfer.restart()?;
        transfer.bring(client, before, progress)?;
    }
    if !transfer.is_right() {
        return Err(transfer.discard(HubError::Checksum { name: target.name.to_owned() }));
    }
    transfer.file.sync_all().map_err(|e| HubError::io(target.partial, e))
}

struct Transfer<'a> {
    target: &'a Target<'a>,
    file: File,
    /// Bytes in the file, and their running digest.
    have: u64,
    digest: Option<Context>,
}

impl<'a> Transfer<'a> {
    /// Opens the partial file and digests what it holds.
    fn open(target: &'a Target<'a>) -> Result<Self, HubError> {
        let failed = |error| HubError::io(target.partial, error);
        let file =
            File::options().read(true).append(true).create(true).open(target.partial).map_err(failed)?;
        let have = file.metadata().map_err(failed)?.len();
        let mut transfer = Self { target, file, have, digest: new_digest(target) };
        if have > target.size {
            transfer.restart()?;
        } else if let Some(digest) = &mut transfer.digest {
            let mut held = (&transfer.file).take(have);
            let mut chunk = vec![0; CHUNK_BYTES];
            loop {
                match held.read(&mut chunk).map_err(failed)? {
                    0 => break,
                    n => digest.update(&chunk[..n]),
                }
            }
        } else {
            transfer.file.seek(SeekFrom::End(0)).map_err(failed)?;
        }
        Ok(transfer)
    }

    /// Forgets every byte.
    fn restart(&mut self) -> Result<(), HubError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .map_err(|e| HubError::io(self.target.partial, e))?;
        self.have = 0;
        self.digest = new_digest(self.target);
        Ok(())
    }

    /// Removes the partial file on the way out with `error`.
    fn discard(&self, error: HubError) -> HubError {
        match fs::remove_file(self.target.partial) {
            Ok(()) => error,
            Err(failed) => HubError::io(self.target.partial, failed),
        }
    }

    /// Gets the missing bytes, in as many attempts as are worth it.
    fn bring(&mut self, client: &Client, before: u64, progress: &mut dyn Progress) -> Result<(), HubError> {
        progress.position(before + self.have);
        // Both closures of `retry` report.
        let progress = std::cell::RefCell::new(progress);
        client.retry(
            |note| progress.borrow_mut().note(note),
            || {
                let had = self.have;
                let result = self.attempt(client, &mut |have| progress.borrow_mut().position(before + have));
                result.map_err(|failure| (failure, self.have >= had + CHUNK_BYTES as u64))
            },
        )
    }

    fn attempt(&mut self, client: &Client, position: &mut dyn FnMut(u64)) -> Result<(), Failure> {
        let Target { url, name, size, .. } = *self.target;
        if self.have == size {
            return Ok(());
        }
        let range = (self.have > 0).then(|| format!("bytes={}-", self.have));
        let answer = client.get(url, range.as_deref())?;
        let announced = match answer.status() {
            200 => answer.header("content-length").and_then(|length| length.parse().ok()),
            206 => match answer.content_range() {
                Some((Some(first), total)) if first == self.have => Some(total),
                _ => {
                    let reason = "it sends another part than the one asked for".to_owned();
                    return Err(HubError::Answer { url: url.to_owned(), reason }.into());
                }
            },
            416 => {
                self.restart()?;
                position(0);
                let reason = "it refuses to go on with the partial file".to_owned();
                return Err(Failure::Again(HubError::Answer { url: url.to_owned(), reason }, None));
            }
            _ => return Err(client.refusal(&answer, url, name)),
        };
        let wrong = |got| HubError::Length { name: name.to_owned(), expected: size, got };
        // Before anything is given up: this may be a login page and not the file.
        if let Some(total) = announced.filter(|&total| total != size) {
            return Err(wrong(total).into());
        }
        if answer.status() == 200 && self.have > 0 {
            // The range was ignored: the whole file comes.
            self.restart()?;
            position(0);
        }
        let mut body = answer.response.into_body().into_reader();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let n = match body.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) => return Err(broken(url, &error)),
            };
            if self.have + n as u64 > size {
                return Err(self.discard(wrong(self.have + n as u64)).into());
            }
            self.file.write_all(&chunk[..n]).map_err(|e| HubError::io(self.target.partial, e))?;
            if let Some(digest) = &mut self.digest {
                digest.update(&chunk[..n]);
            }
            self.have += n as u64;
            position(self.have);
        }
        if self.have < size {
            let reason = format!("the answer ended after {} of {size} bytes", self.have);
            return Err(Failure::Again(HubError::Network { url: url.to_owned(), reason }, None));
        }
        Ok(())
    }

    fn is_right(&self) -> bool {
        let (Check::Sha256(expected) | Check::GitBlob(expected)) = self.target.check else { return true };
        let Some(digest) = self.digest.clone() else { return false };
        let hex: String = digest.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        hex == *expected
    }
}

fn new_digest(target: &Target<'_>) -> Option<Context> {
    match target.check {
        Check::Sha256(_) => Some(Context::new(&SHA256)),
        Check::GitBlob(_) => {
            let mut digest = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            digest.update(format!("blob {}\0", target.size).as_bytes());
            Some(digest)
        }
        Check::Length => None,
    }
}
