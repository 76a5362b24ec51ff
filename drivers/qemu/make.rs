//! Files, folders and sockets that are made, or removed, where a definition says or for those that run a guest.
//!
//! virtd may be root here, and others may own parts of the way: places and templates are held to the rules of
//! [`crate::host::resolve`].

use super::command::Nvram;
use crate::host::acl::through;
use crate::host::resolve::{Found, Place};
use crate::host::user::RunAs;
use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown, fchown};
use std::path::Path;
use std::process::{Command, Stdio};
use virt_model::driver::DriverError;

/// The largest template of firmware variables; those of real firmware have less than a megabyte.
const MAX_TEMPLATE: u64 = 64 << 20;

/// Makes an empty file for QEMU's user to write to, where nothing is: QEMU itself may not be allowed to make it there.
pub fn output(path: &Path, user: Option<&RunAs>) -> io::Result<()> {
    let Some(user) = user else { return Ok(()) };
    let place = Place::resolve(path, true)?;
    match File::options().write(true).create_new(true).mode(0o640).open(place.path()) {
        Ok(file) => fchown(&file, Some(user.uid), Some(user.gid)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
    }
}

/// Makes a file, where nothing is, that only we may open. `wary`: as root among others.
pub fn new_file(path: &Path, wary: bool) -> io::Result<File> {
    let place = Place::resolve(path, wary)?;
    // Where a link is, something is.
    File::options().write(true).create_new(true).mode(0o600).open(place.path())
}

/// An empty file without a name, in the folder of that path, for `user` (us, if `None`) to write to.
pub fn scratch(folder: &Path, user: Option<&RunAs>) -> io::Result<OwnedFd> {
    DirBuilder::new().recursive(true).mode(0o711).create(folder)?;
    let path = folder.join(format!("scratch-{}", uuid::Uuid::new_v4()));
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    user.map_or(Ok(()), |user| fchown(&file, Some(user.uid), Some(user.gid)))?;
    Ok(file.into())
}

/// Makes a folder, where nothing is, that only `user` (we, if `None`) may enter; and the folders on the way to it.
pub fn folder(path: &Path, user: Option<&RunAs>) -> io::Result<()> {
    if let Some(parent) = path.parent().filter(|parent| !parent.exists()) {
        DirBuilder::new().recursive(true).mode(0o711).create(parent)?;
    }
    let place = Place::resolve(path, user.is_some())?;
    match DirBuilder::new().mode(0o700).create(place.path()) {
        Ok(()) => give(&place.path(), user),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(e) => Err(e),
    }
}

/// The same, without what may be in it.
pub fn empty_folder(path: &Path, user: Option<&RunAs>) -> io::Result<()> {
    remove(path, user.is_some()).map_err(io::Error::other)?;
    folder(path, user)
}

/// Makes `user` (we, if `None`) the owner of what only root could have put there.
pub fn give(path: &Path, user: Option<&RunAs>) -> io::Result<()> {
    user.map_or(Ok(()), |user| chown(path, Some(user.uid), Some(user.gid)))
}

/// A listening socket that only `user` (we, if `None`) can connect to, from its first moment.
pub fn listen(path: &Path, user: Option<&RunAs>) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    give(path, user)?;
    listen(&socket, 1)?;
    Ok(socket)
}

/// Makes the firmware's variables from their template, where they are not there or are to be made anew.
pub fn variables(nvram: &Nvram, anew: bool, user: Option<&RunAs>) -> Result<(), DriverError> {
    let path = &nvram.path;
    let at_path = |e: io::Error| DriverError::Storage(format!("{}: {e}", path.display()));
    if !anew && path.exists() {
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
        ("raw", "qcow2") => put(path, user, |to| convert(from, to)).map_err(at_path),
        // An image that others may have made is not ours to read.
        (from_format, format) => Err(DriverError::Storage(format!(
            "{}: variables in {format} are not made from a template in {from_format}",
            path.display()
        ))),
    }
}

