//! Storage of this host: pools that are folders, file systems on devices and folders of other hosts that are mounted on one, volume
//! groups, and whole disks.
//!
//! ```text
//!  HostStorage ───────▶ kind.rs      which driver has which kind of pool
//!              ─build─▶ build.rs     the folder, and the file system on the device
//!              ───────▶ logical.rs    the volume group: made, activated, removed
//!              ───────▶ disk.rs      the whole disk: given a partition table, opened, rid of it
//!                       whole_disk.rs   the disk held alone, and the kernel told; partitions.rs, gpt.rs, dos.rs: its table
//!                       DiskPool ─ disk_pool.rs   what is done to each of its partitions
//!                       VolumeGroup ─ group.rs    what is done to each of its volumes
//!                                   ─ block.rs    the device of one
//!                                   ─ leftovers.rs  what was under way in it when somebody was killed
//!              ─open──▶ folders.rs   the folder of a pool whose volumes are files
//!                       mounts.rs    what is mounted and unmounted: a device's file system, or
//!                       share.rs     a folder of another host's; mount_table.rs tells what is there
//!              ─sources─▶ sources.rs  what pools could come from
//!                       held.rs      which folder is which pool's
//!                       FolderPool ─ pool.rs      what is done to each volume
//!                                  ─ contents.rs  what clients give and take by descriptor
//!                                  ─ folder.rs    the folder that is held, and the files beneath it
//!                                  ─ look.rs      what a volume is, by its header
//!                                  ─ watch.rs     what changes, whoever changes it
//!                                  ─ draft.rs     a file that gets its name when all of it is on disk
//!                                  ─ fill.rs      what it holds
//!                                  ─ serve.rs     read, or written, by NBD
//! ```
//!
//! Each folder is far away: all of it is done in errands with a limit, and a folder that does not answer costs itself alone.

#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys")]
mod block;
mod build;
mod contents;
mod disk;
mod disk_pool;
mod dos;
mod draft;
mod fill;
mod folder;
mod folders;
mod gpt;
mod group;
mod held;
mod kind;
mod leftovers;
mod logical;
mod look;
#[allow(clippy::disallowed_methods, reason = "the kernel's own table below /proc")]
mod mount_table;
#[allow(clippy::disallowed_methods, reason = "the kernel's own table below /proc, and the devices that it names")]
mod mounts;
mod partitions;
mod pool;
mod serve;
mod share;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys")]
mod sources;
pub mod table;
#[cfg(test)]
mod tests;
mod watch;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys and /proc")]
mod whole_disk;

use crate::host::lender::Lender;
use crate::host::workers::{Errand, Workers};
use async_trait::async_trait;
use folder::PoolFolder;
use held::Held;
use kind::{PoolDriver, Search, driver_of};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{OpenPool, PoolAbility, PoolDevice, Storage, Work};
use virt_model::storage::pool::{PoolDef, PoolKind, PoolSource};
use virt_model::storage::source_formats;
use virt_model::storage::volume::VolumeDef;
use virt_model::xml::Finding;

/// By whose rights tools are run; asked anew for each, and may block.
pub type ToolRights = Arc<dyn Fn() -> Result<Lender, DriverError> + Send + Sync>;

/// What opens encrypted volumes, by the uuid or the usage of a secret; may block.
pub type Secrets = Arc<dyn Fn(&str) -> Result<Vec<u8>, DriverError> + Send + Sync>;

/// The storage of this host.
pub struct HostStorage {
    workers: Workers,
    rights: ToolRights,
    secrets: Secrets,
    /// A folder of ours.
    runtime: PathBuf,
    /// We act for others: who could have put a link somewhere counts.
    wary: bool,
    held: Held,
    groups: logical::HeldGroups,
    /// For file systems.
    search: sources::Search,
    /// For volume groups.
    search_of_groups: sources::Search,
    /// For whole disks.
    search_of_disks: sources::Search,
    disks: whole_disk::Disks,
    /// Who holds it asks another host what it offers.
    asks: tokio::sync::Mutex<()>,
    /// Why no share is mounted here, if so: looked for once, since whoever is told it cannot wait for it.
    lacks_for_shares: Option<String>,
}

impl HostStorage {
    /// Whose tools run by those rights; `runtime`: a folder of ours, for what ends with us; `wary`: for others than us. Looks for tools.
    pub fn new(rights: ToolRights, secrets: Secrets, runtime: &Path, wary: bool) -> HostStorage {
        let (workers, held, runtime) = (Workers::default(), Held::default(), runtime.to_owned());
        HostStorage {
            workers,
            rights,
            secrets,
            runtime,
            wary,
            held,
            groups: logical::HeldGroups::default(),
            search: sources::Search::default(),
            search_of_groups: sources::Search::default(),
            search_of_disks: sources::Search::default(),
            disks: whole_disk::Disks::default(),
            asks: tokio::sync::Mutex::default(),
            lacks_for_shares: share::lacks(),
        }
    }

    /// Takes away what may be mounted in vain since virtd was killed. Before any pool is opened. Blocks.
    pub fn clear_leftovers(&self) {
        if self.wary {
            share::clear_asides(&self.runtime);
        }
    }

    fn errand(def: &PoolDef, work: &dyn Work) -> Errand {
        Errand::new(def.uuid, path_of(def).display().to_string()).until(work.cancelled())
    }
}

#[async_trait]
impl Storage for HostStorage {
    fn kinds(&self) -> Vec<PoolAbility> {
        let with_tools = |ability: PoolAbility| match self.lacks(ability.kind) {
            lacks if lacks == ability.lacks => ability,
            lacks => PoolAbility { lacks, volume_formats: &[], features: &[], finds_sources: false, ..ability },
        };
        self.kinds_with_tools().into_iter().map(with_tools).collect()
    }

