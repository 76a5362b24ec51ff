//! Block jobs: the images of one disk are copied, merged or made whole while the guest runs, and disks get another size.
//!
//! ```text
//!  turn ─▶ plan ─▶ record on disk ─▶ driver begins ─▶ turn given back ─▶ followed, for hours perhaps
//!                                                      └▶ turn ─▶ driver concludes ─▶ configurations ─▶ record gone
//! ```
//!
//! A job has the turn while it begins and while it ends. In between everything goes on that leaves its disk alone; what does
//! not is refused, naming the job ([`Domain::disks_are_idle`]). Whoever finds a record and nobody who follows the job takes
//! it up again with the guest, or settles it without (`follow.rs`).

mod follow;
mod plan;

pub use plan::{BlockJobOptions, ResizeOptions};

use super::images::has_ended;
use super::{Creation, Domain};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::fail_point;
use crate::frames::Changeable as _;
use crate::images::GuestDisk;
use crate::job::{Job, Ticket};
use crate::lock::lock;
use crate::store::{BlockRecord, on_disk};
use crate::verb::{self, Verb};
use async_trait::async_trait;
use follow::Followed;
use plan::Asked;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_model::driver::DriverError;
use virt_model::driver::block_jobs::{BlockJob, BlockJobs, BlockNotes, BlockStage};
use virt_model::driver::snapshots::Machine;
use virt_model::xml::{Element, shorten};

/// A block job that has begun and not ended.
#[derive(Clone, Debug)]
pub(super) struct BlockEntry {
    pub(super) record: BlockRecord,
    /// Who follows it: the job's number, and the guest.
    pub(super) follower: Option<(u64, u32)>,
    pub(super) ready: bool,
    /// It has come to its end, and what is left to be done then could not be done yet: that is tried again by itself.
    pub(super) to_settle: bool,
}

impl BlockEntry {
    /// As it was found.
    pub(super) fn found(record: BlockRecord) -> BlockEntry {
        BlockEntry { record, follower: None, ready: false, to_settle: false }
    }
}

impl Domain {
    /// The topmost image of a disk takes in what is below it, down to `base`; all if that is empty. The ticket answers when
    /// that is done.
    pub async fn block_pull(
        self: &Arc<Self>,
        caller: &Caller,
        target: &str,
        base: &str,
        options: BlockJobOptions,
    ) -> Result<Ticket> {
        let asked = Asked::Pull { base: base.to_owned() };
        self.accept_block_job(caller, &verb::BLOCK_PULL, target, asked, options).await
    }

    /// What is in the layers of a disk from `top` down to `base` goes into that; empty: from the one that the guest writes, down
    /// to the last. Of that the job is ready when it waits to be finished.
    pub async fn block_commit(
        self: &Arc<Self>,
        caller: &Caller,
        target: &str,
        base: &str,
        top: &str,
        options: BlockJobOptions,
    ) -> Result<Ticket> {
        let asked = Asked::Commit { base: base.to_owned(), top: top.to_owned() };
        self.accept_block_job(caller, &verb::BLOCK_COMMIT, target, asked, options).await
    }

    /// A disk is copied into the image that a `<disk>` tells, which the guest writes once the job, when it is ready, is finished.
    pub async fn block_copy(
        self: &Arc<Self>,
        caller: &Caller,
        target: &str,
        xml: &str,
        options: BlockJobOptions,
    ) -> Result<Ticket> {
        let asked = Asked::Copy { xml: xml.to_owned() };
        self.accept_block_job(caller, &verb::BLOCK_COPY, target, asked, options).await
    }

    async fn accept_block_job(
        self: &Arc<Self>,
        caller: &Caller,
        verb: &'static Verb,
        target: &str,
        asked: Asked,
        options: BlockJobOptions,
    ) -> Result<Ticket> {
        self.accepted(caller, verb, async {
            self.allow(caller, verb.action).await?;
            let change = self.change(caller, verb);
            if change.has_turn() && self.is_whole() {
                self.applies(verb)?;
                self.plan_block_job(target, &asked, options).await?;
            }
            let (target, uid) = (target.to_owned(), caller.uid);
            let job = change.open(options.cancel_on_disconnect)?;
            let begin = async move |domain: Arc<Domain>, job: Arc<Job>| {
                domain.applies(verb)?;
                domain.begin_block_job(&target, &asked, options, uid, &job).await
            };
            Ok(job.run_beyond(begin, async |domain, job, followed| domain.follow_block_job(followed, job).await))
        })
        .await
    }

    /// The driver's part.
    fn block_jobs(&self) -> Result<&dyn BlockJobs> {
        self.driver.block_jobs().ok_or_else(|| {
            let (name, driver) = (self.name(), self.driver.name());
            Error::OperationUnsupported(format!("domain '{name}': the driver '{driver}' does not work on disks"))
        })
    }

