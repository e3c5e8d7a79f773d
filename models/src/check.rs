//! Where two runners differ: the same prompt on both, every point of every layer compared in the order
//! of execution. The first that differs names the layer and the tensor to look at; what follows it
//! mostly inherits the difference.

mod scan;

use std::collections::HashMap;

use kernels::attention::PAGE;

use crate::batch::{Batch, WantLogits};
use crate::error::{Error, Result};
use crate::runner::{Point, Probe, Runner};
pub use scan::{Scanned, scan_weights, scan_weights_with};

/// Logits are compared for this many last tokens of the prompt; both runners need the capacity.
pub const LOGIT_ROWS: usize = 16;
/// Name of the point at which experts are chosen.
const ROUTING: &str = "routing";
/// Name of the last comparison.
const LOGITS: &str = "logits";

/// What still counts as equal.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Largest `|a - b| / |a|` over a tensor, in the Euclidean norm.
    pub relative_l2: f64,
    /// Largest share of tokens whose experts differ, per layer.
    pub routing: f64,
}

impl Tolerance {
    /// For two runners in `--numerics reference` (the project's tolerance for f32 engines).
    pub const REFERENCE: Self = Self { relative_l2: 1e-4, routing: 0.002 };
}

/// How one value of one layer differs between two runners.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// Layer, from 0.
    pub layer: usize,
    /// [`Point::as_str`], `routing` or `logits`.
    pub point: &'static str,
    /// `|a - b| / |a|` over all tokens; for `routing` the share of tokens whose experts differ.
    pub relative_l2: f64,
    /// Largest absolute difference; for `routing` of the weights of tokens whose experts agree.
    pub max_abs: f64,
    /// Whether both runners' values are finite; where not, the two numbers are infinite.
    pub finite: bool,
}

/// How often two runners chose different experts in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutingDifference {
    /// Layer, from 0.
    pub layer: usize,
    /// Tokens routed.
    pub tokens: usize,
    /// Tokens of which the sets of experts differ.
    pub different: usize,
}

/// The outcome of [`compare`].
#[derive(Clone, Debug)]
pub struct Report {
    /// Every compared value in execution order: points, routing, and the logits last.
    pub rows: Vec<Difference>,
    /// Counts behind the `routing` rows.
    pub routing: Vec<RoutingDifference>,
    /// The first row that is over the tolerance or not finite.
    pub first: Option<Difference>,
    /// Layers and points that only the first runner reports.
    pub unreported: Vec<(usize, &'static str)>,
}

impl Report {
    /// Success if nothing differs.
    ///
    /// # Errors
    /// Names the layer and point of the first difference.
    pub fn verdict(&self) -> Result<()> {
        let Some(Difference { layer, point, relative_l2, max_abs, finite }) = self.first else {
            return Ok(());
        };
        Err(Error::Run(match (finite, point) {
            (false, _) => format!("layer {layer}: {point} holds a NaN or an infinity"),
            (true, ROUTING) => {
                format!("layer {layer}: {:.2} % of tokens go to other experts", 100.0 * relative_l2)
            }
            (true, _) => {
                format!(
                    "layer {layer}: {point} differs by {relative_l2:.1e} (largest difference {max_abs:.1e})"
                )
            }
        }))
    }
}

/// Runs `prompt` on both runners, `a` being the one trusted, and compares every point.
///
/// Uses the first blocks of both caches. Holds all points of `a` in memory, `5 * layers` times
/// `[tokens, hidden]` in f32: keep prompts short.
///
/// # Errors
/// If a runner cannot run the prompt, or their values have different shapes. That they differ, even
/// by a NaN, is no error of this function: see [`Report::verdict`].
pub fn compare(
    a: &mut dyn Runner,
    b: &mut dyn Runner,
    prompt: &[u32],
    tolerance: Tolerance,
) -> Result<Report> {
    if prompt.is_empty() {
        return Err(Error::Run("there is nothing to compare: the prompt is empty".into()));
    }
    let mut batch = Batch::default();
    let table: Vec<u32> = (0..prompt.len().div_ceil(PAGE) as u32).collect();
    batch.push(prompt, 0, &table, WantLogits::None);
    batch.logit_rows = (prompt.len().saturating_sub(LOGIT_ROWS) as u32..prompt.len() as u32).collect();

    let last = a.config().layers.len().saturating_sub(1);
    let mut recording = Recording::default();
    let mut logits = vec![0.0; batch.logit_rows.len() * a.config().vocab];
    a.forward(&batch, &mut recording, &mut logits)?;
    recording.push(last, LOGITS, Value::Plain(logits));

    let mut comparison = Comparison::new(&recording);
    let mut logits = vec![0.0; batch.logit_rows.len() * b.config().vocab];
    b.forward(&batch, &mut comparison, &mut logits)?;
    comparison.add(last, LOGITS, Found::Plain(&logits));
    comparison.report(tolerance)
}

enum Value {
    Plain(Vec<f32>),
    Routing { ids: Vec<u32>, weights: Vec<f32> },
}

/// What the first runner computed, in execution order.
#[derive(Default)]
struct Recording {
    values: Vec<(usize, &'static str, Value)>,
}

impl Recording {
    fn push(&mut self, layer: usize, point: &'static str, value: Value) {
        self.values.push((layer, point, value));
    }
}

impl Probe for Recording {
    fn wants(&self, _layer: usize, _point: Point) -> bool {
        true
    }

