//! The contract for block jobs: the images of one disk are copied, merged or made whole while the guest runs.
//!
//! ```text
//!  check ─▶ recorded ─▶ begin ─▶ follow ─▶ ready, or as far as it goes by itself
//!                                  └─▶ conclude: the guest stands, the images hold the same, it changes over
//!                                  └─▶ settle: which images count ─▶ configurations ─▶ clean_up ─▶ record gone
//! ```
//!
//! Whatever is killed, [`BlockJobs::settle_block_job`] tells from the record alone which images count: those that the disk stood on,
//! or those that it was to stand on.

use super::operation::Machine;
use super::{DriverError, Instance, StoredFile};
use crate::device::Disk;
use crate::device::disk::DiskKind;
use crate::device::source::DiskSource;
use crate::xml::Element;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::path::{Path, PathBuf};

/// An image, and how it is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayer {
    /// A file or block device.
    pub path: PathBuf,
    /// `raw`, `qcow2`, …
    pub format: String,
}

/// Work on the images of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockJob {
    /// `vda`
    pub target: String,
    /// What the disk stood on when it began, from the topmost image down.
    pub chain: Vec<ImageLayer>,
    /// What is done.
    pub work: BlockWork,
    /// How much of it at the most, in bytes a second; 0: as much as there can be.
    pub bandwidth: u64,
}

/// What is done to the images of a disk. Layers are told by their places in its chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockWork {
    /// The topmost image takes in what is below it, down to `base`, on which it stands then; `None`: all, and it stands on nothing.
    Pull {
        /// What stays below.
        base: Option<usize>,
    },
    /// What is in the layers from `top` on goes into `base`.
    Commit {
        /// The first of them; 0 is what the guest writes.
        top: usize,
        /// What takes them in.
        base: usize,
        /// Their files are removed then.
        delete: bool,
    },
    /// All of it is copied into another image, which the guest writes then.
    Copy {
        /// That image.
        to: ImageLayer,
        /// It is a block device.
        block: bool,
        /// It is made for that, and removed where it comes to nothing.
        makes: bool,
    },
}

/// How far the end of a block job has come, as it is recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStage {
    /// The image that is copied into is being made: what is there and empty is ours.
    #[serde(default)]
    pub making: bool,
    /// The image that is copied into has been made.
    pub made: bool,
    /// Which file that is: the number of its file system, and its own there. Nothing where an earlier virtd has made it.
    #[serde(default)]
    pub image: Option<(u64, u64)>,
    /// It is to be finished as soon as it is ready.
    pub finishing: bool,
    /// The guest stands for it, and is to go on.
    pub resume: bool,
    /// Both hold the same: from here on what the disk is to stand on counts.
    pub same: bool,
}

/// How a block job stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockStanding {
    /// It is done but for its last step.
    Ready,
    /// It has ended; why, if it has failed.
    Ended(Option<String>),
}

/// What a driver keeps for as long as a block job is under way.
#[derive(Default)]
pub struct Held(pub Option<Box<dyn Any + Send + Sync>>);

/// Where a driver writes down how far the end of a block job is.
#[async_trait]
pub trait BlockNotes: Send + Sync {
    /// Keeps the stage, durably. On failure nothing may be changed.
    async fn keep(&self, stage: BlockStage) -> Result<(), DriverError>;

    /// What was last kept.
    fn stage(&self) -> BlockStage;

    /// A change has been made that a restart would find: called between any two of them.
    fn step(&self, what: &str);
}

/// What a driver can do with the disks of a guest that runs.
#[async_trait]
pub trait BlockJobs: Send + Sync {
    /// Refuses what cannot be done, by name. Gives the files that are to be removed at its end, as they are now. Changes nothing.
    async fn check_block_job(&self, machine: &Machine, job: &BlockJob) -> Result<Vec<StoredFile>, DriverError>;

    /// Begins it. What is returned is kept until it has ended. After a failure there is something to [clean
    /// up](BlockJobs::clean_up_block_job).
    async fn begin_block_job(
        &self,
        machine: &Machine,
        job: &BlockJob,
        notes: &dyn BlockNotes,
    ) -> Result<Held, DriverError>;

    /// The same for one that an earlier virtd has begun.
    async fn take_up_block_job(&self, machine: &Machine, job: &BlockJob) -> Result<Held, DriverError>;

