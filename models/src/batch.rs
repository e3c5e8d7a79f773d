//! The plain integers one forward pass needs. The scheduler writes them, runners read them, and
//! neither knows the other.

use kernels::attention::PAGE;

use crate::error::{Error, Result};
use crate::runner::Capacity;

/// Tokens of one cache block.
pub const PAGE_TOKENS: usize = PAGE;

/// Which layers a cache block belongs to. Layers with a sliding window have blocks of their own, because these come
/// free when the window has passed them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockKind {
    /// Layers that see every position.
    Full,
    /// Layers with a window.
    Window,
}

/// The block tables of one sequence: one for each [`BlockKind`], of equal length. Entries behind the window may be any
/// block: nothing reads them.
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a> {
    /// Of [`BlockKind::Full`].
    pub full: &'a [u32],
    /// Of [`BlockKind::Window`]; where the model has no such layers, anything.
    pub window: &'a [u32],
}

impl<'a, T: AsRef<[u32]> + ?Sized> From<&'a T> for Tables<'a> {
    /// The same ids for both kinds.
    fn from(table: &'a T) -> Self {
        Self { full: table.as_ref(), window: table.as_ref() }
    }
}

/// Where the rows of all sequences live, for layers of one [`BlockKind`].
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Cache slot each token's rows are written to `[tokens]`.
    pub slots: Vec<u32>,
    /// Block tables of all sequences, one after another.
    pub tables: Vec<u32>,
}

impl Places {
    fn push(&mut self, positions: std::ops::Range<usize>, table: &[u32]) {
        let slot = |position| table[position / PAGE] * PAGE as u32 + (position % PAGE) as u32;
        self.slots.extend(positions.map(slot));
        self.tables.extend_from_slice(table);
    }

    fn clear(&mut self) {
        self.slots.clear();
        self.tables.clear();
    }

    /// The block table of a span.
    pub fn table(&self, span: &SequenceSpan) -> &[u32] {
        &self.tables[span.table..span.table + span.blocks]
    }

    fn check(&self, kind: BlockKind, blocks: usize) -> Result<()> {
        if let Some(slot) = self.slots.iter().find(|slot| **slot as usize >= blocks * PAGE) {
            let message =
                format!("{kind:?} cache slot {slot} is outside the capacity of {blocks} blocks of {PAGE}");
            return Err(Error::Run(message));
        }
        if let Some(block) = self.tables.iter().find(|block| **block as usize >= blocks) {
            let message = format!("{kind:?} cache block {block} is outside the capacity of {blocks} blocks");
            return Err(Error::Run(message));
        }
        Ok(())
    }
}

/// New tokens of one or more sequences, in order, and where their cache rows live.
///
/// A sequence's row for position `p` is in slot `table[p / PAGE] * PAGE + p % PAGE`.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids of all sequences, one after another `[tokens]`.
    pub tokens: Vec<u32>,
    /// Absolute position of each token `[tokens]`.
    pub positions: Vec<u32>,
    /// Rows of layers that see everything.
    pub full: Places,
    /// Rows of layers with a window.
    pub window: Places,
    /// The sequences, in the order of their tokens.
    pub sequences: Vec<SequenceSpan>,
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
    /// First entry of the block table in [`Places::tables`].
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
        self.full.clear();
        self.window.clear();
        self.sequences.clear();
        self.logit_rows.clear();
    }

    /// Adds `tokens` of one sequence, of which `start` tokens are cached already.
    ///
    /// # Panics
    /// If a table is too short for the positions, the two differ in length, or `tokens` is empty.
    pub fn push<'a>(
        &mut self,
        tokens: &[u32],
        start: usize,
        tables: impl Into<Tables<'a>>,
        want: WantLogits,
    ) {
        let Tables { full, window } = tables.into();
        assert!(!tokens.is_empty(), "a sequence span has at least one token");
        let end = start + tokens.len();
        assert!(end <= full.len() * PAGE, "{end} positions, {} blocks", full.len());
        assert_eq!(full.len(), window.len(), "tables of one sequence");
        let first = self.tokens.len();
        self.sequences.push(SequenceSpan {
            first,
            tokens: tokens.len(),
            table: self.full.tables.len(),
            blocks: full.len(),
        });
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(start as u32..end as u32);
        self.full.push(start..end, full);
        self.window.push(start..end, window);
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
        let tokens = self.tokens.len();
        if tokens > capacity.batch_tokens {
            return fail(format!("a batch of {tokens} tokens; the limit is {}", capacity.batch_tokens));
        }
        let slots = (self.full.slots.len(), self.window.slots.len());
        if (self.positions.len(), slots) != (tokens, (tokens, tokens)) {
            let counts = format!("{} positions and {slots:?} slots", self.positions.len());
            return fail(format!("a batch of {tokens} tokens has {counts}"));
        }
        if let Some(id) = self.tokens.iter().find(|id| **id as usize >= vocab) {
            return fail(format!("token id {id} is outside the vocabulary of {vocab}"));
        }
        self.full.check(BlockKind::Full, capacity.blocks)?;
        // A runner of a model without windows has no such blocks and reads no such table.
        if capacity.window_blocks > 0 {
            self.window.check(BlockKind::Window, capacity.window_blocks)?;
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
            let entries = self.full.tables.len().min(self.window.tables.len());
            if span.table + span.blocks > entries || last / PAGE >= span.blocks {
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

    /// Where layers of a kind have their rows.
    pub fn places(&self, kind: BlockKind) -> &Places {
        match kind {
            BlockKind::Full => &self.full,
            BlockKind::Window => &self.window,
        }
    }
}
