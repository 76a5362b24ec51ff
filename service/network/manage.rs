//! All networks: documents until they are networks, look-up, and what is found when virtd starts.

use super::{Network, Networks, Note, State, subject};
use crate::authz::{Caller, Subject};
use crate::choices::Choice;
use crate::error::{Error, Result};
use crate::frames::{self, Changeable as _};
use crate::lock::lock;
use crate::log;
use crate::registry::{Claimed, check_new_name};
use crate::shared::Shared;
use crate::store::{Folder, FoundDocument, on_disk};
use crate::uses::Needed;
use crate::verb::Verb;
use crate::{Service, verb};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::network::NetworkDef;
use virt_model::xml::{Finding, FindingKind, Limits, shorten};

impl Service {
    /// The network with this uuid, written with or without dashes.
    pub fn network_by_uuid(&self, uuid: &str) -> Result<Arc<Network>> {
        let missing = || Error::NoSuchNetwork { what: "uuid", value: shorten(uuid) };
        self.network(crate::read_uuid(uuid)?).ok_or_else(missing)
    }

    /// The network with this uuid, if there is one.
    pub fn network(&self, uuid: Uuid) -> Option<Arc<Network>> {
        self.networks.get(uuid)
    }

    /// The network of this name.
    pub fn network_by_name(&self, name: &str) -> Result<Arc<Network>> {
        let missing = || Error::NoSuchNetwork { what: "name", value: shorten(name) };
        self.networks.by_name(name).ok_or_else(missing)
    }

    /// Stores a network: a new one, or another document for the one with its uuid and name. What there is of it goes on as it was.
    pub async fn define_network(&self, caller: &Caller, xml: &str) -> Result<Arc<Network>> {
        let (verb, begun) = (&verb::DEFINE_NETWORK, Instant::now());
        let result = self.define_network_inner(caller, xml).await;
        log_made(caller, verb, begun, &result);
        result
    }

    async fn define_network_inner(&self, caller: &Caller, xml: &str) -> Result<Arc<Network>> {
        let (def, claimed, _choice) = self.accept_network(caller, xml, &[&verb::DEFINE_NETWORK]).await?;
        match claimed {
            Claimed::Existing(network) => {
                let _turn = frames::take_turn(&*network, verb::DEFINE_NETWORK.word, &CancellationToken::new()).await?;
                network.store(&def).await?;
                network.commit(vec![("defined", "updated")], |state| {
                    (state.stored, state.broken) = (Some(Arc::new(def)), None);
                });
                Ok(network)
            }
            Claimed::New => {
                let (uuid, name) = (def.uuid, def.name.clone());
                let network = new(&self.shared, &self.networks, &def, caller.uid);
                if let Err(error) = network.store(&def).await {
                    self.networks.remove(uuid, &name, caller.uid);
                    return Err(error);
                }
                crate::fail_point::reached();
                self.networks.insert(network.clone());
                network.commit(vec![("defined", "added")], |state| state.stored = Some(Arc::new(def)));
                Ok(network)
            }
        }
    }

    /// Starts a network of which nothing is stored, or the inactive stored one of that uuid and name with this document.
    pub async fn create_network(&self, caller: &Caller, xml: &str) -> Result<Arc<Network>> {
        let (verb, begun) = (&verb::CREATE_NETWORK, Instant::now());
        let result = self.create_network_inner(caller, xml).await;
        log_made(caller, verb, begun, &result);
        result
    }

    async fn create_network_inner(&self, caller: &Caller, xml: &str) -> Result<Arc<Network>> {
        let verbs = [&verb::CREATE_NETWORK, &verb::NETWORK_START];
        let (def, claimed, _choice) = self.accept_network(caller, xml, &verbs).await?;
        let (network, is_new) = match claimed {
            Claimed::Existing(network) => (network, false),
            Claimed::New => (new(&self.shared, &self.networks, &def, caller.uid), true),
        };
        let turn = frames::take_turn(&*network, verb::CREATE_NETWORK.word, &CancellationToken::new()).await?;
        let made = async {
            network.applies(&verb::NETWORK_START)?;
            let (def, _choice) = network.completed(&Arc::new(def)).await?;
            if is_new {
                self.networks.insert(network.clone());
            }
            network.make_of(def).await
        };
        let made = made.await;
        if made.is_err() && is_new {
            lock(&network.state).gone = true;
            self.networks.remove(network.uuid, &network.name, caller.uid);
        }
        // Whoever waits for it finds it gone.
        drop(turn);
        made.map(|()| network)
    }

