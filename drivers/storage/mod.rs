//! Storage of this host: pools that are folders, file systems on devices and folders of other hosts that are mounted on one, and volume
//! groups.
//!
//! ```text
//!  HostStorage ─build─▶ build.rs     the folder, and the file system on the device
//!              ───────▶ logical.rs    the volume group: made, activated, removed
//!                       VolumeGroup ─ group.rs    what is done to each of its volumes
//!                                   ─ block.rs    the device of one
//!                                   ─ leftovers.rs  what was under way in it when somebody was killed
//!              ─open──▶ mounts.rs    what is mounted and unmounted: a device's file system, or
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
mod draft;
mod fill;
mod folder;
mod group;
mod held;
mod leftovers;
mod logical;
mod look;
#[allow(clippy::disallowed_methods, reason = "the kernel's own table below /proc")]
mod mount_table;
#[allow(clippy::disallowed_methods, reason = "the kernel's own table below /proc, and the devices that it names")]
mod mounts;
mod pool;
mod serve;
mod share;
#[allow(clippy::disallowed_methods, reason = "the kernel's own files below /sys")]
mod sources;
pub mod table;
#[cfg(test)]
mod tests;
mod watch;

use crate::host::lender::Lender;
use crate::host::workers::{Errand, Stop, Workers};
use async_trait::async_trait;
use build::BuildSite;
use folder::PoolFolder;
use held::{Held, HeldFolder};
use mounts::{Fresh, Means};
use pool::FolderPool;
use sources::Search;
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
    search: Search,
    /// For volume groups.
    search_of_groups: Search,
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
            search: Search::default(),
            search_of_groups: Search::default(),
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
        if let Some(why) = self.lacks(def.kind) {
            return Err(DriverError::Config(vec![Finding::unsupported(&def.at.attribute("type"), why)]));
        }
        let mut findings = table::refused_of_pool(def);
        findings.extend(match def.kind {
            PoolKind::Fs => mounts::refused(def),
            PoolKind::Netfs => share::refused(def),
            PoolKind::Logical => logical::refused(def),
            _ => Vec::new(),
        });
        if findings.is_empty() { Ok(()) } else { Err(DriverError::Config(findings)) }
    }

    fn check_volume(&self, pool: PoolKind, def: &VolumeDef) -> Result<(), DriverError> {
        let mut findings = table::refused_of_volume(def);
        if pool == PoolKind::Logical {
            findings.extend(logical::refused_of_volume(def));
        }
        if findings.is_empty() { Ok(()) } else { Err(DriverError::Config(findings)) }
    }

    async fn find_sources(&self, kind: PoolKind, asked: Option<&PoolSource>) -> Result<Vec<PoolSource>, DriverError> {
        match (kind, self.lacks(kind)) {
            (PoolKind::Fs | PoolKind::Netfs | PoolKind::Logical, Some(why)) => Err(DriverError::Unsupported(why)),
            (PoolKind::Netfs, None) => self.offered(asked).await,
            (PoolKind::Fs | PoolKind::Logical, None) if asked.is_some() => Err(DriverError::Argument(format!(
                "a search for what pools of type '{kind}' could come from has no document: leave it empty"
            ))),
            (PoolKind::Fs, None) => self.unused_file_systems().await,
            (PoolKind::Logical, None) => self.unused_groups().await,
            _ => Err(DriverError::Unsupported(format!(
                "what pools of type '{kind}' could come from is not searched here"
            ))),
        }
    }

    async fn build(&self, def: &PoolDef, overwrite: bool, work: &dyn Work) -> Result<(), DriverError> {
        self.check(def)?;
        if def.kind == PoolKind::Logical {
            return self.build_group(def, overwrite, work).await;
        }
        if overwrite && matches!(def.kind, PoolKind::Dir | PoolKind::Netfs) {
            let text =
                "a folder has nothing that is overwritten: build it without that, and delete its volumes".to_owned();
            return Err(DriverError::Argument(text));
        }
        let errand = HostStorage::errand(def, work);
        let site = match def.kind {
            PoolKind::Fs => {
                let (def, rights) = (def.clone(), self.rights.clone());
                let judge = move |stop: &Arc<Stop>| {
                    BuildSite::judge(&def, overwrite, || FolderPool::images(&rights, def.uuid, stop))
                };
                Some(self.workers.run(errand.clone(), judge).await?)
            }
            _ => None,
        };
        work.step();
        let (path, wary, def) = (path_of(def), self.wary, def.clone());
        let length = site.as_ref().map_or(0, |site| site.length);
        let make = move |stop: &Arc<Stop>| {
            build::folder(&path, &def, wary).map_err(|e| failed("make", &path, &e))?;
            site.map_or(Ok(()), |site| site.make(&def, stop))
        };
        // Of a device little is written.
        self.workers.run(errand.of(length >> 10), make).await?;
        work.step();
        Ok(())
    }

    async fn delete(&self, def: &PoolDef, work: &dyn Work) -> Result<(), DriverError> {
        self.check(def)?;
        if def.kind == PoolKind::Logical {
            return self.delete_group(def, work).await;
        }
        let (path, wary) = (path_of(def), self.wary);
        work.step();
        let errand = HostStorage::errand(def, work);
        let remove = move |_: &Arc<Stop>| build::remove_empty(&path, wary).map_err(|e| failed("remove", &path, &e));
        self.workers.run(errand, remove).await
    }

    async fn open(&self, def: &PoolDef, work: &dyn Work) -> Result<Arc<dyn OpenPool>, DriverError> {
        self.check(def)?;
        match def.kind {
            PoolKind::Logical => self.open_group(def, work).await,
            _ => self.open_folder(def, work).await,
        }
    }

    async fn close(&self, def: &PoolDef) -> Result<(), DriverError> {
        match def.kind {
            PoolKind::Logical => self.close_group(def).await,
            _ if def.mounted_source().is_some() => self.close_folder(def).await,
            _ => Ok(()),
        }
    }

    async fn devices(&self, def: &PoolDef) -> Result<Vec<PoolDevice>, DriverError> {
        match (def.kind, def.mounted_device().map(PathBuf::from)) {
            (PoolKind::Logical, _) => self.devices_of_group(def).await,
            (_, None) => Ok(Vec::new()),
            (_, Some(path)) => {
                let look = move |_: &Arc<Stop>| {
                    let overlapping = sources::overlapping(&path).map_err(|e| failed("look at", &path, &e))?;
                    Ok(vec![PoolDevice { path, overlapping }])
                };
                self.workers.run(Errand::new(def.uuid, def.mounted_device().unwrap_or_default()), look).await
            }
        }
    }
}

