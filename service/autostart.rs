//! What starts with the host, once since it booted: networks and pools, then the machines that may need them. Nobody waits for all of
//! it, but a machine that is started meanwhile waits for what it needs of it. What has had its turn is noted: a virtd that is killed
//! before all have had theirs leaves the others to the next one.

use crate::boot::{AT_ONCE, in_place};
use crate::domain::{Domain, Domains, StartOptions};
use crate::error::Result;
use crate::network::{Network, Networks};
use crate::shared::{Shared, virtd_itself};
use crate::storage::{Pool, Pools, StartPool};
use crate::store::{Autostarting, on_disk};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;
use virt_model::domain::DomainDef;

/// How long machines that start with the host wait for what they may need.
const NEEDED_FIRST: Duration = Duration::from_secs(120);

/// What machines need that is still to start with the host.
#[derive(Debug, Default)]
pub(crate) struct Coming(watch::Sender<BTreeSet<Needed>>);

/// A network or a pool, by its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Needed {
    Network(String),
    Pool(String),
}

impl Coming {
    /// Waits until all that a definition names has had its turn.
    pub async fn settle_for(&self, def: &DomainDef) {
        let networks = def.named_networks().map(|(name, _)| name.to_owned());
        let disks = def.devices.disks.iter().flat_map(|disk| disk.volumes().map(|(pool, _)| pool.to_owned()));
        let needed: Vec<Needed> = networks.map(Needed::Network).chain(disks.map(Needed::Pool)).collect();
        let mut coming = self.0.subscribe();
        let _ = coming.wait_for(|coming| needed.iter().all(|one| !coming.contains(one))).await;
    }

    fn came(&self, needed: &Needed) {
        self.0.send_modify(|coming| {
            coming.remove(needed);
        });
    }
}

/// See the module.
pub(crate) struct Autostart {
    shared: Arc<Shared>,
    networks: Vec<Arc<Network>>,
    pools: Vec<Arc<Pool>>,
    domains: Vec<Arc<Domain>>,
    turns: Arc<Autostarting>,
}

impl Autostart {
    /// What is still to be started, if anything may be. Machines that are started from now on wait for what they need of it.
    pub async fn open(
        shared: &Arc<Shared>,
        networks: &Networks,
        pools: &Pools,
        domains: &Domains,
    ) -> Result<Option<Autostart>> {
        let on = shared.clone();
        let Some(turns) = on_disk(move || Ok(on.store.autostarting())).await? else { return Ok(None) };
        let (mut networks, mut pools, mut domains) = (networks.all(), pools.all(), domains.all());
        networks.retain(|network| network.starts_with_host() && !turns.has_had(network.uuid()));
        networks.sort_by(|a, b| a.name().cmp(b.name()));
        pools.retain(|pool| pool.starts_with_host() && !turns.has_had(pool.uuid()));
        pools.sort_by(|a, b| a.name().cmp(b.name()));
        domains.retain(|domain| domain.facts().autostart && !turns.has_had(domain.uuid()));
        let needed = networks.iter().map(|network| Needed::Network(network.name().to_owned()));
        let needed = needed.chain(pools.iter().map(|pool| Needed::Pool(pool.name().to_owned())));
        shared.coming.0.send_replace(needed.collect());
        Ok(Some(Autostart { shared: shared.clone(), networks, pools, domains, turns: Arc::new(turns) }))
    }

    /// Begins with it. Error: `StorageFailed`.
    pub async fn begin(self) -> Result<()> {
        if self.networks.is_empty() && self.pools.is_empty() && self.domains.is_empty() {
            return on_disk(move || self.turns.finish()).await;
        }
        tokio::spawn(async move {
            let Autostart { shared, networks, pools, domains, turns } = self;
            let noted = turns.clone();
            let needed = tokio::spawn(async move {
                tokio::join!(start_networks(&shared, networks, &noted), start_pools(&shared, pools, &noted));
            });
            // One that never comes to its end keeps only those machines from starting that need it.
            if timeout(NEEDED_FIRST, needed).await.is_err() {
                tracing::error!(
                    "networks or pools have not all started by now: machines start without waiting for them"
                );
            }
            start_machines(domains, &turns).await;
            if let Err(error) = on_disk(move || turns.finish()).await {
                tracing::error!(%error, "that all has started with the host is not noted");
            }
        });
        Ok(())
    }
}

/// An object has had its turn.
async fn had(turns: &Arc<Autostarting>, uuid: Uuid) {
    let turns = turns.clone();
    if let Err(error) = on_disk(move || turns.note(uuid)).await {
        tracing::warn!(%uuid, %error, "that it has started with the host is not noted");
    }
}

async fn start_networks(shared: &Shared, networks: Vec<Arc<Network>>, turns: &Arc<Autostarting>) {
    for network in networks {
        if network.starts_with_host()
            && let Err(error) = network.start(&virtd_itself()).await
        {
            tracing::error!(uuid = %network.uuid(), name = network.name(), "autostart: {error}");
        }
        shared.coming.came(&Needed::Network(network.name().to_owned()));
        had(turns, network.uuid()).await;
    }
}

async fn start_pools(shared: &Shared, pools: Vec<Arc<Pool>>, turns: &Arc<Autostarting>) {
    for pool in pools {
        if pool.starts_with_host() {
            let started = async { pool.start(&virtd_itself(), StartPool::default()).await?.done().await };
            if let Err(error) = started.await {
                tracing::error!(uuid = %pool.uuid(), name = pool.name(), "autostart: {error}");
            }
        }
        shared.coming.came(&Needed::Pool(pool.name().to_owned()));
        had(turns, pool.uuid()).await;
    }
}

/// Returns when all have been started, or could not be.
async fn start_machines(domains: Vec<Arc<Domain>>, turns: &Arc<Autostarting>) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut starts = JoinSet::new();
    for domain in domains {
        let (places, turns) = (places.clone(), turns.clone());
        starts.spawn(async move {
            start_machine(&domain, places).await;
            had(&turns, domain.uuid()).await;
        });
    }
    starts.join_all().await;
}

async fn start_machine(domain: &Arc<Domain>, places: Arc<Semaphore>) {
    // First it is found out whether it runs.
    domain.is_looked_after().await;
    if domain.facts().active {
        return;
    }
    let started = async {
        match domain.launch(&virtd_itself(), None, StartOptions::default()).await {
            Ok(ticket) => ticket.done().await,
            Err(e) => Err(e),
        }
    };
    if let Err(e) = in_place(places, started).await {
        tracing::error!(uuid = %domain.uuid(), name = domain.name(), "autostart: {e}");
    }
}
