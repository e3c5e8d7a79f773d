//! The threads of a rayon pool, held for a whole step.
//!
//! Rayon wakes a sleeping thread in 5 to 30 µs, which is more than many operations of a decode step
//! take. [`hold`] asks for the threads once; they then wait in a loop for the parallel regions ([`run`])
//! of the step, which start and end in about a microsecond, and go back to rayon, which puts them to
//! sleep, when the step is over. A thread that comes late joins at whatever region is open; one that never
//! comes is not waited for: a region ends when its tasks are done. Nothing here allocates.
//!
//! Tasks that follow one another mostly run on one thread, which finds what the last one asked memory for: each
//! thread begins with a run of its own, from the front, and when that is done takes from the back of another's.
//! Which thread takes which task is still open, so a task's result must not depend on it.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Looks at the region counter before a waiting thread lets others run in between: some 50 µs.
const SPINS: u32 = 1000;

/// Runs of tasks at most; threads beyond share them.
const SHARES: usize = 64;

/// Value of [`Team::region`] after the last region.
const OVER: usize = usize::MAX;

/// On a line of its own, so that threads which poll one value do not slow another down.
#[repr(align(128))]
struct Padded<T>(T);

type Task<'a> = dyn Fn(usize) + Sync + 'a;

struct Team {
    /// Odd while a region is open, even between regions, then [`OVER`].
    region: Padded<AtomicUsize>,
    /// The tasks that nobody has taken: a run of them for each thread.
    shares: [Padded<Share>; SHARES],
    /// How many of the shares are used.
    used: usize,
    /// Helpers that may be working on a task.
    inside: Padded<AtomicUsize>,
    /// What the open region's tasks do. Written between regions only, by the thread that opens them.
    job: Cell<Option<*const Task<'static>>>,
    /// What a helper's task panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A run of tasks that nobody has taken: the first in the low half, the end in the high half.
struct Share(AtomicU64);

impl Share {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    fn set(&self, first: usize, end: usize) {
        self.0.store(first as u64 | ((end as u64) << 32), Ordering::Relaxed);
    }

    /// The first task for its owner, the last one for others.
    fn take(&self, owner: bool) -> Option<usize> {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let (first, end) = (seen & 0xFFFF_FFFF, seen >> 32);
            if first >= end {
                return None;
            }
            let (task, left) =
                if owner { (first, (first + 1) | (end << 32)) } else { (end - 1, first | ((end - 1) << 32)) };
            match self.0.compare_exchange_weak(seen, left, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(task as usize),
                Err(now) => seen = now,
            }
        }
    }
}

// SAFETY: `job` is written only while no helper may read it: helpers read it between adding themselves to
// `inside` and leaving, having seen an open region after they added themselves; the opening thread writes it
// before it opens a region and after it saw `inside` at zero behind the close. All of these are SeqCst.
unsafe impl Sync for Team {}

/// What the calling thread is to [`run`].
#[derive(Clone, Copy)]
enum Place {
    /// Not part of a team.
    Outside,
    /// Holds this team and may open a region.
    Holds(*const Team),
    /// Inside a task, or alone: everything is done on the spot.
    Serial,
}

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place::Outside) };
}

/// Sets the thread's place until it is dropped.
struct Placed(Place);

impl Placed {
    fn new(place: Place) -> Self {
        Self(PLACE.replace(place))
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        PLACE.set(self.0);
    }
}

/// Runs `body` with the threads of the current rayon pool at hand for its regions. `body` runs on a thread of
/// the pool; inside another [`hold`] it simply runs.
pub fn hold<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    if !matches!(PLACE.get(), Place::Outside) {
        return body();
    }
    let threads = rayon::current_num_threads();
    if threads == 1 {
        let _placed = Placed::new(Place::Serial);
        return body();
    }
    let team = Team {
        region: Padded(AtomicUsize::new(0)),
        shares: [const { Padded(Share::new()) }; SHARES],
        used: threads.min(SHARES),
        inside: Padded(AtomicUsize::new(0)),
        job: Cell::new(None),
        panic: Mutex::new(None),
    };
    let team = &team;
    let lead = || {
        // Dropped also if `body` panics: the helpers must not wait for ever.
        let _over = Over(team);
        let _placed = Placed::new(Place::Holds(team));
        body()
    };
    rayon::join(lead, || team.help(1, threads)).0
}

/// `task(i)` for every i below `tasks`, on all threads of the team that is held; on this thread alone inside
/// a task. Without a team, one is held for this region.
///
/// # Panics
/// If a task does.
pub fn run(tasks: usize, task: &Task<'_>) {
    match PLACE.get() {
        Place::Outside if tasks > 1 => hold(|| run(tasks, task)),
        // SAFETY: the thread's place is set by `hold`, which outlives all that `body` calls.
        Place::Holds(team) if tasks > 1 => unsafe { &*team }.open(tasks, task),
        _ => (0..tasks).for_each(task),
    }
}

/// Threads among which [`run`] shares its tasks.
pub fn threads() -> usize {
    match PLACE.get() {
        Place::Serial => 1,
        _ => rayon::current_num_threads(),
    }
}

