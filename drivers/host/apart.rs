//! Guests' files among virtd's descriptors, apart from all others.
//!
//! A new process has a copy of each descriptor of whoever makes it, and closes them before its program runs. Closing a file may
//! wait for its file system, as one of a network does that has still to write. So a file that virtd has open for one machine, on
//! storage that is dead, would keep every other machine from being started.
//!
//! ```text
//!   virtd's table    0 ── sockets, logs, O_PATH … ──┬─ first() ── guests' files ──▶
//!   of a thread      0 ── the same ─────────────────┘ ─▶ fork: the process has none of them
//! ```
//!
//! Whatever opens guests' files gives them a high number ([`apart`]), and whatever makes processes does that in a thread with a
//! table of its own, which ends below those ([`without`], [`leave`]). Only for the moment between the two system calls of
//! [`apart`] has a file a low number. Files that clients send have none while a process is made ([`arrive`]): a client may have
//! made the file system, and could wait for that moment.

use super::process::reap_unheld;
use rustix::fs::{Mode, OFlags};
use rustix::io::{DupFlags, fcntl_dupfd_cloexec};
use rustix::net::sockopt::set_socket_linger;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::io;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock, mpsc};
use std::time::Duration;

/// Descriptors of virtd's own there are at most so many; fewer where it may have fewer in all.
const MOST_OWN: u64 = 1 << 15;

/// The first number of guests' files: half of what we may have when it is first asked.
pub fn first() -> RawFd {
    static FIRST: OnceLock<RawFd> = OnceLock::new();
    *FIRST.get_or_init(|| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let half = limit.map_or(MOST_OWN, |limit| (limit / 2).min(MOST_OWN));
        // Kernels copy whole words of the table, and would close what is beyond.
        RawFd::try_from(half & !63).unwrap_or(RawFd::MAX)
    })
}

/// The same file under a high number. Blocks, as closing it may.
pub fn apart(file: OwnedFd) -> io::Result<OwnedFd> {
    copy(file.as_fd())
}

/// Another descriptor of a file that is open elsewhere, under a high number. Waits for nobody.
pub fn copy(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(fcntl_dupfd_cloexec(file, first())?)
}

/// Read by whoever has strangers' files under low numbers, written by whoever copies those for a process.
static LOW: RwLock<()> = RwLock::new(());

/// What stands in the place of a file for a moment; closing it waits for nobody.
static NOTHING: OnceLock<OwnedFd> = OnceLock::new();

/// Threads that close files of strangers, each for as long as its file system takes.
static CLOSERS: AtomicUsize = AtomicUsize::new(0);
/// So many of them there may be for files that nobody wanted.
const SPARE_CLOSERS: usize = 256;

/// Whether so many files that nobody wants can be received and closed.
pub fn can_spare(files: usize) -> bool {
    CLOSERS.load(Ordering::Relaxed) + 2 * files <= SPARE_CLOSERS
}

/// Gets ready for [`arrive`]. On failure nothing is to be received.
pub fn expects() -> io::Result<()> {
    if NOTHING.get().is_none() {
        let nothing = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let _ = NOTHING.set(nothing);
    }
    Ok(())
}

