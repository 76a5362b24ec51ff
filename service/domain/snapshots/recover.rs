//! What was cut off is made whole when virtd starts: finished where images have changed, undone where they have not.

use super::{Domain, DomainJournal, ExistingSnapshot};
use crate::domain::StartOptions;
use crate::domain::lifecycle::Creation;
use crate::error::{Error, Result};
use crate::images::Taken;
use crate::lock::lock;
use crate::shared::{AGAIN, virtd_itself};
use crate::store::{Deed, Intent, Record, on_disk};
use crate::turn::{PATIENCE, past_grace};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_model::driver::snapshots::{Journal as _, Recovered, Reverted};
use virt_model::snapshot::{SnapshotDef, SnapshotDoc};
use virt_model::state::StateReason;
use virt_model::xml::Limits;

impl Domain {
    /// Finishes or undoes an operation that was cut off, or that failed half-way and could not be undone, if there is one;
    /// says what was done about it. To be called by who has the turn, before anything that an image or a configuration
    /// in two minds would be the worse for. Error: it cannot be made whole now either; nothing else may begin then.
    ///
    /// What it waits for may never answer. Whoever is asked to give up the turn does not wait on then: the work goes on by
    /// itself, and the turn is not free before that has ended.
    pub(crate) async fn finish_interrupted(self: &Arc<Self>) -> Result<()> {
        self.sees_to_block_jobs().await?;
        let Some(intent) = self.open_intent() else { return Ok(()) };
        let what = what_is(&intent.deed);
        let nobody = || Error::Internal(format!("{what} is finished only by who has the turn"));
        let (turn, give_up) = self.turn.share().ok_or_else(nobody)?;
        // In a task: what may have to be done is much, and this may lie deep in what is much already.
        let (domain, cancel) = (self.clone(), give_up.clone());
        let mut work = tokio::spawn(async move {
            let done = domain.recover(intent, what, &cancel).await;
            if cancel.is_cancelled() {
                domain.wants_no_guest().await;
            }
            match &done {
                Ok(story) => tracing::warn!(uuid = %domain.uuid, name = domain.name(), "{what} was cut off: {story}"),
                Err(error) => {
                    tracing::error!(uuid = %domain.uuid, name = domain.name(), %error, "{what} was cut off, and is still half done");
                }
            }
            domain.all_told().await;
            drop(turn);
            done
        });
        let done = tokio::select! {
            done = &mut work => done.unwrap_or_else(|e| Err(Error::Internal(e.to_string()))),
            () = past_grace(&give_up) => return Err(self.left_alone(what)),
        };
        done.map(drop).map_err(|error| {
            Error::OperationInvalid(format!(
                "domain '{}': {what} was cut off half-way, and cannot be finished: {error}; mend that and try again",
                self.name()
            ))
        })
    }

    /// Block jobs that nobody follows are part of that, and end no sooner.
    async fn sees_to_block_jobs(self: &Arc<Self>) -> Result<()> {
        if lock(&self.state).block_jobs.is_empty() {
            return Ok(());
        }
        let what = "work on its disks";
        let nobody = || Error::Internal(format!("{what} is finished only by who has the turn"));
        let (turn, give_up) = self.turn.share().ok_or_else(nobody)?;
        let domain = self.clone();
        let mut work = tokio::spawn(async move {
            let done = domain.looks_after_block_jobs().await;
            drop(turn);
            done
        });
        tokio::select! {
            done = &mut work => done.unwrap_or_else(|e| Err(Error::Internal(e.to_string()))),
            () = past_grace(&give_up) => Err(self.left_alone(what)),
        }
    }

    /// The same for a verb whose caller waits for the answer: not for longer than for the turn.
    pub(in crate::domain) async fn finish_interrupted_soon(self: &Arc<Self>) -> Result<()> {
        match tokio::time::timeout(PATIENCE, self.finish_interrupted()).await {
            Ok(whole) => whole,
            Err(_) => {
                let what = self.open_intent().map_or("a change", |intent| what_is(&intent.deed));
                self.left_alone(what);
                Err(self.busy_with(finishing(what)))
            }
        }
    }

