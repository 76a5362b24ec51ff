//! The snapshot document: `<domainsnapshot>` as it is read, and how its parts are written.

use super::{Beside, SnapshotDef, SnapshotState, check_name};
use crate::device::disk::{CacheSize, MetadataCache};
use crate::device::source::SourceHost;
use crate::domain::DomainDef;
use crate::domain::cpu::Cpu;
use crate::domain::part::{Part, Rest, element};
use crate::domain::value::choices;
use crate::driver::snapshots::{Capture, DiskMode, DiskPart, MemoryMode};
use crate::state::DomainState;
use crate::xml::{self, Attribute, Element, Finding, Limits, Place};
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;

element! {
    /// `<domainsnapshot>`
    pub struct SnapshotDoc {
        /// `<name>`
        child "name" => named: Option<Words>,
        /// `<description>`
        leaf "description" => description: Option<String>,
        /// `<state>`, read when a record is restored.
        child "state" => state: Option<Words>,
        /// `<parent>`, likewise.
        child "parent" => parent: Option<ParentDoc>,
        /// `<creationTime>`, likewise.
        child "creationTime" => created: Option<Words>,
        /// `<memory>`
        child "memory" => memory: Option<MemoryDoc>,
        /// `<disks>`
        child "disks" => disks: Option<DisksDoc>,
        /// `<domain>`, read when a record is restored.
        child "domain" => domain: Option<Element>,
        /// `<inactiveDomain>`, likewise.
        child "inactiveDomain" => inactive: Option<Element>,
        /// `<firmwareState>`, likewise.
        child "firmwareState" => firmware: Option<FirmwareDoc>,
        /// `<cookie>`, likewise.
        child "cookie" => cookie: Option<CookieDoc>,
        /// `<active>`: in libvirt's own files.
        leaf "active" => active: Option<String>,
    }
}

element! {
    /// `<cookie>`: what the hypervisor must be told when it starts from the snapshot. What is in it beside the CPU is kept as
    /// it is, whoever wrote it.
    pub struct CookieDoc {
        /// `<cpu>`: what the hypervisor made of the definition's.
        child "cpu" => cpu: Option<Cpu>,
    }
}

element! {
    /// A text that has a place of its own.
    pub struct Words {
        /// The text.
        text => text: Option<String>,
    }
}

element! {
    /// `<parent>`
    pub struct ParentDoc {
        /// `<name>`
        leaf "name" => name: Option<String>,
    }
}

element! {
    /// `<memory>`
    pub struct MemoryDoc {
        /// Where it goes.
        attr "snapshot" => mode: Option<Capturing>,
        /// The file.
        attr "file" => file: Option<String>,
    }
}

choices! {
    /// How a part is captured.
    pub enum Capturing { No = "no", Internal = "internal", External = "external", Manual = "manual", }
}

element! {
    /// `<disks>`
    pub struct DisksDoc {
        /// `<disk>`
        children "disk" => disks: Vec<DiskDoc>,
    }
}

choices! {
    /// What an overlay is.
    pub enum OverlayKind { File = "file", Block = "block", Network = "network", Dir = "dir", Volume = "volume", }
}

element! {
    /// `<disk>`
    pub struct DiskDoc {
        /// Target, or source path, of a disk of the domain.
        need "name" => name: String,
        /// How it takes part.
        attr "snapshot" => mode: Option<Capturing>,
        /// What the overlay is; a file if absent.
        attr "type" => kind: Option<OverlayKind>,
        /// `<driver>`
        child "driver" => driver: Option<OverlayDriver>,
        /// `<source>`
        child "source" => source: Option<OverlaySource>,
        /// `<snapshotDeleteInProgress>`, read when a record is restored.
        flag "snapshotDeleteInProgress" => merging: bool,
    }
}

element! {
    /// `<disk><driver>`
    pub struct OverlayDriver {
        /// The overlay's format; `qcow2` if absent.
        attr "type" => format: Option<String>,
        /// `<metadata_cache>`: how much of its tables is held in memory.
        child "metadata_cache" => cache: Option<MetadataCache>,
    }
}