    /// Everything that a definition would be refused for and everything that could not be started. Changes nothing.
    pub async fn validate_network(&self, caller: &Caller, xml: &str) -> Result<Vec<Finding>> {
        self.allow(caller, &verb::VALIDATE_NETWORK, &Subject::default()).await?;
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let (def, mut findings) = seat.read(xml, |text| NetworkDef::parse_leniently(text, Limits::ACCEPTED)).await;
        let Some(def) = def else { return Ok(findings) };
        let (networks, checked) = (self.shared.host.networks.clone(), def.clone());
        virt_model::xml::add_findings(&mut findings, seat.work(move || networks.check(&checked)).await);
        if self.nameless(&def).is_none()
            && let Err(conflict) = self.networks.look(def.uuid, &def.name)
        {
            findings.push(Finding::anywhere(FindingKind::Invalid, "/name", conflict.to_string()));
        }
        Ok(findings)
    }

    /// Reads a document, asks for permission for all of `verbs`, completes it, and claims its name and uuid.
    async fn accept_network(
        &self,
        caller: &Caller,
        xml: &str,
        verbs: &[&Verb],
    ) -> Result<(NetworkDef, Claimed<Network>, Choice)> {
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let mut def = seat.read(xml, NetworkDef::parse).await.map_err(Error::ConfigInvalid)?;
        // Nobody keeps a seat while a person is asked.
        drop(seat);
        let nameless = self.nameless(&def);
        let existing = match &nameless {
            Some(network) => Some(network.clone()),
            None => self.networks.look(def.uuid, &def.name)?,
        };
        let about = existing.as_ref().map_or_else(|| subject(def.uuid, &def.name), |network| network.subject());
        for verb in verbs {
            self.allow(caller, verb, &about).await?;
            if let (Some(network), Some(action)) = (&existing, verb.action) {
                network.sound_for(action)?;
            }
        }
        if existing.is_none() || nameless.is_some() {
            check_new_name("network", &def.name)?;
        }
        let choosing = self.shared.choices.turn().await;
        let others = others(&self.shared, &self.networks, def.uuid);
        let bridges: Vec<String> = others.iter().filter_map(|def| def.bridge_name().map(str::to_owned)).collect();
        if let Some(name) = def.bridge_name().filter(|name| def.mode().is_ours() && bridges.iter().any(|b| b == name)) {
            let text =
                format!("the bridge '{}' is another network's: leave out its name, or choose another", shorten(name));
            return Err(Error::NetworkExists(text));
        }
        if let Some(kept) = existing.as_ref().and_then(|network| lock(&network.state).stored.clone()) {
            keep_chosen(&mut def, &kept);
        }
        self.shared.host.networks.complete(&mut def, &bridges).await;
        let choice = self.shared.choices.keep(Arc::new(def.clone()));
        drop(choosing);
        def.write_readable().map_err(Error::OperationInvalid)?;
        let existing = match nameless {
            Some(network) => Some(self.give_name(&network, &def).await?),
            None => existing,
        };
        let limit = self.shared.limits.others_per_user;
        let claimed = self.networks.claim_as_seen(def.uuid, &def.name, caller.uid, limit, existing.as_ref())?;
        Ok((def, claimed, choice))
    }
}

impl Service {
    /// One that is called by its uuid, as its document cannot be read: a new document has a name for it.
    fn nameless(&self, def: &NetworkDef) -> Option<Arc<Network>> {
        let network = self.networks.get(def.uuid)?;
        let is_nameless = network.name == network.uuid.to_string() && network.name != def.name;
        let is_broken = lock(&network.state).broken.is_some();
        (is_nameless && is_broken).then_some(network)
    }

