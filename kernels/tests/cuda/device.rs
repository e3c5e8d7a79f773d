//! The device layer: memory, launches, graphs, timing, and what it does when the driver fails.

use kernels::cuda::{Availability, Buffer, Device, DeviceError, HostBuffer, Kernel};

use crate::mock::{self, Gpu, How, Kind};

const COPY: Kernel = Kernel::new("probe", "copy");
const FILL: Kernel = Kernel::new("probe", "fill_seeded");
const ILLEGAL_ADDRESS: u32 = 700;
const OUT_OF_MEMORY: u32 = 2;

/// Launches `copy`; both sides hold whole vectors of 16 bytes.
fn copy(device: &Device, to: &Buffer<u32>, from: &Buffer<u32>) -> Result<(), DeviceError> {
    assert!(to.len() == from.len() && to.len().is_multiple_of(4));
    let count = to.bytes() as u64 / 16;
    // SAFETY: the arguments are those of `copy`, and both sides hold `count` vectors.
    unsafe { device.launch(COPY, 3, 64, 0).arg(to).arg(from).arg(count).run() }
}

fn fill(device: &Device, values: &Buffer<u32>, seed: u32) -> Result<(), DeviceError> {
    let count = values.len() as u64;
    // SAFETY: the arguments are those of `fill_seeded`, and `values` holds `count`.
    unsafe { device.launch(FILL, 2, 96, 0).arg(values).arg(count).arg(seed).run() }
}

fn filled(count: u64, seed: u32) -> Vec<u32> {
    let hash = |i: u64| {
        let weyl = (i as u32).wrapping_mul(0x9e37_79b9);
        let h = weyl.wrapping_add(((i >> 32) as u32).wrapping_mul(0x7feb_352d)).wrapping_add(seed);
        let h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
        let h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
        h ^ (h >> 16)
    };
    (0..count).map(hash).collect()
}

#[test]
fn kernels_run_on_typed_memory() {
    mock::in_every_order(|device| {
        let values = device.alloc(1000).unwrap();
        fill(device, &values, 7).unwrap();
        let copied = device.zeroed(1000).unwrap();
        copy(device, &copied, &values).unwrap();
        assert_eq!(copied.read().unwrap(), filled(1000, 7));
    });
}

#[test]
fn parts_are_read_written_and_copied() {
    mock::on_device(|device| {
        let values = device.upload(&(0..10u32).collect::<Vec<_>>()).unwrap();
        let middle = values.slice(2..=5);
        assert_eq!(middle.read().unwrap(), [2, 3, 4, 5]);
        middle.slice(1..3).write(&[30, 40]).unwrap();
        values.slice(8..).copy_from(middle.slice(1..3)).unwrap();
        values.slice(..1).zero().unwrap();
        let mut all = [0; 10];
        values.all().read_into(&mut all).unwrap();
        assert_eq!(all, [0, 1, 2, 30, 40, 5, 6, 7, 30, 40]);
        assert_eq!(values.slice(3..4).cast::<u8>().read().unwrap(), [30, 0, 0, 0]);
        assert_eq!(values.slice(4..).address(), values.address() + 16);
        let nothing = device.upload::<f32>(&[]).unwrap();
        assert!(nothing.is_empty() && nothing.read().unwrap().is_empty());
        nothing.zero().unwrap();
    });
}

#[test]
fn pinned_memory_is_seen_from_both_sides() {
    mock::on_device(|device| {
        let inputs: HostBuffer<u32> = device.host(8).unwrap();
        assert_eq!(inputs.to_vec(), [0; 8]);
        inputs.write(2, &[5, 6]);
        let values = device.zeroed(8).unwrap();
        values.copy_from(&inputs).unwrap();
        assert_eq!(values.read().unwrap(), [0, 0, 5, 6, 0, 0, 0, 0]);
        let ring: HostBuffer<u32> = device.host(8).unwrap();
        // SAFETY: the arguments are those of `copy`; two vectors on both sides.
        unsafe { device.launch(COPY, 1, 32, 0).arg(&ring).arg(&values).arg(2u64).run() }.unwrap();
        device.synchronize().unwrap();
        assert_eq!((ring.get(2), ring.get(3)), (5, 6));
    });
}

#[test]
fn a_graph_does_it_again_and_keeps_its_memory() {
    mock::on_device(|device| {
        let (from, to) = (device.upload(&[1u32, 2, 3, 4]).unwrap(), device.zeroed(4).unwrap());
        let between = device.zeroed(4).unwrap();
        let graph = device
            .capture(|| {
                assert!(device.is_capturing());
                between.copy_from(&from)?;
                copy(device, &to, &between)
            })
            .unwrap();
        assert_eq!(to.read().unwrap(), [0; 4], "captured, not done");
        drop(between);
        graph.launch().unwrap();
        assert_eq!(to.read().unwrap(), [1, 2, 3, 4]);
        from.write(&[5, 6, 7, 8]).unwrap();
        graph.launch().unwrap();
        assert_eq!(to.read().unwrap(), [5, 6, 7, 8]);
    });
}

