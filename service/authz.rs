//! Who may do what: callers, actions, and the authority that is asked.
//!
//! Permissions are data: [`Action`] knows its polkit id, and a test holds `polkit/org.virt.policy` to the table.

use crate::error::Error;
use crate::object::ObjectKind;
use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

/// Whoever sent a call.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The unique bus name; `None` on a connection without a bus.
    pub bus_name: Option<String>,
    /// The user.
    pub uid: u32,
    /// The call may wait for a person to authenticate.
    pub interactive: bool,
    /// Fires when the caller has left the bus.
    pub departed: CancellationToken,
}

macro_rules! actions {
    ($($kind:ident { $($(#[$meta:meta])* $name:ident = $id:literal, $deed:literal, $effect:ident;)+ })+) => {
        /// What is asked of polkit.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Action { $($($(#[$meta])* $name,)+)+ }

        impl Action {
            /// All of them.
            pub const ALL: &[Action] = &[$($(Action::$name,)+)+];

            /// The polkit action.
            pub fn id(self) -> &'static str {
                match self { $($(Action::$name => $id,)+)+ }
            }

            /// The deed, completing 'Authentication is required to …'.
            pub fn deed(self) -> &'static str {
                match self { $($(Action::$name => $deed,)+)+ }
            }

            /// What it is done to.
            pub fn kind(self) -> ObjectKind {
                match self { $($(Action::$name)|+ => ObjectKind::$kind,)+ }
            }

            /// Whether it changes nothing.
            pub fn only_reads(self) -> bool {
                matches!(match self { $($(Action::$name => Effect::$effect,)+)+ }, Effect::Reads)
            }
        }
    };
}

/// What doing it leaves behind.
#[derive(Clone, Copy)]
enum Effect {
    /// Nothing.
    Reads,
    /// Another state, document or value.
    Changes,
}

actions! {
    Domain {
        /// Configuration and statistics.
        Read = "org.virt.domain.read", "read the configuration of", Reads;
        /// The same with passwords.
        ReadSecure = "org.virt.domain.read-secure", "read the passwords of", Reads;
        /// Store or change a configuration.
        Define = "org.virt.domain.define", "define or change", Changes;
        /// Remove a configuration.
        Delete = "org.virt.domain.delete", "delete", Changes;
        /// Start.
        Start = "org.virt.domain.start", "start", Changes;
        /// Shut down, destroy, reboot, reset.
        Stop = "org.virt.domain.stop", "stop", Changes;
        /// Suspend, resume and wake.
        Suspend = "org.virt.domain.suspend", "suspend or resume", Changes;
        /// Save and restore.
        Save = "org.virt.domain.save", "save or restore", Changes;
        /// Create and delete snapshots.
        Snapshot = "org.virt.domain.snapshot", "take or delete a snapshot of", Changes;
        /// Revert to a snapshot.
        Revert = "org.virt.domain.revert", "revert", Changes;
        /// Attach, detach, resize.
        Device = "org.virt.domain.device", "change the devices of", Changes;
        /// Console, display, screenshot, keys.
        Console = "org.virt.domain.console", "use the console of", Changes;
        /// What its agent does inside the guest: commands, passwords, files, the clock.
        Agent = "org.virt.domain.agent", "act inside", Changes;
        /// Open a display without its password.
        SkipAuth = "org.virt.domain.skip-auth", "bypass the display password of", Changes;
        /// Raw hypervisor arguments.
        Native = "org.virt.domain.native", "give raw hypervisor arguments to", Changes;
        /// Cancel or finish somebody else's job.
        Job = "org.virt.domain.job", "cancel or finish a job of", Changes;
    }
    Network {
        /// Configuration and leases.
        NetworkRead = "org.virt.network.read", "read the configuration of", Reads;
        /// Store a configuration.
        NetworkDefine = "org.virt.network.define", "define or change", Changes;
        /// Change what runs without dropping a guest.
        NetworkUpdate = "org.virt.network.update", "update", Changes;
        /// Remove a configuration.
        NetworkDelete = "org.virt.network.delete", "delete", Changes;
        /// Start.
        NetworkStart = "org.virt.network.start", "start", Changes;
        /// Destroy.
        NetworkStop = "org.virt.network.stop", "stop", Changes;
    }
    Pool {
        /// Configuration, and that of volumes; where a pool could come from; how much others have.
        StorageRead = "org.virt.storage.read", "read the configuration of", Reads;
        /// Store a configuration, build.
        StorageDefine = "org.virt.storage.define", "define or change", Changes;
        /// Remove a configuration, or what it is made of.
        StorageDelete = "org.virt.storage.delete", "delete", Changes;
        /// Start and refresh.
        StorageStart = "org.virt.storage.start", "start or refresh", Changes;
        /// Destroy.
        StorageStop = "org.virt.storage.stop", "stop", Changes;
    }
    Volume {
        /// Create, and clone to.
        VolumeCreate = "org.virt.volume.create", "create", Changes;
        /// Resize.
        VolumeResize = "org.virt.volume.resize", "resize", Changes;
        /// Upload, wipe, serve for writing.
        VolumeWrite = "org.virt.volume.write", "overwrite", Changes;
        /// Download, clone from, serve for reading.
        VolumeContent = "org.virt.volume.content", "read the content of", Changes;
        /// Delete.
        VolumeDelete = "org.virt.volume.delete", "delete", Changes;
    }
    Secret {
        /// What is known of it but for its value.
        SecretRead = "org.virt.secret.read", "read the description of", Reads;
        /// Store a description.
        SecretDefine = "org.virt.secret.define", "define or change", Changes;
        /// Remove it.
        SecretDelete = "org.virt.secret.delete", "delete", Changes;
        /// Set its value.
        SecretSet = "org.virt.secret.set", "set the value of", Changes;
        /// Get its value.
        SecretGet = "org.virt.secret.get", "read the value of", Reads;
    }
    NodeDevice {
        /// Its document.
        DeviceRead = "org.virt.nodedev.read", "read the description of", Reads;
        /// Take it from the host's driver, give it back, reset it.
        DeviceDetach = "org.virt.nodedev.detach", "detach, reattach or reset", Changes;
        /// Create and end mediated devices and ports.
        DeviceCreate = "org.virt.nodedev.create", "create or remove", Changes;
    }
    Host {
        /// Have it asked again.
        HostManage = "org.virt.host.manage", "manage", Changes;
    }
}

/// What an action is about. No details: no object, or none yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Subject {
    /// The uid that defined the object; `None` for one that is only about to be defined.
    pub owner: Option<u32>,
    details: Vec<(&'static str, String)>,
}

impl Subject {
    /// The same with one more detail, which polkit's rules can look up.
    pub fn with(mut self, key: &'static str, value: impl Into<String>) -> Subject {
        self.details.push((key, value.into()));
        self
    }

    /// The same of an object that is somebody's.
    pub fn owned_by(self, owner: u32) -> Subject {
        Subject { owner: Some(owner), ..self }
    }

    /// A detail; empty where there is none.
    pub fn detail(&self, key: &str) -> &str {
        self.details.iter().find(|(known, _)| *known == key).map_or("", |(_, value)| value)
    }

    /// All details.
    pub fn details(&self) -> &[(&'static str, String)] {
        &self.details
    }
}

/// What an authority would answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Allowed.
    Yes,
    /// Not allowed.
    No,
    /// Allowed after authentication.
    Challenge,
}

impl Answer {
    /// The word on the bus.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Answer::Yes => "yes",
            Answer::No => "no",
            Answer::Challenge => "challenge",
        }
    }
}

/// Decides who may do what: polkit on the system bus, everything to the owner of a session bus.
#[async_trait]
pub trait Authority: Send + Sync {
    /// Returns if `caller` may do `action` to `subject`; may wait for a person when `caller.interactive`.
    /// Errors: [`Error::AccessDenied`], [`Error::InteractionRequired`]; never anything that means yes.
    async fn check(&self, caller: &Caller, action: Action, subject: &Subject) -> Result<(), Error>;

    /// What `check` would answer, without asking a person. A failure to find out is `No`.
    async fn can(&self, caller: &Caller, action: Action, subject: &Subject) -> Answer;
}
