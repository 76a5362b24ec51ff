//! Devices of the host, as plain values; `doc.rs` writes libvirt's document of one. Names are libvirt's, too.

mod doc;
mod wanted;

use crate::device::hostdev::{HostAddressKind, HostdevKind};
use crate::device::{Hostdev, Interface, PciAddress};
use crate::domain::DomainDef;
use std::sync::Arc;

pub use wanted::{NewDevice, PortParent, WideNames};

/// The device that all others are below.
pub const COMPUTER: &str = "computer";

/// The driver that hands PCI devices to guests.
pub const VFIO: &str = "vfio-pci";

/// A device.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeDevice {
    /// Unique on this host, of letters, digits and `_`.
    pub name: Arc<str>,
    /// The device that it is below; `None` of the host itself.
    pub parent: Option<Arc<str>>,
    /// Its folder in sysfs; empty of the host itself.
    pub sys_path: String,
    /// Its file in `/dev`, if it has one, and the links to that.
    pub nodes: Vec<String>,
    /// The host's driver that has it.
    pub driver: Option<String>,
    /// Whose product it is.
    pub vendor: Maker,
    /// Which product.
    pub product: Maker,
    /// What there is to it.
    pub about: About,
}

/// A number in a list of makers or products, and what it stands for there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maker {
    /// The number.
    pub id: Option<u16>,
    /// The words; empty where they are not known.
    pub name: String,
}

/// What there is to a device of each class.
#[derive(Clone, Debug, PartialEq)]
pub enum About {
    /// The host.
    System(SystemAbout),
    /// A function of a PCI device.
    Pci(Box<PciAbout>),
    /// A USB device.
    UsbDevice {
        /// From 1.
        bus: u32,
        /// The number it has until it is unplugged.
        device: u32,
        /// It only carries other devices.
        hub: bool,
    },
    /// An interface of a USB device.
    Usb {
        /// Which one.
        number: u32,
        /// Class, subclass and protocol.
        class: [u32; 3],
        /// Its own words for what it is.
        description: String,
    },
    /// A network device.
    Net(NetAbout),
    /// A SCSI host.
    ScsiHost(ScsiHostAbout),
    /// A target of one, by its name in sysfs.
    ScsiTarget(String),
    /// A logical unit.
    Scsi {
        /// Host, bus, target, unit.
        place: [u32; 4],
        /// `disk`, `cdrom` and the like; empty where it is another.
        kind: &'static str,
    },
    /// The raw way to a logical unit.
    ScsiGeneric,
    /// A disk.
    Storage(Box<StorageAbout>),
    /// A graphics device: `primary`, `render`.
    Drm(&'static str),
    /// A mediated device.
    Mdev(MdevAbout),
}

/// What firmware tells of the host. Its numbers are for root alone, and so not among this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SystemAbout {
    /// Product, its vendor and version.
    pub hardware: [String; 3],
    /// The firmware's vendor, version and date.
    pub firmware: [String; 3],
}

/// Of a function of a PCI device.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PciAbout {
    /// Where it is.
    pub address: PciAddress,
    /// What it is for: base class, subclass, interface.
    pub class: u32,
    /// Its IOMMU group.
    pub group: Option<IommuGroup>,
    /// Memory nodes are numbered from 0.
    pub node: Option<u32>,
    /// Of a virtual function the card.
    pub physical: Option<PciAddress>,
    /// Of a card its virtual functions, and how many it can have; 0 if it has no way to.
    pub functions: (Vec<PciAddress>, u32),
    /// The kinds of mediated devices that can be made of it.
    pub mdev_types: Vec<MdevType>,
    /// It tells what it is by its vital product data.
    pub vpd: bool,
    /// It can be reset without the rest of its bus.
    pub resets: bool,
    /// The host has the driver that hands devices to guests.
    pub vfio: bool,
}

/// Devices that the kernel hands over together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IommuGroup {
    /// Its number.
    pub number: u32,
    /// Which ones.
    pub members: Vec<PciAddress>,
}

/// A kind of mediated device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MdevType {
    /// As in `i915-GVTg_V5_4`.
    pub id: String,
    /// For people.
    pub name: String,
    /// How it is handed over.
    pub api: String,
    /// How many more can be made.
    pub available: u32,
}

/// Of a mediated device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MdevAbout {
    /// Its kind.
    pub kind: String,
    /// Which one.
    pub uuid: String,
    /// The device that it is made of, as sysfs calls it.
    pub parent: String,
    /// Its IOMMU group.
    pub group: Option<u32>,
}

