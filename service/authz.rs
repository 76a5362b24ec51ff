//! Who may do what: callers, actions, and the authority that is asked.
//!
//! Permissions are data: [`Action`] knows its polkit id, and a test holds `polkit/org.virt.policy` to the table.

use crate::error::Error;
use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

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
    ($($(#[$meta:meta])* $name:ident = $id:literal, $deed:literal;)+) => {
        /// What is asked of polkit.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Action { $($(#[$meta])* $name,)+ }

        impl Action {
            /// All of them.
            pub const ALL: &[Action] = &[$(Action::$name,)+];

            /// The polkit action.
            pub fn id(self) -> &'static str {
                match self { $(Action::$name => $id,)+ }
            }

            /// The deed, completing 'Authentication is required to …'.
            pub fn deed(self) -> &'static str {
                match self { $(Action::$name => $deed,)+ }
            }
        }
    };
}

actions! {
    /// Configuration and statistics.
    Read = "org.virt.domain.read", "read the configuration of";
    /// The same with passwords.
    ReadSecure = "org.virt.domain.read-secure", "read the passwords of";
    /// Store or change a configuration.
    Define = "org.virt.domain.define", "define or change";
    /// Remove a configuration.
    Delete = "org.virt.domain.delete", "delete";
    /// Start.
    Start = "org.virt.domain.start", "start";
    /// Shut down, destroy, reboot, reset.
    Stop = "org.virt.domain.stop", "stop";
    /// Suspend, resume and wake.
    Suspend = "org.virt.domain.suspend", "suspend or resume";
    /// Save and restore.
    Save = "org.virt.domain.save", "save or restore";
    /// Create and delete snapshots.
    Snapshot = "org.virt.domain.snapshot", "take or delete a snapshot of";
    /// Revert to a snapshot.
    Revert = "org.virt.domain.revert", "revert";
    /// Attach, detach, resize.
    Device = "org.virt.domain.device", "change the devices of";
    /// Console, display, screenshot, keys.
    Console = "org.virt.domain.console", "use the console of";
    /// What its agent does inside the guest: commands, passwords, files, the clock.
    Agent = "org.virt.domain.agent", "act inside";
    /// Open a display without its password.
    SkipAuth = "org.virt.domain.skip-auth", "bypass the display password of";
    /// Raw hypervisor arguments.
    Native = "org.virt.domain.native", "give raw hypervisor arguments to";
    /// Cancel or finish somebody else's job.
    Job = "org.virt.domain.job", "cancel or finish a job of";
}

/// What an action is about; the details passed to polkit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Subject {
    /// The driver's name, or empty.
    pub driver: String,
    /// The domain's name, or empty where no domain is concerned.
    pub domain_name: String,
    /// The domain's uuid.
    pub domain_uuid: Option<Uuid>,
    /// The uid that defined the domain; `None` for one that is only about to be defined.
    pub owner: Option<u32>,
    /// The snapshot's name, where there is one.
    pub snapshot_name: Option<String>,
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
