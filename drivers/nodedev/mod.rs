//! The devices of the host: sysfs tells which there are, the kernel and udev when one comes, goes or changes. Nothing is polled.
//!
//! ```text
//!  kernel, udev ─▶ uevent.rs ─▶ follow.rs ─▶ read.rs (sysfs, names.rs) ─▶ inventory.rs ─▶ what is told
//! ```
//!
//! A message only says what to look at again. Where messages are lost, all is looked at again.

mod attribute;
mod follow;
mod inventory;
mod made;
mod names;
mod read;
mod uevent;
mod uses;

use crate::host::pci::{Pci, VFIO, VFIO_NODES};
use crate::host::workers::blocking;
use crate::qemu::Claims;
use async_trait::async_trait;
use inventory::Inventory;
use read::{MOST, Reader};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use virt_model::driver::DriverError;
use virt_model::driver::host_devices::{DetachedDevice, DeviceNews, HostDevices};
use virt_model::nodedev::{About, COMPUTER, NewDevice, NodeDevice, PciAbout};

/// How long a device may take to be taken from a driver or given to one, or to be reset.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where a host shows what it has.
#[derive(Clone, Debug)]
pub struct Host {
    sys: PathBuf,
    proc: PathBuf,
    udev: PathBuf,
    lists: Vec<PathBuf>,
    /// Where the files of IOMMU groups are.
    vfio: PathBuf,
    /// Whether a process has the file of one open.
    is_open: fn(&Path) -> bool,
}

impl Host {
    /// This one.
    pub fn this() -> Host {
        Host {
            sys: PathBuf::from("/sys"),
            proc: PathBuf::from("/proc"),
            udev: PathBuf::from("/run/udev"),
            lists: ["/usr/share/hwdata", "/usr/share/misc"].map(PathBuf::from).into(),
            vfio: PathBuf::from(VFIO_NODES),
            is_open,
        }
    }

    fn below_sys(&self, folder: &Path) -> PathBuf {
        self.sys.join(folder.strip_prefix("/").unwrap_or(folder))
    }

    /// Refuses an IOMMU group that a process has open. Blocks.
    fn refuse_open(&self, group: &str) -> Result<(), DriverError> {
        let file = self.vfio.join(group);
        if !(self.is_open)(&file) {
            return Ok(());
        }
        let text = format!("a process has {0} open; end it first (fuser {0} tells which it is)", file.display());
        Err(DriverError::Refused(text))
    }

    /// Whether udev sends on what the kernel says, when it has done its part.
    fn has_udev(&self) -> bool {
        self.udev.join("control").exists()
    }
}

/// The devices of a Linux host.
#[derive(Debug)]
pub struct LinuxDevices {
    host: Host,
    pci: Pci,
    claims: Claims,
    /// Devices are taken from the host's drivers, too.
    takes: bool,
    /// As many are listed.
    most: usize,
    /// How long the kernel may take with one before nobody waits any more.
    patience: Duration,
    /// How the kernel is told what to make and to end.
    write: fn(&Path, &str) -> io::Result<()>,
    inventory: Mutex<Inventory>,
}

impl LinuxDevices {
    /// Those of this host, some of which guests have. `takes`: they can be taken from the host's drivers, which only root can.
    pub fn new(claims: Claims, takes: bool) -> Arc<LinuxDevices> {
        let host = Host::this();
        let pci = Pci::below(&host.sys);
        Arc::new(LinuxDevices {
            host,
            pci,
            claims,
            takes,
            most: MOST,
            patience: PATIENCE,
            write: made::write,
            inventory: Mutex::default(),
        })
    }

    fn inventory(&self) -> MutexGuard<'_, Inventory> {
        self.inventory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that would go with a device.
    fn going_with(&self, device: &NodeDevice) -> Vec<(PathBuf, Arc<NodeDevice>)> {
        let inventory = self.inventory();
        let names = device.with_functions();
        let folders: Vec<PathBuf> =
            names.iter().filter_map(|name| inventory.folder(name).map(Path::to_owned)).collect();
        let below = folders.iter().flat_map(|folder| inventory.below(folder));
        below.map(|(folder, device)| (folder.clone(), device.clone())).collect()
    }

    /// Does `work` with a PCI device while no guest can take it, what is handed over with it, or one of its virtual functions. Work
    /// that nobody waits for any more goes on, and the device is kept until it has ended.
    async fn hold(
        &self,
        device: &NodeDevice,
        what: &str,
        work: impl FnOnce(&Pci, &str) -> Result<(), DriverError> + Send + 'static,
    ) -> Result<(), DriverError> {
        let Some(PciAbout { address, group, functions, .. }) = device.pci() else {
            let text = format!("{} is no PCI device: only those are taken from the host's drivers", device.name);
            return Err(DriverError::Unsupported(text));
        };
        let (pci, claims, address, what) =
            (self.pci.clone(), self.claims.clone(), address.to_string(), what.to_owned());
        let group = group.as_ref().map(|group| group.number.to_string());
        let functions: Vec<String> = functions.0.iter().map(ToString::to_string).collect();
        let own = claim_of(device);
        let late = format!(
            "the kernel has not done with {own} within {} s, and goes on with it: nobody has it before that ends (dmesg \
             says what it waits for)",
            self.patience.as_secs()
        );
        let done = blocking(move || {
            let groups = group.into_iter().chain(functions.iter().filter_map(|function| pci.group(function)));
            let claimed: Vec<String> = groups.map(|group| Claims::group(&group)).chain([own]).collect();
            let _held = claims.hold(format!("virtd, which {what} {address}"), &claimed)?;
            work(&pci, &address)
        });
        timeout(self.patience, done).await.map_err(|_| DriverError::TimedOut(late))??
    }
}

