//! Which devices are PCI devices, and where each would like to be.

use super::super::Board;
use virt_model::device::board::{IommuModel, PanicModel};
use virt_model::device::chardev::SerialKind;
use virt_model::device::controller::ControllerModel;
use virt_model::device::disk::DiskBus;
use virt_model::device::display::VideoKind;
use virt_model::device::hostdev::HostdevKind;
use virt_model::device::interface::InterfaceKind;
use virt_model::device::memory::MemoryModel;
use virt_model::device::misc::{BalloonModel, InputBus, VirtioModel, WatchdogModel};
use virt_model::device::sound::SoundModel;
use virt_model::device::{AddressKind, Controller, ControllerKind, DeviceInfo};
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

/// Calls for every device that sits on PCI (bridges apart), always in the same order.
pub fn visit(def: &mut DomainDef, board: Board, mut each: impl FnMut(&mut DeviceInfo, Wish, &Place)) {
    let devices = &mut def.devices;
    let mut each = |info: &mut DeviceInfo, wish: Option<Wish>, place: &Place| {
        let on_pci = matches!(info.address.as_ref().map(|a| &a.kind), None | Some(AddressKind::Pci(_)));
        if let Some(wish) = wish.filter(|_| on_pci) {
            each(info, wish, place);
        }
    };
    for filesystem in &mut devices.filesystems {
        each(&mut filesystem.info, Some(Wish::Express), &filesystem.at);
    }
    for interface in &mut devices.interfaces {
        let handed_over = interface.kind == InterfaceKind::Hostdev;
        let wish = if handed_over { Some(Wish::Express) } else { interface_wish(interface.model()) };
        each(&mut interface.info, wish, &interface.at);
    }
    for controller in &mut devices.controllers {
        let wish = controller_wish(controller, board);
        each(&mut controller.info, wish, &controller.at);
    }
    for disk in &mut devices.disks {
        let old = disk.model == Some(VirtioModel::Transitional);
        let wish = if old { Wish::Conventional } else { Wish::Express };
        let wish = (disk.target.bus == Some(DiskBus::Virtio)).then_some(wish);
        each(&mut disk.info, wish, &disk.at);
    }
    for (n, video) in devices.videos.iter_mut().enumerate() {
        each(&mut video.info, video_wish(video.model.kind, n == 0, board), &video.at);
    }
    for input in &mut devices.inputs {
        let wish = (input.bus == Some(InputBus::Virtio)).then_some(Wish::Express);
        each(&mut input.info, wish, &input.at);
    }
    for sound in &mut devices.sounds {
        each(&mut sound.info, sound_wish(sound.model, board), &sound.at);
    }
    for device in &mut devices.hostdevs {
        // A card knows itself whether it is PCI Express, and is content with either behind a root port.
        each(&mut device.info, (device.kind == HostdevKind::Pci).then_some(Wish::Express), &device.at);
    }
    for serial in &mut devices.serials {
        let pci = serial.target.as_ref().and_then(|t| t.kind) == Some(SerialKind::Pci);
        each(&mut serial.info, pci.then_some(Wish::Conventional), &serial.at);
    }
    for watchdog in &mut devices.watchdogs {
        let wish = (watchdog.model == WatchdogModel::I6300esb).then_some(Wish::Conventional);
        each(&mut watchdog.info, wish, &watchdog.at);
    }
    if let Some(balloon) = &mut devices.memballoon {
        let virtio = !matches!(balloon.model, BalloonModel::None | BalloonModel::Xen);
        each(&mut balloon.info, virtio.then_some(Wish::Express), &balloon.at);
    }
    for rng in &mut devices.rngs {
        each(&mut rng.info, Some(Wish::Express), &rng.at);
    }
    for panic in &mut devices.panics {
        each(&mut panic.info, (panic.model == Some(PanicModel::Pvpanic)).then_some(Wish::Conventional), &panic.at);
    }
    for shmem in &mut devices.shmems {
        each(&mut shmem.info, Some(Wish::Conventional), &shmem.at);
    }
    for memory in &mut devices.memories {
        let virtio = matches!(memory.model, MemoryModel::VirtioMem | MemoryModel::VirtioPmem);
        each(&mut memory.info, virtio.then_some(Wish::Express), &memory.at);
    }
    for crypto in &mut devices.cryptos {
        each(&mut crypto.info, Some(Wish::Express), &crypto.at);
    }
    for iommu in &mut devices.iommus {
        each(&mut iommu.info, (iommu.model == IommuModel::Virtio).then_some(Wish::Root), &iommu.at);
    }
    if let Some(vsock) = &mut devices.vsock {
        each(&mut vsock.info, Some(Wish::Express), &vsock.at);
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
