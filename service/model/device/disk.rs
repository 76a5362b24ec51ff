//! `<disk>`: a disk, a CD-ROM drive, a floppy drive, and what lies in it.

use super::source::{Auth, DiskSource, Encryption};
pub use super::source::{DiskKind, StartupPolicy};
use super::{DeviceInfo, VirtioDriver, VirtioModel};
use crate::domain::part::element;
use crate::domain::size::scaled;
use crate::domain::value::choices;
use crate::xml::Place;
use std::path::PathBuf;

choices! {
    /// What the guest sees.
    pub enum DiskDevice { Disk = "disk", Cdrom = "cdrom", Floppy = "floppy", Lun = "lun", }
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
        /// Generation, of virtio.
        attr "model" => model: Option<VirtioModel>,
        /// Whether snapshots include it. Advisory to `CreateSnapshot`.
        attr "snapshot" => snapshot: Option<SnapshotPolicy>,
        /// `<driver>`
        child "driver" => driver: Option<DiskDriver>,
        /// `<source>`; without one, a drive is empty.
        child "source" => source: Option<DiskSource>,
        /// `<backingStore>`: what is below. Empty, or absent: there is nothing below.
        child "backingStore" => backing: Option<Box<BackingStore>>,
        /// `<target>`
        must "target" => target: DiskTarget,
        /// `<auth>`, where it is not in `<source>`.
        child "auth" => auth: Option<Auth>,
        /// `<encryption>`, where it is not in `<source>`.
        child "encryption" => encryption: Option<Encryption>,
        /// `<geometry>`
        child "geometry" => geometry: Option<Geometry>,
        /// `<blockio>`
        child "blockio" => blockio: Option<Blockio>,
        /// `<iotune>`
        child "iotune" => iotune: Option<Iotune>,
        /// `<throttlefilters>`
        child "throttlefilters" => throttle_filters: Option<ThrottleFilters>,
        /// `<readonly/>`
        flag "readonly" => readonly: bool,
        /// `<shareable/>`
        flag "shareable" => shareable: bool,
        /// `<transient>`: what is written is thrown away when the guest ends.
        child "transient" => transient: Option<Transient>,
        /// `<serial>`
        leaf "serial" => serial: Option<String>,
        /// `<wwn>`
        leaf "wwn" => wwn: Option<String>,
        /// `<vendor>`
        leaf "vendor" => vendor: Option<String>,
        /// `<product>`
        leaf "product" => product: Option<String>,
        /// Name, place, boot order.
        flat => info: DeviceInfo,
    }
}

impl Disk {
    /// What the guest sees.
    pub fn device(&self) -> DiskDevice {
        self.device.unwrap_or_default()
    }

    /// Where the content comes from. A volume is the file or device that it is, once it is known where.
    pub fn kind(&self) -> DiskKind {
        let kind = self.kind.unwrap_or_default();
        self.source.as_ref().map_or(kind, |source| source.opened_as(kind))
    }

    /// The volume that it is: pool and name, wherever that is.
    pub fn volume(&self) -> Option<(&str, &str)> {
        self.source.as_ref()?.volume_of(self.kind)
    }

    /// The volumes among its layers, its own first.
    pub fn volumes(&self) -> impl Iterator<Item = (&str, &str)> {
        self.chain().filter_map(|layer| layer.volume)
    }

    /// Calls `change` with each layer below its own image, from the topmost down.
    pub fn each_below(&mut self, mut change: impl FnMut(&mut BackingStore)) {
        let mut layer = self.backing.as_deref_mut();
        while let Some(store) = layer {
            change(store);
            layer = store.backing.as_deref_mut();
        }
    }

    /// Whether a client has given its image by descriptor: nobody else can open that again.
    pub fn is_given(&self) -> bool {
        self.source.as_ref().is_some_and(|source| source.given.is_some())
    }

    /// The file or block device, if there is one that can be opened.
    pub fn path(&self) -> Option<&str> {
        self.source.as_ref()?.path(self.kind())
    }

