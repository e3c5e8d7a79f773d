//! The scheduler, without an engine: one policy at a time, and random loads for as long as one likes.

#[path = "scheduler/checks.rs"]
mod checks;
#[path = "scheduler/memory.rs"]
mod memory;
#[path = "scheduler/policy.rs"]
mod policy;
#[path = "scheduler/simulation.rs"]
mod simulation;
#[path = "scheduler/stats.rs"]
mod stats;
#[path = "scheduler/text.rs"]
mod text;

use simulation::Simulation;
use stats::Stats;

fn simulate(seeds: std::ops::Range<u64>, steps: usize) -> Stats {
    let mut total = Stats::default();
    for seed in seeds {
        total.add(&Simulation::run(seed, steps));
    }
    println!("{total:?}");
    total.check_all_happened();
    total
}

#[test]
fn random_loads_end_well() {
    let stats = simulate(0..100, 300);
    assert!(stats.steps >= 10_000);
}

/// Takes minutes.
#[test]
#[ignore = "long"]
fn a_million_steps_end_well() {
    let stats = simulate(1000..1500, 2000);
    assert!(stats.steps >= 1_000_000);
}

/// `SEED=7 STEPS=50 cargo test --release --test scheduler replay -- --ignored`, with what a failed test printed.
#[test]
#[ignore = "for a seed that failed"]
fn replay() {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let seed = number("SEED").expect("SEED is a number");
    println!("{:?}", Simulation::run(seed, number("STEPS").unwrap_or(2000) as usize));
}
