//! All that is published of each kind of object, at one moment: what the service tells, and the bus shows.

use crate::error::Error;
use crate::object::{ObjectRef, User};
use crate::shown::Shown;
use crate::shown::text::published;
use crate::uses::{Need, needs_of};
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::domain::abi::AbiDifference;
use virt_model::driver::storage::Room;
use virt_model::nodedev::{DeviceWish, NodeDevice};
use virt_model::state::{DomainState, StateReason};

/// All that is published of a domain, at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct DomainFacts {
    /// Name; unique on this host.
    pub name: String,
    /// Identity, for ever.
    pub uuid: Uuid,
    /// Of the running guest; 0 when inactive.
    pub id: u32,
    /// The driver's name.
    pub driver: &'static str,
    /// The host that keeps it; empty of our own.
    pub host: Arc<str>,
    /// That host answers; always so of our own.
    pub reachable: bool,
    /// What it does; unknown while its host does not answer.
    pub state: DomainState,
    /// Why.
    pub reason: StateReason,
    /// Since when: microseconds since the epoch.
    pub since_usec: u64,
    /// It has a guest, or had one when its host was last seen.
    pub active: bool,
    /// Has a stored configuration.
    pub persistent: bool,
    /// Starts with the host.
    pub autostart: bool,
    /// Of what runs while active.
    pub config: Arc<ConfigFacts>,
    /// Of what is stored, where that is not `config`.
    pub stored: Option<Arc<ConfigFacts>>,
    /// A managed save image exists.
    pub has_managed_save: bool,
    /// An agent has its port open inside the guest.
    pub agent_connected: bool,
    /// Which channels of what runs are open inside the guest, by their numbers from 0.
    pub open_channels: Box<[usize]>,
    /// The members that its driver cannot do.
    pub lacks: &'static [&'static str],
    /// What the stored configuration says otherwise than what runs.
    pub pending: Arc<[AbiDifference]>,
    /// Name of the current snapshot.
    pub current_snapshot: Option<String>,
    /// Number of snapshots.
    pub snapshot_count: u32,
    /// The names of all snapshots, in the order in which they are listed.
    pub snapshots: Arc<[String]>,
    /// The uid that defined it.
    pub owner: u32,
    /// Empty, or why its files cannot be used.
    pub broken: String,
}

/// All that is published of a configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConfigFacts {
    /// As much of it as is published.
    pub title: Box<str>,
    /// As much of it as is published.
    pub description: Box<str>,
    /// `hvm` and the like.
    pub os_type: Box<str>,
    /// Present.
    pub vcpus: u32,
    /// Possible.
    pub maximum_vcpus: u32,
    /// Bytes.
    pub memory: u64,
    /// Bytes.
    pub maximum_memory: u64,
    /// What is shown of its devices.
    pub shown: Shown,
    /// What it needs of other objects; shown where they are.
    pub needs: Box<[Need]>,
    /// The devices of the host that it wants.
    pub wishes: Box<[DeviceWish]>,
}

impl DomainFacts {
    /// Whether it is made of other things than it was, or runs or is stored otherwise.
    pub(crate) fn is_made_otherwise(&self, before: &DomainFacts) -> bool {
        let stored = |facts: &DomainFacts| facts.stored.as_ref().map(Arc::as_ptr);
        let now = |facts: &DomainFacts| (facts.id != 0, facts.persistent, Arc::as_ptr(&facts.config), stored(facts));
        now(self) != now(before)
    }

    /// Whether it wants devices of the host, by any of its configurations.
    pub(crate) fn wants_devices(&self) -> bool {
        let all = [Some(&self.config), self.stored.as_ref()];
        all.into_iter().flatten().any(|config| !config.wishes.is_empty())
    }

    /// The stored configuration differs from what runs.
    pub fn config_changed(&self) -> bool {
        !self.pending.is_empty()
    }
}

impl ConfigFacts {
    /// The same of a machine of another host, which needs nothing of this one.
    pub(crate) fn at_another_host(self) -> ConfigFacts {
        ConfigFacts { needs: Box::default(), wishes: Box::default(), ..self }
    }

    /// Of a definition.
    pub fn of(def: &DomainDef) -> ConfigFacts {
        ConfigFacts {
            title: published(def.title.as_deref().unwrap_or_default()).into(),
            description: published(def.description.as_deref().unwrap_or_default()).into(),
            os_type: def.os_type().into(),
            vcpus: def.vcpus(),
            maximum_vcpus: def.maximum_vcpus(),
            memory: def.current_memory_kib().saturating_mul(1024),
            maximum_memory: def.memory_kib().saturating_mul(1024),
            shown: Shown::of(def),
            needs: needs_of(def),
            wishes: DeviceWish::all_of(def),
        }
    }
}

