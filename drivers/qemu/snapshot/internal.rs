//! Capturing inside images: by QEMU itself while the guest runs, by qemu-img when it does not.

use super::super::instance::Body;
use super::note::{CreateInternal, Note, Part, taken, written};
use super::{Image, Operation, parts, undone};
use crate::host::image::Images;
use crate::qemu::block::{Readers, delete_snapshot};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{CreatedSnapshot, Journal, SnapshotRequest};

/// What is known before a snapshot is removed from images.
pub(super) struct BeforeForgetting {
    /// Those of the images that are noted as frozen, and look as they did then.
    frozen: Vec<PathBuf>,
    /// By which nodes the guest reads images, if it runs.
    readers: Result<Option<Arc<Readers>>, DriverError>,
}

impl Operation {
    /// All of it inside the images.
    pub(super) async fn create_internal(
        &self,
        request: &SnapshotRequest,
        journal: &Arc<dyn Journal>,
    ) -> Result<CreatedSnapshot, DriverError> {
        let survey = self.survey(self.own_parts()).await?;
        let (record, copies) = (self.record(request, &survey), self.copies(request, &survey));
        let with_nvram = record.nvram == Some(Part::Internal);
        let images = super::internal_images(&self.machine.def, &request.disks, with_nvram);
        let resume = self.machine.running;
        let mut note = CreateInternal {
            name: request.name.clone(),
            resume,
            stay: request.stay_paused,
            paused: request.stay_paused,
            images: images.clone(),
            copies: copies.iter().map(|(_, to)| to.clone()).collect(),
            done: None,
        };
        // QEMU answers while the note is written.
        let noted = journal.note_at_once(written(&Note::CreateInternal(note.clone()))?);
        let (synced, readers) = tokio::join!(noted, self.readers());
        let (synced, readers) = (synced?, readers?);
        let captured = async {
            self.copy_all(copies, journal).await?;
            match self.body.as_ref().zip(readers.as_ref()) {
                Some((body, readers)) => {
                    self.save_in_images(body, request, readers.of_images(&images)?, journal).await?;
                }
                None => self.take_in_images(request, &images, journal).await?,
            }
            if journal.cancelled().is_cancelled() { Err(DriverError::Cancelled) } else { Ok(()) }
        };
        let (captured, synced) = tokio::join!(captured, synced);
        if let Err(error) = captured.and(synced) {
            return Err(undone(error, self.undo_internal(&note).await));
        }
        journal.point_of_no_return();
        self.goes_to_its_end();
        note.done = Some(record.clone());
        journal.captured(written(&Note::CreateInternal(note))?);
        Ok(taken(record, None))
    }

    pub(super) async fn copy_all(
        &self,
        copies: Vec<(PathBuf, PathBuf)>,
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        for (from, to) in copies {
            let (what, bytes) = (from.clone(), self.size(&from).await?);
            self.with_images_of(&what, bytes, move |images| parts::copy(&from, &to, images.lender.is_wary())).await?;
            journal.step("copied");
        }
        Ok(())
    }

    async fn save_in_images(
        &self,
        body: &Arc<Body>,
        request: &SnapshotRequest,
        nodes: Vec<String>,
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        // Of itself QEMU has the guest pause for as long as that takes.
        if self.machine.running && request.stay_paused {
            body.patiently("stop", json!({})).await?;
            journal.step("stopped");
        }
        let arguments = json!({ "tag": request.name, "vmstate": nodes.first(), "devices": nodes });
        body.line()?.job("snapshot-save", "virtd-snapshot-save", arguments, Some(journal)).await?;
        journal.step("saved");
        Ok(())
    }

    async fn take_in_images(
        &self,
        request: &SnapshotRequest,
        images: &[Image],
        journal: &Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        for image in images {
            let (name, image, file) = (request.name.clone(), image.clone(), image.clone());
            let bytes = self.bookkeeping(&image).await?;
            self.with_lent_of(vec![(file, true)], bytes, move |images| images.take(&image, &name)).await?;
            journal.step("taken");
        }
        Ok(())
    }

    /// About the bytes that are written where all that an image holds is counted once more.
    pub(super) async fn bookkeeping(&self, image: &Path) -> Result<u64, DriverError> {
        // A dozen for each 64 KiB.
        Ok(self.size(image).await? >> 10)
    }

    /// Leaves nothing of an internal snapshot that came to nothing.
    pub(super) async fn undo_internal(&self, note: &CreateInternal) -> Result<(), DriverError> {
        self.goes_to_its_end();
        let removed = self.forget_in_images(&note.name, &note.images, false).await;
        self.remove_files(note.copies.clone()).await;
        let resumed = self.go_on(note.resume && note.paused).await;
        removed.and(resumed)
    }

    /// What is to be known before a snapshot is removed from images. Changes nothing.
    pub(super) async fn before_forgetting(&self, images: &[Image]) -> BeforeForgetting {
        let (frozen, readers) = tokio::join!(self.still_frozen(images), self.readers());
        BeforeForgetting { frozen, readers }
    }

    /// Removes a snapshot from images, wherever it is.
    pub(super) async fn forget_in_images(
        &self,
        name: &str,
        images: &[Image],
        must_be_open: bool,
    ) -> Result<(), DriverError> {
        let before = self.before_forgetting(images).await;
        self.forget_as_known(name, images, must_be_open, before).await
    }

    /// The same where that is known.
    pub(super) async fn forget_as_known(
        &self,
        name: &str,
        images: &[Image],
        must_be_open: bool,
        BeforeForgetting { frozen, readers }: BeforeForgetting,
    ) -> Result<(), DriverError> {
        let forgotten = self.forget_wherever(name, images, must_be_open, readers).await;
        if !frozen.is_empty() {
            self.note_frozen(frozen).await;
        }
        forgotten
    }

    async fn forget_wherever(
        &self,
        name: &str,
        images: &[Image],
        must_be_open: bool,
        readers: Result<Option<Arc<Readers>>, DriverError>,
    ) -> Result<(), DriverError> {
        if let Some(body) = &self.body {
            let forgotten = match readers {
                Ok(readers) => {
                    self.forget_in_guest(body, &readers.unwrap_or_default(), name, images, must_be_open).await
                }
                Err(error) => Err(error),
            };
            match forgotten {
                Err(DriverError::Gone) if body.is_gone_soon().await => {}
                done => return done,
            }
        }
        let survey = self.survey(images.iter().cloned()).await?;
        let there: Vec<Image> = images.iter().filter(|image| survey.is_there(image)).cloned().collect();
        let bytes = there.iter().map(|image| survey.size(image) >> 10).sum();
        let (name, files) = (name.to_owned(), there.iter().map(|image| (image.clone(), true)).collect());
        let forget = move |images: &Arc<Images>| there.iter().try_for_each(|image| images.forget(image, &name));
        self.with_lent_of(files, bytes, forget).await
    }

    async fn forget_in_guest(
        &self,
        body: &Body,
        readers: &Readers,
        name: &str,
        images: &[Image],
        must_be_open: bool,
    ) -> Result<(), DriverError> {
        let mut nodes = Vec::new();
        for image in images {
            match readers.image(image, "qcow2") {
                Some(node) => nodes.push(node.to_owned()),
                None if must_be_open => {
                    let image = image.display();
                    return Err(DriverError::Refused(format!(
                        "{image}, which holds '{name}', is not what the running guest has open; shut it down first"
                    )));
                }
                None => {}
            }
        }
        delete_snapshot(&body.line()?, name, nodes).await
    }
}
