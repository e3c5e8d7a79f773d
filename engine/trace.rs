//! Logits and routing of given tokens: what `moebius trace` writes and golden tests compare.
//!
//! The names and shapes are those of `golden.safetensors`: for prompt P and layer L with routed
//! experts `promptP.logits`, `promptP.layerL.topk_idx`, `promptP.layerL.topk_weight`, for every layer
//! `promptP.layerL.out_last`, and with greedy decoding `promptP.greedy_ids`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use models::batch::PAGE_TOKENS;
use models::{Batch, Capacity, Model, NoProbe, Point, Probe, Runner, WantLogits};
use safetensors::tensor::{Dtype, TensorView};

use crate::error::Error;
use crate::memory;
use crate::session::SessionOptions;

/// Which logits are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepLogits {
    /// Of every prompt position.
    All,
    /// Of the last one.
    Last,
    /// None.
    None,
}

/// What to trace.
#[derive(Clone, Copy, Debug)]
pub struct TraceOptions {
    /// Tokens to generate greedily after each prompt; end-of-sequence tokens are ignored.
    pub greedy: usize,
    /// Prompt tokens per forward pass; `None` = up to 512.
    pub chunk: Option<usize>,
    /// Which logits are kept.
    pub logits: KeepLogits,
}

impl Default for TraceOptions {
    fn default() -> Self {
        Self { greedy: 0, chunk: None, logits: KeepLogits::All }
    }
}

/// What one layer did to one prompt.
#[derive(Clone, Debug, Default)]
pub struct LayerTrace {
    /// Experts per token; 0 for a layer without routed experts.
    pub top_k: usize,
    /// `[tokens, top_k]`, ascending per token.
    pub ids: Vec<u32>,
    /// `[tokens, top_k]`, in the same order.
    pub weights: Vec<f32>,
    /// The residual stream after the layer at the last position `[hidden]`.
    pub out_last: Vec<f32>,
}

/// What one prompt led to.
#[derive(Clone, Debug, Default)]
pub struct PromptTrace {
    /// `[rows, vocab]`; rows as [`KeepLogits`] says.
    pub logits: Vec<f32>,
    /// Layers in order.
    pub layers: Vec<LayerTrace>,
    /// Greedy continuation.
    pub greedy_ids: Vec<u32>,
}

/// Runs prompts on a runner made for them.
pub struct Tracer {
    runner: Box<dyn Runner>,
    pool: Arc<rayon::ThreadPool>,
    options: TraceOptions,
    chunk: usize,
    table: Vec<u32>,
    batch: Batch,
}

impl Tracer {
    /// A tracer for prompts of up to `longest` tokens.
    ///
    /// # Errors
    /// If the runner cannot be made, or prompt and output exceed the model's context.
    pub fn new(
        model: &Arc<Model>,
        run: &SessionOptions,
        options: TraceOptions,
        longest: usize,
    ) -> Result<Self, Error> {
        let positions = longest.saturating_add(options.greedy);
        let context = model.config.max_positions;
        if positions > context {
            let message = format!("{positions} tokens exceed the model's context of {context}");
            return Err(Error::Unsupported(message));
        }
        let chunk = options.chunk.unwrap_or(512).clamp(1, longest.max(1));
        let logit_rows = if options.logits == KeepLogits::All { chunk } else { 1 };
        let blocks = positions.div_ceil(PAGE_TOKENS).max(1);
        let capacity = Capacity::new(blocks, chunk, logit_rows);
        memory::check_capacity(&model.config, run.numerics(), &capacity)?;
        let runner = run.runner(model, capacity)?;
        let table = (0..blocks as u32).collect();
        Ok(Self { runner, pool: run.pool()?, options, chunk, table, batch: Batch::default() })
    }

    /// Traces one prompt.
    ///
    /// # Errors
    /// If it is empty, has a token outside the vocabulary, or the runner fails.
    pub fn trace(&mut self, prompt: &[u32]) -> Result<PromptTrace, Error> {
        if prompt.is_empty() {
            return Err(Error::Unsupported("a prompt has no tokens".into()));
        }
        let pool = Arc::clone(&self.pool);
        pool.install(|| self.trace_here(prompt))
    }

