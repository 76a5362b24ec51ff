//! A pool whose volumes are those of a volume group: what is done to each. A volume that is made is marked
//! as unfinished until all that it holds is on disk; one that grows says so of itself until what is new is blank.

use super::block::VolumeDevice;
use super::contents::{Flow, check_given};
use super::fill::{self, Pace};
use super::leftovers::{self, Begun, UnderWay, shrink_back};
use super::{failed, logical};
use crate::host::apart;
use crate::host::given::Use;
use crate::host::lvm::{Change, Group, GroupName, LogicalName, LogicalVolume, LogicalVolumes, Lvm};
use crate::host::workers::{ClosedAside, Errand, Stop, Workers};
use async_trait::async_trait;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::mpsc;
use uuid::Uuid;
use virt_model::driver::storage::{
    Content, KnownFormats, NewSize, NewVolume, OpenPool, Part, PoolChange, Preallocation, Reflink, Room, Served,
    Survey, VolumeAt, VolumeLook, Wiping, Work,
};
use virt_model::driver::{DriverError, GivenFile};

/// What can be done with pools whose volumes are those of a volume group.
pub const FEATURES: &[&str] = &["create", "resize", "shrink", "upload", "wipe"];
/// Devices have no smaller blocks: no size is part of one.
const SECTOR: u64 = 512;

/// See the module.
pub struct VolumeGroup {
    pub(super) pool: Uuid,
    /// What it is called.
    pub(super) group: GroupName,
    /// Where the devices of its volumes are.
    pub(super) path: PathBuf,
    /// Those of its volumes that had no device when the pool was opened.
    pub(super) made_active: Vec<LogicalName>,
    /// No other pool is that group as long as this is there.
    pub(super) held: logical::HeldGroup,
    pub(super) workers: Workers,
}

/// A volume group in an errand. Blocks.
#[derive(Clone)]
pub(super) struct Site {
    pub(super) group: GroupName,
    pub(super) path: PathBuf,
    pub(super) under_way: Arc<UnderWay>,
}

impl Site {
    fn group(&self, lvm: &Lvm) -> Result<Group, DriverError> {
        lvm.group(&self.group)?.ok_or_else(|| logical::no_group(&self.group))
    }

    pub(super) fn device(&self, volume: &LogicalVolume, deed: &str) -> Result<VolumeDevice, DriverError> {
        let path = self.path.join(volume.name.as_str());
        VolumeDevice::of(volume, &path).map_err(|e| failed(deed, &path, &e))
    }

    /// What is known of a volume.
    fn look(&self, volume: &LogicalVolume) -> VolumeLook {
        let path = self.path.join(volume.name.as_str());
        let device = VolumeDevice::of(volume, &path);
        let broken = match (&device, volume.is_active) {
            _ if volume.grown_from.is_some() && !self.under_way.has(&volume.name) => Some(
                "it was growing when that was cut off, and gets the size that it had when its pool is refreshed"
                    .to_owned(),
            ),
            (_, false) => Some(
                "it is not active: activate it ('lvchange --activate y --ignoreactivationskip'), and refresh its pool"
                    .to_owned(),
            ),
            (Err(error), true) => Some(format!("its device {} cannot be found: {error}", path.display())),
            (Ok(_), true) => None,
        };
        VolumeLook {
            name: volume.name.to_string(),
            id: volume.id(),
            key: Some(volume.key.clone()),
            // Nothing says of a volume that it is anything else; its guest writes what is there.
            format: "raw".to_owned(),
            capacity: volume.bytes,
            allocation: volume.taken,
            physical: volume.bytes,
            origin: volume.origin.as_ref().map(LogicalName::to_string),
            broken,
            permissions: device.map_or((0, 0, 0o600), |device| device.permissions()),
            ..VolumeLook::default()
        }
    }

    /// The volume that was judged, if it is there still, and is called so.
    fn judged(&self, lvm: &Lvm, at: &VolumeAt) -> Result<Option<LogicalVolume>, DriverError> {
        let Some(found) = lvm.volumes(&self.group)?.into_iter().find(|volume| volume.id() == at.id) else {
            return Ok(None);
        };
        match found.name.as_str() == at.name {
            true => Ok(Some(found)),
            false => Err(DriverError::Refused(format!(
                "{}: that volume is called '{}' by now; refresh the pool, and try again",
                self.path.join(&at.name).display(),
                found.name
            ))),
        }
    }