/// Takes in descriptors that others sent, by `receive`, and gives them high numbers: all of them, or none where they cannot have
/// one. No process is made before that is done, so `receive` must not wait. Blocks for a moment; it waits for no file system. Of
/// each, what `held` gives for it is dropped when its file system has nothing more to do for the low number.
pub fn arrive<T, H: Send + 'static>(
    receive: impl FnOnce() -> io::Result<(T, Vec<OwnedFd>)>,
    held: impl Fn(usize) -> H,
) -> io::Result<(T, io::Result<Vec<OwnedFd>>)> {
    expects()?;
    let _shared = LOW.read().unwrap_or_else(PoisonError::into_inner);
    let (received, low) = receive()?;
    let (mut high, mut failure) = (Vec::new(), None);
    for file in &low {
        // Who sent it may have wanted its end to take time. What is no socket has none of that.
        let _ = set_socket_linger(file, None);
        match copy(file.as_fd()) {
            Ok(copy) => high.push(copy),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    vacate(low, held);
    let Some(failure) = failure else { return Ok((received, Ok(high))) };
    high.into_iter().for_each(|file| close(file, || ()));
    Ok((received, Err(failure)))
}

/// Closes a file in a thread that nobody waits for, and then runs `then`. Where no thread is to be had it stays open and `then` is
/// not run, since whoever waited for it might wait for ever.
pub fn close(file: OwnedFd, then: impl FnOnce() + Send + 'static) {
    in_closer(move || {
        drop(file);
        then();
    });
}

/// Runs what closes a file in a thread of its own; where there is none, all that it has stays open. Whether it runs.
fn in_closer(close: impl FnOnce() + Send + 'static) -> bool {
    let close = ManuallyDrop::new(close);
    CLOSERS.fetch_add(1, Ordering::Relaxed);
    let closing = move || {
        ManuallyDrop::into_inner(close)();
        CLOSERS.fetch_sub(1, Ordering::Relaxed);
    };
    let begun = std::thread::Builder::new().name("closer".into()).stack_size(64 << 10).spawn(closing);
    if let Err(error) = &begun {
        tracing::warn!(%error, "a file of a client stays open: there is no thread to close it in");
    }
    begun.is_ok()
}

/// Takes files from their numbers. What their file systems have to do then is waited for by threads that nobody waits for.
fn vacate<H: Send + 'static>(files: Vec<OwnedFd>, held: impl Fn(usize) -> H) {
    // What is no more than a path has nothing to be waited for, and is closed here.
    let waits = |file: &OwnedFd| rustix::fs::fcntl_getfl(file).is_ok_and(|flags| !flags.contains(OFlags::PATH));
    let files = files.into_iter().enumerate().filter(|(_, file)| waits(file));
    let vacated: Vec<RawFd> = files
        .filter_map(|(at, file)| {
            let (number, held) = (file.into_raw_fd(), held(at));
            let replace = move || {
                // SAFETY: the number is that of a file which was given up above, and nothing closes it before it is replaced.
                let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
                let replaced = NOTHING.get().map(|nothing| rustix::io::dup3(nothing, &mut place, DupFlags::CLOEXEC));
                drop((replaced, held));
            };
            in_closer(replace).then_some(number)
        })
        .collect();
    for number in vacated {
        // SAFETY: the number is ours until it is closed here; it has been replaced by then.
        let place = unsafe { OwnedFd::from_raw_fd(number) };
        while waits(&place) {
            std::thread::yield_now();
        }
    }
}

/// From now on the calling thread, which must not be the only one, has a table of its own, without guests' files. What it opens
/// is its own; what others have opened before it may use, and must not close for them.
pub fn leave() -> io::Result<Left> {
    is_room()?;
    const UNSHARE: libc::c_uint = 1 << 1;
    let _alone = LOW.write().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the files above stay open in the table that the thread leaves.
    match unsafe { libc::syscall(libc::SYS_close_range, first(), libc::c_uint::MAX, UNSHARE) } {
        0 => Ok(Left(PhantomData)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Refuses where virtd's own descriptors have come among those of guests' files: no process would have them.
fn is_room() -> io::Result<()> {
    let free = fcntl_dupfd_cloexec(io::stderr(), 0).map_err(|error| none_left(&error.into()))?;
    if free.as_raw_fd() < first() { Ok(()) } else { Err(none_left(&rustix::io::Errno::MFILE.into())) }
}

/// Why there is no descriptor for a new process: its places are above those, or there is none at all.
pub fn none_left(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::EMFILE) => io::Error::other(
            "virtd has as many open files as it may have; end some guests, or raise LimitNOFILE= of its unit",
        ),
        _ => io::Error::new(error.kind(), error.to_string()),
    }
}

/// A thread that has a table of its own.
pub struct Left(PhantomData<*const ()>);

impl Left {
    /// Closes all that the thread has but `kept`, in ascending order: what others have open there ends when they close it.
    pub fn keep_only(&self, kept: impl Iterator<Item = RawFd>) {
        let mut next = 0;
        let close = |first: RawFd, last: RawFd| {
            // SAFETY: as in `let_go`.
            let _ = first <= last && unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0;
        };
        for kept in kept {
            close(next, kept - 1);
            next = kept + 1;
        }
        close(next, RawFd::MAX);
    }

    /// Closes all that the thread has: what a process that it has made holds is that process's alone now.
    pub fn let_go(self) {
        // SAFETY: closes descriptors of this thread's own table; their owners have them in another one.
        unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
    }
}

/// Runs `work`, which makes processes, in a thread that has left. Blocks. Descriptors that it makes must not come back.
pub fn without<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("maker".into());
        let thread = thread.spawn_scoped(scope, || leave().and_then(|_left| work()))?;
        thread.join().map_err(|_| io::Error::other("the thread that makes a process failed"))?
    })
}