    /// Its layers as the document tells them, its own image first and what that stands on below.
    pub fn chain(&self) -> impl Iterator<Item = Layer<'_>> {
        let (path, volume) = (self.path(), self.volume());
        let own = Layer { path, volume, format: self.format(), below: self.backing.as_deref(), at: &self.at };
        std::iter::successors(Some(own), |layer| {
            let store = layer.below?;
            let format = store.format.as_ref().map(|format| &*format.name);
            let (path, volume) = (store.path(), store.volume());
            Some(Layer { path, volume, format, below: store.backing.as_deref(), at: &store.at })
        })
    }

    /// The files and block devices of its chain, from the topmost down.
    pub fn files(&self) -> Vec<PathBuf> {
        self.chain().filter_map(|layer| layer.path.map(PathBuf::from)).collect()
    }

    /// Who asks a server for it.
    pub fn auth(&self) -> Option<&Auth> {
        self.source.as_ref().and_then(|source| source.auth.as_ref()).or(self.auth.as_ref())
    }

    /// How it is encrypted.
    pub fn encryption(&self) -> Option<&Encryption> {
        self.source.as_ref().and_then(|source| source.encryption.as_ref()).or(self.encryption.as_ref())
    }

    /// Whether the drive is without medium.
    pub fn is_empty(&self) -> bool {
        self.source.as_ref().is_none_or(DiskSource::is_empty)
    }

    /// Its source as that of a layer: a volume that is frozen is this very file, whatever its pool has by that name later.
    pub fn frozen_source(&self) -> Option<DiskSource> {
        let source = self.source.clone()?;
        Some(match self.kind() {
            DiskKind::Volume => source,
            _ => DiskSource { pool: None, volume: None, ..source },
        })
    }

    /// From now on it is the file that it is now, and no volume.
    pub fn is_only_its_file(&mut self) {
        let kind = self.kind();
        self.source = self.frozen_source();
        self.kind = self.kind.map(|_| kind);
    }

    /// From now on its writes go to an overlay, and what it was is the layer below. The chain is written down to its end:
    /// where nothing was said to be below, nothing is.
    pub fn stand_on(&mut self, overlay: &std::path::Path, block: bool, format: &str) {
        let (kind, source) = (self.kind(), self.frozen_source());
        let below = BackingStore {
            kind: Some(kind),
            format: self.format().map(|name| StoreFormat {
                name: name.to_owned(),
                metadata_cache: self.driver.as_ref().and_then(|driver| driver.metadata_cache.clone()),
                ..StoreFormat::default()
            }),
            source,
            backing: Some(self.backing.take().unwrap_or_default()),
            ..BackingStore::default()
        };
        self.backing = Some(Box::new(below));
        self.kind = Some(if block { DiskKind::Block } else { DiskKind::File });
        let path = Some(overlay.to_string_lossy().into_owned());
        let (file, dev) = if block { (None, path) } else { (path, None) };
        self.source = Some(DiskSource { file, dev, ..DiskSource::default() });
        let driver = self.driver.get_or_insert_default();
        driver.format = Some(format.to_owned());
        // Other images have no such tables.
        driver.metadata_cache = driver.metadata_cache.take().filter(|_| format == "qcow2");
    }

    /// The image below takes its place, with all that is below that. `false`: nothing that is told is below it.
    pub fn give_way(&mut self) -> bool {
        let Some(below) = self.backing.take_if(|below| below.source.is_some()) else { return false };
        let format = below.format.as_ref().map(|format| format.name.clone());
        let cache = below.format.as_ref().and_then(|format| format.metadata_cache.clone());
        self.kind = below.kind;
        self.source = below.source;
        self.backing = below.backing;
        let driver = self.driver.get_or_insert_default();
        driver.format = format;
        driver.metadata_cache = cache.or(driver.metadata_cache.take());
        true
    }

    /// So many of the layers below it are no more, from that one on; 1 is the first below its own image.
    pub fn lose_layers(&mut self, first: usize, count: usize) {
        let mut place = &mut self.backing;
        for _ in 1..first {
            let Some(store) = place else { return };
            place = &mut store.backing;
        }
        for _ in 0..count {
            let Some(gone) = place.take() else { return };
            *place = gone.backing;
        }
    }

    /// Has it stand on what another disk stands on.
    pub fn take_images_of(&mut self, other: &Disk) {
        (self.kind, self.source, self.backing) = (other.kind, other.source.clone(), other.backing.clone());
        let (format, cache) = other
            .driver
            .as_ref()
            .map(|driver| (driver.format.clone(), driver.metadata_cache.clone()))
            .unwrap_or_default();
        let driver = self.driver.get_or_insert_default();
        (driver.format, driver.metadata_cache) = (format, cache);
    }

    /// Where it leaves open what its volume says of itself, it says what `running` has of the same volume.
    pub(crate) fn take_what_its_volume_gave(&mut self, running: &Disk) {
        if let (Some(source), Some(of)) = (&mut self.source, &running.source) {
            source.take_what_its_volume_gave(of, self.encryption.is_some());
        }
        if self.format().is_none()
            && let Some(format) = running.format()
        {
            self.driver.get_or_insert_default().format = Some(format.to_owned());
        }
        if self.backing.is_none() {
            self.backing.clone_from(&running.backing);
        }
    }

    /// The same of the layers below its own image, as far as they are of the same volumes.
    pub(crate) fn take_what_volumes_below_gave(&mut self, running: &Disk) {
        let mut of = running.backing.as_deref();
        self.each_below(|store| {
            let Some(same) = of else { return };
            if store.volume().is_some() && store.volume() == same.volume() {
                if let (Some(source), Some(of)) = (&mut store.source, &same.source) {
                    source.take_what_its_volume_gave(of, false);
                }
                store.format = store.format.take().or_else(|| same.format.clone());
                store.backing = store.backing.take().or_else(|| same.backing.clone());
            }
            of = same.backing.as_deref();
        });
    }

    /// The image format the document gives.
    pub fn format(&self) -> Option<&str> {
        self.driver.as_ref()?.format.as_deref()
    }

    /// The image format that is meant.
    pub fn meant_format(&self) -> &str {
        self.format().unwrap_or("raw")
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
        /// The thread that does its I/O.
        attr "iothread" => iothread: Option<u32>,
        /// What is read from a layer below is written to the topmost.
        on_off "copy_on_read" => copy_on_read: Option<bool>,
        /// The host's kernel takes notice of requests (virtio).
        on_off "ioeventfd" => ioeventfd: Option<bool>,
        /// Notices only when needed (virtio).
        on_off "event_idx" => event_idx: Option<bool>,
        /// Discarded clusters keep their place in the image.
        on_off "discard_no_unref" => discard_no_unref: Option<bool>,
        /// Number of queues.
        attr "queues" => queues: Option<u32>,
        /// Entries of each queue.
        attr "queue_size" => queue_size: Option<u32>,
        /// `<metadata_cache>`
        child "metadata_cache" => metadata_cache: Option<MetadataCache>,
        /// What virtio devices share.
        flat => virtio: VirtioDriver,
    }
}

