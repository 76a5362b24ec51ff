//! Pools that are volume groups of LVM: found, made, activated as long as the pool is started, and removed. What is active stays so
//! whatever becomes of virtd: who opens the pool first looks whether it is.

use super::group::{self, Site, VolumeGroup};
use super::kind::{PoolDriver, Search};
use super::leftovers::{self, UnderWay};
use super::mounts::Device;
use super::{HostStorage, failed, sources};
use crate::host::image::Images;
use crate::host::lvm::{Change, GroupName, LogicalName, Lvm};
use crate::host::workers::{Errand, Stop};
use async_trait::async_trait;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{OpenPool, PoolDevice, Work};
use virt_model::storage::FormatDoc;
use virt_model::storage::pool::{self, PoolDef, PoolSource};
use virt_model::storage::volume::VolumeDef;
use virt_model::xml::Finding;

/// The formats that such a pool's source can have.
const FORMATS: &[&str] = &["lvm2"];
/// How long it may take to be made, activated or deactivated: each device of it is.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// What is searched for pools, for errands: no device and no host that is searched is called so.
const SEARCHED: &str = "volume groups";
/// So much of a device's beginning and end is overwritten before it is made LVM's, where that is asked for.
const EDGE: u64 = 4 << 20;

/// Which group is which pool's.
#[derive(Clone, Default)]
pub struct HeldGroups(Arc<Mutex<HashMap<String, Holder>>>);

/// Who holds a group.
struct Holder {
    pool: Uuid,
    name: String,
    held: Weak<UnderWay>,
}

/// A group is a pool's as long as this is there; and what that pool has under way in it.
pub type HeldGroup = Arc<UnderWay>;

impl HeldGroups {
    /// The groups that are a pool's.
    fn names(&self) -> Vec<String> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.iter().filter(|(_, holder)| holder.held.strong_count() > 0).map(|(name, _)| name.clone()).collect()
    }

    /// A pool takes a group; and whether it had not taken it before. Error: it is another pool's.
    fn take(&self, group: &GroupName, pool: Uuid, name: &str) -> Result<(HeldGroup, bool), DriverError> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|_, holder| holder.held.strong_count() > 0);
        match held.get(&group.to_string()) {
            Some(other) if other.pool != pool => {
                let text = format!("volume group '{group}' is pool '{}' already: stop that one first", other.name);
                return Err(DriverError::Refused(text));
            }
            Some(own) => {
                if let Some(hold) = own.held.upgrade() {
                    return Ok((hold, false));
                }
            }
            None => {}
        }
        let hold = HeldGroup::default();
        let holder = Holder { pool, name: name.to_owned(), held: Arc::downgrade(&hold) };
        held.insert(group.to_string(), holder);
        Ok((hold, true))
    }
}

/// What of such a pool cannot be, whatever is on the host.
fn refused(def: &PoolDef) -> Vec<Finding> {
    let mut findings = Vec::new();
    let source_at = def.source.as_ref().map_or_else(|| def.at.child("name"), |source| source.at.clone());
    match GroupName::new(def.source_name()) {
        Err(why) => findings.push(Finding::unsupported(&source_at, why)),
        Ok(group) => {
            let (own, target) = (format!("/dev/{group}"), def.target_path());
            if let Some(target) = target.filter(|target| *target != own) {
                let at = def.target.as_ref().map_or(&def.at, |target| &target.at).child("path");
                let text = format!("the devices of volume group '{group}' are in {own}, not in {target}: leave it out");
                findings.push(Finding::unsupported(&at, text));
            }
        }
    }
    for device in def.source.iter().flat_map(|source| &source.devices) {
        if !device.path.starts_with('/') || device.path.chars().any(char::is_control) {
            let text = format!("'{}' is no absolute path of a device", virt_model::xml::shorten(&device.path));
            findings.push(Finding::unsupported(&device.at, text));
        }
    }
    if let Some(features) = def.features.as_ref().filter(|features| features.cow.is_some()) {
        findings.push(Finding::unsupported(&features.at, "a volume group has no file system, which <cow> is of"));
    }
    findings
}

