//! Snapshots of QEMU's guests.
//!
//! ```text
//!             guest runs                                   guest is off
//!  internal   snapshot-save, -load (jobs), one deletion    qemu-img snapshot, image by image
//!  external   memory by migration to a file,               qemu-img create, commit, rebase
//!             disks by one transaction, merge by block-commit
//!  UEFI       variables in qcow2 as one more image; raw ones are copied
//!  TPM        within the memory; copied where there is none
//! ```
//!
//! `note.rs` says what is written down before each change, `recover.rs` what is made of it.

mod backup;
mod block_job;
mod chain;
mod checkpoints;
mod create;
mod delete;
mod dump;
mod external;
mod files;
mod frozen;
mod internal;
mod merge;
mod naming;
mod note;
mod packed;
mod park;
mod parts;
mod pipe;
mod reading;
mod reconfigure;
mod recover;
mod resize;
mod revert;
mod save;
mod seal;
mod settle;
mod survey;

pub use files::open_memory;
pub use reading::stream as saved_stream;
pub use seal::Sealing;

use super::block::{Nodes, Readers};
use super::instance::Body;
use super::plan::MemorySource;
use super::{QemuDriver, our_body};
use crate::host::image::Images;
use crate::host::workers::{Errand, Workers};
use async_trait::async_trait;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::device::Disk;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::saved::{SaveRequest, SavedFile, SavedMachines, SavedState};
use virt_model::driver::snapshots::{
    CreatePlan, CreatedSnapshot, DeletePlan, DiskMode, DiskPart, ExistingSnapshot, Journal, Machine, MemoryMode,
    Recovered, Replaced, RevertPlan, Reverted, Siblings, SnapshotRequest, Snapshots, StartFrom, Unfinished,
};
use virt_model::lock::lock;

#[async_trait]
impl Snapshots for QemuDriver {
    async fn check_create(&self, machine: &Machine, request: &SnapshotRequest) -> Result<CreatePlan, DriverError> {
        self.operation(machine).await?.check_create(request).await
    }

    async fn create(
        &self,
        machine: &Machine,
        request: &SnapshotRequest,
        journal: Arc<dyn Journal>,
    ) -> Result<CreatedSnapshot, DriverError> {
        self.operation_for(machine, &journal).await?.create(request, &journal).await
    }

    async fn check_revert(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
        in_place: bool,
    ) -> Result<RevertPlan, DriverError> {
        self.operation(machine).await?.check_revert(snapshot, siblings, in_place).await
    }

    async fn load(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        journal: Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        self.operation(machine).await?.load(snapshot, &journal).await
    }

    async fn park(&self, machine: &Machine, journal: Arc<dyn Journal>) -> Result<bool, DriverError> {
        self.operation(machine).await?.park(&journal).await
    }

    async fn unpark(&self, machine: &Machine) -> Result<(), DriverError> {
        self.operation(machine).await?.unpark().await
    }

    async fn revert_images(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
        journal: Arc<dyn Journal>,
    ) -> Result<Reverted, DriverError> {
        self.operation_for(machine, &journal).await?.revert_images(snapshot, siblings, &journal).await
    }

    async fn commit_revert(&self, machine: &Machine, reverted: &Reverted) -> Result<(), DriverError> {
        self.operation(machine).await?.commit_revert(reverted).await
    }

    async fn roll_back_revert(&self, machine: &Machine, reverted: &Reverted) -> Result<(), DriverError> {
        self.operation(machine).await?.roll_back_revert(reverted).await
    }

    async fn check_delete(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
    ) -> Result<DeletePlan, DriverError> {
        self.operation(machine).await?.check_delete(snapshot, siblings).await
    }

    async fn delete(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
        journal: Arc<dyn Journal>,
    ) -> Result<Vec<Replaced>, Unfinished> {
        self.operation_for(machine, &journal).await?.delete(snapshot, siblings, &journal).await
    }

    async fn recover(&self, machine: &Machine, note: serde_json::Value) -> Result<Recovered, DriverError> {
        self.operation(machine).await?.recover(note).await
    }

    async fn changed_since_frozen(&self, machine: &Machine, files: Vec<PathBuf>) -> Result<Vec<PathBuf>, DriverError> {
        self.operation(machine).await?.changed_since_frozen(files).await
    }
}

