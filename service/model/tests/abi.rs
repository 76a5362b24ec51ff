//! What a guest would notice: pairs of documents, and what holds for any two.
//!
//! `tests/data/abi/<case>.source.xml` and `<case>.target.xml` are compared; `<case>.expected.txt` lists what is found, in the
//! strict form. Each pair also differs in much that may differ. With `UPDATE=1` in the environment the expectations are
//! written anew, to be reviewed.

use proptest::prelude::*;
use std::path::PathBuf;
use std::sync::LazyLock;
use virt_model::domain::DomainDef;
use virt_model::domain::abi::{AbiDifference, Strictness};
use virt_model::xml::{Element, Node, read};

fn data() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/abi")
}

fn text(name: &str) -> String {
    std::fs::read_to_string(data().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn cases() -> Vec<String> {
    let files = std::fs::read_dir(data()).unwrap();
    let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut cases: Vec<_> = names.filter_map(|name| Some(name.strip_suffix(".source.xml")?.to_owned())).collect();
    cases.sort();
    cases
}

fn complete(root: Element) -> Option<DomainDef> {
    let mut def = DomainDef::from_tree(root).ok()?;
    def.fill_defaults();
    Some(def)
}

fn definition(name: &str) -> DomainDef {
    let text = text(name);
    DomainDef::parse(&text).unwrap_or_else(|findings| panic!("{name}: {findings:#?}"));
    complete(tree(&text)).unwrap()
}

fn tree(text: &str) -> Element {
    read(text, &[("domain", "metadata")]).unwrap()
}

/// A line for each difference: path, source, target, with bars between.
fn listed(differences: &[AbiDifference]) -> String {
    differences.iter().map(|d| format!("{} | {} | {}\n", d.path, d.source, d.target)).collect()
}

/// The values with the sides changed, in an order of their own. Paths name the source, so they are not part of it.
fn mirrored(differences: &[AbiDifference], swap: bool) -> Vec<(String, String)> {
    let values = |d: &AbiDifference| (d.source.clone(), d.target.clone());
    let swapped = |(source, target)| if swap { (target, source) } else { (source, target) };
    let mut all: Vec<_> = differences.iter().map(|d| swapped(values(d))).collect();
    all.sort();
    all
}

#[test]
fn pairs_differ_as_expected() {
    for case in cases() {
        let (source, target) = (definition(&format!("{case}.source.xml")), definition(&format!("{case}.target.xml")));
        let found = listed(&source.compare_abi(&target, Strictness::Strict));
        let expected = data().join(format!("{case}.expected.txt"));
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&expected, &found).unwrap();
        }
        assert_eq!(found, text(&format!("{case}.expected.txt")), "{case}");
    }
}

#[test]
fn a_running_guests_current_memory_wins() {
    let (source, target) = (definition("machine.source.xml"), definition("machine.target.xml"));
    let paths = |strictness| -> Vec<String> {
        source.compare_abi(&target, strictness).into_iter().map(|difference| difference.path).collect()
    };
    let (strict, running) = (paths(Strictness::Strict), paths(Strictness::Running));
    assert!(strict.contains(&"/currentMemory".to_owned()));
    assert_eq!(running, strict.into_iter().filter(|path| path != "/currentMemory").collect::<Vec<_>>());
}

#[test]
fn a_difference_reads_as_a_sentence() {
    let difference = |source: &str, target: &str| AbiDifference {
        path: "/devices/interface[mac=52:54:00:ab:1a:01]/mtu/size".to_owned(),
        source: source.to_owned(),
        target: target.to_owned(),
    };
    let path = "/devices/interface[mac=52:54:00:ab:1a:01]/mtu/size";
    assert_eq!(difference("1500", "9000").to_string(), format!("{path}: '1500' → '9000'"));
    assert_eq!(difference("1500", "").to_string(), format!("{path}: '1500' → nothing"));
}

/// All documents there are, as trees.
static SEEDS: LazyLock<Vec<Element>> = LazyLock::new(|| {
    let sides = |case: String| [format!("{case}.source.xml"), format!("{case}.target.xml")];
    cases().into_iter().flat_map(sides).map(|name| tree(&text(&name))).collect()
});

