//! What pools on devices could come from: each device of the host's with a file system on it that nobody uses.

use super::HostStorage;
use super::mounts::{Device, FILE_SYSTEMS};
use super::pool::FolderPool;
use crate::host::recognise::Signs;
use crate::host::workers::{Errand, Stop};
use futures_util::{StreamExt as _, stream};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Mutex;
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::storage::FormatDoc;
use virt_model::storage::pool::{PoolDevice, PoolSource};

/// So many devices are looked at beside each other.
const AT_ONCE: usize = 8;
/// Where the kernel has all block devices, each a folder.
const BLOCK_DEVICES: &str = "/sys/class/block";

/// What was found last, and when that search began. Who holds it searches.
#[derive(Default)]
pub struct Search(Mutex<Option<(Instant, Vec<PoolSource>)>>);

impl Search {
    /// What `look` finds. There is one search at a time: who has asked before it began is told what it finds.
    pub async fn found(
        &self,
        look: impl Future<Output = Result<Vec<PoolSource>, DriverError>> + Send,
    ) -> Result<Vec<PoolSource>, DriverError> {
        let asked = Instant::now();
        let mut last = self.0.lock().await;
        match &*last {
            Some((begun, found)) if *begun >= asked => return Ok(found.clone()),
            _ => {}
        }
        let begun = Instant::now();
        let found = look.await?;
        *last = Some((begun, found.clone()));
        Ok(found)
    }
}

impl HostStorage {
    /// The file systems that could be mounted, in the order of their devices' names. One whose device does not answer is left out.
    pub(super) async fn unused_file_systems(&self) -> Result<Vec<PoolSource>, DriverError> {
        self.search.found(self.look_for_file_systems()).await
    }

    async fn look_for_file_systems(&self) -> Result<Vec<PoolSource>, DriverError> {
        let errand = Errand::new(standing_for(Path::new(BLOCK_DEVICES)), BLOCK_DEVICES);
        let all = self.workers.run(errand, |_| Ok(block_devices())).await?;
        let looks = all.into_iter().map(|device| self.unused_file_system(device));
        Ok(stream::iter(looks).buffered(AT_ONCE).filter_map(std::future::ready).collect().await)
    }

    async fn unused_file_system(&self, path: PathBuf) -> Option<PoolSource> {
        let (rights, one) = (self.rights.clone(), standing_for(&path));
        let shown = path.display().to_string();
        let errand = Errand::new(one, &*shown);
        let look = move |stop: &Arc<Stop>| {
            // A drive without a medium is no source.
            let opened = Device::at(&path).and_then(|device| Ok((device.shared()?, device.is_mounted()?)));
            let Ok((file, false)) = opened else { return Ok(None) };
            Ok(match FolderPool::images(&rights, one, stop)?.recognise(&file, &path)? {
                Signs::FileSystem(kind) if FILE_SYSTEMS.contains(&&*kind) => Some(kind),
                _ => None,
            })
        };
        let found = self.workers.run(errand, look).await;
        let kind = found.inspect_err(|error| tracing::warn!(%error, "{shown} is left out of a search")).ok()??;
        let device = PoolDevice { path: shown, ..PoolDevice::default() };
        let format = Some(FormatDoc { kind, ..FormatDoc::default() });
        Some(PoolSource { devices: vec![device], format, ..PoolSource::default() })
    }
}

/// What stands for a path where errands are told apart, the same each time: one that does not come back keeps its own places alone.
pub(super) fn standing_for(path: &Path) -> Uuid {
    let half = |salt: u8| {
        let mut hash = DefaultHasher::new();
        (salt, path).hash(&mut hash);
        hash.finish()
    };
    Uuid::from_u64_pair(half(0), half(1))
}

/// The block devices that have bytes of one of them, in the order of their names, without that one. Blocks.
pub fn overlapping(device: &Path) -> io::Result<Vec<PathBuf>> {
    of_device(device, |own| reached_from(own, &[made_from, made_of_it]))
}

/// The same without what was put together from it.
pub fn around(device: &Path) -> io::Result<Vec<PathBuf>> {
    of_device(device, |own| reached_from(own, &[made_from, partitions]))
}

/// The devices that one is made from, without that one. Blocks.
pub fn beneath(device: &Path) -> io::Result<Vec<PathBuf>> {
    of_device(device, |own| reached_from(own, &[made_from]))
}

/// The partitions of a device, and what was put together from it or from them. Blocks.
pub fn partitions_of(device: &Path) -> io::Result<Vec<PathBuf>> {
    of_device(device, |own| reached_from(own, &[made_of_it]))
}

