//! `<devices>`: one file per element, and what all devices share.

use crate::domain::part::{element, flat};
use crate::domain::value::choices;
use crate::xml::Element;

pub mod address;
pub mod any;
pub mod balloon;
pub mod board;
pub mod chardev;
pub mod controller;
pub mod disk;
pub mod display;
pub mod filesystem;
pub mod filter;
pub mod hostdev;
pub mod input;
pub mod interface;
pub mod memory;
pub mod rng;
pub mod sound;
pub mod source;
pub mod tpm;
pub mod watchdog;

pub use address::{Address, AddressKind, PciAddress};
pub use any::{Device, DeviceKind, DeviceMut};
pub use balloon::Memballoon;
pub use board::{Crypto, Hub, Iommu, Panic, Shmem};
pub use chardev::{Channel, CharKind, CharSource, Console, Parallel, Redirdev, Redirfilter, Serial};
pub use controller::{Controller, ControllerKind};
pub use disk::Disk;
pub use display::{Graphics, Video};
pub use filesystem::Filesystem;
pub use hostdev::{Hostdev, Vsock};
pub use input::Input;
pub use interface::Interface;
pub use memory::MemoryDevice;
pub use rng::Rng;
pub use sound::{Audio, Sound};
pub use tpm::Tpm;
pub use watchdog::Watchdog;

element! {
    /// `<devices>`. Kinds stand in libvirt's order of output; within a kind, in the document's.
    pub struct Devices {
        /// The hypervisor's program.
        leaf "emulator" => emulator: Option<String>,
        /// `<disk>`
        children "disk" => disks: Vec<Disk>,
        /// `<controller>`
        children "controller" => controllers: Vec<Controller>,
        /// `<filesystem>`
        children "filesystem" => filesystems: Vec<Filesystem>,
        /// `<interface>`
        children "interface" => interfaces: Vec<Interface>,
        /// `<serial>`
        children "serial" => serials: Vec<Serial>,
        /// `<parallel>`
        children "parallel" => parallels: Vec<Parallel>,
        /// `<console>`
        children "console" => consoles: Vec<Console>,
        /// `<channel>`
        children "channel" => channels: Vec<Channel>,
        /// `<input>`
        children "input" => inputs: Vec<Input>,
        /// `<tpm>`
        children "tpm" => tpms: Vec<Tpm>,
        /// `<graphics>`
        children "graphics" => graphics: Vec<Graphics>,
        /// `<sound>`
        children "sound" => sounds: Vec<Sound>,
        /// `<audio>`
        children "audio" => audios: Vec<Audio>,
        /// `<video>`
        children "video" => videos: Vec<Video>,
        /// `<hostdev>`
        children "hostdev" => hostdevs: Vec<Hostdev>,
        /// `<redirdev>`
        children "redirdev" => redirdevs: Vec<Redirdev>,
        /// `<redirfilter>`
        child "redirfilter" => redirfilter: Option<Redirfilter>,
        /// `<hub>`
        children "hub" => hubs: Vec<Hub>,
        /// `<watchdog>`
        children "watchdog" => watchdogs: Vec<Watchdog>,
        /// `<memballoon>`
        child "memballoon" => memballoon: Option<Memballoon>,
        /// `<rng>`
        children "rng" => rngs: Vec<Rng>,
        /// `<panic>`
        children "panic" => panics: Vec<Panic>,
        /// `<shmem>`
        children "shmem" => shmems: Vec<Shmem>,
        /// `<memory>`
        children "memory" => memories: Vec<MemoryDevice>,
        /// `<crypto>`
        children "crypto" => cryptos: Vec<Crypto>,
        /// `<iommu>`
        children "iommu" => iommus: Vec<Iommu>,
        /// `<vsock>`
        child "vsock" => vsock: Option<Vsock>,
    }
}

