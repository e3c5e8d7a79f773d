//! The plain integers one forward pass needs. The scheduler writes them, runners read them, and
//! neither knows the other.

use kernels::attention::PAGE;

use crate::error::{Error, Result};
use crate::runner::Capacity;

/// Tokens of one cache block.
pub const PAGE_TOKENS: usize = PAGE;

/// New tokens of one or more sequences, in order, and where their cache rows live.
///
/// A sequence's row for position `p` is in slot `table[p / PAGE] * PAGE + p % PAGE`.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids of all sequences, one after another `[tokens]`.
    pub tokens: Vec<u32>,
    /// Absolute position of each token `[tokens]`.
    pub positions: Vec<u32>,
    /// Cache slot each token's rows are written to `[tokens]`.
    pub slots: Vec<u32>,
    /// The sequences, in the order of their tokens.
    pub sequences: Vec<SequenceSpan>,
    /// Block tables of all sequences, one after another.
    pub tables: Vec<u32>,
    /// Indices into `tokens` whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
}

/// One sequence's part of a [`Batch`].
#[derive(Clone, Copy, Debug)]
pub struct SequenceSpan {
    /// First token of the span.
    pub first: usize,
    /// Tokens in the span; at least one. Their positions are consecutive.
    pub tokens: usize,
    /// First entry of the block table in [`Batch::tables`].
    pub table: usize,
    /// Entries of the block table.
    pub blocks: usize,
}

/// Which of a sequence's new tokens want logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WantLogits {
    /// None: more of the prompt follows.
    None,
    /// The last one.
    Last,
    /// Every one.
    All,
}

impl Batch {
    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.sequences.clear();
        self.tables.clear();
        self.logit_rows.clear();
    }

    /// Adds `tokens` of one sequence, of which `start` tokens are cached already.
    ///
    /// # Panics
    /// If `table` is too short for the positions, or `tokens` is empty.
    pub fn push(&mut self, tokens: &[u32], start: usize, table: &[u32], want: WantLogits) {
        assert!(!tokens.is_empty(), "a sequence span has at least one token");
        let end = start + tokens.len();
        assert!(end <= table.len() * PAGE, "{end} positions, {} blocks", table.len());
        let first = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        for position in start..end {
            self.positions.push(position as u32);
            self.slots.push(table[position / PAGE] * PAGE as u32 + (position % PAGE) as u32);
        }
        self.sequences.push(SequenceSpan {
            first,
            tokens: tokens.len(),
            table: self.tables.len(),
            blocks: table.len(),
        });
        self.tables.extend_from_slice(table);
        let last = (self.tokens.len() - 1) as u32;
        match want {
            WantLogits::None => {}
            WantLogits::Last => self.logit_rows.push(last),
            WantLogits::All => self.logit_rows.extend(first as u32..=last),
        }
    }

    /// Checks everything that can be wrong with a batch before a runner of `capacity` writes
    /// anything; `logits` is the length of the slice for them.
    ///
    /// # Errors
    /// Says what does not fit.
    pub fn check(&self, capacity: &Capacity, vocab: usize, logits: usize) -> Result<()> {
        let fail = |message: String| Err(Error::Run(message));
        let (tokens, blocks) = (self.tokens.len(), capacity.blocks);
        if tokens > capacity.batch_tokens {
            return fail(format!("a batch of {tokens} tokens; the limit is {}", capacity.batch_tokens));
        }
        if (self.positions.len(), self.slots.len()) != (tokens, tokens) {
            let counts = format!("{} positions and {} slots", self.positions.len(), self.slots.len());
            return fail(format!("a batch of {tokens} tokens has {counts}"));
        }
        if let Some(id) = self.tokens.iter().find(|id| **id as usize >= vocab) {
            return fail(format!("token id {id} is outside the vocabulary of {vocab}"));
        }
        if let Some(slot) = self.slots.iter().find(|slot| **slot as usize >= blocks * PAGE) {
            return fail(format!("cache slot {slot} is outside the capacity of {blocks} blocks of {PAGE}"));
        }
        if let Some(block) = self.tables.iter().find(|block| **block as usize >= blocks) {
            return fail(format!("cache block {block} is outside the capacity of {blocks} blocks"));
        }
        let mut next = 0;
        for span in &self.sequences {
            let end = span.first + span.tokens;
            if span.first != next || span.tokens == 0 || end > tokens {
                return fail(format!(
                    "a sequence of tokens {}..{end} does not follow token {next}",
                    span.first
                ));
            }
            let positions = &self.positions[span.first..end];
            if positions.windows(2).any(|pair| pair[0].checked_add(1) != Some(pair[1])) {
                return fail(format!("the positions of tokens {}..{end} are not consecutive", span.first));
            }
            let last = positions[span.tokens - 1] as usize;
            if span.table + span.blocks > self.tables.len() || last / PAGE >= span.blocks {
                return fail(format!("position {last} is outside its block table of {} blocks", span.blocks));
            }
            next = end;
        }
        if next != tokens {
            return fail(format!("sequences cover {next} of {tokens} tokens"));
        }
        let rows = self.logit_rows.len();
        if rows > capacity.logit_rows {
            return fail(format!("{rows} rows of logits; the limit is {}", capacity.logit_rows));
        }
        if let Some(row) = self.logit_rows.iter().find(|row| **row as usize >= tokens) {
            return fail(format!("logits of token {row} are asked for; the batch has {tokens}"));
        }
        if logits != rows * vocab {
            return fail(format!("{rows} rows of {vocab} logits do not fit a slice of {}", logits));
        }
        Ok(())
    }

    /// The block table of a span.
    pub fn table(&self, span: &SequenceSpan) -> &[u32] {
        &self.tables[span.table..span.table + span.blocks]
    }
}
