//! Pools that are the partitions of a whole disk: found, given a partition table, and rid of it. Nothing is done to a disk when its pool
//! is stopped: its partitions stay.

use super::disk_pool::{DiskPool, FEATURES};
use super::kind::{PoolDriver, Search};
use super::partitions::Format;
use super::pool::FolderPool;
use super::{HostStorage, build, failed, sources};
use crate::host::recognise::Signs;
use crate::host::workers::{Errand, Stop};
use async_trait::async_trait;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{OpenPool, PoolDevice, Work};
use virt_model::storage::FormatDoc;
use virt_model::storage::pool::{self, PoolDef, PoolSource};
use virt_model::storage::volume::VolumeDef;
use virt_model::xml::Finding;

/// Where partitions have their devices.
pub const DEV: &str = "/dev";

/// Pools that are whole disks.
pub struct Partitioned;

/// The disk of a pool. It has been [judged](refused).
fn path_of(def: &PoolDef) -> PathBuf {
    PathBuf::from(def.named_devices().next().unwrap_or_default())
}

fn format_of(def: &PoolDef) -> Option<Format> {
    Format::named(&def.source.as_ref()?.format.as_ref()?.kind)
}

/// The same where it must be said.
fn said_format(def: &PoolDef) -> Result<Format, DriverError> {
    format_of(def).ok_or_else(|| DriverError::Argument(format!("pool '{}': say <format type='gpt'/> or dos", def.name)))
}

fn refused(def: &PoolDef) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Some(source) = &def.source else { return findings };
    let mut refuse = |at: &_, text: String| findings.push(Finding::unsupported(at, text));
    if let Some(second) = source.devices.get(1) {
        refuse(&second.at, "a pool of type 'disk' is one whole disk: name that alone".to_owned());
    }
    for device in &source.devices {
        if !device.path.starts_with('/') || device.path.chars().any(char::is_control) {
            let text = format!("'{}' is no absolute path of a device", virt_model::xml::shorten(&device.path));
            refuse(&device.at, text);
        }
    }
    if format_of(def).is_none() {
        let at = source.format.as_ref().map_or_else(|| source.at.child("format"), |format| format.at.attribute("type"));
        refuse(&at, "say which partition table it has: <format type='gpt'/>, or dos".to_owned());
    }
    if let Some(target) = def.target_path().filter(|target| target != DEV) {
        let at = def.target.as_ref().map_or(&def.at, |target| &target.at).child("path");
        refuse(&at, format!("the devices of partitions are in {DEV}, not in {target}: leave it out"));
    }
    if let Some(features) = def.features.as_ref().filter(|features| features.cow.is_some()) {
        refuse(&features.at, "a disk has no file system, which <cow> is of".to_owned());
    }
    findings
}

