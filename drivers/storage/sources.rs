//! What pools on devices could come from: each device of the host's with a file system on it that nobody uses.

use super::HostStorage;
use super::mounts::{Device, FILE_SYSTEMS};
use super::pool::FolderPool;
use crate::host::recognise::Signs;
use crate::host::workers::{Errand, Stop};
use futures_util::{StreamExt as _, stream};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::storage::FormatDoc;
use virt_model::storage::pool::{PoolDevice, PoolSource};

/// So many devices are looked at beside each other.
const AT_ONCE: usize = 8;
/// Where the kernel has all block devices, each a folder.
const BLOCK_DEVICES: &str = "/sys/class/block";

impl HostStorage {
    /// The file systems that could be mounted, in the order of their devices' names. One whose device does not answer is left out.
    pub(super) async fn unused_file_systems(&self) -> Result<Vec<PoolSource>, DriverError> {
        let all = self.workers.run(Errand::new(Uuid::new_v4(), BLOCK_DEVICES), |_| Ok(block_devices())).await?;
        let looks = all.into_iter().map(|device| self.unused_file_system(device));
        Ok(stream::iter(looks).buffered(AT_ONCE).filter_map(std::future::ready).collect().await)
    }

    async fn unused_file_system(&self, path: PathBuf) -> Option<PoolSource> {
        let (rights, one) = (self.rights.clone(), Uuid::new_v4());
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

/// All block devices that hold anything, in the order of their names.
fn block_devices() -> Vec<PathBuf> {
    let entries = fs::read_dir(BLOCK_DEVICES).into_iter().flatten().flatten();
    let mut all: Vec<PathBuf> = entries
        .filter(|entry| fs::read_to_string(entry.path().join("size")).is_ok_and(|size| size.trim() != "0"))
        .filter(|entry| !is_used(&entry.path(), &entry.file_name()))
        // A slash in a name is another sign there.
        .filter_map(|entry| Some(Path::new("/dev").join(entry.file_name().to_str()?.replace('!', "/"))))
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
