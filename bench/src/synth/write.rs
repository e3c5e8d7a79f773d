//! Streams a recipe's checkpoint to disk. Values are made in parallel, one wave of a shard at a time;
//! memory is one wave and the list of tensors.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use rayon::prelude::*;
use serde_json::Value;

use super::files::Folder;
use super::layout::{Layout, Shard};
use super::values::Fill;
use super::{Recipe, SynthError, tokenizer};

/// Bytes made before they are written.
const WAVE_BYTES: usize = 16 << 20;
/// Bytes one thread makes at a time.
const PART_BYTES: usize = 256 << 10;

/// How to write.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Same seed, same bytes.
    pub seed: u64,
    /// Files of full length that occupy almost nothing: headers and `weight_shape` are really there,
    /// every other value reads as zero.
    pub sparse: bool,
    /// Replace the checkpoint in the folder, if there is one.
    pub force: bool,
    /// Most bytes of tensors in one file; a larger tensor has a file of its own.
    pub shard_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 0, sparse: false, force: false, shard_bytes: 4 << 30 }
    }
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Tensors.
    pub tensors: usize,
    /// Weight files.
    pub shards: usize,
    /// Weights, of which a packed tensor holds several per element.
    pub parameters: u64,
    /// Bytes of all tensors, as `total_size` of the index says.
    pub bytes: u64,
    /// Time taken.
    pub seconds: f64,
}

/// Writes the checkpoint of `recipe` into `folder`. `progress` gets bytes done and in all; `false` stops.
///
/// Files have their names only when all are complete, `config.json` last; a run that fails or is
/// stopped removes what it wrote, and one that is killed leaves nothing that opens as a checkpoint.
///
/// # Errors
/// If the model cannot be run, the folder is not empty, the disk is full, or `progress` says stop.
pub fn write(
    recipe: &Recipe,
    folder: &Path,
    options: &Options,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Summary, SynthError> {
    let begun = Instant::now();
    let layout = Layout::new(&recipe.config, options.seed, options.shard_bytes)?;
    let mut folder = Folder::new(folder, options.force, layout.bytes)?;
    let mut done = 0;
    let mut advance = |bytes: u64| {
        done += bytes;
        if progress(done, layout.bytes) { Ok(()) } else { Err(SynthError::Cancelled) }
    };
    advance(0)?;
    let mut wave = if options.sparse { Vec::new() } else { vec![0; WAVE_BYTES] };
    for shard in &layout.shards {
        let path = folder.partial(&shard.file);
        let mut file = File::create(&path).map_err(|error| folder.failure(&path, error))?;
        file.write_all(&shard.header).map_err(|error| folder.failure(&path, error))?;
        if options.sparse {
            write_sparse(shard, &mut file).map_err(|error| folder.failure(&path, error))?;
            advance(shard.data_bytes)?;
            continue;
        }
        let mut at = 0;
        while at < shard.data_bytes {
            let len = (shard.data_bytes - at).min(WAVE_BYTES as u64) as usize;
            let wave = &mut wave[..len];
            wave.par_chunks_mut(PART_BYTES).enumerate().for_each(|(i, part)| {
                shard.fill(at + (i * PART_BYTES) as u64, part);
            });
            file.write_all(wave).map_err(|error| folder.failure(&path, error))?;
            at += len as u64;
            advance(len as u64)?;
        }
    }
    write_side_files(&mut folder, recipe, &layout)?;
    folder.finish()?;
    let (tensors, shards, parameters, bytes) =
        (layout.tensors, layout.shards.len(), layout.parameters, layout.bytes);
    Ok(Summary { tensors, shards, parameters, bytes, seconds: begun.elapsed().as_secs_f64() })
}

/// After the header: shapes, which come first, and a hole of the rest's length.
fn write_sparse(shard: &Shard, file: &mut File) -> std::io::Result<()> {
    for tensor in &shard.tensors {
        let Fill::Bytes(bytes) = &tensor.fill else { break };
        file.write_all(bytes)?;
    }
    file.set_len(shard.header.len() as u64 + shard.data_bytes)
}

/// `config.json` comes last: without it there is no checkpoint.
fn write_side_files(folder: &mut Folder, recipe: &Recipe, layout: &Layout) -> Result<(), SynthError> {
    let json = |value: &Value| format!("{value:#}\n").into_bytes();
    folder.write("tiktoken.model", tokenizer::tiktoken_model().as_bytes())?;
    folder.write("tokenizer_config.json", &json(&tokenizer::tokenizer_config()))?;
    folder.write("generation_config.json", &json(&tokenizer::generation_config()))?;
    folder.write("model.safetensors.index.json", &json(&layout.index()))?;
    folder.write("config.json", &json(&recipe.config))
}
