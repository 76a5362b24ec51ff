//! The contract for backups: what the guest's disks held at one moment, written to files, or read by whoever is connected.
//!
//! ```text
//!  make_backup_files ─▶ begin_backup ─▶ push: copy_backup, to its end ─┐
//!                                    └▶ pull: open_backup, any number ─┴▶ end_backup
//!  virtd killed   is_backed_up ─▶ goes on as it was, or end_backup
//! ```

use super::DriverError;
use super::checkpoints::TrackedDisk;
use super::operation::Machine;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// What a driver can do for backups.
#[async_trait]
pub trait Backups: Send + Sync {
    /// Refuses what [`Backups::begin_backup`] would refuse before it changes anything. Changes nothing.
    async fn check_backup(&self, machine: &Machine, request: &BackupRequest) -> Result<(), DriverError>;

    /// Makes the files that are written, where nothing is. After a failure none is there that it made, and what somebody else
    /// has made meanwhile is left alone.
    async fn make_backup_files(&self, machine: &Machine, request: &BackupRequest) -> Result<(), DriverError>;

    /// Begins a backup of this moment, and with it the checkpoint that was asked for. What a failure leaves is taken away by
    /// [`Backups::end_backup`].
    async fn begin_backup(&self, machine: &Machine, request: &BackupRequest) -> Result<(), DriverError>;

    /// Waits until all is written, and on the host's storage. `progress` is told how many bytes of how many. Error: `Cancelled` if `cancel` has fired.
    async fn copy_backup(
        &self,
        machine: &Machine,
        request: &BackupRequest,
        progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
        cancel: &CancellationToken,
    ) -> Result<(), DriverError>;

    /// Whether a guest that was found again still does what was begun.
    async fn is_backed_up(&self, machine: &Machine, request: &BackupRequest) -> Result<bool, DriverError>;

    /// A connection for one reader of a backup that is read.
    async fn open_backup(&self, machine: &Machine, disk: &BackedUpDisk) -> Result<OwnedFd, DriverError>;

    /// Nothing of it is left in the guest; files stay only if they are `complete`. Repeatable, with a guest and without.
    async fn end_backup(&self, machine: &Machine, request: &BackupRequest, complete: bool) -> Result<(), DriverError>;
}

/// A backup that is to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRequest {
    /// It is read by who asked for it.
    pub pull: bool,
    /// Disks that take part.
    pub disks: Vec<BackedUpDisk>,
    /// From the same moment on it is kept what is written to these.
    pub checkpoint: Vec<TrackedDisk>,
    /// Bytes a second at most, for each disk; 0: as fast as it can be.
    pub bandwidth: u64,
}

/// A disk that is backed up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackedUpDisk {
    /// `vda`
    pub target: String,
    /// What is written, or where it is kept what the guest overwrites meanwhile: nothing is there before.
    pub file: PathBuf,
    /// The format of that.
    pub format: String,
    /// Only what has been written since, if not all is wanted.
    pub since: Option<TrackedDisk>,
    /// What it is called where it is read.
    pub export: String,
    /// What the bitmap is called there.
    pub bitmap: String,
}
