//! The cpu runner allocates nothing per token once it is warm.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use models::cpu::CpuRunner;
use models::{Batch, Capacity, Checkpoint, Model, NoProbe, Numerics, Runner, WantLogits};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The pool's threads alone: the test harness's own may still be busy.
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

// SAFETY: every call is handed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_warm_decode_step_allocates_nothing() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    // A thread allocates when it starts, which on a busy machine may be late: each has begun after this.
    pool.broadcast(|_| COUNTED.set(true));
    for name in ["kimi_k2_int4", "gpt_oss_mxfp4", "kimi_k2_fp8", "hunyuan_v1_moe"] {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let model = Model::open(Checkpoint::open(&folder).unwrap()).unwrap();
        let capacity = Capacity::new(4, 32, 2);
        let vocab = model.config.vocab;
        let mut runner = CpuRunner::new(model, Numerics::Model, capacity);
        let mut batch = Batch::default();
        let mut logits = vec![0.0; 2 * vocab];
        pool.install(|| {
            let mut step = |position: usize| {
                batch.clear();
                batch.push(&[7], position, &[0, 1], WantLogits::Last);
                batch.push(&[9], position, &[2, 3], WantLogits::Last);
                runner.forward(&batch, &mut NoProbe, &mut logits).unwrap();
            };
            // The pool's queues and the batch grow to their size in the first steps.
            (0..40).for_each(&mut step);
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            (40..100).for_each(&mut step);
            let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
            assert_eq!(allocations, 0, "{name}: {allocations} allocations in 60 steps");
        });
    }
}
