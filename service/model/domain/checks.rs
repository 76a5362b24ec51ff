//! What can be seen to be wrong from the document alone, and would otherwise only show when the machine is started.

use super::cpu::Cpu;
use super::defaults::default_bus;
use super::features::Features;
use super::os::LoaderKind;
use super::value::complain;
use super::{DomainDef, LifecycleAction};
use crate::device::Alias;
use crate::device::address::{Address, AddressKind, DriveAddress};
use crate::device::chardev::{CharKind, CharSource, SocketMode};
use crate::device::disk::{Disk, DiskBus, DiskDevice, DiskKind};
use crate::device::display::{Graphics, GraphicsKind};
use crate::device::interface::{Interface, InterfaceKind};
use crate::xml::{Element, Finding, Place, shorten};
use std::collections::{HashMap, HashSet};
use std::hash::Hash;

/// As many as can be counted in a CPU set.
pub const MAX_VCPUS: u32 = 16_384;
/// The longest file name.
const MAX_NAME: usize = 255;

type Log = Vec<Finding>;

/// Finds all of it.
pub(super) fn check(def: &DomainDef, log: &mut Log) {
    check_identity(def, log);
    check_size(def, log);
    check_firmware(def, log);
    def.cpu.iter().for_each(|cpu| check_cpu(cpu, def.maximum_vcpus(), log));
    check_numa(def, log);
    check_threads(def, log);
    def.features.iter().for_each(|features| check_hyperv(features, log));
    check_boot(def, log);
    check_unique(def, log);
    check_actions(def, log);
    let devices = &def.devices;
    devices.disks.iter().for_each(|disk| check_disk(disk, bus_of(disk, def), log));
    devices.interfaces.iter().for_each(|interface| check_interface(interface, log));
    devices.graphics.iter().for_each(|graphics| check_graphics(graphics, log));
    check_chardevs(def, log);
}

fn check_identity(def: &DomainDef, log: &mut Log) {
    let at = def.at.child("name");
    let name = &def.name;
    if name.trim().is_empty() {
        complain(log, &at, "a domain needs a name");
    } else if name.contains('/') || name.chars().any(char::is_control) || matches!(&**name, "." | "..") {
        complain(log, &at, format!("'{}' cannot be a name: no '/', no control characters", shorten(name)));
    } else if name.len() > MAX_NAME {
        complain(log, &at, format!("the name has {} bytes, more than {MAX_NAME}", name.len()));
    }
    if def.title.as_ref().is_some_and(|title| title.contains('\n')) {
        complain(log, &def.at.child("title"), "a title is one line");
    }
}

fn check_actions(def: &DomainDef, log: &mut Log) {
    for (name, action) in [("on_poweroff", def.on_poweroff), ("on_reboot", def.on_reboot)] {
        if matches!(action, LifecycleAction::CoredumpDestroy | LifecycleAction::CoredumpRestart) {
            complain(log, &def.at.child(name), format!("'{action}' is only for <on_crash>"));
        }
    }
}

fn check_size(def: &DomainDef, log: &mut Log) {
    if def.memory_kib() == 0 && def.numa_cells().is_empty() {
        let at = def.memory.as_ref().map_or_else(|| def.at.child("memory"), |memory| memory.at.clone());
        complain(log, &at, "a domain needs memory: <memory> or NUMA cells");
    }
    let Some(vcpu) = &def.vcpu else { return };
    if vcpu.count == 0 || vcpu.count > MAX_VCPUS {
        complain(log, &vcpu.at, format!("{} vCPUs; there can be 1 to {MAX_VCPUS}", vcpu.count));
    }
    if vcpu.current.is_some_and(|current| current == 0 || current > vcpu.count) {
        let message = format!("{} vCPUs at first; there can be 1 to {}", def.vcpus(), vcpu.count);
        complain(log, &vcpu.at.attribute("current"), message);
    }
}

fn check_cpu(cpu: &Cpu, vcpus: u32, log: &mut Log) {
    if let Some(topology) = &cpu.topology
        && topology.product() != u64::from(vcpus)
    {
        let message = format!("the topology makes {} vCPUs, <vcpu> says {vcpus}", topology.product());
        complain(log, &topology.at, message);
    }
    let mut seen = HashSet::new();
    for feature in &cpu.features {
        once(&mut seen, feature.name.clone(), &feature.at, || format!("CPU feature '{}'", feature.name), log);
    }
}