    /// From now on nobody waits for it: those who want the turn are told what has it.
    fn left_alone(&self, what: &str) -> Error {
        if let Some((turn, _)) = self.turn.share() {
            turn.rename(finishing(what));
        }
        let domain = self.name();
        Error::Cancelled(format!(
            "{} of domain '{domain}' waits for something on the host that does not answer; it goes on, and nothing else begins \
             before it has ended",
            finishing(what)
        ))
    }

    /// Whether nothing is to be finished first.
    pub(in crate::domain) fn is_whole(&self) -> bool {
        self.open_intent().is_none() && lock(&self.state).block_jobs.values().all(|entry| entry.follower.is_some())
    }

    pub(in crate::domain) fn open_intent(&self) -> Option<Intent> {
        let open = lock(&self.state).snapshots.open.clone();
        lock(&open).clone()
    }

    /// What is begun is meant otherwise from now on: on disk first. For who has the turn.
    pub(in crate::domain) async fn keep_intent(&self, intent: Intent) -> Result<()> {
        let (shared, uuid, kept) = (self.shared.clone(), self.uuid, intent.clone());
        on_disk(move || shared.store.save_intent(uuid, &kept)).await?;
        *lock(&lock(&self.state).snapshots.open) = Some(intent);
        Ok(())
    }

    /// Whether a save of it has begun and is not whole.
    pub(in crate::domain) fn is_being_saved(&self) -> bool {
        matches!(self.open_intent(), Some(Intent { deed: Deed::Save { .. }, .. }))
    }

    /// If a save of it is not whole, the domain is there until the result is dropped, even a transient one without a guest: nothing
    /// else begins with its uuid.
    pub(crate) fn stays_until_saved(self: &Arc<Self>) -> Option<Creation> {
        Creation::begin(self).ok().filter(|_| self.is_being_saved())
    }

    /// If a save is half done, because something on the host does not answer, it is tried again and again to make it whole, whatever
    /// else is done meanwhile. Until then `target` stays taken, and the domain is there, even a transient one whose guest ends.
    pub(crate) fn looks_again(self: &Arc<Self>, target: Option<Taken>) {
        let Some(stay) = self.stays_until_saved() else { return };
        let (domain, mut pause) = (self.clone(), AGAIN.0);
        tokio::spawn(async move {
            while domain.is_being_saved() {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(AGAIN.1);
                let what = finishing("saving it");
                // Whoever has the turn sees to it first, or only stops the guest or lets it go on.
                if let Some(_turn) = domain.turn.try_take(&what, &CancellationToken::new()) {
                    // The log has it by then.
                    let _ = domain.finish_interrupted().await;
                }
            }
            drop((stay, target));
        });
    }

    /// Somebody has asked for the end of the guest, and there is none: whatever is still to be finished is not to bring one.
    /// For who has the turn.
    pub(in crate::domain) async fn wants_no_guest(self: &Arc<Self>) {
        let open = lock(&self.state).snapshots.open.clone();
        let intent = lock(&open).clone();
        if self.guest().is_ok() {
            return;
        }
        if let Some(Intent { deed: deed @ Deed::Apply { .. }, .. }) = intent {
            if let Err(error) = self.journal_of(deed, None, &CancellationToken::new()).end().await {
                tracing::warn!(uuid = %self.uuid, %error, "the next virtd may start it anew");
            }
            return;
        }
        let Some(Intent { deed: Deed::Revert { name, active: Some(_), in_place, ran }, note }) = intent else { return };
        let kept = self.keep_intent(Intent { deed: Deed::Revert { name, active: None, in_place, ran }, note });
        if let Err(error) = kept.await {
            tracing::warn!(uuid = %self.uuid, %error, "what is finished later may bring the guest back");
        }
    }

