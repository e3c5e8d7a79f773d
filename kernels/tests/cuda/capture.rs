//! Stream capture of the mock driver: graphs replay what was captured, and what a capture forbids spoils it.

use cudarc::driver::CudaSlice;
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUresult, CUstreamCaptureMode};

use crate::bench::{Bench, PTX, error, load, open};

const CAPTURE_UNSUPPORTED: CUresult = CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
const CAPTURE_INVALIDATED: CUresult = CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;

fn begin(bench: &Bench, mode: CUstreamCaptureMode) {
    bench.stream.begin_capture(mode).unwrap();
}

const RELAXED: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
const GLOBAL: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
const NO_FLAGS: sys::CUgraphInstantiate_flags = sys::CUgraphInstantiate_flags(0);

#[test]
fn graphs_replay_what_was_captured() {
    let Some((mock, bench)) = open() else { return };
    for lazy in [false, true] {
        mock.set_lazy(lazy);
        let mut a = bench.stream.clone_htod(&[1.0f32; 8]).unwrap();
        let mut b = bench.stream.alloc_zeros::<f32>(8).unwrap();
        let steps = |a: &mut CudaSlice<f32>, b: &mut CudaSlice<f32>| {
            bench.scale(b, a, 2.0, 1.0).unwrap();
            bench.stream.memcpy_dtod(b, a).unwrap();
            bench.scale(b, a, 1.0, 10.0).unwrap();
        };
        begin(&bench, RELAXED);
        steps(&mut a, &mut b);
        let graph = bench.stream.end_capture(NO_FLAGS).unwrap().unwrap();
        // Nothing has run yet.
        assert_eq!((bench.read(&a).unwrap(), bench.read(&b).unwrap()), (vec![1.0; 8], vec![0.0; 8]));
        graph.launch().unwrap();
        graph.launch().unwrap();
        let replayed = (bench.read(&a).unwrap(), bench.read(&b).unwrap());
        bench.stream.memcpy_htod(&[1.0f32; 8], &mut a).unwrap();
        steps(&mut a, &mut b);
        steps(&mut a, &mut b);
        assert_eq!((bench.read(&a).unwrap(), bench.read(&b).unwrap()), replayed);
        assert_eq!(replayed.0, [7.0; 8]);
    }
}

#[test]
fn calls_that_a_capture_forbids_spoil_it() {
    let Some((_mock, bench)) = open() else { return };
    begin(&bench, GLOBAL);
    assert_eq!(error(bench.stream.context().synchronize()), Some(CAPTURE_UNSUPPORTED));
    let status = bench.stream.capture_status().unwrap();
    assert_eq!(status, sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED);
    assert_eq!(error(bench.stream.end_capture(NO_FLAGS)), Some(CAPTURE_INVALIDATED));

    begin(&bench, RELAXED);
    assert_eq!(error(bench.stream.synchronize()), Some(CAPTURE_UNSUPPORTED));
    assert_eq!(error(bench.stream.end_capture(NO_FLAGS)), Some(CAPTURE_INVALIDATED));

    // An allocation may wait for the device, which relaxed captures allow.
    for (mode, expected) in [(GLOBAL, Some(CAPTURE_UNSUPPORTED)), (RELAXED, None)] {
        begin(&bench, mode);
        // SAFETY: freed below.
        let allocated = unsafe { result::malloc_sync(16) };
        assert_eq!(error(allocated), expected);
        assert_eq!(error(bench.stream.end_capture(NO_FLAGS)), expected.map(|_| CAPTURE_INVALIDATED));
        if let Ok(address) = allocated {
            // SAFETY: allocated above.
            unsafe { result::free_sync(address) }.unwrap();
        }
    }
    bench.stream.synchronize().unwrap();
}

#[test]
fn other_streams_join_and_leave_a_capture() {
    let Some((_mock, bench)) = open() else { return };
    let a = bench.stream.clone_htod(&[1.0f32; 8]).unwrap();
    let b = bench.stream.alloc_zeros::<f32>(8).unwrap();
    let other = Bench { stream: bench.stream.context().new_stream().unwrap(), module: load(PTX).unwrap() };
    for joined in [true, false] {
        begin(&bench, RELAXED);
        other.stream.join(&bench.stream).unwrap();
        other.scale(&b, &a, 5.0, 0.0).unwrap();
        if joined {
            bench.stream.join(&other.stream).unwrap();
        }
        let graph = bench.stream.end_capture(NO_FLAGS);
        if joined {
            graph.unwrap().unwrap().launch().unwrap();
            assert_eq!(bench.read(&b).unwrap(), [5.0; 8]);
        } else {
            assert_eq!(error(graph), Some(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED));
        }
        assert_eq!(
            other.stream.capture_status().unwrap(),
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE
        );
    }
}
