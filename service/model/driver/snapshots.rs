//! The contract for snapshots: what a driver does to images and to a running guest. Which snapshots there are, what they
//! are called, who is whose child, and what the configurations say afterwards is the service's matter.
//!
//! ```text
//!  create   check_create ─▶ create ─▶ CreatedSnapshot ............. the service keeps the document with CreatedSnapshot::record
//!  revert   check_revert ─▶ load (same process)
//!                        └▶ revert_images ─▶ definition ─▶ Driver::start with Launch::from, or nothing more
//!  delete   check_delete ─▶ delete ─▶ what replaces what ─▶ the service rewrites configurations
//!  killed   recover: the journal's last note ─▶ done or undone
//! ```
//!
//! Every operation writes its note into the [`Journal`] before the first change it makes, naming every file, and is either
//! finished or undone by [`Snapshots::recover`] from that note alone, whatever was killed: virtd, the hypervisor, the host.

use super::DriverError;
pub use super::operation::{Journal, Machine, NoteSync};
use crate::domain::DomainDef;
use crate::domain::cpu::Cpu;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

/// What a driver can do with snapshots.
#[async_trait]
pub trait Snapshots: Send + Sync {
    /// What `create` would do; refuses what it would refuse before it changes anything. Changes nothing.
    async fn check_create(&self, machine: &Machine, request: &SnapshotRequest) -> Result<CreatePlan, DriverError>;

    /// Takes a snapshot, all of it or nothing: on failure, or when the journal is cancelled, files it made are gone, the
    /// guest stands on the images it stood on, and runs if it ran.
    async fn create(
        &self,
        machine: &Machine,
        request: &SnapshotRequest,
        journal: Arc<dyn Journal>,
    ) -> Result<CreatedSnapshot, DriverError>;

    /// What a revert would do, and whether it could: images hold the snapshot, its memory is complete and readable, space
    /// suffices. `in_place`: into the running process. Changes nothing.
    async fn check_revert(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
        in_place: bool,
    ) -> Result<RevertPlan, DriverError>;

    /// Loads memory and disks into the running guest, which is left paused. On failure the guest stands paused.
    async fn load(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        journal: Arc<dyn Journal>,
    ) -> Result<(), DriverError>;

    /// Makes a running guest stand aside and let go of its images, for [`Snapshots::revert_images`] to be tried before it
    /// ends; nothing is reported of it. `false`: it cannot, and runs as before. On failure it runs as before.
    async fn park(&self, machine: &Machine, journal: Arc<dyn Journal>) -> Result<bool, DriverError> {
        let _ = (machine, journal);
        Ok(false)
    }

    /// Lets a guest that stands aside go on.
    async fn unpark(&self, machine: &Machine) -> Result<(), DriverError> {
        let _ = machine;
        Ok(())
    }

    /// Brings the images of a machine without a guest (or whose guest stands aside) to the snapshot: internal
    /// ones in place, external ones by new overlays; firmware variables and TPM too. What was there before is kept aside
    /// until [`Snapshots::commit_revert`] or [`Snapshots::roll_back_revert`] is called. On failure everything is as before.
    async fn revert_images(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
        journal: Arc<dyn Journal>,
    ) -> Result<Reverted, DriverError>;

    /// The revert holds: what was kept aside goes. Repeatable.
    async fn commit_revert(&self, machine: &Machine, reverted: &Reverted) -> Result<(), DriverError>;

    /// The revert does not hold: what was kept aside is what counts again. Repeatable.
    async fn roll_back_revert(&self, machine: &Machine, reverted: &Reverted) -> Result<(), DriverError>;

    /// What `delete` would do. Changes nothing.
    async fn check_delete(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
    ) -> Result<DeletePlan, DriverError>;

    /// Removes the snapshot's data, its memory file and its copies; external overlays are merged into what they stand on.
    /// Cancelled before the journal's point of no return, it has changed nothing; from there on it goes to its end, with
    /// the guest or, when that ends, without. A failure says what is merged already; deleting it again does the rest.
    async fn delete(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        siblings: &Siblings,
        journal: Arc<dyn Journal>,
    ) -> Result<Vec<Replaced>, Unfinished>;

    /// Makes whole what was cut off, from the last note of its journal; `machine.guest` is what has been found of the guest.
    async fn recover(&self, machine: &Machine, note: serde_json::Value) -> Result<Recovered, DriverError>;

