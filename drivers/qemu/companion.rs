//! Programs that QEMU needs beside it for one guest: its TPM today; shared directories and the like are made the same way.
//!
//! ```text
//!   sockets ─▶ in order: record on disk ─▶ run ─▶ QEMU ─▶ watched ─▶ SIGTERM, SIGKILL, reaped when the guest has gone
//! ```
//!
//! Each is recorded before it runs, as QEMU is, so that the next virtd finds or ends it. QEMU and its companions reach each
//! other over sockets that are made before either of them: nobody waits for a socket to appear.

use super::make;
use super::plan::{Companion, Link, Loss, Role};
use super::takeover::take_over;
use crate::host::files::Seen;
use crate::host::listen::listen;
use crate::host::process::{End, Identity, Process};
use crate::host::user::RunAs;
use futures_util::future::{join_all, select_all};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use std::borrow::Borrow;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::timeout;
use uuid::Uuid;

/// How long one may take to end when it is told to.
const TERM_PATIENCE: Duration = Duration::from_secs(3);
/// How long the kernel may take to end one that is killed.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// How much later than its companion QEMU may end: they end together, in any order.
pub const GRACE: Duration = Duration::from_secs(2);

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

/// Those of one guest; `None` once they are to end with it.
#[derive(Default)]
pub struct Companions(Mutex<Option<Vec<Arc<Living>>>>);

impl Companions {
    /// These.
    pub fn of(living: Vec<Living>) -> Companions {
        Companions(Mutex::new(Some(living.into_iter().map(Arc::new).collect())))
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Living>> {
        self.lock().clone().unwrap_or_default()
    }

    /// The same, to end them with their guest: there are to be no more.
    pub fn close(&self) -> Vec<Arc<Living>> {
        self.lock().take().unwrap_or_default()
    }

    /// One more; it is given back if its guest has gone.
    pub fn add(&self, living: Living) -> Result<Arc<Living>, Living> {
        let mut all = self.lock();
        let Some(all) = all.as_mut() else { return Err(living) };
        let living = Arc::new(living);
        all.push(living.clone());
        Ok(living)
    }

    /// The one of that name is the guest's no more: its end is no loss.
    pub fn take(&self, name: &str) -> Option<Arc<Living>> {
        let mut all = self.lock();
        let all = all.as_mut()?;
        let which = all.iter().position(|living| living.recorded.name == name)?;
        Some(all.remove(which))
    }

    /// Whether it is the guest's still.
    pub fn has(&self, living: &Arc<Living>) -> bool {
        self.lock().iter().flatten().any(|one| Arc::ptr_eq(one, living))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Arc<Living>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Descriptors on their way to a process, each with the number it will have there.
pub type Gifts = Vec<(RawFd, OwnedFd)>;

impl Companion {
    /// One without a program, links or files yet.
    pub fn new(name: &str, role: Role) -> Companion {
        let (program, args, env, links) = (PathBuf::new(), Vec::new(), Vec::new(), Vec::new());
        let (secrets, files, folders) = (Vec::new(), Vec::new(), Vec::new());
        Companion {
            name: name.to_owned(),
            program,
            args,
            env,
            links,
            secrets,
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
                    let listening = listen(path, qemus_user).map_err(|e| (path.clone(), e))?;
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
pub async fn end_all<L: Borrow<Living>>(companions: &[L]) {
    join_all(companions.iter().map(|living| end(living.borrow()))).await;
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
