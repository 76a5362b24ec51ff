//! What lies at a socket, read with an eye to descriptors: they come with the first byte of their message, so it is known whose
//! they are before that byte is read.
//!
//! ```text
//!   at the socket   rest of a message │ message │ call with files │ …      looked at (MSG_PEEK)
//!   read at once    ──────────────────┴────────▶                            plainly
//!   next                                         ├─ its header ─▶           with its files, if it is admitted
//! ```

use super::gate::FilePlace;
use super::header::{Fields, Heading, PRIMARY, lengths};
use super::socket::{Intake, MOST_SENT, PIECE};
use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::oneshot;
use virt_drivers::host::apart;
use virt_model::driver::GivenFile;
use zbus::connection::socket::ReadHalf;
use zbus::export::async_trait::async_trait;

/// Bytes, as they come, and the files of calls that may bring some.
#[derive(Debug)]
pub struct Source {
    /// Where they come from.
    pub socket: OwnedReadHalf,
    intake: Arc<Intake>,
    buffer: Box<[u8]>,
    /// What of the buffer has been read and not handed out.
    unread: std::ops::Range<usize>,
    /// How much of the message that is being read is still to be handed out; `None`: that is not known.
    pub left: Option<usize>,
    /// The files of the message that begins where the buffer does.
    pub files: Option<Brought>,
}

/// What a call has brought.
#[derive(Debug)]
pub struct Brought {
    /// Its files.
    pub files: Vec<GivenFile>,
    /// Their places: each is given back when its file is closed and this has been dropped, too, as what stands for the files in the
    /// message is there until then.
    pub places: Vec<Arc<FilePlace>>,
}

/// What is to be read, of what lies at the socket.
#[derive(Debug)]
enum Step {
    /// So many bytes, and no descriptor.
    Bytes(usize),
    /// So many bytes of a message that begins there, with its descriptors: as many as are said, and their places, unless nobody
    /// wants them.
    WithFiles(usize, usize, Option<Vec<FilePlace>>),
}

impl Source {
    /// A source that has read nothing.
    pub fn new(socket: OwnedReadHalf, intake: Arc<Intake>) -> Source {
        Source { socket, intake, buffer: vec![0; PIECE].into(), unread: 0..0, left: None, files: None }
    }

    /// Reads something; nothing at the end.
    pub async fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = if !self.unread.is_empty() {
            self.hand_out(into)
        } else if into.len() >= PIECE && self.left.is_some_and(|left| left >= into.len()) {
            // What is within a message has no descriptors.
            let socket: &UnixStream = self.socket.as_ref();
            socket.async_io(Interest::READABLE, || Ok(recv(socket, &mut *into, RecvFlags::DONTWAIT)?.1)).await?
        } else {
            self.refill().await?;
            self.hand_out(into)
        };
        self.left = self.left.and_then(|left| left.checked_sub(count));
        Ok(count)
    }

    fn hand_out(&mut self, into: &mut [u8]) -> usize {
        let count = into.len().min(self.unread.len());
        into[..count].copy_from_slice(&self.buffer[self.unread.start..][..count]);
        self.unread.start += count;
        count
    }

    /// Reads what there is into the buffer, which is empty: up to the next message with descriptors that are to be taken, or
    /// the beginning of that.
    async fn refill(&mut self) -> io::Result<()> {
        let socket: &UnixStream = self.socket.as_ref();
        let buffer = &mut self.buffer;
        let peek = || Ok(recv(socket, &mut **buffer, RecvFlags::PEEK | RecvFlags::DONTWAIT)?.1);
        let there = socket.async_io(Interest::READABLE, peek).await?;
        let step = next_step(&self.buffer[..there], self.left, |call| self.intake.admit(call));
        let (most, received) = match step {
            Step::Bytes(most) => (most, None),
            Step::WithFiles(most, _, Some(places)) => (most, with_files(socket, most, places).await?),
            // The kernel would close them in this thread, which would wait for whatever that takes.
            Step::WithFiles(most, count, None) if apart::can_spare(count) => {
                (most, with_files(socket, most, Vec::new()).await?.map(|(bytes, _)| (bytes, None)))
            }
            Step::WithFiles(most, ..) => (most, None),
        };
        let count = match received {
            None => recv(socket, &mut self.buffer[..most], RecvFlags::DONTWAIT)?.1,
            Some((bytes, brought)) => {
                self.buffer[..bytes.len()].copy_from_slice(&bytes);
                self.files = brought;
                bytes.len()
            }
        };
        self.unread = 0..count;
        Ok(())
    }
}

