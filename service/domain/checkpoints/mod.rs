//! A domain's checkpoints: which there are, and whether what they have kept can be trusted. The bitmaps in images are the
//! driver's matter (`virt_model::driver::checkpoints`).
//!
//! ```text
//!  create  plan (no change) ─▶ intent on disk ─▶ driver, all disks in one step ─▶ record, intent gone
//!  delete  intent on disk ─▶ driver, which may do that twice ─▶ record and intent gone
//!  killed  the bitmaps are there, and sound: it is complete; else nothing of it is left
//! ```
//!
//! A checkpoint whose bitmaps were once in doubt is broken for ever: a gap in what they tell cannot be seen later.

mod set;

pub(super) use set::CheckpointSet;

use super::Domain;
use super::snapshots::DomainJournal;
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::images::{FROZEN, Fate};
use crate::lock::lock;
use crate::registry::check_new_name;
use crate::store::{Deed, on_disk};
use crate::time::now_usec;
use crate::verb;
use std::path::PathBuf;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_model::checkpoint::{CheckpointDef, CheckpointDoc, of_machine};
use virt_model::driver::DriverError;
use virt_model::driver::checkpoints::{Checkpoints, TrackedDisk};
use virt_model::driver::snapshots::{Journal as _, Machine};
use virt_model::snapshot::check_name_of;

/// What goes with a checkpoint that is deleted.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeleteCheckpoint {
    /// Its record alone: bitmaps stay in images.
    pub metadata_only: bool,
}

impl Domain {
    /// Creates a checkpoint of the running guest; its name. On failure nothing has changed.
    pub async fn create_checkpoint(self: &Arc<Self>, caller: &Caller, xml: &str) -> Result<String> {
        let verb = &verb::CREATE_CHECKPOINT;
        self.logged(caller, verb, async {
            self.allow(caller, verb.action).await?;
            let doc = self.read_checkpoint(caller, xml).await?;
            let _turn = self.take_turn(verb.word, &CancellationToken::new()).await?;
            self.finish_interrupted_soon().await?;
            self.applies(verb)?;
            let machine = self.machine().await?;
            let def = self.plan_checkpoint(&doc, &machine).await?;
            let (name, cancel) = (def.name.clone(), CancellationToken::new());
            let journal = self.journal_of(Deed::Checkpoint { def: def.clone() }, None, &cancel);
            journal.begin().await?;
            if let Err(e) = self.takes_checkpoints()?.create_checkpoint(&machine, &def.tracked).await {
                journal.end_after_failure(&e).await;
                return Err(self.driver_failed(verb.word, e));
            }
            journal.step("bitmaps");
            self.keep_checkpoint(def, &journal).await?;
            Ok(name)
        })
        .await
    }

    /// A document of a checkpoint, which may leave out everything.
    pub(super) async fn read_checkpoint(&self, caller: &Caller, xml: &str) -> Result<CheckpointDoc> {
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        seat.read(xml, CheckpointDoc::parse).await.map_err(Error::ConfigInvalid)
    }

