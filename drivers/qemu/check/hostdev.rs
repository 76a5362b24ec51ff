//! Devices of the host's: what QEMU can take. Whether they are there is looked at when the guest starts.

use super::Check;
use std::collections::BTreeSet;
use virt_model::device::board::IommuModel;
use virt_model::device::hostdev::{HostdevDriverName, HostdevKind, HostdevMode, HostdevSource};
use virt_model::device::{Hostdev, Vsock};
use virt_model::xml::Place;

impl Check<'_> {
    pub(super) fn host_devices(&mut self) {
        let def = self.def;
        let mut seen = BTreeSet::new();
        for device in &def.devices.hostdevs {
            let other = device.mode == Some(HostdevMode::Capabilities);
            self.refuse_if(other, &device.at.attribute("mode"), "mode='capabilities' is for containers");
            let source = device.source.clone().unwrap_or_default();
            match device.kind {
                HostdevKind::Pci => self.pci_device(device, &source),
                HostdevKind::Usb => self.usb_device(device, &source),
                kind => self.refuse(
                    &device.at.attribute("type"),
                    format!("host devices of type='{kind}' are not supported by the QEMU driver yet: pci and usb are"),
                ),
            }
            let usb = device.usb().map(|(bus, number)| format!("{bus}/{number}"));
            let again = device.pci().map(|pci| pci.to_string()).or(usb).is_some_and(|name| !seen.insert(name));
            self.refuse_if(again, &device.at, "the guest has this device twice");
        }
        if let Some(vsock) = &def.devices.vsock {
            self.vsock(vsock);
        }
    }

    fn pci_device(&mut self, device: &Hostdev, source: &HostdevSource) {
        let place = &device.at;
        self.need_device(place, "vfio-pci");
        let how = "<source> with the <address> of a PCI device is needed: domain, bus, slot, function";
        self.refuse_if(device.pci().is_none(), place, how);
        self.word(source, "pci");
        let usb = source.vendor.is_some() || source.product.is_some() || source.guest_reset.is_some();
        let how = "vendor, product, guestReset and startupPolicy are for type='usb'";
        self.refuse_if(usb || source.startup_policy.is_some(), &source.at, how);
        if let Some(driver) = &device.driver {
            let vfio = driver.name.is_none_or(|name| name == HostdevDriverName::Vfio);
            self.refuse_if(!vfio, &driver.at.attribute("name"), "only vfio hands devices to guests of QEMU");
        }
        self.taken_from_the_host(device.managed == Some(true), place);
        self.seated(&device.info, place);
    }

    /// What holds for every PCI device.
    pub(super) fn taken_from_the_host(&mut self, managed: bool, place: &Place) {
        let how = "managed='yes' needs root: use the system bus, or bind the device to vfio-pci and say managed='no'";
        self.refuse_if(managed && !self.caps.site.makes_taps, &place.attribute("managed"), how);
        let iommus = &self.def.devices.iommus;
        let mut intel = iommus.iter().filter(|iommu| iommu.model == IommuModel::Intel);
        let blind = intel.any(|iommu| iommu.driver.as_ref().is_none_or(|driver| driver.caching_mode != Some(true)));
        self.refuse_if(blind, place, "the guest's <iommu> must tell of its changes: <driver caching_mode='on'/>");
    }

    fn usb_device(&mut self, device: &Hostdev, source: &HostdevSource) {
        let place = &device.at;
        self.need_device(place, "usb-host");
        let ids = (source.vendor.is_some(), source.product.is_some());
        let named = ids == (true, true) || device.usb().is_some();
        let how = "<source> needs <vendor> and <product>, or an <address> with bus and device";
        self.refuse_if(!named || ids.0 != ids.1, place, how);
        self.word(source, "usb");
        self.refuse_if(device.driver.is_some(), &place.child("driver"), "<driver> is for PCI devices");
    }

    /// A host's address may say its type.
    fn word(&mut self, source: &HostdevSource, kind: &str) {
        let Some(address) = &source.address else { return };
        let odd = address.word.as_ref().is_some_and(|word| word != kind);
        self.refuse_if(odd, &address.at.attribute("type"), &format!("the address is not one of type='{kind}'"));
    }

    fn vsock(&mut self, vsock: &Vsock) {
        let place = &vsock.at;
        self.need_device(place, crate::qemu::command::vsock_device(vsock));
        let none = !self.caps.site.vhost_vsock;
        self.refuse_if(none, place, "there is no /dev/vhost-vsock: load the module (modprobe vhost_vsock)");
        if let Some(cid) = vsock.cid.as_ref().filter(|cid| cid.auto != Some(true)) {
            let how = "a number is needed, or auto='yes'";
            self.refuse_if(cid.address.is_none(), &cid.at, how);
            let reserved = cid.address.is_some_and(|number| !(3..u32::MAX).contains(&number));
            self.refuse_if(reserved, &cid.at.attribute("address"), "numbers of guests are 3 to 4294967294");
        }
        self.seated(&vsock.info, place);
    }
}
