//! A pool whose volumes are the partitions of a disk: what is done to each. A volume that is made has its bytes first, where nothing
//! is on the disk, and only then a place in the table: nobody finds it before, and of one that was cut off nothing is there.

use super::contents::{Flow, check_given};
use super::disk::DEV;
use super::failed;
use super::fill::{self, Pace, length_of};
use super::mounts::Device;
use super::partitions::{ALIGNMENT, Format, Partition, Table};
use super::whole_disk::{Disk, Hold, Promise, Told};
use crate::host::given::Use;
use crate::host::workers::{ClosedAside, Errand, Stop, Workers};
use crate::host::{apart, lock};
use async_trait::async_trait;
use std::cmp::Ordering;
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

/// What can be done with pools whose volumes are partitions.
pub const FEATURES: &[&str] = &["create", "resize", "shrink", "upload", "wipe"];

/// See the module.
pub struct DiskPool {
    pub(super) pool: Uuid,
    pub(super) disk: Arc<Disk>,
    pub(super) format: Format,
    /// Where the devices of partitions are.
    pub(super) dev: PathBuf,
    pub(super) workers: Workers,
}

/// A disk in an errand. Blocks.
#[derive(Clone)]
struct Site {
    disk: Arc<Disk>,
    format: Format,
}

/// What a volume that is made has until it is one.
struct Begun {
    hold: Hold,
    promise: Promise,
    sector: u64,
}

impl Begun {
    /// Its first byte on the disk, and the first behind it.
    fn bytes(&self) -> std::ops::Range<u64> {
        self.promise.area.start * self.sector..self.promise.area.end * self.sector
    }
}

impl Site {
    fn all(&self) -> Result<(Vec<Partition>, u64), DriverError> {
        self.disk.look(self.format, |table, sector| (table.partitions(), sector))
    }

    /// What is known of a volume.
    fn look(&self, one: &Partition, sector: u64) -> VolumeLook {
        let name = self.disk.partition_name(one.number);
        let device = self.disk.device_of(one, sector);
        let told = |error: &io::Error| {
            format!("its device {DEV}/{name} cannot be used: {error}; stop and start its pool, or delete it")
        };
        let bytes = one.count * sector;
        let broken = device.as_ref().err().map(told);
        VolumeLook {
            name,
            id: one.id,
            key: Some(one.key.clone()),
            // Nothing says of a partition that it is anything else; its guest writes what is there.
            format: "raw".to_owned(),
            capacity: bytes,
            allocation: bytes,
            physical: bytes,
            broken,
            permissions: device.map_or((0, 0, 0o600), |device| device.permissions()),
            ..VolumeLook::default()
        }
    }

    fn path(&self, at: &VolumeAt) -> PathBuf {
        Path::new(DEV).join(&at.name)
    }

    /// The volume that was judged, if it is there still, and is called so.
    fn judged(&self, all: &[Partition], at: &VolumeAt) -> Option<Partition> {
        all.iter().find(|one| one.id == at.id && self.disk.partition_name(one.number) == at.name).cloned()
    }

    fn gone(&self, at: &VolumeAt) -> DriverError {
        DriverError::Storage(format!(
            "{}: there is no such partition any more; refresh the pool",
            self.path(at).display()
        ))
    }

    /// The device of a volume as it was judged.
    fn device(&self, at: &VolumeAt, deed: &str) -> Result<Device, DriverError> {
        let (all, sector) = self.all()?;
        let one = self.judged(&all, at).ok_or_else(|| self.gone(at))?;
        self.disk.device_of(&one, sector).map_err(|e| failed(deed, &self.path(at), &e))
    }

    /// Refuses to change what somebody has open. One without a device nobody has.
    fn refuse_open(&self, one: &Partition, sector: u64) -> Result<(), DriverError> {
        let path = Path::new(DEV).join(self.disk.partition_name(one.number));
        let Ok(device) = self.disk.device_of(one, sector) else { return Ok(()) };
        match is_open_elsewhere(&device, true).map_err(|e| failed("look at", &path, &e))? {
            false => Ok(()),
            true => Err(DriverError::InUse(format!("{}: somebody has it open (fuser tells who)", path.display()))),
        }
    }
}

