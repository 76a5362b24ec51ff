//! Places on disk controllers, virtio-serial and USB. Given ones are kept; the rest are chosen in document order.

use super::Board;
use super::controllers::is_companion;
use std::collections::{BTreeMap, BTreeSet};
use virt_model::device::address::{DimmAddress, DriveAddress, UsbAddress, VirtioSerialAddress};
use virt_model::device::chardev::{ChannelKind, ConsoleKind, SerialKind};
use virt_model::device::controller::ControllerModel;
use virt_model::device::disk::DiskBus;
use virt_model::device::hostdev::HostdevKind;
use virt_model::device::input::InputBus;
use virt_model::device::memory::MemoryModel;
use virt_model::device::sound::SoundModel;
use virt_model::device::{
    Address, AddressKind, Controller, ControllerKind, DeviceInfo, DeviceKind, DeviceMut, Disk, MemoryDevice,
};
use virt_model::domain::DomainDef;
use virt_model::xml::{Element, Finding, Place};

/// More controllers of one kind than any guest can use; bounds the search for a free place.
const MANY: u32 = 64;

/// Ports of a virtio-serial controller that does not say.
const SERIAL_PORTS: u32 = 31;

/// Gives every disk that is not a PCI device its place on a controller.
pub fn disks(def: &mut DomainDef, board: Board, log: &mut Vec<Finding>) {
    let mut taken = BTreeMap::new();
    for disk in &def.devices.disks {
        if let (Some(bus), Some(AddressKind::Drive(drive))) = (disk.target.bus, kind(&disk.info))
            && let Some(other) = taken.insert((bus, *drive), &disk.target.dev)
        {
            let message = format!("the place on the {bus} controller is also the one of '{other}'");
            log.push(Finding::invalid(&disk.at, message));
        }
    }
    let mut taken: BTreeSet<(DiskBus, DriveAddress)> = taken.into_keys().collect();
    for disk in &mut def.devices.disks {
        let Some(bus) = disk.target.bus.filter(|bus| disk.info.address.is_none() && on_a_controller(*bus)) else {
            continue;
        };
        match free_drive(disk, bus, board, &taken) {
            Some(drive) => {
                taken.insert((bus, drive));
                disk.info.address = Some(Address::of(AddressKind::Drive(drive)));
            }
            None => log.push(Finding::invalid(
                &disk.at,
                format!("there is no free place on the {bus} bus for '{}'", disk.target.dev),
            )),
        }
    }
}

fn on_a_controller(bus: DiskBus) -> bool {
    matches!(bus, DiskBus::Scsi | DiskBus::Sata | DiskBus::Ide | DiskBus::Fdc)
}

/// The place its letter stands for, or the next one after it that is free.
fn free_drive(
    disk: &Disk,
    bus: DiskBus,
    board: Board,
    taken: &BTreeSet<(DiskBus, DriveAddress)>,
) -> Option<DriveAddress> {
    let per_controller = match bus {
        DiskBus::Scsi => 7,
        DiskBus::Sata => 6,
        DiskBus::Ide => 4,
        _ => 2,
    };
    let controllers = match bus {
        DiskBus::Ide if board == Board::I440fx => 1,
        DiskBus::Ide => MANY,
        DiskBus::Fdc => 1,
        _ => MANY,
    };
    let at = |n: u32| {
        let (controller, n) = (n / per_controller, n % per_controller);
        let (channel, unit) = if bus == DiskBus::Ide { (n / 2, n % 2) } else { (0, n) };
        DriveAddress { controller, bus: channel, target: 0, unit }
    };
    let limit = per_controller * controllers;
    let first = target_number(&disk.target.dev).unwrap_or(0) % limit;
    (first..limit).chain(0..first).map(at).find(|drive| !taken.contains(&(bus, *drive)))
}

/// 0 for `vda`, 25 for `sdz`, 26 for `sdaa`.
pub fn target_number(dev: &str) -> Option<u32> {
    let letters = dev.get(2..)?.trim_end_matches(|c: char| c.is_ascii_digit());
    let step = |n: Option<u32>, c: u8| {
        let digit = c.is_ascii_lowercase().then(|| u32::from(c - b'a'))?;
        n.map_or(Some(digit), |n| n.checked_add(1)?.checked_mul(26)?.checked_add(digit))
    };
    let mut number = None;
    for c in letters.bytes() {
        number = Some(step(number, c)?);
    }
    number
}

