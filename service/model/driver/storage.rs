//! The contract for storage: what a host does with pools and volumes. Which pools there are, what they are called, who may do what
//! and who needs a volume is the service's matter.
//!
//! ```text
//!  build ─▶ open ─▶ OpenPool: survey, then follow and look ─▶ dropped when the pool is stopped
//!                     ├─ create, copy, resize, wipe, upload, download, delete: each all of it, or nothing
//!                     └─ serve: until the client leaves
//! ```
//!
//! Of a volume that is made nothing has a name before all of it is on disk: whoever is killed leaves nothing. What is known of a
//! file and cannot be told from it (its format, which a guest could forge) is kept by the service, and comes with each look.

use super::{DriverError, GivenFile};
use crate::domain::value::choices;
use crate::storage::pool::{PoolDef, PoolKind, PoolSource};
use crate::storage::volume::VolumeDef;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// What a host can do with storage.
#[async_trait]
pub trait Storage: Send + Sync {
    /// What it can do with each kind of pool. Waits for nothing.
    fn kinds(&self) -> Vec<PoolAbility>;

    /// Refuses a pool that [`Storage::open`] would refuse, whatever is on the host. Waits for nothing.
    fn check(&self, def: &PoolDef) -> Result<(), DriverError>;

    /// Refuses a volume whose document asks for what no volume of such a pool can be here. Waits for nothing.
    fn check_volume(&self, pool: PoolKind, def: &VolumeDef) -> Result<(), DriverError>;

    /// What pools of that kind could come from, of what nobody on the host uses; of the server that is `asked`, if their kind comes from
    /// one. Errors: `Unsupported` where that is not searched; `Argument` where a server is to be asked and none is, or the reverse.
    async fn find_sources(&self, kind: PoolKind, asked: Option<&PoolSource>) -> Result<Vec<PoolSource>, DriverError>;

    /// Makes what volumes are to be in. Without `overwrite`, what is there and is something stays. Repeatable.
    async fn build(&self, def: &PoolDef, overwrite: bool, work: &dyn Work) -> Result<(), DriverError>;

    /// Removes what volumes were in, if nothing is in it.
    async fn delete(&self, def: &PoolDef, work: &dyn Work) -> Result<(), DriverError>;

    /// Makes it usable, and takes away what was being made in it when somebody was killed. It stays usable until it is
    /// [closed](OpenPool::close), whatever becomes of virtd; who opens it again finds it so. Error: nothing was done to the host.
    async fn open(&self, def: &PoolDef, work: &dyn Work) -> Result<Arc<dyn OpenPool>, DriverError>;

    /// The same as [`OpenPool::close`] for a pool that a virtd before this one opened, and this one could not.
    async fn close(&self, def: &PoolDef) -> Result<(), DriverError>;

    /// The block devices that a pool is on, whose bytes are nobody else's while it is active. Error: that cannot be told.
    async fn devices(&self, def: &PoolDef) -> Result<Vec<PoolDevice>, DriverError>;
}

/// A block device that a pool is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolDevice {
    /// Where it is.
    pub path: PathBuf,
    /// Others that have bytes of it: the disk that it is a part of, its partitions, and what it is made from. What is made of it is
    /// among them as far as it is no volume of the pool's.
    pub overlapping: Vec<PathBuf>,
    /// Its volumes, and what is made of them, where the device is lost with all of them when the pool is built.
    pub volumes: Vec<PathBuf>,
}

/// A pool that is usable.
#[async_trait]
pub trait OpenPool: Send + Sync {
    /// Where its volumes are, without links on the way, as it was found. Waits for nothing.
    fn real_path(&self) -> &Path;

