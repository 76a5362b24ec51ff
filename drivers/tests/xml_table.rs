//! `docs/DOMAIN-XML.md`: what becomes of every element and attribute of the format, written from the lists that decide it.
//! With `UPDATE=1` in the environment the page is written anew, to be reviewed.

use std::collections::BTreeMap;
use std::path::Path;
use virt_drivers::qemu::check::{Standing, standing};
use virt_model::domain::vocabulary;

const HEAD: &str = "# What becomes of domain XML

Every element and attribute of libvirt's domain format is known, stored and shown again. This page says what the **QEMU**
driver does with each: it *acts*; or it is *kept*, and asks for nothing at start; or it is *refused* by `Start` and reported
by `ValidateDomain`, by name and with the reason. `DefineDomain` stores all of it. What is not in the format is refused by
`DefineDomain`, with line and column; so is what contradicts itself on any machine: values out of range, references to what
is not there, lists that overlap, things that exclude each other (`service/model/domain/cross`; `tests/data/refused` shows
what is said of each kind). The **test** driver stores all and acts on memory, vCPUs, title, description and
`on_*`; it refuses raw hypervisor arguments.

The page is generated from the lists in `drivers/qemu/check/table.rs` (`UPDATE=1 cargo test -p virt-drivers --test
xml_table`), and a test holds it to them. A value or a combination can be refused although its attribute acts; the
message then says so. An element in brackets stands for itself and all below it.

`<filterref>` names one of the filters that libvirt ships; other names are refused by `DefineDomain`, for there are no objects that
define filters. It acts as two chains of nftables at the bridge, in a table of the card's own, made before the card is in the bridge
and gone with it. A filter that looks at addresses is told them (`IP`, `IPV6`; `DHCPSERVER`, `GATEWAY_MAC`): they are not learnt from
what a guest sends. While a machine runs, `UpdateDevice` gives a card another one in one step, and none where it says `<filterref/>`.

The `<encryption>` of a TPM names a secret of type `vtpm` by its uuid, or one for nothing in particular. With its value the state is
encrypted from its making on: a state that is there stays as it was made, so who adds the element or takes it out removes the state,
or finds that QEMU does not start. While a machine names the secret so, its value is not replaced by another (`InUse`), and the memory
of a snapshot whose TPM had another secret is not loaded.
";

/// One element's line, or `None` if it is covered by the line of an element above.
fn row(path: &str, attributes: &[String], parents: &mut Vec<String>) -> Option<String> {
    if parents.iter().any(|parent| path.strip_prefix(&**parent).is_some_and(|rest| rest.starts_with('/'))) {
        return None;
    }
    let name = if path.is_empty() { "domain" } else { path };
    let (mut acts, mut kept, mut refused) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    match standing(path) {
        Standing::Kept(why) => {
            parents.push(path.to_owned());
            return Some(format!("| [`{name}`] | | {why} | |\n"));
        }
        Standing::Refused(why) => {
            parents.push(path.to_owned());
            return Some(format!("| [`{name}`] | | | {} |\n", sentence(why)));
        }
        Standing::Acts => {}
    }
    for attribute in attributes {
        let place = if path.is_empty() { format!("@{attribute}") } else { format!("{path}/@{attribute}") };
        match standing(&place) {
            Standing::Acts => acts.push(format!("`{attribute}`")),
            Standing::Kept(why) => kept.entry(why).or_insert_with(Vec::new).push(format!("`{attribute}`")),
            Standing::Refused(why) => {
                refused.entry(sentence(why)).or_insert_with(Vec::new).push(format!("`{attribute}`"));
            }
        }
    }
    let list = |reasons: &BTreeMap<&str, Vec<String>>| {
        let parts = reasons.iter().map(|(why, names)| format!("{}: {why}", names.join(" ")));
        parts.collect::<Vec<_>>().join("; ")
    };
    let acts = if acts.is_empty() { "yes".to_owned() } else { acts.join(" ") };
    Some(format!("| `{name}` | {acts} | {} | {} |\n", list(&kept), list(&refused)))
}

/// A reason as it reads in a table.
fn sentence(why: &'static str) -> &'static str {
    why.strip_prefix("is ").unwrap_or(why)
}

fn page() -> String {
    let mut page = HEAD.to_owned();
    let mut section = None;
    let mut parents = Vec::new();
    for (path, attributes) in vocabulary() {
        let parts: Vec<&str> = path.split('/').collect();
        let own = if parts[0] == "devices" && parts.len() > 1 { parts[1] } else { "" };
        let title = if own.is_empty() { "The machine".to_owned() } else { format!("`<{own}>`") };
        let Some(row) = row(&path, &attributes, &mut parents) else { continue };
        if section.as_ref() != Some(&title) {
            page += &format!("\n## {title}\n\n| element | acts | kept | refused |\n|---|---|---|---|\n");
            section = Some(title);
        }
        page += &row;
    }
    page
}

#[test]
fn the_page_says_what_is_done() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/DOMAIN-XML.md");
    let page = page();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(written == page, "docs/DOMAIN-XML.md is not what the lists say: UPDATE=1 writes it anew");
    assert!(page.lines().count() > 200);
}
