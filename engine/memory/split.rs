//! How the memory that there is becomes a context and blocks of the KV pool.
//!
//! One request of the whole context always fits; more of them need not, because a request can lose its blocks for a
//! while and prefixes are shared. So a pool is made as large as was asked for, or as all requests together could use,
//! but by itself never so large that the weights lose the memory they are read from.

use kernels::attention::CacheType;
use models::batch::PAGE_TOKENS;
use models::{ModelConfig, Numerics};

use super::{Bytes, Count, MemoryPlan, Pool, Weights, available_memory};
use crate::engine::EngineOptions;
use crate::error::Error;

/// Context that is planned for unless the user says otherwise, if it fits.
const DEFAULT_CONTEXT: usize = 32 * 1024;
/// Context below which a default is not reduced.
const MIN_CONTEXT: usize = 2048;
/// A prefix can be continued where the window blocks before its end are cached: one such place is paid for per so
/// many tokens of the pool. A window is short against that, so it costs a few per cent.
const TOKENS_PER_PREFIX: usize = 4096;
/// Of what is available, the part that a pool leaves alone unless it was asked for.
const SPARE_PART: usize = 16;
/// Most slots of a pool: their numbers have 32 bits.
const MOST_BLOCKS: usize = u32::MAX as usize / PAGE_TOKENS;

/// What the user asks for; what is not given is planned.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    /// Longest prompt plus output (`--context`).
    pub context: Option<usize>,
    /// Bytes of the KV pool (`--kv-memory`).
    pub kv_memory: Option<usize>,
    /// How cached values are stored (`--kv-type`); `None` = as the numerics say.
    pub cache_type: Option<CacheType>,
    /// Requests that run at a time; 0 counts as 1.
    pub sequences: usize,
    /// Most tokens of a step; `None` = as [`EngineOptions::new`] says.
    pub step_tokens: Option<usize>,
    /// Whether there is a store behind the pool (`--kv-cache-dir`).
    pub store: bool,
}

/// The engine's limits and their plan, for what this machine has now.
///
/// # Errors
/// If the wishes contradict the model or each other, or nothing fits; with the numbers.
pub fn fit(
    config: &ModelConfig,
    weights: Weights,
    numerics: Numerics,
    wishes: &Wishes,
) -> Result<(EngineOptions, MemoryPlan), Error> {
    fit_into(available_memory(), config, weights, numerics, wishes)
}

/// As [`fit`], for a machine that has so much available; `None` = as much as it takes.
///
/// # Errors
/// As [`fit`].
pub fn fit_into(
    available: Option<usize>,
    config: &ModelConfig,
    weights: Weights,
    numerics: Numerics,
    wishes: &Wishes,
) -> Result<(EngineOptions, MemoryPlan), Error> {
    let split = Split { available, config, weights, numerics, wishes, sequences: wishes.sequences.max(1) };
    if let Some(context) = wishes.context {
        let longest = config.max_positions;
        if context > longest {
            let longest = Count(longest);
            return refuse(format!(
                "--context {context} is more than the {longest} tokens the model was made for"
            ));
        }
        if context == 0 {
            return refuse("--context 0 has room for no token".into());
        }
    }
    match (wishes.context, wishes.kv_memory) {
        (context, Some(budget)) => split.by_budget(context, budget),
        (Some(context), None) => split.by_context(context),
        (None, None) => split.by_default(),
    }
}

fn refuse<T>(message: String) -> Result<T, Error> {
    Err(Error::Unsupported(message))
}

struct Split<'a> {
    available: Option<usize>,
    config: &'a ModelConfig,
    weights: Weights,
    numerics: Numerics,
    wishes: &'a Wishes,
    sequences: usize,
}

type Fitted = Result<(EngineOptions, MemoryPlan), Error>;