    /// Has another stand for it, with the name that the document has. Error: `NetworkExists`.
    async fn give_name(&self, network: &Arc<Network>, def: &NetworkDef) -> Result<Arc<Network>> {
        // Whoever undefines it would remove the other's document.
        let _turn = frames::take_turn(&**network, verb::DEFINE_NETWORK.word, &CancellationToken::new()).await?;
        self.networks.claim_name(def.uuid, &def.name)?;
        let named = new(&self.shared, &self.networks, def, network.owner);
        {
            let (mut before, mut now) = (lock(&network.state), lock(&named.state));
            if before.gone || before.live.is_some() {
                drop((before, now));
                self.networks.drop_name(&def.name);
                return Err(Error::NetworkExists(format!("network '{}' is another by now; try again", network.name)));
            }
            before.gone = true;
            now.stored = Some(Arc::new(NetworkDef { uuid: def.uuid, name: def.name.clone(), ..NetworkDef::default() }));
            (now.broken, now.autostart) = (before.broken.clone(), before.autostart);
        }
        self.networks.insert(named.clone());
        self.networks.drop_name(&network.name);
        self.shared.plugs.are_gone(&network.name);
        // Its name is another by now, whatever becomes of the document.
        named.look_at_users();
        Ok(named)
    }
}

/// What other networks are: stored, on the host, or just being made.
pub(super) fn others(shared: &Shared, networks: &Networks, uuid: Uuid) -> Vec<Arc<NetworkDef>> {
    let all = networks.all().into_iter().filter(|other| other.uuid != uuid);
    let known = all.flat_map(|other| {
        let state = lock(&other.state);
        state.stored.iter().chain(&state.live).cloned().collect::<Vec<_>>()
    });
    known.chain(shared.choices.of_others(uuid)).collect()
}

/// What was chosen once for a network stays with it, where a new document leaves it open.
fn keep_chosen(def: &mut NetworkDef, kept: &NetworkDef) {
    if def.mode().is_ours() && kept.mode().is_ours() {
        if let (None, Some(name)) = (def.bridge_name(), kept.bridge_name()) {
            def.set_bridge_name(name);
        }
        if def.mac.is_none() {
            def.mac.clone_from(&kept.mac);
        }
    }
}

fn log_made(caller: &Caller, verb: &Verb, begun: Instant, result: &Result<Arc<Network>>) {
    match result {
        Ok(network) => frames::log_of(&**network, caller, verb, begun, None),
        Err(error) => log::refused(caller, verb, begun, error),
    }
}

/// One whose name and uuid are claimed, of which nothing is stored and nothing there.
fn new(shared: &Arc<Shared>, networks: &Arc<Networks>, def: &NetworkDef, owner: u32) -> Arc<Network> {
    let state = State {
        stored: None,
        live: None,
        devices: Arc::default(),
        broken: None,
        autostart: false,
        leases: Arc::default(),
        problems: Vec::new(),
        partly_seen: false,
        gone: false,
        going: false,
        facts: None,
    };
    Arc::new(Network {
        uuid: def.uuid,
        owner,
        name: def.name.clone(),
        shared: shared.clone(),
        networks: networks.clone(),
        turn: Arc::default(),
        state: Mutex::new(state),
    })
}

/// Fills the registry from disk, and from what there is on the host. One whose document cannot be used is there, and says so.
pub(crate) async fn load(shared: &Arc<Shared>, networks: &Arc<Networks>) -> Result<()> {
    let on = shared.clone();
    let found = on_disk(move || on.store.documents(Folder::Networks).load::<Note>()).await?;
    let there = shared.host.networks.find().await;
    put_all(shared, networks, found, &there);
    for (def, owner) in there {
        is_there(shared, networks, def, owner).await;
    }
    networks.all().iter().for_each(|network| network.look_at_users());
    serve_guests(shared, networks);
    Ok(())
}

