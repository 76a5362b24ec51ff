//! From what a document asks for to what is done to each disk of the machine: defaults, made-up overlays, and every
//! combination that cannot be.

use super::doc::{Capturing, DiskDoc, SnapshotDoc, asked_memory, cache_of, overlay};
use super::{check_name, unsupported};
use crate::device::Disk;
use crate::device::disk::{DiskDevice, DiskKind, SnapshotPolicy};
use crate::domain::DomainDef;
use crate::driver::snapshots::{DiskMode, DiskPart, MemoryMode};
use crate::xml::Finding;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

/// What is asked for, beside the document.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// The guest is active.
    pub active: bool,
    /// Disks alone.
    pub disk_only: bool,
    /// The memory is written while the guest runs.
    pub live: bool,
    /// Nothing is made: a record is held against its machine.
    pub restored: bool,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub struct Alignment {
    /// The memory.
    pub memory: MemoryMode,
    /// Every disk of the machine, in its order.
    pub disks: Vec<DiskPart>,
    /// Files that the caller named, rather than we.
    pub named: Vec<PathBuf>,
    /// How much of the tables of which disk's overlay may be held in memory, in bytes.
    pub caches: BTreeMap<String, u64>,
}

impl Alignment {
    /// Holds the document against the machine. `name` is the snapshot's. Errors: everything that cannot be.
    pub fn of(doc: &SnapshotDoc, name: &str, def: &DomainDef, request: Request) -> Result<Alignment, Vec<Finding>> {
        let mut log = Vec::new();
        if let Err(why) = check_name(name) {
            log.push(Finding::invalid(&doc.place_of_name(), why));
            return Err(log);
        }
        let memory = memory(doc, request, &mut log);
        let external = request.disk_only || matches!(memory, MemoryMode::External(_));
        let default = if external { Capturing::External } else { Capturing::Internal };
        let listed = listed(doc, def, &mut log);
        let (mut named, mut disks, mut caches) = (Vec::new(), Vec::new(), BTreeMap::new());
        for disk in &def.devices.disks {
            let said = listed.iter().find(|(target, _)| *target == disk.target.dev).map(|(_, said)| *said);
            let mode = mode(said, disk, default, name, &mut named, &mut log);
            if let (DiskMode::Remote { .. }, Some(said), false) = (&mode, said, request.restored) {
                let message = "overlays on servers are not made here: name a file or a block device of this host's, or copy \
                               the disk by hand (snapshot='manual')";
                log.push(Finding::unsupported(&said.at.attribute("type"), message));
            }
            if let (DiskMode::External { .. }, Some(said)) = (&mode, said) {
                caches.extend(cache_of(said, &mut log).map(|bytes| (disk.target.dev.clone(), bytes)));
            }
            disks.push(DiskPart { target: disk.target.dev.clone(), mode });
        }
        if let MemoryMode::External(file) = &memory {
            named.push(file.clone());
        }
        let alignment = Alignment { memory, disks, named, caches };
        if log.is_empty() {
            alignment.check(doc, def, request, &mut log);
        }
        if log.is_empty() { Ok(alignment) } else { Err(log) }
    }