fn check_numa(def: &DomainDef, log: &mut Log) {
    let (mut ids, mut cpus) = (HashSet::new(), HashSet::new());
    for (n, cell) in (0..).zip(def.numa_cells()) {
        let id = cell.id.unwrap_or(n);
        once(&mut ids, id, &cell.at, || format!("NUMA cell {id}"), log);
        let place = cell.at.attribute("cpus");
        for cpu in cell.cpus.iter().flat_map(|set| set.0.iter().copied()) {
            // One complaint for a cell: a few bytes name thousands of vCPUs.
            if !cpus.insert(cpu) {
                complain(log, &place, format!("vCPU {cpu} of a NUMA cell is there twice"));
                break;
            }
            if cpu >= def.maximum_vcpus() {
                complain(log, &place, format!("there is no vCPU {cpu}, only {}", def.maximum_vcpus()));
                break;
            }
        }
        for sibling in cell.distances.iter().flat_map(|d| &d.siblings) {
            let own = sibling.id == id;
            if !(10..=255).contains(&sibling.value) || own != (sibling.value == 10) {
                let message = "a distance is 11 to 255, and 10 to itself";
                complain(log, &sibling.at.attribute("value"), message);
            }
        }
    }
}

fn check_threads(def: &DomainDef, log: &mut Log) {
    let mut ids = HashSet::new();
    for thread in def.iothread_ids.iter().flat_map(|ids| &ids.threads) {
        let id = thread.id;
        if id == 0 {
            complain(log, &thread.at.attribute("id"), "I/O threads count from 1");
        }
        once(&mut ids, id, &thread.at, || format!("I/O thread {id}"), log);
    }
    if def.iothreads.is_some_and(|count| count > super::MAX_IOTHREADS) {
        complain(log, &def.at.child("iothreads"), format!("there can be at most {} I/O threads", super::MAX_IOTHREADS));
    }
    let mut vcpus = HashSet::new();
    for vcpu in def.vcpus_each.iter().flat_map(|all| &all.vcpus) {
        let id = vcpu.id;
        once(&mut vcpus, id, &vcpu.at, || format!("vCPU {id}"), log);
        if id >= def.maximum_vcpus() {
            complain(log, &vcpu.at.attribute("id"), format!("there is no vCPU {id}, only {}", def.maximum_vcpus()));
        }
    }
}

fn check_hyperv(features: &Features, log: &mut Log) {
    let Some(hyperv) = &features.hyperv else { return };
    if let Some(spinlocks) = &hyperv.spinlocks
        && spinlocks.retries.is_some_and(|retries| retries < 4095)
    {
        complain(log, &spinlocks.at.attribute("retries"), "spinlock retries must be at least 4095");
    }
    if let Some(vendor) = &hyperv.vendor_id
        && vendor.value.as_ref().is_some_and(|value| value.len() > 12 || value.contains(','))
    {
        complain(log, &vendor.at.attribute("value"), "a vendor id has at most 12 characters and no comma");
    }
}

fn check_firmware(def: &DomainDef, log: &mut Log) {
    let os = &def.os;
    if !matches!(os.kind.arch.as_deref(), None | Some("x86_64" | "i686")) {
        return;
    }
    let on = |feature: fn(&Features) -> bool| def.features.as_ref().is_some_and(feature);
    let flash = os.loader.as_ref().filter(|loader| loader.kind == Some(LoaderKind::Pflash));
    let efi = os.firmware == Some(super::os::FirmwareKind::Efi);
    if (efi || flash.is_some()) && !on(|features| features.acpi) {
        complain(log, &os.at, "UEFI firmware needs <acpi/> in <features>");
    }
    let Some(loader) = os.loader.as_ref().filter(|loader| loader.secure == Some(true)) else { return };
    if !efi && !on(|features| features.smm.as_ref().is_some_and(super::features::Smm::is_on)) {
        complain(log, &loader.at.attribute("secure"), "a secure loader needs <smm state='on'/> in <features>");
    }
    if os.kind.machine.as_ref().is_some_and(|machine| !machine.contains("q35")) {
        complain(log, &loader.at.attribute("secure"), "a secure loader needs the machine 'q35'");
    }
}

/// Devices are tried either by class or one by one, and no two have the same turn.
fn check_boot(def: &DomainDef, log: &mut Log) {
    let typed =
        def.devices.infos().into_iter().filter_map(|(info, _)| info.boot.as_ref()).map(|b| (b.at.clone(), b.order));
    let kept = def.devices.untyped().iter().filter_map(|device| device.child("boot"));
    let kept = kept.filter_map(|boot| Some((boot.at.clone(), boot.attr("order")?.parse().ok()?)));
    let mut seen = HashSet::new();
    for (at, order) in typed.chain(kept) {
        if order == 0 {
            complain(log, &at.attribute("order"), "the boot order counts from 1");
        }
        once(&mut seen, order, &at, || format!("boot order {order}"), log);
    }
    if let Some(boot) = def.os.boot.first().filter(|_| !seen.is_empty()) {
        complain(log, &boot.at, "<boot> is either in <os> or in the devices, not in both");
    }
}

