//! What a checkpoint is: a moment of a machine's disks from which on bitmaps in their images tell what has been written.
//!
//! ```text
//!  XML ─read─▶ CheckpointDoc ─align with the machine─▶ CheckpointDef ─write─▶ XML
//! ```

mod doc;

pub(crate) use doc::check_new_name_of;
pub use doc::{CheckpointDiskDoc, CheckpointDoc};

use crate::device::Disk;
use crate::device::disk::DiskDevice;
use crate::domain::DomainDef;
use crate::driver::checkpoints::TrackedDisk;
use crate::xml::{Element, Finding, Place};
use doc::Tracking;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// A checkpoint, complete.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointDef {
    /// Unique among the domain's.
    pub name: String,
    /// For people.
    pub description: Option<String>,
    /// Microseconds since the epoch.
    pub created_usec: u64,
    /// In which order they were created.
    pub order: u64,
    /// Disks of which it is known what has been written since.
    pub tracked: Vec<TrackedDisk>,
    /// Targets of the other disks.
    pub left_out: Vec<String>,
    /// Why what its bitmaps say is not to be trusted, if so: that is for ever.
    pub broken: Option<String>,
}

impl CheckpointDef {
    /// The checkpoint that a document asks for, of this machine. `name` where the document has none.
    pub fn of(doc: &CheckpointDoc, name: &str, machine: &DomainDef) -> Result<CheckpointDef, Vec<Finding>> {
        let (mut tracked, mut left_out, mut log) = (Vec::new(), Vec::new(), Vec::new());
        check_named(machine, doc.disks().iter().map(|asked| (&asked.at, asked.name.as_str())), &mut log);
        for disk in &machine.devices.disks {
            let target = &disk.target.dev;
            let asked = doc.disks().iter().find(|asked| is_named(disk, &asked.name));
            let default = if doc.disks().is_empty() && can_be_written(disk) { Tracking::Bitmap } else { Tracking::No };
            // A bitmap that is named is wanted.
            let said = asked.map(|asked| asked.tracking.unwrap_or(Tracking::Bitmap));
            if said.unwrap_or(default) == Tracking::No {
                left_out.push(target.clone());
                continue;
            }
            let at = asked.map_or(&doc.at, |asked| &asked.at);
            match untracked(disk) {
                Some(why) => log.push(Finding::invalid(at, format!("disk '{target}' {why}"))),
                None => tracked.push(TrackedDisk {
                    target: target.clone(),
                    bitmap: asked.and_then(|asked| asked.bitmap.clone()).unwrap_or_else(|| name.to_owned()),
                    began: PathBuf::from(disk.path().unwrap_or_default()),
                }),
            }
        }
        if tracked.is_empty() && log.is_empty() {
            log.push(Finding::invalid(&doc.at, "no disk takes part in it"));
        }
        let (name, description) = (name.to_owned(), doc.description.clone());
        let def = CheckpointDef { name, description, tracked, left_out, ..CheckpointDef::default() };
        if log.is_empty() { Ok(def) } else { Err(log) }
    }

    /// Writes it; `parent` is the checkpoint before it.
    pub fn write(&self, parent: Option<&str>) -> String {
        let leaf = |name: &str, text: &str| Element::new(name).with_text(text);
        let mut root = Element::new("domaincheckpoint");
        root.push(leaf("name", &self.name));
        self.description.iter().for_each(|text| root.push(leaf("description", text)));
        if let Some(parent) = parent {
            let mut element = Element::new("parent");
            element.push(leaf("name", parent));
            root.push(element);
        }
        root.push(leaf("creationTime", &(self.created_usec / 1_000_000).to_string()));
        let mut disks = Element::new("disks");
        for disk in &self.tracked {
            disks.push(doc::write_disk(&disk.target, Some(&disk.bitmap)));
        }
        self.left_out.iter().for_each(|target| disks.push(doc::write_disk(target, None)));
        root.push(disks);
        root.write()
    }
}

/// The disk of that target, or that path.
pub fn of_machine<'a>(machine: &'a DomainDef, name: &str) -> Option<&'a Disk> {
    machine.devices.disks.iter().find(|disk| is_named(disk, name))
}

/// Whether a document names that disk so.
pub(crate) fn is_named(disk: &Disk, name: &str) -> bool {
    disk.target.dev == name || disk.path() == Some(name)
}

