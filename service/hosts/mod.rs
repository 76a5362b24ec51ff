//! Hosts of other hypervisors, which keep their machines by themselves: which there are, and whether they answer. Their machines are
//! domains as all others (`service/domain/hosted.rs` has what is otherwise with them); `follow.rs` takes up what a host reports.
//!
//! Nobody who reads waits for a host: what is published is what was last seen, and a host that does not answer is shown as that.

mod follow;
mod identity;
mod keep;

use crate::Service;
use crate::authz::{Action, Caller, Subject};
use crate::domain::Domains;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::facts::{HostFacts, ObjectFacts};
use crate::frames::{self, Changeable};
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef};
use crate::shared::Shared;
use crate::store::{Documents, FoundDocument, HostedChange, HostedNote, on_disk};
use crate::time::now_usec;
use crate::turn::Turn;
use crate::verb::{self, Verb};
use follow::Follower;
use keep::Keeper;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use virt_model::driver::inventory::{Ability, Inventory};
use virt_model::driver::{Driver, DriverError};
use virt_model::xml::{plainly, shorten};

/// A host, as long as virtd runs.
pub struct OtherHost {
    name: Arc<str>,
    driver: Arc<dyn Driver>,
    shared: Arc<Shared>,
    turn: Arc<Turn>,
    /// As last published.
    facts: Mutex<Arc<HostFacts>>,
    /// Who writes down what was seen.
    keeper: Keeper,
    /// Asks its follower to say when all is told that was reported before.
    asks: mpsc::UnboundedSender<oneshot::Sender<()>>,
}

/// How long virtd's end waits for what was seen of all hosts to be written down.
const KEPT: Duration = Duration::from_secs(10);

/// All hosts.
pub(crate) struct Hosts(BTreeMap<Arc<str>, Arc<OtherHost>>);

impl Hosts {
    /// Begins to follow these hosts, those first that come first: of machines of one name, theirs is whose it is. When this returns, each
    /// has told what it has, or is shown as it was last seen.
    pub async fn open(shared: &Arc<Shared>, domains: &Arc<Domains>, drivers: Vec<Arc<dyn Driver>>) -> Result<Hosts> {
        let mut all = BTreeMap::new();
        let mut followers = Vec::new();
        for driver in drivers {
            let Some(profile) = driver.inventory().map(|inventory| inventory.profile().clone()) else { continue };
            let found = found(shared, &profile.name).await;
            let (asks, asked) = mpsc::unbounded_channel();
            let documents = found.as_ref().ok().map(|(documents, _)| documents.clone());
            let host = OtherHost::new(shared, driver, Keeper::of(documents), asks)?;
            let (follower, wait) = Follower::new(shared, domains, &host, found.map(|(_, found)| found));
            host.tell(|_| ());
            all.insert(host.name.clone(), host);
            followers.push((follower, asked, wait, profile.connect_wait));
        }
        forget_others(shared, all.keys().map(|name| name.to_string()).collect()).await?;
        let begun = Instant::now();
        let mut waits = Vec::new();
        for (follower, asked, settled, patience) in followers {
            let (go, goes) = oneshot::channel();
            tokio::spawn(follower.run(asked, goes));
            waits.push((go, settled, patience));
        }
        // All are connected to at once, and what they have is taken up in their order.
        for (go, settled, patience) in waits {
            let _ = go.send(());
            // One that has not answered by then is shown as it was last seen.
            let _ = timeout_at(begun + patience, settled).await;
        }
        Ok(Hosts(all))
    }
}

impl Hosts {
    /// Waits until what was seen is written down, for a while.
    pub async fn close(&self) {
        let until = Instant::now() + KEPT;
        for host in self.0.values() {
            if timeout_at(until, host.keeper.all_kept()).await.is_err() {
                tracing::warn!(host = %host.name, "the disk is too slow for what was last seen of a host: some of it is not kept");
            }
        }
    }
}

/// Where that is written down which is seen of a host, and what is there.
async fn found(shared: &Arc<Shared>, host: &str) -> Result<(Documents, Vec<FoundDocument<HostedNote>>)> {
    let (on, host) = (shared.clone(), host.to_owned());
    on_disk(move || {
        let documents = on.store.hosted(&host)?;
        let found = documents.load::<HostedNote>()?;
        Ok((documents, found))
    })
    .await
}

/// What is kept of hosts that are not configured any more goes.
async fn forget_others(shared: &Arc<Shared>, configured: Vec<String>) -> Result<()> {
    let on = shared.clone();
    on_disk(move || {
        for name in on.store.hosts_kept().into_iter().filter(|name| !configured.contains(name)) {
            on.store.forget_host(&name).unwrap_or_else(|e| tracing::warn!("{e}"));
        }
        Ok(())
    })
    .await
}

impl Service {
    /// Publishes the machines of other hosts, too, and follows those. To be called once, before anybody is on the bus.
    pub async fn follow_other_hosts(&self, drivers: Vec<Arc<dyn Driver>>) -> Result<()> {
        let hosts = Hosts::open(&self.shared, &self.domains, drivers).await?;
        let _ = self.hosts.set(hosts);
        Ok(())
    }

    /// The names of the other hosts.
    pub fn other_hosts(&self) -> Vec<String> {
        self.hosts.get().into_iter().flat_map(|hosts| hosts.0.keys()).map(|name| name.to_string()).collect()
    }

