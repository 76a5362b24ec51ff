//! A process held by its pidfd, whether it is our child or outlived an earlier virtd: never the wrong one.

use super::ready::ready_by;
use rustix::io::retry_on_intr;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitOptions, kill_process, kill_process_group, pidfd_open,
    pidfd_send_signal, waitid, waitpid,
};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What names one process among all that ever had its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since the host booted.
    pub start_time: u64,
    /// The boot of the host.
    pub boot_id: String,
}

/// A process of ours. Dropping it does nothing to the process.
pub struct Process(AsyncFd<PidFd>);

/// A pidfd that stays open as long as it is watched.
struct PidFd(OwnedFd);

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// How a process ended, as far as can be told: only a parent learns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It exited with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It was not our child.
    Unknown,
}

/// Lets a process keep that many bytes of its memory in place, and no more; as many as we may if `None`. What it keeps there already
/// stays there.
pub fn may_lock(pid: i32, bytes: Option<u64>) -> io::Result<()> {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    let limit = match bytes {
        Some(libc::RLIM_INFINITY) => Rlimit { current: None, maximum: None },
        Some(bytes) => Rlimit { current: Some(bytes), maximum: Some(bytes) },
        None => getrlimit(Resource::Memlock),
    };
    prlimit(Pid::from_raw(pid), Resource::Memlock, limit)?;
    Ok(())
}

impl Identity {
    /// The identity of `pid`, which must be a process that cannot have been replaced: a child not yet reaped.
    pub fn of(pid: i32) -> io::Result<Identity> {
        let start_time = start_time(pid)?;
        Ok(Identity { pid, start_time, boot_id: boot_id()? })
    }

