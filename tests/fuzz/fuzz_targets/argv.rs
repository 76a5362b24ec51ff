//! libFuzzer's way into `argv.rs`.
#![no_main]

#[path = "../argv.rs"]
mod argv;
#[path = "../dice.rs"]
mod dice;
#[path = "../documents.rs"]
mod documents;
#[path = "mutator.rs"]
mod mutator;

use std::path::Path;
use std::sync::LazyLock;
use virt_drivers::qemu::capabilities::Capabilities;

static HOST: LazyLock<Capabilities> =
    LazyLock::new(|| argv::host(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/qemu")));

libfuzzer_sys::fuzz_target!(|text: &str| argv::holds(text, &HOST));
libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutator::change(data, size, max_size, seed)
});