impl Split<'_> {
    fn options(&self, context: usize, blocks: usize) -> EngineOptions {
        let window = self.config.window();
        let mut options = EngineOptions::new(context, self.sequences, window);
        options.blocks = blocks;
        if let Some(tokens) = self.wishes.step_tokens {
            options.step_tokens = tokens.clamp(1, context.max(1)).max(self.sequences);
        }
        options.window =
            window.map(|window| (window, self.window_blocks(window, blocks, options.step_tokens)));
        options.cache_type = self.wishes.cache_type;
        options
    }

    /// Window blocks beside so many full ones: each running sequence's window and the blocks at its ends, the step's
    /// chunks wherever they fall, and the windows before places where cached prefixes can be continued.
    fn window_blocks(&self, window: usize, blocks: usize, step_tokens: usize) -> usize {
        let window = window.div_ceil(PAGE_TOKENS);
        let prefixes = (blocks * PAGE_TOKENS).div_ceil(TOKENS_PER_PREFIX);
        let running = self.sequences * (window + 2) + step_tokens.div_ceil(PAGE_TOKENS);
        running.saturating_add(prefixes.saturating_mul(window + 1)).min(blocks).max(1)
    }

    fn plan(&self, options: &EngineOptions) -> MemoryPlan {
        let system = (self.wishes.store, self.available);
        MemoryPlan::new(self.config, self.weights, self.numerics, options, system)
    }

    fn planned(&self, context: usize, blocks: usize) -> Fitted {
        let options = self.options(context, blocks);
        Ok((options, self.plan(&options)))
    }

    fn pool(&self, context: usize, blocks: usize) -> Pool {
        Pool::new(self.config, self.numerics, &self.options(context, blocks).capacity())
    }

    /// The most blocks, up to `most`, for which `fits` holds; it must hold for fewer wherever it does for more.
    fn most_blocks(&self, most: usize, fits: impl Fn(usize) -> bool) -> usize {
        let (mut good, mut bad) = (0, most.min(MOST_BLOCKS) + 1);
        while bad - good > 1 {
            let middle = good + (bad - good) / 2;
            *(if fits(middle) { &mut good } else { &mut bad }) = middle;
        }
        good
    }

    /// The pool has as many blocks as `budget` pays for.
    fn by_budget(&self, context: Option<usize>, budget: usize) -> Fitted {
        let longest = self.config.max_positions.min(DEFAULT_CONTEXT);
        let wanted = context.unwrap_or(longest);
        let most =
            |context| self.most_blocks(MOST_BLOCKS, |blocks| self.pool(context, blocks).bytes() <= budget);
        let blocks = most(wanted);
        let bytes = Bytes(budget);
        if blocks == 0 {
            let block = Bytes(self.pool(wanted, 1).bytes());
            let message =
                format!("--kv-memory {bytes} holds no block of {PAGE_TOKENS} tokens, which takes {block}");
            return refuse(message);
        }
        let held = blocks * PAGE_TOKENS;
        let context = match context {
            Some(context) if context > held => {
                let needed = Bytes(self.pool(context, context.div_ceil(PAGE_TOKENS)).bytes());
                let held = Count(held);
                return refuse(format!(
                    "--kv-memory {bytes} holds {held} tokens, fewer than --context {context}, which takes {needed}"
                ));
            }
            Some(context) => context,
            None => wanted.min(held),
        };
        // A shorter context runs shorter steps: no window block more.
        let (options, plan) = self.planned(context, blocks)?;
        plan.check()?;
        Ok((options, plan))
    }

    /// Rooms to try for pool and buffers, the best for speed first: what leaves all weights in memory, what leaves
    /// those that every token touches, and all there is. `None` = no limit.
    fn rooms(&self) -> [Option<usize>; 3] {
        let Some(available) = self.available else { return [None; 3] };
        let spare = available - available / SPARE_PART;
        let Weights { mapped_bytes, token_bytes, .. } = self.weights;
        [spare.saturating_sub(mapped_bytes), spare.saturating_sub(token_bytes.min(mapped_bytes)), available]
            .map(Some)
    }

    /// The largest pool of at most all requests' contexts that fits; without room for the weights, of one context.
    fn within(&self, context: usize) -> Option<(EngineOptions, MemoryPlan)> {
        let one = context.div_ceil(PAGE_TOKENS);
        let all = one.saturating_mul(self.sequences);
        let fits = |room: Option<usize>, blocks: usize| {
            let plan = self.plan(&self.options(context, blocks));
            room.is_none_or(|room| plan.required_bytes() <= room)
        };
        let rooms = self.rooms();
        let last = rooms.len() - 1;
        for (index, room) in rooms.into_iter().enumerate() {
            if fits(room, one) {
                let most = if index == last && room.is_some() { one } else { all };
                let blocks = self.most_blocks(most, |blocks| fits(room, blocks));
                return self.planned(context, blocks.max(one)).ok();
            }
        }
        None
    }

    /// The pool holds one request of `context` tokens at least.
    fn by_context(&self, context: usize) -> Fitted {
        let one = context.div_ceil(PAGE_TOKENS);
        if one > MOST_BLOCKS {
            return refuse(format!("--context {context} is more than can be numbered"));
        }
        if let Some(fitted) = self.within(context) {
            return Ok(fitted);
        }
        let (options, plan) = self.planned(context, one)?;
        plan.check()?;
        Ok((options, plan))
    }

    /// The default context, or less if that does not fit.
    fn by_default(&self) -> Fitted {
        let mut context = self.config.max_positions.min(DEFAULT_CONTEXT);
        loop {
            if let Some(fitted) = self.within(context) {
                return Ok(fitted);
            }
            if context <= MIN_CONTEXT {
                return self.by_context(context);
            }
            context = (context / 2).max(MIN_CONTEXT);
        }
    }
}