    /// Why no hypervisor can do it as the machine is now, if so.
    pub fn not_in_this_state(&self, request: Request) -> Option<&'static str> {
        if request.live && !(request.active && matches!(self.memory, MemoryMode::External(_))) {
            return Some("'live' is for the memory of a running guest that is written to a file");
        }
        let without = self.memory == MemoryMode::No && request.active && !request.disk_only;
        without.then_some("the disks of a running guest are captured without its memory only with the option disk-only")
    }

    /// What does not go together.
    fn check(&self, doc: &SnapshotDoc, def: &DomainDef, request: Request, log: &mut Vec<Finding>) {
        let mut refuse = |path: &str, message: String| log.push(unsupported(path, message));
        let is_external = |disk: &&DiskPart| disk.mode.is_external();
        let is_internal = |disk: &&DiskPart| disk.mode == DiskMode::Internal;
        let external = self.disks.iter().find(is_external);
        let internal = self.disks.iter().find(is_internal);
        if let (Some(one), Some(other)) = (external, internal) {
            let text = "are internal and external: choose one for the whole snapshot";
            refuse("/disks", format!("the disks '{}' and '{}' {text}", other.target, one.target));
        }
        match (&self.memory, external, internal) {
            (MemoryMode::Internal, Some(disk), _) => {
                let text = "is external, and so the memory cannot be internal: name a file for it, or use disk-only";
                refuse("/memory", format!("disk '{}' {text}", disk.target));
            }
            (MemoryMode::External(_), _, Some(disk)) => {
                let text = "is internal, and so the memory cannot go to a file of its own";
                refuse("/memory", format!("disk '{}' {text}", disk.target));
            }
            (MemoryMode::Internal, None, None) => {
                refuse("/disks", "there is no disk that can hold the memory; name a file for it".to_owned());
            }
            _ => {}
        }
        if request.disk_only && request.active && internal.is_some() {
            refuse("/disks", "disks of a running guest cannot be captured inside their images without its memory; leave out disk-only, or make them external".to_owned());
        }
        let manual = self.disks.iter().any(|disk| disk.mode == DiskMode::Manual);
        if self.memory == MemoryMode::No && external.is_none() && internal.is_none() && !manual {
            refuse("/disks", "nothing is selected: neither memory nor a disk".to_owned());
        } else if request.disk_only && external.is_none() && internal.is_none() {
            refuse(
                "/disks",
                "disk-only needs at least one external disk: what is copied by hand alone needs no snapshot".to_owned(),
            );
        }
        if internal.is_some() || self.memory == MemoryMode::Internal {
            self.check_internal(def, log);
        }
        self.check_overlays(doc, log);
    }

    /// All writable disks hold it, or none: else they would be of different times afterwards.
    fn check_internal(&self, def: &DomainDef, log: &mut Vec<Finding>) {
        for (part, disk) in self.disks.iter().zip(&def.devices.disks).filter(|(_, disk)| is_writable(disk)) {
            let (target, format) = (&part.target, disk.meant_format());
            let why = match part.mode {
                DiskMode::Internal if disk.kind() == DiskKind::Network => {
                    format!("disk '{target}' is on a server and cannot hold an internal snapshot; use disk-only")
                }
                DiskMode::Internal if format == "qcow2" => continue,
                DiskMode::Internal => {
                    format!("disk '{target}' ({format}) cannot hold an internal snapshot; use disk-only")
                }
                DiskMode::No if disk.snapshot == Some(SnapshotPolicy::No) => continue,
                DiskMode::No => format!(
                    "disk '{target}' is left out of an internal snapshot, and would be of another time after a revert; \
                     say snapshot='no' in the domain's disk if that is meant"
                ),
                _ => format!("disk '{target}' cannot be captured by hand in an internal snapshot"),
            };
            log.push(unsupported("/disks/disk", why));
        }
    }

    fn check_overlays(&self, doc: &SnapshotDoc, log: &mut Vec<Finding>) {
        let mut seen: HashSet<&Path> = HashSet::new();
        if let MemoryMode::External(file) = &self.memory {
            seen.insert(file);
        }
        for disk in &self.disks {
            let DiskMode::External { path, .. } = &disk.mode else { continue };
            if !seen.insert(path) {
                let text = format!("two parts of the snapshot would be written to {}", path.display());
                log.push(unsupported(&doc.at.child("disks").path.to_string(), text));
            }
        }
    }
}

fn memory(doc: &SnapshotDoc, request: Request, log: &mut Vec<Finding>) -> MemoryMode {
    let usual = if request.active && !request.disk_only { MemoryMode::Internal } else { MemoryMode::No };
    let Some(said) = &doc.memory else { return usual };
    let memory = asked_memory(said, log).unwrap_or(MemoryMode::No);
    if memory != MemoryMode::No && (!request.active || request.disk_only) {
        let why = if request.active { "with disk-only" } else { "of a domain that is shut off" };
        log.push(Finding::invalid(&said.at, format!("there is no memory to capture {why}")));
    }
    memory
}