/// Who works with a device claims it by that, beside the IOMMU groups that guests have.
fn claim_of(device: &NodeDevice) -> String {
    match device.pci() {
        Some(pci) => format!("PCI device {}", pci.address),
        None => format!("node device {}", device.name),
    }
}

/// Work that a process would keep waiting, or notice, which has the device and is no guest of ours: not while it has.
fn unless_open(
    host: Host,
    work: impl FnOnce(&Pci, &str) -> io::Result<()> + Send + 'static,
) -> impl FnOnce(&Pci, &str) -> Result<(), DriverError> + Send + 'static {
    move |pci: &Pci, address: &str| {
        let group = pci.group(address).filter(|_| pci.driver(address).as_deref() == Some(VFIO));
        group.map_or(Ok(()), |group| host.refuse_open(&group))?;
        work(pci, address).map_err(|error| failed(address, &error))
    }
}

fn failed(address: &str, error: &io::Error) -> DriverError {
    DriverError::Hypervisor(format!("PCI device {address}: {error}"))
}

/// Whether a process has an IOMMU group open: the kernel gives each to one at a time.
fn is_open(group: &Path) -> bool {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    matches!(rustix::fs::open(group, flags, Mode::empty()), Err(rustix::io::Errno::BUSY))
}

/// A device as it is read now, with what is known of its makers if it is still theirs.
fn by_makers_of(known: &NodeDevice, now: NodeDevice) -> NodeDevice {
    let ids = |device: &NodeDevice| device.vendor.id.zip(device.product.id);
    match ids(&now) {
        Some(own) if ids(known) == Some(own) => {
            NodeDevice { vendor: known.vendor.clone(), product: known.product.clone(), ..now }
        }
        _ => now,
    }
}

#[async_trait]
impl HostDevices for LinuxDevices {
    fn follow(self: Arc<Self>) -> mpsc::Receiver<DeviceNews> {
        follow::begin(self)
    }

    async fn read(&self, name: &str) -> Result<Option<NodeDevice>, DriverError> {
        let known = {
            let inventory = self.inventory();
            inventory.folder(name).map(Path::to_owned).zip(inventory.shown(name))
        };
        // The lists of makers are large, and were read when it came.
        let (host, name) = (Host { lists: Vec::new(), ..self.host.clone() }, name.to_owned());
        let read = blocking(move || {
            let reader = Reader::of(&host);
            match known {
                // Its hardware address may be another by now, of which nobody tells.
                Some((folder, known)) => reader
                    .device(&folder)
                    .map(|device| NodeDevice { name: name.into(), ..by_makers_of(&known, device) }),
                None => (name == COMPUTER).then(|| reader.computer()),
            }
        });
        read.await
    }

    fn only_reads(&self) -> Option<&'static str> {
        (!self.takes).then_some("only the virtd of the system bus takes devices from the host's drivers, and makes any")
    }

    async fn host_uses(&self, device: &NodeDevice) -> Result<Vec<(&'static str, String)>, DriverError> {
        let (going, host) = (self.going_with(device), self.host.clone());
        if !going.iter().any(|(_, device)| matches!(device.about, About::Storage(_) | About::Net(_))) {
            return Ok(Vec::new());
        }
        blocking(move || uses::host_uses(&host, &going)).await
    }

    async fn disks(&self, device: &NodeDevice) -> Result<Vec<PathBuf>, DriverError> {
        let (going, host) = (self.going_with(device), self.host.clone());
        if !going.iter().any(|(_, device)| matches!(device.about, About::Storage(_))) {
            return Ok(Vec::new());
        }
        blocking(move || uses::disks(&host, &going)).await
    }

    async fn detach(&self, device: &NodeDevice) -> Result<(), DriverError> {
        self.hold(device, "detaches", |pci, address| match pci.driver(address) {
            Some(driver) if driver == VFIO => Ok(()),
            _ => pci.detach(address).map_err(|error| failed(address, &error)),
        })
        .await
    }

    async fn reattach(&self, device: &NodeDevice, before: Option<&DetachedDevice>) -> Result<(), DriverError> {
        let driven = before.is_none_or(|before| before.driver.is_some());
        let work = unless_open(self.host.clone(), move |pci, address| pci.give_back(address, driven));
        self.hold(device, "reattaches", work).await
    }

    async fn make(&self, parent: &NodeDevice, new: &NewDevice) -> Result<(Arc<str>, Vec<DeviceNews>), DriverError> {
        self.make_device(parent, new).await
    }

    async fn end(&self, device: &NodeDevice) -> Result<Vec<DeviceNews>, DriverError> {
        self.end_device(device).await
    }

    async fn reset(&self, device: &NodeDevice) -> Result<(), DriverError> {
        let work = unless_open(self.host.clone(), |pci, address| pci.reset(address));
        self.hold(device, "resets", work).await
    }
}

#[cfg(test)]
mod tests;
