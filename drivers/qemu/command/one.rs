//! One device of a running guest: what QEMU is told over its monitor for it, made of the same arguments as at a start, so that
//! a machine is the same whether a device was there at its start or came later.

use super::{Builder, Place, monitor_words, usb_device};
use crate::qemu::capabilities::Capabilities;
use crate::qemu::plan::{Companion, HostFile, SecretContent, Tap};
use serde_json::{Value, json};
use virt_model::device::chardev::{ChannelKind, SerialKind};
use virt_model::device::disk::{DiskBus, DiskDevice};
use virt_model::device::hostdev::HostdevKind;
use virt_model::device::input::{InputBus, InputKind};
use virt_model::device::interface::InterfaceKind;
use virt_model::device::memory::MemoryModel;
use virt_model::device::watchdog::WatchdogModel;
use virt_model::device::{ControllerKind, Device};
use virt_model::domain::DomainDef;

/// A device as it is plugged into a running guest.
pub struct OneDevice {
    /// What QEMU is told, in this order.
    pub steps: Vec<Step>,
    /// What must be accessible to it before.
    pub files: Vec<HostFile>,
    /// Network devices that it is given before, each by [`fd_name`].
    pub taps: Vec<Tap>,
    /// Sets of descriptors, each with a file without a name in it for what is written to the disk of that target.
    pub scratch: Vec<(u32, String)>,
    /// What runs beside it from before it is plugged in until it has gone.
    pub companions: Vec<Companion>,
    /// Whether something of it is reached by the network of the host.
    pub by_network: bool,
}

/// A command, and the one that takes it back.
pub struct Step {
    /// The command.
    pub command: &'static str,
    /// Its arguments. May hold what is secret.
    pub arguments: Value,
    /// What takes it back.
    pub undo: Option<(&'static str, Value)>,
    /// What is in the object, if it is a secret that QEMU would find in an open file at a start.
    pub secret: Option<SecretContent>,
}

impl Step {
    /// Whether it makes an object with limits, which several disks may share.
    pub fn is_of_limits(&self) -> bool {
        self.command == "object-add" && self.arguments["qom-type"] == "throttle-group"
    }
}

/// Under which name QEMU's monitor is given a descriptor that at a start would have that number.
pub fn fd_name(fd: i32) -> String {
    format!("virtd-plugged-{fd}")
}

/// Why a device of that kind cannot be plugged into, or unplugged from, a machine that runs; nothing if it can.
pub fn keeps_its_place(device: &Device) -> Option<&'static str> {
    const BOARD: &str = "it is part of the board";
    const OFF: &str = "virtd plugs it in only while the machine is off";
    match device {
        Device::Disk(disk) => match disk.target.bus {
            _ if disk.device() == DiskDevice::Floppy => Some("floppy drives are part of the board"),
            Some(DiskBus::Virtio | DiskBus::Scsi | DiskBus::Usb) => None,
            _ => Some("disks on this bus cannot be plugged; use bus 'virtio', 'scsi' or 'usb'"),
        },
        Device::Interface(card) => match card.kind {
            InterfaceKind::VhostUser if card.listens() => {
                Some("QEMU would wait for the switch, and its guest with it: have the switch listen (mode='client')")
            }
            _ => None,
        },
        Device::Rng(_) => None,
        Device::Input(input) => match (input.kind, input.bus) {
            (InputKind::Evdev, _) => Some(OFF),
            (_, Some(InputBus::Usb | InputBus::Virtio)) => None,
            _ => Some(BOARD),
        },
        Device::Channel(channel) => match channel.target.kind {
            ChannelKind::Virtio => None,
            _ => Some("only channels of type 'virtio' can be plugged"),
        },
        Device::Serial(serial) => match serial.target.as_ref().and_then(|target| target.kind) {
            Some(SerialKind::Usb | SerialKind::Pci) => None,
            _ => Some("serial ports on ISA are part of the board; use <target type='usb-serial'/> or 'pci-serial'"),
        },
        Device::Redirdev(_) => None,
        Device::Controller(controller) => match controller.kind {
            ControllerKind::Scsi | ControllerKind::VirtioSerial => None,
            ControllerKind::Usb if controller.master.is_none() => match controller.model.and_then(usb_device) {
                Some(_) => None,
                None => Some("QEMU has no device for it"),
            },
            ControllerKind::Pci => Some("bridges and root ports are part of the board"),
            _ => Some(BOARD),
        },
        Device::Watchdog(watchdog) => match watchdog.model {
            WatchdogModel::I6300esb => None,
            _ => Some(BOARD),
        },
        Device::MemoryDevice(memory) => match memory.model {
            MemoryModel::Dimm | MemoryModel::VirtioMem => None,
            _ => Some(OFF),
        },
        Device::Filesystem(shared) => match shared.is_virtiofs() {
            true => None,
            false => Some("QEMU shares folders by 9p from its start on only; use <driver type='virtiofs'/>"),
        },
        Device::Hostdev(device) => match device.kind {
            HostdevKind::Pci | HostdevKind::Usb => None,
            _ => Some(OFF),
        },
        Device::Memballoon(_) | Device::Shmem(_) | Device::Crypto(_) => Some(OFF),
        Device::Vsock(_) | Device::Iommu(_) | Device::Panic(_) | Device::Tpm(_) | Device::Hub(_) => Some(OFF),
        Device::Sound(_) | Device::Video(_) | Device::Parallel(_) | Device::Console(_) => Some(BOARD),
    }
}

