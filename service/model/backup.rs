//! What a backup is: the document that asks for it, held against the machine.
//!
//! ```text
//!  XML ─read─▶ BackupDoc ─align with the machine─▶ disks of a BackupRequest
//! ```

use crate::checkpoint::{CheckpointDef, can_be_written, check_named, check_new_name_of, is_named};
use crate::device::Disk;
use crate::device::disk::DiskKind;
use crate::domain::DomainDef;
use crate::domain::part::{Part as _, Rest, element};
use crate::domain::value::choices;
use crate::driver::backup::BackedUpDisk;
use crate::xml::{self, Element, Finding, FindingKind, Limits};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

element! {
    /// `<domainbackup>`
    pub struct BackupDoc {
        /// Whether it is written to files, or read by who asked for it.
        attr "mode" => mode: Option<BackupMode>,
        /// Kept for libvirt's sake: there is one backup of a machine at a time.
        attr "id" => id: Option<String>,
        /// `<incremental>`: what has been written since that checkpoint.
        leaf "incremental" => incremental: Option<String>,
        /// `<server>`
        child "server" => server: Option<Element>,
        /// `<disks>`
        child "disks" => disks: Option<BackupDisks>,
    }
}

element! {
    /// `<disks>`
    pub struct BackupDisks {
        /// `<disk>`
        children "disk" => disks: Vec<BackupDiskDoc>,
    }
}

element! {
    /// `<disk>`
    pub struct BackupDiskDoc {
        /// Target, or source path, of a disk of the domain.
        need "name" => name: String,
        /// Whether it takes part; it does if it is named.
        yes_no "backup" => backup: Option<bool>,
        /// What it is written to; a file if absent.
        attr "type" => kind: Option<BackupKind>,
        /// What it is called where it is read; its target if absent.
        attr "exportname" => export: Option<String>,
        /// What the bitmap is called where it is read.
        attr "exportbitmap" => bitmap: Option<String>,
        /// `<driver>`
        child "driver" => driver: Option<BackupDriver>,
        /// `<target>`: where a push is written.
        child "target" => target: Option<BackupFile>,
        /// `<scratch>`: where a pull keeps what the guest overwrites.
        child "scratch" => scratch: Option<BackupFile>,
    }
}

element! {
    /// `<driver>`
    pub struct BackupDriver {
        /// The format of what is written; `qcow2` if absent.
        attr "type" => format: Option<BackupFormat>,
    }
}

element! {
    /// `<target>`, `<scratch>`
    pub struct BackupFile {
        /// The file.
        attr "file" => file: Option<String>,
    }
}

choices! {
    /// Who moves the data.
    pub enum BackupMode { Push = "push", Pull = "pull", }
}

choices! {
    /// What a disk is backed up to.
    pub enum BackupKind { File = "file", }
}

choices! {
    /// The format of what is written.
    pub enum BackupFormat { Qcow2 = "qcow2", Raw = "raw", }
}

/// A document held against a machine.
#[derive(Clone, Debug)]
pub struct AlignedBackup {
    /// It is read by who asked for it.
    pub pull: bool,
    /// Disks that take part, in their order.
    pub disks: Vec<BackedUpDisk>,
    /// Files that the caller named.
    pub named: Vec<PathBuf>,
}

