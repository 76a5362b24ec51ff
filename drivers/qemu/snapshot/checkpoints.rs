//! Checkpoints: bitmaps in the images of disks, which QEMU keeps at each write and puts away when it closes an image in order.
//!
//! Each checkpoint has bitmaps of its own, which all go on until it is deleted; so none of them has to be merged into another,
//! and what is doubtful of one is doubtful of that one alone. An overlay that is laid on an image gets the same bitmaps in the
//! same moment: what has been written since is what they tell together.

use super::{Operation, cannot};
use crate::host::image::Bitmaps;
use crate::qemu::QemuDriver;
use crate::qemu::block::Node;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use virt_model::checkpoint::of_machine;
use virt_model::device::Disk;
use virt_model::driver::DriverError;
use virt_model::driver::checkpoints::{BitmapState, Checkpoints, TrackedDisk};
use virt_model::driver::snapshots::Machine;

#[async_trait]
impl Checkpoints for QemuDriver {
    async fn check_create_checkpoint(&self, machine: &Machine, disks: &[TrackedDisk]) -> Result<(), DriverError> {
        self.operation(machine).await?.bitmaps_to_add(disks).await.map(drop)
    }

    async fn create_checkpoint(&self, machine: &Machine, disks: &[TrackedDisk]) -> Result<(), DriverError> {
        let operation = self.operation(machine).await?;
        let actions = operation.bitmaps_to_add(disks).await?;
        operation.transaction(actions).await
    }

    async fn delete_checkpoint(&self, machine: &Machine, disks: &[TrackedDisk]) -> Result<(), DriverError> {
        self.operation(machine).await?.remove_bitmaps(disks).await
    }

    async fn doubts(
        &self,
        machine: &Machine,
        checkpoints: &[Vec<TrackedDisk>],
    ) -> Result<BTreeMap<usize, String>, DriverError> {
        let operation = self.operation(machine).await?;
        let all = checkpoints.iter().flatten();
        let layers = all.filter_map(|tracked| of_machine(&machine.def, &tracked.target)).flat_map(Disk::files);
        let held = operation.bitmaps_in(layers.collect()).await?;
        let state = |file: &Path, bitmap: &str| {
            held.get(file).and_then(|held| held.get(bitmap)).copied().unwrap_or(BitmapState::Missing)
        };
        let doubt = |tracked: &TrackedDisk| match of_machine(&machine.def, &tracked.target) {
            Some(disk) => tracked.doubt(&disk.files(), state),
            None => Some(format!("the machine has no disk '{}' any more", tracked.target)),
        };
        let doubts = checkpoints.iter().enumerate();
        Ok(doubts.filter_map(|(at, tracked)| Some((at, tracked.iter().find_map(doubt)?))).collect())
    }
}

impl Operation {
    /// What has the running guest keep bitmaps, as parts of one transaction. Refuses names that an image has already.
    pub(super) async fn bitmaps_to_add(&self, disks: &[TrackedDisk]) -> Result<Vec<Value>, DriverError> {
        let nodes = self.nodes().await?.ok_or(DriverError::Gone)?;
        let action = |tracked: &TrackedDisk| {
            let (target, bitmap) = (&tracked.target, &tracked.bitmap);
            let disk = of_machine(&self.machine.def, target);
            let disk = disk.ok_or_else(|| DriverError::Internal(format!("there is no disk '{target}'")))?;
            let node = nodes.of_disk(disk)?;
            if node.driver != "qcow2" {
                return Err(cannot(format!("disk '{target}' is no qcow2 image, and only those keep bitmaps")));
            }
            let layers = disk.files();
            let has = |node: &&Node| node.bitmaps.contains_key(bitmap) && layers.contains(&node.file);
            if let Some(held) = nodes.0.iter().find(has) {
                return Err(DriverError::SnapshotExists(format!(
                    "disk '{target}': {} holds a bitmap '{bitmap}' already; choose another name, or remove it with 'qemu-img \
                     bitmap --remove' while nobody has it open",
                    held.file.display()
                )));
            }
            Ok(add_bitmap(&node.name, bitmap))
        };
        disks.iter().map(action).collect()
    }