/// Gives every channel and virtio console its port.
pub fn virtio_serial(def: &mut DomainDef, log: &mut Vec<Finding>) {
    let ports: BTreeMap<u32, u32> = (def.devices.controllers.iter())
        .filter(|c| c.kind == ControllerKind::VirtioSerial)
        .map(|c| (c.index(), c.ports.unwrap_or(SERIAL_PORTS)))
        .collect();
    let mut taken: BTreeSet<(u32, u32)> = BTreeSet::new();
    for (info, place, _) in serial_ports(def) {
        if let Some(AddressKind::VirtioSerial(VirtioSerialAddress { controller, port: Some(port), .. })) = kind(info)
            && !taken.insert((*controller, *port))
        {
            log.push(Finding::invalid(
                &place,
                format!("port {port} of virtio-serial controller {controller} is taken twice"),
            ));
        }
    }
    for (info, place, first) in serial_ports(def) {
        let fixed = match kind(info) {
            Some(AddressKind::VirtioSerial(VirtioSerialAddress { port: Some(_), .. })) => continue,
            Some(AddressKind::VirtioSerial(address)) => Some(address.controller),
            Some(_) => continue,
            None => None,
        };
        let controllers = fixed.map_or(0..MANY, |n| n..n.saturating_add(1));
        let places =
            controllers.flat_map(|c| (first..*ports.get(&c).unwrap_or(&SERIAL_PORTS)).map(move |port| (c, port)));
        let Some((controller, port)) = places.into_iter().find(|place| !taken.contains(place)) else {
            log.push(Finding::invalid(&place, "there is no free virtio-serial port"));
            continue;
        };
        taken.insert((controller, port));
        let address = VirtioSerialAddress { controller, bus: 0, port: Some(port) };
        info.address = Some(Address::of(AddressKind::VirtioSerial(address)));
    }
}

/// Channels and virtio consoles, with the first port each may have: port 0 is for a console.
fn serial_ports(def: &mut DomainDef) -> impl Iterator<Item = (&mut DeviceInfo, Place, u32)> {
    let consoles = def.devices.consoles.iter_mut();
    let consoles = consoles.filter(|c| c.target.as_ref().and_then(|t| t.kind) == Some(ConsoleKind::Virtio));
    let channels = def.devices.channels.iter_mut().filter(|c| c.target.kind == ChannelKind::Virtio);
    let consoles = consoles.map(|c| (&mut c.info, c.at.clone(), 0));
    consoles.chain(channels.map(|c| (&mut c.info, c.at.clone(), 1)))
}

/// Gives a smartcard its slot; there is one reader with one slot.
pub fn smartcards(def: &mut DomainDef) {
    let cards = def.devices.rest.elements.iter_mut().filter(|device| device.name == "smartcard");
    for card in cards.filter(|card| card.child("address").is_none()) {
        let address = Element::new("address").with_attr("type", "ccid");
        card.push(address.with_attr("controller", "0").with_attr("slot", "0"));
    }
}

/// Gives every USB device its port; where ports run out, adds a controller like the last.
pub fn usb(def: &mut DomainDef, board: Board, log: &mut Vec<Finding>) {
    let mut taken: BTreeSet<(u32, String)> = BTreeSet::new();
    let mut ports = usb_ports(&def.devices.controllers);
    for (info, place) in usb_devices(def) {
        let Some(AddressKind::Usb(UsbAddress { bus, port })) = kind(info) else { continue };
        if !ports.contains_key(bus) {
            log.push(Finding::invalid(&place, format!("there is no USB controller with index {bus}")));
        }
        if let Some(port) = port
            && !taken.insert((*bus, port.clone()))
        {
            log.push(Finding::invalid(&place, format!("port {port} of USB controller {bus} is taken twice")));
        }
    }
    let mut added = Vec::new();
    for (info, place) in usb_devices(def) {
        let fixed = match kind(info) {
            Some(AddressKind::Usb(UsbAddress { bus, port: None })) => Some(*bus),
            Some(_) => continue,
            None => None,
        };
        if ports.is_empty() {
            log.push(Finding::invalid(&place, "it is a USB device, and USB is turned off (controller model='none')"));
            continue;
        }
        let free = find_port(&ports, fixed, &taken)
            .or_else(|| fixed.is_none().then(|| another(&mut ports, &mut added, board))?);
        match free {
            Some((bus, port)) => {
                taken.insert((bus, port.clone()));
                info.address = Some(Address::of(AddressKind::Usb(UsbAddress { bus, port: Some(port) })));
            }
            None => log.push(Finding::invalid(&place, "there is no free USB port")),
        }
    }
    def.devices.controllers.extend(added);
}