#[async_trait]
impl SavedMachines for QemuDriver {
    async fn check_save(&self, machine: &Machine, request: &SaveRequest) -> Result<(), DriverError> {
        self.operation(machine).await?.check_save(request).await
    }

    async fn save(
        &self,
        machine: &Machine,
        request: &SaveRequest,
        journal: Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        self.operation_for(machine, &journal).await?.save(request, &journal).await
    }

    fn taken_back(&self, note: serde_json::Value, resumes: bool) -> Result<serde_json::Value, DriverError> {
        save::taken_back(note, resumes)
    }

    async fn settle_save(&self, machine: Uuid, note: serde_json::Value) -> Result<String, DriverError> {
        let settled = save::settle(&self.0.workers, machine, note, !self.0.privileges.are_ours()).await?;
        // Its guest is no more.
        lock(&self.0.sealing).remove(&machine);
        Ok(settled)
    }

    async fn read_saved(&self, from: SavedFile, machine: Option<Uuid>) -> Result<(SavedState, String), DriverError> {
        reading::read(&self.0.workers, from, machine, !self.0.privileges.are_ours()).await
    }

    async fn reconfigure_saved(&self, saved: &SavedState, configuration: String) -> Result<(), DriverError> {
        reconfigure::reconfigure(&self.0.workers, saved, configuration, !self.0.privileges.are_ours()).await
    }

    async fn verify_saved(
        &self,
        saved: &SavedState,
        def: &DomainDef,
        progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
        cancel: &CancellationToken,
    ) -> Result<(), DriverError> {
        let caps = self.capabilities_for(def).await;
        if reading::held(saved)?.is_packed() {
            packed::Zstd::find(&self.lender(def, None).await?).await?;
        }
        reading::verify(&self.0.workers, saved, def, caps.version, progress, cancel).await
    }
}

impl QemuDriver {
    async fn operation(&self, machine: &Machine) -> Result<Operation, DriverError> {
        let body = match &machine.guest {
            None => None,
            Some(guest) => Some(our_body(guest.as_ref())?.clone()),
        };
        let process = body.as_ref().and_then(|body: &Arc<Body>| body.keeper.process_id());
        let images = Arc::new(Images::new(self.lender(&machine.def, process).await?, machine.def.uuid, process));
        let (state_dir, workers) = (self.0.state_dir.clone(), self.0.workers.clone());
        let (machine, sealing) = (machine.clone(), self.0.sealing.clone());
        Ok(Operation { machine, images, body, state_dir, workers, sealing, cancel: Mutex::default() })
    }

    /// The same, until its journal says that it is no longer wanted.
    async fn operation_for(&self, machine: &Machine, journal: &Arc<dyn Journal>) -> Result<Operation, DriverError> {
        let operation = self.operation(machine).await?;
        *lock(&operation.cancel) = journal.cancelled().clone();
        Ok(operation)
    }
}

/// One operation on the snapshots of one machine.
struct Operation {
    machine: Machine,
    images: Arc<Images>,
    /// The guest, if it runs.
    body: Option<Arc<Body>>,
    state_dir: PathBuf,
    workers: Workers,
    sealing: Sealing,
    /// Fires when what is done next is no longer wanted.
    cancel: Mutex<CancellationToken>,
}

/// An image in qcow2 that holds, or is to hold, a snapshot.
type Image = PathBuf;

impl Operation {
    /// Refuses what would need the content of a disk that is thrown away with the guest.
    fn keeps_what_is_written(&self, what: &str) -> Result<(), DriverError> {
        let disks = &self.machine.def.devices.disks;
        let Some(disk) = disks.iter().find(|disk| disk.transient.is_some()) else { return Ok(()) };
        let target = &disk.target.dev;
        let how = "take snapshots of it with disk-only, and while it is off";
        Err(cannot(format!("disk '{target}' throws away what is written to it, which excludes {what}: {how}")))
    }

    /// The block nodes of the guest, if it runs.
    async fn nodes(&self) -> Result<Option<Nodes>, DriverError> {
        match &self.body {
            Some(body) => Nodes::of(body).await.map(Some),
            None => Ok(None),
        }
    }