    /// What can be done with it: of what its kind [can](PoolAbility::features) as much as its storage can. Waits for nothing.
    fn features(&self) -> &'static [&'static str];

    /// Its volumes, and how much room there is.
    async fn survey(&self, known: &KnownFormats) -> Result<Survey, DriverError>;

    /// Some volumes as they are now; those that are not in the answer are not there, or are no volumes.
    async fn look(&self, names: Vec<String>, known: &KnownFormats) -> Result<Vec<VolumeLook>, DriverError>;

    /// How much room there is.
    async fn room(&self) -> Result<Room, DriverError>;

    /// What changes in it from now on, whoever changes it; `None` where that cannot be told.
    async fn follow(&self) -> Result<Option<mpsc::Receiver<PoolChange>>, DriverError>;

    /// Makes a volume. Errors: `Exists`, `NoSpace`; nothing is left of it then.
    async fn create(&self, new: NewVolume, work: Arc<dyn Work>) -> Result<VolumeLook, DriverError>;

    /// Gives it another size.
    async fn resize(&self, volume: &VolumeAt, to: NewSize, work: Arc<dyn Work>) -> Result<(), DriverError>;

    /// Overwrites all that it holds; its size and format stay.
    async fn wipe(&self, volume: &VolumeAt, how: Wiping, work: Arc<dyn Work>) -> Result<(), DriverError>;

    /// Writes what is read of a file: all of it is the volume then, or, with a `part`, that part of it is. What is a
    /// [block device](crate::storage::volume::VolumeKind::Block) is always written in place, and stays as long as it is: behind what
    /// was read are zeroes then.
    async fn upload(
        &self,
        volume: &VolumeAt,
        from: GivenFile,
        part: Option<Part>,
        sparse: bool,
        work: Arc<dyn Work>,
    ) -> Result<(), DriverError>;

    /// Writes what it holds into a file. `sparse`: what holds nothing is left out of a file in which that can be done.
    async fn download(
        &self,
        volume: &VolumeAt,
        to: GivenFile,
        part: Option<Part>,
        sparse: bool,
        work: Arc<dyn Work>,
    ) -> Result<(), DriverError>;

    /// Removes it. Nothing need be there.
    async fn delete(&self, volume: &VolumeAt, work: Arc<dyn Work>) -> Result<(), DriverError>;

    /// Opens it, for a copy of it to be made.
    async fn hold(&self, volume: &VolumeAt) -> Result<GivenFile, DriverError>;

    /// Serves it by NBD to one client, who has the connection: an export named '', which may be `writable`.
    async fn serve(&self, volume: &VolumeAt, writable: bool) -> Result<Served, DriverError>;

    /// Whether somebody has it open who writes it, and where it is to be `written`, anybody at all: QEMU and its tools say so.
    async fn is_open_elsewhere(&self, name: &str, written: bool) -> Result<bool, DriverError>;

    /// Takes back what is done to the host for it, whoever did that. Error: that is there still, and the pool can be used as before;
    /// one that comes back too late may be done yet, and the pool answers nothing any more.
    async fn close(&self) -> Result<(), DriverError>;

    /// Takes back what [`Storage::open`] did to the host this time: what was there before stays. Errors: as [`OpenPool::close`].
    async fn take_back(&self) -> Result<(), DriverError>;
}

/// A volume that is served to a client.
pub struct Served {
    /// The client's end of the connection.
    pub connection: OwnedFd,
    /// Comes to its end when the client has closed that, and nobody has the volume open for them any more.
    pub ended: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// Long work: what it tells while it goes on, and how it is told to stop. What it holds is free when it is dropped: whoever changes a
/// file in a thread of its own has it there, too, until that thread ends.
pub trait Work: Send + Sync {
    /// So many bytes of so many are done. From the first time on the file may be another.
    fn progress(&self, done: u64, total: u64);

    /// Something that stays is done next.
    fn step(&self);

    /// The volume that is made, or replaced, is to have that capacity, in bytes; from the first time on no less. Error: `TooMany`,
    /// if whose it is may not have so much.
    fn grows(&self, capacity: u64) -> Result<(), DriverError>;

    /// A file of that format gets a name next: it is noted what it is, before anybody can find it, and by which secret it is
    /// opened, where that is known. Blocks.
    fn names(&self, id: FileId, name: &str, format: &str, secret: Option<&str>) -> Result<(), DriverError>;

    /// Fires when it is no longer wanted.
    fn cancelled(&self) -> &CancellationToken;
}

/// What a host can do with one kind of pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolAbility {
    /// The kind.
    pub kind: PoolKind,
    /// Why it cannot be started, if so.
    pub lacks: Option<String>,
    /// Formats of volumes that are made.
    pub volume_formats: &'static [&'static str],
    /// What it can come from.
    pub source_formats: &'static [&'static str],
    /// What can be done with it.
    pub features: &'static [&'static str],
    /// What it could come from is [found](Storage::find_sources).
    pub finds_sources: bool,
}

/// Which file it is, whatever it is called: a file that takes its name is another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// Its number in its file system.
    pub number: u64,
    /// When it was made, in nanoseconds; 0 where that is not known.
    pub born: u64,
}

/// The formats of files that were made here, or that a definition names.
pub type KnownFormats = Arc<HashMap<FileId, String>>;

/// How much room there is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// In all.
    pub capacity: u64,
    /// Taken.
    pub allocation: u64,
    /// To be had.
    pub available: u64,
}

/// What is in a pool.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Survey {
    /// How much room there is.
    pub room: Room,
    /// Its volumes.
    pub volumes: Vec<VolumeLook>,
    /// Files whose names nobody could write.
    pub unnameable: u32,
}

