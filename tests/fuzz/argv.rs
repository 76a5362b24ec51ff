//! What holds for every document on its way to QEMU's arguments.

use serde_json::Value;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use virt_drivers::qemu::capabilities::{Capabilities, Site};
use virt_drivers::qemu::check::{check, checked_command};
use virt_drivers::qemu::command::Place;
use virt_drivers::qemu::complete::complete;
use virt_drivers::qemu::firmware::{place_variables, read_all};
use virt_drivers::qemu::plan::Command;
use virt_model::domain::{DomainDef, Form};
use virt_model::xml::{Finding, FindingKind};

/// A recorded QEMU 7.2 on a host with everything; `data` is `tests/data/qemu`.
pub fn host(data: &Path) -> Capabilities {
    let mut caps: Capabilities = serde_json::from_str(include_str!("../data/qemu/qemu-7.2.json")).unwrap();
    caps.kvm = Ok(());
    caps.firmware = read_all(&[&data.join("firmware")]);
    caps.bridge_helper = Some(PathBuf::from("/usr/lib/qemu/qemu-bridge-helper"));
    caps.site = Site {
        state_dir: "/var/lib/virt".into(),
        swtpm: Some("/usr/bin/swtpm".into()),
        swtpm_setup: Some("/usr/bin/swtpm_setup".into()),
        ..Site::default()
    };
    caps
}

/// Panics if something does not hold: completing is done once and for all, what is not refused has a command line, and
/// always the same one.
pub fn holds(text: &str, caps: &Capabilities) {
    let Ok(mut def) = DomainDef::parse(text) else { return all_is_told(text, caps) };
    if !matches!(&*def.kind, "qemu" | "kvm") {
        return;
    }
    if let Err(findings) = complete(&mut def, caps) {
        assert!(!findings.is_empty(), "refused without a word: {text}");
        return;
    }
    place_variables(&mut def, Path::new("/var/lib/virt/nvram"));
    let stored = def.write(Form::STORED);
    let mut again = DomainDef::parse(&stored).unwrap_or_else(|findings| panic!("{}\n{stored}", said(&findings)));
    complete(&mut again, caps).unwrap_or_else(|findings| panic!("again: {}\n{stored}", said(&findings)));
    assert_eq!(again.write(Form::STORED), stored, "completed again");
    let findings = check(&def, caps);
    assert_eq!(findings, check(&def, caps));
    let refused = findings.iter().any(|finding| finding.kind != FindingKind::Warning);
    match checked_command(&def, caps, &place()) {
        Ok(command) => {
            assert!(!refused, "built in spite of: {}\n{stored}", said(&findings));
            assert_eq!(checked_command(&def, caps, &place()).as_ref(), Ok(&command));
            sound(&command, &def);
        }
        Err(why) => assert!(refused, "not built: {}\n{stored}", said(&why)),
    }
}

/// Of what is refused, too, the rest is looked at: `ValidateDomain` tells all at once.
fn all_is_told(text: &str, caps: &Capabilities) {
    let (def, findings) = DomainDef::parse_leniently(text);
    assert!(!findings.is_empty(), "refused without a word: {text}");
    if let Some(mut def) = def.filter(|def| matches!(&*def.kind, "qemu" | "kvm")) {
        let _ = complete(&mut def, caps);
        let _ = check(&def, caps);
    }
}

fn place() -> Place<'static> {
    Place { runtime_dir: Path::new("/run/g"), monitor_fd: 3, now: 1_795_403_655, east_of_utc: 3600, sandbox: true }
}

fn said(findings: &[Finding]) -> String {
    findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// What every command line keeps: JSON that says nothing twice, each name once, no password.
fn sound(command: &Command, def: &DomainDef) {
    let own = def.native.as_ref().map_or(0, |native| native.arguments.len());
    let args = &command.args[..command.args.len() - own];
    let mut names = HashSet::new();
    for pair in args.windows(2).filter(|pair| pair[1].starts_with('{')) {
        let value: Value = serde_json::from_str(&pair[1]).unwrap_or_else(|e| panic!("{e}: {}", pair[1]));
        assert_eq!(members(&value), colons(&pair[1]), "a member is there twice: {}", pair[1]);
        let id = value.get("id").and_then(Value::as_str).map(|id| (&*pair[0] == "-audiodev", id.to_owned()));
        assert!(id.is_none_or(|id| names.insert(id)), "a name is there twice: {}", pair[1]);
    }
    for password in def.devices.graphics.iter().filter_map(|graphics| graphics.passwd.as_deref()) {
        let secret = password.len() > 7 && password.chars().all(|c| c.is_ascii_alphanumeric());
        assert!(!secret || args.iter().all(|arg| !arg.contains(password)), "{password} is in {args:?}");
    }
}

/// How many members objects have, inner ones included.
fn members(value: &Value) -> usize {
    match value {
        Value::Object(map) => map.len() + map.values().map(members).sum::<usize>(),
        Value::Array(list) => list.iter().map(members).sum(),
        _ => 0,
    }
}

/// How many colons stand outside of strings.
fn colons(json: &str) -> usize {
    let (mut count, mut quoted, mut escaped) = (0, false, false);
    for c in json.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = quoted,
            '"' => quoted = !quoted,
            ':' if !quoted => count += 1,
            _ => {}
        }
    }
    count
}
