//! The checkpoint document: `<domaincheckpoint>` as it is read, and how its disks are written.

use crate::domain::part::{Part as _, Rest, element};
use crate::domain::value::choices;
use crate::snapshot::{ParentDoc, check_name_of};
use crate::xml::{self, Element, Finding, Limits};

element! {
    /// `<domaincheckpoint>`
    pub struct CheckpointDoc {
        /// `<name>`
        leaf "name" => named: Option<String>,
        /// `<description>`
        leaf "description" => description: Option<String>,
        /// `<parent>`: written, and of no effect when it is read.
        child "parent" => parent: Option<ParentDoc>,
        /// `<creationTime>`, likewise.
        leaf "creationTime" => created: Option<String>,
        /// `<disks>`
        child "disks" => disks: Option<CheckpointDisks>,
    }
}

element! {
    /// `<disks>`
    pub struct CheckpointDisks {
        /// `<disk>`
        children "disk" => disks: Vec<CheckpointDiskDoc>,
    }
}

element! {
    /// `<disk>`
    pub struct CheckpointDiskDoc {
        /// Target, or source path, of a disk of the domain.
        need "name" => name: String,
        /// Whether it takes part; it does if it is named.
        attr "checkpoint" => tracking: Option<Tracking>,
        /// What its bitmap is called; as the checkpoint if absent.
        attr "bitmap" => bitmap: Option<String>,
    }
}

choices! {
    /// How a disk takes part in a checkpoint.
    pub enum Tracking { No = "no", Bitmap = "bitmap", }
}

impl CheckpointDoc {
    /// Reads a document; everything wrong is reported at once. Elements and attributes that are not known are refused. An
    /// empty text is a document that leaves out everything.
    pub fn parse(text: &str) -> Result<CheckpointDoc, Vec<Finding>> {
        let text = if text.is_empty() { "<domaincheckpoint/>" } else { text };
        let root = xml::read_within(text, &[], Limits::ACCEPTED).map_err(|finding| vec![finding])?;
        if root.name != "domaincheckpoint" {
            let message = format!("the root is <{}>, and a checkpoint's is <domaincheckpoint>", root.name);
            return Err(vec![Finding::invalid(&root.at, message)]);
        }
        let mut log = Vec::new();
        let doc = CheckpointDoc::read(root, &mut log);
        unknown(&doc.rest, &mut log);
        doc.parent.iter().for_each(|part| unknown(&part.rest, &mut log));
        doc.disks.iter().for_each(|part| unknown(&part.rest, &mut log));
        for disk in doc.disks() {
            unknown(&disk.rest, &mut log);
            if disk.tracking == Some(Tracking::No) && disk.bitmap.is_some() {
                log.push(Finding::invalid(&disk.at, "checkpoint='no' has no bitmap"));
            }
            let named = disk.bitmap.as_deref().map_or(Ok(()), |name| check_new_name_of("bitmap", name));
            if let Err(why) = named {
                log.push(Finding::invalid(&disk.at.attribute("bitmap"), why));
            }
        }
        log.sort_by_key(|finding| (finding.line, finding.column));
        if log.is_empty() { Ok(doc) } else { Err(log) }
    }

    /// What it is to be called, if it says so.
    pub fn name(&self) -> Option<&str> {
        self.named.as_deref().filter(|name| !name.is_empty())
    }

    /// The disks that it names.
    pub fn disks(&self) -> &[CheckpointDiskDoc] {
        self.disks.as_ref().map_or(&[], |disks| &disks.disks)
    }
}

/// A name that can be one, and that nobody takes for another.
pub(crate) fn check_new_name_of(what: &str, name: &str) -> Result<(), String> {
    check_name_of(what, name)?;
    xml::check_new_name(name).map_err(|why| format!("the name '{}' of a {what} {why}", xml::shorten(name)))
}

fn unknown(rest: &Rest, log: &mut Vec<Finding>) {
    crate::snapshot::unknown("checkpoint", rest, log);
}

/// A disk as it is shown; without a bitmap it takes no part.
pub(super) fn write_disk(target: &str, bitmap: Option<&str>) -> Element {
    let mut disk = Element::new("disk");
    disk.set_attr("name", target);
    match bitmap {
        Some(bitmap) => {
            disk.set_attr("checkpoint", Tracking::Bitmap.as_str());
            disk.set_attr("bitmap", bitmap);
        }
        None => disk.set_attr("checkpoint", Tracking::No.as_str()),
    }
    disk
}
