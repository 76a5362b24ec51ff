//! The one reader of what a host reports: has its machines be domains here, and tells what becomes of it.

use super::identity::{names, second_uuid};
use super::{OtherHost, fit};
use crate::domain::{AtHost, Domain, Domains, HostedSeed};
use crate::error::{Error, Result};
use crate::registry::Claimed;
use crate::shared::Shared;
use crate::store::{FoundDocument, HostedChange, HostedNote};
use crate::stored::StoredDef;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::inventory::{HostReport, Key, Seen};
use virt_model::state::StateReason;
use virt_model::xml::{Limits, shorten};

/// Whose machines these are, by the host's keys.
pub(super) struct Follower {
    shared: Arc<Shared>,
    domains: Arc<Domains>,
    host: Arc<OtherHost>,
    machines: BTreeMap<Key, Machine>,
    /// Those that were seen since it has answered.
    seen: BTreeSet<Key>,
    /// Between `Connected` and `Complete`: those that nobody knew. What has gone first gives its names and uuids back.
    new: Option<BTreeMap<Key, Seen>>,
    /// What is not shown as it was last seen, and why.
    refused: BTreeMap<Key, (Seen, String)>,
    /// Why nothing is kept of it.
    unkept: Option<String>,
    /// That is otherwise than what is published of it.
    problems_changed: bool,
    /// Goes when all was told for the first time, or it is known that that takes long.
    settling: Option<oneshot::Sender<()>>,
}

/// How many machines of one host are shown.
const MOST: usize = 10_000;

/// How many problems of one host are told.
const MOST_PROBLEMS: usize = 100;

/// A machine of it.
struct Machine {
    domain: Arc<Domain>,
    /// Its name there.
    host_name: String,
}

