//! What a definition gets when it does not say, as far as no host and no hypervisor has to be asked.
//!
//! Done once, when a definition is stored, so that what is shown is what will run. Doing it again changes nothing.

use super::clock::Clock;
use super::cpu::{CpuMatch, CpuMode, Fallback, FeaturePolicy};
use super::features::HypervMode;
use super::memory::{Placement, Vcpu};
use super::os::{Boot, BootDevice, Nvram};
use super::size::Kib;
use super::value::Mac;
use super::{DomainDef, cpu::Cpu};
use crate::device::chardev::{
    ChannelKind, CharKind, Console, ConsoleKind, ConsoleTarget, Serial, SerialKind, SerialTarget,
};
use crate::device::controller::{Controller, ControllerModel};
use crate::device::disk::{Disk, DiskBus, DiskDevice, DiskKind};
use crate::device::display::{Graphics, GraphicsKind, Listen, ListenKind};
use crate::device::hostdev::HostdevMode;
use crate::device::input::{InputBus, InputKind};
use crate::device::interface::{Interface, InterfaceKind, InterfaceMac, SourceMode};
use crate::device::{VirtioModel, Vsock};
use std::collections::{HashMap, HashSet};
use uuid::Uuid;

impl DomainDef {
    /// Fills in what libvirt would, wherever the document is silent. Idempotent.
    pub fn fill_defaults(&mut self) {
        if self.uuid.is_nil() {
            self.uuid = Uuid::new_v4();
        }
        self.genid.iter_mut().for_each(|genid| _ = genid.id.get_or_insert_with(Uuid::new_v4));
        self.os.nvram.iter_mut().for_each(Nvram::say_path_as_text);
        self.fill_memory();
        let placed = self.numatune.as_ref().and_then(|tune| tune.memory.as_ref()?.placement);
        let auto = placed == Some(Placement::Auto);
        let vcpu = self.vcpu.get_or_insert_with(|| Vcpu { count: 1, ..Vcpu::default() });
        vcpu.placement.get_or_insert(if auto { Placement::Auto } else { Placement::Static });
        self.clock.get_or_insert_with(Clock::default);
        self.fill_boot();
        self.cpu.iter_mut().for_each(fill_cpu);
        if let Some(hyperv) = self.features.as_mut().and_then(|features| features.hyperv.as_mut()) {
            hyperv.mode.get_or_insert(HypervMode::Custom);
        }
        self.fill_devices();
    }

    /// NUMA cells and memory devices, where given, say how much memory there is.
    fn fill_memory(&mut self) {
        let cells = self.numa_cells().iter().map(|cell| cell.memory.0.0).fold(0, u64::saturating_add);
        if cells > 0 {
            let total = cells.saturating_add(self.memory_devices_kib());
            self.memory.get_or_insert_default().size = Kib(total);
        }
        let memory = Kib(self.memory_kib());
        self.current_memory = Some(self.current_memory.map_or(memory, |current| current.min(memory)));
    }

    fn fill_boot(&mut self) {
        let ordered = self.devices.infos().iter().any(|(info, _)| info.boot.is_some())
            || self.devices.untyped().iter().any(|device| device.child("boot").is_some());
        if self.os_type() == "hvm" && self.os.boot.is_empty() && !ordered {
            self.os.boot.push(Boot { dev: BootDevice::Hd, ..Boot::default() });
        }
    }

    fn fill_devices(&mut self) {
        let q35 = self.os.kind.machine.as_deref().is_some_and(|machine| machine.contains("q35"));
        let devices = &mut self.devices;
        devices.disks.iter_mut().for_each(|disk| fill_disk(disk, q35));
        number_controllers(&mut devices.controllers);
        devices.interfaces.iter_mut().for_each(fill_interface);
        devices.graphics.iter_mut().for_each(fill_graphics);
        for hostdev in &mut devices.hostdevs {
            hostdev.mode.get_or_insert(HostdevMode::Subsystem);
            hostdev.managed.get_or_insert(false);
        }
        devices.vsock.iter_mut().for_each(fill_vsock);
        for input in &mut devices.inputs {
            input.bus.get_or_insert(match input.kind {
                InputKind::Mouse | InputKind::Keyboard => InputBus::Ps2,
                InputKind::Tablet => InputBus::Usb,
                InputKind::Passthrough => InputBus::Virtio,
                InputKind::Evdev => InputBus::None,
            });
        }
        for channel in &mut devices.channels {
            if channel.source.kind == CharKind::SpiceVmc && channel.target.kind == ChannelKind::Virtio {
                channel.target.name.get_or_insert_with(|| "com.redhat.spice.0".to_owned());
            }
        }
        if self.os_type() == "hvm" {
            self.twin_console();
        }
        number_ports(&mut self.devices.serials);
    }

    /// The first serial port and the first console are the same device under two names; either implies the other.
    fn twin_console(&mut self) {
        let devices = &mut self.devices;
        match (devices.serials.first(), devices.consoles.first_mut()) {
            (None, Some(console)) if console.is_serial() => {
                let serial = Serial { source: console.source.clone(), info: console.info.clone(), ..Serial::default() };
                devices.serials.push(serial);
            }
            (Some(serial), Some(console)) if console.is_serial() => console.source = serial.source.clone(),
            (Some(serial), None) if is_console(serial) => {
                let console = Console { source: serial.source.clone(), ..Console::default() };
                devices.consoles.push(console);
            }
            _ => {}
        }
        for (port, console) in (0..).zip(&mut devices.consoles) {
            let target = console.target.get_or_insert_with(ConsoleTarget::default);
            target.kind.get_or_insert(ConsoleKind::Serial);
            target.port.get_or_insert(port);
        }
    }
}

