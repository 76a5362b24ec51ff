//! What virtd does when it starts: loads definitions, finds the guests that run, makes whole what was cut off, autostarts.

use crate::domain::{Birth, Domain, FoundGuest, StartOptions};
use crate::error::{Error, Result};
use crate::registry::Claimed;
use crate::shared::{Shared, now_usec, virtd_itself};
use crate::store::{Ended, Loaded, Note, Status, on_disk};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::{Condition, Driver, Reconnect, Reconnected};
use virt_model::state::{DomainState, PmSuspended, StateReason, Suspended};

/// How many guests are reconnected, or started, at once.
const AT_ONCE: usize = 16;

/// How long guests are looked for before virtd is there for everybody, whatever one of them does.
const LOOK: Duration = Duration::from_secs(1);

/// How long one machine that does not come on keeps others waiting for its place among [`AT_ONCE`].
const PLACE: Duration = Duration::from_secs(5);

/// Fills the registry from disk and from the guests that run. What can be told without waiting for any of them is told when
/// this returns; each machine that is not whole then has its turn taken, and is looked after by itself.
pub(crate) async fn load(shared: &Arc<Shared>) -> Result<()> {
    let on = shared.clone();
    let definitions = on_disk(move || on.store.load_definitions()).await?;
    let on = shared.clone();
    let mut snapshots = on_disk(move || load_snapshots(&on)).await?;
    let mut cut_off: BTreeSet<Uuid> =
        snapshots.iter().filter(|(_, loaded)| loaded.intent.is_some()).map(|(uuid, _)| *uuid).collect();
    for (uuid, xml, note) in definitions {
        if let Err(e) = load_definition(shared, uuid, &xml, note, snapshots.remove(&uuid).unwrap_or_default()) {
            tracing::error!(%uuid, "its stored configuration is left alone: {e}");
        }
    }
    let on = shared.clone();
    let statuses = on_disk(move || on.store.load_statuses()).await?;
    for status in statuses.values().flatten() {
        shared.id_is_taken(status.id);
    }
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut looked_at = JoinSet::new();
    for (uuid, status) in statuses {
        cut_off.remove(&uuid);
        let search = match Search::begin(shared, uuid, status, snapshots.remove(&uuid).unwrap_or_default()) {
            Ok(Some(search)) => search,
            Ok(None) => {
                shared.forget_guest(uuid).await?;
                continue;
            }
            Err(e) => {
                tracing::error!(%uuid, "a guest that may run is left alone: {e}");
                if let Some(domain) = shared.registry.get(uuid) {
                    domain.may_run(&e);
                }
                continue;
            }
        };
        let (looked, is_looked_at) = oneshot::channel::<()>();
        // An error means the same: whoever was to say it is no longer there.
        looked_at.spawn(async move { drop(is_looked_at.await) });
        let domain = search.domain.clone();
        look_after(&domain, &places, async move {
            search.run().await;
            drop(looked);
        });
    }
    let _ = timeout(LOOK, looked_at.join_all()).await;
    for domain in cut_off.into_iter().filter_map(|uuid| shared.registry.get(uuid)) {
        look_after(&domain, &places, async {});
    }
    for domain in shared.registry.all() {
        domain.announce();
    }
    Ok(())
}

/// Does `first`, then makes the domain whole, in a task that has its turn from now on.
fn look_after(domain: &Arc<Domain>, places: &Arc<Semaphore>, first: impl Future<Output = ()> + Send + 'static) {
    let Some(turn) = domain.turn_to_recover(&CancellationToken::new()) else {
        return tracing::error!(uuid = %domain.uuid(), "it is looked after already");
    };
    let (domain, places) = (domain.clone(), places.clone());
    tokio::spawn(async move {
        let place = places.acquire_owned().await;
        let work = async {
            first.await;
            // The log has it by then.
            let _ = domain.made_whole().await;
        };
        let mut work = std::pin::pin!(work);
        if timeout(PLACE, &mut work).await.is_err() {
            drop(place);
            work.await;
        }
        drop(turn);
    });
}

