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

/// The value that a tree stands for, sensible or not: what cannot be read is left out of it, and what is only kept has the
/// order and the blanks of the format, as in every value that comes from a document. None if it uses prefixes that it does
/// not declare.
fn value(tree: &Element) -> Option<DomainDef> {
    let mut text = DomainDef::read(tree.clone(), &mut Vec::new()).tree().write();
    for _ in 0..20 {
        let tree = read(&text, &[("domain", "metadata")]).ok()?;
        let def = DomainDef::read(tree, &mut Vec::new());
        let written = def.tree().write();
        if written == text {
            return Some(def);
        }
        text = written;
    }
    panic!("it never settles: {text}");
}

/// Where two values begin to differ.
fn differing(one: &DomainDef, other: &DomainDef) -> Option<(String, String)> {
    let lines = |def: &DomainDef| format!("{def:#?}").lines().map(str::to_owned).collect::<Vec<_>>();
    let places =
        |line: &(String, String)| ["at: ", "origin: "].iter().any(|name| line.0.trim_start().starts_with(name));
    lines(one).into_iter().zip(lines(other)).filter(|pair| !places(pair)).find(|(one, other)| one != other)
}

/// A value, written and read, is the same value.
fn reads_back(tree: &Element) -> Result<(), TestCaseError> {
    let Some(def) = value(tree) else { return Ok(()) };
    let again = value(&def.tree()).ok_or_else(|| TestCaseError::fail(def.tree().write()))?;
    let (text, back) = (def.tree().write(), again.tree().write());
    prop_assert!(again == def, "{}\n{}\n{:?}", text, back, differing(&def, &again));
    Ok(())
}

#[test]
fn values_are_made_of_all_there_is() {
    let mut devices = std::collections::BTreeSet::new();
    let values: Vec<DomainDef> = (0..500).filter_map(|seed| value(&MAKER.made_up(&mut Dice::new(seed)))).collect();
    assert!(values.len() > 250, "{}", values.len());
    for def in values {
        devices.extend(def.tree().child("devices").into_iter().flat_map(Element::elements).map(|e| e.name.clone()));
    }
    assert!(devices.len() > 25, "{devices:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_value_reads_back_equal(seed in any::<u64>()) {
        let dice = &mut Dice::new(seed);
        reads_back(&MAKER.made_up(dice))?;
        if let Ok(tree) = read(&MAKER.variant(dice), &[("domain", "metadata")]) {
            reads_back(&tree)?;
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
