//! `Interfaces`.

use super::pack::{Entry, Key};
use virt_model::device::Interface;

pub(super) fn entry(card: &Interface) -> Entry {
    let host_card = card.host_card().map(|place| place.to_string());
    let mac = card.mac().map(|mac| mac.to_string());
    let source = card.source.as_ref().and_then(|source| {
        // Of a network the bridge is what it came to.
        let named = [&source.network, &source.bridge, &source.dev, &source.path, &source.address];
        named.into_iter().flatten().next().map(String::as_str)
    });
    Entry::default()
        .text(Key::Mac, mac.as_deref())
        .text(Key::Type, Some(card.kind.as_str()))
        .text(Key::Source, source.or(host_card.as_deref()))
        .text(Key::Model, card.model())
        .text(Key::Target, card.target.as_ref().and_then(|target| target.dev.as_deref()))
        .text(Key::Alias, card.info.alias())
        .flag(Key::Link, card.link_up())
        .number(Key::BootOrder, card.info.boot_order())
}
