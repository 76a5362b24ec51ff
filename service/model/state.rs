//! What can be said of a domain at a moment, and what can happen to it: states, their reasons, lifecycle events.
//!
//! The words are the ones on the bus and on disk; each enum has one table of them.
//!
//! ```text
//!             start                    destroy, exit
//!  shutoff ───────────▶ running ─────────────────────▶ shutoff
//!                        │  ▲
//!               suspend  │  │ resume      guest powers off: running ─▶ shutdown ─▶ shutoff
//!                        ▼  │             guest panics:     running ─▶ crashed  ─▶ shutoff
//!                       paused            guest sleeps:     running ─▶ pmsuspended ─▶ running
//! ```

use serde::{Deserialize, Serialize};
use std::fmt;

/// Declares an enum whose variants are words on the bus and on disk.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[allow(missing_docs, reason = "most words say it themselves")]
        pub enum $name { $($(#[$vmeta])* #[serde(rename = $word)] $variant,)+ }

        impl $name {
            /// All values, in the order of declaration.
            pub const ALL: &[$name] = &[$($name::$variant,)+];

            /// The word for it on the bus and on disk.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $word,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = UnknownWord;
            fn from_str(word: &str) -> Result<Self, UnknownWord> {
                $name::ALL.iter().copied().find(|v| v.as_str() == word).ok_or_else(|| UnknownWord {
                    word: word.to_owned(),
                    known: $name::ALL.iter().map(|v| v.as_str()).collect(),
                })
            }
        }
    };
}

/// A word that is none of the enumeration's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{word}' is not one of {}", known.join(", "))]
pub struct UnknownWord {
    /// What was given.
    pub word: String,
    /// What would have been understood.
    pub known: Vec<&'static str>,
}

words! {
    /// What a domain does now.
    DomainState {
        /// Its CPUs run.
        Running = "running",
        /// Active, waiting inside the hypervisor.
        Idle = "idle",
        /// Active, its CPUs stand still.
        Paused = "paused",
        /// Active, the guest has powered off and its process still stands.
        Shutdown = "shutdown",
        /// Inactive.
        Shutoff = "shutoff",
        /// Active, the guest has panicked and stands still.
        Crashed = "crashed",
        /// Active, the guest sleeps and can be woken.
        PmSuspended = "pmsuspended",
        /// Not known: the host that keeps it does not answer.
        Unknown = "unknown",
    }
}

impl DomainState {
    /// Whether a guest exists, in whatever condition. Not to be asked where nothing is known.
    pub fn is_active(self) -> bool {
        self != DomainState::Shutoff
    }
}

words! {
    /// Why a domain is in its state.
    StateReason {
        /// Not known, e.g. defined and never started since.
        Unknown = "unknown",
        /// Started from power off.
        Booted = "booted",
        /// Came from another host, or has gone to one.
        Migrated = "migrated",
        /// Started from a saved image.
        Restored = "restored",
        /// Put here by a snapshot operation.
        FromSnapshot = "from-snapshot",
        /// CPUs were resumed.
        Unpaused = "unpaused",
        /// Woken from sleep.
        Wakeup = "wakeup",
        /// A person or program asked for it.
        User = "user",
        /// A disk failed and its policy is to stop.
        IoError = "io-error",
        /// The watchdog's action.
        Watchdog = "watchdog",
        /// Paused while memory is saved.
        Save = "save",
        /// Paused while a snapshot is taken.
        Snapshot = "snapshot",
        /// Paused and not resumed since the resume failed.
        ApiError = "api-error",
        /// The guest powered itself off.
        Shutdown = "shutdown",
        /// Ended by force.
        Destroyed = "destroyed",
        /// The hypervisor process died or the guest crashed.
        Crashed = "crashed",
        /// Memory was saved and the guest ended.
        Saved = "saved",
        /// It could not be started.
        Failed = "failed",
        /// It ended while virtd was not there to see how.
        Daemon = "daemon",
        /// The guest's kernel panicked.
        Panicked = "panicked",
        /// Somebody else did it, on the host that keeps the machine.
        External = "external",
        /// The host that keeps the machine does not answer.
        Unreachable = "unreachable",
    }
}

words! {
    /// Details of [`Lifecycle::Defined`].
    Defined { Added = "added", Updated = "updated", Renamed = "renamed", FromSnapshot = "from-snapshot", }
}
words! {
    /// Details of [`Lifecycle::Undefined`].
    Undefined { Removed = "removed", Renamed = "renamed", }
}
words! {
    /// Details of [`Lifecycle::Started`].
    Started { Booted = "booted", Migrated = "migrated", Restored = "restored", FromSnapshot = "from-snapshot", Wakeup = "wakeup", }
}
words! {
    /// Details of [`Lifecycle::Suspended`].
    Suspended {
        Paused = "paused", Migrated = "migrated", IoError = "io-error", Watchdog = "watchdog",
        Restored = "restored", FromSnapshot = "from-snapshot", ApiError = "api-error",
    }
}
words! {
    /// Details of [`Lifecycle::Resumed`].
    Resumed { Unpaused = "unpaused", Migrated = "migrated", FromSnapshot = "from-snapshot", }
}
words! {
    /// Details of [`Lifecycle::Stopped`].
    Stopped {
        Shutdown = "shutdown", Destroyed = "destroyed", Crashed = "crashed", Migrated = "migrated",
        Saved = "saved", Failed = "failed", FromSnapshot = "from-snapshot",
    }
}
words! {
    /// Details of [`Lifecycle::Shutdown`]: who ended the guest.
    ShutdownBy { Finished = "finished", Guest = "guest", Host = "host", }
}
words! {
    /// Details of [`Lifecycle::PmSuspended`].
    PmSuspended { Memory = "memory", Disk = "disk", }
}
words! {
    /// Details of [`Lifecycle::Crashed`].
    Crashed { Panicked = "panicked", }
}

/// Something that happened to a domain, as `Lifecycle(event, detail)` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lifecycle {
    /// The stored configuration came or changed.
    Defined(Defined),
    /// The stored configuration went.
    Undefined(Undefined),
    /// The guest began to exist.
    Started(Started),
    /// Its CPUs stopped.
    Suspended(Suspended),
    /// Its CPUs went on.
    Resumed(Resumed),
    /// The guest ceased to exist.
    Stopped(Stopped),
    /// The guest has powered off.
    Shutdown(ShutdownBy),
    /// The guest fell asleep.
    PmSuspended(PmSuspended),
    /// The guest crashed.
    Crashed(Crashed),
}

impl Lifecycle {
    /// Event and detail, the two words on the bus.
    pub fn words(self) -> (&'static str, &'static str) {
        match self {
            Lifecycle::Defined(d) => ("defined", d.as_str()),
            Lifecycle::Undefined(d) => ("undefined", d.as_str()),
            Lifecycle::Started(d) => ("started", d.as_str()),
            Lifecycle::Suspended(d) => ("suspended", d.as_str()),
            Lifecycle::Resumed(d) => ("resumed", d.as_str()),
            Lifecycle::Stopped(d) => ("stopped", d.as_str()),
            Lifecycle::Shutdown(d) => ("shutdown", d.as_str()),
            Lifecycle::PmSuspended(d) => ("pmsuspended", d.as_str()),
            Lifecycle::Crashed(d) => ("crashed", d.as_str()),
        }
    }
}

impl fmt::Display for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (event, detail) = self.words();
        write!(f, "{event} {detail}")
    }
}
