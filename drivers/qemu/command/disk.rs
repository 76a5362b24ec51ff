//! Disks: a chain of nodes from the file up to what the guest sees, and the device that shows it.
//!
//! ```text
//!  vda-storage ◀─ vda-format (◀─ vda-cor ◀─ vda-throttle) ◀─ virtio-blk-pci
//!                                                       nodes are named after the target, layers below are numbered
//!       ▲ backing: vda-1-storage ◀─ vda-1-format
//! ```
//!
//! Every layer is named, the lowest one says that nothing is below it: what an image's header names is never opened.

use super::args::Props;
use super::{Builder, id, turn, virtio};
use crate::qemu::capabilities::Capabilities;
use crate::qemu::complete::Board;
use crate::qemu::format::{has_backing, known_format};
use crate::qemu::given::GivenImage;
use serde_json::{Value, json};
use virt_model::device::address::DriveAddress;
use virt_model::device::controller::ControllerModel;
use virt_model::device::disk::{
    BackingStore, DetectZeroes, Discard, DiskBus, DiskCache, DiskDevice, DiskDriver, DiskKind, Iotune,
};
use virt_model::device::source::DiskSource;
use virt_model::device::{AddressKind, ControllerKind, Disk, VirtioModel};
use virt_model::domain::DomainDef;

/// The first file descriptor of those for what is thrown away; from 200 on they are virtd's own.
const FIRST_SCRATCH_FD: i32 = 180;

/// What is laid over the image of a disk that is plugged in, and thrown away.
pub struct Overlay {
    /// The set of descriptors that its file is in.
    pub set: u32,
    /// What QEMU is told of it.
    pub arguments: Value,
}

fn overlay(name: &str, file: &str) -> Value {
    json!({
        "node-name": format!("{name}-format"),
        "snapshot-file": file,
        "snapshot-node-name": format!("{name}-transient"),
        "format": "qcow2",
    })
}

