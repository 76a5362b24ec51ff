//! What holds for every text that is given as a domain document.

use std::collections::BTreeMap;
use virt_model::domain::abi::Strictness;
use virt_model::domain::{DomainDef, Form};
use virt_model::xml::{Element, read};

const FULL: Form = Form { inactive: false, secure: true, migratable: false };

/// Panics if something does not hold: what is accepted is well-formed, loses nothing, and reads back equal in each form.
pub fn holds(text: &str) {
    let Ok(tree) = read(text, &[]) else {
        assert!(DomainDef::parse(text).is_err(), "accepted, and not well-formed: {text}");
        return;
    };
    let written = tree.write();
    let again = read(&written, &[]).unwrap_or_else(|finding| panic!("{finding}\n{text}\n{written}"));
    assert_eq!(again.write(), written, "{text}");
    if let Err(other) = roxmltree::Document::parse(text) {
        panic!("another parser refuses it: {other}\n{text}");
    }
    match DomainDef::parse(text) {
        Ok(def) => accepted(text, &def),
        Err(findings) => assert!(!findings.is_empty(), "refused without a word: {text}"),
    }
}

fn parsed(text: &str, what: &str) -> DomainDef {
    DomainDef::parse(text).unwrap_or_else(|findings| panic!("{what}: {findings:?}\n{text}"))
}

fn accepted(text: &str, def: &DomainDef) {
    let written = def.write(FULL);
    nothing_is_lost(text, &written);
    let again = parsed(&written, "written");
    assert!(again == *def, "{text}\n{written}\n{}", again.write(FULL));
    let mut filled = def.clone();
    filled.fill_defaults();
    let stored = filled.write(FULL);
    let mut back = parsed(&stored, "completed");
    assert!(back == filled, "completed: {stored}\n{}", back.write(FULL));
    back.fill_defaults();
    assert!(back == filled, "completed twice: {stored}\n{}", back.write(FULL));
    let _ = def.unhandled();
    for form in [Form { inactive: true, ..FULL }, Form { secure: false, ..FULL }, Form { migratable: true, ..FULL }] {
        let there = filled.write(form);
        assert_eq!(parsed(&there, "in a form").write(form), there, "{form:?}");
    }
    assert!(filled.same_configuration(&back));
    assert_eq!(filled.compare_abi(&back, Strictness::Strict), [], "{stored}");
}

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
        // The prefix of a namespace is free.
        let name = if child.namespace.is_some() { child.local_name() } else { &child.name };
        let path = format!("{path}/{name}");
        inventory(child, &path, found);
        *found.entry(path).or_default() += 1;
    }
}

/// Everything in `given` is in `written`, at least as often.
fn nothing_is_lost(given: &str, written: &str) {
    let count = |text| {
        let mut found = BTreeMap::new();
        let tree = read(text, &[("domain", "metadata")]).unwrap_or_else(|finding| panic!("{finding}\n{text}"));
        inventory(&tree, "/domain", &mut found);
        found
    };
    let after = count(written);
    for (path, times) in count(given) {
        assert!(after.get(&path).copied().unwrap_or(0) >= times, "{path} is lost\n{given}\n{written}");
    }
}