/// Whether the host uses a device, or QEMU or one of its tools has it open: to write it, or, where it is to be `written`, at all.
fn is_open_elsewhere(device: &Device, written: bool) -> io::Result<bool> {
    lock::is_held(&device.shared()?, written)
}

impl DiskPool {
    fn site(&self) -> Site {
        Site { disk: self.disk.clone(), format: self.format }
    }

    /// One that takes moments.
    fn errand(&self, what: &str) -> Errand {
        Errand::new(self.pool, self.dev.join(what).display().to_string())
    }

    /// One that moves bytes; it stands in the way of no other of this pool.
    fn long(&self, what: &str, bytes: u64, work: &dyn Work) -> Errand {
        Errand { guest: Uuid::new_v4(), ..self.errand(what).of(bytes).until(work.cancelled()) }
    }

    async fn run<T: Send + 'static>(
        &self,
        errand: Errand,
        act: impl FnOnce(&Site, &Arc<Stop>) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let site = self.site();
        self.workers.run(errand, move |stop| act(&site, stop)).await
    }

    /// Promises a new volume its place.
    async fn begin(&self, new: &NewVolume, number: u32, work: &Arc<dyn Work>) -> Result<Begun, DriverError> {
        let (tells, capacity) = (work.clone(), new.capacity);
        self.run(self.errand(&new.name).until(work.cancelled()), move |site, _| {
            let bytes = in_units(capacity)?;
            let hold = site.disk.hold()?;
            let promise = hold.promise(site.format, number, bytes)?;
            tells.grows(bytes)?;
            let sector = hold.sector().map_err(|e| failed("read", &site.disk.path, &e))?;
            Ok(Begun { hold, promise, sector })
        })
        .await
    }

    /// Has such a place hold what it is to hold, and nothing of what was there before.
    async fn fill(&self, begun: Begun, new: &mut NewVolume, work: &Arc<dyn Work>) -> Result<Begun, DriverError> {
        let (bytes, tells) = (begun.bytes(), work.clone());
        let content = std::mem::replace(&mut new.content, Content::Empty);
        let mut from = bytes.start;
        if let Content::Given(given) = content {
            from += self.pour(&begun, &new.name, given, work).await?;
            return self.blank(begun, &new.name, from..bytes.end, work).await;
        }
        let Content::Copy { from: copied, .. } = content else {
            return self.blank(begun, &new.name, bytes, work).await;
        };
        self.run(self.long(&new.name, bytes.end - bytes.start, &**work), move |site, stop| {
            let copy = |begun: &Begun| fill::copy_into(&copied, begun.hold.file()?, bytes, &Pace::new(&tells, stop));
            copy(&begun).map_err(|e| of_disk(site, &e, stop)).map(|()| begun)
        })
        .await
    }

    async fn blank(
        &self,
        begun: Begun,
        name: &str,
        bytes: std::ops::Range<u64>,
        work: &Arc<dyn Work>,
    ) -> Result<Begun, DriverError> {
        let tells = work.clone();
        self.run(self.long(name, bytes.end - bytes.start, &**work), move |site, stop| {
            let blank = |begun: &Begun| {
                let file = begun.hold.file()?;
                fill::blank(file, bytes.start, bytes.end, &Pace::new(&tells, stop))?;
                file.sync_all()
            };
            blank(&begun).map_err(|e| of_disk(site, &e, stop)).map(|()| begun)
        })
        .await
    }

    /// Writes what a client gives to where a volume is to be; how much that was.
    async fn pour(
        &self,
        begun: &Begun,
        name: &str,
        given: GivenFile,
        work: &Arc<dyn Work>,
    ) -> Result<u64, DriverError> {
        let bytes = begun.bytes();
        let file = self.run(self.errand(name).until(work.cancelled()), |site, _| site.disk.beside()).await?;
        let room = bytes.end - bytes.start;
        work.step();
        let flow = Flow { name, path: self.dev.join(name), length: room, part: None, work };
        flow.into_at(given, Arc::new(ClosedAside::of(file)), bytes.start).await
    }

    /// Has everybody find it.
    async fn finish(&self, begun: Begun, name: &str, work: &Arc<dyn Work>) -> Result<VolumeLook, DriverError> {
        let (work, name) = (work.clone(), name.to_owned());
        self.run(self.errand(&name).until(work.cancelled()), move |site, stop| {
            let Begun { hold, promise, sector } = begun;
            stop.check()?;
            let mut made = None;
            let add = |table: &mut Table| {
                let is_in_it =
                    |area: &std::ops::Range<u64>| area.start <= promise.area.start && promise.area.end <= area.end;
                let is_free = table.free(sector, &[]).iter().any(is_in_it);
                if !is_free || table.partitions().iter().any(|one| one.number == promise.number) {
                    return Err(site.changed());
                }
                table.add(promise.number, &promise.area);
                made = table.partitions().into_iter().find(|one| one.number == promise.number);
                let id = made.as_ref().map(|one| one.id).unwrap_or_default();
                work.names(id, &name, "raw", None)?;
                work.step();
                Ok(Told::Added(promise.number))
            };
            hold.change(site.format, &*work, add)?;
            work.step();
            let made = made.ok_or_else(|| site.disk.refuse("the new partition is not in its table"))?;
            Ok(site.look(&made, sector))
        })
        .await
    }

    /// Opens a volume as it was judged; and how long it is.
    async fn open_volume(
        &self,
        volume: &VolumeAt,
        deed: &'static str,
        write: bool,
        work: &dyn Work,
    ) -> Result<(Arc<ClosedAside>, u64), DriverError> {
        let at = volume.clone();
        self.run(self.errand(&volume.name).until(work.cancelled()), move |site, _| {
            let device = site.device(&at, deed)?;
            let opened = if write { device.to_write() } else { device.shared() };
            let opened = opened.and_then(|file| length_of(&file).map(|length| (file, length)));
            let (file, length) = opened.map_err(|e| failed(deed, &site.path(&at), &e))?;
            Ok((Arc::new(ClosedAside::of(file)), length))
        })
        .await
    }
}

