//! What a machine keeps beside disks and memory: the firmware's variables, the TPM's state.

use super::super::command::tpm_state_of;
use super::super::make;
use crate::host::acl::through;
use crate::host::resolve::Place;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

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
    let is_dir = fs::symlink_metadata(from).map_err(failed)?.is_dir();
    if is_dir { copy_folder(from, to, wary) } else { copy_file(from, to, wary) }.map_err(failed)
}

fn copy_folder(from: &Path, to: &Path, wary: bool) -> io::Result<()> {
    let data = fs::symlink_metadata(from)?;
    let mut new = to.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    make::remove(&new, wary).map_err(io::Error::other)?;
    let (place, target) = (Place::resolve(&new, wary)?, Place::resolve(to, wary)?);
    fs::create_dir(place.path())?;
    // Whatever its name comes to mean, this is the one.
    let folder =
        fs::File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(place.path())?;
    let inside = through(&folder);
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        // Locks and sockets are no state.
        if entry.file_type()?.is_file() && !entry.file_name().to_string_lossy().starts_with('.') {
            copy_into(&entry.path(), &inside, &inside.join(entry.file_name()), wary)?;
        }
    }
    folder.set_permissions(fs::Permissions::from_mode(data.mode() & 0o777))?;
    fchown(&folder, Some(data.uid()), Some(data.gid()))?;
    make::remove(to, wary).map_err(io::Error::other)?;
    fs::rename(place.path(), target.path())
}

fn copy_file(from: &Path, to: &Path, wary: bool) -> io::Result<()> {
    let place = Place::resolve(to, wary)?;
    copy_into(from, &place.dir(), &place.path(), wary)
}

/// The same where the folder is held.
fn copy_into(from: &Path, folder: &Path, to: &Path, wary: bool) -> io::Result<()> {
    let mut source = make::open_plain(from, wary)?;
    let data = source.metadata()?;
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    io::copy(&mut source, new.as_file_mut())?;
    new.as_file().set_permissions(fs::Permissions::from_mode(data.mode() & 0o777))?;
    fchown(new.as_file(), Some(data.uid()), Some(data.gid()))?;
    new.as_file().sync_all()?;
    new.persist(to)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
