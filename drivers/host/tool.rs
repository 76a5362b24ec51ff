//! Programs that virtd runs to learn or to change something, and waits for: with the rights of whoever they work for, no
//! way to more, and no more of the host than they need.

use super::apart;
use super::process::{End, Process, kill_unheld};
use super::user::RunAs;
use super::workers::Stop;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use rustix::process::{pidfd_open, waitid};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use tokio::net::unix::pipe::{Receiver, Sender, pipe};

/// Of what a tool says, this many bytes are kept.
const MOST_SAID: u64 = 16 << 20;

/// Whose rights a tool has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rights {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// All groups.
    pub groups: Vec<u32>,
}

/// What a tool may take of the host at most.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// Bytes of memory that it writes to.
    pub data: Option<u64>,
    /// Seconds of a CPU's time.
    pub cpu: Option<u64>,
    /// Open files.
    pub files: Option<u64>,
}

impl Rights {
    /// That user's in that group alone.
    pub fn of_group(uid: u32, gid: u32) -> Rights {
        Rights { uid, gid, groups: vec![gid] }
    }
}

impl From<&RunAs> for Rights {
    fn from(user: &RunAs) -> Rights {
        Rights { uid: user.uid, gid: user.gid, groups: user.groups.clone() }
    }
}

/// The program will run with those rights (ours, if `None`), with no capability that it could get back, nothing to be gained
/// by what it runs, and within those bounds. It leaves no core, which would hold what it has read.
pub fn tame(command: &mut Command, rights: Option<Rights>, bounds: Bounds) {
    // SAFETY: between fork and exec only system calls are made, on memory prepared before.
    unsafe {
        command.pre_exec(move || {
            limit(libc::RLIMIT_CORE, Some(0))?;
            limit(libc::RLIMIT_DATA, bounds.data)?;
            limit(libc::RLIMIT_CPU, bounds.cpu)?;
            limit(libc::RLIMIT_NOFILE, bounds.files)?;
            if let Some(rights) = &rights {
                // The last of the capabilities is not known: the kernel knows nothing of what is beyond it.
                for right in 0..=63 {
                    if libc::prctl(libc::PR_CAPBSET_READ, right, 0, 0, 0) == 1 {
                        done(libc::prctl(libc::PR_CAPBSET_DROP, right, 0, 0, 0))?;
                    }
                }
                done(libc::setgroups(rights.groups.len(), rights.groups.as_ptr()))?;
                done(libc::setresgid(rights.gid, rights.gid, rights.gid))?;
                done(libc::setresuid(rights.uid, rights.uid, rights.uid))?;
            }
            done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        });
    }
}

/// The program is told so when the thread that made it ends, be it with all of virtd.
pub(super) fn ends_with_its_maker(command: &mut Command, signal: Signal) {
    let (maker, signal) = (std::process::id(), signal.as_raw() as libc::c_ulong);
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(move || {
            // In that order: one whose maker has ended before is not started.
            done(libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0, 0, 0))?;
            match libc::getppid().cast_unsigned() == maker {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(libc::ECHILD)),
            }
        });
    }
}

/// Sets a limit, to no more than we may have ourselves. System calls only.
pub(super) fn limit(which: libc::__rlimit_resource_t, to: Option<u64>) -> io::Result<()> {
    let Some(to) = to else { return Ok(()) };
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: reads and writes a value on this stack.
    unsafe {
        done(libc::getrlimit(which, &raw mut now))?;
        let to = to.min(now.rlim_max);
        done(libc::setrlimit(which, &libc::rlimit { rlim_cur: to, rlim_max: to }))
    }
}

/// Runs it to its end, or until it is told to stop; `writes`: it is given time then to end in order. In a thread without guests'
/// files.
#[allow(clippy::disallowed_methods, reason = "without guests' files")]
pub(super) fn finish(command: &mut Command, stop: &Stop, writes: bool) -> io::Result<Output> {
    let mut child = command.spawn()?;
    let pid = Pid::from_child(&child);
    let watched = stop.watch(pid, writes);
    let said = |stream: Option<Box<dyn Read + Send>>| {
        let mut said = Vec::new();
        stream.map_or(Ok(0), |stream| stream.take(MOST_SAID).read_to_end(&mut said)).map(|_| said)
    };
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = std::thread::scope(|scope| {
        let words = scope.spawn(|| said(err.map(|stream| Box::new(stream) as _)));
        let stdout = said(out.map(|stream| Box::new(stream) as _));
        (stdout, words.join().unwrap_or_else(|_| Ok(Vec::new())))
    });
    // Until it is reaped the number is its own.
    let ended = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
    drop(watched);
    ended?;
    Ok(Output { status: child.wait()?, stdout: stdout?, stderr: stderr? })
}

/// A program that works for us, and is killed when this is dropped before it has ended. Must be made within the runtime.
pub struct Tool(Option<Process>);

impl Tool {
    /// Starts it. Its streams are none, or open already ([`ear`], [`mouth`]); our copies of its ends are closed.
    pub fn start(mut command: Command) -> io::Result<Tool> {
        let pid = Pid::from_child(&apart::start(&mut command)?);
        // Not reaped yet, so the number is still the child's.
        let held = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from).and_then(Process::new);
        if held.is_err() {
            kill_unheld(pid);
        }
        held.map(|process| Tool(Some(process)))
    }

    /// Waits for its end; whether it was a good one.
    pub async fn succeeds(mut self) -> bool {
        let Some(process) = &self.0 else { return false };
        let end = process.ended().await;
        self.0 = None;
        end == End::Code(0)
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        if let Some(process) = self.0.take() {
            let _ = process.signal(Signal::KILL);
            tokio::spawn(async move { process.ended().await });
        }
    }
}

/// A pipe for what a program says: the end that we read, and its own.
pub fn ear() -> io::Result<(Receiver, OwnedFd)> {
    let (theirs, ours) = pipe()?;
    Ok((ours, theirs.into_blocking_fd()?))
}

/// A pipe for what a program is told: the end that we write to, and its own.
pub fn mouth() -> io::Result<(Sender, OwnedFd)> {
    let (ours, theirs) = pipe()?;
    Ok((ours, theirs.into_blocking_fd()?))
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_has_no_way_to_more_rights() {
        let mut command = Command::new("/bin/cat");
        command.arg("/proc/self/status");
        let root = nix::unistd::geteuid().is_root();
        let rights = root.then(|| Rights::of_group(65534, 65534));
        let bounds = Bounds { data: Some(1 << 30), cpu: Some(7), files: Some(64) };
        tame(&mut command, rights, bounds);
        let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let field = |name: &str| {
            said.lines().find_map(|line| line.strip_prefix(name)).unwrap().split_whitespace().collect::<Vec<_>>()
        };
        assert_eq!(field("NoNewPrivs:"), ["1"]);
        if root {
            assert_eq!(field("Uid:"), ["65534"; 4]);
            assert_eq!(field("Groups:"), ["65534"]);
            for set in ["CapBnd:", "CapEff:", "CapPrm:", "CapInh:"] {
                assert_eq!(field(set), ["0000000000000000"], "{set}");
            }
        }
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "ulimit -d; ulimit -t; ulimit -n; ulimit -c"]);
        tame(&mut command, None, bounds);
        assert_eq!(String::from_utf8(command.output().unwrap().stdout).unwrap(), "1048576\n7\n64\n0\n");
    }
}
