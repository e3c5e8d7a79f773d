//! The mock driver itself: what it lets pass and what it catches.

use cudarc::driver::DevicePtr;
use cudarc::driver::result::{self, module};
use cudarc::driver::sys::{self, CUresult};

use crate::bench::{Argument, Bench, PTX, at, error, load, open, uninitialised};
use crate::mock::{self, Gpu, How, Kind, Order};

const OUT_OF_MEMORY: CUresult = CUresult::CUDA_ERROR_OUT_OF_MEMORY;
const LAUNCH_FAILED: CUresult = CUresult::CUDA_ERROR_LAUNCH_FAILED;
const ILLEGAL_ADDRESS: CUresult = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
const INVALID_VALUE: CUresult = CUresult::CUDA_ERROR_INVALID_VALUE;

#[test]
fn kernels_run_by_name() {
    let Some((mock, bench)) = open() else { return };
    let input = bench.stream.clone_htod(&[1.0f32; 100]).unwrap();
    let out = uninitialised(&bench, 100).unwrap();
    bench.scale(&out, &input, 3.0, 0.5).unwrap();
    assert_eq!(bench.read(&out).unwrap(), [3.5; 100]);
    // Asked for by name: not in the image; in the image and nowhere else.
    assert_eq!(error(bench.function("sample")), Some(CUresult::CUDA_ERROR_NOT_FOUND));
    assert_eq!(error(bench.function("selftest_nowhere")), Some(CUresult::CUDA_ERROR_NOT_FOUND));
    assert!(mock.last_message().contains("selftest_nowhere"), "{}", mock.last_message());
}

#[test]
fn images_are_for_drivers_and_devices() {
    let Some((mock, bench)) = open() else { return };
    let image = |version: &str, target: &str| load(&PTX.replace("8.0", version).replace("sm_80", target));
    let check = |version, target, expected| {
        let loaded = image(version, target);
        if let Ok(loaded) = loaded {
            // SAFETY: loaded just now.
            unsafe { module::unload(loaded) }.unwrap();
        }
        assert_eq!(error(loaded), expected, "{version} {target} {}", bench.stream.context().name().unwrap());
    };
    mock.set_driver_version((12, 8));
    check("8.7", "sm_90a", None);
    check("8.8", "sm_80", Some(CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION));
    check("8.0", "sm_100", Some(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU));
    mock.set_gpu(Gpu::B200);
    check("8.0", "sm_90", None);
    check("8.0", "sm_90a", Some(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU));
    assert_eq!(error(load("not PTX\0")), Some(CUresult::CUDA_ERROR_INVALID_PTX));
}

#[test]
fn memory_is_limited_and_starts_as_garbage() {
    let Some((mock, bench)) = open() else { return };
    mock.set_memory_bytes(1 << 20);
    let first = uninitialised::<f32>(&bench, 1000).unwrap();
    assert!(bench.read(&first).unwrap().iter().all(|value| value.is_nan()));
    assert_eq!(error(uninitialised::<u8>(&bench, 1 << 20)), Some(OUT_OF_MEMORY));
    assert_eq!(bench.stream.context().mem_get_info().unwrap(), ((1 << 20) - 4000, 1 << 20));
    assert_eq!((mock.live_allocations(), mock.live_bytes()), (1, 4000));
    drop(first);
    assert!(uninitialised::<u8>(&bench, 1 << 20).is_ok());
    assert_eq!(mock.live_allocations(), 0);
}

#[test]
fn copies_stay_inside_allocations() {
    let Some((_mock, bench)) = open() else { return };
    let slice = bench.stream.clone_htod(&[1u8; 64]).unwrap();
    let address = slice.device_ptr(&bench.stream).0;
    // SAFETY: the mock refuses what is out of bounds.
    let write = |at, bytes: &[u8]| error(unsafe { result::memcpy_htod_sync(at, bytes) });
    assert_eq!(write(address + 60, &[2; 4]), None);
    assert_eq!(write(address + 61, &[2; 4]), Some(INVALID_VALUE));
    assert_eq!(write(address - 1, &[2; 4]), Some(INVALID_VALUE));
    // SAFETY: as above.
    let freed = unsafe { result::free_sync(address + 16) };
    assert_eq!(error(freed), Some(INVALID_VALUE));
    // SAFETY: as above.
    assert_eq!(error(unsafe { result::memset_d8_sync(address, 0, 65) }), Some(INVALID_VALUE));
    let mut expected = [1; 64];
    expected[60..].fill(2);
    assert_eq!(bench.stream.clone_dtoh(&slice).unwrap(), expected);
}

