//! What befalls single devices of a running guest, as clients are told it.

use crate::domain::value::choices;

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
}

choices! {
    /// How it came about that another medium lies in a drive.
    pub enum MediumChange {
        Changed = "changed", Ejected = "ejected", GuestEjected = "guest-ejected",
    }
}