    /// For who has the turn.
    async fn begin_block_job(
        self: &Arc<Self>,
        target: &str,
        asked: &Asked,
        options: BlockJobOptions,
        uid: u32,
        job: &Arc<Job>,
    ) -> Result<Followed> {
        self.is_as_configured().await?;
        let planned = self.plan_block_job(target, asked, options).await?;
        let (machine, block, removes) = (planned.machine, planned.job, planned.removes);
        let _taken = self.take_written(&block).await?;
        let guest = self.guest()?;
        // A transient domain is there until it is settled.
        let stay = Creation::begin(self)?;
        let driver = self.driver.name().to_owned();
        let record = BlockRecord { job: block.clone(), uid, stage: BlockStage::default(), removes, driver };
        let follower = Some((job.id(), guest.id));
        self.keep_block_job(BlockEntry { record, follower, ready: false, to_settle: false }).await?;
        fail_point::reached();
        let begun = self.block_jobs()?.begin_block_job(&machine, &block, &*self.block_notes(target)).await;
        let held = match begun {
            Ok(held) if !job.cancel_token().is_cancelled() => held,
            begun => {
                let undone = self.settle_or_try_again(&block, Some(machine.def)).await;
                let error = begun.err().unwrap_or(DriverError::Cancelled);
                undone.unwrap_or_else(|e| {
                    tracing::error!(uuid = %self.uuid, target, error = %e, "what was begun of a block job is still there");
                    false
                });
                return Err(self.driver_failed(block.operation(), error));
            }
        };
        fail_point::reached();
        self.changes_in_document();
        Ok(Followed { job: block, live: machine.def, guest, held, _stay: stay })
    }

    /// Refuses what would get in the way of a block job or a backup of the disk `target`, or of a block job of any.
    pub(super) fn disks_are_idle(&self, target: Option<&str>) -> Result<()> {
        self.has_no_block_job(target)?;
        target.map_or(Ok(()), |target| lock(&self.state).disk_is_not_backed_up(target))
    }

    /// The same for what goes on beside a backup.
    pub(super) fn has_no_block_job(&self, target: Option<&str>) -> Result<()> {
        let state = lock(&self.state);
        let mut jobs = state.block_jobs.values();
        let Some(entry) = jobs.find(|entry| target.is_none_or(|target| entry.record.job.target == target)) else {
            return Ok(());
        };
        let job = &entry.record.job;
        let job_name = match entry.follower {
            Some((number, _)) => format!("{} (job {number})", job.operation()),
            None => format!("{} that was cut off", job.operation()),
        };
        Err(Error::Busy { object: format!("disk '{}' of domain '{}'", job.target, state.name), job: job_name })
    }

    /// A guest that may stand for the end of a block job does not go on before it is known which images count.
    pub(super) fn knows_its_images(&self) -> Result<()> {
        let unsettled = {
            let state = lock(&self.state);
            let mut entries = state.block_jobs.values();
            entries
                .find(|entry| entry.to_settle && entry.record.stage.same)
                .map(|entry| entry.record.job.target.clone())
        };
        unsettled.map_or(Ok(()), |target| self.disks_are_idle(Some(&target)))
    }

    /// What is shown in the configuration of what runs of the images that block jobs write.
    pub(super) fn mirrors(block_jobs: &BTreeMap<String, BlockEntry>) -> Vec<(String, Element)> {
        let shown = |entry: &BlockEntry| {
            entry.follower?;
            Some((entry.record.job.target.clone(), entry.record.job.mirror(entry.ready)?))
        };
        block_jobs.values().filter_map(shown).collect()
    }

    /// The document that most readers get is another one.
    fn changes_in_document(&self) {
        if let Some(guest) = lock(&self.state).guest.as_mut() {
            guest.document = Arc::default();
        }
    }

    /// Keeps a block job, on disk and then in what is known.
    async fn keep_block_job(&self, entry: BlockEntry) -> Result<()> {
        let target = entry.record.job.target.clone();
        self.change_block_jobs(|jobs| _ = jobs.insert(target, entry)).await
    }

    /// It has ended.
    async fn forget_block_job(&self, target: &str) -> Result<()> {
        self.change_block_jobs(|jobs| _ = jobs.remove(target)).await
    }

    async fn change_block_jobs(&self, change: impl FnOnce(&mut BTreeMap<String, BlockEntry>)) -> Result<()> {
        // Of jobs on several disks, what is written last is what is known last.
        let _alone = self.block_records.lock().await;
        let mut jobs = lock(&self.state).block_jobs.clone();
        change(&mut jobs);
        let records: BTreeMap<String, BlockRecord> =
            jobs.iter().map(|(target, entry)| (target.clone(), entry.record.clone())).collect();
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        on_disk(move || shared.store.save_block_jobs(uuid, &records)).await?;
        lock(&self.state).block_jobs = jobs;
        self.changes_in_document();
        Ok(())
    }

