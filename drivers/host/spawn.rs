//! Makes a process that outlives us, with nothing inherited but what it is given, and none that we could lose.
//!
//! ```text
//!   us:     wall ─▶ vfork ─▶ pidfd, start time ──▶ record on disk ──▶ "go" ──▶ wait for exec or its end
//!   child:            └─▶ descriptors, session, limits, user ─▶ wait ────┴──▶ exec
//! ```
//!
//! The wall ([`super::wall`]) is put up in the thread that forks; the child is behind it from its first moment, and in the
//! control groups that this thread has joined before. Where the wall is not root's the child puts it up, before anything else.
//!
//! Until "go" the child dies with us: the kernel kills it, and a closed pipe ends it. From "go" on the record says who it
//! is. So at every moment a virtd that is killed leaves either no process or one that the next virtd can find.
//!
//! Until its program runs the child has our memory ([`vfork`]), in which it leaves why it failed. It is killed only where it does
//! not end by itself.

use super::apart::{self, Born, Left};
use super::files::Program;
use super::process::{Identity, kill, reap_unheld};
use super::ready::ready_by;
use super::tool::limit;
use super::user::RunAs;
use super::vfork::{Kin, die_with, vfork};
use super::wall::{self, Ground, Maker, Wall};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// What to run.
pub struct Plan<'a> {
    /// The program, an absolute path.
    pub program: &'a Path,
    /// The file that is run, whatever that path means by then; what it means, if `None`.
    pub judged: Option<&'a Program>,
    /// Its arguments, without its name.
    pub args: &'a [String],
    /// Its whole environment.
    pub env: &'a [(String, String)],
    /// Becomes its standard output and error.
    pub output: &'a File,
    /// Become its descriptors of these numbers, each other than 0, 1, 2, 4 and below 198.
    pub gifts: Vec<(RawFd, OwnedFd)>,
    /// Whom it runs as; as we do if `None`.
    pub user: Option<&'a RunAs>,
    /// How many bytes of its memory it may keep from being swapped; as many as we may if `None`.
    pub lock_limit: Option<u64>,
    /// How many descriptors it may have; as many as we may if `None`.
    pub descriptors: Option<u64>,
    /// How long the files that it writes may become, in bytes; beyond that it cannot write to them. As long as ours may if
    /// `None`.
    pub file_limit: Option<u64>,
    /// What it finds around it; all that we do if `None`.
    pub wall: Option<&'a Wall>,
    /// The ground of that wall, where it was made before.
    pub ground: Option<&'a Ground>,
    /// Called by the thread that is to go behind the wall, and makes the process there: what that thread joins, the process is
    /// in from its first moment. Never called without a wall, nor with one that the process makes itself.
    pub join: &'a (dyn Fn() + Sync),
    /// It keeps the rights that it has, and may gain more by what it runs.
    pub privileged: bool,
}