    fn value(&mut self, layer: usize, point: Point, values: &[f32]) {
        self.push(layer, point.as_str(), Value::Plain(values.to_vec()));
    }

    fn routing(&mut self, layer: usize, _top_k: usize, ids: &[u32], weights: &[f32]) {
        self.push(layer, ROUTING, Value::Routing { ids: ids.to_vec(), weights: weights.to_vec() });
    }
}

/// A value of the second runner.
enum Found<'a> {
    Plain(&'a [f32]),
    Routing { top_k: usize, ids: &'a [u32], weights: &'a [f32] },
}

/// Compares what the second runner computes with a recording, as it comes.
struct Comparison<'a> {
    recording: &'a Recording,
    index: HashMap<(usize, &'static str), usize>,
    /// One per recorded value.
    rows: Vec<Option<Difference>>,
    routing: Vec<RoutingDifference>,
    error: Option<Error>,
}

impl<'a> Comparison<'a> {
    fn new(recording: &'a Recording) -> Self {
        let places = recording.values.iter().enumerate();
        let index = places.map(|(at, (layer, point, _))| ((*layer, *point), at)).collect();
        let rows = vec![None; recording.values.len()];
        Self { recording, index, rows, routing: Vec::new(), error: None }
    }

    fn add(&mut self, layer: usize, point: &'static str, found: Found<'_>) {
        let Some(&at) = self.index.get(&(layer, point)) else { return };
        let (relative_l2, max_abs) = match (&self.recording.values[at].2, found) {
            (Value::Plain(want), Found::Plain(got)) if want.len() == got.len() => distance(want, got),
            (
                Value::Routing { ids: want, weights },
                Found::Routing { top_k, ids: got, weights: got_weights },
            ) if want.len() == got.len() && top_k > 0 && got.len().is_multiple_of(top_k) => {
                let (different, max_abs) = routing_distance(top_k, (want, weights), (got, got_weights));
                let tokens = got.len() / top_k;
                self.routing.push(RoutingDifference { layer, tokens, different });
                (different as f64 / tokens.max(1) as f64, max_abs)
            }
            _ => {
                let message = format!("layer {layer}: the runners report {point} in different shapes");
                self.error.get_or_insert(Error::Run(message));
                return;
            }
        };
        let finite = relative_l2.is_finite() && max_abs.is_finite();
        self.rows[at] = Some(Difference { layer, point, relative_l2, max_abs, finite });
    }

    fn report(self, tolerance: Tolerance) -> Result<Report> {
        if let Some(error) = self.error {
            return Err(error);
        }
        let recorded = self.recording.values.iter().zip(&self.rows);
        let unreported =
            recorded.filter(|(_, row)| row.is_none()).map(|((layer, point, _), _)| (*layer, *point));
        let unreported = unreported.collect();
        let rows: Vec<Difference> = self.rows.into_iter().flatten().collect();
        let over = |row: &&Difference| {
            let limit = if row.point == ROUTING { tolerance.routing } else { tolerance.relative_l2 };
            !row.finite || row.relative_l2 > limit
        };
        let first = rows.iter().find(over).copied();
        Ok(Report { rows, routing: self.routing, first, unreported })
    }
}

impl Probe for Comparison<'_> {
    fn wants(&self, layer: usize, point: Point) -> bool {
        self.index.contains_key(&(layer, point.as_str()))
    }

    fn value(&mut self, layer: usize, point: Point, values: &[f32]) {
        self.add(layer, point.as_str(), Found::Plain(values));
    }

