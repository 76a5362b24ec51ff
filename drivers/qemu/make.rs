//! Files, folders and sockets that are made, or removed, where a definition says or for those that run a guest.
//!
//! virtd may be root here, and others may own parts of the way: each is found once and held ([`crate::host::files`]), and
//! nothing is given away, changed or removed by its path.

use super::plan::Nvram;
use crate::host::acl::through;
use crate::host::files::{Plain, Seen, What, open_plain};
use crate::host::image;
use crate::host::resolve::{Found, Place};
use crate::host::user::RunAs;
use crate::host::workers::Stop;
use rustix::fs::{FileType, fstat};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::fchown;
use std::path::Path;
use virt_model::driver::DriverError;

/// The largest template of firmware variables; those of real firmware have less than a megabyte.
const MAX_TEMPLATE: u64 = 64 << 20;

/// Makes an empty file for `user` (us, if `None`) to write to, where nothing is: behind its wall QEMU has no place to make it.
/// What is there is left as it is.
pub fn output(path: &Path, user: Option<&RunAs>) -> io::Result<()> {
    match Place::resolve(path, user.is_some())?.create(0o640) {
        Ok(file) => user.map_or(Ok(()), |user| fchown(&file, Some(user.uid), Some(user.gid))),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
    }
}

/// Makes a file, where nothing is, that only we may open. `wary`: as root among others.
pub fn new_file(path: &Path, wary: bool) -> io::Result<File> {
    // Where a link is, something is.
    Place::resolve(path, wary)?.create(0o600)
}

/// The same for an image that is to be used as one that is there, and so is its owner's: what an image names to stand on counts as
/// chosen by its owner, who is not QEMU's user.
/// Gives which file that is: the number of its file system, and its own there.
pub fn image_beside(path: &Path, like: &Path, wary: bool) -> io::Result<(u64, u64)> {
    let file = new_file(path, wary)?;
    if wary {
        let like = Found::resolve(like)?.stat;
        fchown(&file, Some(like.st_uid), Some(like.st_gid))?;
    }
    let made = fstat(&file)?;
    Ok((made.st_dev, made.st_ino))
}

/// An empty file without a name, in that folder of ours, for `user` (us, if `None`) to write to.
pub fn scratch(folder: &Path, user: Option<&RunAs>) -> io::Result<OwnedFd> {
    Place::make_folders(folder, user.is_some())?;
    let place = Place::resolve(&folder.join(format!("scratch-{}", uuid::Uuid::new_v4())), user.is_some())?;
    let file = place.create(0o600)?;
    place.remove_file()?;
    user.map_or(Ok(()), |user| fchown(&file, Some(user.uid), Some(user.gid)))?;
    Ok(file.into())
}

/// Makes a folder, where nothing is, that only `user` (we, if `None`) may enter; and the folders on the way to it.
pub fn folder(path: &Path, user: Option<&RunAs>) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        Place::make_folders(parent, user.is_some())?;
    }
    match Place::resolve(path, user.is_some())?.make_folder(0o700) {
        Ok(folder) => user.map_or(Ok(()), |user| folder.give(user.uid, user.gid)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && Seen::at(path).what == What::Folder => Ok(()),
        Err(e) => Err(e),
    }
}

/// The same, without what may be in it. What cannot be removed is put aside: it must not be in a guest's way for good.
pub fn empty_folder(path: &Path, user: Option<&RunAs>) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        Place::make_folders(parent, user.is_some())?;
    }
    let place = Place::resolve(path, user.is_some())?;
    match place.remove_all() {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            let aside = path.with_file_name(format!(".left-{}", uuid::Uuid::new_v4()));
            tracing::warn!(error = %e, "{} is put aside as {}", path.display(), aside.display());
            place.rename_to(&Place::resolve(&aside, user.is_some())?)?;
        }
        _ => {}
    }
    folder(path, user)
}

/// Makes the firmware's variables from their template, where they are not there or are to be made anew; not if it is told to
/// stop before.
pub fn variables(nvram: &Nvram, anew: bool, user: Option<&RunAs>, stop: &Stop) -> Result<(), DriverError> {
    let path = &nvram.path;
    let at_path = |e: io::Error| DriverError::Storage(format!("{}: {e}", path.display()));
    if let Some(why) = no_variables(path) {
        return Err(DriverError::Storage(why));
    }
    if !anew && Seen::at(path).is_there() {
        return Ok(());
    }
    let Some(template) = &nvram.template else {
        let path = path.display();
        return Err(DriverError::Storage(format!("{path}: there are no firmware variables and no template for them")));
    };
    let (template, template_format) = template;
    let from = open_template(template, user.is_some())
        .map_err(|e| DriverError::Storage(format!("{}: {e}", template.display())))?;
    match (&**template_format, &*nvram.format) {
        (from_format, format) if from_format == format => put(path, user, |to| copy(from, to)).map_err(at_path),
        ("raw", "qcow2") => {
            stop.check()?;
            put(path, user, |to| convert(from, to, user, stop)).map_err(at_path)
        }
        // An image that others may have made is not ours to read.
        (from_format, format) => Err(DriverError::Storage(format!(
            "{}: variables in {format} are not made from a template in {from_format}",
            path.display()
        ))),
    }
}

