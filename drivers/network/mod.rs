//! Networks on the host itself: bridges, rules and dnsmasq. Everything outside virtd's own tables, bridges and servers is left
//! alone.
//!
//! | file | what it holds |
//! |---|---|
//! | `make` | the steps, and what is on disk of them |
//! | `link` | bridge, addresses, routes: iproute2 |
//! | `rules` | one table of nftables for each network |
//! | `serve`, `server` | what dnsmasq is told; its process |
//! | `leases` | who has which address |
//! | `devices` | devices of the host's that guests' cards are given |
//! | `foreign`, `rule_changes` | what others' rules stand in the way of; when others change them |
//! | `zones` | the zone of firewalld's that a bridge is in |
//! | `own` | the namespaces of a user without root, who holds them, and their uplink |
//! | `inside` | what is done in these, by a process that goes there |

mod devices;
mod foreign;
pub mod inside;
pub mod leases;
mod link;
mod make;
mod own;
mod rule_changes;
mod rules;
mod serve;
mod server;
#[cfg(test)]
pub(crate) mod tests;
pub mod zones;

use crate::host::process::{End, Process};
use async_trait::async_trait;
use foreign::Ruleset;
use make::{Maker, Namespace};
pub use own::OwnNetwork;
use rule_changes::RuleChanges;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use uuid::Uuid;
use virt_model::driver::network::{
    Lease, NetworkDriver, NetworkError, NetworkReport, PartlySeen, PluggedCard, Problem, ProblemToken,
};
use virt_model::network::NetworkDef;
use virt_model::network::address::Net;
use virt_model::network::forward::ForwardDevice;
use virt_model::xml::Finding;
use zones::Zones;

/// Reports that nobody has read yet; more of them say nothing more.
const UNREAD: usize = 4;

/// Networks of this host.
pub struct HostNetworks {
    maker: Arc<Maker>,
    /// One change of the host's network at a time: two starts would both find a net free. Who follows a network looks at it
    /// between changes only.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The networks that are there.
    followed: Arc<Mutex<Followed>>,
    zones: Option<Arc<dyn Zones>>,
    /// The bridges that are there are to be put into their zones, by who hears of zones.
    zones_due: Arc<Notify>,
    /// Who hears of zones; it ends when this is dropped.
    hears: JoinSet<()>,
}

/// The networks that an earlier virtd or this one has made, until they are stopped.
#[derive(Default)]
struct Followed {
    networks: HashMap<Uuid, Changes>,
    /// Who hears when others change rules, as long as there are networks; it ends when this is dropped.
    rules: Option<JoinSet<()>>,
    /// The bridges of those that were found have been put into their zones, as far as firewalld answers. Before, which are in
    /// theirs says nothing.
    zones_are_put: bool,
}

/// Who watches a network is told here that it was changed, or that others' rules were, with those rules for all who are told so. No
/// change is lost to a watcher who is busy: what they have not seen is kept.
struct Changes {
    told: watch::Sender<Option<Arc<Ruleset>>>,
    /// What has been told since somebody last looked for problems.
    unlooked: watch::Receiver<Option<Arc<Ruleset>>>,
}

impl Default for Changes {
    fn default() -> Changes {
        let (told, unlooked) = watch::channel(None);
        Changes { told, unlooked }
    }
}

impl Changes {
    /// The rules to look at for problems. What is told from here on is to be looked at again.
    fn ruleset(&mut self) -> Arc<Ruleset> {
        let is_told = self.unlooked.has_changed().unwrap_or(false);
        let told = self.unlooked.borrow_and_update().clone();
        // Those that it was looked at with before may be others by now, of which nothing has been told yet.
        told.filter(|_| is_told).unwrap_or_default()
    }
}