/// All that is published of a snapshot, at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotFacts {
    /// Whose it is.
    pub domain: Uuid,
    /// Unique among the domain's.
    pub name: String,
    /// Empty, or why its record cannot be used.
    pub broken: String,
    /// For people.
    pub description: String,
    /// Microseconds since the epoch.
    pub created_usec: u64,
    /// What the guest did; empty if the record is broken.
    pub state: &'static str,
    /// The snapshot before it.
    pub parent: Option<String>,
    /// Those after it, in the order of their creation.
    pub children: Vec<String>,
    /// A new snapshot would be its child.
    pub is_current: bool,
    /// `no`, `internal`, `external`.
    pub memory: &'static str,
    /// Target, mode, file.
    pub disks: Vec<(String, &'static str, String)>,
}

/// All that is published of a checkpoint, at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointFacts {
    /// Whose it is.
    pub domain: Uuid,
    /// Unique among the domain's.
    pub name: String,
    /// Microseconds since the epoch.
    pub created_usec: u64,
    /// The checkpoint before it.
    pub parent: Option<String>,
    /// Those after it.
    pub children: Vec<String>,
    /// Empty, or why what it has kept is not to be trusted.
    pub broken: String,
}

/// All that is published of an object of a kind beside domains, at one moment. `interfaces/objects/mod.rs` says what is shown
/// of each kind.
#[derive(Clone, Debug)]
pub enum ObjectFacts {
    /// A storage pool's.
    Pool(Arc<PoolFacts>),
    /// A storage volume's.
    Volume(Arc<VolumeFacts>),
    /// A network's.
    Network(Arc<NetworkFacts>),
    /// A secret's.
    Secret(Arc<SecretFacts>),
    /// A device's of the host.
    NodeDevice(Arc<NodeDeviceFacts>),
    /// Another host's.
    Host(Arc<HostFacts>),
}

/// All that is published of a host of another hypervisor, at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct HostFacts {
    /// What the administrator calls it.
    pub name: Arc<str>,
    /// The driver's name.
    pub driver: &'static str,
    /// Where it is; empty of what needs no address.
    pub address: String,
    /// Product and version, in its own words; empty until it has answered.
    pub version: String,
    /// Why it does not answer; empty if it does.
    pub error: String,
    /// On what it was tried that it is spoken to rightly.
    pub proof: &'static str,
    /// `connecting`, `connected`, `unreachable`.
    pub state: &'static str,
    /// Since when: microseconds since the epoch.
    pub since_usec: u64,
    /// What it can do to its machines.
    pub abilities: Vec<&'static str>,
    /// What of it cannot be shown as it is, each a sentence.
    pub problems: Vec<String>,
}

/// All that is published of a device of the host, at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeDeviceFacts {
    /// What it is.
    pub device: Arc<NodeDevice>,
    /// Which machines want it.
    pub users: Arc<[User]>,
}

/// All that is published of a storage pool, at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolFacts {
    /// Identity, for ever.
    pub uuid: Uuid,
    /// Name; unique on this host.
    pub name: String,
    /// `dir`, `fs`, …
    pub kind: &'static str,
    /// `inactive`, `starting`, `running`, `inaccessible`.
    pub state: &'static str,
    /// It is not inactive.
    pub active: bool,
    /// It is stored.
    pub persistent: bool,
    /// Starts with the host.
    pub autostart: bool,
    /// What is stored is not what runs.
    pub config_changed: bool,
    /// Where its volumes are on this host.
    pub target: String,
    /// How much room there is.
    pub room: Room,
    /// How many volumes it has.
    pub volume_count: u32,
    /// When all of it was last looked at: microseconds since the epoch.
    pub refreshed_usec: u64,
    /// What can be done with it.
    pub features: &'static [&'static str],
    /// The uid that defined it.
    pub owner: u32,
    /// Why it is active and cannot do all its work: a word, and a sentence.
    pub problems: Vec<(&'static str, String)>,
    /// Who needs what is in it.
    pub users: Arc<[User]>,
    /// Empty, or why its document cannot be used.
    pub broken: String,
}

