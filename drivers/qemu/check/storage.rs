//! Disks and the controllers they sit on.

use super::Check;
use crate::qemu::command::{disk_device, scsi_device, usb_device, wwn};
use crate::qemu::complete::Board;
use crate::qemu::format::known_format;
use virt_model::device::controller::ControllerModel;
use virt_model::device::disk::{
    BackingStore, DiskBus, DiskCache, DiskDevice, DiskIo, DiskKind, MetadataCache, StartupPolicy,
};
use virt_model::device::source::DiskSource;
use virt_model::device::{AddressKind, Controller, ControllerKind, DeviceInfo, Disk};
use virt_model::xml::Place;

/// Nodes are named after the target, and a node's name is short.
const TARGET_LENGTH: usize = 12;

/// Each needs a descriptor of those that QEMU is given.
const MOST_TRANSIENT: usize = 16;

/// More layers than this have no use and would make a long command line.
const MOST_LAYERS: usize = 64;

impl Check<'_> {
    pub(super) fn storage(&mut self) {
        let def = self.def;
        let transient = def.devices.disks.iter().filter_map(|disk| disk.transient.as_ref());
        for transient in transient.skip(MOST_TRANSIENT) {
            self.refuse(&transient.at, format!("at most {MOST_TRANSIENT} disks of a guest are transient"));
        }
        for disk in &def.devices.disks {
            self.disk(disk);
            self.medium(disk);
            self.disk_driver(disk);
        }
        for controller in &def.devices.controllers {
            self.controller(controller);
        }
    }

    fn disk(&mut self, disk: &Disk) {
        let (device, dev) = (disk.device(), &disk.target.dev);
        let word = dev.starts_with(|c: char| c.is_ascii_lowercase()) && dev.chars().all(|c| c.is_ascii_alphanumeric());
        self.refuse_if(
            !word || dev.len() > TARGET_LENGTH,
            &disk.target.at.attribute("dev"),
            "a target is a short word such as vda",
        );
        let Some(bus) = disk.target.bus else {
            self.refuse(&disk.target.at, format!("no bus is known for target '{dev}': give one"));
            return;
        };
        let place = disk.target.at.attribute("bus");
        if matches!(bus, DiskBus::Xen | DiskBus::Uml | DiskBus::Sd | DiskBus::Nvme) {
            self.refuse(&place, format!("bus='{bus}' is not supported by the QEMU driver yet"));
        }
        let fits = match device {
            DiskDevice::Disk => bus != DiskBus::Fdc,
            DiskDevice::Cdrom => matches!(bus, DiskBus::Ide | DiskBus::Sata | DiskBus::Scsi),
            DiskDevice::Floppy => bus == DiskBus::Fdc,
            DiskDevice::Lun => false,
        };
        self.refuse_if(
            !fits,
            &disk.at.attribute("device"),
            &format!("device='{device}' on bus='{bus}' is not supported"),
        );
        let ide = bus == DiskBus::Ide && self.board == Board::Q35;
        self.refuse_if(ide, &place, "q35 machines have no IDE bus: use bus='sata'");
        let seated = match &disk.info.address.as_ref().map(|a| &a.kind) {
            Some(AddressKind::Pci(_)) => bus == DiskBus::Virtio,
            Some(AddressKind::Drive(_)) => !matches!(bus, DiskBus::Virtio | DiskBus::Usb),
            Some(AddressKind::Usb(_)) => bus == DiskBus::Usb,
            Some(_) => false,
            None => true,
        };
        self.refuse_if(!seated, &disk.at.child("address"), &format!("this address is not one on bus='{bus}'"));
        let type_needed = match bus {
            DiskBus::Virtio => disk_device(disk),
            DiskBus::Usb => "usb-storage",
            DiskBus::Scsi => "scsi-hd",
            _ => return,
        };
        self.need_device(&disk.at, type_needed);
    }

    fn medium(&mut self, disk: &Disk) {
        let kind = disk.kind();
        let place = disk.at.attribute("type");
        match kind {
            DiskKind::File | DiskKind::Block => {}
            DiskKind::Network => {
                let source = disk.source.clone().unwrap_or_default();
                self.server(&DiskSource { auth: disk.auth().cloned(), ..source });
            }
            // Where it is, and of which format, is known when it starts; whoever keeps volumes says what is missing.
            DiskKind::Volume => return,
            _ => {
                self.refuse(&place, format!("disks of type='{kind}' are not supported: 'file', 'block', 'network' are"))
            }
        }
        self.encryption(disk.encryption(), disk.meant_format());
        let removable = matches!(disk.device(), DiskDevice::Cdrom | DiskDevice::Floppy);
        self.refuse_if(disk.is_empty() && !removable, &disk.at, "a disk needs a <source>; only drives can be empty");
        if let Some(source) = &disk.source {
            let lenient = matches!(source.startup_policy, Some(StartupPolicy::Optional | StartupPolicy::Requisite));
            let how = "only the medium of a CD-ROM or floppy drive may be missing";
            self.refuse_if(lenient && !removable, &source.at.attribute("startupPolicy"), how);
        }
        self.absolute(disk.path(), &disk.at);
        let format = disk.meant_format();
        let place = disk.driver.as_ref().map_or_else(|| disk.at.clone(), |d| d.at.attribute("type"));
        self.format(format, &place);
        self.layers(disk.backing.as_deref(), format);
    }

    /// How much of an image's tables is held in memory.
    fn metadata_cache(&mut self, cache: &MetadataCache, format: &str) {
        self.refuse_if(format != "qcow2", &cache.at, "only qcow2 images have this");
        if let Some(Err(why)) = cache.max_size.as_ref().map(|size| size.bytes()) {
            self.refuse(&cache.at, why);
        }
    }

    fn layers(&mut self, mut layer: Option<&BackingStore>, above: &str) {
        // Of which format a volume is, where nobody says it, is known when it starts, as of a disk.
        let mut above = Some(above.to_owned());
        for depth in 0.. {
            let Some(store) = layer.filter(|store| !store.is_end()) else { return };
            if depth == MOST_LAYERS {
                self.refuse(&store.at, format!("more than {MOST_LAYERS} layers are not supported"));
                return;
            }
            if let Some(above) = above.filter(|above| !matches!(&**above, "qcow2" | "qcow" | "qed" | "vmdk")) {
                self.refuse(&store.at, format!("an image of format '{above}' does not stand on another"));
            }
            let kind = store.kind();
            match (kind, &store.source) {
                (DiskKind::File | DiskKind::Block, _) => {}
                // Where it is is known when it starts.
                (DiskKind::Volume, _) => {
                    let format = store.format.as_ref();
                    format.inspect(|format| self.format(&format.name, &format.at));
                    above = format.map(|format| format.name.clone());
                    layer = store.backing.as_deref();
                    continue;
                }
                (DiskKind::Network, Some(source)) => self.server(source),
                _ => {
                    self.refuse(&store.at.attribute("type"), format!("layers of type='{kind}' are not supported"));
                    return;
                }
            }
            let path = store.source.as_ref().and_then(|source| source.path(kind));
            self.refuse_if(path.is_none() && kind != DiskKind::Network, &store.at, "a layer needs a <source>");
            self.absolute(path, &store.at);
            let Some(format) = &store.format else {
                self.refuse(&store.at, "a layer needs a <format>: a format that is guessed can be forged by the guest");
                return;
            };
            self.format(&format.name, &format.at);
            if let Some(cache) = &format.metadata_cache {
                self.metadata_cache(cache, &format.name);
            }
            self.encryption(store.source.as_ref().and_then(|source| source.encryption.as_ref()), &format.name);
            above = Some(format.name.clone());
            layer = store.backing.as_deref();
        }
    }

    fn absolute(&mut self, path: Option<&str>, place: &Place) {
        let relative = path.is_some_and(|path| !path.starts_with('/'));
        self.refuse_if(relative, &place.child("source"), "the path must be absolute");
    }

    fn format(&mut self, format: &str, place: &Place) {
        if known_format(format).is_none() {
            self.refuse(place, format!("images of format '{format}' are not supported"));
        }
    }

    fn disk_driver(&mut self, disk: &Disk) {
        let bus = disk.target.bus.unwrap_or_default();
        let scsi_like = matches!(bus, DiskBus::Scsi | DiskBus::Sata | DiskBus::Ide);
        if let Some(text) = &disk.wwn {
            self.refuse_if(
                !scsi_like || wwn(text).is_none(),
                &disk.at.child("wwn"),
                "a wwn is 16 hexadecimal digits, on scsi, sata or ide",
            );
        }
        let floppy = disk.device() == DiskDevice::Floppy;
        self.refuse_if(floppy && disk.serial.is_some(), &disk.at.child("serial"), "a floppy has no serial number");
        let rate = disk.target.rotation_rate.is_some() && !scsi_like;
        self.refuse_if(
            rate,
            &disk.target.at.attribute("rotation_rate"),
            "only scsi, sata and ide disks have a rotation rate",
        );
        let removable = disk.target.removable.is_some() && !matches!(bus, DiskBus::Usb | DiskBus::Scsi);
        self.refuse_if(removable, &disk.target.at.attribute("removable"), "only usb and scsi disks can be removable");
        let fua = disk.target.dpofua.is_some() && bus != DiskBus::Scsi;
        self.refuse_if(fua, &disk.target.at.attribute("dpofua"), "only scsi disks have dpofua");
        let generation = disk.model.is_some() && bus != DiskBus::Virtio;
        self.refuse_if(generation, &disk.at.attribute("model"), "only virtio disks have a model");
        self.transient(disk);
        self.shape(disk, bus);
        let Some(driver) = &disk.driver else { return };
        // Of a volume it may be known later.
        let format = driver.format.as_deref().unwrap_or(if disk.kind() == DiskKind::Volume { "qcow2" } else { "raw" });
        let qcow2 = format == "qcow2";
        let only = "only qcow2 images have this";
        if let Some(cache) = &driver.metadata_cache {
            self.metadata_cache(cache, format);
        }
        self.refuse_if(driver.discard_no_unref.is_some() && !qcow2, &driver.at.attribute("discard_no_unref"), only);
        let newer = driver.discard_no_unref.is_some() && !self.caps.at_least(8, 1);
        self.refuse_if(newer, &driver.at.attribute("discard_no_unref"), "discard_no_unref needs QEMU 8.1");
        let copies = driver.copy_on_read == Some(true) && (disk.readonly || disk.device() != DiskDevice::Disk);
        self.refuse_if(copies, &driver.at.attribute("copy_on_read"), "only a disk that is written copies on read");
        let other = driver.name.as_deref().is_some_and(|name| name != "qemu");
        self.refuse_if(other, &driver.at.attribute("name"), "the QEMU driver handles disks with driver name='qemu'");
        let direct = matches!(driver.cache, Some(DiskCache::None | DiskCache::Directsync));
        let native = driver.io == Some(DiskIo::Native) && !direct;
        self.refuse_if(native, &driver.at.attribute("io"), "io='native' needs cache='none' or 'directsync'");
        self.io_thread(driver.iothread, &driver.at);
        let virtio = driver.queues.is_some()
            || driver.queue_size.is_some()
            || driver.iothread.is_some()
            || driver.ioeventfd.is_some()
            || driver.event_idx.is_some();
        self.refuse_if(
            virtio && bus != DiskBus::Virtio,
            &driver.at,
            "only virtio disks have queues, an iothread, ioeventfd and event_idx",
        );
        let plain = driver.virtio == Default::default();
        self.refuse_if(
            !plain && bus != DiskBus::Virtio,
            &driver.at,
            "only virtio disks have iommu, ats, packed, page_per_vq",
        );
    }

    fn transient(&mut self, disk: &Disk) {
        let Some(transient) = &disk.transient else { return };
        let fixed = disk.readonly || disk.device() != DiskDevice::Disk;
        self.refuse_if(fixed, &transient.at, "only a disk that is written can throw away what is written");
        let how = "other guests would not see what is written: leave out <shareable/> or <transient/>";
        self.refuse_if(disk.shareable, &transient.at, how);
        let local = matches!(disk.kind(), DiskKind::File | DiskKind::Block | DiskKind::Volume);
        self.refuse_if(!local, &transient.at, "only disks of type='file' and type='block' are transient");
        let open = disk.encryption().is_some();
        self.refuse_if(open, &transient.at, "what is written to an encrypted disk would lie on the host in the open");
    }

    fn controller(&mut self, controller: &Controller) {
        let place = &controller.at;
        let model = controller.model;
        match controller.kind {
            ControllerKind::Pci => self.bridge(controller),
            ControllerKind::Usb => match model.map(|m| (m, usb_device(m))) {
                Some((ControllerModel::None, _)) | None => {}
                Some((_, Some(device))) => self.need_device(place, device),
                Some((model, None)) => {
                    self.refuse(&place.attribute("model"), format!("there is no USB controller '{model}'"))
                }
            },
            ControllerKind::Scsi => {
                use ControllerModel::{VirtioNonTransitional, VirtioScsi, VirtioTransitional};
                let virtio = matches!(model, Some(VirtioScsi | VirtioTransitional | VirtioNonTransitional));
                match scsi_device(model) {
                    Some(device) => self.need_device(place, device),
                    None => {
                        let how = "SCSI controllers are virtio-scsi, lsilogic, lsisas1068, lsisas1078, vmpvscsi, dc390, am53c974";
                        self.refuse_if(!virtio, &place.attribute("model"), how);
                    }
                }
                if let Some(driver) = controller.driver.as_ref().filter(|_| !virtio) {
                    self.refuse(&driver.at, "<driver> is for model='virtio-scsi': leave it out");
                }
            }
            ControllerKind::Ide => {
                let there = self.board == Board::I440fx && controller.index() == 0;
                self.refuse_if(!there, place, "the only IDE controller is number 0 of a pc-i440fx machine");
            }
            ControllerKind::Fdc => {
                self.refuse_if(controller.index() > 0, place, "there is one floppy controller, number 0")
            }
            ControllerKind::Ccid => {
                self.refuse_if(controller.index() > 0, place, "there is one smartcard reader, number 0");
                self.need_device(place, "usb-ccid");
            }
            ControllerKind::Sata | ControllerKind::VirtioSerial => {}
            kind => {
                self.refuse(place, format!("controllers of type='{kind}' are not supported by the QEMU driver yet"))
            }
        }
        let ports = controller.ports.is_some()
            && !matches!(controller.kind, ControllerKind::Usb | ControllerKind::VirtioSerial);
        self.refuse_if(ports, &place.attribute("ports"), "only usb and virtio-serial controllers have ports");
        let xhci = matches!(model, Some(ControllerModel::QemuXhci | ControllerModel::NecXhci));
        let many =
            controller.kind == ControllerKind::Usb && controller.ports.is_some_and(|n| !xhci || !(1..=15).contains(&n));
        self.refuse_if(many, &place.attribute("ports"), "ports is from 1 to 15, on qemu-xhci or nec-xhci");
        if let Some(driver) = &controller.driver {
            self.io_thread(driver.iothread, &driver.at);
            let scsi = driver.iothread.is_some()
                || driver.cmd_per_lun.is_some()
                || driver.max_sectors.is_some()
                || driver.ioeventfd.is_some();
            let how = "only virtio-scsi controllers have an iothread, cmd_per_lun, max_sectors and ioeventfd";
            self.refuse_if(scsi && controller.kind != ControllerKind::Scsi, &driver.at, how);
        }
        let queues =
            controller.driver.as_ref().is_some_and(|d| d.queues.is_some()) && controller.kind != ControllerKind::Scsi;
        self.refuse_if(queues, &place.child("driver"), "only scsi controllers have queues");
        self.seated(&controller.info, place);
    }

    fn bridge(&mut self, controller: &Controller) {
        use ControllerModel::{
            DmiToPciBridge, PciBridge, PciRoot, PcieRoot, PcieRootPort, PcieSwitchDownstreamPort,
            PcieSwitchUpstreamPort, PcieToPciBridge,
        };
        let express = self.board == Board::Q35;
        let root = if self.board == Board::Q35 { PcieRoot } else { PciRoot };
        let known: &[&str] = match controller.model {
            Some(model) if model == root && controller.index() == 0 => return,
            Some(PcieRootPort) => &["pcie-root-port", "ioh3420"],
            Some(PcieToPciBridge) => &["pcie-pci-bridge"],
            Some(PciBridge) => &["pci-bridge"],
            Some(DmiToPciBridge) if express => &["i82801b11-bridge"],
            Some(PcieSwitchUpstreamPort) if express => &["x3130-upstream"],
            Some(PcieSwitchDownstreamPort) if express => &["xio3130-downstream"],
            Some(model) => {
                let message =
                    format!("a PCI controller '{model}' with this index is not supported on this machine yet");
                return self.refuse(&controller.at.attribute("model"), message);
            }
            None => return self.refuse(&controller.at, "a PCI controller needs a model"),
        };
        if let Some(name) = &controller.pci_model
            && !known.contains(&&*name.name)
        {
            self.refuse(&name.at, format!("this controller is one of {}, not '{}'", known.join(", "), name.name));
        }
        let reserves = controller.target.as_ref().filter(|target| target.mem_reserve_kib.is_some());
        if let Some(target) = reserves.filter(|_| controller.model != Some(PcieRootPort)) {
            self.refuse(&target.at.attribute("memReserve"), "only a pcie-root-port keeps memory for what is plugged");
        }
        if controller.model == Some(PcieSwitchDownstreamPort) {
            let on = controller.info.pci().map(|pci| u32::from(pci.bus));
            let switch = |c: &&Controller| Some(c.index()) == on && c.model == Some(PcieSwitchUpstreamPort);
            let there =
                self.def.devices.controllers.iter().filter(|c| c.kind == ControllerKind::Pci).any(|c| switch(&c));
            let how = "a downstream port is plugged into a pcie-switch-upstream-port: add one with a lower index";
            self.refuse_if(!there, &controller.at, how);
        }
        let own = controller.info.pci().is_some_and(|pci| u32::from(pci.bus) == controller.index());
        let index = controller.index();
        let after = controller.info.pci().is_some_and(|pci| u32::from(pci.bus) > index);
        self.refuse_if(own || after, &controller.at, "a PCI controller must be plugged into one with a lower index");
    }

    /// Refuses places that are none on a PC.
    pub(super) fn seated(&mut self, info: &DeviceInfo, place: &Place) {
        if let Some(AddressKind::Other(kind)) = info.address.as_ref().map(|a| &a.kind) {
            self.refuse(
                &place.child("address"),
                format!("an address of type='{kind}' is not supported on this machine"),
            );
        }
    }
}