fn lock(followed: &Mutex<Followed>) -> MutexGuard<'_, Followed> {
    followed.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HostNetworks {
    /// Those with their records below `folder`, e.g. `/run/virt`, and leases below `state`, e.g. `/var/lib/virt`. `teller` is
    /// what dnsmasq runs when an address is given: it calls [`leases::tell`].
    /// Who is not root has them in an [`OwnNetwork`], if there is a `teller`.
    pub fn new(folder: &std::path::Path, state: &std::path::Path, teller: Option<PathBuf>) -> HostNetworks {
        let (runtime, leases) = (folder.join("networks"), state.join("leases"));
        let own = OwnNetwork::new(folder, teller.as_deref());
        let namespace = match own {
            _ if nix::unistd::geteuid().is_root() => Namespace::Host,
            Some(own) => Namespace::Own(own),
            None => Namespace::Nowhere,
        };
        let maker = Arc::new(Maker { runtime, leases, teller, namespace, steps_left: None });
        HostNetworks {
            maker,
            turn: Arc::default(),
            followed: Arc::default(),
            zones: None,
            zones_due: Arc::default(),
            hears: JoinSet::new(),
        }
    }

    /// With bridges in zones of the host's firewall. Before any network is started or found.
    pub fn with_zones(mut self, zones: Arc<dyn Zones>) -> HostNetworks {
        if matches!(self.maker.namespace, Namespace::Host) {
            let (maker, turn, due) = (self.maker.clone(), self.turn.clone(), self.zones_due.clone());
            self.hears.spawn(zones::hear(zones.clone(), maker, turn, Arc::downgrade(&self.followed), due));
            self.zones = Some(zones);
        }
        self
    }

    /// Runs what blocks for moments.
    async fn does<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Maker) -> T + Send + 'static,
    ) -> Result<T, NetworkError> {
        let maker = self.maker.clone();
        let done = tokio::task::spawn_blocking(move || work(&maker)).await;
        done.map_err(|error| NetworkError::Failed(format!("work on the host's network ended early: {error}")))
    }

    fn followed(&self) -> MutexGuard<'_, Followed> {
        lock(&self.followed)
    }

    /// That one is there from now on: who watches it is told of its changes, and of others' rules. For who has the turn, before
    /// anybody looks for its problems, so that no change falls between.
    fn is_there(&self, uuid: Uuid) {
        let mut followed = self.followed();
        followed.networks.entry(uuid).or_default();
        // Those in namespaces of a user's own have nobody else's rules beside them.
        if followed.rules.is_some() || !matches!(self.maker.namespace, Namespace::Host) {
            return;
        }
        let rules = followed.rules.insert(JoinSet::new());
        match RuleChanges::listen() {
            Ok(changes) => _ = rules.spawn(hear(changes, Arc::downgrade(&self.followed))),
            Err(error) => tracing::warn!(%error, "networks' problems do not follow others' rules: {NOT_HEARD}"),
        }
    }

    /// Puts the bridge of a network that is there into its zone; where firewalld is silent, that is done when it answers. For who has
    /// the turn.
    async fn put_into_zone(&self, def: &NetworkDef) {
        if let Some(zones) = &self.zones
            && zones::put_all(&**zones, std::slice::from_ref(def)).await
        {
            self.zones_due.notify_one();
        }
    }

    /// Takes the bridge of one that is about to go out of its zone, and tells which it is. For who has the turn.
    async fn take_out_of_zone(&self, uuid: Uuid) -> Result<Option<NetworkDef>, NetworkError> {
        let Some(zones) = &self.zones else { return Ok(None) };
        let there = self.does(Maker::there).await?;
        let def = there.into_iter().find(|def| def.uuid == uuid);
        if let Some(def) = &def {
            zones::take_out(&**zones, def).await;
        }
        Ok(def)
    }

    /// Tells who watches that it was changed. For who has the turn.
    fn tell(&self, uuid: Uuid) {
        self.followed().networks.get(&uuid).into_iter().for_each(|one| _ = one.told.send_replace(None));
    }
}

/// What to do where the kernel does not tell of changes.
const NOT_HEARD: &str = "they are looked at when a network starts, and when virtd does";