/// Has all that are stored in the registry; `there` is what there is on the host.
fn put_all(
    shared: &Arc<Shared>,
    networks: &Arc<Networks>,
    found: Vec<FoundDocument<Note>>,
    there: &[(NetworkDef, u32)],
) {
    let mut broken = Vec::new();
    for FoundDocument { uuid, text, note } in found {
        let first = |findings: Vec<Finding>| findings.first().map(ToString::to_string).unwrap_or_default();
        let read = text.as_ref().map_err(String::clone);
        let read = read.and_then(|text| NetworkDef::parse_within(text, Limits::STORED).map_err(first));
        let other = |def: &NetworkDef| format!("its file holds the network {}", def.uuid);
        let read = read.and_then(|def| if def.uuid == uuid { Ok(def) } else { Err(other(&def)) });
        let read = read.and_then(|def| networks.look(uuid, &def.name).map(|_| def).map_err(|e| e.to_string()));
        match read {
            Ok(def) => put(shared, networks, def, None, &note),
            Err(why) => broken.push((uuid, text.unwrap_or_default(), why, note)),
        }
    }
    // Names are first of all those of documents that can be used.
    for (uuid, text, why, note) in broken {
        tracing::error!(%uuid, "the document of this network is left alone: {why}");
        let live = there.iter().map(|(def, _)| def).find(|def| def.uuid == uuid);
        let said = NetworkDef::parse_leniently(&text, Limits::STORED).0.filter(|def| def.uuid == uuid);
        let names = live.into_iter().chain(&said).map(|def| def.name.clone());
        let is_name = |name: &str| !name.is_empty() && !name.contains('/') && check_new_name("network", name).is_ok();
        let free = |name: &String| is_name(name) && networks.look(uuid, name).is_ok();
        // Guests that are in it name it so, and so does a new document.
        let name = names.into_iter().find(free).unwrap_or_else(|| uuid.to_string());
        put(shared, networks, NetworkDef { uuid, name, ..NetworkDef::default() }, Some(why), &note);
    }
}

/// It is on the host, whether something is stored of it or not: what there is is followed from now on.
async fn is_there(shared: &Arc<Shared>, networks: &Arc<Networks>, def: NetworkDef, owner: u32) {
    let network = match networks.get(def.uuid) {
        Some(network) => network,
        // Nothing is stored of it.
        None => match networks.claim(def.uuid, &def.name, owner, usize::MAX) {
            Ok(Claimed::New) => {
                let network = new(shared, networks, &def, owner);
                networks.insert(network.clone());
                network
            }
            Ok(Claimed::Existing(network)) => network,
            Err(error) => {
                return tracing::error!(uuid = %def.uuid, %error, "a network that is there is left alone");
            }
        },
    };
    let looked = shared.host.networks.problems(&def).await;
    let leases = shared.host.networks.leases(&def).await.unwrap_or_default();
    let devices = shared.host.networks.forward_devices(def.uuid).await;
    {
        let mut state = lock(&network.state);
        state.has_looked(&network.name, looked);
        (state.live, state.devices, state.leases) = (Some(Arc::new(def)), devices.into(), leases.into());
    }
    network.follow();
}

/// Machines have networks started that they are to be in, and each network looks when somebody comes to use it.
fn serve_guests(shared: &Arc<Shared>, networks: &Arc<Networks>) {
    let all = Arc::downgrade(networks);
    shared.plugs.started_by(Box::new(move |caller, name| {
        let network = all.upgrade().and_then(|networks| networks.by_name(&name));
        Box::pin(async move {
            match network {
                Some(network) => network.start(&caller).await,
                None => Err(Error::NoSuchNetwork { what: "name", value: shorten(&name) }),
            }
        })
    }));
    let all = Arc::downgrade(networks);
    shared.uses.listen(move |changed| {
        let Some(networks) = all.upgrade() else { return };
        for needed in changed {
            if let Needed::Network(name) = needed {
                networks.by_name(name).iter().for_each(|network| network.look_at_users());
            }
        }
    });
}

/// Has one that is stored in the registry.
fn put(shared: &Arc<Shared>, networks: &Arc<Networks>, def: NetworkDef, broken: Option<String>, note: &Note) {
    if let Err(error) = networks.claim(def.uuid, &def.name, note.owner, usize::MAX) {
        return tracing::error!(uuid = %def.uuid, %error, "a stored network is left alone");
    }
    let network = new(shared, networks, &def, note.owner);
    {
        let mut state = lock(&network.state);
        (state.stored, state.broken, state.autostart) = (Some(Arc::new(def)), broken, note.autostart);
    }
    networks.insert(network);
}

/// Plugs the guests in that an earlier virtd was about to plug in. To be called when the machines are known.
pub(crate) fn plug_in_guests(networks: &Networks) {
    networks.all().iter().for_each(Network::plug_again_soon);
}