element! {
    /// `<metadata_cache>`: of a qcow2 image.
    pub struct MetadataCache {
        /// `<max_size>`
        child "max_size" => max_size: Option<CacheSize>,
    }
}

element! {
    /// `<max_size>`: in bytes, unless it says another unit.
    pub struct CacheSize {
        /// The unit.
        attr "unit" => unit: Option<String>,
        /// The number.
        need_text => number: String,
    }
}

impl MetadataCache {
    /// So much may be held in memory, in bytes.
    pub fn of(bytes: u64) -> MetadataCache {
        let size = CacheSize { unit: Some("bytes".to_owned()), number: bytes.to_string(), ..CacheSize::default() };
        MetadataCache { max_size: Some(size), ..MetadataCache::default() }
    }

    /// How much may be held in memory, in bytes, if that is said and can be.
    pub fn bytes(&self) -> Option<u64> {
        self.max_size.as_ref()?.bytes().ok()
    }
}

impl CacheSize {
    /// In bytes; the error is a sentence.
    pub fn bytes(&self) -> Result<u64, String> {
        let bytes = scaled(&self.number, self.unit.as_deref().unwrap_or("bytes"))?;
        u64::try_from(bytes).map_err(|_| format!("{} is more than can be counted", self.number))
    }
}

choices! {
    /// How a BIOS translates.
    pub enum Translation { Auto = "auto", None = "none", Lba = "lba", }
}

