//! Files that clients have given, read and written in threads of their own, as each may keep one waiting for ever. Whoever waits
//! for that can stop at any time; a thread that hangs keeps the file, and with it the place that its client has for one.
//!
//! Clients have opened these files, and virtd is not to lend them its rights: files of the kernel's look at who writes, and sockets
//! tell it. So such a thread has no capabilities, and no socket is written to.

use super::workers::ClosedAside;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom, fallocate, fstat, ftruncate, seek};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use virt_model::driver::GivenFile;

/// So much is read at once, in bytes.
const PIECE: usize = 64 << 10;
/// So much is written at once: a pipe that takes anything takes that, and keeps nobody waiting.
const TAKEN: usize = 4096;
/// How long a file that says it is ready and is not is left alone.
const NOT_READY: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// The stack of such a thread.
const STACK: usize = 128 << 10;

/// What a file is given for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// To be read.
    Read,
    /// To be written.
    Write,
}

/// How much of a client's file is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Most {
    /// All of it.
    All,
    /// So many bytes, whatever follows.
    First(u64),
    /// All of it, and it may have no more bytes than these.
    Within(u64),
}

/// How long a client may leave unread what is written for it.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Until something more is taken.
    pub next: Duration,
    /// Until all is.
    pub all: Duration,
}

/// Whether the file can be of that use, so far as it can be told without waiting.
pub fn check(file: &GivenFile, what_for: Use) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    let mode = flags & OFlags::RWMODE;
    let (other, text) = match what_for {
        Use::Read => (OFlags::WRONLY, "it is open for writing alone"),
        Use::Write => (OFlags::RDONLY, "it is open for reading alone"),
    };
    if flags.contains(OFlags::PATH) {
        return Err(io::Error::other("it is no more than a path"));
    }
    if mode == other {
        return Err(io::Error::other(text));
    }
    if what_for == Use::Write && rustix::net::sockopt::socket_type(file).is_ok() {
        return Err(io::Error::other("it is a socket: give a pipe or a file"));
    }
    Ok(())
}

/// Ends when nothing more is taken for so long.
async fn none_within(next: Duration, taken: &mut watch::Receiver<()>) {
    while let Ok(more) = timeout(next, taken.changed()).await {
        if more.is_err() {
            // The thread tells how it has ended.
            std::future::pending::<()>().await;
        }
    }
}

/// Reads a file to its end; `None`: it has more than `most` bytes. Waits for as long as that takes.
pub async fn read_all(file: GivenFile, most: usize) -> io::Result<Option<Vec<u8>>> {
    let (stop, stopped) = stop()?;
    let (told, read) = oneshot::channel();
    let work = move || {
        let result = without_rights().and_then(|()| read_blocking(&file, most, &stopped));
        drop(file);
        let _ = told.send(result);
    };
    in_a_thread("stdin", work)?;
    let read = read.await;
    drop(stop);
    read.map_err(|_| io::Error::other("the thread that reads it failed"))?
}

/// Writes all that, and closes the file. Error: `TimedOut` if its reader does not take it.
pub async fn write_all(file: GivenFile, bytes: Vec<u8>, patience: Patience) -> io::Result<()> {
    let (stop, stopped) = stop()?;
    let (told, written) = oneshot::channel();
    let (progress, mut taken) = watch::channel(());
    let work = move || {
        let result = without_rights().and_then(|()| write_blocking(&file, &bytes, &stopped, &progress));
        drop(file);
        let _ = told.send(result);
    };
    in_a_thread("stdout", work)?;
    let nothing_is_taken = none_within(patience.next, &mut taken);
    let result = tokio::select! {
        biased;
        written = written => written.map_err(|_| io::Error::other("the thread that writes it failed"))?,
        () = nothing_is_taken => Err(io::ErrorKind::TimedOut.into()),
        () = sleep(patience.all) => Err(io::ErrorKind::TimedOut.into()),
    };
    drop(stop);
    result
}