    /// The same where it must be there.
    fn there(&self, lvm: &Lvm, at: &VolumeAt) -> Result<LogicalVolume, DriverError> {
        self.judged(lvm, at)?.ok_or_else(|| {
            DriverError::Storage(format!("{}: there is no such volume any more", self.path.join(&at.name).display()))
        })
    }

    pub(super) fn named(&self, lvm: &Lvm, name: &LogicalName) -> Result<LogicalVolume, DriverError> {
        let found = lvm.volumes(&self.group)?.into_iter().find(|volume| volume.name == *name);
        found.ok_or_else(|| DriverError::Storage(format!("volume group '{}' has no volume '{name}'", self.group)))
    }

    /// Removes a volume that was being made. What cannot be removed now is when the pool is refreshed.
    fn remove_unfinished(&self, lvm: &Lvm, volume: &LogicalVolume) {
        if let Err(error) = lvm.change(&self.group, &Change::Remove(&volume.key)) {
            tracing::warn!(%error, "{} stays until its pool is refreshed", self.path.join(volume.name.as_str()).display());
        }
    }
}

impl VolumeGroup {
    fn site(&self) -> Site {
        Site { group: self.group.clone(), path: self.path.clone(), under_way: self.held.clone() }
    }

    /// One that takes moments.
    fn errand(&self, what: &str) -> Errand {
        Errand::new(self.pool, self.path.join(what).display().to_string())
    }

    /// One that takes as long as so many bytes do, which stands in the way of no other, and ends whether it is wanted still or not.
    fn to_its_end(&self, what: &str, bytes: u64) -> Errand {
        Errand { guest: Uuid::new_v4(), ..self.errand(what).of(bytes) }
    }

    /// One that moves bytes; it stands in the way of no other of this pool.
    fn long(&self, what: &str, bytes: u64, work: &dyn Work) -> Errand {
        self.to_its_end(what, bytes).until(work.cancelled())
    }

    async fn run<T: Send + 'static>(
        &self,
        errand: Errand,
        act: impl FnOnce(&Site, &Arc<Stop>) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let site = self.site();
        self.workers.run(errand, move |stop| act(&site, stop)).await
    }

    /// Makes a volume that nobody finds yet, and which holds what was there before.
    async fn begin(
        &self,
        new: &NewVolume,
        name: LogicalName,
        work: &Arc<dyn Work>,
    ) -> Result<LogicalVolume, DriverError> {
        let bytes = in_units(new.capacity, SECTOR)?;
        let tells = work.clone();
        self.run(self.errand(&new.name).until(work.cancelled()), move |site, stop| {
            let lvm = Lvm(stop);
            match lvm.volumes(&site.group)?.into_iter().find(|volume| volume.name == name) {
                // Nobody makes it any more.
                Some(left) if left.is_unfinished => lvm.change(&site.group, &Change::Remove(&left.key))?,
                Some(_) => {
                    return Err(DriverError::Exists(format!("volume group '{}' has a volume '{name}'", site.group)));
                }
                None => {}
            }
            lvm.change(&site.group, &Change::Make(&name, bytes))?;
            let made = site.named(&lvm, &name)?;
            tells.grows(made.bytes).inspect_err(|_| site.remove_unfinished(&lvm, &made))?;
            Ok(made)
        })
        .await
    }

    /// Has such a volume hold what it is to hold, and nothing of what was there before.
    async fn fill(&self, made: &LogicalVolume, new: &mut NewVolume, work: &Arc<dyn Work>) -> Result<(), DriverError> {
        let errand = self.long(&new.name, made.bytes, &**work);
        let (volume, tells) = (made.clone(), work.clone());
        match std::mem::replace(&mut new.content, Content::Empty) {
            Content::Given(from) => self.pour(made, &new.name, from, work).await,
            Content::Copy { from, .. } => {
                self.run(errand, move |site, stop| {
                    let (device, length) = opened(site, &volume)?;
                    let copied = fill::copy_into(&from, &device, 0..length, &Pace::new(&tells, stop));
                    copied.map_err(|e| of_device(site, &volume, &e, stop))
                })
                .await
            }
            _ => {
                self.run(errand, move |site, stop| {
                    let (device, length) = opened(site, &volume)?;
                    let blank =
                        fill::blank(&device, 0, length, &Pace::new(&tells, stop)).and_then(|()| device.sync_all());
                    blank.map_err(|e| of_device(site, &volume, &e, stop))
                })
                .await
            }
        }
    }

    /// Has all of a volume hold what a client gives, and nothing behind that.
    async fn pour(
        &self,
        volume: &LogicalVolume,
        name: &str,
        from: GivenFile,
        work: &Arc<dyn Work>,
    ) -> Result<(), DriverError> {
        let found = volume.clone();
        let (file, length) =
            self.run(self.errand(name).until(work.cancelled()), move |site, _| opened(site, &found)).await?;
        let file = Arc::new(ClosedAside::of(file));
        work.step();
        let flow = Flow { name, path: self.path.join(name), length, part: None, work };
        let written = flow.into(from, file.clone(), false).await?;
        let (found, tells) = (volume.clone(), work.clone());
        self.run(self.long(name, length, &**work), move |site, stop| {
            let blank = || {
                let device = file.get()?;
                fill::blank(device, written, length, &Pace::new(&tells, stop))?;
                device.sync_all()
            };
            blank().map_err(|e| of_device(site, &found, &e, stop))
        })
        .await
    }

    /// Has everybody find it.
    async fn finish(&self, made: &LogicalVolume, work: &Arc<dyn Work>) -> Result<VolumeLook, DriverError> {
        let (made, work) = (made.clone(), work.clone());
        self.run(self.errand(made.name.as_str()).until(work.cancelled()), move |site, stop| {
            let lvm = Lvm(stop);
            work.names(made.id(), made.name.as_str(), "raw", None)?;
            work.step();
            lvm.change(&site.group, &Change::Finish(&made.name))?;
            work.step();
            Ok(site.look(&made))
        })
        .await
    }

    /// Opens a volume as it was judged.
    async fn open_volume(
        &self,
        volume: &VolumeAt,
        deed: &'static str,
        write: bool,
        work: &dyn Work,
    ) -> Result<(Arc<ClosedAside>, u64), DriverError> {
        let at = volume.clone();
        self.run(self.errand(&volume.name).until(work.cancelled()), move |site, stop| {
            let device = site.device(&site.there(&Lvm(stop), &at)?, deed)?;
            let opened = if write { device.to_write() } else { device.to_read() };
            let (file, length) = opened.map_err(|e| failed(deed, &site.path.join(&at.name), &e))?;
            Ok((Arc::new(ClosedAside::of(file)), length))
        })
        .await
    }
}

