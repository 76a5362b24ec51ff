//! What virtd does when it starts: loads definitions, finds the guests that run, makes whole what was cut off.

use crate::domain::{Domain, DomainSeed, Domains, FoundGuest};
use crate::error::{Error, Result};
use crate::facts::ConfigFacts;
use crate::left_behind;
use crate::registry::Claimed;
use crate::shared::{AGAIN, Shared};
use crate::store::{Deed, Ended, Found, Intent, Loaded, Note, Status, Stored, on_disk};
use crate::stored::StoredDef;
use crate::time::now_usec;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::{Condition, Driver, Reconnect, Reconnected};
use virt_model::state::{DomainState, PmSuspended, StateReason, Suspended};
use virt_model::xml::Limits;

/// How many guests are reconnected, or started, at once.
pub(crate) const AT_ONCE: usize = 16;

/// How long guests are looked for before virtd is there for everybody, whatever one of them does.
const LOOK: Duration = Duration::from_secs(1);

/// How long one machine that does not come on keeps others waiting for its place among [`AT_ONCE`].
const PLACE: Duration = Duration::from_secs(5);

/// Fills the registry from disk and from the guests that run. What can be told without waiting for any of them is told when
/// this returns; each machine that is not whole then has its turn taken, and is looked after by itself.
pub(crate) async fn load(shared: &Arc<Shared>, domains: &Arc<Domains>) -> Result<()> {
    let on = shared.clone();
    let definitions = on_disk(move || on.store.load_definitions()).await?;
    let on = shared.clone();
    let mut snapshots = on_disk(move || load_snapshots(&on)).await?;
    for loaded in snapshots.values() {
        // The guest that it is about may have gone with its status, and no other is to be taken for it.
        if let Some(Intent { deed: Deed::Apply { id, .. }, .. }) = &loaded.intent {
            shared.id_is_taken(*id);
        }
    }
    let cut_off = |loaded: &Loaded| loaded.intent.is_some() || !loaded.block_jobs.is_empty() || loaded.backup.is_some();
    let mut cut_off: BTreeSet<Uuid> =
        snapshots.iter().filter(|(_, loaded)| cut_off(loaded)).map(|(uuid, _)| *uuid).collect();
    let unfinished = |loaded: &Loaded| loaded.intent.is_some() || loaded.broken.is_some();
    let unfinished: BTreeSet<Uuid> =
        snapshots.iter().filter(|(_, loaded)| unfinished(loaded)).map(|(uuid, _)| *uuid).collect();
    let on = shared.clone();
    let saved = on_disk(move || on.store.load_managed_saves(&unfinished)).await?;
    enter_definitions(shared, domains, definitions, &mut snapshots, &saved);
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut looked_at = JoinSet::new();
    for uuid in look_for_guests(shared, domains, &mut snapshots, &places, &mut looked_at).await? {
        cut_off.remove(&uuid);
    }
    for (uuid, left) in &snapshots {
        // Its guest has ended, and it was transient.
        if domains.get(*uuid).is_none() && (left.backup.is_some() || !left.block_jobs.is_empty()) {
            left_behind::settle(shared, *uuid, Some(awaited(&mut looked_at)));
        }
    }
    let left_behind: Vec<_> = snapshots.into_iter().map(|(uuid, left)| (uuid, left.intent)).collect();
    settle_saves(shared, domains, &left_behind, &mut looked_at);
    let _ = timeout(LOOK, looked_at.join_all()).await;
    finish_removals(shared, domains, left_behind).await?;
    for domain in cut_off.into_iter().filter_map(|uuid| domains.get(uuid)) {
        look_after(&domain, &places, async {});
    }
    for domain in domains.all() {
        domain.announce();
    }
    Ok(())
}

/// Makes domains of what is stored, and takes what is kept with each of them out of `snapshots`.
fn enter_definitions(
    shared: &Arc<Shared>,
    domains: &Arc<Domains>,
    mut definitions: Vec<Stored>,
    snapshots: &mut HashMap<Uuid, Loaded>,
    saved: &BTreeSet<Uuid>,
) {
    // Where two have one name, it is whose it was.
    definitions.sort_by_key(|stored| match &stored.found {
        Found::Sound { name, .. } if *name == stored.note.name => 0,
        Found::Sound { .. } => 1,
        Found::Broken { .. } => 2,
    });
    for stored in definitions {
        let (uuid, kept) = (stored.uuid, snapshots.remove(&stored.uuid).unwrap_or_default());
        if let Err(e) = load_definition(shared, domains, stored, kept, saved.contains(&uuid)) {
            tracing::error!(%uuid, "its stored configuration is left alone: {e}");
        }
    }
}