impl Devices {
    /// Devices of kinds that are kept and not acted upon, e.g. `<lease>`.
    pub fn untyped(&self) -> &[Element] {
        &self.rest.elements
    }

    /// The host's end of every character device that is a device of its own.
    pub fn char_sources_mut(&mut self) -> Vec<&mut CharSource> {
        let mut all = Vec::new();
        all.extend(self.serials.iter_mut().map(|d| &mut d.source));
        all.extend(self.parallels.iter_mut().map(|d| &mut d.source));
        all.extend(self.consoles.iter_mut().map(|d| &mut d.source));
        all.extend(self.channels.iter_mut().map(|d| &mut d.source));
        all.extend(self.redirdevs.iter_mut().map(|d| &mut d.source));
        all
    }
}

flat! {
    /// What every device can have: a name, a place on a bus, a turn at booting.
    pub struct DeviceInfo {
        /// `<boot>`
        child "boot" => boot: Option<DeviceBoot>,
        /// `<alias>`
        child "alias" => alias: Option<Alias>,
        /// `<acpi>`
        child "acpi" => acpi: Option<DeviceAcpi>,
        /// `<rom>`
        child "rom" => rom: Option<Rom>,
        /// `<address>`
        child "address" => address: Option<Address>,
    }
}

impl DeviceInfo {
    /// The turn at booting, from 1.
    pub fn boot_order(&self) -> Option<u32> {
        self.boot.as_ref().map(|boot| boot.order)
    }

    /// The name of the device within the hypervisor.
    pub fn alias(&self) -> Option<&str> {
        self.alias.as_ref().map(|alias| &*alias.name)
    }

    /// The address, if it is one on PCI and complete.
    pub fn pci(&self) -> Option<&PciAddress> {
        match &self.address.as_ref()?.kind {
            AddressKind::Pci(Some(pci)) => Some(pci),
            _ => None,
        }
    }
}

element! {
    /// `<boot order=…>`
    pub struct DeviceBoot {
        /// From 1.
        need "order" => order: u32,
    }
}

element! {
    /// `<acpi>`: what firmware tables say of a device.
    pub struct DeviceAcpi {
        /// Its number among what is on the board, by which systems name it (`eno3`).
        need "index" => index: u32,
    }
}

element! {
    /// `<rom>`: what a PCI device brings for the firmware to run.
    pub struct Rom {
        /// Whether there is any.
        yes_no "enabled" => enabled: Option<bool>,
        /// Whether the guest sees it.
        on_off "bar" => bar: Option<bool>,
        /// Its content; the device's own if absent.
        attr "file" => file: Option<String>,
    }
}

element! {
    /// `<alias>`
    pub struct Alias {
        /// `ua-…` if a person chose it.
        need "name" => name: String,
    }
}

impl Alias {
    /// Whether it is kept in the stored definition.
    pub fn is_user(&self) -> bool {
        self.name.starts_with("ua-")
    }
}

flat! {
    /// Attributes of `<driver>` that all virtio devices share.
    pub struct VirtioDriver {
        /// DMA through the IOMMU.
        on_off "iommu" => iommu: Option<bool>,
        /// Address translation services.
        on_off "ats" => ats: Option<bool>,
        /// Packed rings.
        on_off "packed" => packed: Option<bool>,
        /// A notification page for each queue.
        on_off "page_per_vq" => page_per_vq: Option<bool>,
    }
}

element! {
    /// A `<driver>` with nothing but what virtio devices share.
    pub struct PlainDriver {
        /// What virtio devices share.
        flat => virtio: VirtioDriver,
    }
}

choices! {
    /// Which generation of virtio.
    pub enum VirtioModel {
        Virtio = "virtio", Transitional = "virtio-transitional", NonTransitional = "virtio-non-transitional",
    }
}

/// `0x…`, padded to `digits`.
pub(crate) fn hex(value: impl std::fmt::LowerHex, digits: usize) -> String {
    format!("0x{value:0digits$x}")
}
