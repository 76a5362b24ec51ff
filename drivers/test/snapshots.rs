//! Snapshots of guests in memory: names that images would hold, and nothing in them.

use super::guest;
use super::{TestDriver, lock, our_machine};
use crate::agent::talk::HELLO;
use crate::agent::{self, Line, Terms};
use async_trait::async_trait;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::driver::DriverError;
use virt_model::driver::snapshots::{
    CreatePlan, CreatedSnapshot, DeletePlan, DiskMode, ExistingSnapshot, FileChange, FileFate, Journal, Machine,
    MemoryMode, Recovered, Replaced, RevertPlan, Reverted, Siblings, SnapshotRequest, Snapshots, Unfinished,
};

/// The way to the agent of its guest.
fn line(machine: &Machine) -> Result<Arc<guest::Machine>, DriverError> {
    machine.guest.as_deref().map_or(Err(DriverError::Gone), our_machine)
}

#[async_trait]
impl Snapshots for TestDriver {
    async fn check_create(&self, machine: &Machine, request: &SnapshotRequest) -> Result<CreatePlan, DriverError> {
        if request.quiesce {
            line(machine)?.talk(Terms::within(HELLO)).await?;
        }
        if lock(&self.0.images).get(&machine.def.uuid).is_some_and(|names| names.contains(&request.name)) {
            let text = format!("the images hold a snapshot '{}' already", request.name);
            return Err(DriverError::SnapshotExists(text));
        }
        let overlays = request.disks.iter().filter_map(|disk| overlay(&disk.mode));
        let memory = match &request.memory {
            MemoryMode::External(file) => Some(file.as_path()),
            _ => None,
        };
        let change = |path: &Path| FileChange { path: path.to_owned(), what: FileFate::Created, bytes: 0 };
        Ok(CreatePlan {
            files: overlays.chain(memory).map(change).collect(),
            pauses_guest: machine.running && request.memory != MemoryMode::No && !request.live,
        })
    }

    async fn create(
        &self,
        machine: &Machine,
        request: &SnapshotRequest,
        journal: Arc<dyn Journal>,
    ) -> Result<CreatedSnapshot, DriverError> {
        journal.note(json!({ "create": request.name })).await?;
        if request.quiesce {
            agent::freeze(&line(machine)?).await?;
        }
        let pauses = machine.running && request.memory != MemoryMode::No;
        if let Some(guest) = machine.guest.as_ref().filter(|_| pauses) {
            guest.suspend().await?;
        }
        journal.part_done(1, 2);
        let cancelled = journal.cancelled().is_cancelled();
        if !cancelled {
            lock(&self.0.images).entry(machine.def.uuid).or_default().insert(request.name.clone());
        }
        if let Some(guest) = machine.guest.as_ref().filter(|_| pauses && (cancelled || !request.stay_paused)) {
            guest.resume().await?;
        }
        if request.quiesce {
            agent::thaw(&line(machine)?).await?;
        }
        if cancelled {
            return Err(DriverError::Cancelled);
        }
        journal.part_done(2, 2);
        let mut now = machine.def.clone();
        let def = Arc::make_mut(&mut now);
        let mut switched = false;
        for (disk, part) in def.devices.disks.iter_mut().zip(&request.disks) {
            if let Some(path) = overlay(&part.mode) {
                self.tracked(machine.def.uuid).go_on(Path::new(disk.path().unwrap_or_default()), path);
                disk.stand_on(path, false, "qcow2");
                switched = true;
            }
        }
        let record = json!({ "test": request.name });
        Ok(CreatedSnapshot { record, def: switched.then_some(now), nvram: None, tpm: None })
    }

    async fn check_revert(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        _: &Siblings,
        _: bool,
    ) -> Result<RevertPlan, DriverError> {
        let holds = lock(&self.0.images).get(&machine.def.uuid).is_some_and(|names| names.contains(&snapshot.name));
        if !holds {
            let text = format!("no image holds the snapshot '{}'; delete it with metadata-only", snapshot.name);
            return Err(DriverError::Storage(text));
        }
        Ok(RevertPlan::default())
    }

    async fn load(
        &self,
        _: &Machine,
        snapshot: &ExistingSnapshot,
        journal: Arc<dyn Journal>,
    ) -> Result<(), DriverError> {
        journal.note(json!({ "load": snapshot.name })).await
    }

    async fn revert_images(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        _: &Siblings,
        journal: Arc<dyn Journal>,
    ) -> Result<Reverted, DriverError> {
        journal.note(json!({ "revert": snapshot.name })).await?;
        let mut now = snapshot.def.clone();
        let def = Arc::make_mut(&mut now);
        let number = lock(&self.0.images).get(&machine.def.uuid).map_or(0, |names| names.len());
        for (disk, part) in def.devices.disks.iter_mut().zip(&snapshot.disks) {
            if overlay(&part.mode).is_some() {
                let base = PathBuf::from(disk.path().unwrap_or_default());
                disk.stand_on(&base.with_extension(format!("again-{number}")), false, "qcow2");
            }
        }
        let (disks, record) = (snapshot.disks.clone(), snapshot.record.clone());
        Ok(Reverted { def: now, disks, record, aside: serde_json::Value::Null })
    }

    async fn commit_revert(&self, _: &Machine, _: &Reverted) -> Result<(), DriverError> {
        Ok(())
    }

    async fn roll_back_revert(&self, _: &Machine, _: &Reverted) -> Result<(), DriverError> {
        Ok(())
    }

    async fn check_delete(
        &self,
        _: &Machine,
        snapshot: &ExistingSnapshot,
        _: &Siblings,
    ) -> Result<DeletePlan, DriverError> {
        let merged = |path: &Path| FileChange { path: path.to_owned(), what: FileFate::Merged, bytes: 0 };
        let files = snapshot.disks.iter().filter_map(|disk| overlay(&disk.mode)).map(merged).collect();
        Ok(DeletePlan { files, ..DeletePlan::default() })
    }

    async fn delete(
        &self,
        machine: &Machine,
        snapshot: &ExistingSnapshot,
        _: &Siblings,
        journal: Arc<dyn Journal>,
    ) -> Result<Vec<Replaced>, Unfinished> {
        journal.note(json!({ "delete": snapshot.name })).await?;
        if let Some(names) = lock(&self.0.images).get_mut(&machine.def.uuid) {
            names.remove(&snapshot.name);
        }
        let frozen = |target: &str| {
            let disk = snapshot.def.devices.disks.iter().find(|disk| disk.target.dev == target)?;
            Some((PathBuf::from(disk.path()?), disk.format().map(str::to_owned)))
        };
        let replaced = snapshot.disks.iter().filter_map(|part| {
            let (by, format) = frozen(&part.target)?;
            Some(Replaced { target: part.target.clone(), gone: overlay(&part.mode)?.to_owned(), by, format })
        });
        Ok(replaced.collect())
    }

    async fn recover(&self, machine: &Machine, note: serde_json::Value) -> Result<Recovered, DriverError> {
        let hangs = lock(&self.0.recoveries).remove(&machine.def.uuid);
        if let Some(notice) = hangs {
            notice.notified().await;
        }
        if let Some(recovered) = self.recover_save(machine.def.uuid, note).await {
            return recovered;
        }
        Ok(Recovered::Undone { story: "a guest in memory ends with virtd, and so does what was done to it".to_owned() })
    }
}

fn overlay(mode: &DiskMode) -> Option<&Path> {
    match mode {
        DiskMode::External { path, .. } => Some(path),
        _ => None,
    }
}
