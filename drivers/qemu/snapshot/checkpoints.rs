//! Checkpoints: bitmaps in the images of disks, which QEMU keeps at each write and puts away when it closes an image in order.
//!
//! Each checkpoint has bitmaps of its own, which all go on until it is deleted; so none of them has to be merged into another,
//! and what is doubtful of one is doubtful of that one alone. An overlay that is laid on an image gets the same bitmaps in the
//! same moment: what has been written since is what they tell together.

use super::{Operation, cannot, pairs};
use crate::host::image::Bitmaps;
use crate::qemu::QemuDriver;
use crate::qemu::block::{Node, Nodes};
use async_trait::async_trait;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use virt_model::checkpoint::of_machine;
use virt_model::device::Disk;
use virt_model::driver::DriverError;
use virt_model::driver::checkpoints::{BitmapState, Checkpoints, TrackedDisk};
use virt_model::driver::snapshots::{DiskMode, Machine, SnapshotRequest};

/// What QEMU may tell of bitmaps, in bytes: a part of the longest line that is read.
const MOST_TOLD: usize = 1 << 20;

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
        room_for_bitmaps(nodes.0.iter().map(|node| &node.bitmaps), disks.iter().map(|tracked| &tracked.bitmap))?;
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

    /// Refuses overlays that would go on with more bitmaps than there may be.
    pub(super) async fn overlays_have_room(
        &self,
        request: &SnapshotRequest,
        nodes: Option<&Nodes>,
    ) -> Result<(), DriverError> {
        let def = &self.machine.def;
        let keeps = |mode: &DiskMode| matches!(mode, DiskMode::External { format, .. } if format == "qcow2");
        let bases = pairs(def, &request.disks).filter(|(_, part)| keeps(&part.mode));
        let bases = bases.filter_map(|(disk, _)| disk.path().map(PathBuf::from)).collect();
        let held = self.bitmaps_of(nodes, bases).await?;
        let new: Vec<&String> = held.values().flat_map(sound).collect();
        if new.is_empty() {
            return Ok(());
        }
        let all = self.bitmaps_of(nodes, def.devices.disks.iter().flat_map(Disk::files).collect()).await?;
        room_for_bitmaps(all.values(), new.into_iter())
    }

    /// The bitmaps that these files hold. What is no qcow2 image holds none.
    async fn bitmaps_in(&self, files: Vec<PathBuf>) -> Result<BTreeMap<PathBuf, Bitmaps>, DriverError> {
        self.bitmaps_of(self.nodes().await?.as_ref(), files).await
    }

    async fn bitmaps_of(
        &self,
        nodes: Option<&Nodes>,
        mut files: Vec<PathBuf>,
    ) -> Result<BTreeMap<PathBuf, Bitmaps>, DriverError> {
        if let Some(nodes) = nodes {
            let held = nodes.0.iter().filter(|node| node.driver == "qcow2" && files.contains(&node.file));
            return Ok(held.map(|node| (node.file.clone(), node.bitmaps.clone())).collect());
        }
        let layers = self.machine.def.devices.disks.iter().flat_map(Disk::chain);
        let qcow2: Vec<PathBuf> = layers
            .filter(|layer| layer.format == Some("qcow2"))
            .filter_map(|layer| layer.path.map(PathBuf::from))
            .collect();
        files.retain(|file| qcow2.contains(file));
        files.sort();
        files.dedup();
        if files.is_empty() {
            return Ok(BTreeMap::new());
        }
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

/// Refuses bitmaps of which QEMU would have more to tell than is listened to: each layer of each disk has its own, and all are
/// told with each look at the images.
fn room_for_bitmaps<'a>(
    held: impl Iterator<Item = &'a Bitmaps>,
    new: impl Iterator<Item = &'a String>,
) -> Result<(), DriverError> {
    let told: usize = held.flat_map(Bitmaps::keys).chain(new).map(|name| told_of(name)).sum();
    match told <= MOST_TOLD {
        true => Ok(()),
        false => Err(DriverError::TooMany(
            "the layers of its disks would hold too many bitmaps; delete checkpoints, or merge layers, first"
                .to_owned(),
        )),
    }
}

/// How long it is, at the most, what QEMU tells of a bitmap.
fn told_of(name: &str) -> usize {
    // What is not ASCII is told by its numbers.
    let length = |c: char| if c.is_ascii() { 2 } else { 6 * c.len_utf16() };
    160 + name.chars().map(length).sum::<usize>()
}

/// The names of those that can be trusted.
pub(super) fn sound(bitmaps: &Bitmaps) -> impl Iterator<Item = &String> {
    bitmaps.iter().filter(|(_, state)| **state == BitmapState::Sound).map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_of_all_layers_have_room_or_are_refused() {
        let layer = |name: &str| (0..256).map(|n| (format!("{name}{n}"), BitmapState::Sound)).collect::<Bitmaps>();
        let (short, long) = (layer("b"), layer(&"\u{1f600}".repeat(60)));
        let one = "one".to_owned();
        let room = |held: &[&Bitmaps]| room_for_bitmaps(held.iter().copied(), std::iter::once(&one));
        assert!(room(&[]).is_ok() && room(&[&short; 10]).is_ok() && room(&[&long]).is_ok());
        for held in [&[&short; 30][..], &[&long; 6]] {
            assert!(matches!(room(held), Err(DriverError::TooMany(_))));
        }
    }
}