/// Of a network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetAbout {
    /// As `ip link` calls it.
    pub interface: String,
    /// Its hardware address; empty if it has none.
    pub mac: String,
    /// `up`, `down` and the like.
    pub state: String,
    /// Mbit/s.
    pub speed: Option<u32>,
    /// It has no cable.
    pub wireless: bool,
    /// It is an Ethernet device.
    pub ethernet: bool,
}

/// Of a SCSI host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScsiHostAbout {
    /// From 0.
    pub host: u32,
    /// The number that its driver gave it.
    pub unique_id: Option<u32>,
    /// Of Fibre Channel: node, port and fabric, as 16 hexadecimal digits each.
    pub fibre: Option<[String; 3]>,
    /// How many virtual ports it can have and has.
    pub ports: Option<(u32, u32)>,
}

/// Of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StorageAbout {
    /// As in `sda`.
    pub block: String,
    /// `ata`, `usb`, `nvme`, `virtio` and the like; empty where it is another.
    pub bus: String,
    /// `disk`, `cdrom`, `loop`.
    pub kind: &'static str,
    /// Its maker's number for this one; empty if it has none.
    pub serial: String,
    /// Bytes.
    pub size: u64,
    /// Bytes that are read or written together.
    pub sector: u32,
    /// Media can be taken out; whether one is in.
    pub removable: Option<bool>,
    /// Bound to what a loop device is bound to.
    pub backing: Option<String>,
}

impl NodeDevice {
    /// The word for its class.
    pub fn class(&self) -> &'static str {
        match self.about {
            About::System(_) => "system",
            About::Pci(_) => "pci",
            About::UsbDevice { .. } => "usb_device",
            About::Usb { .. } => "usb",
            About::Net(_) => "net",
            About::ScsiHost(_) => "scsi_host",
            About::ScsiTarget(_) => "scsi_target",
            About::Scsi { .. } => "scsi",
            About::ScsiGeneric => "scsi_generic",
            About::Storage(_) => "storage",
            About::Drm(_) => "drm",
            About::Mdev(_) => "mdev",
        }
    }

    /// Words for what it can do beside what all of its class can.
    pub fn capabilities(&self) -> Vec<&'static str> {
        let told = match &self.about {
            About::Pci(pci) => vec![
                ("sriov", pci.functions.1 > 0),
                ("phys_function", pci.physical.is_some()),
                ("mdev_types", !pci.mdev_types.is_empty()),
                ("vpd", pci.vpd),
            ],
            About::Net(net) => vec![("80203", net.ethernet && !net.wireless), ("80211", net.wireless)],
            About::ScsiHost(host) => vec![("fc_host", host.fibre.is_some()), ("vports", host.ports.is_some())],
            About::Storage(disk) => vec![("removable", disk.removable.is_some())],
            _ => Vec::new(),
        };
        told.into_iter().filter(|(_, has)| *has).map(|(word, _)| word).collect()
    }

    /// Where it is: on its bus, or its hardware address; empty where there is no such thing.
    pub fn address(&self) -> String {
        match &self.about {
            About::Pci(pci) => pci.address.to_string(),
            About::UsbDevice { bus, device, .. } => format!("{bus:03}:{device:03}"),
            About::Net(net) => net.mac.clone(),
            About::Scsi { place: [host, bus, target, unit], .. } => format!("{host}:{bus}:{target}:{unit}"),
            About::Mdev(mdev) => mdev.uuid.clone(),
            _ => String::new(),
        }
    }

    /// The number of its IOMMU group.
    pub fn group(&self) -> Option<u32> {
        match &self.about {
            About::Pci(pci) => pci.group.as_ref().map(|group| group.number),
            About::Mdev(mdev) => mdev.group,
            _ => None,
        }
    }

    /// What it is as a PCI device, if it is one.
    pub fn pci(&self) -> Option<&PciAbout> {
        if let About::Pci(pci) = &self.about { Some(pci) } else { None }
    }

    /// The names of what goes with it, as does all that is below any of these: itself, and its virtual functions.
    pub fn with_functions(&self) -> Vec<Arc<str>> {
        let functions = self.pci().into_iter().flat_map(|pci| &pci.functions.0).map(|function| pci_name(*function));
        [self.name.clone()].into_iter().chain(functions).collect()
    }

    /// Whether it waits for a guest, away from the host's own driver.
    pub fn detached(&self) -> bool {
        self.pci().is_some() && self.driver.as_deref() == Some(VFIO)
    }

    /// `yes` if a guest can have it, or why not: `bridge`, `no-iommu`, `no-vfio`; empty of what is no device to be handed over.
    pub fn assignable(&self) -> &'static str {
        match &self.about {
            About::Pci(pci) if pci.class >> 16 == 0x06 => "bridge",
            About::Pci(pci) if pci.group.is_none() => "no-iommu",
            About::Pci(pci) if !pci.vfio => "no-vfio",
            About::UsbDevice { hub: true, .. } => "bridge",
            About::Pci(_) | About::UsbDevice { .. } => "yes",
            _ => "",
        }
    }

    /// Whether somebody had the kernel make it: a mediated device, or a virtual port. It can be ended.
    pub fn is_made(&self) -> bool {
        match &self.about {
            About::Mdev(_) => true,
            About::ScsiHost(host) => {
                host.fibre.is_some() && self.sys_path.split('/').any(|part| part.starts_with("vport-"))
            }
            _ => false,
        }
    }

    /// World wide names of its node and port, if it is a host of Fibre Channel.
    pub fn fibre(&self) -> Option<(&str, &str)> {
        match &self.about {
            About::ScsiHost(ScsiHostAbout { fibre: Some([node, port, _]), .. }) => Some((node, port)),
            _ => None,
        }
    }
}

