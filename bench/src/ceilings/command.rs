//! `moebius bench ceilings`: bandwidth by threads, pages and prefetch; arithmetic peaks; parallel regions.

use std::hint::black_box;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use kernels::team;

use super::{Bound, Pages, Reading, STREAMS, memory, peak_rate, peaks, read_rate, spin, turns};
use crate::row::{NO_MODEL, Row, Setting, Share, Times, median};
use crate::{Error, Sink};

/// What an empty region may cost.
const REGION_TARGET_SECONDS: f64 = 2e-6;
/// Work on each side of a region, as between the products of a decode step.
const SIDE_SECONDS: f64 = 20e-6;
/// Distances of prefetching, in bytes.
const PREFETCHES: [usize; 5] = [0, 512, 2048, 8192, 32768];

/// All rows, for 1 to `threads` threads (every number up to 8, beyond that doublings). `quick` is for tests.
///
/// # Errors
/// If there is no memory or no thread for it, or a row cannot be written.
pub fn measure(threads: usize, quick: bool, sink: &mut dyn Sink) -> Result<(), Error> {
    let mut counts: Vec<usize> = (1..=threads.min(8)).collect();
    counts.extend((4..).map(|shift| 1 << shift).take_while(|count| *count < threads));
    if threads > 8 {
        counts.push(threads);
    }
    for count in counts {
        if sink.stopped() {
            break;
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build().map_err(io::Error::other)?;
        pool.install(|| {
            reads(quick, sink)?;
            arithmetic(quick, sink)?;
            if count > 1 { regions(quick, sink) } else { Ok(()) }
        })?;
    }
    Ok(())
}

fn setting() -> Setting {
    Setting { numerics: "reference".into(), runner: "cpu", threads: team::threads(), model: NO_MODEL.into() }
}

fn reads(quick: bool, sink: &mut dyn Sink) -> Result<(), Error> {
    let (bytes, runs) = if quick { (16 << 20, 2) } else { (1 << 30, 9) };
    let mut found = Vec::new();
    for (pages, name) in [(Pages::Small, "4k"), (Pages::Huge, "huge")] {
        let memory = memory(bytes, pages)?;
        let windows: Vec<&[u8]> = memory.chunks(bytes / 4).collect();
        let streams = PREFETCHES.map(Reading::Stream);
        for reading in streams.into_iter().chain([Reading::SideBySide]) {
            let seconds: Vec<f64> = (0..runs)
                .map(|run| windows[run % 4].len() as f64 / read_rate(windows[run % 4], reading))
                .collect();
            let name = match reading {
                Reading::Stream(0) => format!("read/{name}-pages"),
                Reading::Stream(prefetch) => format!("read/{name}-pages/prefetch-{prefetch}"),
                Reading::SideBySide => format!("read/{name}-pages/{STREAMS}-side-by-side"),
            };
            found.push((name, windows[0].len() as u64, seconds));
        }
    }
    let rate = |bytes: u64, seconds: f64| bytes as f64 / seconds;
    let best = found.iter().map(|(_, bytes, seconds)| rate(*bytes, median(seconds.iter().copied())));
    let best = best.fold(0.0, f64::max);
    for (name, bytes, seconds) in found {
        let times = Times::of(&seconds);
        let share =
            Share { bound: Bound::ReadBandwidth, value: best, share: rate(bytes, times.median) / best };
        sink.row(Row::new(name, times, (bytes, 0), Some(share), &setting()))?;
    }
    Ok(())
}

fn arithmetic(quick: bool, sink: &mut dyn Sink) -> Result<(), Error> {
    let runs = if quick { 2 } else { 15 };
    let peaks = peaks();
    let measured: Vec<(u64, Times)> = peaks
        .iter()
        .map(|peak| {
            let turns = turns(peak);
            let operations = turns * peak.operations * team::threads() as u64;
            let seconds: Vec<f64> = (0..runs).map(|_| operations as f64 / peak_rate(peak, turns)).collect();
            (operations, Times::of(&seconds))
        })
        .collect();
    let rate = |(operations, times): &(u64, Times)| *operations as f64 / times.median;
    for (peak, found) in peaks.iter().zip(&measured) {
        let same = peaks.iter().zip(&measured).filter(|(other, _)| peak.bound.takes(other));
        let value = same.map(|(_, found)| rate(found)).fold(0.0, f64::max);
        let share = Share { bound: peak.bound, value, share: rate(found) / value };
        let name = format!("{}/{}", peak.bound.as_str(), peak.isa);
        sink.row(Row::new(name, found.1, (0, found.0), Some(share), &setting()))?;
    }
    Ok(())
}

/// One region in which every task takes so many seconds.
type Region<'a> = &'a (dyn Fn(f64) + Sync);

/// What a parallel region costs over its work: ours with held threads, and rayon's own.
fn regions(quick: bool, sink: &mut dyn Sink) -> Result<(), Error> {
    let (runs, turns) = if quick { (2, 20) } else { (25, 400) };
    let threads = team::threads();
    // Work that another thread than the one that opened the region did: where there is none, the other cores
    // were busy, and the row says nothing.
    let (helped, opener) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let task = |seconds: f64| {
        if rayon::current_thread_index() != Some(opener.load(Ordering::Relaxed)) {
            helped.fetch_add(1, Ordering::Relaxed);
        }
        spin(seconds);
    };
    let team = |seconds: f64| team::run(threads, &|_| task(seconds));
    let broadcast = |seconds: f64| _ = rayon::broadcast(|_| task(seconds));
    let join = |seconds: f64| fork(threads, &|| task(seconds));
    let kinds: [(&str, bool, Region<'_>); 3] =
        [("team", true, &team), ("rayon-join", false, &join), ("rayon-broadcast", false, &broadcast)];
    for (name, held, region) in kinds {
        for side in [0.0, SIDE_SECONDS] {
            helped.store(0, Ordering::Relaxed);
            let one = || {
                opener.store(rayon::current_thread_index().unwrap_or(usize::MAX), Ordering::Relaxed);
                let begun = Instant::now();
                for _ in 0..turns {
                    region(black_box(side));
                    spin(side);
                }
                (begun.elapsed().as_secs_f64() / turns as f64 - 2.0 * side).max(1e-10)
            };
            let seconds: Vec<f64> = (0..runs).map(|_| if held { team::hold(one) } else { one() }).collect();
            let name = if side == 0.0 { format!("region/{name}") } else { format!("region/{name}/20us") };
            let row = Row::new(name, Times::of(&seconds), (0, 0), None, &setting());
            let helped = helped.load(Ordering::Relaxed) as f64 / (runs * turns * (threads - 1)) as f64;
            sink.row(row.with("helped", helped).with("target_seconds", REGION_TARGET_SECONDS))?;
        }
    }
    Ok(())
}

/// `task` on `count` sides by nested joins.
fn fork(count: usize, task: &(dyn Fn() + Sync)) {
    match count {
        0 | 1 => task(),
        _ => _ = rayon::join(|| fork(count / 2, task), || fork(count - count / 2, task)),
    }
}
