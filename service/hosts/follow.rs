//! The one reader of what a host reports: has its machines be domains here, and tells what becomes of it.

use super::identity::{names, second_uuid};
use super::{Keep, OtherHost};
use crate::domain::{AtHost, Domain, Domains, HostedSeed};
use crate::error::{Error, Result};
use crate::registry::Claimed;
use crate::shared::Shared;
use crate::store::{Documents, FoundDocument, HostedChange, HostedNote, on_disk};
use crate::stored::StoredDef;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::inventory::{HostReport, Key, Seen};
use virt_model::state::StateReason;
use virt_model::xml::Limits;

/// Whose machines these are, by the host's keys.
pub(super) struct Follower {
    shared: Arc<Shared>,
    domains: Arc<Domains>,
    host: Arc<OtherHost>,
    machines: BTreeMap<Key, Machine>,
    /// Those that were seen since it has answered.
    seen: BTreeSet<Key>,
    /// Why machines are not shown.
    problems: BTreeMap<Key, String>,
    /// Goes when all was told for the first time, or it is known that that takes long.
    settling: Option<oneshot::Sender<()>>,
}

/// A machine of it.
struct Machine {
    domain: Arc<Domain>,
    /// Its name there.
    host_name: String,
}

/// Writes down what was seen, until the host goes with virtd.
pub(super) async fn keep(documents: Documents, mut changes: mpsc::UnboundedReceiver<Keep>) {
    while let Some(keep) = changes.recv().await {
        let change = match keep {
            Keep::Change(change) => change,
            Keep::AllBefore(told) => {
                let _ = told.send(());
                continue;
            }
        };
        let documents = documents.clone();
        if let Err(error) = on_disk(move || documents.keep_hosted(change)).await {
            tracing::warn!(%error, "what was last seen of a host's machine is not kept");
        }
    }
}

impl Follower {
    /// With the machines that were last seen, which are told of as of a host that does not answer. The second fires when it is known
    /// what there is, or that it is not told soon.
    pub async fn new(
        shared: &Arc<Shared>,
        domains: &Arc<Domains>,
        host: &Arc<OtherHost>,
        documents: &Documents,
    ) -> Result<(Follower, oneshot::Receiver<()>)> {
        let (settling, settled) = oneshot::channel();
        let mut follower = Follower {
            shared: shared.clone(),
            domains: domains.clone(),
            host: host.clone(),
            machines: BTreeMap::new(),
            seen: BTreeSet::new(),
            problems: BTreeMap::new(),
            settling: Some(settling),
        };
        let documents = documents.clone();
        for found in on_disk(move || documents.load::<HostedNote>()).await? {
            let uuid = found.uuid;
            if let Err(error) = follower.was_there(found) {
                tracing::warn!(%uuid, host = %host.name, %error, "what was last seen of a machine is left out");
                host.keep(HostedChange::Gone(uuid));
            }
        }
        Ok((follower, settled))
    }

    /// Makes a domain of a machine that was last seen so.
    fn was_there(&mut self, found: FoundDocument<HostedNote>) -> Result<()> {
        let FoundDocument { uuid, text, note } = found;
        let read = DomainDef::parse_within(&text.map_err(Error::StorageFailed)?, Limits::STORED);
        let def = read.map_err(Error::ConfigInvalid)?;
        if note.key.is_empty() || def.uuid != uuid || self.domains.get(uuid).is_some() {
            return Err(Error::StorageFailed(
                "it is not known which machine it is, or another one has its uuid".to_owned(),
            ));
        }
        let key = Key(note.key.as_str().into());
        let free = |name: &String| self.domains.look(uuid, name).is_ok();
        let kept = [def.name.clone()].into_iter().chain(names(&self.host.name, &note.name, &key));
        let Some(name) = kept.into_iter().find(free) else { return Err(taken(&note.name)) };
        let (def, host_name) = (as_here(Arc::new(def), uuid, &name), note.name.clone());
        let stored = stored(&def)?;
        let live = def.clone();
        let domain = self.domain(&key, uuid, (&name, &host_name), stored, Some((note, live)))?;
        self.domains.insert(domain.clone());
        domain.is_reachable(Some(crate::time::now_usec()));
        self.machines.insert(key, Machine { domain, host_name });
        Ok(())
    }

    /// Follows the host, as long as virtd runs: connects to it, and takes up what it has when `goes` has come.
    pub async fn run(mut self, mut asks: mpsc::UnboundedReceiver<oneshot::Sender<()>>, goes: oneshot::Receiver<()>) {
        let (to, mut reports) = mpsc::unbounded_channel();
        match self.host.inventory() {
            Ok(inventory) => inventory.watch(to),
            Err(error) => return tracing::error!(%error, "a host is not followed"),
        }
        let _ = goes.await;
        loop {
            tokio::select! {
                // A question is answered when all before it is told.
                biased;
                report = reports.recv() => match report {
                    Some(report) => self.takes(report).await,
                    None => return,
                },
                ask = asks.recv() => match ask {
                    Some(ask) => {
                        for machine in self.machines.values() {
                            machine.domain.guest_is_told().await;
                        }
                        let _ = ask.send(());
                    }
                    None => return,
                },
            }
        }
    }

