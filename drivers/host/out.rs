//! Where a machine is written that is saved: a file beside its name, or what a client has open and gives by descriptor.
//!
//! What is given is written by that descriptor alone. A regular file begins where the descriptor stands, and loses what is behind;
//! a pipe cannot be gone back in, so that what is known last follows at its end (`saved.rs`). Whoever is killed leaves nothing
//! there that begins as a saved machine does, but for a pipe, whose reader sees that the end is missing.

use super::apart;
use super::workers::{ClosedAside, Stop};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Advice, FileType, Mode, OFlags, SeekFrom, fadvise, fcntl_getfl, fstat, seek};
use std::fs::File;
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use virt_model::driver::{DriverError, GivenFile};

/// How much stays in the page cache at most of what is to go past it, in bytes.
const WINDOW: u64 = 8 << 20;

/// What is written to.
#[derive(Clone)]
pub struct Out {
    /// The file.
    pub file: Arc<ClosedAside>,
    way: Way,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// It can be gone back in. `base`: where it begins; `uncached`: it is to go past the page cache; `given`: by a client.
    File { base: u64, uncached: bool, given: bool },
    /// It cannot.
    Pipe,
}

impl Out {
    /// A file that has been made for it.
    pub fn made(file: File, uncached: bool) -> Out {
        Out { file: Arc::new(ClosedAside::of(file)), way: Way::File { base: 0, uncached, given: false } }
    }

    /// What a client has given. Changes nothing. Blocks, where its file system does not answer without end.
    pub fn given(given: &GivenFile, uncached: bool) -> Result<Out, DriverError> {
        let refuse = |why: &str| DriverError::Argument(format!("the descriptor that was given {why}"));
        let failed = |e: io::Error| DriverError::Argument(format!("the descriptor that was given cannot be used: {e}"));
        let flags = fcntl_getfl(given).map_err(|e| failed(e.into()))?;
        if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE == OFlags::RDONLY {
            return Err(refuse("cannot be written to"));
        }
        let stat = fstat(given).map_err(|e| failed(e.into()))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile if flags.contains(OFlags::APPEND) => {
                Err(refuse("only appends to its file: open it without O_APPEND"))
            }
            FileType::RegularFile => {
                let base = seek(given, SeekFrom::Current(0)).map_err(|e| failed(e.into()))?;
                let file = apart::copy(given.as_fd()).map_err(failed)?;
                let way = Way::File { base, uncached, given: true };
                Ok(Out { file: Arc::new(ClosedAside::of(file.into())), way })
            }
            FileType::Fifo => {
                // One of our own, that does not wait: how the client's waits is the client's to say.
                let again = format!("/proc/self/fd/{}", given.as_fd().as_raw_fd());
                let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = rustix::fs::open(again, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
                Ok(Out { file: Arc::new(ClosedAside::of(file.into())), way: Way::Pipe })
            }
            _ => Err(refuse("is of neither a regular file nor a pipe")),
        }
    }

    /// Where it begins; `None`: it cannot be gone back in.
    pub fn base(&self) -> Option<u64> {
        match self.way {
            Way::File { base, .. } => Some(base),
            Way::Pipe => None,
        }
    }

    /// Takes away what a client's file has from its beginning on: what was there is no saved machine any more. Blocks.
    pub fn empty(&self) -> io::Result<()> {
        match self.way {
            Way::File { base, given: true, .. } => self.file.get()?.set_len(base),
            _ => Ok(()),
        }
    }

    /// What writes to it, from `at` on where that can be said. It waits for a pipe until it is told to stop.
    pub fn writer<'a>(&'a self, at: u64, stop: &'a Stop) -> io::Result<Box<dyn Write + 'a>> {
        let file = self.file.get()?;
        Ok(match self.way {
            Way::File { uncached, .. } => Box::new(At { file, at, kept: uncached.then_some(at) }),
            Way::Pipe => Box::new(Waiting { file, stop }),
        })
    }

    /// Has on disk what has been written so far to a client's file, so that what is left is done soon. Blocks.
    pub fn settle(&self) -> io::Result<()> {
        match self.way {
            Way::File { given: true, .. } => self.file.get()?.sync_data(),
            _ => Ok(()),
        }
    }

    /// It is complete and on disk: a client's descriptor stands at its end, and nothing of it stays in the page cache that is to
    /// go past it. Blocks.
    pub fn leave(&self) -> io::Result<()> {
        let Way::File { uncached, given, .. } = self.way else { return Ok(()) };
        let file = self.file.get()?;
        if uncached {
            fadvise(file, 0, None, Advice::DontNeed)?;
        }
        if given {
            seek(file, SeekFrom::End(0))?;
        }
        Ok(())
    }

    /// Has all of it on disk, where there is one. Blocks.
    pub fn sync(&self) -> io::Result<()> {
        match self.way {
            Way::File { .. } => self.file.get()?.sync_all().and_then(|()| self.leave()),
            Way::Pipe => Ok(()),
        }
    }
}

/// Writes at a place of its own, wherever others have the file stand.
struct At<'a> {
    file: &'a File,
    at: u64,
    /// From where on it is in the page cache, if it is to go past that.
    kept: Option<u64>,
}

impl Write for At<'_> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let count = self.file.write_at(piece, self.at)?;
        self.at += count as u64;
        if let Some(from) = self.kept.filter(|from| self.at - from >= WINDOW) {
            self.file.sync_data()?;
            fadvise(self.file, from, NonZeroU64::new(self.at - from), Advice::DontNeed)?;
            self.kept = Some(self.at);
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes to a pipe that does not wait, and waits until it takes more or nobody wants it any more.
struct Waiting<'a> {
    file: &'a File,
    stop: &'a Stop,
}

impl Write for Waiting<'_> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let mut file = self.file;
        loop {
            // Whoever was told to stop writes nothing more: what is missing then may be all that keeps it from being whole.
            self.stop.check().map_err(io::Error::other)?;
            match file.write(piece) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            let soon = Timespec { tv_sec: 1, tv_nsec: 0 };
            match poll(&mut [PollFd::new(file, PollFlags::OUT)], Some(&soon)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