/// Tells all who watch networks when others have changed rules.
async fn hear(changes: RuleChanges, followed: Weak<Mutex<Followed>>) {
    loop {
        if let Err(error) = changes.settled().await {
            return tracing::warn!(%error, "networks' problems follow others' rules no longer: {NOT_HEARD}");
        }
        let Some(followed) = followed.upgrade() else { return };
        let rules = Arc::<Ruleset>::default();
        lock(&followed).networks.values().for_each(|one| _ = one.told.send_replace(Some(rules.clone())));
    }
}

#[async_trait]
impl NetworkDriver for HostNetworks {
    fn check(&self, def: &NetworkDef) -> Vec<Finding> {
        self.maker.check(def)
    }

    async fn complete(&self, def: &mut NetworkDef, taken: &[String]) {
        let known = self.does(|_| link::names()).await.ok().and_then(Result::ok).unwrap_or_default();
        def.complete(|name| known.iter().chain(taken).any(|one| one == name));
    }

    async fn free_net(&self, taken: &[Net]) -> Result<Net, NetworkError> {
        let taken = taken.to_vec();
        self.does(move |maker| maker.free_net(&taken)).await?
    }

    async fn can_start(&self, def: &NetworkDef) -> Result<(), NetworkError> {
        let def = def.clone();
        self.does(move |maker| maker.can_start(&def)).await?
    }

    async fn start(&self, def: &NetworkDef, owner: u32) -> Result<(), NetworkError> {
        let _turn = self.turn.lock().await;
        let made = def.clone();
        self.does(move |maker| maker.start(&made, owner)).await??;
        self.is_there(def.uuid);
        self.put_into_zone(def).await;
        Ok(())
    }

    async fn stop(&self, uuid: Uuid) -> Result<(), NetworkError> {
        let _turn = self.turn.lock().await;
        // Before anything of it is taken away: killed here, it is found whole, and put there again.
        let out = self.take_out_of_zone(uuid).await?;
        let stopped = self.does(move |maker| maker.stop(uuid)).await?;
        if let (Err(_), Some(def)) = (&stopped, &out) {
            self.put_into_zone(def).await;
        }
        stopped?;
        // Of one that is there still, who watches it goes on.
        let mut followed = self.followed();
        followed.networks.remove(&uuid);
        if followed.networks.is_empty() {
            followed.rules = None;
        }
        Ok(())
    }

    async fn find(&self) -> Vec<(NetworkDef, u32)> {
        let _turn = self.turn.lock().await;
        let found = self.does(Maker::find).await.unwrap_or_default();
        found.iter().for_each(|(def, _)| self.is_there(def.uuid));
        // Not waited for: virtd has no name before this has returned, and firewalld may answer nobody for minutes.
        self.zones_due.notify_one();
        found
    }

    async fn change(&self, def: &NetworkDef) -> Result<(), NetworkError> {
        let _turn = self.turn.lock().await;
        let (uuid, def) = (def.uuid, def.clone());
        let done = self.does(move |maker| maker.change(&def)).await?;
        self.tell(uuid);
        done
    }

    async fn forward_devices(&self, uuid: Uuid) -> Vec<ForwardDevice> {
        self.does(move |maker| maker.forward_devices(uuid)).await.unwrap_or_default()
    }

    async fn plug(&self, def: &NetworkDef, cards: Vec<PluggedCard>) {
        if cards.is_empty() {
            return;
        }
        let def = def.clone();
        let done = self.does(move |maker| maker.plug(&def, &cards)).await;
        done.unwrap_or_else(|why| tracing::warn!(%why, "guests are not plugged in again"));
    }

    async fn leases(&self, def: &NetworkDef) -> Result<Vec<Lease>, NetworkError> {
        let def = def.clone();
        self.does(move |maker| maker.leases(&def)).await?.map_err(|error| NetworkError::Failed(error.to_string()))
    }