/// Writes what is read of a file into another, from `at` on, and as much as `most` says; how many bytes. `sparse`: what its holes
/// stand for is not written, and that other file has nothing there. Waits for as long as that takes; `progress` is told how far it
/// is, first right before anything is written, and ends it by an error. Error: `Interrupted` when it is cancelled; from then on
/// nothing is written, whatever is read yet.
pub async fn pour_in(
    from: GivenFile,
    to: Arc<ClosedAside>,
    at: u64,
    most: Most,
    sparse: bool,
    cancelled: &CancellationToken,
    progress: impl Fn(u64) -> io::Result<()> + Send + 'static,
) -> io::Result<u64> {
    let gate = Gate::default();
    let passes = gate.clone();
    let poured = pour("upload", move |stopped| {
        let bytes = match most {
            Most::All => u64::MAX,
            Most::First(bytes) | Most::Within(bytes) => bytes,
        };
        let place = Pouring { at, most: bytes, stopped, gate: &passes, progress: &progress };
        // Whoever serves a file of its own may never answer that: it is asked here, where nobody else waits.
        if matches!(most, Most::Within(_)) && length_left(&from).is_some_and(|left| left > bytes) {
            return Err(too_long());
        }
        // To look for holes moves it.
        let base = if sparse { Some(seekable(&from)?) } else { None };
        let done = match base {
            Some(base) => place.in_sparsely(&from, base, to.get()?)?,
            None => place.in_whole(&from, to.get()?)?,
        };
        if most == Most::Within(done) {
            place.is_at_end(&from, base)?;
        }
        Ok(done)
    });
    tokio::select! {
        poured = poured => poured,
        () = cancelled.cancelled() => {
            gate.shut().await;
            Err(io::ErrorKind::Interrupted.into())
        }
    }
}

/// What a client gives is longer than what it is to be written into.
fn too_long() -> io::Error {
    io::Error::other("it has more bytes than there is place for")
}

/// What each write to a file of ours passes. A read of a client's file may take as long as that client likes, and what it gives
/// then is not to be written into a file that is somebody else's by now.
#[derive(Clone, Default)]
struct Gate(Arc<tokio::sync::Mutex<bool>>);

impl Gate {
    /// Nothing is written any more when this returns.
    async fn shut(&self) {
        *self.0.lock().await = true;
    }

    /// Writes, unless it is shut. For threads that are not the runtime's.
    fn pass(&self, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let is_shut = self.0.blocking_lock();
        if *is_shut { Err(io::ErrorKind::Interrupted.into()) } else { write() }
    }
}

/// Writes so many bytes of a file, from `at` on, to what a client has given. `sparse`: what holds nothing is left out there. Error:
/// `TimedOut` if its reader takes nothing for so long.
pub async fn pour_out(
    from: Arc<ClosedAside>,
    at: u64,
    length: u64,
    to: GivenFile,
    sparse: bool,
    patience: Duration,
    progress: impl Fn(u64) + Send + 'static,
) -> io::Result<u64> {
    let (takes, mut taken) = watch::channel(());
    let poured = pour("download", move |stopped| {
        let progress = |done| {
            takes.send_replace(());
            progress(done);
            Ok(())
        };
        let place = Pouring { at, most: length, stopped, gate: &Gate::default(), progress: &progress };
        if sparse { place.out_sparsely(from.get()?, &to) } else { place.out_whole(from.get()?, &to) }
    });
    tokio::select! {
        biased;
        poured = poured => poured,
        () = none_within(patience, &mut taken) => {
            let text = format!("its reader has taken nothing for {} s", patience.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        }
    }
}

/// Does that in a thread without rights, until nobody waits for it any more.
async fn pour(name: &str, work: impl FnOnce(&OwnedFd) -> io::Result<u64> + Send + 'static) -> io::Result<u64> {
    let (stop, stopped) = stop()?;
    let (told, done) = oneshot::channel();
    in_a_thread(name, move || {
        let _ = told.send(without_rights().and_then(|()| work(&stopped)));
    })?;
    let done = done.await;
    drop(stop);
    done.map_err(|_| io::Error::other("the thread that moves it failed"))?
}

/// Bytes that are moved between a file of ours and a client's.
struct Pouring<'a> {
    /// Where, in ours.
    at: u64,
    /// How many at most.
    most: u64,
    stopped: &'a OwnedFd,
    gate: &'a Gate,
    progress: &'a dyn Fn(u64) -> io::Result<()>,
}

