//! One network: what is stored of it, what there is of it on the host, and who is in it. Bridges, rules and servers are its
//! driver's (`NetworkDriver`).
//!
//! ```text
//!  define ─▶ document and note on disk ─▶ told      start ─▶ the driver's record, then the host ─▶ told
//!  update ─▶ document ─▶ the host ─▶ told           destroy ─▶ the host ─▶ told
//! ```
//!
//! What the driver has on record outlives virtd: the next one finds it, whether a document is stored or not.

mod change;
mod manage;
mod run;

pub use change::HostEntry;
pub(crate) use manage::{load, plug_in_guests};

use crate::authz::{Action, Caller, Subject};
use crate::error::{Error, Result};
use crate::events::{Event, Happened};
use crate::facts::{LeaseFacts, NetworkFacts, ObjectFacts};
use crate::frames::{self, Changeable};
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef, Usage, User};
use crate::registry::{Object, Registry};
use crate::shared::Shared;
use crate::shown::text::published;
use crate::turn::Turn;
use crate::uses::Needed;
use crate::verb::{self, Verb, When};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use uuid::Uuid;
use virt_model::driver::network::{Lease, NetworkDriver, NetworkError, PartlySeen, Problem};
use virt_model::network::NetworkDef;
use virt_model::network::forward::ForwardDevice;

/// All networks of this host.
pub(crate) type Networks = Registry<Network>;

/// So many leases and reservations are published of a network; `GetLeases` and `GetXML` tell all.
const PUBLISHED: usize = 1024;

/// A network, from its definition or its start to its end.
pub struct Network {
    uuid: Uuid,
    owner: u32,
    name: String,
    shared: Arc<Shared>,
    networks: Arc<Networks>,
    turn: Arc<Turn>,
    state: Mutex<State>,
}

struct State {
    /// What is stored; of one whose document cannot be used, what stands for it.
    stored: Option<Arc<NetworkDef>>,
    /// What there is on the host.
    live: Option<Arc<NetworkDef>>,
    /// The devices of the host's that it gives to guests' cards.
    devices: Arc<[ForwardDevice]>,
    /// Why its document cannot be used.
    broken: Option<String>,
    autostart: bool,
    leases: Arc<[Lease]>,
    problems: Vec<Problem>,
    /// At the last look for problems not all could be looked at.
    partly_seen: bool,
    gone: bool,
    /// It is being destroyed: nobody is plugged in any more.
    going: bool,
    /// As last published.
    facts: Option<Arc<NetworkFacts>>,
}

/// What XML has no word for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Note {
    owner: u32,
    #[serde(default)]
    autostart: bool,
}

/// What is known of a verb of which nothing is done.
#[derive(Debug)]
pub struct CheckedNetwork {
    /// Why it would be refused.
    pub refusal: Option<Error>,
    /// Who is in it, or names it.
    pub users: Vec<User>,
}

/// What polkit is told of a network, or of one that is about to be defined.
fn subject(uuid: Uuid, name: &str) -> Subject {
    Subject::default().with("network_name", name).with("network_uuid", uuid.to_string())
}

impl Object for Network {
    const KIND: ObjectKind = ObjectKind::Network;

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn exists(text: String) -> Error {
        Error::NetworkExists(text)
    }
}

impl Changeable for Network {
    const KIND: ObjectKind = ObjectKind::Network;

    fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn turn(&self) -> &Arc<Turn> {
        &self.turn
    }

    fn reference(&self) -> ObjectRef {
        ObjectRef::Network(self.uuid)
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn subject(&self) -> Subject {
        subject(self.uuid, &self.name).owned_by(self.owner)
    }

    fn still_here(&self) -> Result<()> {
        match lock(&self.state).gone {
            true => Err(Error::NoSuchNetwork { what: "uuid", value: self.uuid.to_string() }),
            false => Ok(()),
        }
    }

    fn sound_for(&self, action: Action) -> Result<()> {
        match &lock(&self.state).broken {
            Some(why) if !matches!(action, Action::NetworkDefine | Action::NetworkDelete | Action::NetworkStop) => {
                Err(Error::OperationInvalid(format!(
                    "network '{}' is broken: {why}; define it anew, or undefine it",
                    self.name
                )))
            }
            _ => Ok(()),
        }
    }

    fn applies(&self, verb: &Verb) -> Result<()> {
        let state = lock(&self.state);
        let (active, persistent) = (state.live.is_some(), state.stored.is_some());
        let refused = |why: &str| Err(Error::OperationInvalid(format!("network '{}' {why}", self.name)));
        match verb.when {
            When::Inactive if active => refused("is active already"),
            When::Active if !active => refused("is not active: start it first"),
            When::Persistent if !persistent => refused("is transient: nothing is stored of it"),
            _ => Ok(()),
        }
    }
}

impl State {
    /// What keeps it from its work now. Of what could not be looked for, what was known is kept, which is logged once.
    fn has_looked(&mut self, name: &str, looked: std::result::Result<Vec<Problem>, PartlySeen>) {
        let problems = match looked {
            Ok(found) => {
                self.partly_seen = false;
                found
            }
            Err(PartlySeen { found, seen, why }) => {
                if !std::mem::replace(&mut self.partly_seen, true) {
                    tracing::warn!(
                        network = name,
                        "whether it can do its work is not known: {why}; what was known is kept"
                    );
                }
                let known = self.problems.iter().filter(|one| !seen.contains(&one.token) && !found.contains(one));
                known.cloned().chain(found.iter().cloned()).collect()
            }
        };
        let new = problems.iter().filter(|one| !self.problems.contains(*one));
        new.for_each(|one| tracing::warn!(network = name, "{}", one.sentence));
        self.problems = problems;
    }