    async fn problems(&self, def: &NetworkDef) -> Result<Vec<Problem>, PartlySeen> {
        let rules = self.followed().networks.get_mut(&def.uuid).map(Changes::ruleset).unwrap_or_default();
        let seen = def.clone();
        let looked = self.does(move |maker| maker.problems(&seen, &rules)).await;
        let mut looked = looked.unwrap_or_else(|error| Err(PartlySeen::nothing(error)));
        if let Some(zones) = self.zones.as_ref().filter(|_| self.followed().zones_are_put) {
            let lost = zones::problem(&**zones, def).await;
            PartlySeen::add(&mut looked, ProblemToken::ZoneLost, lost);
        }
        looked
    }

    async fn watch(&self, uuid: Uuid) -> mpsc::Receiver<NetworkReport> {
        let (to, from) = mpsc::channel(UNREAD);
        let changes = self.followed().networks.get(&uuid).map(|one| one.unlooked.clone());
        if let Some(changes) = changes {
            tokio::spawn(follow(self.maker.clone(), self.turn.clone(), uuid, changes, to));
        }
        from
    }
}

/// Reports what befalls a network until it is stopped or nobody listens.
async fn follow(
    maker: Arc<Maker>,
    turn: Arc<tokio::sync::Mutex<()>>,
    uuid: Uuid,
    mut changes: watch::Receiver<Option<Arc<Ruleset>>>,
    to: mpsc::Sender<NetworkReport>,
) {
    let (mut were_down, mut changed) = (0, false);
    loop {
        let there = {
            // While it is changed its server may end and be another: whoever looks has missed no change that was made before.
            let _turn = turn.lock().await;
            let Ok(unseen) = changes.has_changed() else { return };
            changed |= unseen;
            changes.mark_unchanged();
            let maker = maker.clone();
            // One that is not there any more was stopped.
            match tokio::task::spawn_blocking(move || maker.watched(uuid)).await {
                Ok(Some(there)) => there,
                _ => return,
            }
        };
        let held = |process: std::os::fd::OwnedFd| Process::new(process).ok();
        let holder = match there.holder {
            None => None,
            Some(holder) => match holder.and_then(held) {
                Some(holder) => Some(holder),
                None => return gone(&to).await,
            },
        };
        let parts: Vec<Option<Process>> = there.parts.into_iter().map(|part| part.and_then(held)).collect();
        let are_down = parts.iter().filter(|part| part.is_none()).count();
        let report = match (changed, are_down > were_down) {
            (true, _) => Some(NetworkReport::Changed),
            (false, true) => Some(NetworkReport::ServerEnded),
            (false, false) => None,
        };
        were_down = are_down;
        if let Some(report) = report
            && to.send(report).await.is_err()
        {
            return;
        }
        changed = false;
        let watched = leases::WatchedLeases::new(&there.told).ok();
        loop {
            tokio::select! {
                another = changes.changed() => match another {
                    Ok(()) => {
                        changed = true;
                        break;
                    }
                    Err(_) => return,
                },
                () = to.closed() => return,
                touched = touch_of(watched.as_ref()) => {
                    if touched.is_err() { break }
                    let _ = to.try_send(NetworkReport::Leases);
                }
                _ = ended_of(holder.as_ref()) => return gone(&to).await,
                () = one_ended(&parts) => break,
            }
        }
    }
}

/// Says that it has gone, if somebody listens.
async fn gone(to: &mpsc::Sender<NetworkReport>) {
    let _ = to.send(NetworkReport::Gone).await;
}

async fn touch_of(watched: Option<&leases::WatchedLeases>) -> std::io::Result<()> {
    match watched {
        Some(watched) => watched.touched().await,
        None => std::future::pending().await,
    }
}

async fn ended_of(process: Option<&Process>) -> End {
    match process {
        Some(process) => process.ended().await,
        None => std::future::pending().await,
    }
}

/// Waits until one of them has ended.
async fn one_ended(parts: &[Option<Process>]) {
    match parts {
        [one, another] => tokio::select! {
            _ = ended_of(one.as_ref()) => {}
            _ = ended_of(another.as_ref()) => {}
        },
        parts => _ = ended_of(parts.first().and_then(Option::as_ref)).await,
    }
}
