//! A whole disk: found, held while its partition table is looked at and changed, and told to the kernel partition by partition.
//!
//! ```text
//!  Disks ─▶ Disk, one for each ─┬─▶ Hold   the one descriptor that is alone on the disk, and has its lock
//!                               └─▶ areas promised to volumes that are being made
//! ```
//!
//! Who changes a table has the disk to itself: no file system of the host's is mounted from it, nothing is made of it, and whoever
//! keeps to the lock on it (udev does, and so do tools of partitions) waits. In virtd all work on the disk shares that one descriptor.

use super::failed;
use super::mount_table::{lines, table};
use super::mounts::Device;
use super::partitions::{Format, Medium, Partition, Table};
use crate::host::{SYSFS, lock};
use rustix::fs::{FlockOperation, flock, major, minor};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use virt_model::driver::DriverError;
use virt_model::driver::storage::Work;

/// What the kernel is asked of a disk: how long its sectors are, and to have other partitions.
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKPG: libc::c_ulong = 0x1269;
const ADD: libc::c_int = 1;
const REMOVE: libc::c_int = 2;
const RESIZE: libc::c_int = 3;
/// In which unit the kernel tells of partitions, in bytes.
const TOLD: u64 = 512;

/// All disks that somebody has here, by their numbers.
#[derive(Clone, Default)]
pub struct Disks(Arc<Mutex<HashMap<u64, Weak<Disk>>>>);

/// A whole disk.
pub struct Disk {
    /// Where a definition says that it is.
    pub path: PathBuf,
    device: Device,
    /// What the kernel calls it.
    name: String,
    holders: Mutex<Holders>,
    closed: Condvar,
    promised: Mutex<Vec<(u32, Range<u64>)>>,
}

/// Who has the disk to themselves.
#[derive(Default)]
struct Holders {
    file: Option<Arc<File>>,
    count: usize,
    /// The last of them has gone, and what they had is not closed yet.
    closing: bool,
}

/// The disk is nobody else's as long as this is there.
pub struct Hold {
    disk: Arc<Disk>,
    file: Option<Arc<File>>,
}

/// An area and a number are a new volume's as long as this is there.
pub struct Promise {
    disk: Arc<Disk>,
    /// Its number.
    pub number: u32,
    /// Its sectors.
    pub area: Range<u64>,
}

/// What the kernel has of a partition, in units of 512 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    number: u32,
    first: u64,
    count: u64,
}

impl Disks {
    /// The disk at a path. Blocks. Error: it is none, or a part of one.
    pub fn at(&self, path: &Path) -> Result<Arc<Disk>, DriverError> {
        let device = Device::at(path).map_err(|e| failed("open", path, &e))?;
        let number = device.number();
        let own = format!("{SYSFS}/dev/block/{}:{}", major(number), minor(number));
        let own = fs::canonicalize(own).map_err(|e| failed("look at", path, &e))?;
        let name = own.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let refuse = |why: &str| Err(DriverError::Refused(format!("{}: {why}", path.display())));
        if own.join("partition").exists() {
            return refuse("it is a partition: name the whole disk, or use a pool of type 'logical' or 'fs' on it");
        }
        if own.join("dm").exists() {
            return refuse(
                "it is made by the device mapper, and has no partitions of the kernel's: name what it is made of",
            );
        }
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, disk| disk.strong_count() > 0);
        if let Some(disk) = all.get(&number).and_then(Weak::upgrade) {
            return Ok(disk);
        }
        let disk = Arc::new(Disk {
            path: path.to_owned(),
            device,
            name,
            holders: Mutex::default(),
            closed: Condvar::new(),
            promised: Mutex::default(),
        });
        all.insert(number, Arc::downgrade(&disk));
        Ok(disk)
    }
}

impl Disk {
    /// What the kernel calls a partition of it.
    pub fn partition_name(&self, number: u32) -> String {
        match self.name.ends_with(|last: char| last.is_ascii_digit()) {
            true => format!("{}p{number}", self.name),
            false => format!("{}{number}", self.name),
        }
    }

    /// The number of the partition that is called so.
    pub fn number_of(&self, name: &str) -> Option<u32> {
        let separator = if self.name.ends_with(|last: char| last.is_ascii_digit()) { "p" } else { "" };
        let digits = name.strip_prefix(&*self.name)?.strip_prefix(separator)?;
        let number = digits.parse().ok().filter(|number| *number > 0)?;
        (self.partition_name(number) == name).then_some(number)
    }

