//! What happened in a simulation.

/// Counts.
#[derive(Debug, Default)]
pub struct Stats {
    pub steps: usize,
    /// That ran.
    pub tokens: usize,
    pub requests: usize,
    pub forks: usize,
    pub finished: usize,
    pub cancelled_waiting: usize,
    pub cancelled_loading: usize,
    pub cancelled_in_prompt: usize,
    pub cancelled_in_output: usize,
    /// Forward passes, and the sequences that they took with them.
    pub failures: usize,
    pub failed: usize,
    pub admitted: usize,
    /// Admitted with something cached.
    pub hits: usize,
    pub hit_tokens: usize,
    pub preempted: usize,
    pub copies: usize,
    /// Blocks that came from disk, and sequences for which not all did.
    pub restored: usize,
    pub restores_failed: usize,
    /// Steps in which a younger sequence was let past one that waits for another's blocks.
    pub passed: usize,
    /// Steps that the oldest sequence stood still, at most.
    pub longest_wait: usize,
}

impl Stats {
    /// All the ways a sequence ends.
    pub fn ended(&self) -> usize {
        let waiting = self.cancelled_waiting + self.cancelled_loading;
        self.finished + self.failed + waiting + self.cancelled_in_prompt + self.cancelled_in_output
    }

    pub fn add(&mut self, other: &Self) {
        let Self { longest_wait, .. } = *self;
        for (mine, its) in self.counts().into_iter().zip(other.values()) {
            *mine += its;
        }
        self.longest_wait = longest_wait.max(other.longest_wait);
    }

    /// Everything that a long simulation must have seen.
    pub fn check_all_happened(&self) {
        assert!(self.values().iter().all(|count| *count > 0), "{self:?}");
    }
}

/// The fields, named once.
macro_rules! fields {
    ($($field:ident)*) => {
        impl Stats {
            fn counts(&mut self) -> Vec<&mut usize> {
                vec![$(&mut self.$field),*]
            }

            fn values(&self) -> Vec<usize> {
                vec![$(self.$field),*]
            }
        }
    };
}

fields! {
    steps tokens requests forks finished cancelled_waiting cancelled_loading cancelled_in_prompt cancelled_in_output
    failures failed admitted hits hit_tokens preempted copies restored restores_failed passed longest_wait
}
