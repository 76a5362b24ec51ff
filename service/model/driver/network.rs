//! The contract between the service and whatever makes networks on the host: [`NetworkDriver`], and what it reports.
//!
//! The service owns which networks there are, who may touch them and which guests are in them. A driver makes bridge, addresses,
//! rules and servers of a definition, all or nothing, and finds them again after virtd was killed at any instruction.

use crate::device::interface::Vlan;
use crate::domain::value::Mac;
use crate::network::NetworkDef;
use crate::network::address::Net;
use crate::network::forward::ForwardDevice;
use crate::xml::Finding;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use tokio::sync::mpsc;
use uuid::Uuid;

/// Makes networks.
#[async_trait]
pub trait NetworkDriver: Send + Sync {
    /// What keeps it from being started here, whatever else there is on the host, in document order.
    fn check(&self, def: &NetworkDef) -> Vec<Finding>;

    /// Fills in what a definition leaves open and must never change again: the bridge's name, none of those that are `taken`, and
    /// its hardware address.
    async fn complete(&self, def: &mut NetworkDef, taken: &[String]);

    /// A net of the host's that no route leads to, nor is among `taken`: the first /24 from 192.168.122.0.
    async fn free_net(&self, taken: &[Net]) -> Result<Net, NetworkError>;

    /// What a start would be refused for now. Changes nothing.
    async fn can_start(&self, def: &NetworkDef) -> Result<(), NetworkError>;

    /// Makes it, all or nothing: on failure nothing is left of it. `owner` is told again by [`NetworkDriver::find`]. What is to be made is on disk before it is made.
    async fn start(&self, def: &NetworkDef, owner: u32) -> Result<(), NetworkError>;

    /// Takes it away; what is gone already is not missed. Guests' devices stay, without a bridge.
    async fn stop(&self, uuid: Uuid) -> Result<(), NetworkError>;

    /// Everything that an earlier virtd has made and that is there, finished, with its owner; what it was at has been undone.
    async fn find(&self) -> Vec<(NetworkDef, u32)>;

    /// Makes of a network that is there what `def` says, without a packet lost to who is in it.
    async fn change(&self, def: &NetworkDef) -> Result<(), NetworkError>;

    /// The devices of the host's of which a network that is there gives one to each guest's card, as they were when it was started,
    /// or last changed; none, of one with a bridge.
    async fn forward_devices(&self, uuid: Uuid) -> Vec<ForwardDevice>;

    /// Plugs cards of guests that are in no bridge, or were cut off on their way into its own, into a network that is there; nothing passes before each is held to what it
    /// was held to. What has gone meanwhile is left out, and what cannot be plugged is logged.
    async fn plug(&self, def: &NetworkDef, cards: Vec<PluggedCard>);

    /// Who has which address.
    async fn leases(&self, def: &NetworkDef) -> Result<Vec<Lease>, NetworkError>;

    /// Why a network that is there cannot do its work. Error: not all that could keep it from that could be looked at.
    async fn problems(&self, def: &NetworkDef) -> Result<Vec<Problem>, PartlySeen>;

    /// What befalls a network that was started or found, until it is stopped, and what has befallen it since somebody last looked for
    /// its problems; nothing of any other. One reader at a time.
    async fn watch(&self, uuid: Uuid) -> mpsc::Receiver<NetworkReport>;
}

/// A guest's card in a network, as it was when it was plugged in.
#[derive(Clone, Debug, PartialEq)]
pub struct PluggedCard {
    /// Its end on the host.
    pub end: String,
    /// It does not see others that are isolated.
    pub isolated: bool,
    /// The VLANs that it is in.
    pub vlan: Option<Vlan>,
}

/// What befalls a network by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkReport {
    /// Addresses were given, or given back.
    Leases,
    /// What serves addresses and names has ended.
    ServerEnded,
    /// It, or what others' rules do to it, was changed: what is known of it may be otherwise now.
    Changed,
    /// What it was in has ended, and it with that: it is to be stopped. Nothing more is reported of it.
    Gone,
}

/// An address that somebody has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Whose, where that can be told.
    pub mac: Option<Mac>,
    /// The address.
    pub address: IpAddr,
    /// How many bits of it are the network's.
    pub prefix: u8,
    /// What the guest calls itself, or is called; empty if nothing.
    pub host_name: String,
    /// What it is known by to the server.
    pub client_id: Option<String>,
    /// Of IPv6: which of its cards.
    pub iaid: Option<u32>,
    /// Until when, in seconds since 1970; 0: for ever.
    pub expires: u64,
}

/// Why a network that is there cannot do its work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// In a word.
    pub token: ProblemToken,
    /// In a sentence, with the remedy.
    pub sentence: String,
}

/// What keeps a network from its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProblemToken {
    /// A chain that is not virtd's drops packets of its guests.
    ForwardBlocked,
    /// The same of guests' questions for addresses and names.
    InputBlocked,
    /// What serves addresses and names has ended.
    DhcpDown,
    /// Its bridge was removed.
    BridgeGone,
    /// Its bridge is not in the zone of the host's firewall in which it is to be.
    ZoneLost,
    /// What brings packets out of a user's own namespaces has ended.
    UplinkDown,
}

impl ProblemToken {
    /// The word by which it is told.
    pub fn as_str(self) -> &'static str {
        match self {
            ProblemToken::ForwardBlocked => "forward-blocked",
            ProblemToken::InputBlocked => "input-blocked",
            ProblemToken::DhcpDown => "dhcp-down",
            ProblemToken::BridgeGone => "bridge-gone",
            ProblemToken::ZoneLost => "zone-lost",
            ProblemToken::UplinkDown => "uplink-down",
        }
    }
}

/// Not all could be looked at that may keep a network from its work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{why}")]
pub struct PartlySeen {
    /// What was found where it could be looked.
    pub found: Vec<Problem>,
    /// What was looked for there: what of it was not found is none.
    pub seen: Vec<ProblemToken>,
    /// Why it could not be looked elsewhere.
    pub why: String,
}

impl PartlySeen {
    /// It could be looked nowhere.
    pub fn nothing(why: impl ToString) -> PartlySeen {
        PartlySeen { found: Vec::new(), seen: Vec::new(), why: why.to_string() }
    }

    /// Adds what came of a look for one more problem to what came of others.
    pub fn add(looked: &mut Result<Vec<Problem>, PartlySeen>, token: ProblemToken, problem: Option<Problem>) {
        match looked {
            Ok(found) => found.extend(problem),
            Err(partly) => {
                partly.found.extend(problem);
                partly.seen.push(token);
            }
        }
    }
}

/// Why something could not be done.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NetworkError {
    /// Parts of the definition that cannot be run; never empty.
    #[error("{}", .0.iter().map(|f| f.message.as_str()).collect::<Vec<_>>().join("; "))]
    Config(Vec<Finding>),
    /// The host, or a program that does the work, refused; ends with its own words.
    #[error("{0}")]
    Failed(String),
}