/// Why a guest's firmware variables cannot be at that path, if so: something else is there. Blocks.
pub fn no_variables(path: &Path) -> Option<String> {
    let other = match Seen::at(path).what {
        What::Nothing | What::Plain | What::Block => return None,
        What::Folder => "a folder",
        What::Other => "neither a plain file nor a block device",
    };
    Some(format!("{}: firmware variables are kept in a file, and this is {other}; name a file", path.display()))
}

/// Opens a template, which is a plain file of some size.
fn open_template(template: &Path, wary: bool) -> io::Result<Plain> {
    let file = open_plain(template, wary)?;
    match file.length() {
        0..=MAX_TEMPLATE => Ok(file),
        size => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{size} bytes are no firmware variables"))),
    }
}

/// Makes or replaces the file at `path` in one step, its content made by `fill`.
fn put(path: &Path, user: Option<&RunAs>, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        Place::make_folders(parent, user.is_some())?;
    }
    let place = Place::resolve(path, user.is_some())?;
    replace(&place, |new| {
        fill(new)?;
        user.map_or(Ok(()), |user| fchown(&*new, Some(user.uid), Some(user.gid)))
    })
}

/// Makes or replaces the file at a place in one step, its content and owner made by `fill`. Only a file or a link is
/// replaced.
pub fn replace(place: &Place, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    if let Ok(there) = place.stat()
        && !matches!(FileType::from_raw_mode(there.st_mode), FileType::RegularFile | FileType::Symlink)
    {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no plain file is there"));
    }
    let folder = through(place.folder_fd());
    let mut new = tempfile::Builder::new().make_in(&folder, |path| {
        let name = path.file_name().unwrap_or_default();
        Place::in_folder(place.folder_fd().try_clone()?, name).create(0o600)
    })?;
    fill(new.as_file_mut())?;
    new.as_file().sync_all()?;
    new.persist(place.path())?;
    Ok(())
}

fn copy(from: Plain, to: &mut File) -> io::Result<()> {
    io::copy(&mut from.take(MAX_TEMPLATE), to).map(drop)
}

