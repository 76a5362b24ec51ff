//! Files that snapshots are made of: where they may be, whether there is room, and how they come to be.

use super::super::make;
use super::cannot;
use crate::host::resolve::Place;
use crate::host::user::RunAs;
use std::fs::File;
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use virt_model::driver::DriverError;

/// What must be free beside what is counted, in bytes.
pub const RESERVE: u64 = 16 << 20;

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

/// It is complete: on disk, and under its name.
pub fn finished(part: &Path, path: &Path, wary: bool) -> Result<(), DriverError> {
    let done = || {
        let (from, to) = (Place::resolve(part, wary)?, Place::resolve(path, wary)?);
        File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(from.path())?.sync_all()?;
        std::fs::rename(from.path(), to.path())?;
        File::open(to.dir())?.sync_all()
    };
    done().map_err(|e: io::Error| stored(path, &e))
}

/// An empty file of QEMU's user, where nothing is, or an empty file.
pub fn make_empty(path: &Path, user: Option<&RunAs>) -> Result<(), DriverError> {
    let made = make::new_file(path, user.is_some()).and_then(|file| match user {
        Some(user) => {
            file.set_permissions(std::fs::Permissions::from_mode(0o640))?;
            fchown(&file, Some(user.uid), Some(user.gid))
        }
        None => file.set_permissions(std::fs::Permissions::from_mode(0o644)),
    });
    match made {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && is_empty(path, user.is_some()) => Ok(()),
        made => made.map_err(|e| stored(path, &e)),
    }
}

fn is_empty(path: &Path, wary: bool) -> bool {
    let there = Place::resolve(path, wary).and_then(|place| std::fs::symlink_metadata(place.path()));
    there.is_ok_and(|data| data.is_file() && data.len() == 0)
}