/// Holds the disks that a document names, each with its place there, against the machine: it has each, and none is named twice.
pub(crate) fn check_named<'a>(
    machine: &DomainDef,
    named: impl Iterator<Item = (&'a Place, &'a str)>,
    log: &mut Vec<Finding>,
) {
    let mut seen = BTreeSet::new();
    for (at, name) in named {
        match of_machine(machine, name) {
            None => log.push(Finding::invalid(at, format!("the machine has no disk '{name}'"))),
            Some(disk) if !seen.insert(&disk.target.dev) => {
                log.push(Finding::invalid(at, format!("disk '{}' is named twice", disk.target.dev)));
            }
            Some(_) => {}
        }
    }
}

/// Whether the guest writes to it.
pub(crate) fn can_be_written(disk: &Disk) -> bool {
    !disk.readonly && !disk.is_empty() && matches!(disk.device(), DiskDevice::Disk | DiskDevice::Lun)
}

/// Why no bitmap can tell what is written to a disk, if so.
fn untracked(disk: &Disk) -> Option<String> {
    let format = disk.meant_format();
    let remedy = "leave it out with checkpoint='no'";
    if !can_be_written(disk) {
        return Some(format!("is not written by the guest, so no bitmap is kept of it; {remedy}"));
    }
    if disk.transient.is_some() {
        return Some(format!("throws away what is written to it, so no bitmap is kept of it; {remedy}"));
    }
    if disk.is_given() {
        return Some(format!("was opened by a client, and no other process could go on with its bitmap; {remedy}"));
    }
    if disk.path().is_none() || format != "qcow2" {
        let what = if disk.path().is_none() { "is no file" } else { "is no qcow2 image" };
        return Some(format!("{what} (format {format}), and only those keep bitmaps; {remedy}"));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: &str = "<domain type='test'><name>web</name><memory>1</memory><os><type>hvm</type></os><devices>\
        <disk type='file'><driver type='qcow2'/><source file='/a'/><target dev='vda'/></disk>\
        <disk type='file'><driver type='raw'/><source file='/b'/><target dev='vdb'/></disk>\
        <disk type='file' device='cdrom'><target dev='sda'/></disk></devices></domain>";

    fn aligned(xml: &str) -> Result<CheckpointDef, String> {
        let machine = DomainDef::parse(MACHINE).unwrap();
        let doc = CheckpointDoc::parse(xml).map_err(|log| log[0].to_string())?;
        CheckpointDef::of(&doc, "monday", &machine).map_err(|log| log[0].to_string())
    }

    #[test]
    fn disks_are_tracked_as_asked_and_the_others_by_name() {
        let one = "<domaincheckpoint><disks><disk name='/a' bitmap='b'/></disks></domaincheckpoint>";
        let def = aligned(one).unwrap();
        let bitmap = TrackedDisk { target: "vda".into(), bitmap: "b".into(), began: "/a".into() };
        assert_eq!((def.tracked.clone(), def.left_out.len()), (vec![bitmap], 2));
        let text = CheckpointDef { created_usec: 7_000_001, ..def.clone() }.write(Some("sunday"));
        let again = CheckpointDoc::parse(&text).unwrap();
        assert_eq!(aligned(&text).unwrap().tracked, def.tracked, "{text}");
        assert_eq!(again.name(), Some("monday"));
        assert!(text.contains("<creationTime>7</creationTime>") && text.contains("sunday"), "{text}");
    }

    #[test]
    fn what_cannot_be_tracked_is_refused_by_name() {
        let disk =
            |attributes: &str| format!("<domaincheckpoint><disks><disk {attributes}/></disks></domaincheckpoint>");
        let cases = [
            (String::new(), "'vdb' is no qcow2 image"),
            (disk("name='vdz'"), "no disk 'vdz'"),
            (disk("name='sda' checkpoint='bitmap'"), "'sda' is not written"),
            (disk("name='vda' checkpoint='no'"), "no disk takes part"),
            (disk("name='vda'/><disk name='/a'"), "twice"),
            (disk("name='vda' checkpoint='no' bitmap='x'"), "has no bitmap"),
            (disk("name='vda' size='1'"), "size"),
            ("<domainsnapshot/>".to_owned(), "domaincheckpoint"),
        ];
        for (xml, expected) in cases {
            let why = aligned(&xml).unwrap_err();
            assert!(why.contains(expected), "{xml}: {why}");
        }
    }
}
