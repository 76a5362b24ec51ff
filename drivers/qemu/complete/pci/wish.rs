//! Which devices are PCI devices, and where each would like to be.

use super::super::Board;
use virt_model::device::balloon::BalloonModel;
use virt_model::device::board::{IommuModel, PanicModel};
use virt_model::device::chardev::SerialKind;
use virt_model::device::controller::ControllerModel;
use virt_model::device::disk::DiskBus;
use virt_model::device::display::VideoKind;
use virt_model::device::hostdev::HostdevKind;
use virt_model::device::input::InputBus;
use virt_model::device::interface::InterfaceKind;
use virt_model::device::memory::MemoryModel;
use virt_model::device::sound::SoundModel;
use virt_model::device::watchdog::WatchdogModel;
use virt_model::device::{AddressKind, Controller, ControllerKind, DeviceInfo, DeviceKind, DeviceMut, VirtioModel};
use virt_model::domain::DomainDef;
use virt_model::xml::Place;

/// Where a device would like to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Behind a root port of its own.
    Express,
    /// On a bus that is not PCI Express.
    Conventional,
    /// On the root itself.
    Root,
    /// Bus, slot and function that the board gives it.
    BuiltIn(u8, u8, u8),
    /// Slot and function on the root if free; whether it is a PCI Express device else.
    Preferred(u8, u8, bool),
    /// One function of a slot shared by a USB 2 controller and its companions.
    Usb2 {
        /// The controllers' number.
        index: u32,
        /// Which function it is.
        function: u8,
    },
}

impl Wish {
    /// The only place there is for it.
    pub fn built_in(self) -> Option<(u8, u8, u8)> {
        match self {
            Wish::BuiltIn(bus, slot, function) => Some((bus, slot, function)),
            _ => None,
        }
    }
}

/// In which order kinds of devices choose their places: another one would give the guests of today other places.
const ORDER: &[DeviceKind] = &[
    DeviceKind::Filesystem,
    DeviceKind::Interface,
    DeviceKind::Controller,
    DeviceKind::Disk,
    DeviceKind::Video,
    DeviceKind::Input,
    DeviceKind::Sound,
    DeviceKind::Hostdev,
    DeviceKind::Serial,
    DeviceKind::Watchdog,
    DeviceKind::Memballoon,
    DeviceKind::Rng,
    DeviceKind::Panic,
    DeviceKind::Shmem,
    DeviceKind::MemoryDevice,
    DeviceKind::Crypto,
    DeviceKind::Iommu,
    DeviceKind::Vsock,
];

/// Calls for every device that sits on PCI (bridges apart), always in the same order.
pub fn visit(def: &mut DomainDef, board: Board, mut each: impl FnMut(&mut DeviceInfo, Wish, &Place)) {
    let mut first_screen = true;
    for device in def.devices.all_mut_in(ORDER) {
        let is_first = device.kind() == DeviceKind::Video && std::mem::take(&mut first_screen);
        let wish = wish(&device, is_first, board);
        let (info, place) = device.into_info();
        let on_pci = matches!(info.address.as_ref().map(|a| &a.kind), None | Some(AddressKind::Pci(_)));
        if let Some(wish) = wish.filter(|_| on_pci) {
            each(info, wish, place);
        }
    }
}