/// What is found from where the kernel has a block device; nothing from another path. Blocks.
fn of_device(device: &Path, find: impl FnOnce(&Path) -> io::Result<Vec<PathBuf>>) -> io::Result<Vec<PathBuf>> {
    let found = match fs::metadata(device) {
        Ok(found) if found.file_type().is_block_device() => found,
        // Who opens it says why it cannot be used.
        _ => return Ok(Vec::new()),
    };
    let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
    find(&fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"))?)
}

/// The devices that these ways lead to, each again and again, from the one that the kernel has there.
fn reached_from(own: &Path, ways: &[Way]) -> io::Result<Vec<PathBuf>> {
    let mut others = BTreeSet::new();
    ways.iter().try_for_each(|way| reach(own, *way, &mut others))?;
    let named = others.iter().filter_map(|one| dev_path(one.file_name()?));
    Ok(named.collect())
}

/// From where the kernel has a device to where it has others.
type Way = fn(&Path) -> io::Result<Vec<PathBuf>>;

/// Adds all that `next` leads to, and what that leads to.
fn reach(from: &Path, next: Way, reached: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for one in next(from)? {
        if reached.insert(one.clone()) {
            reach(&one, next, reached)?;
        }
    }
    Ok(())
}

/// The disk that a device is a partition of, and what it was put together from.
fn made_from(device: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = linked(&device.join("slaves"))?;
    if device.join("partition").exists() {
        all.extend(device.parent().map(Path::to_owned));
    }
    Ok(all)
}

/// The partitions of a device, and what was put together from it.
fn made_of_it(device: &Path) -> io::Result<Vec<PathBuf>> {
    Ok([linked(&device.join("holders"))?, partitions(device)?].concat())
}

/// The partitions of a device.
fn partitions(device: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(device)? {
        let part = entry?.path();
        if part.join("partition").exists() {
            all.push(part);
        }
    }
    Ok(all)
}

/// Where the links in a folder lead, if it is there.
fn linked(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| fs::canonicalize(entry?.path())).collect(),
    }
}

/// Where a device is that the kernel calls so: a slash in a name is another sign there.
fn dev_path(name: &OsStr) -> Option<PathBuf> {
    Some(Path::new("/dev").join(name.to_str()?.replace('!', "/")))
}

/// All block devices that hold anything, in the order of their names.
pub(super) fn block_devices() -> Vec<PathBuf> {
    let entries = fs::read_dir(BLOCK_DEVICES).into_iter().flatten().flatten();
    let mut all: Vec<PathBuf> = entries
        .filter(|entry| fs::read_to_string(entry.path().join("size")).is_ok_and(|size| size.trim() != "0"))
        .filter(|entry| !is_used(&entry.path(), &entry.file_name()))
        .filter_map(|entry| dev_path(&entry.file_name()))
        .collect();
    all.sort();
    all
}

/// Whether the kernel has a device in use, as a part of another or mounted in anybody's namespace. To open it for ourselves would
/// tell that too, and keep others from mounting it meanwhile.
fn is_used(device: &Path, name: &OsStr) -> bool {
    let names = |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten();
    let has_holders = names(device.join("holders")).next().is_some();
    let is_mounted = ["ext4", "xfs"].iter().any(|kind| Path::new("/sys/fs").join(kind).join(name).exists());
    let is_in_btrfs = || names("/sys/fs/btrfs".into()).any(|one| one.path().join("devices").join(name).exists());
    has_holders || is_mounted || is_in_btrfs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn who_asks_before_a_search_begins_is_told_what_it_finds() {
        let (search, begun) = (Search::default(), AtomicUsize::new(0));
        let look = async || {
            begun.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            Ok(Vec::new())
        };
        // Two ask while the first searches: of theirs there is one.
        let found = tokio::join!(search.found(look()), search.found(look()), search.found(look()));
        assert!(found.0.is_ok() && found.1.is_ok() && found.2.is_ok());
        assert_eq!(begun.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn what_has_bytes_of_a_device_is_found_and_its_neighbour_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let all = fs::canonicalize(dir.path()).unwrap();
        for folder in ["sda/sda1/holders", "sda/sda2", "dm-0/slaves", "dm-1/slaves", "dm-0/holders"] {
            fs::create_dir_all(all.join(folder)).unwrap();
        }
        for part in ["sda/sda1", "sda/sda2"] {
            fs::write(all.join(part).join("partition"), "1").unwrap();
        }
        for (link, to) in [
            ("sda/sda1/holders/dm-0", "sda/../dm-0"),
            ("dm-0/slaves/sda1", "sda/sda1"),
            ("dm-0/holders/dm-1", "dm-1"),
            ("dm-1/slaves/dm-0", "dm-0"),
        ] {
            symlink(all.join(to), all.join(link)).unwrap();
        }
        let of = |name: &str| reached_from(&all.join(name), &[made_from, made_of_it]).unwrap();
        let around = |name: &str| reached_from(&all.join(name), &[made_from, partitions]).unwrap();
        let paths = |names: &[&str]| names.iter().map(|name| Path::new("/dev").join(name)).collect::<Vec<_>>();
        assert_eq!(of("sda/sda2"), paths(&["sda"]));
        assert_eq!(of("sda/sda1"), paths(&["dm-0", "dm-1", "sda"]));
        assert_eq!(of("dm-1"), paths(&["dm-0", "sda", "sda1"]));
        assert_eq!(of("sda"), paths(&["dm-0", "dm-1", "sda1", "sda2"]));
        assert_eq!((around("sda/sda1"), around("sda")), (paths(&["sda"]), paths(&["sda1", "sda2"])));
    }
}
