//! What befalls single devices of a running guest, as clients are told it.

use crate::domain::value::choices;
use std::time::Duration;

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
    /// How long a guest may keep its tray locked, if the caller says so: after it `TimedOut`, not `Refused`.
    pub patience: Option<Duration>,
}

choices! {
    /// How it came about that another medium lies in a drive.
    pub enum MediumChange {
        Changed = "changed", Ejected = "ejected", GuestEjected = "guest-ejected",
    }
}
