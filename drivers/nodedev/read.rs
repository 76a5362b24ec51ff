//! A device as sysfs tells it.
//!
//! What is in there was said by the kernel or by the device itself: each text is bounded, and shown without what deceives.

use super::Host;
use super::attribute::{LONGEST, attribute, bounded};
use super::names::{Lists, Note};
use crate::host::pci::{Pci, VFIO, name_of_link};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::device::PciAddress;
use virt_model::nodedev::{
    About, COMPUTER, IommuGroup, Maker, MdevAbout, MdevType, NetAbout, NodeDevice, PciAbout, ScsiHostAbout,
    StorageAbout, SystemAbout, device_name, pci_name,
};
use virt_model::xml::plainly;

/// As much of a text is shown, in bytes.
const SHOWN: usize = 256;

/// The folders in which the devices that are listed stand, as links.
const FOLDERS: [&str; 8] = [
    "bus/pci/devices",
    "bus/usb/devices",
    "bus/scsi/devices",
    "bus/mdev/devices",
    "class/net",
    "class/block",
    "class/scsi_generic",
    "class/drm",
];

/// As many entries of a folder are looked at, and as many devices are listed.
pub const MOST: usize = 16 << 10;

/// Virtual functions and kinds of mediated devices that are told of one device.
const PARTS: usize = 512;

/// The same as it is shown; empty where there is none.
fn words(device: &Path, name: &str) -> String {
    shown(&attribute(device, name).unwrap_or_default())
}

fn shown(text: &str) -> String {
    let text = text.trim();
    plainly(&text[..text.floor_char_boundary(SHOWN)]).into_owned()
}

fn number<T: std::str::FromStr>(device: &Path, name: &str) -> Option<T> {
    attribute(device, name)?.parse().ok()
}

fn hexadecimal(device: &Path, name: &str) -> Option<u32> {
    let text = attribute(device, name)?;
    u32::from_str_radix(text.strip_prefix("0x").unwrap_or(&text), 16).ok()
}

fn word(device: &Path, name: &str) -> Option<u16> {
    hexadecimal(device, name).and_then(|number| u16::try_from(number).ok())
}

fn is_there(device: &Path, name: &str) -> bool {
    device.join(name).symlink_metadata().is_ok()
}

/// What is in a folder, by name.
pub fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.take(MOST).map(|entry| entry.path()).collect();
    found.sort();
    found
}

/// What kind of device a folder is, as far as it is to be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Pci,
    UsbDevice,
    Usb,
    Net,
    ScsiHost,
    ScsiTarget,
    Scsi,
    ScsiGeneric,
    Storage,
    Drm,
    Mdev,
}

/// What the kernel says of a device in one file.
#[derive(Debug, Default)]
struct Said {
    subsystem: String,
    kind: String,
    node: Option<String>,
    number: Option<(u32, u32)>,
}

impl Said {
    fn of(device: &Path) -> Option<Said> {
        let mut said = Said { subsystem: name_of_link(&device.join("subsystem"))?, ..Said::default() };
        let (mut major, mut minor) = (None, None);
        for line in bounded(&device.join("uevent"), LONGEST).unwrap_or_default().lines() {
            match line.split_once('=') {
                Some(("DEVTYPE", kind)) => kind.clone_into(&mut said.kind),
                Some(("DEVNAME", node)) => said.node = Some(format!("/dev/{node}")),
                Some(("MAJOR", number)) => major = number.parse().ok(),
                Some(("MINOR", number)) => minor = number.parse().ok(),
                _ => {}
            }
        }
        said.number = major.zip(minor);
        Some(said)
    }

    /// Error: it is not listed.
    fn sort(&self, device: &Path) -> Option<Sort> {
        let name = file_name(device);
        Some(match (&*self.subsystem, &*self.kind) {
            ("pci", _) => Sort::Pci,
            ("usb", "usb_device") => Sort::UsbDevice,
            ("usb", "usb_interface") => Sort::Usb,
            ("net", _) => Sort::Net,
            ("scsi", "scsi_host") => Sort::ScsiHost,
            ("scsi", "scsi_target") => Sort::ScsiTarget,
            ("scsi", "scsi_device") => Sort::Scsi,
            ("scsi_generic", _) => Sort::ScsiGeneric,
            ("block", "disk") if is_there(device, "device") || is_there(device, "loop/backing_file") => Sort::Storage,
            ("drm", _) if drm_kind(&name).is_some() => Sort::Drm,
            ("mdev", _) => Sort::Mdev,
            _ => return None,
        })
    }
}

