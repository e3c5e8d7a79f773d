//! libFuzzer over `moebius_fuzz::index_and_config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| moebius_fuzz::index_and_config::run(data));
