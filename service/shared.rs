//! What every object shares with the service: drivers, authority, events, jobs, images and the disk. It knows no object.

use crate::authz::{Authority, Caller};
use crate::autostart::Coming;
use crate::choices::Choices;
use crate::desk::{Desk, Reading};
use crate::error::{Error, Result};
use crate::events::Events;
use crate::fair::FairPlaces;
use crate::frozen_disks::FrozenDisks;
use crate::image_users::ImageUsers;
use crate::images::Images;
use crate::job::Jobs;
use crate::plugs::Plugs;
use crate::scrape::SCRAPES;
use crate::storage::CONNECTIONS;
use crate::store::{Store, on_disk};
use crate::stored::{Readings, StoredDef};
use crate::subscribe::{SUBSCRIPTIONS, Subscriptions};
use crate::turn::PATIENCE;
use crate::uses::Uses;
use crate::volumes::{self, Volumes};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::Driver;
use virt_model::driver::network::NetworkDriver;
use virt_model::driver::secrets::SecretKeeper;
use virt_model::driver::storage::Storage;

/// Knows who is on the bus.
pub trait Callers: Send + Sync {
    /// Fires when the owner of a unique bus name has left; at once if it is not there.
    fn watch(&self, bus_name: &str) -> CancellationToken;
}

/// How long between two attempts to make whole what is half done, at first and at most.
pub(crate) const AGAIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// What the host gives beside hypervisors.
#[derive(Clone)]
pub struct Host {
    /// Storage.
    pub storage: Arc<dyn Storage>,
    /// Who keeps the values of secrets.
    pub secrets: Arc<dyn SecretKeeper>,
    /// Who makes networks.
    pub networks: Arc<dyn NetworkDriver>,
}

/// How much any user but root may have.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Domains owned.
    pub domains_per_user: usize,
    /// Objects owned, of each other kind.
    pub others_per_user: usize,
    /// Jobs under way.
    pub jobs_per_user: usize,
    /// Volumes owned.
    pub volumes_per_user: u32,
    /// The capacity of those together, in bytes; `None`: any number.
    pub storage_per_user: Option<u64>,
    /// Documents being read. Root has no more than others.
    pub reading: Reading,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            domains_per_user: 1000,
            others_per_user: 1000,
            jobs_per_user: 64,
            volumes_per_user: 10_000,
            storage_per_user: None,
            reading: Reading::default(),
        }
    }
}

/// See the module.
pub(crate) struct Shared {
    pub drivers: Vec<Arc<dyn Driver>>,
    pub host: Host,
    pub authority: Arc<dyn Authority>,
    pub callers: Arc<dyn Callers>,
    pub events: Events,
    pub jobs: Arc<Jobs>,
    pub store: Store,
    pub limits: Limits,
    pub images: Arc<Images>,
    /// Who is warned of disks that cannot be written.
    pub frozen_disks: FrozenDisks,
    /// Which machine has which image.
    pub image_users: ImageUsers,
    /// What machines need of objects of other kinds.
    pub uses: Uses,
    /// Which networks there are for machines.
    pub plugs: Plugs,
    /// Which volumes there are for machines.
    pub volumes: Volumes,
    /// What is still to start with the host.
    pub coming: Coming,
    /// What is just being chosen for networks.
    pub choices: Arc<Choices>,
    pub desk: Arc<Desk>,
    /// Scrapes that are there.
    pub scrapes: Arc<FairPlaces<u32>>,
    /// Subscriptions to statistics, and how many there may be.
    pub subscriptions: Subscriptions,
    pub subscription_places: Arc<FairPlaces<u32>>,
    /// Connections to volumes that are served.
    pub connection_places: Arc<FairPlaces<u32>>,
    pub readings: Readings,
    /// Counts how often what a machine that wants devices of the host is made of has changed, or whether it runs.
    pub configurations: watch::Sender<u64>,
    /// Machines of which nothing is left but something that was cut off, and is not whole yet.
    unsettled: watch::Sender<BTreeMap<Uuid, usize>>,
    last_id: AtomicU32,
}

