//! The process that serves a network's addresses and names. It outlives virtd, which has written down which one it is. Only of one
//! that was just being started when virtd was killed, the file with its number and its command line say that.

use super::leases::TOLD;
use super::serve::USER;
use crate::host::net_tool::{finished, output_within};
use crate::host::own_file::{self, replace, replace_json};
use crate::host::process::{Identity, kill};
use crate::host::ready::ready_by;
use nix::unistd::User;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::{self, File};
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// How long it may take to read its files again: some milliseconds are usual.
const PATIENCE: Duration = Duration::from_secs(20);

/// More than it ever has: itself, what it becomes when it goes into the background, and what tells of leases.
const MOST_PROCESSES: usize = 8;

/// Which process it is.
const IDENTITY: &str = "server.json";
/// More than that file has, than a number, and than its command line.
const LONGEST: [u64; 3] = [1024, 32, 8192];

/// Starts it with the configuration in its folder; with `gives`, what it writes to belongs to the user that it becomes. It has
/// come up when this returns; the error is its own words.
pub fn start(folder: &Path, gives: bool) -> io::Result<()> {
    let _ = fs::remove_file(folder.join(IDENTITY));
    let told = folder.join("told");
    fs::write(&told, "")?;
    if gives {
        give(&told)?;
    }
    let config = argument(folder);
    output_within("dnsmasq", &[&config], &[(TOLD, told.as_os_str())])?;
    match by_number(folder) {
        Some((number, held)) => {
            let identity = Identity::of(number)?;
            // It is there still, so that the number was its own; who is not stopped takes no notice of that signal.
            pidfd_send_signal(&held, Signal::CONT)?;
            replace_json(&folder.join(IDENTITY), &identity, false)
        }
        None => {
            Err(io::Error::other("dnsmasq has ended as soon as it was started (its own words are in the host's log)"))
        }
    }
}

/// The one argument by which it is known.
fn argument(folder: &Path) -> String {
    format!("--conf-file={}", folder.join("dnsmasq.conf").display())
}

/// Gives it a file that it, or what it runs, writes to.
fn give(file: &Path) -> io::Result<()> {
    let user = user()?;
    Ok(nix::unistd::chown(file, Some(user.uid), Some(user.gid))?)
}

/// Whom it becomes, where it is root's at first.
fn user() -> io::Result<User> {
    let none = || io::Error::other(format!("there is no user '{USER}' (Debian makes it with dnsmasq-base)"));
    User::from_name(USER).ok().flatten().ok_or_else(none)
}

/// Has the user that it becomes run what it is to run when it has given an address. That tells nobody. Error: it cannot, so that
/// nobody would be told of addresses. Blocks for moments.
pub fn can_run(teller: &Path) -> io::Result<()> {
    let user = user()?;
    let mut command = Command::new(teller);
    command.env_clear().env(TOLD, "/dev/null").current_dir("/").uid(user.uid.as_raw()).gid(user.gid.as_raw());
    let why = match finished(&mut command) {
        Ok(done) if done.status.success() => return Ok(()),
        Ok(done) => format!("{}: {}", done.status, String::from_utf8_lossy(&done.stderr).trim()),
        Err(error) => error.to_string(),
    };
    Err(io::Error::other(format!(
        "dnsmasq's user '{USER}' cannot run {}, by which virtd hears who has which address: {why}; let everybody pass through the \
         folders above it, or install virtd where everybody may",
        teller.display()
    )))
}

/// Writes a file that it reads.
pub fn write(file: &Path, text: &str) -> io::Result<()> {
    replace(file, text.as_bytes(), 0o644, false)
}

/// The process, if it is there.
pub fn find(folder: &Path) -> Option<OwnedFd> {
    match own_file::read(&folder.join(IDENTITY), LONGEST[0]) {
        Ok(text) => serde_json::from_slice::<Identity>(&text).ok()?.open().ok()?,
        Err(_) => by_number(folder).map(|(_, held)| held),
    }
}

/// The one that has the number in its file and was started by that folder. Who runs as its user may have written that file, and may
/// have any command line.
fn by_number(folder: &Path) -> Option<(i32, OwnedFd)> {
    let number = String::from_utf8(read(&folder.join("pid"), LONGEST[1])?).ok()?.trim().parse().ok()?;
    Some((number, by_argument(number, folder)?))
}

/// The process of that number, if it was started by that folder.
fn by_argument(number: i32, folder: &Path) -> Option<OwnedFd> {
    let held = pidfd_open(Pid::from_raw(number)?, PidfdFlags::empty()).ok()?;
    // Asked after it was opened: whoever has the number now is whom the descriptor names.
    let command = read(Path::new(&format!("/proc/{number}/cmdline")), LONGEST[2])?;
    let wanted = argument(folder);
    command.split(|byte| *byte == 0).any(|word| word == wanted.as_bytes()).then_some(held)
}

/// What a file has, of so many bytes at most.
fn read(file: &Path, most: u64) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    File::open(file).ok()?.take(most).read_to_end(&mut content).ok()?;
    Some(content)
}

/// Has it read these of its files again. It has when this returns: whatever it is asked from then on it answers by them.
pub fn reload(folder: &Path, files: &[&str]) -> io::Result<()> {
    let ended = || io::Error::other("dnsmasq has ended: destroy the network and start it again");
    let server = find(folder).ok_or_else(ended)?;
    let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let add = |file: &&str| inotify::add_watch(&watch, folder.join(file), WatchFlags::CLOSE_NOWRITE);
    let mut unread: Vec<i32> = files.iter().map(add).collect::<Result<_, _>>()?;
    pidfd_send_signal(&server, Signal::HUP)?;
    let until = Instant::now() + PATIENCE;
    // It does one thing after the other: who has closed the last file takes questions again when it has worked it in.
    while !unread.is_empty() {
        match ready_by([watch.as_fd(), server.as_fd()], until)? {
            [_, true] => return Err(ended()),
            [true, false] => {}
            [false, false] => {
                return Err(io::Error::other("dnsmasq does not read its files again: it does not answer"));
            }
        }
        let mut room = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&watch, &mut room);
        loop {
            match events.next() {
                Ok(event) => unread.retain(|one| *one != event.wd()),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// One that was started by that folder, and may not have written its number yet.
fn by_command(folder: &Path) -> Option<OwnedFd> {
    let numbers = fs::read_dir("/proc").ok()?.flatten();
    numbers.filter_map(|entry| by_argument(entry.file_name().to_str()?.parse().ok()?, folder)).next()
}

/// Ends it. What it has given is in its file.
pub fn stop(folder: &Path) {
    if let Some(server) = find(folder) {
        kill(&server);
    } else if folder.join("dnsmasq.conf").exists() {
        // Who started it may have been killed before it was there: it may be two processes by now, and no more.
        (0..MOST_PROCESSES).map_while(|_| by_command(folder)).for_each(|server| kill(&server));
    }
    let _ = (fs::remove_file(folder.join(IDENTITY)), fs::remove_file(folder.join("pid")));
}
