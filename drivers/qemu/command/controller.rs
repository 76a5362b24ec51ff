//! Controllers: bridges first, each after the one it is plugged into.

use super::args::Props;
use super::{Builder, id, virtio};
use crate::qemu::complete::Board;
use virt_model::device::controller::ControllerModel;
use virt_model::device::disk::DiskDevice;
use virt_model::device::{AddressKind, Controller, ControllerKind, Disk};

impl Builder<'_> {
    pub(super) fn controllers(&mut self) {
        self.bridges();
        let def = self.def;
        let others = def.devices.controllers.iter().filter(|c| c.kind != ControllerKind::Pci);
        // Each after what it is plugged into: companions after their master, card readers after USB.
        let mut others: Vec<_> = others.collect();
        if self.board == Board::I440fx {
            for (drive, order) in self.floppy_turns() {
                self.args.pair("-global", format!("isa-fdc.bootindex{drive}={order}"));
            }
        }
        others.sort_by_key(|c| (c.kind == ControllerKind::Ccid, c.master.is_some()));
        for controller in others {
            if let Some(props) = self.controller_device(controller) {
                self.args.device(props);
            }
        }
    }

    fn bridges(&mut self) {
        let def = self.def;
        let bridges = def.devices.controllers.iter().filter(|c| c.kind == ControllerKind::Pci && c.index() > 0);
        let mut waiting: Vec<&Controller> = bridges.collect();
        let mut there = vec![0];
        while !waiting.is_empty() {
            let parent = |c: &&Controller| c.info.pci().map_or(0, |pci| u32::from(pci.bus));
            let (ready, rest): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|c| there.contains(&parent(c)));
            if ready.is_empty() {
                // A ring of bridges: `check` refuses it.
                return;
            }
            for bridge in ready {
                there.push(bridge.index());
                let props = self.bridge(bridge);
                self.args.device(props);
            }
            waiting = rest;
        }
    }

    fn bridge(&self, bridge: &Controller) -> Props {
        let name = bridge.pci_model.as_ref().map_or("pcie-root-port", |model| &*model.name);
        let target = bridge.target.as_ref();
        Props::device(name)
            .maybe("port", target.and_then(|t| t.port).map(|port| port.0))
            .maybe("chassis", target.and_then(|t| t.chassis))
            .maybe("chassis_nr", target.and_then(|t| t.chassis_nr))
            .maybe("hotplug", target.and_then(|t| t.hotplug))
            .maybe("mem-reserve", target.and_then(|t| t.mem_reserve_kib).map(|kib| kib.saturating_mul(1024)))
            .set("id", id(&bridge.info))
            .extend(self.pci(&bridge.info))
    }

    pub(super) fn controller_device(&self, controller: &Controller) -> Option<Props> {
        let device = match controller.kind {
            ControllerKind::Ccid => {
                let props = Props::device("usb-ccid").set("id", id(&controller.info));
                return Some(props.extend(self.usb(&controller.info)));
            }
            ControllerKind::Usb => return self.usb_controller(controller),
            ControllerKind::Scsi => match scsi_device(controller.model) {
                Some(device) => {
                    return Some(
                        Props::device(device).set("id", id(&controller.info)).extend(self.pci(&controller.info)),
                    );
                }
                None => format!("virtio-scsi-pci{}", generation(controller)),
            },
            ControllerKind::VirtioSerial => format!("virtio-serial-pci{}", generation(controller)),
            ControllerKind::Sata if self.board == Board::Q35 && controller.index() == 0 => return None,
            ControllerKind::Sata => "ich9-ahci".to_owned(),
            ControllerKind::Fdc if self.board == Board::Q35 => {
                let props = Props::device("isa-fdc").set("id", id(&controller.info));
                let turns = self.floppy_turns().into_iter();
                return Some(turns.fold(props, |props, (drive, order)| props.set(&format!("bootindex{drive}"), order)));
            }
            _ => return None,
        };
        let driver = controller.driver.as_ref();
        let serial = controller.kind == ControllerKind::VirtioSerial;
        let props = Props::device(&device)
            .set("id", id(&controller.info))
            .maybe("max_ports", controller.ports.filter(|_| serial))
            .maybe("vectors", controller.vectors.filter(|n| serial && *n >= 0))
            .maybe("iothread", driver.and_then(|d| d.iothread).map(|n| format!("iothread{n}")))
            .maybe("ioeventfd", driver.and_then(|d| d.ioeventfd))
            .maybe("cmd_per_lun", driver.and_then(|d| d.cmd_per_lun))
            .maybe("max_sectors", driver.and_then(|d| d.max_sectors))
            .maybe("num_queues", driver.and_then(|d| d.queues))
            .extend(driver.map(|d| virtio(&d.virtio)).unwrap_or_default());
        Some(props.extend(self.pci(&controller.info)))
    }

    /// When each floppy drive is tried, by its letter.
    fn floppy_turns(&self) -> Vec<(char, u32)> {
        let floppies = self.def.devices.disks.iter().filter(|disk| disk.device() == DiskDevice::Floppy);
        let letter = |unit: u32| if unit == 0 { 'A' } else { 'B' };
        let turn = |disk: &Disk| match disk.info.address.as_ref()?.kind {
            AddressKind::Drive(drive) => Some((letter(drive.unit), self.boot_index(&disk.info)?)),
            _ => None,
        };
        floppies.filter_map(turn).collect()
    }

    fn usb_controller(&self, controller: &Controller) -> Option<Props> {
        let props = Props::device(usb_device(controller.model?)?);
        let props = match &controller.master {
            Some(master) => {
                let ehci = self.controller(ControllerKind::Usb, controller.index());
                let bus = ehci.and_then(|c| c.info.alias()).unwrap_or("usb");
                props.set("masterbus", format!("{bus}.0")).set("firstport", master.startport)
            }
            None => props.set("id", id(&controller.info)),
        };
        let ports = controller.ports;
        Some(props.maybe("p2", ports).maybe("p3", ports).extend(self.pci(&controller.info)))
    }
}

