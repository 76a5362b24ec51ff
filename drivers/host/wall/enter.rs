//! Files shown to a guest that runs: mounted behind its wall.

use super::super::access::LentFile;
use super::attach::{Origin, Root, Tree};
use super::unprivileged;
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags, fstat, openat};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Shows `files` to the process, each where it was named; what is there and has been replaced outside is replaced. A process
/// without a wall sees what we see, and one that has ended sees nothing: both need nothing. The process must be one that
/// cannot have been replaced. Blocks.
pub fn show(pid: i32, files: &[LentFile]) -> io::Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    let Some(mounts) = foreign(pid, "mnt")? else { return Ok(()) };
    if let Some(user) = foreign(pid, "user")? {
        return unprivileged::show(&user, &mounts, files);
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("wall".into());
        let thread = thread.spawn_scoped(scope, || enter_and_show(&mounts, files))?;
        thread.join().map_err(|_| io::Error::other("the thread behind the wall failed"))?
    })
}

/// Whether the process has a network of its own. Blocks.
pub fn has_own_network(pid: i32) -> io::Result<bool> {
    Ok(foreign(pid, "net")?.is_some())
}

/// That namespace of the process, if it is not ours, and the process is still there.
fn foreign(pid: i32, kind: &str) -> io::Result<Option<OwnedFd>> {
    let theirs = match File::open(Path::new("/proc").join(pid.to_string()).join("ns").join(kind)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        theirs => theirs?,
    };
    let (ours, them) = (fstat(File::open(Path::new("/proc/self/ns").join(kind))?)?, fstat(&theirs)?);
    Ok(((ours.st_dev, ours.st_ino) != (them.st_dev, them.st_ino)).then(|| theirs.into()))
}

/// In a thread of its own, which is of no use afterwards.
fn enter_and_show(namespace: &OwnedFd, files: &[LentFile]) -> io::Result<()> {
    // A mount is made in the namespace in which its file was found.
    let trees = files.iter().map(|file| Tree::of(file, Origin::Held)).collect::<io::Result<Vec<_>>>()?;
    unshare(CloneFlags::CLONE_FS)?;
    setns(namespace, CloneFlags::CLONE_NEWNS)?;
    let root = Root(openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?);
    root.attach_new(&trees, files)
}
