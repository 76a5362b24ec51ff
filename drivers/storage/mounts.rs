//! Pools that are a file system mounted on a folder: that on a device of the host's, or a folder that another host shares. A mount
//! outlives virtd: who opens the pool first looks whether it is there.
//!
//! ```text
//!  device, found and judged ─┬─▶ mount that is nowhere yet ─▶ put onto the folder that is held ─▶ the folder, opened anew
//!  share (share.rs) ─────────┘
//!  the folder ─▶ which mount it is in ─▶ the kernel's table says of what, or that it is nowhere any more
//! ```

use super::build::dress;
use super::folder::PoolFolder;
use super::held::HeldFolder;
use super::mount_table::{Line, lines, table};
use super::share::Share;
use super::watch::Mounts;
use super::{Secrets, failed, opened};
use crate::host::acl::through;
use crate::host::apart::apart;
use crate::host::files::Folder;
use crate::host::image::Images;
use crate::host::recognise::Signs;
use crate::host::resolve::{Found, Place};
use crate::host::wall::{Hold, file_system, put};
use crate::host::workers::{Errand, Stop, Workers};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, StatxFlags, fstat, open, openat, openat2, statx};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;
use virt_model::driver::DriverError;
use virt_model::driver::storage::PoolChange;
use virt_model::storage::pool::PoolDef;
use virt_model::xml::Finding;

/// The file systems that can be pools: those in which files are made as virtd makes them.
pub const FILE_SYSTEMS: &[&str] = &["ext2", "ext3", "ext4", "xfs", "btrfs"];
/// The formats that a pool's source can have: what is on the device, or one of these.
pub const FORMATS: &[&str] = &["auto", "ext2", "ext3", "ext4", "xfs", "btrfs"];

/// Where devices are.
const DEV: &str = "/dev";
/// How long a file system may take to be mounted or unmounted: it reads what it finds itself by, and writes what is not on disk yet.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// How long an unmount waits for those who look into the file system for a moment.
const BUSY: Duration = Duration::from_secs(5);
/// How often it tries meanwhile.
const AGAIN: Duration = Duration::from_millis(50);
/// How long at most who could not look waits for another look.
const MOST_PAUSE: Duration = Duration::from_secs(60);

/// A block device that is there, and is not opened.
#[derive(Debug)]
pub struct Device {
    found: Found,
}

/// What is mounted for a pool.
#[derive(Debug)]
pub enum Mountable {
    /// The file system on a device.
    Device(Device),
    /// A folder that another host shares.
    Share(Share),
}

/// What mounting may need.
pub struct Means<'a> {
    /// The tool that says what is on a device, with the rights that it has.
    pub images: &'a dyn Fn() -> Result<Images, DriverError>,
    /// What proves to a server who comes.
    pub secrets: &'a Secrets,
    /// A folder of ours.
    pub runtime: &'a Path,
    /// When to stop.
    pub stop: &'a Stop,
}

/// What is mounted where a pool is to be.
#[derive(Debug, PartialEq, Eq)]
enum OnFolder {
    /// What is mounted for it, as it is mounted here.
    PoolsOwn,
    /// That file system, mounted otherwise, and how.
    Unfit(String),
    /// Nothing: it is a folder of another file system.
    Nothing,
    /// Something else, which is called so.
    Other(String),
}

/// A mount that was made here: dropped before it is kept, it is taken away again.
#[derive(Debug, Default)]
pub struct Fresh(Option<PathBuf>);

impl Fresh {
    /// The mount stays; whether it was made here.
    pub fn keep(mut self) -> bool {
        self.0.take().is_some()
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        let Some(path) = self.0.take() else { return };
        // Nobody was told of it: whoever looks into it meanwhile does not keep it there.
        if let Err(error) = take_away(&path, UnmountFlags::DETACH) {
            tracing::warn!("{} was mounted in vain, and stays: {error}", path.display());
        }
    }
}