/// Opens a template, which is a plain file of some size.
fn open_template(template: &Path, wary: bool) -> io::Result<File> {
    let file = open_plain(template, wary)?;
    match file.metadata()?.len() {
        0..=MAX_TEMPLATE => Ok(file),
        size => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{size} bytes are no firmware variables"))),
    }
}

/// Opens a plain file to be read; anything else could keep us waiting. `wary`: as root among others.
pub fn open_plain(path: &Path, wary: bool) -> io::Result<File> {
    let found = Found::resolve(path)?;
    if let Some(why) = found.objection(None, false).filter(|_| wary) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    match found.kind() {
        rustix::fs::FileType::RegularFile => File::open(through(&found.fd)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no plain file")),
    }
}

/// Makes or replaces the file at `path` in one step, its content made by `fill`.
fn put(path: &Path, user: Option<&RunAs>, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    if !parent.exists() {
        DirBuilder::new().mode(0o711).create(Place::resolve(parent, user.is_some())?.path())?;
    }
    let place = Place::resolve(path, user.is_some())?;
    if std::fs::symlink_metadata(place.path()).is_ok_and(|there| !there.is_file() && !there.is_symlink()) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no plain file is there"));
    }
    let mut new = tempfile::NamedTempFile::new_in(place.dir())?;
    fill(new.as_file_mut())?;
    if let Some(user) = user {
        fchown(new.as_file(), Some(user.uid), Some(user.gid))?;
    }
    new.as_file().sync_all()?;
    new.persist(place.path())?;
    Ok(())
}

fn copy(from: File, to: &mut File) -> io::Result<()> {
    io::copy(&mut from.take(MAX_TEMPLATE), to).map(drop)
}

/// Writes the raw image `from` as qcow2.
fn convert(from: File, to: &mut File) -> io::Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw", "-O", "qcow2", "/dev/stdin", "/dev/stdout"]);
    let done =
        command.stdin(from).stdout(to.try_clone()?).stderr(Stdio::piped()).output().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => io::Error::other("qemu-img is not installed (Debian has it in qemu-utils)"),
            _ => e,
        })?;
    if done.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&done.stderr).trim().to_owned()))
}

/// Removes a file, or a folder with all that is in it, if it is there; `wary` as in [`Place::resolve`].
pub fn remove(path: &Path, wary: bool) -> Result<(), DriverError> {
    let removed = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => Err(e),
        Ok(there) => Place::resolve(path, wary).and_then(|place| match there.is_dir() {
            true => std::fs::remove_dir_all(place.path()),
            false => std::fs::remove_file(place.path()),
        }),
    };
    removed.map_err(|e| DriverError::Storage(format!("{}: {e}", path.display())))
}

/// Removes a file, never a folder; what is not there is fine.
pub fn remove_file(path: &Path, wary: bool) -> Result<(), DriverError> {
    match Place::resolve(path, wary).and_then(|place| std::fs::remove_file(place.path())) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(|e| DriverError::Storage(format!("{}: {e}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_template_becomes_a_store_in_qcow2() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("template"), vec![7; 528 << 10]).unwrap();
        let store = |from: &str| {
            let template = Some((at("template"), from.to_owned()));
            variables(&Nvram { path: at("store"), format: "qcow2".to_owned(), template }, true, None)
        };
        store("raw").unwrap();
        let content = std::fs::read(at("store")).unwrap();
        assert_eq!((&content[..4], &content[24..32]), (&b"QFI\xfb"[..], &(528_u64 << 10).to_be_bytes()[..]));
        let odd =
            Nvram { path: at("raw"), format: "raw".to_owned(), template: Some((at("store"), "qcow2".to_owned())) };
        assert!(variables(&odd, true, None).unwrap_err().to_string().contains("not made from a template in qcow2"));
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
            variables(&nvram, false, None).map_err(|e| e.to_string())
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