/// What is to be read of `there`, which lies at the socket. `left`: how much of it is the rest of a message.
fn next_step(there: &[u8], left: Option<usize>, admit: impl Fn(Heading<'_>) -> Option<Vec<FilePlace>>) -> Step {
    let mut at = left.unwrap_or(there.len());
    while let Some(head) = there.get(at..).filter(|head| head.len() >= PRIMARY) {
        let (header, body) = lengths(head);
        // Where a header is cut off, its descriptors are not taken.
        let Some(head) = head.get(..header) else { break };
        let fields = Fields::of(head).unwrap_or_default();
        if fields.call.descriptors > 0 {
            if at > 0 {
                break;
            }
            let is_call = head[1] == 1;
            let places = is_call.then(|| admit(fields.call)).flatten();
            return Step::WithFiles(header, fields.call.descriptors, places);
        }
        at += header + body;
    }
    Step::Bytes(if at == 0 { there.len() } else { at.min(there.len()) })
}

/// The first bytes of a call with the files that come with them; no files, where not all of them can be had. `None`: there is no
/// way to take any now, and nothing is read.
async fn with_files(
    socket: &UnixStream,
    most: usize,
    places: Vec<FilePlace>,
) -> io::Result<Option<(Vec<u8>, Option<Brought>)>> {
    let (received, receiving) = oneshot::channel();
    let places: Vec<_> = places.into_iter().map(Arc::new).collect();
    let held = places.clone();
    let begun = apart::expects().and_then(|()| socket.as_fd().try_clone_to_owned()).and_then(|socket| {
        let receive = move || {
            let _ = received.send(apart::arrive(|| receive(&socket, most), |at| held.get(at).cloned()));
        };
        std::thread::Builder::new().name("receiver".into()).spawn(receive)
    });
    if let Err(error) = begun {
        tracing::warn!(%error, "the files of a call cannot be taken");
        return Ok(None);
    }
    let (bytes, files) = receiving.await.map_err(|_| io::Error::other("the thread that receives files failed"))??;
    let files = files.unwrap_or_else(|error| {
        tracing::warn!(%error, "the files of a call could not be taken");
        Vec::new()
    });
    if files.len() != places.len() {
        // Not all came, or a peer that counts wrongly has sent more.
        files.into_iter().for_each(|file| apart::close(file, || ()));
        return Ok(Some((bytes, None)));
    }
    let files = files.into_iter().zip(&places).map(|(file, place)| {
        let place = place.clone();
        GivenFile::new(file, move |file| apart::close(file, move || drop(place)))
    });
    let brought = Brought { files: files.collect(), places };
    Ok(Some((bytes, Some(brought))))
}

/// Receives bytes with their descriptors.
fn receive(socket: &OwnedFd, most: usize) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SENT))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; most];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags)?;
    bytes.truncate(got.bytes);
    let files = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let files: Vec<OwnedFd> = files.flatten().collect();
    Ok((bytes, files))
}

#[async_trait]
impl ReadHalf for Source {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        Ok((self.read(buffer).await?, Vec::new()))
    }
}

/// Which of a call's files this descriptor in its message stands for: it is a file in memory that is read from there on.
pub fn which(stands_for: impl AsFd) -> Option<usize> {
    usize::try_from(rustix::fs::tell(stands_for).ok()?).ok()
}

/// Descriptors that stand for so many files.
pub fn stand_ins(count: usize) -> io::Result<Vec<OwnedFd>> {
    let stand_in = |number| {
        let file = rustix::fs::memfd_create("stand-in", MemfdFlags::CLOEXEC)?;
        rustix::fs::seek(&file, SeekFrom::Start(number as u64))?;
        Ok(file)
    };
    (0..count).map(stand_in).collect()
}
