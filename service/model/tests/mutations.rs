//! Random changes to real documents: whatever comes in, nothing panics, and what is accepted loses nothing.

use proptest::prelude::*;
use std::collections::BTreeMap;
use virt_model::domain::{DomainDef, Form};
use virt_model::xml::{Element, Node, read};

const FULL: Form = Form { inactive: false, secure: true, migratable: false };
const SEEDS: &[&str] = &[
    include_str!("../../../tests/data/domain/cockpit.xml"),
    include_str!("../../../tests/data/domain/gnome-boxes.xml"),
    include_str!("../../../tests/data/domain/kept.xml"),
    include_str!("../../../tests/data/domain/terraform.xml"),
    include_str!("../../../tests/data/domain/vagrant.xml"),
    include_str!("../../../tests/data/domain/virt-install.xml"),
    include_str!("../../../tests/data/domain/virt-manager-live.xml"),
];
const VALUES: &[&str] = &[
    "",
    "0",
    "1",
    "2",
    "-1",
    "0x1f",
    "99999999999999999999",
    "yes",
    "no",
    "on",
    "off",
    "pci",
    "usb",
    "drive",
    "virtio",
    "spice",
    "vnc",
    "file",
    "raw",
    "qcow2",
    "none",
    "network",
    "tcp",
    "unix",
    "pty",
    "address",
    "vda",
    "sdb",
    "a'b\"<&>\n\t\r",
    "é",
];

/// How often each element, attribute and text stands in a tree, by path; metadata aside.
fn inventory(element: &Element, path: &str, found: &mut BTreeMap<String, usize>) {
    if path == "/domain/metadata" {
        return;
    }
    for attribute in element.attributes.iter().filter(|a| !a.name.starts_with("xmlns")) {
        *found.entry(format!("{path}/@{}", attribute.name)).or_default() += 1;
    }
    if element.has_text() {
        *found.entry(format!("{path}/text()")).or_default() += 1;
    }
    for child in element.elements() {
        let path = format!("{path}/{}", child.name);
        inventory(child, &path, found);
        *found.entry(path).or_default() += 1;
    }
}

/// Everything in `given` is in `written`, at least as often.
fn assert_nothing_lost(given: &str, written: &str) {
    let count = |text| {
        let mut found = BTreeMap::new();
        let tree = read(text, &[("domain", "metadata")]).unwrap_or_else(|finding| panic!("{finding}\n{text}"));
        inventory(&tree, "/domain", &mut found);
        found
    };
    let after = count(written);
    for (path, times) in count(given) {
        // The prefix of a namespace is free.
        if path.contains("/q:") {
            continue;
        }
        assert!(after.get(&path).copied().unwrap_or(0) >= times, "{path} is lost\n{given}\n{written}");
    }
}

/// What holds for every document.
fn hold(text: &str) {
    let Ok(def) = DomainDef::parse(text) else { return };
    let written = def.write(FULL);
    assert_nothing_lost(text, &written);
    let again = DomainDef::parse(&written).unwrap_or_else(|findings| panic!("{findings:?}\n{written}"));
    assert!(again == def, "{text}\n{written}\n{}", again.write(FULL));
    let mut filled = def.clone();
    filled.fill_defaults();
    let stored = filled.write(FULL);
    let read_back = DomainDef::parse(&stored).unwrap_or_else(|findings| panic!("completed: {findings:?}\n{stored}"));
    assert!(read_back == filled, "completed: {stored}\n{}", read_back.write(FULL));
    let mut twice = read_back;
    twice.fill_defaults();
    assert!(twice == filled, "completed twice: {stored}\n{}", twice.write(FULL));
    let _ = def.unhandled();
    for form in [Form { inactive: true, ..FULL }, Form { migratable: true, ..FULL }] {
        let text = filled.write(form);
        assert!(DomainDef::parse(&text).is_ok(), "{form:?}: {text}");
    }
}

/// The `n`-th element, counted around.
fn pick(root: &mut Element, n: usize) -> &mut Element {
    fn count(element: &Element) -> usize {
        1 + element.elements().map(count).sum::<usize>()
    }
    let mut n = n % count(root);
    let mut element = root;
    while n > 0 {
        n -= 1;
        let mut index = 0;
        for (position, child) in element.elements().enumerate() {
            let size = count(child);
            if n < size {
                index = position;
                break;
            }
            n -= size;
        }
        element = element.elements_mut().nth(index).unwrap();
    }
    element
}

/// One change to a tree.
fn change(root: &mut Element, (what, place, value): (u8, usize, usize)) {
    let value = VALUES[value % VALUES.len()].to_owned();
    let other = pick(root, place.wrapping_mul(31)).clone();
    let element = pick(root, place);
    let attributes = element.attributes.len().max(1);
    match what {
        0 => element.attributes.iter_mut().skip(place % attributes).take(1).for_each(|a| a.value.clone_from(&value)),
        1 => drop(element.attributes.drain(..attributes.min(element.attributes.len()) / 2)),
        2 => element.nodes = vec![Node::Text(value)],
        3 => element.nodes.reverse(),
        4 => element.nodes.truncate(place % 3),
        5 => element.push(other),
        6 => element.nodes.extend(element.nodes.clone()),
        7 => element.attributes.clone_from(&other.attributes),
        _ => element.nodes.push(Node::Comment(" c ".to_owned())),
    }
}

#[test]
fn seeds_hold() {
    SEEDS.iter().for_each(|seed| hold(seed));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_trees(seed in 0..SEEDS.len(), changes in prop::collection::vec((0u8..9, any::<u16>(), any::<u8>()), 1..3)) {
        let mut root = read(SEEDS[seed], &[]).unwrap();
        for (what, place, value) in changes {
            change(&mut root, (what, place.into(), value.into()));
        }
        hold(&root.write());
    }

    #[test]
    fn changed_bytes(seed in 0..SEEDS.len(), at in any::<prop::sample::Index>(), len in 0usize..12, new in "[ -~\n]{0,4}") {
        let mut chars: Vec<char> = SEEDS[seed].chars().collect();
        let at = at.index(chars.len());
        let end = (at + len).min(chars.len());
        chars.splice(at..end, new.chars());
        hold(&chars.into_iter().collect::<String>());
    }
}