/// Begins to look for each guest of which a status was left; whose they are. Each is looked after when it has been found, or not.
async fn look_for_guests(
    shared: &Arc<Shared>,
    domains: &Arc<Domains>,
    snapshots: &mut HashMap<Uuid, Loaded>,
    places: &Arc<Semaphore>,
    looked_at: &mut JoinSet<()>,
) -> Result<Vec<Uuid>> {
    let on = shared.clone();
    let statuses = on_disk(move || on.store.load_statuses()).await?;
    for status in statuses.values().flatten().flatten() {
        shared.id_is_taken(status.id);
    }
    let all = statuses.keys().copied().collect();
    for (uuid, status) in statuses {
        let search = match Search::begin(shared, domains, uuid, status, snapshots.remove(&uuid).unwrap_or_default()) {
            Ok(Some(search)) => search,
            Ok(None) => {
                shared.forget_guest(uuid).await?;
                continue;
            }
            Err(e) => {
                tracing::error!(%uuid, "a guest that may run is left alone: {e}");
                if let Some(domain) = domains.get(uuid) {
                    domain.may_run(&e);
                }
                continue;
            }
        };
        let looked = awaited(looked_at);
        let domain = search.domain.clone();
        look_after(&domain, places, async move {
            search.run().await;
            drop(looked);
        });
    }
    Ok(all)
}

/// What is awaited among these until it is dropped.
fn awaited(looked_at: &mut JoinSet<()>) -> oneshot::Sender<()> {
    let (looked, is_looked_at) = oneshot::channel::<()>();
    // An error means the same: whoever was to say it is no longer there.
    looked_at.spawn(async move { drop(is_looked_at.await) });
    looked
}

/// Of the machines of which nothing is left but what was cut off: makes whole those saves.
fn settle_saves(
    shared: &Arc<Shared>,
    domains: &Domains,
    left_behind: &[(Uuid, Option<Intent>)],
    looked_at: &mut JoinSet<()>,
) {
    for (uuid, intent) in left_behind {
        // Its guest has ended, and it was transient.
        if let (Some(intent @ Intent { deed: Deed::Save { .. }, .. }), None) = (intent, domains.get(*uuid)) {
            shared.is_unsettled(*uuid, true);
            tokio::spawn(settle_save(shared.clone(), *uuid, intent.clone(), awaited(looked_at)));
        }
    }
}

/// Of the same machines: forgets those that were being removed with their storage.
async fn finish_removals(
    shared: &Arc<Shared>,
    domains: &Domains,
    left_behind: Vec<(Uuid, Option<Intent>)>,
) -> Result<()> {
    for (uuid, intent) in left_behind {
        // Its definition went before: all that it was to be removed with is gone.
        if let (Some(Intent { deed: Deed::Undefine { .. }, .. }), None) = (intent, domains.get(uuid)) {
            let on = shared.clone();
            on_disk(move || on.store.forget_snapshots(uuid)).await?;
            tracing::warn!(%uuid, "its removal with its storage was cut off: it is undefined, and its storage removed");
        }
    }
    Ok(())
}

/// Makes whole the save of a machine of which nothing else is left, however often that has to be tried; nothing else is begun with
/// its uuid before. `looked` is dropped after the first time.
async fn settle_save(shared: Arc<Shared>, uuid: Uuid, intent: Intent, looked: oneshot::Sender<()>) {
    let (mut pause, mut looked) = (AGAIN.0, Some(looked));
    while let Err(error) = settle_save_now(&shared, uuid, &intent).await {
        tracing::error!(%uuid, %error, "saving it was cut off, and it is not known yet what came of that: it is looked at again");
        looked.take();
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(AGAIN.1);
    }
    shared.is_unsettled(uuid, false);
}

async fn settle_save_now(shared: &Arc<Shared>, uuid: Uuid, intent: &Intent) -> Result<()> {
    let driver = shared.drivers.iter().find_map(|driver| driver.saved_machines());
    let story = match (driver, intent.note.clone()) {
        (Some(driver), Some(note)) => {
            driver.settle_save(uuid, note).await.map_err(|e| Error::StorageFailed(e.to_string()))?
        }
        _ => "nothing had been changed".to_owned(),
    };
    let on = shared.clone();
    on_disk(move || on.store.remove_intent(uuid)).await?;
    tracing::warn!(%uuid, "saving it was cut off: {story}");
    Ok(())
}