    /// What a new checkpoint would be; refuses what cannot be. Changes nothing.
    pub(super) async fn plan_checkpoint(&self, doc: &CheckpointDoc, machine: &Machine) -> Result<CheckpointDef> {
        let created_usec = now_usec();
        let name = match doc.name() {
            Some(name) => name.to_owned(),
            None => self.free_checkpoint_name(created_usec / 1_000_000),
        };
        check_name_of("checkpoint", &name).map_err(Error::InvalidArgument)?;
        check_new_name("checkpoint", &name)?;
        let def = CheckpointDef::of(doc, &name, &machine.def).map_err(Error::ConfigInvalid)?;
        self.has_no_block_jobs_on(&def.tracked)?;
        let order = {
            let state = lock(&self.state);
            state.no_backup_is_to_be_ended()?;
            state.checkpoints.room_for_another(&state.name)?;
            if state.checkpoints.get(&name).is_some() {
                let text = format!("checkpoint '{name}' already exists for domain '{}'; delete it first", state.name);
                return Err(Error::CheckpointExists(text));
            }
            let tracks = |disk: &TrackedDisk| {
                let same = |other: &TrackedDisk| other.target == disk.target && other.bitmap == disk.bitmap;
                state.checkpoints.all().iter().find(|other| other.tracked.iter().any(same))
            };
            if let Some((disk, other)) = def.tracked.iter().find_map(|disk| Some((disk, tracks(disk)?))) {
                let (bitmap, target, other) = (&disk.bitmap, &disk.target, &other.name);
                let text =
                    format!("the bitmap '{bitmap}' of disk '{target}' is that of checkpoint '{other}'; name another");
                return Err(Error::CheckpointExists(text));
            }
            state.checkpoints.next_order()
        };
        let able = self.takes_checkpoints()?.check_create_checkpoint(machine, &def.tracked).await;
        able.map_err(|e| match e {
            DriverError::SnapshotExists(text) => Error::CheckpointExists(text),
            e => self.driver_failed(verb::CREATE_CHECKPOINT.word, e),
        })?;
        Ok(CheckpointDef { created_usec, order, ..def })
    }

    /// A block job may take layers out of a disk, and bitmaps with them.
    fn has_no_block_jobs_on(&self, tracked: &[TrackedDisk]) -> Result<()> {
        tracked.iter().try_for_each(|disk| self.has_no_block_job(Some(&disk.target)))
    }

    /// The time in seconds, or the next that is free.
    fn free_checkpoint_name(&self, seconds: u64) -> String {
        let state = lock(&self.state);
        let mut names = (seconds..).map(|second| second.to_string());
        names.find(|name| state.checkpoints.get(name).is_none()).unwrap_or_default()
    }

    /// Its bitmaps are there: it is kept, and told.
    async fn keep_checkpoint(self: &Arc<Self>, def: CheckpointDef, journal: &Arc<DomainJournal>) -> Result<()> {
        self.save_checkpoints(vec![def.clone()]).await?;
        journal.step("record");
        journal.end().await?;
        self.has_checkpoint_now(def).await;
        Ok(())
    }

    /// The same for one that was made with something else, which is noted elsewhere.
    pub(super) async fn add_checkpoint(self: &Arc<Self>, def: CheckpointDef) -> Result<()> {
        self.save_checkpoints(vec![def.clone()]).await?;
        self.has_checkpoint_now(def).await;
        Ok(())
    }

    /// It is on disk; a guest that has ended before anybody knew of it is looked at, too.
    async fn has_checkpoint_now(self: &Arc<Self>, def: CheckpointDef) {
        self.all_told().await.commit(|state| {
            state.checkpoints.put(def);
            Vec::new()
        });
        if self.guest().is_err() {
            self.looks_at_checkpoints();
        }
    }

    /// One that was cut off: complete, or nothing is left of it.
    pub(super) async fn finish_checkpoint(
        self: &Arc<Self>,
        def: CheckpointDef,
        journal: &Arc<DomainJournal>,
    ) -> Result<String> {
        let (machine, name) = (self.machine().await?, def.name.clone());
        let word = verb::CREATE_CHECKPOINT.word;
        let driver = self.takes_checkpoints()?;
        let doubts = driver
            .doubts(&machine, std::slice::from_ref(&def.tracked))
            .await
            .map_err(|e| self.driver_failed(word, e))?;
        if doubts.is_empty() {
            self.keep_checkpoint(def, journal).await?;
            return Ok(format!("checkpoint '{name}' is complete"));
        }
        driver.delete_checkpoint(&machine, &def.tracked).await.map_err(|e| self.driver_failed(word, e))?;
        self.forget_checkpoint(&name, journal).await?;
        Ok(format!("nothing is left of checkpoint '{name}'"))
    }