    /// Has the disk for us, as all in virtd have it that hold it. Blocks, until who has its lock lets go. Error: `InUse`, if the host
    /// uses it or QEMU has it open.
    pub fn hold(self: &Arc<Disk>) -> Result<Hold, DriverError> {
        let mut holders = self.holders();
        while holders.closing {
            holders = self.closed.wait(holders).unwrap_or_else(PoisonError::into_inner);
        }
        let file = match &holders.file {
            Some(file) => file.clone(),
            None => {
                let file = self.device.alone_to_write().map_err(|e| match e.raw_os_error() {
                    Some(libc::EBUSY) => self.in_use(),
                    _ => failed("open", &self.path, &e),
                })?;
                flock(&file, FlockOperation::LockExclusive).map_err(|e| failed("lock", &self.path, &e.into()))?;
                if lock::is_held(&file, true).map_err(|e| failed("look at", &self.path, &e))? {
                    let path = self.path.display();
                    return Err(DriverError::InUse(format!(
                        "{path}: QEMU or one of its tools has it open (fuser tells who)"
                    )));
                }
                Arc::new(file)
            }
        };
        holders.file = Some(file.clone());
        holders.count += 1;
        Ok(Hold { disk: self.clone(), file: Some(file) })
    }

    /// Does something with its table as it is now, which is read only. Blocks. Error: it has none that we can keep.
    pub fn look<T>(&self, format: Format, look: impl FnOnce(&Table, u64) -> T) -> Result<T, DriverError> {
        // Who writes one has it meanwhile.
        let _promised = self.promised();
        let held = self.holders().file.clone();
        let file = match held {
            Some(file) => file,
            None => Arc::new(self.device.shared().map_err(|e| failed("read", &self.path, &e))?),
        };
        let (table, _) = self.table(format, &file)?;
        Ok(look(&table, sector_of(&file).map_err(|e| failed("read", &self.path, &e))?))
    }

    fn table(&self, format: Format, file: &File) -> Result<(Table, bool), DriverError> {
        let medium = medium(file).map_err(|e| failed("read", &self.path, &e))?;
        Table::read(format, &medium).map_err(|why| self.refuse(&why))
    }

    /// The disk is not so that we could use it.
    pub fn refuse(&self, why: &str) -> DriverError {
        DriverError::Storage(format!("{}: {why}", self.path.display()))
    }

    /// Somebody of the host's has it, or a part of it, for themselves.
    fn in_use(&self) -> DriverError {
        let who = self.users().join(", ");
        let who = if who.is_empty() { "somebody has it for themselves (lsblk tells more)" } else { &who };
        DriverError::InUse(format!("{}: the host uses it: {who}; end that first", self.path.display()))
    }

    /// What the host uses it, or its partitions, for, in words for people. It is not opened for that.
    pub fn users(&self) -> Vec<String> {
        let mut who = Vec::new();
        let names: Vec<String> = [self.name.clone()]
            .into_iter()
            .chain(self.known().iter().map(|one| self.partition_name(one.number)))
            .collect();
        for name in &names {
            let own = Path::new(SYSFS).join("class/block").join(name);
            let number = fs::read_to_string(own.join("dev")).unwrap_or_default();
            let mounted = table().map(|table| lines(&table).collect::<Vec<_>>()).unwrap_or_default();
            let here = mounted.into_iter().find(|line| {
                let (major, minor) = line.device;
                format!("{major}:{minor}") == number.trim() || line.source == Path::new("/dev").join(name)
            });
            who.extend(here.map(|line| format!("/dev/{name} is mounted on {}", line.at.display())));
            let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
            if swaps.lines().any(|line| line.split_whitespace().next() == Some(&*format!("/dev/{name}"))) {
                who.push(format!("the host swaps to /dev/{name}"));
            }
            for holder in fs::read_dir(own.join("holders")).into_iter().flatten().flatten() {
                who.push(format!("{} is made of /dev/{name}", holder.file_name().to_string_lossy()));
            }
        }
        who
    }

    /// The partitions that the kernel has of it.
    fn known(&self) -> Vec<Known> {
        let own = Path::new(SYSFS).join("class/block").join(&self.name);
        let entries = fs::read_dir(own).into_iter().flatten().flatten();
        let of = |folder: PathBuf| {
            let said = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
            Some(Known { number: said("partition")? as u32, first: said("start")?, count: said("size")? })
        };
        entries.filter_map(|entry| of(entry.path())).collect()
    }

