//! What libvirt adds to a definition and what depends on the emulator: [`DomainDef::fill_defaults`] has done the rest.

use super::super::capabilities::Capabilities;
use virt_model::device::balloon::BalloonModel;
use virt_model::device::chardev::{SerialKind, SerialModel};
use virt_model::device::display::{GraphicsKind, VideoKind, VideoModel};
use virt_model::device::input::{InputBus, InputKind};
use virt_model::device::interface::{InterfaceKind, InterfaceModel};
use virt_model::device::memory::MemoryModel;
use virt_model::device::sound::AudioKind;
use virt_model::device::tpm::{TpmKind, TpmModel, TpmVersion};
use virt_model::device::watchdog::WatchdogAction;
use virt_model::device::{Audio, Input, Interface, Memballoon, Tpm, Video};
use virt_model::domain::DomainDef;
use virt_model::domain::cpu::{Cpu, CpuCheck, CpuMatch, CpuMode, CpuModel, Fallback};
use virt_model::domain::size::Kib;

/// Memory comes in whole MiB.
const MIB_IN_KIB: u64 = 1024;

/// The emulator, the architecture, and the board by its versioned name.
pub fn machine(def: &mut DomainDef, caps: &Capabilities) {
    def.devices.emulator.get_or_insert_with(|| caps.binary.to_string_lossy().into_owned());
    def.os.kind.arch.get_or_insert_with(|| match &*caps.arch {
        "" => std::env::consts::ARCH.to_owned(),
        "i386" => "i686".to_owned(),
        other => other.to_owned(),
    });
    let found = match &def.os.kind.machine {
        Some(name) => caps.machine(name),
        None => caps.machines.iter().find(|m| m.is_default),
    };
    if let Some(found) = found {
        def.os.kind.machine = Some(found.name.clone());
    }
}

/// Devices and settings that need no place on a bus.
pub fn fill(def: &mut DomainDef, caps: &Capabilities) {
    round_memory(def);
    def.fill_defaults();
    name_the_cpu(def.cpu.get_or_insert_default());
    for disk in &mut def.devices.disks {
        if !disk.is_empty() {
            let is_volume = disk.volume().is_some();
            let driver = disk.driver.get_or_insert_default();
            // Never found out from the content: a guest writes that. What a volume is, its pool says.
            if !is_volume {
                driver.format.get_or_insert_with(|| "raw".to_owned());
            }
        }
        disk.driver.iter_mut().for_each(|driver| _ = driver.name.get_or_insert_with(|| "qemu".to_owned()));
    }
    let emulated = |interface: &&mut Interface| interface.kind != InterfaceKind::Hostdev;
    for interface in def.devices.interfaces.iter_mut().filter(emulated) {
        let rtl8139 = || InterfaceModel { name: "rtl8139".to_owned(), ..InterfaceModel::default() };
        interface.model.get_or_insert_with(rtl8139);
    }
    name_serials(def);
    if !def.devices.graphics.is_empty() {
        companions_of_graphics(def, caps);
    }
    fill_videos(def);
    if def.devices.audios.is_empty() && !(def.devices.graphics.is_empty() && def.devices.sounds.is_empty()) {
        let spice = def.devices.graphics.iter().any(|g| g.kind == GraphicsKind::Spice);
        let kind = if spice { AudioKind::Spice } else { AudioKind::None };
        def.devices.audios.push(Audio { id: 1, kind, ..Audio::default() });
    }
    // Where libvirt's QEMU finds itself, and so where it puts what has no path.
    let files = def.devices.audios.iter_mut().filter(|audio| audio.kind == AudioKind::File);
    for path in files.filter_map(|audio| audio.path.as_mut()).filter(|path| !path.starts_with('/')) {
        path.insert(0, '/');
    }
    def.devices.tpms.iter_mut().for_each(name_the_tpm);
    def.devices.watchdogs.iter_mut().for_each(|w| _ = w.action.get_or_insert(WatchdogAction::Reset));
    def.devices.memballoon.get_or_insert_with(|| Memballoon { model: BalloonModel::Virtio, ..Memballoon::default() });
}