    fn check(&self, def: &PoolDef) -> Result<(), DriverError> {
        self.driver(def).map(drop)
    }

    fn check_volume(&self, pool: PoolKind, def: &VolumeDef) -> Result<(), DriverError> {
        let mut findings = table::refused_of_volume(def);
        findings.extend(driver_of(pool).map(|driver| driver.refused_of_volume(def)).unwrap_or_default());
        if findings.is_empty() { Ok(()) } else { Err(DriverError::Config(findings)) }
    }

    async fn find_sources(&self, kind: PoolKind, asked: Option<&PoolSource>) -> Result<Vec<PoolSource>, DriverError> {
        let not_searched =
            || DriverError::Unsupported(format!("what pools of type '{kind}' could come from is not searched here"));
        let driver = driver_of(kind).filter(|driver| driver.search() != Search::None).ok_or_else(not_searched)?;
        match self.lacks(kind) {
            Some(why) => Err(DriverError::Unsupported(why)),
            None if driver.search() == Search::Host && asked.is_some() => Err(DriverError::Argument(format!(
                "a search for what pools of type '{kind}' could come from has no document: leave it empty"
            ))),
            None => driver.find_sources(self, asked).await,
        }
    }

    async fn build(&self, def: &PoolDef, overwrite: bool, work: &dyn Work) -> Result<(), DriverError> {
        self.driver(def)?.build(self, def, overwrite, work).await
    }

    async fn delete(&self, def: &PoolDef, work: &dyn Work) -> Result<(), DriverError> {
        self.driver(def)?.delete(self, def, work).await
    }

    async fn open(&self, def: &PoolDef, work: &dyn Work) -> Result<Arc<dyn OpenPool>, DriverError> {
        self.driver(def)?.open(self, def, work).await
    }

    async fn close(&self, def: &PoolDef) -> Result<(), DriverError> {
        match driver_of(def.kind) {
            Some(driver) => driver.close(self, def).await,
            None => Ok(()),
        }
    }

    async fn devices(&self, def: &PoolDef) -> Result<Vec<PoolDevice>, DriverError> {
        match driver_of(def.kind) {
            Some(driver) => driver.devices(self, def).await,
            None => Ok(Vec::new()),
        }
    }
}

impl HostStorage {
    /// Who starts such a pool. Error: nobody does here, or not this one.
    fn driver(&self, def: &PoolDef) -> Result<&'static dyn PoolDriver, DriverError> {
        let refuse = |why| DriverError::Config(vec![Finding::unsupported(&def.at.attribute("type"), why)]);
        let driver = match (driver_of(def.kind), self.lacks(def.kind)) {
            (_, Some(why)) => return Err(refuse(why)),
            (None, None) => return Err(refuse(not_started())),
            (Some(driver), None) => driver,
        };
        let mut findings = table::refused_of_pool(def);
        findings.extend(driver.refused(def));
        if findings.is_empty() { Ok(driver) } else { Err(DriverError::Config(findings)) }
    }

    /// What it can do with each kind of pool where every tool is installed.
    pub fn kinds_with_tools(&self) -> Vec<PoolAbility> {
        PoolKind::ALL.iter().map(|kind| self.ability(*kind)).collect()
    }

    fn ability(&self, kind: PoolKind) -> PoolAbility {
        let lacks = self.refuses(kind);
        let Some(driver) = driver_of(kind).filter(|_| lacks.is_none()) else {
            let source_formats = source_formats(kind);
            return PoolAbility {
                kind,
                lacks,
                volume_formats: &[],
                source_formats,
                features: &[],
                finds_sources: false,
            };
        };
        PoolAbility {
            kind,
            lacks,
            volume_formats: driver.volume_formats(),
            source_formats: driver.source_formats(),
            features: driver.features(),
            finds_sources: driver.search() != Search::None,
        }
    }

    /// Why pools of that kind are not started, if so.
    fn lacks(&self, kind: PoolKind) -> Option<String> {
        self.refuses(kind).or_else(|| driver_of(kind)?.lacks(self))
    }

    /// The same whatever is installed.
    fn refuses(&self, kind: PoolKind) -> Option<String> {
        match driver_of(kind) {
            None => Some(not_started()),
            Some(driver) => driver.only_for_root().filter(|_| !self.wary).map(str::to_owned),
        }
    }
}

fn not_started() -> String {
    format!("pools of this type are kept and shown, and not started here: only {} are", kind::started_kinds())
}

fn path_of(def: &PoolDef) -> PathBuf {
    PathBuf::from(def.target_path().unwrap_or_default())
}

/// A pool's folder, found and held. Blocks.
fn opened(path: &Path, wary: bool) -> Result<PoolFolder, DriverError> {
    PoolFolder::open(path, wary).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            DriverError::Storage(format!("{}: there is no such folder; build the pool first", path.display()))
        }
        _ => failed("open", path, &e),
    })
}

/// That somebody may not have so much is told as it is.
fn too_many(error: &io::Error) -> Option<DriverError> {
    match error.get_ref()?.downcast_ref::<DriverError>() {
        Some(DriverError::TooMany(why)) => Some(DriverError::TooMany(why.clone())),
        _ => None,
    }
}

/// What went wrong, in words for people.
fn failed(deed: &str, path: &Path, error: &io::Error) -> DriverError {
    if let Some(too_many) = too_many(error) {
        return too_many;
    }
    let text = format!("cannot {deed} {}: {error}", path.display());
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => DriverError::NoSpace(text),
        Some(libc::EEXIST) => DriverError::Exists(format!("{}: there is something of that name", path.display())),
        _ => DriverError::Storage(text),
    }
}
