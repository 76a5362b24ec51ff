//! Checkpoints of guests in memory: bitmaps that images would hold. A hypervisor that dies leaves them inconsistent.

use super::{TestDriver, lock, our_machine};
use async_trait::async_trait;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use virt_model::checkpoint::of_machine;
use virt_model::driver::DriverError;
use virt_model::driver::checkpoints::{BitmapState, Checkpoints, TrackedDisk};
use virt_model::driver::snapshots::Machine;

/// The bitmaps of a domain's images, by file and name.
#[derive(Debug, Default)]
pub struct Tracked(Mutex<BTreeMap<(PathBuf, String), BitmapState>>);

impl Tracked {
    /// Whoever wrote to the images did not come to an end in order.
    pub fn are_in_doubt(&self) {
        lock(&self.0).values_mut().for_each(|state| *state = BitmapState::Inconsistent);
    }

    /// An overlay goes on with what its base holds.
    pub fn go_on(&self, base: &Path, overlay: &Path) {
        let mut all = lock(&self.0);
        let names: Vec<String> = all.keys().filter(|(file, _)| file == base).map(|(_, name)| name.clone()).collect();
        all.extend(names.into_iter().map(|name| ((overlay.to_owned(), name), BitmapState::Sound)));
    }
}

/// The image in which a disk's bitmap is kept now.
fn image(machine: &Machine, disk: &TrackedDisk) -> Option<(PathBuf, String)> {
    let path = of_machine(&machine.def, &disk.target)?.path()?;
    Some((PathBuf::from(path), disk.bitmap.clone()))
}

#[async_trait]
impl Checkpoints for TestDriver {
    async fn check_create_checkpoint(&self, machine: &Machine, disks: &[TrackedDisk]) -> Result<(), DriverError> {
        our_machine(machine.guest.as_deref().ok_or(DriverError::Gone)?)?.listens().await?;
        let tracked = self.tracked(machine.def.uuid);
        let held = lock(&tracked.0);
        match disks.iter().find(|disk| image(machine, disk).is_some_and(|key| held.contains_key(&key))) {
            None => Ok(()),
            Some(TrackedDisk { target, bitmap, .. }) => {
                let text = format!("disk '{target}' holds a bitmap '{bitmap}' already; choose another name");
                Err(DriverError::SnapshotExists(text))
            }
        }
    }

    async fn create_checkpoint(&self, machine: &Machine, disks: &[TrackedDisk]) -> Result<(), DriverError> {
        self.check_create_checkpoint(machine, disks).await?;
        let new = disks.iter().filter_map(|disk| Some((image(machine, disk)?, BitmapState::Sound)));
        lock(&self.tracked(machine.def.uuid).0).extend(new);
        Ok(())
    }

    async fn delete_checkpoint(&self, machine: &Machine, disks: &[TrackedDisk]) -> Result<(), DriverError> {
        let tracked = self.tracked(machine.def.uuid);
        let mut held = lock(&tracked.0);
        disks.iter().filter_map(|disk| image(machine, disk)).for_each(|key| _ = held.remove(&key));
        Ok(())
    }

    async fn doubts(
        &self,
        machine: &Machine,
        checkpoints: &[Vec<TrackedDisk>],
    ) -> Result<BTreeMap<usize, String>, DriverError> {
        let tracked = self.tracked(machine.def.uuid);
        let held = lock(&tracked.0);
        let state = |file: &Path, bitmap: &str| {
            held.get(&(file.to_owned(), bitmap.to_owned())).copied().unwrap_or(BitmapState::Missing)
        };
        let doubt = |tracked: &TrackedDisk| match of_machine(&machine.def, &tracked.target) {
            Some(disk) => tracked.doubt(&disk.files(), state),
            None => Some(format!("the machine has no disk '{}' any more", tracked.target)),
        };
        let all = checkpoints.iter().enumerate();
        Ok(all.filter_map(|(at, tracked)| Some((at, tracked.iter().find_map(doubt)?))).collect())
    }
}