impl BackupDoc {
    /// Reads a document; everything wrong is reported at once. Elements and attributes that are not known are refused. An
    /// empty text is a document that leaves out everything.
    pub fn parse(text: &str) -> Result<BackupDoc, Vec<Finding>> {
        let text = if text.is_empty() { "<domainbackup/>" } else { text };
        let root = xml::read_within(text, &[], Limits::ACCEPTED).map_err(|finding| vec![finding])?;
        if root.name != "domainbackup" {
            let message = format!("the root is <{}>, and a backup's is <domainbackup>", root.name);
            return Err(vec![Finding::invalid(&root.at, message)]);
        }
        let mut log = Vec::new();
        let doc = BackupDoc::read(root, &mut log);
        unknown(&doc.rest, &mut log);
        doc.disks.iter().for_each(|part| unknown(&part.rest, &mut log));
        if let Some(server) = &doc.server {
            let message = "no server is opened for a backup: OpenBackup connects whoever may read it";
            log.push(Finding { kind: FindingKind::Unsupported, ..Finding::invalid(&server.at, message) });
        }
        doc.disks().iter().for_each(|disk| disk.check(doc.pulls(), &mut log));
        log.sort_by_key(|finding| (finding.line, finding.column));
        if log.is_empty() { Ok(doc) } else { Err(log) }
    }

    /// Whether it is read by who asks for it.
    pub fn pulls(&self) -> bool {
        self.mode == Some(BackupMode::Pull)
    }

    /// The checkpoint since which it is to be, if not all is wanted.
    pub fn since(&self) -> Option<&str> {
        self.incremental.as_deref().filter(|name| !name.is_empty())
    }

    fn disks(&self) -> &[BackupDiskDoc] {
        self.disks.as_ref().map_or(&[], |disks| &disks.disks)
    }

    /// The backup of this machine that it asks for. `since`: the checkpoint that it names; `called`: what files that it does not
    /// name are called after.
    pub fn align(
        &self,
        machine: &DomainDef,
        since: Option<&CheckpointDef>,
        called: &str,
    ) -> Result<AlignedBackup, Vec<Finding>> {
        let (mut disks, mut named, mut log): (Vec<BackedUpDisk>, Vec<PathBuf>, Vec<Finding>) = Default::default();
        let (mut exports, mut files) = (BTreeSet::new(), BTreeSet::new());
        check_named(machine, self.disks().iter().map(|asked| (&asked.at, asked.name.as_str())), &mut log);
        for disk in &machine.devices.disks {
            let target = &disk.target.dev;
            let asked = self.disks().iter().find(|asked| is_named(disk, &asked.name));
            let wanted = match asked {
                Some(asked) => asked.backup != Some(false),
                None => self.disks().is_empty() && can_be_written(disk),
            };
            if !wanted {
                continue;
            }
            let mut refuse =
                |message: String| log.push(Finding::invalid(asked.map_or(&self.at, |asked| &asked.at), message));
            if let Some(why) = not_backed_up(disk) {
                refuse(format!("disk '{target}' {why}; leave it out with backup='no'"));
                continue;
            }
            let bitmap = since.map(|since| since.tracked.iter().find(|one| one.target == *target));
            if bitmap == Some(None) {
                let since = self.since().unwrap_or_default();
                refuse(format!("checkpoint '{since}' knows nothing of disk '{target}'; leave it out with backup='no'"));
                continue;
            }
            let of = BackedUp { disk, asked, pull: self.pulls(), called };
            let (file, by_caller) = of.file();
            if by_caller {
                named.push(file.clone());
            } else if disk.kind() == DiskKind::Block {
                // What is beside a device lies in the host's memory.
                let element = if self.pulls() { "<scratch>" } else { "<target>" };
                refuse(format!("disk '{target}' is a device of the host's: say with {element} which file is written"));
                continue;
            }
            let format = of.format();
            if !self.pulls() && since.is_some() && format != BackupFormat::Qcow2 {
                refuse(format!(
                    "disk '{target}': what is incremental is written as qcow2, which tells what it leaves out"
                ));
            }
            let said = |name: fn(&BackupDiskDoc) -> Option<&String>| asked.and_then(name).cloned();
            let export = said(|asked| asked.export.as_ref()).unwrap_or_else(|| target.clone());
            if !files.insert(file.clone()) || !exports.insert(export.clone()) {
                refuse(format!("disk '{target}' has the file or the name of another disk's backup"));
            }
            disks.push(BackedUpDisk {
                target: target.clone(),
                file,
                format: format.as_str().to_owned(),
                since: bitmap.flatten().cloned(),
                export,
                bitmap: said(|asked| asked.bitmap.as_ref()).unwrap_or_else(|| format!("backup-{target}")),
            });
        }
        if disks.is_empty() && log.is_empty() {
            log.push(Finding::invalid(&self.at, "no disk takes part in it"));
        }
        let aligned = AlignedBackup { pull: self.pulls(), disks, named };
        if log.is_empty() { Ok(aligned) } else { Err(log) }
    }
}

