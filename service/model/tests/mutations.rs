//! Random documents and random values: whatever comes in, nothing panics, and nothing is lost on the way in or out.
//!
//! What is made at random, and what then holds, stands in `tests/fuzz`, where it is searched for longer.

#[path = "../../../tests/fuzz/dice.rs"]
mod dice;
#[path = "../../../tests/fuzz/documents.rs"]
mod documents;
#[path = "../../../tests/fuzz/xml.rs"]
mod xml;

use dice::Dice;
use documents::{Maker, texts};
use proptest::prelude::*;
use std::path::PathBuf;
use std::sync::LazyLock;
use virt_model::domain::DomainDef;
use virt_model::domain::part::Part;
use virt_model::xml::{Element, read};

static DATA: LazyLock<PathBuf> = LazyLock::new(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data"));
static MAKER: LazyLock<Maker> = LazyLock::new(|| Maker::new(&DATA));
static TEXTS: LazyLock<Vec<String>> =
    LazyLock::new(|| texts(&DATA.join("domain")).into_iter().map(|(_, text)| text).collect());

/// The value that a tree stands for, sensible or not: what cannot be read is left out of it.
fn value(tree: Element) -> DomainDef {
    let mut def = DomainDef::read(tree, &mut Vec::new());
    // Declared where a prefix is used, which is a matter of writing.
    def.rest.attributes.retain(|attribute| !attribute.name.starts_with("xmlns:"));
    def
}

/// Where two values begin to differ.
fn differing(one: &DomainDef, other: &DomainDef) -> Option<(String, String)> {
    let lines = |def: &DomainDef| format!("{def:#?}").lines().map(str::to_owned).collect::<Vec<_>>();
    let places = |line: &(String, String)| line.0.trim_start().starts_with(|c: char| c.is_ascii_digit());
    lines(one).into_iter().zip(lines(other)).filter(|pair| !places(pair)).find(|(one, other)| one != other)
}

/// A value, written and read, is the same value.
fn reads_back(tree: Element) -> Result<(), TestCaseError> {
    let def = value(tree);
    let text = def.tree().write();
    let again = read(&text, &[("domain", "metadata")]).map_err(|finding| TestCaseError::fail(finding.to_string()))?;
    let again = value(again);
    prop_assert!(again == def, "{}\n{}\n{:?}", text, again.tree().write(), differing(&def, &again));
    Ok(())
}

#[test]
fn values_are_made_of_all_there_is() {
    let mut devices = std::collections::BTreeSet::new();
    for seed in 0..500 {
        let def = value(MAKER.made_up(&mut Dice::new(seed)));
        devices.extend(def.tree().child("devices").into_iter().flat_map(Element::elements).map(|e| e.name.clone()));
    }
    assert!(devices.len() > 25, "{devices:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_value_reads_back_equal(seed in any::<u64>()) {
        let dice = &mut Dice::new(seed);
        reads_back(MAKER.made_up(dice))?;
        if let Ok(tree) = read(&MAKER.variant(dice), &[("domain", "metadata")]) {
            reads_back(tree)?;
        }
    }

    #[test]
    fn changed_bytes(seed in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), len in 0usize..12, new in "[ -~\n]{0,4}") {
        let mut chars: Vec<char> = seed.get(&TEXTS).chars().collect();
        let at = at.index(chars.len());
        let end = (at + len).min(chars.len());
        chars.splice(at..end, new.chars());
        xml::holds(&chars.into_iter().collect::<String>());
    }
}