    /// Deletes a checkpoint. Those before and after it tell what they told.
    pub async fn delete_checkpoint(self: &Arc<Self>, caller: &Caller, name: &str, how: DeleteCheckpoint) -> Result<()> {
        let verb = &verb::DELETE_CHECKPOINT;
        self.short(caller, verb, async {
            let def = self.checkpoint(name)?;
            let deed = Deed::DeleteCheckpoint { name: name.to_owned() };
            let journal = self.journal_of(deed, None, &CancellationToken::new());
            if how.metadata_only {
                return self.forget_checkpoint(name, &journal).await;
            }
            self.has_no_block_jobs_on(&def.tracked)?;
            let machine = self.machine().await?;
            self.may_write_bitmaps(&def, &machine).await?;
            journal.begin().await?;
            let deleted = self.takes_checkpoints()?.delete_checkpoint(&machine, &def.tracked).await;
            journal.step("bitmaps");
            if let Err(e) = deleted {
                // What is gone of it is seen by whoever looks at it next.
                journal.end_after_failure(&e).await;
                self.look_at_checkpoints().await?;
                return Err(self.driver_failed(verb.word, e));
            }
            self.forget_checkpoint(name, &journal).await
        })
        .await
    }

    /// Refuses to write to images without a guest that others stand on.
    async fn may_write_bitmaps(&self, def: &CheckpointDef, machine: &Machine) -> Result<()> {
        if machine.guest.is_some() {
            return Ok(());
        }
        let deed = format!("cannot delete checkpoint '{}' of domain '{}'", def.name, self.name());
        let disk = |tracked: &TrackedDisk| of_machine(&machine.def, &tracked.target).and_then(|disk| disk.path());
        let files: Vec<PathBuf> = def.tracked.iter().filter_map(disk).map(PathBuf::from).collect();
        self.shared.images.refuse_in_use(&deed, &files, Fate::Written, None, FROZEN).await
    }

    async fn forget_checkpoint(&self, name: &str, journal: &Arc<DomainJournal>) -> Result<()> {
        let (shared, uuid, gone) = (self.shared.clone(), self.uuid, name.to_owned());
        on_disk(move || shared.store.remove_checkpoint(uuid, &gone)).await?;
        journal.step("record");
        journal.end().await?;
        self.has_no_checkpoint(name).await;
        Ok(())
    }

    /// Its record goes, and with it the checkpoint.
    pub(super) async fn drop_checkpoint(&self, name: &str) -> Result<()> {
        let (shared, uuid, gone) = (self.shared.clone(), self.uuid, name.to_owned());
        on_disk(move || shared.store.remove_checkpoint(uuid, &gone)).await?;
        self.has_no_checkpoint(name).await;
        Ok(())
    }

    async fn has_no_checkpoint(&self, name: &str) {
        self.all_told().await.commit(|state| {
            state.checkpoints.remove(name);
            Vec::new()
        });
    }

    /// A deletion that was cut off is done once more.
    pub(super) async fn finish_deleting_checkpoint(&self, name: &str, journal: &Arc<DomainJournal>) -> Result<String> {
        if let Ok(def) = self.checkpoint(name) {
            let machine = self.machine().await?;
            let deleted = self.takes_checkpoints()?.delete_checkpoint(&machine, &def.tracked).await;
            deleted.map_err(|e| self.driver_failed(verb::DELETE_CHECKPOINT.word, e))?;
        }
        self.forget_checkpoint(name, journal).await?;
        Ok(format!("checkpoint '{name}' is deleted"))
    }

    /// The names of its checkpoints, in the order of their creation.
    pub async fn checkpoints(&self, caller: &Caller) -> Result<Vec<String>> {
        self.allow(caller, verb::LIST_CHECKPOINTS.action).await?;
        Ok(lock(&self.state).checkpoints.all().iter().map(|def| def.name.clone()).collect())
    }

    /// Whether it has a checkpoint of that name.
    pub async fn has_checkpoint(&self, caller: &Caller, name: &str) -> Result<()> {
        self.allow(caller, verb::GET_CHECKPOINT.action).await?;
        self.checkpoint(name).map(drop)
    }

