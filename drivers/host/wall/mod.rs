//! The wall around a guest's processes: a mount namespace in which nothing is but what they were given.
//!
//! ```text
//!   unshare ─▶ an empty root ◀─ /usr, few of /etc, /dev               (the ground: it may be made before the rest is known)
//!                  ▲─attach── mounts ◀─clone─ judged descriptors, /proc ─▶ pivot_root ─▶ fork
//! ```
//!
//! A path means there what root judged by its descriptor, whatever is renamed outside. All of it is done in a thread of its
//! own, whose namespaces a process made by it inherits.
//!
//! On top of it: a filter of system calls ([`calls`]), and Landlock where the kernel has it ([`second`]).
//!
//! Root's wall has no process namespace: the guest has a user of its own, and `/proc` shows it no other's processes. Who is
//! not root makes a wall in a user namespace ([`unprivileged`]), where all guests have one user, and each has processes of
//! its own instead.

mod attach;
mod build;
mod calls;
mod enter;
mod second;
mod sys;
mod unprivileged;

use super::access::LentFile;
use super::apart;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use build::{Ground, GroundToCome, PTMX};
pub use enter::{has_own_network, show};
pub use sys::{Hold, clone, file_system, put};
pub use unprivileged::{fork, obstacle, own_network, terminals};

/// What there is within.
#[derive(Clone, Debug, Default)]
pub struct Wall {
    /// Programs that run within, absolute paths.
    pub programs: Vec<PathBuf>,
    /// Files, each where it was named.
    pub files: Vec<LentFile>,
    /// Folders with all that is mounted in them.
    pub folders: Vec<Folder>,
    /// Device nodes and others of the host's, shown with the rights they have, where they are there.
    pub nodes: Vec<PathBuf>,
    /// The host's network. Else there is none.
    pub network: bool,
    /// All of `/proc`, and `/sys` as it is. Else only what tells of the processes within, and of CPUs and memory.
    pub kernel: bool,
    /// It hears the kernel tell of devices that come and go, in its own network: libusb insists on that, whatever it opens.
    pub news_of_devices: bool,
    /// A `/tmp` for what is thrown away.
    pub scratch: bool,
    /// It makes namespaces and mounts for itself, and needs the kernel's calls for that.
    pub shuts_itself_in: bool,
    /// It does its I/O by io_uring.
    pub uring: bool,
    /// By whose rights it is made.
    pub maker: Maker,
    /// It has no `/proc`: it is among our processes, and nobody but root shows those.
    pub no_processes: bool,
}

/// By whose rights a wall is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Maker {
    /// By root's, in a thread.
    #[default]
    Root,
    /// By our own, whoever we are: in a user namespace, by [`fork`].
    Own,
    /// Nobody may make mounts: what is behind it sees what we see; all else of the wall is there.
    Nobody,
}

/// A folder of the host's.
#[derive(Clone, Debug)]
pub struct Folder {
    /// Where it is.
    pub path: PathBuf,
    /// An `O_PATH` descriptor of it.
    pub fd: Arc<OwnedFd>,
    /// To be written.
    pub write: bool,
}

impl Wall {
    /// Runs `work` in a thread behind the wall; processes it makes are there, too. It is one of [`apart::without`]. Needs root.
    /// Blocks. Errors say what of the wall could not be made.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        apart::without(|| self.enter(None).and_then(|()| work()))
    }

    /// Takes the calling thread, and no other, behind the wall; on `ground`, where that has been made for it. On error the thread is
    /// of no use any more. A wall of [`Maker::Own`] is entered by [`fork`].
    pub fn enter(&self, ground: Option<&Ground>) -> io::Result<()> {
        if self.maker != Maker::Nobody {
            build::enter(self, ground)?;
        }
        self.lock()
    }

    /// Takes the calling process, which must have one thread, behind a wall of [`Maker::Own`] with `no_processes`. On error it is of
    /// no use any more.
    pub fn enter_process(&self) -> io::Result<()> {
        unprivileged::enter(self)
    }

    /// A second lock, for what has no place in the first: no mount is made after it.
    fn lock(&self) -> io::Result<()> {
        second::lock(self).map_err(|e| io::Error::other(format!("it cannot be held to its files: {e}")))?;
        calls::filter(self).map_err(|e| io::Error::other(format!("system calls cannot be filtered: {e}")))
    }

    /// Adds a folder as it is now.
    pub fn folder(&mut self, path: &Path, write: bool) -> io::Result<()> {
        use rustix::fs::{CWD, Mode, OFlags, openat};
        let fd = openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        self.folders.push(Folder { path: path.to_owned(), fd: Arc::new(fd), write });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