    fn routing(&mut self, layer: usize, top_k: usize, ids: &[u32], weights: &[f32]) {
        self.add(layer, ROUTING, Found::Routing { top_k, ids, weights });
    }
}

/// Relative Euclidean and largest absolute difference; infinite where a value is not finite.
fn distance(a: &[f32], b: &[f32]) -> (f64, f64) {
    let (mut difference, mut norm, mut max_abs) = (0.0, 0.0, 0.0f64);
    for (&a, &b) in a.iter().zip(b) {
        if !a.is_finite() || !b.is_finite() {
            return (f64::INFINITY, f64::INFINITY);
        }
        let (a, b) = (f64::from(a), f64::from(b));
        difference += (a - b) * (a - b);
        norm += a * a;
        max_abs = max_abs.max((a - b).abs());
    }
    // Zeros against anything else differ entirely, and still by a finite number.
    let relative = if difference == 0.0 { 0.0 } else { (difference / norm.max(1e-100)).sqrt() };
    (relative, max_abs)
}

/// Tokens whose experts differ, and the largest difference of weights where they agree.
fn routing_distance(top_k: usize, a: (&[u32], &[f32]), b: (&[u32], &[f32])) -> (usize, f64) {
    let (mut different, mut max_abs) = (0, 0.0f64);
    for first in (0..a.0.len()).step_by(top_k) {
        let token = first..first + top_k;
        if a.0[token.clone()] == b.0[token.clone()] {
            max_abs = max_abs.max(distance(&a.1[token.clone()], &b.1[token]).1);
        } else {
            different += 1;
        }
    }
    (different, max_abs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;

    #[test]
    fn distances_are_relative_and_see_nan() {
        assert_eq!(distance(&[3.0, 4.0], &[3.0, 4.0]), (0.0, 0.0));
        assert_eq!(distance(&[3.0, 4.0], &[3.0, 4.5]), (0.1, 0.5));
        assert_eq!(distance(&[3.0], &[f32::NAN]).0, f64::INFINITY);
        assert!(distance(&[0.0], &[1.0]).0 > 1e10);
        assert_eq!(distance(&[0.0], &[0.0]), (0.0, 0.0));
    }

    #[test]
    fn routing_counts_tokens_and_compares_weights_where_sets_agree() {
        let a = (&[0, 1, 2, 3][..], &[0.5, 0.5, 0.25, 0.75][..]);
        let b = (&[0, 1, 1, 3][..], &[0.5, 0.25, 0.1, 0.9][..]);
        assert_eq!(routing_distance(2, a, b), (1, 0.25));
    }

    /// A copy of a fixture whose layer 1 has a NaN in a norm, and the sound one.
    fn sound_and_poisoned() -> Option<[std::sync::Arc<Model>; 2]> {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let places = ["../tests/golden/mixtral", "../../shared/cases/mixtral"].map(|place| root.join(place));
        let Some(sound) = places.into_iter().find(|place| place.join("config.json").exists()) else {
            println!("SKIP: no golden case mixtral");
            return None;
        };
        let copy = std::env::temp_dir().join(format!("moebius-check-{}", std::process::id()));
        std::fs::create_dir_all(&copy).unwrap();
        for entry in std::fs::read_dir(&sound).unwrap() {
            let path = entry.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            if let Ok((header, metadata)) = safetensors::SafeTensors::read_metadata(&bytes)
                && let Some(norm) = metadata.info("model.layers.1.post_attention_layernorm.weight")
            {
                bytes[8 + header + norm.data_offsets.0 + 6..][..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
            }
            std::fs::write(copy.join(path.file_name().unwrap()), bytes).unwrap();
        }
        let models = [&sound, &copy].map(|at| Model::open(crate::Checkpoint::open(at).unwrap()).unwrap());
        std::fs::remove_dir_all(copy).unwrap();
        Some(models)
    }

    #[test]
    fn a_poisoned_weight_runs_and_is_found() {
        let Some([sound, poisoned]) = sound_and_poisoned() else { return };
        let capacity = crate::Capacity::new(1, 64, LOGIT_ROWS);
        let runner = |model| crate::reference::ReferenceRunner::new(model, capacity).unwrap();
        let (mut a, mut b) =
            (runner(std::sync::Arc::clone(&sound)), runner(std::sync::Arc::clone(&poisoned)));
        let prompt: Vec<u32> = (10..30).collect();

        let same = compare(&mut a, &mut runner(std::sync::Arc::clone(&sound)), &prompt, Tolerance::REFERENCE)
            .unwrap();
        same.verdict().unwrap();
        assert!(same.unreported.is_empty() && same.rows.iter().all(|row| row.relative_l2 == 0.0));
        // Embedding; five points and the routing of each layer; the last norm and the logits.
        assert_eq!(same.rows.len(), 1 + 6 * 3 + 2);
        assert_eq!(same.rows.last().unwrap().point, LOGITS);

        let report = compare(&mut a, &mut b, &prompt, Tolerance::REFERENCE).unwrap();
        let first = report.first.unwrap();
        assert_eq!((first.layer, first.point, first.finite), (1, "post_norm", false));
        assert!(report.verdict().unwrap_err().to_string().contains("layer 1: post_norm"));

        assert!(scan_weights(&sound).unwrap().tensors > 90);
        let error = scan_weights(&poisoned).unwrap_err().to_string();
        assert!(
            error.contains("model.layers.1.post_attention_layernorm.weight (1, first at [3])"),
            "{error}"
        );
    }
}
