//! Which kinds of objects there are, how one names another, and who uses whom. Texts name an object as it is said here.

use std::fmt;
use std::sync::Arc;
use uuid::Uuid;

macro_rules! kinds {
    ($($(#[$meta:meta])* $name:ident = $word:literal, $shown:literal, $detail:literal;)+) => {
        /// A kind of object that permissions are asked for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ObjectKind { $($(#[$meta])* $name,)+ }

        impl ObjectKind {
            /// The word for one of them in errors and the log.
            pub fn word(self) -> &'static str {
                match self { $(ObjectKind::$name => $word,)+ }
            }

            /// The words for one of them where a person is asked for a password.
            pub fn shown(self) -> &'static str {
                match self { $(ObjectKind::$name => $shown,)+ }
            }

            /// The detail by which a person is told which one it is.
            pub fn detail(self) -> &'static str {
                match self { $(ObjectKind::$name => $detail,)+ }
            }
        }
    };
}

kinds! {
    /// A virtual machine, with its snapshots and checkpoints.
    Domain = "domain", "virtual machine", "domain_name";
    /// A virtual network.
    Network = "network", "network", "network_name";
    /// A storage pool.
    Pool = "pool", "storage pool", "pool_name";
    /// A volume of a storage pool.
    Volume = "volume", "storage volume", "volume_name";
    /// A secret.
    Secret = "secret", "secret", "secret_uuid";
    /// A device of the host.
    NodeDevice = "node device", "host device", "device_name";
    /// A host of another hypervisor.
    Host = "host", "host", "host";
}

impl ObjectKind {
    /// One of them by its name, as errors say it: `network 'lan'`.
    pub fn named(self, name: &str) -> String {
        format!("{} '{name}'", self.word())
    }
}

/// Names an object: what a job works on, or who uses another. `interfaces/objects/paths.rs` makes a path of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectRef {
    /// None of virtd's.
    Foreign,
    /// A domain.
    Domain(Uuid),
    /// A snapshot of a domain, by its name.
    Snapshot(Uuid, Arc<str>),
    /// A network.
    Network(Uuid),
    /// A storage pool.
    Pool(Uuid),
    /// A volume of a pool, by its name.
    Volume(Uuid, Arc<str>),
    /// A secret.
    Secret(Uuid),
    /// A device of the host, by its name.
    NodeDevice(Arc<str>),
    /// A host of another hypervisor, by its name.
    Host(Arc<str>),
}

impl ObjectRef {
    /// The uuid in it, if there is one: of a snapshot that of its domain, of a volume that of its pool.
    pub fn uuid(&self) -> Option<Uuid> {
        match self {
            ObjectRef::Domain(uuid)
            | ObjectRef::Snapshot(uuid, _)
            | ObjectRef::Network(uuid)
            | ObjectRef::Pool(uuid)
            | ObjectRef::Volume(uuid, _)
            | ObjectRef::Secret(uuid) => Some(*uuid),
            ObjectRef::Foreign | ObjectRef::NodeDevice(_) | ObjectRef::Host(_) => None,
        }
    }

    /// The domain, if it is one.
    pub fn domain(&self) -> Option<Uuid> {
        if let ObjectRef::Domain(uuid) = self { Some(*uuid) } else { None }
    }
}

/// Who needs an object as it is, and where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct User {
    /// Who.
    pub object: ObjectRef,
    /// Where in it: a disk's target, a MAC address, or nothing.
    pub place: String,
    /// How.
    pub how: Usage,
}

/// How an object is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Usage {
    /// By what runs.
    Live,
    /// By a stored configuration.
    Config,
    /// By what a snapshot would bring back.
    Snapshot,
    /// By a volume that stands on it.
    Backing,
    /// By a process that is none of virtd's.
    Foreign,
}

impl Usage {
    /// The word on the bus.
    pub fn as_str(self) -> &'static str {
        match self {
            Usage::Live => "live",
            Usage::Config => "config",
            Usage::Snapshot => "snapshot",
            Usage::Backing => "backing",
            Usage::Foreign => "foreign",
        }
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