/// What of a pool on a device cannot be mounted, whatever is on the host.
pub fn refused(def: &PoolDef) -> Vec<Finding> {
    let Some(source) = &def.source else { return Vec::new() };
    let mut findings = Vec::new();
    if let Some(second) = source.devices.get(1) {
        let text = "a pool of type 'fs' is on one device: name that alone (of a btrfs of several any one of them)";
        findings.push(Finding::unsupported(&second.at, text));
    }
    if let Some(format) = source.format.as_ref().filter(|format| !FORMATS.contains(&&*format.kind)) {
        let text =
            format!("file systems of type '{}' are not mounted here: only {}", format.kind, FILE_SYSTEMS.join(", "));
        findings.push(Finding::unsupported(&format.at.attribute("type"), text));
    }
    findings
}

/// The type of file system that a definition names; `None`: what is on its device.
pub fn said_type(def: &PoolDef) -> Option<&str> {
    let format = def.source.as_ref().and_then(|source| source.format.as_ref()).map(|format| &*format.kind);
    format.filter(|format| *format != "auto")
}

/// The folder on which a pool's file system is mounted, from now on if it was not yet. Blocks. Error: nothing is mounted that was not
/// before.
pub fn mounted(
    (path, def): (&Path, &PoolDef),
    means: &Means<'_>,
) -> Result<(PoolFolder, Arc<Mountable>, Fresh), DriverError> {
    let mountable = Mountable::of(def)?;
    let source = mountable.source().to_owned();
    let folder = opened(path, true)?;
    match mountable.mounted_on(&folder).map_err(|e| failed("look at", path, &e))? {
        OnFolder::PoolsOwn => return Ok((folder, Arc::new(mountable), Fresh::default())),
        OnFolder::Unfit(how) => return Err(unfit(path, &source, &how)),
        OnFolder::Other(what) => {
            let path = path.display();
            let text = format!("{path}: {what} is mounted there: unmount that, or give the pool another folder");
            return Err(DriverError::Refused(text));
        }
        OnFolder::Nothing => {}
    }
    let cannot =
        |e: &io::Error| DriverError::Storage(format!("cannot mount {} on {}: {e}", source.display(), path.display()));
    let mount = mountable.mount(def, means)?;
    put(&mount, &folder).map_err(|e| cannot(&e))?;
    drop(mount);
    let fresh = Fresh(Some(folder.real().to_owned()));
    drop(folder);
    let folder = opened(path, true)?;
    match mountable.mounted_on(&folder).map_err(|e| failed("look at", path, &e))? {
        OnFolder::PoolsOwn => Ok((folder, Arc::new(mountable), fresh)),
        OnFolder::Other(what) => Err(cannot(&io::Error::other(format!("what is there now is {what}")))),
        _ => Err(cannot(&io::Error::other("another folder has come to its place meanwhile"))),
    }
}

/// Unmounts what a pool has on its folder. What is not there any more is fine. Blocks. Error: it is there, or that cannot be told,
/// and the pool has it.
pub fn close(mountable: &Mountable, hold: &HeldFolder, path: &Path, stop: &Stop) -> Result<(), DriverError> {
    // One that came back late, or failed, may have left what was not found again.
    let Some(folder) = hold.peek() else { return release(mountable, path, stop) };
    let is_there = mountable.is_at(&folder, path).map_err(|e| failed("look at", path, &e))?;
    let real = is_there.then(|| folder.real().to_owned());
    drop(folder);
    hold.let_go();
    let Some(real) = real else { return Ok(()) };
    take_away_in_time(&real, stop).inspect_err(|_| {
        let again = opened(path, true).and_then(|folder| hold.take_again(folder, path));
        again.unwrap_or_else(|error| tracing::warn!("{} is not unmounted, and lost: {error}", path.display()));
    })
}