/// Has `make` make a process in a thread that has left, and gives the process to `follow`. The thread lives until `follow` has
/// returned, for a process may end with the thread that made it; by then it has let go of all that it has open, and what it was
/// `given` is dropped where that was opened: nobody but the process has it. Blocks.
pub fn made<G: Send, P: Send, T>(
    mut given: G,
    make: impl FnOnce(&mut G) -> io::Result<P> + Send,
    follow: impl FnOnce(P) -> io::Result<T>,
) -> io::Result<T> {
    let (tell, is_made) = mpsc::channel();
    let (done, until_done) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let making = move || {
            let process = leave().and_then(|left| {
                let process = make(&mut given);
                left.let_go();
                process
            });
            let _ = tell.send((process, given));
            let _ = until_done.recv();
        };
        std::thread::Builder::new().name("maker".into()).spawn_scoped(scope, making)?;
        let failed = |_| io::Error::other("the thread that makes a process failed");
        let (process, given) = is_made.recv().map_err(failed)?;
        drop(given);
        let followed = process.and_then(follow);
        drop(done);
        followed
    })
}

/// As [`made`], of a process that has our memory at first. `make` calls what it is given with its number as soon as there is one,
/// and gives that when the process has run its program or ended: `follow` does in the meantime what is to be done with it, and where
/// that fails sees to its end. The thread lives until then, for a process may end with the thread that made it. Then `finish` has what
/// `follow` gave, and what was `given`, with which the thread has nothing more: when that is dropped nobody but the process has it.
/// A process that takes longer than `within` from what `follow` did is a failure: what `follow` gave is dropped, which is to end the
/// process, and its end is waited for. Blocks.
pub fn made_by_vfork<G: Send, F, T>(
    mut given: G,
    make: impl FnOnce(&mut G, &Left, &Born) -> io::Result<libc::pid_t> + Send,
    follow: impl FnOnce(libc::pid_t) -> io::Result<F>,
    within: Duration,
    finish: impl FnOnce(F, G) -> io::Result<T>,
) -> io::Result<T> {
    let (born, is_born) = mpsc::channel();
    let (done, is_done) = mpsc::channel();
    let failed = || io::Error::other("the thread that makes a process failed");
    std::thread::scope(|scope| {
        let making = move || {
            let made = leave().and_then(|left| {
                let born = Born { tell: born, is_told: AtomicBool::new(false) };
                let made = make(&mut given, &left, &born).and_then(|number| born.told_of(number));
                left.let_go();
                made
            });
            let _ = done.send((made, given));
        };
        std::thread::Builder::new().name("maker".into()).spawn_scoped(scope, making)?;
        // Where there is none, what follows says why.
        let followed = is_born.recv().map(follow).ok().transpose()?;
        let (made, given) = is_done.recv_timeout(within).map_err(|error| match error {
            mpsc::RecvTimeoutError::Timeout => {
                io::Error::new(io::ErrorKind::TimedOut, "its process does not come to run the program")
            }
            mpsc::RecvTimeoutError::Disconnected => failed(),
        })?;
        made.and_then(|()| finish(followed.ok_or_else(failed)?, given))
    })
}

