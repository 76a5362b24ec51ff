//! LVM's tool: which volume groups there are and what is in them, as it tells it in JSON, and what is changed in one. It has our
//! rights, and its own locks: what others do with it meanwhile is waited for.

use super::image::not_run;
use super::tool::{Bounds, finish, tame};
use super::workers::Stop;
use super::{SYSFS, apart};
use serde::Deserialize;
use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use virt_model::driver::DriverError;
use virt_model::driver::storage::FileId;

const BOUNDS: Bounds = Bounds { data: Some(2 << 30), cpu: None, files: Some(1024) };
/// So long the name of a group may be.
const MAX_GROUP_NAME: usize = 62;
/// So long the name that the kernel has for a volume may be: its group's and its own, with - between them, and each - in them twice.
const MAX_KERNEL_NAME: usize = 127;
/// What LVM has for itself in names of volumes: at their beginning, and anywhere.
const OWN_BEGINNINGS: &[&str] = &["snapshot", "pvmove"];
const OWN_PARTS: &[&str] = &[
    "_cdata", "_cmeta", "_corig", "_cpool", "_cvol", "_imeta", "_iorig", "_mimage", "_mlog", "_pmspare", "_rimage",
    "_rmeta", "_tdata", "_tmeta", "_vdata", "_vorigin", "_wcorig",
];
/// There udev listens, where there is one.
const UDEV: &str = "/run/udev/control";
/// Where there is none the tool makes the devices of volumes itself, as it does not unless it is told.
const WITHOUT_UDEV: &str = "activation { udev_sync=0 udev_rules=0 }";
/// What is asked of groups.
const GROUP_FIELDS: &str = "vg_name,vg_size,vg_free,vg_extent_size,lv_count";
/// A volume that grows says with this mark how many bytes it had, until what is new is blank.
const GROWN_FROM: &str = "virt-grown-from-";
/// One that is being made has this mark until it holds what it is to hold.
const UNFINISHED: &str = "virt-unfinished";

/// The name of a volume group: one that LVM takes, and takes for no option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupName(String);

/// The name of a volume in one, likewise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogicalName(String);

/// A volume group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// How large it is, in bytes.
    pub bytes: u64,
    /// How much of that is no volume's, in bytes.
    pub free: u64,
    /// In which unit it is given to volumes, in bytes.
    pub extent: u64,
    /// How many volumes are in it, those that only serve others included.
    pub volumes: u64,
}

/// A volume in a group.
#[derive(Clone, Debug, PartialEq)]
pub struct LogicalVolume {
    /// Its name.
    pub name: LogicalName,
    /// Its uuid, which is never another's.
    pub key: String,
    /// How large its device is, in bytes.
    pub bytes: u64,
    /// How much of the group is taken for it, in bytes.
    pub taken: u64,
    /// It has a device.
    pub is_active: bool,
    /// It only holds others.
    pub is_pool: bool,
    /// What is taken for it is taken as it is written.
    pub is_thin: bool,
    /// The volume of the same group that it is a snapshot of, or else shows what it has not itself.
    pub origin: Option<LogicalName>,
    /// It is being made, or was when somebody was killed: it is none yet.
    pub is_unfinished: bool,
    /// It was growing, and had so many bytes.
    pub grown_from: Option<u64>,
}

/// What is in a group.
#[derive(Debug, Default)]
pub struct LogicalVolumes {
    /// Its volumes.
    pub volumes: Vec<LogicalVolume>,
    /// How many have names that nobody could write.
    pub unnameable: u32,
}

/// A device that is LVM's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhysicalVolume {
    /// Where it is.
    pub device: PathBuf,
    /// The group that it is in, if it is in one.
    pub group: Option<String>,
}

