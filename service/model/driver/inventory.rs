//! Hosts of other hypervisors: machines that a host keeps by itself, with or without us. [`Inventory`] tells which there are and
//! what becomes of them, and does to them what is asked.
//!
//! What a host tells of a machine is the whole of it ([`Seen`]), never a difference: an update that is lost, or two that come as
//! one, do no harm. Whoever listens holds it against what it knew.

use super::{Condition, DriverError, EventSink, Instance};
use crate::domain::DomainDef;
use async_trait::async_trait;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use uuid::Uuid;

/// By what a host itself knows one of its machines, for ever.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub Arc<str>);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Declares what a host may be able to do to a machine of its own, by the words on the bus.
macro_rules! abilities {
    ($($(#[$meta:meta])* $name:ident = $word:literal,)+) => {
        /// What a host may be able to do to a machine of its own.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Ability { $($(#[$meta])* $name,)+ }

        impl Ability {
            /// The word on the bus.
            pub fn as_str(self) -> &'static str {
                match self { $(Ability::$name => $word,)+ }
            }
        }
    };
}

abilities! {
    /// Start it from power off.
    Start = "start",
    /// Ask it to power off.
    Shutdown = "shutdown",
    /// Ask it to reboot.
    Reboot = "reboot",
    /// Reset it.
    Reset = "reset",
    /// Stop its CPUs, and let them go on.
    Suspend = "suspend",
    /// Give it another name.
    Rename = "rename",
}

/// Which host of other machines it is, and how it is treated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostProfile {
    /// What the administrator calls it: `[a-z0-9-]{1,32}`.
    pub name: String,
    /// Nothing is done to its machines by us.
    pub read_only: bool,
    /// How often it is asked what it has, where it does not tell by itself.
    pub poll: Duration,
    /// How long it may take to answer.
    pub timeout: Duration,
    /// How long virtd's start waits for it.
    pub connect_wait: Duration,
}

impl HostProfile {
    /// A host of that name, treated as usual.
    pub fn named(name: &str) -> HostProfile {
        HostProfile {
            name: name.to_owned(),
            read_only: false,
            poll: Duration::from_secs(5),
            timeout: Duration::from_secs(20),
            connect_wait: Duration::from_secs(2),
        }
    }
}

/// All that a host says of one of its machines, but for what it does now.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// By what the host knows it.
    pub key: Key,
    /// As the host says it; two machines of a host may have the same.
    pub uuid: Uuid,
    /// As the host says it; two machines of a host may have the same.
    pub name: String,
    /// As it would be started.
    pub def: Arc<DomainDef>,
}

/// What becomes of a host and its machines, in the order in which it happened.
#[derive(Clone, Debug)]
pub enum HostReport {
    /// It answers. What it has is told next, and then `Complete`.
    Connected {
        /// Product and version, in its own words.
        version: String,
    },
    /// It has that machine, which is new, or as it was, or otherwise.
    Seen(Box<Seen>),
    /// That machine runs, and we have not started it: [`Inventory::adopt`] gives it.
    Active(Key),
    /// It has that machine no more. Its guest had ended before.
    Gone(Key),
    /// All that it has was told: what was not seen since `Connected` has gone.
    Complete,
    /// It does not answer. It is asked again by and by; until `Connected` nothing is known of its machines.
    Lost(DriverError),
}

/// A machine that runs on a host, whose reports are listened to from now on.
pub struct Adopted {
    /// The guest.
    pub instance: Arc<dyn Instance>,
    /// What it does now.
    pub condition: Condition,
    /// What it runs with.
    pub live: Arc<DomainDef>,
}

/// The machines of a host. Nothing here waits for a host that does not answer for longer than [`HostProfile::timeout`]; while it is
/// lost all that would ask it fails at once with [`DriverError::Unreachable`].
#[async_trait]
pub trait Inventory: Send + Sync {
    /// How the host is treated.
    fn profile(&self) -> &HostProfile;

    /// Where it is, as people say it; empty of what needs no address.
    fn address(&self) -> String;

    /// On what it was tried that we speak to it rightly.
    fn proof(&self) -> &'static str;

    /// What it can do to its machines, as far as is known; nothing, if nothing is to be done to them.
    fn abilities(&self) -> Vec<Ability>;

    /// Refuses while the host does not answer: `Unreachable`, which says since when and why.
    fn reachable(&self) -> Result<(), DriverError>;

    /// Begins to connect, and reports there from now on. Returns at once. To be called once.
    fn watch(&self, to: UnboundedSender<HostReport>);

    /// Asks again now a host that is lost, or one that is there what it has.
    fn look_again(&self);

    /// Looks at all machines of the host now. Returns when what is otherwise has been reported.
    async fn refresh(&self) -> Result<(), DriverError>;

    /// Listens from now on to a machine that runs; `None` if it does not run any more. What happened before the result is told by
    /// that, what happens after it by `events`.
    fn adopt(&self, key: &Key, events: EventSink) -> Option<Adopted>;

    /// Starts a machine. Returns when it is seen to run. Error: as the host says it; after `TimedOut` and `Unreachable` it may come
    /// to run, and is reported as `Active` then.
    async fn start(&self, key: &Key, events: EventSink) -> Result<Adopted, DriverError>;

    /// Gives a machine another name. Returns when it is seen to have that, which has been reported then. Error: as the host says it;
    /// after `TimedOut` and `Unreachable` it may come to have that name, and is reported as `Seen` then.
    async fn rename(&self, key: &Key, name: &str) -> Result<(), DriverError>;
}
