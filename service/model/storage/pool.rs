//! `<pool>`: where volumes are, and how one comes to them.

use super::Bytes;
use super::volume::VolumeKind;
use super::{FormatDoc, PathDoc, Permissions, check, read_part, read_root, unless_found, write_root};
use crate::device::source::{Initiator, SecretRef};
use crate::domain::part::element;
use crate::domain::value::choices;
use crate::xml::{self, Finding, Limits};
use uuid::Uuid;

element! {
    /// A pool's configuration.
    pub struct PoolDef {
        /// `<pool type=…>`
        need "type" => kind: PoolKind,
        /// `<name>`
        own "name" => name: String,
        /// `<uuid>`, made up when the document has none.
        own "uuid" => uuid: Uuid,
        /// `<capacity>`: read and forgotten, and shown of a pool that is active.
        child "capacity" => capacity: Option<Bytes>,
        /// `<allocation>`, likewise.
        child "allocation" => allocation: Option<Bytes>,
        /// `<available>`, likewise.
        child "available" => available: Option<Bytes>,
        /// `<features>`
        child "features" => features: Option<PoolFeatures>,
        /// `<source>`
        child "source" => source: Option<PoolSource>,
        /// `<target>`
        child "target" => target: Option<PoolTarget>,
    }
}

choices! {
    /// What kind of storage it is.
    pub enum PoolKind {
        Dir = "dir",
        Fs = "fs",
        Netfs = "netfs",
        Logical = "logical",
        Disk = "disk",
        Iscsi = "iscsi",
        IscsiDirect = "iscsi-direct",
        Scsi = "scsi",
        Mpath = "mpath",
        Rbd = "rbd",
        Sheepdog = "sheepdog",
        Gluster = "gluster",
        Zfs = "zfs",
        Vstorage = "vstorage",
    }
}

impl PoolKind {
    /// What the volumes of such a pool are.
    pub fn volume_kind(self) -> VolumeKind {
        match self {
            PoolKind::Dir | PoolKind::Fs | PoolKind::Netfs | PoolKind::Vstorage => VolumeKind::File,
            PoolKind::Logical | PoolKind::Disk | PoolKind::Iscsi | PoolKind::Scsi | PoolKind::Mpath | PoolKind::Zfs => {
                VolumeKind::Block
            }
            PoolKind::IscsiDirect | PoolKind::Rbd | PoolKind::Sheepdog | PoolKind::Gluster => VolumeKind::Network,
        }
    }

    /// Whether its volumes go from the host when the pool is stopped: it is mounted, or activated, until then.
    pub fn is_attached(self) -> bool {
        matches!(self, PoolKind::Fs | PoolKind::Netfs | PoolKind::Logical)
    }
}

element! {
    /// `<features>`
    pub struct PoolFeatures {
        /// `<cow>`
        child "cow" => cow: Option<Cow>,
    }
}

element! {
    /// `<cow>`: whether its file system may lay what is overwritten elsewhere.
    pub struct Cow {
        /// Whether.
        yes_no "state" => state: Option<bool>,
    }
}

element! {
    /// `<source>`: where the storage comes from.
    pub struct PoolSource {
        /// `<host>`: servers.
        children "host" => hosts: Vec<PoolHost>,
        /// `<device>`: devices of this host, or what a server calls one.
        children "device" => devices: Vec<PoolDevice>,
        /// `<dir>`: a folder of a server's.
        child "dir" => dir: Option<PathDoc>,
        /// `<adapter>`
        child "adapter" => adapter: Option<PoolAdapter>,
        /// `<name>`: what it is called there; as the pool if absent.
        leaf "name" => name: Option<String>,
        /// `<initiator>`: as whom we come.
        child "initiator" => initiator: Option<Initiator>,
        /// `<format>`
        child "format" => format: Option<FormatDoc>,
        /// `<protocol>`
        child "protocol" => protocol: Option<PoolProtocol>,
        /// `<auth>`
        child "auth" => auth: Option<PoolAuth>,
    }
}

element! {
    /// `<host>`
    pub struct PoolHost {
        /// Its name or address.
        need "name" => name: String,
        /// Its port.
        attr "port" => port: Option<u16>,
    }
}

element! {
    /// `<device>`
    pub struct PoolDevice {
        /// Where it is.
        need "path" => path: String,
        /// Whether the names of its partitions have a `p`.
        yes_no "part_separator" => part_separator: Option<bool>,
    }
}

element! {
    /// `<adapter>`
    pub struct PoolAdapter {
        /// What it is; `scsi_host` if absent.
        attr "type" => kind: Option<String>,
        /// Its name.
        attr "name" => name: Option<String>,
        /// Of Fibre Channel: its node.
        attr "wwnn" => wwnn: Option<String>,
        /// Of Fibre Channel: its port.
        attr "wwpn" => wwpn: Option<String>,
    }
}