    /// The host of that name.
    pub fn other_host(&self, name: &str) -> Result<Arc<OtherHost>> {
        let found = self.hosts.get().and_then(|hosts| hosts.0.get(name));
        found.cloned().ok_or_else(|| {
            let known = self.other_hosts().join(", ");
            Error::InvalidArgument(format!("there is no host '{}', only {known}", shorten(name)))
        })
    }
}

impl OtherHost {
    fn new(
        shared: &Arc<Shared>,
        driver: Arc<dyn Driver>,
        keeper: Keeper,
        asks: mpsc::UnboundedSender<oneshot::Sender<()>>,
    ) -> Result<Arc<OtherHost>> {
        let inventory = driver.inventory().ok_or_else(|| no_inventory(&*driver))?;
        let facts = HostFacts {
            name: inventory.profile().name.as_str().into(),
            driver: driver.name(),
            address: inventory.address(),
            version: String::new(),
            error: String::new(),
            proof: inventory.proof(),
            state: "connecting",
            since_usec: now_usec(),
            abilities: inventory.abilities().iter().map(|ability| ability.as_str()).collect(),
            problems: Vec::new(),
        };
        Ok(Arc::new(OtherHost {
            name: facts.name.clone(),
            driver,
            shared: shared.clone(),
            turn: Arc::default(),
            facts: Mutex::new(Arc::new(facts)),
            keeper,
            asks,
        }))
    }

    /// What the administrator calls it.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(crate) fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Who speaks to it.
    pub(crate) fn inventory(&self) -> Result<&dyn Inventory> {
        self.driver.inventory().ok_or_else(|| no_inventory(&*self.driver))
    }

    pub(crate) fn abilities(&self) -> Vec<Ability> {
        self.inventory().map(Inventory::abilities).unwrap_or_default()
    }

    /// Whether nothing is done to its machines by us.
    pub(crate) fn is_read_only(&self) -> bool {
        self.inventory().is_ok_and(|inventory| inventory.profile().read_only)
    }

    /// Refuses while it does not answer.
    pub(crate) fn reachable(&self) -> Result<(), DriverError> {
        self.driver.inventory().map_or(Ok(()), Inventory::reachable)
    }

    /// Has something kept of a machine of it.
    pub(crate) fn keep(&self, change: HostedChange) {
        self.keeper.keep(change);
    }

    /// Asks again now a host that is lost, or one that is there what it has. Returns when it is asked.
    pub async fn reconnect(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        frames::beside(&**self, caller, &verb::RECONNECT, async {
            self.inventory()?.look_again();
            Ok(())
        })
        .await
    }

    /// Looks at all its machines. Returns when what is otherwise is told. Error: `HostUnreachable`.
    pub async fn refresh(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        frames::beside(&**self, caller, &verb::REFRESH, async {
            let looked = self.inventory()?.refresh().await;
            looked.map_err(|e| Error::from_driver_of(ObjectKind::Host, &self.name, verb::REFRESH.word, e))?;
            self.reports_are_told().await;
            Ok(())
        })
        .await
    }

    /// Returns when all that was reported of its machines until now is told.
    pub(crate) async fn reports_are_told(&self) {
        let (ask, told) = oneshot::channel();
        if self.asks.send(ask).is_ok() {
            // No answer: virtd is closing.
            let _ = told.await;
        }
    }

    /// Changes what is published of it.
    fn tell(&self, change: impl FnOnce(&mut HostFacts)) {
        let mut facts = lock(&self.facts);
        let mut now = (**facts).clone();
        change(&mut now);
        *facts = Arc::new(now);
        self.shared.events.send(Event::Object(ObjectFacts::Host(facts.clone()), Vec::new()));
    }

    /// The state in which it is, since now.
    fn is_in(&self, state: &'static str, error: String, version: Option<String>) -> u64 {
        let since_usec = now_usec();
        let mut since = since_usec;
        self.tell(|facts| {
            if facts.state != state {
                (facts.state, facts.since_usec) = (state, since_usec);
            }
            since = facts.since_usec;
            facts.error = fit(&error);
            facts.version = version.map_or_else(|| facts.version.clone(), |version| fit(&version));
            facts.abilities = self.abilities().iter().map(|ability| ability.as_str()).collect();
        });
        since
    }
}

/// A text that came from a host, fit to be shown: what is deceptive is written out, and it is not too long.
fn fit(text: &str) -> String {
    const LONGEST: usize = 500;
    let shown: String = text.chars().take(LONGEST).collect();
    let shown = plainly(&shown).into_owned();
    if text.chars().nth(LONGEST).is_some() { shown + "…" } else { shown }
}

fn no_inventory(driver: &dyn Driver) -> Error {
    Error::Internal(format!("the driver '{}' is for no host", driver.name()))
}

impl Changeable for OtherHost {
    const KIND: ObjectKind = ObjectKind::Host;

    fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn turn(&self) -> &Arc<Turn> {
        &self.turn
    }

    fn reference(&self) -> ObjectRef {
        ObjectRef::Host(self.name.clone())
    }

    fn name(&self) -> String {
        self.name.to_string()
    }

    fn subject(&self) -> Subject {
        Subject::default().with("driver", self.driver.name()).with("host", &*self.name)
    }

    fn still_here(&self) -> Result<()> {
        Ok(())
    }

    fn sound_for(&self, _: Action) -> Result<()> {
        Ok(())
    }

    fn applies(&self, _: &Verb) -> Result<()> {
        Ok(())
    }
}