/// Unmounts what somebody mounted of that on that folder for a pool, of which nothing is held. Blocks.
fn release(mountable: &Mountable, path: &Path, stop: &Stop) -> Result<(), DriverError> {
    match Found::resolve(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        _ => {}
    }
    let folder = opened(path, true)?;
    let (found, real) = (mountable.mounted_on(&folder), folder.real().to_owned());
    drop(folder);
    match found.map_err(|e| failed("look at", path, &e))? {
        OnFolder::PoolsOwn => take_away_in_time(&real, stop),
        OnFolder::Unfit(how) => Err(unfit(path, mountable.source(), &how)),
        OnFolder::Nothing | OnFolder::Other(_) => Ok(()),
    }
}

/// The same for a pool that was not opened since virtd began.
pub fn release_of((path, def): (&Path, &PoolDef), stop: &Stop) -> Result<(), DriverError> {
    let source = PathBuf::from(def.mounted_source().unwrap_or_default());
    match Mountable::of(def) {
        Ok(mountable) => release(&mountable, path, stop),
        // Of a device that has gone nothing is known but what was said when it was mounted.
        Err(error) => {
            let table = table().map_err(|e| failed("look at", path, &e))?;
            match lines(&table).any(|line| line.at == path && line.source == source) {
                false => Ok(()),
                true => Err(DriverError::Refused(format!(
                    "{}: {} is mounted there, and cannot be looked at ({error}): unmount it",
                    path.display(),
                    source.display()
                ))),
            }
        }
    }
}

fn unfit(path: &Path, source: &Path, how: &str) -> DriverError {
    let (path, source) = (path.display(), source.display());
    DriverError::Refused(format!("{path}: {source} is mounted there {how}: unmount that, and start the pool"))
}

/// Tells that a pool is lost as soon as its file system is not mounted any more, until nobody listens.
pub async fn tell_lost(
    mounts: Mounts,
    tell: Sender<PoolChange>,
    workers: Workers,
    errand: Errand,
    mountable: Arc<Mountable>,
    path: PathBuf,
    hold: HeldFolder,
) {
    let mut pause = AGAIN;
    loop {
        let (mountable, path, hold) = (mountable.clone(), path.clone(), hold.clone());
        let look = move |_: &Arc<Stop>| {
            let is_at = hold.peek().map_or(Ok(true), |folder| mountable.is_at(&folder, &path));
            is_at.map_err(|e| failed("look at", &path, &e))
        };
        let looked = workers.run(errand.clone(), look).await;
        if let Ok(false) = looked {
            let _ = tell.send(PoolChange::Lost).await;
            return;
        }
        // One that does not answer is not known to be elsewhere, and nobody tells when it answers.
        pause = if looked.is_ok() { AGAIN } else { (pause * 2).min(MOST_PAUSE) };
        tokio::select! {
            changed = mounts.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(pause), if looked.is_err() => {}
            () = tell.closed() => return,
        }
    }
}

impl Mountable {
    /// What is mounted for a pool. Error: it is not there, or cannot be used.
    fn of(def: &PoolDef) -> Result<Mountable, DriverError> {
        if let Some(share) = Share::of(def) {
            return Ok(Mountable::Share(share));
        }
        let path = PathBuf::from(def.mounted_device().unwrap_or_default());
        Device::at(&path).map(Mountable::Device).map_err(|e| failed("open", &path, &e))
    }

    /// Where it comes from, as the table of mounts has it.
    fn source(&self) -> &Path {
        match self {
            Mountable::Device(device) => device.real(),
            Mountable::Share(share) => share.source(),
        }
    }

    /// A mount of it that is nowhere yet. Device nodes and programs in it are none.
    fn mount(&self, def: &PoolDef, means: &Means<'_>) -> Result<OwnedFd, DriverError> {
        match self {
            Mountable::Device(device) => device.dressed_mount(def, means),
            Mountable::Share(share) => share.mount(def.uuid, means),
        }
    }

    fn is_of(&self, line: &Line) -> bool {
        match self {
            Mountable::Device(device) => device.is_of(line),
            Mountable::Share(share) => share.is_of(line),
        }
    }