element! {
    /// `<geometry>`
    pub struct Geometry {
        /// Cylinders.
        need "cyls" => cylinders: u32,
        /// Heads.
        need "heads" => heads: u32,
        /// Sectors of a track.
        need "secs" => sectors: u32,
        /// How a BIOS translates.
        attr "trans" => translation: Option<Translation>,
    }
}

element! {
    /// `<blockio>`: sizes in bytes.
    pub struct Blockio {
        /// The smallest that can be addressed.
        attr "logical_block_size" => logical: Option<u32>,
        /// The smallest that is written at once.
        attr "physical_block_size" => physical: Option<u32>,
        /// The smallest that can be discarded.
        attr "discard_granularity" => discard: Option<u32>,
    }
}

element! {
    /// `<iotune>`: how much I/O there may be.
    pub struct Iotune {
        /// Bytes a second.
        leaf "total_bytes_sec" => bytes: Option<u64>,
        /// Of reads.
        leaf "read_bytes_sec" => bytes_read: Option<u64>,
        /// Of writes.
        leaf "write_bytes_sec" => bytes_written: Option<u64>,
        /// Operations a second.
        leaf "total_iops_sec" => ops: Option<u64>,
        /// Of reads.
        leaf "read_iops_sec" => ops_read: Option<u64>,
        /// Of writes.
        leaf "write_iops_sec" => ops_written: Option<u64>,
        /// For a while.
        leaf "total_bytes_sec_max" => bytes_max: Option<u64>,
        /// Of reads.
        leaf "read_bytes_sec_max" => bytes_read_max: Option<u64>,
        /// Of writes.
        leaf "write_bytes_sec_max" => bytes_written_max: Option<u64>,
        /// For a while.
        leaf "total_iops_sec_max" => ops_max: Option<u64>,
        /// Of reads.
        leaf "read_iops_sec_max" => ops_read_max: Option<u64>,
        /// Of writes.
        leaf "write_iops_sec_max" => ops_written_max: Option<u64>,
        /// Larger operations count as several.
        leaf "size_iops_sec" => ops_size: Option<u64>,
        /// Disks of one group share.
        leaf "group_name" => group: Option<String>,
        /// In seconds.
        leaf "total_bytes_sec_max_length" => bytes_max_s: Option<u64>,
        /// Of reads.
        leaf "read_bytes_sec_max_length" => bytes_read_max_s: Option<u64>,
        /// Of writes.
        leaf "write_bytes_sec_max_length" => bytes_written_max_s: Option<u64>,
        /// In seconds.
        leaf "total_iops_sec_max_length" => ops_max_s: Option<u64>,
        /// Of reads.
        leaf "read_iops_sec_max_length" => ops_read_max_s: Option<u64>,
        /// Of writes.
        leaf "write_iops_sec_max_length" => ops_written_max_s: Option<u64>,
    }
}

/// Where a limit stands.
type Limit = fn(&mut Iotune) -> &mut Option<u64>;

