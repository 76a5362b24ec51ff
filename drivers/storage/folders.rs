//! Pools whose volumes are files of a folder: one of this host's, or what is mounted on one, be it a file system on a device or a
//! folder that another host shares.

use super::build::{self, BuildSite};
use super::held::HeldFolder;
use super::kind::{PoolDriver, Search};
use super::mounts::{self, Fresh, Means};
use super::pool::FolderPool;
use super::{HostStorage, failed, fill, opened, path_of, share, sources};
use crate::host::workers::{Errand, Stop};
use async_trait::async_trait;
use std::path::PathBuf;
use std::sync::Arc;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{OpenPool, PoolDevice, Work};
use virt_model::storage::pool::{PoolDef, PoolKind, PoolSource};
use virt_model::storage::source_formats;
use virt_model::xml::Finding;

/// The formats of volumes that are made.
const FORMATS: &[&str] = &["raw", "qcow2", "luks"];
/// What can be done with pools whose volumes are files.
const FEATURES: &[&str] = &["create", "thin-clone", "resize", "shrink", "upload", "wipe", "watch"];
/// The same where a copy can share blocks with what it is copied from.
const SHARING: &[&str] = &["create", "thin-clone", "reflink", "resize", "shrink", "upload", "wipe", "watch"];
/// The same where other hosts change what is there, and nobody tells.
const OF_OTHERS_TOO: &[&str] = &["create", "thin-clone", "resize", "shrink", "upload", "wipe"];

/// What the folder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folders {
    /// A folder.
    Plain,
    /// The file system on a device, mounted there.
    OnDevice,
    /// A folder of another host's, likewise.
    Shared,
}

#[async_trait]
impl PoolDriver for Folders {
    fn only_for_root(&self) -> Option<&'static str> {
        const MOUNTED: &str = "file systems are mounted by root's virtd alone, that of the system bus: define the pool there, or mount the \
             file system by other means, and define a pool of type 'dir' on its folder";
        (*self != Folders::Plain).then_some(MOUNTED)
    }

    fn lacks(&self, host: &HostStorage) -> Option<String> {
        host.lacks_for_shares.clone().filter(|_| *self == Folders::Shared)
    }

    fn volume_formats(&self) -> &'static [&'static str] {
        FORMATS
    }

    fn source_formats(&self) -> &'static [&'static str] {
        match self {
            Folders::Plain => source_formats(PoolKind::Dir),
            Folders::OnDevice => mounts::FORMATS,
            Folders::Shared => share::FORMATS,
        }
    }

    fn features(&self) -> &'static [&'static str] {
        if *self == Folders::Shared { OF_OTHERS_TOO } else { SHARING }
    }

    fn refused(&self, def: &PoolDef) -> Vec<Finding> {
        match self {
            Folders::Plain => Vec::new(),
            Folders::OnDevice => mounts::refused(def),
            Folders::Shared => share::refused(def),
        }
    }

    fn search(&self) -> Search {
        match self {
            Folders::Plain => Search::None,
            Folders::OnDevice => Search::Host,
            Folders::Shared => Search::Server,
        }
    }

    async fn find_sources(
        &self,
        host: &HostStorage,
        asked: Option<&PoolSource>,
    ) -> Result<Vec<PoolSource>, DriverError> {
        match self {
            Folders::Plain => Ok(Vec::new()),
            Folders::OnDevice => host.unused_file_systems().await,
            Folders::Shared => host.offered(asked).await,
        }
    }

    async fn build(
        &self,
        host: &HostStorage,
        def: &PoolDef,
        overwrite: bool,
        work: &dyn Work,
    ) -> Result<(), DriverError> {
        if overwrite && *self != Folders::OnDevice {
            let text =
                "a folder has nothing that is overwritten: build it without that, and delete its volumes".to_owned();
            return Err(DriverError::Argument(text));
        }
        let errand = HostStorage::errand(def, work);
        let site = match self {
            Folders::OnDevice => {
                let (def, rights) = (def.clone(), host.rights.clone());
                let judge = move |stop: &Arc<Stop>| {
                    BuildSite::judge(&def, overwrite, || FolderPool::images(&rights, def.uuid, stop))
                };
                Some(host.workers.run(errand.clone(), judge).await?)
            }
            Folders::Plain | Folders::Shared => None,
        };
        work.step();
        let (path, wary, def) = (path_of(def), host.wary, def.clone());
        let length = site.as_ref().map_or(0, |site| site.length);
        let make = move |stop: &Arc<Stop>| {
            build::folder(&path, &def, wary).map_err(|e| failed("make", &path, &e))?;
            site.map_or(Ok(()), |site| site.make(&def, stop))
        };
        // Of a device little is written.
        host.workers.run(errand.of(length >> 10), make).await?;
        work.step();
        Ok(())
    }

    async fn delete(&self, host: &HostStorage, def: &PoolDef, work: &dyn Work) -> Result<(), DriverError> {
        let (path, wary) = (path_of(def), host.wary);
        work.step();
        let errand = HostStorage::errand(def, work);
        let remove = move |_: &Arc<Stop>| build::remove_empty(&path, wary).map_err(|e| failed("remove", &path, &e));
        host.workers.run(errand, remove).await
    }

    async fn open(&self, host: &HostStorage, def: &PoolDef, work: &dyn Work) -> Result<Arc<dyn OpenPool>, DriverError> {
        host.open_folder(*self, def, work).await
    }

    async fn close(&self, host: &HostStorage, def: &PoolDef) -> Result<(), DriverError> {
        match self {
            Folders::Plain => Ok(()),
            Folders::OnDevice | Folders::Shared => host.close_folder(def).await,
        }
    }

    async fn devices(&self, host: &HostStorage, def: &PoolDef) -> Result<Vec<PoolDevice>, DriverError> {
        let Some(path) = def.mounted_device().map(PathBuf::from) else { return Ok(Vec::new()) };
        let look = move |_: &Arc<Stop>| {
            let overlapping = sources::overlapping(&path).map_err(|e| failed("look at", &path, &e))?;
            Ok(vec![PoolDevice { path, overlapping, volumes: Vec::new() }])
        };
        host.workers.run(Errand::new(def.uuid, def.mounted_device().unwrap_or_default()), look).await
    }
}

impl HostStorage {
    /// Finds the folder of a pool, on which what it comes from is mounted, if that is elsewhere.
    async fn open_folder(
        &self,
        kind: Folders,
        def: &PoolDef,
        work: &dyn Work,
    ) -> Result<Arc<dyn OpenPool>, DriverError> {
        let (path, wary, errand, def) = (path_of(def), self.wary, HostStorage::errand(def, work), def.clone());
        let limit = match kind {
            Folders::OnDevice => mounts::PATIENCE,
            Folders::Shared => share::PATIENCE,
            Folders::Plain => errand.limit,
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
                let others_too = kind == Folders::Shared;
                folder.remove_unfinished(others_too).map_err(|e| failed("tidy", &path, &e))?;
            }
            let features = match kind {
                Folders::Shared => OF_OTHERS_TOO,
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
}
