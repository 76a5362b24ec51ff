//! The agent that runs in a guest: what [`super::Instance::agent`] gives. Whatever an agent says, somebody in the guest may have made
//! up: a driver hands on no more of it than is bounded in size and number, and texts without characters that deceive.

use super::{DriverError, GivenFile};
use async_trait::async_trait;
use std::collections::BTreeMap;
use std::time::Duration;

/// A group of what an agent tells of its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InfoGroup {
    /// Its operating system.
    Os,
    /// Its own name.
    Hostname,
    /// Who is logged in.
    Users,
    /// Its clock's zone.
    TimeZone,
    /// What is mounted.
    FileSystems,
    /// Its disks, by its own names.
    Disks,
    /// Its network cards, by its own names.
    Interfaces,
    /// How busy it is.
    Load,
}

impl InfoGroup {
    /// All of them.
    pub const ALL: &[InfoGroup] = &[
        InfoGroup::Os,
        InfoGroup::Hostname,
        InfoGroup::Users,
        InfoGroup::TimeZone,
        InfoGroup::FileSystems,
        InfoGroup::Disks,
        InfoGroup::Interfaces,
        InfoGroup::Load,
    ];

    /// Its word on the bus.
    pub fn as_str(self) -> &'static str {
        match self {
            InfoGroup::Os => "os",
            InfoGroup::Hostname => "hostname",
            InfoGroup::Users => "users",
            InfoGroup::TimeZone => "time-zone",
            InfoGroup::FileSystems => "file-systems",
            InfoGroup::Disks => "disks",
            InfoGroup::Interfaces => "interfaces",
            InfoGroup::Load => "load",
        }
    }
}

/// One thing that an agent tells.
#[derive(Clone, Debug, PartialEq)]
pub enum GuestFact {
    /// `s`
    Text(String),
    /// `b`
    Flag(bool),
    /// `t`
    Number(u64),
    /// `i`
    Offset(i32),
    /// `d`
    Load(f64),
    /// `as`
    Texts(Vec<String>),
    /// `a(su)`: with the lengths of their prefixes.
    Addresses(Vec<(String, u32)>),
    /// `a{sv}`
    Facts(GuestFacts),
    /// `aa{sv}`
    Each(Vec<GuestFacts>),
}

/// What an agent tells of one thing; what it does not tell is not there.
pub type GuestFacts = BTreeMap<&'static str, GuestFact>;

/// A network card with the addresses that it has, as somebody knows them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CardAddresses {
    /// What it is called inside; empty if that is not known.
    pub name: String,
    /// Its hardware address in lower case; empty if it has none.
    pub mac: String,
    /// Its addresses, with the lengths of their prefixes, 0 if that is not known.
    pub addresses: Vec<(String, u32)>,
}

/// How a guest is put to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sleep {
    /// In memory.
    Memory,
    /// On disk; then it is off.
    Disk,
    /// In memory, and on disk should it lose that.
    Hybrid,
}

/// A program that is run in a guest.
#[derive(Debug, Default)]
pub struct Program {
    /// Its file and its arguments.
    pub argv: Vec<String>,
    /// Its environment, each as `NAME=value`; none: that of the agent.
    pub env: Vec<String>,
    /// What it reads, to its end; nothing if not given.
    pub stdin: Option<GivenFile>,
    /// Gets what it prints; kept nowhere if not given.
    pub stdout: Option<GivenFile>,
    /// Gets what it complains of; kept nowhere if not given.
    pub stderr: Option<GivenFile>,
}

/// A guest's agent. Errors of all: `AgentUnavailable` if none answers, `AgentFailed` with its own words, `TimedOut` if it takes too
/// long, after which it may still do what it was asked. One is asked one thing at a time; who waits for that waits a few seconds.
#[async_trait]
pub trait GuestAgent: Send + Sync {
    /// Gives it a command in its own protocol, a JSON object, and returns what it answers. Error: `Argument` if that is no command.
    async fn command(&self, command: &str, within: Duration) -> Result<String, DriverError>;

    /// The guest's cards and addresses.
    async fn addresses(&self) -> Result<Vec<CardAddresses>, DriverError>;

    /// What it tells of its guest, by the words of the groups; of none named, all that it can tell.
    async fn info(&self, groups: &[InfoGroup]) -> Result<GuestFacts, DriverError>;

    /// What the guest's clock says, in microseconds since the epoch.
    async fn time(&self) -> Result<u64, DriverError>;

    /// Sets the guest's clock: to this, in microseconds since the epoch, or to that of the machine.
    async fn set_time(&self, usec: Option<u64>) -> Result<(), DriverError>;

    /// Sets a user's password; `crypted`: what is given is its hash.
    async fn set_password(&self, user: &str, password: &str, crypted: bool) -> Result<(), DriverError>;

    /// Freezes the file systems mounted there, or all; says how many. What is frozen is thawed by the next virtd should this one end.
    /// Error: `Refused` while some are frozen.
    async fn freeze(&self, mountpoints: &[String]) -> Result<u32, DriverError>;

    /// Thaws them; says how many.
    async fn thaw(&self) -> Result<u32, DriverError>;

    /// Whether some are frozen that are to be thawed.
    fn is_frozen(&self) -> bool;

    /// Thaws them, however often that must be tried. Error: `Gone` if the guest has ended before.
    async fn thaw_at_last(&self) -> Result<(), DriverError>;

    /// Gives back what file systems do not use, in pieces of that many bytes at least; says of how many.
    async fn trim(&self, minimum: u64) -> Result<u32, DriverError>;

    /// Runs a program in the guest, and waits for its end and until what it has printed is written. Says how it ended: its exit
    /// status, or 128 and the number of the signal. Nothing is run if its input cannot be read. Who does not wait any more leaves it
    /// running.
    async fn run(&self, program: Program) -> Result<i32, DriverError>;

    /// Puts the guest to sleep. Returns when it has been asked.
    async fn sleep(&self, how: Sleep) -> Result<(), DriverError>;
}
