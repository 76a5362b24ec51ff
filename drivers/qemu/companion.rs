//! Programs that QEMU needs beside it for one guest: its TPM today; shared directories and the like are made the same way.
//!
//! ```text
//!   sockets ─▶ in order: record on disk ─▶ run ─▶ QEMU ─▶ watched ─▶ SIGTERM, SIGKILL, reaped when the guest has gone
//! ```
//!
//! Each is recorded before it runs, as QEMU is, so that the next virtd finds or ends it. QEMU and its companions reach each
//! other over sockets that are made before either of them: nobody waits for a socket to appear.

use super::command::HostFile;
use super::make;
use super::takeover::take_over;
use crate::host::files::Seen;
use crate::host::process::{End, Identity, Process};
use crate::host::user::RunAs;
use futures_util::future::{join_all, select_all};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::timeout;
use uuid::Uuid;

/// How long one may take to end when it is told to.
const TERM_PATIENCE: Duration = Duration::from_secs(3);
/// How long the kernel may take to end one that is killed.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// A program beside QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Companion {
    /// What people call it, e.g. `swtpm`; different for each of a guest's.
    pub name: String,
    /// The program, an absolute path.
    pub program: PathBuf,
    /// Its arguments, without its name.
    pub args: Vec<String>,
    /// Its environment, beyond what every guest's processes get.
    pub env: Vec<(String, String)>,
    /// How it is reached.
    pub links: Vec<Link>,
    /// What it must be able to open.
    pub files: Vec<HostFile>,
    /// Folders made where they are missing, for whom it runs as and nobody else.
    pub folders: Vec<PathBuf>,
    /// What it is there for.
    pub role: Role,
    /// It runs as virtd does, even where QEMU has a user of its own.
    pub privileged: bool,
    /// It talks to the host's network.
    pub needs_network: bool,
}

/// A socket between a companion and QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// Two connected ends; each process finds its own open. Nobody else can connect.
    Pair {
        /// The companion's descriptor: not 0, 1, 2, 4 or 5, and below 200.
        its: RawFd,
        /// QEMU's; see [`FIRST_FD`].
        qemus: RawFd,
    },
    /// A listening socket that the companion finds open, and QEMU connects to. It belongs to QEMU's user.
    Listening {
        /// The companion's descriptor, as above.
        its: RawFd,
        /// Where QEMU finds it, in the guest's own folder.
        path: PathBuf,
    },
}

/// How much later than its companion QEMU may end: they end together, in any order.
pub const GRACE: Duration = Duration::from_secs(2);

/// The first of QEMU's descriptors for companions; the command line's builder counts up from it.
pub const FIRST_FD: RawFd = 150;

/// What a companion does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs as long as the guest.
    Beside(Loss),
    /// Does something at each start and ends; what comes after it in the list starts then.
    Step {
        /// How long that may take.
        within: Duration,
    },
    /// Makes a folder, once, and ends, as above. Not run where the folder is.
    Maker {
        /// Where it works: an empty folder of its own.
        work: PathBuf,
        /// What that becomes when it has succeeded.
        made: PathBuf,
        /// How long that may take.
        within: Duration,
    },
}

/// What becomes of a guest whose companion has ended too early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// It goes on without what the companion gave it; that is logged.
    Bear,
    /// It is ended, as if it had died.
    Fatal,
}

/// What is kept on disk of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// As in [`Companion`].
    pub name: String,
    /// Who it is.
    pub process: Identity,
    /// What its end would mean.
    pub loss: Loss,
}

/// One that runs, or has ended and is not yet reaped.
pub struct Living {
    /// What is kept of it.
    pub recorded: Recorded,
    /// Its process.
    pub process: Process,
}

/// Descriptors on their way to a process, each with the number it will have there.
pub type Gifts = Vec<(RawFd, OwnedFd)>;

impl Companion {
    /// One without a program, links or files yet.
    pub fn new(name: &str, role: Role) -> Companion {
        let (program, args, env, links) = (PathBuf::new(), Vec::new(), Vec::new(), Vec::new());
        let (files, folders) = (Vec::new(), Vec::new());
        Companion {
            name: name.to_owned(),
            program,
            args,
            env,
            links,
            files,
            folders,
            role,
            privileged: false,
            needs_network: false,
        }
    }