/// Reports the second of its kind.
fn once<T: Hash + Eq>(seen: &mut HashSet<T>, key: T, at: &Place, what: impl Fn() -> String, log: &mut Log) {
    if !seen.insert(key) {
        complain(log, at, format!("{} is there twice", what()));
    }
}

fn check_unique(def: &DomainDef, log: &mut Log) {
    let devices = &def.devices;
    let (mut targets, mut names) = (HashSet::new(), HashMap::new());
    for disk in &devices.disks {
        let target = disk.target.dev.clone();
        once(&mut targets, target, &disk.target.at, || format!("the disk '{}'", disk.target.dev), log);
        if let Some(wwn) = &disk.wwn {
            let other = names.insert(wwn, disk);
            if other.is_some_and(|other| !is_one_lun(other, disk)) {
                let message =
                    format!("the WWN '{wwn}' is there twice: only ways to one image or serial number share it");
                complain(log, &disk.at.child("wwn"), message);
            }
        }
    }
    let (mut controllers, mut audios) = (HashSet::new(), HashSet::new());
    for controller in &devices.controllers {
        let Some(index) = controller.index else { continue };
        // Companions share the number of their master, each with ports of its own.
        let ports = controller.master.as_ref().map(|master| master.startport);
        let what =
            || format!("the {} controller {index}{}", controller.kind, ports.map_or("", |_| " with these ports"));
        once(&mut controllers, (controller.kind, index, ports), &controller.at, what, log);
    }
    for audio in &devices.audios {
        once(&mut audios, audio.id, &audio.at, || format!("the audio back end {}", audio.id), log);
    }
    check_aliases(def, log);
    check_addresses(def, log);
}

/// Whether both are ways to one disk, of which a guest makes one again (multipath).
fn is_one_lun(one: &Disk, other: &Disk) -> bool {
    let image = one.source.is_some() && one.kind() == other.kind() && one.source == other.source;
    image || one.serial.is_some() && one.serial == other.serial
}

fn check_aliases(def: &DomainDef, log: &mut Log) {
    // USB 2 companions are parts of their master, and carry its alias.
    let companions = def.devices.controllers.iter().filter(|controller| controller.master.is_some());
    let companions: Vec<_> = companions.filter_map(|controller| controller.info.alias.as_ref()).collect();
    let is_companion = |alias: &Alias| companions.iter().any(|other| std::ptr::eq(*other, alias));
    let aliases = def.devices.infos().into_iter().filter_map(|(info, _)| info.alias.as_ref());
    let typed = aliases.filter(|alias| alias.is_user() || !is_companion(alias)).map(|a| (&a.at, &*a.name));
    let kept = def.devices.untyped().iter().filter_map(|device| device.child("alias"));
    let kept = kept.filter_map(|alias| Some((&alias.at, alias.attr("name")?)));
    let mut seen = HashSet::new();
    // In a live definition a console carries the alias of the serial port that it is.
    let twin = def.devices.consoles.first().filter(|console| console.is_serial());
    let twin = twin.and_then(|console| console.info.alias.as_ref()).map(|alias| &alias.at.path);
    let is_twin = |at: &Place| twin.is_some_and(|path| path.to_string() == at.path.to_string());
    for (at, name) in typed.chain(kept).filter(|(at, _)| !is_twin(at)) {
        once(&mut seen, name, at, || format!("the alias '{name}'"), log);
    }
}

/// A place on a bus, for comparison.
#[derive(PartialEq, Eq, Hash)]
enum Spot {
    Pci(u16, u8, u8, u8),
    Drive(DiskBus, DriveAddress),
    Usb(u32, String),
    VirtioSerial(u32, u32),
    Ccid(u32, u32),
}

