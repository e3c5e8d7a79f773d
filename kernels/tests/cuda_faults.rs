//! Allocation failures, launch failures, sticky errors and lost devices, at every tenth call of the driver: they
//! come back as errors, never as a panic, a hang, a leak or a wrong result.

#[path = "mock/mod.rs"]
mod mock;

use kernels::cuda::{Availability, Buffer, Device, DeviceError, Kernel};
use mock::{Fault, Gpu, How, Kind};

// Of CUresult.
const OUT_OF_MEMORY: u32 = 2;
const INVALID_HANDLE: u32 = 400;
const ECC_UNCORRECTABLE: u32 = 214;
const ILLEGAL_ADDRESS: u32 = 700;
const LAUNCH_FAILED: u32 = 719;
const UNKNOWN: u32 = 999;

const FILL: Kernel = Kernel::new("probe", "fill_seeded");
const COPY: Kernel = Kernel::new("probe", "copy");
const WORDS: usize = 1000;

fn fill(device: &Device, values: &Buffer<u32>, seed: u32) -> Result<(), DeviceError> {
    let launch = device.launch(FILL, 2, 64, 0).arg(values).arg(values.len() as u64).arg(seed);
    // SAFETY: the kernel's arguments; it writes as many words as it is told.
    unsafe { launch.run() }
}

fn copy(device: &Device, to: &Buffer<u32>, from: &Buffer<u32>) -> Result<(), DeviceError> {
    let launch = device.launch(COPY, 2, 64, 0).arg(to).arg(from).arg(from.len() as u64 / 4);
    // SAFETY: the kernel's arguments; it copies as many times sixteen bytes as it is told.
    unsafe { launch.run() }
}

/// A little of everything: buffers, uploads, launches, timing, pinned memory, a graph that is launched twice. Returns
/// what it computes, in short.
fn program(device: &Device) -> Result<u64, DeviceError> {
    let first = device.alloc::<u32>(WORDS)?;
    let second = device.zeroed::<u32>(WORDS)?;
    device.profile(true)?;
    fill(device, &first, 1)?;
    copy(device, &second, &first)?;
    let times = device.take_profile()?.len() as u32;
    device.profile(false)?;
    let mut result = second.read()?;
    let uploaded = device.upload(&result[..WORDS / 2])?;
    second.slice(..WORDS / 2).copy_from(&uploaded)?;
    drop(uploaded);
    let graph = device.capture(|| {
        fill(device, &first, 2)?;
        copy(device, &second, &first)
    })?;
    graph.launch()?;
    let pinned = device.host::<u32>(8)?;
    pinned.set(3, times);
    graph.launch()?;
    device.synchronize()?;
    result.extend(second.read()?);
    result.push(pinned.get(3));
    Ok(result.iter().fold(0, |hash: u64, word| (hash ^ u64::from(*word)).wrapping_mul(0x0100_0000_01b3)))
}

fn fault(kind: Kind, result: u32, how: How) -> Fault {
    Fault { kind, result, how }
}

#[test]
fn allocations_that_fail_are_errors() {
    mock::for_every_call(fault(Kind::Allocation, OUT_OF_MEMORY, How::Once), 1, program);
}

#[test]
fn launches_that_fail_are_errors() {
    for how in [How::Once, How::Forever, How::Later] {
        mock::for_every_call(fault(Kind::Launch, LAUNCH_FAILED, how), 1, program);
    }
}

#[test]
fn any_call_may_fail_once() {
    for result in [INVALID_HANDLE, UNKNOWN] {
        mock::for_every_call(fault(Kind::Any, result, How::Once), 1, program);
    }
}

#[test]
fn errors_may_show_late() {
    mock::for_every_call(fault(Kind::Any, ILLEGAL_ADDRESS, How::Later), 1, program);
}

#[test]
fn the_device_may_be_lost_at_any_call() {
    for result in [ECC_UNCORRECTABLE, LAUNCH_FAILED, INVALID_HANDLE] {
        mock::for_every_call(fault(Kind::Any, result, How::Forever), 1, program);
    }
}

#[test]
fn memory_that_does_not_suffice_is_an_error() {
    let Some(session) = mock::device() else { return };
    let Some(mock) = session.mock() else { return };
    mock.set_memory_bytes(9000);
    let error = program(&session).unwrap_err();
    assert!(error.is_out_of_memory() && !error.is_lost(), "{error}");
    mock.set_memory_bytes(1 << 20);
    program(&session).unwrap();
}

#[test]
fn work_that_runs_late_gives_the_same() {
    let Some(session) = mock::device() else { return };
    let Some(mock) = session.mock() else { return };
    let expected = program(&session).unwrap();
    mock.set_lazy(true);
    assert_eq!(program(&session).unwrap(), expected);
}

#[test]
fn machines_that_cannot_are_told_why() {
    let Some(mock) = mock::control() else { return };
    mock.set_device_count(0);
    assert!(matches!(Device::probe(), Availability::NoDevice(_)), "{}", Device::probe());
    assert!(Device::open(0).is_err());

    mock.reset();
    mock.set_gpu(Gpu { capability: (7, 5), multiprocessors: 40 });
    assert!(Device::open(0).unwrap_err().to_string().contains("compute capability 7.5"));

    mock.reset();
    mock.set_driver_version((11, 4));
    let device = Device::open(0).unwrap();
    let error = device.load(FILL).unwrap_err().to_string();
    assert!(error.contains("driver 5") && error.contains("11.4"), "{error}");
}

#[test]
fn kernels_run_on_every_generation() {
    for gpu in [Gpu::A100, Gpu::RTX_4090, Gpu::H100, Gpu::B200, Gpu::RTX_5090] {
        mock::on_device_like(gpu, |device| {
            assert!(mock::on_real_device() || device.info().compute_capability == gpu.capability);
            program(device).unwrap();
        });
    }
}

#[test]
fn the_same_under_the_address_sanitizer() {
    if let Some(ran) = mock::rerun_all_sanitized(&[]) {
        assert!(ran.contains("copy forward"), "{ran:?}");
    }
}
