//! Images that clients have open themselves, and give to a guest by descriptor: QEMU has them by that alone, whoever may follow
//! their paths. Nothing is lent for them, and no path of theirs is opened.
//!
//! ```text
//!  client ──fd──▶ judged in a worker ──add-fd──▶ a set of QEMU's, of one file ◀── /dev/fdset/N ── the node of the storage
//!                     └─▶ fdgroup='N-rw' in what runs: another virtd knows the image by that
//! ```
//!
//! QEMU tells of each set which disk it is for, so that what is left of one is found whatever has been lost.

use super::format::known_format;
use super::instance::Body;
use super::qmp::COMMAND_TIMEOUT;
use crate::host::apart;
use crate::host::chain::{Header, is_of_format};
use crate::host::lock;
use crate::host::workers::{ClosedAside, Errand, Workers};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use uuid::Uuid;
use virt_model::device::Disk;
use virt_model::device::disk::{DiskDevice, DiskKind};
use virt_model::domain::DomainDef;
use virt_model::driver::{DriverError, GivenFile};

/// What is said of an image that a configuration would have by descriptor before its guest runs.
pub const NOT_STORED: &str =
    "is of images that clients give by descriptor to guests that run (AttachDevice, ChangeMedium): name a file";

/// What an image is in the guest's QEMU, as `fdgroup` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GivenImage {
    /// The number of its set.
    pub set: u32,
    /// Whether the descriptor may be written to.
    pub writable: bool,
}

impl GivenImage {
    /// One that QEMU does not have yet. QEMU reads the number as an int.
    pub fn new(writable: bool) -> GivenImage {
        GivenImage { set: Uuid::new_v4().as_u128() as u32 >> 2 | 1 << 30, writable }
    }

    /// What a disk of a running guest says.
    pub fn of(disk: &Disk) -> Option<GivenImage> {
        GivenImage::read(disk.source.as_ref()?.given.as_deref()?)
    }

    /// What `fdgroup` says.
    pub fn read(text: &str) -> Option<GivenImage> {
        let (set, mode) = text.split_once('-')?;
        Some(GivenImage { set: set.parse().ok()?, writable: mode == "rw" })
    }

    fn written(self) -> String {
        format!("{}-{}", self.set, if self.writable { "rw" } else { "ro" })
    }

    /// What QEMU opens.
    pub fn file_name(self) -> String {
        format!("/dev/fdset/{}", self.set)
    }
}

/// The definition as if all its images lay where it shows them: what can be said of it without looking at them is the same.
pub fn as_shown(def: &DomainDef) -> Cow<'_, DomainDef> {
    if !def.devices.disks.iter().any(Disk::is_given) {
        return Cow::Borrowed(def);
    }
    let mut def = def.clone();
    def.devices.disks.iter_mut().filter_map(|disk| disk.source.as_mut()).for_each(|source| source.given = None);
    Cow::Owned(def)
}

/// Judges an image for a disk, and gives it a name.
pub async fn judge(workers: &Workers, guest: Uuid, disk: &Disk, image: &Arc<GivenFile>) -> Result<String, DriverError> {
    let (disk, image) = (disk.clone(), image.clone());
    let errand = Errand::new(guest, format!("the image that was given for '{}'", disk.target.dev));
    workers.run(errand, move |_| judged(&disk, &image).map(GivenImage::written)).await
}

