//! Makes and removes what volumes are to be in: a folder, and for pools on devices a file system to be mounted there.

use super::mounts::{Device, FILE_SYSTEMS, said_type};
use super::{draft, failed};
use crate::host::files::{Folder, Seen, What};
use crate::host::image::Images;
use crate::host::mkfs::make_file_system;
use crate::host::recognise::Signs;
use crate::host::resolve::Place;
use crate::host::workers::Stop;
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use virt_model::driver::DriverError;
use virt_model::storage::pool::PoolDef;

/// Makes the folder, if it is not there, as its definition says; one that is there stays as it is.
pub fn folder(path: &Path, def: &PoolDef, wary: bool) -> io::Result<()> {
    match Seen::at(path).what {
        What::Folder => return Ok(()),
        What::Nothing => {}
        _ => return Err(io::Error::new(io::ErrorKind::NotADirectory, "what is there is no folder")),
    }
    if let Some(above) = path.parent() {
        Place::make_folders(above, wary)?;
    }
    let place = Place::resolve(path, wary)?;
    dress(&place.make_folder(0o700)?, def)?;
    place.sync_folder()
}

/// Gives a folder in which nothing is what its definition says of it.
pub fn dress(folder: &Folder, def: &PoolDef) -> io::Result<()> {
    let wanted = def.target.as_ref().and_then(|target| target.permissions.as_ref());
    let mode = wanted.and_then(|wanted| wanted.mode).map_or(0o711, |mode| mode.0);
    if def.features.as_ref().and_then(|features| features.cow.as_ref()).and_then(|cow| cow.state) == Some(false) {
        draft::without_copies(folder)?;
    }
    draft::give(folder, wanted.and_then(|wanted| wanted.owner()), wanted.and_then(|wanted| wanted.group()))?;
    folder.set_mode(mode)
}

/// A device on which a file system is to be made.
pub struct BuildSite {
    device: Device,
    source: PathBuf,
    kind: String,
    /// How long it is, in bytes.
    pub length: u64,
}

impl BuildSite {
    /// Looks whether a file system can be made on a pool's device: nothing of the host's uses it, and without `overwrite` nothing is on
    /// it. Nothing is changed. Blocks.
    pub fn judge(
        def: &PoolDef,
        overwrite: bool,
        images: impl FnOnce() -> Result<Images, DriverError>,
    ) -> Result<BuildSite, DriverError> {
        let source = PathBuf::from(def.mounted_device().unwrap_or_default());
        let shown = source.display();
        let Some(kind) = said_type(def) else {
            let known = FILE_SYSTEMS.join(", ");
            return Err(DriverError::Argument(format!(
                "{shown}: say in the pool's <source><format type='…'/> which file system is to be made: {known}"
            )));
        };
        let device = Device::at(&source).map_err(|e| failed("open", &source, &e))?;
        let mut file = refuse_what_is_on(&device, &source, overwrite, images)?;
        let length = file.seek(SeekFrom::End(0)).map_err(|e| failed("read", &source, &e))?;
        Ok(BuildSite { device, kind: kind.to_owned(), length, source })
    }

    /// Makes the file system, with the owner and mode that the definition says. Blocks.
    pub fn make(&self, def: &PoolDef, stop: &Stop) -> Result<(), DriverError> {
        make_file_system(&self.kind, self.device.real(), stop)?;
        let dressed = self.device.root_folder(&self.kind).and_then(|root| dress(&root, def));
        dressed.map_err(|e| failed("set the owner and mode of what is on", &self.source, &e))
    }
}

/// Refuses a device that the host uses, and without `overwrite` one on which anything is. Returns it, open to be read while nobody of
/// the host's uses it. Blocks.
pub fn refuse_what_is_on(
    device: &Device,
    path: &Path,
    overwrite: bool,
    images: impl FnOnce() -> Result<Images, DriverError>,
) -> Result<File, DriverError> {
    let shown = path.display();
    let file = device.alone().map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => DriverError::Refused(format!(
            "{shown}: the host uses it: unmount it, or take it out of what it is a part of (lsblk tells)"
        )),
        _ => failed("open", path, &e),
    })?;
    let signs = if overwrite { Signs::Nothing } else { images()?.recognise(&file, path)? };
    refuse_signs(signs, path).map(|()| file)
}

/// Refuses what is on a device, unless that is nothing.
pub fn refuse_signs(signs: Signs, path: &Path) -> Result<(), DriverError> {
    let refuse = |what: String| Err(DriverError::Refused(format!("{}: {what}", path.display())));
    let replace = |what: &str| {
        refuse(format!("there is {what} on it: start the pool without building it, or say overwrite and lose that"))
    };
    match signs {
        Signs::Nothing => Ok(()),
        Signs::Unknown => refuse("something unknown is on it: say overwrite to replace that".to_owned()),
        Signs::FileSystem(what) | Signs::Other(what) => replace(&what),
        Signs::Table(format) => replace(&format!("a partition table ({format})")),
    }
}

/// Removes a folder in which nothing is.
pub fn remove_empty(path: &Path, wary: bool) -> io::Result<()> {
    let place = Place::resolve(path, wary)?;
    match rustix::fs::unlinkat(place.folder_fd(), place.name(), rustix::fs::AtFlags::REMOVEDIR) {
        Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(rustix::io::Errno::NOTEMPTY | rustix::io::Errno::EXIST) => {
            Err(io::Error::other("there are files in it: delete its volumes, and move away what else there is"))
        }
        Err(rustix::io::Errno::BUSY) => Err(io::Error::other("something is mounted on it: unmount that first")),
        removed => removed.map_err(io::Error::from).and_then(|()| place.sync_folder()),
    }
}
