//! What a block job would be: what callers say, held against the disk, the images and whoever else stands on them. Changes nothing.

use super::Domain;
use crate::domain::absolute;
use crate::error::{Error, Result};
use crate::images::{Chain, FROZEN, Fate, Taken};
use crate::lock::lock;
use std::path::{Path, PathBuf};
use virt_model::device::Disk;
use virt_model::device::disk::DiskDevice;
use virt_model::driver::StoredFile;
use virt_model::driver::block_jobs::{BlockJob, BlockWork, ImageLayer};
use virt_model::driver::checkpoints::TrackedDisk;
use virt_model::driver::snapshots::Machine;
use virt_model::xml::{self, Element, shorten};

/// The largest number of bytes that images and hypervisors know.
const MOST: u64 = i64::MAX as u64;

/// How a block job is done.
#[derive(Clone, Copy, Debug, Default)]
pub struct BlockJobOptions {
    /// Bytes a second, at the most; 0: as many as there can be.
    pub bandwidth: u64,
    /// The files of layers that have been committed are removed.
    pub delete: bool,
    /// The image to copy into is there.
    pub reuse_external: bool,
    /// Cancel when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

/// How a disk is resized.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResizeOptions {
    /// It may become smaller, and lose what is at its end.
    pub shrink: bool,
    /// Cancel when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

/// What a caller has asked for.
#[derive(Clone, Debug)]
pub(super) enum Asked {
    Pull { base: String },
    Commit { base: String, top: String },
    Copy { xml: String },
}

/// A block job that has been thought through.
pub(super) struct Planned {
    pub machine: Machine,
    pub job: BlockJob,
    /// The files that are to be removed at its end, as they are now.
    pub removes: Vec<StoredFile>,
}

impl Domain {
    pub(super) async fn plan_block_job(
        &self,
        target: &str,
        asked: &Asked,
        options: BlockJobOptions,
    ) -> Result<Planned> {
        let driver = self.block_jobs()?;
        if options.bandwidth > MOST {
            let text = format!(
                "'bandwidth' {}: no more than {MOST} bytes a second can be told; 0 is no limit",
                options.bandwidth
            );
            return Err(Error::InvalidArgument(text));
        }
        let machine = self.machine().await?;
        let disk = self.disk_of(&machine, target)?.clone();
        self.disks_are_idle(Some(target))?;
        self.is_not_leaving(&disk)?;
        let chain = self.chain_of(&disk)?;
        let work = match asked {
            Asked::Pull { base } => self.pull(&disk, &chain, base)?,
            Asked::Commit { base, top } => self.commit(&disk, &chain, base, top, options.delete)?,
            Asked::Copy { xml } => self.copy(&disk, xml, options.reuse_external).await?,
        };
        let job = BlockJob { target: target.to_owned(), chain, work, bandwidth: options.bandwidth };
        self.nobody_stands_on(&job).await?;
        self.keeps_checkpoints(&job)?;
        let able = driver.check_block_job(&machine, &job).await;
        let removes = able.map_err(|e| self.driver_failed(job.operation(), e))?;
        Ok(Planned { machine, job, removes })
    }

    /// The guest may let go of what it has been asked for at any time.
    fn is_not_leaving(&self, disk: &Disk) -> Result<()> {
        let state = lock(&self.state);
        let leaving =
            state.guest.as_ref().zip(disk.info.alias()).is_some_and(|(guest, alias)| guest.leaving.contains_key(alias));
        match leaving {
            false => Ok(()),
            true => Err(Error::OperationInvalid(format!(
                "domain '{}': disk '{}' is being unplugged: the guest was asked to let go of it",
                state.name, disk.target.dev
            ))),
        }
    }

