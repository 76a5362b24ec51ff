//! An operation that was cut off: finished where images have changed for good, undone where nothing was lost by that.

use super::Operation;
use super::delete::Noted;
use super::note::{CreateExternal, CreateInternal, Delete, Note, Revert};
use super::note::{record_of, taken};
use crate::qemu::block::Nodes;
use crate::qemu::monitor::JobStatus;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{Journal, Recovered, Reverted, Siblings};

impl Operation {
    pub(super) async fn recover(&self, note: serde_json::Value) -> Result<Recovered, DriverError> {
        let note: Note = serde_json::from_value(note)
            .map_err(|e| DriverError::Internal(format!("the note of a snapshot cannot be read: {e}")))?;
        self.let_jobs_end().await?;
        match note {
            Note::CreateInternal(note) => self.recover_internal(note).await,
            Note::CreateExternal(note) => self.recover_external(note).await,
            Note::Load { job, snapshot, loaded } => self.recover_load(&job, snapshot, loaded).await,
            Note::Park => self.recover_parked().await,
            Note::Revert(note) => self.recover_revert(note).await,
            Note::Delete(note) => self.recover_delete(note).await,
            Note::Save(note) => self.recover_save(note).await,
        }
    }

    /// What QEMU was told, it does: it is not to be disturbed.
    async fn let_jobs_end(&self) -> Result<(), DriverError> {
        let Some(body) = &self.body else { return Ok(()) };
        let line = body.line()?;
        for id in ["virtd-snapshot-save", "virtd-snapshot-delete"] {
            line.settled(id, None).await?;
            line.dismiss(id).await;
        }
        Ok(())
    }

    async fn recover_internal(&self, note: CreateInternal) -> Result<Recovered, DriverError> {
        if let Some(record) = &note.done {
            self.go_on(note.resume && note.paused && !note.stay).await?;
            return Ok(Recovered::Created(Box::new(taken(record.clone(), None))));
        }
        self.undo_internal(&note).await?;
        Ok(Recovered::Undone { story: format!("nothing of '{}' is left in the images", note.name) })
    }

    async fn recover_external(&self, note: CreateExternal) -> Result<Recovered, DriverError> {
        if let Some(body) = &self.body {
            // A migration to a file ends with the descriptor's reader, or is given up.
            body.line()?.end_migration().await?;
        }
        let stands = match (&self.body, &note.complete) {
            (_, None) => false,
            // Without a guest nobody can tell, and an overlay that was never written to is as good as its base.
            (None, Some(record)) => self.is_inside(&note.name, record).await,
            (Some(body), Some(_)) => {
                let nodes = Nodes::of(body).await?;
                note.overlays.iter().all(|overlay| nodes.image(&overlay.path, &overlay.format).is_some())
            }
        };
        match note.complete.clone().filter(|_| stands) {
            Some(record) => {
                // What is frozen can be thawed only while it runs.
                self.go_on(note.resume && (!note.stay || note.frozen)).await?;
                self.thaw(&note).await;
                self.stand(note.resume && note.stay && note.frozen).await;
                self.note_frozen(self.frozen_below(&note.overlays)).await;
                Ok(Recovered::Created(Box::new(taken(record, Some(self.standing_on(&note.overlays))))))
            }
            None => {
                self.undo_external(&note).await?;
                Ok(Recovered::Undone { story: format!("the files of '{}' are removed", note.name) })
            }
        }
    }

    async fn recover_load(
        &self,
        job: &str,
        snapshot: super::note::NotedSnapshot,
        loaded: bool,
    ) -> Result<Recovered, DriverError> {
        let snapshot = snapshot.read()?;
        if let Some(body) = &self.body {
            let line = body.line()?;
            let loaded = loaded || line.settled(job, None).await? == JobStatus::Ended(Ok(()));
            line.dismiss(job).await;
            if loaded {
                let reverted = Reverted {
                    def: self.machine.def.clone(),
                    disks: snapshot.disks,
                    record: snapshot.record,
                    aside: serde_json::Value::Null,
                };
                return Ok(Recovered::Reverted(Box::new(reverted)));
            }
            return Ok(Recovered::Undone { story: "the guest had not been loaded".to_owned() });
        }
        // Its images may be half-way, and its memory is gone: forward.
        let record = record_of(&snapshot);
        let images = self.held_images(&snapshot, &record);
        let name = snapshot.name.clone();
        let lent = images.iter().map(|image| (image.clone(), true)).collect();
        let brought = images.clone();
        let mut bytes = 0;
        for image in &images {
            bytes += self.bookkeeping(image).await?;
        }
        self.with_lent_of(lent, bytes, move |images| brought.iter().try_for_each(|image| images.apply(image, &name)))
            .await?;
        let aside = super::note::Aside::default();
        let reverted = self.reverted(&snapshot, record, aside, &Siblings::default()).await?;
        Ok(Recovered::Reverted(Box::new(reverted)))
    }

    async fn recover_parked(&self) -> Result<Recovered, DriverError> {
        self.unpark().await?;
        Ok(Recovered::Undone { story: "its images are as they were".to_owned() })
    }

    async fn recover_revert(&self, mut note: Revert) -> Result<Recovered, DriverError> {
        if self.is_parked().await? {
            self.put_back(&note.aside).await?;
            return self.recover_parked().await;
        }
        let snapshot = note.snapshot.clone().read()?;
        let record = self.own_record_of(&snapshot);
        if self.body.is_none() {
            self.bring_back(&snapshot, &record, &mut note, &silent()).await?;
        }
        // What nothing needs was decided when it began.
        let reverted = self.reverted(&snapshot, record, note.aside, &Siblings::default()).await?;
        Ok(Recovered::Reverted(Box::new(reverted)))
    }

    async fn recover_delete(&self, mut note: Delete) -> Result<Recovered, DriverError> {
        let snapshot = note.snapshot.clone().read()?;
        let known = self.before_forgetting(&self.held_images(&snapshot, &record_of(&snapshot))).await;
        let carried_out = self.carry_out(&snapshot, &mut note, known, Noted::before()).await;
        self.go_on(note.resume).await?;
        Ok(match carried_out {
            Ok(replaced) => Recovered::Deleted(replaced),
            Err(unfinished) => Recovered::Undeleted(unfinished),
        })
    }
}

/// Where nobody is told.
fn silent() -> Arc<dyn Journal> {
    Arc::new(Silent(CancellationToken::new()))
}

struct Silent(CancellationToken);

#[async_trait::async_trait]
impl Journal for Silent {
    async fn note(&self, _: serde_json::Value) -> Result<(), DriverError> {
        Ok(())
    }

    fn captured(&self, _: serde_json::Value) {}

    async fn merging(&self, _: &[String]) -> Result<(), DriverError> {
        Ok(())
    }

    fn step(&self, _: &str) {}

    fn progress(&self, _: u64, _: u64) {}

    fn part_done(&self, _: u64, _: u64) {}

    fn point_of_no_return(&self) {}

    fn cancelled(&self) -> &CancellationToken {
        &self.0
    }
}
