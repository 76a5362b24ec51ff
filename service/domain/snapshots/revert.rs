//! Going back to a snapshot: images, memory and both configurations together.

use super::create::switch_disks;
use super::plan::{Planned, renamed};
use super::{Domain, DomainJournal, RevertOptions};
use crate::authz::Caller;
use crate::domain::config::Update;
use crate::domain::lifecycle::{Origin, StartOptions};
use crate::error::{Error, Result};
use crate::job::{Job, Ticket};
use crate::lock::lock;
use crate::store::{Deed, Record};
use crate::stored::StoredDef;
use crate::time::now_usec;
use crate::verb;
use std::path::PathBuf;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_model::device::Disk;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{
    DiskMode, ExistingSnapshot, Journal as _, Machine, Reverted, Siblings, Snapshots, StartFrom,
};
use virt_model::snapshot::SnapshotDef;
use virt_model::state::{Defined, DomainState, Lifecycle, Resumed, StateReason, Stopped, Suspended};

impl Domain {
    /// Reverts to a snapshot. Everything that can be checked is checked before it is accepted; the ticket answers when it
    /// is done. Errors: `RevertRisky` names the risks that `force` has not accepted; nothing has changed then.
    pub async fn revert(self: &Arc<Self>, caller: &Caller, name: &str, options: RevertOptions) -> Result<Ticket> {
        self.accepted(caller, &verb::REVERT, self.accept_revert(caller, name, options)).await
    }

    async fn accept_revert(self: &Arc<Self>, caller: &Caller, name: &str, options: RevertOptions) -> Result<Ticket> {
        self.snapshot(name)?;
        self.allow_snapshot(caller, verb::REVERT.action, name).await?;
        options.check()?;
        if let Ok((_, SnapshotDef { domain: Some(then), .. })) = self.usable_snapshot(name) {
            self.driver.learn(&then).await;
        }
        let planned = self.plan_revert(name, &options).await?;
        self.accept_risks(name, &planned.plan)?;
        let (name, who) = (name.to_owned(), caller.clone());
        let job = self.change(caller, &verb::REVERT).open(options.cancel_on_disconnect)?;
        Ok(job.run(async move |domain, job| {
            // The domain may have become another while we waited for our turn.
            let planned = domain.plan_revert(&name, &options).await?;
            domain.accept_risks(&name, &planned.plan)?;
            domain.go_back(&who, planned, &options, job).await
        }))
    }

    async fn go_back(
        self: &Arc<Self>,
        caller: &Caller,
        planned: Planned,
        options: &RevertOptions,
        job: Arc<Job>,
    ) -> Result<()> {
        let Planned { def, kept, machine, keep, active, in_place, .. } = planned;
        if active.is_some() && !in_place {
            self.volumes_are_there(&def)?;
        }
        let deed = Deed::Revert { name: def.name.clone(), active, in_place, ran: machine.running };
        let journal = self.journal(deed, &job);
        journal.begin().await?;
        // A transient domain must not go with its guest.
        let stay = crate::domain::lifecycle::Creation::begin(self)?;
        let starts = active.map(|_| self.will_start(job.cancel_token()));
        if in_place {
            return self.load_in_place(&def, &kept, &machine, active == Some(true), &journal).await;
        }
        let stored = lock(&self.state).stored.clone();
        let before = Before { stored, record: self.snapshot(&def.name)? };
        let reverted = match self.bring_images(&kept, &machine, keep, &journal, &job).await {
            Ok(reverted) => reverted,
            Err(e) => {
                journal.end_after_failure(&e).await;
                return Err(self.not_reverted(&def.name, e));
            }
        };
        // From here on it cannot come back: the images are another time's.
        self.end_for_revert(&journal).await?;
        let stands = async {
            if job.cancel_token().is_cancelled() {
                return Err(self.not_reverted(&def.name, DriverError::Cancelled));
            }
            let def = self.keep_reverted(def, &reverted, &journal).await?;
            match active {
                Some(paused) => {
                    let how = StartOptions { paused, reset_nvram: options.reset_nvram, ..StartOptions::default() };
                    self.start_reverted(caller, &def, kept, &reverted, how, job.cancel_token()).await?;
                    journal.step("started");
                }
                None => self.is_off(StateReason::FromSnapshot).await,
            }
            Ok(def)
        };
        let def = match stands.await {
            Ok(def) => def,
            Err(e) => {
                self.take_back(&without_guest(&machine), &reverted, before, &journal).await;
                self.is_left_without_guest(&machine, matches!(e, Error::Cancelled(_))).await;
                return Err(e);
            }
        };
        drop(starts);
        drop(stay);
        self.reverted(def, &reverted, &journal).await
    }

