//! libFuzzer over `moebius_fuzz::tokenizer_files`.
#![no_main]

// The tokenizers crate panics where it should return errors; `moebius::tokenizer` catches that, and
// libFuzzer's hook, which aborts before anything can be caught, must go.
libfuzzer_sys::fuzz_target!(
    init: drop(std::panic::take_hook()),
    |data: &[u8]| moebius_fuzz::tokenizer_files::run(data)
);