impl BackupDiskDoc {
    fn check(&self, pull: bool, log: &mut Vec<Finding>) {
        unknown(&self.rest, log);
        self.driver.iter().for_each(|part| unknown(&part.rest, log));
        for file in [&self.target, &self.scratch].into_iter().flatten() {
            unknown(&file.rest, log);
            if !file.file.as_deref().is_some_and(|file| Path::new(file).is_absolute() && !file.ends_with('/')) {
                log.push(Finding::invalid(&file.at, "it needs the attribute 'file', with an absolute path"));
            }
        }
        let (other, mode, wanted) = match pull {
            true => (&self.target, "pull", "scratch"),
            false => (&self.scratch, "push", "target"),
        };
        if let Some(other) = other {
            log.push(Finding::invalid(&other.at, format!("mode='{mode}' has no use for it: give <{wanted}>")));
        }
        if !pull && (self.export.is_some() || self.bitmap.is_some()) {
            log.push(Finding::invalid(
                &self.at,
                "mode='push' is read by nobody: leave out exportname and exportbitmap",
            ));
        }
        if pull && self.driver.as_ref().is_some_and(|driver| driver.format == Some(BackupFormat::Raw)) {
            log.push(Finding::invalid(&self.at, "what the guest overwrites is kept as qcow2"));
        }
        for (what, name) in [("export", &self.export), ("bitmap", &self.bitmap)] {
            if let Some(Err(why)) = name.as_deref().map(|name| check_new_name_of(what, name)) {
                log.push(Finding::invalid(&self.at, why));
            }
        }
    }
}

/// A disk that takes part.
struct BackedUp<'a> {
    disk: &'a Disk,
    asked: Option<&'a BackupDiskDoc>,
    pull: bool,
    called: &'a str,
}

impl BackedUp<'_> {
    fn format(&self) -> BackupFormat {
        self.asked.and_then(|asked| asked.driver.as_ref()?.format).unwrap_or_default()
    }

    /// The file, and whether the caller named it; else it is beside the image.
    fn file(&self) -> (PathBuf, bool) {
        let file = self.asked.and_then(|asked| if self.pull { asked.scratch.as_ref() } else { asked.target.as_ref() });
        if let Some(file) = file.and_then(|file| file.file.as_deref()) {
            return (PathBuf::from(file), true);
        }
        let image = Path::new(self.disk.path().unwrap_or_default());
        let stem = image.file_stem().unwrap_or_default().to_string_lossy();
        let ending = if self.pull { "scratch" } else { "backup" };
        (image.with_file_name(format!("{stem}.{}.{ending}", self.called)), false)
    }
}

/// Why a disk cannot be backed up, if so.
fn not_backed_up(disk: &Disk) -> Option<String> {
    if disk.is_empty() {
        return Some("is empty".to_owned());
    }
    if disk.is_given() || disk.path().is_none() {
        return Some("is no file or device that virtd knows".to_owned());
    }
    if disk.encryption().is_some() {
        return Some("is encrypted, and what is written of it would not be".to_owned());
    }
    None
}