/// The snapshots of all domains. Those that cannot be read are left alone.
fn load_snapshots(shared: &Shared) -> Result<HashMap<Uuid, Loaded>> {
    let mut all = HashMap::new();
    for uuid in shared.store.domains_with_snapshots() {
        match shared.store.load_snapshots(uuid) {
            Ok(loaded) => _ = all.insert(uuid, loaded),
            Err(e) => tracing::error!(%uuid, "its snapshots are left alone: {e}"),
        }
    }
    Ok(all)
}

fn load_definition(shared: &Arc<Shared>, uuid: Uuid, xml: &str, note: Note, snapshots: Loaded) -> Result<()> {
    let def = DomainDef::parse(xml).map_err(Error::ConfigInvalid)?;
    if def.uuid != uuid {
        return Err(Error::StorageFailed(format!("the file is named {uuid}, the domain in it is {}", def.uuid)));
    }
    let driver = shared.driver_for(&def.kind).cloned().ok_or_else(|| {
        Error::ConfigUnsupported(format!("no driver serves domains of type '{}' in this virtd", def.kind))
    })?;
    let never = Ended { reason: StateReason::Unknown, since_usec: now_usec() };
    let ended = shared.store.ended(uuid).unwrap_or(never);
    enter(shared, Birth { def, persistent: true, driver, note, ended, snapshots })?;
    Ok(())
}

/// Registers a domain found on disk.
fn enter(shared: &Arc<Shared>, birth: Birth) -> Result<Arc<Domain>> {
    match shared.registry.claim(birth.def.uuid, &birth.def.name, birth.note.owner, usize::MAX)? {
        Claimed::Existing(domain) => Ok(domain),
        Claimed::New => {
            let domain = Domain::new(shared.clone(), birth);
            shared.registry.insert(domain.clone());
            Ok(domain)
        }
    }
}

/// A guest that ran when virtd was last here is looked for.
struct Search {
    shared: Arc<Shared>,
    domain: Arc<Domain>,
    driver: Arc<dyn Driver>,
    live: Arc<DomainDef>,
    status: Status,
}

impl Search {
    /// Makes the domain that it belongs to, where there is none, and what was last known of it that domain's. From now on it
    /// is not started beside that. `None`: no guest of it can have outlived the last virtd.
    fn begin(shared: &Arc<Shared>, uuid: Uuid, status: Result<Status>, snapshots: Loaded) -> Result<Option<Search>> {
        let known = shared.registry.get(uuid);
        let stored = known.as_ref().and_then(|domain| domain.stored());
        let status = match status {
            Ok(status) => status,
            Err(e) => {
                let Some(status) = unreadable(shared, stored.as_deref()) else { return Ok(None) };
                tracing::error!(%uuid, "what is noted of its guest cannot be read: {e}; it is looked for all the same");
                status
            }
        };
        let driver = shared.driver_named(&status.driver).cloned();
        let driver =
            driver.ok_or_else(|| Error::ConfigUnsupported(format!("this virtd has no driver '{}'", status.driver)))?;
        let live = match DomainDef::parse(&status.live) {
            Ok(live) => Arc::new(live),
            Err(findings) => {
                let why = Error::ConfigInvalid(findings);
                tracing::error!(%uuid, "the configuration of its guest cannot be read: {why}; that of its next start is shown");
                stored.map_or_else(|| unknown(uuid, &driver).map(Arc::new), Ok)?
            }
        };
        let domain = match known {
            Some(domain) => domain,
            None => {
                let note = Note { owner: status.owner, autostart: false };
                let ended = Ended { reason: status.reason, since_usec: status.since_usec };
                let def = DomainDef::clone(&live);
                enter(shared, Birth { def, persistent: false, driver: driver.clone(), note, ended, snapshots })?
            }
        };
        domain.is_sought(&status, live.clone());
        Ok(Some(Search { shared: shared.clone(), domain, driver, live, status }))
    }

    /// Finds it, or learns that it has gone; else the domain says why neither can be told.
    async fn run(self) {
        let (domain, uuid) = (self.domain.clone(), self.domain.uuid());
        if let Err(e) = self.look().await {
            tracing::error!(%uuid, "its guest is left alone: {e}");
            domain.cannot_be_found(&e);
        }
    }

