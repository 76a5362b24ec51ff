//! libFuzzer's way into `xml.rs`.
#![no_main]

#[path = "../dice.rs"]
mod dice;
#[path = "../documents.rs"]
mod documents;
#[path = "mutator.rs"]
mod mutator;
#[path = "../xml.rs"]
mod xml;

libfuzzer_sys::fuzz_target!(|text: &str| xml::holds(text));
libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutator::change(data, size, max_size, seed)
});