/// What of a volume's document cannot be in such a pool.
fn refused_of_volume(def: &VolumeDef) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Err(why) = LogicalName::new(&def.name) {
        findings.push(Finding::unsupported(&def.at.child("name"), why));
    }
    let Some(target) = &def.target else { return findings };
    if let Some(permissions) = &target.permissions {
        let text = "whose the device of a volume in a volume group is udev says: leave it out";
        findings.push(Finding::unsupported(&permissions.at, text));
    }
    findings
}

/// The group that a pool is. It has been [judged](refused).
fn group_of(def: &PoolDef) -> Result<GroupName, DriverError> {
    GroupName::new(def.source_name()).map_err(DriverError::Argument)
}

/// What to tell of a group that is not there.
pub fn no_group(group: &GroupName) -> DriverError {
    DriverError::Storage(format!(
        "there is no volume group '{group}': build the pool first, or see that its devices are there ('vgs' tells which are)"
    ))
}

/// Pools that are volume groups.
pub struct Groups;

#[async_trait]
impl PoolDriver for Groups {
    fn only_for_root(&self) -> Option<&'static str> {
        Some(
            "volume groups are activated by root's virtd alone, that of the system bus: define the pool there, or have root \
             give you a device",
        )
    }

    fn volume_formats(&self) -> &'static [&'static str] {
        &["raw"]
    }

    fn source_formats(&self) -> &'static [&'static str] {
        FORMATS
    }

    fn features(&self) -> &'static [&'static str] {
        group::FEATURES
    }

    fn refused(&self, def: &PoolDef) -> Vec<Finding> {
        refused(def)
    }

    fn refused_of_volume(&self, def: &VolumeDef) -> Vec<Finding> {
        refused_of_volume(def)
    }

    fn search(&self) -> Search {
        Search::Host
    }

    async fn find_sources(&self, host: &HostStorage, _: Option<&PoolSource>) -> Result<Vec<PoolSource>, DriverError> {
        host.unused_groups().await
    }

    async fn build(
        &self,
        host: &HostStorage,
        def: &PoolDef,
        overwrite: bool,
        work: &dyn Work,
    ) -> Result<(), DriverError> {
        host.build_group(def, overwrite, work).await
    }

    async fn delete(&self, host: &HostStorage, def: &PoolDef, work: &dyn Work) -> Result<(), DriverError> {
        host.delete_group(def, work).await
    }

    async fn open(&self, host: &HostStorage, def: &PoolDef, work: &dyn Work) -> Result<Arc<dyn OpenPool>, DriverError> {
        host.open_group(def, work).await
    }

    async fn close(&self, host: &HostStorage, def: &PoolDef) -> Result<(), DriverError> {
        host.close_group(def).await
    }

    async fn devices(&self, host: &HostStorage, def: &PoolDef) -> Result<Vec<PoolDevice>, DriverError> {
        host.devices_of_group(def).await
    }
}