    /// Whether that folder of its file system is all that was asked for.
    fn is_whole(&self, root: &Path) -> bool {
        let is_below = |share: &Share| share.folder_within().is_some_and(|within| root == within);
        root == Path::new("/") || matches!(self, Mountable::Share(share) if is_below(share))
    }

    /// Whether its file system is what that path leads to, as a folder of it that is held. Error: that cannot be told.
    fn is_at(&self, folder: &PoolFolder, path: &Path) -> io::Result<bool> {
        Ok(folder.has_path(path)? && matches!(self.mounted_on(folder)?, OnFolder::PoolsOwn | OnFolder::Unfit(_)))
    }

    /// What is mounted where that folder is.
    fn mounted_on(&self, folder: &PoolFolder) -> io::Result<OnFolder> {
        let id = statx(folder, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id;
        // A mount that is not in the table was unmounted, and is held still.
        let Some(line) = lines(&table()?).find(|line| line.id == id && line.at == folder.real()) else {
            return Ok(OnFolder::Nothing);
        };
        Ok(match (self.is_of(&line), line.lacks(self.is_whole(&line.root))) {
            (true, None) => OnFolder::PoolsOwn,
            (true, Some(how)) => OnFolder::Unfit(how),
            (false, _) => OnFolder::Other(line.source.display().to_string()),
        })
    }
}

impl Device {
    /// The device at a path that nobody but root can lead elsewhere: the kernel mounts by a path. Error: it is none.
    pub fn at(path: &Path) -> io::Result<Device> {
        let found = Found::resolve(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => io::Error::new(e.kind(), "there is no such device"),
            _ => e,
        })?;
        let others = |what: String| {
            let why = format!("{what} on the way to it can be changed by others than root: name it below /dev");
            Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
        };
        match (found.kind(), found.choosers.first(), &found.exposed) {
            (FileType::BlockDevice, None, None) => Ok(Device { found }),
            (FileType::BlockDevice, Some(user), _) => others(format!("a link of user {user}'s")),
            (FileType::BlockDevice, None, Some(folder)) => others(format!("the folder {}", folder.display())),
            _ => Err(io::Error::other("it is no block device")),
        }
    }

    /// Opens it to be read, beside whoever uses it.
    pub fn shared(&self) -> io::Result<fs::File> {
        self.found.image()?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Whether it is mounted where virtd is.
    pub fn is_mounted(&self) -> io::Result<bool> {
        Ok(lines(&table()?).any(|line| self.is_of(&line)))
    }

    /// Opens it to be read, while the host does not use it. Error: `EBUSY`, if it is mounted or part of something.
    pub fn alone(&self) -> io::Result<fs::File> {
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(apart(openat(rustix::fs::CWD, through(&self.found.fd), flags, Mode::empty())?)?.into())
    }

    /// Where it is, without links.
    pub fn real(&self) -> &Path {
        &self.found.real
    }

    /// The topmost folder of the file system of that type on it, which is mounted nowhere.
    pub fn root_folder(&self, kind: &str) -> io::Result<Folder> {
        Found::of(self.mount(kind)?, self.found.real.clone())?.folder()
    }

    /// Opens it to be read and written, beside whoever uses it.
    pub fn to_write(&self) -> io::Result<fs::File> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(apart(openat(rustix::fs::CWD, through(&self.found.fd), flags, Mode::empty())?)?.into())
    }

    /// Opens it to be read and written, while the host does not use it. Error: `EBUSY`, as [`Device::alone`].
    pub fn alone_to_write(&self) -> io::Result<fs::File> {
        let flags = OFlags::RDWR | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(apart(openat(rustix::fs::CWD, through(&self.found.fd), flags, Mode::empty())?)?.into())
    }

    /// Its owner, group and mode.
    pub fn permissions(&self) -> (u32, u32, u32) {
        (self.found.stat.st_uid, self.found.stat.st_gid, self.found.stat.st_mode & 0o7777)
    }

    /// Its number for the kernel.
    pub fn number(&self) -> u64 {
        self.found.stat.st_rdev
    }