/// The disks that the document names, by target.
fn listed<'a>(doc: &'a SnapshotDoc, def: &DomainDef, log: &mut Vec<Finding>) -> Vec<(String, &'a DiskDoc)> {
    let mut listed: Vec<(String, &DiskDoc)> = Vec::new();
    for said in doc.disks() {
        let named = |disk: &&Disk| disk.target.dev == said.name || disk.path() == Some(&said.name);
        let Some(disk) = def.devices.disks.iter().find(named) else {
            let message = format!("the domain has no disk '{}': give a target or the path of a source", said.name);
            log.push(Finding::invalid(&said.at.attribute("name"), message));
            continue;
        };
        if listed.iter().any(|(target, _)| *target == disk.target.dev) {
            let message = format!("the disk '{}' is named twice", disk.target.dev);
            log.push(Finding::invalid(&said.at.attribute("name"), message));
            continue;
        }
        listed.push((disk.target.dev.clone(), said));
    }
    listed
}

/// How a disk takes part.
fn mode(
    said: Option<&DiskDoc>,
    disk: &Disk,
    default: Capturing,
    name: &str,
    named: &mut Vec<PathBuf>,
    log: &mut Vec<Finding>,
) -> DiskMode {
    let own = disk.snapshot.map(|policy| match policy {
        SnapshotPolicy::No => Capturing::No,
        SnapshotPolicy::Internal => Capturing::Internal,
        SnapshotPolicy::External => Capturing::External,
        SnapshotPolicy::Manual => Capturing::Manual,
    });
    let Some(said) = said else {
        if disk.is_empty() || !is_writable(disk) {
            return DiskMode::No;
        }
        return match own.unwrap_or(default) {
            Capturing::External => made_up(disk, name, None, log),
            other => simple(other),
        };
    };
    let given = said.source.is_some() || said.driver.is_some();
    let mode = said.mode.or(given.then_some(Capturing::External)).or(own).unwrap_or(default);
    let place = &said.at;
    if mode != Capturing::External {
        if given {
            log.push(Finding::invalid(place, format!("snapshot='{mode}' has no overlay: leave out source and driver")));
        }
        if mode == Capturing::Internal && (disk.is_empty() || !is_writable(disk)) {
            let message = format!("disk '{}' is empty or read-only, and cannot be captured", disk.target.dev);
            log.push(Finding::unsupported(place, message));
        }
        return simple(mode);
    }
    if disk.is_empty() || !is_writable(disk) {
        let message = format!("disk '{}' is empty or read-only: an overlay of it has no use", disk.target.dev);
        log.push(Finding::unsupported(place, message));
    }
    let known = log.len();
    match overlay(said, log) {
        Some(overlay) => {
            if let DiskMode::External { path, .. } = &overlay {
                named.push(path.clone());
            }
            overlay
        }
        None if log.len() > known => DiskMode::No,
        None => made_up(disk, name, Some(said), log),
    }
}

fn simple(mode: Capturing) -> DiskMode {
    match mode {
        Capturing::Internal => DiskMode::Internal,
        Capturing::Manual => DiskMode::Manual,
        Capturing::No | Capturing::External => DiskMode::No,
    }
}

/// An overlay beside the image, named after it and the snapshot.
fn made_up(disk: &Disk, name: &str, said: Option<&DiskDoc>, log: &mut Vec<Finding>) -> DiskMode {
    let target = &disk.target.dev;
    let source = disk.path().filter(|_| disk.kind() == DiskKind::File);
    let Some(source) = source else {
        let message = format!("disk '{target}' is no file, so its overlay must be named: give a <source>");
        match said {
            Some(said) => log.push(Finding::unsupported(&said.at, message)),
            None => log.push(unsupported("/disks", message)),
        }
        return DiskMode::No;
    };
    let format = said.and_then(|said| said.driver.as_ref()?.format.clone()).unwrap_or_else(|| "qcow2".to_owned());
    let source = Path::new(source);
    let stem = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    DiskMode::External { path: source.with_file_name(format!("{stem}.{name}")), block: false, format }
}

/// Whether the guest can change it.
fn is_writable(disk: &Disk) -> bool {
    !disk.readonly && !disk.is_empty() && !matches!(disk.device(), DiskDevice::Cdrom)
}