    /// A checkpoint's document.
    pub async fn checkpoint_xml(&self, caller: &Caller, name: &str) -> Result<String> {
        self.allow(caller, verb::CHECKPOINT_XML.action).await?;
        let def = self.checkpoint(name)?;
        let parent = lock(&self.state).checkpoints.parent(name).map(str::to_owned);
        Ok(def.write(parent.as_deref()))
    }

    /// The checkpoint of that name.
    pub(super) fn checkpoint(&self, name: &str) -> Result<Arc<CheckpointDef>> {
        let state = lock(&self.state);
        state.still_here()?;
        state.checkpoints.get(name).cloned().ok_or_else(|| CheckpointSet::none_of(&state.name, name))
    }

    /// The driver's part.
    pub(super) fn takes_checkpoints(&self) -> Result<&dyn Checkpoints> {
        self.driver.checkpoints().ok_or_else(|| {
            let (name, driver) = (self.name(), self.driver.name());
            Error::OperationUnsupported(format!("domain '{name}': the driver '{driver}' keeps no checkpoints"))
        })
    }

    /// Looks whether what is kept of each checkpoint can still be trusted; those that cannot are broken from now on. For who has
    /// the turn: nobody else may open the images meanwhile.
    pub(super) async fn look_at_checkpoints(&self) -> Result<()> {
        let sound = self.sound_checkpoints();
        if sound.is_empty() {
            return Ok(());
        }
        let machine = self.machine().await?;
        let tracked: Vec<Vec<TrackedDisk>> = sound.iter().map(|def| def.tracked.clone()).collect();
        let doubts = self.takes_checkpoints()?.doubts(&machine, &tracked).await;
        let doubts = doubts.map_err(|e| self.driver_failed("look at the checkpoints of", e))?;
        self.break_checkpoints(doubts.into_iter().filter_map(|(at, why)| Some((sound.get(at)?.clone(), why)))).await
    }

    /// The same when the turn comes, after something that may have been to their harm.
    pub(super) fn looks_at_checkpoints(self: &Arc<Self>) {
        if self.sound_checkpoints().is_empty() {
            return;
        }
        let domain = self.clone();
        tokio::spawn(async move {
            let looked = async {
                let _turn = domain.take_turn("a look at its checkpoints", &CancellationToken::new()).await?;
                domain.look_at_checkpoints().await
            };
            if let Err(error) = looked.await {
                tracing::warn!(uuid = %domain.uuid, name = domain.name(), %error, "its checkpoints are looked at before they are used");
            }
        });
    }

    /// None of the checkpoints can be trusted any more, for that reason.
    pub(super) async fn breaks_checkpoints(&self, why: &str) -> Result<()> {
        self.break_checkpoints(self.sound_checkpoints().into_iter().map(|def| (def, why.to_owned()))).await
    }

    fn sound_checkpoints(&self) -> Vec<Arc<CheckpointDef>> {
        lock(&self.state).checkpoints.all().iter().filter(|def| def.broken.is_none()).cloned().collect()
    }

    async fn break_checkpoints(&self, doubts: impl Iterator<Item = (Arc<CheckpointDef>, String)>) -> Result<()> {
        let broken = doubts.map(|(def, why)| CheckpointDef { broken: Some(why), ..CheckpointDef::clone(&def) });
        let broken: Vec<CheckpointDef> = broken.collect();
        if broken.is_empty() {
            return Ok(());
        }
        for def in &broken {
            let (checkpoint, why) = (&def.name, def.broken.as_deref().unwrap_or_default());
            tracing::warn!(uuid = %self.uuid, name = self.name(), checkpoint, "a checkpoint is broken: {why}");
        }
        self.save_checkpoints(broken.clone()).await?;
        self.all_told().await.commit(|state| {
            broken.into_iter().for_each(|def| state.checkpoints.put(def));
            Vec::new()
        });
        Ok(())
    }

    async fn save_checkpoints(&self, records: Vec<CheckpointDef>) -> Result<()> {
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        on_disk(move || shared.store.save_checkpoints(uuid, &records)).await
    }
}
