//! `docs/SECRET-XML.md`: what becomes of every element and attribute of the document of a secret. With `UPDATE=1` in the environment
//! the page is written anew, to be reviewed.

use std::path::Path;
use virt_model::secret::{SecretDef, UsageKind, vocabulary};

const HEAD: &str = "# What becomes of secret XML

Every element and attribute of libvirt's document of a secret is read, stored and shown again, and does what stands here. What is not
in the format is refused by `DefineSecret`, with line and column; so is what the type of its use does not have. The value is never in
the document.

The page is generated from the format in `service/model/secret.txt` (`UPDATE=1 cargo test -p virt-model --test secret`), and a test
holds it to that.

| element or attribute | says |
|---|---|
";

/// What each says, in the order of the format.
const SAYS: &[(&str, &str)] = &[
    (
        "@ephemeral",
        "`yes`: value and definition are never on disk, and end with virtd. `no` is shown where nothing was said",
    ),
    ("@private", "`yes`: the value is told to nobody, root included. `no` is shown where nothing was said"),
    (
        "uuid",
        "what it is named by; chosen where there is none. That of another secret means that one, which is changed",
    ),
    ("description", "what it is for, for people"),
    ("usage", "what it is for, for machines and volumes that name it by that"),
    (
        "usage/@type",
        "one of the kinds below; without `<usage>` it is named by its uuid alone, and its `UsageType` is `none`",
    ),
    ("usage/volume", "the volume that it opens"),
    ("usage/name", "the user, certificate or TPM that it is for"),
    ("usage/target", "the server's name of what it lets in at"),
];

/// What needs secrets of that kind.
fn needed_by(kind: UsageKind) -> &'static str {
    match kind {
        UsageKind::None => "who names its uuid",
        UsageKind::Volume => "encrypted disks and volumes",
        UsageKind::Ceph => "disks at servers by `rbd`, in their `<auth>`",
        UsageKind::Iscsi => "disks at servers by other protocols, in their `<auth>`",
        UsageKind::Tls => "nothing of virtd's yet: it is kept, and its value told to who may have it",
        UsageKind::Vtpm => "machines whose TPM's state is encrypted (`<tpm><backend><encryption secret='uuid'/>`)",
    }
}

fn page() -> String {
    let rows = SAYS.iter().map(|(path, says)| match path.rsplit_once('@') {
        Some((at, attribute)) => format!("| `{attribute}` of `<{}>` | {says} |\n", root_or(at.trim_end_matches('/'))),
        None => format!("| `{path}` | {says} |\n"),
    });
    let kinds = UsageKind::ALL.iter().map(|kind| {
        let element = kind.element().map(|name| format!("`<{name}>`")).unwrap_or_default();
        format!("| `{kind}` | {element} | {} |\n", needed_by(*kind))
    });
    let head = "\n## What it is for\n\n| `type` | element | needed by |\n|---|---|---|\n";
    HEAD.to_owned() + &rows.collect::<String>() + head + &kinds.collect::<String>()
}

fn root_or(path: &str) -> &str {
    if path.is_empty() { "secret" } else { path }
}

#[test]
fn the_page_says_what_the_format_has() {
    let known = vocabulary().into_iter().flat_map(|(path, attributes)| {
        let below = |name: &String| if path.is_empty() { format!("@{name}") } else { format!("{path}/@{name}") };
        let attributes: Vec<_> = attributes.iter().map(below).collect();
        (!path.is_empty()).then_some(path).into_iter().chain(attributes)
    });
    assert_eq!(known.collect::<Vec<_>>(), SAYS.iter().map(|(path, _)| *path).collect::<Vec<_>>());
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/SECRET-XML.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, page()).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(written == page(), "docs/SECRET-XML.md is not what the format says: UPDATE=1 writes it anew");
}

/// A document of each kind that says all that there is comes back as it was, and each word of another kind is refused where it is.
#[test]
fn nothing_of_the_format_is_lost() {
    for kind in UsageKind::ALL {
        let document = |element: &str| {
            format!(
                "<secret ephemeral='yes' private='yes'>\n  <uuid>0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f</uuid>\n  \
                 <description>a &lt; b</description>\n  <usage type='{kind}'>\n    <{element}>x</{element}>\n  </usage>\n</secret>\n"
            )
        };
        for (path, _) in vocabulary() {
            let Some(element) = path.strip_prefix("usage/") else { continue };
            let text = document(element);
            match SecretDef::parse(&text) {
                Ok(def) => assert_eq!((kind.element(), def.to_xml()), (Some(element), text)),
                Err(findings) => {
                    assert_ne!(kind.element(), Some(element), "{text}: {findings:?}");
                    // What is wrong below `<usage>` is told at that, by its path.
                    let place = format!("/usage/{element}");
                    let found = findings.iter().any(|one| (one.line, one.column, &*one.path) == (4, 3, &*place));
                    assert!(found, "{text}: {findings:?}");
                }
            }
        }
    }
}