/// What QEMU calls a USB controller.
pub fn usb_device(model: ControllerModel) -> Option<&'static str> {
    Some(match model {
        ControllerModel::QemuXhci => "qemu-xhci",
        ControllerModel::NecXhci => "nec-usb-xhci",
        ControllerModel::Piix3Uhci => "piix3-usb-uhci",
        ControllerModel::Piix4Uhci => "piix4-usb-uhci",
        ControllerModel::Ehci => "usb-ehci",
        ControllerModel::Ich9Ehci1 => "ich9-usb-ehci1",
        ControllerModel::Ich9Uhci1 => "ich9-usb-uhci1",
        ControllerModel::Ich9Uhci2 => "ich9-usb-uhci2",
        ControllerModel::Ich9Uhci3 => "ich9-usb-uhci3",
        ControllerModel::PciOhci => "pci-ohci",
        _ => return None,
    })
}

/// What QEMU calls a SCSI controller that is not virtio's.
pub fn scsi_device(model: Option<ControllerModel>) -> Option<&'static str> {
    Some(match model? {
        ControllerModel::Lsilogic => "lsi53c895a",
        ControllerModel::Lsisas1068 => "mptsas1068",
        ControllerModel::Lsisas1078 => "megasas",
        ControllerModel::Vmpvscsi => "pvscsi",
        ControllerModel::Dc390 => "dc390",
        ControllerModel::Am53c974 => "am53c974",
        _ => return None,
    })
}

fn generation(controller: &Controller) -> &'static str {
    match controller.model {
        Some(ControllerModel::VirtioTransitional) => "-transitional",
        Some(ControllerModel::VirtioNonTransitional) => "-non-transitional",
        _ => "",
    }
}