element! {
    /// `<disk><source>`
    pub struct OverlaySource {
        /// A file.
        attr "file" => file: Option<String>,
        /// A block device.
        attr "dev" => dev: Option<String>,
        /// An image on a server: what is spoken with it.
        attr "protocol" => protocol: Option<String>,
        /// An image on a server: its name there.
        attr "name" => name: Option<String>,
        /// `<host>`: the servers.
        children "host" => hosts: Vec<SourceHost>,
        /// `<seclabel>`: how another host's security driver labels it.
        children "seclabel" => labels: Vec<LabelDoc>,
    }
}

element! {
    /// `<source><seclabel>`
    pub struct LabelDoc {
        /// The driver.
        attr "model" => model: Option<String>,
        /// Whether it is labelled.
        yes_no "relabel" => relabel: Option<bool>,
        /// Whether it could not be.
        yes_no "labelskip" => skipped: Option<bool>,
        /// `<label>`
        leaf "label" => label: Option<String>,
    }
}

element! {
    /// `<firmwareState>`: where the parts beside disks and memory are.
    pub struct FirmwareDoc {
        /// `<nvram>`: the firmware's variables.
        child "nvram" => nvram: Option<CaptureDoc>,
        /// `<tpm>`: the TPM's state.
        child "tpm" => tpm: Option<CaptureDoc>,
    }
}

element! {
    /// One part.
    pub struct CaptureDoc {
        /// How it was captured.
        need "snapshot" => how: CaptureWord,
        /// The file.
        attr "file" => file: Option<String>,
    }
}

choices! {
    /// How a part beside disks and memory was captured.
    pub enum CaptureWord { Internal = "internal", Memory = "memory", File = "file", }
}

/// Where `<metadata>` is kept as written.
const VERBATIM: &[(&str, &str)] = &[("domain", "metadata"), ("inactiveDomain", "metadata")];

impl SnapshotDoc {
    /// Reads a document; everything wrong is reported at once. Elements and attributes that are not known are refused. An
    /// empty text is a document that leaves out everything.
    pub fn parse(text: &str) -> Result<SnapshotDoc, Vec<Finding>> {
        let text = if text.is_empty() { "<domainsnapshot/>" } else { text };
        SnapshotDoc::parse_within(text, Limits::ACCEPTED)
    }

    /// The same with other limits: [`Limits::STORED`] for one of our own files.
    pub fn parse_within(text: &str, limits: Limits) -> Result<SnapshotDoc, Vec<Finding>> {
        let root = xml::read_within(text, VERBATIM, limits).map_err(|finding| vec![finding])?;
        if root.name != "domainsnapshot" {
            let message = format!("the root is <{}>, and a snapshot's is <domainsnapshot>", root.name);
            return Err(vec![Finding::invalid(&root.at, message)]);
        }
        let mut log = Vec::new();
        let doc = SnapshotDoc::read(root, &mut log);
        doc.refuse_unknown(&mut log);
        log.sort_by_key(|finding| (finding.line, finding.column));
        if log.is_empty() { Ok(doc) } else { Err(log) }
    }

    /// What it is to be called, if it says so.
    pub fn name(&self) -> Option<&str> {
        self.named.as_ref().map(|words| words.text.as_deref().unwrap_or_default())
    }

    /// Names it, as if the document did.
    pub fn set_name(&mut self, name: &str) {
        self.named = Some(Words { text: Some(name.to_owned()), ..Words::default() });
    }

    /// Where it says that.
    pub(super) fn place_of_name(&self) -> Place {
        self.named.as_ref().map_or_else(|| self.at.child("name"), |words| words.at.clone())
    }

    /// What it says of overlays beside where they are.
    pub fn kept(&self) -> Vec<Beside> {
        self.disks().iter().filter_map(said_beside).collect()
    }

    /// The disks that it names.
    pub fn disks(&self) -> &[DiskDoc] {
        self.disks.as_ref().map_or(&[], |disks| &disks.disks)
    }

