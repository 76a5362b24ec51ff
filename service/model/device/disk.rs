//! `<disk>`: a disk, a CD-ROM drive, a floppy drive, and what lies in it.

use super::{DeviceInfo, VirtioDriver};
use crate::domain::part::element;
use crate::domain::value::choices;

choices! {
    /// What the guest sees.
    pub enum DiskDevice { Disk = "disk", Cdrom = "cdrom", Floppy = "floppy", Lun = "lun", }
}

choices! {
    /// Where the content comes from.
    pub enum DiskKind {
        File = "file", Block = "block", Dir = "dir", Network = "network", Volume = "volume", Nvme = "nvme",
        VhostUser = "vhostuser", VhostVdpa = "vhostvdpa",
    }
}

choices! {
    /// The bus the guest sees it on.
    pub enum DiskBus {
        Ide = "ide", Fdc = "fdc", Scsi = "scsi", Virtio = "virtio", Xen = "xen", Usb = "usb", Uml = "uml", Sata = "sata",
        Sd = "sd", Nvme = "nvme",
    }
}

choices! {
    /// Host caching.
    pub enum DiskCache {
        Default = "default", None = "none", Writethrough = "writethrough", Writeback = "writeback",
        Directsync = "directsync", Unsafe = "unsafe",
    }
}

choices! {
    /// How the host does I/O.
    pub enum DiskIo { Native = "native", Threads = "threads", IoUring = "io_uring", }
}

choices! {
    /// What becomes of the guest's discards.
    pub enum Discard { Unmap = "unmap", Ignore = "ignore", }
}

choices! {
    /// What becomes of zeroes written.
    pub enum DetectZeroes { Off = "off", On = "on", Unmap = "unmap", }
}

choices! {
    /// What happens when the host's I/O fails.
    pub enum ErrorPolicy { Stop = "stop", Report = "report", Ignore = "ignore", Enospace = "enospace", }
}

choices! {
    /// The same for reads.
    pub enum ReadErrorPolicy { Stop = "stop", Report = "report", Ignore = "ignore", }
}

choices! {
    /// The drive's tray.
    pub enum Tray { Closed = "closed", Open = "open", }
}

choices! {
    /// What to do at start when the source is missing.
    pub enum StartupPolicy { Mandatory = "mandatory", Requisite = "requisite", Optional = "optional", }
}

choices! {
    /// Whether a snapshot includes the disk.
    pub enum SnapshotPolicy { Internal = "internal", External = "external", No = "no", Manual = "manual", }
}

element! {
    /// `<disk>`
    pub struct Disk {
        /// Where the content comes from; `file` if absent.
        attr "type" => kind: Option<DiskKind>,
        /// What the guest sees; `disk` if absent.
        attr "device" => device: Option<DiskDevice>,
        /// Whether snapshots include it. Advisory to `CreateSnapshot`.
        attr "snapshot" => snapshot: Option<SnapshotPolicy>,
        /// `<driver>`
        child "driver" => driver: Option<DiskDriver>,
        /// `<source>`; without one, a drive is empty.
        child "source" => source: Option<DiskSource>,
        /// `<backingStore>`: what is below. Absent: not known yet; empty: there is nothing below.
        child "backingStore" => backing: Option<Box<BackingStore>>,
        /// `<target>`
        must "target" => target: DiskTarget,
        /// `<readonly/>`
        flag "readonly" => readonly: bool,
        /// `<shareable/>`
        flag "shareable" => shareable: bool,
        /// `<serial>`
        leaf "serial" => serial: Option<String>,
        /// `<wwn>`
        leaf "wwn" => wwn: Option<String>,
        /// Name, place, boot order.
        flat => info: DeviceInfo,
    }
}

impl Disk {
    /// What the guest sees.
    pub fn device(&self) -> DiskDevice {
        self.device.unwrap_or_default()
    }

    /// Where the content comes from.
    pub fn kind(&self) -> DiskKind {
        self.kind.unwrap_or_default()
    }

