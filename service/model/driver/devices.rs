//! What befalls single devices of a running guest, as clients are told it.

use super::GivenFile;
use crate::domain::DomainDef;
use crate::domain::value::choices;
use std::sync::Arc;
use std::time::Duration;

/// A device that is to be plugged into a running guest.
#[derive(Clone, Copy, Debug)]
pub struct Attachment<'a> {
    /// What the guest runs with.
    pub before: &'a DomainDef,
    /// The device's name.
    pub alias: &'a str,
    /// The disk's image, if a client has given it and it has been judged.
    pub image: Option<&'a Arc<GivenFile>>,
}

/// A device that a running guest is to let go of.
#[derive(Clone, Copy, Debug)]
pub struct Detachment<'a> {
    /// What the guest runs with.
    pub def: &'a DomainDef,
    /// The device's name.
    pub alias: &'a str,
    /// How long the guest may take.
    pub patience: Duration,
}

/// What has happened to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// It was plugged in.
    Added {
        /// Its name.
        alias: String,
    },
    /// The guest has let go of it.
    Removed {
        /// Its name.
        alias: String,
    },
    /// The guest keeps it.
    RemovalFailed {
        /// Its name.
        alias: String,
    },
    /// Another medium lies in a drive, or none.
    MediumChanged {
        /// The drive's target.
        target: String,
        /// How that came about.
        reason: MediumChange,
    },
    /// An image could not be read or written.
    IoError {
        /// The disk's target; a driver may say a name that begins with that and a hyphen.
        target: String,
        /// What the hypervisor does about it.
        action: IoAction,
        /// Why it failed.
        reason: IoFailure,
    },
    /// An image has been written beyond the offset that was to be told of.
    WrittenBeyond {
        /// The disk's target; a driver may say a name that begins with that and a hyphen.
        target: String,
        /// That offset.
        threshold: u64,
        /// By how many bytes.
        excess: u64,
    },
    /// The guest has not reset its watchdog in time.
    WatchdogFired {
        /// What follows, in the hypervisor's word.
        action: String,
    },
    /// Memory of the host has failed.
    MemoryFailure {
        /// Whose it was, in the hypervisor's word.
        recipient: String,
        /// What follows, in its word.
        action: String,
        /// The guest must do something about it at once.
        action_required: bool,
        /// It befell what was just dealing with another one.
        recursive: bool,
    },
    /// The balloon has another size: what the guest has of its memory, in bytes.
    BalloonChanged {
        /// How many.
        bytes: u64,
    },
}

choices! {
    /// What is done about an image that could not be read or written.
    pub enum IoAction {
        None = "none", Pause = "pause", Report = "report",
    }
}

choices! {
    /// Why an image could not be read or written.
    pub enum IoFailure {
        Failed = "failed", NoSpace = "no-space",
    }
}

/// How a medium is exchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MediumExchange {
    /// The tray is opened even where the guest has locked it.
    pub force: bool,
    /// How long a guest may keep its tray locked, if the caller says so: after it `TrayLocked`, not `Refused`.
    pub patience: Option<Duration>,
}

choices! {
    /// How it came about that another medium lies in a drive.
    pub enum MediumChange {
        Changed = "changed", Ejected = "ejected", GuestEjected = "guest-ejected",
    }
}