/// Why a device that can be plugged in, or was there at the start, cannot be unplugged; nothing if it can.
pub fn never_leaves(device: &Device) -> Option<&'static str> {
    match device {
        // QEMU 7.2 lost its process when more was plugged in after a DIMM had gone, and has no virtio-mem that goes.
        Device::MemoryDevice(_) => Some(
            "QEMU does not survive it when memory has gone, or cannot do it; have the guest give back what it does not need \
             (SetMemory), or take it out of the stored configuration",
        ),
        device => keeps_its_place(device),
    }
}

/// What is told of the device of that name. Error: why it cannot be plugged.
pub fn one_device(def: &DomainDef, caps: &Capabilities, place: &Place<'_>, alias: &str) -> Result<OneDevice, String> {
    let device = def.device_named(alias).ok_or_else(|| format!("there is no device '{alias}'"))?;
    if let Some(why) = keeps_its_place(&device) {
        return Err(why.to_owned());
    }
    let mut builder = Builder::new(def, caps, place);
    match device {
        Device::Disk(disk) => builder.plugged_disk(disk),
        Device::Interface(card) => builder.interface(card),
        Device::Rng(rng) => builder.rng(rng),
        Device::Input(input) => builder.input(input),
        Device::Channel(channel) => builder.channel(channel),
        // What it says is kept of those only that the guest was started with.
        Device::Serial(serial) => {
            let chardev = builder.back_end(&serial.source, super::id(&serial.info), None);
            builder.serial_port(serial, chardev);
        }
        Device::Hostdev(device) => builder.host_device(device),
        Device::Redirdev(redirection) => builder.redirection(redirection),
        Device::Watchdog(watchdog) => builder.watchdog(watchdog),
        Device::MemoryDevice(memory) => builder.memory_device(memory),
        Device::Filesystem(shared) => builder.virtiofs(shared),
        Device::Controller(controller) => {
            let props = builder.controller_device(controller);
            props.into_iter().for_each(|props| builder.args.device(props));
        }
        _ => {}
    }
    let rom = device.info().0.rom.as_ref().and_then(|rom| rom.file.as_deref());
    rom.into_iter().for_each(|file| builder.read_whole(file));
    let mut told = told(builder)?;
    if let (Device::Watchdog(_), Some(action)) = (device, super::watchdog_action(def)) {
        let arguments = json!({ "watchdog": action });
        told.steps.insert(0, Step { command: "set-action", arguments, undo: None, secret: None });
    }
    Ok(told)
}

fn told(builder: Builder<'_>) -> Result<OneDevice, String> {
    let Builder { args, files, taps, secrets, setup, companions, overlays, .. } = builder;
    let words = args.into_vec();
    let by_network = crate::qemu::wall::reach_the_network(&words);
    let mut words = words.into_iter();
    let mut steps = Vec::new();
    while let Some(option) = words.next() {
        let value = words.next().unwrap_or_default();
        let said = || serde_json::from_str::<Value>(&value).map_err(|e| format!("{option}: {e}"));
        let (command, arguments, (undo, key)) = match option.as_str() {
            "-object" => ("object-add", said()?, ("object-del", "id")),
            "-blockdev" => ("blockdev-add", said()?, ("blockdev-del", "node-name")),
            "-chardev" => {
                let arguments = monitor_words::chardev(&value).ok_or("no monitor knows such a character device")?;
                ("chardev-add", arguments, ("chardev-remove", "id"))
            }
            "-netdev" => ("netdev_add", monitor_words::netdev(&value, fd_name), ("netdev_del", "id")),
            "-device" => ("device_add", said()?, ("device_del", "id")),
            other => return Err(format!("{other} is said at a start only")),
        };
        let undo = Some((undo, json!({ key: arguments[key] })));
        let file = arguments["file"].as_str().filter(|_| command == "object-add");
        let of_file = |secret: &&crate::qemu::plan::Secret| Some(&*format!("/dev/fd/{}", secret.fd)) == file;
        let secret = secrets.iter().find(of_file).map(|secret| secret.content.clone());
        steps.push(Step { command, arguments, undo, secret });
    }
    let mut scratch = Vec::new();
    for (target, overlay) in overlays {
        let before = steps.iter().position(|step| step.command == "device_add").unwrap_or(steps.len());
        // It goes with what is above it.
        let (command, arguments) = ("blockdev-snapshot-sync", overlay.arguments);
        steps.insert(before, Step { command, arguments, undo: None, secret: None });
        scratch.push((overlay.set, target));
    }
    let set = |(command, arguments): (String, Value)| match command.as_str() {
        "set_link" => Ok(Step { command: "set_link", arguments, undo: None, secret: None }),
        other => Err(format!("{other} is said at a start only")),
    };
    steps.extend(setup.into_iter().map(set).collect::<Result<Vec<_>, _>>()?);
    Ok(OneDevice { steps, files, taps, scratch, companions, by_network })
}