fn opened(site: &Site, volume: &LogicalVolume) -> Result<(File, u64), DriverError> {
    let path = site.path.join(volume.name.as_str());
    site.device(volume, "write")?.to_write().map_err(|e| failed("write", &path, &e))
}

/// What went wrong with a volume's device, unless it was told to stop.
fn of_device(site: &Site, volume: &LogicalVolume, error: &io::Error, stop: &Stop) -> DriverError {
    let why = || failed("write", &site.path.join(volume.name.as_str()), error);
    stop.check().err().unwrap_or_else(why)
}

/// So many bytes as whole units.
fn in_units(bytes: u64, unit: u64) -> Result<u64, DriverError> {
    let text = || DriverError::Argument(format!("{bytes} bytes are more than a volume can have"));
    bytes.checked_next_multiple_of(unit).ok_or_else(text)
}

/// The volume that is to get another size, with what was cut off in it undone. Blocks. Error: it cannot get one.
fn resizable(site: &Site, lvm: &Lvm, at: &VolumeAt) -> Result<LogicalVolume, DriverError> {
    shrink_back(site, lvm, &site.there(lvm, at)?)?;
    let found = site.there(lvm, at)?;
    match &found.origin {
        None => Ok(found),
        Some(origin) => Err(DriverError::Unsupported(format!(
            "'{}' shows what is in '{origin}', and has no size of its own here: copy it to a new volume, and resize that",
            at.name
        ))),
    }
}

/// Refuses to remove what others in its group would go with. Error: they are named.
fn refuse_origin(found: &LogicalVolume, all: &[LogicalVolume]) -> Result<(), DriverError> {
    let others = all.iter().filter(|other| other.origin.as_ref() == Some(&found.name));
    let others: Vec<String> = others.map(|other| format!("'{}'", other.name)).collect();
    match others.is_empty() {
        true => Ok(()),
        false => Err(DriverError::Refused(format!(
            "'{}' is the origin of {}, which would go, too: delete those first",
            found.name,
            others.join(", ")
        ))),
    }
}