    /// Refuses to end what runs where the guest of the snapshot could not be started for want of a volume.
    fn volumes_are_there(&self, def: &SnapshotDef) -> Result<()> {
        let Some(then) = &def.domain else { return Ok(()) };
        // Such a disk is an overlay of its own afterwards.
        let is_frozen = |disk: &&Disk| {
            let mut parts = def.disks.iter();
            parts.any(|part| part.target == disk.target.dev && matches!(part.mode, DiskMode::External { .. }))
        };
        let mut disks = then.devices.disks.iter().filter(|disk| !is_frozen(disk));
        disks.try_for_each(|disk| self.shared.volumes.plug_disk(&self.name(), &mut disk.clone()))
    }

    /// Brings the images to the snapshot, while what runs stands aside where it can; else it ends first. On failure it goes
    /// on, or has failed.
    async fn bring_images(
        self: &Arc<Self>,
        kept: &ExistingSnapshot,
        machine: &Machine,
        keep: Vec<PathBuf>,
        journal: &Arc<DomainJournal>,
        job: &Job,
    ) -> std::result::Result<Reverted, DriverError> {
        let driver = self.snapshot_driver()?;
        let off = without_guest(machine);
        let siblings = self.siblings(&kept.name, &[], &off).map_err(|e| DriverError::Internal(e.to_string()))?;
        let siblings = Siblings { keep, ..siblings };
        let parked = driver.park(machine, journal.clone()).await?;
        if !parked && job.cancel_token().is_cancelled() {
            return Err(DriverError::Cancelled);
        }
        if !parked {
            self.end_for_revert(journal).await.map_err(|e| DriverError::Internal(e.to_string()))?;
        }
        if machine.guest.is_some() {
            // What runs is lost, should this be given up: only a destroy may want that.
            job.past_return();
        }
        let brought = driver.revert_images(&off, kept, &siblings, journal.clone()).await;
        if brought.is_err() {
            if parked {
                let stands = |e| DriverError::HalfDone(format!("what runs had to stand aside, and cannot go on: {e}"));
                match driver.unpark(machine).await {
                    // It was destroyed meanwhile.
                    Ok(()) | Err(DriverError::Gone) => {}
                    Err(e) => return Err(stands(e)),
                }
            } else {
                self.is_left_without_guest(machine, false).await;
            }
        }
        brought
    }

    /// Ends what runs, if anything does.
    async fn end_for_revert(self: &Arc<Self>, journal: &Arc<DomainJournal>) -> Result<()> {
        if let Ok(guest) = self.guest() {
            self.end_as(guest, Stopped::FromSnapshot).await?;
            journal.step("ended");
        }
        Ok(())
    }

    /// The snapshot could not be started from, or written down: disks, stored configuration and record are again what they
    /// were.
    async fn take_back(&self, machine: &Machine, reverted: &Reverted, before: Before, journal: &Arc<DomainJournal>) {
        let back = async {
            let driver = self.takes_snapshots()?;
            let settled = driver.roll_back_revert(machine, reverted).await;
            settled.map_err(|e| Error::from_driver(&self.name(), "take back the revert of", e))?;
            if let Some(stored) = before.stored {
                self.store(stored, &self.name()).await?;
            }
            self.save_record(Record::clone(&before.record)).await?;
            let current = lock(&self.state).snapshots.current().map(str::to_owned);
            self.save_current(current).await?;
            journal.end().await
        };
        if let Err(error) = back.await {
            tracing::error!(uuid = %self.uuid, %error, "a revert is half done; it is finished before anything else is");
        }
    }

    /// Where the guest that ran has ended for this, no other has come in its place: it was `destroyed` before it was there, or
    /// it failed.
    async fn is_left_without_guest(&self, before: &Machine, destroyed: bool) {
        let ended_for_this = {
            let state = lock(&self.state);
            state.guest.is_none() && state.reason == StateReason::FromSnapshot
        };
        if before.guest.is_none() || !ended_for_this {
            return;
        }
        let since_usec = now_usec();
        let reason = if destroyed { StateReason::Destroyed } else { StateReason::Failed };
        self.forget_guest(None, reason, since_usec).await;
        self.all_told().await.commit(|state| {
            state.reason = reason;
            state.since_usec = since_usec;
            if destroyed { Vec::new() } else { vec![Lifecycle::Stopped(Stopped::Failed)] }
        });
    }

