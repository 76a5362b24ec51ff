//! Metadata: kept to the letter, one child per namespace, replaced without touching its neighbours.

use virt_model::domain::{DomainDef, Form};

fn def(inner: &str) -> DomainDef {
    let text = format!(
        "<domain type='test' xmlns:outer='urn:outer'><name>a</name><memory>1</memory><metadata>{inner}</metadata></domain>"
    );
    DomainDef::parse(&text).unwrap()
}

fn text(def: &DomainDef) -> Option<String> {
    let written = def.write(Form::default());
    assert!(DomainDef::parse(&written).unwrap() == *def, "{written}");
    let start = written.find("<metadata>")? + "<metadata>".len();
    Some(written[start..written.find("</metadata>")?].to_owned())
}

#[test]
fn comes_back_to_the_letter() {
    let inner = "\n\t<x:a  xmlns:x = \"urn:x\" y=\"'1'\"></x:a>\r\n<!-- c --> <b><![CDATA[<]]>&#65;</b>";
    assert_eq!(text(&def(inner)).unwrap(), inner);
    assert_eq!(def(inner).metadata("urn:x").unwrap(), "<x:a  xmlns:x = \"urn:x\" y=\"'1'\"></x:a>");
    assert_eq!(def(inner).metadata("urn:y"), None);
}

#[test]
fn prefixes_declared_outside_travel_along() {
    let def = def("<outer:a><outer:b/></outer:a>");
    assert_eq!(def.metadata("urn:outer").unwrap(), "<outer:a xmlns:outer='urn:outer'><outer:b/></outer:a>");
}

#[test]
fn is_set_replaced_and_removed() {
    let mut def = def("");
    def.set_metadata("urn:x", "x", Some("<a b=\"1\"><c/></a>")).unwrap();
    assert_eq!(def.metadata("urn:x").unwrap(), "<x:a xmlns:x='urn:x' b=\"1\"><c/></x:a>");
    def.set_metadata("urn:y", "y", Some("<?xml version='1.0'?>\n<!-- n --> <z/>")).unwrap();
    assert_eq!(text(&def).unwrap(), "\n    <x:a xmlns:x='urn:x' b=\"1\"><c/></x:a>\n    <y:z xmlns:y='urn:y'/>\n  ");
    def.set_metadata("urn:x", "x", Some("<p:q xmlns:p='urn:x'/>")).unwrap();
    assert_eq!(text(&def).unwrap(), "\n    <p:q xmlns:p='urn:x'/>\n    <y:z xmlns:y='urn:y'/>\n  ");
    def.set_metadata("urn:x", "x", None).unwrap();
    assert_eq!(text(&def).unwrap(), "\n    <y:z xmlns:y='urn:y'/>\n  ");
    def.set_metadata("urn:y", "y", None).unwrap();
    assert_eq!(text(&def), None);
    def.set_metadata("urn:y", "y", None).unwrap();
}

#[test]
fn refusals_change_nothing() {
    let mut def = def("<x:a xmlns:x='urn:x'/>");
    let before = def.clone();
    let deep = format!("{}{}", "<a>".repeat(63), "</a>".repeat(63));
    let cases = [
        ("urn:x", "x", "<a>", "ends before"),
        ("urn:x", "x", "<a/><b/>", "second root"),
        ("urn:x", "x", "text", "outside the root"),
        ("urn:x", "x", "<!DOCTYPE a><a/>", "document type"),
        ("urn:x", "x", deep.as_str(), "deep"),
        ("", "x", "<a/>", "URI"),
        ("urn:\u{1}", "x", "<a/>", "URI"),
        ("urn:z", "a b", "<a/>", "prefix"),
        ("urn:z", "xmlns", "<a/>", "prefix"),
        ("urn:z", "", "<a/>", "prefix"),
        ("urn:z", "p", "<a xmlns:p='urn:other'/>", "another namespace"),
    ];
    for (uri, prefix, xml, expected) in cases {
        let finding = def.set_metadata(uri, prefix, Some(xml)).unwrap_err();
        assert!(finding.message.contains(expected), "{xml}: {finding}");
        assert!(def == before, "{xml}");
    }
}
