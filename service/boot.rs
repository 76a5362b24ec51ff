//! What virtd does when it starts: loads definitions, finds the guests that run, makes whole what was cut off, autostarts.

use crate::domain::{Birth, Domain, FoundGuest, StartOptions};
use crate::error::{Error, Result};
use crate::registry::Claimed;
use crate::shared::{Shared, now_usec, virtd_itself};
use crate::store::{Ended, Loaded, Note, Status, on_disk};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::{Condition, DomainEnd, Driver, Reconnect, Reconnected};
use virt_model::state::{DomainState, PmSuspended, StateReason, Suspended};

/// How many guests are reconnected, or started, at once.
const AT_ONCE: usize = 16;

/// Fills the registry from disk and from the guests that run.
pub(crate) async fn load(shared: &Arc<Shared>) -> Result<()> {
    let on = shared.clone();
    let definitions = on_disk(move || on.store.load_definitions()).await?;
    let on = shared.clone();
    let mut snapshots = on_disk(move || load_snapshots(&on)).await?;
    let cut_off: Vec<Uuid> =
        snapshots.iter().filter(|(_, loaded)| loaded.intent.is_some()).map(|(uuid, _)| *uuid).collect();
    for (uuid, xml, note) in definitions {
        if let Err(e) = load_definition(shared, uuid, &xml, note, snapshots.remove(&uuid).unwrap_or_default()) {
            tracing::error!(%uuid, "its stored configuration is left alone: {e}");
        }
    }
    let on = shared.clone();
    let statuses = on_disk(move || on.store.load_statuses()).await?;
    for (_, status) in &statuses {
        shared.id_is_taken(status.id);
    }
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut under_way = JoinSet::new();
    for (uuid, status) in statuses {
        let (shared, places, kept) = (shared.clone(), places.clone(), snapshots.remove(&uuid).unwrap_or_default());
        under_way.spawn(async move {
            let _place = places.acquire_owned().await;
            if let Err(e) = find_guest(&shared, uuid, status, kept).await {
                tracing::error!(%uuid, "its guest is left alone: {e}");
                if let Some(domain) = shared.registry.get(uuid) {
                    domain.has_lost_sight(&e);
                }
            }
        });
    }
    while under_way.join_next().await.is_some() {}
    for domain in cut_off.into_iter().filter_map(|uuid| shared.registry.get(uuid)) {
        if let Err(e) = domain.made_whole().await {
            tracing::error!(uuid = %domain.uuid(), "{e}");
        }
    }
    for domain in shared.registry.all() {
        domain.announce();
    }
    Ok(())
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

/// Finds one guest that ran when virtd was last here, or learns that it has gone.
async fn find_guest(shared: &Arc<Shared>, uuid: Uuid, status: Status, snapshots: Loaded) -> Result<()> {
    let driver = shared
        .driver_named(&status.driver)
        .cloned()
        .ok_or_else(|| Error::ConfigUnsupported(format!("this virtd has no driver '{}'", status.driver)))?;
    let live = DomainDef::parse(&status.live).map_err(Error::ConfigInvalid)?;
    let file = shared.store.status_file(uuid, status.clone());
    let (events, reports) = virt_model::driver::reports();
    let reconnected = match &status.record {
        None => None,
        Some(record) => driver
            .reconnect(Reconnect {
                live: live.clone(),
                record: record.clone(),
                last: last_condition(status.state, status.reason),
                runtime_dir: shared.store.runtime_dir(uuid),
                log_file: shared.store.log_file(uuid),
                recorder: file.clone(),
                events,
            })
            .await
            .map_err(|e| Error::from_driver(&live.name, "find", e))?,
    };
    match reconnected {
        Some(Reconnected { instance, condition }) => {
            let domain = domain_of(shared, driver, &live, &status, snapshots)?;
            domain.adopt(FoundGuest { instance, live, condition, status, file }, reports).await;
            tracing::info!(%uuid, name = domain.name(), ?condition, "found its guest");
        }
        None => has_gone(shared, uuid, driver.as_ref(), &live).await?,
    }
    Ok(())
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

/// The domain a found guest belongs to: the stored one, or a transient one that is made again.
fn domain_of(
    shared: &Arc<Shared>,
    driver: Arc<dyn Driver>,
    live: &DomainDef,
    status: &Status,
    snapshots: Loaded,
) -> Result<Arc<Domain>> {
    let note = Note { owner: status.owner, autostart: false };
    let ended = Ended { reason: status.reason, since_usec: status.since_usec };
    enter(shared, Birth { def: live.clone(), persistent: false, driver, note, ended, snapshots })
}

/// A guest ended while virtd was away, or its start was cut off.
async fn has_gone(shared: &Arc<Shared>, uuid: Uuid, driver: &dyn Driver, live: &DomainDef) -> Result<()> {
    tracing::warn!(%uuid, name = live.name, "its guest ended, or its start was cut off, while virtd was away");
    if let Some(domain) = shared.registry.get(uuid) {
        domain.ended_unseen(StateReason::Daemon, now_usec()).await;
        return Ok(());
    }
    if let Err(error) = driver.remove_belongings(live, DomainEnd::Transient).await {
        tracing::warn!(%uuid, name = live.name, %error, "what belongs to it cannot be removed");
    }
    shared.forget_guest(uuid).await
}

/// Starts what starts with the host, once since the host booted.
pub(crate) async fn autostart(shared: &Arc<Shared>) -> Result<()> {
    let on = shared.clone();
    if !on_disk(move || on.store.first_start_since_boot()).await? {
        return Ok(());
    }
    let places = Arc::new(Semaphore::new(AT_ONCE));
    for domain in shared.registry.all() {
        let facts = domain.facts();
        if !facts.autostart || facts.state.is_active() {
            continue;
        }
        let places = places.clone();
        tokio::spawn(async move {
            let _place = places.acquire_owned().await;
            let started = match domain.launch(&virtd_itself(), None, StartOptions::default()).await {
                Ok(ticket) => ticket.done().await,
                Err(e) => Err(e),
            };
            if let Err(e) = started {
                tracing::error!(uuid = %domain.uuid(), name = domain.name(), "autostart: {e}");
            }
        });
    }
    Ok(())
}
