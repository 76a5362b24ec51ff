//! What domains say of the images that they need: for those who are about to write one (`crate::images`).

use super::{Domain, Domains};
use crate::error::{Error, Result};
use crate::images::{
    Begins, ChainKind, DiskImages, FROZEN, Fate, GuestDisk, KeptChain, Machines, Overlay, Shown, images_of,
    overlays_of, show_disk, show_snapshot, written_by,
};
use crate::lock::lock;
use crate::volumes::Answer;
use std::path::PathBuf;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::device::Disk;
use virt_model::device::disk::{DiskDevice, DiskKind};
use virt_model::driver::block_jobs::BlockWork;
use virt_model::driver::{DriverError, GivenFile};

impl Machines for Domains {
    fn show_chains(&self, except: Option<Uuid>, to: Shown<'_>) {
        let all = self.all().into_iter().filter(|domain| Some(domain.uuid) != except);
        all.for_each(|domain| domain.show_chains(to));
    }

    fn show_running_chains(&self, to: Shown<'_>) {
        self.all().iter().for_each(|domain| domain.show_running_chains(to));
    }

    fn overlays(&self) -> Vec<Overlay> {
        self.all().iter().flat_map(|domain| domain.overlays()).collect()
    }

    fn name_of(&self, machine: Uuid) -> Option<String> {
        self.get(machine).map(|domain| domain.name())
    }

    fn resize_disk<'a>(&'a self, disk: &'a GuestDisk, size: u64, give_up: &'a CancellationToken) -> Answer<'a> {
        Box::pin(async move {
            match self.get(disk.machine) {
                Some(domain) => domain.resize_disk_on(disk, size, give_up).await,
                None => Err(has_ended(disk)),
            }
        })
    }
}

/// Of a guest that was to do something with its disk.
pub(super) fn has_ended(disk: &GuestDisk) -> Error {
    Error::OperationInvalid(format!("{} has ended meanwhile; try again", disk.whose))
}

impl Domain {
    /// What the driver said while it was to `deed` this domain. Of an image that is locked it is told who has it.
    pub(super) fn driver_failed(&self, deed: &str, error: DriverError) -> Error {
        Error::from_driver(&self.name(), deed, self.shared.images.with_owner_of_lock(|to| self.show_chains(to), error))
    }

    /// Refuses what would have to open an image again that a client has given to its guest by descriptor.
    pub(super) fn opens_no_given_image(&self, deed: &str) -> Result<()> {
        let live = self.live();
        let given = live.iter().flat_map(|live| &live.devices.disks).find(|disk| disk.is_given());
        let Some(disk) = given else { return Ok(()) };
        let (name, target) = (self.name(), &disk.target.dev);
        Err(Error::OperationUnsupported(format!(
            "cannot {deed} domain '{name}': the image of disk '{target}' was given by descriptor, and nobody could open it \
             again; unplug the disk first, or take the medium out"
        )))
    }

    /// Fills in the images of a disk that its guest is about to get: the one that a client gives for it, or its volume's.
    pub(super) async fn take_images(&self, disk: &mut Disk, image: Option<&Arc<GivenFile>>) -> Result<()> {
        if let Some(image) = image {
            self.take_given(disk, image).await?;
        }
        self.shared.volumes.plug_disk(&self.name(), disk)
    }

    /// Refuses a guest that would write what others stand on. Until the result is dropped those are told of it who would change
    /// its images. `how` ends the sentence `domain 'web', …`.
    pub(super) async fn reserve_images(&self, deed: &str, how: &str, written: Vec<PathBuf>) -> Result<Begins> {
        let images = &self.shared.images;
        let begins = images.begins(written.clone(), format!("domain '{}', {how}", self.name()));
        images.refuse_in_use(deed, &written, Fate::Written, None, FROZEN).await?;
        Ok(begins)
    }

    /// Has an image that a client gives judged for that disk of its guest, which from then on is known by it.
    async fn take_given(&self, disk: &mut Disk, image: &Arc<GivenFile>) -> Result<()> {
        let target = disk.target.dev.clone();
        let refuse = |why: &str| {
            let name = self.name();
            Err(Error::InvalidArgument(format!("domain '{name}', disk '{target}': a descriptor {why}")))
        };
        if !matches!(disk.kind(), DiskKind::File | DiskKind::Block) || disk.path().is_none() {
            return refuse(
                "is of an image: give its <source file='…'/>, which is shown, or <source dev='…'/> of a block device",
            );
        }
        if !matches!(disk.device(), DiskDevice::Disk | DiskDevice::Cdrom) {
            return refuse("is of a disk or a CD-ROM");
        }
        if disk.backing.as_ref().is_some_and(|store| !store.is_end()) {
            return refuse("is of one image, which stands on no other: make it whole with 'qemu-img convert'");
        }
        let judged = self.driver.judge_image(self.uuid, disk, image).await;
        let given = judged.map_err(|e| Error::from_driver(&self.name(), &format!("give '{target}' an image in"), e))?;
        disk.source.get_or_insert_default().given = Some(given);
        Ok(())
    }

    /// Shows the chains of images that it needs: what runs, what is stored, and its snapshots.
    fn show_chains(&self, to: Shown<'_>) {
        if self.hosted.is_some() {
            return;
        }
        let state = lock(&self.state);
        let whose = format!("domain '{}'", state.name);
        for DiskImages { target, files } in state.guest.iter().flat_map(|guest| images_of(&guest.live)) {
            show_disk(self.uuid, &whose, &target, &files, &ChainKind::Disk, to);
        }
        state.snapshots.defs().for_each(|def| show_snapshot(self.uuid, &state.name, def, to));
        for entry in state.block_jobs.values() {
            let job = &entry.record.job;
            if let BlockWork::Copy { to: copy, .. } = &job.work {
                let whose = || format!("the copy of disk '{}' of {whose}", job.target);
                let files = std::slice::from_ref(&copy.path);
                to(&KeptChain { domain: self.uuid, whose: &whose, files, kind: &ChainKind::Copy });
            }
        }
        let stored = state.stored.clone();
        // Who keeps volumes is asked while nothing is locked.
        drop(state);
        for DiskImages { target, files } in stored.iter().flat_map(|stored| &stored.disks) {
            let places = self.shared.volumes.places_of(files);
            show_disk(self.uuid, &whose, target, places.as_deref().unwrap_or(files), &ChainKind::Disk, to);
        }
    }

    /// Of them those of the guest that runs.
    fn show_running_chains(&self, to: Shown<'_>) {
        let state = lock(&self.state);
        let Some(guest) = state.guest.as_ref().filter(|_| !state.hosted) else { return };
        let whose = format!("domain '{}'", state.name);
        // What is only read stays as it is, the topmost image with it.
        let written = written_by(&guest.live);
        for DiskImages { target, files } in images_of(&guest.live) {
            let is_written = files.first().is_some_and(|top| written.contains(top));
            let kind = if is_written { ChainKind::Disk } else { ChainKind::ReadDisk };
            show_disk(self.uuid, &whose, &target, &files, &kind, to);
        }
    }

    /// The overlays that its snapshots have laid on its disks.
    fn overlays(&self) -> Vec<Overlay> {
        let state = lock(&self.state);
        let mut overlays = Vec::new();
        state.snapshots.defs().for_each(|def| overlays_of(def, &mut overlays));
        overlays
    }
}