impl<'a> Plan<'a> {
    /// A program with these arguments, and with nothing else but that output.
    pub fn new(program: &'a Path, args: &'a [String], output: &'a File) -> Plan<'a> {
        Plan {
            program,
            judged: None,
            args,
            env: &[],
            output,
            gifts: Vec::new(),
            user: None,
            lock_limit: None,
            descriptors: None,
            file_limit: None,
            wall: None,
            ground: None,
            join: &|| (),
            privileged: false,
        }
    }
}

/// A process that runs its program, or died of it.
pub struct Spawned {
    /// Who it is.
    pub identity: Identity,
    /// Its pidfd.
    pub fd: OwnedFd,
}

/// The child's end of the pipe by which it is told to go, or to end. That is said in a word: the thread that makes the child has
/// copies of both ends until the child runs.
const GO: RawFd = 4;
const RUN: u8 = b'!';
const END: u8 = b'.';
/// The program, where it was judged before.
const PROGRAM: RawFd = 199;
/// Copies are made above here, so that none is in another's place.
const ABOVE: RawFd = 200;

/// Threads of one user, where no control group holds them: fewer than would be felt by others.
const THREADS: libc::rlim_t = 4096;

/// How long a child may take from "go" to its program; or, where it is not to go, to its end.
const UNTIL_IT_RUNS: Duration = Duration::from_secs(30);

/// What a child may have failed to do.
const STAGES: [&str; 7] = [
    "set up its descriptors",
    "set up its session",
    "set its limits",
    "change to the user",
    "give up privileges",
    "be tied to us",
    "run",
];

/// Everything the child needs, made before it exists: what it made itself would stay with us.
struct Prepared {
    program: CString,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    /// Where each of its descriptors comes from, and which it becomes; in ascending order.
    places: Vec<(OwnedFd, RawFd)>,
    /// Ranges of descriptors that it must not have.
    gaps: Vec<(RawFd, RawFd)>,
    user: Option<RunAs>,
    lock_limit: Option<u64>,
    descriptors: Option<u64>,
    file_limit: Option<u64>,
    /// It is run by its descriptor; `Some(true)`: an interpreter must be able to open that again.
    by_descriptor: Option<bool>,
    privileged: bool,
    /// Threads of its user are bounded.
    few_threads: bool,
    /// Who must be its parent; in a process namespace of its own it has none.
    parent: Option<Pid>,
    /// Why it did not come to run its program.
    failure: OnceLock<Failure>,
    /// What `argv` and `envp` point into.
    _strings: Vec<CString>,
}

// SAFETY: the pointers are to its own strings, which nobody changes.
unsafe impl Send for Prepared {}

/// Why a child failed.
enum Failure {
    /// Its wall could not be made.
    Wall(io::Error),
    /// It could not do that one of [`STAGES`].
    Stage(usize, io::Error),
}

/// Starts the process. `record` is called with its identity, and must have it on disk when it returns, before the
/// program runs. Blocks until the program runs; the calling thread must live that long. On error there is no process.
pub fn spawn(plan: Plan<'_>, record: impl FnOnce(&Identity) -> io::Result<()>) -> io::Result<Spawned> {
    let (program, wall, ground, join) = (plan.program.to_owned(), plan.wall, plan.ground, plan.join);
    let (go_child, go) = pipe()?;
    let prepared = Prepared::new(plan, go_child)?;
    let release = |pid| {
        let mut child = Child::hold(pid, go.into())?;
        child.record(record)?;
        child.let_go();
        Ok(child)
    };
    let fork = |prepared: &mut Prepared, left: &Left, born: &Born| match wall {
        None => prepared.fork(left, born),
        Some(wall) if wall.maker == Maker::Own => {
            let forked = wall::fork(
                wall,
                |pid| born.tell(pid),
                |ready| match ready {
                    Ok(()) => prepared.exec(),
                    Err(why) => prepared.fail(Failure::Wall(why)),
                },
            );
            forked.map_err(|e| unwalled(&program, &e))
        }
        Some(wall) => {
            join();
            wall.enter(ground).map_err(|e| unwalled(&program, &e))?;
            prepared.fork(left, born)
        }
    };
    let finish = |child: Child, prepared: Prepared| match prepared.failure.into_inner() {
        None => child.release(),
        Some(failure) => Err(failure.explain(&program)),
    };
    // Until it is told to go, the child dies with the thread that made it.
    apart::made_by_vfork(prepared, fork, release, UNTIL_IT_RUNS, finish)
}

fn unwalled(program: &Path, why: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("{} cannot be walled in: {why}", program.display()))
}

/// A child that is ended unless it is released.
struct Child {
    pid: libc::pid_t,
    /// What it waits for.
    go: Option<File>,
    held: Option<Spawned>,
    is_released: bool,
}

impl Child {
    /// Takes hold of a child that nobody has reaped.
    fn hold(pid: libc::pid_t, go: File) -> io::Result<Child> {
        let mut child = Child { pid, go: Some(go), held: None, is_released: false };
        let named = Pid::from_raw(pid).ok_or_else(released)?;
        let fd = pidfd_open(named, PidfdFlags::empty())?;
        child.held = Some(Spawned { identity: Identity::of(pid)?, fd });
        Ok(child)
    }

