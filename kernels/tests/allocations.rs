//! Nothing allocates once its buffers stand.

mod common;

use common::{Format, Random, Weight};
use kernels::Isa;
use kernels::attention::{CacheSlice, Mla, PAGE, Pages, Queries, SPAN, mla};
use kernels::experts::{
    Activation, Dispatch, DispatchLimits, ExpertFfn, GateUp, Routed, ffn, ffn_scratch_len, run_experts,
};
use kernels::matmul::{matmul, matmul_transposed};
use kernels::norm::rms_norm;
use kernels::quantised::{Activations, Precision};
use kernels::route::{Normalise, RouterRule, Score, route};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The pool's threads alone: the test harness's own may still be busy.
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: passes every call on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTED.get() {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The only test of this binary, so that no other thread allocates meanwhile.
#[test]
fn nothing_allocates_in_steady_state() {
    let mut random = Random(41);
    let isa = Isa::detect();
    let (hidden, inter, experts, top_k) = (512, 256, 8, 2);
    let weights: Vec<[Weight; 3]> = (0..experts)
        .map(|_| {
            [(inter, hidden), (inter, hidden), (hidden, inter)]
                .map(|(rows, cols)| Weight::random(&mut random, Format::Int4, rows, cols))
        })
        .collect();
    let lookup = |id: u32| {
        let [gate, up, down] = &weights[id as usize];
        ExpertFfn {
            gate_up: GateUp::Separate { gate: gate.matrix(), up: up.matrix() },
            gate_up_bias: None,
            down: down.matrix(),
            down_transposed: false,
            down_bias: None,
            activation: Activation::SiluGlu,
        }
    };
    let square = Weight::random(&mut random, Format::Bf16, hidden, hidden);
    let rule = RouterRule {
        experts,
        top_k,
        score: Score::Sigmoid,
        groups: None,
        normalise: Some(Normalise::Epsilon(1e-20)),
        scale: 1.0,
    };
    let context = 2 * SPAN;
    let attention = Mla { heads: 8, latent: 64, rope: 32, scale: 0.1 };
    let cache = vec![0x3f80; context * 96];
    let table: Vec<u32> = (0..(context / PAGE) as u32).collect();
    let pages = Pages { data: CacheSlice::Bf16(&cache), row: 96, table: &table };

    for (tokens, precision) in
        [(1, None), (40, None), (1, Some(Precision::Int16)), (40, Some(Precision::Int8))]
    {
        let x = random.values(tokens * hidden);
        let logits = random.values(experts);
        let mut out = vec![0.0; tokens * hidden];
        let limits = DispatchLimits { tokens, top_k, experts, hidden, inter, precision, floats: false };
        let mut room = precision.map(|p| Activations::new(Some(p), tokens, hidden));
        let mut dispatch = Dispatch::new(limits);
        let mut scratch = vec![0.0; ffn_scratch_len(tokens, inter)];
        let mut router_scratch = vec![0.0; rule.scratch_len()];
        let (mut ids, mut gates) = (vec![0; tokens * top_k], vec![0.0; tokens * top_k]);
        let queries = random.values(tokens * 8 * 96);
        let mut attended = vec![0.0; tokens * 8 * 64];
        let mut attention_scratch = vec![0.0; attention.scratch_len(tokens, context)];
        let mut step = || {
            rms_norm(isa, &x, None, 1e-6, hidden, &mut out);
            matmul(isa, &x, &square.matrix(), None, &mut out);
            matmul_transposed(isa, &x, &square.matrix(), None, &mut out);
            for (ids, gates) in ids.chunks_mut(top_k).zip(gates.chunks_mut(top_k)) {
                route(isa, &rule, &logits, None, &mut router_scratch, ids, gates);
            }
            let routed = Routed { x: &x, ids: &ids, weights: &gates };
            run_experts(isa, routed, &lookup, None, &mut dispatch, &mut out);
            ffn(isa, &x, &lookup(0), room.as_mut(), &mut scratch, &mut out);
            let queries = Queries { rows: &queries, first_position: context - tokens };
            mla(isa, &attention, queries, &pages, &mut attention_scratch, &mut attended);
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        // A thread allocates when it starts, which on a busy machine may be late: each has begun after this.
        pool.broadcast(|_| COUNTED.set(true));
        let allocated = pool.install(|| {
            // Queues grow to their size.
            (0..20).for_each(|_| step());
            let before = COUNT.load(Ordering::Relaxed);
            (0..20).for_each(|_| step());
            COUNT.load(Ordering::Relaxed) - before
        });
        assert_eq!(allocated, 0, "{tokens} tokens");
    }
}