impl Follower {
    /// With the machines that were last seen, which are told of as of a host that does not answer; that they could not be read is a
    /// problem of it. The second fires when it is known what there is, or that it is not told soon.
    pub fn new(
        shared: &Arc<Shared>,
        domains: &Arc<Domains>,
        host: &Arc<OtherHost>,
        last_seen: Result<Vec<FoundDocument<HostedNote>>>,
    ) -> (Follower, oneshot::Receiver<()>) {
        let (settling, settled) = oneshot::channel();
        let mut follower = Follower {
            shared: shared.clone(),
            domains: domains.clone(),
            host: host.clone(),
            machines: BTreeMap::new(),
            seen: BTreeSet::new(),
            new: None,
            refused: BTreeMap::new(),
            unkept: None,
            problems_changed: false,
            settling: Some(settling),
        };
        let last_seen = last_seen.unwrap_or_else(|error| {
            tracing::error!(host = %host.name, %error, "what is seen of a host is not kept");
            let why = format!("what is seen of this host is not kept for the next start of virtd: {error}");
            (follower.unkept, follower.problems_changed) = (Some(why), true);
            Vec::new()
        });
        for found in last_seen {
            let uuid = found.uuid;
            if let Err(error) = follower.was_there(found) {
                tracing::warn!(%uuid, host = %host.name, %error, "what was last seen of a machine is left out");
                host.keep(HostedChange::Gone(uuid));
            }
        }
        follower.tell_problems();
        (follower, settled)
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
        if self.machines.contains_key(&key) {
            return Err(Error::StorageFailed("another document says that it is the same machine".to_owned()));
        }
        let free = |name: &String| self.domains.look(uuid, name).is_ok();
        let kept = [def.name.clone()].into_iter().chain(names(&self.host.name, &note.name, &key));
        let Some(name) = kept.into_iter().find(free) else { return Err(taken(&note.name)) };
        let (def, host_name) = (as_here(Arc::new(def), uuid, &name), note.name.clone());
        let stored = stored(&def)?;
        let live = def.clone();
        let domain = self.domain(&key, uuid, (&name, &host_name), stored, Some((note, live)))?;
        self.domains.insert(domain.clone());
        domain.is_unreachable(crate::time::now_usec());
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
                report = reports.recv() => match report {
                    Some(report) => self.takes(report).await,
                    None => return,
                },
                ask = asks.recv() => match ask {
                    Some(ask) => self.answers(ask, &mut reports).await,
                    None => return,
                },
            }
            if reports.is_empty() {
                self.tell_problems();
            }
        }
    }

    /// Answers a question when all before it is told; what comes after it is not waited for.
    async fn answers(&mut self, ask: oneshot::Sender<()>, reports: &mut mpsc::UnboundedReceiver<HostReport>) {
        for _ in 0..reports.len() {
            let Ok(report) = reports.try_recv() else { break };
            self.takes(report).await;
        }
        // Names and uuids that were taken may be free by now.
        for (seen, _) in std::mem::take(&mut self.refused).into_values() {
            self.problems_changed = true;
            self.sees(seen).await;
        }
        for machine in self.machines.values() {
            machine.domain.guest_is_told().await;
        }
        self.tell_problems();
        let _ = ask.send(());
    }

    async fn takes(&mut self, report: HostReport) {
        tracing::debug!(host = %self.host.name, ?report, "reported");
        match report {
            HostReport::Connected { version } => {
                self.seen.clear();
                self.new = Some(BTreeMap::new());
                self.problems_changed |= !self.refused.is_empty();
                self.refused.clear();
                self.host.is_in("connected", String::new(), Some(version));
            }
            HostReport::Seen(seen) => self.sees(*seen).await,
            HostReport::Active(key) => self.runs(&key).await,
            HostReport::Gone(key) => self.loses(&key).await,
            HostReport::Complete => {
                let unseen = self.machines.keys().filter(|key| !self.seen.contains(key));
                for key in unseen.cloned().collect::<Vec<_>>() {
                    self.loses(&key).await;
                }
                for seen in self.new.take().unwrap_or_default().into_values() {
                    self.sees(seen).await;
                }
                for machine in self.machines.values() {
                    machine.domain.guest_is_told().await;
                    machine.domain.all_of_host_told();
                }
                self.tell_problems();
                self.settling.take();
            }
            HostReport::Lost(why) => {
                tracing::warn!(host = %self.host.name, %why, "a host does not answer");
                let since = self.host.is_in("unreachable", why.to_string(), None);
                self.machines.values().for_each(|machine| machine.domain.is_unreachable(since));
                self.settling.take();
            }
        }
    }

    /// Publishes what is not shown, if that is otherwise than it was.
    fn tell_problems(&mut self) {
        if !std::mem::take(&mut self.problems_changed) {
            return;
        }
        let all = || self.unkept.iter().chain(self.refused.values().map(|(_, why)| why));
        let mut told: Vec<String> = all().take(MOST_PROBLEMS).map(|why| fit(why)).collect();
        let more = all().count().saturating_sub(MOST_PROBLEMS);
        if more > 0 {
            told.push(format!("and {more} more"));
        }
        self.host.tell(|facts| facts.problems = told);
    }

    async fn sees(&mut self, seen: Seen) {
        let key = seen.key.clone();
        self.seen.insert(key.clone());
        let known = self.machines.contains_key(&key);
        if let (false, Some(new)) = (known, &mut self.new) {
            new.insert(key, seen);
            return;
        }
        let shown = match known {
            true => self.is_otherwise(seen.clone()).await,
            false => self.is_new(seen.clone()),
        };
        let why = shown.err().map(|error| error.to_string());
        let before = match &why {
            None => self.refused.remove(&key),
            Some(why) => self.refused.insert(key.clone(), (seen, why.clone())),
        };
        self.problems_changed |= before.map(|(_, why)| why) != why;
        if !known && why.is_none() {
            // That it runs may have been told when it was not shown yet.
            self.runs(&key).await;
        }
    }

    fn is_new(&mut self, seen: Seen) -> Result<()> {
        if self.machines.len() >= MOST {
            let (name, host) = (shorten(&seen.name), &self.host.name);
            let text =
                format!("the machine '{name}' is not shown: of host '{host}' {MOST} are shown, which is the most");
            return Err(Error::LimitsExceeded(text));
        }
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
        let at = AtHost::new(self.host.clone(), key.clone());
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
        self.problems_changed |= self.refused.remove(key).is_some();
        self.new.iter_mut().for_each(|new| _ = new.remove(key));
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
        Error::OperationUnsupported(format!(
            "the machine '{}' is not shown: its configuration {why}",
            shorten(&def.name)
        ))
    })?;
    Ok(Arc::new(stored.at_another_host()))
}

fn taken(name: &str) -> Error {
    Error::DomainExists(format!(
        "the machine '{}' is not shown: other machines have every name that it could have here",
        shorten(name)
    ))
}
