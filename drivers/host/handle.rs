//! A file by its handle: the kernel's name for it in its file system, which no renaming changes.

use rustix::fs::{CWD, Mode, OFlags, fstat, openat};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// What the kernel takes at most.
const MAX: usize = 128;

/// A handle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handle {
    kind: i32,
    bytes: Vec<u8>,
}

/// As the kernel has it.
#[repr(C)]
struct Raw {
    length: u32,
    kind: i32,
    bytes: [u8; MAX],
}

impl Handle {
    /// That of the file behind `fd`, which may be an `O_PATH` one. Not every file system has them.
    pub fn of(fd: &impl AsFd) -> io::Result<Handle> {
        let mut raw = Raw { length: MAX as u32, kind: 0, bytes: [0; MAX] };
        let mut mount = 0;
        // SAFETY: the structure is as long as it says, and lives across the call, as do the string and the number.
        let done = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                fd.as_fd().as_raw_fd(),
                c"".as_ptr(),
                &raw mut raw,
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        let bytes = raw.bytes.get(..raw.length as usize).filter(|_| done == 0);
        bytes.map(|bytes| Handle { kind: raw.kind, bytes: bytes.to_vec() }).ok_or_else(io::Error::last_os_error)
    }

    /// The file, if it is still there, as an `O_PATH` descriptor; `path` is where it was on the device `dev`. Needs root.
    pub fn open(&self, path: &Path, dev: u64) -> Option<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let folders = path.ancestors().skip(1).filter_map(|folder| openat(CWD, folder, flags, Mode::empty()).ok());
        let mut same = folders.filter(|folder| fstat(folder).is_ok_and(|stat| stat.st_dev == dev));
        self.open_on(&same.next()?).ok()
    }

    /// The file, on the file system of `folder`.
    fn open_on(&self, folder: &OwnedFd) -> io::Result<OwnedFd> {
        let mut raw = Raw { length: self.bytes.len().min(MAX) as u32, kind: self.kind, bytes: [0; MAX] };
        raw.bytes.iter_mut().zip(&self.bytes).for_each(|(to, from)| *to = *from);
        // SAFETY: the structure lives across the call; the call makes a new descriptor, which nothing else owns.
        unsafe {
            let flags = libc::O_PATH | libc::O_CLOEXEC;
            match libc::syscall(libc::SYS_open_by_handle_at, folder.as_raw_fd(), &raw const raw, flags) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(OwnedFd::from_raw_fd(fd as i32)),
            }
        }
    }
}
