//! The socket of a connection: what a message may cost is decided here, before its body is in memory.
//!
//! zbus makes room for a whole message, of up to 128 MiB, before it reads it, and its queue counts messages. So all it
//! reads comes through [`Reader`]:
//!
//! - The body of a message beyond [`LARGEST`] is read away piece by piece. What is left of it, its header, comes in as a
//!   message without a body, marked ([`is_cut`]), for the dispatcher to refuse.
//! - At most [`QUEUED`] bytes lie between socket and dispatcher; nothing is read while there is no room.
//! - Descriptors are taken with calls of members that have a use for them, if the gate has places for them ([`Admits`]): so
//!   what lies at the socket is looked at before it is read. The others are never ours: the kernel closes them, as plain reads
//!   have no place for them. So no sender can use up our descriptors, and no message can fail to come in for want of one. A
//!   message that came with some is marked ([`brought_descriptors`]), for the dispatcher to refuse unless it has them
//!   ([`Intake::files`]). The bus policy lets none through with other calls; this is for a bus that has another, and for peers.
//! - In the message stand other descriptors for those that came ([`which`](super::source::which)): messages are dropped where nobody may wait, as
//!   whoever closes a file of a client may have to.
//!
//! And all it writes goes through [`Writer`]: a bus that has taken nothing for [`STALLED`] is left, for [`Intake::stalled`]
//! to tell. Descriptors go out with the first byte of their message.

use super::gate::FilePlace;
use super::header::{Fields, Heading, PRIMARY, lengths};
use super::source::{Brought, Source, stand_ins};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::Notify;
use zbus::Message;
use zbus::connection::socket::{ReadHalf, Socket, Split, WriteHalf};
use zbus::export::async_trait::async_trait;
use zbus::fdo::ConnectionCredentials;

/// The largest body that is read, in bytes; the largest document is smaller.
pub const LARGEST: usize = 12 << 20;
/// The longest header that is read, in bytes. Nobody is told of a message with a longer one: who sent it stands in it.
const LONGEST_HEADER: usize = 64 << 10;
/// Bytes that may lie between socket and dispatcher; a larger message lies there alone.
const QUEUED: usize = 4 << 20;
/// How much is read at a time, in bytes: of small messages many, so that we are not slower than who sends them.
pub(super) const PIECE: usize = 64 << 10;
/// How long a bus may take nothing of what is written.
pub const STALLED: Duration = Duration::from_secs(10);
/// The mark, in the byte of flags: a bit that the specification gives no meaning. Nobody else can set it.
const CUT: u8 = 0x80;
/// Another such mark.
const BROUGHT: u8 = 0x40;
/// A third: what was brought is here.
const TAKEN: u8 = 0x20;
/// Descriptors that can go with one message, either way.
pub(super) const MOST_SENT: usize = 16;

/// Whether the body of this message was too large to be read.
pub fn is_cut(message: &Message) -> bool {
    message.primary_header().flags().bits() & CUT != 0
}

/// Whether descriptors came with this message. They are closed, unless [`Intake::files`] has them.
pub fn brought_descriptors(message: &Message) -> bool {
    message.primary_header().flags().bits() & BROUGHT != 0
}

/// Gives the descriptors of a call places, all of them or none.
pub type Admits = Box<dyn Fn(Heading<'_>) -> Option<Vec<FilePlace>> + Send + Sync>;

/// What socket and dispatcher of a connection know of each other.
#[derive(Default)]
pub struct Intake {
    /// Bytes between the two; `None` while nobody takes them, and so nothing lies there.
    queued: Mutex<Option<usize>>,
    taken: Notify,
    stalled: AtomicBool,
    /// Who may bring descriptors; nobody, while nothing is there.
    admits: Mutex<Option<Admits>>,
    /// What was brought by each message that lies between the two and is marked so.
    files: Mutex<VecDeque<Brought>>,
}

impl fmt::Debug for Intake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intake").field("queued", &self.queued).finish_non_exhaustive()
    }
}

impl Intake {
    /// The dispatcher takes messages from now on, and descriptors with those that `admits` says.
    pub fn begin(&self, admits: Admits) {
        *self.admits.lock().unwrap_or_else(PoisonError::into_inner) = Some(admits);
        *self.lock() = Some(0);
    }

