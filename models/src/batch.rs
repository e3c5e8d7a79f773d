//! The plain integers one forward pass needs. The scheduler writes them, runners read them, and
//! neither knows the other.

use kernels::attention::PAGE;

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

    /// The block table of a span.
    pub fn table(&self, span: &SequenceSpan) -> &[u32] {
        &self.tables[span.table..span.table + span.blocks]
    }
}