/// QEMU takes no memory that ends within a page of its own. All of it is rounded up to MiB, as libvirt does; that of which
/// the host has a file is as long as the file.
fn round_memory(def: &mut DomainDef) {
    let up = |size: &mut Kib| size.0 = size.0.div_ceil(MIB_IN_KIB).saturating_mul(MIB_IN_KIB);
    let cells = def.numa_cells().iter().map(|cell| cell.memory.0.0).fold(0, u64::saturating_add);
    let (given, devices) = (def.memory_kib(), def.memory_devices_kib());
    let all = if cells > 0 { cells.saturating_add(devices) } else { given };
    def.current_memory = def.current_memory.filter(|current| current.0 < all);
    for cell in def.cpu.iter_mut().filter_map(|cpu| cpu.numa.as_mut()).flat_map(|numa| &mut numa.cells) {
        up(&mut cell.memory.0);
    }
    let dimms = def.devices.memories.iter_mut().filter(|device| device.model == MemoryModel::Dimm);
    dimms.for_each(|device| up(&mut device.target.size));
    def.max_memory.iter_mut().for_each(|most| up(&mut most.size));
    let plugged = def.memory_devices_kib();
    if let Some(memory) = def.memory.as_mut().filter(|memory| memory.size.0 > 0) {
        let mut first = Kib(given.saturating_sub(devices));
        up(&mut first);
        memory.size = Kib(first.0.saturating_add(plugged));
    }
}

fn name_the_cpu(cpu: &mut Cpu) {
    let mode = *cpu.mode.get_or_insert(CpuMode::Custom);
    let named = cpu.model.as_ref().is_some_and(|model| model.name.is_some());
    match mode {
        CpuMode::Custom => {
            cpu.matching.get_or_insert(CpuMatch::Exact);
            cpu.check.get_or_insert(CpuCheck::None);
            if !named {
                let name = Some("qemu64".to_owned());
                cpu.model =
                    Some(CpuModel { fallback: Some(Fallback::Forbid), name, ..cpu.model.take().unwrap_or_default() });
            }
        }
        CpuMode::HostModel => _ = cpu.check.get_or_insert(CpuCheck::Partial),
        CpuMode::HostPassthrough | CpuMode::Maximum => {
            cpu.check.get_or_insert(CpuCheck::None);
            cpu.migratable.get_or_insert(true);
        }
    }
}

/// Chips of the two versions do not understand each other's guests, so that one is chosen for good: libvirt's choice.
fn name_the_tpm(tpm: &mut Tpm) {
    let model = *tpm.model.get_or_insert(TpmModel::Tis);
    if tpm.backend.kind == TpmKind::Emulator {
        let version = if model == TpmModel::Tis { TpmVersion::V1_2 } else { TpmVersion::V2_0 };
        tpm.backend.version.get_or_insert(version);
    }
}

fn name_serials(def: &mut DomainDef) {
    for target in def.devices.serials.iter_mut().filter_map(|serial| serial.target.as_mut()) {
        let kind = *target.kind.get_or_insert(SerialKind::Isa);
        let model = || SerialModel { name: kind.as_str().to_owned(), ..SerialModel::default() };
        if matches!(kind, SerialKind::Isa | SerialKind::Pci | SerialKind::Usb) {
            target.model.get_or_insert_with(model);
        }
    }
}

/// A screen brings a mouse, a keyboard, and something to draw on.
fn companions_of_graphics(def: &mut DomainDef, caps: &Capabilities) {
    let no_ps2 = def.features.as_ref().and_then(|f| f.ps2.as_ref()).is_some_and(|ps2| !ps2.is_on());
    let devices = &mut def.devices;
    let kinds = [InputKind::Mouse, InputKind::Keyboard].into_iter().filter(|_| !no_ps2);
    for kind in kinds {
        let same = |input: &Input| input.kind == kind && input.bus == Some(InputBus::Ps2);
        if !devices.inputs.iter().any(same) {
            devices.inputs.push(Input { kind, bus: Some(InputBus::Ps2), ..Input::default() });
        }
    }
    if devices.videos.is_empty() {
        let kind = if caps.has_device("cirrus-vga") { VideoKind::Cirrus } else { VideoKind::Vga };
        devices.videos.push(Video { model: VideoModel { kind, ..VideoModel::default() }, ..Video::default() });
    }
}

fn fill_videos(def: &mut DomainDef) {
    let one_is_primary = def.devices.videos.iter().any(|video| video.model.primary == Some(true));
    for (n, video) in def.devices.videos.iter_mut().enumerate() {
        let model = &mut video.model;
        if model.kind == VideoKind::None {
            continue;
        }
        if n == 0 && !one_is_primary {
            model.primary = Some(true);
        }
        model.heads.get_or_insert(1);
        match model.kind {
            VideoKind::Qxl => {
                model.ram_kib.get_or_insert(64 * 1024);
                model.vram_kib.get_or_insert(64 * 1024);
                model.vgamem_kib.get_or_insert(16 * 1024);
            }
            VideoKind::Vga | VideoKind::Cirrus | VideoKind::Bochs => _ = model.vram_kib.get_or_insert(16 * 1024),
            _ => {}
        }
    }
    // The primary one comes first: it is the one that firmware shows.
    def.devices.videos.sort_by_key(|video| video.model.primary != Some(true));
}
