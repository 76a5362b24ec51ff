//! `DomainDef`: what a domain's XML says.
//!
//! ```text
//!  text ──xml::read──▶ tree ──format::check──▶ tree ──Part::read──▶ DomainDef ──checks, cross──▶ findings, or the definition
//!  text ◀─xml write─── tree ◀─format::arrange─ tree ◀─Part::write── DomainDef (for_form)
//! ```
//!
//! Each section has a file with type, read and write. `format` knows every name and the order of output.

pub mod abi;
mod checks;
pub mod clock;
pub mod cpu;
mod cross;
mod defaults;
pub mod features;
pub(crate) mod format;
mod forms;
pub mod listening;
pub mod memory;
pub mod metadata;
pub mod native;
mod networks;
pub mod one_device;
pub mod os;
pub mod part;
mod secrets;
pub mod size;
pub mod sysinfo;
pub mod tune;
pub mod value;
mod vcpus;

pub use checks::MAX_VCPUS;
pub use format::{nearest, vocabulary};

use crate::device::Devices;
use crate::device::disk::ThrottleGroups;
use crate::xml::{self, Element, Finding, FindingKind, Limits, Place, add_findings};
use clock::{Clock, Pm};
use cpu::{Cpu, NumaCell};
use features::Features;
use memory::{DefaultIothread, IothreadIds, MaxMemory, Memory, MemoryBacking, Numatune, Vcpu, Vcpus};
use metadata::Metadata;
use native::NativeArguments;
use os::Os;
use part::{Part, element};
use size::Kib;
use std::collections::BTreeSet;
use sysinfo::{Genid, Sysinfo};
use tune::{Blkiotune, Cputune, Memtune};
use uuid::Uuid;
use value::choices;

/// More I/O threads than any host has CPUs.
pub const MAX_IOTHREADS: u32 = 4096;

/// More devices than any machine has; whoever may read may have a document of so many worked through.
const MAX_DEVICES: usize = 1024;

element! {
    /// A domain's configuration.
    pub struct DomainDef {
        /// `<domain type=…>`, e.g. `qemu`.
        need "type" => kind: String,
        /// `<domain id=…>`: only in a live definition.
        attr "id" => id: Option<u32>,
        /// `<name>`
        own "name" => name: String,
        /// `<uuid>`, made up when the document has none.
        own "uuid" => uuid: Uuid,
        /// `<genid>`
        child "genid" => genid: Option<Genid>,
        /// `<title>`
        leaf "title" => title: Option<String>,
        /// `<description>`
        leaf "description" => description: Option<String>,
        /// `<metadata>`
        child "metadata" => metadata: Option<Metadata>,
        /// `<memory>`
        child "memory" => memory: Option<Memory>,
        /// `<currentMemory>`; all of it if absent.
        child "currentMemory" => current_memory: Option<Kib>,
        /// `<maxMemory>`
        child "maxMemory" => max_memory: Option<MaxMemory>,
        /// `<memoryBacking>`
        child "memoryBacking" => memory_backing: Option<MemoryBacking>,
        /// `<throttlegroups>`
        child "throttlegroups" => throttle_groups: Option<ThrottleGroups>,
        /// `<cputune>`
        child "cputune" => cputune: Option<Cputune>,
        /// `<memtune>`
        child "memtune" => memtune: Option<Memtune>,
        /// `<blkiotune>`
        child "blkiotune" => blkiotune: Option<Blkiotune>,
        /// `<numatune>`
        child "numatune" => numatune: Option<Numatune>,
        /// `<vcpu>`
        child "vcpu" => vcpu: Option<Vcpu>,
        /// `<vcpus>`
        child "vcpus" => vcpus_each: Option<Vcpus>,
        /// `<iothreads>`: how many.
        leaf "iothreads" => iothreads: Option<u32>,
        /// `<iothreadids>`
        child "iothreadids" => iothread_ids: Option<IothreadIds>,
        /// `<defaultiothread>`
        child "defaultiothread" => default_iothread: Option<DefaultIothread>,
        /// `<sysinfo>`
        children "sysinfo" => sysinfos: Vec<Sysinfo>,
        /// `<os>`
        inner "os" => os: Os,
        /// `<features>`
        child "features" => features: Option<Features>,
        /// `<cpu>`
        child "cpu" => cpu: Option<Cpu>,
        /// `<clock>`
        child "clock" => clock: Option<Clock>,
        /// `<on_poweroff>`
        own "on_poweroff" => on_poweroff: LifecycleAction,
        /// `<on_reboot>`
        own "on_reboot" => on_reboot: LifecycleAction,
        /// `<on_crash>`
        own "on_crash" => on_crash: LifecycleAction,
        /// `<pm>`
        child "pm" => pm: Option<Pm>,
        /// `<devices>`
        inner "devices" => devices: Devices,
        /// `<qemu:commandline>`
        child "qemu:commandline" => native: Option<NativeArguments>,
    }
}

