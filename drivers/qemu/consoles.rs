//! The consoles of a running QEMU whose other end is a terminal: what they say stands in a file that QEMU appends to (its
//! `logfile`), in the guest's own folder, and whoever types does so by the terminal.
//!
//! QEMU drops what it says to a terminal that nobody has open. One that is open it waits for; so virtd opens it only while a
//! client is there, and for a moment after it (`Lines`), and reads it. QEMU may have been taken over by its guest: both the file and the terminal are held against
//! what they must be, whatever stands in their places.

use super::instance::{Body, Leavings};
use crate::host::console::{BEHIND, Clients, Lines, Talk, Transcript, stream};
use crate::host::workers::blocking;
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat, stat, unlink};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virt_model::device::CharSource;
use virt_model::device::chardev::CharKind;
use virt_model::domain::DomainDef;
use virt_model::driver::{ConsoleOptions, DriverError};

/// The first major number of the terminals of `/dev/pts`, and how many there are.
const TERMINALS: (u32, u32) = (136, 8);

/// Where QEMU keeps what that console says, below the guest's own folder; `None` for one that is no terminal, or that has a
/// place of its own for that: QEMU has one for each.
pub fn transcript(own_dir: &Path, alias: &str, source: &CharSource) -> Option<PathBuf> {
    let ours = source.kind == CharKind::Pty && source.log.is_none() && !alias.contains('/');
    ours.then(|| own_dir.join(format!("{alias}.said")))
}

/// Those of a guest.
#[derive(Default)]
pub struct Consoles {
    /// By the alias of the device.
    transcripts: Mutex<HashMap<String, Arc<Transcript>>>,
    clients: Clients,
    lines: Lines,
}

impl Consoles {
    /// Those of a QEMU that runs. One that an earlier virtd started may keep no transcripts.
    pub fn of(live: &DomainDef, leavings: &Leavings) -> Consoles {
        let own_dir = leavings.own_dir();
        let files = live.devices.all_consoles().filter_map(|console| {
            let alias = console.info.alias()?;
            Some((alias, transcript(&own_dir, alias, console.source)?))
        });
        let files: Vec<(&str, PathBuf)> = files.collect();
        // All of them lie in one folder that is not large.
        let behind = BEHIND / u64::try_from(files.len()).unwrap_or(u64::MAX).max(1);
        let kept = files.into_iter().filter_map(|(alias, file)| {
            let opened = Transcript::open(&file, behind);
            let opened = opened.inspect_err(|error| {
                tracing::info!(uuid = %live.uuid, %error, "what {alias} says is not kept");
            });
            Some((alias.to_owned(), Arc::new(opened.ok()?)))
        });
        Consoles { transcripts: Mutex::new(kept.collect()), ..Consoles::default() }
    }

    /// What its consoles say.
    pub fn transcripts(&self) -> Vec<Arc<Transcript>> {
        self.kept().values().cloned().collect()
    }