/// The same completed, so that nothing is chosen by position, and without what only its position tells from its like.
static ORDERED: LazyLock<Vec<Element>> = LazyLock::new(|| {
    const KNOWN: &[&str] = &["disk", "controller", "interface", "serial", "parallel", "console", "channel", "graphics"];
    let mut seeds: Vec<_> = SEEDS.iter().cloned().filter_map(complete).map(|def| def.tree()).collect();
    for devices in seeds.iter_mut().flat_map(Element::elements_mut).filter(|e| e.name == "devices") {
        let placed = |e: &Element| KNOWN.contains(&&*e.name) || e.child("address").is_some();
        devices.nodes.retain(|node| node.as_element().is_none_or(placed));
    }
    seeds
});

fn elements(element: &mut Element) -> usize {
    1 + element.elements_mut().map(elements).sum::<usize>()
}

/// Does `what` to the `index`-th element of the tree, counted from its root.
fn visit(element: &mut Element, index: &mut usize, what: &mut impl FnMut(&mut Element)) {
    if *index == 0 {
        what(element);
    }
    *index = index.wrapping_sub(1);
    element.elements_mut().for_each(|child| visit(child, index, what));
}

/// Some change at a place: an attribute, the text, a child less, a child twice, the children in another order.
fn change(root: &mut Element, (what, place, value): (u8, usize, usize)) {
    const VALUES: &[&str] = &["0", "1", "2", "on", "off", "yes", "no", "virtio", "pci", "0x5", "x"];
    let value_text = VALUES[value % VALUES.len()];
    let mut index = place % elements(root);
    visit(root, &mut index, &mut |element| match what {
        0 | 1 => {
            let count = element.attributes.len().max(1);
            element.attributes.get_mut(value % count).into_iter().for_each(|a| a.value = value_text.to_owned());
        }
        2 => element.nodes.iter_mut().for_each(|node| {
            if let Node::Text(text) = node {
                *text = value_text.to_owned();
            }
        }),
        3 if !element.nodes.is_empty() => drop(element.nodes.remove(value % element.nodes.len())),
        4 if !element.nodes.is_empty() => element.nodes.push(element.nodes[value % element.nodes.len()].clone()),
        _ => element.nodes.reverse(),
    });
}

/// Puts the children of the elements in which order says nothing in another order.
fn shuffle(root: &mut Element, by: usize) {
    const FREE: &[&str] =
        &["domain", "features", "hyperv", "kvm", "clock", "cpu", "devices", "distances", "vcpus", "system"];
    if FREE.contains(&&*root.name) && !root.nodes.is_empty() {
        let by = by % root.nodes.len();
        root.nodes.rotate_left(by);
        if by % 2 == 1 {
            root.nodes.reverse();
        }
    }
    root.elements_mut().for_each(|child| shuffle(child, by / 2 + 1));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_machine_is_like_itself_and_differences_have_two_sides(
        seed in any::<prop::sample::Index>(),
        changes in prop::collection::vec((0u8..6, any::<u16>(), any::<u8>()), 1..4),
    ) {
        let source = seed.get(&SEEDS).clone();
        let mut target = source.clone();
        changes.into_iter().for_each(|(what, place, value)| change(&mut target, (what, place.into(), value.into())));
        let (Some(source), Some(target)) = (complete(source), complete(target)) else { return Ok(()) };
        for strictness in [Strictness::Strict, Strictness::Running] {
            prop_assert!(source.compare_abi(&source, strictness).is_empty());
            prop_assert!(target.compare_abi(&target, strictness).is_empty());
            let (there, back) = (source.compare_abi(&target, strictness), target.compare_abi(&source, strictness));
            prop_assert_eq!(mirrored(&there, false), mirrored(&back, true));
            prop_assert!(there.iter().all(|difference| difference.source != difference.target));
        }
    }

    #[test]
    fn another_order_is_the_same_machine(seed in any::<prop::sample::Index>(), by in any::<u16>()) {
        let source = seed.get(&ORDERED).clone();
        let mut target = source.clone();
        shuffle(&mut target, by.into());
        let (source, target) = (complete(source).unwrap(), complete(target).unwrap());
        prop_assert_eq!(listed(&source.compare_abi(&target, Strictness::Strict)), "");
    }
}
