//! Pools that are the file system on a device of the host's, mounted on a folder. A mount outlives virtd: who opens the pool first
//! looks whether it is there.
//!
//! ```text
//!  device, found and judged ─▶ mount that is nowhere yet ─▶ put onto the folder that is held ─▶ the folder, opened anew
//!  the folder ─▶ which mount it is in ─▶ the kernel's table says of which device, or that it is nowhere any more
//! ```

use super::folder::PoolFolder;
use super::held::HeldFolder;
use super::watch::Mounts;
use super::{failed, opened};
use crate::host::acl::through;
use crate::host::apart::apart;
use crate::host::files::Folder;
use crate::host::image::Images;
use crate::host::recognise::Signs;
use crate::host::resolve::{Found, Place};
use crate::host::wall::{Hold, file_system, put};
use crate::host::workers::{Errand, Stop, Workers};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
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

/// What is mounted where, for virtd.
pub const TABLE: &str = "/proc/self/mountinfo";

/// How long an unmount waits for those who look into the file system for a moment.
const BUSY: Duration = Duration::from_secs(5);
/// How often it tries meanwhile.
const AGAIN: Duration = Duration::from_millis(50);

/// A block device that is there, and is not opened.
#[derive(Debug)]
pub struct Device {
    found: Found,
}

/// What is mounted where a pool is to be.
#[derive(Debug, PartialEq, Eq)]
enum OnFolder {
    /// The file system on its device.
    PoolsOwn,
    /// Nothing: it is a folder of another file system.
    Nothing,
    /// Something else, which is called so.
    Other(String),
}

/// A line of the kernel's table of mounts.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    id: u64,
    device: (u32, u32),
    at: PathBuf,
    source: String,
}

/// A mount that was made here: dropped before it is kept, it is taken away again.
#[derive(Debug, Default)]
pub struct Fresh(Option<PathBuf>);

impl Fresh {
    /// The mount stays.
    pub fn keep(mut self) {
        self.0 = None;
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

/// The folder on which the file system of a pool's device is mounted, from now on if it was not yet. `images`: by whose rights it is
/// looked what is on the device. Blocks. Error: nothing is mounted that was not before.
pub fn mounted(
    (path, def): (&Path, &PoolDef),
    images: impl FnOnce() -> Result<Images, DriverError>,
) -> Result<(PoolFolder, Arc<Device>, Fresh), DriverError> {
    let source = PathBuf::from(def.mounted_device().unwrap_or_default());
    let device = Device::at(&source).map_err(|e| failed("open", &source, &e))?;
    let folder = opened(path, true)?;
    match device.mounted_on(&folder).map_err(|e| failed("look at", path, &e))? {
        OnFolder::PoolsOwn => return Ok((folder, Arc::new(device), Fresh::default())),
        OnFolder::Other(what) => {
            let path = path.display();
            let text = format!("{path}: {what} is mounted there: unmount that, or give the pool another folder");
            return Err(DriverError::Refused(text));
        }
        OnFolder::Nothing => {}
    }
    let kind = match said_type(def) {
        Some(kind) => kind.to_owned(),
        None => device.type_on_it(&source, &images()?)?,
    };
    let cannot = |e: &io::Error| {
        DriverError::Storage(format!("cannot mount {} as {kind} on {}: {e}", source.display(), path.display()))
    };
    device.mount(&kind).and_then(|mount| put(&mount, &folder)).map_err(|e| cannot(&e))?;
    let fresh = Fresh(Some(folder.real().to_owned()));
    drop(folder);
    let folder = opened(path, true)?;
    match device.mounted_on(&folder).map_err(|e| failed("look at", path, &e))? {
        OnFolder::PoolsOwn => Ok((folder, Arc::new(device), fresh)),
        _ => Err(cannot(&io::Error::other("another folder has come to its place meanwhile"))),
    }
}

/// Unmounts what a pool has on its folder. What is not there any more is fine. Blocks. Error: it is there, and the pool has it.
pub fn close(device: &Device, hold: &HeldFolder, path: &Path, stop: &Stop) -> Result<(), DriverError> {
    let Some(folder) = hold.peek() else { return Ok(()) };
    let real = device.is_at(&folder, path).then(|| folder.real().to_owned());
    drop(folder);
    hold.let_go();
    let Some(real) = real else { return Ok(()) };
    take_away_in_time(&real, stop).inspect_err(|_| {
        let again = opened(path, true).and_then(|folder| hold.take_again(folder, path));
        again.unwrap_or_else(|error| tracing::warn!("{} is not unmounted, and lost: {error}", path.display()));
    })
}

/// Tells that a pool is lost as soon as its file system is not mounted any more, until nobody listens.
pub async fn tell_lost(
    mounts: Mounts,
    tell: Sender<PoolChange>,
    workers: Workers,
    errand: Errand,
    device: Arc<Device>,
    path: PathBuf,
    hold: HeldFolder,
) {
    loop {
        let (device, path, hold) = (device.clone(), path.clone(), hold.clone());
        let look = move |_: &Arc<Stop>| Ok(hold.peek().is_none_or(|folder| device.is_at(&folder, &path)));
        // One that does not answer is not known to be elsewhere.
        if !workers.run(errand.clone(), look).await.unwrap_or(true) {
            let _ = tell.send(PoolChange::Lost).await;
            return;
        }
        tokio::select! {
            changed = mounts.changed() => if changed.is_err() { return },
            () = tell.closed() => return,
        }
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
        let table = fs::read_to_string(TABLE)?;
        Ok(table.lines().filter_map(read).any(|line| self.is_of(&line)))
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

    fn number(&self) -> u64 {
        self.found.stat.st_rdev
    }

    /// A mount, which is nowhere yet, of the file system of that type on it. Device nodes and programs in it are none.
    fn mount(&self, kind: &str) -> io::Result<OwnedFd> {
        let source = self.found.real.to_string_lossy();
        let hold = Hold { no_devices: true, no_programs: true, read_only: false };
        file_system(kind, &[("source", &source)], hold)
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
                    _ => "something unknown".to_owned(),
                };
                let known = FILE_SYSTEMS.join(", ");
                Err(DriverError::Storage(format!("{path}: there is {what} on it, and what is mounted here is {known}")))
            }
        }
    }

