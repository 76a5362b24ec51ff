//! What clients can ask for: one row a member of an interface. Who may do it, in which state of its object it has a
//! meaning, and what it is called in the log and by those who wait for it: the frames every verb runs in
//! (`frames.rs`) read that here, and so does `Can`.

use crate::authz::Action::{self, *};
use crate::error::{Error, Result};
use When::*;
use std::pin::Pin;
use virt_model::driver::inventory::Ability;
use virt_model::driver::{DriverError, Instance};
use virt_model::xml::shorten;

type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A row.
#[derive(Debug, PartialEq, Eq)]
pub struct Verb {
    /// The member on the bus: a method, or a property that can be set.
    pub member: &'static str,
    /// What polkit is asked; `None`: it is for everybody who may talk to virtd.
    pub action: Option<Action>,
    /// When it has a meaning.
    pub when: When,
    /// What it is called in the log, in refusals, and by those who wait for its end; of a job its `Operation`.
    pub word: &'static str,
}

/// The state of its object in which a verb has a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// In any.
    Always,
    /// There is no guest, and none is about to be.
    Inactive,
    /// There is a guest.
    Active,
    /// There is a guest, or one is about to be.
    ActiveOrStarting,
    /// The guest's CPUs run, so that it hears what it is asked.
    Running,
    /// The guest's CPUs are stopped, and can go on.
    Paused,
    /// The guest sleeps.
    Asleep,
    /// The guest's CPUs run, or are stopped and can go on from there.
    RunningOrPaused,
    /// The same, and a configuration is stored.
    RunningOrPausedPersistent,
    /// There is a managed save: the next start goes on from it.
    ManagedSaved,
    /// A configuration is stored.
    Persistent,
    /// A configuration is stored, and there is no guest.
    InactivePersistent,
    /// The guest's CPUs run, and what is stored is not what runs.
    Pending,
    /// Its driver takes snapshots.
    Snapshots,
    /// A value is kept of it, and may be told.
    HasValue,
    /// It is a device that could be taken from the host's driver.
    NotDetached,
    /// It is a device that was taken from the host's driver.
    Detached,
    /// It is a device that no driver of the host's has.
    Undriven,
    /// It is a device that the kernel was told to make.
    Made,
    /// In none yet.
    Never,
}

/// What a guest's hypervisor is asked, where that is all there is to a verb.
pub type Ask = for<'a> fn(&'a dyn Instance) -> BoxFuture<'a, Result<(), DriverError>>;

/// The verbs that are no more than a question to the hypervisor, without arguments. Whoever adds one adds a row above and
/// one here, the method to `Instance` and to the introspection data, and to the drivers that can.
pub const ASKS: &[(&Verb, Ask)] = &[(&INJECT_NMI, |guest| guest.inject_nmi()), (&WAKEUP, |guest| guest.wake_up())];

/// What a member of `org.virt.Domain` needs of the host that keeps the machine, where that is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hosted {
    /// Nothing: what was last seen is told.
    Always,
    /// Every host can do it, unless nothing is to be done there.
    Destroy,
    /// That it can do this.
    If(Ability),
    /// More than any host can be asked for.
    Never,
}

impl Verb {
    /// See [`Hosted`].
    pub fn hosted(&self) -> Hosted {
        match *self {
            START => Hosted::If(Ability::Start),
            SHUTDOWN => Hosted::If(Ability::Shutdown),
            REBOOT => Hosted::If(Ability::Reboot),
            RESET => Hosted::If(Ability::Reset),
            SUSPEND | RESUME => Hosted::If(Ability::Suspend),
            RENAME => Hosted::If(Ability::Rename),
            DESTROY => Hosted::Destroy,
            GET_XML | GET_METADATA | LIST_SNAPSHOTS | GET_SNAPSHOT | LIST_CHECKPOINTS | GET_CHECKPOINT | CAN => {
                Hosted::Always
            }
            _ => Hosted::Never,
        }
    }

    /// Whether it may change something.
    pub fn changes(&self) -> bool {
        self.action.is_some_and(|action| !action.only_reads())
    }

