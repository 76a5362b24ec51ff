//! What is the same for all long operations on a machine: the machine, and where is told how far it is.

use super::{DriverError, Instance};
use crate::domain::DomainDef;
use async_trait::async_trait;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// The machine an operation is about.
#[derive(Clone)]
pub struct Machine {
    /// What runs, or what is stored if nothing does.
    pub def: Arc<DomainDef>,
    /// The running guest.
    pub guest: Option<Arc<dyn Instance>>,
    /// Whether its CPUs run.
    pub running: bool,
    /// Where the driver may keep what belongs to this domain's snapshots: copies of variables and the like. Exists.
    pub folder: PathBuf,
}

/// Ready once a note is on disk, whatever becomes of the host.
pub type NoteSync = Pin<Box<dyn Future<Output = Result<(), DriverError>> + Send>>;

/// Where an operation tells how far it is.
#[async_trait]
pub trait Journal: Send + Sync {
    /// Keeps a note, durably, in place of the one before. On failure nothing may be changed.
    async fn note(&self, note: serde_json::Value) -> Result<(), DriverError>;

    /// The same for what can be done once more, or is of no use without its record: the next virtd finds the note from now on,
    /// however this one ends. What it gives is ready once the host may lose its power, too, and is to be waited for before the
    /// operation is taken for done.
    async fn note_at_once(&self, note: serde_json::Value) -> Result<NoteSync, DriverError> {
        self.note(note).await?;
        Ok(Box::pin(async { Ok(()) }))
    }

    /// Takes a note in place of the one before which says that the machine is captured: it is kept, durably, in one step with the
    /// record of the snapshot. What is lost before that, with virtd or the host, is undone by the note before.
    fn captured(&self, note: serde_json::Value);

    /// The frozen files of these disks are about to be written. That is recorded durably with the snapshot, which can then only be
    /// deleted; on failure nothing may be changed.
    async fn merging(&self, targets: &[String]) -> Result<(), DriverError>;

    /// A change has been made that a restart would find: called between any two of them.
    fn step(&self, what: &str);

    /// Bytes done and in all.
    fn progress(&self, done: u64, total: u64);

    /// How much of it is done, of `total`, where that is not counted in bytes.
    fn part_done(&self, done: u64, total: u64);

    /// All of a guest that is being saved is written: however it ends from here on, unless the save fails, it ends as saved.
    fn memory_written(&self) {}

    /// A guest that was being saved is about to go on: however it ends from here on, it does not end as saved.
    fn save_given_up(&self) {}

    /// Refuses to replace a file that a machine stands on by now.
    async fn may_replace(&self, _file: &Path) -> Result<(), DriverError> {
        Ok(())
    }

    /// From here on it cannot be cancelled.
    fn point_of_no_return(&self);

    /// Fires when the operation is no longer wanted.
    fn cancelled(&self) -> &CancellationToken;
}
