//! What can be seen to be wrong from the document of a pool or volume alone.

use super::pool::{PoolDef, PoolKind};
use super::volume::VolumeDef;
use crate::domain::value::complain;
use crate::xml::{self, Finding, Place, shorten};

/// The longest name of a file.
const MAX_NAME: usize = 255;
/// How names begin of what virtd is making in a folder; such a file is no volume.
pub const UNFINISHED: &str = ".virt-new-";

type Log = Vec<Finding>;

/// What a kind of pool is made of.
struct Needs {
    kind: PoolKind,
    /// It comes from a server.
    host: bool,
    /// It comes from a device.
    device: bool,
    /// It comes from a folder of a server's.
    dir: bool,
    /// It is somewhere on this host.
    target: bool,
    /// What the thing that it comes from can be; nothing is said of it otherwise.
    formats: &'static [&'static str],
}

const PLAIN: Needs = Needs { kind: PoolKind::Dir, host: false, device: false, dir: false, target: false, formats: &[] };

/// A row for each kind.
const NEEDS: &[Needs] = &[
    Needs { target: true, ..PLAIN },
    Needs {
        kind: PoolKind::Fs,
        device: true,
        target: true,
        formats: &[
            "auto", "ext2", "ext3", "ext4", "ufs", "iso9660", "udf", "gfs", "gfs2", "vfat", "hfs+", "xfs", "ocfs2",
            "vmfs", "btrfs",
        ],
        ..PLAIN
    },
    Needs {
        kind: PoolKind::Netfs,
        host: true,
        dir: true,
        target: true,
        formats: &["auto", "nfs", "glusterfs", "cifs"],
        ..PLAIN
    },
    Needs { kind: PoolKind::Logical, formats: &["unknown", "lvm2"], ..PLAIN },
    Needs {
        kind: PoolKind::Disk,
        device: true,
        formats: &["unknown", "dos", "dvh", "gpt", "mac", "bsd", "pc98", "sun", "lvm2"],
        ..PLAIN
    },
    Needs { kind: PoolKind::Iscsi, host: true, device: true, target: true, ..PLAIN },
    Needs { kind: PoolKind::IscsiDirect, host: true, device: true, ..PLAIN },
    Needs { kind: PoolKind::Scsi, target: true, ..PLAIN },
    Needs { kind: PoolKind::Mpath, ..PLAIN },
    Needs { kind: PoolKind::Rbd, host: true, ..PLAIN },
    Needs { kind: PoolKind::Sheepdog, host: true, ..PLAIN },
    Needs { kind: PoolKind::Gluster, host: true, ..PLAIN },
    Needs { kind: PoolKind::Zfs, ..PLAIN },
    Needs { kind: PoolKind::Vstorage, target: true, ..PLAIN },
];

/// The formats that a pool of that kind can come from.
pub fn source_formats(kind: PoolKind) -> &'static [&'static str] {
    needs(kind).formats
}

fn needs(kind: PoolKind) -> &'static Needs {
    NEEDS.iter().find(|row| row.kind == kind).unwrap_or(&PLAIN)
}

/// Finds all of it in a pool.
pub(super) fn check_pool(def: &PoolDef, log: &mut Log) {
    check_name("pool", &def.name, &def.at, log);
    let needs = needs(def.kind);
    check_source(def, needs, log);
    check_target(def, needs, log);
    if def.kind != PoolKind::Rbd && def.rest.child("rbd:config_opts").is_some() {
        refuse_child(def, "rbd:config_opts", log);
    }
    if !matches!(def.kind, PoolKind::Fs | PoolKind::Netfs) && def.rest.child("fs:mount_opts").is_some() {
        refuse_child(def, "fs:mount_opts", log);
    }
}

fn refuse_child(def: &PoolDef, name: &str, log: &mut Log) {
    let at = def.rest.child(name).map_or_else(|| def.at.clone(), |element| element.at.clone());
    complain(log, &at, format!("a pool of type '{}' has no <{name}>", def.kind));
}

fn check_source(def: &PoolDef, needs: &Needs, log: &mut Log) {
    let at = def.source.as_ref().map_or_else(|| def.at.child("source"), |source| source.at.clone());
    let mut missing = |is_needed: bool, is_there: bool, what: &str| {
        if is_needed && !is_there {
            complain(log, &at, format!("a pool of type '{}' needs a {what} in its <source>", def.kind));
        }
    };
    let source = def.source.as_ref();
    missing(needs.host, source.is_some_and(|source| !source.hosts.is_empty()), "<host name='…'/>");
    missing(needs.device, source.is_some_and(|source| !source.devices.is_empty()), "<device path='…'/>");
    missing(needs.dir, source.is_some_and(|source| source.dir.is_some()), "<dir path='…'/>");
    let initiator = source.is_some_and(|source| source.initiator.is_some());
    missing(def.kind == PoolKind::IscsiDirect, initiator, "<initiator><iqn name='…'/></initiator>");
    missing(def.kind == PoolKind::Scsi, source.is_some_and(|source| source.adapter.is_some()), "<adapter>");
    let Some(format) = source.and_then(|source| source.format.as_ref()) else { return };
    let known = source_formats(def.kind);
    if known.is_empty() {
        complain(log, &format.at, format!("a pool of type '{}' has no <format> in its <source>", def.kind));
    } else if !known.contains(&&*format.kind) {
        let message = format!("'{}' is not one of {}", shorten(&format.kind), known.join(", "));
        complain(log, &format.at.attribute("type"), message);
    }
}