    /// All of that at one moment, or nothing.
    async fn transaction(&self, actions: Vec<Value>) -> Result<(), DriverError> {
        if actions.is_empty() {
            return Ok(());
        }
        let body = self.body.as_ref().ok_or(DriverError::Gone)?;
        body.patiently("transaction", json!({ "actions": actions })).await.map(drop)
    }

    /// Removes bitmaps from the images that are written; those in frozen layers stay.
    async fn remove_bitmaps(&self, disks: &[TrackedDisk]) -> Result<(), DriverError> {
        let disk =
            |tracked: &TrackedDisk| Some((of_machine(&self.machine.def, &tracked.target)?, tracked.bitmap.clone()));
        let disks: Vec<(&Disk, String)> = disks.iter().filter_map(disk).collect();
        if let Some(nodes) = self.nodes().await? {
            let remove = |(disk, bitmap): (&Disk, String)| {
                let node = nodes.of_disk(disk).ok().filter(|node| node.bitmaps.contains_key(&bitmap))?;
                let data = json!({ "node": node.name, "name": bitmap });
                Some(json!({ "type": "block-dirty-bitmap-remove", "data": data }))
            };
            return self.transaction(disks.into_iter().filter_map(remove).collect()).await;
        }
        let image = |(disk, bitmap): (&Disk, String)| Some((PathBuf::from(disk.path()?), bitmap));
        let images: Vec<(PathBuf, String)> = disks.into_iter().filter_map(image).collect();
        let files = images.iter().map(|(file, _)| (file.clone(), true)).collect();
        self.with_lent(files, move |tools| images.iter().try_for_each(|(file, name)| tools.remove_bitmap(file, name)))
            .await
    }

    /// The bitmaps that these files hold. What is no qcow2 image holds none.
    async fn bitmaps_in(&self, mut files: Vec<PathBuf>) -> Result<BTreeMap<PathBuf, Bitmaps>, DriverError> {
        if let Some(nodes) = self.nodes().await? {
            let held = nodes.0.into_iter().filter(|node| node.driver == "qcow2" && files.contains(&node.file));
            return Ok(held.map(|node| (node.file, node.bitmaps)).collect());
        }
        let layers = self.machine.def.devices.disks.iter().flat_map(Disk::chain);
        let qcow2: Vec<PathBuf> = layers
            .filter(|layer| layer.format == Some("qcow2"))
            .filter_map(|layer| layer.path.map(PathBuf::from))
            .collect();
        files.retain(|file| qcow2.contains(file));
        files.sort();
        files.dedup();
        let lent = files.iter().map(|file| (file.clone(), false)).collect();
        self.with_lent(lent, move |tools| {
            files.into_iter().map(|file| tools.info(&file, "qcow2").map(|info| (file, info.bitmaps()))).collect()
        })
        .await
    }
}

/// A part of a transaction: a bitmap in that node's image tells what is written from then on.
pub(super) fn add_bitmap(node: &str, bitmap: &str) -> Value {
    json!({ "type": "block-dirty-bitmap-add", "data": { "node": node, "name": bitmap, "persistent": true } })
}

/// What has an overlay go on with the sound bitmaps of the node that it is laid on: parts of the same transaction.
pub(super) fn go_on_with(below: &Node, overlay: &str) -> Vec<Value> {
    sound(&below.bitmaps).map(|bitmap| add_bitmap(overlay, bitmap)).collect()
}

/// The names of those that can be trusted.
pub(super) fn sound(bitmaps: &Bitmaps) -> impl Iterator<Item = &String> {
    bitmaps.iter().filter(|(_, state)| **state == BitmapState::Sound).map(|(name, _)| name)
}
