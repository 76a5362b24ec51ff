//! What a machine keeps beside disks and memory: the firmware's variables, the TPM's state.

use super::super::command::tpm_state_of;
use super::super::make;
use crate::host::files::{Folder, Plain};
use crate::host::resolve::{Found, Place};
use rustix::fs::FileType;
use std::fs::Permissions;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

/// Files in a folder that is copied; the TPM's has a handful.
const MOST: usize = 256;

/// The file of the firmware's variables, and its format.
pub fn variables(def: &DomainDef) -> impl Iterator<Item = (PathBuf, String)> {
    let nvram = def.os.nvram.as_ref().filter(|_| def.os.loader.as_ref().is_some_and(|loader| loader.path.is_some()));
    let found = nvram.and_then(|nvram| {
        Some((PathBuf::from(nvram.path.as_ref()?), nvram.format.clone().unwrap_or_else(|| "raw".to_owned())))
    });
    found.into_iter()
}

/// The folder of the TPM's state.
pub fn tpm(def: &DomainDef, state_dir: &Path) -> Option<PathBuf> {
    tpm_state_of(def, state_dir)
}

/// Copies a file, or a folder of files, in place of what is at `to`; owner and mode go with it. In one step for a file.
/// `wary`: as root among others, who may own parts of the way.
pub fn copy(from: &Path, to: &Path, wary: bool) -> Result<(), DriverError> {
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            DriverError::NoSpace(format!("{}: {e}", to.display()))
        }
        _ => DriverError::Storage(format!("cannot copy {} to {}: {e}", from.display(), to.display())),
    };
    let copied = Found::resolve(from).and_then(|found| match found.kind() {
        FileType::Directory => copy_folder(&found.folder()?, to, wary),
        _ => copy_into(found.plain(wary)?, &Place::resolve(to, wary)?),
    });
    copied.map_err(failed)
}

fn copy_folder(from: &Folder, to: &Path, wary: bool) -> io::Result<()> {
    let data = from.stat()?;
    let mut new = to.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    make::remove(&new, wary).map_err(io::Error::other)?;
    let (place, target) = (Place::resolve(&new, wary)?, Place::resolve(to, wary)?);
    let folder = place.make_folder(0o700)?;
    for name in from.names(MOST)? {
        let entry = from.place(&name)?;
        // Locks and sockets are no state.
        let plain = FileType::from_raw_mode(entry.stat()?.st_mode) == FileType::RegularFile;
        if plain && !name.as_bytes().starts_with(b".") {
            copy_into(entry.open_plain()?, &folder.place(&name)?)?;
        }
    }
    folder.set_mode(data.st_mode & 0o777)?;
    folder.give(data.st_uid, data.st_gid)?;
    make::remove(to, wary).map_err(io::Error::other)?;
    place.rename_to(&target)
}

/// Copies an open file to a place, with its owner and mode.
fn copy_into(mut from: Plain, to: &Place) -> io::Result<()> {
    let (uid, gid, mode) = (from.stat().st_uid, from.stat().st_gid, from.stat().st_mode & 0o777);
    make::replace(to, |new| {
        io::copy(&mut from, new)?;
        new.set_permissions(Permissions::from_mode(mode))?;
        fchown(&*new, Some(uid), Some(gid))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_copy_goes_through_no_link_that_lies_in_its_way() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("vars"), "variables").unwrap();
        fs::write(at("precious"), "precious").unwrap();
        for name in ["copy", "copy.new"] {
            std::os::unix::fs::symlink(at("precious"), at(name)).unwrap();
        }
        copy(&at("vars"), &at("copy"), true).unwrap();
        assert_eq!(fs::read_to_string(at("precious")).unwrap(), "precious");
        assert_eq!(fs::read_to_string(at("copy")).unwrap(), "variables");
        assert!(!fs::symlink_metadata(at("copy")).unwrap().is_symlink());
    }

    #[test]
    fn a_folder_is_copied_with_its_files_in_place_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["tpm", "elsewhere", "copy", "precious"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("tpm/state"), "state").unwrap();
        fs::write(at("tpm/.lock"), "").unwrap();
        fs::write(at("copy/old"), "").unwrap();
        std::os::unix::fs::symlink(at("precious"), at("copy.new")).unwrap();
        copy(&at("tpm"), &at("copy"), true).unwrap();
        let found: Vec<_> = fs::read_dir(at("copy")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(found, ["state"]);
        assert_eq!(fs::read_dir(at("precious")).unwrap().count(), 0);
    }
}