    /// A mount, which is nowhere yet, of the file system of that type on it. Device nodes and programs in it are none.
    fn mount(&self, kind: &str) -> io::Result<OwnedFd> {
        let source = self.found.real.to_string_lossy();
        let hold = Hold { no_devices: true, no_programs: true, read_only: false };
        let how = match kind {
            // What is on the device may say that the host is to panic when it is found to be wrong.
            "ext2" | "ext3" | "ext4" => Some(("errors", "remount-ro")),
            // Whatever part of it is shown where nobody says which.
            "btrfs" => Some(("subvolid", "5")),
            _ => None,
        };
        let parameters: Vec<_> = [("source", &*source)].into_iter().chain(how).collect();
        file_system(kind, &parameters, hold)
    }

    /// The same of the type that a pool's definition names, or else of what is on it. One in which nothing is yet is as the definition says.
    fn dressed_mount(&self, def: &PoolDef, means: &Means<'_>) -> Result<OwnedFd, DriverError> {
        let source = self.real();
        let kind = match said_type(def) {
            Some(kind) => kind.to_owned(),
            None => self.type_on_it(source, &(means.images)()?)?,
        };
        let cannot = |e: io::Error| DriverError::Storage(format!("cannot mount {} as {kind}: {e}", source.display()));
        let mount = self.mount(&kind).map_err(cannot)?;
        // Who made it may have been killed before it was given these.
        if is_blank(&mount).map_err(cannot)? {
            let root = mount.try_clone().and_then(|mount| Found::of(mount, source.to_owned())?.folder());
            let dressed = root.and_then(|root| dress(&root, def));
            dressed.map_err(|e| failed("set the owner and mode of what is on", source, &e))?;
        }
        Ok(mount)
    }

    /// What type of file system is on it. Error: none, or none that is mounted here.
    fn type_on_it(&self, path: &Path, images: &Images) -> Result<String, DriverError> {
        let file = self.shared().map_err(|e| failed("read", path, &e))?;
        let signs = images.recognise(&file, path)?;
        let path = path.display();
        match signs {
            Signs::FileSystem(kind) if FILE_SYSTEMS.contains(&&*kind) => Ok(kind),
            Signs::Nothing => {
                Err(DriverError::Storage(format!("{path}: there is no file system on it; build the pool first")))
            }
            signs => {
                let what = match signs {
                    Signs::FileSystem(what) | Signs::Other(what) => what,
                    Signs::Table(format) => format!("a partition table ({format})"),
                    _ => "something unknown".to_owned(),
                };
                let known = FILE_SYSTEMS.join(", ");
                Err(DriverError::Storage(format!("{path}: there is {what} on it, and what is mounted here is {known}")))
            }
        }
    }

    /// Whether a line of the table is of the file system on it.
    fn is_of(&self, line: &Line) -> bool {
        let (major, minor) = line.device;
        // Some file systems have a number of their own for each part, and say from which device they come.
        rustix::fs::makedev(major, minor) == self.number() || number_below_dev(&line.source) == Some(self.number())
    }
}

/// The number of the device that somebody's words name. They are not followed out of /dev, to where somebody lets everybody wait.
fn number_below_dev(source: &Path) -> Option<u64> {
    let below = source.strip_prefix(DEV).ok()?;
    let (flags, mode) = (OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let dev = open(DEV, flags | OFlags::DIRECTORY, mode).ok()?;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    let found = openat2(&dev, below, flags, mode, within).ok()?;
    let found = fstat(found).ok()?;
    (FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice).then_some(found.st_rdev)
}

/// Whether a file system holds nothing but what is made with it.
fn is_blank(mount: &OwnedFd) -> io::Result<bool> {
    let root = openat(mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for entry in Dir::read_from(root)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b".." | b"lost+found") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Unmounts what is mounted at a path, as soon as nobody is in it any more.
fn take_away_in_time(path: &Path, stop: &Stop) -> Result<(), DriverError> {
    let begun = Instant::now();
    loop {
        match take_away(path, UnmountFlags::empty()) {
            // Threads of virtd's close what they had open, guests' files are given back, an indexer has a look. The kernel tells
            // nobody when a mount is busy no more.
            Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) && begun.elapsed() < BUSY => {
                stop.check()?;
                std::thread::sleep(AGAIN);
            }
            Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                let path = path.display();
                let text =
                    format!("{path} cannot be unmounted: files in it are open ('fuser -vm {path}' tells by whom)");
                return Err(DriverError::Refused(text));
            }
            done => return done.map_err(|e| failed("unmount", path, &e)),
        }
    }
}