fn file_name(device: &Path) -> String {
    device.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Connectors stand among them, as `card0-HDMI-A-1`.
fn drm_kind(name: &str) -> Option<&'static str> {
    let kinds = [("card", "primary"), ("renderD", "render"), ("controlD", "control")];
    let kind = kinds.iter().find(|(prefix, _)| {
        name.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
    });
    kind.map(|(_, kind)| *kind)
}

/// Reads devices of a host. Blocks for what drivers of the kernel answer.
pub struct Reader<'h> {
    host: &'h Host,
    pci: Pci,
    lists: Lists<'h>,
}

impl<'h> Reader<'h> {
    /// For a while: it keeps large lists.
    pub fn of(host: &'h Host) -> Reader<'h> {
        Reader { host, pci: Pci::below(&host.sys), lists: Lists::of(host) }
    }

    /// The folders of all that may be listed, below sysfs; and whether there are more than are looked at.
    pub fn folders(&self) -> (Vec<PathBuf>, bool) {
        let links = FOLDERS.iter().flat_map(|folder| entries(&self.host.sys.join(folder)));
        let mut folders: Vec<PathBuf> = links.filter_map(|link| self.folder(&link)).collect();
        folders.sort();
        folders.dedup();
        let more = folders.len() > 4 * MOST;
        folders.truncate(4 * MOST);
        (folders, more)
    }

    /// Where a link leads, below sysfs.
    fn folder(&self, link: &Path) -> Option<PathBuf> {
        let real = std::fs::canonicalize(link).ok()?;
        Some(Path::new("/").join(real.strip_prefix(&self.host.sys).ok()?))
    }

    /// The host itself.
    pub fn computer(&self) -> NodeDevice {
        let dmi = self.host.sys.join("class/dmi/id");
        let say = |names: [&str; 3]| names.map(|name| words(&dmi, name));
        let about = SystemAbout {
            hardware: say(["product_name", "sys_vendor", "product_version"]),
            firmware: say(["bios_vendor", "bios_version", "bios_date"]),
        };
        let maker = |name: &String| Maker { id: None, name: name.clone() };
        NodeDevice {
            name: COMPUTER.into(),
            parent: None,
            sys_path: String::new(),
            nodes: Vec::new(),
            driver: None,
            vendor: maker(&about.hardware[1]),
            product: maker(&about.hardware[0]),
            about: About::System(about),
        }
    }

    /// The device in a folder below sysfs; `None` where there is none, or none that is listed.
    pub fn device(&self, folder: &Path) -> Option<NodeDevice> {
        let device = self.host.below_sys(folder);
        let said = Said::of(&device)?;
        let sort = said.sort(&device)?;
        let note = Note::of(self.host, &device, &said.subsystem, said.number);
        let (about, [vendor, product]) = self.about(&device, sort, &note)?;
        let nodes = said.node.iter().chain(&note.links).take(PARTS);
        Some(NodeDevice {
            name: name_of(&device, sort)?,
            parent: Some(self.parent(folder)),
            sys_path: shown_path(folder),
            nodes: nodes.map(|node| shown(node)).collect(),
            driver: name_of_link(&device.join("driver")).map(|driver| shown(&driver)),
            vendor,
            product,
            about,
        })
    }

    /// The next device above that is listed.
    fn parent(&self, folder: &Path) -> Arc<str> {
        let above = folder.ancestors().skip(1).take_while(|above| above.parent().is_some());
        let named = above.filter_map(|above| {
            let device = self.host.below_sys(above);
            let sort = Said::of(&device)?.sort(&device)?;
            name_of(&device, sort)
        });
        named.into_iter().next().unwrap_or_else(|| COMPUTER.into())
    }

    fn about(&self, device: &Path, sort: Sort, note: &Note) -> Option<(About, [Maker; 2])> {
        let name = file_name(device);
        let about = match sort {
            Sort::Pci => return self.pci(device, &name, note),
            Sort::UsbDevice => return self.usb_device(device, note),
            Sort::Storage => return Some(storage(device, &name)),
            Sort::Usb => About::Usb {
                number: hexadecimal(device, "bInterfaceNumber")?,
                class: ["bInterfaceClass", "bInterfaceSubClass", "bInterfaceProtocol"]
                    .map(|name| hexadecimal(device, name).unwrap_or_default()),
                description: words(device, "interface"),
            },
            Sort::Net => About::Net(NetAbout {
                interface: shown(&name),
                mac: words(device, "address"),
                state: words(device, "operstate"),
                speed: number(device, "speed"),
                wireless: is_there(device, "phy80211") || is_there(device, "wireless"),
                ethernet: number(device, "type") == Some(1),
            }),
            Sort::ScsiHost => About::ScsiHost(scsi_host(device, &name)?),
            Sort::ScsiTarget => About::ScsiTarget(shown(&name)),
            Sort::Scsi => {
                let mut place = name.splitn(4, ':').map(|part| part.parse().ok());
                let place = [place.next()??, place.next()??, place.next()??, place.next()??];
                About::Scsi { place, kind: scsi_kind(number(device, "type")) }
            }
            Sort::ScsiGeneric => About::ScsiGeneric,
            Sort::Drm => About::Drm(drm_kind(&name)?),
            Sort::Mdev => About::Mdev(MdevAbout {
                kind: name_of_link(&device.join("mdev_type")).map(|kind| shown(&kind)).unwrap_or_default(),
                uuid: shown(&name.to_ascii_lowercase()),
                parent: device.parent().map(|parent| shown(&file_name(parent))).unwrap_or_default(),
                group: group_of(device),
            }),
        };
        let makers = match sort {
            Sort::Scsi => ["vendor", "model"].map(|name| Maker { id: None, name: words(device, name) }),
            _ => Default::default(),
        };
        Some((about, makers))
    }

    fn pci(&self, device: &Path, name: &str, note: &Note) -> Option<(About, [Maker; 2])> {
        let address = PciAddress::read(name)?;
        let number_of = self.pci.group(name).and_then(|group| Some((group.parse().ok()?, self.pci.peers(&group))));
        let group = number_of.map(|(number, peers)| IommuGroup {
            number,
            members: peers.iter().take(PARTS).filter_map(|peer| PciAddress::read(peer)).collect(),
        });
        let most = number(device, "sriov_totalvfs").unwrap_or(0);
        let about = PciAbout {
            address,
            class: hexadecimal(device, "class").unwrap_or_default(),
            group,
            node: number(device, "numa_node"),
            physical: name_of_link(&device.join("physfn")).and_then(|card| PciAddress::read(&card)),
            functions: (if most > 0 { functions(device) } else { Vec::new() }, most),
            mdev_types: mdev_types(device),
            vpd: is_there(device, "vpd"),
            resets: is_there(device, "reset"),
            vfio: self.host.sys.join("bus/pci/drivers").join(VFIO).exists(),
        };
        let makers = makers(device, ["vendor", "device"], note, ["ID_VENDOR_FROM_DATABASE", "ID_MODEL_FROM_DATABASE"]);
        Some((About::Pci(Box::new(about)), listed(makers, |vendor, product| self.lists.pci(vendor, product))))
    }

    fn usb_device(&self, device: &Path, note: &Note) -> Option<(About, [Maker; 2])> {
        // 9 is the class of hubs.
        let hub = hexadecimal(device, "bDeviceClass") == Some(9);
        let about = About::UsbDevice { bus: number(device, "busnum")?, device: number(device, "devnum")?, hub };
        let keys = ["ID_VENDOR_FROM_DATABASE", "ID_MODEL_FROM_DATABASE"];
        let mut makers = listed(makers(device, ["idVendor", "idProduct"], note, keys), |vendor, product| {
            self.lists.usb(vendor, product)
        });
        for (maker, own) in makers.iter_mut().zip(["manufacturer", "product"]) {
            if maker.name.is_empty() {
                maker.name = words(device, own);
            }
        }
        Some((about, makers))
    }
}

/// Numbers in sysfs, and names as udev has noted them.
fn makers(device: &Path, numbers: [&str; 2], note: &Note, keys: [&str; 2]) -> [Maker; 2] {
    let [vendor, product] = numbers.map(|name| word(device, name));
    let [vendor_name, product_name] = keys.map(|key| shown(note.property(key)));
    [Maker { id: vendor, name: vendor_name }, Maker { id: product, name: product_name }]
}

/// The same, with names of a list where none was noted.
fn listed(mut makers: [Maker; 2], list: impl Fn(u16, u16) -> [String; 2]) -> [Maker; 2] {
    if let (Some(vendor), Some(product)) = (makers[0].id, makers[1].id)
        && makers.iter().any(|maker| maker.name.is_empty())
    {
        for (maker, name) in makers.iter_mut().zip(list(vendor, product)) {
            if maker.name.is_empty() {
                maker.name = shown(&name);
            }
        }
    }
    makers
}

/// As libvirt names it.
fn name_of(device: &Path, sort: Sort) -> Option<Arc<str>> {
    let name = device.file_name().map(OsStr::as_bytes)?;
    let named = |kind: &str| device_name(kind, &[name]);
    Some(match sort {
        Sort::Pci => pci_name(PciAddress::read(&file_name(device))?),
        Sort::UsbDevice | Sort::Usb => named("usb"),
        Sort::Net => device_name("net", &[name, attribute(device, "address").unwrap_or_default().as_bytes()]),
        // Theirs begin with what they are.
        Sort::ScsiHost | Sort::ScsiTarget | Sort::Scsi => named("scsi"),
        Sort::ScsiGeneric => named("scsi_generic"),
        Sort::Storage => device_name("block", &[name, serial(device).as_bytes()]),
        Sort::Drm => named("drm"),
        Sort::Mdev => device_name("mdev", &[name, device.parent()?.file_name()?.as_bytes()]),
    })
}

fn serial(disk: &Path) -> String {
    let known = ["serial", "device/serial"].into_iter().filter_map(|name| attribute(disk, name));
    shown(&known.into_iter().find(|serial| !serial.is_empty()).unwrap_or_default())
}

/// The folder as it is known outside.
fn shown_path(folder: &Path) -> String {
    plainly(&format!("/sys{}", folder.to_string_lossy())).into_owned()
}

fn group_of(device: &Path) -> Option<u32> {
    name_of_link(&device.join("iommu_group"))?.parse().ok()
}

fn functions(card: &Path) -> Vec<PciAddress> {
    let links = entries(card).into_iter().filter_map(|entry| {
        let number: u32 = entry.file_name()?.to_str()?.strip_prefix("virtfn")?.parse().ok()?;
        Some((number, PciAddress::read(&name_of_link(&entry)?)?))
    });
    let mut found: Vec<_> = links.take(PARTS).collect();
    found.sort_by_key(|(number, _)| *number);
    found.into_iter().map(|(_, address)| address).collect()
}

fn mdev_types(device: &Path) -> Vec<MdevType> {
    let folders = entries(&device.join("mdev_supported_types")).into_iter().take(PARTS);
    let kinds = folders.map(|folder| MdevType {
        id: shown(&file_name(&folder)),
        name: words(&folder, "name"),
        api: words(&folder, "device_api"),
        available: number(&folder, "available_instances").unwrap_or_default(),
    });
    kinds.collect()
}

fn scsi_host(device: &Path, name: &str) -> Option<ScsiHostAbout> {
    let (own, fibre) = (device.join("scsi_host").join(name), device.join("fc_host").join(name));
    let wide = |name: &str| attribute(&fibre, name).map(|text| shown(text.strip_prefix("0x").unwrap_or(&text)));
    let names = wide("node_name").zip(wide("port_name"));
    let ports = |name: &str| number(&fibre, name).or_else(|| number(&own, name));
    Some(ScsiHostAbout {
        host: name.strip_prefix("host")?.parse().ok()?,
        unique_id: number(&own, "unique_id"),
        fibre: names.map(|(node, port)| [node, port, wide("fabric_name").unwrap_or_default()]),
        ports: ports("max_npiv_vports").zip(ports("npiv_vports_inuse")),
    })
}

fn scsi_kind(number: Option<u32>) -> &'static str {
    match number {
        Some(0) => "disk",
        Some(1) => "tape",
        Some(4) => "worm",
        Some(5) => "cdrom",
        Some(6) => "scanner",
        Some(7) => "mod",
        Some(8) => "changer",
        Some(13) => "enclosure",
        Some(14) => "rbc",
        _ => "",
    }
}

