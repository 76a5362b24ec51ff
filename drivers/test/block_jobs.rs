//! Block jobs of guests in memory: nothing is moved, at once or, where a job has a bandwidth, at that pace.

use super::guest::Machine as Played;
use super::{TestDriver, lock, our_machine, stats};
use async_trait::async_trait;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;
use virt_model::device::Disk;
use virt_model::driver::block_jobs::{BlockJob, BlockJobs, BlockNotes, BlockStage, BlockStanding, Held};
use virt_model::driver::snapshots::Machine;
use virt_model::driver::{DeviceEvent, DriverError, Instance, StoredFile};

/// How much each job would move.
const TOTAL: u64 = 64 << 20;
/// How often its progress is told.
const LOOK: Duration = Duration::from_millis(100);

/// A block job that is played.
pub struct PlayedJob {
    begun: Instant,
    /// It has changed over.
    done: bool,
}

fn guest_of(machine: &Machine) -> Result<Arc<Played>, DriverError> {
    machine.guest.as_deref().map_or(Err(DriverError::Gone), our_machine)
}

impl TestDriver {
    fn played<T>(&self, machine: Uuid, job: &BlockJob, with: impl FnOnce(&mut PlayedJob) -> T) -> Option<T> {
        lock(&self.0.block_jobs).get_mut(&(machine, job.target.clone())).map(with)
    }

    fn forget_played(&self, machine: Uuid, job: &BlockJob) {
        lock(&self.0.block_jobs).remove(&(machine, job.target.clone()));
    }

    /// The offset of a disk whose first writing is told.
    pub(super) fn threshold(&self, machine: Uuid, target: &str) -> u64 {
        lock(&self.0.thresholds).get(&(machine, target.to_owned())).copied().unwrap_or_default()
    }

    /// What a disk holds that has been given another size.
    pub(super) fn resized(&self, machine: Uuid, target: &str) -> Option<u64> {
        lock(&self.0.sizes).get(&(machine, target.to_owned())).copied()
    }
}

#[async_trait]
impl BlockJobs for TestDriver {
    async fn check_block_job(&self, machine: &Machine, _: &BlockJob) -> Result<Vec<StoredFile>, DriverError> {
        guest_of(machine)?.listens().await?;
        Ok(Vec::new())
    }

    async fn begin_block_job(
        &self,
        machine: &Machine,
        job: &BlockJob,
        notes: &dyn BlockNotes,
    ) -> Result<Held, DriverError> {
        guest_of(machine)?.listens().await?;
        let played = PlayedJob { begun: Instant::now(), done: false };
        lock(&self.0.block_jobs).insert((machine.def.uuid, job.target.clone()), played);
        notes.step("begun");
        Ok(Held::default())
    }

    async fn take_up_block_job(&self, _: &Machine, _: &BlockJob) -> Result<Held, DriverError> {
        Ok(Held::default())
    }

    async fn follow_block_job(
        &self,
        guest: &dyn Instance,
        job: &BlockJob,
        ready: bool,
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<BlockStanding, DriverError> {
        let guest = our_machine(guest)?;
        if ready {
            guest.has_gone().await;
            return Err(DriverError::Gone);
        }
        loop {
            let Some(begun) = self.played(guest.uuid, job, |played| played.begun) else {
                return Ok(BlockStanding::Ended(None));
            };
            let moved = begun.elapsed().as_secs().saturating_mul(job.bandwidth);
            let moved = if job.bandwidth == 0 { TOTAL } else { moved.min(TOTAL) };
            progress(moved, TOTAL);
            if moved == TOTAL {
                return Ok(BlockStanding::Ready);
            }
            tokio::select! {
                () = guest.has_gone() => return Err(DriverError::Gone),
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    async fn conclude_block_job(
        &self,
        machine: &Machine,
        job: &BlockJob,
        notes: &dyn BlockNotes,
    ) -> Result<bool, DriverError> {
        guest_of(machine)?.listens().await?;
        notes.keep(BlockStage { same: true, ..notes.stage() }).await?;
        self.played(machine.def.uuid, job, |played| played.done = true);
        Ok(true)
    }

    async fn cancel_block_job(&self, guest: &dyn Instance, job: &BlockJob) -> Result<(), DriverError> {
        let guest = our_machine(guest)?;
        guest.listens().await?;
        self.forget_played(guest.uuid, job);
        Ok(())
    }

    async fn settle_block_job(&self, machine: &Machine, job: &BlockJob, same: bool) -> Result<bool, DriverError> {
        match machine.guest {
            Some(_) => Ok(self.played(machine.def.uuid, job, |played| played.done).unwrap_or(false)),
            None => Ok(same),
        }
    }

    async fn clean_up_block_job(
        &self,
        machine: &Machine,
        job: &BlockJob,
        _: bool,
        _: BlockStage,
        _: Vec<StoredFile>,
    ) -> Result<(), DriverError> {
        self.forget_played(machine.def.uuid, job);
        Ok(())
    }

    /// An offset that is not beyond what each image takes has been written already.
    async fn set_write_threshold(&self, guest: &dyn Instance, disk: &Disk, threshold: u64) -> Result<(), DriverError> {
        let guest = our_machine(guest)?;
        guest.listens().await?;
        let (key, target) = ((guest.uuid, disk.target.dev.clone()), disk.target.dev.clone());
        let excess = stats::ALLOCATION.checked_sub(threshold).filter(|_| threshold > 0);
        lock(&self.0.thresholds).insert(key, if excess.is_some() { 0 } else { threshold });
        if let Some(excess) = excess {
            guest.tells_of_device(DeviceEvent::WrittenBeyond { target: format!("{target}-played"), threshold, excess });
        }
        Ok(())
    }

    async fn resize_disk(&self, machine: &Machine, target: &str, size: u64, shrink: bool) -> Result<(), DriverError> {
        if machine.guest.is_some() {
            guest_of(machine)?.listens().await?;
        }
        let now = self.resized(machine.def.uuid, target).unwrap_or(stats::CAPACITY);
        if size < now && !shrink {
            let text = format!(
                "disk '{target}' has {now} bytes, and would lose what is at its end: give 'shrink' if that is meant"
            );
            return Err(DriverError::Argument(text));
        }
        lock(&self.0.sizes).insert((machine.def.uuid, target.to_owned()), size);
        Ok(())
    }
}
