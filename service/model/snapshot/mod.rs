//! What a snapshot is: its document, and what it means for the disks of a machine.
//!
//! ```text
//!  XML ─read─▶ SnapshotDoc ─align with the machine─▶ SnapshotDef ─write─▶ XML
//!                (what a caller asks for)              (what there is)
//! ```

mod align;
mod doc;
mod tree;

pub use align::{Alignment, Request};
pub(crate) use doc::unknown;
pub use doc::{Capturing, DiskDoc, MemoryDoc, ParentDoc, SnapshotDoc};
pub use tree::{Node, SnapshotTree};

use crate::domain::cpu::Cpu;
use crate::domain::part::Part as _;
use crate::domain::{DomainDef, Form};
use crate::driver::snapshots::{Capture, DiskPart, MemoryMode};
use crate::state::DomainState;
use crate::xml::{self, Element, Finding, FindingKind, Limits};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use uuid::Uuid;

/// The longest name, in bytes: it is also a file's.
pub const MAX_NAME: usize = 200;

/// What the guest did when the snapshot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotState {
    /// As a domain's state.
    Domain(DomainState),
    /// It was active, and its disks alone were taken.
    DiskSnapshot,
}

impl SnapshotState {
    /// The word on the bus and in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            SnapshotState::Domain(state) => state.as_str(),
            SnapshotState::DiskSnapshot => "disk-snapshot",
        }
    }

    /// Whether memory goes with it.
    pub fn is_online(self) -> bool {
        matches!(self, SnapshotState::Domain(DomainState::Running | DomainState::Paused))
    }
}

impl fmt::Display for SnapshotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for SnapshotState {
    type Err = String;

    fn from_str(word: &str) -> Result<SnapshotState, String> {
        match word {
            "disk-snapshot" => Ok(SnapshotState::DiskSnapshot),
            "running" | "paused" | "shutdown" | "shutoff" | "crashed" => {
                word.parse().map(SnapshotState::Domain).map_err(|_| String::new())
            }
            _ => Err("one of running, paused, shutdown, shutoff, crashed and disk-snapshot".to_owned()),
        }
    }
}

/// What a record says of an overlay beside where it is: as it is shown again.
#[derive(Clone, Debug, PartialEq)]
pub struct Beside {
    /// The disk, as the document names it.
    pub disk: String,
    /// Elements of `<driver>`.
    pub driver: Vec<Element>,
    /// Elements of `<source>`.
    pub source: Vec<Element>,
    /// All of an overlay that is on a server.
    pub remote: Vec<Element>,
}

/// A snapshot, complete.
#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotDef {
    /// Unique among the domain's.
    pub name: String,
    /// For people.
    pub description: Option<String>,
    /// What the guest did.
    pub state: SnapshotState,
    /// The snapshot before it; `None` for a root.
    pub parent: Option<String>,
    /// Seconds since the epoch.
    pub created: u64,
    /// Where the memory is.
    pub memory: MemoryMode,
    /// Every disk of the machine, in its order.
    pub disks: Vec<DiskPart>,
    /// Targets of disks whose frozen files a deletion has begun to write: it can only be deleted from then on.
    pub merging: BTreeSet<String>,
    /// What is said of overlays beside where they are, kept as it is said.
    pub kept: Vec<Beside>,
    /// Whose it is, where no machine is kept that says so: records of old are like this.
    pub of: Option<Uuid>,
    /// The machine at that time; `None` for one that was restored from a document without it.
    pub domain: Option<Arc<DomainDef>>,
    /// What the next cold start would have used, where the guest was active and that differed or could have.
    pub inactive: Option<Arc<DomainDef>>,
    /// Where the firmware's variables and the TPM's state are: `nvram` or `tpm`, and how.
    pub captured: Vec<(String, Capture)>,
    /// The CPU as the hypervisor made it of the definition's, which may stand for another at each start: it is part of the
    /// cookie, and what the memory is started with again. `None` where the definition says it all, or it is not known.
    pub cpu: Option<Cpu>,
    /// What else the driver must know of it; opaque to clients.
    pub cookie: Option<Element>,
}

