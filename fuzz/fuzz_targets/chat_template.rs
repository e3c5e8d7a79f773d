//! libFuzzer over `moebius_fuzz::chat_template`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| moebius_fuzz::chat_template::run(data));