    /// Waits until it is ready, or, if it has been `ready`, until it is so no more. `progress` is told bytes done and in all.
    async fn follow_block_job(
        &self,
        guest: &dyn Instance,
        job: &BlockJob,
        ready: bool,
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<BlockStanding, DriverError>;

    /// Does the last step of one that is ready, while the guest stands still for a moment. On failure it goes on as before. `false`:
    /// the guest writes more than can be copied in a moment; both go on as before, and it is to be tried again.
    async fn conclude_block_job(
        &self,
        machine: &Machine,
        job: &BlockJob,
        notes: &dyn BlockNotes,
    ) -> Result<bool, DriverError>;

    /// Ends it, if it has not ended, without its last step.
    async fn cancel_block_job(&self, guest: &dyn Instance, job: &BlockJob) -> Result<(), DriverError>;

    /// Says whether the disk stands on what it was to stand on; without a guest it is seen to that it does, if both hold the `same`.
    /// Repeatable.
    async fn settle_block_job(&self, machine: &Machine, job: &BlockJob, same: bool) -> Result<bool, DriverError>;

    /// Leaves nothing of it that is of no use: of one that is not `done`, the image that has been made for it; and these files, as
    /// far as they are still what they were. Repeatable, and to be repeated on failure.
    async fn clean_up_block_job(
        &self,
        machine: &Machine,
        job: &BlockJob,
        done: bool,
        stage: BlockStage,
        remove: Vec<StoredFile>,
    ) -> Result<(), DriverError>;

    /// The first writing of a disk's image beyond that offset is told, once ([`DeviceEvent::WrittenBeyond`]); 0: none is.
    ///
    /// [`DeviceEvent::WrittenBeyond`]: super::DeviceEvent::WrittenBeyond
    async fn set_write_threshold(&self, guest: &dyn Instance, disk: &Disk, threshold: u64) -> Result<(), DriverError>;

    /// Gives a disk another size, in bytes, while its guest runs or, without one, in its image. Returns when that is so.
    /// Errors: `Argument` if it would be smaller and is not to `shrink`; `Unsupported` where such an image has one size.
    async fn resize_disk(&self, machine: &Machine, target: &str, size: u64, shrink: bool) -> Result<(), DriverError>;
}

impl BlockJob {
    /// The word for it.
    pub fn operation(&self) -> &'static str {
        match self.work {
            BlockWork::Pull { .. } => "block-pull",
            BlockWork::Commit { .. } => "block-commit",
            BlockWork::Copy { .. } => "block-copy",
        }
    }

    /// Whether it goes on until somebody finishes it.
    pub fn waits_to_be_finished(&self) -> bool {
        matches!(self.work, BlockWork::Commit { top: 0, .. } | BlockWork::Copy { .. })
    }

    /// The layers that the disk does not stand on afterwards.
    pub fn left(&self) -> &[ImageLayer] {
        let chain = &self.chain;
        match &self.work {
            BlockWork::Pull { base } => &chain[1..base.unwrap_or(chain.len())],
            BlockWork::Commit { top, base, .. } => &chain[*top..*base],
            BlockWork::Copy { .. } => chain,
        }
    }

    /// What the disk stands on afterwards, from the topmost image down.
    pub fn chain_after(&self) -> Vec<&ImageLayer> {
        let chain = &self.chain;
        match &self.work {
            BlockWork::Pull { base } => chain[..1].iter().chain(&chain[base.unwrap_or(chain.len())..]).collect(),
            BlockWork::Commit { top, base, .. } => chain[..*top].iter().chain(&chain[*base..]).collect(),
            BlockWork::Copy { to, .. } => vec![to],
        }
    }

    /// The image that is written, other than the one that the guest writes.
    pub fn written(&self) -> Option<&ImageLayer> {
        match &self.work {
            BlockWork::Pull { .. } => None,
            BlockWork::Commit { base, .. } => self.chain.get(*base),
            BlockWork::Copy { to, .. } => Some(to),
        }
    }

    /// Whether a disk stands on what it stood on when this began.
    pub fn is_about(&self, disk: &Disk) -> bool {
        let chain = self.chain.iter().map(|layer| &*layer.path);
        disk.target.dev == self.target && disk.files().iter().map(|file| &**file).eq(chain)
    }

    /// Has a disk stand on what it is to stand on afterwards.
    pub fn apply_to(&self, disk: &mut Disk) {
        match &self.work {
            BlockWork::Pull { base: Some(base) } => disk.lose_layers(1, base - 1),
            BlockWork::Pull { base: None } => disk.backing = Some(Box::default()),
            BlockWork::Commit { top: 0, base, .. } => (0..*base).for_each(|_| _ = disk.give_way()),
            BlockWork::Commit { top, base, .. } => disk.lose_layers(*top, base - top),
            BlockWork::Copy { to, block, .. } => {
                disk.kind = Some(if *block { DiskKind::Block } else { DiskKind::File });
                disk.source = Some(source_at(&to.path, *block));
                disk.backing = Some(Box::default());
                let driver = disk.driver.get_or_insert_default();
                driver.format = Some(to.format.clone());
                // Other images have no such tables.
                driver.metadata_cache = driver.metadata_cache.take().filter(|_| to.format == "qcow2");
            }
        }
    }

