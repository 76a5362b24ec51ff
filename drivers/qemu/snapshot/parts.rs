//! What a machine keeps beside disks and memory: the firmware's variables, the TPM's state.

use super::super::command::tpm_state_of;
use super::super::make;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
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
pub fn copy(from: &Path, to: &Path) -> Result<(), DriverError> {
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            DriverError::NoSpace(format!("{}: {e}", to.display()))
        }
        _ => DriverError::Storage(format!("cannot copy {} to {}: {e}", from.display(), to.display())),
    };
    let data = fs::symlink_metadata(from).map_err(failed)?;
    if !data.is_dir() {
        return copy_file(from, to).map_err(failed);
    }
    let new = with_suffix(to, ".new");
    make::remove(&new, false)?;
    let copied = || -> io::Result<()> {
        fs::create_dir(&new)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            // Locks and sockets are no state.
            if entry.file_type()?.is_file() && !entry.file_name().to_string_lossy().starts_with('.') {
                copy_file(&entry.path(), &new.join(entry.file_name()))?;
            }
        }
        fs::set_permissions(&new, fs::Permissions::from_mode(data.mode() & 0o777))?;
        chown(&new, Some(data.uid()), Some(data.gid()))
    };
    copied().map_err(failed)?;
    make::remove(to, false)?;
    fs::rename(&new, to).map_err(failed)
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let data = fs::symlink_metadata(from)?;
    if !data.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no plain file"));
    }
    let new = with_suffix(to, ".new");
    let mut source = fs::File::open(from)?;
    let mut target = fs::File::create(&new)?;
    io::copy(&mut source, &mut target)?;
    target.set_permissions(fs::Permissions::from_mode(data.mode() & 0o777))?;
    std::os::unix::fs::fchown(&target, Some(data.uid()), Some(data.gid()))?;
    target.sync_all()?;
    fs::rename(&new, to)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