    /// The device of a partition. Error: the kernel has none, or another than the table says.
    pub fn device_of(&self, one: &Partition, sector: u64) -> io::Result<Device> {
        let name = self.partition_name(one.number);
        match self.known().iter().find(|known| known.number == one.number) {
            None => return Err(io::Error::other("the kernel has no such partition")),
            Some(known) if *known != told(one, sector) => {
                return Err(io::Error::other("the kernel has it elsewhere than the table says"));
            }
            Some(_) => {}
        }
        let device = Device::at(&Path::new("/dev").join(&name))?;
        let number = fs::read_to_string(Path::new(SYSFS).join("class/block").join(&name).join("dev"))?;
        match number.trim() == format!("{}:{}", major(device.number()), minor(device.number())) {
            true => Ok(device),
            false => Err(io::Error::other("that device is another's")),
        }
    }

    /// Whether the kernel has just the partitions of a table.
    fn is_known(&self, table: &Table, sector: u64) -> bool {
        let (mut known, mut all): (Vec<_>, Vec<_>) =
            (self.known(), table.partitions().iter().map(|one| told(one, sector)).collect());
        known.sort_by_key(|one| one.number);
        all.sort_by_key(|one| one.number);
        known == all
    }

    fn holders(&self) -> MutexGuard<'_, Holders> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn promised(&self) -> MutexGuard<'_, Vec<(u32, Range<u64>)>> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody in virtd has it for us.
    pub fn is_held(&self) -> bool {
        self.holders().count > 0
    }

    /// Opens it to be read, beside whoever uses it.
    pub fn shared(&self) -> io::Result<File> {
        self.device.shared()
    }

    /// Opens it beside who [has it](Disk::hold), to write what they have promised.
    pub fn beside(&self) -> Result<File, DriverError> {
        self.device.to_write().map_err(|e| failed("write", &self.path, &e))
    }

    /// Whether something is being made on it.
    pub fn is_busy(&self) -> bool {
        !self.promised().is_empty()
    }
}