fn check_addresses(def: &DomainDef, log: &mut Log) {
    let mut seen = HashSet::new();
    for disk in &def.devices.disks {
        let bus = bus_of(disk, def);
        if let Some(Address { kind: AddressKind::Drive(drive), at, .. }) = &disk.info.address {
            let what = || format!("the place {}:{}:{}:{}", drive.controller, drive.bus, drive.target, drive.unit);
            once(&mut seen, Spot::Drive(bus, *drive), at, what, log);
        }
    }
    let twin = def.devices.consoles.iter().filter(|console| console.is_serial()).map(|console| &console.at.path);
    let twin: HashSet<String> = twin.map(ToString::to_string).collect();
    for (info, device) in def.devices.infos() {
        let Some(address) = info.address.as_ref().filter(|_| !twin.contains(&device.path.to_string())) else {
            continue;
        };
        claim(&mut seen, address, log);
    }
    for device in def.devices.untyped().iter().filter_map(|device| device.child("address")) {
        // Read again only to compare; what is wrong with it is a driver's matter, as it is not acted upon here.
        claim(&mut seen, &super::part::Part::read(Element::clone(device), &mut Vec::new()), log);
    }
}

fn claim(seen: &mut HashSet<Spot>, address: &Address, log: &mut Log) {
    let (spot, name) = match &address.kind {
        AddressKind::Pci(Some(pci)) => {
            let (domain, bus, slot, function) = pci.place();
            let name = format!("the PCI address {domain:04x}:{bus:02x}:{slot:02x}.{function}");
            (Spot::Pci(domain, bus, slot, function), name)
        }
        AddressKind::Usb(usb) => match &usb.port {
            Some(port) => (Spot::Usb(usb.bus, port.clone()), format!("the USB port {}:{port}", usb.bus)),
            None => return,
        },
        AddressKind::VirtioSerial(serial) => match serial.port.filter(|port| *port > 0) {
            Some(port) => {
                let name = format!("the virtio-serial port {}:{port}", serial.controller);
                (Spot::VirtioSerial(serial.controller, port), name)
            }
            None => return,
        },
        AddressKind::Ccid(ccid) => {
            (Spot::Ccid(ccid.controller, ccid.slot), format!("the smartcard slot {}:{}", ccid.controller, ccid.slot))
        }
        _ => return,
    };
    once(seen, spot, &address.at, || name.clone(), log);
}

/// The bus it is on or will be on.
fn bus_of(disk: &Disk, def: &DomainDef) -> DiskBus {
    let q35 = def.os.kind.machine.as_deref().is_some_and(|machine| machine.contains("q35"));
    disk.target.bus.unwrap_or_else(|| default_bus(disk.device(), &disk.target.dev, q35))
}

fn check_disk(disk: &Disk, bus: DiskBus, log: &mut Log) {
    let device = disk.device();
    let target = &disk.target;
    let at_bus = target.at.attribute("bus");
    if (device == DiskDevice::Floppy) != target.dev.starts_with("fd") && !target.dev.is_empty() {
        let message =
            format!("'{}' for a {device}; floppies, and only they, are called fda, fdb …", shorten(&target.dev));
        complain(log, &target.at.attribute("dev"), message);
    }
    match (device, bus) {
        (DiskDevice::Floppy, bus) if bus != DiskBus::Fdc => {
            complain(log, &at_bus, format!("a floppy is on the bus 'fdc', not '{bus}'"));
        }
        (DiskDevice::Cdrom, DiskBus::Virtio | DiskBus::Fdc | DiskBus::Nvme) => {
            complain(log, &at_bus, format!("a CD-ROM cannot be on the bus '{bus}'"));
        }
        (DiskDevice::Disk | DiskDevice::Lun, DiskBus::Fdc) => {
            complain(log, &at_bus, "only floppies are on the bus 'fdc'");
        }
        (DiskDevice::Lun, bus) if !matches!(bus, DiskBus::Scsi | DiskBus::Virtio) => {
            complain(log, &at_bus, format!("a LUN is on the bus 'scsi' or 'virtio', not '{bus}'"));
        }
        _ => {}
    }
    let wants_source = matches!(disk.kind(), DiskKind::File | DiskKind::Block);
    if wants_source && matches!(device, DiskDevice::Disk | DiskDevice::Lun) && disk.path().is_none() && !disk.is_given()
    {
        let attribute = if disk.kind() == DiskKind::File { "file" } else { "dev" };
        complain(log, &disk.at, format!("a {device} needs <source {attribute}='…'/>"));
    }
    let of_volume = disk.kind == Some(DiskKind::Volume) && !disk.is_empty();
    let named = |(pool, volume): (&str, &str)| !pool.is_empty() && !volume.is_empty();
    if of_volume && !disk.volume().is_some_and(named) {
        complain(log, &disk.at, "a disk of type='volume' needs <source pool='…' volume='…'/>");
    }
    let below = std::iter::successors(disk.backing.as_deref(), |store| store.backing.as_deref());
    for store in below.filter(|store| store.kind == Some(DiskKind::Volume)) {
        if !store.volume().is_some_and(named) {
            complain(log, &store.at, "a layer of type='volume' needs <source pool='…' volume='…'/>");
        }
    }
    check_disk_address(disk, bus, log);
}