pub(super) fn take_away(path: &Path, how: UnmountFlags) -> io::Result<()> {
    let place = Place::resolve(path, true)?;
    Ok(unmount(through(place.folder_fd()).join(place.name()), how | UnmountFlags::NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::lender::Lender;
    use crate::storage::{HostStorage, ToolRights};
    use virt_model::driver::storage::Storage as _;

    #[test]
    fn what_cannot_be_mounted_is_refused_before_it_is_tried() {
        let refused = |wary: bool, source: &str| {
            let xml = format!("<pool type='fs'><name>p</name>{source}<target><path>/p</path></target></pool>");
            let rights: ToolRights = Arc::new(|| Ok(Lender::Ours));
            let storage = HostStorage::new(rights, Arc::new(|_| Ok(Vec::new())), Path::new("/nowhere"), wary);
            match storage.check(&PoolDef::parse(&xml).unwrap()) {
                Err(DriverError::Config(findings)) => findings.into_iter().map(|found| found.message).collect(),
                refused => {
                    refused.unwrap();
                    String::new()
                }
            }
        };
        let one = "<source><device path='/dev/sdb1'/><format type='xfs'/></source>";
        assert_eq!(refused(true, one), "");
        assert!(refused(false, one).contains("root's virtd alone"));
        let two = one.replace("<format", "<device path='/dev/sdb2'/><format");
        assert!(refused(true, &two).contains("on one device"));
        assert!(refused(true, &one.replace("xfs", "ufs")).contains("'ufs' are not mounted here"));
        let options = "<fs:mount_opts xmlns:fs='http://libvirt.org/schemas/storagepool/fs/1.0'><fs:option name='dev'/>\
                       </fs:mount_opts>";
        assert!(refused(true, &format!("{one}{options}")).contains("nosuid, nodev and noexec"));
    }

    #[test]
    fn a_device_that_others_could_choose_is_none() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let why = |path: &Path| Device::at(path).unwrap_err().to_string();
        assert_eq!(why(&dir.path().join("none")), "there is no such device");
        assert_eq!(why(Path::new("/dev/null")), "it is no block device");
        let link = dir.path().join("link");
        let Some(number) = (0..8).find(|number| Device::at(&PathBuf::from(format!("/dev/loop{number}"))).is_ok())
        else {
            return eprintln!("SKIPPED: no loop devices here");
        };
        std::os::unix::fs::symlink(format!("/dev/loop{number}"), &link).unwrap();
        assert!(why(&link).contains("the folder /tmp on the way to it can be changed by others than root"));
    }

    #[test]
    fn what_a_mount_says_of_itself_is_not_followed_out_of_dev() {
        let loops = (0..8).map(|number| PathBuf::from(format!("/dev/loop{number}")));
        let Some(device) = loops.into_iter().find(|path| Device::at(path).is_ok()) else {
            return eprintln!("SKIPPED: no loop devices here");
        };
        let number = Device::at(&device).unwrap().number();
        assert_eq!(number_below_dev(&device), Some(number));
        let name = device.file_name().unwrap().to_str().unwrap();
        let out_and_in = format!("/dev/../dev/{name}");
        for other in [&*out_and_in, name, "/dev/null", "/dev/shm/x", "/dev/stdin", "/dev", ""] {
            assert_eq!(number_below_dev(Path::new(other)), None, "{other}");
        }
    }
}