    /// The machine, and the image that gets another size.
    pub(super) async fn plan_resize(&self, target: &str, size: u64) -> Result<(Machine, PathBuf)> {
        self.block_jobs()?;
        if size == 0 || size > MOST || !size.is_multiple_of(512) {
            let text = format!("a disk of {size} bytes: give a multiple of 512, more than 0 and no more than {MOST}");
            return Err(Error::InvalidArgument(text));
        }
        let machine = self.machine().await?;
        let disk = self.disk_of(&machine, target)?;
        self.disks_are_idle(Some(target))?;
        let own = self.can_be_worked_on(disk)?;
        let deed = format!("cannot resize disk '{target}' of domain '{}'", self.name());
        self.shared.images.refuse_in_use(&deed, std::slice::from_ref(&own), Fate::Written, None, FROZEN).await?;
        Ok((machine, own))
    }

    fn disk_of<'a>(&self, machine: &'a Machine, target: &str) -> Result<&'a Disk> {
        machine
            .def
            .devices
            .disks
            .iter()
            .find(|disk| disk.target.dev == target)
            .ok_or_else(|| Error::NoSuchDevice(format!("domain '{}' has no disk '{}'", self.name(), shorten(target))))
    }

    /// The image of a disk that is the guest's own to write. Refuses others by what they are.
    fn can_be_worked_on(&self, disk: &Disk) -> Result<PathBuf> {
        let why = match disk {
            _ if disk.device() != DiskDevice::Disk => "is no hard disk",
            _ if disk.is_empty() => "has no image",
            _ if disk.is_given() => "has an image that was given by descriptor, which nobody could open again",
            _ if disk.readonly => "is read-only",
            _ if disk.shareable => "may be shared with other machines",
            _ if disk.transient.is_some() => "throws away what is written to it",
            _ if disk.encryption().is_some() => "is encrypted",
            _ => match disk.path() {
                Some(path) => return Ok(path.into()),
                None => "is on a server",
            },
        };
        let (name, target) = (self.name(), &disk.target.dev);
        Err(Error::OperationUnsupported(format!("domain '{name}': disk '{target}' {why}, which excludes it")))
    }

    fn chain_of(&self, disk: &Disk) -> Result<Vec<ImageLayer>> {
        self.can_be_worked_on(disk)?;
        let mut chain = Vec::new();
        for layer in disk.chain().take_while(|layer| layer.path.is_some() || layer.below.is_some()) {
            let path = layer.path.ok_or_else(|| {
                let (name, target) = (self.name(), &disk.target.dev);
                Error::OperationUnsupported(format!("domain '{name}': disk '{target}' stands on an image on a server"))
            })?;
            chain.push(ImageLayer { path: path.into(), format: layer.format.unwrap_or("raw").to_owned() });
        }
        Ok(chain)
    }

    /// Which layer of a disk a caller means: by its path, or as `vda[1]`.
    fn layer(&self, disk: &Disk, chain: &[ImageLayer], what: &str, said: &str) -> Result<usize> {
        let target = &disk.target.dev;
        let place = said.strip_prefix(&**target).and_then(|rest| rest.strip_prefix('[')?.strip_suffix(']'));
        let found = match place {
            Some(number) => number.parse().ok().filter(|number| *number < chain.len()),
            None => chain.iter().position(|layer| layer.path == Path::new(said)),
        };
        found.ok_or_else(|| {
            let (name, said, last) = (self.name(), shorten(said), chain.len() - 1);
            Error::InvalidArgument(format!(
                "domain '{name}': '{said}' ({what}) is no layer of disk '{target}': give a path of its chain, or {target}[0] to \
                 {target}[{last}]"
            ))
        })
    }

    fn pull(&self, disk: &Disk, chain: &[ImageLayer], base: &str) -> Result<BlockWork> {
        let (name, target) = (self.name(), &disk.target.dev);
        let base = match base {
            "" => None,
            said => Some(self.layer(disk, chain, "base", said)?),
        };
        if chain.len() < 2 {
            return Err(Error::OperationInvalid(format!(
                "domain '{name}': disk '{target}' stands on nothing that could be pulled"
            )));
        }
        match base {
            Some(0 | 1) => Err(Error::InvalidArgument(format!(
                "domain '{name}': nothing of disk '{target}' is between its topmost image and that base; give one further below"
            ))),
            base => Ok(BlockWork::Pull { base }),
        }
    }

    fn commit(&self, disk: &Disk, chain: &[ImageLayer], base: &str, top: &str, delete: bool) -> Result<BlockWork> {
        let (name, target) = (self.name(), &disk.target.dev);
        let top = if top.is_empty() { 0 } else { self.layer(disk, chain, "top", top)? };
        let base = if base.is_empty() { chain.len() - 1 } else { self.layer(disk, chain, "base", base)? };
        if chain.len() < 2 {
            return Err(Error::OperationInvalid(format!(
                "domain '{name}': disk '{target}' stands on nothing that could take it in"
            )));
        }
        if base <= top {
            return Err(Error::InvalidArgument(format!(
                "domain '{name}': of disk '{target}' the base is not below the top; a layer goes into one further below"
            )));
        }
        Ok(BlockWork::Commit { top, base, delete })
    }

    /// The image that a `<disk>` tells, to be copied into.
    async fn copy(&self, disk: &Disk, text: &str, reuse: bool) -> Result<BlockWork> {
        let element = xml::read(text, &[]).map_err(|finding| Error::ConfigInvalid(vec![finding]))?;
        let (path, block, format) = self.destination(disk, &element)?;
        self.shared.images.refuse_below(&path, &self.shared.store.own_folders()).await?;
        let deed = format!("cannot copy disk '{}' of domain '{}'", disk.target.dev, self.name());
        let remedy = "choose another file";
        self.shared.images.refuse_in_use(&deed, std::slice::from_ref(&path), Fate::Removed, None, remedy).await?;
        Ok(BlockWork::Copy { to: ImageLayer { path, format }, block, makes: !reuse })
    }

    fn destination(&self, disk: &Disk, element: &Element) -> Result<(PathBuf, bool, String)> {
        let (name, target) = (self.name(), &disk.target.dev);
        let refuse = |why: String| Err(Error::OperationUnsupported(format!("domain '{name}', disk '{target}': {why}")));
        if element.name != "disk" {
            let what = shorten(&element.name);
            let text = format!("domain '{name}': a copy is told as a <disk>, not as a <{what}>");
            return Err(Error::InvalidArgument(text));
        }
        let block = match element.attr("type").unwrap_or("file") {
            "file" => false,
            "block" => true,
            other => {
                return refuse(format!("it is copied into files and block devices, not into '{}'", shorten(other)));
            }
        };
        let known = |child: &Element| match &*child.name {
            "source" => child.elements().next().is_none(),
            "driver" => true,
            "target" => child.attr("dev").is_none_or(|dev| dev == &**target),
            "backingStore" => child.elements().next().is_none(),
            _ => false,
        };
        if let Some(other) = element.elements().find(|child| !known(child)) {
            let what = shorten(&other.name);
            return refuse(format!(
                "a copy is told by <source> and <driver type='…'/>, and <{what}> cannot be said of it"
            ));
        }
        let attribute = if block { "dev" } else { "file" };
        let said = element.child("source").and_then(|source| source.attr(attribute)).unwrap_or_default();
        let path = absolute(said)?;
        let format = element.child("driver").and_then(|driver| driver.attr("type")).unwrap_or(disk.meant_format());
        if !matches!(format, "raw" | "qcow2") {
            return refuse(format!("it is copied into images in raw and qcow2, not in '{}'", shorten(format)));
        }
        Ok((path, block, format.to_owned()))
    }

    /// Refuses what others, or snapshots of this machine, would be the worse for.
    async fn nobody_stands_on(&self, job: &BlockJob) -> Result<()> {
        let (name, target) = (self.name(), &job.target);
        let deed = format!("cannot {} disk '{target}' of domain '{name}'", job.operation());
        let (files, remedy): (Vec<PathBuf>, _) = match &job.work {
            BlockWork::Copy { .. } => return Ok(()),
            BlockWork::Pull { .. } => {
                (job.left().iter().map(|layer| layer.path.clone()).collect(), "delete that snapshot first")
            }
            BlockWork::Commit { .. } => {
                let layers = job.left().iter().chain(job.written());
                (
                    layers.map(|layer| layer.path.clone()).collect(),
                    "delete that snapshot, or make that image whole, first",
                )
            }
        };
        let counts = |chain: &Chain| match &job.work {
            // To read them harms nobody; a record that tells of a chain which is no more does.
            BlockWork::Pull { .. } => chain.domain == self.uuid && chain.snapshot().is_some(),
            // The disk itself is what it is done for.
            _ => chain.domain != self.uuid || chain.snapshot().is_some() || !is_above(chain, job),
        };
        let own: Vec<PathBuf> = job.chain.iter().map(|layer| layer.path.clone()).collect();
        self.shared.images.refuse_in_chains(&deed, &files, &own, counts, remedy).await
    }

    /// Refuses to leave layers whose bitmaps a checkpoint needs: nothing else tells what was written to those. What a checkpoint that
    /// was deleted has left in frozen layers does not count.
    fn keeps_checkpoints(&self, job: &BlockJob) -> Result<()> {
        let state = lock(&self.state);
        let of_layers = |tracked: &TrackedDisk| tracked.target == job.target && needs(&tracked.began, job);
        // What breaks one may pass, so it counts as well until it is deleted.
        match state.checkpoints.all().iter().find(|def| def.tracked.iter().any(of_layers)) {
            None => Ok(()),
            Some(def) => Err(Error::OperationInvalid(format!(
                "cannot {} disk '{}' of domain '{}': checkpoint '{}' needs the bitmaps in the layers that would go; delete it \
                 first",
                job.operation(),
                job.target,
                state.name,
                def.name
            ))),
        }
    }

    /// From now on nobody else writes what is written, until the result is dropped: by then the record tells.
    pub(super) async fn take_written(&self, job: &BlockJob) -> Result<Option<Taken>> {
        let Some(written) = job.written() else { return Ok(None) };
        let taken = self.shared.images.take(&written.path, format!("{}, which begins,", self.of_disk(job))).await;
        taken.map(Some).map_err(|by| {
            let (name, file) = (self.name(), written.path.display());
            Error::InUse(format!("cannot {} domain '{name}': {file} is what {by} writes", job.operation()))
        })
    }

    /// Of the layers that have been committed, as they were when that began, those that nobody needs.
    pub(super) async fn to_be_removed(&self, layers: Vec<StoredFile>) -> Vec<StoredFile> {
        let files: Vec<PathBuf> = layers.iter().map(|layer| layer.path.clone()).collect();
        let users = self.shared.images.users_of(&files, Fate::Removed, None).await;
        let free = layers.into_iter().filter(|layer| match users.get(&layer.path) {
            None => true,
            Some(users) => {
                let users = users.join(", ");
                tracing::warn!(uuid = %self.uuid, "{} is not removed: {users} stands on it", layer.path.display());
                false
            }
        });
        free.collect()
    }
}

/// Whether a chain of the machine's own goes through the layers that are committed.
fn is_above(chain: &Chain, job: &BlockJob) -> bool {
    let BlockWork::Commit { base, .. } = &job.work else { return false };
    let own = job.chain.iter().take(base + 1).map(|layer| &layer.path);
    chain.files.iter().take(base + 1).eq(own)
}

/// Whether a checkpoint that began in that layer has bitmaps in one that the disk does not stand on afterwards.
fn needs(began: &Path, job: &BlockJob) -> bool {
    // All layers from the topmost down to that have them; of one that is none of its layers nobody knows.
    let deepest = job.chain.iter().position(|layer| layer.path == began).unwrap_or(job.chain.len());
    let first_left = match &job.work {
        BlockWork::Pull { .. } => 1,
        BlockWork::Commit { top, .. } => *top,
        BlockWork::Copy { .. } => 0,
    };
    deepest >= first_left
}