choices! {
    /// What happens to the domain when its guest powers off, reboots or crashes.
    pub enum LifecycleAction {
        Destroy = "destroy", Restart = "restart", RenameRestart = "rename-restart", Preserve = "preserve",
        CoredumpDestroy = "coredump-destroy", CoredumpRestart = "coredump-restart",
    }
}

/// Which form of a definition is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Form {
    /// Without runtime facts (id, aliases, terminals, ports).
    pub inactive: bool,
    /// With all that is secret (`secrets.rs`).
    pub secure: bool,
    /// For another host: without what only this host adds.
    pub migratable: bool,
}

impl Form {
    /// What is kept of a configuration: all that it says, secrets included.
    pub const STORED: Form = Form { inactive: true, secure: true, migratable: false };
    /// What is kept of a configuration that a guest runs with: its runtime facts, too.
    pub const LIVE: Form = Form { inactive: false, ..Form::STORED };
}

/// Something the document says and no typed field holds: kept and shown, not acted upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Where, with its path, e.g. `/devices/hostdev[1]` or `/vcpu/@cpuset`.
    pub at: Place,
    /// The element's or attribute's name.
    pub name: String,
    /// An attribute's value or an element's text.
    pub value: String,
}

impl Kept {
    /// Refuses it: `reason` completes the sentence "<hostdev> …".
    pub fn unsupported(&self, reason: &str) -> Finding {
        let subject = if self.is_attribute() { format!("'{}'", self.name) } else { format!("<{}>", self.name) };
        Finding::new(FindingKind::Unsupported, &self.at, format!("{subject} {reason}"))
    }

    /// Whether it is an attribute, else an element.
    pub fn is_attribute(&self) -> bool {
        self.at.path.is_attribute()
    }
}

/// Where what others have written is kept as they wrote it.
const VERBATIM: &[(&str, &str)] = &[("domain", "metadata")];

impl DomainDef {
    /// Reads a domain document. Everything wrong is reported at once, never an empty list; nothing read is dropped.
    pub fn parse(xml: &str) -> Result<DomainDef, Vec<Finding>> {
        DomainDef::parse_within(xml, Limits::ACCEPTED)
    }

    /// The same with other limits: [`Limits::STORED`] for what was accepted once and is one of our own files; rules of
    /// `cross` that have been added since do not keep it from being read.
    pub fn parse_within(xml: &str, limits: Limits) -> Result<DomainDef, Vec<Finding>> {
        let root = xml::read_within(xml, VERBATIM, limits).map_err(|finding| vec![finding])?;
        if limits == Limits::STORED { DomainDef::from_kept_tree(root) } else { DomainDef::from_tree(root) }
    }

    /// As much of a domain document as can be read, with everything wrong: for telling all that is to be said about it.
    pub fn parse_leniently(xml: &str) -> (Option<DomainDef>, Vec<Finding>) {
        DomainDef::parse_leniently_within(xml, Limits::ACCEPTED)
    }

    /// The same with other limits.
    pub fn parse_leniently_within(xml: &str, limits: Limits) -> (Option<DomainDef>, Vec<Finding>) {
        match xml::read_within(xml, VERBATIM, limits) {
            Ok(root) => DomainDef::read_leniently(root, limits != Limits::STORED),
            Err(finding) => (None, vec![finding]),
        }
    }

