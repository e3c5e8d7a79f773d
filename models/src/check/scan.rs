//! Weights that are NaN or infinite, found without running anything.

use std::collections::HashSet;

use rayon::prelude::*;
use safetensors::tensor::Dtype;

use crate::Model;
use crate::checkpoint::TensorEntry;
use crate::error::{Error, Result};

/// Tensors that an error names before it says "and more".
const NAMED: usize = 5;

/// What [`scan_weights`] has looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// Tensors that hold floats or scales.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Reads every float and every scale that the model uses, and none that it skips.
///
/// `run` gives defined output for any weights; here NaN and infinity are errors.
///
/// # Errors
/// Names the first tensors that hold a NaN or an infinity, with the place of the first in each.
pub fn scan_weights(model: &Model) -> Result<Scanned> {
    scan_weights_with(model, &|_| ())
}

/// As [`scan_weights`]; `progress` gets the bytes of each tensor that is done.
///
/// # Errors
/// As [`scan_weights`].
pub fn scan_weights_with(model: &Model, progress: &(dyn Fn(usize) + Sync)) -> Result<Scanned> {
    let skipped: HashSet<&str> =
        model.weights.skipped.tensors.iter().map(|(name, _)| name.as_str()).collect();
    let used: Vec<(&String, &TensorEntry)> =
        model.checkpoint.tensors().iter().filter(|(name, _)| !skipped.contains(name.as_str())).collect();
    let scanned: Vec<(&String, &TensorEntry, Bad)> = used
        .into_par_iter()
        .filter_map(|(name, entry)| {
            let bad = scan(name, entry);
            progress(entry.bytes.as_slice().len());
            Some((name, entry, bad?))
        })
        .collect();
    let bad: Vec<_> = scanned.iter().filter(|(.., bad)| bad.count > 0).collect();
    let Some((name, ..)) = bad.first() else {
        let bytes = scanned.iter().map(|(_, entry, _)| entry.bytes.as_slice().len() as u64).sum();
        return Ok(Scanned { tensors: scanned.len(), bytes });
    };
    let describe = |(name, entry, found): &&(&String, &TensorEntry, Bad)| {
        format!("{name} ({}, first at {:?})", found.count, place(&entry.shape, found.first))
    };
    let mut list = bad.iter().take(NAMED).map(describe).collect::<Vec<_>>().join(", ");
    if bad.len() > NAMED {
        list.push_str(&format!(" and {} more", bad.len() - NAMED));
    }
    Err(Error::tensor(
        *name,
        format!("{} of {} tensors hold NaN or infinity: {list}", bad.len(), scanned.len()),
    ))
}

/// Values that are not finite: how many, and the flat index of the first.
struct Bad {
    count: usize,
    first: usize,
}

/// `None` if the tensor holds neither floats nor scales.
fn scan(name: &str, entry: &TensorEntry) -> Option<Bad> {
    let bytes = entry.bytes.as_slice();
    // All exponent bits set is a NaN or an infinity.
    Some(match entry.dtype {
        Dtype::F32 => count(bytes.as_chunks(), |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::F16 => count(bytes.as_chunks(), |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        Dtype::BF16 => count(bytes.as_chunks(), |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Dtype::F8_E4M3 => count(bytes.as_chunks(), |[b]| b & 0x7f == 0x7f),
        // e8m0 scales of MXFP4.
        Dtype::U8 if name.ends_with("_scales") => count(bytes.as_chunks(), |[b]| b == 255),
        _ => return None,
    })
}

fn count<const N: usize>((values, _): (&[[u8; N]], &[u8]), bad: impl Fn([u8; N]) -> bool) -> Bad {
    let count = values.iter().filter(|value| bad(**value)).count();
    let first = if count == 0 { 0 } else { values.iter().position(|value| bad(*value)).unwrap_or(0) };
    Bad { count, first }
}

/// The index of a flat position, slowest dimension first.
fn place(shape: &[usize], mut flat: usize) -> Vec<usize> {
    let mut place = vec![0; shape.len()];
    for (at, &size) in place.iter_mut().zip(shape).rev() {
        *at = flat % size;
        flat /= size;
    }
    place
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_counted_from_the_end() {
        assert_eq!(place(&[2, 3, 4], 23), [1, 2, 3]);
        assert_eq!(place(&[2, 3, 4], 5), [0, 1, 1]);
    }
}
