//! What only a running guest has: every device's name, free ports, where sockets are.

use std::collections::BTreeSet;
use std::path::Path;
use virt_model::device::address::DriveAddress;
use virt_model::device::chardev::{ChannelKind, CharKind, SocketMode};
use virt_model::device::controller::ControllerModel;
use virt_model::device::disk::DiskBus;
use virt_model::device::display::{ChannelMode, GraphicsKind, ListenKind};
use virt_model::device::memory::MemoryModel;
use virt_model::device::{Address, AddressKind, Alias, Controller, ControllerKind, DeviceInfo, Disk, Graphics};
use virt_model::domain::DomainDef;
use virt_model::xml::Finding;

use super::Board;
use super::buses::target_number;

/// Where a screen listens when the definition does not say.
pub const LOCALHOST: &str = "127.0.0.1";

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
    let board = Board::of(def);
    let devices = &mut def.devices;
    for info in devices.infos_mut() {
        info.alias = info.alias.take().filter(Alias::is_user);
    }
    let mut disks = BTreeSet::new();
    for disk in &mut devices.disks {
        // Where vdc and sdc are both on virtio, one number would name two.
        let mut name = disk_name(disk);
        while !disks.insert(name.clone()) {
            name += "x";
        }
        name_it(&mut disk.info, name);
    }
    for controller in &mut devices.controllers {
        let name = controller_name(controller, board);
        name_it(&mut controller.info, name);
    }
    devices.interfaces.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("net{n}")));
    devices.serials.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("serial{n}")));
    devices.parallels.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("parallel{n}")));
    let first_serial = devices.serials.first().and_then(|s| s.info.alias.clone());
    for (n, console) in devices.consoles.iter_mut().enumerate() {
        match &first_serial {
            Some(alias) if n == 0 && console.is_serial() => _ = console.info.alias.get_or_insert_with(|| alias.clone()),
            _ => name_it(&mut console.info, format!("console{n}")),
        }
    }
    devices.channels.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("channel{n}")));
    devices.inputs.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("input{n}")));
    devices.sounds.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("sound{n}")));
    devices.videos.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("video{n}")));
    devices.redirdevs.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("redir{n}")));
    devices.hostdevs.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("hostdev{n}")));
    devices.vsock.iter_mut().for_each(|d| name_it(&mut d.info, "vsock0".to_owned()));
    devices.tpms.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("tpm{n}")));
    devices.watchdogs.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("watchdog{n}")));
    devices.memballoon.iter_mut().for_each(|d| name_it(&mut d.info, "balloon0".to_owned()));
    devices.rngs.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("rng{n}")));
    devices.filesystems.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("fs{n}")));
    devices.hubs.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("hub{n}")));
    devices.panics.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("panic{n}")));
    devices.shmems.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("shmem{n}")));
    let mut counts = std::collections::BTreeMap::new();
    for memory in &mut devices.memories {
        let kind = match memory.model {
            MemoryModel::Dimm => "dimm",
            MemoryModel::Nvdimm => "nvdimm",
            MemoryModel::VirtioPmem => "virtiopmem",
            MemoryModel::VirtioMem => "virtiomem",
            MemoryModel::SgxEpc => "epc",
        };
        let count = counts.entry(kind).or_insert(0);
        name_it(&mut memory.info, format!("{kind}{count}"));
        *count += 1;
    }
    devices.cryptos.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("crypto{n}")));
    devices.iommus.iter_mut().enumerate().for_each(|(n, d)| name_it(&mut d.info, format!("iommu{n}")));
}

fn name_it(info: &mut DeviceInfo, name: String) {
    info.alias.get_or_insert_with(|| Alias { name, ..Alias::default() });
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