    /// It is on the host no longer.
    fn has_stopped(&mut self) {
        (self.live, self.problems, self.partly_seen, self.leases) = (None, Vec::new(), false, Arc::default());
        self.devices = Arc::default();
    }
}

impl Network {
    /// Its identity.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is not there, and is to be when the host is.
    pub(crate) fn starts_with_host(&self) -> bool {
        let state = lock(&self.state);
        state.autostart && state.live.is_none()
    }

    /// What a method would meet now: `yes`, `no`, `challenge` or `na`. Never prompts.
    /// Error: `InvalidArgument` for a name that is no method of a network.
    pub async fn can(&self, caller: &Caller, member: &str) -> Result<&'static str> {
        let verb = verb::find("org.virt.Network", verb::NETWORK, member)?;
        Ok(frames::can(self, caller, verb).await)
    }

    /// Its document: what there is on the host, or with `inactive` what is stored.
    pub async fn xml(&self, caller: &Caller, inactive: bool) -> Result<String> {
        frames::beside(self, caller, &verb::NETWORK_XML, async {
            let shown = {
                let state = lock(&self.state);
                let live = state.live.as_ref().filter(|_| !inactive);
                live.map(|def| self.shared.plugs.shown(def).write())
                    .or_else(|| state.stored.as_ref().map(|def| def.write()))
            };
            let none = || Error::OperationInvalid(format!("network '{}' is transient: nothing is stored", self.name));
            shown.ok_or_else(none)
        })
        .await
    }

    /// Who has which address, each with the machine whose it is.
    pub async fn leases(&self, caller: &Caller) -> Result<Vec<(Lease, Option<Uuid>)>> {
        frames::beside(self, caller, &verb::GET_LEASES, async {
            // Everybody may read them: what is known of them is told, and no file is opened for it.
            let leases = lock(&self.state).leases.clone();
            let of = self.machines();
            Ok(leases.iter().map(|lease| (lease.clone(), machine_of(&of, lease))).collect())
        })
        .await
    }

    fn driver(&self) -> &Arc<dyn NetworkDriver> {
        &self.shared.host.networks
    }

    /// What there is on the host. Error: it is not active.
    fn live(&self) -> Result<Arc<NetworkDef>> {
        let live = lock(&self.state).live.clone();
        live.ok_or_else(|| Error::OperationInvalid(format!("network '{}' is not active: start it first", self.name)))
    }

    fn failed(&self, deed: &str, error: NetworkError) -> Error {
        failed(&self.name, deed, error)
    }

    /// The machines with a card in it, by the cards' addresses.
    fn machines(&self) -> HashMap<String, Uuid> {
        let users = self.users().into_iter();
        users.filter_map(|user| Some((user.place, user.object.domain()?))).collect()
    }

    /// Who is in it, or names it.
    fn users(&self) -> Vec<User> {
        self.shared.uses.of(|needed| matches!(needed, Needed::Network(name) if **name == *self.name))
    }

    /// Refuses what would take it from those who use it so.
    fn is_not_used(&self, deed: &str, how: Usage) -> Result<()> {
        let users = self.users();
        let named: Vec<String> =
            users.iter().filter(|user| user.how == how).map(|user| self.shared.images.called(user)).collect();
        if named.is_empty() {
            return Ok(());
        }
        Err(Error::InUse(format!("cannot {deed} network '{}': it is used by {}", self.name, named.join(", "))))
    }

