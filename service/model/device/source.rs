//! Where a disk's content comes from: a file, a device, a server; with what it takes to be let in.

use crate::domain::part::element;
use crate::domain::value::choices;

choices! {
    /// Where the content comes from.
    pub enum DiskKind {
        File = "file", Block = "block", Dir = "dir", Network = "network", Volume = "volume", Nvme = "nvme",
        VhostUser = "vhostuser", VhostVdpa = "vhostvdpa",
    }
}

choices! {
    /// What to do at start when the source is missing.
    pub enum StartupPolicy { Mandatory = "mandatory", Requisite = "requisite", Optional = "optional", }
}

choices! {
    /// What a server speaks.
    pub enum Protocol {
        Nbd = "nbd", Rbd = "rbd", Sheepdog = "sheepdog", Gluster = "gluster", Iscsi = "iscsi", Http = "http",
        Https = "https", Ftp = "ftp", Ftps = "ftps", Tftp = "tftp", Vxhs = "vxhs", Ssh = "ssh", Nfs = "nfs",
    }
}

element! {
    /// `<disk><source>`
    pub struct DiskSource {
        /// For `type='file'`.
        attr "file" => file: Option<String>,
        /// Runtime: under what the hypervisor has an image that a client has given by descriptor. The path is for people then.
        attr "fdgroup" => given: Option<String>,
        /// For `type='block'`.
        attr "dev" => dev: Option<String>,
        /// For `type='volume'`: the storage pool. Where the volume is, `file` or `dev` says while the guest runs.
        attr "pool" => pool: Option<String>,
        /// For `type='volume'`: its name there.
        attr "volume" => volume: Option<String>,
        /// For `type='network'`: what the server speaks.
        attr "protocol" => protocol: Option<Protocol>,
        /// For `type='network'`: what is asked of the server.
        attr "name" => name: Option<String>,
        /// Of http and the like: follows the name after `?`.
        attr "query" => query: Option<String>,
        /// Encrypted on its way.
        yes_no "tls" => tls: Option<bool>,
        /// Whom the server's certificate must name, if not the host.
        attr "tlsHostname" => tls_hostname: Option<String>,
        /// When it is missing.
        attr "startupPolicy" => startup_policy: Option<StartupPolicy>,
        /// Runtime: number of the layer in the chain.
        attr "index" => index: Option<u32>,
        /// `<host>`: the servers.
        children "host" => hosts: Vec<SourceHost>,
        /// `<snapshot>`: of that name on the server.
        child "snapshot" => snapshot: Option<Named>,
        /// `<config>`: of ceph.
        child "config" => config: Option<SourceConfig>,
        /// `<auth>`
        child "auth" => auth: Option<Auth>,
        /// `<initiator>`: of iSCSI.
        child "initiator" => initiator: Option<Initiator>,
        /// `<encryption>`
        child "encryption" => encryption: Option<Encryption>,
        /// `<ssl>`
        child "ssl" => ssl: Option<Ssl>,
        /// `<cookies>`
        child "cookies" => cookies: Option<Cookies>,
        /// `<readahead>`
        child "readahead" => readahead: Option<Readahead>,
        /// `<timeout>`
        child "timeout" => timeout: Option<Timeout>,
        /// `<reconnect>`
        child "reconnect" => reconnect: Option<SourceReconnect>,
        /// `<identity>`: of ssh.
        child "identity" => identity: Option<Identity>,
    }
}

impl DiskSource {
    /// The path on the host; `None` of what was given by descriptor, whatever is shown as its path.
    pub fn path(&self, kind: DiskKind) -> Option<&str> {
        if self.given.is_some() {
            return None;
        }
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
        let any = named(&self.file) || named(&self.dev) || named(&self.pool) || named(&self.volume);
        !any && self.protocol.is_none() && self.rest.is_empty()
    }

    /// Of `type='volume'`: the pool, and the volume's name there.
    pub fn volume(&self) -> Option<(&str, &str)> {
        self.pool.as_deref().zip(self.volume.as_deref())
    }

    /// The volume that it is as a source of that kind.
    pub(super) fn volume_of(&self, kind: Option<DiskKind>) -> Option<(&str, &str)> {
        self.volume().filter(|_| kind == Some(DiskKind::Volume))
    }

