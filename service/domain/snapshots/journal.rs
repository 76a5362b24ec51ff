//! Where an operation on snapshots tells how far it is: on disk, for the next virtd, and to its job, for people.

use super::Domain;
use super::set::Open;
use crate::error::{Error, Result};
use crate::fail_point;
use crate::job::Job;
use crate::lock::lock;
use crate::store::{Current, Deed, Intent, Record, on_disk};
use async_trait::async_trait;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use tokio_util::sync::CancellationToken;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{Journal, NoteSync};
use virt_model::state::Stopped;

/// See the module.
pub(in crate::domain) struct DomainJournal {
    domain: Arc<Domain>,
    intent: Mutex<Intent>,
    /// The intent is not on disk as it is here.
    behind: AtomicBool,
    open: Open,
    job: Option<Arc<Job>>,
    cancel: CancellationToken,
}

impl DomainJournal {
    /// The journal of `deed`, which is done in `job`, or by virtd itself; `cancel` fires when it is to be given up.
    pub fn new(
        domain: Arc<Domain>,
        deed: Deed,
        open: Open,
        job: Option<Arc<Job>>,
        cancel: CancellationToken,
    ) -> DomainJournal {
        let intent = Mutex::new(Intent { deed, note: None });
        DomainJournal { domain, intent, behind: AtomicBool::new(false), open, job, cancel }
    }

    /// To be called before anything is changed. A revert may end the guest before the driver notes anything, an undefine
    /// removes files without a note, and checkpoints and new starts have none at all: these are on disk from now on. What else there is comes there
    /// with the driver's first note.
    pub async fn begin(&self) -> Result<()> {
        let intent = lock(&self.intent).clone();
        match intent.deed {
            Deed::Revert { .. }
            | Deed::Undefine { .. }
            | Deed::Apply { .. }
            | Deed::Checkpoint { .. }
            | Deed::DeleteCheckpoint { .. } => self.keep(intent).await?,
            Deed::Create { .. } | Deed::Delete { .. } | Deed::Save { .. } => {}
        }
        self.step("begun");
        Ok(())
    }

    /// Takes a note of the driver's into the intent.
    fn with_note(&self, note: serde_json::Value) -> Intent {
        let mut intent = lock(&self.intent);
        intent.note = Some(note);
        intent.clone()
    }

    async fn keep(&self, intent: Intent) -> Result<()> {
        let (shared, uuid, kept) = (self.domain.shared.clone(), self.domain.uuid, intent.clone());
        on_disk(move || shared.store.save_intent(uuid, &kept)).await?;
        self.behind.store(false, Relaxed);
        *lock(&self.open) = Some(intent);
        Ok(())
    }

    /// Keeps a record and which one is current, and with them a note that is not kept yet.
    pub async fn keep_record(&self, record: Record, current: Current) -> Result<()> {
        let intent = self.behind.load(Relaxed).then(|| lock(&self.intent).clone());
        let (shared, uuid) = (self.domain.shared.clone(), self.domain.uuid);
        on_disk(move || shared.store.save_snapshots(uuid, intent.as_ref(), &[record], Some(&current))).await?;
        self.behind.store(false, Relaxed);
        Ok(())
    }

    /// Ends with a snapshot that has gone for good: its record goes, and what others say of it is kept before. What is only removed is
    /// not waited for until it is on disk: should the host lose its power in this moment, the deletion is done once more.
    pub async fn end_with_gone(&self, changed: Vec<Record>, current: Option<Current>, gone: String) -> Result<()> {
        let (shared, uuid) = (self.domain.shared.clone(), self.domain.uuid);
        let is_noted = lock(&self.open).is_some();
        on_disk(move || {
            shared.store.remove_snapshot(uuid, &changed, current.as_ref(), &gone)?;
            if !is_noted {
                shared.store.sync_snapshots(uuid);
            }
            Ok(())
        })
        .await?;
        self.step("records");
        self.end().await
    }