    /// Whether its file system is what that path leads to, as a folder of it that is held. Where that cannot be told it is not.
    fn is_at(&self, folder: &PoolFolder, path: &Path) -> bool {
        folder.is_there(path).is_ok() && self.mounted_on(folder).is_ok_and(|found| found == OnFolder::PoolsOwn)
    }

    /// What is mounted where that folder is.
    fn mounted_on(&self, folder: &PoolFolder) -> io::Result<OnFolder> {
        let id = statx(folder, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id;
        let table = fs::read_to_string(TABLE)?;
        // A mount that is not in the table was unmounted, and is held still.
        let line = table.lines().filter_map(read).find(|line| line.id == id && line.at == folder.real());
        let Some(line) = line else { return Ok(OnFolder::Nothing) };
        Ok(if self.is_of(&line) { OnFolder::PoolsOwn } else { OnFolder::Other(line.source) })
    }

    /// Whether a line of the table is of the file system on it.
    fn is_of(&self, line: &Line) -> bool {
        let (major, minor) = line.device;
        // Some file systems have a number of their own for each part, and say from which device they come.
        rustix::fs::makedev(major, minor) == self.number()
            || fs::metadata(&line.source).is_ok_and(|source| source.rdev() == self.number())
    }
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

fn take_away(path: &Path, how: UnmountFlags) -> io::Result<()> {
    let place = Place::resolve(path, true)?;
    Ok(unmount(through(place.folder_fd()).join(place.name()), how | UnmountFlags::NOFOLLOW)?)
}

/// `36 35 98:0 /root /mnt opts shared:1 - ext4 /dev/sda1 rw`
fn read(line: &str) -> Option<Line> {
    let (own, of) = line.split_once(" - ")?;
    let mut own = own.split(' ');
    let id = own.next()?.parse().ok()?;
    let (major, minor) = own.nth(1)?.split_once(':')?;
    let at = plain(own.nth(1)?).into();
    let source = plain(of.split(' ').nth(1)?);
    Some(Line { id, device: (major.parse().ok()?, minor.parse().ok()?), at, source })
}

/// Blanks are told by their numbers there.
fn plain(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (number, letter)| text.replace(number, letter))
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
    fn the_kernels_table_is_read() {
        let line = read("36 35 98:0 / /mnt/a\\040b rw,nosuid shared:1 - ext4 /dev/loop0 rw").unwrap();
        let wanted = Line { id: 36, device: (98, 0), at: "/mnt/a b".into(), source: "/dev/loop0".into() };
        assert_eq!(line, wanted);
        assert_eq!(read("36 35 98:0"), None);
    }
}