    /// It does not say where the volume is that it is.
    pub fn forget_place(&mut self) {
        (self.file, self.dev) = (None, None);
    }

    /// Where it leaves open what its volume says of itself, it says what `running` has of the same volume.
    pub(super) fn take_what_its_volume_gave(&mut self, running: &DiskSource, is_encrypted: bool) {
        (self.file, self.dev) = (running.file.clone(), running.dev.clone());
        if !is_encrypted && self.encryption.is_none() {
            self.encryption.clone_from(&running.encryption);
        }
    }

    /// What it is once it is known where the volume is.
    fn kind_of_volume(&self) -> DiskKind {
        match (&self.file, &self.dev) {
            (Some(_), _) => DiskKind::File,
            (None, Some(_)) => DiskKind::Block,
            (None, None) => DiskKind::Volume,
        }
    }

    /// Where the content comes from; of a volume, what that is, once it is known where it is.
    pub(super) fn opened_as(&self, kind: DiskKind) -> DiskKind {
        if kind == DiskKind::Volume { self.kind_of_volume() } else { kind }
    }
}

choices! {
    /// How a server is reached.
    pub enum Transport { Tcp = "tcp", Unix = "unix", Rdma = "rdma", }
}

element! {
    /// `<source><host>`
    pub struct SourceHost {
        /// Its name or address.
        attr "name" => name: Option<String>,
        /// Its port; the protocol's usual one if absent.
        attr "port" => port: Option<u16>,
        /// How it is reached.
        attr "transport" => transport: Option<Transport>,
        /// Of `unix`: the socket.
        attr "socket" => socket: Option<String>,
    }
}

element! {
    /// An element with a name.
    pub struct Named {
        /// The name.
        need "name" => name: String,
    }
}

element! {
    /// `<source><config>`
    pub struct SourceConfig {
        /// The file.
        need "file" => file: String,
    }
}

choices! {
    /// What a secret is.
    pub enum SecretKind { Ceph = "ceph", Iscsi = "iscsi", Passphrase = "passphrase", Volume = "volume", }
}

element! {
    /// `<secret>`: names one that is kept elsewhere.
    pub struct SecretRef {
        /// What it is.
        attr "type" => kind: Option<SecretKind>,
        /// By its uuid.
        attr "uuid" => uuid: Option<uuid::Uuid>,
        /// By what it is for.
        attr "usage" => usage: Option<String>,
    }
}

element! {
    /// `<auth>`
    pub struct Auth {
        /// Who asks.
        need "username" => username: String,
        /// How it is proved.
        child "secret" => secret: Option<SecretRef>,
    }
}

element! {
    /// `<source><initiator>`
    pub struct Initiator {
        /// `<iqn>`
        must "iqn" => iqn: Named,
    }
}

choices! {
    /// How content is encrypted.
    pub enum EncryptionFormat { Default = "default", Qcow = "qcow", Luks = "luks", Luks2 = "luks2", LuksAny = "luks-any", }
}

element! {
    /// `<encryption>`
    pub struct Encryption {
        /// How.
        need "format" => format: EncryptionFormat,
        /// Who does it; `qemu` if absent.
        attr "engine" => engine: Option<String>,
        /// `<secret>`
        children "secret" => secrets: Vec<SecretRef>,
    }
}

element! {
    /// `<source><ssl>`
    pub struct Ssl {
        /// The server must prove who it is.
        yes_no "verify" => verify: Option<bool>,
    }
}

element! {
    /// `<source><cookies>`
    pub struct Cookies {
        /// Each.
        children "cookie" => cookies: Vec<Cookie>,
    }
}

element! {
    /// `<cookie>`
    pub struct Cookie {
        /// Its name.
        need "name" => name: String,
        /// Its value.
        text => value: Option<String>,
    }
}

element! {
    /// `<source><readahead>`
    pub struct Readahead {
        /// In bytes.
        need "size" => size: u64,
    }
}

element! {
    /// `<source><timeout>`
    pub struct Timeout {
        /// How long the server may take.
        need "seconds" => seconds: u32,
    }
}

element! {
    /// `<source><reconnect>`
    pub struct SourceReconnect {
        /// For how many seconds a connection is sought again.
        attr "delay" => delay: Option<u32>,
    }
}

element! {
    /// `<source><identity>`
    pub struct Identity {
        /// Who logs in.
        attr "username" => username: Option<String>,
    }
}
