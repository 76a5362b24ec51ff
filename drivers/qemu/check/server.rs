//! Disks on servers, encrypted disks, limits and shapes of disks.

use super::Check;
use crate::host::secret::file_of;
use crate::qemu::capabilities::End;
use std::collections::{BTreeMap, BTreeSet};
use virt_model::device::Disk;
use virt_model::device::disk::{DiskBus, DiskDevice};
use virt_model::device::source::{
    DiskSource, Encryption, EncryptionFormat, Protocol, SecretRef, SourceHost, Transport,
};
use virt_model::secret::{SecretName, UsageKind};
use virt_model::xml::Place;

/// The longest name of a file.
const LONGEST_NAME: usize = 255;

impl Check<'_> {
    /// A source on a server.
    pub(super) fn server(&mut self, source: &DiskSource) {
        let place = &source.at;
        let Some(protocol) = source.protocol else {
            return self.refuse(place, "a disk of type='network' needs a <source> with a protocol");
        };
        use Protocol::{Ftp, Ftps, Gluster, Http, Https, Iscsi, Nbd, Rbd, Ssh};
        let module = match protocol {
            Nbd => None,
            Rbd => Some("block-rbd"),
            Iscsi => Some("block-iscsi"),
            Ssh => Some("block-ssh"),
            Gluster => Some("block-gluster"),
            Http | Https | Ftp | Ftps => Some("block-curl"),
            _ => {
                let known = "nbd, rbd, iscsi, ssh, gluster, http, https, ftp and ftps are";
                return self
                    .refuse(&place.attribute("protocol"), format!("protocol='{protocol}' is not supported: {known}"));
            }
        };
        if let Some(module) = module.filter(|module| self.caps.site.lacks_module(module)) {
            let how = format!("this QEMU has no {module}; install its modules (Debian: qemu-block-extra)");
            self.refuse(&place.attribute("protocol"), how);
        }
        self.server_parts(source, protocol);
        self.hosts(source, protocol);
    }

    fn server_parts(&mut self, source: &DiskSource, protocol: Protocol) {
        use Protocol::{Ftp, Ftps, Gluster, Http, Https, Iscsi, Nbd, Rbd, Ssh};
        let place = &source.at;
        let web = matches!(protocol, Http | Https | Ftp | Ftps);
        let mut only = |there: bool, fits: bool, what: &str| {
            let how = format!("{what} is not for protocol='{protocol}'");
            self.refuse_if(there && !fits, place, &how);
        };
        only(source.query.is_some(), web, "a query");
        only(source.cookies.is_some(), matches!(protocol, Http | Https), "<cookies>");
        only(source.ssl.is_some(), matches!(protocol, Https | Ftps), "<ssl>");
        only(source.readahead.is_some() || source.timeout.is_some(), web, "<readahead> or <timeout>");
        only(source.initiator.is_some(), protocol == Iscsi, "<initiator>");
        only(source.snapshot.is_some() || source.config.is_some(), protocol == Rbd, "<snapshot> or <config>");
        only(source.reconnect.is_some(), protocol == Nbd, "<reconnect>");
        only(source.identity.is_some(), protocol == Ssh, "<identity>");
        only(source.auth.is_some(), web || matches!(protocol, Rbd | Iscsi), "<auth>");
        let tls = source.tls == Some(true);
        if tls && protocol == Nbd {
            self.certified(End::Client, &place.attribute("tls"));
        }
        let other = tls && !matches!(protocol, Nbd | Https | Ftps);
        let how = format!("QEMU does not speak TLS with protocol='{protocol}': tunnel it, or use nbd or https");
        self.refuse_if(other, &place.attribute("tls"), &how);
        let named = source.tls_hostname.is_some() && !(tls && protocol == Nbd);
        self.refuse_if(named, &place.attribute("tlsHostname"), "tlsHostname is for protocol='nbd' with tls='yes'");
        let name = source.name.as_deref().unwrap_or_default();
        let halves = matches!(protocol, Rbd | Gluster) && !name.contains('/');
        self.refuse_if(halves, &place.attribute("name"), "the name is pool/image, or volume/path");
        let lun = name.rsplit_once('/').is_some_and(|(_, lun)| lun.parse::<u32>().is_err());
        self.refuse_if(protocol == Iscsi && lun, &place.attribute("name"), "what follows '/' is the number of the LUN");
        let nameless = name.is_empty() && protocol != Nbd;
        self.refuse_if(nameless, place, "<source> needs a name");
        if let Some(auth) = &source.auth {
            match &auth.secret {
                Some(secret) => self.secret(secret),
                None => self.refuse(&auth.at, "<auth> needs a <secret> with a uuid or a usage"),
            }
        }
    }

    fn hosts(&mut self, source: &DiskSource, protocol: Protocol) {
        let many = matches!(protocol, Protocol::Rbd | Protocol::Gluster);
        let count = source.hosts.len();
        self.refuse_if(count > 1 && !many, &source.at, "one <host> is enough for this protocol");
        self.refuse_if(count == 0 && protocol != Protocol::Rbd, &source.at, "<source> needs a <host>");
        for host in &source.hosts {
            self.host(host, protocol);
        }
    }

    fn host(&mut self, host: &SourceHost, protocol: Protocol) {
        let unix = host.transport == Some(Transport::Unix);
        let fits = matches!(protocol, Protocol::Nbd | Protocol::Gluster);
        self.refuse_if(unix && !fits, &host.at.attribute("transport"), "a Unix socket is for nbd and gluster");
        let rdma = host.transport == Some(Transport::Rdma);
        self.refuse_if(rdma, &host.at.attribute("transport"), "transport='rdma' is not supported");
        let socket = host.socket.as_deref().is_some_and(|path| path.starts_with('/'));
        self.refuse_if(unix && !socket, &host.at, "a Unix socket needs the path of its socket");
        self.refuse_if(!unix && host.name.is_none(), &host.at, "<host> needs a name");
    }

    fn secret(&mut self, secret: &SecretRef) {
        let name = SecretName::of(secret, UsageKind::Volume).map(|name| file_of(&name));
        let odd = name.as_ref().is_some_and(|name| name.is_empty() || name.len() > LONGEST_NAME);
        let how = "a secret is named by its uuid, or by a usage that makes a file's name of at most 255 bytes";
        self.refuse_if(name.is_none() || odd, &secret.at, how);
        let both = secret.uuid.is_some() && secret.usage.is_some();
        self.refuse_if(both, &secret.at, "a secret is named by its uuid or by its usage, not by both");
    }

    pub(super) fn encryption(&mut self, encryption: Option<&Encryption>, format: &str) {
        let Some(encryption) = encryption else { return };
        let place = &encryption.at;
        let luks = encryption.format == EncryptionFormat::Luks;
        let how = "QEMU opens format='luks'; convert older images with qemu-img";
        self.refuse_if(!luks, &place.attribute("format"), how);
        let engine = encryption.engine.as_deref().is_some_and(|engine| engine != "qemu");
        self.refuse_if(engine, &place.attribute("engine"), "QEMU itself decrypts: engine='qemu'");
        let holds = matches!(format, "raw" | "qcow2");
        self.refuse_if(!holds, place, "images of format raw and qcow2 can be encrypted");
        match encryption.secrets.as_slice() {
            [secret] => self.secret(secret),
            _ => self.refuse(place, "<encryption> needs one <secret> with a uuid or a usage"),
        }
    }

    /// Disks that share a group have the same limits.
    pub(super) fn throttling(&mut self) {
        let mut groups = BTreeMap::new();
        let def = self.def;
        let shared = def.throttle_groups.iter().flat_map(|groups| &groups.groups);
        for group in shared.clone() {
            self.refuse_if(group.group.is_none(), &group.at, "a <throttlegroup> needs a <group_name>");
        }
        let names: BTreeSet<&String> = shared.clone().filter_map(|group| group.group.as_ref()).collect();
        for filter in def.devices.disks.iter().filter_map(|disk| disk.throttle_filters.as_ref()) {
            for filter in &filter.filters {
                let lost = !names.contains(&filter.group);
                self.refuse_if(lost, &filter.at.attribute("group"), "there is no <throttlegroup> of this name");
            }
        }
        for tune in shared.chain(def.devices.disks.iter().filter_map(|disk| disk.iotune.as_ref())) {
            let limits = tune.limits();
            let Some(group) = &tune.group else { continue };
            let word = group.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
            self.refuse_if(
                !word || group.is_empty(),
                &tune.at,
                "a group's name is made of letters, digits, '-', '_' and '.'",
            );
            let first = groups.entry(group).or_insert_with(|| limits.clone());
            self.refuse_if(*first != limits, &tune.at, "disks of one group share their limits: say the same for each");
        }
    }

    pub(super) fn shape(&mut self, disk: &Disk, bus: DiskBus) {
        let scsi = bus == DiskBus::Scsi;
        let named = disk.vendor.is_some() || disk.product.is_some();
        self.refuse_if(named && !scsi, &disk.at, "only scsi disks have a vendor and a product");
        let long =
            disk.vendor.as_ref().is_some_and(|v| v.len() > 8) || disk.product.as_ref().is_some_and(|p| p.len() > 16);
        self.refuse_if(long, &disk.at, "a vendor has at most 8 characters, a product 16");
        let hard = disk.device() == DiskDevice::Disk;
        if let Some(shape) = &disk.geometry {
            let fits = hard && matches!(bus, DiskBus::Virtio | DiskBus::Ide | DiskBus::Sata | DiskBus::Scsi);
            self.refuse_if(!fits, &shape.at, "a geometry is for disks on virtio, ide, sata and scsi");
            let chs = shape.translation.is_some() && !matches!(bus, DiskBus::Ide | DiskBus::Sata);
            self.refuse_if(chs, &shape.at.attribute("trans"), "a translation is for disks on ide and sata");
        }
        if let Some(io) = &disk.blockio {
            for (name, size) in [("logical_block_size", io.logical), ("physical_block_size", io.physical)] {
                let odd = size.is_some_and(|n| !n.is_power_of_two() || !(512..=2 << 20).contains(&n));
                self.refuse_if(odd, &io.at.attribute(name), "a size of blocks is a power of two from 512 to 2097152");
            }
        }
    }

    pub(super) fn io_thread(&mut self, number: Option<u32>, place: &Place) {
        let Some(number) = number else { return };
        let there = self.def.iothread_numbers().contains(&number);
        let how = format!("there is no I/O thread {number}: <iothreads> or <iothreadids> make them");
        self.refuse_if(!there, &place.attribute("iothread"), &how);
    }
}