impl HostStorage {
    /// Finds the folder of a pool, on which what it comes from is mounted, if that is elsewhere.
    async fn open_folder(&self, def: &PoolDef, work: &dyn Work) -> Result<Arc<dyn OpenPool>, DriverError> {
        let (path, wary, errand, def) = (path_of(def), self.wary, HostStorage::errand(def, work), def.clone());
        let limit = match def.kind {
            PoolKind::Fs => mounts::PATIENCE,
            PoolKind::Netfs => share::PATIENCE,
            _ => errand.limit,
        };
        let (held, rights, pool) = (self.held.clone(), self.rights.clone(), def.uuid);
        let (workers, secrets, runtime) = (self.workers.clone(), self.secrets.clone(), self.runtime.clone());
        work.step();
        let open = move |stop: &Arc<Stop>| {
            let means = Means {
                images: &|| FolderPool::images(&rights, pool, stop),
                secrets: &secrets,
                runtime: &runtime,
                stop,
            };
            let (fresh, folder, mounted) = match def.mounted_source() {
                Some(_) => {
                    let (folder, mounted, fresh) = mounts::mounted((&path, &def), &means)?;
                    (fresh, folder, Some(mounted))
                }
                None => (Fresh::default(), opened(&path, wary)?, None),
            };
            let folder = Arc::new(folder);
            // What this pool is making itself is no rest of anything.
            if held.take(&folder, pool, &def.name, &path)? {
                let others_too = def.kind == PoolKind::Netfs;
                folder.remove_unfinished(others_too).map_err(|e| failed("tidy", &path, &e))?;
            }
            let features = match def.kind {
                PoolKind::Netfs => OF_OTHERS_TOO,
                _ if fill::shares_blocks(&folder) => SHARING,
                _ => FEATURES,
            };
            // What comes too late is taken away again.
            stop.check()?;
            let made_mount = fresh.keep();
            let real = folder.real().to_owned();
            let folder = HeldFolder::new(held, (pool, &def.name), folder);
            Ok(FolderPool {
                pool,
                path,
                real,
                folder,
                mounted,
                made_mount,
                features,
                workers,
                rights,
                secrets,
                runtime,
            })
        };
        let workers = self.workers.clone();
        Ok(Arc::new(workers.run(Errand { limit, ..errand }, open).await?))
    }