    /// That device has gone: what it said is nobody's any more, and the next one of its name is another. Blocks.
    pub fn forget(&self, alias: &str, own_dir: &Path) {
        self.clients.forget(alias);
        self.lines.forget(alias);
        let kept = self.kept().remove(alias);
        if kept.is_some()
            && let Err(error) = unlink(own_dir.join(format!("{alias}.said")))
        {
            tracing::warn!(%error, "what '{alias}' said stays until the guest ends");
        }
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<String, Arc<Transcript>>> {
        self.transcripts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Body {
    /// Connects whoever asked to a console. Error: `Refused` while another client is there.
    pub async fn open_console(
        &self,
        alias: &str,
        source: &CharSource,
        options: ConsoleOptions,
    ) -> Result<OwnedFd, DriverError> {
        if *self.gone.borrow() {
            return Err(DriverError::Gone);
        }
        let transcript = self.consoles.kept().get(alias).cloned();
        if options.log && transcript.is_none() {
            let why = match &source.log {
                Some(_) => {
                    "what it says is kept in the <log file> of its own; read that file, or open it without 'log'"
                }
                None => {
                    "nothing is kept of what it says, as it was plugged in while the guest ran, or an earlier virtd started \
                     the guest; open it without 'log', or start the guest anew"
                }
            };
            return Err(DriverError::Unsupported(why.to_owned()));
        }
        let path = source.path().map(PathBuf::from);
        let path = path.ok_or_else(|| DriverError::Internal("its terminal is not known".to_owned()))?;
        let admitted = self.consoles.clients.admit(alias, options.force).await.map_err(|e| no_console(&e))?;
        let (client, admitted) = admitted.ok_or_else(|| DriverError::Refused("another client".to_owned()))?;
        let lines = self.consoles.lines.clone();
        let line = match lines.take(alias).await {
            Some(line) => {
                forget_unread(line.get_ref());
                line
            }
            None => {
                let own_dir = self.leavings.own_dir();
                let opened = blocking(move || terminal(&path, &own_dir)).await?;
                Arc::new(opened.and_then(stream).map_err(|e| no_console(&e))?)
            }
        };
        let talk = Talk::new(admitted, line, transcript, options.log).map_err(|e| no_console(&e))?;
        let mut gone = self.gone.subscribe();
        let gone = async move {
            // That nobody is left who could say so is the end as well.
            let _ = gone.wait_for(|gone| *gone).await;
        };
        let alias = alias.to_owned();
        tokio::spawn(talk.run(gone, move |line| lines.keep(&alias, line)));
        Ok(client)
    }
}

fn no_console(error: &io::Error) -> DriverError {
    DriverError::Hypervisor(format!("its terminal cannot be opened: {error}"))
}

/// Opens the terminal at `path`, which must belong to whom the guest's own folder belongs: its number may be another's by
/// now. Nothing that goes through it is changed by the kernel. Blocks.
fn terminal(path: &Path, own_dir: &Path) -> io::Result<OwnedFd> {
    let other = |why: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{} {why}", path.display()));
    if path.parent() != Some(Path::new("/dev/pts")) {
        return Err(other("is no terminal of a program"));
    }
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let line = openat(CWD, path, flags, Mode::empty())?;
    let (is, owner) = (fstat(&line)?, stat(own_dir)?.st_uid);
    let (first, count) = TERMINALS;
    let major = rustix::fs::major(is.st_rdev);
    if FileType::from_raw_mode(is.st_mode) != FileType::CharacterDevice || !(first..first + count).contains(&major) {
        return Err(other("is no terminal of a program"));
    }
    if is.st_uid != owner {
        return Err(other("is not the guest's any more"));
    }
    forget_unread(&line);
    // SAFETY: the structure is plain numbers, and is filled by tcgetattr before it is used.
    let set = unsafe {
        let mut modes: libc::termios = std::mem::zeroed();
        match libc::tcgetattr(line.as_raw_fd(), &raw mut modes) {
            0 => {
                libc::cfmakeraw(&raw mut modes);
                libc::tcsetattr(line.as_raw_fd(), libc::TCSANOW, &raw const modes)
            }
            failed => failed,
        }
    };
    if set == 0 { Ok(line) } else { Err(io::Error::last_os_error()) }
}

/// What was said to those who were here before, and is unread, is told to nobody.
fn forget_unread(line: &OwnedFd) {
    // SAFETY: it takes numbers only.
    unsafe { libc::tcflush(line.as_raw_fd(), libc::TCIFLUSH) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    #[test]
    fn a_terminal_is_opened_raw_and_nothing_else_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let mut master = std::fs::File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        let mut number: libc::c_int = 0;
        // SAFETY: both calls are given the number that they read or fill.
        unsafe {
            assert_eq!(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const number), 0);
            assert_eq!(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number), 0);
        }
        let name = PathBuf::from(format!("/dev/pts/{number}"));
        let mut line = std::fs::File::from(terminal(&name, dir.path()).unwrap());
        line.write_all(b"a\nb\x03").unwrap();
        let mut read = [0; 4];
        master.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"a\nb\x03");
        master.write_all(b"c\rd").unwrap();
        line.read_exact(&mut read[..3]).unwrap();
        assert_eq!(&read[..3], b"c\rd");

        for path in ["/dev/null", "/dev/ptmx", "/dev/pts/ptmx", "/dev/pts/../null", "/dev/pts/none", "/etc/passwd"] {
            assert!(terminal(Path::new(path), dir.path()).is_err(), "{path}");
        }
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(dir.path(), Some(12345), None).unwrap();
            let refused = terminal(&name, dir.path()).unwrap_err().to_string();
            assert!(refused.contains("is not the guest's any more"), "{refused}");
        }
    }

    #[test]
    fn what_a_device_said_that_has_gone_is_not_shown_of_the_next_one_of_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let said = dir.path().join("serial1.said");
        std::fs::write(&said, "booted").unwrap();
        let consoles = Consoles::default();
        let kept = Arc::new(Transcript::open(&said, BEHIND).unwrap());
        consoles.kept().insert("serial1".to_owned(), kept);
        consoles.forget("serial0", dir.path());
        assert_eq!(consoles.transcripts().len(), 1);
        consoles.forget("serial1", dir.path());
        assert!(consoles.transcripts().is_empty() && !said.exists());
    }

    #[test]
    fn qemu_keeps_what_terminals_say_that_have_no_log_of_their_own() {
        let kept = |alias: &str, kind, log: bool| {
            let log = log.then(|| virt_model::device::chardev::Log { file: "/log".to_owned(), ..Default::default() });
            let path = transcript(Path::new("/own"), alias, &CharSource { log, ..CharSource::new(kind) });
            path.map(|path| path.display().to_string())
        };
        assert_eq!(kept("serial0", CharKind::Pty, false).as_deref(), Some("/own/serial0.said"));
        assert_eq!(kept("serial0", CharKind::Pty, true), None);
        assert_eq!(kept("serial0", CharKind::File, false), None);
        assert_eq!(kept("ua-/../x", CharKind::Pty, false), None);
    }
}
