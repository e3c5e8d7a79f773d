//! `moebius bench gpu` at tiny sizes on the mock driver, or with `MOEBIUS_CUDA=device` on the machine's own device.

#[path = "../../kernels/tests/mock/mod.rs"]
mod mock;

use std::io;

use bench::gpu::{GpuOptions, Sizes, Stage, measure};
use bench::row::{KEYS, Row};
use bench::{Error, Sink};
use kernels::cuda::Multiply;

/// Few multiprocessors: loops that fill a device do not take long.
fn small_device() -> Option<mock::Session> {
    mock::device_like(mock::Gpu::H100.with_multiprocessors(4))
}

#[derive(Default)]
struct Rows {
    rows: Vec<Row>,
    notes: Vec<String>,
}

impl Sink for Rows {
    fn row(&mut self, row: Row) -> io::Result<()> {
        println!("{}", row.line());
        self.rows.push(row);
        Ok(())
    }

    fn note(&mut self, text: &str) {
        println!("{text}");
        self.notes.push(text.to_owned());
    }
}

#[test]
fn all_stages_pass_and_rows_are_whole() {
    let Some(device) = small_device() else { return };
    let mut sink = Rows::default();
    measure(&device, &GpuOptions::default(), &Sizes::tiny(), &mut sink).unwrap();
    for stage in Stage::ALL {
        let passed = format!("{}: passed", stage.as_str());
        assert!(sink.notes.iter().any(|note| note.starts_with(&passed)), "{passed}");
    }
    for row in &sink.rows {
        let json = row.json();
        for key in KEYS {
            assert!(json.get(key).is_some(), "{key} of {json}");
        }
        assert!(row.times.median > 0.0 && row.times.runs > 0, "{json}");
        assert_eq!(json["runner"], "cuda");
    }
    let names: Vec<&str> = sink.rows.iter().map(|row| row.name.as_str()).collect();
    for wanted in [
        "gpu/ceiling/copy",
        "gpu/ceiling/read",
        "gpu/ceiling/mma_sync_bf16",
        "gpu/check/tiny/experts/t9/route",
        "gpu/check/tiny/experts/t9/group",
        "gpu/check/tiny/experts/t9/few",
        "gpu/check/tiny/experts/t9/finalize",
        "gpu/check/tiny/mla/fp8/150",
        "gpu/check/tiny/dense/head/t5",
        "gpu/check/tiny/dense/shared_pair/t5",
        "gpu/moe/int4/b1/layer/few",
        "gpu/moe/int4/b5/down",
        "gpu/mla/bf16/130x2",
        "gpu/dense/bf16/q_a/t3",
        "gpu/layer/b2x70",
        "gpu/layer/b2x70/step",
    ] {
        assert!(names.contains(&wanted), "{wanted} of {names:?}");
    }
    let wgmma = names.contains(&"gpu/check/tiny/experts/t9/wgmma");
    assert_eq!(wgmma, Multiply::Wgmma.is_possible(&device));
    let layer = sink.rows.iter().find(|row| row.name == "gpu/moe/int4/b1/layer/few").unwrap();
    assert!(layer.share.is_some() && layer.bytes > 0 && layer.operations > 0);
    let mut unique = names.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), names.len(), "names that are not one row's");
}

/// What is wrong on purpose ends the run after its stage: here the page before the right one, in both kinds of cache.
#[test]
fn a_wrong_kernel_ends_the_run_after_the_stage() {
    let test = "all_stages_pass_and_rows_are_whole";
    mock::assert_ends("FAULT_PAGE", test, "would be right; wrong results besides: ");
}

#[test]
fn one_stage_alone() {
    let Some(device) = small_device() else { return };
    let mut sink = Rows::default();
    measure(&device, &GpuOptions { only: Some(Stage::Ceilings) }, &Sizes::tiny(), &mut sink).unwrap();
    assert!(sink.rows.iter().all(|row| row.name.starts_with("gpu/ceiling/")));
    assert_eq!(sink.rows.len(), 4);
}

#[test]
fn an_error_says_what_was_being_done() {
    let Some(device) = small_device() else { return };
    let Some(mock) = device.mock() else { return };
    // Out of memory, at an allocation in the middle.
    mock.fail(mock::Kind::Allocation, 20, 2, mock::How::Once);
    let mut sink = Rows::default();
    let error = measure(&device, &GpuOptions::default(), &Sizes::tiny(), &mut sink).unwrap_err();
    assert!(matches!(error, Error::Device(..)), "{error}");
    assert!(error.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY"), "{error}");
    assert!(!sink.rows.is_empty(), "what was measured before is kept");
    assert!(sink.notes.iter().any(|note| note.contains("a part FAILED")));
    assert!(sink.rows.iter().any(|row| row.name.contains("/mla/")), "the next part is measured");
    assert!(!sink.rows.iter().any(|row| row.name.starts_with("gpu/moe/")), "the next stage is not");
}
