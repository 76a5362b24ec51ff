//! Files that snapshots are made of: where they may be, whether there is room, and how they come to be.

use super::super::make;
use super::note::{Part, Record};
use super::revert::record_of;
use super::{Operation, cannot, parts};
use crate::host::resolve::Place;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{Kept, MemoryMode};

/// About what an overlay takes in which nothing has been written, in bytes.
pub const OVERLAY: u64 = 200 << 10;
/// What must be free beside what is counted, in bytes.
pub const RESERVE: u64 = 16 << 20;

/// How a file of QEMU's memory begins.
const MAGIC: &[u8; 4] = b"QEVM";

/// Records may have been restored by anybody, from a document that says what it likes. What they tell of files is held to
/// what we would have made ourselves before root reads, replaces or removes one of them.
impl Operation {
    /// Where a part of the machine is copied to.
    pub(super) fn copy_place(&self, name: &str, part: &str) -> PathBuf {
        self.machine.folder.join(format!("{name}.{part}"))
    }

    /// What was kept with a snapshot, without copies that are not ours.
    pub(super) fn record_of(&self, snapshot: &Kept) -> Record {
        let mut record = record_of(snapshot);
        for (part, kept) in [("nvram", &mut record.nvram), ("tpm", &mut record.tpm)] {
            kept.take_if(|kept| !self.is_own(&snapshot.name, part, kept));
        }
        record
    }

    fn is_own(&self, name: &str, part: &str, kept: &Part) -> bool {
        !matches!(kept, Part::File(file) if *file != self.copy_place(name, part))
    }

    /// Whether what was copied is there, and whether it can be put back.
    pub(super) fn check_copies(&self, snapshot: &Kept) -> Result<(), DriverError> {
        let record = record_of(snapshot);
        for (part, kept) in [("nvram", &record.nvram), ("tpm", &record.tpm)] {
            let Some(kept @ Part::File(file)) = kept else { continue };
            let shown = file.display();
            if !self.is_own(&snapshot.name, part, kept) {
                let place = self.copy_place(&snapshot.name, part);
                return Err(DriverError::Storage(format!(
                    "{shown} is not where copies are kept; bring it to {}, and restore the snapshot's record with that",
                    place.display()
                )));
            }
            if !file.exists() {
                return Err(DriverError::Storage(format!("{shown}: what was copied is not there any more")));
            }
        }
        for (_, original) in self.copied_parts(snapshot, &record) {
            if !self.may_replace(&original) {
                let original = original.display();
                return Err(DriverError::Refused(format!(
                    "{original} is in the way of what was copied, and is neither this machine's nor of QEMU's user; \
                     move it away"
                )));
            }
        }
        Ok(())
    }

    /// Nothing is there, or something of this machine's, or of QEMU's user.
    fn may_replace(&self, original: &Path) -> bool {
        let def = &self.machine.def;
        let mut own = parts::variables(def).map(|(path, _)| path).chain(parts::tpm(def, &self.state_dir));
        let Some((user, _)) = &self.images.user else { return true };
        match std::fs::symlink_metadata(original) {
            Ok(data) => [user.uid, user.common].contains(&data.uid()) || own.any(|own| own == original),
            Err(_) => true,
        }
    }

    /// What goes with a snapshot beside its disks.
    pub(super) fn leavings(&self, snapshot: &Kept) -> Vec<PathBuf> {
        let record = self.record_of(snapshot);
        let memory = match &snapshot.memory {
            MemoryMode::External(file) => Some(file.clone()).filter(|file| self.memory_at(file, None).is_ok()),
            _ => None,
        };
        let copies = [record.nvram, record.tpm].into_iter().flatten().filter_map(|part| match part {
            Part::File(file) => Some(file),
            _ => None,
        });
        memory.into_iter().chain(copies).filter(|file| file.exists()).collect()
    }