fn find_port(ports: &BTreeMap<u32, u32>, fixed: Option<u32>, taken: &BTreeSet<(u32, String)>) -> Option<(u32, String)> {
    let buses = ports.iter().filter(|(bus, _)| fixed.is_none_or(|f| f == **bus));
    let mut places = buses.flat_map(|(bus, count)| (1..=*count).map(|port| (*bus, port.to_string())));
    places.find(|place| !taken.contains(place))
}

fn another(ports: &mut BTreeMap<u32, u32>, added: &mut Vec<Controller>, board: Board) -> Option<(u32, String)> {
    let index = ports.keys().max()?.checked_add(1).filter(|n| *n < MANY)?;
    let model = if board == Board::Q35 { ControllerModel::QemuXhci } else { ControllerModel::Piix3Uhci };
    let controller = Controller::new(ControllerKind::Usb, index, Some(model));
    ports.insert(index, controller.usb_ports());
    added.push(controller);
    Some((index, "1".to_owned()))
}

fn usb_ports(controllers: &[Controller]) -> BTreeMap<u32, u32> {
    let usb = controllers.iter().filter(|c| c.kind == ControllerKind::Usb && c.model != Some(ControllerModel::None));
    let mut ports = BTreeMap::new();
    for controller in usb.filter(|c| !is_companion(c) || c.master.is_none()) {
        let count = controller.usb_ports();
        ports.entry(controller.index()).and_modify(|known: &mut u32| *known = count.max(*known)).or_insert(count);
    }
    ports
}

/// Gives memory devices their slots.
pub fn memory_slots(def: &mut DomainDef, log: &mut Vec<Finding>) {
    let mut taken = BTreeSet::new();
    for memory in &def.devices.memories {
        if let Some(AddressKind::Dimm(DimmAddress { slot: Some(slot), .. })) = kind(&memory.info)
            && !taken.insert(*slot)
        {
            log.push(Finding::invalid(&memory.at, format!("memory slot {slot} is taken twice")));
        }
    }
    let plugged = |device: &&mut MemoryDevice| matches!(device.model, MemoryModel::Dimm | MemoryModel::Nvdimm);
    for memory in def.devices.memories.iter_mut().filter(plugged) {
        let base = match kind(&memory.info) {
            None => None,
            Some(AddressKind::Dimm(DimmAddress { slot: None, base })) => *base,
            Some(_) => continue,
        };
        let slot = (0..).find(|slot| taken.insert(*slot));
        memory.info.address = Some(Address::of(AddressKind::Dimm(DimmAddress { slot, base })));
    }
}

/// In which order kinds of devices choose their ports.
const USB_ORDER: &[DeviceKind] = &[
    DeviceKind::Disk,
    DeviceKind::Hub,
    DeviceKind::Controller,
    DeviceKind::Input,
    DeviceKind::Sound,
    DeviceKind::Redirdev,
    DeviceKind::Serial,
    DeviceKind::Hostdev,
];

fn usb_devices(def: &mut DomainDef) -> impl Iterator<Item = (&mut DeviceInfo, Place)> {
    let devices = def.devices.all_mut_in(USB_ORDER).into_iter().filter(is_on_usb);
    devices.map(DeviceMut::into_info).map(|(info, at)| (info, at.clone()))
}

fn is_on_usb(device: &DeviceMut) -> bool {
    match device {
        DeviceMut::Disk(disk) => disk.target.bus == Some(DiskBus::Usb),
        DeviceMut::Input(input) => input.bus == Some(InputBus::Usb),
        DeviceMut::Sound(sound) => sound.model == SoundModel::Usb,
        DeviceMut::Controller(controller) => controller.kind == ControllerKind::Ccid,
        DeviceMut::Serial(serial) => serial.target.as_ref().and_then(|target| target.kind) == Some(SerialKind::Usb),
        DeviceMut::Hostdev(device) => device.kind == HostdevKind::Usb,
        DeviceMut::Redirdev(_) | DeviceMut::Hub(_) => true,
        _ => false,
    }
}

fn kind(info: &DeviceInfo) -> Option<&AddressKind> {
    info.address.as_ref().map(|address| &address.kind)
}

#[cfg(test)]
mod tests {
    use super::target_number;

    #[test]
    fn letters_count_like_columns_of_a_sheet() {
        assert_eq!(target_number("vda"), Some(0));
        assert_eq!(target_number("sdz"), Some(25));
        assert_eq!(target_number("sdaa"), Some(26));
        assert_eq!(target_number("vda1"), Some(0));
        assert_eq!(target_number("vd"), None);
        assert_eq!(target_number("vdA"), None);
        assert_eq!(target_number("sdzzzzzzzzzzzzzzz"), None);
    }
}