    /// Into the process that runs.
    async fn load_in_place(
        self: &Arc<Self>,
        def: &SnapshotDef,
        kept: &ExistingSnapshot,
        machine: &Machine,
        paused: bool,
        journal: &Arc<DomainJournal>,
    ) -> Result<()> {
        let guest = self.guest()?;
        let was_running = machine.running;
        let loaded = async {
            lock(&self.state).mute();
            if was_running {
                guest.instance.suspend().await?;
                journal.step("suspended");
            }
            self.driver_load(machine, kept, journal.clone()).await?;
            journal.step("loaded");
            Ok::<_, DriverError>(())
        };
        if let Err(e) = loaded.await {
            // Given up before anything was loaded: it goes on as before.
            if let (DriverError::Cancelled, true) = (&e, was_running)
                && let Err(error) = guest.instance.resume().await
            {
                tracing::error!(uuid = %self.uuid, %error, "the guest stood for a revert that was cancelled, and does not go on");
            }
            self.unmuted(was_running).await;
            if let DriverError::Gone = e {
                return Err(self.died_while_loaded(&def.name, guest.id).await);
            }
            journal.end_after_failure(&e).await;
            return Err(self.not_reverted(&def.name, e));
        }
        let reverted = in_process(kept, machine);
        // The guest is there, whether that can be written down or not: it goes on.
        let written = self.keep_reverted(def.clone(), &reverted, journal).await;
        let resumed = if paused { Ok(()) } else { guest.instance.resume().await };
        self.unmuted(was_running).await;
        let def = written?;
        self.relabel(&def).await?;
        let name = def.name.clone();
        self.reverted(def, &reverted, journal).await?;
        resumed.map_err(|e| self.not_reverted(&name, e))
    }

    /// The process died, and its images may be of this time or that: they are brought to the snapshot at once.
    async fn died_while_loaded(self: &Arc<Self>, name: &str, id: u32) -> Error {
        self.until(|state| !state.runs(id)).await;
        let story = match self.finish_interrupted().await {
            Ok(()) => "what was cut off has been looked after, as the log says".to_owned(),
            Err(e) => e.to_string(),
        };
        let domain = self.name();
        Error::HypervisorFailed {
            what: format!("cannot revert domain '{domain}' to '{name}'"),
            why: format!("its process ended while it went back; {story}"),
        }
    }

    async fn driver_load(
        &self,
        machine: &Machine,
        kept: &ExistingSnapshot,
        journal: Arc<DomainJournal>,
    ) -> std::result::Result<(), DriverError> {
        self.snapshot_driver()?.load(machine, kept, journal).await
    }

    fn snapshot_driver(&self) -> std::result::Result<&dyn Snapshots, DriverError> {
        let none = || DriverError::Unsupported("this driver cannot take snapshots".to_owned());
        self.driver.snapshots().ok_or_else(none)
    }

    /// What the running guest is called and described by is the snapshot's again.
    pub(super) async fn relabel(&self, def: &SnapshotDef) -> Result<()> {
        let (Some(taken), Some(mut live)) = (def.domain.as_deref(), self.live()) else { return Ok(()) };
        let labels = Arc::make_mut(&mut live);
        labels.title.clone_from(&taken.title);
        labels.description.clone_from(&taken.description);
        labels.metadata.clone_from(&taken.metadata);
        self.put_configurations(Some(live), None, Update::Part).await
    }

    /// The stored configuration and the mark of the current one, on disk.
    pub(super) async fn keep_reverted(
        &self,
        mut def: SnapshotDef,
        reverted: &Reverted,
        journal: &Arc<DomainJournal>,
    ) -> Result<SnapshotDef> {
        def.disks.clone_from(&reverted.disks);
        let record = self.snapshot(&def.name)?;
        if record.record != reverted.record || record.def.as_ref() != Ok(&def) {
            let record = Record { def: Ok(def.clone()), record: reverted.record.clone(), ..Record::clone(&record) };
            self.save_record(record).await?;
            journal.step("record");
        }
        if let Some(stored) = self.stored_again(&def, &reverted.def).await? {
            self.store(stored, &self.name()).await?;
            journal.step("stored");
        }
        self.save_current(Some(def.name.clone())).await?;
        journal.step("current");
        Ok(def)
    }