    /// Whether an operation on snapshots that was cut off is finished before this begins. What only stops a guest or lets
    /// it go on waits for nothing to be mended; neither does what gives all of it up.
    pub(crate) fn waits_for_recovery(&self) -> bool {
        !matches!(self.action, Some(Stop | Suspend | Delete))
    }
}

macro_rules! verbs {
    ($($(#[$meta:meta])* $table:ident { $($name:ident = $member:literal, $action:expr, $when:ident, $word:literal;)+ })+) => {
        $(
            $(
                #[doc = concat!("`", $member, "`")]
                pub const $name: Verb = Verb { member: $member, action: $action, when: $when, word: $word };
            )+
            $(#[$meta])*
            pub const $table: &[Verb] = &[$($name,)+];
        )+
    };
}

verbs! {
    /// `org.virt.Manager`
    MANAGER {
        DEFINE = "DefineDomain", Some(Define), Always, "define";
        CREATE = "CreateDomain", Some(Define), Always, "create";
        RESTORE = "RestoreDomain", Some(Save), Always, "restore";
        SAVED_XML = "GetSavedXML", Some(Read), Always, "get XML of what is saved";
        SET_SAVED_XML = "SetSavedXML", Some(Save), Always, "set XML of what is saved";
        VALIDATE = "ValidateDomain", Some(Read), Always, "validate";
        COMPARE = "CompareDomains", Some(Read), Always, "compare";
        NATIVE = "DomainToNative", Some(Read), Always, "translate";
        GET_DOMAIN = "GetDomain", None, Always, "get";
        GET_BY_NAME = "GetDomainByName", None, Always, "get";
        GET_BY_ID = "GetDomainById", None, Always, "get";
        LIST = "ListDomains", None, Always, "list";
        JOBS = "GetJobs", None, Always, "list jobs";
        CAPABILITIES = "GetCapabilities", None, Always, "get capabilities";
        DOMAIN_CAPABILITIES = "GetDomainCapabilities", None, Always, "get domain capabilities";
        OPEN_METRICS = "OpenMetrics", None, Always, "read metrics";
        SUBSCRIBE_STATS = "SubscribeStats", None, Always, "subscribe to statistics";
        MANAGER_CAN = "Can", None, Always, "can";
    }

    /// `org.virt.Domain`
    DOMAIN {
        START = "Start", Some(Start), Inactive, "start";
        SHUTDOWN = "Shutdown", Some(Stop), Running, "shut down";
        REBOOT = "Reboot", Some(Stop), Running, "reboot";
        RESET = "Reset", Some(Stop), Active, "reset";
        DESTROY = "Destroy", Some(Stop), ActiveOrStarting, "destroy";
        SUSPEND = "Suspend", Some(Suspend), Running, "suspend";
        RESUME = "Resume", Some(Suspend), Paused, "resume";
        SAVE = "Save", Some(Save), RunningOrPaused, "save";
        CORE_DUMP = "CoreDump", Some(Save), RunningOrPaused, "dump";
        MANAGED_SAVE = "ManagedSave", Some(Save), RunningOrPausedPersistent, "save";
        MANAGED_SAVE_REMOVE = "ManagedSaveRemove", Some(Save), ManagedSaved, "remove the managed save of";
        MANAGED_SAVE_XML = "GetManagedSaveXML", Some(Read), ManagedSaved, "get XML of the managed save of";
        INJECT_NMI = "InjectNMI", Some(Console), Running, "inject an NMI into";
        WAKEUP = "Wakeup", Some(Suspend), Asleep, "wake";
        SCREENSHOT = "Screenshot", Some(Console), Active, "take a screenshot of";
        OPEN_GRAPHICS = "OpenGraphics", Some(Console), Active, "open the display of";
        OPEN_CHANNEL = "OpenChannel", Some(Console), Active, "open a channel of";
        OPEN_CONSOLE = "OpenConsole", Some(Console), Active, "open a console of";
        SEND_KEY = "SendKey", Some(Console), Running, "send keys to";
        AGENT_COMMAND = "AgentCommand", Some(Agent), Running, "give a command to the agent of";
        GET_ADDRESSES = "GetInterfaceAddresses", Some(Read), Active, "get addresses of";
        GET_GUEST_INFO = "GetGuestInfo", Some(Read), Running, "get information from the guest of";
        GET_TIME = "GetTime", Some(Read), Running, "get the time of";
        SET_TIME = "SetTime", Some(Agent), Running, "set the time of";
        SET_USER_PASSWORD = "SetUserPassword", Some(Agent), Running, "set a user's password in";
        FREEZE = "FreezeFilesystems", Some(Agent), Running, "freeze file systems of";
        THAW = "ThawFilesystems", Some(Agent), Running, "thaw file systems of";
        TRIM = "TrimFilesystems", Some(Agent), Running, "trim file systems of";
        GUEST_EXEC = "GuestExec", Some(Agent), Running, "guest-exec";
        SUSPEND_GUEST = "SuspendGuest", Some(Suspend), Running, "put to sleep the guest of";
        APPLY_PENDING = "ApplyPending", Some(Stop), Pending, "apply-pending";
        UNDEFINE = "Undefine", Some(Delete), Persistent, "undefine";
        CHECK_UNDEFINE = "CheckUndefine", Some(Read), Persistent, "check";
        RENAME = "Rename", Some(Define), InactivePersistent, "rename";
        AUTOSTART = "Autostart", Some(Define), Persistent, "set autostart";
        SET_TITLE = "SetTitle", Some(Define), Always, "set title";
        SET_DESCRIPTION = "SetDescription", Some(Define), Always, "set description";
        SET_METADATA = "SetMetadata", Some(Define), Always, "set metadata";
        ATTACH_DEVICE = "AttachDevice", Some(Device), Always, "attach device";
        DETACH_DEVICE = "DetachDevice", Some(Device), Always, "detach device";
        DETACH_DEVICE_ALIAS = "DetachDeviceAlias", Some(Device), Always, "detach device";
        CHANGE_MEDIUM = "ChangeMedium", Some(Device), Always, "change the medium in";
        SET_LINK = "SetLink", Some(Device), Always, "set the link of";
        SET_VCPUS = "SetVCPUs", Some(Device), Always, "set the vCPUs of";
        SET_MEMORY = "SetMemory", Some(Device), Always, "set the memory of";
        SET_MEMORY_STATS_PERIOD = "SetMemoryStatsPeriod", Some(Device), Always, "set the period of memory statistics of";
        SET_BLOCK_THROTTLE = "SetBlockThrottle", Some(Device), Always, "limit a disk of";
        GET_BLOCK_THROTTLE = "GetBlockThrottle", Some(Read), Always, "get the limits of a disk of";
        SET_BANDWIDTH = "SetInterfaceBandwidth", Some(Device), Always, "limit a network card of";
        GET_BANDWIDTH = "GetInterfaceBandwidth", Some(Read), Always, "get the limits of a network card of";
        SET_SCHEDULER = "SetSchedulerParameters", Some(Device), Always, "limit the CPU time of";
        GET_SCHEDULER = "GetSchedulerParameters", Some(Read), Always, "get the limits of CPU time of";
        SET_MEMORY_PARAMETERS = "SetMemoryParameters", Some(Device), Always, "limit the host's memory of";
        GET_MEMORY_PARAMETERS = "GetMemoryParameters", Some(Read), Always, "get the limits of the host's memory of";
        SET_GRAPHICS_PASSWORD = "SetGraphicsPassword", Some(Console), Always, "set a display's password of";
        UPDATE_DEVICE = "UpdateDevice", Some(Device), Always, "update device";
        SET_BLOCK_THRESHOLD = "SetBlockThreshold", Some(Device), Active, "watch a disk of";
        BLOCK_RESIZE = "BlockResize", Some(Device), Always, "block-resize";
        BLOCK_PULL = "BlockPull", Some(Device), RunningOrPaused, "block-pull";
        BLOCK_COMMIT = "BlockCommit", Some(Device), RunningOrPaused, "block-commit";
        BLOCK_COPY = "BlockCopy", Some(Device), RunningOrPaused, "block-copy";
        GET_METADATA = "GetMetadata", Some(Read), Always, "get metadata";
        GET_XML = "GetXML", Some(Read), Always, "get XML";
        GET_STATS = "GetStats", Some(Read), Always, "get statistics of";
        BLOCK_INFO = "BlockInfo", Some(Read), Always, "get the size of a disk of";
        CREATE_SNAPSHOT = "CreateSnapshot", Some(Snapshot), Snapshots, "snapshot-create";
        CHECK_CREATE = "CheckCreateSnapshot", Some(Read), Snapshots, "check";
        LIST_SNAPSHOTS = "ListSnapshots", None, Always, "list snapshots";
        GET_SNAPSHOT = "GetSnapshot", None, Always, "get snapshot";
        CREATE_CHECKPOINT = "CreateCheckpoint", Some(Snapshot), RunningOrPaused, "create a checkpoint of";
        BACKUP_BEGIN = "BackupBegin", Some(Snapshot), RunningOrPaused, "backup";
        OPEN_BACKUP = "OpenBackup", Some(Snapshot), Active, "open the backup of";
        LIST_CHECKPOINTS = "ListCheckpoints", Some(Read), Always, "list checkpoints of";
        GET_CHECKPOINT = "GetCheckpoint", Some(Read), Always, "get a checkpoint of";
        CAN = "Can", None, Always, "can";
    }

    /// `org.virt.Checkpoint`
    CHECKPOINT {
        DELETE_CHECKPOINT = "Delete", Some(Snapshot), Always, "delete a checkpoint of";
        CHECKPOINT_XML = "GetXML", Some(Read), Always, "get XML of a checkpoint of";
        CHECKPOINT_CAN = "Can", None, Always, "can";
    }

    /// `org.virt.Snapshot`
    SNAPSHOT {
        REVERT = "Revert", Some(Revert), Snapshots, "snapshot-revert";
        CHECK_REVERT = "CheckRevert", Some(Read), Snapshots, "check";
        DELETE = "Delete", Some(Snapshot), Snapshots, "snapshot-delete";
        CHECK_DELETE = "CheckDelete", Some(Read), Snapshots, "check";
        SNAPSHOT_XML = "GetXML", Some(Read), Always, "get XML";
        SNAPSHOT_CAN = "Can", None, Always, "can";
    }

    /// `org.virt.Manager.Secret`
    SECRET_MANAGER {
        DEFINE_SECRET = "DefineSecret", Some(SecretDefine), Always, "define";
        GET_SECRET = "GetSecret", None, Always, "get";
        GET_SECRET_BY_USAGE = "GetSecretByUsage", None, Always, "get";
        LIST_SECRETS = "ListSecrets", None, Always, "list";
    }

    /// `org.virt.Secret`
    SECRET {
        SET_VALUE = "SetValue", Some(SecretSet), Always, "set the value of";
        SET_VALUE_FROM_FD = "SetValueFromFD", Some(SecretSet), Always, "set the value of";
        GET_VALUE = "GetValue", Some(SecretGet), HasValue, "read the value of";
        SECRET_XML = "GetXML", Some(SecretRead), Always, "get XML";
        UNDEFINE_SECRET = "Undefine", Some(SecretDelete), Always, "undefine";
        CHECK_UNDEFINE_SECRET = "CheckUndefine", Some(SecretRead), Always, "check";
        SECRET_CAN = "Can", None, Always, "can";
    }

    /// `org.virt.Manager.Network`
    NETWORK_MANAGER {
        DEFINE_NETWORK = "DefineNetwork", Some(NetworkDefine), Always, "define";
        CREATE_NETWORK = "CreateNetwork", Some(NetworkDefine), Always, "create";
        GET_NETWORK = "GetNetwork", None, Always, "get";
        GET_NETWORK_BY_NAME = "GetNetworkByName", None, Always, "get";
        LIST_NETWORKS = "ListNetworks", None, Always, "list";
        VALIDATE_NETWORK = "ValidateNetwork", Some(NetworkRead), Always, "validate";
    }

    /// `org.virt.Network`
    NETWORK {
        NETWORK_START = "Start", Some(NetworkStart), Inactive, "start";
        CHECK_START = "CheckStart", Some(NetworkRead), Always, "check";
        NETWORK_DESTROY = "Destroy", Some(NetworkStop), Active, "destroy";
        CHECK_DESTROY = "CheckDestroy", Some(NetworkRead), Always, "check";
        NETWORK_UPDATE = "Update", Some(NetworkUpdate), Always, "update";
        SET_HOST = "SetHost", Some(NetworkUpdate), Always, "reserve an address in";
        REMOVE_HOST = "RemoveHost", Some(NetworkUpdate), Always, "remove a reservation of";
        GET_LEASES = "GetLeases", Some(NetworkRead), Active, "read the leases of";
        NETWORK_XML = "GetXML", Some(NetworkRead), Always, "get XML";
        NETWORK_UNDEFINE = "Undefine", Some(NetworkDelete), Persistent, "undefine";
        NETWORK_CHECK_UNDEFINE = "CheckUndefine", Some(NetworkRead), Persistent, "check";
        NETWORK_AUTOSTART = "Autostart", Some(NetworkDefine), Persistent, "set autostart";
        NETWORK_CAN = "Can", None, Always, "can";
    }

    /// `org.virt.Job`
    JOB {
        CANCEL = "Cancel", Some(Job), Always, "cancel job";
        FINISH = "Finish", Some(Job), Always, "finish job";
    }

    /// `org.virt.Manager.NodeDevice`
    MANAGER_NODE_DEVICE {
        LIST_NODE_DEVICES = "ListNodeDevices", None, Always, "list";
        GET_NODE_DEVICE = "GetNodeDevice", None, Always, "get";
        GET_NODE_DEVICE_BY_WWN = "GetNodeDeviceByWWN", None, Always, "get";
        CREATE_NODE_DEVICE = "CreateNodeDevice", Some(DeviceCreate), Always, "create";
        DEFINE_NODE_DEVICE = "DefineNodeDevice", Some(DeviceCreate), Never, "define";
    }

    /// `org.virt.NodeDevice`
    NODE_DEVICE {
        DETACH = "Detach", Some(DeviceDetach), NotDetached, "detach";
        REATTACH = "Reattach", Some(DeviceDetach), Detached, "reattach";
        RESET_DEVICE = "Reset", Some(DeviceDetach), Undriven, "reset";
        CHECK_DETACH = "CheckDetach", Some(DeviceRead), Always, "check";
        DESTROY_DEVICE = "Destroy", Some(DeviceCreate), Made, "destroy";
        NODE_DEVICE_XML = "GetXML", Some(DeviceRead), Always, "get XML of";
        NODE_DEVICE_CAN = "Can", None, Always, "can";
    }

    /// `org.virt.Host`
    HOST {
        RECONNECT = "Reconnect", Some(HostManage), Always, "reconnect";
        REFRESH = "Refresh", Some(HostManage), Always, "refresh";
    }

    /// `org.virt.StatsSubscription`
    SUBSCRIPTION {
        CLOSE = "Close", None, Always, "close";
    }
}

verbs! {
    /// `org.virt.Manager.Storage`
    MANAGER_STORAGE {
        DEFINE_POOL = "DefineStoragePool", Some(StorageDefine), Always, "define";
        CREATE_POOL = "CreateStoragePool", Some(StorageDefine), Always, "create";
        GET_POOL = "GetStoragePool", None, Always, "get";
        GET_POOL_BY_NAME = "GetStoragePoolByName", None, Always, "get";
        LIST_POOLS = "ListStoragePools", None, Always, "list pools";
        VALIDATE_POOL = "ValidateStoragePool", Some(StorageRead), Always, "validate";
        POOL_CAPABILITIES = "GetPoolCapabilities", None, Always, "get capabilities of pools";
        FIND_SOURCES = "FindSources", Some(StorageDefine), Always, "find sources of pools";
        GET_VOLUME_BY_PATH = "GetVolumeByPath", None, Always, "get";
        GET_VOLUME_BY_KEY = "GetVolumeByKey", None, Always, "get";
        GET_QUOTA = "GetQuota", Some(StorageRead), Always, "get the quota of";
    }

    /// `org.virt.StoragePool`
    POOL {
        POOL_START = "Start", Some(StorageStart), Inactive, "pool-start";
        POOL_REFRESH = "Refresh", Some(StorageStart), Active, "pool-refresh";
        POOL_DESTROY = "Destroy", Some(StorageStop), Active, "stop";
        POOL_BUILD = "Build", Some(StorageDefine), Inactive, "pool-build";
        POOL_DELETE = "Delete", Some(StorageDelete), Inactive, "pool-delete";
        CHECK_POOL_DELETE = "CheckDelete", Some(StorageRead), Always, "check deleting";
        CREATE_VOLUME = "CreateVolume", Some(VolumeCreate), Running, "volume-create";
        CHECK_CREATE_VOLUME = "CheckCreateVolume", Some(StorageRead), Running, "check a volume of";
        ADD_VOLUME = "AddVolume", Some(VolumeCreate), Running, "volume-create";
        GET_VOLUME = "GetVolume", None, Always, "get a volume of";
        LIST_VOLUMES = "ListVolumes", None, Always, "list volumes of";
        POOL_XML = "GetXML", Some(StorageRead), Always, "get XML of";
        UNDEFINE_POOL = "Undefine", Some(StorageDelete), Inactive, "undefine";
        CHECK_UNDEFINE_POOL = "CheckUndefine", Some(StorageRead), Always, "check undefining";
        POOL_CAN = "Can", None, Always, "can";
        POOL_AUTOSTART = "Autostart", Some(StorageDefine), Persistent, "set autostart";
    }

    /// `org.virt.StorageVolume`
    VOLUME {
        VOLUME_DELETE = "Delete", Some(VolumeDelete), Running, "volume-delete";
        CHECK_VOLUME_DELETE = "CheckDelete", Some(StorageRead), Running, "check deleting";
        VOLUME_CLONE = "Clone", Some(VolumeContent), Running, "volume-clone";
        VOLUME_RESIZE = "Resize", Some(VolumeResize), Running, "volume-resize";
        VOLUME_WIPE = "Wipe", Some(VolumeWrite), Running, "volume-wipe";
        VOLUME_UPLOAD = "Upload", Some(VolumeWrite), Running, "volume-upload";
        VOLUME_DOWNLOAD = "Download", Some(VolumeContent), Running, "volume-download";
        OPEN_NBD = "OpenNBD", Some(VolumeContent), Running, "serve";
        VOLUME_XML = "GetXML", Some(StorageRead), Always, "get XML of";
        VOLUME_CAN = "Can", None, Always, "can";
    }
}

/// All tables, by their interfaces.
pub const TABLES: &[(&str, &[Verb])] = &[
    ("org.virt.Manager", MANAGER),
    ("org.virt.Domain", DOMAIN),
    ("org.virt.Snapshot", SNAPSHOT),
    ("org.virt.Checkpoint", CHECKPOINT),
    ("org.virt.Manager.Secret", SECRET_MANAGER),
    ("org.virt.Secret", SECRET),
    ("org.virt.Manager.Network", NETWORK_MANAGER),
    ("org.virt.Network", NETWORK),
    ("org.virt.Job", JOB),
    ("org.virt.Manager.NodeDevice", MANAGER_NODE_DEVICE),
    ("org.virt.NodeDevice", NODE_DEVICE),
    ("org.virt.Host", HOST),
    ("org.virt.StatsSubscription", SUBSCRIPTION),
    ("org.virt.Manager.Storage", MANAGER_STORAGE),
    ("org.virt.StoragePool", POOL),
    ("org.virt.StorageVolume", VOLUME),
];

/// The row of a member. Error: `InvalidArgument` if `interface` has none of that name.
pub(crate) fn find(interface: &str, verbs: &'static [Verb], member: &str) -> Result<&'static Verb> {
    verbs
        .iter()
        .find(|verb| verb.member == member)
        .ok_or_else(|| Error::InvalidArgument(format!("{interface} has no method '{}'", shorten(member))))
}
