//! From a definition to QEMU's command line. Pure: no file is opened, the same input gives the same arguments.
//!
//! One file per story; each adds its arguments to the [`Builder`]. What `check` refuses never gets here.

mod args;
mod audio;
mod balloon;
mod board;
mod chardev;
mod controller;
mod cpu;
mod disk;
mod filesystem;
mod graphics;
mod hostdev;
mod input;
mod machine;
mod memory;
mod monitor_words;
mod net;
mod one;
mod rng;
mod source;
mod sysinfo;
mod tpm;

use super::capabilities::{Capabilities, End};
use super::checked::Checked;
use super::complete::{Board, Chosen, go_live};
use super::plan::{BEFORE_DEVICES, Command, Companion, Expected, FIRST_COMPANION_FD, HostFile, Nvram, Secret, Tap};
use args::{Args, List, Props};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use virt_model::device::controller::ControllerModel;
use virt_model::device::disk::DiskDevice;
use virt_model::device::{AddressKind, Controller, ControllerKind, DeviceInfo, VirtioModel};
use virt_model::domain::DomainDef;
use virt_model::domain::os::BootDevice;
use virt_model::xml::Finding;

pub use audio::{back_end as audio_back_end, card as sound_card};
pub use board::{iommu_device, shmem_kind};
pub use chardev::{serial_device, usb_number, usb_version};
pub use controller::{scsi_device, usb_device};
pub use cpu::{
    enlightenments, is_exact, is_of_the_system, is_same_feature, is_vcpu, knows_feature, pinned, plugged_cpu,
    vcpu_name, vcpu_place,
};
pub use disk::{Medium, device_type as disk_device, medium, overlay_nodes, wwn};
pub use graphics::{card as video_card, password_commands};
pub use hostdev::lock_limit;
pub use hostdev::vsock_device;
pub use input::input_device;
pub use machine::watchdog_action;
pub use memory::memory_device;
pub use net::{by_passt, card_type, tap_plan};
pub use one::{OneDevice, Step, fd_name, keeps_its_place, never_leaves, one_device};
pub use sysinfo::{has_field, tables};
pub use tpm::{tpm_device, tpm_state, tpm_state_of};

/// Where the guest's process finds itself.
pub struct Place<'a> {
    /// Where sockets and the pidfile go.
    pub runtime_dir: &'a Path,
    /// The file descriptor at which it finds the listening monitor socket.
    pub monitor_fd: i32,
    /// The time, in seconds since the epoch.
    pub now: i64,
    /// Seconds by which local time is ahead of UTC.
    pub east_of_utc: i64,
    /// Whether it is to be fenced in with seccomp (where the binary can).
    pub sandbox: bool,
}

impl<'a> Place<'a> {
    /// A place, at this time by this host's clock.
    pub fn now(runtime_dir: &'a Path, monitor_fd: i32, sandbox: bool) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        // SAFETY: all fields of the structure are numbers or a pointer that is not looked at; localtime_r fills it.
        let east_of_utc = unsafe {
            let mut local: libc::tm = std::mem::zeroed();
            libc::localtime_r(&now, &mut local);
            local.tm_gmtoff
        };
        Place { runtime_dir, monitor_fd, now, east_of_utc, sandbox }
    }
}

/// The command line for a completed definition. A live one (see [`go_live`]) is taken as it is; of a stored one, ports are
/// those that would be tried first.
pub fn build(checked: Checked<'_>, caps: &Capabilities, place: &Place) -> Result<Command, Vec<Finding>> {
    let mut live = checked.def().clone();
    let encrypts = caps.site.certificates(End::Server).is_ok();
    go_live(&mut live, &mut Chosen { runtime_dir: place.runtime_dir, encrypts, free_port: &mut |_, _| true })?;
    let mut builder = Builder::new(&live, caps, place);
    builder.machine();
    builder.cpu();
    builder.resources();
    builder.service();
    builder.clock();
    builder.boot();
    builder.firmware_tables();
    builder.iommus();
    builder.controllers();
    builder.hubs();
    builder.memory_devices();
    builder.disks();
    builder.filesystems();
    builder.interfaces();
    builder.smartcards();
    builder.character_devices();
    builder.inputs();
    builder.audio();
    builder.graphics();
    builder.videos();
    builder.sounds();
    builder.redirections();
    builder.host_devices();
    builder.tpms();
    builder.watchdogs();
    builder.balloon();
    builder.random();
    builder.panics();
    builder.shared_memory();
    builder.accelerators();
    builder.vsock();
    builder.roms();
    builder.fence();
    Ok(builder.finish())
}