/// Refuses what cannot be made, and what it is to be called.
fn check(new: &NewVolume) -> Result<LogicalName, DriverError> {
    let name = LogicalName::new(&new.name).map_err(DriverError::Argument)?;
    let refuse = |why: &str| Err(DriverError::Unsupported(format!("'{name}': {why}")));
    match &new.content {
        _ if new.format != "raw" => return refuse("what is in a volume group is raw: leave out its format"),
        _ if new.secret.is_some() => {
            return refuse("what is in a volume group is not encrypted here: leave out the secret");
        }
        _ if new.qcow2 != Default::default() => return refuse("compat, cluster size and features are those of qcow2"),
        _ if new.nocow => return refuse("a volume in a volume group has no file system under it: leave out <nocow/>"),
        _ if new.owner != (None, None) => {
            return refuse("whose its device is udev says: leave out its owner and group");
        }
        _ if new.preallocation == Preallocation::Metadata => return refuse("only qcow2 has metadata to lay out"),
        Content::Overlay { .. } => {
            return refuse("a volume in a volume group stands on nothing: put a qcow2 volume on that");
        }
        Content::Converted { .. } => {
            return refuse(
                "what is in a volume group is a copy of what is raw and stands on nothing: flatten that first",
            );
        }
        Content::Copy { reflink: Reflink::Always, .. } => {
            return refuse("a volume in a volume group shares no blocks with what is copied; use reflink 'auto'");
        }
        _ => {}
    }
    match new.capacity {
        0 => Err(DriverError::Argument(format!("'{name}': say how large it is to be: nothing makes it larger later"))),
        _ => Ok(name),
    }
}

#[async_trait]
impl OpenPool for VolumeGroup {
    fn real_path(&self) -> &Path {
        &self.path
    }

