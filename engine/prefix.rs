//! Names for the content of cache blocks. A key is a keyed hash over the tokens of a block and the key of the block
//! before it, so it stands for a whole prefix. The chain begins with what else the content depends on: the model's
//! files, the numerics, the type of the cache and the tenant. Without the secret nobody can make two prompts collide.

use models::batch::PAGE_TOKENS;
use models::{Model, Runner};

use crate::blocks::BlockKey;

/// To be changed by whoever changes the bits that a runner writes to its cache: what older programs left on disk is
/// then no longer found.
const REVISION: u32 = 2;
/// Tensors whose values take part in a model's identity, and bytes of each.
const SAMPLED_TENSORS: usize = 1024;
const SAMPLED_BYTES: usize = 64;

/// Makes the keys of one engine.
#[derive(Clone)]
pub struct PrefixHasher {
    secret: [u8; 32],
    identity: [u8; 32],
}

/// The keys of one sequence, as far as it is known.
#[derive(Clone, Debug)]
pub struct PrefixChain {
    last: BlockKey,
}

impl PrefixHasher {
    /// Keys that only this `secret` gives, for content that depends on `identity`.
    pub fn new(secret: [u8; 32], identity: [u8; 32]) -> Self {
        Self { secret, identity }
    }

    /// Keys for a process of its own.
    ///
    /// # Panics
    /// If the system has no random numbers.
    pub fn random(identity: [u8; 32]) -> Self {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).expect("the system has random numbers");
        Self::new(secret, identity)
    }

    /// The chain of a tenant, before any token.
    pub fn chain(&self, salt: &str) -> PrefixChain {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(&self.identity).update(salt.as_bytes());
        PrefixChain { last: key(&hasher) }
    }

    /// The keys of all blocks that `tokens` fill, further along the chain.
    pub fn extend(&self, chain: &mut PrefixChain, tokens: &[u32]) -> Vec<BlockKey> {
        let blocks = tokens.as_chunks::<PAGE_TOKENS>().0.iter();
        blocks
            .map(|tokens| {
                let mut bytes = [0; PAGE_TOKENS * 4];
                for (bytes, token) in bytes.as_chunks_mut().0.iter_mut().zip(tokens) {
                    *bytes = token.to_le_bytes();
                }
                let mut hasher = blake3::Hasher::new_keyed(&self.secret);
                hasher.update(&chain.last.0.to_le_bytes()).update(&bytes);
                chain.last = key(&hasher);
                chain.last
            })
            .collect()
    }
}

fn key(hasher: &blake3::Hasher) -> BlockKey {
    let hash = hasher.finalize();
    BlockKey(u128::from_le_bytes(*hash.as_bytes().first_chunk().expect("32 bytes")))
}

/// What the rows in a runner's cache depend on besides tokens. The weights take part by name, shape, file time and
/// samples of their values: reading all of a large model would take minutes.
pub fn identity(model: &Model, runner: &dyn Runner, cache_type: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let mut put = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    };
    put(&REVISION.to_le_bytes());
    put(env!("CARGO_PKG_VERSION").as_bytes());
    put(runner.arithmetic().as_bytes());
    put(model.numerics_label(runner.numerics()).as_bytes());
    put(cache_type.as_bytes());
    put(model.checkpoint.config().to_string().as_bytes());
    let tensors = model.checkpoint.tensors();
    let every = tensors.len().div_ceil(SAMPLED_TENSORS).max(1);
    for (index, (name, entry)) in tensors.iter().enumerate() {
        put(name.as_bytes());
        put(format!("{:?} {:?}", entry.dtype, entry.shape).as_bytes());
        if index.is_multiple_of(every) {
            let bytes = entry.bytes.as_slice();
            let middle = (bytes.len() / 2).min(bytes.len().saturating_sub(SAMPLED_BYTES));
            put(&bytes[middle..][..SAMPLED_BYTES.min(bytes.len() - middle)]);
        }
    }
    for (name, bytes, modified) in files(model) {
        put(name.as_bytes());
        put(&bytes.to_le_bytes());
        put(&modified.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Name, length and time of change (nanoseconds) of a model's weight files, by name.
fn files(model: &Model) -> Vec<(String, u64, u128)> {
    let entries = model.checkpoint.folder().and_then(|folder| std::fs::read_dir(folder).ok());
    let mut files: Vec<_> = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name().into_string().ok().filter(|name| name.ends_with(".safetensors"))?;
            // Through links: a hub cache keeps its files elsewhere.
            let metadata = std::fs::metadata(entry.path()).ok()?;
            let modified = metadata.modified().ok()?.duration_since(std::time::UNIX_EPOCH);
            Some((name, metadata.len(), modified.map_or(0, |time| time.as_nanos())))
        })
        .collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stands_for_all_before_it_and_for_its_tenant() {
        let hasher = PrefixHasher::new([1; 32], [2; 32]);
        let tokens: Vec<u32> = (0..200).collect();
        let keys = hasher.extend(&mut hasher.chain(""), &tokens);
        assert_eq!(keys.len(), 3, "full blocks only");
        let mut chain = hasher.chain("");
        let mut parts = hasher.extend(&mut chain, &tokens[..64]);
        parts.extend(hasher.extend(&mut chain, &tokens[64..]));
        assert_eq!(parts, keys, "in one go or in parts");

        let mut other = tokens.clone();
        other[63] += 1;
        let others = hasher.extend(&mut hasher.chain(""), &other);
        assert!(keys.iter().zip(&others).all(|(a, b)| a != b), "one token changes all keys from it on");
        let mut later = tokens.clone();
        later[64] += 1;
        let others = hasher.extend(&mut hasher.chain(""), &later);
        assert_eq!((keys[0] == others[0], keys[1] == others[1]), (true, false));

        for different in [
            (hasher.clone(), "salt"),
            (PrefixHasher::new([3; 32], [2; 32]), ""),
            (PrefixHasher::new([1; 32], [3; 32]), ""),
        ] {
            let (hasher, salt) = different;
            assert_ne!(hasher.extend(&mut hasher.chain(salt), &tokens)[0], keys[0]);
        }
    }
}
