//! Consoles of guests: what they say is kept in a file, and one client at a time reads it from there and types.
//!
//! ```text
//!   guest ─▶ hypervisor ─▶ transcript ─▶ client     at the client's pace
//!                 └──────▶ line ─▶ nobody           read all the same, as a line that is full would stop the guest
//!   client ─▶ line ─▶ hypervisor ─▶ guest           at the guest's pace
//! ```
//!
//! Where the hypervisor writes no transcript, what comes by the line is put into one of virtd's own while a client is there.

mod lines;
mod next_write;
mod talk;
mod transcript;

pub use lines::Lines;
pub use talk::Talk;
pub use transcript::Transcript;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::{CancellationToken, DropGuard};

/// A client that is so many bytes behind what a console says loses what is before them: of a file that is the guest's own,
/// shared by all its consoles.
pub const BEHIND: u64 = 4 << 20;
/// The same of one that is in virtd's memory.
pub const BEHIND_IN_MEMORY: u64 = 256 << 10;

/// How long a client may take to have left whose descriptor is closed.
const LEAVING: Duration = Duration::from_millis(500);

/// A descriptor that does not block, in the runtime.
pub type Stream = AsyncFd<OwnedFd>;

/// That of `fd`, which does not block. Within the runtime.
pub fn stream(fd: OwnedFd) -> io::Result<Stream> {
    let interest = Interest::READABLE | Interest::WRITABLE;
    // SAFETY: the descriptor is owned by the wrapper, lives as long, and is always the same one.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|e| io::Error::other(e.to_string()))
}

/// The clients of a guest's consoles, one each.
#[derive(Default)]
pub struct Clients(Mutex<HashMap<String, Client>>);

#[derive(Clone)]
struct Client {
    socket: Weak<Stream>,
    /// Fires when it is seen that it has left.
    left: CancellationToken,
    /// Fires when another takes its place.
    end: CancellationToken,
    /// Fires when it has.
    ended: CancellationToken,
}

impl Client {
    /// Whether somebody still has the other end. Closing it is seen here at once, whatever its talk has noticed by now.
    fn is_there(&self) -> bool {
        let Some(socket) = self.socket.upgrade().filter(|_| !self.end.is_cancelled()) else { return false };
        !is_closed(&socket)
    }

    /// The same after a moment: of what the client has closed, those by whom it got it may have a copy still.
    async fn stays(&self) -> bool {
        let leaves = async {
            tokio::select! {
                () = self.left.cancelled() => {}
                () = self.ended.cancelled() => {}
            }
        };
        self.is_there() && tokio::time::timeout(LEAVING, leaves).await.is_err() && self.is_there()
    }
}

/// Whether the other end of a socket is closed.
fn is_closed(socket: &AsyncFd<OwnedFd>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(socket.get_ref().as_fd(), PollFlags::empty())];
    let told = poll(&mut polled, Some(&rustix::event::Timespec::default()));
    told.is_err() || polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

/// A client that has a console to itself.
pub struct Admitted {
    /// Our end of its connection.
    socket: Arc<Stream>,
    left: CancellationToken,
    end: CancellationToken,
    _ended: DropGuard,
}

impl Clients {
    /// Lets a new client have a console: the descriptor for it, and its talk to be. `None`: another client has it, which is
    /// not to be ended. Returns when nobody else has anything to do with that console any more.
    pub async fn admit(&self, console: &str, force: bool) -> io::Result<Option<(OwnedFd, Admitted)>> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let socket = Arc::new(stream(ours)?);
        let [left, end, ended] = [(); 3].map(|()| CancellationToken::new());
        let client =
            Client { socket: Arc::downgrade(&socket), left: left.clone(), end: end.clone(), ended: ended.clone() };
        let admitted = Admitted { socket, left, end, _ended: ended.drop_guard() };
        let other = self.all().get(console).filter(|_| !force).cloned();
        if let Some(other) = other
            && other.stays().await
        {
            return Ok(None);
        }
        let before = {
            let mut clients = self.all();
            match clients.get(console) {
                // Somebody who asked at the same time.
                Some(other) if !force && other.is_there() => return Ok(None),
                _ => clients.insert(console.to_owned(), client),
            }
        };
        if let Some(before) = before {
            before.end.cancel();
            before.ended.cancelled().await;
        }
        Ok(Some((theirs, admitted)))
    }

    /// There is no such console any more; whoever has it is cut off.
    pub fn forget(&self, console: &str) {
        let client = self.all().remove(console);
        client.iter().for_each(|client| client.end.cancel());
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Client>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
