//! `<address>`: where on which bus a device sits.

use crate::device::hex;
use crate::domain::part::{Part, Rest, need_attr, take_attr, take_bool};
use crate::domain::value::{Bool, Value, complain};
use crate::xml::{Element, Finding, Place};

/// `<address>`
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Address {
    /// The bus and the place on it.
    pub kind: AddressKind,
    /// What is said beyond that, kept.
    pub rest: Rest,
    /// Where it stood.
    pub at: Place,
}

/// A place on a bus.
#[derive(Clone, Debug, PartialEq)]
pub enum AddressKind {
    /// Function of a PCI device. `None`: on PCI, place to be chosen.
    Pci(Option<PciAddress>),
    /// On a disk controller.
    Drive(DriveAddress),
    /// Port of a virtio-serial controller.
    VirtioSerial(VirtioSerialAddress),
    /// Slot of a smartcard controller.
    Ccid(CcidAddress),
    /// Port of a USB controller.
    Usb(UsbAddress),
    /// ISA port and interrupt.
    Isa(IsaAddress),
    /// A place for a memory device.
    Dimm(DimmAddress),
    /// Another kind (`spapr-vio`, `ccw`, `virtio-mmio`, `unassigned`): named here, its details in `rest`.
    Other(String),
}

impl Default for AddressKind {
    fn default() -> Self {
        AddressKind::Pci(None)
    }
}

/// A PCI function.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PciAddress {
    /// Segment.
    pub domain: u16,
    /// Index of the bus's controller.
    pub bus: u8,
    /// 0 to 31.
    pub slot: u8,
    /// 0 to 7.
    pub function: u8,
    /// Whether the slot has further functions.
    pub multifunction: Option<bool>,
}

impl std::fmt::Display for PciAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.slot, self.function)
    }
}

impl PciAddress {
    /// Domain, bus, slot and function, without `multifunction`.
    pub fn place(&self) -> (u16, u8, u8, u8) {
        (self.domain, self.bus, self.slot, self.function)
    }
}

/// A disk on a controller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DriveAddress {
    /// Index of the controller.
    pub controller: u32,
    /// Channel.
    pub bus: u32,
    /// SCSI target.
    pub target: u32,
    /// Logical unit.
    pub unit: u32,
}

/// A virtio-serial port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VirtioSerialAddress {
    /// Index of the controller.
    pub controller: u32,
    /// Always 0.
    pub bus: u32,
    /// `None`: to be chosen.
    pub port: Option<u32>,
}

/// A smartcard slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CcidAddress {
    /// Index of the controller.
    pub controller: u32,
    /// Slot.
    pub slot: u32,
}

/// A USB port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct UsbAddress {
    /// Index of the controller.
    pub bus: u32,
    /// E.g. `1` or `2.1` behind a hub; `None`: to be chosen.
    pub port: Option<String>,
}

/// An ISA device's resources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct IsaAddress {
    /// Port.
    pub iobase: Option<u32>,
    /// Interrupt.
    pub irq: Option<u32>,
}

/// A memory device's place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DimmAddress {
    /// From 0; `None`: to be chosen.
    pub slot: Option<u32>,
    /// Where it begins in the guest's memory; chosen at start if absent.
    pub base: Option<u64>,
}

impl Part for Address {
    fn read(mut at: Element, log: &mut Vec<Finding>) -> Address {
        let place = at.at.clone();
        let kind: String = need_attr(&mut at, "type", log);
        let kind = match &*kind {
            "pci" => AddressKind::Pci(read_pci(&mut at, log)),
            "drive" => AddressKind::Drive(DriveAddress {
                controller: number(&mut at, "controller", log),
                bus: number(&mut at, "bus", log),
                target: number(&mut at, "target", log),
                unit: number(&mut at, "unit", log),
            }),
            "virtio-serial" => AddressKind::VirtioSerial(VirtioSerialAddress {
                controller: number(&mut at, "controller", log),
                bus: number(&mut at, "bus", log),
                port: take_attr(&mut at, "port", log),
            }),
            "ccid" => AddressKind::Ccid(CcidAddress {
                controller: number(&mut at, "controller", log),
                slot: number(&mut at, "slot", log),
            }),
            "usb" => AddressKind::Usb(UsbAddress {
                bus: number(&mut at, "bus", log),
                port: take_attr::<UsbPort>(&mut at, "port", log).map(|port| port.0),
            }),
            "isa" => AddressKind::Isa(IsaAddress {
                iobase: take_attr(&mut at, "iobase", log),
                irq: take_attr(&mut at, "irq", log),
            }),
            "dimm" => AddressKind::Dimm(DimmAddress {
                slot: take_attr(&mut at, "slot", log),
                base: take_attr(&mut at, "base", log),
            }),
            "ccw" | "spapr-vio" | "virtio-s390" | "virtio-mmio" | "unassigned" | "" => AddressKind::Other(kind),
            _ => {
                let known = "pci, drive, virtio-serial, ccid, usb, isa, ccw, spapr-vio, virtio-s390, virtio-mmio, dimm, unassigned";
                complain(log, &place.attribute("type"), format!("'{kind}' is not one of {known}"));
                AddressKind::default()
            }
        };
        Address { kind, at: place, rest: Rest::of(at) }
    }