/// A volume as it is found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VolumeLook {
    /// Its name in the pool.
    pub name: String,
    /// Which file it is.
    pub id: FileId,
    /// By which it is known on the host, whatever it is called; its path where there is nothing better.
    pub key: Option<String>,
    /// Its format, as it is known or else as it begins.
    pub format: String,
    /// What a guest sees, in bytes.
    pub capacity: u64,
    /// What it takes, in bytes.
    pub allocation: u64,
    /// Its length, in bytes.
    pub physical: u64,
    /// What its header says that it stands on.
    pub backing: Option<BackingLook>,
    /// Part of what it holds is in a file beside it, which is never followed.
    pub has_data_file: bool,
    /// The volume of the same pool that it is a snapshot of, and goes with, where it is no file.
    pub origin: Option<String>,
    /// How many snapshots are in it.
    pub snapshots: u32,
    /// It can be read with a secret only.
    pub encrypted: bool,
    /// What is wrong with it.
    pub broken: Option<String>,
    /// Its owner, group and mode.
    pub permissions: (u32, u32, u32),
}

/// What a header names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingLook {
    /// As it is written there.
    pub text: String,
    /// The format of that, if it says one.
    pub format: Option<String>,
    /// Where it leads, if to a file of this host; nothing has been looked at.
    pub place: Option<PathBuf>,
}

/// What has changed in a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolChange {
    /// These names have come, or gone.
    Names(BTreeSet<String>),
    /// These volumes have been written.
    Sizes(BTreeSet<String>),
    /// More than could be told.
    Much,
    /// It is not there any more.
    Lost,
}

/// A volume that is there, as it was judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeAt {
    /// Its name.
    pub name: String,
    /// Which file it is: no other is touched.
    pub id: FileId,
    /// Its format.
    pub format: String,
    /// What a guest sees, in bytes.
    pub capacity: u64,
    /// What it stands on, from the next image down, each with its format.
    pub below: Vec<(PathBuf, String)>,
}

/// A volume that is to be made.
#[derive(Debug)]
pub struct NewVolume {
    /// Its name.
    pub name: String,
    /// Its format: `raw`, `qcow2`, `luks`.
    pub format: String,
    /// What a guest sees, in bytes.
    pub capacity: u64,
    /// What is taken for it at once, in bytes; of raw ones.
    pub allocation: u64,
    /// How much is laid out at once.
    pub preallocation: Preallocation,
    /// What only qcow2 has.
    pub qcow2: Qcow2Options,
    /// Its file system is not to lay what is overwritten elsewhere.
    pub nocow: bool,
    /// Its owner and group, if not whoever makes it.
    pub owner: (Option<u32>, Option<u32>),
    /// Its mode.
    pub mode: u32,
    /// The uuid or the usage of the secret that opens it, if it is encrypted.
    pub secret: Option<String>,
    /// What it holds.
    pub content: Content,
}

/// What a new volume holds.
#[derive(Debug)]
pub enum Content {
    /// Nothing.
    Empty,
    /// What is in that image, until it is written.
    Overlay {
        /// The image.
        base: PathBuf,
        /// Its format.
        format: String,
    },
    /// What a client gives, to its end; it is in the format wanted.
    Given(GivenFile),
    /// The same bytes as a volume of an open pool.
    Copy {
        /// That file, open to be read.
        from: GivenFile,
        /// Whether blocks are shared with it.
        reflink: Reflink,
    },
    /// What a guest would see of an image, in the format wanted.
    Converted {
        /// The image and what it stands on, from the topmost down, each with its format.
        chain: Vec<(PathBuf, String)>,
    },
}

choices! {
    /// How much of a new volume is laid out at once.
    pub enum Preallocation { Off = "off", Metadata = "metadata", Falloc = "falloc", Full = "full", }
}

impl Preallocation {
    /// Whether all of the volume is written, or taken.
    pub fn writes_all(self) -> bool {
        matches!(self, Preallocation::Falloc | Preallocation::Full)
    }
}

choices! {
    /// Whether a copy shares blocks with what it is copied from.
    pub enum Reflink { Auto = "auto", Always = "always", Never = "never", }
}

choices! {
    /// With what a volume is overwritten.
    pub enum Wiping { Zero = "zero", Discard = "discard", Random = "random", }
}

/// What only qcow2 has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Qcow2Options {
    /// Its version, `0.10` or `1.1`.
    pub compat: Option<String>,
    /// The unit in which it grows, in bytes.
    pub cluster_size: Option<u64>,
    /// Counts of references may lag behind.
    pub lazy_refcounts: bool,
    /// Parts of clusters are kept for themselves.
    pub extended_l2: bool,
}

/// The size that a volume is to get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewSize {
    /// What a guest sees, in bytes.
    pub capacity: u64,
    /// It may become smaller, and loses what is behind.
    pub shrink: bool,
    /// What is new is taken at once.
    pub allocate: bool,
}

/// A part of a volume; all of it, if nothing is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes; to the end if not said.
    pub length: Option<u64>,
}