impl HostStorage {
    /// Activates a pool's group, and takes away, or back, what was under way in it when somebody was killed.
    async fn open_group(&self, def: &PoolDef, work: &dyn Work) -> Result<Arc<dyn OpenPool>, DriverError> {
        let (group, held, pool, name) = (group_of(def)?, self.groups.clone(), def.uuid, def.name.clone());
        let errand = Errand { limit: PATIENCE, ..HostStorage::errand(def, work) };
        let (workers, path) = (self.workers.clone(), Path::new("/dev").join(group.to_string()));
        work.step();
        let open = move |stop: &Arc<Stop>| {
            let lvm = Lvm(stop);
            lvm.group(&group)?.ok_or_else(|| no_group(&group))?;
            let (held, is_first) = held.take(&group, pool, &name)?;
            let without_device = lvm.volumes(&group)?.into_iter().filter(|volume| !volume.is_active);
            let made_active: Vec<LogicalName> = without_device.map(|volume| volume.name).collect();
            let active = lvm.activate(&group);
            let site = Site { group: group.clone(), path: path.clone(), under_way: held.clone() };
            let tidied = active.and_then(|()| if is_first { leftovers::tidy(&site, &lvm) } else { Ok(()) });
            if let Err(error) = tidied.and_then(|()| stop.check()) {
                // What comes too late, or in part, is taken away again.
                take_back(&group, &made_active, &Stop::default()).unwrap_or_else(|e| tracing::warn!("{e}"));
                return Err(error);
            }
            Ok(VolumeGroup { pool, group, path, made_active, held, workers })
        };
        Ok(Arc::new(self.workers.run(errand, open).await?))
    }

    /// Deactivates a pool's group, if it is there.
    async fn close_group(&self, def: &PoolDef) -> Result<(), DriverError> {
        let group = group_of(def)?;
        let errand = Errand { limit: PATIENCE, ..Errand::new(def.uuid, group.to_string()) };
        let close = move |stop: &Arc<Stop>| match Lvm(stop).group(&group)? {
            None => Ok(()),
            Some(_) => deactivate(&group, stop),
        };
        self.workers.run(errand, close).await
    }

    /// The devices that a pool names, and those that its group has. Of what is made of them nothing is anybody else's.
    async fn devices_of_group(&self, def: &PoolDef) -> Result<Vec<PoolDevice>, DriverError> {
        let (group, mut all) = (group_of(def)?, named_devices(def));
        let find = move |stop: &Arc<Stop>| {
            let told = Lvm(stop).devices().unwrap_or_else(|error| {
                // Those that are named are nobody else's at least; the others are taken when the pool is refreshed.
                tracing::warn!(%error, "which devices volume group '{group}' has cannot be told");
                Vec::new()
            });
            let found = told.into_iter().filter(|one| one.group.as_deref() == Some(&*group.to_string()));
            all.extend(found.map(|one| one.device));
            all.sort();
            // One may have several names.
            let mut numbers = BTreeSet::new();
            all.retain(|path| number_of(path).is_none_or(|number| numbers.insert(number)));
            let whole = |path: PathBuf| {
                let overlapping = sources::around(&path).map_err(|e| failed("look at", &path, &e))?;
                Ok(PoolDevice { path, overlapping, volumes: Vec::new() })
            };
            all.into_iter().map(whole).collect()
        };
        self.workers.run(Errand::new(def.uuid, def.source_name()), find).await
    }

    /// Makes a pool's group of the devices that it names. One that is there, of these devices and with nothing in it, is that.
    async fn build_group(&self, def: &PoolDef, overwrite: bool, work: &dyn Work) -> Result<(), DriverError> {
        let (group, named, pool, rights) = (group_of(def)?, named_devices(def), def.uuid, self.rights.clone());
        if named.is_empty() {
            let text = format!(
                "volume group '{group}': say in the pool's <source> of which <device path='…'/> it is to be made"
            );
            return Err(DriverError::Argument(text));
        }
        work.step();
        let errand = Errand { limit: PATIENCE, ..HostStorage::errand(def, work) };
        let make = move |stop: &Arc<Stop>| {
            let lvm = Lvm(stop);
            if is_there(&lvm, &group, &named)? {
                return Ok(());
            }
            for device in &named {
                let images = || super::pool::FolderPool::images(&rights, pool, stop);
                judge(device, overwrite, images)?;
            }
            if overwrite {
                named.iter().try_for_each(|device| blank_edges(device).map_err(|e| failed("overwrite", device, &e)))?;
            }
            lvm.change(&group, &Change::MakeGroup(&named))
        };
        self.workers.run(errand, make).await?;
        work.step();
        Ok(())
    }