#[test]
fn a_capture_refuses_what_would_break_it_and_always_ends() {
    mock::on_device(|device| {
        let values = device.upload(&[1u32, 2, 3, 4]).unwrap();
        let refusals: [&dyn Fn() -> Result<(), DeviceError>; 6] = [
            &|| device.alloc::<u32>(4).map(drop),
            &|| device.host::<u32>(4).map(drop),
            &|| values.read().map(drop),
            &|| values.write(&[0; 4]),
            &|| device.synchronize(),
            &|| device.capture(|| Ok(())).map(drop),
        ];
        for refusal in refusals {
            let error = device.capture(refusal).unwrap_err();
            assert!(error.to_string().ends_with("not possible while a graph is captured"), "{error}");
            assert!(!device.is_capturing());
        }
        let short_lived = device.zeroed::<u32>(4).unwrap();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            device.capture(|| {
                drop(short_lived);
                panic!("a wrong shape")
            })
        }));
        assert!(panicked.is_err() && !device.is_capturing());
        assert_eq!(values.read().unwrap(), [1, 2, 3, 4]);
    });
}

#[test]
fn operations_are_timed_when_asked_for() {
    mock::on_device(|device| {
        let (from, to) = (device.upload(&[1u32, 2, 3, 4]).unwrap(), device.zeroed(4).unwrap());
        copy(device, &to, &from).unwrap();
        assert_eq!(device.take_profile().unwrap(), [], "off");
        device.profile(true).unwrap();
        copy(device, &to, &from).unwrap();
        let both = || {
            copy(device, &to, &from)?;
            copy(device, &from, &to)
        };
        device.op("there and back", both).unwrap();
        let graph = device.capture(both).unwrap();
        graph.launch().unwrap();
        let timings = device.take_profile().unwrap();
        let names: Vec<_> = timings.iter().map(|timing| timing.op).collect();
        assert_eq!(names, ["copy", "there and back", "graph"]);
        assert!(timings.iter().all(|timing| timing.microseconds >= 0.0));
        device.profile(false).unwrap();
        copy(device, &to, &from).unwrap();
        assert_eq!(device.take_profile().unwrap(), []);
    });
}

#[test]
fn events_measure() {
    mock::on_device(|device| {
        let (start, end) = (device.event().unwrap(), device.event().unwrap());
        start.record().unwrap();
        let values = device.zeroed(1 << 12).unwrap();
        fill(device, &values, 1).unwrap();
        end.record().unwrap();
        assert!(end.microseconds_since(&start).unwrap() >= 0.0);
        let residency = device.residency(FILL, 96, 0).unwrap();
        assert_eq!(residency.blocks, residency.blocks_per_multiprocessor * device.info().multiprocessors);
        assert!(residency.blocks > 0);
    });
}

#[test]
fn launches_beyond_the_limits_are_refused() {
    mock::on_device(|device| {
        let values = device.zeroed::<u32>(4).unwrap();
        let too_many = device.launch(FILL, 1, 2048, 0).arg(&values).arg(4u64).arg(1u32);
        // SAFETY: refused before it begins.
        let error = unsafe { too_many.run() }.unwrap_err();
        assert_eq!(
            error.to_string(),
            "CUDA: launch of kernel fill_seeded: blocks of 2048 threads; from 1 to 1024 are possible"
        );
        // SAFETY: as above.
        let error = unsafe { device.launch(Kernel::new("probe", "nothing"), 1, 32, 0).run() }.unwrap_err();
        assert!(
            error.to_string().contains("find the function of kernel nothing: CUDA_ERROR_NOT_FOUND"),
            "{error}"
        );
        // SAFETY: as above.
        let error = unsafe { device.launch(Kernel::new("nowhere", "nothing"), 1, 32, 0).run() }.unwrap_err();
        assert!(error.to_string().contains("no kernels/cuda/nowhere.cu is embedded"), "{error}");
        fill(device, &values, 1).unwrap();
    });
}

#[test]
fn large_shared_memory_is_allowed() {
    mock::on_device(|device| {
        let values = device.zeroed::<u32>(4).unwrap();
        for _ in 0..2 {
            let launch = device.launch(FILL, 1, 32, 100 << 10).arg(&values).arg(4u64).arg(1u32);
            // SAFETY: the arguments are those of `fill_seeded`; the memory is there.
            unsafe { launch.early().run() }.unwrap();
        }
        assert_eq!(values.read().unwrap(), filled(4, 1));
    });
}

