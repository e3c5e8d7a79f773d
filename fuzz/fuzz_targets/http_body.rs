//! libFuzzer over `moebius_fuzz::http_body`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| moebius_fuzz::http_body::run(data));