    /// What the next cold start is to use; `None` for a transient domain.
    async fn stored_again(&self, def: &SnapshotDef, stands_on: &DomainDef) -> Result<Option<Arc<StoredDef>>> {
        let name = {
            let state = lock(&self.state);
            state.stored.is_some().then(|| state.name.clone())
        };
        let (Some(name), Some(taken)) = (name, &def.domain) else { return Ok(None) };
        let mut stored = DomainDef::clone(def.inactive.as_ref().unwrap_or(taken));
        stored.name = name;
        stored.id = None;
        stored.uuid = self.uuid;
        switch_disks(&mut stored, taken, stands_on);
        self.to_store(Arc::new(stored)).await.map(Some)
    }

    pub(super) async fn start_reverted(
        self: &Arc<Self>,
        caller: &Caller,
        def: &SnapshotDef,
        kept: ExistingSnapshot,
        reverted: &Reverted,
        options: StartOptions,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let from = def.has_memory().then_some(StartFrom::Snapshot(kept));
        let live = renamed(&reverted.def, &self.name());
        let origin = Origin::Snapshot(from.map(Box::new));
        // Boxed: a start is large, and this lies deep in what may already be one.
        Box::pin(self.start_guest(live, caller, options, origin, cancel)).await
    }

    /// It was shut off before, or its guest has been ended for this.
    pub(in crate::domain) async fn is_off(&self, reason: StateReason) {
        let since_usec = now_usec();
        self.forget_guest(None, reason, since_usec).await;
        self.all_told().await.commit(|state| {
            state.reason = reason;
            state.since_usec = since_usec;
            state.is_saved_or_not(reason);
            Vec::new()
        });
    }

    /// Told last.
    pub(super) async fn reverted(
        &self,
        def: SnapshotDef,
        reverted: &Reverted,
        journal: &Arc<DomainJournal>,
    ) -> Result<()> {
        let machine = self.machine().await?;
        let stored = self.stored_again(&def, &reverted.def).await?;
        if let Err(error) = self.takes_snapshots()?.commit_revert(&machine, reverted).await {
            tracing::warn!(uuid = %self.uuid, %error, "what a revert kept aside is still there");
        }
        journal.step("settled");
        // It would bring old memory to other disks.
        self.remove_managed_save_file().await?;
        let back = format!("the machine was brought back to snapshot '{}' since, which no bitmap tells", def.name);
        self.breaks_checkpoints(&back).await?;
        journal.end().await?;
        self.all_told().await.commit(|state| {
            state.managed_save = false;
            let tree = state.snapshots.change();
            tree.set_current(Some(&def.name));
            if let Some(content) = tree.content_mut(&def.name) {
                let record = reverted.record.clone();
                *content = Arc::new(Record { def: Ok(def.clone()), record, ..Record::clone(content) });
            }
            match stored {
                Some(stored) => state.has_stored(stored, Lifecycle::Defined(Defined::FromSnapshot)),
                None => Vec::new(),
            }
        });
        Ok(())
    }

    /// The hypervisor's reports count again: what they came to is told, if it is news.
    pub(super) async fn unmuted(&self, was_running: bool) {
        self.all_told().await;
        let (reason, since_usec) = (StateReason::FromSnapshot, now_usec());
        let seen = lock(&self.state).muted;
        if let (Some(now), Ok(guest)) = (seen, self.guest()) {
            self.keep_status(guest.id, now, reason, since_usec).await;
        }
        self.all_told().await.commit(|state| {
            let (Some(now), true) = (state.muted.take(), state.guest.is_some()) else { return Vec::new() };
            state.state = now;
            state.reason = reason;
            state.since_usec = since_usec;
            match (was_running, now) {
                (true, DomainState::Paused) => vec![Lifecycle::Suspended(Suspended::FromSnapshot)],
                (false, DomainState::Running) => vec![Lifecycle::Resumed(Resumed::FromSnapshot)],
                _ => Vec::new(),
            }
        });
    }
}

/// The same machine, once what runs has ended.
fn without_guest(machine: &Machine) -> Machine {
    Machine { guest: None, running: false, ..machine.clone() }
}

/// What was on disk before a revert.
struct Before {
    stored: Option<Arc<StoredDef>>,
    record: Arc<Record>,
}

/// What a revert within the process comes to: the machine stands on what it stood on.
pub(super) fn in_process(kept: &ExistingSnapshot, machine: &Machine) -> Reverted {
    let (disks, record) = (kept.disks.clone(), kept.record.clone());
    Reverted { def: machine.def.clone(), disks, record, aside: serde_json::Value::Null }
}