    /// Those of the files that a snapshot of this machine froze, and that have been written since, as far as that can be told.
    /// Changes nothing.
    async fn changed_since_frozen(&self, machine: &Machine, files: Vec<PathBuf>) -> Result<Vec<PathBuf>, DriverError> {
        let _ = (machine, files);
        Ok(Vec::new())
    }
}

/// Where the memory goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryMode {
    /// Nowhere.
    No,
    /// Into a disk image.
    Internal,
    /// Into this file.
    External(PathBuf),
}

/// How a disk takes part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskMode {
    /// Not.
    No,
    /// Inside its image.
    Internal,
    /// Its image is frozen, and this overlay takes the writes.
    External {
        /// The overlay: a file, or a block device.
        path: PathBuf,
        /// It is a block device.
        block: bool,
        /// `qcow2` or `qed`.
        format: String,
    },
    /// Its image is frozen, and an overlay on a server takes the writes. Only records say this, which another program made:
    /// they are kept, and can be forgotten.
    Remote {
        /// What is spoken with the server, and the overlay's name there, for people.
        shown: String,
    },
    /// The caller copies it while the guest is held still.
    Manual,
}

impl DiskMode {
    /// Whether its image is frozen below an overlay, wherever that is.
    pub fn is_external(&self) -> bool {
        matches!(self, DiskMode::External { .. } | DiskMode::Remote { .. })
    }
}

/// One disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPart {
    /// `vda`
    pub target: String,
    /// How it takes part.
    pub mode: DiskMode,
}

/// A snapshot to be taken.
#[derive(Clone, Debug)]
pub struct SnapshotRequest {
    /// Its name, valid and free.
    pub name: String,
    /// Where the memory goes.
    pub memory: MemoryMode,
    /// Every disk of the machine, in its order.
    pub disks: Vec<DiskPart>,
    /// How much of the tables of which disk's overlay may be held in memory, in bytes; of others as of the disk.
    pub caches: BTreeMap<String, u64>,
    /// The guest runs while its memory is written.
    pub live: bool,
    /// File systems are frozen by the agent meanwhile; thawed in every case.
    pub quiesce: bool,
    /// Overlays exist, made by the caller.
    pub reuse_external: bool,
    /// The guest's CPUs are not to go on afterwards: it is about to end, or a disk is copied by hand.
    pub stay_paused: bool,
    /// Do not capture the firmware's variables.
    pub leave_out_nvram: bool,
    /// Do not capture the TPM's state.
    pub leave_out_tpm: bool,
}

/// A file that an operation makes, merges or removes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileChange {
    /// Absolute.
    pub path: PathBuf,
    /// What becomes of it.
    pub what: FileFate,
    /// Its size, or about what it will be, in bytes.
    pub bytes: u64,
}

/// What becomes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFate {
    /// It is made.
    Created,
    /// Its content goes into the file below it, and it is removed.
    Merged,
    /// It is removed.
    Deleted,
}

/// What `create` would do.
#[derive(Clone, Debug, Default)]
pub struct CreatePlan {
    /// Files made.
    pub files: Vec<FileChange>,
    /// The guest stands still for a while.
    pub pauses_guest: bool,
}

/// What was taken.
#[derive(Clone, Debug)]
pub struct CreatedSnapshot {
    /// What the driver must know to revert and delete: ids inside images, copies. ExistingSnapshot with the snapshot.
    pub record: serde_json::Value,
    /// The machine on its new overlays, where disks were switched: source and backing chain of each.
    pub def: Option<Arc<DomainDef>>,
    /// How the firmware's variables were captured.
    pub nvram: Option<Capture>,
    /// How the TPM's state was captured.
    pub tpm: Option<Capture>,
}

/// How a part of the machine beside disks and memory was captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capture {
    /// Inside its own image, as the disks.
    Internal,
    /// With the memory.
    Memory,
    /// In this file.
    File(PathBuf),
}

/// A snapshot that exists.
#[derive(Clone, Debug)]
pub struct ExistingSnapshot {
    /// Its name.
    pub name: String,
    /// Where its memory is.
    pub memory: MemoryMode,
    /// Its disks; of an external one the overlay it made.
    pub disks: Vec<DiskPart>,
    /// Disks whose frozen files an earlier deletion has begun to write.
    pub merging: BTreeSet<String>,
    /// The machine as it was: the disks' sources are what was frozen.
    pub def: Arc<DomainDef>,
    /// The CPU that it had, where the definition leaves that open ([`Instance::expanded_cpu`]): it is started with no other.
    pub cpu: Option<Cpu>,
    /// What the driver kept; null for one that was restored from a document without it.
    pub record: serde_json::Value,
}