/// What went wrong with a disk, unless it was told to stop.
fn of_disk(site: &Site, error: &io::Error, stop: &Stop) -> DriverError {
    stop.check().err().unwrap_or_else(|| failed("write", &site.disk.path, error))
}

/// So many bytes as whole units.
fn in_units(bytes: u64) -> Result<u64, DriverError> {
    let text = || DriverError::Argument(format!("{bytes} bytes are more than a volume can have"));
    bytes.checked_next_multiple_of(ALIGNMENT).ok_or_else(text)
}

/// Refuses what cannot be made; the number that it is to have.
fn check(new: &NewVolume, disk: &Disk) -> Result<u32, DriverError> {
    let name = &new.name;
    let refuse = |why: &str| Err(DriverError::Unsupported(format!("'{name}': {why}")));
    match &new.content {
        _ if new.format != "raw" => return refuse("a partition is raw: leave out its format"),
        _ if new.secret.is_some() => return refuse("a partition is not encrypted here: leave out the secret"),
        _ if new.qcow2 != Default::default() => return refuse("compat, cluster size and features are those of qcow2"),
        _ if new.nocow => return refuse("a partition has no file system under it: leave out <nocow/>"),
        _ if new.owner != (None, None) => {
            return refuse("whose its device is udev says: leave out its owner and group");
        }
        _ if new.preallocation == Preallocation::Metadata => return refuse("only qcow2 has metadata to lay out"),
        Content::Overlay { .. } => return refuse("a partition stands on nothing: put a qcow2 volume on that"),
        Content::Converted { .. } => {
            return refuse("a partition is a copy of what is raw and stands on nothing: flatten that first");
        }
        Content::Copy { reflink: Reflink::Always, .. } => {
            return refuse("a partition shares no blocks with what is copied; use reflink 'auto'");
        }
        _ if new.capacity == 0 => {
            return Err(DriverError::Argument(format!("'{name}': say how large it is to be")));
        }
        _ => {}
    }
    disk.number_of(name).ok_or_else(|| {
        DriverError::Argument(format!(
            "'{name}' cannot be the name of a partition of {}: it is called as its device, '{}' and so on",
            disk.path.display(),
            disk.partition_name(1)
        ))
    })
}

#[async_trait]
impl OpenPool for DiskPool {
    fn real_path(&self) -> &Path {
        &self.dev
    }