    fn refuse_unknown(&self, log: &mut Vec<Finding>) {
        [&self.named, &self.state, &self.created].into_iter().flatten().for_each(|part| unknown_here(&part.rest, log));
        let attributes = self.rest.attributes.iter().filter(|attribute| !is_declaration(attribute)).cloned().collect();
        unknown_here(&Rest { attributes, elements: self.rest.elements.clone() }, log);
        self.parent.iter().for_each(|part| unknown_here(&part.rest, log));
        self.memory.iter().for_each(|part| unknown_here(&part.rest, log));
        self.disks.iter().for_each(|part| unknown_here(&part.rest, log));
        for disk in self.disks() {
            unknown_here(&disk.rest, log);
            disk.driver.iter().for_each(|part| unknown_here(&part.rest, log));
            disk.driver.iter().filter_map(|part| part.cache.as_ref()).for_each(|part| unknown_here(&part.rest, log));
            disk.source.iter().for_each(|part| unknown_here(&part.rest, log));
            disk.source.iter().flat_map(|part| &part.labels).for_each(|part| unknown_here(&part.rest, log));
            disk.source.iter().flat_map(|part| &part.hosts).for_each(|part| unknown_here(&part.rest, log));
        }
        if let Some(firmware) = &self.firmware {
            unknown_here(&firmware.rest, log);
            [&firmware.nvram, &firmware.tpm].into_iter().flatten().for_each(|part| unknown_here(&part.rest, log));
        }
    }

    /// The record that it is: every disk as it is said. Errors are the document's; whether it fits the domain is not looked
    /// at.
    pub fn record(self) -> Result<(SnapshotDef, Option<Uuid>), Vec<Finding>> {
        let mut log = Vec::new();
        let disks = self.disks().iter().map(|disk| part(disk, &mut log)).collect();
        let read = self.without_disks();
        match read {
            Ok((def, uuid)) if log.is_empty() => Ok((SnapshotDef { disks, ..def }, uuid)),
            Ok(_) => Err(log),
            Err(mut findings) => {
                findings.append(&mut log);
                Err(findings)
            }
        }
    }

    /// The same for a document of which the disks are still to be held against the machine ([`super::Alignment`]).
    pub fn without_disks(self) -> Result<(SnapshotDef, Option<Uuid>), Vec<Finding>> {
        let mut log = Vec::new();
        let name = self.name().unwrap_or_default().to_owned();
        if let Err(why) = check_name(&name) {
            log.push(Finding::invalid(&self.place_of_name(), why));
        }
        let kept = self.kept();
        let state = state(self.state.as_ref(), &self.at, &mut log);
        let created = self.created.as_ref().and_then(|words| words.text.as_deref()?.trim().parse().ok());
        if created.is_none() {
            let message = "a snapshot that is restored needs its <creationTime>, in seconds since the epoch";
            let place = self.created.as_ref().map_or(&self.at, |words| &words.at);
            log.push(Finding::invalid(place, message));
        }
        let uuid = self.domain.as_ref().and_then(|domain| domain.child("uuid")).map(|uuid| uuid.text());
        let full = self.domain.filter(|domain| domain.child("memory").is_some() || domain.attr("type").is_some());
        let declared: Vec<Attribute> = self.rest.attributes.iter().filter(|a| is_declaration(a)).cloned().collect();
        let mut machine = |element: Option<Element>| -> Option<Arc<DomainDef>> {
            let mut element = element?;
            "domain".clone_into(&mut element.name);
            // What is declared around it holds in it, and is to hold when it stands alone.
            let inherited = declared.iter().filter(|outer| element.attr(&outer.name).is_none()).cloned();
            element.attributes.extend(inherited.collect::<Vec<_>>());
            DomainDef::from_kept_tree(element).map_err(|mut findings| log.append(&mut findings)).ok().map(Arc::new)
        };
        let (domain, inactive) = (machine(full), machine(self.inactive));
        let state = state.unwrap_or(SnapshotState::DiskSnapshot);
        let memory = memory(self.memory.as_ref(), state, &mut log);
        let marked = self.disks.iter().flat_map(|disks| &disks.disks).filter(|disk| disk.merging);
        let merging = marked.map(|disk| disk.name.clone()).collect();
        let captured = self.firmware.iter().flat_map(captured).collect();
        let uuid = uuid.and_then(|text| Uuid::try_parse(text.trim()).ok());
        let (cpu, cookie) = self.cookie.map_or((None, None), CookieDoc::parted);
        let def = SnapshotDef {
            name,
            of: uuid.filter(|_| domain.is_none()),
            kept,
            description: self.description,
            state,
            parent: self.parent.and_then(|parent| parent.name),
            created: created.unwrap_or_default(),
            memory,
            disks: Vec::new(),
            merging,
            domain,
            inactive,
            captured,
            cpu,
            cookie,
        };
        if log.is_empty() { Ok((def, uuid)) } else { Err(log) }
    }
}

