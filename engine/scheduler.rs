//! Which tokens of which sequences run in the next step. Pure policy over integers: it sees no
//! tensor, no token and no text.
//!
//! Every sequence that is generating gets its one token; what is left of the step's budget goes to
//! prompts, first come first served. So a long prompt delays others by one chunk at most.

/// What the policy knows of one running sequence.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Tokens whose cache rows exist.
    pub cached: usize,
    /// Tokens known: the prompt and what was generated.
    pub known: usize,
}

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Index of the sequence in arrival order.
    pub sequence: usize,
    /// Tokens to run.
    pub tokens: usize,
}

/// Fills `shares` for one step of at most `budget` tokens. `running` is in arrival order.
pub fn schedule(running: &[Progress], budget: usize, shares: &mut Vec<Share>) {
    shares.clear();
    let mut left = budget;
    let mut give = |shares: &mut Vec<Share>, sequence: usize, wanted: usize| {
        let tokens = wanted.min(left);
        if tokens > 0 {
            shares.push(Share { sequence, tokens });
            left -= tokens;
        }
    };
    let missing = |progress: &Progress| progress.known - progress.cached;
    for (sequence, progress) in running.iter().enumerate().filter(|(_, p)| missing(p) == 1) {
        give(shares, sequence, missing(progress));
    }
    for (sequence, progress) in running.iter().enumerate().filter(|(_, p)| missing(p) > 1) {
        give(shares, sequence, missing(progress));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(running: &[(usize, usize)], budget: usize) -> Vec<(usize, usize)> {
        let running: Vec<Progress> =
            running.iter().map(|&(cached, known)| Progress { cached, known }).collect();
        let mut shares = Vec::new();
        schedule(&running, budget, &mut shares);
        shares.iter().map(|share| (share.sequence, share.tokens)).collect()
    }

    #[test]
    fn decoding_goes_first_and_prompts_fill_the_rest_in_order() {
        assert_eq!(run(&[(0, 100), (9, 10), (0, 50)], 64), [(1, 1), (0, 63)]);
        assert_eq!(run(&[(63, 100), (10, 11), (0, 50)], 64), [(1, 1), (0, 37), (2, 26)]);
        assert_eq!(run(&[], 64), []);
    }

    #[test]
    fn a_step_never_exceeds_its_budget() {
        let many: Vec<(usize, usize)> = (0..100).map(|i| (i, i + 1)).collect();
        assert_eq!(run(&many, 8).iter().map(|share| share.1).sum::<usize>(), 8);
    }
}