/// What else the domain has that a deletion or a revert must not harm.
#[derive(Clone, Debug, Default)]
pub struct Siblings {
    /// All its other snapshots.
    pub others: Arc<[Arc<ExistingSnapshot>]>,
    /// The stored configuration, where it is not what runs.
    pub stored: Option<Arc<DomainDef>>,
    /// Snapshots that will be deleted in the same deed: what only they need is not needed.
    pub deleted_together: Vec<String>,
    /// Files that other machines stand on: they are not removed.
    pub keep: Vec<PathBuf>,
    /// There are others whose records cannot be read: what they need nobody knows.
    pub unreadable: bool,
}

/// What a revert would do.
#[derive(Clone, Debug, Default)]
pub struct RevertPlan {
    /// Files made and removed.
    pub files: Vec<FileChange>,
    /// Frozen files that have been written since: what would be gone back to is not what was taken.
    pub changed: Vec<PathBuf>,
}

/// Images that have been brought to a snapshot.
#[derive(Clone, Debug)]
pub struct Reverted {
    /// The snapshot's definition with the disks that it stands on now.
    pub def: Arc<DomainDef>,
    /// The snapshot's disks: an external one may have another overlay now.
    pub disks: Vec<DiskPart>,
    /// The driver's record of the snapshot from now on.
    pub record: serde_json::Value,
    /// What `commit_revert` and `roll_back_revert` must know.
    pub aside: serde_json::Value,
}

/// What a deletion would do.
#[derive(Clone, Debug, Default)]
pub struct DeletePlan {
    /// Files merged and removed.
    pub files: Vec<FileChange>,
    /// Files that would be written: what overlays are merged into.
    pub written: Vec<PathBuf>,
    /// Why it would be refused.
    pub refused: Option<DriverError>,
}

/// A deletion that did not come to its end.
#[derive(Clone, Debug)]
pub struct Unfinished {
    /// Why.
    pub error: DriverError,
    /// What is merged for good: configurations follow.
    pub replaced: Vec<Replaced>,
    /// Disks whose frozen files have been written, or may have been. None: nothing was changed there.
    pub merging: Vec<String>,
}

impl From<DriverError> for Unfinished {
    /// Before anything was changed.
    fn from(error: DriverError) -> Unfinished {
        Unfinished { error, replaced: Vec::new(), merging: Vec::new() }
    }
}

/// A file that is no more, and what holds its content now: for every configuration that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// The disk.
    pub target: String,
    /// The file that is no more.
    pub gone: PathBuf,
    /// What holds its content.
    pub by: PathBuf,
    /// The format of that, where it is known.
    pub format: Option<String>,
}

/// How a cut off operation ended after all.
#[derive(Clone, Debug)]
pub enum Recovered {
    /// Nothing of it is left.
    Undone {
        /// What was done about it, for people.
        story: String,
    },
    /// It is complete; what it would have returned.
    Created(Box<CreatedSnapshot>),
    /// It is complete but for `commit_revert` and `roll_back_revert`.
    Reverted(Box<Reverted>),
    /// It is complete.
    Deleted(Vec<Replaced>),
    /// A deletion that cannot be brought to its end now.
    Undeleted(Unfinished),
    /// The machine is saved, in this file; its guest, if it is there still, is to end.
    Saved(PathBuf),
}

/// What a guest starts from, other than power off.
pub enum StartFrom {
    /// The snapshot whose memory is loaded; its images have been reverted.
    Snapshot(ExistingSnapshot),
    /// A saved machine, which has been held to its checksums.
    Saved(super::saved::SavedState),
}

impl StartFrom {
    /// The CPU that the guest had, where its definition leaves that open ([`Instance::expanded_cpu`]): it is started with no
    /// other.
    pub fn cpu(&self) -> Option<&Cpu> {
        match self {
            StartFrom::Snapshot(snapshot) => snapshot.cpu.as_ref(),
            StartFrom::Saved(saved) => saved.cpu.as_ref(),
        }
    }
}