/// All that is published of a storage volume, at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeFacts {
    /// Whose it is.
    pub pool: Uuid,
    /// Unique in its pool.
    pub name: String,
    /// Where it is.
    pub path: String,
    /// By which it is known on the host, whatever it is called.
    pub key: String,
    /// `file`, `block`, `dir`, `network`.
    pub kind: &'static str,
    /// Its format.
    pub format: String,
    /// What a guest sees, in bytes.
    pub capacity: u64,
    /// What it takes, in bytes.
    pub allocation: u64,
    /// What its header says that it stands on.
    pub backing_path: String,
    /// Where that leads, if to a file of this host.
    pub backing_place: Option<PathBuf>,
    /// The volume that this is.
    pub backing: Option<ObjectRef>,
    /// It can be read with a secret only.
    pub encrypted: bool,
    /// `ready`, `busy`, `incomplete`, `broken`.
    pub state: &'static str,
    /// Who made it.
    pub owner: u32,
    /// Who needs it.
    pub users: Arc<[User]>,
    /// A word, and a sentence.
    pub problems: Vec<(&'static str, String)>,
}

/// All that is published of a network, at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkFacts {
    /// Unique on this host.
    pub name: String,
    /// Identity, for ever.
    pub uuid: Uuid,
    /// It is there on the host.
    pub active: bool,
    /// A document is stored.
    pub persistent: bool,
    /// It starts with the host.
    pub autostart: bool,
    /// What is stored is not what there is.
    pub config_changed: bool,
    /// The uid that defined it.
    pub owner: u32,
    /// Why it is there and cannot do its work: a word, and a sentence with the remedy.
    pub problems: Vec<(&'static str, String)>,
    /// Who is in it, or names it.
    pub users: Vec<User>,
    /// `nat`, `route` and the like.
    pub mode: &'static str,
    /// The host's device; empty if it has none.
    pub bridge: String,
    /// The host's addresses in it, with their prefixes.
    pub addresses: Vec<String>,
    /// What its names end in.
    pub domain_name: String,
    /// By which packets leave; any if empty.
    pub forward_devices: Vec<String>,
    /// The largest packet; 0: as usual.
    pub mtu: u32,
    /// Reservations, as many as are published: card, address, name.
    pub hosts: Vec<(String, String, String)>,
    /// Who has which address, as many as are published.
    pub leases: Vec<LeaseFacts>,
    /// Empty, or why its document cannot be used.
    pub broken: String,
}

/// An address that somebody has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseFacts {
    /// The card; empty if it is not known.
    pub mac: String,
    /// The address.
    pub address: String,
    /// What the guest calls itself, or is called.
    pub host_name: String,
    /// The machine whose card it is.
    pub domain: Option<Uuid>,
}

/// All that is published of a secret, at one moment. Never anything of its value.
#[derive(Clone, Debug, PartialEq)]
pub struct SecretFacts {
    /// Identity, for ever.
    pub uuid: Uuid,
    /// `none`, `volume`, `ceph`, `iscsi`, `tls`, `vtpm`.
    pub usage_type: &'static str,
    /// What it is for.
    pub usage_id: String,
    /// As much of it as is published.
    pub description: String,
    /// Ends with virtd.
    pub ephemeral: bool,
    /// Its value is told to nobody.
    pub private: bool,
    /// It has a value.
    pub has_value: bool,
    /// When that was last set: microseconds since the epoch; 0 if it was never.
    pub value_changed_usec: u64,
    /// How the value is kept: `tpm2`, `host-key`, `file`, `memory`.
    pub protection: &'static str,
    /// The uid that defined it.
    pub owner: u32,
    /// Who names it.
    pub users: Arc<[User]>,
    /// Empty, or why its files cannot be used.
    pub broken: String,
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// For its turn.
    Waiting,
    /// At work.
    Running,
    /// Done.
    Succeeded,
    /// Not done; the error says why.
    Failed,
    /// Not done, since somebody asked for that.
    Cancelled,
}

impl JobState {
    /// The word on the bus.
    pub fn as_str(self) -> &'static str {
        match self {
            JobState::Waiting => "waiting",
            JobState::Running => "running",
            JobState::Succeeded => "succeeded",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more will happen to it.
    pub fn is_final(self) -> bool {
        matches!(self, JobState::Succeeded | JobState::Failed | JobState::Cancelled)
    }
}

/// All that is published of a job.
#[derive(Clone, Debug)]
pub struct JobFacts {
    /// Its number, from 1, never used again while virtd runs.
    pub id: u64,
    /// What it works on.
    pub object: ObjectRef,
    /// Where it stands.
    pub state: JobState,
    /// `start`, `save`, …
    pub operation: &'static str,
    /// Microseconds since the epoch.
    pub started_usec: u64,
    /// 0 to 1, -1 while unknown.
    pub progress: f64,
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes in all, 0 while unknown.
    pub bytes_total: u64,
    /// Whether `Cancel` would be heard.
    pub cancellable: bool,
    /// Whether `Finish` would be heard.
    pub ready: bool,
    /// Who asked for it.
    pub requester_uid: u32,
    /// Why it failed or was cancelled.
    pub error: Option<Error>,
}