    fn trace_here(&mut self, prompt: &[u32]) -> Result<PromptTrace, Error> {
        let config = self.runner.config();
        let (vocab, hidden, layers) = (config.vocab, config.hidden, config.layers.len());
        let mut trace = PromptTrace { layers: vec![LayerTrace::default(); layers], ..PromptTrace::default() };
        let mut next = 0;
        for (index, chunk) in prompt.chunks(self.chunk).enumerate() {
            let start = index * self.chunk;
            let last = start + chunk.len() == prompt.len();
            let want = match (self.options.logits, last) {
                (KeepLogits::All, _) => WantLogits::All,
                (KeepLogits::Last, true) => WantLogits::Last,
                (KeepLogits::None, true) if self.options.greedy > 0 => WantLogits::Last,
                _ => WantLogits::None,
            };
            self.batch.clear();
            self.batch.push(chunk, start, &self.table, want);
            let mut logits = vec![0.0; self.batch.logit_rows.len() * vocab];
            self.runner.forward(&self.batch, &mut Recorder { trace: &mut trace, hidden }, &mut logits)?;
            if last && self.options.greedy > 0 {
                next = argmax(&logits[logits.len() - vocab..]);
            }
            if self.options.logits != KeepLogits::None {
                trace.logits.append(&mut logits);
            }
        }
        let mut logits = vec![0.0; vocab];
        for step in 0..self.options.greedy {
            trace.greedy_ids.push(next);
            if step + 1 < self.options.greedy {
                self.batch.clear();
                self.batch.push(&[next], prompt.len() + step, &self.table, WantLogits::Last);
                self.runner.forward(&self.batch, &mut NoProbe, &mut logits)?;
                next = argmax(&logits);
            }
        }
        Ok(trace)
    }
}

/// The lowest id of the largest logit; NaN counts as smallest.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (id as u32, logit);
        }
    }
    best.0
}

struct Recorder<'a> {
    trace: &'a mut PromptTrace,
    hidden: usize,
}

impl Probe for Recorder<'_> {
    fn wants(&self, _layer: usize, point: Point) -> bool {
        point == Point::LayerOut
    }

    fn value(&mut self, layer: usize, _point: Point, values: &[f32]) {
        // Of the last chunk the last row remains.
        let layer = &mut self.trace.layers[layer];
        layer.out_last.clear();
        layer.out_last.extend_from_slice(&values[values.len() - self.hidden..]);
    }

    fn routing(&mut self, layer: usize, top_k: usize, ids: &[u32], weights: &[f32]) {
        let layer = &mut self.trace.layers[layer];
        layer.top_k = top_k;
        layer.ids.extend_from_slice(ids);
        layer.weights.extend_from_slice(weights);
    }
}

/// Writes traces under their golden names.
///
/// # Errors
/// If the file cannot be written.
pub fn write(path: &Path, traces: &[PromptTrace], vocab: usize) -> Result<(), Error> {
    let mut tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let ids = |values: &[u32]| values.iter().flat_map(|v| (*v as i32).to_le_bytes()).collect::<Vec<u8>>();
    for (p, trace) in traces.iter().enumerate() {
        let mut add = |name: &str, dtype, shape: Vec<usize>, bytes| {
            tensors.insert(format!("prompt{p}.{name}"), (dtype, shape, bytes));
        };
        if !trace.logits.is_empty() {
            add("logits", Dtype::F32, vec![trace.logits.len() / vocab, vocab], floats(&trace.logits));
        }
        if !trace.greedy_ids.is_empty() {
            add("greedy_ids", Dtype::I32, vec![trace.greedy_ids.len()], ids(&trace.greedy_ids));
        }
        for (l, layer) in trace.layers.iter().enumerate() {
            let out = &layer.out_last;
            add(&format!("layer{l}.out_last"), Dtype::F32, vec![out.len()], floats(out));
            if let Some(tokens) = layer.ids.len().checked_div(layer.top_k) {
                let shape = vec![tokens, layer.top_k];
                add(&format!("layer{l}.topk_idx"), Dtype::I32, shape.clone(), ids(&layer.ids));
                add(&format!("layer{l}.topk_weight"), Dtype::F32, shape, floats(&layer.weights));
            }
        }
    }
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).expect("the shape is that of the bytes");
        (name.as_str(), view)
    });
    let bytes = safetensors::serialize(views, None)
        .map_err(|error| Error::Unsupported(format!("{}: {error}", path.display())))?;
    std::fs::write(path, bytes).map_err(|error| Error::Io(path.display().to_string(), error))
}