    async fn close_folder(&self, def: &PoolDef) -> Result<(), DriverError> {
        let (path, def, runtime) = (path_of(def), def.clone(), self.runtime.clone());
        let errand = Errand { limit: mounts::PATIENCE, ..Errand::new(def.uuid, path.display().to_string()) };
        let close = move |stop: &Arc<Stop>| {
            share::clear_aside(&runtime, def.uuid);
            mounts::release_of((&path, &def), stop)
        };
        self.workers.run(errand, close).await
    }

    /// What it can do with each kind of pool where every tool is installed.
    pub fn kinds_with_tools(&self) -> Vec<PoolAbility> {
        PoolKind::ALL.iter().map(|kind| self.ability(*kind)).collect()
    }

    fn ability(&self, kind: PoolKind) -> PoolAbility {
        let lacks = self.refuses(kind);
        let (volume_formats, features): (&[_], &[_]) = match (lacks, kind) {
            (None, PoolKind::Netfs) => (FORMATS, OF_OTHERS_TOO),
            (None, PoolKind::Logical) => (&["raw"], group::FEATURES),
            (None, _) => (FORMATS, SHARING),
            (Some(_), _) => (&[], &[]),
        };
        let source_formats = match (kind, lacks) {
            (PoolKind::Fs, None) => mounts::FORMATS,
            (PoolKind::Netfs, None) => share::FORMATS,
            (PoolKind::Logical, None) => logical::FORMATS,
            _ => source_formats(kind),
        };
        let finds_sources = matches!(kind, PoolKind::Fs | PoolKind::Netfs | PoolKind::Logical) && lacks.is_none();
        let lacks = lacks.map(str::to_owned);
        PoolAbility { kind, lacks, volume_formats, source_formats, features, finds_sources }
    }

    /// Why pools of that kind are not started, if so.
    fn lacks(&self, kind: PoolKind) -> Option<String> {
        let refused = self.refuses(kind).map(str::to_owned);
        refused.or_else(|| self.lacks_for_shares.clone().filter(|_| kind == PoolKind::Netfs))
    }

    /// The same whatever is installed.
    fn refuses(&self, kind: PoolKind) -> Option<&'static str> {
        match kind {
            PoolKind::Dir => None,
            PoolKind::Fs | PoolKind::Netfs if self.wary => None,
            PoolKind::Fs | PoolKind::Netfs => Some(
                "file systems are mounted by root's virtd alone, that of the system bus: define the pool there, or mount the \
                 file system by other means, and define a pool of type 'dir' on its folder",
            ),
            PoolKind::Logical if self.wary => None,
            PoolKind::Logical => Some(
                "volume groups are activated by root's virtd alone, that of the system bus: define the pool there, or have root \
                 give you a device",
            ),
            _ => Some(
                "pools of this type are kept and shown, and not started here: only 'dir', 'fs', 'netfs' and 'logical' are",
            ),
        }
    }
}

/// The formats of volumes that are made.
const FORMATS: &[&str] = &["raw", "qcow2", "luks"];
/// What can be done with pools whose volumes are files.
const FEATURES: &[&str] = &["create", "thin-clone", "resize", "shrink", "upload", "wipe", "watch"];
/// The same where a copy can share blocks with what it is copied from.
const SHARING: &[&str] = &["create", "thin-clone", "reflink", "resize", "shrink", "upload", "wipe", "watch"];

/// The same where other hosts change what is there, and nobody tells.
const OF_OTHERS_TOO: &[&str] = &["create", "thin-clone", "resize", "shrink", "upload", "wipe"];

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