    /// Its text in a form that is kept, which is known to be read again. Error: what stands in the way of that, and what
    /// to do about it.
    pub fn write_readable(&self, form: Form, limits: Limits) -> Result<String, String> {
        let text = self.write(form);
        DomainDef::read_back(&text, limits).map(|_| text)
    }

    /// What is read of a text that was written so. Error: why it could not be, within `limits`.
    pub fn read_back(text: &str, limits: Limits) -> Result<DomainDef, String> {
        DomainDef::parse_within(text, limits).map_err(|findings| xml::unreadable(&findings))
    }

    /// The same from a tree whose `<metadata>` was kept verbatim.
    pub fn from_tree(root: Element) -> Result<DomainDef, Vec<Finding>> {
        DomainDef::unless_refused(DomainDef::read_leniently(root, true))
    }

    /// The same of what was accepted once, here or elsewhere, and kept.
    pub fn from_kept_tree(root: Element) -> Result<DomainDef, Vec<Finding>> {
        DomainDef::unless_refused(DomainDef::read_leniently(root, false))
    }

    fn unless_refused(read: (Option<DomainDef>, Vec<Finding>)) -> Result<DomainDef, Vec<Finding>> {
        match read {
            (Some(def), log) if log.iter().all(|finding| finding.kind != FindingKind::Invalid) => Ok(def),
            (_, log) => Err(log),
        }
    }

    fn read_leniently(mut root: Element, new: bool) -> (Option<DomainDef>, Vec<Finding>) {
        if let Some(excess) =
            root.elements().filter(|e| e.name == "devices").flat_map(Element::elements).nth(MAX_DEVICES)
        {
            let message = format!("more than {MAX_DEVICES} devices");
            return (None, vec![Finding::new(FindingKind::Invalid, &excess.at, message)]);
        }
        let mut log = Vec::new();
        native::canonical_prefixes(&mut root, native::NAMESPACES, &mut log);
        format::check(&mut root, &mut log);
        // What is only kept, too, has one order from here on.
        native::declare_prefixes(&mut root, native::NAMESPACES);
        format::arrange(&mut root);
        let reboot = root.child("on_reboot").is_some();
        let mut def = DomainDef::read(root, &mut log);
        if !reboot {
            def.on_reboot = LifecycleAction::Restart;
        }
        if def.uuid.is_nil() {
            def.uuid = Uuid::new_v4();
        }
        if def.os.kind.name.is_empty() {
            // A boot loader of the host's is for guests that know their hypervisor.
            let name = if def.rest.child("bootloader").is_some() { "xen" } else { "hvm" };
            def.os.kind.name = name.to_owned();
        }
        let mut seen = Vec::new();
        checks::check(&def, &mut seen);
        if new {
            add_findings(&mut seen, cross_findings(&def));
        }
        add_findings(&mut log, seen);
        (Some(def), log)
    }

    /// What contradicts itself in it, as `parse_leniently` would say of a document that says the same.
    pub fn contradictions(&self) -> Vec<Finding> {
        let mut found = Vec::new();
        checks::check(self, &mut found);
        add_findings(&mut found, cross_findings(self));
        found
    }

    /// Writes it, in libvirt's order and layout (two spaces, one final newline).
    pub fn write(&self, form: Form) -> String {
        self.in_form(form).tree().write()
    }

    /// The same as a tree.
    pub fn tree_in(&self, form: Form) -> Element {
        self.in_form(form).tree()
    }

    /// The whole of it, secrets and runtime facts included, in libvirt's order.
    pub fn tree(&self) -> Element {
        let mut root = Part::write(self, "domain");
        native::declare_prefixes(&mut root, native::NAMESPACES);
        format::arrange(&mut root);
        root
    }

    /// Whether both are the same configuration, runtime facts aside.
    pub fn same_configuration(&self, other: &DomainDef) -> bool {
        self.write(Form::STORED) == other.write(Form::STORED)
    }

    /// Everything that is kept and shown and that no typed field holds, in document order: what a driver must refuse by
    /// name unless it may be ignored. Metadata and namespace declarations are not among it.
    pub fn unhandled(&self) -> Vec<Kept> {
        let mut kept = Vec::new();
        collect_kept(&self.tree(), &mut kept);
        kept.sort_by_key(|kept| (kept.at.line, kept.at.column));
        kept
    }