    fn features(&self) -> &'static [&'static str] {
        FEATURES
    }

    async fn survey(&self, _: &KnownFormats) -> Result<Survey, DriverError> {
        self.run(self.errand(""), |site, _| {
            let room = site.disk.look(site.format, room)?;
            let (all, sector) = site.all()?;
            let volumes = all.iter().map(|one| site.look(one, sector)).collect();
            Ok(Survey { room, volumes, unnameable: 0 })
        })
        .await
    }

    async fn look(&self, names: Vec<String>, known: &KnownFormats) -> Result<Vec<VolumeLook>, DriverError> {
        let all = self.survey(known).await?.volumes;
        Ok(all.into_iter().filter(|look| names.contains(&look.name)).collect())
    }

    async fn room(&self) -> Result<Room, DriverError> {
        self.run(self.errand(""), |site, _| site.disk.look(site.format, room)).await
    }

    /// Whoever changes a partition table tells nobody.
    async fn follow(&self) -> Result<Option<mpsc::Receiver<PoolChange>>, DriverError> {
        Ok(None)
    }

    async fn create(&self, mut new: NewVolume, work: Arc<dyn Work>) -> Result<VolumeLook, DriverError> {
        let number = check(&new, &self.disk)?;
        if let Content::Given(from) = &new.content {
            check_given(&self.dev, from, Use::Read)?;
        }
        work.step();
        let begun = self.begin(&new, number, &work).await?;
        work.step();
        let begun = self.fill(begun, &mut new, &work).await?;
        self.finish(begun, &new.name, &work).await
    }

    async fn resize(&self, volume: &VolumeAt, to: NewSize, work: Arc<dyn Work>) -> Result<(), DriverError> {
        let at = volume.clone();
        work.step();
        self.run(self.long(&volume.name, to.capacity.max(volume.capacity), &*work), move |site, stop| {
            let hold = site.disk.hold()?;
            let (all, sector) = site.all()?;
            let one = site.judged(&all, &at).ok_or_else(|| site.gone(&at))?;
            site.refuse_open(&one, sector)?;
            let count = in_units(to.capacity)? / sector;
            match count.cmp(&one.count) {
                Ordering::Equal => Ok(()),
                Ordering::Less if !to.shrink => Err(DriverError::Argument(format!(
                    "'{}' has {} bytes, and would lose what is behind; say shrink",
                    at.name,
                    one.count * sector
                ))),
                Ordering::Less if count == 0 => {
                    Err(DriverError::Argument(format!("'{}' cannot have 0 bytes: delete it", at.name)))
                }
                Ordering::Less => hold.change(site.format, &*work, |table| {
                    site.still(table, &one)?;
                    table.resize(one.number, count);
                    Ok(Told::Shrunk(one.number))
                }),
                Ordering::Greater => grow(site, &hold, (&one, count, sector), &work, stop),
            }
        })
        .await
    }

    async fn wipe(&self, volume: &VolumeAt, how: Wiping, work: Arc<dyn Work>) -> Result<(), DriverError> {
        work.step();
        let (file, length) = self.open_volume(volume, "wipe", true, &*work).await?;
        let path = self.dev.join(&volume.name);
        self.run(self.long(&volume.name, length, &*work), move |_, stop| {
            let wiped = file.get().and_then(|file| fill::wipe(file, length, how, &Pace::new(&work, stop)));
            wiped.map_err(|e| match e.raw_os_error() {
                Some(libc::EOPNOTSUPP) if how == Wiping::Discard => DriverError::Unsupported(format!(
                    "{}: its disk cannot discard what is on it; use algorithm zero",
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
        check_given(&self.dev, &from, Use::Read)?;
        if sparse {
            let text = format!("'{}' is a device, and has no holes to leave: leave out sparse", volume.name);
            return Err(DriverError::Unsupported(text));
        }
        let (file, length) = self.open_volume(volume, "write", true, &*work).await?;
        work.step();
        let path = self.dev.join(&volume.name);
        let is_all = part.is_none();
        let flow = Flow { name: &volume.name, path: path.clone(), length, part, work: &work };
        let written = flow.into(from, file.clone(), false).await?;
        self.run(self.long(&volume.name, length, &*work), move |_, stop| {
            let pace = Pace::new(&work, stop);
            let end = |file: &std::fs::File| {
                if is_all {
                    fill::blank(file, written, length, &pace)?;
                }
                file.sync_all()
            };
            file.get().and_then(end).map_err(|e| failed("write", &path, &e))
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
        check_given(&self.dev, &to, Use::Write)?;
        let (file, length) = self.open_volume(volume, "read", false, &*work).await?;
        let path = self.dev.join(&volume.name);
        Flow { name: &volume.name, path, length, part, work: &work }.out(file, to, sparse).await
    }

    async fn delete(&self, volume: &VolumeAt, work: Arc<dyn Work>) -> Result<(), DriverError> {
        work.step();
        let (at, kept) = (volume.clone(), work.clone());
        self.run(self.errand(&volume.name), move |site, _| {
            let work = kept;
            let hold = site.disk.hold()?;
            let (all, sector) = site.all()?;
            let Some(one) = site.judged(&all, &at) else { return Ok(()) };
            site.refuse_open(&one, sector)?;
            hold.change(site.format, &*work, |table| {
                site.still(table, &one)?;
                table.remove(one.number);
                Ok(Told::Removed(one.number))
            })
        })
        .await?;
        Ok(())
    }

    async fn hold(&self, volume: &VolumeAt) -> Result<GivenFile, DriverError> {
        let at = volume.clone();
        let file = self.run(self.errand(&volume.name), move |site, _| {
            site.device(&at, "read")?.shared().map_err(|e| failed("read", &site.path(&at), &e))
        });
        Ok(GivenFile::new(file.await?.into(), |file| apart::close(file, || {})))
    }

    async fn serve(&self, volume: &VolumeAt, _: bool) -> Result<Served, DriverError> {
        Err(DriverError::Unsupported(format!(
            "'{}' is a partition, and what is there is not served by NBD: use Download, or give it to a machine",
            volume.name
        )))
    }

    async fn is_open_elsewhere(&self, name: &str, written: bool) -> Result<bool, DriverError> {
        let (name, path) = (name.to_owned(), self.dev.join(name));
        self.run(self.errand(&name.clone()), move |site, _| {
            let (all, sector) = site.all()?;
            let found = all.iter().find(|one| site.disk.partition_name(one.number) == name);
            // One without a device nobody has open.
            let Some(device) = found.and_then(|one| site.disk.device_of(one, sector).ok()) else { return Ok(false) };
            match device.alone() {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && !site.disk.is_held() => Ok(true),
                _ => is_open_elsewhere(&device, written).map_err(|e| failed("look at", &path, &e)),
            }
        })
        .await
    }

    /// Its partitions stay.
    async fn take_back(&self) -> Result<(), DriverError> {
        Ok(())
    }

    /// The same.
    async fn close(&self) -> Result<(), DriverError> {
        Ok(())
    }
}

impl Site {
    /// Refuses what is another by now.
    fn still(&self, table: &Table, one: &Partition) -> Result<(), DriverError> {
        match table.partitions().contains(one) {
            true => Ok(()),
            false => Err(self.changed()),
        }
    }

    fn changed(&self) -> DriverError {
        self.disk.refuse("somebody else changed its partition table meanwhile: refresh the pool")
    }
}

fn room(table: &Table, sector: u64) -> Room {
    let free: u64 = table.free(sector, &[]).iter().map(|area| area.end - area.start).sum();
    let usable = table.usable();
    let (capacity, available) = ((usable.end - usable.start) * sector, free * sector);
    Room { capacity, allocation: capacity - available, available }
}

/// Gives a partition more sectors of those behind it, which are blank. Killed anywhere, it has as many as before, or all of them. Error:
/// as many as before.
fn grow(
    site: &Site,
    hold: &Hold,
    (one, count, sector): (&Partition, u64, u64),
    work: &Arc<dyn Work>,
    stop: &Arc<Stop>,
) -> Result<(), DriverError> {
    let pace = &Pace::new(work, stop);
    let end = one.first + count;
    let promise = hold.promise_behind(site.format, one, end)?;
    let file = hold.file().map_err(|e| failed("write", &site.disk.path, &e))?;
    let blank = fill::blank(file, promise.area.start * sector, promise.area.end * sector, pace);
    blank.and_then(|()| file.sync_all()).map_err(|e| of_disk(site, &e, stop))?;
    hold.change(site.format, &**work, |table| {
        site.still(table, one)?;
        let is_free = |other: &Partition| other.number == one.number || other.first >= end || other.last() < one.first;
        if !table.partitions().iter().all(is_free) {
            return Err(site.changed());
        }
        table.resize(one.number, count);
        Ok(Told::Grown(one.number))
    })
}