fn unknown(rest: &Rest, log: &mut Vec<Finding>) {
    crate::snapshot::unknown("backup", rest, log);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::CheckpointDoc;

    const MACHINE: &str = "<domain type='test'><name>web</name><memory>1</memory><os><type>hvm</type></os><devices>\
        <disk type='file'><driver type='qcow2'/><source file='/i/a.qcow2'/><target dev='vda'/></disk>\
        <disk type='file'><driver type='raw'/><source file='/i/b'/><target dev='vdb'/></disk>\
        <disk type='file'><driver type='qcow2'/><source file='/i/c'><encryption format='luks'/></source><target dev='vdc'/>\
        <readonly/></disk><disk type='block'><source dev='/dev/d'/><target dev='vdd'/><readonly/></disk>\
        <disk type='file' device='cdrom'><target dev='sda'/></disk></devices></domain>";

    fn aligned(xml: &str) -> Result<AlignedBackup, String> {
        let machine = DomainDef::parse(MACHINE).unwrap();
        let one = "<domaincheckpoint><disks><disk name='vda'/></disks></domaincheckpoint>";
        let since = CheckpointDef::of(&CheckpointDoc::parse(one).unwrap(), "one", &machine).unwrap();
        let doc = BackupDoc::parse(xml).map_err(|log| log[0].to_string())?;
        let since = doc.since().map(|_| &since);
        doc.align(&machine, since, "now").map_err(|log| log[0].to_string())
    }

    #[test]
    fn what_is_left_out_is_every_disk_in_full_beside_its_image() {
        let all = aligned("").unwrap();
        let files: Vec<&str> = all.disks.iter().map(|disk| disk.file.to_str().unwrap()).collect();
        assert_eq!((files, all.pull, all.named.len()), (vec!["/i/a.now.backup", "/i/b.now.backup"], false, 0));
        let pull = aligned(
            "<domainbackup mode='pull'><incremental>one</incremental><disks><disk name='vda' exportbitmap='x'>\
                            <scratch file='/s'/></disk></disks></domainbackup>",
        )
        .unwrap();
        let disk = &pull.disks[0];
        assert_eq!((pull.disks.len(), disk.bitmap.as_str(), disk.export.as_str()), (1, "x", "vda"));
        assert_eq!((disk.since.as_ref().unwrap().bitmap.as_str(), pull.named), ("one", vec![PathBuf::from("/s")]));
    }

    #[test]
    fn what_cannot_be_backed_up_is_refused_by_name() {
        let disk = |of: &str| format!("<domainbackup><disks>{of}</disks></domainbackup>");
        let cases = [
            ("<domainbackup mode='pull'><server transport='tcp'/></domainbackup>".to_owned(), "OpenBackup"),
            (disk("<disk name='sda'/>"), "'sda' is empty"),
            (disk("<disk name='vdc'/>"), "'vdc' is encrypted"),
            (disk("<disk name='vdd'/>"), "'vdd' is a device"),
            (disk("<disk name='vdz'/>"), "no disk 'vdz'"),
            (disk("<disk name='vda'/><disk name='/i/a.qcow2'/>"), "twice"),
            (disk("<disk name='vda'><scratch file='/s'/></disk>"), "<target>"),
            (disk("<disk name='vda'><target file='s'/></disk>"), "absolute"),
            (disk("<disk name='vda' exportname='x'/>"), "exportname"),
            (disk("<disk name='vda'><target file='/s'/></disk><disk name='vdb'><target file='/s'/></disk>"), "another"),
            ("<domainbackup><incremental>one</incremental></domainbackup>".to_owned(), "nothing of disk 'vdb'"),
            (
                "<domainbackup><incremental>one</incremental><disks><disk name='vda'><driver type='raw'/></disk></disks>\
                 </domainbackup>"
                    .to_owned(),
                "written as qcow2",
            ),
            (disk("<disk name='vda' backup='no'/>"), "no disk takes part"),
            (disk("<disk name='vda' size='1'/>"), "size"),
        ];
        for (xml, expected) in cases {
            let why = aligned(&xml).unwrap_err();
            assert!(why.contains(expected), "{xml}: {why}");
        }
    }
}