    fn features(&self) -> &'static [&'static str] {
        FEATURES
    }

    async fn survey(&self, _: &KnownFormats) -> Result<Survey, DriverError> {
        let (survey, has_leftovers) = self.run(self.errand(""), surveyed).await?;
        if !has_leftovers {
            return Ok(survey);
        }
        let errand = Errand { limit: logical::PATIENCE, ..self.to_its_end("", 0) };
        self.run(errand, |site, stop| leftovers::tidy(site, &Lvm(stop))).await?;
        Ok(self.run(self.errand(""), surveyed).await?.0)
    }

    async fn look(&self, names: Vec<String>, _: &KnownFormats) -> Result<Vec<VolumeLook>, DriverError> {
        let all = self.run(self.errand(""), surveyed).await?.0.volumes;
        Ok(all.into_iter().filter(|look| names.contains(&look.name)).collect())
    }

    async fn room(&self) -> Result<Room, DriverError> {
        self.run(self.errand(""), |site, stop| Ok(room(&site.group(&Lvm(stop))?))).await
    }

    /// Whoever changes a volume group tells nobody.
    async fn follow(&self) -> Result<Option<mpsc::Receiver<PoolChange>>, DriverError> {
        Ok(None)
    }

    async fn create(&self, mut new: NewVolume, work: Arc<dyn Work>) -> Result<VolumeLook, DriverError> {
        let name = check(&new)?;
        self.group.check_new(&name).map_err(DriverError::Argument)?;
        let _begun = self.held.begin(&name)?;
        if let Content::Given(from) = &new.content {
            check_given(&self.path, from, Use::Read)?;
        }
        work.step();
        let made = self.begin(&new, name, &work).await?;
        work.step();
        let filled = async {
            self.fill(&made, &mut new, &work).await?;
            self.finish(&made, &work).await
        };
        let done = filled.await;
        if done.is_err() {
            let (errand, kept) = (self.to_its_end(&new.name, made.bytes), work.clone());
            let undo = move |site: &Site, stop: &Arc<Stop>| {
                let _until_the_end = kept;
                site.remove_unfinished(&Lvm(stop), &made);
                Ok(())
            };
            if let Err(error) = self.run(errand, undo).await {
                tracing::warn!(%error, "volume '{}' that was not made stays until its pool is refreshed", new.name);
            }
        }
        done
    }

    async fn resize(&self, volume: &VolumeAt, to: NewSize, work: Arc<dyn Work>) -> Result<(), DriverError> {
        let at = volume.clone();
        let begun = self.held.begin(&LogicalName::new(&volume.name).map_err(DriverError::Argument)?)?;
        work.step();
        self.run(self.long(&volume.name, to.capacity.max(volume.capacity), &*work), move |site, stop| {
            let (_until_the_end, lvm): (Begun, _) = (begun, Lvm(stop));
            let found = resizable(site, &lvm, &at)?;
            let bytes = in_units(to.capacity, SECTOR.max(site.group(&lvm)?.extent))?;
            if to.allocate && found.is_thin {
                let text = format!("'{}' is thin: it takes what is written to it; leave out allocate", at.name);
                return Err(DriverError::Unsupported(text));
            }
            match bytes.cmp(&found.bytes) {
                std::cmp::Ordering::Equal => Ok(()),
                std::cmp::Ordering::Less if !to.shrink => Err(DriverError::Argument(format!(
                    "'{}' has {} bytes, and would lose what is behind; say shrink",
                    at.name, found.bytes
                ))),
                std::cmp::Ordering::Less => lvm.change(&site.group, &Change::Reduce(&found.name, bytes)),
                std::cmp::Ordering::Greater => grow(site, &found, bytes, &work, stop),
            }
        })
        .await
    }

    async fn wipe(&self, volume: &VolumeAt, how: Wiping, work: Arc<dyn Work>) -> Result<(), DriverError> {
        work.step();
        let (file, length) = self.open_volume(volume, "wipe", true, &*work).await?;
        let path = self.path.join(&volume.name);
        self.run(self.long(&volume.name, length, &*work), move |_, stop| {
            let wiped = file.get().and_then(|file| fill::wipe(file, length, how, &Pace::new(&work, stop)));
            wiped.map_err(|e| match e.raw_os_error() {
                Some(libc::EOPNOTSUPP) if how == Wiping::Discard => DriverError::Unsupported(format!(
                    "{}: its device cannot discard what is on it; use algorithm zero",
                    path.display()
                )),
                _ => stop.check().err().unwrap_or_else(|| failed("wipe", &path, &e)),
            })
        })
        .await
    }

    async fn upload(
        &self,
        volume: &VolumeAt,
        from: GivenFile,
        part: Option<Part>,
        sparse: bool,
        work: Arc<dyn Work>,
    ) -> Result<(), DriverError> {
        check_given(&self.path, &from, Use::Read)?;
        if sparse {
            let text = format!("'{}' is a device, and has no holes to leave: leave out sparse", volume.name);
            return Err(DriverError::Unsupported(text));
        }
        if part.is_none() {
            let at = volume.clone();
            let errand = self.errand(&volume.name).until(work.cancelled());
            let found = self.run(errand, move |site, stop| site.there(&Lvm(stop), &at)).await?;
            return self.pour(&found, &volume.name, from, &work).await;
        }
        let (file, length) = self.open_volume(volume, "write", true, &*work).await?;
        work.step();
        let path = self.path.join(&volume.name);
        let flow = Flow { name: &volume.name, path: path.clone(), length, part, work: &work };
        let written = flow.into(from, file.clone(), false).await?;
        self.run(self.long(&volume.name, written, &*work), move |_, _| {
            let _until_the_end = work;
            file.get().and_then(|file| file.sync_all()).map_err(|e| failed("write", &path, &e))
        })
        .await
    }

    async fn download(
        &self,
        volume: &VolumeAt,
        to: GivenFile,
        part: Option<Part>,
        sparse: bool,
        work: Arc<dyn Work>,
    ) -> Result<(), DriverError> {
        check_given(&self.path, &to, Use::Write)?;
        let (file, length) = self.open_volume(volume, "read", false, &*work).await?;
        let path = self.path.join(&volume.name);
        Flow { name: &volume.name, path, length, part, work: &work }.out(file, to, sparse).await
    }

    async fn delete(&self, volume: &VolumeAt, work: Arc<dyn Work>) -> Result<(), DriverError> {
        work.step();
        let (at, kept) = (volume.clone(), work.clone());
        self.run(self.to_its_end(&volume.name, volume.capacity), move |site, stop| {
            let (_until_the_end, lvm) = (kept, Lvm(stop));
            let Some(found) = site.judged(&lvm, &at)? else { return Ok(()) };
            refuse_origin(&found, &lvm.volumes(&site.group)?)?;
            lvm.change(&site.group, &Change::Remove(&found.key))
        })
        .await?;
        work.step();
        Ok(())
    }

    async fn hold(&self, volume: &VolumeAt) -> Result<GivenFile, DriverError> {
        let at = volume.clone();
        let file = self.run(self.errand(&volume.name), move |site, stop| {
            let device = site.device(&site.there(&Lvm(stop), &at)?, "read")?;
            device.to_read().map_err(|e| failed("read", &site.path.join(&at.name), &e))
        });
        Ok(GivenFile::new(file.await?.0.into(), |file| apart::close(file, || {})))
    }

    async fn serve(&self, volume: &VolumeAt, _: bool) -> Result<Served, DriverError> {
        Err(DriverError::Unsupported(format!(
            "'{}' is in a volume group, and what is there is not served by NBD: use Download, or give it to a machine",
            volume.name
        )))
    }

    async fn is_open_elsewhere(&self, name: &str, written: bool) -> Result<bool, DriverError> {
        let name = LogicalName::new(name).map_err(DriverError::Argument)?;
        self.run(self.errand(name.as_str()), move |site, stop| {
            let all = Lvm(stop).volumes(&site.group)?;
            let found = all.into_iter().find(|volume| volume.name == name && volume.is_active);
            let Some(found) = found else { return Ok(false) };
            let path = site.path.join(name.as_str());
            let is_open = site.device(&found, "look at")?.is_open_elsewhere(written);
            is_open.map_err(|e| failed("look at", &path, &e))
        })
        .await
    }

    async fn take_back(&self) -> Result<(), DriverError> {
        let (made_active, errand) = (self.made_active.clone(), Errand { limit: logical::PATIENCE, ..self.errand("") });
        self.run(errand, move |site, stop| logical::take_back(&site.group, &made_active, stop)).await
    }

    async fn close(&self) -> Result<(), DriverError> {
        let errand = Errand { limit: logical::PATIENCE, ..self.errand("") };
        self.run(errand, |site, stop| logical::deactivate(&site.group, stop)).await
    }
}