    /// Removes a pool's group, if nothing is in it, and has LVM leave its devices.
    async fn delete_group(&self, def: &PoolDef, work: &dyn Work) -> Result<(), DriverError> {
        let (group, named) = (group_of(def)?, named_devices(def));
        work.step();
        let errand = Errand { limit: PATIENCE, ..HostStorage::errand(def, work) };
        let remove = move |stop: &Arc<Stop>| {
            let lvm = Lvm(stop);
            let named: Vec<u64> = named.iter().filter_map(|path| number_of(path)).collect();
            let mut devices = Vec::new();
            for one in lvm.devices()? {
                // Who was killed in between has left some that are in no group.
                let is_named = number_of(&one.device).is_some_and(|number| named.contains(&number));
                let is_left = one.group.is_none() && is_named;
                if is_left || one.group.as_deref() == Some(&*group.to_string()) {
                    devices.push(one.device);
                }
            }
            if let Some(found) = lvm.group(&group)? {
                if found.volumes > 0 {
                    let (count, text) = (found.volumes, "delete its volumes, and what else there is ('lvs' tells)");
                    return Err(DriverError::Refused(format!("volume group '{group}' has {count} volumes: {text}")));
                }
                lvm.change(&group, &Change::RemoveGroup)?;
            }
            devices.iter().try_for_each(|device| lvm.change(&group, &Change::Release(device)))
        };
        self.workers.run(errand, remove).await
    }

    /// The groups that pools could come from: they are no pool's yet, and of none of their volumes the host has a use.
    async fn unused_groups(&self) -> Result<Vec<PoolSource>, DriverError> {
        self.search_of_groups.found(self.look_for_groups()).await
    }

    async fn look_for_groups(&self) -> Result<Vec<PoolSource>, DriverError> {
        let mut used = self.groups.names();
        let find = move |stop: &Arc<Stop>| {
            let lvm = Lvm(stop);
            used.extend(lvm.groups_in_use()?);
            let mut all: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
            for one in lvm.devices()? {
                if let Some(group) = one.group.filter(|group| !used.contains(group)) {
                    all.entry(group).or_default().push(one.device);
                }
            }
            Ok(all.into_iter().map(|(name, devices)| source(name, &devices)).collect())
        };
        self.workers.run(Errand::new(sources::standing_for(Path::new(SEARCHED)), SEARCHED), find).await
    }
}

fn source(name: String, devices: &[PathBuf]) -> PoolSource {
    let device = |path: &PathBuf| pool::PoolDevice { path: path.display().to_string(), ..Default::default() };
    let format = Some(FormatDoc { kind: "lvm2".to_owned(), ..FormatDoc::default() });
    PoolSource { devices: devices.iter().map(device).collect(), name: Some(name), format, ..PoolSource::default() }
}

/// The kernel's number of a device, if there is one at that path that nobody but root can lead elsewhere.
fn number_of(path: &Path) -> Option<u64> {
    Device::at(path).ok().map(|device| device.number())
}

fn named_devices(def: &PoolDef) -> Vec<PathBuf> {
    def.named_devices().map(PathBuf::from).collect()
}

/// These volumes of a group have no device any more; those that are gone need none. Blocks. Error: some have it yet.
pub fn take_back(group: &GroupName, volumes: &[LogicalName], stop: &Stop) -> Result<(), DriverError> {
    let lvm = Lvm(stop);
    let mut all = lvm.volumes(group)?.into_iter().filter(|volume| volume.is_active && volumes.contains(&volume.name));
    all.try_for_each(|volume| lvm.change(group, &Change::DeactivateVolume(&volume.name)))
}