    /// Holds a file to be one that memory was written to, all of it where it is known how much that was.
    pub(super) fn memory_at(&self, file: &Path, bytes: Option<u64>) -> Result<(), DriverError> {
        let read = || -> io::Result<([u8; 4], u64)> {
            let (mut opened, mut magic) = (make::open_plain(file, self.images.user.is_some())?, [0; 4]);
            opened.read_exact(&mut magic)?;
            Ok((magic, opened.metadata()?.len()))
        };
        let (magic, length) = read().map_err(|e| stored(file, &e))?;
        let shown = file.display();
        match bytes {
            _ if magic != *MAGIC => Err(DriverError::Storage(format!("{shown} holds no memory"))),
            Some(bytes) if bytes != length => Err(DriverError::Storage(format!(
                "{shown} has {length} bytes, and {bytes} were written; bring back the whole file"
            ))),
            _ => Ok(()),
        }
    }

    /// Removes files that are of no use to anybody; says so where that fails. A folder only where our copies are.
    pub(super) async fn remove_files(&self, files: Vec<PathBuf>) {
        let folder = self.machine.folder.clone();
        let removed = self.with_images(move |images| {
            let wary = images.user.is_some();
            for file in files {
                let ours = file.parent() == Some(&folder);
                let removed = if ours { make::remove(&file, wary) } else { make::remove_file(&file, wary) };
                if let Err(error) = removed {
                    tracing::warn!(%error, "a file of no use is still there");
                }
            }
            Ok(())
        });
        if let Err(error) = removed.await {
            tracing::warn!(%error, "files of no use are still there");
        }
    }
}

/// A file that is to be made: nothing is there, or nothing in it, and its folder is.
pub fn check_free_place(path: &Path, what: &str) -> Result<(), DriverError> {
    match std::fs::metadata(path) {
        Ok(data) if data.is_file() && data.len() == 0 => Ok(()),
        Ok(_) => Err(cannot(format!("{what}: {} is there already; choose another file", path.display()))),
        Err(_) => match path.parent().map(std::fs::metadata) {
            Some(Ok(folder)) if folder.is_dir() => Ok(()),
            _ => Err(cannot(format!("{what}: {} is in a folder that is not there", path.display()))),
        },
    }
}

/// Refuses what would not fit.
pub fn check_space(path: &Path, bytes: u64) -> Result<(), DriverError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let Ok(room) = rustix::fs::statvfs(folder) else { return Ok(()) };
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    if free >= bytes {
        return Ok(());
    }
    Err(DriverError::NoSpace(format!(
        "{}: {} MiB are free there, and at least {} MiB are needed",
        folder.display(),
        free >> 20,
        bytes >> 20
    )))
}

/// Where a file is made that becomes `path` when it is complete: a name that nothing has.
pub fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".virtd-{}", Uuid::new_v4()));
    path.with_file_name(name)
}

/// Why a file cannot be made.
pub fn stored(path: &Path, error: &io::Error) -> DriverError {
    DriverError::Storage(format!("{}: {error}", path.display()))
}

/// It is complete: on disk, and under its name. How long it is.
pub fn finished(part: &Path, path: &Path, wary: bool) -> Result<u64, DriverError> {
    let done = || {
        let (from, to) = (Place::resolve(part, wary)?, Place::resolve(path, wary)?);
        let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(from.path())?;
        file.sync_all()?;
        std::fs::rename(from.path(), to.path())?;
        File::open(to.dir())?.sync_all()?;
        Ok(file.metadata()?.len())
    };
    done().map_err(|e: io::Error| stored(path, &e))
}

/// An empty file, where nothing is, or an empty file. Its owner is whose the base is, and not QEMU's user: what an image
/// names to stand on counts as chosen by its owner.
pub fn make_empty(path: &Path, base: &Path, wary: bool) -> Result<(), DriverError> {
    let made = make::new_file(path, wary).and_then(|file| match wary {
        true => {
            let base = std::fs::metadata(base)?;
            fchown(&file, Some(base.uid()), Some(base.gid()))
        }
        false => Ok(()),
    });
    match made {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && is_empty(path, wary) => Ok(()),
        made => made.map_err(|e| stored(path, &e)),
    }
}

fn is_empty(path: &Path, wary: bool) -> bool {
    let there = Place::resolve(path, wary).and_then(|place| std::fs::symlink_metadata(place.path()));
    there.is_ok_and(|data| data.is_file() && data.len() == 0)
}