impl Builder<'_> {
    pub(super) fn disks(&mut self) {
        let def = self.def;
        for group in def.throttle_groups.iter().flat_map(|groups| &groups.groups) {
            self.throttle_group(&format!("throttle-{}", group.group.as_deref().unwrap_or_default()), group);
        }
        for disk in &def.devices.disks {
            let before = self.args.len();
            let node = self.disk_nodes(disk, &disk.target.dev);
            if asks(disk) && self.caps.takes_nodes_early() {
                self.nodes.extend(self.args.take("-blockdev", before));
            }
            if disk.transient.is_some() {
                self.overlay_to_throw_away(&disk.target.dev);
            }
            let props = self.disk_device(disk, node);
            self.args.device(props);
        }
    }

    /// One that is plugged into a running guest: what of it nobody may see goes by the monitor anyway.
    pub(super) fn plugged_disk(&mut self, disk: &Disk) {
        let name = &*disk.target.dev;
        let mut node = self.disk_nodes(disk, name);
        if let (Some(_), Some(top)) = (&disk.transient, &mut node) {
            // QEMU keeps an overlay only for what is above it, and the device is to come later.
            if *top == format!("{name}-format") {
                let whole = format!("{name}-whole");
                let props = Props::new("driver", "raw").set("node-name", &*whole).set("file", std::mem::take(top));
                self.args.blockdev(props);
                *top = whole;
            }
            let set = GivenImage::new(true).set;
            let arguments = overlay(name, &format!("/dev/fdset/{set}"));
            self.overlays.push((name.to_owned(), Overlay { set, arguments }));
        }
        let props = self.disk_device(disk, node);
        self.args.device(props);
    }

    /// The nodes of the medium, if there is one, their names begun by `name`; gives the topmost.
    fn disk_nodes(&mut self, disk: &Disk, name: &str) -> Option<String> {
        let source = disk.source.as_ref().filter(|_| !disk.is_empty())?;
        let driver = disk.driver.as_ref();
        let backing = self.backing_nodes(disk.backing.as_deref(), name, 1);
        let format = disk.meant_format();
        let read_only = disk.readonly || disk.device() == DiskDevice::Cdrom;
        if let Some(path) = disk.path() {
            match disk.kind() {
                DiskKind::File | DiskKind::Block => self.open_image(path, !read_only),
                _ => self.open(path, !read_only),
            }
        }
        let removable = disk.device() == DiskDevice::Cdrom;
        // Who may ask is said beside the source or in it.
        let source = DiskSource { auth: disk.auth().cloned(), ..source.clone() };
        let given = GivenImage::of(disk);
        let storage = match given {
            // QEMU looks for a descriptor of just that mode: it cannot begin with one that reads, and go on with one that writes.
            Some(image) => given_node(image, disk.kind(), name),
            None => self.storage_node(&source, disk.kind(), name, removable).set("auto-read-only", true),
        };
        let local = disk.kind() != DiskKind::Network;
        let aio = driver.and_then(|d| d.io).filter(|_| local).map(|io| io.as_str());
        let storage = storage.set("discard", "unmap").maybe("aio", aio);
        self.args.blockdev(storage.extend(cache(driver)));
        let key = disk.encryption().and_then(|encryption| self.passphrase(encryption, name));
        let image = Props::new("node-name", format!("{name}-format"))
            .set("read-only", read_only)
            .maybe("discard", driver.and_then(|d| d.discard).map(|d| d.as_str()))
            .maybe("detect-zeroes", detect_zeroes(driver))
            .extend(cache(driver));
        let image = content(image, format, key).extend(qcow2_options(driver)).set("file", format!("{name}-storage"));
        self.args.blockdev(with_backing(image, format, backing));
        Some(self.filters(disk, name, format!("{name}-format")))
    }

    /// Before the guest runs QEMU itself lays an overlay over the image, in a file that has no name: it goes with QEMU,
    /// whatever ends it.
    fn overlay_to_throw_away(&mut self, name: &str) {
        let fd = self.scratch.len().try_into().map_or(FIRST_SCRATCH_FD, |n: i32| FIRST_SCRATCH_FD + n);
        self.scratch.push(fd);
        let arguments = overlay(name, &format!("/dev/fd/{fd}"));
        self.setup.push(("blockdev-snapshot-sync".to_owned(), arguments));
    }

    /// What stands between the image and the device; gives the topmost.
    fn filters(&mut self, disk: &Disk, name: &str, mut top: String) -> String {
        let mut filter = |builder: &mut Self, suffix: &str, props: Props| {
            let node = format!("{name}-{suffix}");
            builder.args.blockdev(props.set("node-name", &*node).set("file", std::mem::take(&mut top)));
            top = node;
        };
        if disk.driver.as_ref().and_then(|driver| driver.copy_on_read) == Some(true) {
            filter(self, "cor", Props::new("driver", "copy-on-read"));
        }
        if let Some(tune) = disk.iotune.as_ref().filter(|tune| !tune.limits().is_empty() || tune.group.is_some()) {
            let group = format!("throttle-{}", tune.group.as_deref().unwrap_or(&disk.target.dev));
            self.throttle_group(&group, tune);
            filter(self, "throttle", Props::new("driver", "throttle").set("throttle-group", group));
        }
        let shared = disk.throttle_filters.iter().flat_map(|filters| &filters.filters);
        // The first one is the topmost.
        for (n, shared) in shared.enumerate().collect::<Vec<_>>().into_iter().rev() {
            let group = format!("throttle-{}", shared.group);
            filter(self, &format!("filter{n}"), Props::new("driver", "throttle").set("throttle-group", group));
        }
        top
    }

    /// Disks of one group share its limits, which the first one says.
    fn throttle_group(&mut self, group: &str, tune: &Iotune) {
        if self.throttle_groups.insert(group.to_owned()) {
            let limits = tune.limits().into_iter().fold(Props::default(), |props, (name, n)| props.set(name, n));
            self.args.object(Props::new("qom-type", "throttle-group").set("id", group).set("limits", limits));
        }
    }

    /// The nodes below; gives the topmost of them, if there are any.
    fn backing_nodes(&mut self, layer: Option<&BackingStore>, disk: &str, depth: usize) -> Option<String> {
        let layer = layer?;
        let kind = layer.kind();
        let source = layer.source.as_ref().filter(|source| !source.is_empty())?;
        let below = self.backing_nodes(layer.backing.as_deref(), disk, depth + 1);
        let format = layer.format.as_ref().map_or("raw", |format| &*format.name);
        if let Some(path) = source.path(kind) {
            match kind {
                DiskKind::File | DiskKind::Block => self.open_image(path, false),
                _ => self.open(path, false),
            }
        }
        let name = format!("{disk}-{depth}");
        let storage = self.storage_node(source, kind, &name, false).set("auto-read-only", true).set("discard", "unmap");
        self.args.blockdev(storage);
        let key = source.encryption.as_ref().and_then(|encryption| self.passphrase(encryption, &name));
        let image = Props::new("node-name", format!("{name}-format")).set("read-only", true);
        let image = content(image, format, key).set("file", format!("{name}-storage"));
        let cache = layer.format.as_ref().and_then(|format| format.metadata_cache.as_ref()?.bytes());
        self.args.blockdev(with_backing(image.maybe("cache-size", cache), format, below));
        Some(format!("{name}-format"))
    }

    fn disk_device(&self, disk: &Disk, node: Option<String>) -> Props {
        let driver = disk.driver.as_ref();
        let hard = disk.device() == DiskDevice::Disk;
        let on_virtio = disk.target.bus == Some(DiskBus::Virtio);
        let props = Props::device(device_type(disk))
            .extend(self.disk_place(disk))
            .maybe("share-rw", disk.shareable.then_some(true))
            .maybe("drive", node)
            .set("id", id(&disk.info));
        // A floppy's turn is said by its controller.
        let order = self.boot_index(&disk.info).filter(|_| disk.device() != DiskDevice::Floppy);
        let props = turn(props, order)
            .maybe("write-cache", write_cache(driver).filter(|_| hard))
            .maybe("serial", disk.serial.as_deref())
            .maybe("vendor", disk.vendor.as_deref())
            .maybe("product", disk.product.as_deref())
            .extend(blocks(disk))
            .maybe("wwn", disk.wwn.as_deref().and_then(wwn))
            .maybe("rotation_rate", disk.target.rotation_rate)
            .maybe("removable", disk.target.removable)
            .maybe("dpofua", disk.target.dpofua)
            .maybe(
                "werror",
                driver
                    .and_then(|d| d.error_policy)
                    .map(|p| if p.as_str() == "enospace" { "enospc" } else { p.as_str() }),
            )
            .maybe("rerror", driver.and_then(|d| d.rerror_policy).map(|p| p.as_str()));
        match driver.filter(|_| on_virtio) {
            Some(driver) => props
                .maybe("iothread", driver.iothread.map(|n| format!("iothread{n}")))
                .maybe("ioeventfd", driver.ioeventfd)
                .maybe("event_idx", driver.event_idx)
                .maybe("num-queues", driver.queues)
                .maybe("queue-size", driver.queue_size)
                .extend(virtio(&driver.virtio)),
            None => props,
        }
    }

    fn disk_place(&self, disk: &Disk) -> Props {
        let drive = match disk.info.address.as_ref().map(|a| &a.kind) {
            Some(AddressKind::Drive(drive)) => *drive,
            Some(AddressKind::Usb(_)) => return self.usb(&disk.info),
            _ => return self.pci(&disk.info),
        };
        let DriveAddress { controller, bus, target, unit } = drive;
        let alias = |kind| self.controller(kind, controller).and_then(|c| c.info.alias()).unwrap_or_default();
        match disk.target.bus {
            Some(DiskBus::Scsi) => {
                let place = Props::new("bus", format!("{}.0", alias(ControllerKind::Scsi))).set("channel", bus);
                // Most of what is not virtio's has one disk at each target: there a unit is a target.
                let model = self.controller(ControllerKind::Scsi, controller).and_then(|c| c.model);
                let flat = super::scsi_device(model).is_some() && model != Some(ControllerModel::Lsisas1078);
                let (target, unit) = if flat { (target.max(unit), 0) } else { (target, unit) };
                let place = place.set("scsi-id", target).set("lun", unit);
                place.set("device_id", format!("drive-{}", id(&disk.info)))
            }
            Some(DiskBus::Ide) => Props::new("bus", format!("ide.{bus}")).set("unit", unit),
            Some(DiskBus::Sata) if self.board == Board::Q35 && controller == 0 => {
                Props::new("bus", format!("ide.{unit}"))
            }
            Some(DiskBus::Sata) => Props::new("bus", format!("{}.{unit}", alias(ControllerKind::Sata))),
            Some(DiskBus::Fdc) if self.board == Board::Q35 => {
                Props::new("bus", format!("{}.0", alias(ControllerKind::Fdc))).set("unit", unit)
            }
            _ => Props::new("unit", unit),
        }
    }
}