    /// It is done, or undone. Should the host lose its power in this moment, that is found and done once more.
    pub async fn end(&self) -> Result<()> {
        let (shared, uuid) = (self.domain.shared.clone(), self.domain.uuid);
        on_disk(move || shared.store.remove_intent(uuid)).await?;
        *lock(&self.open) = None;
        let shared = self.domain.shared.clone();
        // Nobody waits for that: it is no news to whoever asked for it.
        drop(tokio::spawn(on_disk(move || {
            shared.store.sync_snapshots(uuid);
            Ok(())
        })));
        self.step("end");
        Ok(())
    }

    /// The same after a failure, unless that has left something to be done.
    pub async fn end_after_failure(&self, failure: &DriverError) {
        if let DriverError::HalfDone(_) = failure {
            tracing::error!(uuid = %self.domain.uuid, %failure, "it is looked after before anything else is done");
            return;
        }
        if let Err(error) = self.end().await {
            tracing::warn!(uuid = %self.domain.uuid, %error, "the next start of virtd looks at this operation again");
        }
    }
}

fn not_noted(error: Error) -> DriverError {
    match error {
        Error::NoSpace(text) => DriverError::NoSpace(text),
        error => DriverError::Storage(error.to_string()),
    }
}

#[async_trait]
impl Journal for DomainJournal {
    async fn note(&self, note: serde_json::Value) -> Result<(), DriverError> {
        self.keep(self.with_note(note)).await.map_err(not_noted)?;
        self.step("note");
        Ok(())
    }

    async fn note_at_once(&self, note: serde_json::Value) -> Result<NoteSync, DriverError> {
        let intent = self.with_note(note);
        let (shared, uuid, kept) = (self.domain.shared.clone(), self.domain.uuid, intent.clone());
        let unsynced = on_disk(move || shared.store.save_intent_at_once(uuid, &kept)).await.map_err(not_noted)?;
        self.behind.store(false, Relaxed);
        *lock(&self.open) = Some(intent);
        self.step("note");
        let sync = tokio::spawn(on_disk(move || unsynced.sync()));
        Ok(Box::pin(async move {
            match sync.await {
                Ok(synced) => synced.map_err(not_noted),
                Err(e) => Err(DriverError::Internal(format!("what is under way is not kept: {e}"))),
            }
        }))
    }

    fn captured(&self, note: serde_json::Value) {
        let intent = self.with_note(note);
        self.behind.store(true, Relaxed);
        *lock(&self.open) = Some(intent);
        self.step("captured");
    }

    async fn merging(&self, targets: &[String]) -> Result<(), DriverError> {
        let deed = lock(&self.intent).deed.clone();
        self.domain.still_here().map_err(|_| DriverError::Gone)?;
        self.domain.mark_merging(&deed, targets).await.map_err(|e| DriverError::Storage(e.to_string()))?;
        self.step("marked");
        Ok(())
    }

    fn step(&self, what: &str) {
        tracing::debug!(uuid = %self.domain.uuid, step = what, "snapshots");
        fail_point::reached();
    }

    fn progress(&self, done: u64, total: u64) {
        self.job.iter().for_each(|job| job.progress(done, total));
    }

    fn part_done(&self, done: u64, total: u64) {
        self.job.iter().for_each(|job| job.part_done(done, total));
    }

    fn memory_written(&self) {
        if let Ok(guest) = self.domain.guest() {
            self.domain.expect_end(guest.id, Stopped::Saved);
        }
    }

    fn save_given_up(&self) {
        if let Ok(guest) = self.domain.guest() {
            self.domain.expect_no_end(guest.id);
        }
    }

    async fn may_replace(&self, file: &Path) -> Result<(), DriverError> {
        let dump = matches!(lock(&self.intent).deed, Deed::Save { dump: true, .. });
        let free = self.domain.refuse_to_replace(if dump { "dump" } else { "save" }, file).await;
        free.map_err(|e| DriverError::Refused(e.to_string()))
    }

    fn point_of_no_return(&self) {
        self.job.iter().for_each(|job| job.past_return());
        if let (Deed::Save { dump: false, .. }, Ok(guest)) = (&lock(&self.intent).deed, self.domain.guest()) {
            self.domain.is_past_saving(guest.id);
        }
    }

    fn cancelled(&self) -> &CancellationToken {
        &self.cancel
    }
}