/// The command line as it grows, and what goes with it.
struct Builder<'a> {
    def: &'a DomainDef,
    caps: &'a Capabilities,
    place: &'a Place<'a>,
    board: Board,
    kvm: bool,
    args: Args,
    nodes: Vec<Value>,
    files: Vec<HostFile>,
    nvram: Option<Nvram>,
    taps: Vec<Tap>,
    tap_fds_used: i32,
    secrets: Vec<Secret>,
    scratch: Vec<i32>,
    /// By the targets of their disks.
    overlays: Vec<(String, disk::Overlay)>,
    throttle_groups: BTreeSet<String>,
    companions: Vec<Companion>,
    companion_fds: i32,
    setup: Vec<(String, Value)>,
    env: Vec<(String, String)>,
    boot_order: HashMap<String, u32>,
}

impl<'a> Builder<'a> {
    fn new(def: &'a DomainDef, caps: &'a Capabilities, place: &'a Place<'a>) -> Self {
        Builder {
            def,
            caps,
            place,
            board: Board::of(def),
            kvm: def.kind == "kvm",
            args: Args::default(),
            nodes: Vec::new(),
            files: Vec::new(),
            nvram: None,
            taps: Vec::new(),
            tap_fds_used: 0,
            secrets: Vec::new(),
            scratch: Vec::new(),
            overlays: Vec::new(),
            throttle_groups: BTreeSet::new(),
            companions: Vec::new(),
            companion_fds: 0,
            setup: Vec::new(),
            env: Vec::new(),
            boot_order: boot_order(def),
        }
    }

    fn finish(mut self) -> Command {
        let mut env = self.env;
        if !self.nodes.is_empty() {
            self.args.flag(BEFORE_DEVICES);
        }
        if let Some(native) = &self.def.native {
            self.args.verbatim(native.arguments.iter().map(|argument| argument.value.clone()));
            env.extend(native.environment.iter().map(|v| (v.name.clone(), v.value.clone().unwrap_or_default())));
        }
        Command {
            program: self.caps.binary.clone(),
            args: self.args.into_vec(),
            nodes: self.nodes,
            env,
            files: self.files,
            nvram: self.nvram,
            taps: self.taps,
            secrets: self.secrets,
            scratch: self.scratch,
            lock_limit: hostdev::lock_limit(self.def),
            companions: self.companions,
            setup: self.setup,
        }
    }

    /// QEMU's descriptor for its end of a link to a companion.
    fn companion_fd(&mut self) -> i32 {
        self.companion_fds += 1;
        FIRST_COMPANION_FD + self.companion_fds - 1
    }

    fn open(&mut self, path: &str, write: bool) {
        self.opens(path, write, Expected::Anything);
    }

    fn open_image(&mut self, path: &str, write: bool) {
        self.opens(path, write, Expected::Image);
    }

    /// A file whose content becomes part of the machine.
    fn read_whole(&mut self, path: &str) {
        self.opens(path, false, Expected::PlainFile);
    }

    fn opens(&mut self, path: &str, write: bool, expected: Expected) {
        self.files.push(HostFile { path: PathBuf::from(path), write, create: false, device: false, expected });
    }

    /// A file that takes what the guest says.
    fn output(&mut self, path: &str) {
        let expected = Expected::Anything;
        self.files.push(HostFile { path: PathBuf::from(path), write: true, create: true, device: false, expected });
    }

    /// Where a PCI device sits.
    fn pci(&self, info: &DeviceInfo) -> Props {
        let Some(pci) = info.pci() else { return Props::default() };
        let addr =
            if pci.function == 0 { format!("{:#x}", pci.slot) } else { format!("{:#x}.{:#x}", pci.slot, pci.function) };
        let bus = self.pci_bus(pci.bus.into());
        let (acpi, rom) = (info.acpi.as_ref(), info.rom.as_ref());
        let none = rom.filter(|rom| rom.enabled == Some(false)).map(|_| "");
        Props::new("bus", bus)
            .maybe("multifunction", pci.multifunction)
            .set("addr", addr)
            .maybe("acpi-index", acpi.map(|acpi| acpi.index))
            .maybe("rombar", rom.and_then(|rom| rom.bar).map(u8::from))
            .maybe("romfile", none.or(rom.and_then(|rom| rom.file.as_deref())))
    }

    /// Contents of ROMs that are not the devices' own.
    fn roms(&mut self) {
        let def = self.def;
        let roms = def.devices.infos().into_iter().filter_map(|(info, _)| info.rom.as_ref()?.file.as_deref());
        roms.for_each(|file| self.read_whole(file));
    }