    async fn takes(&mut self, report: HostReport) {
        tracing::debug!(host = %self.host.name, ?report, "reported");
        match report {
            HostReport::Connected { version } => {
                self.seen.clear();
                self.problems.clear();
                self.host.is_in("connected", String::new(), Some(version));
                self.machines.values().for_each(|machine| machine.domain.is_reachable(None));
            }
            HostReport::Seen(seen) => self.sees(*seen).await,
            HostReport::Active(key) => self.runs(&key).await,
            HostReport::Gone(key) => self.loses(&key).await,
            HostReport::Complete => {
                let unseen = self.machines.keys().filter(|key| !self.seen.contains(key));
                for key in unseen.cloned().collect::<Vec<_>>() {
                    self.loses(&key).await;
                }
                self.machines.values().for_each(|machine| machine.domain.all_of_host_told());
                self.tell_problems();
                self.settling.take();
            }
            HostReport::Lost(why) => {
                tracing::warn!(host = %self.host.name, %why, "a host does not answer");
                let since = self.host.is_in("unreachable", why.to_string(), None);
                self.machines.values().for_each(|machine| machine.domain.is_reachable(Some(since)));
                self.settling.take();
            }
        }
    }

    fn tell_problems(&self) {
        let all: Vec<String> = self.problems.values().cloned().collect();
        self.host.tell(|facts| facts.problems = all);
    }

    async fn sees(&mut self, seen: Seen) {
        let key = seen.key.clone();
        self.seen.insert(key.clone());
        let shown = match self.machines.contains_key(&key) {
            true => self.is_otherwise(seen).await,
            false => self.is_new(seen),
        };
        let known = match shown {
            Ok(()) => self.problems.remove(&key).is_some(),
            Err(error) => self.problems.insert(key, error.to_string()).is_none(),
        };
        if known {
            self.tell_problems();
        }
    }

    fn is_new(&mut self, seen: Seen) -> Result<()> {
        let Seen { key, uuid, name: host_name, def } = seen;
        let uuid = if self.domains.get(uuid).is_some() { second_uuid(&self.host.name, &key) } else { uuid };
        let free = |name: &String| matches!(self.domains.look(uuid, name), Ok(None));
        let name = names(&self.host.name, &host_name, &key).into_iter().find(free).ok_or_else(|| taken(&host_name))?;
        let stored = stored(&as_here(def, uuid, &name))?;
        let domain = self.domain(&key, uuid, (&name, &host_name), stored, None)?;
        domain.add();
        self.machines.insert(key, Machine { domain, host_name });
        Ok(())
    }

    /// A domain whose name and uuid are claimed for it.
    fn domain(
        &self,
        key: &Key,
        uuid: Uuid,
        (name, host_name): (&str, &str),
        stored: Arc<StoredDef>,
        last: Option<(HostedNote, Arc<DomainDef>)>,
    ) -> Result<Arc<Domain>> {
        match self.domains.claim(uuid, name, 0, usize::MAX)? {
            Claimed::Existing(_) => return Err(taken(name)),
            Claimed::New => {}
        }
        let at = AtHost { host: self.host.clone(), key: key.clone() };
        let (name, host_name) = (name.to_owned(), host_name.to_owned());
        let seed = HostedSeed { at, uuid, name, host_name, stored, last };
        Ok(Domain::of_host(&self.shared, &self.domains, seed))
    }

    async fn is_otherwise(&mut self, seen: Seen) -> Result<()> {
        let Seen { key, name: host_name, def, .. } = seen;
        let Some(machine) = self.machines.get_mut(&key) else { return Ok(()) };
        let (domain, uuid) = (machine.domain.clone(), machine.domain.uuid());
        let mut name = domain.name();
        if machine.host_name != host_name {
            let mut all = names(&self.host.name, &host_name, &key).into_iter();
            name = all
                .find(|one| *one == name || self.domains.claim_name(uuid, one).is_ok())
                .ok_or_else(|| taken(&host_name))?;
        }
        let def = as_here(def, uuid, &name);
        match stored(&def) {
            Ok(stored) => domain.is_at_host((&name, &host_name), def, stored).await,
            Err(error) => {
                if name != domain.name() {
                    self.domains.drop_name(&name);
                }
                return Err(error);
            }
        }
        machine.host_name = host_name;
        Ok(())
    }

    async fn runs(&mut self, key: &Key) {
        let Some(machine) = self.machines.get(key) else { return };
        // The end of the guest before it is told first.
        machine.domain.guest_is_told().await;
        let (events, reports) = virt_model::driver::reports();
        let Ok(inventory) = self.host.inventory() else { return };
        // It may have ended meanwhile.
        let Some(adopted) = inventory.adopt(key, events) else { return };
        if let Err(error) = machine.domain.runs_at_host(adopted, reports, StateReason::External) {
            tracing::error!(uuid = %machine.domain.uuid(), %error, "a guest is not followed");
        }
    }

    async fn loses(&mut self, key: &Key) {
        self.problems.remove(key);
        if let Some(machine) = self.machines.remove(key) {
            machine.domain.has_left_host().await;
        }
    }
}

/// A configuration with what its machine is called here. Its networks, volumes and images are the host's.
fn as_here(mut def: Arc<DomainDef>, uuid: Uuid, name: &str) -> Arc<DomainDef> {
    let here = Arc::make_mut(&mut def);
    (here.uuid, here.id) = (uuid, None);
    name.clone_into(&mut here.name);
    def
}

/// As it is kept and shown. Error: it could not be read again.
fn stored(def: &DomainDef) -> Result<Arc<StoredDef>> {
    let written = StoredDef::write(def, Limits::STORED);
    let (stored, _) = written.map_err(|why| {
        Error::OperationUnsupported(format!("the machine '{}' is not shown: its configuration {why}", def.name))
    })?;
    Ok(Arc::new(stored.at_another_host()))
}

fn taken(name: &str) -> Error {
    Error::DomainExists(format!(
        "the machine '{name}' is not shown: other machines have every name that it could have here"
    ))
}
