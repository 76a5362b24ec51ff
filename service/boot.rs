//! What virtd does when it starts: loads definitions, finds the guests that run, makes whole what was cut off, autostarts.

use crate::domain::{Birth, Domain, FoundGuest, StartOptions};
use crate::error::{Error, Result};
use crate::registry::Claimed;
use crate::shared::{Shared, now_usec, virtd_itself};
use crate::store::{Ended, Found, Loaded, Note, Status, Stored, on_disk};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::{Condition, DomainEnd, Driver, Reconnect, Reconnected};
use virt_model::state::{DomainState, PmSuspended, StateReason, Suspended};
use virt_model::xml::Limits;

/// How many guests are reconnected, or started, at once.
const AT_ONCE: usize = 16;

/// Fills the registry from disk and from the guests that run.
pub(crate) async fn load(shared: &Arc<Shared>) -> Result<()> {
    let on = shared.clone();
    let mut definitions = on_disk(move || on.store.load_definitions()).await?;
    let on = shared.clone();
    let mut snapshots = on_disk(move || load_snapshots(&on)).await?;
    let cut_off: Vec<Uuid> =
        snapshots.iter().filter(|(_, loaded)| loaded.intent.is_some()).map(|(uuid, _)| *uuid).collect();
    // Where two have one name, it is whose it was.
    definitions.sort_by_key(|stored| match &stored.found {
        Found::Sound(def) if def.name == stored.note.name => 0,
        Found::Sound(_) => 1,
        Found::Broken { .. } => 2,
    });
    for stored in definitions {
        let (uuid, kept) = (stored.uuid, snapshots.remove(&stored.uuid).unwrap_or_default());
        if let Err(e) = load_definition(shared, stored, kept) {
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
            Err(e) => {
                tracing::error!(%uuid, "its snapshots are left alone: {e}");
                all.insert(
                    uuid,
                    Loaded { broken: Some(format!("its snapshots are not known: {e}")), ..Loaded::default() },
                );
            }
        }
    }
    Ok(all)
}

/// Makes a domain of a stored configuration; of one that cannot be used, a broken one that says why.
fn load_definition(shared: &Arc<Shared>, stored: Stored, snapshots: Loaded) -> Result<()> {
    let Stored { uuid, note, found } = stored;
    let (def, broken) = match found {
        Found::Sound(def) if shared.driver_for(&def.kind).is_none() => {
            let why = format!("no driver serves domains of type '{}' in this virtd", def.kind);
            (DomainDef { kind: def.kind, name: def.name, uuid, ..DomainDef::default() }, Some(why))
        }
        Found::Sound(def) => match shared.registry.look(uuid, &def.name) {
            Ok(_) => (*def, None),
            Err(e) => (DomainDef { kind: def.kind, uuid, ..DomainDef::default() }, Some(e.to_string())),
        },
        Found::Broken { why, name, kind } => {
            let name = Some(note.name.clone()).filter(|name| !name.is_empty()).or(name).unwrap_or_default();
            (DomainDef { kind: kind.unwrap_or_default(), name, uuid, ..DomainDef::default() }, Some(why))
        }
    };
    let never = Ended { reason: StateReason::Unknown, since_usec: now_usec() };
    let ended = shared.store.ended(uuid).unwrap_or(never);
    let driver = likely_driver(shared, &note, &def.kind)?;
    let mut birth = Birth { def, persistent: true, broken, driver, note, ended, snapshots };
    if birth.broken.is_some() && (birth.def.name.is_empty() || shared.registry.look(uuid, &birth.def.name).is_err()) {
        // Nobody knows its name, or another has it.
        birth.def.name = uuid.to_string();
    }
    enter(shared, birth)?;
    Ok(())
}

/// Whose a domain is: of one that cannot be read, as far as that can be made out.
fn likely_driver(shared: &Shared, note: &Note, kind: &str) -> Result<Arc<dyn Driver>> {
    let driver = shared.driver_for(kind).or_else(|| shared.driver_named(&note.driver)).or(shared.drivers.first());
    driver.cloned().ok_or_else(|| Error::ConfigUnsupported("this virtd has no driver at all".to_owned()))
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
    let (live, unread) = live_configuration(shared, uuid, &status);
    let file = shared.store.status_file(uuid, status.clone());
    let (events, reports) = mpsc::unbounded_channel();
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
            unread.iter().for_each(|why| domain.has_lost_sight(why));
            domain.adopt(FoundGuest { instance, live, condition, status, file }, reports).await;
            tracing::info!(%uuid, name = domain.name(), ?condition, "found its guest");
        }
        None => has_gone(shared, uuid, driver.as_ref(), &live).await?,
    }
    Ok(())
}

/// What a guest runs with: it was found good when the guest started, so whatever can be read of it counts. Where that is
/// nothing, the stored configuration stands for it, or else its mere name; then also why.
fn live_configuration(shared: &Shared, uuid: Uuid, status: &Status) -> (DomainDef, Option<Error>) {
    let (live, findings) = DomainDef::parse_leniently_within(&status.live, Limits::STORED);
    let why = findings.first().map(ToString::to_string).unwrap_or_default();
    match live {
        Some(live) if live.uuid == uuid && !live.name.is_empty() => {
            if !why.is_empty() {
                tracing::warn!(%uuid, name = live.name, "what its guest runs with is no longer taken as it is: {why}");
            }
            (live, None)
        }
        _ => {
            let error = Error::StorageFailed(format!("what its guest runs with cannot be read: {why}"));
            let stored = shared.registry.get(uuid).and_then(|domain| domain.stored());
            let nameless = || DomainDef { name: uuid.to_string(), uuid, ..DomainDef::default() };
            (stored.map_or_else(nameless, |stored| DomainDef::clone(&stored)), Some(error))
        }
    }
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
    if let Some(domain) = shared.registry.get(live.uuid) {
        return Ok(domain);
    }
    let note = Note { owner: status.owner, ..Note::default() };
    let ended = Ended { reason: status.reason, since_usec: status.since_usec };
    enter(shared, Birth { def: live.clone(), persistent: false, broken: None, driver, note, ended, snapshots })
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