    fn record(&self, record: impl FnOnce(&Identity) -> io::Result<()>) -> io::Result<()> {
        self.held.as_ref().map_or_else(|| Err(released()), |spawned| record(&spawned.identity))
    }

    /// Lets it run its program. One that has failed by now has said why.
    fn let_go(&mut self) {
        let _ = self.go.take().map(|mut go| go.write_all(&[RUN]));
    }

    fn release(mut self) -> io::Result<Spawned> {
        self.is_released = true;
        self.held.take().ok_or_else(released)
    }
}

fn released() -> io::Error {
    io::Error::other("the child was released")
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.is_released {
            return;
        }
        // It may have a lock of ours: it ends by itself, and is killed only where it hangs in the kernel.
        let is_to_end = self.go.take().map(|mut go| go.write_all(&[END])).is_some();
        match &self.held {
            Some(Spawned { fd, .. }) => {
                if is_to_end {
                    let _ = ready_by([fd.as_fd()], Instant::now() + UNTIL_IT_RUNS);
                }
                kill(fd);
            }
            None => Pid::from_raw(self.pid).into_iter().for_each(reap_unheld),
        }
    }
}

impl Failure {
    fn explain(self, program: &Path) -> io::Error {
        let (stage, why) = match self {
            Failure::Wall(why) => return unwalled(program, &why),
            Failure::Stage(stage, why) => (STAGES.get(stage).unwrap_or(&"start"), why),
        };
        let locked = *stage == "set its limits" && why.kind() == io::ErrorKind::PermissionDenied;
        let remedy = if locked {
            "; the limit of locked memory, which guests inherit from virtd, is too low for it"
        } else {
            ""
        };
        io::Error::new(why.kind(), format!("{} cannot {stage}: {why}{remedy}", program.display()))
    }
}

/// Both ends, not inherited, out of the way of the child's places.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((above(&read)?, above(&write)?))
}

fn above(fd: &impl AsFd) -> io::Result<OwnedFd> {
    let copy = fcntl_dupfd_cloexec(fd, ABOVE).map_err(|error| apart::none_left(&error.into()))?;
    // From there on no process would have it.
    if copy.as_raw_fd() < apart::first() { Ok(copy) } else { Err(apart::none_left(&Errno::MFILE.into())) }
}

fn string(bytes: &OsStr) -> io::Result<CString> {
    CString::new(bytes.as_bytes()).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "NUL in an argument"))
}