/// A medium that is put into a running guest's drive.
pub struct Medium {
    /// Objects that must be there before, unless they are: groups that share limits.
    pub objects: Vec<Value>,
    /// What QEMU is to open, lowest first.
    pub nodes: Vec<Value>,
    /// The topmost.
    pub top: String,
    /// What it must be able to open.
    pub files: Vec<crate::qemu::plan::HostFile>,
    /// Opening it takes a secret.
    pub secret: bool,
}

/// What is to be opened for what lies in a drive; `None` if nothing does. Names of nodes begin with `name`.
pub fn medium(def: &DomainDef, caps: &Capabilities, disk: &Disk, name: &str) -> Option<Medium> {
    let place = super::Place::now(std::path::Path::new("/"), 0, false);
    let mut builder = Builder::new(def, caps, &place);
    let top = builder.disk_nodes(disk, name)?;
    Some(Medium {
        // Secrets come by file descriptors, which are handed over at a start only.
        objects: builder.args.json_of("-object"),
        nodes: builder.args.json_of("-blockdev"),
        top,
        files: builder.files,
        secret: !builder.secrets.is_empty(),
    })
}

/// The nodes of an overlay that a running guest's disk gets, lowest first; what it stands on is said when it is put in.
pub fn overlay_nodes(disk: &Disk, path: &std::path::Path, block: bool, format: &str, name: &str) -> [Value; 2] {
    let driver = disk.driver.as_ref();
    let (storage, path) = (format!("{name}-storage"), path.to_string_lossy().into_owned());
    let aio = driver.and_then(|d| d.io).map(|io| io.as_str());
    let file = Props::new("driver", if block { "host_device" } else { "file" }).set("filename", path);
    let file = file.set("node-name", &*storage).set("auto-read-only", true).set("discard", "unmap").maybe("aio", aio);
    let image = Props::new("driver", driver_name(format))
        .set("node-name", format!("{name}-format"))
        .set("read-only", false)
        .maybe("discard", driver.and_then(|d| d.discard).map(|d| d.as_str()))
        .maybe("detect-zeroes", detect_zeroes(driver))
        .extend(cache(driver))
        .extend(if format == "qcow2" { qcow2_options(driver) } else { Props::default() })
        .set("file", storage)
        .set("backing", Value::Null);
    [file.extend(cache(driver)).into(), image.into()]
}