impl SnapshotDef {
    /// Writes it; passwords only if `secure`, what is the driver's own only if `cookie`.
    pub fn write(&self, secure: bool, cookie: bool) -> String {
        let mut root = Element::new("domainsnapshot");
        let leaf = |name: &str, text: &str| Element::new(name).with_text(text);
        root.push(leaf("name", &self.name));
        self.description.iter().for_each(|text| root.push(leaf("description", text)));
        root.push(leaf("state", self.state.as_str()));
        if let Some(parent) = &self.parent {
            let mut element = Element::new("parent");
            element.push(leaf("name", parent));
            root.push(element);
        }
        root.push(leaf("creationTime", &self.created.to_string()));
        root.push(doc::write_memory(&self.memory));
        if !self.disks.is_empty() {
            let mut disks = Element::new("disks");
            for disk in &self.disks {
                let beside = self.kept.iter().find(|beside| beside.disk == disk.target);
                disks.push(doc::write_disk(disk, self.merging.contains(&disk.target), beside));
            }
            root.push(disks);
        }
        let form = Form { secure, ..Form::STORED };
        for (name, def) in [("domain", &self.domain), ("inactiveDomain", &self.inactive)] {
            if let Some(def) = def {
                let mut tree = def.tree_in(form);
                name.clone_into(&mut tree.name);
                root.push(tree);
            }
        }
        if let (None, Some(uuid)) = (&self.domain, self.of) {
            let mut domain = Element::new("domain");
            domain.push(leaf("uuid", &uuid.to_string()));
            root.push(domain);
        }
        if !self.captured.is_empty() {
            let mut firmware = Element::new("firmwareState");
            self.captured.iter().for_each(|(part, how)| firmware.push(doc::write_capture(part, how)));
            root.push(firmware);
        }
        if cookie && (self.cpu.is_some() || self.cookie.is_some()) {
            let mut cookie = self.cookie.clone().unwrap_or_else(|| Element::new("cookie"));
            self.cpu.iter().for_each(|cpu| cookie.push(cpu.write("cpu")));
            root.push(cookie);
        }
        root.write()
    }

    /// The record of it as it is kept, which is known to be read again. Error: what stands in the way of that, and what to
    /// do about it.
    pub fn write_readable(&self, limits: Limits) -> Result<String, String> {
        let text = self.write(true, true);
        match SnapshotDoc::parse_within(&text, limits).and_then(SnapshotDoc::record) {
            Ok(_) => Ok(text),
            Err(findings) => Err(xml::unreadable(&findings)),
        }
    }

    /// Whether a running machine is to be loaded. What is kept of one that had come to its end is not.
    pub fn has_memory(&self) -> bool {
        self.memory != MemoryMode::No && self.state.is_online()
    }

    /// Whether overlays are part of it.
    pub fn is_external(&self) -> bool {
        self.disks.iter().any(|disk: &DiskPart| disk.mode.is_external())
            || matches!(self.memory, MemoryMode::External(_))
    }
}

/// Refuses what cannot be a snapshot's name, before anything is done. The error is a sentence.
pub fn check_name(name: &str) -> Result<(), String> {
    check_name_of("snapshot", name)
}

/// The same for what is kept as snapshots are, and called `what`.
pub fn check_name_of(what: &str, name: &str) -> Result<(), String> {
    let shown = crate::xml::shorten(name);
    if name.is_empty() {
        return Err(format!("a {what}'s name may not be empty"));
    }
    if name.contains('/') {
        return Err(format!("{what} name '{shown}' may not contain '/'"));
    }
    if name.starts_with('.') {
        return Err(format!("{what} name '{shown}' may not begin with '.'"));
    }
    if name.chars().any(char::is_control) {
        return Err(format!("{what} name '{shown}' may not contain control characters"));
    }
    if name.len() > MAX_NAME {
        return Err(format!("{what} name '{shown}' may not be longer than {MAX_NAME} bytes, and has {}", name.len()));
    }
    Ok(())
}

/// A finding where the document has no place for it.
pub(crate) fn invalid(path: &str, message: impl Into<String>) -> Finding {
    Finding::anywhere(FindingKind::Invalid, path, message)
}

/// The same for what cannot be had.
pub(crate) fn unsupported(path: &str, message: impl Into<String>) -> Finding {
    Finding { kind: FindingKind::Unsupported, ..invalid(path, message) }
}