    /// `os/type`: `hvm` and the like.
    pub fn os_type(&self) -> &str {
        &self.os.kind.name
    }

    /// vCPUs present at boot.
    pub fn vcpus(&self) -> u32 {
        self.vcpu.as_ref().and_then(|vcpu| vcpu.current).unwrap_or_else(|| self.maximum_vcpus())
    }

    /// The vCPUs that are there at boot, and of them those that are plugged in then, in their turn; the others are the board's.
    pub fn vcpus_at_boot(&self) -> (BTreeSet<u32>, Vec<u32>) {
        let said = |n: u32| self.vcpus_each.iter().flat_map(|all| &all.vcpus).find(move |vcpu| vcpu.id == n);
        let first = self.vcpus();
        // A definition that is only being checked may say any number.
        let online: BTreeSet<u32> = (0..self.maximum_vcpus().min(MAX_VCPUS))
            .filter(|n| said(*n).and_then(|vcpu| vcpu.enabled).unwrap_or(*n < first))
            .collect();
        let is_plugged = |n: &u32| said(*n).and_then(|vcpu| vcpu.hotpluggable) == Some(true);
        let mut plugged: Vec<u32> = online.iter().copied().filter(is_plugged).collect();
        plugged.sort_by_key(|n| said(*n).and_then(|vcpu| vcpu.order).unwrap_or(u32::MAX));
        (online, plugged)
    }

    /// vCPUs that can be plugged in.
    pub fn maximum_vcpus(&self) -> u32 {
        self.vcpu.as_ref().map_or(1, |vcpu| vcpu.count)
    }

    /// `<currentMemory>` in KiB, at most [`DomainDef::memory_kib`].
    pub fn current_memory_kib(&self) -> u64 {
        self.current_memory.map_or(u64::MAX, |size| size.0).min(self.memory_kib())
    }

    /// The guest's NUMA cells.
    pub fn numa_cells(&self) -> &[NumaCell] {
        self.cpu.as_ref().and_then(|cpu| cpu.numa.as_ref()).map_or(&[], |numa| &numa.cells)
    }

    /// What memory devices add, in KiB.
    pub fn memory_devices_kib(&self) -> u64 {
        self.devices.memories.iter().map(|device| device.target.size.0).fold(0, u64::saturating_add)
    }

    /// RAM at boot in KiB, without what memory devices add.
    pub fn initial_memory_kib(&self) -> u64 {
        self.memory_kib().saturating_sub(self.memory_devices_kib())
    }

    /// The numbers of the I/O threads: those listed, and further ones up to how many there are.
    pub fn iothread_numbers(&self) -> BTreeSet<u32> {
        let listed = self.iothread_ids.iter().flat_map(|ids| &ids.threads).map(|thread| thread.id);
        let mut numbers: BTreeSet<u32> = listed.collect();
        let wanted = self.iothreads.unwrap_or(0).min(MAX_IOTHREADS) as usize;
        let mut next = 1..;
        while numbers.len() < wanted {
            numbers.extend(next.next());
        }
        numbers
    }

    /// `<memory>` in KiB.
    pub fn memory_kib(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.size.0)
    }

    /// Whether raw hypervisor arguments are in it (`qemu:commandline` and the like).
    pub fn has_native_arguments(&self) -> bool {
        self.native.is_some() || self.rest.elements.iter().any(|element| element.name.contains(':'))
    }
}

fn cross_findings(def: &DomainDef) -> Vec<Finding> {
    let mut found = Vec::new();
    cross::check(def, &mut found);
    found
}

/// What typed fields write has no place in a document; what was kept has.
fn collect_kept(element: &Element, kept: &mut Vec<Kept>) {
    for attribute in element.attributes.iter().filter(|a| a.at.is_known() && !a.name.starts_with("xmlns:")) {
        let (name, value) = (attribute.name.clone(), attribute.value.clone());
        kept.push(Kept { at: attribute.place(), name, value });
    }
    for child in element.elements() {
        if child.at.is_known() {
            kept.push(Kept { at: child.at.clone(), name: child.name.clone(), value: child.text() });
        } else {
            collect_kept(child, kept);
        }
    }
}