/// Tells of a process in the moment in which there is one. It is the making thread's, which lets go of it when the process has run
/// its program or ended, however that was.
pub struct Born {
    tell: mpsc::Sender<libc::pid_t>,
    is_told: AtomicBool,
}

impl Born {
    /// Its number.
    pub fn tell(&self, number: libc::pid_t) {
        self.is_told.store(self.tell.send(number).is_ok(), Ordering::Release);
    }

    /// One of which nobody was told was killed in its first moment, and is reaped here.
    fn told_of(&self, number: libc::pid_t) -> io::Result<()> {
        if self.is_told.load(Ordering::Acquire) {
            return Ok(());
        }
        Pid::from_raw(number).into_iter().for_each(reap_unheld);
        Err(io::Error::other("its process was killed"))
    }
}

/// Starts a program whose streams are none, or open already: pipes that this made (`Stdio::piped`) would be lost.
#[allow(clippy::disallowed_methods, reason = "without guests' files")]
pub fn start(command: &mut Command) -> io::Result<Child> {
    without(|| command.spawn())
}

/// A copy of one of virtd's files for a thread that has left. It is that thread's, and must be dropped by it.
pub fn fetch(file: &impl AsFd) -> io::Result<OwnedFd> {
    let us = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(us, file.as_fd().as_raw_fd(), PidfdGetfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::process::Stdio;

    fn guests_file() -> File {
        apart(tempfile::tempfile().unwrap().into()).unwrap().into()
    }

    fn numbers(command: &mut Command) -> Vec<RawFd> {
        let listed = without(|| command.args(["/proc/self/fd"]).stdin(Stdio::null()).output()).unwrap();
        String::from_utf8(listed.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect()
    }

    #[test]
    fn what_is_made_has_no_file_of_guests() {
        let file = guests_file();
        assert!(file.as_raw_fd() >= first());
        // Also what is not closed by exec.
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        let has = numbers(&mut Command::new("ls"));
        assert!(has.contains(&1) && has.iter().all(|number| *number < first()), "{has:?}");
        assert!(rustix::io::fcntl_getfd(&file).is_ok(), "it is open here");
    }

    #[test]
    fn what_arrives_has_a_high_number_and_leaves_none_behind() {
        let (mut ear, mouth) = std::io::pipe().unwrap();
        let path = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let low = [mouth.as_raw_fd(), path.as_raw_fd()];
        let (said, files) = arrive(|| Ok(("here", vec![mouth.into(), path])), |_| ()).unwrap();
        let files = files.unwrap();
        assert!(said == "here" && files.len() == 2 && files.iter().all(|file| file.as_raw_fd() >= first()));
        assert!(numbers(&mut Command::new("ls")).iter().all(|number| !low.contains(number)), "no process has one");
        let mut files = files.into_iter();
        File::from(files.next().unwrap()).write_all(b"there").unwrap();
        let mut heard = String::new();
        ear.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "there", "nobody else has that end");
        assert!(arrive(|| Err::<((), _), _>(io::ErrorKind::WouldBlock.into()), |_| ()).is_err());
    }

    /// What another thread has in hand is neither closed nor waited for.
    #[test]
    fn a_thread_that_has_left_uses_what_is_open_and_closes_its_own() {
        let (mut file, low) = (guests_file(), tempfile::tempfile().unwrap());
        let copied = without(|| {
            assert!(rustix::io::fcntl_getfd(&file).is_err(), "it is not there");
            rustix::io::fcntl_getfd(&low)?;
            File::from(fetch(&file)?).write_all(b"from there")?;
            leave()?.let_go();
            Ok(rustix::io::fcntl_getfd(&low).is_err())
        });
        assert!(copied.unwrap(), "it had let go");
        rustix::io::fcntl_getfd(&low).unwrap();
        let mut text = String::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "from there");
    }
}