    fn write(&self, name: &str) -> Element {
        let mut to = Element::new(name);
        to.origin = self.at.clone();
        let mut set = |name: &str, value: String| to.set_attr(name, value);
        match &self.kind {
            AddressKind::Pci(pci) => {
                set("type", "pci".to_owned());
                if let Some(pci) = pci {
                    set("domain", hex(pci.domain, 4));
                    set("bus", hex(pci.bus, 2));
                    set("slot", hex(pci.slot, 2));
                    set("function", hex(pci.function, 1));
                    Bool::OnOff.put(&mut to, "multifunction", pci.multifunction);
                }
            }
            AddressKind::Drive(drive) => {
                set("type", "drive".to_owned());
                set("controller", drive.controller.to_string());
                set("bus", drive.bus.to_string());
                set("target", drive.target.to_string());
                set("unit", drive.unit.to_string());
            }
            AddressKind::VirtioSerial(serial) => {
                set("type", "virtio-serial".to_owned());
                set("controller", serial.controller.to_string());
                set("bus", serial.bus.to_string());
                serial.port.iter().for_each(|port| set("port", port.to_string()));
            }
            AddressKind::Ccid(ccid) => {
                set("type", "ccid".to_owned());
                set("controller", ccid.controller.to_string());
                set("slot", ccid.slot.to_string());
            }
            AddressKind::Usb(usb) => {
                set("type", "usb".to_owned());
                set("bus", usb.bus.to_string());
                usb.port.iter().for_each(|port| set("port", port.clone()));
            }
            AddressKind::Isa(isa) => {
                set("type", "isa".to_owned());
                isa.iobase.iter().for_each(|n| set("iobase", hex(n, 1)));
                isa.irq.iter().for_each(|n| set("irq", hex(n, 1)));
            }
            AddressKind::Dimm(dimm) => {
                set("type", "dimm".to_owned());
                dimm.slot.iter().for_each(|slot| set("slot", slot.to_string()));
                dimm.base.iter().for_each(|base| set("base", hex(base, 1)));
            }
            AddressKind::Other(kind) => set("type", kind.clone()),
        }
        self.rest.put(&mut to);
        to
    }
}

impl Address {
    /// A place on PCI.
    pub fn pci(pci: PciAddress) -> Address {
        Address { kind: AddressKind::Pci(Some(pci)), ..Address::default() }
    }

    /// Some other place.
    pub fn of(kind: AddressKind) -> Address {
        Address { kind, ..Address::default() }
    }
}

/// `None` if the address only says that it is on PCI.
pub(crate) fn read_pci(at: &mut Element, log: &mut Vec<Finding>) -> Option<PciAddress> {
    let place = at.at.clone();
    let domain = take_attr(at, "domain", log);
    let bus = take_attr(at, "bus", log);
    let slot = take_attr(at, "slot", log);
    let function = take_attr(at, "function", log);
    let multifunction = take_bool(at, "multifunction", Bool::OnOff, log);
    if (domain, bus, slot, function, multifunction) == (None, None, None, None, None) {
        return None;
    }
    let pci = PciAddress {
        domain: domain.unwrap_or_default(),
        bus: bus.unwrap_or_default(),
        slot: slot.unwrap_or_default(),
        function: function.unwrap_or_default(),
        multifunction,
    };
    for (name, value, limit) in [("slot", pci.slot, 31), ("function", pci.function, 7)] {
        if value > limit {
            complain(log, &place.attribute(name), format!("{value} is too large, a PCI {name} is at most {limit}"));
        }
    }
    Some(pci)
}

/// A number that is 0 if not said.
fn number(at: &mut Element, name: &str, log: &mut Vec<Finding>) -> u32 {
    take_attr(at, name, log).unwrap_or_default()
}

/// Port numbers with dots between, the way through hubs.
struct UsbPort(String);

impl Value for UsbPort {
    fn from_text(text: &str) -> Result<Self, String> {
        let fits = |part: &str| part.len() <= 3 && part.parse::<std::num::NonZeroU8>().is_ok();
        let parts = text.split('.').count();
        if parts <= 5 && text.split('.').all(fits) {
            Ok(UsbPort(text.to_owned()))
        } else {
            Err("a USB port such as 1 or, behind a hub at port 2, 2.1".to_owned())
        }
    }

    fn to_text(&self) -> String {
        self.0.clone()
    }
}