    /// What is shown of it in the configuration of what runs, where the guest's writes go into another image, too.
    pub fn mirror(&self, ready: bool) -> Option<Element> {
        let (image, block, word) = match &self.work {
            BlockWork::Copy { to, block, .. } => (to, *block, "copy"),
            BlockWork::Commit { top: 0, base, .. } => (self.chain.get(*base)?, false, "active-commit"),
            _ => return None,
        };
        let path = image.path.to_string_lossy();
        let mut mirror = Element::new("mirror").with_attr("type", if block { "block" } else { "file" });
        if word == "copy" {
            mirror = mirror.with_attr("file", &*path).with_attr("format", &*image.format);
        }
        mirror = mirror.with_attr("job", word);
        if ready {
            mirror = mirror.with_attr("ready", "yes");
        }
        mirror.push(Element::new("format").with_attr("type", &*image.format));
        mirror.push(Element::new("source").with_attr(if block { "dev" } else { "file" }, &*path));
        Some(mirror)
    }
}

fn source_at(path: &Path, block: bool) -> DiskSource {
    let path = Some(path.to_string_lossy().into_owned());
    let (file, dev) = if block { (None, path) } else { (path, None) };
    DiskSource { file, dev, ..DiskSource::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::DomainDef;

    fn disk() -> Disk {
        let layer = |file: &str, below: &str| {
            format!("<backingStore type='file'><format type='qcow2'/><source file='{file}'/>{below}</backingStore>")
        };
        let below = layer("/c", &layer("/b", &layer("/a", "<backingStore/>")));
        let text = format!(
            "<domain type='test'><name>a</name><memory>1</memory><devices><disk type='file'><driver type='qcow2'/>\
             <source file='/d'/>{below}<target dev='vda'/></disk></devices></domain>"
        );
        DomainDef::parse(&text).expect("a document").devices.disks.remove(0)
    }

    fn after(work: BlockWork) -> String {
        let mut disk = disk();
        let chain = disk.files().into_iter().map(|path| ImageLayer { path, format: "qcow2".to_owned() });
        let job = BlockJob { target: "vda".to_owned(), chain: chain.collect(), work, bandwidth: 0 };
        assert!(job.is_about(&disk));
        job.apply_to(&mut disk);
        let left: Vec<String> = job.left().iter().map(|layer| layer.path.display().to_string()).collect();
        let files: Vec<String> = disk.files().iter().map(|file| file.display().to_string()).collect();
        assert!(!left.iter().any(|gone| files.contains(gone)), "{left:?} {files:?}");
        assert!(job.chain_after().into_iter().map(|layer| &layer.path).eq(&disk.files()));
        format!("{} without {}", files.join(" "), left.join(" "))
    }

    #[test]
    fn a_disk_stands_on_what_is_left_of_its_chain() {
        assert_eq!(after(BlockWork::Pull { base: None }), "/d without /c /b /a");
        assert_eq!(after(BlockWork::Pull { base: Some(2) }), "/d /b /a without /c");
        assert_eq!(after(BlockWork::Pull { base: Some(3) }), "/d /a without /c /b");
        let commit = |top, base| BlockWork::Commit { top, base, delete: false };
        assert_eq!(after(commit(0, 1)), "/c /b /a without /d");
        assert_eq!(after(commit(0, 3)), "/a without /d /c /b");
        assert_eq!(after(commit(1, 2)), "/d /b /a without /c");
        assert_eq!(after(commit(1, 3)), "/d /a without /c /b");
        assert_eq!(after(commit(2, 3)), "/d /c /a without /b");
        let to = ImageLayer { path: "/e".into(), format: "raw".to_owned() };
        assert_eq!(after(BlockWork::Copy { to, block: false, makes: true }), "/e without /d /c /b /a");
    }

    #[test]
    fn a_copy_is_shown_as_libvirt_shows_it() {
        let to = ImageLayer { path: "/e".into(), format: "raw".to_owned() };
        let work = BlockWork::Copy { to, block: false, makes: true };
        let job = BlockJob { target: "vda".to_owned(), chain: Vec::new(), work, bandwidth: 0 };
        let shown = job.mirror(true).expect("shown").write();
        assert!(shown.contains("job=\"copy\" ready=\"yes\"") || shown.contains("job='copy' ready='yes'"), "{shown}");
    }
}