    fn block_notes(self: &Arc<Self>, target: &str) -> Arc<Notes> {
        Arc::new(Notes { domain: self.clone(), target: target.to_owned(), job: None })
    }

    fn block_entry(&self, target: &str) -> Option<BlockEntry> {
        lock(&self.state).block_jobs.get(target).cloned()
    }

    /// Has the first writing of a disk's image beyond that offset told, once; 0: none.
    pub async fn set_block_threshold(&self, caller: &Caller, target: &str, threshold: u64) -> Result<()> {
        self.beside(caller, &verb::SET_BLOCK_THRESHOLD, async {
            let guest = self.guest()?;
            let disk = guest.live.devices.disks.iter().find(|disk| disk.target.dev == target);
            let disk = disk.ok_or_else(|| {
                Error::NoSuchDevice(format!("domain '{}' has no disk '{}'", self.name(), shorten(target)))
            })?;
            let set = self.block_jobs()?.set_write_threshold(guest.instance.as_ref(), disk, threshold).await;
            set.map_err(|e| Error::from_driver(&self.name(), &format!("watch disk '{target}' of"), e))
        })
        .await
    }

    /// Gives a disk another size, in bytes; the ticket answers when that is done.
    pub async fn block_resize(
        self: &Arc<Self>,
        caller: &Caller,
        target: &str,
        size: u64,
        options: ResizeOptions,
    ) -> Result<Ticket> {
        self.accepted(caller, &verb::BLOCK_RESIZE, async {
            self.allow(caller, verb::BLOCK_RESIZE.action).await?;
            self.host_can(&verb::BLOCK_RESIZE)?;
            let change = self.change(caller, &verb::BLOCK_RESIZE);
            if change.has_turn() && self.is_whole() {
                self.plan_resize(target, size).await?;
            }
            let (target, by) = (target.to_owned(), caller.uid);
            let job = change.open(options.cancel_on_disconnect)?;
            Ok(job.run(async move |domain, job| {
                let (machine, image) = domain.plan_resize(&target, size).await?;
                let resizes = async {
                    job.past_return();
                    domain.resize(&machine, &target, size, options.shrink).await
                };
                domain.shared.volumes.resizes(image, by, size, Box::pin(resizes)).await
            }))
        })
        .await
    }

    /// The same of a disk whose image is a volume, for who resizes that volume while the guest runs. It does not become smaller.
    pub(super) async fn resize_disk_on(
        self: &Arc<Self>,
        disk: &GuestDisk,
        size: u64,
        give_up: &CancellationToken,
    ) -> Result<()> {
        let _turn = self.take_turn(verb::VOLUME_RESIZE.word, give_up).await?;
        self.recovers().await?;
        let live = self.live().ok_or_else(|| has_ended(disk))?;
        let of_guest = live.devices.disks.iter().find(|one| one.path().is_some_and(|path| *path == *disk.image));
        let target = &of_guest.ok_or_else(|| has_ended(disk))?.target.dev;
        let (machine, _) = self.plan_resize(target, size).await?;
        self.resize(&machine, target, size, false).await
    }

    async fn resize(&self, machine: &Machine, target: &str, size: u64, shrink: bool) -> Result<()> {
        let resized = self.block_jobs()?.resize_disk(machine, target, size, shrink).await;
        resized.map_err(|e| self.driver_failed(&format!("resize disk '{target}' of"), e))
    }
}

/// The record of one block job.
pub(super) struct Notes {
    domain: Arc<Domain>,
    target: String,
    /// Whose end is written down here: from then on that both images hold the same it cannot be cancelled.
    job: Option<Arc<Job>>,
}

#[async_trait]
impl BlockNotes for Notes {
    async fn keep(&self, stage: BlockStage) -> Result<(), DriverError> {
        let Some(mut entry) = self.domain.block_entry(&self.target) else { return Err(DriverError::Gone) };
        if stage.same
            && !entry.record.stage.same
            && let Some(job) = &self.job
        {
            job.past_return();
            if job.cancel_token().is_cancelled() {
                return Err(DriverError::Cancelled);
            }
        }
        entry.record.stage = stage;
        let kept = self.domain.keep_block_job(entry).await;
        kept.map_err(|e| match e {
            Error::NoSpace(text) => DriverError::NoSpace(text),
            e => DriverError::Storage(e.to_string()),
        })?;
        self.step("note");
        Ok(())
    }

    fn stage(&self) -> BlockStage {
        self.domain.block_entry(&self.target).map(|entry| entry.record.stage).unwrap_or_default()
    }

    fn step(&self, what: &str) {
        tracing::debug!(uuid = %self.domain.uuid, target = self.target, step = what, "block job");
        fail_point::reached();
    }
}

impl Domain {
    /// Which disk a job on is of, for people.
    fn of_disk(&self, job: &BlockJob) -> String {
        format!("the {} of disk '{}' of domain '{}'", job.operation(), job.target, self.name())
    }
}