#[test]
fn writes_outside_allocations_are_seen() {
    let Some(mock) = mock::control() else { return };
    for (offset, seen) in [(0, ""), (99, ""), (100, "write past"), (-1, "write before"), (1023, "write past")]
    {
        let bench = Bench::open();
        let slice = uninitialised::<u8>(&bench, 100).unwrap();
        let launched = error(bench.poke(&slice, offset));
        assert_eq!(launched, (!seen.is_empty()).then_some(ILLEGAL_ADDRESS), "{offset}");
        assert!(mock.last_message().contains(seen), "{offset}: {}", mock.last_message());
        if !seen.is_empty() {
            assert!(mock.last_message().contains("selftest_poke"), "{}", mock.last_message());
            // From now on nothing works.
            assert_eq!(error(bench.stream.synchronize()), Some(ILLEGAL_ADDRESS));
            assert_eq!(error(uninitialised::<u8>(&bench, 1)), Some(ILLEGAL_ADDRESS));
        }
    }
    // With the context its errors are gone.
    let bench = Bench::open();
    bench.stream.synchronize().unwrap();
}

#[test]
fn writes_to_freed_memory_are_seen() {
    let Some((mock, bench)) = open() else { return };
    let kept = uninitialised::<u8>(&bench, 100).unwrap();
    let freed = uninitialised::<u8>(&bench, 100).unwrap();
    let distance = freed.device_ptr(&bench.stream).0.wrapping_sub(kept.device_ptr(&bench.stream).0) as i64;
    drop(freed);
    assert_eq!(error(bench.poke(&kept, distance + 50)), Some(ILLEGAL_ADDRESS));
    assert!(mock.last_message().contains("freed"), "{}", mock.last_message());
}

#[test]
fn what_goes_wrong_in_a_kernel_is_a_failed_launch() {
    let Some(mock) = mock::control() else { return };
    for (name, shared, words) in [("selftest_deadlock", 0, None), ("selftest_shared_overrun", 64, Some(20))] {
        let bench = Bench::open();
        let out = uninitialised::<u32>(&bench, 1).unwrap();
        let arguments = words.map(|words| [at(&out), Argument::U32(words)]);
        let launched = bench.launch(name, (1, 64), shared, arguments.as_ref().map_or(&[], |a| a));
        assert_eq!(error(launched), Some(LAUNCH_FAILED), "{name}");
        assert!(mock.last_message().contains(name), "{}", mock.last_message());
        assert_eq!(error(bench.stream.synchronize()), Some(LAUNCH_FAILED));
    }
}

#[test]
fn launches_keep_to_the_limits() {
    let Some((mock, bench)) = open() else { return };
    let out = bench.stream.alloc_zeros::<f32>(4).unwrap();
    let input = bench.stream.alloc_zeros::<f32>(4096).unwrap();
    let sums = |shape, shared| error(bench.launch("selftest_sums", shape, shared, &[at(&out), at(&input)]));
    assert_eq!(sums((1, 1024), 4096), None);
    assert_eq!(sums((1, 1025), 4100), Some(INVALID_VALUE));
    assert_eq!(sums((0, 64), 256), Some(INVALID_VALUE));
    // More than 48 KiB only when asked for, and never more than the device has.
    let function = bench.function("selftest_sums").unwrap();
    let allow = |bytes| {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the module lives.
        error(unsafe { result::function::set_function_attribute(function, attribute, bytes) })
    };
    assert_eq!(sums((1, 64), 64 << 10), Some(INVALID_VALUE));
    mock.set_gpu(Gpu::RTX_4090);
    assert_eq!(allow(100 << 10), Some(INVALID_VALUE));
    mock.set_gpu(Gpu::A100);
    assert_eq!(allow(163 << 10), None);
    assert_eq!(sums((1, 64), 163 << 10), None);
    // What the image says of a kernel counts.
    let overrun = |threads| {
        error(bench.launch("selftest_shared_overrun", (1, threads), 64, &[at(&out), Argument::U32(16)]))
    };
    assert_eq!(overrun(256), None);
    assert_eq!(overrun(288), Some(CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES));
    // None of this broke anything.
    bench.stream.synchronize().unwrap();
}

#[test]
fn barriers_matter() {
    let Some((mock, bench)) = open() else { return };
    let input: Vec<f32> = (0..256).map(|i| i as f32).collect();
    let input = bench.stream.clone_htod(&input).unwrap();
    for order in [Order::Forward, Order::Reverse, Order::Random(1), Order::Random(2)] {
        mock.set_order(order);
        let out = uninitialised::<f32>(&bench, 2).unwrap();
        bench.launch("selftest_sums", (2, 128), 512, &[at(&out), at(&input)]).unwrap();
        assert_eq!(bench.read(&out).unwrap(), [8128.0, 24512.0], "{order:?}");
    }
}

#[test]
fn a_missing_barrier_is_caught() {
    mock::assert_caught("FAULT_SELFTEST_BARRIER", "driver::barriers_matter");
}

/// Only as a child: see below.
#[test]
fn a_page_of_nobody() {
    if !mock::is_child() {
        return;
    }
    let Some((_mock, bench)) = open() else { return };
    let slice = uninitialised::<u8>(&bench, 100).unwrap();
    bench.poke(&slice, 1 << 46).unwrap();
}

