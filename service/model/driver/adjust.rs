//! What of a machine can change while it runs, without anything being plugged.

use super::{GivenFile, MediumExchange};
use crate::device::display::Connected;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// One such thing; which values it is to have stands in the definition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Adjustment {
    /// How much of its memory the guest has: `<currentMemory>`.
    Memory,
    /// Which vCPUs there are, and how long a guest may take to let go of those that go.
    Vcpus(Duration),
    /// How often the guest tells of its memory: `<memballoon><stats>`.
    MemoryStats,
    /// What of the host's CPU time and memory it may use: `<cputune>` but for where threads run, `<memtune>`.
    Limits,
    /// How much I/O the disk of that target may do, with all that share that: `<iotune>`.
    Throttle(String),
    /// Whether the cable of the network card is plugged in that is known by that.
    Link(String),
    /// Into which bridge the cable of the network card is plugged that is known by that.
    Bridge(String),
    /// The password of the display of that number, how long it is good, and what becomes of who is there, if that is said.
    Password(usize, #[serde(skip)] Option<Connected>),
    /// At which address the display of that number listens.
    Listen(usize),
    /// How much may pass the network card that is known by that: `<bandwidth>`.
    Bandwidth(String),
    /// What may pass it: `<filterref>`.
    Filter(String),
    /// What lies in a drive: its source.
    Medium {
        /// The drive's target.
        target: String,
        /// How it is exchanged. `None` where a change is undone: what lies in the drive already is not exchanged then, and of what
        /// was given by descriptor, which cannot be opened again, the drive is left empty.
        #[serde(skip)]
        how: Option<MediumExchange>,
        /// The medium, if a client has given it and it has been judged.
        #[serde(skip)]
        image: Option<Arc<GivenFile>>,
    },
}

impl Adjustment {
    /// The same as it is asked for to undo it: without what was said of this one change.
    pub fn back(&self) -> Adjustment {
        match self {
            Adjustment::Medium { target, .. } => Adjustment::Medium { target: target.clone(), how: None, image: None },
            other => other.clone(),
        }
    }
}

impl fmt::Display for Adjustment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Adjustment::Memory => f.write_str("the memory that it has"),
            Adjustment::Vcpus(_) => f.write_str("its vCPUs"),
            Adjustment::Limits => f.write_str("what it may use of the host"),
            Adjustment::Throttle(target) => write!(f, "the limits of disk '{target}'"),
            Adjustment::Link(card) => write!(f, "the link of network card '{card}'"),
            Adjustment::Bridge(card) => write!(f, "the bridge of network card '{card}'"),
            Adjustment::Password(index, _) => write!(f, "the password of graphics {index}"),
            Adjustment::Listen(index) => write!(f, "where graphics {index} listens"),
            Adjustment::Bandwidth(card) => write!(f, "the limits of network card '{card}'"),
            Adjustment::Filter(card) => write!(f, "the filter of network card '{card}'"),
            Adjustment::Medium { target, .. } => write!(f, "the medium in '{target}'"),
            Adjustment::MemoryStats => f.write_str("how often it tells of its memory"),
        }
    }
}