    /// Whether there is something for it to do. Blocks.
    pub fn is_wanted(&self) -> bool {
        !matches!(&self.role, Role::Maker { made, .. } if Seen::at(made).is_there())
    }

    /// What its end would mean; that of one that does not run as long as the guest is waited for.
    pub fn loss(&self) -> Loss {
        if let Role::Beside(loss) = self.role { loss } else { Loss::Bear }
    }

    /// Makes its folders, and its sockets: its own ends, and those that go to QEMU. Nobody but virtd puts anything into
    /// `state_dir`. Blocks.
    pub fn prepare(
        &self,
        qemus_user: Option<&RunAs>,
        state_dir: &Path,
        machine: Uuid,
    ) -> Result<(Gifts, Gifts), (PathBuf, io::Error)> {
        let user = qemus_user.filter(|_| !self.privileged);
        for folder in &self.folders {
            make::folder(folder, user).map_err(|e| (folder.clone(), e))?;
        }
        if let Role::Maker { work, .. } = &self.role {
            make::empty_folder(work, user).map_err(|e| (work.clone(), e))?;
        }
        if let Some(user) = user {
            let made = if let Role::Maker { made, .. } = &self.role { Some(made) } else { None };
            for folder in self.folders.iter().chain(made) {
                take_over(folder, user, state_dir, machine).map_err(|e| (folder.clone(), e))?;
            }
        }
        let (mut own, mut qemus) = (Vec::new(), Vec::new());
        for link in &self.links {
            match link {
                Link::Pair { its, qemus: theirs } => {
                    let (one, other) = UnixStream::pair().map_err(|e| (self.program.clone(), e))?;
                    own.push((*its, one.into()));
                    qemus.push((*theirs, other.into()));
                }
                Link::Listening { its, path } => {
                    let listening = make::listen(path, qemus_user).map_err(|e| (path.clone(), e))?;
                    own.push((*its, listening));
                }
            }
        }
        Ok((own, qemus))
    }
}

impl Recorded {
    /// Takes hold of it again, as [`Identity::open`]. Within the runtime. Blocks.
    pub fn open(&self) -> io::Result<Option<Living>> {
        let Some(fd) = self.process.open()? else { return Ok(None) };
        Ok(Some(Living { recorded: self.clone(), process: Process::new(fd)? }))
    }
}

/// Waits for one that does not run as long as the guest; `Err` says how it ended otherwise. It is not ended here.
pub async fn finish(living: &Living, within: Duration) -> Result<(), String> {
    let name = &living.recorded.name;
    match timeout(within, living.process.ended()).await {
        Ok(End::Code(0)) => Ok(()),
        Ok(end) => Err(format!("{name} {}", how(end))),
        Err(_) => Err(format!("{name} did not end within {} s", within.as_secs())),
    }
}

/// How a process ended, in words: "ended with code 1".
pub fn how(end: End) -> String {
    match end {
        End::Code(code) => format!("ended with code {code}"),
        End::Signal(number) => format!("was ended by signal {number}"),
        End::Unknown => "ended".to_owned(),
    }
}

/// Waits until one of them has ended; for ever if there is none.
pub async fn first_lost(companions: &[Living]) -> String {
    if companions.is_empty() {
        return std::future::pending().await;
    }
    let ends = companions.iter().map(|living| Box::pin(living.process.ended()));
    let (end, which, _) = select_all(ends).await;
    format!("{} {} before the guest was up", companions[which].recorded.name, how(end))
}

/// Ends and reaps all of them, and what they have started themselves.
pub async fn end_all(companions: &[Living]) {
    join_all(companions.iter().map(end)).await;
}

async fn end(living: &Living) {
    let Recorded { name, process, .. } = &living.recorded;
    for (signal, patience) in [(Signal::TERM, TERM_PATIENCE), (Signal::KILL, KILL_PATIENCE)] {
        let told = living.process.signal_group(process.pid, signal);
        if told.is_ok() && timeout(patience, living.process.ended()).await.is_ok() {
            return;
        }
    }
    tracing::error!("{name} cannot be ended");
}