fn check_target(def: &PoolDef, needs: &Needs, log: &mut Log) {
    let at = def.target.as_ref().map_or_else(|| def.at.child("target"), |target| target.at.clone());
    match def.target_path() {
        None if needs.target => {
            complain(log, &at, format!("a pool of type '{}' needs a <path> in its <target>", def.kind));
        }
        Some(path) => check_path(&path, said_path(def), &at.child("path"), log),
        None => {}
    }
}

/// The path as the document has it.
fn said_path(def: &PoolDef) -> &str {
    def.target.as_ref().and_then(|target| target.path.as_deref()).unwrap_or("/")
}

fn check_path(path: &str, said: &str, at: &Place, log: &mut Log) {
    if !said.trim().starts_with('/') {
        complain(log, at, format!("'{}' is no absolute path", shorten(said)));
    } else if path.split('/').any(|part| part == "..") {
        complain(log, at, format!("'{}' goes up by '..': name the folder itself", shorten(said)));
    } else if path == "/" {
        complain(log, at, "the root of all files is no place for a pool");
    } else if path.chars().any(char::is_control) {
        complain(log, at, "a path has no control characters");
    }
}

/// Finds all of it in a volume that is to be made.
pub(super) fn check_volume(def: &VolumeDef, log: &mut Log) {
    if let Err(why) = check_volume_name(&def.name) {
        complain(log, &def.at.child("name"), why);
    }
    let Some(target) = &def.target else { return };
    if target.compat.as_deref().is_some_and(|compat| !matches!(compat, "0.10" | "1.1")) {
        complain(log, &target.at.child("compat"), "it is one of 0.10, 1.1");
    }
    let cluster = target.cluster_size.map_or(1 << 16, |size| size.0);
    if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
        complain(log, &target.at.child("clusterSize"), "it is a power of two, from 512 bytes to 2 MiB");
    }
    if target.permissions.as_ref().and_then(|given| given.mode).is_some_and(|mode| mode.0 > 0o777) {
        let message = "it is at most 0777: whoever runs a volume runs it with no more than their own rights";
        complain(log, &target.at.child("permissions").child("mode"), message);
    }
    for (field, id) in target.permissions.iter().flat_map(|given| [("owner", given.owner), ("group", given.group)]) {
        if id.is_some_and(|id| id != -1 && u32::try_from(id).is_err()) {
            complain(log, &target.at.child("permissions").child(field), "it is the number of a user or group, or -1");
        }
    }
}

fn check_name(kind: &str, name: &str, at: &Place, log: &mut Log) {
    let at = at.child("name");
    if name.trim().is_empty() {
        complain(log, &at, format!("a {kind} needs a name"));
    } else if name.contains('/') || name.chars().any(char::is_control) || matches!(name, "." | "..") {
        complain(log, &at, format!("'{}' cannot be a name: no '/', no control characters", shorten(name)));
    } else if name.len() > MAX_NAME {
        complain(log, &at, format!("the name has {} bytes, more than {MAX_NAME}", name.len()));
    }
}

/// Whether NFS has called a file so that was removed while it is open: it goes when it is closed, and is no volume.
pub fn is_left_by_nfs(name: &str) -> bool {
    let number = name.strip_prefix(".nfs");
    number.is_some_and(|number| number.len() == 24 && number.bytes().all(|digit| digit.is_ascii_hexdigit()))
}

/// Whether a volume can be called that, in a pool of files as in any other. The error is a sentence.
pub fn check_volume_name(name: &str) -> Result<(), String> {
    let mut log = Vec::new();
    check_name("volume", name, &Place::default(), &mut log);
    if let Some(finding) = log.pop() {
        return Err(finding.message);
    }
    if name.starts_with(UNFINISHED) {
        return Err(format!("names that begin with {UNFINISHED} are virtd's own"));
    }
    if is_left_by_nfs(name) {
        let text = "'.nfs' and 24 hexadecimal digits are what NFS calls a file that was removed while it is open, which is never \
                    listed: choose another name";
        return Err(text.to_owned());
    }
    xml::check_new_name(name).map_err(|why| format!("the name '{}' of a volume {why}", shorten(name)))
}