impl CookieDoc {
    /// The CPU, and the rest of it as it stands there.
    fn parted(mut self) -> (Option<Cpu>, Option<Element>) {
        let cpu = self.cpu.take();
        let rest = Some(self).filter(|rest| !rest.rest.is_empty()).map(|rest| rest.write("cookie"));
        (cpu, rest)
    }
}

/// What the guest did; a record says it.
fn state(said: Option<&Words>, whole: &Place, log: &mut Vec<Finding>) -> Option<SnapshotState> {
    let Some(words) = said else {
        log.push(Finding::invalid(whole, "a snapshot that is restored needs its <state>"));
        return None;
    };
    let known = |known| Finding::invalid(&words.at, format!("the state of a snapshot is {known}"));
    words.text.as_deref().unwrap_or_default().parse().map_err(|why: String| log.push(known(why))).ok()
}

/// What a record says of an overlay beside where it is, as elements of `<driver>` and of `<source>`.
fn said_beside(disk: &DiskDoc) -> Option<Beside> {
    if disk.kind == Some(OverlayKind::Network) {
        let driver = disk.driver.iter().map(|driver| driver.write("driver"));
        let remote: Vec<Element> = driver.chain(disk.source.iter().map(|source| source.write("source"))).collect();
        return Some(Beside { disk: disk.name.clone(), driver: Vec::new(), source: Vec::new(), remote });
    }
    let driver = disk.driver.iter().filter_map(|driver| Some(driver.cache.as_ref()?.write("metadata_cache")));
    let source = disk.source.iter().flat_map(|source| &source.labels).map(|label| label.write("seclabel"));
    let (driver, source): (Vec<_>, Vec<_>) = (driver.collect(), source.collect());
    let said = !driver.is_empty() || !source.is_empty();
    said.then(|| Beside { disk: disk.name.clone(), driver, source, remote: Vec::new() })
}

/// Whether it declares a prefix, as it may at the root.
fn is_declaration(attribute: &Attribute) -> bool {
    attribute.name.starts_with("xmlns:")
}

fn unknown_here(rest: &Rest, log: &mut Vec<Finding>) {
    unknown("snapshot", rest, log);
}

/// Refuses what no document of a `what` has.
pub(crate) fn unknown(what: &str, rest: &Rest, log: &mut Vec<Finding>) {
    for element in &rest.elements {
        log.push(Finding::invalid(&element.at, format!("<{}> is no element of a {what} document here", element.name)));
    }
    for attribute in &rest.attributes {
        let message = format!("'{}' is no attribute of a {what} document here", attribute.name);
        log.push(Finding::invalid(&attribute.place(), message));
    }
}

/// Where the memory of a restored snapshot is.
fn memory(doc: Option<&MemoryDoc>, state: SnapshotState, log: &mut Vec<Finding>) -> MemoryMode {
    let Some(doc) = doc else {
        return if state.is_online() { MemoryMode::Internal } else { MemoryMode::No };
    };
    let mode = asked_memory(doc, log).unwrap_or(MemoryMode::No);
    // Of one that had come to its end, libvirt writes that its memory is in the images, and never loads it.
    let ended = matches!(state, SnapshotState::Domain(DomainState::Crashed | DomainState::Shutdown));
    let kept = ended && mode == MemoryMode::Internal;
    if mode != MemoryMode::No && !state.is_online() && !kept {
        log.push(Finding::invalid(&doc.at, format!("a snapshot whose state is {state} has no memory")));
    }
    mode
}

