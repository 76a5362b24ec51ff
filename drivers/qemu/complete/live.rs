//! What only a running guest has: every device's name, free ports, where sockets are.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use virt_model::device::address::DriveAddress;
use virt_model::device::chardev::{ChannelKind, CharKind, SocketMode};
use virt_model::device::controller::ControllerModel;
use virt_model::device::disk::DiskBus;
use virt_model::device::display::{ChannelMode, GraphicsKind, ListenKind};
use virt_model::device::memory::MemoryModel;
use virt_model::device::{
    Address, AddressKind, Alias, Controller, ControllerKind, DeviceInfo, DeviceKind, DeviceMut, Disk, Graphics,
};
use virt_model::domain::DomainDef;
use virt_model::domain::listening::LOCALHOST;
use virt_model::xml::Finding;

use super::Board;
use super::buses::target_number;

/// What the caller chooses for a guest that is to start.
pub struct Chosen<'a> {
    /// Where sockets go.
    pub runtime_dir: &'a Path,
    /// The host has certificates: where it is open whether there is a port for what is encrypted, there is one.
    pub encrypts: bool,
    /// Whether a TCP port on this address can be had. Asked in order, from 5900; the port then counts as taken.
    pub free_port: &'a mut dyn FnMut(&str, u16) -> bool,
}

/// Turns a completed definition into the live one: names for all devices that have none, ports and sockets that were left
/// to be chosen. Errors: no free port.
pub fn go_live(def: &mut DomainDef, chosen: &mut Chosen) -> Result<(), Vec<Finding>> {
    name_devices(def);
    let mut log = Vec::new();
    let mut taken: BTreeSet<u16> = BTreeSet::new();
    for graphics in &def.devices.graphics {
        let ports = [graphics.port, graphics.tls_port, graphics.websocket];
        taken.extend(ports.into_iter().flatten().filter_map(|port| u16::try_from(port).ok()));
    }
    for (n, graphics) in def.devices.graphics.iter_mut().enumerate() {
        screen(graphics, n, chosen, &mut taken, &mut log);
    }
    for (n, channel) in def.devices.channels.iter_mut().enumerate() {
        let unnamed = channel.source.kind == CharKind::Unix && channel.source.path().is_none();
        if unnamed && channel.target.kind == ChannelKind::Virtio {
            let path = chosen.runtime_dir.join(format!("channel{n}.sock"));
            channel.source.set_path(Some(path.to_string_lossy().into_owned()));
            channel.source.sources.iter_mut().for_each(|source| _ = source.mode.get_or_insert(SocketMode::Bind));
        }
    }
    if log.is_empty() { Ok(()) } else { Err(log) }
}

fn screen(graphics: &mut Graphics, n: usize, chosen: &mut Chosen, taken: &mut BTreeSet<u16>, log: &mut Vec<Finding>) {
    let auto = graphics.autoport == Some(true);
    let kind = graphics.kind;
    let Some(listen) = graphics.listens.first_mut() else { return };
    match listen.kind {
        ListenKind::Socket => {
            let path = || chosen.runtime_dir.join(format!("{kind}{n}.sock")).to_string_lossy().into_owned();
            graphics.socket = Some(listen.socket.get_or_insert_with(path).clone());
            return;
        }
        ListenKind::Address => {
            let address = listen.address.get_or_insert_with(|| LOCALHOST.to_owned());
            graphics.listen = Some(address.clone());
        }
        // Who has the networks has said where, if there is one.
        ListenKind::Network if listen.address.is_some() => graphics.listen.clone_from(&listen.address),
        ListenKind::None | ListenKind::Network => return,
    }
    let address = graphics.listen.clone().unwrap_or_default();
    let wants = |port: Option<i32>| port == Some(-1) || (auto && port.is_none_or(|port| port <= 0));
    let mut choose = |from: u16| {
        let found = (from..from.saturating_add(1000)).find(|p| !taken.contains(p) && (chosen.free_port)(&address, *p));
        match found {
            Some(port) => _ = taken.insert(port),
            None => {
                log.push(Finding::unsupported(&graphics.at, format!("there is no free port for {kind} on {address}")))
            }
        }
        found.map(i32::from)
    };
    // Of SPICE, a port that nothing goes by is not opened.
    let modes = || graphics.default_mode.into_iter().chain(graphics.channels.iter().map(|channel| channel.mode));
    let encrypted = kind == GraphicsKind::Spice && modes().any(|mode| mode == ChannelMode::Secure);
    let only = graphics.default_mode == Some(ChannelMode::Secure) && modes().all(|mode| mode == ChannelMode::Secure);
    if wants(graphics.port) && !(encrypted && only) {
        graphics.port = choose(5900);
    }
    if encrypted && wants(graphics.tls_port) || chosen.encrypts && graphics.tls_port == Some(-1) {
        graphics.tls_port = choose(5900);
    }
    if kind == GraphicsKind::Vnc && graphics.websocket == Some(-1) {
        graphics.websocket = choose(5700);
    }
}