/// Where a device would like to be; `None`: not on PCI.
fn wish(device: &DeviceMut, first_screen: bool, board: Board) -> Option<Wish> {
    match device {
        DeviceMut::Filesystem(_) | DeviceMut::Rng(_) | DeviceMut::Crypto(_) | DeviceMut::Vsock(_) => {
            Some(Wish::Express)
        }
        DeviceMut::Interface(card) if card.kind == InterfaceKind::Hostdev => Some(Wish::Express),
        DeviceMut::Interface(card) => interface_wish(card.model()),
        DeviceMut::Controller(controller) => controller_wish(controller, board),
        DeviceMut::Disk(disk) => {
            let old = disk.model == Some(VirtioModel::Transitional);
            let wish = if old { Wish::Conventional } else { Wish::Express };
            (disk.target.bus == Some(DiskBus::Virtio)).then_some(wish)
        }
        DeviceMut::Video(video) => video_wish(video.model.kind, first_screen, board),
        DeviceMut::Input(input) => (input.bus == Some(InputBus::Virtio)).then_some(Wish::Express),
        DeviceMut::Sound(sound) => sound_wish(sound.model, board),
        // A card knows itself whether it is PCI Express, and is content with either behind a root port.
        DeviceMut::Hostdev(card) => (card.kind == HostdevKind::Pci).then_some(Wish::Express),
        DeviceMut::Serial(serial) => {
            let pci = serial.target.as_ref().and_then(|t| t.kind) == Some(SerialKind::Pci);
            pci.then_some(Wish::Conventional)
        }
        DeviceMut::Watchdog(dog) => (dog.model == WatchdogModel::I6300esb).then_some(Wish::Conventional),
        DeviceMut::Memballoon(balloon) => {
            let virtio = !matches!(balloon.model, BalloonModel::None | BalloonModel::Xen);
            virtio.then_some(Wish::Express)
        }
        DeviceMut::Panic(panic) => (panic.model == Some(PanicModel::Pvpanic)).then_some(Wish::Conventional),
        DeviceMut::Shmem(_) => Some(Wish::Conventional),
        DeviceMut::MemoryDevice(memory) => {
            let virtio = matches!(memory.model, MemoryModel::VirtioMem | MemoryModel::VirtioPmem);
            virtio.then_some(Wish::Express)
        }
        DeviceMut::Iommu(iommu) => (iommu.model == IommuModel::Virtio).then_some(Wish::Root),
        DeviceMut::Parallel(_)
        | DeviceMut::Console(_)
        | DeviceMut::Channel(_)
        | DeviceMut::Tpm(_)
        | DeviceMut::Redirdev(_)
        | DeviceMut::Hub(_) => None,
    }
}

fn interface_wish(model: Option<&str>) -> Option<Wish> {
    match model? {
        "ne2k_isa" | "usb-net" => None,
        name if name.starts_with("virtio") || matches!(name, "e1000e" | "igb") => Some(Wish::Express),
        _ => Some(Wish::Conventional),
    }
}

fn controller_wish(controller: &Controller, board: Board) -> Option<Wish> {
    let index = controller.index();
    match controller.kind {
        ControllerKind::Usb => usb_wish(controller.model?, index, board),
        ControllerKind::Scsi => match controller.model {
            Some(
                ControllerModel::VirtioScsi
                | ControllerModel::VirtioTransitional
                | ControllerModel::VirtioNonTransitional,
            ) => Some(Wish::Express),
            _ => Some(Wish::Conventional),
        },
        ControllerKind::VirtioSerial => Some(Wish::Express),
        ControllerKind::Sata if board == Board::Q35 && index == 0 => Some(Wish::BuiltIn(0, 31, 2)),
        ControllerKind::Sata => Some(Wish::Conventional),
        ControllerKind::Ide if board == Board::I440fx && index == 0 => Some(Wish::BuiltIn(0, 1, 1)),
        _ => None,
    }
}

fn usb_wish(model: ControllerModel, index: u32, board: Board) -> Option<Wish> {
    let companion = |function| Some(Wish::Usb2 { index, function });
    match model {
        ControllerModel::None => None,
        ControllerModel::QemuXhci | ControllerModel::NecXhci => Some(Wish::Express),
        ControllerModel::Ich9Ehci1 => companion(7),
        ControllerModel::Ich9Uhci1 => companion(0),
        ControllerModel::Ich9Uhci2 => companion(1),
        ControllerModel::Ich9Uhci3 => companion(2),
        ControllerModel::Piix3Uhci if board == Board::I440fx && index == 0 => Some(Wish::Preferred(1, 2, false)),
        _ => Some(Wish::Conventional),
    }
}

fn video_wish(kind: VideoKind, first: bool, board: Board) -> Option<Wish> {
    let express = matches!(kind, VideoKind::Virtio | VideoKind::Bochs);
    match kind {
        VideoKind::None | VideoKind::Ramfb => None,
        _ if first => Some(Wish::Preferred(if board == Board::Q35 { 1 } else { 2 }, 0, express)),
        _ if express => Some(Wish::Express),
        _ => Some(Wish::Conventional),
    }
}

fn sound_wish(model: SoundModel, board: Board) -> Option<Wish> {
    match model {
        SoundModel::Usb | SoundModel::Pcspk | SoundModel::Sb16 => None,
        SoundModel::Virtio => Some(Wish::Express),
        SoundModel::Ich6 | SoundModel::Ich9 if board == Board::Q35 => Some(Wish::Preferred(0x1b, 0, false)),
        _ => Some(Wish::Conventional),
    }
}
