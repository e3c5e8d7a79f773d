//! All other tests once more with the address sanitizer in the mock driver and its kernels, and that they run every
//! kernel in every order of threads. First by its name, so that it runs beside the others.

use crate::mock;

/// Read or write where they must not, for which the sanitizer ends the process.
const WITHOUT: [&str; 6] = [
    "driver::a_page_of_nobody",
    "driver::lazy_work_fails_late",
    "driver::one_byte_too_far",
    "driver::what_goes_wrong_in_a_kernel_is_a_failed_launch",
    "driver::writes_outside_allocations_are_seen",
    "driver::writes_to_freed_memory_are_seen",
];

#[test]
fn every_kernel_in_every_order() {
    let Some(ran) = mock::rerun_all_sanitized(&WITHOUT) else { return };
    let kernels = mock::control().expect("the mock that the others ran on").kernels();
    let kernels: Vec<&String> = kernels.iter().filter(|name| !name.starts_with("selftest_")).collect();
    assert!(!kernels.is_empty());
    let wanted = kernels
        .iter()
        .flat_map(|kernel| ["forward", "reverse", "random"].map(|order| format!("{kernel} {order}")));
    let missing: Vec<String> = wanted.filter(|wanted| !ran.contains(wanted)).collect();
    assert!(missing.is_empty(), "no test runs {missing:#?}");
}