impl Hold {
    /// The descriptor that is alone on the disk.
    pub fn file(&self) -> io::Result<&File> {
        self.file.as_deref().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// How long a sector is, in bytes.
    pub fn sector(&self) -> io::Result<u64> {
        sector_of(self.file()?)
    }

    /// Has the table of the disk whole, and the kernel know it. Blocks. Error: it is none, or something of it is open.
    pub fn mend(&self, format: Format) -> Result<(), DriverError> {
        let _promised = self.disk.promised();
        let cannot = |e: io::Error| failed("mend the partition table of", &self.disk.path, &e);
        let file = self.file().map_err(cannot)?;
        let (table, is_torn) = self.disk.table(format, file)?;
        let medium = medium(file).map_err(cannot)?;
        if is_torn {
            tracing::warn!("{}: one of its two partition tables was torn, and is made whole", self.disk.path.display());
            table.write(&medium).map_err(cannot)?;
        }
        if self.disk.is_known(&table, medium.sector) {
            return Ok(());
        }
        let all = table.partitions();
        for known in self.disk.known() {
            if !all.iter().any(|one| told(one, medium.sector) == known) {
                tell(file, REMOVE, known.number, 0, 0).map_err(cannot)?;
            }
        }
        let known = self.disk.known();
        for one in all.iter().filter(|one| !known.contains(&told(one, medium.sector))) {
            tell_of(file, ADD, one, medium.sector).map_err(cannot)?;
        }
        Ok(())
    }

    /// Promises a place for so many bytes, and a number, to a new volume. Blocks. Error: `Exists`, `NoSpace`, or what is wrong with the
    /// table.
    pub fn promise(&self, format: Format, number: u32, bytes: u64) -> Result<Promise, DriverError> {
        let mut promised = self.disk.promised();
        let path = &self.disk.path;
        let file = self.file().map_err(|e| failed("read", path, &e))?;
        let sector = sector_of(file).map_err(|e| failed("read", path, &e))?;
        let (table, _) = self.disk.table(format, file)?;
        let name = self.disk.partition_name(number);
        let is_free = |number: u32| {
            !promised.iter().any(|(other, _)| *other == number)
                && !table.partitions().iter().any(|one| one.number == number)
        };
        if !is_free(number) {
            return Err(DriverError::Exists(format!("{} has a partition '{name}'", path.display())));
        }
        if number > table.most() {
            let (most, format) = (table.most(), format.name());
            return Err(DriverError::Argument(format!(
                "'{name}': the partition table (format '{format}') of {} has {most} partitions at most",
                path.display()
            )));
        }
        let areas: Vec<Range<u64>> = promised.iter().map(|(_, area)| area.clone()).collect();
        let free = table.free(sector, &areas);
        let area = super::partitions::place(&free, bytes / sector).ok_or_else(|| {
            let most = free.iter().map(|area| area.end - area.start).max().unwrap_or(0) * sector;
            DriverError::NoSpace(format!(
                "{}: its largest free area has {most} bytes, and {bytes} are asked for",
                path.display()
            ))
        })?;
        promised.push((number, area.clone()));
        Ok(Promise { disk: self.disk.clone(), number, area })
    }

    /// Promises a partition the sectors behind it up to `end`. Blocks. Error: `NoSpace`.
    pub fn promise_behind(&self, format: Format, one: &Partition, end: u64) -> Result<Promise, DriverError> {
        let mut promised = self.disk.promised();
        let file = self.file().map_err(|e| failed("read", &self.disk.path, &e))?;
        let (table, _) = self.disk.table(format, file)?;
        let area = one.last() + 1..end;
        let taken = table.partitions().into_iter().filter(|other| other.number != one.number).map(|other| other.area());
        let mut taken = taken.chain(promised.iter().map(|(_, area)| area.clone()));
        if end > table.usable().end || taken.any(|other| other.start < area.end && area.start < other.end) {
            return Err(DriverError::NoSpace(format!(
                "{}: behind partition {} there is not so much free: make another volume, and copy it there",
                self.disk.path.display(),
                one.number
            )));
        }
        promised.push((one.number, area.clone()));
        Ok(Promise { disk: self.disk.clone(), number: one.number, area })
    }

    /// Changes the table, if it is still so that it can be, and tells the kernel. Killed anywhere, the table is as before or as after.
    /// `change` judges the table that is there, and changes it. Blocks. Error: it is as before.
    pub fn change(
        &self,
        format: Format,
        work: &dyn Work,
        change: impl FnOnce(&mut Table) -> Result<Told, DriverError>,
    ) -> Result<(), DriverError> {
        let _promised = self.disk.promised();
        let path = &self.disk.path;
        let cannot = |e: io::Error| failed("change the partition table of", path, &e);
        let file = self.file().map_err(cannot)?;
        let medium = medium(file).map_err(cannot)?;
        let (before, _) = self.disk.table(format, file)?;
        let mut after = before.clone();
        let told = change(&mut after)?;
        // What is taken away the kernel gives up first: it refuses what is in use.
        let first = match &told {
            Told::Added(_) | Told::Grown(_) => Ok(()),
            Told::Removed(number) => match tell(file, REMOVE, *number, 0, 0) {
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(()),
                told => told,
            },
            Told::Shrunk(number) => self.tell_size(file, *number, &after, medium.sector),
        };
        first.map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => {
                DriverError::InUse(format!("{}: somebody has that partition open (fuser tells who)", path.display()))
            }
            _ => cannot(e),
        })?;
        work.step();
        let written = after.write(&medium).inspect(|()| work.step()).and_then(|()| match &told {
            Told::Added(number) => match after.partitions().iter().find(|one| one.number == *number) {
                Some(one) => tell_of(file, ADD, one, medium.sector),
                None => Ok(()),
            },
            Told::Grown(number) => self.tell_size(file, *number, &after, medium.sector),
            Told::Removed(_) | Told::Shrunk(_) => Ok(()),
        });
        written.map_err(|e| {
            let undone = before.write(&medium);
            if let Err(error) = undone {
                tracing::warn!(
                    "{}: what was cut off in its partition table is undone when its pool is started: {error}",
                    path.display()
                );
            }
            cannot(e)
        })
    }

    fn tell_size(&self, file: &File, number: u32, table: &Table, sector: u64) -> io::Result<()> {
        match table.partitions().iter().find(|one| one.number == number) {
            Some(one) => match tell_of(file, RESIZE, one, sector) {
                // It has none, or it is elsewhere: it is told when the pool is started.
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(()),
                told => told,
            },
            None => Ok(()),
        }
    }

    /// Has an empty table on the disk, and nothing else at its edges, whatever was there. Blocks.
    pub fn make(&self, format: Format) -> Result<(), DriverError> {
        let _promised = self.disk.promised();
        let cannot = |e: io::Error| failed("write a partition table to", &self.disk.path, &e);
        let file = self.file().map_err(cannot)?;
        let medium = medium(file).map_err(cannot)?;
        let table = Table::new(format, &medium).map_err(|why| self.disk.refuse(&why))?;
        for known in self.disk.known() {
            tell(file, REMOVE, known.number, 0, 0).map_err(|e| match e.raw_os_error() {
                Some(libc::EBUSY) => self.disk.in_use(),
                _ => cannot(e),
            })?;
        }
        super::logical::blank_edges_of(file).map_err(cannot)?;
        table.write_anew(&medium).map_err(cannot)
    }

    /// There is no table on the disk any more, if no partition is in it. Blocks.
    pub fn unmake(&self, format: Format) -> Result<(), DriverError> {
        let _promised = self.disk.promised();
        let cannot = |e: io::Error| failed("remove the partition table of", &self.disk.path, &e);
        let file = self.file().map_err(cannot)?;
        let (table, _) = self.disk.table(format, file)?;
        let count = table.partitions().len();
        if count > 0 {
            return Err(DriverError::Refused(format!(
                "{} has {count} partitions: delete its volumes first",
                self.disk.path.display()
            )));
        }
        let medium = medium(file).map_err(cannot)?;
        match format {
            Format::Gpt => super::gpt::Gpt::erase(&medium),
            Format::Dos => medium.write(0, &vec![0; medium.sector as usize]).and_then(|()| file.sync_data()),
        }
        .map_err(cannot)
    }
}