    async fn look(self) -> Result<()> {
        let Search { shared, domain, driver, live, status } = self;
        let (store, uuid) = (&shared.store, domain.uuid());
        let file = store.status_file(uuid, status.clone());
        let (events, reports) = mpsc::unbounded_channel();
        let found = match &status.record {
            None => None,
            Some(record) => driver
                .reconnect(Reconnect {
                    live: DomainDef::clone(&live),
                    record: record.clone(),
                    last: last_condition(status.state, status.reason),
                    runtime_dir: store.runtime_dir(uuid),
                    log_file: store.log_file(uuid),
                    recorder: file.clone(),
                    events,
                })
                .await
                .map_err(|e| Error::from_driver(&live.name, "find", e))?,
        };
        match found {
            Some(Reconnected { instance, condition }) => {
                domain.adopt(FoundGuest { instance, live, condition, status, file }, reports).await;
                tracing::info!(%uuid, name = domain.name(), ?condition, "found its guest");
            }
            None => {
                tracing::warn!(%uuid, name = live.name, "its guest ended, or its start was cut off, while virtd was away");
                domain.ended_unseen().await;
            }
        }
        Ok(())
    }
}

/// What is assumed of a guest of which nothing can be read: that it runs, until its driver says that it does not. `None`:
/// guests of that kind end with virtd.
fn unreadable(shared: &Arc<Shared>, stored: Option<&DomainDef>) -> Option<Status> {
    let kind = |driver: &Arc<dyn Driver>| stored.is_none_or(|def| driver.types().contains(&def.kind.as_str()));
    let driver = shared.drivers.iter().find(|driver| driver.guests_outlive_virtd() && kind(driver))?;
    Some(Status {
        driver: driver.name().to_owned(),
        id: shared.next_id(),
        owner: 0,
        state: DomainState::Running,
        reason: StateReason::Unknown,
        since_usec: now_usec(),
        autodestroy: None,
        live: String::new(),
        record: Some(serde_json::Value::Null),
    })
}

/// What is shown of a transient machine of which nothing but its uuid can be read.
fn unknown(uuid: Uuid, driver: &Arc<dyn Driver>) -> Result<DomainDef> {
    let kind = driver.types().first().copied().unwrap_or_default();
    let text = format!(
        "<domain type='{kind}'><name>{uuid}</name><uuid>{uuid}</uuid><description>what virtd noted of this running machine cannot \
         be read; it can be destroyed</description><memory>0</memory><os><type>hvm</type></os></domain>"
    );
    DomainDef::parse(&text).map_err(Error::ConfigInvalid)
}

/// What a guest did when its state was last kept.
fn last_condition(state: DomainState, reason: StateReason) -> Condition {
    match (state, reason) {
        (DomainState::Paused, StateReason::IoError) => Condition::Suspended(Suspended::IoError),
        (DomainState::Paused, StateReason::Watchdog) => Condition::Suspended(Suspended::Watchdog),
        (DomainState::Paused, _) => Condition::Suspended(Suspended::Paused),
        (DomainState::Shutdown, _) => Condition::PoweredOff,
        (DomainState::Crashed, _) => Condition::Panicked,
        (DomainState::PmSuspended, _) => Condition::PmSuspended(PmSuspended::Memory),
        _ => Condition::Running,
    }
}

/// Starts what starts with the host, once since the host booted.
pub(crate) async fn autostart(shared: &Arc<Shared>) -> Result<()> {
    let on = shared.clone();
    if !on_disk(move || on.store.first_start_since_boot()).await? {
        return Ok(());
    }
    let places = Arc::new(Semaphore::new(AT_ONCE));
    for domain in shared.registry.all().into_iter().filter(|domain| domain.facts().autostart) {
        let places = places.clone();
        tokio::spawn(async move {
            // First it is found out whether it runs.
            domain.is_looked_after().await;
            if domain.facts().state.is_active() {
                return;
            }
            let place = places.acquire_owned().await;
            let work = async {
                match domain.launch(&virtd_itself(), None, StartOptions::default()).await {
                    Ok(ticket) => ticket.done().await,
                    Err(e) => Err(e),
                }
            };
            let mut work = std::pin::pin!(work);
            let started = match timeout(PLACE, &mut work).await {
                Ok(started) => started,
                Err(_) => {
                    drop(place);
                    work.await
                }
            };
            if let Err(e) = started {
                tracing::error!(uuid = %domain.uuid(), name = domain.name(), "autostart: {e}");
            }
        });
    }
    Ok(())
}
