//! Backups of guests in memory: what is copied is copied at once when the guest runs, and what is read says whose it is.

use super::nbd::{Export, serve};
use super::{TestDriver, lock, our_machine};
use async_trait::async_trait;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use virt_model::driver::DriverError;
use virt_model::driver::backup::{BackedUpDisk, BackupRequest, Backups};
use virt_model::driver::checkpoints::Checkpoints;
use virt_model::driver::snapshots::Machine;

/// How long each disk of a guest in memory is.
const LENGTH: usize = 1 << 20;
/// So much of it, from its beginning on, has been written since any checkpoint.
const WRITTEN: u32 = 1 << 16;

/// How many readers there may be of one backup at once.
const READERS: usize = 64;

/// Those who read a backup.
#[derive(Clone)]
pub(super) struct Readers {
    /// Ends them all.
    ends: CancellationToken,
    /// For those who may still come.
    places: Arc<Semaphore>,
}

impl Default for Readers {
    fn default() -> Readers {
        Readers { ends: CancellationToken::new(), places: Arc::new(Semaphore::new(READERS)) }
    }
}

#[async_trait]
impl Backups for TestDriver {
    async fn check_backup(&self, machine: &Machine, request: &BackupRequest) -> Result<(), DriverError> {
        self.check_create_checkpoint(machine, &request.checkpoint).await
    }

    async fn make_backup_files(&self, _machine: &Machine, _request: &BackupRequest) -> Result<(), DriverError> {
        // Nothing is written.
        Ok(())
    }

    async fn begin_backup(&self, machine: &Machine, request: &BackupRequest) -> Result<(), DriverError> {
        self.create_checkpoint(machine, &request.checkpoint).await?;
        lock(&self.0.backups).insert(machine.def.uuid, Readers::default());
        Ok(())
    }

    async fn copy_backup(
        &self,
        machine: &Machine,
        request: &BackupRequest,
        progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
        cancel: &CancellationToken,
    ) -> Result<(), DriverError> {
        let all = u64::try_from(LENGTH * request.disks.len()).unwrap_or_default();
        progress(0, all);
        let guest = our_machine(machine.guest.as_deref().ok_or(DriverError::Gone)?)?;
        tokio::select! {
            goes_on = guest.goes_on() => if !goes_on { return Err(DriverError::Gone) },
            () = cancel.cancelled() => return Err(DriverError::Cancelled),
        }
        progress(all, all);
        Ok(())
    }

    async fn is_backed_up(&self, machine: &Machine, _request: &BackupRequest) -> Result<bool, DriverError> {
        Ok(lock(&self.0.backups).contains_key(&machine.def.uuid))
    }

    async fn open_backup(&self, machine: &Machine, disk: &BackedUpDisk) -> Result<OwnedFd, DriverError> {
        let readers = lock(&self.0.backups).get(&machine.def.uuid).cloned().ok_or(DriverError::Gone)?;
        let place = readers.places.try_acquire_owned().map_err(|_| {
            DriverError::Refused(format!("the backup has {READERS} readers already; close some of their connections"))
        })?;
        let ends = readers.ends;
        let failed = |e: std::io::Error| DriverError::Internal(format!("no connection: {e}"));
        let (client, server) = UnixStream::pair().map_err(failed)?;
        server.set_nonblocking(true).map_err(failed)?;
        let server = tokio::net::UnixStream::from_std(server).map_err(failed)?;
        let mut content = format!("{} {}\n", machine.def.name, disk.target).into_bytes();
        content.resize(LENGTH, 0);
        let bitmap = disk.since.as_ref().map(|_| (disk.bitmap.clone(), WRITTEN));
        let export = Export { name: disk.export.clone(), content, bitmap };
        tokio::spawn(async move {
            let _place = place;
            tokio::select! {
                // A client may leave, or speak nonsense, at any time.
                _ = serve(server, &export) => {}
                () = ends.cancelled() => {}
            }
        });
        Ok(client.into())
    }

    async fn end_backup(
        &self,
        machine: &Machine,
        _request: &BackupRequest,
        _complete: bool,
    ) -> Result<(), DriverError> {
        if let Some(readers) = lock(&self.0.backups).remove(&machine.def.uuid) {
            readers.ends.cancel();
        }
        Ok(())
    }
}