/// What a document says about memory; `None` if that cannot be.
pub(super) fn asked_memory(doc: &MemoryDoc, log: &mut Vec<Finding>) -> Option<MemoryMode> {
    let file = doc.file.as_deref();
    let mode = doc.mode.unwrap_or(if file.is_some() { Capturing::External } else { Capturing::Internal });
    match (mode, file) {
        (Capturing::No, None) => return Some(MemoryMode::No),
        (Capturing::Internal, None) => return Some(MemoryMode::Internal),
        (Capturing::External, Some(file)) if file.starts_with('/') => {
            return Some(MemoryMode::External(PathBuf::from(file)));
        }
        (Capturing::External, Some(_)) => {
            log.push(Finding::invalid(&doc.at.attribute("file"), "the memory's file is given by its absolute path"));
        }
        (Capturing::External, None) => {
            log.push(Finding::invalid(&doc.at, "snapshot='external' needs the attribute 'file'"));
        }
        (Capturing::Manual, _) => {
            log.push(Finding::invalid(&doc.at.attribute("snapshot"), "memory cannot be captured by hand"));
        }
        (mode, Some(_)) => {
            log.push(Finding::invalid(&doc.at.attribute("file"), format!("snapshot='{mode}' has no file")));
        }
    }
    None
}

/// A disk of a restored snapshot.
fn part(doc: &DiskDoc, log: &mut Vec<Finding>) -> DiskPart {
    let mode = match doc.mode.unwrap_or(if doc.source.is_some() { Capturing::External } else { Capturing::No }) {
        Capturing::No => DiskMode::No,
        Capturing::Internal => DiskMode::Internal,
        Capturing::Manual => DiskMode::Manual,
        Capturing::External => overlay(doc, log).unwrap_or_else(|| {
            log.push(Finding::invalid(&doc.at, format!("disk '{}' needs the <source> of its overlay", doc.name)));
            DiskMode::No
        }),
    };
    DiskPart { target: doc.name.clone(), mode }
}

/// The overlay that a disk's element names, if it names one.
pub(super) fn overlay(doc: &DiskDoc, log: &mut Vec<Finding>) -> Option<DiskMode> {
    let format = doc.driver.as_ref().and_then(|driver| driver.format.as_deref()).unwrap_or("qcow2");
    if !matches!(format, "qcow2" | "qed") {
        let message = format!("an overlay is in qcow2 or qed, not '{format}'");
        log.push(Finding::unsupported(&doc.at.child("driver").attribute("type"), message));
    }
    let block = match doc.kind {
        None | Some(OverlayKind::File) => false,
        Some(OverlayKind::Block) => true,
        Some(OverlayKind::Network) => return remote(doc, log),
        Some(kind) => {
            let message = format!("an overlay is a file or a block device, not '{kind}'");
            log.push(Finding::unsupported(&doc.at.attribute("type"), message));
            return None;
        }
    };
    if block && doc.source.as_ref().is_none_or(|source| source.dev.is_none() && source.file.is_none()) {
        let message = "a block device is not made up: name one that is there, with <source dev='…'/>";
        log.push(Finding::invalid(&doc.at.attribute("type"), message));
        return None;
    }
    let source = doc.source.as_ref()?;
    for (name, said) in [("protocol", &source.protocol), ("name", &source.name)] {
        if said.is_some() {
            log.push(Finding::invalid(&source.at.attribute(name), format!("'{name}' is for type='network'")));
        }
    }
    let (path, other) = if block { (&source.dev, &source.file) } else { (&source.file, &source.dev) };
    if other.is_some() {
        let (needs, has) = if block { ("dev", "file") } else { ("file", "dev") };
        log.push(Finding::invalid(&source.at.attribute(has), format!("the <source> here has '{needs}'")));
    }
    let path = path.as_ref()?;
    if !path.starts_with('/') {
        log.push(Finding::invalid(&source.at, format!("the overlay '{path}' is given by its absolute path")));
    }
    Some(DiskMode::External { path: PathBuf::from(path), block, format: format.to_owned() })
}