impl Shared {
    #[allow(clippy::too_many_arguments, reason = "each is a part of it, and it is made in one place")]
    pub fn new(
        drivers: Vec<Arc<dyn Driver>>,
        host: Host,
        authority: Arc<dyn Authority>,
        callers: Arc<dyn Callers>,
        events: Events,
        images: Arc<Images>,
        store: Store,
        limits: Limits,
    ) -> Arc<Shared> {
        let jobs = Jobs::new(events.clone(), limits.jobs_per_user, store.last_job());
        Arc::new(Shared {
            drivers,
            host,
            authority,
            callers,
            events,
            jobs,
            store,
            limits,
            images,
            frozen_disks: FrozenDisks::default(),
            image_users: ImageUsers::default(),
            uses: Uses::default(),
            plugs: Plugs::default(),
            volumes: Volumes::default(),
            coming: Coming::default(),
            choices: Arc::default(),
            desk: Desk::new(limits.reading),
            scrapes: FairPlaces::new(SCRAPES.0, SCRAPES.1),
            subscriptions: Subscriptions::default(),
            subscription_places: FairPlaces::new(SUBSCRIPTIONS.0, SUBSCRIPTIONS.1),
            connection_places: FairPlaces::new(CONNECTIONS.0, CONNECTIONS.1),
            readings: Readings::default(),
            configurations: watch::Sender::default(),
            unsettled: watch::Sender::default(),
            last_id: AtomicU32::new(0),
        })
    }

    /// A stored configuration, with where its volumes are.
    pub fn reading_of(&self, stored: &StoredDef) -> Result<Arc<DomainDef>> {
        let mut def = self.readings.of(stored)?;
        self.volumes.place(&mut def);
        Ok(def)
    }

    /// Waits, for a while, for what a machine needs that is just starting, or is still to start with the host.
    pub async fn settle_for(&self, def: &DomainDef) {
        let settled = async {
            self.coming.settle_for(def).await;
            self.volumes.settle_for(def).await;
        };
        let _ = tokio::time::timeout(volumes::PATIENCE, settled).await;
    }

    /// Has a definition that is to run say what its networks and volumes are. Errors: of what is not there, or not active.
    pub fn plug(&self, def: &mut Arc<DomainDef>) -> Result<()> {
        self.plugs.plug(def)?;
        self.volumes.plug(def)
    }

    /// The driver that serves `<domain type='kind'>`.
    pub fn driver_for(&self, kind: &str) -> Option<&Arc<dyn Driver>> {
        self.drivers.iter().find(|d| d.types().contains(&kind))
    }

    /// The driver of that name.
    pub fn driver_named(&self, name: &str) -> Option<&Arc<dyn Driver>> {
        self.drivers.iter().find(|d| d.name() == name)
    }

    /// Of this machine only something is left that was cut off; or that is whole now. Whoever says the first says the second.
    pub fn is_unsettled(&self, uuid: Uuid, unsettled: bool) {
        self.unsettled.send_modify(|all| {
            let at_it = all.entry(uuid).or_default();
            *at_it = if unsettled { *at_it + 1 } else { at_it.saturating_sub(1) };
            all.retain(|_, at_it| *at_it > 0);
        });
    }

    /// Waits until nothing of that machine is to be made whole, for as long as for a turn. Error: `Busy` then.
    pub async fn is_settled(&self, uuid: Uuid) -> Result<()> {
        let mut unsettled = self.unsettled.subscribe();
        let settled = unsettled.wait_for(|all| !all.contains_key(&uuid));
        match tokio::time::timeout(PATIENCE, settled).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::Busy {
                object: format!("the domain {uuid}"),
                job: "finishing what was cut off with it".to_owned(),
            }),
        }
    }

    /// Removes what is on disk of a guest that has gone.
    pub async fn forget_guest(self: &Arc<Self>, uuid: Uuid) -> Result<()> {
        let shared = self.clone();
        on_disk(move || {
            shared.store.forget_guest(uuid);
            Ok(())
        })
        .await
    }

    /// An id for a guest about to start, never used before by this virtd nor by a guest it found.
    pub fn next_id(&self) -> u32 {
        self.last_id.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// A guest with this id was found running.
    pub fn id_is_taken(&self, id: u32) {
        self.last_id.fetch_max(id, Ordering::Relaxed);
    }
}

/// virtd itself, as far as limits and the log are concerned; what it does of its own accord is not asked of anybody.
pub(crate) fn virtd_itself() -> Caller {
    Caller {
        bus_name: None,
        uid: nix::unistd::getuid().as_raw(),
        interactive: false,
        departed: CancellationToken::new(),
    }
}