fn storage(device: &Path, name: &str) -> (About, [Maker; 2]) {
    let path = device.to_string_lossy();
    let buses = [("/usb", "usb"), ("/ata", "ata"), ("/nvme", "nvme"), ("/virtio", "virtio"), ("/mmc_host", "mmc")];
    let scsi = is_there(device, "device/scsi_level").then_some("scsi");
    let bus = buses.iter().find(|(part, _)| path.contains(part)).map(|(_, bus)| *bus).or(scsi).unwrap_or_default();
    let kind = match name {
        name if name.starts_with("sr") => "cdrom",
        name if name.starts_with("loop") => "loop",
        _ => "disk",
    };
    let size = number::<u64>(device, "size").unwrap_or_default().saturating_mul(512);
    let about = StorageAbout {
        block: shown(name),
        bus: bus.to_owned(),
        kind,
        serial: serial(device),
        size,
        sector: number(device, "queue/logical_block_size").unwrap_or(512),
        removable: (number(device, "removable") == Some(1)).then_some(size > 0),
        backing: attribute(device, "loop/backing_file").map(|file| shown(&file)),
    };
    let makers = ["device/vendor", "device/model"].map(|name| Maker { id: None, name: words(device, name) });
    (About::Storage(Box::new(about)), makers)
}