/// None of a group's volumes has a device any more. Blocks. Error: each has it as before.
pub fn deactivate(group: &GroupName, stop: &Stop) -> Result<(), DriverError> {
    let done = Lvm(stop).change(group, &Change::Deactivate);
    done.map_err(|error| {
        // Some of them may have none by now.
        Lvm(&Stop::default()).activate(group).unwrap_or_else(|e| tracing::warn!("volume group '{group}': {e}"));
        match error {
            DriverError::Refused(why) => DriverError::Refused(format!(
                "volume group '{group}' cannot be deactivated: the host uses it, or somebody has it open ('lsblk' tells): {why}"
            )),
            error => error,
        }
    })
}

/// Whether a group has been made of just these devices, and is empty. Error: it is there, and another.
fn is_there(lvm: &Lvm, group: &GroupName, named: &[PathBuf]) -> Result<bool, DriverError> {
    let Some(found) = lvm.group(group)? else { return Ok(false) };
    let own = lvm.devices()?.into_iter().filter(|one| one.group.as_deref() == Some(&*group.to_string()));
    let own: BTreeSet<_> = own.map(|one| number_of(&one.device)).collect();
    match found.volumes == 0 && own == named.iter().map(|path| number_of(path)).collect() {
        true => Ok(true),
        false => Err(DriverError::Refused(format!(
            "there is a volume group '{group}': start the pool without building it, give the pool another name in <source>, or \
             remove that group ('vgremove {group}')"
        ))),
    }
}

/// Looks whether a device can be made LVM's: nothing of the host's uses it, and without `overwrite` nothing is on it. Blocks.
fn judge(
    path: &Path,
    overwrite: bool,
    images: impl FnOnce() -> Result<Images, DriverError>,
) -> Result<(), DriverError> {
    let device = Device::at(path).map_err(|e| failed("open", path, &e))?;
    super::build::refuse_what_is_on(&device, path, overwrite, images).map(drop)
}

/// Nobody finds what was on a device any more.
fn blank_edges(path: &Path) -> io::Result<()> {
    blank_edges_of(&Device::at(path)?.to_write()?)
}

/// The same of one that is open.
pub fn blank_edges_of(device: &File) -> io::Result<()> {
    let length = super::fill::length_of(device)?;
    let zeroes = vec![0; EDGE.min(length) as usize];
    for at in [0, length - zeroes.len() as u64] {
        device.write_all_at(&zeroes, at)?;
    }
    device.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_volume_in_a_group_can_be_is_refused_by_name() {
        let refused = |name: &str, target: &str| {
            let xml = format!("<volume><name>{name}</name><capacity>1</capacity><target>{target}</target></volume>");
            let findings = refused_of_volume(&VolumeDef::parse(&xml).unwrap());
            findings.into_iter().map(|finding| finding.message).collect::<Vec<_>>().join("; ")
        };
        assert_eq!(refused("a.img", "<format type='raw'/>"), "");
        assert!(refused("pvmove1", "").contains("LVM has 'pvmove' for itself"));
        assert!(refused("a b", "").contains("letters, digits and + _ . - alone"));
        assert!(refused("a", "<permissions><mode>0600</mode></permissions>").contains("udev says"));
    }

    #[test]
    fn a_group_is_one_pools_until_that_lets_go_of_it() {
        let (groups, group) = (HeldGroups::default(), GroupName::new("vg0").unwrap());
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let (held, is_first) = groups.take(&group, one, "one").unwrap();
        assert!(is_first);
        let refused = groups.take(&group, other, "other").unwrap_err().to_string();
        assert!(refused.contains("pool 'one' already"), "{refused}");
        let (again, is_first) = groups.take(&group, one, "one").unwrap();
        assert!(!is_first, "what is being made in it is no rest of anything");
        assert_eq!(groups.names(), ["vg0"]);
        let name = LogicalName::new("a").unwrap();
        let begun = held.begin(&name).unwrap();
        assert!(again.has(&name), "who opens it again knows what is under way");
        drop((held, again));
        assert_eq!(groups.names(), ["vg0"], "something is under way in it");
        drop(begun);
        assert!(groups.names().is_empty());
        assert!(groups.take(&group, other, "other").unwrap().1);
    }
}