/// How a machine names a device of the host's that it wants for itself.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceWish {
    /// Which device.
    pub device: WishedDevice,
    /// Where in the machine: a hardware address, or an alias; empty where it has no name.
    pub place: Box<str>,
}

/// See [`DeviceWish`].
#[derive(Clone, Debug, PartialEq)]
pub enum WishedDevice {
    /// A function of a PCI device.
    Pci(PciAddress),
    /// A USB device by its place.
    UsbAt(u32, u32),
    /// USB devices of this vendor and product.
    Usb(u16, u16),
    /// A mediated device by its uuid.
    Mdev(Box<str>),
}

impl DeviceWish {
    /// All in a definition.
    pub fn all_of(def: &DomainDef) -> Box<[DeviceWish]> {
        let cards = def.devices.interfaces.iter().filter_map(DeviceWish::of_card);
        def.devices.hostdevs.iter().filter_map(DeviceWish::of_hostdev).chain(cards).collect()
    }

    fn of_hostdev(hostdev: &Hostdev) -> Option<DeviceWish> {
        let source = hostdev.source.as_ref()?;
        let mdev = || match source.address.as_ref()? {
            address if address.kind == HostAddressKind::Other => address.rest.attr("uuid"),
            _ => None,
        };
        let ids = source.vendor.as_ref().zip(source.product.as_ref());
        let device = match hostdev.kind {
            HostdevKind::Pci => WishedDevice::Pci(hostdev.pci()?),
            HostdevKind::Usb => match (hostdev.usb(), ids) {
                (Some((bus, device)), _) => WishedDevice::UsbAt(bus, device),
                (None, Some((vendor, product))) => WishedDevice::Usb(vendor.id.0, product.id.0),
                (None, None) => return None,
            },
            HostdevKind::Mdev => WishedDevice::Mdev(mdev()?.to_ascii_lowercase().into()),
            _ => return None,
        };
        Some(DeviceWish { device, place: hostdev.info.alias().unwrap_or_default().into() })
    }

    fn of_card(card: &Interface) -> Option<DeviceWish> {
        let place = card.mac().map(|mac| mac.to_string()).unwrap_or_default();
        Some(DeviceWish { device: WishedDevice::Pci(card.host_card()?), place: place.into() })
    }

    /// Whether this is the device, or one of those, that is wanted.
    pub fn means(&self, device: &NodeDevice) -> bool {
        match (&self.device, &device.about) {
            (WishedDevice::Pci(wanted), About::Pci(pci)) => wanted.place() == pci.address.place(),
            (WishedDevice::UsbAt(bus, number), About::UsbDevice { bus: on, device, .. }) => {
                (bus, number) == (on, device)
            }
            (WishedDevice::Usb(vendor, product), About::UsbDevice { .. }) => {
                (Some(*vendor), Some(*product)) == (device.vendor.id, device.product.id)
            }
            (WishedDevice::Mdev(uuid), About::Mdev(mdev)) => **uuid == *mdev.uuid,
            _ => false,
        }
    }
}