impl Prepared {
    fn new(plan: Plan<'_>, go: OwnedFd) -> io::Result<Prepared> {
        if plan.user.is_some() {
            others_cannot_look_in()?;
        }
        let program = string(plan.program.as_os_str())?;
        let args = plan.args.iter().map(|arg| string(OsStr::new(arg))).collect::<io::Result<Vec<_>>>()?;
        let env = plan.env.iter().map(|(key, value)| string(OsStr::new(&format!("{key}={value}"))));
        let env = env.collect::<io::Result<Vec<_>>>()?;
        // A CString's bytes stay where they are when it is moved.
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let argv = [vec![program.as_ptr()], pointers(&args), vec![ptr::null()]].concat();
        let envp = [pointers(&env), vec![ptr::null()]].concat();
        let mut places =
            vec![(above(&File::open("/dev/null")?)?, 0), (above(plan.output)?, 1), (above(plan.output)?, 2)];
        places.push((go, GO));
        for (place, gift) in &plan.gifts {
            if (0..=2).contains(place) || *place == GO || *place >= wall::PTMX {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("descriptor {place} is taken")));
            }
            places.push((above(gift)?, *place));
        }
        if let Some(judged) = plan.judged {
            places.push((above(&judged.as_fd())?, PROGRAM));
        }
        let alone = plan.wall.is_some_and(|wall| wall.maker == Maker::Own);
        if let Some(terminals) = alone.then(wall::terminals).flatten() {
            places.push((above(&terminals)?, wall::PTMX));
        }
        places.sort_by_key(|(_, place)| *place);
        let ends = places.iter().map(|(_, place)| place - 1).skip(1).chain([RawFd::MAX]);
        let gaps = places.iter().map(|(_, place)| place + 1).zip(ends).filter(|(first, last)| first <= last).collect();
        Ok(Prepared {
            program,
            argv,
            envp,
            places,
            gaps,
            user: plan.user.cloned(),
            lock_limit: plan.lock_limit,
            descriptors: plan.descriptors,
            file_limit: plan.file_limit,
            by_descriptor: plan.judged.map(Program::is_script),
            privileged: plan.privileged,
            // In a user namespace of its own its user's are its own.
            few_threads: plan.user.is_some() || alone,
            parent: (!alone).then(getpid),
            failure: OnceLock::new(),
            _strings: args.into_iter().chain(env).collect(),
        })
    }

    /// Makes the child; gives its number when it has run its program or ended.
    fn fork(&self, left: &Left, born: &Born) -> io::Result<libc::pid_t> {
        let mut sources: Vec<RawFd> = self.places.iter().map(|(from, _)| from.as_raw_fd()).collect();
        sources.sort_unstable();
        left.keep_only(sources.into_iter());
        vfork(Kin::Child, |pid| {
            born.tell(pid);
            self.exec()
        })
    }

    /// The child's whole life before the program. System calls only.
    fn exec(&self) -> ! {
        let stages: [fn(&Prepared) -> bool; 6] = [
            Self::take_descriptors,
            Self::new_session,
            Self::set_limits,
            Self::change_user,
            Self::give_up_privileges,
            Self::wait_for_go,
        ];
        for (stage, work) in stages.iter().enumerate() {
            if !work(self) {
                self.fail(Failure::Stage(stage, io::Error::last_os_error()));
            }
        }
        // SAFETY: both arrays end with null and their strings live in `self`.
        unsafe {
            match self.by_descriptor {
                None => libc::execve(self.program.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()),
                Some(_) => {
                    let (name, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH);
                    let (argv, envp) = (self.argv.as_ptr(), self.envp.as_ptr());
                    libc::syscall(libc::SYS_execveat, PROGRAM, name, argv, envp, flags) as libc::c_int
                }
            }
        };
        self.fail(Failure::Stage(STAGES.len() - 1, io::Error::last_os_error()))
    }

    /// Ends the child, and leaves why.
    fn fail(&self, why: Failure) -> ! {
        let _ = self.failure.set(why);
        // SAFETY: ends this process, and runs nothing of what its thread would run at an end.
        unsafe { libc::_exit(127) }
    }

    /// Takes its own, closes all others.
    fn take_descriptors(&self) -> bool {
        let close = |(first, last): &(RawFd, RawFd)| {
            // SAFETY: closes descriptors of this process, which owns nothing else any more.
            unsafe { libc::syscall(libc::SYS_close_range, *first, *last, 0) == 0 }
        };
        // SAFETY: as above; sources are all above the places.
        let own = unsafe {
            self.places.iter().all(|(from, place)| libc::dup2(from.as_raw_fd(), *place) >= 0)
                && libc::fcntl(GO, libc::F_SETFD, libc::FD_CLOEXEC) >= 0
                && (self.by_descriptor != Some(false) || libc::fcntl(PROGRAM, libc::F_SETFD, libc::FD_CLOEXEC) >= 0)
        };
        own && self.gaps.iter().all(close)
    }

    /// Its own session, no signal blocked, none handled as ours are, none ignored (Rust ignores SIGPIPE) but that of a file that has
    /// become too long: where that is a log which others fill, the process goes on.
    fn new_session(&self) -> bool {
        // SAFETY: plain system calls on a zeroed set, which is how an empty one looks after sigemptyset.
        unsafe {
            (1..=libc::SIGRTMAX()).for_each(not_ours);
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            let too_long = if self.file_limit.is_some() { libc::SIG_IGN } else { libc::SIG_DFL };
            libc::signal(libc::SIGPIPE, libc::SIG_DFL) != libc::SIG_ERR
                && libc::signal(libc::SIGXFSZ, too_long) != libc::SIG_ERR
                && libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut()) == 0
                && libc::setsid() != -1
                && libc::chdir(c"/".as_ptr()) == 0
        }
    }

    /// No core dumps (they would hold the guest's memory), no file for others to read, of a user of its own no more
    /// threads than that, and what the plan says.
    fn set_limits(&self) -> bool {
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        let threads = libc::rlimit { rlim_cur: THREADS, rlim_max: THREADS };
        let locked = |bytes| libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
        // SAFETY: reads values on this stack.
        unsafe {
            libc::umask(0o077);
            libc::setrlimit(libc::RLIMIT_CORE, &none) == 0
                && (!self.few_threads || libc::setrlimit(libc::RLIMIT_NPROC, &threads) == 0)
                && self.lock_limit.is_none_or(|bytes| libc::setrlimit(libc::RLIMIT_MEMLOCK, &locked(bytes)) == 0)
                && limit(libc::RLIMIT_NOFILE, self.descriptors).is_ok()
                && limit(libc::RLIMIT_FSIZE, self.file_limit).is_ok()
        }
    }

    fn change_user(&self) -> bool {
        let Some(user) = &self.user else { return true };
        // The kernel's own calls: by the C library's our threads would change with it. While it is another's with our memory,
        // nobody but root may look into that, as into any process that has changed its user.
        // SAFETY: changes properties of this process; the slice lives in `self`. The last of the capabilities is not known:
        // the kernel refuses what is beyond it.
        unsafe {
            (0..=63).all(|right| {
                libc::prctl(libc::PR_CAPBSET_READ, right, 0, 0, 0) != 1
                    || libc::prctl(libc::PR_CAPBSET_DROP, right, 0, 0, 0) == 0
            }) && libc::syscall(libc::SYS_setgroups, user.groups.len(), user.groups.as_ptr()) == 0
                && libc::syscall(libc::SYS_setresgid, user.gid, user.gid, user.gid) == 0
                && libc::syscall(libc::SYS_setresuid, user.uid, user.uid, user.uid) == 0
        }
    }

    /// Nothing that it runs gives it any.
    fn give_up_privileges(&self) -> bool {
        // SAFETY: sets a property of this process.
        self.privileged || unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 }
    }

    /// Lives on only if the parent says so; from then on it needs no parent.
    fn wait_for_go(&self) -> bool {
        // After the change of user, which clears it.
        if die_with(self.parent).is_err() {
            return false;
        }
        let mut byte = 0u8;
        loop {
            // SAFETY: reads one byte into one on this stack.
            match unsafe { libc::read(GO, (&raw mut byte).cast(), 1) } {
                // SAFETY: sets a property of this process.
                1 if byte == RUN => return unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, 0, 0, 0, 0) == 0 },
                -1 if unsafe { *libc::__errno_location() } == libc::EINTR => {}
                _ => unsafe { libc::_exit(127) },
            }
        }
    }
}

/// Refuses where the kernel would let others of its new user look into a process that has changed its user: a child has our memory.
fn others_cannot_look_in() -> io::Result<()> {
    match std::fs::read_to_string("/proc/sys/fs/suid_dumpable") {
        Ok(value) if value.trim() == "1" => Err(io::Error::other(
            "the kernel shows the memory of processes that change their user (fs.suid_dumpable is 1): no process is made for \
             another user; set it to 0 or 2 (sysctl fs.suid_dumpable=0)",
        )),
        _ => Ok(()),
    }
}

/// A signal that we handle does to the calling process what it does to any.
fn not_ours(signal: libc::c_int) {
    // SAFETY: changes a property of this process; zeroes are a valid action.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let known = libc::sigaction(signal, ptr::null(), &raw mut action) == 0;
        if known && ![libc::SIG_DFL, libc::SIG_IGN].contains(&action.sa_sigaction) {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
}

#[cfg(test)]
#[path = "spawn_tests.rs"]
mod tests;
