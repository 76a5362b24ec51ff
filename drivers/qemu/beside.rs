//! A program that runs beside a guest's QEMU is started: with the guest, or with the device that needs it.

use super::companion::{Gifts, Living, Recorded};
use super::plan::Companion;
use super::record::Keeper;
use super::spawn::{Job, spawn_companion};
use super::tune::Bounds;
use super::wall::{self, Mason};
use crate::host::access::LentFile;
use crate::host::files::Program;
use crate::host::lender::Lender;
use crate::host::workers::blocking;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;
use virt_model::driver::DriverError;

/// How many descriptors a process of a guest may have. A QEMU has four for each queue of a card that the kernel serves, two
/// for each queue of a disk, a few for each image, and one for each connection that a guest opens by way of it.
pub(super) const DESCRIPTORS: u64 = 16_384;
/// How long files may become that a companion of a guest writes: the state of a TPM, the log of a card. The log of the guest
/// itself is cut before that.
pub(super) const COMPANION_FILE: u64 = 64 << 20;

/// What is the same for all that runs beside one guest.
pub struct Side {
    /// The guest's uuid.
    pub uuid: Uuid,
    /// By whose rights files are opened.
    pub lender: Lender,
    /// The guest's own folder.
    pub own: PathBuf,
    /// What the guest may use of the host where its definition does not say.
    pub bounds: Bounds,
    /// Where it prints to.
    pub output: Arc<File>,
}

impl Side {
    /// Starts one that has been prepared. `lent` is what the guest was lent.
    pub async fn start(
        self: &Arc<Self>,
        keeper: &Arc<Keeper>,
        companion: &Companion,
        gifts: Gifts,
        lent: Vec<LentFile>,
    ) -> Result<Living, DriverError> {
        let (name, loss) = (companion.name.clone(), companion.loss());
        let (side, one, shown) = (self.clone(), companion.clone(), name.clone());
        let wall =
            move || wall::of_companion(mason(&side.lender), &one, &lent, &side.own).map_err(|e| unshown(&shown, &e));
        let (program, wary) = (companion.program.clone(), self.lender.is_wary());
        let judged = blocking(move || Program::at(&program, wary)).await?;
        let judged = judged.map_err(|e| storage(&companion.program, &e))?;
        let job = self.job(companion, gifts, Arc::new(judged));
        spawn_companion(keeper, job, wall, move |process| Recorded { name, process, loss }).await
    }

    fn job(&self, companion: &Companion, gifts: Gifts, judged: Arc<Program>) -> Job {
        Job {
            program: companion.program.clone(),
            judged: Some(judged),
            args: companion.args.clone(),
            env: environment(&self.own, &companion.env),
            output: self.output.clone(),
            gifts,
            user: self.lender.user().cloned().filter(|_| !companion.privileged),
            lock_limit: None,
            // virtiofsd holds a descriptor for each file that the guest knows of, and writes the guest's files; it says itself
            // how many it takes, and whoever shares a folder says by that folder how much there is room for.
            descriptors: Some(DESCRIPTORS).filter(|_| !companion.privileged),
            file_limit: Some(COMPANION_FILE).filter(|_| !companion.privileged),
            privileged: companion.privileged,
            ground: None,
            bounds: self.lender.user().map(|_| (self.uuid, self.bounds)),
        }
    }
}

/// Who makes the walls. Blocks.
pub fn mason(lender: &Lender) -> Mason {
    if lender.is_wary() { Mason::ROOT } else { Mason::ours() }
}

/// What each of a guest's processes finds, with what is its own.
pub fn environment(home: &Path, own: &[(String, String)]) -> Vec<(String, String)> {
    let home = home.to_string_lossy().into_owned();
    let base =
        [("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("LC_ALL", "C"), ("HOME", &home), ("XDG_RUNTIME_DIR", &home)];
    let mut env: Vec<(String, String)> = base.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    env.retain(|(key, _)| !own.iter().any(|(name, _)| name == key));
    env.extend(own.iter().cloned());
    env
}

/// That files could not be shown to a program behind its wall.
pub fn unshown(whom: &str, error: &io::Error) -> DriverError {
    DriverError::Storage(format!("{whom} cannot be shown what it needs: {error}"))
}

/// That something could not be done with a file.
pub fn storage(path: &Path, error: &io::Error) -> DriverError {
    DriverError::Storage(format!("{}: {error}", path.display()))
}