element! {
    /// `<protocol>`
    pub struct PoolProtocol {
        /// Which version of it is spoken.
        need "ver" => version: String,
    }
}

element! {
    /// `<auth>`
    pub struct PoolAuth {
        /// How: `chap`, `ceph`.
        need "type" => kind: String,
        /// Who asks.
        need "username" => username: String,
        /// How it is proved.
        child "secret" => secret: Option<SecretRef>,
    }
}

element! {
    /// `<target>`: where it is on this host.
    pub struct PoolTarget {
        /// The folder.
        leaf "path" => path: Option<String>,
        /// Whose it is made.
        child "permissions" => permissions: Option<Permissions>,
    }
}

impl PoolDef {
    /// Reads a document; everything wrong is reported at once.
    pub fn parse(text: &str) -> Result<PoolDef, Vec<Finding>> {
        PoolDef::parse_within(text, Limits::ACCEPTED)
    }

    /// The same with other limits: [`Limits::STORED`] for one of our own files.
    pub fn parse_within(text: &str, limits: Limits) -> Result<PoolDef, Vec<Finding>> {
        let mut log = Vec::new();
        let mut def: PoolDef = read_root(text, "pool", limits, &mut log)?;
        (def.capacity, def.allocation, def.available) = (None, None, None);
        if def.uuid.is_nil() {
            def.uuid = Uuid::new_v4();
        }
        check::check_pool(&def, &mut log);
        unless_found(def, log)
    }

    /// Its text, which is known to be read again.
    pub fn write_readable(&self, limits: Limits) -> Result<String, String> {
        let text = self.write();
        PoolDef::parse_within(&text, limits).map(|_| text).map_err(|findings| xml::unreadable(&findings))
    }

    /// Writes it, in libvirt's order and layout.
    pub fn write(&self) -> String {
        write_root(self, "pool")
    }

    /// A copy that says how much room there is.
    pub fn with_room(&self, capacity: u64, allocation: u64, available: u64) -> PoolDef {
        let bytes = |bytes| Some(Bytes(bytes));
        let (capacity, allocation, available) = (bytes(capacity), bytes(allocation), bytes(available));
        PoolDef { capacity, allocation, available, ..self.clone() }
    }

    /// Where its volumes are on this host, if it has such a place.
    pub fn target_path(&self) -> Option<String> {
        let said = self.target.as_ref().and_then(|target| target.path.as_deref()).map(str::trim);
        match (said.filter(|path| !path.is_empty()), self.kind) {
            (Some(path), _) => Some(normal(path)),
            (None, PoolKind::Logical) => Some(format!("/dev/{}", self.source_name())),
            (None, PoolKind::Disk) => Some("/dev".to_owned()),
            (None, PoolKind::Mpath) => Some("/dev/mapper".to_owned()),
            (None, _) => None,
        }
    }

    /// The devices that its document names.
    pub fn named_devices(&self) -> impl Iterator<Item = &str> {
        self.source.iter().flat_map(|source| &source.devices).map(|device| &*device.path)
    }

    /// The device whose file system is mounted for it, if that is what it is.
    pub fn mounted_device(&self) -> Option<&str> {
        let source = self.source.as_ref().filter(|_| self.kind == PoolKind::Fs)?;
        source.devices.first().map(|device| &*device.path)
    }

    /// What is mounted for it, as the kernel's table of mounts is told, if anything is: a device, or a server's folder.
    pub fn mounted_source(&self) -> Option<String> {
        if self.kind != PoolKind::Netfs {
            return self.mounted_device().map(str::to_owned);
        }
        let source = self.source.as_ref()?;
        let (host, dir) = (&*source.hosts.first()?.name, &*source.dir.as_ref()?.path);
        Some(match source.format.as_ref().is_some_and(|format| format.kind == "cifs") {
            true => format!("//{host}/{}", dir.trim_matches('/')),
            // The colons of an address are none before a path.
            false if host.contains(':') && !host.starts_with('[') => format!("[{host}]:{dir}"),
            false => format!("{host}:{dir}"),
        })
    }

    /// The secret that proves who comes to its server, if it names one by its uuid.
    pub fn secret(&self) -> Option<Uuid> {
        self.source.as_ref()?.auth.as_ref()?.secret.as_ref()?.uuid
    }

    /// What it is called where it comes from.
    pub fn source_name(&self) -> &str {
        self.source.as_ref().and_then(|source| source.name.as_deref()).unwrap_or(&self.name)
    }
}

impl PoolSource {
    /// Reads a document that is a source alone, as a search for sources may be given one.
    pub fn parse(text: &str) -> Result<PoolSource, Vec<Finding>> {
        let mut log = Vec::new();
        let source = read_part(text, "source", "pool", &mut log)?;
        unless_found(source, log)
    }
}

/// A path without slashes that say nothing.
fn normal(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    format!("/{}", parts.join("/"))
}