    /// Opens the process of this identity if it still lives; `None` if it has gone. A child that has ended is reaped.
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid).filter(|_| boot_id().is_ok_and(|id| id == self.boot_id)) else {
            return Ok(None);
        };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // Asked after it was opened: whoever has this number and start time now is who the descriptor names.
        match start_time(self.pid) {
            Ok(time) if time == self.start_time => Ok((!has_ended(&fd)).then_some(fd)),
            Ok(_) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl Process {
    /// Holds the process behind `fd`. Must be called within the runtime.
    pub fn new(fd: OwnedFd) -> io::Result<Process> {
        // SAFETY: PidFd owns its descriptor and always shows the same one.
        let fd = unsafe { AsyncFd::register_with_interest(PidFd(fd), Interest::READABLE) };
        fd.map(Process).map_err(|e| io::Error::other(e.to_string()))
    }

    /// Sends a signal; one to a process that has gone is none.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.0.get_ref().0, signal) {
            Err(e) if e != rustix::io::Errno::SRCH => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Sends a signal to it and to the processes it has made that stayed in its group, of which it is the leader: what
    /// [`super::spawn`] makes is. None is sent once it has gone, since its group then may be another's.
    pub fn signal_group(&self, pid: i32, signal: Signal) -> io::Result<()> {
        let (fd, pid) = (&self.0.get_ref().0, Pid::from_raw(pid));
        if wait_for_end(fd, Duration::ZERO) {
            return Ok(());
        }
        // Unless another reaps it this moment the number is still its own; and numbers are not given out again at once.
        match pid.map(|pid| kill_process_group(pid, signal)) {
            Some(Err(e)) if e != rustix::io::Errno::SRCH => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Whether it has ended: until then its number is its own.
    pub fn has_ended(&self) -> bool {
        wait_for_end(&self.0.get_ref().0, Duration::ZERO)
    }

    /// Waits until it has ended, and reaps it if it is our child.
    pub async fn ended(&self) -> End {
        // An error can only mean that the runtime is being shut down.
        let _ = self.0.readable().await;
        reap(&self.0.get_ref().0)
    }
}

/// Takes hold of a child that nobody has reaped, so that the number is still its own. On error it is killed and reaped.
pub fn adopt(pid: i32) -> io::Result<OwnedFd> {
    let named = Pid::from_raw(pid).ok_or_else(|| io::Error::other("no process was made"))?;
    let held = pidfd_open(named, PidfdFlags::empty());
    if held.is_err() {
        kill_unheld(named);
    }
    Ok(held?)
}

/// Kills and reaps a child that nobody has reaped, by its number.
pub fn kill_unheld(child: Pid) {
    let _ = kill_process(child, Signal::KILL);
    reap_unheld(child);
}

/// Waits for the end of a child that nobody has reaped, and reaps it, by its number.
pub fn reap_unheld(child: Pid) {
    let _ = retry_on_intr(|| waitpid(Some(child), WaitOptions::empty()));
}

/// Reaps an ended child; no-one else may have reaped it.
pub fn reap(fd: &OwnedFd) -> End {
    match waitid(WaitId::PidFd(fd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => End::Code(code),
            (_, Some(signal)) => End::Signal(signal),
            _ => End::Unknown,
        },
        _ => End::Unknown,
    }
}

/// Kills and reaps a child or stranger, waiting for its end. Blocks for moments.
pub fn kill(fd: &OwnedFd) {
    let _ = pidfd_send_signal(fd, Signal::KILL);
    wait_for_end(fd, Duration::from_secs(10));
    reap(fd);
}

fn has_ended(fd: &OwnedFd) -> bool {
    let ended = wait_for_end(fd, Duration::ZERO);
    if ended {
        reap(fd);
    }
    ended
}

fn wait_for_end(fd: &OwnedFd, at_most: Duration) -> bool {
    ready_by([fd.as_fd()], Instant::now() + at_most).is_ok_and(|[has_ended]| has_ended)
}

/// The id of this boot of the host.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Field 22 of `/proc/PID/stat`, counted after the command's name, which may contain anything.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read(Path::new("/proc").join(pid.to_string()).join("stat")).map_err(|e| {
        // A process that ends while it is read.
        if e.raw_os_error() == Some(libc::ESRCH) { io::ErrorKind::NotFound.into() } else { e }
    })?;
    let stat = String::from_utf8_lossy(&stat);
    let after_name = stat.rsplit_once(')').map(|(_, rest)| rest);
    let field = after_name.and_then(|rest| rest.split_ascii_whitespace().nth(19)?.parse().ok());
    field.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unexpected form of /proc/PID/stat"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sleeper() -> std::process::Child {
        Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    }

    #[tokio::test]
    #[allow(clippy::zombie_processes)]
    async fn a_child_is_held_ended_and_reaped() {
        let child = sleeper();
        let identity = Identity::of(child.id() as i32).unwrap();
        let process = Process::new(identity.open().unwrap().unwrap()).unwrap();
        process.signal(Signal::TERM).unwrap();
        assert_eq!(process.ended().await, End::Signal(libc::SIGTERM));
        assert!(identity.open().unwrap().is_none());
        assert!(!Path::new("/proc").join(identity.pid.to_string()).exists(), "no zombie");
        process.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn another_process_with_the_same_number_is_a_stranger() {
        let mut child = sleeper();
        let identity = Identity::of(child.id() as i32).unwrap();
        let older = Identity { start_time: identity.start_time - 1, ..identity.clone() };
        assert!(older.open().unwrap().is_none());
        let other_boot = Identity { boot_id: "another".into(), ..identity.clone() };
        assert!(other_boot.open().unwrap().is_none());
        assert!(identity.open().unwrap().is_some());
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    /// Where there is no descriptor for it, nobody would wait for it.
    #[test]
    #[allow(clippy::zombie_processes)]
    fn a_child_that_cannot_be_held_is_not_left() {
        let child = sleeper();
        let pid = child.id().cast_signed();
        let none_left = || {
            use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
            let none = SeccompAction::Errno(libc::EMFILE.cast_unsigned());
            let rules = [(libc::SYS_pidfd_open, Vec::new())].into();
            let arch = std::env::consts::ARCH.try_into().unwrap();
            let filter = SeccompFilter::new(rules, SeccompAction::Allow, none, arch).unwrap();
            apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
            adopt(pid).unwrap_err()
        };
        let why = std::thread::scope(|scope| scope.spawn(none_left).join().unwrap());
        assert_eq!(why.raw_os_error(), Some(libc::EMFILE), "{why}");
        assert!(!Path::new("/proc").join(pid.to_string()).exists(), "neither it nor a zombie");
    }

    #[test]
    #[allow(clippy::zombie_processes)]
    fn a_zombie_does_not_live() {
        let mut child = sleeper();
        let identity = Identity::of(child.id() as i32).unwrap();
        let fd = identity.open().unwrap().unwrap();
        child.kill().unwrap();
        assert!(wait_for_end(&fd, Duration::from_secs(10)));
        assert!(identity.open().unwrap().is_none());
    }
}