    /// The object with what that end of an encrypted connection shows. Each end asks the other for the same.
    fn credentials(&mut self, id: &str, end: End) {
        let dir = self.certificates(end);
        let object = Props::new("qom-type", "tls-creds-x509").set("id", id).set("dir", dir);
        self.args.object(object.set("endpoint", end.as_str()).set("verify-peer", true));
    }

    /// The folder with the host's certificates, to be read.
    fn certificates(&mut self, end: End) -> String {
        let site = &self.caps.site;
        for file in site.certificates(end).unwrap_or_default() {
            let expected = Expected::PlainFile;
            self.files.push(HostFile { path: file, write: false, create: false, device: false, expected });
        }
        site.tls_dir.to_string_lossy().into_owned()
    }

    fn pci_bus(&self, index: u32) -> String {
        let controller = self.controller(ControllerKind::Pci, index);
        match controller.and_then(|c| c.model) {
            Some(ControllerModel::PcieRoot) => "pcie.0".to_owned(),
            Some(ControllerModel::PciRoot) => "pci.0".to_owned(),
            _ => controller.and_then(|c| c.info.alias()).map_or_else(|| format!("pci.{index}"), str::to_owned),
        }
    }

    /// Where a USB device sits.
    fn usb(&self, info: &DeviceInfo) -> Props {
        let Some(AddressKind::Usb(usb)) = info.address.as_ref().map(|a| &a.kind) else { return Props::default() };
        let controller = self.controller(ControllerKind::Usb, usb.bus);
        let alias = controller.and_then(|c| c.info.alias()).unwrap_or("usb");
        Props::new("bus", format!("{alias}.0")).maybe("port", usb.port.clone())
    }

    /// The controller of that number; of several USB 2 companions, the master.
    fn controller(&self, kind: ControllerKind, index: u32) -> Option<&'a Controller> {
        let same = |c: &&Controller| c.kind == kind && c.index() == index;
        let mut all = self.def.devices.controllers.iter().filter(same);
        let first = all.clone().next();
        all.find(|c| c.master.is_none()).or(first)
    }

    /// The turn at booting, from 1.
    fn boot_index(&self, info: &DeviceInfo) -> Option<u32> {
        self.boot_order.get(id(info)).copied()
    }
}

/// The device's name; every device has one once it is live.
fn id(info: &DeviceInfo) -> &str {
    info.alias().unwrap_or_default()
}

/// Name and place of a PCI device come last; so does its turn at booting.
fn turn(props: Props, index: Option<u32>) -> Props {
    props.maybe("bootindex", index)
}

/// Each device's turn: its own, or that of the first device of each class in `<os><boot>`.
fn boot_order(def: &DomainDef) -> HashMap<String, u32> {
    let devices = &def.devices;
    let disks = devices.disks.iter().map(|d| &d.info);
    let infos =
        disks.chain(devices.interfaces.iter().map(|i| &i.info)).chain(devices.redirdevs.iter().map(|r| &r.info));
    let infos = infos.chain(devices.hostdevs.iter().map(|h| &h.info));
    let mut order: HashMap<String, u32> =
        infos.filter_map(|info| Some((id(info).to_owned(), info.boot_order()?))).collect();
    for (turn, boot) in (1..).zip(&def.os.boot) {
        let disk = |device: DiskDevice| devices.disks.iter().find(|d| d.device() == device).map(|d| &d.info);
        let first = match boot.dev {
            BootDevice::Hd => disk(DiskDevice::Disk),
            BootDevice::Cdrom => disk(DiskDevice::Cdrom),
            BootDevice::Fd => disk(DiskDevice::Floppy),
            BootDevice::Network => devices.interfaces.first().map(|i| &i.info),
        };
        if let Some(info) = first {
            order.entry(id(info).to_owned()).or_insert(turn);
        }
    }
    order
}

/// What virtio devices share.
fn virtio(driver: &virt_model::device::VirtioDriver) -> Props {
    Props::default()
        .maybe("iommu_platform", driver.iommu)
        .maybe("ats", driver.ats)
        .maybe("packed", driver.packed)
        .maybe("page-per-vq", driver.page_per_vq)
}

/// What of a device's name says which generation of virtio it is.
fn generation(model: VirtioModel) -> &'static str {
    match model {
        VirtioModel::Virtio => "",
        VirtioModel::Transitional => "-transitional",
        VirtioModel::NonTransitional => "-non-transitional",
    }
}

/// `socket,…` and the like.
fn list(first: &str) -> List {
    List::new(first)
}
