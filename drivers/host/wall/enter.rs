//! Files shown to a guest that runs: mounted behind its wall.

use super::super::access::LentFile;
use super::attach::{Root, Tree};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags, fstat, openat};
use std::fs::File;
use std::io;
use std::path::Path;

/// Shows `files` to the process, each where it was named; what is there and has been replaced outside is replaced. A process
/// without a wall sees what we see, and one that has ended sees nothing: both need nothing. The process must be one that
/// cannot have been replaced. Blocks.
pub fn show(pid: i32, files: &[LentFile]) -> io::Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    let theirs = match File::open(Path::new("/proc").join(pid.to_string()).join("ns/mnt")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        theirs => theirs?,
    };
    let (ours, them) = (fstat(File::open("/proc/self/ns/mnt")?)?, fstat(&theirs)?);
    if (ours.st_dev, ours.st_ino) == (them.st_dev, them.st_ino) {
        return Ok(());
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("wall".into());
        let thread = thread.spawn_scoped(scope, || enter_and_show(&theirs, files))?;
        thread.join().map_err(|_| io::Error::other("the thread behind the wall failed"))?
    })
}

/// In a thread of its own, which is of no use afterwards.
fn enter_and_show(namespace: &File, files: &[LentFile]) -> io::Result<()> {
    // A mount is made in the namespace in which its file was found.
    let trees = files.iter().map(Tree::of).collect::<io::Result<Vec<_>>>()?;
    unshare(CloneFlags::CLONE_FS)?;
    setns(namespace, CloneFlags::CLONE_NEWNS)?;
    let root = Root(openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?);
    for (tree, file) in trees.iter().zip(files) {
        if !root.has(&tree.at, file) {
            root.attach(tree)?;
        }
    }
    Ok(())
}