/// Writes the raw image `from` as qcow2, by a program that has the rights of `user`: of the template it gets what is in it.
fn convert(from: Plain, to: &mut File, user: Option<&RunAs>, stop: &Stop) -> io::Result<()> {
    let held = rustix::fs::memfd_create("template", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut held = File::from(held);
    copy(from, &mut held)?;
    user.map_or(Ok(()), |user| fchown(&*to, Some(user.uid), Some(user.gid)))?;
    image::convert(&held, to, user, stop)
}

/// Gives what was made another name, over what is there.
pub fn rename(from: &Path, to: &Path, wary: bool) -> Result<(), DriverError> {
    let renamed = Place::resolve(from, wary).and_then(|from| from.rename_to(&Place::resolve(to, wary)?));
    renamed.map_err(|e| DriverError::Storage(format!("{}: {e}", to.display())))
}

/// Removes a file, or a folder with all that is in it, if it is there; `wary` as in [`Place::resolve`].
pub fn remove(path: &Path, wary: bool) -> Result<(), DriverError> {
    gone(path, Place::resolve(path, wary).and_then(|place| place.remove_all()))
}

/// Removes all that is in a folder of ours, if it is there. On failure some of it is left.
pub fn empty(path: &Path, wary: bool) -> Result<(), DriverError> {
    gone(path, Place::resolve(path, wary).and_then(|place| place.open_folder()?.empty()))
}

/// Removes a file, never a folder; what is not there is fine.
pub fn remove_file(path: &Path, wary: bool) -> Result<(), DriverError> {
    gone(path, Place::resolve(path, wary).and_then(|place| place.remove_file()))
}

/// Removes a plain file, or a link; leaves alone anything else that a definition may have named.
pub fn remove_plain(path: &Path, wary: bool) -> Result<(), DriverError> {
    let removed = Place::resolve(path, wary).and_then(|place| match FileType::from_raw_mode(place.stat()?.st_mode) {
        FileType::RegularFile | FileType::Symlink => place.remove_file(),
        _ => {
            tracing::warn!("{} is no plain file and is not removed", path.display());
            Ok(())
        }
    });
    gone(path, removed)
}

fn gone(path: &Path, removed: io::Result<()>) -> Result<(), DriverError> {
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(|e| DriverError::Storage(format!("{}: {e}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::listen::listen;

    #[test]
    fn a_raw_template_becomes_a_store_in_qcow2() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("template"), vec![7; 528 << 10]).unwrap();
        let store = |from: &str| {
            let template = Some((at("template"), from.to_owned()));
            variables(&Nvram { path: at("store"), format: "qcow2".to_owned(), template }, true, None, &Stop::default())
        };
        store("raw").unwrap();
        let content = std::fs::read(at("store")).unwrap();
        assert_eq!((&content[..4], &content[24..32]), (&b"QFI\xfb"[..], &(528_u64 << 10).to_be_bytes()[..]));
        let odd =
            Nvram { path: at("raw"), format: "raw".to_owned(), template: Some((at("store"), "qcow2".to_owned())) };
        assert!(
            variables(&odd, true, None, &Stop::default())
                .unwrap_err()
                .to_string()
                .contains("not made from a template in qcow2")
        );
    }

    /// The template may be root's alone, and so may the folder: the program that makes the store of it has the guest's rights.
    #[test]
    fn a_store_in_qcow2_belongs_to_the_guest_of_a_system() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let (true, Ok(nobody)) = (nix::unistd::geteuid().is_root(), RunAs::look_up("nobody", None, &[])) else {
            return eprintln!("SKIPPED: needs root and a user nobody");
        };
        let dir = tempfile::tempdir_in("/root").unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("template"), vec![7; 528 << 10]).unwrap();
        std::fs::set_permissions(at("template"), std::fs::Permissions::from_mode(0o600)).unwrap();
        let template = Some((at("template"), "raw".to_owned()));
        let nvram = Nvram { path: at("store"), format: "qcow2".to_owned(), template };
        variables(&nvram, true, Some(&nobody), &Stop::default()).unwrap();
        let store = std::fs::metadata(at("store")).unwrap();
        assert_eq!((store.uid(), store.gid(), store.mode() & 0o777), (nobody.uid, nobody.gid, 0o600));
        assert_eq!(std::fs::read(at("store")).unwrap()[..4], *b"QFI\xfb");
    }

    /// M7.
    #[test]
    fn a_folder_is_no_place_for_variables_and_is_not_removed_as_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("vars");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("precious"), "").unwrap();
        let nvram = Nvram { path: folder.clone(), format: "raw".to_owned(), template: None };
        for anew in [false, true] {
            let refused = variables(&nvram, anew, None, &Stop::default()).unwrap_err().to_string();
            assert!(refused.contains("this is a folder; name a file"), "{refused}");
        }
        assert!(remove_file(&folder, false).is_err());
        remove_plain(&folder, false).unwrap();
        assert!(folder.join("precious").exists());
        remove_plain(&folder.join("precious"), false).unwrap();
        assert!(!folder.join("precious").exists());
    }

    /// C3: the guest renames its socket away and puts a link to root's file there, again and again.
    #[test]
    fn a_socket_in_a_guests_folder_makes_the_guest_owner_of_nothing_else() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
        use std::sync::atomic::{AtomicBool, Ordering};
        let Ok(nobody) = RunAs::look_up("nobody", None, &[]) else {
            return eprintln!("SKIPPED: no user nobody");
        };
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let (own, secret) = (dir.path().join("qemu"), dir.path().join("secret"));
        std::fs::write(&secret, "").unwrap();
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o640)).unwrap();
        folder(&own, Some(&nobody)).unwrap();
        let (path, ended) = (own.join("sock"), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    // Whoever comes second finds the place taken.
                    let _ = std::fs::rename(&path, own.join("away"));
                    let _ = symlink(&secret, &path);
                    let _ = std::fs::remove_file(&path);
                }
            });
            let mut made = 0;
            while made < 200 {
                // A link may be in the way just now.
                made += usize::from(listen(&path, Some(&nobody)).is_ok());
            }
            ended.store(true, Ordering::Relaxed);
        });
        let data = std::fs::metadata(&secret).unwrap();
        assert_eq!((data.uid(), data.mode() & 0o7777), (0, 0o640));
        let _ = std::fs::remove_file(&path);
        listen(&path, Some(&nobody)).unwrap();
        let data = std::fs::metadata(&path).unwrap();
        assert_eq!((data.uid(), data.gid(), data.mode() & 0o777), (nobody.uid, nobody.gid, 0o600));
    }

    #[test]
    fn what_cannot_be_removed_is_no_hindrance() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("not/there/qemu");
        std::fs::create_dir_all(path.join("deep")).unwrap();
        std::fs::write(path.join("deep/file"), "").unwrap();
        empty_folder(&path, None).unwrap();
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
        empty(path.parent().unwrap(), false).unwrap();
        assert!(!path.exists());
        empty(&path, false).unwrap();
    }

    #[test]
    fn a_template_is_a_plain_file_of_some_size() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        File::create(at("large")).unwrap().set_len(MAX_TEMPLATE + 1).unwrap();
        std::fs::write(at("good"), "variables").unwrap();
        let make = |name: &str| {
            let template = Some((at(name), "raw".to_owned()));
            let nvram = Nvram { path: at("vars/own"), format: "raw".to_owned(), template };
            variables(&nvram, false, None, &Stop::default()).map_err(|e| e.to_string())
        };
        // Of the first, nobody ever opens the other end.
        assert!(make("fifo").unwrap_err().contains("fifo: it is no plain file"));
        assert!(make("large").unwrap_err().contains("bytes"));
        make("good").unwrap();
        assert_eq!(std::fs::read_to_string(at("vars/own")).unwrap(), "variables");
        remove(&at("vars/own"), false).unwrap();
        remove(&at("vars/own"), false).unwrap();
        assert!(!at("vars/own").exists());
    }
}
