//! Devices of the host's, and the socket between guest and host.

use super::args::Props;
use super::{Builder, id, turn, virtio};
use crate::host::usb;
use crate::qemu::plan::VSOCK_FD;
use virt_model::device::hostdev::{GuestReset, HostdevKind, HostdevSource};
use virt_model::device::interface::InterfaceKind;
use virt_model::device::{Hostdev, VirtioModel, Vsock};
use virt_model::domain::DomainDef;

/// What vfio's tables and QEMU's own devices need beside the guest's memory, as libvirt has it.
const BESIDE_MEMORY: u64 = 1 << 30;

impl Builder<'_> {
    pub(super) fn host_devices(&mut self) {
        let def = self.def;
        for device in &def.devices.hostdevs {
            self.host_device(device);
        }
    }

    pub(super) fn host_device(&mut self, device: &Hostdev) {
        let index = self.boot_index(&device.info);
        let props = match device.kind {
            HostdevKind::Pci => self.pci_device(device, index),
            HostdevKind::Usb => self.usb_device(device, index),
            _ => return,
        };
        self.args.device(props);
    }

    fn pci_device(&self, device: &Hostdev, index: Option<u32>) -> Props {
        let host = device.pci().map(|pci| pci.to_string()).unwrap_or_default();
        let props = turn(Props::device("vfio-pci").set("host", host).set("id", id(&device.info)), index);
        props.extend(self.pci(&device.info))
    }

    fn usb_device(&mut self, device: &Hostdev, index: Option<u32>) -> Props {
        let source = device.source.clone().unwrap_or_default();
        let props = Props::device("usb-host");
        let props = match device.usb() {
            Some((bus, number)) => {
                let node = usb::node(bus, number);
                self.files.push(crate::qemu::hostdev::node(node.clone()));
                props.set("hostdevice", node.to_string_lossy())
            }
            // Of a guest that is not started now; or the device is not plugged in, and QEMU waits for it.
            None => props
                .maybe("vendorid", source.vendor.as_ref().map(|vendor| vendor.id.0))
                .maybe("productid", source.product.as_ref().map(|product| product.id.0)),
        };
        let props = props.extend(resets(&source)).set("id", id(&device.info));
        turn(props, index).extend(self.usb(&device.info))
    }

    pub(super) fn vsock(&mut self) {
        let Some(vsock) = &self.def.devices.vsock else { return };
        // One that is chosen at the start has been; else the first that would be tried is shown.
        let cid = vsock.cid.as_ref().and_then(|cid| cid.address).unwrap_or(3);
        let props = Props::device(vsock_device(vsock)).set("id", id(&vsock.info)).set("guest-cid", cid);
        let shared = vsock.driver.as_ref().map(|driver| virtio(&driver.virtio)).unwrap_or_default();
        let props = props.set("vhostfd", VSOCK_FD.to_string()).extend(shared).extend(self.pci(&vsock.info));
        self.args.device(props);
    }
}

fn resets(source: &HostdevSource) -> Props {
    let Some(reset) = source.guest_reset else { return Props::default() };
    let props = Props::new("guest-reset", reset != GuestReset::Off);
    props.maybe("guest-resets-all", (reset != GuestReset::Off).then_some(reset == GuestReset::On))
}

/// The device of that generation.
pub fn vsock_device(vsock: &Vsock) -> &'static str {
    match vsock.model.unwrap_or_default() {
        VirtioModel::Virtio => "vhost-vsock-pci",
        VirtioModel::Transitional => "vhost-vsock-pci-transitional",
        VirtioModel::NonTransitional => "vhost-vsock-pci-non-transitional",
    }
}

/// How much of its memory a guest's QEMU must be able to keep in place: all of it if it says so, and where devices of the
/// host's reach into it, once for each behind an IOMMU of its own.
pub fn lock_limit(def: &DomainDef) -> Option<u64> {
    if def.memory_backing.as_ref().is_some_and(|backing| backing.locked) {
        return Some(libc::RLIM_INFINITY);
    }
    let devices = def.devices.hostdevs.iter().filter(|device| device.kind == HostdevKind::Pci).count();
    let devices = devices + def.devices.interfaces.iter().filter(|i| i.kind == InterfaceKind::Hostdev).count();
    let times = if def.devices.iommus.is_empty() { 1 } else { devices as u64 };
    let memory = def.memory_kib().saturating_mul(1024).saturating_mul(times);
    (devices > 0).then(|| memory.saturating_add(BESIDE_MEMORY))
}