/// What has been done to a table, by the number of the partition: what the kernel is told.
pub enum Told {
    Added(u32),
    Removed(u32),
    Grown(u32),
    Shrunk(u32),
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.file = None;
        let mut holders = self.disk.holders();
        holders.count -= 1;
        if holders.count > 0 {
            return;
        }
        let Some(file) = holders.file.take() else { return };
        holders.closing = true;
        drop(holders);
        // To close it may wait for what is not on disk yet.
        let disk = self.disk.clone();
        let close = move || {
            drop(file);
            disk.holders().closing = false;
            disk.closed.notify_all();
        };
        if let Err(error) = crate::host::threads::run(close) {
            tracing::warn!(%error, "no thread to close a disk in");
            self.disk.holders().closing = false;
            self.disk.closed.notify_all();
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.disk.promised().retain(|(number, _)| *number != self.number);
    }
}

/// An open disk, with its measures.
fn medium(file: &File) -> io::Result<Medium<'_>> {
    let sector = sector_of(file)?;
    Ok(Medium { file, sector, sectors: super::fill::length_of(file)? / sector })
}

fn sector_of(file: &File) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the kernel writes a number on this stack.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET as _, &raw mut bytes) } {
        0 if bytes >= 512 => Ok(u64::from(bytes.unsigned_abs())),
        0 => Err(io::Error::other("its sectors are shorter than 512 bytes")),
        _ => Err(io::Error::last_os_error()),
    }
}

fn told(one: &Partition, sector: u64) -> Known {
    Known { number: one.number, first: one.first * sector / TOLD, count: one.count * sector / TOLD }
}

fn tell_of(file: &File, what: libc::c_int, one: &Partition, sector: u64) -> io::Result<()> {
    tell(file, what, one.number, one.first * sector, one.count * sector)
}

/// Has the kernel have another partition; begin and length are in bytes.
fn tell(file: &File, what: libc::c_int, number: u32, begin: u64, length: u64) -> io::Result<()> {
    #[repr(C)]
    struct Told {
        start: libc::c_longlong,
        length: libc::c_longlong,
        number: libc::c_int,
        names: [libc::c_char; 128],
    }
    #[repr(C)]
    struct Request {
        what: libc::c_int,
        flags: libc::c_int,
        length: libc::c_int,
        data: *mut Told,
    }
    let mut told = Told {
        start: begin.cast_signed(),
        length: length.cast_signed(),
        number: number.cast_signed(),
        names: [0; 128],
    };
    let data = &raw mut told;
    let mut request = Request { what, flags: 0, length: size_of::<Told>() as libc::c_int, data };
    // SAFETY: the descriptor is open, and what the request leads to is on this stack.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKPG as _, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