/// What is in a group, and whether something in it is a leftover. Blocks.
fn surveyed(site: &Site, stop: &Arc<Stop>) -> Result<(Survey, bool), DriverError> {
    let lvm = Lvm(stop);
    let room = room(&site.group(&lvm)?);
    let LogicalVolumes { volumes, unnameable } = lvm.all_of(&site.group)?;
    let is_left = |volume: &LogicalVolume| leftovers::is_leftover(volume) && !site.under_way.has(&volume.name);
    let looks = volumes.iter().filter(|volume| !volume.is_pool && !volume.is_unfinished);
    let survey = Survey { room, volumes: looks.map(|volume| site.look(volume)).collect(), unnameable };
    Ok((survey, volumes.iter().any(is_left)))
}

fn room(group: &Group) -> Room {
    Room { capacity: group.bytes, allocation: group.bytes.saturating_sub(group.free), available: group.free }
}

/// Gives a volume more bytes, which are blank. Killed anywhere, it has as many as before when its pool is opened, or all of them.
/// Blocks. Error: it has as many as before.
fn grow(
    site: &Site,
    volume: &LogicalVolume,
    bytes: u64,
    work: &Arc<dyn Work>,
    stop: &Arc<Stop>,
) -> Result<(), DriverError> {
    let (lvm, group, name, before) = (Lvm(stop), &site.group, &volume.name, volume.bytes);
    if volume.is_thin {
        return lvm.change(group, &Change::Extend(name, bytes));
    }
    // Behind a device of another length is not what is new.
    let as_told = |length, told| match length == told {
        true => Ok(()),
        false => Err(DriverError::Refused(format!(
            "'{name}' has {told} bytes as LVM tells, and its device {length}: what is new in it cannot be told; refresh the pool"
        ))),
    };
    as_told(opened(site, volume)?.1, before)?;
    lvm.change(group, &Change::MarkGrown(name, before))?;
    // What went wrong may be that it is not wanted any more.
    let to_the_end = Arc::new(Stop::default());
    let grown = lvm.change(group, &Change::Extend(name, bytes)).and_then(|()| {
        let (device, length) = opened(site, volume)?;
        // It may be more than was asked for, where it is in stripes.
        as_told(length, site.named(&lvm, name)?.bytes)?;
        let blank = fill::blank(&device, before, length, &Pace::new(work, stop)).and_then(|()| device.sync_all());
        blank.map_err(|e| of_device(site, volume, &e, stop))
    });
    let grown = grown.and_then(|()| Lvm(&to_the_end).change(group, &Change::MarkBlank(name, before)));
    grown.inspect_err(|_| {
        let undo = Lvm(&to_the_end);
        let undone = site.named(&undo, name).and_then(|now| shrink_back(site, &undo, &now));
        if let Err(error) = undone {
            tracing::warn!(%error, "volume '{name}' of volume group '{group}' has its old size when its pool is refreshed");
        }
    })
}
