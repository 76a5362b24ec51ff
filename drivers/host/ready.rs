//! Waiting in threads that may block: for what descriptors have to be read, and for the end of processes.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// Waits until there is something to be read from one of these, or it has hung up, or has ended where it is a process. Says of
/// each whether that is so: of none where it was not until then. `None`: however long that takes.
pub fn ready_by<const N: usize>(of: [BorrowedFd<'_>; N], until: impl Into<Option<Instant>>) -> io::Result<[bool; N]> {
    let (mut polled, until) = (of.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)), until.into());
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut polled, left.as_ref()) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(polled.map(|one| !one.revents().is_empty())),
        }
    }
}