/// Blocks, where the file system does not answer without end.
fn judged(disk: &Disk, image: &GivenFile) -> Result<GivenImage, DriverError> {
    let target = &disk.target.dev;
    let refuse = |why: String| DriverError::Argument(format!("the descriptor for disk '{target}' {why}"));
    let failed = |error: &dyn std::fmt::Display| refuse(format!("cannot be looked at: {error}"));
    let format = disk.meant_format();
    let format = known_format(format).unwrap_or(format);
    if matches!(format, "vmdk" | "dmg") {
        let why = format!(
            "is of an image of format '{format}', which may name files of its own; convert it (qemu-img convert)"
        );
        return Err(refuse(why));
    }
    let flags = fcntl_getfl(image).map_err(|e| failed(&e))?;
    let mode = flags & OFlags::RWMODE;
    let read_only = disk.readonly || disk.device() == DiskDevice::Cdrom;
    if flags.contains(OFlags::PATH) || mode == OFlags::WRONLY {
        return Err(refuse(
            "cannot be read; open the image for reading, and for writing if the guest is to write".into(),
        ));
    }
    if mode == OFlags::RDONLY && !read_only {
        return Err(refuse("cannot be written to; open the image for writing, too, or say <readonly/>".into()));
    }
    let (wanted, what) = match disk.kind() {
        DiskKind::Block => (FileType::BlockDevice, "block device (type='block')"),
        _ => (FileType::RegularFile, "regular file (type='file')"),
    };
    let stat = fstat(image).map_err(|e| failed(&e))?;
    if FileType::from_raw_mode(stat.st_mode) != wanted {
        return Err(refuse(format!("is of no {what}")));
    }
    let file = copy(image).map_err(|e| failed(&e))?;
    let file = file.get().map_err(|e| failed(&e))?;
    if !is_of_format(file, format).map_err(|e| failed(&e))? {
        return Err(refuse(format!("is of no {format} image; correct the <driver type='…'>, or the file")));
    }
    let header = Header::of(file, format).map_err(|e| failed(&e))?;
    if let Some(name) = header.backing.as_ref().or(header.data.as_ref()) {
        let name: String = name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        return Err(refuse(format!(
            "is of an image that is not whole, but stands on another file ('{name}'): make it whole with 'qemu-img convert'"
        )));
    }
    let shared = disk.shareable;
    if !shared && lock::is_held(file, !read_only).map_err(|e| failed(&e))? {
        return Err(DriverError::Refused(format!(
            "the image that was given for disk '{target}' is open elsewhere: another machine has it, or a tool, or its \
             descriptor is that of a guest that was killed (open the image anew)"
        )));
    }
    Ok(GivenImage::new(mode == OFlags::RDWR))
}

/// Another descriptor of the file, which is closed as the files of guests are.
fn copy(image: &impl AsFd) -> std::io::Result<ClosedAside> {
    Ok(ClosedAside::of(File::from(apart::copy(image.as_fd())?)))
}

/// Gives QEMU an image that has been judged, for that disk. On failure it has none.
pub async fn hand_over(body: &Body, disk: &Disk, image: &GivenFile) -> Result<(), DriverError> {
    let lost = || DriverError::Internal(format!("the image that was given for '{}' is lost", disk.target.dev));
    let name = GivenImage::of(disk).ok_or_else(lost)?;
    let copy = copy(image).map_err(|e| DriverError::Storage(format!("a descriptor cannot be copied: {e}")))?;
    let arguments = json!({ "fdset-id": name.set, "opaque": whose(&disk.target.dev) });
    let given = body.monitor()?.execute_with("add-fd", arguments, vec![copy], COMMAND_TIMEOUT).await;
    if given.is_err() {
        take_back_this(body, Some(name)).await;
    }
    Ok(given.map(drop)?)
}

/// Has QEMU close what was given for a disk, but for `kept`. What a node has open goes with that.
pub async fn take_back(body: &Body, target: &str, kept: Option<GivenImage>) {
    let told = body.ask("query-fdsets", json!({})).await.unwrap_or_default();
    for set in sets_of(&told, target).into_iter().filter(|set| kept.is_none_or(|kept| kept.set != *set)) {
        if let Err(error) = body.ask("remove-fd", json!({ "fdset-id": set })).await {
            tracing::warn!(uuid = %body.uuid, target, %error, "an image that was given stays open until the guest ends");
        }
    }
}

/// Has QEMU close one of them, which came to nothing.
pub async fn take_back_this(body: &Body, image: Option<GivenImage>) {
    if let (Some(image), Ok(monitor)) = (image, body.monitor()) {
        monitor.tell("remove-fd", json!({ "fdset-id": image.set })).await;
    }
}

fn sets_of(told: &Value, target: &str) -> Vec<u32> {
    let whose = whose(target);
    let sets = told.as_array().into_iter().flatten();
    let sets = sets.filter(|set| set["fds"].as_array().is_some_and(|fds| fds.iter().any(|fd| fd["opaque"] == whose)));
    sets.filter_map(|set| set["fdset-id"].as_u64()?.try_into().ok()).collect()
}

/// What QEMU keeps beside a set.
pub fn whose(target: &str) -> String {
    format!("virtd: disk {target}")
}

#[cfg(test)]
#[path = "given_tests.rs"]
mod tests;