    /// The file or block device, if there is one.
    pub fn path(&self) -> Option<&str> {
        self.source.as_ref()?.path(self.kind())
    }

    /// Whether the drive is without medium.
    pub fn is_empty(&self) -> bool {
        self.source.as_ref().is_none_or(DiskSource::is_empty)
    }

    /// The image format the document gives.
    pub fn format(&self) -> Option<&str> {
        self.driver.as_ref()?.format.as_deref()
    }
}

element! {
    /// `<disk><driver>`: how the host handles it.
    pub struct DiskDriver {
        /// Who: `qemu`.
        attr "name" => name: Option<String>,
        /// Image format: `raw`, `qcow2`.
        attr "type" => format: Option<String>,
        /// Host caching.
        attr "cache" => cache: Option<DiskCache>,
        /// On write errors.
        attr "error_policy" => error_policy: Option<ErrorPolicy>,
        /// On read errors.
        attr "rerror_policy" => rerror_policy: Option<ReadErrorPolicy>,
        /// How I/O is done.
        attr "io" => io: Option<DiskIo>,
        /// What becomes of discards.
        attr "discard" => discard: Option<Discard>,
        /// What becomes of zeroes.
        attr "detect_zeroes" => detect_zeroes: Option<DetectZeroes>,
        /// Number of queues.
        attr "queues" => queues: Option<u32>,
        /// Entries of each queue.
        attr "queue_size" => queue_size: Option<u32>,
        /// What virtio devices share.
        flat => virtio: VirtioDriver,
    }
}

element! {
    /// `<disk><source>`
    pub struct DiskSource {
        /// For `type='file'`.
        attr "file" => file: Option<String>,
        /// For `type='block'`.
        attr "dev" => dev: Option<String>,
        /// When it is missing.
        attr "startupPolicy" => startup_policy: Option<StartupPolicy>,
        /// Runtime: number of the layer in the chain.
        attr "index" => index: Option<u32>,
    }
}

impl DiskSource {
    /// The path on the host.
    pub fn path(&self, kind: DiskKind) -> Option<&str> {
        let path = match kind {
            DiskKind::File => self.file.as_deref(),
            DiskKind::Block => self.dev.as_deref(),
            _ => None,
        };
        path.filter(|path| !path.is_empty())
    }

    /// Whether it names nothing.
    pub fn is_empty(&self) -> bool {
        let named = |value: &Option<String>| value.as_ref().is_some_and(|v| !v.is_empty());
        !named(&self.file) && !named(&self.dev) && self.rest.is_empty()
    }
}

element! {
    /// `<disk><backingStore>`: one layer and all below it.
    pub struct BackingStore {
        /// Where the layer comes from; absent: the chain ends here.
        attr "type" => kind: Option<DiskKind>,
        /// Runtime: number of the layer in the chain.
        attr "index" => index: Option<u32>,
        /// `<format>`
        child "format" => format: Option<StoreFormat>,
        /// `<source>`
        child "source" => source: Option<DiskSource>,
        /// What is below.
        child "backingStore" => backing: Option<Box<BackingStore>>,
    }
}

impl BackingStore {
    /// Whether the chain ends here.
    pub fn is_end(&self) -> bool {
        self.kind.is_none() && self.source.is_none()
    }
}

element! {
    /// `<format>`
    pub struct StoreFormat {
        /// `raw`, `qcow2`
        need "type" => name: String,
    }
}

element! {
    /// `<disk><target>`: where the guest sees it.
    pub struct DiskTarget {
        /// `vda`, `sda`, `hda`, `fda` …: unique; its prefix suggests the bus.
        need "dev" => dev: String,
        /// From the prefix of `dev` if absent.
        attr "bus" => bus: Option<DiskBus>,
        /// The tray of a removable drive.
        attr "tray" => tray: Option<Tray>,
        /// The guest sees a removable medium (USB, SCSI).
        on_off "removable" => removable: Option<bool>,
        /// In revolutions a minute; 1: not rotating.
        attr "rotation_rate" => rotation_rate: Option<u32>,
    }
}