#[test]
fn wild_writes_name_the_kernel() {
    mock::assert_ends("FAULT_NONE", "driver::a_page_of_nobody", "selftest_poke: read or write at an address");
}

/// Only as a child: see below.
#[test]
fn one_byte_too_far() {
    if !mock::is_child() {
        return;
    }
    let Some((_mock, bench)) = open() else { return };
    let slice = uninitialised::<u8>(&bench, 100).unwrap();
    bench.poke(&slice, 100).unwrap();
}

#[test]
fn the_sanitizer_sees_writes_outside_allocations() {
    mock::assert_caught_sanitized("FAULT_NONE", "driver::one_byte_too_far");
}

#[test]
fn events_take_the_time() {
    let Some((_mock, bench)) = open() else { return };
    let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let start = bench.stream.record_event(timed).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let end = bench.stream.record_event(timed).unwrap();
    assert!((20.0..2000.0).contains(&start.elapsed_ms(&end).unwrap()));
    assert!(end.is_complete());
    let untimed = bench.stream.record_event(None).unwrap();
    assert_eq!(error(start.elapsed_ms(&untimed)), Some(CUresult::CUDA_ERROR_INVALID_HANDLE));
}

#[test]
fn pinned_memory_has_a_device_address() {
    let Some((_mock, bench)) = open() else { return };
    let out = bench.stream.alloc_zeros::<f32>(16).unwrap();
    // SAFETY: written before it is read.
    let mut host = unsafe { bench.stream.context().alloc_pinned::<f32>(16) }.unwrap();
    host.as_mut_slice().unwrap().fill(2.0);
    let mut address = 0;
    let pointer = host.as_mut_ptr().unwrap();
    // SAFETY: the memory lives; the driver writes one number.
    unsafe { sys::cuMemHostGetDevicePointer_v2(&mut address, pointer.cast(), 0) }.result().unwrap();
    let arguments =
        [at(&out), Argument::U64(address), Argument::F32(4.0), Argument::F32(0.0), Argument::U32(16)];
    bench.launch("selftest_scale", (1, 32), 0, &arguments).unwrap();
    assert_eq!(bench.read(&out).unwrap(), [8.0; 16]);
}

#[test]
fn lazy_work_fails_late() {
    let Some((mock, bench)) = open() else { return };
    mock.set_lazy(true);
    let slice = uninitialised::<u8>(&bench, 100).unwrap();
    bench.poke(&slice, 100).unwrap();
    bench.poke(&slice, 0).unwrap();
    assert_eq!(error(bench.stream.synchronize()), Some(ILLEGAL_ADDRESS));
    assert_eq!(error(bench.poke(&slice, 0)), Some(ILLEGAL_ADDRESS));
}

#[test]
fn calls_fail_on_demand() {
    let Some((mock, bench)) = open() else { return };
    let wait = || error(bench.stream.synchronize());
    mock.fail(Kind::Allocation, 2, OUT_OF_MEMORY as u32, How::Once);
    let first = uninitialised::<u8>(&bench, 100);
    let second = uninitialised::<u8>(&bench, 100);
    assert_eq!((first.is_ok(), error(second)), (true, Some(OUT_OF_MEMORY)));
    assert_eq!(mock.injected_into(), "cuMemAllocAsync");
    let first = first.unwrap();

    mock.fail(Kind::Launch, 1, LAUNCH_FAILED as u32, How::Later);
    assert_eq!(error(bench.poke(&first, 0)), None);
    assert_eq!((wait(), error(bench.poke(&first, 0))), (Some(LAUNCH_FAILED), Some(LAUNCH_FAILED)));
    mock.reset();
    assert_eq!((wait(), error(bench.poke(&first, 0))), (None, None));

    let before = mock.calls(Kind::Any);
    mock.fail(Kind::Any, 3, CUresult::CUDA_ERROR_UNKNOWN as u32, How::Forever);
    let lost = Some(CUresult::CUDA_ERROR_UNKNOWN);
    // Each is two calls: cudarc first asks which context is current.
    assert_eq!([wait(), wait(), wait()], [None, lost, lost]);
    assert_eq!(mock.calls(Kind::Any) - before, 4);
}

#[test]
fn what_is_not_given_back_is_counted() {
    let Some(mock) = mock::control() else { return };
    let bench = Bench::open();
    std::mem::forget(uninitialised::<u8>(&bench, 100).unwrap());
    // The forgotten slice keeps the context alive.
    drop(bench);
    assert_eq!((mock.live_allocations(), mock.leaked()), (1, 3));
    // SAFETY: as the forgotten ones would do, so that later tests begin with nothing.
    unsafe {
        sys::cuDevicePrimaryCtxRelease_v2(0).result().unwrap();
    }
    assert_eq!((mock.live_allocations(), mock.forgotten()), (0, 2));
    mock.reset();
}