/// An overlay on a server.
fn remote(doc: &DiskDoc, log: &mut Vec<Finding>) -> Option<DiskMode> {
    let source = doc.source.as_ref()?;
    let Some(protocol) = &source.protocol else {
        log.push(Finding::invalid(&source.at, "an overlay on a server needs a protocol, and its name there"));
        return None;
    };
    for (name, said) in [("file", &source.file), ("dev", &source.dev)] {
        if said.is_some() {
            log.push(Finding::invalid(
                &source.at.attribute(name),
                format!("'{name}' is for an overlay of this host's"),
            ));
        }
    }
    Some(DiskMode::Remote { shown: format!("{protocol}:{}", source.name.as_deref().unwrap_or_default()) })
}

/// How much of the tables of an overlay may be held in memory, in bytes, if that is said.
pub(super) fn cache_of(doc: &DiskDoc, log: &mut Vec<Finding>) -> Option<u64> {
    let driver = doc.driver.as_ref()?;
    let cache = driver.cache.as_ref()?;
    if driver.format.as_deref().is_some_and(|format| format != "qcow2") {
        log.push(Finding::unsupported(&cache.at, "only qcow2 images have this: leave it out"));
    }
    match cache.max_size.as_ref().map(CacheSize::bytes) {
        Some(Ok(bytes)) => return Some(bytes),
        Some(Err(why)) => log.push(Finding::invalid(&cache.at, why)),
        None => log.push(Finding::invalid(&cache.at, "a <max_size> is needed")),
    }
    None
}

fn captured(doc: &FirmwareDoc) -> Vec<(String, Capture)> {
    let one = |name: &str, doc: &Option<CaptureDoc>| {
        let doc = doc.as_ref()?;
        let how = match (doc.how, &doc.file) {
            (CaptureWord::File, Some(file)) => Capture::File(PathBuf::from(file)),
            (CaptureWord::Memory, _) => Capture::Memory,
            _ => Capture::Internal,
        };
        Some((name.to_owned(), how))
    };
    [one("nvram", &doc.nvram), one("tpm", &doc.tpm)].into_iter().flatten().collect()
}

pub(super) fn write_memory(memory: &MemoryMode) -> Element {
    let element = Element::new("memory");
    match memory {
        MemoryMode::No => element.with_attr("snapshot", "no"),
        MemoryMode::Internal => element.with_attr("snapshot", "internal"),
        MemoryMode::External(file) => {
            element.with_attr("snapshot", "external").with_attr("file", file.to_string_lossy())
        }
    }
}

pub(super) fn write_disk(disk: &DiskPart, merging: bool, beside: Option<&Beside>) -> Element {
    let element = Element::new("disk").with_attr("name", &*disk.target);
    let mut element = match &disk.mode {
        DiskMode::No => element.with_attr("snapshot", "no"),
        DiskMode::Internal => element.with_attr("snapshot", "internal"),
        DiskMode::Manual => element.with_attr("snapshot", "manual"),
        DiskMode::Remote { .. } => {
            let mut element = element.with_attr("snapshot", "external").with_attr("type", "network");
            beside.iter().flat_map(|beside| &beside.remote).for_each(|kept| element.push(kept.clone()));
            element
        }
        DiskMode::External { path, block, format } => {
            let (kind, attribute) = if *block { ("block", "dev") } else { ("file", "file") };
            let mut element = element.with_attr("snapshot", "external").with_attr("type", kind);
            let mut driver = Element::new("driver").with_attr("type", &**format);
            beside.iter().flat_map(|beside| &beside.driver).for_each(|kept| driver.push(kept.clone()));
            let mut source = Element::new("source").with_attr(attribute, path.to_string_lossy());
            beside.iter().flat_map(|beside| &beside.source).for_each(|kept| source.push(kept.clone()));
            element.push(driver);
            element.push(source);
            element
        }
    };
    if merging {
        element.push(Element::new("snapshotDeleteInProgress"));
    }
    element
}

pub(super) fn write_capture(part: &str, how: &Capture) -> Element {
    let element = Element::new(part);
    match how {
        Capture::Internal => element.with_attr("snapshot", "internal"),
        Capture::Memory => element.with_attr("snapshot", "memory"),
        Capture::File(file) => element.with_attr("snapshot", "file").with_attr("file", file.to_string_lossy()),
    }
}