/// Whether a guest's console can be on it.
fn is_console(serial: &Serial) -> bool {
    let kind = serial.target.as_ref().and_then(|target| target.kind);
    !matches!(kind, Some(SerialKind::Usb | SerialKind::Pci | SerialKind::IsaDebug))
}

fn fill_cpu(cpu: &mut Cpu) {
    if cpu.mode.is_none() && cpu.model.is_some() {
        cpu.mode = Some(CpuMode::Custom);
    }
    if cpu.mode == Some(CpuMode::Custom) {
        cpu.matching.get_or_insert(CpuMatch::Exact);
        cpu.model.iter_mut().for_each(|model| {
            model.fallback.get_or_insert(Fallback::Allow);
        });
    }
    if let Some(topology) = &mut cpu.topology {
        topology.dies.get_or_insert(1);
        topology.clusters.get_or_insert(1);
    }
    for feature in &mut cpu.features {
        feature.policy.get_or_insert(FeaturePolicy::Require);
    }
}

fn fill_disk(disk: &mut Disk, q35: bool) {
    let device = *disk.device.get_or_insert_default();
    let kind = *disk.kind.get_or_insert_default();
    disk.readonly |= device == DiskDevice::Cdrom;
    let bus = default_bus(device, &disk.target.dev, q35);
    disk.target.bus.get_or_insert(bus);
    if !matches!(kind, DiskKind::Dir | DiskKind::Volume | DiskKind::VhostUser | DiskKind::VhostVdpa) {
        disk.driver.get_or_insert_default().format.get_or_insert_with(|| "raw".to_owned());
    }
}

/// What the first letters of a disk's name say about its bus.
pub(super) fn default_bus(device: DiskDevice, target: &str, q35: bool) -> DiskBus {
    match target.trim_end_matches(|c: char| c.is_ascii_digit()) {
        _ if device == DiskDevice::Floppy => DiskBus::Fdc,
        name if name.starts_with("fd") => DiskBus::Fdc,
        name if name.starts_with("sd") => {
            if q35 {
                DiskBus::Sata
            } else {
                DiskBus::Scsi
            }
        }
        name if name.starts_with("vd") => DiskBus::Virtio,
        name if name.starts_with("xvd") => DiskBus::Xen,
        name if name.starts_with("ubd") => DiskBus::Uml,
        name if name.starts_with("nvme") => DiskBus::Nvme,
        _ => DiskBus::Ide,
    }
}

/// The next free number of each kind. Companions of a USB controller share its number.
fn number_controllers(controllers: &mut [Controller]) {
    let mut next: HashMap<_, u32> = HashMap::new();
    for controller in controllers.iter() {
        let after = controller.index.map_or(0, |index| index.saturating_add(1));
        let free = next.entry(controller.kind).or_default();
        *free = after.max(*free);
    }
    for controller in controllers.iter_mut().filter(|controller| controller.index.is_none()) {
        let free = next.entry(controller.kind).or_default();
        let companion = matches!(
            controller.model,
            Some(ControllerModel::Ich9Uhci1 | ControllerModel::Ich9Uhci2 | ControllerModel::Ich9Uhci3)
        );
        let shared = companion && controller.master.is_some() && *free > 0;
        controller.index = Some(if shared { *free - 1 } else { *free });
        *free = if shared { *free } else { free.saturating_add(1) };
    }
}

fn number_ports(serials: &mut [Serial]) {
    let taken: HashSet<u32> = serials.iter().filter_map(|serial| serial.target.as_ref()?.port).collect();
    let mut free = (0..).filter(|port| !taken.contains(port));
    for serial in serials {
        let target = serial.target.get_or_insert_with(SerialTarget::default);
        if target.port.is_none() {
            target.port = free.next();
        }
    }
}

/// A number that nobody gave is chosen at start.
fn fill_vsock(vsock: &mut Vsock) {
    vsock.model.get_or_insert(VirtioModel::Virtio);
    let cid = vsock.cid.get_or_insert_default();
    let unsaid = cid.address.is_none();
    cid.auto.get_or_insert(unsaid);
}

fn fill_interface(interface: &mut Interface) {
    interface.mac.get_or_insert_with(|| InterfaceMac { address: Mac::made_up(), ..InterfaceMac::default() });
    if let (InterfaceKind::Direct, Some(source)) = (interface.kind, &mut interface.source) {
        source.mode.get_or_insert(SourceMode::Vepa);
    }
    if interface.kind == InterfaceKind::Hostdev {
        interface.managed.get_or_insert(false);
    }
}

/// Ports are chosen at start unless given; there is one place to listen at least; its address stands in both forms.
fn fill_graphics(graphics: &mut Graphics) {
    if !matches!(graphics.kind, GraphicsKind::Vnc | GraphicsKind::Spice | GraphicsKind::Rdp) {
        return;
    }
    if graphics.listens.is_empty() {
        let kind = if graphics.socket.is_some() { ListenKind::Socket } else { ListenKind::Address };
        let (address, socket) = (graphics.listen.clone(), graphics.socket.take());
        graphics.listens.push(Listen { kind, address, socket, ..Listen::default() });
    }
    let first = &graphics.listens[0];
    if first.kind == ListenKind::Address && first.address.is_some() {
        graphics.listen = first.address.clone();
    }
    let by_port = matches!(first.kind, ListenKind::Address | ListenKind::Network);
    let chosen = graphics.port.is_none_or(|port| port == -1) && graphics.tls_port.is_none_or(|port| port == -1);
    if by_port {
        graphics.autoport.get_or_insert(chosen);
    }
    if by_port && graphics.autoport == Some(true) && graphics.kind == GraphicsKind::Vnc {
        graphics.port.get_or_insert(-1);
    }
}