#[test]
fn machines_without_a_usable_device_say_so() {
    let Some(mock) = mock::control() else { return };
    mock.set_device_count(0);
    assert!(matches!(Device::probe(), Availability::NoDevice(_)), "{}", Device::probe());
    assert!(Device::open(0).is_err());
    mock.set_device_count(1);
    mock.set_gpu(Gpu { capability: (7, 5), multiprocessors: 40 });
    let Availability::Devices(devices) = Device::probe() else { panic!("{}", Device::probe()) };
    assert!(!devices[0].is_usable());
    let error = Device::open(0).unwrap_err().to_string();
    assert!(error.ends_with("has compute capability 7.5; 8.0 or newer is needed"), "{error}");
    let error = Device::open(3).unwrap_err().to_string();
    assert_eq!(error, "CUDA: open the device: there is no device 3, only 1");
}

#[test]
fn an_old_driver_is_told_what_it_lacks() {
    let Some(mock) = mock::control() else { return };
    mock.set_driver_version((12, 2));
    let device = Device::open(0).unwrap();
    let Err(error) = device.load(COPY) else {
        println!("SKIP: machine code is embedded");
        return;
    };
    let error = error.to_string();
    assert!(error.contains("driver 570 (CUDA 12.8) or newer; this driver supports CUDA 12.2"), "{error}");
}

#[test]
fn memory_that_runs_out_is_an_error_and_no_more() {
    let Some(mock) = mock::control() else { return };
    mock.set_memory_bytes(1 << 20);
    let device = Device::open(0).unwrap();
    let most = device.alloc::<u8>(900 << 10).unwrap();
    let error = device.alloc::<u8>(900 << 10).map(drop).unwrap_err();
    assert!(error.is_out_of_memory() && !error.is_lost(), "{error}");
    assert!(device.alloc::<u64>(usize::MAX).is_err());
    drop(most);
    device.alloc::<u8>(900 << 10).unwrap();
    assert!(device.memory().unwrap().free_bytes <= 1 << 20);
}

#[test]
fn after_a_fatal_error_every_call_says_so_at_once() {
    let Some(mock) = mock::control() else { return };
    let device = Device::open(0).unwrap();
    let (from, to) = (device.upload(&[1u32, 2, 3, 4]).unwrap(), device.zeroed(4).unwrap());
    let graph = device.capture(|| copy(&device, &to, &from)).unwrap();
    copy(&device, &to, &from).unwrap();
    device.synchronize().unwrap();
    mock.fail(Kind::Launch, 1, ILLEGAL_ADDRESS, How::Later);
    copy(&device, &to, &from).unwrap();
    let first = device.synchronize().unwrap_err();
    assert!(first.is_lost());
    assert!(first.to_string().contains("the last kernel launched before was copy"), "{first}");
    let calls = mock.calls(Kind::Any);
    assert_eq!(copy(&device, &to, &from).unwrap_err(), first);
    assert_eq!(to.read().unwrap_err(), first);
    assert_eq!(device.alloc::<u8>(1).map(drop).unwrap_err(), first);
    assert_eq!(graph.launch().unwrap_err(), first);
    assert_eq!(device.capture(|| Ok(())).map(drop).unwrap_err(), first);
    assert_eq!(device.memory().unwrap_err(), first);
    drop((from, to, graph));
    assert_eq!(mock.calls(Kind::Any), calls, "the driver was asked");
    drop(device);
}

/// Everything that the layer can do, and a word before all of it is given back.
fn scenario(done: impl FnOnce()) -> Result<(), DeviceError> {
    let device = Device::open(0)?;
    device.profile(true)?;
    let from = device.upload(&[1u32, 2, 3, 4])?;
    let (to, host) = (device.zeroed(4)?, device.host::<u32>(4)?);
    fill(&device, &from, 3)?;
    device.op("copies", || copy(&device, &to, &from))?;
    let graph = device.capture(|| {
        to.zero()?;
        copy(&device, &from, &to)?;
        to.copy_from(&host)
    })?;
    graph.launch()?;
    device.residency(COPY, 64, 0)?;
    let (start, end) = (device.event()?, device.event()?);
    start.record()?;
    end.record()?;
    end.microseconds_since(&start)?;
    device.memory()?;
    device.take_profile()?;
    assert_eq!(from.read()?, [0; 4]);
    device.synchronize()?;
    done();
    Ok(())
}

#[test]
fn a_failure_at_any_call_is_an_error_and_nothing_worse() {
    let Some(mock) = mock::control() else { return };
    let mut calls = 0;
    scenario(|| calls = mock.calls(Kind::Any)).unwrap();
    let all = mock.calls(Kind::Any);
    assert!(calls > 50 && all > calls, "{calls} of {all}");
    for (code, how) in
        [(OUT_OF_MEMORY, How::Once), (ILLEGAL_ADDRESS, How::Once), (ILLEGAL_ADDRESS, How::Forever)]
    {
        for n in 1..=all {
            mock.reset();
            mock.fail(Kind::Any, n, code, how);
            let result = scenario(|| ());
            // What fails while things are given back has nobody to tell.
            assert!(result.is_err() || n > calls, "call {n}, {}: no error", mock.injected_into());
        }
    }
    mock.reset();
    scenario(|| ()).unwrap();
}