/// The node of an image that a client has given by descriptor.
fn given_node(image: GivenImage, kind: DiskKind, name: &str) -> Props {
    Props::new("driver", if kind == DiskKind::Block { "host_device" } else { "file" })
        .set("filename", image.file_name())
        .set("node-name", format!("{name}-storage"))
        .set("read-only", !image.writable)
}

/// Whether something of it is asked of a server with a query, which may be a token.
fn asks(disk: &Disk) -> bool {
    let below = std::iter::successors(disk.backing.as_deref(), |layer| layer.backing.as_deref());
    let sources = below.map(|layer| layer.source.as_ref()).chain([disk.source.as_ref()]);
    sources.flatten().any(|source| source.query.is_some())
}

/// Sizes of blocks, and the shape that old systems ask for.
fn blocks(disk: &Disk) -> Props {
    let (io, shape) = (disk.blockio.as_ref(), disk.geometry.as_ref());
    Props::default()
        .maybe("logical_block_size", io.and_then(|io| io.logical))
        .maybe("physical_block_size", io.and_then(|io| io.physical))
        .maybe("discard_granularity", io.and_then(|io| io.discard))
        .maybe("cyls", shape.map(|shape| shape.cylinders))
        .maybe("heads", shape.map(|shape| shape.heads))
        .maybe("secs", shape.map(|shape| shape.sectors))
        .maybe("bios-chs-trans", shape.and_then(|shape| shape.translation).map(|t| t.as_str()))
}

