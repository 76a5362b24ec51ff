//! What the tests of the QEMU driver share: the corpus, and a QEMU to measure it by.
#![allow(dead_code, reason = "each test crate uses its part")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use virt_drivers::qemu::capabilities::{Capabilities, Site};
use virt_drivers::qemu::command::Place;
use virt_drivers::qemu::complete::complete;
use virt_drivers::qemu::firmware::{place_variables, read_all};
use virt_model::domain::DomainDef;
use virt_model::xml::Finding;

/// What `@DIR@` in the corpus stands for where nothing is opened.
pub const DIR: &str = "/guests";

pub fn data() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data/qemu")
}

pub fn text(name: &str) -> String {
    std::fs::read_to_string(data().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The cases, sorted.
pub fn cases() -> Vec<String> {
    let files = std::fs::read_dir(data()).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let documents =
        files.filter(|name| !name.contains(".out.")).filter_map(|name| Some(name.strip_suffix(".xml")?.to_owned()));
    let mut cases: Vec<String> = documents.collect();
    cases.sort();
    cases
}

/// A recorded QEMU 7.2, on a host where KVM and bridges work.
pub fn caps() -> Capabilities {
    let mut caps: Capabilities = serde_json::from_str(&text("qemu-7.2.json")).unwrap();
    caps.kvm = Ok(());
    caps.firmware = read_all(&[&data().join("firmware")]);
    caps.bridge_helper = Some(PathBuf::from("/usr/lib/qemu/qemu-bridge-helper"));
    caps.site = site(Path::new("/var/lib/virt"));
    caps
}

/// What is on that host beside QEMU.
pub fn site(state_dir: &Path) -> Site {
    Site {
        state_dir: state_dir.to_owned(),
        swtpm: Some("/usr/bin/swtpm".into()),
        swtpm_setup: Some("/usr/bin/swtpm_setup".into()),
        virtiofsd: Some("/usr/lib/qemu/virtiofsd".into()),
        passt: Some("/usr/bin/passt".into()),
        makes_taps: true,
        vhost_net: true,
        vhost_vsock: true,
        tls_dir: "/etc/virt/tls".into(),
        certificates: certificates(),
        modules: ["block-curl", "block-rbd", "block-iscsi", "block-gluster"].map(str::to_owned).into(),
    }
}

/// All that a host can have.
pub fn certificates() -> BTreeSet<String> {
    let names = ["ca-cert", "server-cert", "server-key", "client-cert", "client-key"];
    names.map(|name| format!("{name}.pem")).into()
}

pub fn message(findings: &[Finding]) -> String {
    findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

pub fn parse(xml: &str) -> DomainDef {
    DomainDef::parse(xml).unwrap_or_else(|findings| panic!("{}\n{xml}", message(&findings)))
}

/// A case, completed, its files in `dir`.
pub fn completed(case: &str, dir: &str, caps: &Capabilities) -> DomainDef {
    let mut def = parse(&text(&format!("{case}.xml")).replace("@DIR@", dir));
    complete(&mut def, caps).unwrap_or_else(|findings| panic!("{case}: {}", message(&findings)));
    place_variables(&mut def, Path::new(dir));
    def
}

pub fn place(dir: &str) -> Place<'_> {
    Place { runtime_dir: Path::new(dir), monitor_fd: 3, now: 1_795_403_655, east_of_utc: 3600, sandbox: true }
}