/// Each bus has one kind of address.
fn check_disk_address(disk: &Disk, bus: DiskBus, log: &mut Log) {
    let Some(address) = &disk.info.address else { return };
    let fits = match bus {
        DiskBus::Ide | DiskBus::Sata | DiskBus::Scsi | DiskBus::Fdc => matches!(address.kind, AddressKind::Drive(_)),
        DiskBus::Usb => matches!(address.kind, AddressKind::Usb(_)),
        DiskBus::Virtio => matches!(address.kind, AddressKind::Pci(_) | AddressKind::Other(_)),
        DiskBus::Xen | DiskBus::Uml | DiskBus::Sd | DiskBus::Nvme => true,
    };
    let unassigned = matches!(&address.kind, AddressKind::Other(kind) if kind == "unassigned");
    if !fits && !unassigned {
        complain(log, &address.at, format!("this kind of address is not one of the bus '{bus}'"));
    }
}

fn check_interface(interface: &Interface, log: &mut Log) {
    let source = interface.source.as_ref();
    let missing = match interface.kind {
        InterfaceKind::Bridge if interface.bridge().is_none_or(str::is_empty) => Some("bridge"),
        InterfaceKind::Network if source.is_none_or(|s| s.network.as_ref().is_none_or(String::is_empty)) => {
            Some("network")
        }
        _ => None,
    };
    if let Some(attribute) = missing {
        let message = format!("an interface of type '{}' needs <source {attribute}='…'/>", interface.kind);
        complain(log, &interface.at, message);
    }
    if let Some(mac) = interface.mac.as_ref().filter(|mac| mac.address.0[0] & 1 == 1) {
        complain(log, &mac.at, format!("{} is a multicast address", mac.address));
    }
}

fn check_graphics(graphics: &Graphics, log: &mut Log) {
    if let Some(message) = graphics.says_two_addresses() {
        complain(log, &graphics.at.attribute("listen"), message);
    }
    for (name, port) in [("port", graphics.port), ("tlsPort", graphics.tls_port), ("websocket", graphics.websocket)] {
        if port.is_some_and(|port| !(-1..=65_535).contains(&port)) {
            complain(log, &graphics.at.attribute(name), "a port is at most 65535, or -1 to have one chosen");
        }
    }
}

fn check_chardevs(def: &DomainDef, log: &mut Log) {
    let devices = &def.devices;
    let spice = devices.graphics.iter().any(|graphics| graphics.kind == GraphicsKind::Spice);
    let mut check = |element: &str, source: &CharSource, at: &Place| {
        if matches!(source.kind, CharKind::SpiceVmc | CharKind::SpicePort) && !spice {
            let message = format!("<{element} type='{}'> needs <graphics type='spice'>", source.kind);
            complain(log, &at.attribute("type"), message);
        }
        if let Some(missing) = missing_source(source) {
            complain(log, at, format!("<{element} type='{}'> needs {missing}", source.kind));
        }
    };
    devices.serials.iter().for_each(|d| check("serial", &d.source, &d.at));
    // A console that is another name for a serial port may leave everything to it.
    let alone = devices.serials.is_empty();
    devices.consoles.iter().filter(|d| alone || !d.is_serial()).for_each(|d| check("console", &d.source, &d.at));
    devices.parallels.iter().for_each(|d| check("parallel", &d.source, &d.at));
    devices.channels.iter().for_each(|d| check("channel", &d.source, &d.at));
    devices.redirdevs.iter().for_each(|d| check("redirdev", &d.source, &d.at));
}

/// What the host's end lacks.
fn missing_source(source: &CharSource) -> Option<&'static str> {
    let sources = &source.sources;
    let connects = sources.iter().any(|address| address.mode != Some(SocketMode::Bind));
    match source.kind {
        CharKind::Dev | CharKind::File | CharKind::Pipe if source.path().is_none() => Some("<source path='…'/>"),
        CharKind::Unix if connects && source.path().is_none() => Some("<source path='…'/>"),
        CharKind::Tcp if !sources.iter().any(|s| s.host.is_some() && s.service.is_some()) => {
            Some("<source host='…' service='…'/>")
        }
        CharKind::Udp if !sources.iter().any(|s| s.service.is_some()) => Some("<source service='…'/>"),
        CharKind::SpicePort if !sources.iter().any(|s| s.channel.is_some()) => Some("<source channel='…'/>"),
        _ => None,
    }
}
