//! Controllers: each has a number, and there is one for every bus in use.

use super::Board;
use std::collections::BTreeSet;
use virt_model::device::chardev::{ChannelKind, ConsoleKind};
use virt_model::device::controller::ControllerModel;
use virt_model::device::disk::DiskBus;
use virt_model::device::{AddressKind, Controller, ControllerKind, DeviceInfo};
use virt_model::domain::DomainDef;
use virt_model::xml::Finding;

/// Refuses a number given twice, but for the companions of one USB 2 controller, and a root that is not the first.
pub fn check_numbers(def: &DomainDef, log: &mut Vec<Finding>) {
    let mut taken: BTreeSet<(ControllerKind, u32)> = BTreeSet::new();
    for controller in &def.devices.controllers {
        let index = controller.index();
        if index != 0 && matches!(controller.model, Some(ControllerModel::PcieRoot | ControllerModel::PciRoot)) {
            log.push(Finding::invalid(&controller.at, "the root of all PCI buses has index 0"));
        }
        if !taken.insert((controller.kind, index)) && !is_companion(controller) {
            let message = format!("there are two {} controllers with index {index}", controller.kind);
            log.push(Finding::invalid(&controller.at, message));
        }
    }
}

/// Whether a USB 1 controller serves the slow devices of a USB 2 one, and so shares its number.
pub fn is_companion(controller: &Controller) -> bool {
    use ControllerModel::{Ich9Ehci1, Ich9Uhci1, Ich9Uhci2, Ich9Uhci3};
    matches!(controller.model, Some(Ich9Uhci1 | Ich9Uhci2 | Ich9Uhci3 | Ich9Ehci1))
}

/// The root of all PCI buses. It has number 0, so it must be there before others are numbered.
pub fn pci_root(def: &mut DomainDef, board: Board) {
    let model = if board == Board::Q35 { ControllerModel::PcieRoot } else { ControllerModel::PciRoot };
    let controllers = &mut def.devices.controllers;
    let is_root = |c: &&mut Controller| c.kind == ControllerKind::Pci && (c.index == Some(0) || c.model == Some(model));
    match controllers.iter_mut().find(is_root) {
        Some(root) => {
            root.index.get_or_insert(0);
            root.model.get_or_insert(model);
        }
        None => controllers.push(Controller::new(ControllerKind::Pci, 0, Some(model))),
    }
}

/// The other controllers that the board itself brings, and one for USB.
pub fn built_in(def: &mut DomainDef, board: Board) {
    if board == Board::Q35 {
        ensure(def, ControllerKind::Sata, 0, None);
    }
    let usual = if board == Board::Q35 { ControllerModel::QemuXhci } else { ControllerModel::Piix3Uhci };
    if !def.devices.controllers.iter().any(|c| c.kind == ControllerKind::Usb) {
        ensure(def, ControllerKind::Usb, 0, Some(usual));
    }
    for controller in &mut def.devices.controllers {
        match controller.kind {
            ControllerKind::Usb => _ = controller.model.get_or_insert(usual),
            ControllerKind::Scsi if matches!(controller.model, None | Some(ControllerModel::Auto)) => {
                controller.model = Some(ControllerModel::VirtioScsi);
            }
            _ => {}
        }
    }
}

/// A controller for each number that an address names.
pub fn for_drives(def: &mut DomainDef, board: Board) {
    let mut wanted = BTreeSet::new();
    for disk in &def.devices.disks {
        let (kind, model) = match disk.target.bus {
            Some(DiskBus::Scsi) => (ControllerKind::Scsi, Some(ControllerModel::VirtioScsi)),
            Some(DiskBus::Sata) => (ControllerKind::Sata, None),
            Some(DiskBus::Ide) if board == Board::I440fx => (ControllerKind::Ide, None),
            Some(DiskBus::Fdc) => (ControllerKind::Fdc, None),
            _ => continue,
        };
        if let Some(AddressKind::Drive(drive)) = disk.info.address.as_ref().map(|a| &a.kind) {
            wanted.insert((kind, drive.controller, model));
        }
    }
    for info in serial_ports(def) {
        if let Some(AddressKind::VirtioSerial(serial)) = info.address.as_ref().map(|a| &a.kind) {
            wanted.insert((ControllerKind::VirtioSerial, serial.controller, None));
        }
    }
    if def.devices.untyped().iter().any(|device| device.name == "smartcard") {
        wanted.insert((ControllerKind::Ccid, 0, None));
    }
    for (kind, index, model) in wanted {
        ensure(def, kind, index, model);
    }
}

/// What sits on virtio-serial.
pub fn serial_ports(def: &DomainDef) -> impl Iterator<Item = &DeviceInfo> {
    let channels = def.devices.channels.iter().filter(|c| c.target.kind == ChannelKind::Virtio).map(|c| &c.info);
    let on_virtio = |kind: Option<ConsoleKind>| kind == Some(ConsoleKind::Virtio);
    let consoles = def.devices.consoles.iter().filter(move |c| on_virtio(c.target.as_ref().and_then(|t| t.kind)));
    channels.chain(consoles.map(|c| &c.info))
}

fn ensure(def: &mut DomainDef, kind: ControllerKind, index: u32, model: Option<ControllerModel>) {
    if !def.devices.controllers.iter().any(|c| c.kind == kind && c.index() == index) {
        def.devices.controllers.push(Controller::new(kind, index, model));
    }
}
