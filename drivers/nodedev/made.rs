//! Devices that the kernel makes and ends when it is told to: mediated devices, and virtual ports of hosts of Fibre Channel.
//!
//! It has made one, or ended it, when what tells it so returns; what comes below a port comes later, as any device does.

use super::read::{Reader, entries};
use super::{Host, LinuxDevices, claim_of};
use crate::host::workers::blocking;
use crate::qemu::Claims;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::time::timeout;
use virt_model::driver::DriverError;
use virt_model::driver::host_devices::DeviceNews;
use virt_model::nodedev::{NewDevice, NodeDevice, WideNames};

/// Tells the kernel by a file of its own, which is there or is not: nobody makes any in sysfs.
pub(super) fn write(file: &Path, text: &str) -> io::Result<()> {
    File::options().write(true).open(file)?.write_all(text.as_bytes())
}

/// What the kernel is told, and by which of its files.
struct Order {
    file: PathBuf,
    text: String,
}

impl Order {
    /// Makes a device of that which is in `folder` below sysfs.
    fn to_make(host: &Host, folder: &Path, new: &NewDevice) -> Order {
        match new {
            NewDevice::Mdev { kind, uuid, .. } => {
                let file = host.below_sys(folder).join("mdev_supported_types").join(kind).join("create");
                Order { file, text: uuid.to_string() }
            }
            NewDevice::Port { names, .. } => Order::of_port(host, folder, "vport_create", names),
        }
    }

    /// Ends the device in `folder` below sysfs.
    fn to_end(host: &Host, folder: &Path, device: &NodeDevice) -> Option<Order> {
        match device.fibre() {
            None => Some(Order { file: host.below_sys(folder).join("remove"), text: "1".to_owned() }),
            Some((node, port)) => {
                // Between it and its host stands the port.
                let of = folder.parent()?.parent()?;
                let names = WideNames { node: node.to_owned(), port: port.to_owned() };
                Some(Order::of_port(host, of, "vport_delete", &names))
            }
        }
    }

    fn of_port(host: &Host, folder: &Path, file: &str, names: &WideNames) -> Order {
        let own = folder.file_name().unwrap_or_default();
        let file = host.below_sys(folder).join("fc_host").join(own).join(file);
        Order { file, text: format!("{}:{}", names.port, names.node) }
    }

    fn give(&self, write: fn(&Path, &str) -> io::Result<()>) -> Result<(), DriverError> {
        write(&self.file, &self.text).map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => DriverError::Refused(
                "the kernel says that it is busy: end the process that has it open, which is no machine of virtd's"
                    .into(),
            ),
            io::ErrorKind::NotFound => {
                DriverError::Unsupported(format!("{} is not there: its driver makes none", self.file.display()))
            }
            _ => DriverError::Hypervisor(format!("{}: {error}", self.file.display())),
        })
    }
}

/// What was made, below the folder of what it was made of.
fn made(host: &Host, folder: &Path, new: &NewDevice) -> Option<(PathBuf, NodeDevice)> {
    let reader = Reader::of(host);
    match new {
        NewDevice::Mdev { uuid, .. } => {
            let own = folder.join(uuid.to_string());
            reader.device(&own).map(|device| (own, device))
        }
        NewDevice::Port { names, .. } => {
            let ports = entries(&host.below_sys(folder)).into_iter().filter(|entry| starts_with(entry, "vport-"));
            let hosts = ports.flat_map(|port| entries(&port)).filter(|entry| starts_with(entry, "host"));
            let below = hosts.filter_map(|entry| Some(Path::new("/").join(entry.strip_prefix(&host.sys).ok()?)));
            let wanted = Some((&*names.node, &*names.port));
            let found = below.filter_map(|own| reader.device(&own).map(|device| (own, device)));
            found.into_iter().find(|(_, device)| device.fibre() == wanted)
        }
    }
}

fn starts_with(entry: &Path, what: &str) -> bool {
    entry.file_name().is_some_and(|name| name.to_string_lossy().starts_with(what))
}

impl LinuxDevices {
    fn folder_of(&self, device: &NodeDevice) -> Result<PathBuf, DriverError> {
        let folder = self.inventory().folder(&device.name).map(Path::to_owned);
        folder.ok_or_else(|| DriverError::Refused(format!("{} has just gone", device.name)))
    }

    /// See [`virt_model::driver::host_devices::HostDevices::make`].
    pub(super) async fn make_device(
        &self,
        parent: &NodeDevice,
        new: &NewDevice,
    ) -> Result<(Arc<str>, Vec<DeviceNews>), DriverError> {
        let (folder, host, write, new) = (self.folder_of(parent)?, self.host.clone(), self.write, new.clone());
        let (claims, claimed, maker) = (self.claims.clone(), claim_of(parent), parent.name.clone());
        let work = blocking(move || {
            let _held = claims.hold(format!("virtd, which makes a device of {maker}"), &[claimed])?;
            Order::to_make(&host, &folder, &new).give(write)?;
            made(&host, &folder, &new).ok_or_else(|| {
                let why = "the kernel was told to make it, and shows none; what it says of that is in dmesg";
                DriverError::Hypervisor(why.to_owned())
            })
        });
        let (own, device) = timeout(self.patience, work).await.map_err(|_| self.late())???;
        let name = device.name.clone();
        let news = self.inventory().put(&own, Some(device));
        Ok((name, news))
    }

    /// See [`virt_model::driver::host_devices::HostDevices::end`].
    pub(super) async fn end_device(&self, device: &NodeDevice) -> Result<Vec<DeviceNews>, DriverError> {
        let (folder, host, write, claims) =
            (self.folder_of(device)?, self.host.clone(), self.write, self.claims.clone());
        let (own, device, name) = (folder.clone(), device.clone(), device.name.clone());
        let work = blocking(move || {
            let group = device.group().map(|group| Claims::group(&group.to_string()));
            let claimed: Vec<String> = group.into_iter().chain([claim_of(&device)]).collect();
            let _held = claims.hold(format!("virtd, which ends {name}"), &claimed)?;
            // The kernel would ask who has it open to let go, and wait for that without a limit.
            device.group().map_or(Ok(()), |group| host.refuse_open(&group.to_string()))?;
            let order = Order::to_end(&host, &folder, &device);
            order.ok_or_else(|| DriverError::Internal(format!("{name} is no device that was made")))?.give(write)?;
            match Reader::of(&host).device(&folder) {
                None => Ok(()),
                Some(_) => Err(DriverError::Hypervisor("the kernel was told to end it, and it is there still".into())),
            }
        });
        timeout(self.patience, work).await.map_err(|_| self.late())???;
        Ok(self.inventory().put(&own, None))
    }

    fn late(&self) -> DriverError {
        let seconds = self.patience.as_secs();
        DriverError::TimedOut(format!(
            "the kernel has not done with it within {seconds} s, and goes on with it (dmesg says what it waits for)"
        ))
    }
}