impl Pouring<'_> {
    fn in_whole(&self, from: &GivenFile, to: &File) -> io::Result<u64> {
        let (mut done, mut piece) = (0, vec![0; PIECE]);
        while done < self.most {
            wait(from, PollFlags::IN, self.stopped)?;
            let wanted = (self.most - done).min(PIECE as u64) as usize;
            match rustix::io::read(from, &mut piece[..wanted]) {
                Ok(0) => break,
                Ok(count) => {
                    self.write(done, || to.write_all_at(&piece[..count], self.at + done))?;
                    done += count as u64;
                    (self.progress)(done)?;
                }
                Err(Errno::AGAIN | Errno::INTR) => leave_alone(self.stopped)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    /// Writes to a file of ours, unless nobody wants that any more.
    fn write(&self, done: u64, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.gate.pass(|| {
            (self.progress)(done)?;
            write()
        })
    }

    /// Refuses a client's file that goes on where there is no more place; `base`: it was read from there on, wherever it stands.
    fn is_at_end(&self, from: &GivenFile, base: Option<u64>) -> io::Result<()> {
        let mut more = [0u8; 1];
        loop {
            wait(from, PollFlags::IN, self.stopped)?;
            let read = match base {
                Some(base) => rustix::io::pread(from, &mut more, base.saturating_add(self.most)),
                None => rustix::io::read(from, &mut more),
            };
            match read {
                Ok(0) => return Ok(()),
                Ok(_) => return Err(too_long()),
                Err(Errno::AGAIN | Errno::INTR) => leave_alone(self.stopped)?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn in_sparsely(&self, from: &GivenFile, base: u64, to: &File) -> io::Result<u64> {
        let length = fstat(from)?.st_size.unsigned_abs().saturating_sub(base).min(self.most);
        let (mut done, mut piece) = (0, vec![0; PIECE]);
        while let Some((begin, end)) = next_data(from, base + done, base + length)? {
            self.write(done, || leave_out(to, self.at + done, begin - base - done))?;
            done = begin - base;
            while done < end - base {
                wait(from, PollFlags::IN, self.stopped)?;
                let wanted = (end - base - done).min(PIECE as u64) as usize;
                let count = rustix::io::pread(from, &mut piece[..wanted], base + done)?;
                if count == 0 {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter meanwhile"));
                }
                self.write(done, || to.write_all_at(&piece[..count], self.at + done))?;
                done += count as u64;
                (self.progress)(done)?;
            }
        }
        self.write(done, || leave_out(to, self.at + done, length - done))?;
        Ok(length)
    }

    fn out_whole(&self, from: &File, to: &GivenFile) -> io::Result<u64> {
        let is_file = FileType::from_raw_mode(fstat(to)?.st_mode) == FileType::RegularFile;
        let (mut done, mut piece) = (0, vec![0; PIECE]);
        while done < self.most {
            let wanted = (self.most - done).min(PIECE as u64) as usize;
            let count = from.read_at(&mut piece[..wanted], self.at + done)?;
            if count == 0 {
                break;
            }
            let mut left = &piece[..count];
            while !left.is_empty() {
                wait(to, PollFlags::OUT, self.stopped)?;
                // A pipe that takes anything takes so much.
                let most = if is_file { left.len() } else { left.len().min(TAKEN) };
                match rustix::io::write(to, &left[..most]) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(count) => left = &left[count..],
                    Err(Errno::AGAIN | Errno::INTR) => leave_alone(self.stopped)?,
                    Err(error) => return Err(error.into()),
                }
            }
            done += count as u64;
            (self.progress)(done)?;
        }
        Ok(done)
    }

    fn out_sparsely(&self, from: &File, to: &GivenFile) -> io::Result<u64> {
        let base = seekable(to)?;
        if rustix::fs::fcntl_getfl(to)?.contains(OFlags::APPEND) {
            return Err(io::Error::other("it only appends to its file: open it without O_APPEND"));
        }
        let (mut done, mut piece) = (0, vec![0; PIECE]);
        // What is there from there on would show through the holes.
        ftruncate(to, base)?;
        while let Some((begin, end)) = next_data(from, self.at + done, self.at + self.most)? {
            done = begin - self.at;
            while done < end - self.at {
                let wanted = (end - self.at - done).min(PIECE as u64) as usize;
                let count = from.read_at(&mut piece[..wanted], self.at + done)?;
                if count == 0 {
                    break;
                }
                self.write_out(to, &piece[..count], base + done)?;
                done += count as u64;
                (self.progress)(done)?;
            }
        }
        ftruncate(to, base + self.most)?;
        Ok(self.most)
    }

    /// Writes all that into a client's regular file. What a file system of the client's own says it has taken is what it likes.
    fn write_out(&self, to: &GivenFile, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut written = 0;
        while written < bytes.len() {
            wait(to, PollFlags::OUT, self.stopped)?;
            match rustix::io::pwrite(to, &bytes[written..], at + written as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => written += count,
                Err(Errno::AGAIN | Errno::INTR) => leave_alone(self.stopped)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// How many bytes a regular file has yet, from where it is read. Waits for whoever serves it.
fn length_left(given: &GivenFile) -> Option<u64> {
    let stat = fstat(given).ok().filter(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)?;
    stat.st_size.unsigned_abs().checked_sub(seek(given, SeekFrom::Current(0)).ok()?)
}

/// Where a client's file stands, which one can go about in.
fn seekable(file: &GivenFile) -> io::Result<u64> {
    match FileType::from_raw_mode(fstat(file)?.st_mode) {
        FileType::RegularFile => Ok(seek(file, SeekFrom::Current(0))?),
        _ => Err(io::Error::other("it is no regular file, and has no holes: leave out 'sparse'")),
    }
}

/// Where something is in a file from `at` on, before `end`: from where to where.
pub fn next_data(file: &impl AsFd, at: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= end {
        return Ok(None);
    }
    let begins = match seek(file, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => return Ok(None),
        // It has no holes that could be told.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, end))),
        begins => begins?,
    };
    let ends = seek(file, SeekFrom::Hole(begins))?.min(end);
    Ok((begins < ends).then_some((begins, ends)))
}

/// Has nothing in a part of a file of ours; it is as long as that at least.
fn leave_out(file: &File, at: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    if file.metadata()?.len() < at + length {
        file.set_len(at + length)?;
    }
    Ok(fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, length)?)
}

/// Tells a thread that nobody waits for it any more, when it is dropped.
struct StopsThread(Arc<OwnedFd>);

impl Drop for StopsThread {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

fn stop() -> io::Result<(StopsThread, Arc<OwnedFd>)> {
    let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    Ok((StopsThread(event.clone()), event))
}

fn in_a_thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(work).map(drop)
}

/// Takes all capabilities from the calling thread, and from it alone.
fn without_rights() -> io::Result<()> {
    let none = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?)
}

fn read_blocking(file: &GivenFile, most: usize, stopped: &OwnedFd) -> io::Result<Option<Vec<u8>>> {
    let (mut all, mut piece) = (Vec::new(), vec![0; PIECE]);
    loop {
        wait(file, PollFlags::IN, stopped)?;
        match rustix::io::read(file, &mut piece) {
            Ok(0) => return Ok(Some(all)),
            Ok(count) if count > most - all.len() => return Ok(None),
            Ok(count) => all.extend_from_slice(&piece[..count]),
            Err(Errno::AGAIN | Errno::INTR) => leave_alone(stopped)?,
            Err(error) => return Err(error.into()),
        }
    }
}

fn write_blocking(file: &GivenFile, bytes: &[u8], stopped: &OwnedFd, progress: &watch::Sender<()>) -> io::Result<()> {
    let mut left = bytes;
    while !left.is_empty() {
        wait(file, PollFlags::OUT, stopped)?;
        match rustix::io::write(file, &left[..left.len().min(TAKEN)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                left = &left[count..];
                progress.send_replace(());
            }
            Err(Errno::AGAIN | Errno::INTR) => leave_alone(stopped)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Waits until the file is ready. Error: `Interrupted` when nobody waits any more.
fn wait(file: &GivenFile, ready: PollFlags, stopped: &OwnedFd) -> io::Result<()> {
    let mut both = [PollFd::from_borrowed_fd(file.as_fd(), ready), PollFd::new(stopped, PollFlags::IN)];
    poll_for(&mut both, None)?;
    if both[1].revents().is_empty() { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
}

fn leave_alone(stopped: &OwnedFd) -> io::Result<()> {
    let mut one = [PollFd::new(stopped, PollFlags::IN)];
    poll_for(&mut one, Some(&NOT_READY))?;
    if one[0].revents().is_empty() { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
}

fn poll_for(files: &mut [PollFd<'_>], at_most: Option<&Timespec>) -> io::Result<()> {
    loop {
        match poll(files, at_most) {
            Err(Errno::INTR) => {}
            done => return Ok(done.map(drop)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::mpsc;

    const LONG: Patience = Patience { next: Duration::from_secs(3600), all: Duration::from_secs(3600) };

    /// The file as a client's, and what hears of its end.
    fn given(file: impl Into<OwnedFd>) -> (GivenFile, mpsc::Receiver<()>) {
        let (closed, hears) = mpsc::channel();
        let close = move |file| {
            drop(file);
            let _ = closed.send(());
        };
        (GivenFile::new(file.into(), close), hears)
    }

    #[tokio::test]
    async fn all_is_read_and_no_more_than_is_wanted() {
        let (ear, mut mouth) = std::io::pipe().unwrap();
        mouth.write_all(b"there").unwrap();
        drop(mouth);
        assert_eq!(read_all(given(ear).0, 5).await.unwrap().unwrap(), b"there");
        let zero = || given(std::fs::File::open("/dev/zero").unwrap());
        assert_eq!(read_all(zero().0, 1 << 20).await.unwrap(), None);
        let folder = given(std::fs::File::open("/").unwrap()).0;
        let why = read_all(folder, 5).await.unwrap_err();
        assert_eq!(why.kind(), io::ErrorKind::IsADirectory);
    }

    #[tokio::test]
    async fn a_file_is_closed_when_nobody_waits_for_it_any_more() {
        let (ear, _mouth) = std::io::pipe().unwrap();
        let (file, closed) = given(ear);
        let mut reading = Box::pin(read_all(file, 5));
        assert!(futures_util::poll!(&mut reading).is_pending());
        drop(reading);
        closed.recv().expect("closed");
        let (_ear, mouth) = std::io::pipe().unwrap();
        let (file, closed) = given(mouth);
        let mut writing = Box::pin(write_all(file, vec![7; 1 << 20], LONG));
        assert!(futures_util::poll!(&mut writing).is_pending());
        drop(writing);
        closed.recv().expect("closed");
    }

    #[tokio::test]
    async fn a_reader_gets_all_or_is_given_up() {
        let (ear, mouth) = std::io::pipe().unwrap();
        let reading = std::thread::spawn(move || std::io::read_to_string(ear).unwrap().len());
        write_all(given(mouth).0, vec![b'x'; 1 << 20], LONG).await.unwrap();
        assert_eq!(reading.join().unwrap(), 1 << 20, "it has seen the end");

        let (ear, mouth) = std::io::pipe().unwrap();
        drop(ear);
        let why = write_all(given(mouth).0, vec![7], LONG).await.unwrap_err();
        assert_eq!(why.kind(), io::ErrorKind::BrokenPipe);

        let short = Duration::from_millis(10);
        for patience in [Patience { next: short, ..LONG }, Patience { all: short, ..LONG }] {
            let (_ear, mouth) = std::io::pipe().unwrap();
            let (file, closed) = given(mouth);
            let why = write_all(file, vec![7; 1 << 20], patience).await.unwrap_err();
            assert_eq!(why.kind(), io::ErrorKind::TimedOut);
            closed.recv().expect("closed");
        }
    }

    #[test]
    fn what_is_of_no_use_is_told_at_once() {
        let (ear, mouth) = std::io::pipe().unwrap();
        let path = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let [ear, mouth, path, socket] =
            [ear.into(), mouth.into(), path, socket.into()].map(|file: OwnedFd| given(file).0);
        let why = |file, what_for| check(file, what_for).err().map(|error| error.to_string()).unwrap_or_default();
        for (file, reads, writes) in [
            (&ear, "", "for reading alone"),
            (&mouth, "for writing alone", ""),
            (&path, "a path", "a path"),
            (&socket, "", "a socket"),
        ] {
            for (what_for, word) in [(Use::Read, reads), (Use::Write, writes)] {
                let why = why(file, what_for);
                assert_eq!((why.is_empty(), why.contains(word)), (word.is_empty(), true), "{why}");
            }
        }
    }

    /// The kernel's own files look at who writes them.
    #[tokio::test]
    async fn a_file_is_written_without_our_rights() {
        let score = std::fs::File::options().write(true).open("/proc/self/oom_score_adj").unwrap();
        let why = write_all(given(score).0, b"-999".to_vec(), LONG).await.unwrap_err();
        assert_eq!(why.kind(), io::ErrorKind::PermissionDenied);
    }

    #[tokio::test]
    async fn a_file_that_is_too_long_is_refused_before_anything_is_written() {
        let mut source = tempfile::tempfile().unwrap();
        source.write_all(&[7; 5]).unwrap();
        std::io::Seek::seek(&mut source, std::io::SeekFrom::Start(1)).unwrap();
        let ours = tempfile::tempfile().unwrap();
        let pour = async |most: u64| {
            let from = given(source.try_clone().unwrap()).0;
            let to = Arc::new(ClosedAside::of(ours.try_clone().unwrap()));
            pour_in(from, to, 0, Most::Within(most), false, &CancellationToken::new(), |_| Ok(())).await
        };
        let refused = pour(3).await.unwrap_err().to_string();
        assert!(refused.contains("more bytes than"), "{refused}");
        assert_eq!(ours.metadata().unwrap().len(), 0);
        assert_eq!(pour(4).await.unwrap(), 4);
        assert_eq!(ours.metadata().unwrap().len(), 4);
    }

    /// The read that gives it began before anybody was told to stop.
    #[tokio::test]
    async fn what_is_read_when_nobody_wants_it_any_more_is_not_written() {
        let source = tempfile::tempfile().unwrap();
        source.write_all_at(b"late", 0).unwrap();
        let (ours, gate) = (tempfile::tempfile().unwrap(), Gate::default());
        gate.shut().await;
        let ours = std::thread::spawn(move || {
            let (_stop, stopped) = stop().unwrap();
            let place = Pouring { at: 0, most: u64::MAX, stopped: &stopped, gate: &gate, progress: &|_| Ok(()) };
            let from = given(source).0;
            for poured in [place.in_whole(&from, &ours), place.in_sparsely(&from, 0, &ours)] {
                assert_eq!(poured.unwrap_err().kind(), io::ErrorKind::Interrupted);
            }
            ours
        });
        assert_eq!(ours.join().unwrap().metadata().unwrap().len(), 0);
    }
}
