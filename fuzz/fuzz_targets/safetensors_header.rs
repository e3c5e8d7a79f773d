//! libFuzzer over `moebius_fuzz::safetensors_header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| moebius_fuzz::safetensors_header::run(data));