#[async_trait]
impl PoolDriver for Partitioned {
    fn only_for_root(&self) -> Option<&'static str> {
        Some(
            "disks are partitioned by root's virtd alone, that of the system bus: define the pool there, or have root give you \
             a device",
        )
    }

    fn volume_formats(&self) -> &'static [&'static str] {
        &["raw"]
    }

    fn source_formats(&self) -> &'static [&'static str] {
        Format::NAMES
    }

    fn features(&self) -> &'static [&'static str] {
        FEATURES
    }

    fn refused(&self, def: &PoolDef) -> Vec<Finding> {
        refused(def)
    }

    fn refused_of_volume(&self, def: &VolumeDef) -> Vec<Finding> {
        let permissions = def.target.as_ref().and_then(|target| target.permissions.as_ref());
        let text = "whose the device of a partition is udev says: leave it out";
        permissions.map(|permissions| Finding::unsupported(&permissions.at, text)).into_iter().collect()
    }

    fn search(&self) -> Search {
        Search::Host
    }

    async fn find_sources(&self, host: &HostStorage, _: Option<&PoolSource>) -> Result<Vec<PoolSource>, DriverError> {
        host.search_of_disks.found(host.look_for_disks()).await
    }

    /// A table of that format in which nothing is stays as it is.
    async fn build(
        &self,
        host: &HostStorage,
        def: &PoolDef,
        overwrite: bool,
        work: &dyn Work,
    ) -> Result<(), DriverError> {
        let (path, format) = (path_of(def), said_format(def)?);
        let (disks, rights, pool) = (host.disks.clone(), host.rights.clone(), def.uuid);
        work.step();
        let make = move |stop: &Arc<Stop>| {
            let disk = disks.at(&path)?;
            if disk.is_busy() {
                return Err(disk.refuse("a volume is being made on it"));
            }
            let hold = disk.hold()?;
            if !overwrite {
                let file = hold.file().map_err(|e| failed("read", &path, &e))?;
                match FolderPool::images(&rights, pool, stop)?.recognise(file, &path)? {
                    Signs::Table(found) if found == format.name() => {
                        if disk.look(format, |table, _| table.partitions().is_empty()).is_ok_and(|is_empty| is_empty) {
                            return Ok(());
                        }
                        build::refuse_signs(Signs::Table(found), &path)?;
                    }
                    signs => build::refuse_signs(signs, &path)?,
                }
            }
            stop.check()?;
            hold.make(format)
        };
        host.workers.run(HostStorage::errand(def, work), make).await?;
        work.step();
        Ok(())
    }

    async fn delete(&self, host: &HostStorage, def: &PoolDef, work: &dyn Work) -> Result<(), DriverError> {
        let (path, format) = (path_of(def), said_format(def)?);
        let (disks, rights, pool) = (host.disks.clone(), host.rights.clone(), def.uuid);
        work.step();
        let remove = move |stop: &Arc<Stop>| {
            let hold = disks.at(&path)?.hold()?;
            let file = hold.file().map_err(|e| failed("read", &path, &e))?;
            match FolderPool::images(&rights, pool, stop)?.recognise(file, &path)? {
                // Who was killed in between has left what nobody knows.
                Signs::Nothing | Signs::Unknown => Ok(()),
                Signs::Table(found) if found == format.name() => hold.unmake(format),
                signs => build::refuse_signs(signs, &path),
            }
        };
        host.workers.run(HostStorage::errand(def, work), remove).await
    }

    async fn open(&self, host: &HostStorage, def: &PoolDef, work: &dyn Work) -> Result<Arc<dyn OpenPool>, DriverError> {
        let (path, format) = (path_of(def), said_format(def)?);
        let (disks, rights, pool, workers) = (host.disks.clone(), host.rights.clone(), def.uuid, host.workers.clone());
        work.step();
        let open = move |stop: &Arc<Stop>| {
            let disk = disks.at(&path)?;
            let hold = disk.hold()?;
            let file = hold.file().map_err(|e| failed("read", &path, &e))?;
            // A file system may have the signs of a table, too.
            match FolderPool::images(&rights, pool, stop)?.recognise(file, &path)? {
                Signs::Table(found) if found == format.name() => {}
                Signs::Nothing => return Err(disk.refuse("there is no partition table on it; build the pool first")),
                Signs::Table(found) => {
                    let text =
                        format!("there is a partition table (format '{found}') on it: say <format type='{found}'/>");
                    return Err(disk.refuse(&text));
                }
                Signs::FileSystem(what) | Signs::Other(what) => {
                    return Err(disk.refuse(&format!("there is {what} on it, and no partition table alone")));
                }
                Signs::Unknown => return Err(disk.refuse("there is something unknown on it, and no partition table")),
            }
            hold.mend(format)?;
            Ok(DiskPool { pool, disk, format, dev: PathBuf::from(DEV), workers })
        };
        Ok(Arc::new(host.workers.run(HostStorage::errand(def, work), open).await?))
    }

    async fn close(&self, _: &HostStorage, _: &PoolDef) -> Result<(), DriverError> {
        Ok(())
    }

    async fn devices(&self, host: &HostStorage, def: &PoolDef) -> Result<Vec<PoolDevice>, DriverError> {
        let path = path_of(def);
        let errand = Errand::new(def.uuid, path.display().to_string());
        let look = move |_: &Arc<Stop>| {
            let look = |e| failed("look at", &path, &e);
            let (overlapping, volumes) =
                (sources::beneath(&path).map_err(look)?, sources::partitions_of(&path).map_err(look)?);
            Ok(vec![PoolDevice { path, overlapping, volumes }])
        };
        host.workers.run(errand, look).await
    }
}

impl HostStorage {
    /// The disks that have a partition table, and that nobody uses.
    async fn look_for_disks(&self) -> Result<Vec<PoolSource>, DriverError> {
        const SEARCHED: &str = "whole disks";
        let (disks, rights) = (self.disks.clone(), self.rights.clone());
        let one = sources::standing_for(Path::new(SEARCHED));
        let find = move |stop: &Arc<Stop>| {
            let mut all = Vec::new();
            for path in sources::block_devices() {
                stop.check()?;
                let Ok(disk) = disks.at(&path) else { continue };
                // A drive without a medium is no source; nor is what is mounted in part.
                let Ok(file) = disk.shared() else { continue };
                if !disk.users().is_empty() {
                    continue;
                }
                let signs = FolderPool::images(&rights, one, stop)?.recognise(&file, &path);
                let Ok(Signs::Table(kind)) = signs else { continue };
                let Some(format) = Format::named(&kind) else { continue };
                if disk.look(format, |_, _| ()).is_ok() {
                    all.push(source(&path, kind));
                }
            }
            Ok(all)
        };
        self.workers.run(Errand::new(one, SEARCHED), find).await
    }
}

fn source(path: &Path, kind: String) -> PoolSource {
    let device = pool::PoolDevice { path: path.display().to_string(), ..Default::default() };
    let format = Some(FormatDoc { kind, ..FormatDoc::default() });
    PoolSource { devices: vec![device], format, ..PoolSource::default() }
}