    /// By which nodes the guest reads images, if it runs.
    async fn readers(&self) -> Result<Option<Arc<Readers>>, DriverError> {
        match &self.body {
            Some(body) => Readers::of(body).await.map(Some),
            None => Ok(None),
        }
    }

    /// From here on it is not given up any more: what is under way is undone, or goes to its end.
    fn goes_to_its_end(&self) {
        *lock(&self.cancel) = CancellationToken::new();
    }

    /// Works on images where that may block. `what` is shown to people if it does not answer.
    async fn with_images<T: Send + 'static>(
        &self,
        what: &Path,
        work: impl FnOnce(&Arc<Images>) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        self.with_images_of(what, 0, work).await
    }

    /// The same for work that reads or writes that many bytes.
    async fn with_images_of<T: Send + 'static>(
        &self,
        what: &Path,
        bytes: u64,
        work: impl FnOnce(&Arc<Images>) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let errand = Errand::new(self.machine.def.uuid, what.display().to_string());
        let errand = errand.of(bytes).until(&lock(&self.cancel));
        let images = self.images.clone();
        self.workers.run(errand, move |stop| work(&Arc::new(images.within(stop)))).await
    }

    /// The same with files lent for it.
    async fn with_lent<T: Send + 'static>(
        &self,
        files: Vec<(PathBuf, bool)>,
        work: impl FnOnce(&Arc<Images>) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        self.with_lent_of(files, 0, work).await
    }

    /// The same for work that reads or writes that many bytes.
    async fn with_lent_of<T: Send + 'static>(
        &self,
        files: Vec<(PathBuf, bool)>,
        bytes: u64,
        work: impl FnOnce(&Arc<Images>) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let what = files.first().map(|(path, _)| path.clone()).unwrap_or_default();
        self.with_images_of(&what, bytes, move |images| {
            let _lent = images.lend(&files)?;
            work(images)
        })
        .await
    }
}

/// Where the memory is that a guest is started from.
pub fn source(from: StartFrom) -> Result<MemorySource, DriverError> {
    let snapshot = match &from {
        StartFrom::Snapshot(snapshot) => snapshot,
        StartFrom::Saved(saved) => return saved_stream(saved).map(MemorySource::Stream),
    };
    match &snapshot.memory {
        MemoryMode::No => Err(DriverError::Internal("a snapshot without memory cannot be loaded".to_owned())),
        MemoryMode::External(file) => {
            Ok(MemorySource::File { path: file.clone(), bytes: note::record_of(snapshot).memory_bytes })
        }
        MemoryMode::Internal => {
            let nvram = note::record_of(snapshot).nvram == Some(note::Part::Internal);
            let images = internal_images(&snapshot.def, &snapshot.disks, nvram);
            Ok(MemorySource::Images { name: snapshot.name.clone(), images })
        }
    }
}

/// The images that hold an internal snapshot: of the disks that take part, and of the firmware's variables.
fn internal_images(def: &DomainDef, disks: &[DiskPart], nvram: bool) -> Vec<Image> {
    let disks = pairs(def, disks).filter(|(_, part)| part.mode == DiskMode::Internal);
    let mut images: Vec<Image> = disks.filter_map(|(disk, _)| disk.path().map(PathBuf::from)).collect();
    images.extend(parts::variables(def).filter(|(_, format)| nvram && format == "qcow2").map(|(path, _)| path));
    images
}

/// The disks with how each takes part.
fn pairs<'a>(def: &'a DomainDef, parts: &'a [DiskPart]) -> impl Iterator<Item = (&'a Disk, &'a DiskPart)> {
    let by_target: BTreeMap<&str, &DiskPart> = parts.iter().map(|part| (&*part.target, part)).collect();
    def.devices.disks.iter().filter_map(move |disk| Some((disk, *by_target.get(&*disk.target.dev)?)))
}

/// Why it failed, once it has been tried to undo what had been done.
fn undone(error: DriverError, undone: Result<(), DriverError>) -> DriverError {
    match undone {
        Ok(()) => error,
        Err(why) => DriverError::HalfDone(format!("{error}; what had been done could not be undone: {why}")),
    }
}

/// What this host or these images cannot do.
fn cannot(message: impl Into<String>) -> DriverError {
    DriverError::NotPossible(message.into())
}