/// Names every device, as libvirt would. Names that users gave stay; others in a document are of a guest that ran once.
pub fn name_devices(def: &mut DomainDef) {
    for info in def.devices.infos_mut() {
        info.alias = info.alias.take().filter(Alias::is_user);
    }
    name_new_devices(def);
}

/// Names those that have no name, so that no two have the same; where none has one, as libvirt would.
pub fn name_new_devices(def: &mut DomainDef) {
    let board = Board::of(def);
    let devices = &mut def.devices;
    let named = |info: &DeviceInfo| info.alias().map(str::to_owned);
    let mut taken: BTreeSet<String> = devices.infos().into_iter().filter_map(|(info, _)| named(info)).collect();
    let mut first_serial = None;
    let mut counts = BTreeMap::new();
    for device in devices.all_mut() {
        let (kind, prefix) = (device.kind(), prefix(&device));
        let count = counts.entry(prefix).or_insert(0_u32);
        let n = *count;
        *count += 1;
        let as_serial = matches!(&device, DeviceMut::Console(console) if n == 0 && console.is_serial());
        let same = first_serial.clone().filter(|_| as_serial);
        let choose = || match &device {
            DeviceMut::Disk(disk) => {
                // Where vdc and sdc are both on virtio, one number would name two.
                let mut name = disk_name(disk);
                while taken.contains(&name) {
                    name += "x";
                }
                name
            }
            DeviceMut::Controller(controller) => controller_name(controller, board),
            // One before it may have been unplugged.
            _ => (n..).map(|n| format!("{prefix}{n}")).find(|name| !taken.contains(name)).unwrap_or_default(),
        };
        let name = Alias { name: choose(), ..Alias::default() };
        let alias = device.into_info().0.alias.get_or_insert(same.unwrap_or(name));
        taken.insert(alias.name.clone());
        if kind == DeviceKind::Serial && n == 0 {
            first_serial = Some(alias.clone());
        }
    }
}

/// What the names of such devices begin with; a number follows, except of disks and controllers.
fn prefix(device: &DeviceMut) -> &'static str {
    match device {
        DeviceMut::Disk(_) => "disk",
        DeviceMut::Controller(_) => "controller",
        DeviceMut::Filesystem(_) => "fs",
        DeviceMut::Interface(_) => "net",
        DeviceMut::Serial(_) => "serial",
        DeviceMut::Parallel(_) => "parallel",
        DeviceMut::Console(_) => "console",
        DeviceMut::Channel(_) => "channel",
        DeviceMut::Input(_) => "input",
        DeviceMut::Tpm(_) => "tpm",
        DeviceMut::Sound(_) => "sound",
        DeviceMut::Video(_) => "video",
        DeviceMut::Hostdev(_) => "hostdev",
        DeviceMut::Redirdev(_) => "redir",
        DeviceMut::Hub(_) => "hub",
        DeviceMut::Watchdog(_) => "watchdog",
        DeviceMut::Memballoon(_) => "balloon",
        DeviceMut::Rng(_) => "rng",
        DeviceMut::Panic(_) => "panic",
        DeviceMut::Shmem(_) => "shmem",
        DeviceMut::MemoryDevice(memory) => match memory.model {
            MemoryModel::Dimm => "dimm",
            MemoryModel::Nvdimm => "nvdimm",
            MemoryModel::VirtioPmem => "virtiopmem",
            MemoryModel::VirtioMem => "virtiomem",
            MemoryModel::SgxEpc => "epc",
        },
        DeviceMut::Crypto(_) => "crypto",
        DeviceMut::Iommu(_) => "iommu",
        DeviceMut::Vsock(_) => "vsock",
    }
}

fn disk_name(disk: &Disk) -> String {
    let number = target_number(&disk.target.dev).unwrap_or(0);
    let bus = disk.target.bus.unwrap_or_default();
    match (bus, disk.info.address.as_ref().map(|a: &Address| &a.kind)) {
        (DiskBus::Scsi, Some(AddressKind::Drive(DriveAddress { controller, bus, target, unit }))) => {
            format!("scsi{controller}-{bus}-{target}-{unit}")
        }
        (DiskBus::Ide | DiskBus::Sata | DiskBus::Fdc, Some(AddressKind::Drive(d))) => {
            format!("{bus}{}-{}-{}", d.controller, d.bus, d.unit)
        }
        _ => format!("{bus}-disk{number}"),
    }
}

fn controller_name(controller: &Controller, board: Board) -> String {
    let index = controller.index();
    match controller.kind {
        ControllerKind::Pci if controller.model == Some(ControllerModel::PcieRoot) => "pcie.0".to_owned(),
        ControllerKind::Pci => format!("pci.{index}"),
        ControllerKind::Ide if board == Board::I440fx && index == 0 => "ide".to_owned(),
        ControllerKind::Sata if board == Board::Q35 && index == 0 => "ide".to_owned(),
        ControllerKind::Usb if index == 0 => "usb".to_owned(),
        kind => format!("{kind}{index}"),
    }
}