    async fn recover(
        self: &Arc<Self>,
        intent: Intent,
        what: &'static str,
        cancel: &CancellationToken,
    ) -> Result<String> {
        let journal = self.journal_of(intent.deed.clone(), None, cancel);
        let brings_a_guest = matches!(intent.deed, Deed::Revert { active: Some(_), .. } | Deed::Apply { .. });
        let _starts = brings_a_guest.then(|| self.will_start(cancel));
        if let (Deed::Save { .. }, true) = (&intent.deed, self.is_only_stayed_for()) {
            let story = self.settle_save(intent.note).await?;
            journal.end().await?;
            return Ok(story);
        }
        if let Deed::Undefine { storage } = intent.deed {
            return self.finish_undefine(storage, &journal).await;
        }
        match intent.deed {
            Deed::Apply { id, until_usec } => return self.finish_apply(id, until_usec, &journal).await,
            Deed::Checkpoint { def } => return self.finish_checkpoint(def, &journal).await,
            Deed::DeleteCheckpoint { name } => return self.finish_deleting_checkpoint(&name, &journal).await,
            _ => {}
        }
        let note = match intent.deed {
            Deed::Save { .. } => self.keep_save(intent.clone()).await?.note,
            _ => intent.note,
        };
        let recovered = match note {
            Some(note) => {
                let machine = self.machine().await?;
                let recovered = self.takes_snapshots()?.recover(&machine, note).await;
                if recovered.is_err() {
                    self.mark_all_merging(&intent.deed).await;
                }
                recovered.map_err(|e| Error::from_driver(&self.name(), &format!("make whole {what} of"), e))?
            }
            None => Recovered::Undone { story: "nothing had been changed".to_owned() },
        };
        self.follow_up(intent.deed, recovered, &journal).await
    }

    /// Whether nothing is left of it, and it is there, if at all, only until what was begun is whole.
    fn is_only_stayed_for(&self) -> bool {
        let state = lock(&self.state);
        state.gone || state.stored.is_none() && state.live().is_none()
    }

    async fn follow_up(
        self: &Arc<Self>,
        deed: Deed,
        recovered: Recovered,
        journal: &Arc<DomainJournal>,
    ) -> Result<String> {
        match (deed, recovered) {
            (Deed::Create { xml, keep, .. }, Recovered::Created(taken)) => {
                let (def, _) = parsed(&xml)?;
                let name = def.name.clone();
                self.snapshot_taken(def, *taken, keep, journal).await?;
                Ok(format!("snapshot '{name}' is complete"))
            }
            (Deed::Revert { name, active, in_place, .. }, Recovered::Reverted(reverted)) => {
                self.finish_revert(&name, active, in_place, *reverted, journal).await
            }
            // Its guest had been ended, and nothing else had been done: that is repeatable.
            (Deed::Revert { name, active, in_place: false, .. }, Recovered::Undone { story }) => {
                self.redo_revert(&name, active, story, journal).await
            }
            (Deed::Revert { ran: true, .. }, Recovered::Undone { story }) => {
                journal.end().await?;
                if let Ok(guest) = self.guest() {
                    // It was stopped for this alone.
                    guest.instance.resume().await.map_err(|e| Error::from_driver(&self.name(), "resume", e))?;
                }
                Ok(format!("{story}; the guest goes on as before"))
            }
            (Deed::Delete { name }, Recovered::Deleted(replaced)) => {
                self.snapshot_deleted(&name, &replaced, journal).await?;
                Ok(format!("snapshot '{name}' is deleted"))
            }
            (Deed::Delete { name }, Recovered::Undeleted(unfinished)) => {
                Ok(self.deletion_failed(&name, unfinished, journal).await.to_string())
            }
            (Deed::Save { dump: true, .. }, Recovered::Saved(file)) => {
                journal.end().await?;
                Ok(format!("'{}' is dumped in {}", self.name(), file.display()))
            }
            (Deed::Save { .. }, Recovered::Saved(file)) => {
                let story = self.finish_save(&file).await?;
                journal.end().await?;
                Ok(story)
            }
            (deed, Recovered::Undone { story }) => {
                if let Deed::Save { .. } = deed {
                    self.is_not_saved().await;
                }
                journal.end().await?;
                Ok(story)
            }
            (deed, recovered) => {
                journal.end().await?;
                Err(Error::Internal(format!("{deed:?} cannot have ended as {recovered:?}")))
            }
        }
    }

