//! What a step did, for whoever watches: plain counts, for every step in which something ran, began or lost its blocks.

use crate::blocks::Counts;

/// One step of the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Requests that hold cache blocks; those that wait for blocks from disk included.
    pub running: usize,
    /// Requests that wait for blocks from disk.
    pub restoring: usize,
    /// Requests that wait for their turn.
    pub waiting: usize,
    /// Blocks of layers that see every position.
    pub full_blocks: Counts,
    /// Blocks of layers with a window.
    pub window_blocks: Counts,
    /// Tokens of prompts (or read anew after a preemption) that the step ran.
    pub prefill_tokens: usize,
    /// Requests that got their next token.
    pub decode_tokens: usize,
    /// Tokens of requests admitted in this step that were found in memory or on disk.
    pub hit_tokens: usize,
    /// Tokens of requests admitted in this step.
    pub admitted_tokens: usize,
    /// Requests that lost their blocks in this step.
    pub preempted: usize,
    /// Time of the runner.
    pub forward_seconds: f64,
    /// Time of the decisions before and the books after it.
    pub schedule_seconds: f64,
}

/// Sees every step; called on the engine's thread, so it must not block.
pub type Observer = Box<dyn FnMut(&StepReport) + Send>;