/// What is changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// Each of its volumes has a device.
    Activate,
    /// None has.
    Deactivate,
    /// That volume has none.
    DeactivateVolume(&'a LogicalName),
    /// It is made, of these devices.
    MakeGroup(&'a [PathBuf]),
    /// It is removed; what is in it keeps it.
    RemoveGroup,
    /// A device that is in no group is LVM's no more.
    Release(&'a Path),
    /// A volume of at least so many bytes, which is unfinished.
    Make(&'a LogicalName, u64),
    /// A volume is not unfinished any more.
    Finish(&'a LogicalName),
    /// The volume with that uuid is removed.
    Remove(&'a str),
    /// A volume has at least so many bytes, which are more than now.
    Extend(&'a LogicalName, u64),
    /// A volume has at least so many bytes, which are less than now: what is behind is lost.
    Reduce(&'a LogicalName, u64),
    /// A volume says that it had so many bytes.
    MarkGrown(&'a LogicalName, u64),
    /// It does not say that any more.
    MarkBlank(&'a LogicalName, u64),
}

impl GroupName {
    /// Error: a sentence.
    pub fn new(name: &str) -> Result<GroupName, String> {
        check_name("volume group", name, MAX_GROUP_NAME).map(|()| GroupName(name.to_owned()))
    }

    /// Refuses a name that a new volume in it cannot have, as it is too long together with the group's. Error: a sentence.
    pub fn check_new(&self, name: &LogicalName) -> Result<(), String> {
        let length = |name: &str| name.len() + name.matches('-').count();
        match length(&self.0) + 1 + length(&name.0) > MAX_KERNEL_NAME {
            false => Ok(()),
            true => Err(format!(
                "the name of a volume and that of its group '{self}' have at most {} bytes together, each - counted twice: choose \
                 a shorter one",
                MAX_KERNEL_NAME - 1
            )),
        }
    }
}

impl LogicalName {
    /// Error: a sentence.
    pub fn new(name: &str) -> Result<LogicalName, String> {
        // A group's has one byte at least.
        check_name("volume in a volume group", name, MAX_KERNEL_NAME - 2)?;
        match own_part(name) {
            None => Ok(LogicalName(name.to_owned())),
            Some(own) => {
                Err(format!("'{name}' cannot be the name of a volume in a volume group: LVM has '{own}' for itself"))
            }
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for LogicalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What of a name LVM has for itself, if anything.
fn own_part(name: &str) -> Option<&'static str> {
    let begins = OWN_BEGINNINGS.iter().find(|own| name.starts_with(**own));
    begins.or_else(|| OWN_PARTS.iter().find(|own| name.contains(**own))).copied()
}

fn check_name(of: &str, name: &str, most: usize) -> Result<(), String> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"+_.-".contains(&byte);
    match !name.is_empty() && name.bytes().all(known) && !name.starts_with('-') && !matches!(name, "." | "..") {
        false => Err(format!(
            "'{}' cannot be the name of a {of}: it has letters, digits and + _ . - alone, and does not begin with -",
            virt_model::xml::shorten(name)
        )),
        true if name.len() > most => Err(format!("the name of a {of} has at most {most} bytes")),
        true => Ok(()),
    }
}

impl Change<'_> {
    /// What the tool is told. What is no option follows the two dashes.
    fn arguments(&self, group: &GroupName) -> Vec<String> {
        let volume = |name: &LogicalName| format!("{group}/{name}");
        let size = |bytes: &u64| format!("{bytes}b");
        let words = |options: &[&str], rest: &[String]| -> Vec<String> {
            options.iter().map(|word| (*word).to_owned()).chain(["--".to_owned()]).chain(rest.iter().cloned()).collect()
        };
        let own = [group.to_string()];
        match self {
            Change::Activate => words(&["vgchange", "--activate", "y"], &own),
            Change::Deactivate => words(&["vgchange", "--activate", "n"], &own),
            Change::DeactivateVolume(name) => words(&["lvchange", "--activate", "n"], &[volume(name)]),
            Change::MakeGroup(devices) => {
                let devices = devices.iter().map(|device| device.display().to_string());
                words(&["vgcreate", "--yes"], &own.into_iter().chain(devices).collect::<Vec<_>>())
            }
            Change::RemoveGroup => words(&["vgremove"], &own),
            Change::Release(device) => words(&["pvremove"], &[device.display().to_string()]),
            Change::Make(name, bytes) => {
                let options = [
                    "lvcreate",
                    "--yes",
                    "--addtag",
                    UNFINISHED,
                    "--wipesignatures",
                    "y",
                    "--zero",
                    "y",
                    "--size",
                    &size(bytes),
                    "--name",
                ];
                words(&[&options[..], &[name.as_str()]].concat(), &own)
            }
            Change::Finish(name) => words(&["lvchange", "--deltag", UNFINISHED], &[volume(name)]),
            Change::Remove(key) => words(&["lvremove", "--yes", "--select", &format!("lv_uuid={key}")], &own),
            Change::Extend(name, bytes) => words(&["lvextend", "--size", &size(bytes)], &[volume(name)]),
            Change::Reduce(name, bytes) => {
                words(&["lvreduce", "--force", "--yes", "--size", &size(bytes)], &[volume(name)])
            }
            Change::MarkGrown(name, bytes) => {
                words(&["lvchange", "--addtag", &format!("{GROWN_FROM}{bytes}")], &[volume(name)])
            }
            Change::MarkBlank(name, bytes) => {
                words(&["lvchange", "--deltag", &format!("{GROWN_FROM}{bytes}")], &[volume(name)])
            }
        }
    }
}

/// The tool, for an errand. Blocks.
pub struct Lvm<'a>(pub &'a Stop);

impl Lvm<'_> {
    /// All volume groups.
    pub fn groups(&self) -> Result<Vec<Group>, DriverError> {
        read_groups(&self.report("vgs", GROUP_FIELDS, &[])?)
    }

    /// The group of that name, if there is one.
    pub fn group(&self, name: &GroupName) -> Result<Option<Group>, DriverError> {
        let told = self.report_of("vgs", GROUP_FIELDS, name)?;
        Ok(told.map(|told| read_groups(&told)).transpose()?.and_then(|mut found| found.pop()))
    }

    /// The volumes in a group.
    pub fn volumes(&self, group: &GroupName) -> Result<Vec<LogicalVolume>, DriverError> {
        Ok(self.all_of(group)?.volumes)
    }

    /// What is in a group; nothing where there is no such group.
    pub fn all_of(&self, group: &GroupName) -> Result<LogicalVolumes, DriverError> {
        let fields = "lv_name,lv_uuid,lv_size,lv_layout,lv_active,lv_tags,data_percent,origin,origin_size";
        self.report_of("lvs", fields, group)?.map_or_else(|| Ok(LogicalVolumes::default()), |told| read_volumes(&told))
    }

    /// The devices that are LVM's.
    pub fn devices(&self) -> Result<Vec<PhysicalVolume>, DriverError> {
        read_devices(&self.report("pvs", "pv_name,vg_name", &[])?)
    }

    /// The groups of which a volume is in use, each as often as one is.
    pub fn groups_in_use(&self) -> Result<Vec<String>, DriverError> {
        let told = self.report("lvs", "vg_name", &["--select", "lv_device_open=1"])?;
        Ok(rows(&told, "lv")?.iter().filter_map(|row| text(row, "vg_name").ok()).collect())
    }

    /// The same of one group alone, whatever is wrong with others, if it is there.
    fn report_of(&self, what: &str, fields: &str, group: &GroupName) -> Result<Option<String>, DriverError> {
        match self.report(what, fields, &["--", &group.0]) {
            Ok(told) => Ok(Some(told)),
            Err(DriverError::Storage(why)) if says_there_is_none(&why, group) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn report(&self, what: &str, fields: &str, which: &[&str]) -> Result<String, DriverError> {
        let mut arguments = vec![what, "--reportformat", "json", "--units", "b", "--nosuffix", "--options", fields];
        arguments.extend(which);
        let arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
        run(&arguments, self.0, false)
    }

    /// Changes a group. What is begun is ended, whether it is wanted still or not: a tool that is killed could leave devices to which
    /// nobody comes any more. Error: `NoSpace`, or in the tool's own words.
    pub fn change(&self, group: &GroupName, change: &Change) -> Result<(), DriverError> {
        self.0.check()?;
        run(&change.arguments(group), &Stop::default(), true).map(drop)
    }

    /// Has each volume of a group have its device. Error: what has none is as before.
    pub fn activate(&self, group: &GroupName) -> Result<(), DriverError> {
        let done = self.change(group, &Change::Activate);
        // To nothing the tool says that all of it is active.
        if fs::symlink_metadata(Path::new(SYSFS).join("class/misc/device-mapper")).is_err() {
            return Err(DriverError::Unsupported(format!(
                "volume group '{group}' cannot be activated: this host's kernel has no device mapper; load it ('modprobe dm_mod'), \
                 or use a kernel that has it"
            )));
        }
        done
    }
}

fn run(arguments: &[String], stop: &Stop, writes: bool) -> Result<String, DriverError> {
    stop.check()?;
    let mut command = Command::new("lvm");
    command.args(&arguments[..1]);
    if fs::symlink_metadata(UDEV).is_err() {
        command.args(["--config", WITHOUT_UDEV]);
    }
    command.args(&arguments[1..]).env("LC_ALL", "C").env("LVM_SUPPRESS_FD_WARNINGS", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    tame(&mut command, None, BOUNDS);
    let missing = "lvm is not installed (Debian has it in lvm2)";
    let done = apart::without(|| finish(&mut command, stop, writes)).map_err(|e| not_run("lvm", missing, e))?;
    stop.check()?;
    match done.status.success() {
        true => Ok(String::from_utf8_lossy(&done.stdout).into_owned()),
        false => Err(refusal(&arguments[0], &String::from_utf8_lossy(&done.stderr))),
    }
}

/// What the tool said when it failed, in one line.
fn refusal(what: &str, words: &str) -> DriverError {
    let lines: Vec<&str> = words.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let text = format!("lvm {what}: {}", lines.join(" "));
    let full = ["insufficient free space", "Insufficient free space", "insufficient suitable"];
    match full.iter().any(|sign| words.contains(sign)) {
        true => DriverError::NoSpace(text),
        false if words.contains("in use") => DriverError::Refused(text),
        false => DriverError::Storage(text),
    }
}

/// Whether the tool failed as there is no such group.
fn says_there_is_none(why: &str, group: &GroupName) -> bool {
    why.contains(&format!("Volume group \"{group}\" not found"))
}

type Row = HashMap<String, String>;

#[derive(Deserialize)]
struct Report {
    report: Vec<HashMap<String, Vec<Row>>>,
}

/// The rows of a report, of which each is of that kind.
fn rows(told: &str, kind: &str) -> Result<Vec<Row>, DriverError> {
    let read: Report = serde_json::from_str(told).map_err(|e| unread(&e.to_string()))?;
    Ok(read.report.into_iter().filter_map(|mut part| part.remove(kind)).flatten().collect())
}

fn unread(what: &str) -> DriverError {
    DriverError::Internal(format!("what lvm tells is not understood: {what}"))
}

fn text(row: &Row, field: &str) -> Result<String, DriverError> {
    row.get(field).cloned().ok_or_else(|| unread(&format!("{field} is missing")))
}

fn number(row: &Row, field: &str) -> Result<u64, DriverError> {
    let said = text(row, field)?;
    said.parse().map_err(|_| unread(&format!("{field} is '{said}'")))
}

fn read_groups(told: &str) -> Result<Vec<Group>, DriverError> {
    let read = |row: &Row| {
        Ok(Group {
            name: text(row, "vg_name")?,
            bytes: number(row, "vg_size")?,
            free: number(row, "vg_free")?,
            extent: number(row, "vg_extent_size")?,
            volumes: number(row, "lv_count")?,
        })
    };
    rows(told, "vg")?.iter().map(read).collect()
}

/// Those whose names LVM has for itself are none that anybody could use.
fn read_volumes(told: &str) -> Result<LogicalVolumes, DriverError> {
    let mut all = LogicalVolumes::default();
    for row in rows(told, "lv")? {
        let called = text(&row, "lv_name")?;
        let Ok(name) = LogicalName::new(&called) else {
            all.unnameable += u32::from(own_part(&called).is_none());
            continue;
        };
        let (size, layout, tags) = (number(&row, "lv_size")?, text(&row, "lv_layout")?, text(&row, "lv_tags")?);
        // LVM's own part of a cached one is in brackets.
        let origin = LogicalName::new(&text(&row, "origin")?).ok();
        let has = |word: &str| layout.split(',').any(|one| one == word);
        let percent: Option<f64> = text(&row, "data_percent")?.parse().ok();
        let is_thin = has("thin") && !has("pool");
        let taken = match percent.filter(|_| is_thin) {
            Some(percent) => (size as f64 / 100.0 * percent) as u64,
            None => size,
        };
        // Of a snapshot that is not thin the size is that of what it keeps for itself.
        let bytes = if origin.is_some() && !is_thin { number(&row, "origin_size")? } else { size };
        all.volumes.push(LogicalVolume {
            name,
            key: text(&row, "lv_uuid")?,
            bytes,
            taken,
            is_active: text(&row, "lv_active")? == "active",
            is_pool: has("pool"),
            is_thin,
            origin,
            is_unfinished: tags.split(',').any(|tag| tag == UNFINISHED),
            grown_from: tags.split(',').find_map(|tag| tag.strip_prefix(GROWN_FROM)?.parse().ok()),
        });
    }
    Ok(all)
}

fn read_devices(told: &str) -> Result<Vec<PhysicalVolume>, DriverError> {
    let read = |row: &Row| {
        let group = Some(text(row, "vg_name")?).filter(|group| !group.is_empty());
        Ok(PhysicalVolume { device: text(row, "pv_name")?.into(), group })
    };
    let all: Result<Vec<_>, DriverError> = rows(told, "pv")?.iter().map(read).collect();
    // One that is lost has a word for a path.
    Ok(all?.into_iter().filter(|one| one.device.is_absolute()).collect())
}

impl LogicalVolume {
    /// Which volume it is, whatever it is called: of its uuid's 32 signs, of 64 kinds each, as many as numbers hold.
    pub fn id(&self) -> FileId {
        const SIGNS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ!#";
        let place = |sign: u8| SIGNS.iter().position(|known| *known == sign).unwrap_or_default() as u64;
        let mut places = self.key.bytes().filter(|sign| *sign != b'-').map(place);
        let mut ten = || places.by_ref().take(10).fold(0, |all, place| all << 6 | place);
        FileId { number: ten(), born: ten() }
    }
}

#[cfg(test)]
#[path = "lvm_tests.rs"]
mod tests;
