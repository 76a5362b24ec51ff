//! Processes of a guest, each recorded before it runs.

use super::companion::{Gifts, Living, Recorded};
use super::record::{Keeper, Record};
use super::tune::Bounds;
use crate::host::files::Program;
use crate::host::process::{Identity, Process};
use crate::host::spawn::{Plan, Spawned, spawn};
use crate::host::user::RunAs;
use crate::host::wall::{GroundToCome, Wall};
use crate::host::workers::blocking;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;
use virt_model::driver::DriverError;

/// A process that is to be made.
pub struct Job {
    /// The program, an absolute path.
    pub program: PathBuf,
    /// The file itself, where it was judged; else what the path means.
    pub judged: Option<Arc<Program>>,
    /// Without the program's name.
    pub args: Vec<String>,
    /// All of it.
    pub env: Vec<(String, String)>,
    /// What it prints goes there.
    pub output: Arc<File>,
    /// What it finds open.
    pub gifts: Gifts,
    /// As whom it runs, if not as we do.
    pub user: Option<RunAs>,
    /// Bytes that it may keep from being swapped.
    pub lock_limit: Option<u64>,
    /// How many it may have.
    pub descriptors: Option<u64>,
    /// How long files may become that it writes.
    pub file_limit: Option<u64>,
    /// It runs as virtd does.
    pub privileged: bool,
    /// What its guest may take of the host.
    pub bounds: Option<(Uuid, Bounds)>,
    /// The ground of its wall, where that is being made.
    pub ground: Option<GroundToCome>,
}

/// Makes a process beside QEMU, which is recorded as `record` says.
pub async fn spawn_companion(
    keeper: &Arc<Keeper>,
    job: Job,
    wall: impl FnOnce() -> Result<Wall, DriverError> + Send + 'static,
    record: impl FnOnce(Identity) -> Recorded + Clone + Send + 'static,
) -> Result<Living, DriverError> {
    let enter = record.clone();
    let spawned = spawn_one(keeper, job, wall, move |record, process| record.companions.push(enter(process)));
    spawned.await.map(|(identity, process)| Living { recorded: record(identity), process })
}

/// Makes a process behind that wall, which is recorded before it runs. Cannot be interrupted; takes moments.
pub async fn spawn_one(
    keeper: &Arc<Keeper>,
    job: Job,
    wall: impl FnOnce() -> Result<Wall, DriverError> + Send + 'static,
    change: impl FnOnce(&mut Record, Identity) + Send + 'static,
) -> Result<(Identity, Process), DriverError> {
    let (keeper, name) = (keeper.clone(), job.program.display().to_string());
    let spawned = blocking(move || {
        let wall = wall()?;
        let unwalled = |e| DriverError::Hypervisor(format!("{} cannot be walled in: {e}", job.program.display()));
        let ground = job.ground.map(GroundToCome::wait).transpose().map_err(unwalled)?;
        let joined = AtomicBool::new(false);
        let join = || {
            let entered = job.bounds.iter().all(|(guest, bounds)| bounds.enter(*guest));
            joined.store(entered, Ordering::Release);
        };
        let plan = Plan {
            program: &job.program,
            judged: job.judged.as_deref(),
            args: &job.args,
            env: &job.env,
            output: &job.output,
            gifts: job.gifts,
            user: job.user.as_ref(),
            lock_limit: job.lock_limit,
            descriptors: job.descriptors,
            file_limit: job.file_limit,
            wall: Some(&wall),
            ground: ground.as_ref(),
            join: &join,
            privileged: job.privileged,
        };
        let spawned = spawn(plan, |identity| {
            keeper.update(|record| change(record, identity.clone()))?;
            // While it waits: it never was without.
            if !joined.load(Ordering::Acquire) {
                job.bounds.iter().for_each(|(guest, bounds)| bounds.hold(*guest, identity.pid));
            }
            Ok(())
        });
        spawned.map_err(|e| DriverError::Hypervisor(e.to_string()))
    });
    let Spawned { identity, fd } = spawned.await??;
    let process = Process::new(fd).map_err(|e| DriverError::Internal(format!("cannot watch {name}: {e}")))?;
    Ok((identity, process))
}