    /// Changes it, and tells what came of it, as one.
    fn commit(&self, events: Vec<Happened>, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        if state.gone {
            return;
        }
        change(&mut state);
        state.gone = state.stored.is_none() && state.live.is_none();
        match state.gone {
            true => self.shared.plugs.are_gone(&self.name),
            false => {
                self.shared.plugs.forward_devices.are(&self.name, &state.devices);
                self.shared.plugs.are(&self.name, state.live.as_ref().filter(|_| !state.going), &state.leases);
            }
        }
        let facts = Arc::new(self.facts_of(&state));
        if state.facts.as_deref() == Some(&*facts) && events.is_empty() {
            return;
        }
        state.facts = Some(facts.clone());
        let told = match state.gone {
            false => Event::Object(ObjectFacts::Network(facts), events),
            true => Event::ObjectGone(ObjectFacts::Network(facts), events),
        };
        self.shared.events.send(told);
        if state.gone {
            // Only now: whoever takes its name after it must not be told of before its end is.
            self.networks.remove(self.uuid, &self.name, self.owner);
        }
    }

    fn facts_of(&self, state: &State) -> NetworkFacts {
        let (live, stored) = (state.live.as_deref(), state.stored.as_deref());
        let empty = NetworkDef::default();
        let def = live.or(stored).unwrap_or(&empty);
        let machines = self.machines();
        let addresses = def.addresses().into_iter().map(|(address, net)| format!("{address}/{}", net.prefix));
        let hosts = def.ips.iter().filter_map(|ip| ip.dhcp.as_ref()).flat_map(|dhcp| &dhcp.hosts).take(PUBLISHED);
        let hosts = hosts.map(|host| {
            let known = host.mac.map(|mac| mac.to_string()).or(host.id.clone()).unwrap_or_default();
            (known, host.ip.map(|ip| ip.to_string()).unwrap_or_default(), host.name.clone().unwrap_or_default())
        });
        let leases = state.leases.iter().take(PUBLISHED).map(|lease| LeaseFacts {
            mac: lease.mac.map(|mac| mac.to_string()).unwrap_or_default(),
            address: lease.address.to_string(),
            host_name: lease.host_name.clone(),
            domain: machine_of(&machines, lease),
        });
        NetworkFacts {
            name: self.name.clone(),
            uuid: self.uuid,
            active: live.is_some(),
            persistent: stored.is_some(),
            autostart: state.autostart,
            config_changed: live.zip(stored).is_some_and(|(live, stored)| live.write() != stored.write()),
            owner: self.owner,
            problems: state.problems.iter().map(|one| (one.token.as_str(), one.sentence.clone())).collect(),
            users: self.users(),
            mode: def.mode().as_str(),
            bridge: def.bridge_name().unwrap_or_default().to_owned(),
            addresses: addresses.collect(),
            domain_name: def.domain.as_ref().map(|domain| domain.name.clone()).unwrap_or_default(),
            forward_devices: names_of_devices(def, &state.devices),
            mtu: def.mtu.as_ref().map_or(0, |mtu| mtu.size),
            hosts: hosts.collect(),
            leases: leases.collect(),
            broken: published(state.broken.as_deref().unwrap_or_default()).to_owned(),
        }
    }

    /// Who is in it may be others now.
    fn look_at_users(&self) {
        self.commit(Vec::new(), |_| {});
    }
}

/// What packets leave by: of a network that gives its devices to guests' cards those that were found, else those that it names.
fn names_of_devices(def: &NetworkDef, found: &[ForwardDevice]) -> Vec<String> {
    let found = found.iter().filter_map(|device| device.link.clone().or_else(|| device.pci.clone()));
    let mut names: Vec<String> = found.collect();
    if names.is_empty() {
        let forward = def.forward.iter();
        let cards = forward.clone().flat_map(|forward| &forward.functions).map(|card| card.dev.clone());
        let addresses =
            forward.flat_map(|forward| &forward.addresses).filter_map(|address| Some(address.pci()?.to_string()));
        names.extend(def.forward_devices().into_iter().map(str::to_owned).chain(addresses).chain(cards));
    }
    names
}

/// The machine whose card has that lease.
fn machine_of(machines: &HashMap<String, Uuid>, lease: &Lease) -> Option<Uuid> {
    machines.get(&lease.mac?.to_string()).copied()
}

/// What a driver said while it was to `deed` the network.
fn failed(name: &str, deed: &str, error: NetworkError) -> Error {
    let what = format!("cannot {deed} network '{name}'");
    match error {
        NetworkError::Config(_) => Error::ConfigUnsupported(format!("{what}: {error}")),
        NetworkError::Failed(why) => Error::NetworkFailed(format!("{what}: {why}")),
    }
}