impl Team {
    /// One region, from the thread that holds the team.
    fn open(&self, tasks: usize, task: &Task<'_>) {
        assert!(u32::try_from(tasks).is_ok(), "{tasks} tasks in one region");
        let task: *const Task<'_> = task;
        // SAFETY: only the lifetime is changed; `Close` ends all use of the pointer before this returns.
        let task: *const Task<'static> = unsafe { std::mem::transmute(task) };
        self.job.set(Some(task));
        for (i, share) in self.shares[..self.used].iter().enumerate() {
            share.0.set(i * tasks / self.used, (i + 1) * tasks / self.used);
        }
        self.region.0.fetch_add(1, Ordering::SeqCst);
        {
            let _close = Close(self);
            let _placed = Placed::new(Place::Serial);
            // SAFETY: the caller's reference is alive.
            self.work(0, unsafe { &*task });
        }
        let panic = self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Takes tasks until none is left, as thread `member` of the team.
    fn work(&self, member: usize, task: &Task<'_>) {
        let own = member % self.used;
        while let Some(index) = self.shares[own].0.take(true) {
            task(index);
        }
        for other in 1..self.used {
            while let Some(index) = self.shares[(own + other) % self.used].0.take(false) {
                task(index);
            }
        }
    }

    /// Helpers `member .. end`, as many as rayon has threads to spare for.
    fn help(&self, member: usize, end: usize) {
        if member + 1 < end {
            rayon::join(|| self.serve(member), || self.help(member + 1, end));
        } else {
            self.serve(member);
        }
    }

    /// Works on every region that opens, until the team is over.
    fn serve(&self, member: usize) {
        let _placed = Placed::new(Place::Serial);
        let (mut seen, mut waited) = (0, 0);
        loop {
            let region = self.region.0.load(Ordering::SeqCst);
            if region == OVER {
                return;
            }
            if region.is_multiple_of(2) || region == seen {
                waited += 1;
                if waited < SPINS {
                    std::hint::spin_loop()
                } else {
                    std::thread::yield_now()
                }
                continue;
            }
            (seen, waited) = (region, 0);
            self.inside.0.fetch_add(1, Ordering::SeqCst);
            if self.region.0.load(Ordering::SeqCst) == region {
                self.join_in(member);
            }
            self.inside.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn join_in(&self, member: usize) {
        let task = self.job.get().expect("an open region has tasks");
        // SAFETY: the region was open after this thread was counted as inside, so its opener waits for it.
        let task = unsafe { &*task };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(member, task))) {
            *self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(panic);
        }
    }
}

/// Closes a region: no helper comes in any more, and all have left.
struct Close<'a>(&'a Team);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        let team = self.0;
        // After a panic tasks may be left: nobody is to begin one.
        for share in &team.shares[..team.used] {
            share.0.set(0, 0);
        }
        team.region.0.fetch_add(1, Ordering::SeqCst);
        let mut waited = 0;
        while team.inside.0.load(Ordering::SeqCst) != 0 {
            waited += 1;
            if waited < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        team.job.set(None);
    }
}

/// Sends the helpers home.
struct Over<'a>(&'a Team);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.region.0.store(OVER, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        for threads in [1, 2, 4, 7] {
            pool(threads).install(|| {
                hold(|| {
                    for tasks in (0..200).chain([5000]) {
                        let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                        run(tasks, &|i| {
                            counts[i].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(
                            counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                            "{tasks} on {threads}"
                        );
                    }
                })
            });
        }
    }

    #[test]
    fn a_long_task_does_not_keep_those_behind_it() {
        pool(2).install(|| {
            let done = AtomicUsize::new(0);
            let start = std::time::Instant::now();
            run(8, &|i| {
                // The first of the opening thread's run: the other thread must take the rest of it.
                while i == 0 && done.load(Ordering::SeqCst) < 7 {
                    assert!(start.elapsed().as_secs() < 20, "nobody took the tasks behind this one");
                    std::thread::yield_now();
                }
                done.fetch_add(1, Ordering::SeqCst);
            });
            assert_eq!(done.load(Ordering::SeqCst), 8);
        });
    }

    #[test]
    fn nested_regions_run_in_place() {
        let total = AtomicUsize::new(0);
        pool(3).install(|| {
            run(10, &|_| run(10, &|_| hold(|| run(2, &|_| _ = total.fetch_add(1, Ordering::Relaxed)))))
        });
        assert_eq!(total.load(Ordering::Relaxed), 200);
    }

    #[test]
    fn a_panic_in_any_task_reaches_the_caller_and_the_team_lives_on() {
        pool(4).install(|| {
            for bad in [0, 1, 50, 99] {
                let caught = catch_unwind(|| {
                    run(100, &|i| {
                        std::thread::sleep(std::time::Duration::from_micros(20));
                        assert!(i != bad, "task {i}")
                    })
                });
                assert!(caught.is_err(), "task {bad} panicked");
            }
            let count = AtomicUsize::new(0);
            run(100, &|_| _ = count.fetch_add(1, Ordering::Relaxed));
            assert_eq!(count.load(Ordering::Relaxed), 100);
        });
    }

    #[test]
    fn many_callers_share_one_pool() {
        let pool = pool(2);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.install(|| run(16, &|_| _ = total.fetch_add(1, Ordering::Relaxed)));
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 6 * 50 * 16);
    }
}