    /// The files that a message has brought, if they are here; to be asked once for each message, in their order.
    pub fn files(&self, message: &Message) -> Option<Brought> {
        let here = message.primary_header().flags().bits() & TAKEN != 0;
        here.then(|| self.files.lock().unwrap_or_else(PoisonError::into_inner).pop_front()).flatten()
    }

    pub(super) fn admit(&self, call: Heading<'_>) -> Option<Vec<FilePlace>> {
        let admits = self.admits.lock().unwrap_or_else(PoisonError::into_inner);
        admits.as_ref().and_then(|admits| admits(call)).filter(|places| places.len() == call.descriptors)
    }

    /// The dispatcher has taken a message of so many bytes.
    pub fn taken(&self, bytes: usize) {
        if let Some(queued) = self.lock().as_mut() {
            *queued = queued.saturating_sub(bytes);
        }
        self.taken.notify_waiters();
    }

    /// The dispatcher takes no more.
    pub fn end(&self) {
        *self.admits.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.files.lock().unwrap_or_else(PoisonError::into_inner).clear();
        *self.lock() = None;
        self.taken.notify_waiters();
    }

    /// Whether the connection was ended because nothing was taken at its other end.
    pub fn stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }

    /// Waits for room for so many bytes, and takes it.
    async fn room(&self, bytes: usize) {
        loop {
            let taken = self.taken.notified();
            match self.lock().as_mut() {
                None => return,
                Some(queued) if *queued == 0 || *queued + bytes <= QUEUED => {
                    *queued += bytes;
                    return;
                }
                Some(_) => {}
            }
            taken.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<usize>> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A Unix socket that zbus is to read and write through.
#[derive(Debug)]
pub struct Measured {
    stream: UnixStream,
    intake: Arc<Intake>,
    patience: Option<Duration>,
}

impl Measured {
    /// A socket whose other end may take nothing for as long as `patience`; `None`: for ever.
    pub fn new(stream: UnixStream, intake: Arc<Intake>, patience: Option<Duration>) -> Measured {
        Measured { stream, intake, patience }
    }
}

impl Socket for Measured {
    type ReadHalf = Reader;
    type WriteHalf = Writer;

    fn split(self) -> Split<Reader, Writer> {
        let (read, write) = self.stream.into_split();
        let reader = Reader { socket: Source::new(read, self.intake.clone()), intake: self.intake.clone() };
        Split::new(reader, Writer { socket: write, intake: self.intake, patience: self.patience })
    }
}

/// The half that is read.
#[derive(Debug)]
pub struct Reader {
    socket: Source,
    intake: Arc<Intake>,
}

#[async_trait]
impl ReadHalf for Reader {
    async fn receive_message(
        &mut self,
        seq: u64,
        already: &mut Vec<u8>,
        fds: &mut Vec<OwnedFd>,
    ) -> zbus::Result<Message> {
        loop {
            let mut head = Vec::with_capacity(512);
            self.socket.left = already.is_empty().then_some(0);
            self.fill(&mut head, PRIMARY, already).await?;
            let brought = self.socket.files.take();
            let (header, body) = lengths(&head);
            self.socket.left = (header - PRIMARY + body).checked_sub(already.len());
            if header > LONGEST_HEADER {
                tracing::debug!(header, "a message with too long a header was passed over");
                self.skip(header - PRIMARY + body, already).await?;
                continue;
            }
            self.fill(&mut head, header, already).await?;
            head[2] &= !(CUT | BROUGHT | TAKEN);
            let Ok(fields) = Fields::of(&head) else {
                tracing::debug!("a message with a field in its header that no known one is like was passed over");
                self.skip(body, already).await?;
                continue;
            };
            if let (count @ 1.., at) = (fields.call.descriptors, fields.descriptors_at) {
                head[2] |= BROUGHT;
                match brought
                    .filter(|brought| brought.files.len() == count && body <= LARGEST)
                    .zip(stand_ins(count).ok())
                {
                    Some((brought, stand_ins)) => {
                        head[2] |= TAKEN;
                        fds.extend(stand_ins);
                        self.intake.files.lock().unwrap_or_else(PoisonError::into_inner).push_back(brought);
                    }
                    None => head[at..at + 4].fill(0),
                }
            }
            if body > LARGEST {
                self.skip(body, already).await?;
                head[2] |= CUT;
                head[4..8].fill(0);
                self.intake.room(header).await;
            } else {
                self.intake.room(header + body).await;
            }
            already.splice(..0, head);
            // What has been read already comes first, so this goes on where we are.
            return self.socket.receive_message(seq, already, fds).await;
        }
    }

    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        self.socket.recvmsg(buffer).await
    }

    /// Without that, the other end would take none either.
    fn can_pass_unix_fd(&self) -> bool {
        true
    }

    async fn peer_credentials(&mut self) -> io::Result<ConnectionCredentials> {
        credentials(self.socket.socket.as_ref())
    }
}

impl Reader {
    /// Reads on until `head` has so many bytes.
    async fn fill(&mut self, head: &mut Vec<u8>, length: usize, already: &mut Vec<u8>) -> io::Result<()> {
        let known = already.len().min(length - head.len());
        head.extend(already.drain(..known));
        let mut from = head.len();
        head.resize(length, 0);
        while from < length {
            match self.socket.read(&mut head[from..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => from += count,
            }
        }
        Ok(())
    }

    /// Reads so many bytes and forgets them.
    async fn skip(&mut self, mut length: usize, already: &mut Vec<u8>) -> io::Result<()> {
        length -= already.drain(..already.len().min(length)).len();
        let mut piece = vec![0; length.min(PIECE)];
        while length > 0 {
            let room = piece.len().min(length);
            let count = self.socket.read(&mut piece[..room]).await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            length -= count;
        }
        Ok(())
    }
}

/// The half that is written.
#[derive(Debug)]
pub struct Writer {
    socket: OwnedWriteHalf,
    intake: Arc<Intake>,
    patience: Option<Duration>,
}

#[async_trait]
impl WriteHalf for Writer {
    async fn send_message(&mut self, message: &Message) -> zbus::Result<()> {
        self.send_messages(std::slice::from_ref(message)).await
    }

    async fn send_messages(&mut self, messages: &[Message]) -> zbus::Result<()> {
        // Descriptors go with the first byte of a write, so a message that has some begins one.
        for together in messages.chunk_by(|_, next| next.data().fds().is_empty()) {
            let mut fds: Vec<_> = together[0].data().fds().iter().map(|fd| fd.as_fd()).collect();
            let mut slices: Vec<_> = together.iter().map(|message| IoSlice::new(message.data())).collect();
            let mut rest = &mut slices[..];
            while !rest.is_empty() {
                let count = self.write(rest, &fds).await?;
                fds.clear();
                IoSlice::advance_slices(&mut rest, count);
            }
        }
        Ok(())
    }

    async fn sendmsg(&mut self, buffer: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.write(&[IoSlice::new(buffer)], fds).await
    }

    async fn close(&mut self) -> io::Result<()> {
        self.shut()
    }

    fn can_pass_unix_fd(&self) -> bool {
        true
    }

    async fn peer_credentials(&mut self) -> io::Result<ConnectionCredentials> {
        credentials(self.socket.as_ref())
    }
}

impl Writer {
    /// Writes something. When that takes too long, the connection ends.
    async fn write(&mut self, slices: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let socket: &UnixStream = self.socket.as_ref();
        let writing = socket.async_io(Interest::WRITABLE, || send(socket, slices, fds));
        let Some(patience) = self.patience else { return writing.await };
        match tokio::time::timeout(patience, writing).await {
            Ok(Ok(0)) => Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => written,
            Err(_) => {
                self.intake.stalled.store(true, Ordering::Relaxed);
                self.shut()?;
                Err(io::Error::new(io::ErrorKind::TimedOut, "the other end takes nothing"))
            }
        }
    }

    /// Ends both directions, so the reader sees the end too.
    fn shut(&self) -> io::Result<()> {
        let stream: &UnixStream = self.socket.as_ref();
        Ok(nix::sys::socket::shutdown(stream.as_raw_fd(), nix::sys::socket::Shutdown::Both)?)
    }
}

/// Sends what fits; the descriptors go with the first byte.
fn send(socket: &UnixStream, slices: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SENT))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        let text = format!("more than {MOST_SENT} descriptors for one message");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(sendmsg(socket, slices, &mut ancillary, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
}

fn credentials(stream: &UnixStream) -> io::Result<ConnectionCredentials> {
    let peer = stream.peer_cred()?;
    let known = ConnectionCredentials::default().set_unix_user_id(peer.uid());
    Ok(match peer.pid().and_then(|pid| u32::try_from(pid).ok()) {
        Some(pid) => known.set_process_id(pid),
        None => known,
    })
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;
