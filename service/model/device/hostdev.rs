//! `<hostdev>`: a device of the host's, handed to the guest. `<vsock>`: a socket between guest and host.

use super::address::read_pci;
use super::disk::StartupPolicy;
use super::{DeviceInfo, PciAddress, PlainDriver, VirtioModel, hex};
use crate::domain::part::{Part, Rest, element, take_attr};
use crate::domain::value::{Bool, Value, choices};
use crate::xml::{Element, Finding, Place};

choices! {
    /// How it is handed over.
    pub enum HostdevMode { Subsystem = "subsystem", Capabilities = "capabilities", }
}

choices! {
    /// What it is.
    pub enum HostdevKind {
        Usb = "usb", Pci = "pci", Scsi = "scsi", ScsiHost = "scsi_host", Mdev = "mdev", Storage = "storage",
        Misc = "misc", Net = "net",
    }
}

element! {
    /// `<hostdev>`
    pub struct Hostdev {
        /// How it is handed over.
        attr "mode" => mode: Option<HostdevMode>,
        /// What it is.
        need "type" => kind: HostdevKind,
        /// Of PCI: it is taken from the host's driver at start, and given back at the end.
        yes_no "managed" => managed: Option<bool>,
        /// `<source>`: which one.
        child "source" => source: Option<HostdevSource>,
        /// `<driver>`
        child "driver" => driver: Option<HostdevDriver>,
        /// Name, place, boot order.
        flat => info: DeviceInfo,
    }
}

impl Hostdev {
    /// Where a PCI device is on the host, if it is one and that is said.
    pub fn pci(&self) -> Option<PciAddress> {
        let address = self.source.as_ref()?.address.as_ref()?;
        address.pci().filter(|_| self.kind == HostdevKind::Pci)
    }

    /// Bus and device number of a USB device, if it is one and that is said.
    pub fn usb(&self) -> Option<(u32, u32)> {
        match self.source.as_ref()?.address.as_ref()?.kind {
            HostAddressKind::Usb { bus, device } if self.kind == HostdevKind::Usb => Some((bus, device)),
            _ => None,
        }
    }
}

choices! {
    /// Whether a USB device is reset when the guest resets it.
    pub enum GuestReset { Off = "off", Uninitialized = "uninitialized", On = "on", }
}

element! {
    /// `<hostdev><source>`
    pub struct HostdevSource {
        /// What a start does without it.
        attr "startupPolicy" => startup_policy: Option<StartupPolicy>,
        /// Whether the guest resets the host's device.
        attr "guestReset" => guest_reset: Option<GuestReset>,
        /// `<vendor>`
        child "vendor" => vendor: Option<UsbId>,
        /// `<product>`
        child "product" => product: Option<UsbId>,
        /// `<address>`: where it is on the host.
        child "address" => address: Option<HostAddress>,
    }
}

element! {
    /// `<vendor>` and `<product>` of a USB device.
    pub struct UsbId {
        /// The number.
        need "id" => id: HexWord,
    }
}

/// Two bytes, written as `0x046d`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HexWord(pub u16);

impl Value for HexWord {
    fn from_text(text: &str) -> Result<Self, String> {
        u16::from_text(text).map(HexWord)
    }

    fn to_text(&self) -> String {
        hex(self.0, 4)
    }
}

choices! {
    /// Who hands it over.
    pub enum HostdevDriverName { Vfio = "vfio", Kvm = "kvm", Xen = "xen", }
}

element! {
    /// `<hostdev><driver>`
    pub struct HostdevDriver {
        /// Who hands it over.
        attr "name" => name: Option<HostdevDriverName>,
    }
}

/// `<address>` of a device of the host's. Other than a guest's, it need not say its type.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostAddress {
    /// The type, where it is said.
    pub word: Option<String>,
    /// The place.
    pub kind: HostAddressKind,
    /// What is said beyond that, kept.
    pub rest: Rest,
    /// Where it stood.
    pub at: Place,
}

/// Where a device of the host's is.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum HostAddressKind {
    /// Function of a PCI device.
    Pci(PciAddress),
    /// On a USB bus.
    Usb {
        /// From 1.
        bus: u32,
        /// The number that the device has until it is unplugged.
        device: u32,
    },
    /// Another, which is in `rest`.
    #[default]
    Other,
}

impl HostAddress {
    /// A USB device's.
    pub fn usb(bus: u32, device: u32) -> HostAddress {
        HostAddress { kind: HostAddressKind::Usb { bus, device }, ..HostAddress::default() }
    }

    /// A PCI device's.
    pub fn of_pci(address: PciAddress) -> HostAddress {
        HostAddress { word: Some("pci".to_owned()), kind: HostAddressKind::Pci(address), ..HostAddress::default() }
    }

    /// The function of a PCI device, if it is one.
    pub fn pci(&self) -> Option<PciAddress> {
        if let HostAddressKind::Pci(pci) = self.kind { Some(pci) } else { None }
    }
}

impl Part for HostAddress {
    fn read(mut at: Element, log: &mut Vec<Finding>) -> HostAddress {
        let place = at.at.clone();
        let word = take_attr(&mut at, "type", log);
        let says = |at: &Element, names: &[&str]| names.iter().any(|name| at.attr(name).is_some());
        let kind = if says(&at, &["device"]) {
            let bus = take_attr(&mut at, "bus", log).unwrap_or_default();
            HostAddressKind::Usb { bus, device: take_attr(&mut at, "device", log).unwrap_or_default() }
        } else if says(&at, &["target", "unit", "uuid"]) {
            HostAddressKind::Other
        } else {
            read_pci(&mut at, log).map_or(HostAddressKind::Other, HostAddressKind::Pci)
        };
        HostAddress { word, kind, at: place, rest: Rest::of(at) }
    }

    fn write(&self, name: &str) -> Element {
        let mut to = Element::new(name);
        to.origin = self.at.clone();
        let mut set = |name: &str, value: String| to.set_attr(name, value);
        self.word.iter().for_each(|word| set("type", word.clone()));
        match self.kind {
            HostAddressKind::Pci(pci) => {
                set("domain", hex(pci.domain, 4));
                set("bus", hex(pci.bus, 2));
                set("slot", hex(pci.slot, 2));
                set("function", hex(pci.function, 1));
                Bool::OnOff.put(&mut to, "multifunction", pci.multifunction);
            }
            HostAddressKind::Usb { bus, device } => {
                set("bus", bus.to_string());
                set("device", device.to_string());
            }
            HostAddressKind::Other => {}
        }
        self.rest.put(&mut to);
        to
    }
}

element! {
    /// `<vsock>`
    pub struct Vsock {
        /// Generation; `virtio` if absent.
        attr "model" => model: Option<VirtioModel>,
        /// `<cid>`: the guest's number.
        child "cid" => cid: Option<VsockCid>,
        /// `<driver>`
        child "driver" => driver: Option<PlainDriver>,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

element! {
    /// `<vsock><cid>`
    pub struct VsockCid {
        /// It is chosen at start.
        yes_no "auto" => auto: Option<bool>,
        /// From 3; of one that is chosen, runtime.
        attr "address" => address: Option<u32>,
    }
}

impl Vsock {
    /// The guest's number, unless it is to be chosen.
    pub fn fixed_cid(&self) -> Option<u32> {
        self.cid.as_ref().filter(|cid| cid.auto != Some(true)).and_then(|cid| cid.address)
    }
}