/// All limits, with QEMU's and libvirt's words for them.
const LIMITS: [(&str, Limit); 19] = [
    ("bps-total", |tune| &mut tune.bytes),
    ("bps-read", |tune| &mut tune.bytes_read),
    ("bps-write", |tune| &mut tune.bytes_written),
    ("iops-total", |tune| &mut tune.ops),
    ("iops-read", |tune| &mut tune.ops_read),
    ("iops-write", |tune| &mut tune.ops_written),
    ("bps-total-max", |tune| &mut tune.bytes_max),
    ("bps-read-max", |tune| &mut tune.bytes_read_max),
    ("bps-write-max", |tune| &mut tune.bytes_written_max),
    ("iops-total-max", |tune| &mut tune.ops_max),
    ("iops-read-max", |tune| &mut tune.ops_read_max),
    ("iops-write-max", |tune| &mut tune.ops_written_max),
    ("iops-size", |tune| &mut tune.ops_size),
    ("bps-total-max-length", |tune| &mut tune.bytes_max_s),
    ("bps-read-max-length", |tune| &mut tune.bytes_read_max_s),
    ("bps-write-max-length", |tune| &mut tune.bytes_written_max_s),
    ("iops-total-max-length", |tune| &mut tune.ops_max_s),
    ("iops-read-max-length", |tune| &mut tune.ops_read_max_s),
    ("iops-write-max-length", |tune| &mut tune.ops_written_max_s),
];

impl Iotune {
    /// The limits that are said, with QEMU's and libvirt's words for them.
    pub fn limits(&self) -> Vec<(&'static str, u64)> {
        self.all_limits().into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// All limits, whether they are said or not.
    pub fn all_limits(&self) -> Vec<(&'static str, Option<u64>)> {
        let mut own = self.clone();
        LIMITS.iter().map(|(name, field)| (*name, *field(&mut own))).collect()
    }

    /// Has `value` say each limit, by its word.
    pub fn set_limits(&mut self, mut value: impl FnMut(&'static str, Option<u64>) -> Option<u64>) {
        LIMITS.iter().for_each(|(name, field)| *field(self) = value(name, *field(self)));
    }

    /// Makes its limits those of another; which group it is in stays.
    pub fn copy_limits(&mut self, other: &Iotune) {
        let group = self.group.take();
        *self = Iotune { group, ..other.clone() };
    }
}

element! {
    /// `<transient>`
    pub struct Transient {}
}

element! {
    /// `<throttlegroups>`: limits that several disks share.
    pub struct ThrottleGroups {
        /// Each `<throttlegroup>`; its `group_name` is what it is known by.
        children "throttlegroup" => groups: Vec<Iotune>,
    }
}

element! {
    /// `<throttlefilters>`
    pub struct ThrottleFilters {
        /// Each `<throttlefilter>`; requests pass the first one first.
        children "throttlefilter" => filters: Vec<ThrottleFilter>,
    }
}

element! {
    /// `<throttlefilter>`
    pub struct ThrottleFilter {
        /// The group whose limits hold.
        need "group" => group: String,
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

/// One of the layers of a disk.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Its file or block device; `None` if it is on a server, or there is none.
    pub path: Option<&'a str>,
    /// The volume that it is: pool and name, wherever that is.
    pub volume: Option<(&'a str, &'a str)>,
    /// The image format the document gives.
    pub format: Option<&'a str>,
    /// What it stands on.
    pub below: Option<&'a BackingStore>,
    /// Where the document says so.
    pub at: &'a Place,
}

impl BackingStore {
    /// Where the content comes from. A volume is the file or device that it is, once it is known where.
    pub fn kind(&self) -> DiskKind {
        let kind = self.kind.unwrap_or_default();
        self.source.as_ref().map_or(kind, |source| source.opened_as(kind))
    }

    /// The volume that it is: pool and name, wherever that is.
    pub fn volume(&self) -> Option<(&str, &str)> {
        self.source.as_ref()?.volume_of(self.kind)
    }

    /// The file or block device, if it is one.
    pub fn path(&self) -> Option<&str> {
        self.source.as_ref()?.path(self.kind())
    }

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
        /// `<metadata_cache>`
        child "metadata_cache" => metadata_cache: Option<MetadataCache>,
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
        /// Writes can be told to reach the medium before they are done (SCSI).
        on_off "dpofua" => dpofua: Option<bool>,
    }
}
