//! Changes that know what a domain document is, and now and then libFuzzer's own, which know nothing.

use super::dice::Dice;
use super::documents::Maker;
use std::path::Path;
use std::sync::LazyLock;
use virt_model::xml::read;

static MAKER: LazyLock<Maker> = LazyLock::new(|| Maker::new(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../data")));

/// Changes the first `size` bytes of `data`, of which `max_size` may be used; gives how many there are then.
pub fn change(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let dice = &mut Dice::new(seed.into());
    let tree = std::str::from_utf8(&data[..size]).ok().and_then(|text| read(text, &[]).ok());
    let text = match tree {
        _ if dice.once_in(4) => None,
        Some(root) => Some(MAKER.changed(root, dice)),
        None if dice.once_in(2) => Some(MAKER.made_up(dice).write()),
        None => Some(MAKER.variant(dice)),
    };
    match text.filter(|text| text.len() <= max_size) {
        Some(text) => {
            data[..text.len()].copy_from_slice(text.as_bytes());
            text.len()
        }
        None => libfuzzer_sys::fuzzer_mutate(data, size, max_size),
    }
}