/// QEMU's name of what the guest sees.
pub fn device_type(disk: &Disk) -> &'static str {
    let cd = disk.device() == DiskDevice::Cdrom;
    match disk.target.bus.unwrap_or_default() {
        DiskBus::Virtio if disk.model == Some(VirtioModel::Transitional) => "virtio-blk-pci-transitional",
        DiskBus::Virtio if disk.model == Some(VirtioModel::NonTransitional) => "virtio-blk-pci-non-transitional",
        DiskBus::Virtio => "virtio-blk-pci",
        DiskBus::Scsi if cd => "scsi-cd",
        DiskBus::Scsi => "scsi-hd",
        DiskBus::Usb => "usb-storage",
        DiskBus::Fdc => "floppy",
        _ if cd => "ide-cd",
        _ => "ide-hd",
    }
}

/// How the image is read; `key` opens it if it is encrypted.
fn content(image: Props, format: &str, key: Option<String>) -> Props {
    match (driver_name(format), key) {
        ("raw", Some(key)) => image.set("driver", "luks").set("key-secret", key),
        (driver, Some(key)) => {
            image.set("driver", driver).set("encrypt", Props::new("format", "luks").set("key-secret", key))
        }
        (driver, None) => image.set("driver", driver),
    }
}

fn qcow2_options(driver: Option<&DiskDriver>) -> Props {
    let cache = driver.and_then(|d| d.metadata_cache.as_ref()?.bytes());
    Props::default().maybe("cache-size", cache).maybe("discard-no-unref", driver.and_then(|d| d.discard_no_unref))
}

/// What the image stands on is said wherever its header could say it.
pub(super) fn with_backing(image: Props, format: &str, below: Option<String>) -> Props {
    match has_backing(format) {
        true => image.set("backing", below.map_or(Value::Null, Value::from)),
        false => image,
    }
}

fn driver_name(format: &str) -> &'static str {
    known_format(format).unwrap_or("raw")
}

fn cache(driver: Option<&DiskDriver>) -> Props {
    let (direct, no_flush) = match driver.and_then(|d| d.cache) {
        None | Some(DiskCache::Default) => return Props::default(),
        Some(DiskCache::None | DiskCache::Directsync) => (true, false),
        Some(DiskCache::Unsafe) => (false, true),
        Some(DiskCache::Writeback | DiskCache::Writethrough) => (false, false),
    };
    Props::new("cache", Props::new("direct", direct).set("no-flush", no_flush))
}

fn write_cache(driver: Option<&DiskDriver>) -> Option<&'static str> {
    Some(match driver.and_then(|d| d.cache)? {
        DiskCache::Default => return None,
        DiskCache::Writethrough | DiskCache::Directsync => "off",
        DiskCache::None | DiskCache::Writeback | DiskCache::Unsafe => "on",
    })
}

/// Zeroes can only be given back as holes where discards are.
fn detect_zeroes(driver: Option<&DiskDriver>) -> Option<&'static str> {
    let driver = driver?;
    match driver.detect_zeroes? {
        DetectZeroes::Unmap if driver.discard != Some(Discard::Unmap) => Some("on"),
        other => Some(other.as_str()),
    }
}

/// A world wide name is 16 hexadecimal digits.
pub fn wwn(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok().filter(|_| text.len() <= 18)
}
