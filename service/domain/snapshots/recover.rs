//! What was cut off is made whole when virtd starts: finished where images have changed, undone where they have not.

use super::{Domain, DomainJournal, Kept};
use crate::error::{Error, Result};
use crate::job::lock;
use crate::shared::virtd_itself;
use crate::store::{Deed, Intent, Record};
use std::sync::Arc;
use virt_model::driver::snapshots::{Recovered, Reverted};
use virt_model::snapshot::{SnapshotDef, SnapshotDoc};
use virt_model::xml::Limits;

impl Domain {
    /// Finishes or undoes an operation that was cut off, or that failed half-way and could not be undone, if there is one;
    /// says what was done about it. To be called by who has the turn, before anything that an image or a configuration
    /// in two minds would be the worse for. Error: it cannot be made whole now either; nothing else may begin then.
    pub(crate) async fn made_whole(self: &Arc<Self>) -> Result<()> {
        let open = lock(&self.state).snapshots.open.clone();
        let intent = lock(&open).clone();
        let Some(intent) = intent else { return Ok(()) };
        let what = match &intent.deed {
            Deed::Create { .. } => "taking a snapshot",
            Deed::Revert { .. } => "a revert",
            Deed::Delete { .. } => "deleting a snapshot",
        };
        // In a task: what may have to be done is much, and this may lie deep in what is much already.
        let domain = self.clone();
        let done = tokio::spawn(async move { domain.made_up_for(intent, what).await });
        let done = done.await.unwrap_or_else(|e| Err(Error::Internal(e.to_string())));
        let story = done.map_err(|error| {
            tracing::error!(uuid = %self.uuid, name = self.name(), %error, "{what} was cut off, and is still half done");
            Error::OperationInvalid(format!(
                "domain '{}': {what} was cut off half-way, and cannot be finished: {error}; mend that and try again",
                self.name()
            ))
        })?;
        self.all_told().await;
        tracing::warn!(uuid = %self.uuid, name = self.name(), "{what} was cut off: {story}");
        Ok(())
    }

    async fn made_up_for(self: &Arc<Self>, intent: Intent, what: &'static str) -> Result<String> {
        let journal = self.journal(intent.deed.clone(), None);
        let recovered = match intent.note {
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
            (_, Recovered::Undone { story }) => {
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
        let (_, _, kept) = self.kept_snapshot(name).await?;
        let machine = self.machine().await?;
        let kin = self.kin(name, &[], &machine);
        let reverted = self.takes_snapshots()?.revert_images(&machine, &kept, &kin, journal.clone()).await;
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
                let caller = virtd_itself();
                self.start_reverted(&caller, &def, kept, &reverted, paused, false).await?;
                "its guest has been started again"
            }
            (None, Err(_)) => {
                self.is_off().await;
                "it is shut off"
            }
        };
        self.reverted(def, &reverted, journal).await?;
        Ok(format!("'{}' stands at snapshot '{name}', and {story}", self.name()))
    }

    async fn kept_snapshot(&self, name: &str) -> Result<(Arc<Record>, SnapshotDef, Kept)> {
        let (record, def) = self.usable_snapshot(name)?;
        let machine = self.machine().await?;
        let kept = self.kept(&record, &def, &machine);
        Ok((record, def, kept))
    }
}

fn parsed(xml: &str) -> Result<(SnapshotDef, Option<uuid::Uuid>)> {
    SnapshotDoc::parse_within(xml, Limits::STORED).and_then(SnapshotDoc::record).map_err(Error::ConfigInvalid)
}