    /// A guest that has been ended for a revert is not to stay so: what was begun is done, if it can still be.
    async fn redo_revert(
        self: &Arc<Self>,
        name: &str,
        active: Option<bool>,
        story: String,
        journal: &Arc<DomainJournal>,
    ) -> Result<String> {
        if self.guest().is_ok() {
            journal.end().await?;
            return Ok(format!("{story}; the guest goes on as before"));
        }
        if journal.cancelled().is_cancelled() {
            journal.end().await?;
            return Ok(format!("{story}; nobody wants its guest any more"));
        }
        let (_, _, kept) = self.kept_snapshot(name).await?;
        let machine = self.machine().await?;
        let siblings = self.siblings(name, &[], &machine)?;
        let reverted = self.takes_snapshots()?.revert_images(&machine, &kept, &siblings, journal.clone()).await;
        let reverted = reverted.map_err(|e| self.not_reverted(name, e))?;
        self.finish_revert(name, active, false, reverted, journal).await
    }

    async fn finish_revert(
        self: &Arc<Self>,
        name: &str,
        active: Option<bool>,
        in_place: bool,
        reverted: Reverted,
        journal: &Arc<DomainJournal>,
    ) -> Result<String> {
        let (_, def, kept) = self.kept_snapshot(name).await?;
        let def = self.keep_reverted(def, &reverted, journal).await?;
        let running = self.guest();
        let story = match (active, running) {
            (Some(paused), Ok(guest)) if in_place => {
                lock(&self.state).mute();
                let resumed = if paused { Ok(()) } else { guest.instance.resume().await };
                self.unmuted(false).await;
                resumed.map_err(|e| self.not_reverted(name, e))?;
                self.relabel(&def).await?;
                "the guest has been loaded"
            }
            (_, Ok(_)) => "its guest had been started",
            (Some(paused), Err(_)) => {
                let (caller, how) = (virtd_itself(), StartOptions { paused, ..StartOptions::default() });
                match self.start_reverted(&caller, &def, kept, &reverted, how, journal.cancelled()).await {
                    Ok(()) => "its guest has been started again",
                    Err(Error::Cancelled(_)) => {
                        self.is_off(StateReason::FromSnapshot).await;
                        "it is shut off, since nobody wants its guest any more"
                    }
                    Err(e) => return Err(e),
                }
            }
            (None, Err(_)) => {
                self.is_off(StateReason::FromSnapshot).await;
                "it is shut off"
            }
        };
        self.reverted(def, &reverted, journal).await?;
        Ok(format!("'{}' stands at snapshot '{name}', and {story}", self.name()))
    }

    async fn kept_snapshot(&self, name: &str) -> Result<(Arc<Record>, SnapshotDef, ExistingSnapshot)> {
        let (record, def) = self.usable_snapshot(name)?;
        let machine = self.machine().await?;
        let kept = self.kept(&record, &def, &machine);
        Ok((record, def, kept))
    }
}

/// In words.
fn what_is(deed: &Deed) -> &'static str {
    match deed {
        Deed::Create { .. } => "taking a snapshot",
        Deed::Revert { .. } => "a revert",
        Deed::Delete { .. } => "deleting a snapshot",
        Deed::Save { .. } => "saving it",
        Deed::Checkpoint { .. } => "a checkpoint",
        Deed::DeleteCheckpoint { .. } => "deleting a checkpoint",
        Deed::Undefine { .. } => "its removal with its storage",
        Deed::Apply { .. } => "a new start with what is stored",
    }
}

/// What has the turn of a machine that is not whole yet.
fn finishing(what: &str) -> String {
    format!("finishing {what} that was cut off")
}

fn parsed(xml: &str) -> Result<(SnapshotDef, Option<uuid::Uuid>)> {
    SnapshotDoc::parse_within(xml, Limits::STORED).and_then(SnapshotDoc::record).map_err(Error::ConfigInvalid)
}