/// The name of a device: kind and name as sysfs has them, and what else tells it apart, with `_` for all that is neither letter nor
/// digit.
pub fn device_name(kind: &str, parts: &[&[u8]]) -> Arc<str> {
    let parts = parts.iter().filter(|part| !part.is_empty());
    let bytes = parts.flat_map(|part| std::iter::once(&b'_').chain(part.iter()));
    let letters = bytes.map(|byte| if byte.is_ascii_alphanumeric() { char::from(*byte) } else { '_' });
    kind.chars().chain(letters).collect::<String>().into()
}

/// The name of a function of a PCI device.
pub fn pci_name(address: PciAddress) -> Arc<str> {
    device_name("pci", &[address.to_string().as_bytes()])
}

impl PciAddress {
    /// Reads what `Display` writes.
    pub fn read(text: &str) -> Option<PciAddress> {
        let (rest, function) = text.rsplit_once('.')?;
        let mut parts = rest.split(':').map(|part| u16::from_str_radix(part, 16).ok());
        let (domain, bus, slot) = (parts.next()??, parts.next()??, parts.next()??);
        let (bus, slot) = (u8::try_from(bus).ok()?, u8::try_from(slot).ok()?);
        let function = u8::from_str_radix(function, 16).ok()?;
        let address = PciAddress { domain, bus, slot, function, multifunction: None };
        (parts.next().is_none() && slot < 32 && function < 8).then_some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_libvirts_and_hold_nothing_odd() {
        let address = PciAddress::read("0000:00:1f.2").unwrap();
        assert_eq!(&*pci_name(address), "pci_0000_00_1f_2");
        assert_eq!(&*device_name("usb", &[b"1-1"]), "usb_1_1");
        assert_eq!(&*device_name("net", &[b"eth0", b"52:54:00:01:02:03"]), "net_eth0_52_54_00_01_02_03");
        assert_eq!(&*device_name("block", &[b"sda", b""]), "block_sda");
        assert_eq!(&*device_name("net", &[b"a\xff'<"]), "net_a___");
        for odd in ["", "1f.2", "0000:00:1f.9", "0000:00:20.0", "0000:00:1f.2:1", "10000:00:1f.2"] {
            assert_eq!(PciAddress::read(odd), None, "{odd}");
        }
    }

    #[test]
    fn a_machine_wants_what_its_document_names() {
        let def = DomainDef::parse(
            "<domain type='kvm'><name>m</name><memory>65536</memory><os><type>hvm</type></os><devices>\
             <hostdev type='pci'><source><address bus='6'/></source><alias name='hostdev0'/></hostdev>\
             <hostdev type='usb'><source><vendor id='0x0951'/><product id='0x1666'/></source></hostdev>\
             <hostdev type='usb'><source><address bus='1' device='4'/></source></hostdev>\
             <hostdev type='mdev' model='vfio-pci'><source><address uuid='C2177883-F1BB-47F0-914D-32A22E3A8804'/></source>\
             </hostdev><interface type='hostdev'><mac address='52:54:00:00:00:01'/><source>\
             <address type='pci' bus='7'/></source></interface></devices></domain>",
        )
        .unwrap();
        let wishes = DeviceWish::all_of(&def);
        let places: Vec<_> = wishes.iter().map(|wish| &*wish.place).collect();
        assert_eq!(places, ["hostdev0", "", "", "", "52:54:00:00:00:01"]);
        assert_eq!(wishes[3].device, WishedDevice::Mdev("c2177883-f1bb-47f0-914d-32a22e3a8804".into()));
        let device = |about, ids: Option<(u16, u16)>| NodeDevice {
            name: "x".into(),
            parent: None,
            sys_path: String::new(),
            nodes: Vec::new(),
            driver: None,
            vendor: Maker { id: ids.map(|ids| ids.0), name: String::new() },
            product: Maker { id: ids.map(|ids| ids.1), name: String::new() },
            about,
        };
        let pci = |text: &str| {
            let address = PciAddress::read(text).unwrap();
            device(About::Pci(Box::new(PciAbout { address, ..PciAbout::default() })), None)
        };
        let meant = |device: &NodeDevice| wishes.iter().map(|wish| wish.means(device)).collect::<Vec<_>>();
        assert_eq!(meant(&pci("0000:06:00.0")), [true, false, false, false, false]);
        assert_eq!(meant(&pci("0000:07:00.0")), [false, false, false, false, true]);
        let stick = device(About::UsbDevice { bus: 1, device: 4, hub: false }, Some((0x0951, 0x1666)));
        assert_eq!(meant(&stick), [false, true, true, false, false]);
        assert_eq!(stick.assignable(), "yes");
        assert_eq!(pci("0000:07:00.0").assignable(), "no-iommu");
    }
}