/// Does `first`, then makes the domain whole, in a task that has its turn from now on.
fn look_after(domain: &Arc<Domain>, places: &Arc<Semaphore>, first: impl Future<Output = ()> + Send + 'static) {
    let Some(turn) = domain.turn_to_recover(&CancellationToken::new()) else {
        return tracing::error!(uuid = %domain.uuid(), "it is looked after already");
    };
    let (domain, places) = (domain.clone(), places.clone());
    let stays = domain.stays_until_saved();
    tokio::spawn(async move {
        let work = async {
            first.await;
            // The log has it by then.
            if domain.finish_interrupted().await.is_err() {
                domain.looks_again(None);
            }
            domain.takes_up_backup().await;
        };
        in_place(places, work).await;
        drop((turn, stays));
    });
}

/// Does some work when there is a place for it, which it gives up where it takes longer than [`PLACE`].
pub(crate) async fn in_place<T>(places: Arc<Semaphore>, work: impl Future<Output = T>) -> T {
    let place = places.acquire_owned().await;
    let mut work = std::pin::pin!(work);
    match timeout(PLACE, &mut work).await {
        Ok(done) => done,
        Err(_) => {
            drop(place);
            work.await
        }
    }
}

/// The snapshots of all domains. Those that cannot be read are left alone.
fn load_snapshots(shared: &Shared) -> Result<HashMap<Uuid, Loaded>> {
    let mut all = HashMap::new();
    shared.store.finish_forgetting();
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
fn load_definition(
    shared: &Arc<Shared>,
    domains: &Arc<Domains>,
    stored: Stored,
    snapshots: Loaded,
    managed_save: bool,
) -> Result<()> {
    let Stored { uuid, note, found } = stored;
    let (name, kind, sound) = match found {
        Found::Sound { name, kind, .. } if shared.driver_for(&kind).is_none() => {
            let why = format!("no driver serves domains of type '{kind}' in this virtd");
            (name, kind, Err(why))
        }
        Found::Sound { name, kind, stored } => match domains.look(uuid, &name) {
            Ok(_) => (name, kind, Ok(*stored)),
            Err(e) => (String::new(), kind, Err(e.to_string())),
        },
        Found::Broken { why, name, kind } => {
            let name = Some(note.name.clone()).filter(|name| !name.is_empty()).or(name).unwrap_or_default();
            (name, kind.unwrap_or_default(), Err(why))
        }
    };
    let ended = shared.store.ended(uuid).unwrap_or_else(|| Ended::never(managed_save));
    let driver = likely_driver(shared, &note, &kind)?;
    // Nobody may know its name, or another has it.
    let nameless = sound.is_err() && (name.is_empty() || domains.look(uuid, &name).is_err());
    let name = if nameless { uuid.to_string() } else { name };
    let (stored, broken) = match sound {
        Ok(stored) => (stored, None),
        Err(why) => {
            let def = DomainDef { kind, name: name.clone(), uuid, ..DomainDef::default() };
            (StoredDef::stand_in(&def), Some(why))
        }
    };
    let (config, stored) = (stored.config.clone(), Some(Arc::new(stored)));
    let hosted = None;
    let seed = DomainSeed { uuid, name, config, stored, broken, driver, note, ended, managed_save, snapshots, hosted };
    enter(shared, domains, seed)?;
    Ok(())
}

/// Whose a domain is: of one that cannot be read, as far as that can be made out.
fn likely_driver(shared: &Shared, note: &Note, kind: &str) -> Result<Arc<dyn Driver>> {
    let driver = shared.driver_for(kind).or_else(|| shared.driver_named(&note.driver)).or(shared.drivers.first());
    driver.cloned().ok_or_else(|| Error::ConfigUnsupported("this virtd has no driver at all".to_owned()))
}

/// Registers a domain found on disk.
fn enter(shared: &Arc<Shared>, domains: &Arc<Domains>, birth: DomainSeed) -> Result<Arc<Domain>> {
    match domains.claim(birth.uuid, &birth.name, birth.note.owner, usize::MAX)? {
        Claimed::Existing(domain) => Ok(domain),
        Claimed::New => {
            let domain = Domain::new(shared, domains, birth);
            domains.insert(domain.clone());
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
    /// There was a status, readable or not. Else there is only its folder, and the guest had ended, or had not begun.
    noted: bool,
}

impl Search {
    /// Makes the domain that it belongs to, where there is none, and what was last known of it that domain's. From now on it
    /// is not started beside that. `None`: no guest of it can have outlived the last virtd.
    fn begin(
        shared: &Arc<Shared>,
        domains: &Arc<Domains>,
        uuid: Uuid,
        status: Option<Result<Status>>,
        snapshots: Loaded,
    ) -> Result<Option<Search>> {
        let noted = status.is_some();
        let known = domains.get(uuid);
        let stored = known.as_ref().map(|domain| domain.stored()).transpose()?.flatten();
        let status = match status {
            Some(Ok(status)) => status,
            unread => {
                let Some(status) = unreadable(shared, known.as_deref()) else { return Ok(None) };
                if let Some(Err(e)) = unread {
                    tracing::error!(%uuid, "what is noted of its guest cannot be read: {e}; it is looked for all the same");
                }
                status
            }
        };
        let driver = shared.driver_named(&status.driver).cloned();
        let driver =
            driver.ok_or_else(|| Error::ConfigUnsupported(format!("this virtd has no driver '{}'", status.driver)))?;
        let (live, unread) = live_configuration(uuid, &status, stored.as_deref(), &*driver);
        let live = Arc::new(live);
        let domain = match known {
            Some(domain) => domain,
            None => {
                let note = Note { owner: status.owner, ..Note::default() };
                let ended = Ended { reason: status.reason, since_usec: status.since_usec };
                let (name, driver) = (live.name.clone(), driver.clone());
                let (config, stored, broken) = (Arc::new(ConfigFacts::of(&live)), None, None);
                let (managed_save, hosted) = (false, None);
                let seed = DomainSeed {
                    uuid,
                    name,
                    config,
                    stored,
                    broken,
                    driver,
                    note,
                    ended,
                    managed_save,
                    snapshots,
                    hosted,
                };
                enter(shared, domains, seed)?
            }
        };
        domain.is_sought(&status, live.clone(), unread);
        Ok(Some(Search { shared: shared.clone(), domain, driver, live, status, noted }))
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
        let Search { shared, domain, driver, live, status, noted } = self;
        let (store, uuid) = (&shared.store, domain.uuid());
        let file = store.status_file(uuid, status.clone());
        let (events, reports) = virt_model::driver::reports();
        let found = match &status.record {
            None => None,
            Some(record) => driver
                .reconnect(Reconnect {
                    live: live.clone(),
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
            Some(Reconnected { instance, condition, unmarked }) => {
                domain.adopt(FoundGuest { instance, live, condition, unmarked, status, file }, reports).await;
                tracing::info!(%uuid, name = domain.name(), ?condition, "found its guest");
            }
            None => {
                tracing::warn!(%uuid, name = live.name, "its guest ended, or its start was cut off, while virtd was away");
                // What it leaves of work on its disks is seen to before anything new has its uuid.
                let leaves = domain.has_work_on_disks();
                if leaves {
                    shared.is_unsettled(uuid, true);
                }
                domain.ended_unseen(noted).await;
                if leaves && domain.has_gone() {
                    left_behind::settle(&shared, uuid, None);
                }
                if leaves {
                    shared.is_unsettled(uuid, false);
                }
            }
        }
        Ok(())
    }
}

/// What is assumed of a guest of which nothing can be read: that it runs, until its driver says that it does not. `None`:
/// guests of that kind end with virtd.
fn unreadable(shared: &Shared, known: Option<&Domain>) -> Option<Status> {
    let outlive = |driver: &&Arc<dyn Driver>| driver.guests_outlive_virtd();
    let driver = match known {
        Some(domain) => Some(domain.driver()).filter(outlive)?,
        None => shared.drivers.iter().find(outlive)?,
    };
    Some(Status {
        driver: driver.name().to_owned(),
        id: shared.next_id(),
        owner: 0,
        state: DomainState::Running,
        reason: StateReason::Unknown,
        since_usec: now_usec(),
        autodestroy: None,
        live: String::new(),
        leaving: BTreeMap::new(),
        adjusting: None,
        record: Some(serde_json::Value::Null),
    })
}

/// What a guest runs with: it was found good when the guest started, so whatever can be read of it counts. Where that is
/// nothing, the stored configuration stands for it, or else its mere name; then also why.
fn live_configuration(
    uuid: Uuid,
    status: &Status,
    stored: Option<&DomainDef>,
    driver: &dyn Driver,
) -> (DomainDef, Option<String>) {
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
            let kind = driver.types().first().copied().unwrap_or_default().to_owned();
            let nameless = || DomainDef { kind, name: uuid.to_string(), uuid, ..DomainDef::default() };
            let why = format!("what its guest runs with cannot be read: {why}");
            (stored.cloned().unwrap_or_else(nameless), Some(why))
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
