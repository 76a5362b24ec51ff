//! `Domain`: its state, and the only reader of what its hypervisor reports (`follow`).
//!
//! Two locks with two meanings: `state` is held for a few lines and never across an await; the turn is the right to
//! change. What is published is computed while `state` is held, so the order of events is the order of changes.

mod broken;
mod can;
mod change;
mod config;
mod found;
mod lifecycle;
mod media;
mod reports;
mod snapshots;

pub use config::{Affect, UndefineOptions};
pub(crate) use found::FoundGuest;
pub use lifecycle::StartOptions;
pub use snapshots::{CreateCheck, CreateOptions, DeleteOptions, Force, Plan, RevertOptions};

use crate::authz::Subject;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::facts::DomainFacts;
use crate::images;
use crate::lock::lock;
use crate::log;
use crate::shared::Shared;
use crate::store::{Ended, Loaded, Note, StatusFile, on_disk};
use crate::time::now_usec;
use crate::turn::Turn;
use reports::Reports;
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;
use virt_model::domain::{DomainDef, LifecycleAction};
use virt_model::driver::{Driver, DriverEvent, Exit, Instance};
use virt_model::state::{
    Crashed, Defined, DomainState, Lifecycle, Resumed, ShutdownBy, Started, StateReason, Stopped, Suspended,
};

/// One domain, from its definition (or creation, if transient) to its end.
pub struct Domain {
    uuid: Uuid,
    owner: u32,
    driver: Arc<dyn Driver>,
    shared: Arc<Shared>,
    turn: Arc<Turn>,
    state: Mutex<State>,
    /// Counts the changes of `state`, for those who wait for one.
    changes: watch::Sender<u64>,
}

/// What a domain is at a moment.
struct State {
    name: String,
    stored: Option<Arc<DomainDef>>,
    guest: Option<Guest>,
    /// The start under way, or to come of what is under way: there is no guest yet, and soon there may be one.
    starting: Option<lifecycle::Starting>,
    /// Starts that bring their own definition and have not ended: until then the domain stays, whatever else goes.
    creations: usize,
    /// A configuration is on its way to disk: as with `creations`.
    being_stored: bool,
    state: DomainState,
    reason: StateReason,
    since_usec: u64,
    autostart: bool,
    config_changed: bool,
    /// Why its stored configuration cannot be used: `stored` then only stands for it, by its name, type and uuid.
    broken: Option<String>,
    /// A guest that ran when virtd was last here, and is not found again yet.
    sought: Option<Sought>,
    /// Why what its guest runs with is not known: what is shown for that only stands for it.
    unread: Option<String>,
    snapshots: snapshots::Kit,
    /// While a snapshot is loaded into the running guest, stops and starts of its CPUs are not told: what they last did.
    muted: Option<DomainState>,
    /// No longer in the registry.
    gone: bool,
    /// Anybody was told that it exists.
    told: bool,
    /// As last published.
    facts: Arc<DomainFacts>,
}

/// The active half of a domain.
#[derive(Clone)]
struct Guest {
    id: u32,
    instance: Arc<dyn Instance>,
    live: Arc<DomainDef>,
    status: Arc<StatusFile>,
    /// Why its end is expected, once it is.
    ending: Option<Stopped>,
    /// Asks `follow` to say when it has told all that was reported before.
    asks: mpsc::UnboundedSender<oneshot::Sender<()>>,
}

/// A guest that is sought since virtd started: what was last known of it is published meanwhile.
struct Sought {
    id: u32,
    live: Arc<DomainDef>,
    /// Why it cannot be found, once that is known: it may run, and is never to be started beside that.
    why: Option<String>,
}

/// What a hypervisor has reported is told: now it can be told what a verb has done.
struct AllTold<'a>(&'a Domain);

impl AllTold<'_> {
    /// The one way for a verb to change what is published, so that a record of what was done to a guest never comes before
    /// what that did to the guest. See [`Domain::commit_report`].
    fn commit(self, change: impl FnOnce(&mut State) -> Vec<Lifecycle>) {
        self.0.commit_report(change);
    }
}

/// How a new `Domain` comes to be.
pub(crate) struct Birth {
    /// Its configuration; of a transient domain that of its guest, or of the one about to start.
    pub def: Arc<DomainDef>,
    pub persistent: bool,
    /// Why the stored configuration cannot be used; `def` then has only its name, type and uuid.
    pub broken: Option<String>,
    pub driver: Arc<dyn Driver>,
    pub note: Note,
    pub ended: Ended,
    /// What was found of its snapshots.
    pub snapshots: Loaded,
}

impl Domain {
    pub(crate) fn new(shared: Arc<Shared>, birth: Birth) -> Arc<Domain> {
        let (uuid, name) = (birth.def.uuid, birth.def.name.clone());
        let facts = DomainFacts {
            name: name.clone(),
            uuid,
            id: 0,
            driver: birth.driver.name(),
            state: DomainState::Shutoff,
            reason: birth.ended.reason,
            since_usec: birth.ended.since_usec,
            persistent: birth.persistent,
            autostart: birth.note.autostart,
            title: String::new(),
            description: String::new(),
            os_type: String::new(),
            vcpus: 0,
            maximum_vcpus: 0,
            memory: 0,
            maximum_memory: 0,
            has_managed_save: false,
            config_changed: false,
            current_snapshot: None,
            snapshot_count: 0,
            owner: birth.note.owner,
            broken: String::new(),
        };
        let facts = Arc::new(describe(&facts, &birth.def));
        Arc::new(Domain {
            uuid,
            owner: birth.note.owner,
            driver: birth.driver,
            shared,
            turn: Arc::default(),
            state: Mutex::new(State {
                name,
                stored: birth.persistent.then_some(birth.def),
                guest: None,
                starting: None,
                creations: 0,
                being_stored: false,
                state: DomainState::Shutoff,
                reason: birth.ended.reason,
                since_usec: birth.ended.since_usec,
                autostart: birth.note.autostart,
                config_changed: false,
                broken: birth.broken,
                sought: None,
                unread: None,
                snapshots: snapshots::Kit::new(birth.snapshots),
                muted: None,
                gone: false,
                told: false,
                facts,
            }),
            changes: watch::channel(0).0,
        })
    }

    /// Its identity.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Its name today.
    pub fn name(&self) -> String {
        lock(&self.state).name.clone()
    }

    /// The id of its guest, 0 without one.
    pub fn id(&self) -> u32 {
        lock(&self.state).guest.as_ref().map_or(0, |guest| guest.id)
    }

    /// All that is published of it, as last told.
    pub fn facts(&self) -> Arc<DomainFacts> {
        lock(&self.state).facts.clone()
    }

    /// The chains of images that it needs: what runs, what is stored, and its snapshots.
    pub(crate) fn chains(&self) -> Vec<images::Chain> {
        let state = lock(&self.state);
        let whose = format!("domain '{}'", state.name);
        let mut chains = Vec::new();
        for def in state.guest.iter().map(|guest| &guest.live).chain(&state.stored) {
            images::chains_of(self.uuid, &whose, def, &mut chains);
        }
        state.snapshots.defs().for_each(|def| images::chains_of_snapshot(self.uuid, &state.name, def, &mut chains));
        chains
    }

    /// Of them those of the guest that runs.
    pub(crate) fn running_chains(&self) -> Vec<images::Chain> {
        let state = lock(&self.state);
        let mut chains = Vec::new();
        if let Some(guest) = &state.guest {
            images::chains_of(self.uuid, &format!("domain '{}'", state.name), &guest.live, &mut chains);
        }
        chains
    }

    /// What the driver said while it was to `deed` this domain. Of an image that is locked it is told who has it.
    fn driver_failed(&self, deed: &str, error: virt_model::driver::DriverError) -> Error {
        Error::from_driver(&self.name(), deed, self.shared.with_owner_of_lock(self, error))
    }

    /// The overlays that its snapshots have laid on its disks.
    pub(crate) fn overlays(&self) -> Vec<images::Overlay> {
        let state = lock(&self.state);
        let mut overlays = Vec::new();
        state.snapshots.defs().for_each(|def| images::overlays_of(def, &mut overlays));
        overlays
    }

    /// What polkit is told it is about.
    pub fn subject(&self) -> Subject {
        Subject {
            driver: self.driver.name().to_owned(),
            domain_name: self.name(),
            domain_uuid: Some(self.uuid),
            owner: Some(self.owner),
            snapshot_name: None,
        }
    }

    /// A domain may go while somebody waits for it.
    fn still_here(&self) -> Result<()> {
        lock(&self.state).still_here()
    }

    /// Changes the state, then tells what came of it, as one. Of a domain that has gone, or that nobody knows yet and is gone
    /// with this, nothing is told. For what the hypervisor reports (`follow` cannot wait for itself), and where there is no
    /// guest that could report; verbs have [`AllTold::commit`].
    fn commit_report(&self, change: impl FnOnce(&mut State) -> Vec<Lifecycle>) {
        let mut state = lock(&self.state);
        let was_there = !state.gone;
        let was_told = state.told && was_there;
        let events = change(&mut state);
        state.refresh();
        let facts = state.facts.clone();
        if was_told || !state.gone {
            let gone = state.gone;
            let (there, lost) = state.snapshots.news(self.uuid, gone);
            // A snapshot is told before the domain that names it, and goes after it does not; but a new domain is told
            // before its snapshots, and goes after them.
            let order = match (was_told, gone) {
                (_, true) => [lost, vec![Event::DomainGone(facts, events)], there],
                (true, false) => [there, vec![Event::Domain(facts, events)], lost],
                (false, false) => [vec![Event::Domain(facts, events)], there, lost],
            };
            order.into_iter().flatten().for_each(|event| self.shared.events.send(event));
            state.told = true;
        }
        if was_there && state.gone {
            // Only now: whoever takes its uuid after it must not be told of before its end is.
            self.shared.registry.remove(self.uuid, &state.name, self.owner);
        }
        self.changes.send_modify(|n| *n += 1);
    }

    /// Makes a new domain findable and tells of it, as one: nothing can be told of it before.
    pub(crate) fn add(self: &Arc<Self>) {
        self.commit_report(|_| {
            self.shared.registry.insert(self.clone());
            vec![Lifecycle::Defined(Defined::Added)]
        });
    }

    /// Tells the publisher of a domain that was there before virtd.
    pub(crate) fn announce(&self) {
        self.commit_report(|_| Vec::new());
    }

    /// A domain of which nothing is left, or about to come, ceases to exist.
    fn drop_if_nothing_left(&self) {
        let nothing_left = lock(&self.state).nothing_left();
        if nothing_left {
            self.commit_report(|state| {
                state.leave_if_nothing_left();
                Vec::new()
            });
        }
    }

    /// Waits until the state satisfies `wanted`.
    async fn until(&self, wanted: impl Fn(&State) -> bool) {
        let mut changes = self.changes.subscribe();
        while !wanted(&lock(&self.state)) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    fn guest(&self) -> Result<Guest> {
        lock(&self.state).running().cloned()
    }

    /// Returns when all that the hypervisor has reported until now is told.
    async fn all_told(&self) -> AllTold<'_> {
        if let Ok(guest) = self.guest() {
            let (ask, told) = oneshot::channel();
            let asked = guest.asks.send(ask);
            // A question that comes in while `follow` ends is lost only with the last who could ask another.
            drop(guest);
            if asked.is_ok() {
                // No answer: the guest's end was among it.
                let _ = told.await;
            }
        }
        AllTold(self)
    }

    /// Follows what a guest's hypervisor reports, to its end.
    async fn follow(self: Arc<Self>, id: u32, mut reports: Reports) {
        while let Some(report) = reports.next().await {
            tracing::debug!(uuid = %self.uuid, ?report, "reported");
            match report {
                DriverEvent::Suspended(why) => {
                    self.note(id, DomainState::Paused, pause_reason(why), Lifecycle::Suspended(why)).await;
                }
                DriverEvent::Resumed => {
                    let event = Lifecycle::Resumed(Resumed::Unpaused);
                    self.note(id, DomainState::Running, StateReason::Unpaused, event).await;
                }
                DriverEvent::PmSuspended(how) => {
                    let event = Lifecycle::PmSuspended(how);
                    self.note(id, DomainState::PmSuspended, StateReason::Unknown, event).await;
                }
                DriverEvent::Woken => {
                    let event = Lifecycle::Started(Started::Wakeup);
                    self.note(id, DomainState::Running, StateReason::Wakeup, event).await;
                }
                DriverEvent::PoweredOff { by, rebooting } => self.powered_off(id, by, rebooting).await,
                DriverEvent::Panicked => self.panicked(id).await,
                DriverEvent::Exited(exit) => return self.became_inactive(id, &exit).await,
            }
        }
    }

    /// The guest's state is another: kept, then told.
    async fn note(&self, id: u32, new: DomainState, reason: StateReason, event: Lifecycle) {
        if matches!(event, Lifecycle::Suspended(_) | Lifecycle::Resumed(_)) && self.swallow(new) {
            return;
        }
        let since_usec = now_usec();
        self.keep_status(id, new, reason, since_usec).await;
        self.commit_report(|state| {
            state.state = new;
            state.reason = reason;
            state.since_usec = since_usec;
            vec![event]
        });
        log::guest(self.uuid, &self.name(), event);
    }

    /// Whether this is part of loading a snapshot, of which only the outcome is told.
    fn swallow(&self, new: DomainState) -> bool {
        lock(&self.state).muted.as_mut().map(|seen| *seen = new).is_some()
    }

    async fn keep_status(&self, id: u32, new: DomainState, reason: StateReason, since_usec: u64) {
        let Some(status) = self.guest().ok().filter(|g| g.id == id).map(|g| g.status) else { return };
        let kept = on_disk(move || {
            status.update(|s| {
                s.state = new;
                s.reason = reason;
                s.since_usec = since_usec;
            })
        });
        if let Err(e) = kept.await {
            tracing::warn!(uuid = %self.uuid, "{e}; after a restart of virtd the reason of its state will be an older one");
        }
    }

    async fn powered_off(self: &Arc<Self>, id: u32, by: ShutdownBy, rebooting: bool) {
        self.note(id, DomainState::Shutdown, StateReason::User, Lifecycle::Shutdown(by)).await;
        let Ok(guest) = self.guest() else { return };
        let action = if rebooting { guest.live.on_reboot } else { guest.live.on_poweroff };
        self.act_on_end(guest, action, Stopped::Shutdown);
    }

    async fn panicked(self: &Arc<Self>, id: u32) {
        self.note(id, DomainState::Crashed, StateReason::Panicked, Lifecycle::Crashed(Crashed::Panicked)).await;
        let Ok(guest) = self.guest() else { return };
        let action = guest.live.on_crash;
        self.act_on_end(guest, action, Stopped::Crashed);
    }

    /// Does what the configuration says is to follow the guest's end. In a task: `follow` must go on reading.
    fn act_on_end(self: &Arc<Self>, guest: Guest, action: LifecycleAction, as_what: Stopped) {
        let restart = matches!(action, LifecycleAction::Restart | LifecycleAction::CoredumpRestart);
        if action == LifecycleAction::Preserve {
            return;
        }
        if !restart {
            self.expect_end(guest.id, as_what);
        }
        let domain = self.clone();
        tokio::spawn(async move {
            let done = if restart {
                match guest.instance.reset().await {
                    Ok(()) => guest.instance.resume().await,
                    failed => failed,
                }
            } else {
                guest.instance.destroy(false).await
            };
            if let Err(e) = done {
                tracing::error!(uuid = %domain.uuid, name = domain.name(), "could not {action:?} the ended guest: {e}");
            }
        });
    }

    /// Remembers why the guest will end; the first reason stays.
    fn expect_end(&self, id: u32, why: Stopped) {
        if let Some(guest) = lock(&self.state).guest.as_mut().filter(|g| g.id == id) {
            guest.ending.get_or_insert(why);
        }
    }

    /// The one place where a guest ends, however it came to that.
    async fn became_inactive(self: &Arc<Self>, id: u32, exit: &Exit) {
        let Some(guest) = self.guest().ok().filter(|g| g.id == id) else { return };
        let (stopped, reason) = verdict(guest.ending, exit);
        let since_usec = now_usec();
        self.forget_transient(&guest.live).await;
        self.forget_guest(Some(guest.status), reason, since_usec).await;
        self.commit_report(|state| {
            state.has_ended(reason, since_usec);
            vec![Lifecycle::Stopped(stopped)]
        });
        let name = self.name();
        log::guest(self.uuid, &name, Lifecycle::Stopped(stopped));
        if let Exit::Died(words) = exit {
            let words = guest.live.black_out(&words.lines().collect::<Vec<_>>().join("; "));
            tracing::error!(uuid = %self.uuid, name, "domain {name:?}: the hypervisor died: {words}");
        }
    }

    /// Keeps how a guest ended, and removes what is on disk of it: in this order, so that a virtd killed in between does
    /// not take the end of an earlier guest for that of this one.
    async fn forget_guest(&self, status: Option<Arc<StatusFile>>, reason: StateReason, since_usec: u64) {
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        let stays = {
            let state = lock(&self.state);
            state.stored.is_some() || state.being_stored
        };
        let forgotten = on_disk(move || {
            if let Some(status) = status {
                status.close();
            }
            let kept = shared.store.save_ended(uuid, stays.then_some(Ended { reason, since_usec }));
            shared.store.forget_guest(uuid);
            kept
        });
        if let Err(e) = forgotten.await {
            tracing::warn!(%uuid, "{e}");
        }
    }
}

impl State {
    /// Its guest has gone, and none is sought any more.
    fn has_ended(&mut self, reason: StateReason, since_usec: u64) {
        (self.guest, self.sought, self.unread) = (None, None, None);
        (self.state, self.reason, self.since_usec) = (DomainState::Shutoff, reason, since_usec);
        self.config_changed = false;
        self.leave_if_nothing_left();
    }

    /// Computes anew what is published.
    fn refresh(&mut self) {
        let mut facts = match self.live().or(self.stored.as_ref()) {
            Some(def) => describe(&self.facts, def),
            None => (*self.facts).clone(),
        };
        facts.name.clone_from(&self.name);
        facts.id = self.guest.as_ref().map(|g| g.id).or(self.sought.as_ref().map(|s| s.id)).unwrap_or_default();
        facts.state = self.state;
        facts.reason = self.reason;
        facts.since_usec = self.since_usec;
        facts.persistent = self.stored.is_some();
        facts.autostart = self.autostart;
        facts.config_changed = self.config_changed;
        facts.current_snapshot = self.snapshots.current().map(str::to_owned);
        facts.snapshot_count = self.snapshots.count();
        facts.broken = shortened(Some(&self.why_broken()));
        if facts != *self.facts {
            self.facts = Arc::new(facts);
        }
    }

    /// From now on stops and starts of the CPUs are only remembered.
    fn mute(&mut self) {
        self.muted = Some(self.state);
    }

    fn compare_configs(&mut self) {
        self.config_changed = match (&self.stored, self.live()) {
            (Some(stored), Some(live)) => !stored.same_configuration(live),
            _ => false,
        };
    }

    /// The guest; else why there is none.
    fn running(&self) -> Result<&Guest> {
        match (&self.guest, &self.sought) {
            (Some(guest), _) => Ok(guest),
            (None, Some(sought)) => Err(sought.refusal(&self.name)),
            (None, None) => Err(Error::OperationInvalid(format!(
                "domain '{}' is not running (it is {}); start it first",
                self.name, self.state
            ))),
        }
    }

    /// What runs, or ran when it was last seen.
    fn live(&self) -> Option<&Arc<DomainDef>> {
        self.guest.as_ref().map(|guest| &guest.live).or(self.sought.as_ref().map(|sought| &sought.live))
    }

    /// A domain may go while somebody waits for it.
    fn still_here(&self) -> Result<()> {
        if self.gone { Err(Error::NoSuchDomain { what: "name", value: self.name.clone() }) } else { Ok(()) }
    }

    /// Whether it is to go: it has neither configuration nor guest, and is about to get neither.
    fn nothing_left(&self) -> bool {
        let left = self.stored.is_some() || self.guest.is_some() || self.sought.is_some();
        !left && !self.being_stored && self.creations == 0 && !self.gone
    }

    /// See [`State::nothing_left`]. `commit` does the rest.
    fn leave_if_nothing_left(&mut self) {
        self.gone |= self.nothing_left();
    }

    fn note(&self, owner: u32, driver: &dyn Driver) -> Note {
        Note { owner, autostart: self.autostart, name: self.name.clone(), driver: driver.name().to_owned() }
    }
}

/// How much of a title or description is published, in bytes: a few long ones must not make every listing too large.
pub(crate) const PUBLISHED: usize = 4096;

/// As much of a text as is published; `GetXML` has all of it.
fn shortened(text: Option<&str>) -> String {
    let text = text.unwrap_or_default();
    text[..text.floor_char_boundary(PUBLISHED)].to_owned()
}

/// The facts that come from a definition.
fn describe(facts: &DomainFacts, def: &DomainDef) -> DomainFacts {
    DomainFacts {
        title: shortened(def.title.as_deref()),
        description: shortened(def.description.as_deref()),
        os_type: def.os_type().to_owned(),
        vcpus: def.vcpus(),
        maximum_vcpus: def.maximum_vcpus(),
        memory: def.current_memory_kib().saturating_mul(1024),
        maximum_memory: def.memory_kib().saturating_mul(1024),
        ..facts.clone()
    }
}

fn pause_reason(why: Suspended) -> StateReason {
    match why {
        Suspended::Paused => StateReason::User,
        Suspended::Migrated => StateReason::Migrated,
        Suspended::IoError => StateReason::IoError,
        Suspended::Watchdog => StateReason::Watchdog,
        Suspended::Restored => StateReason::Restored,
        Suspended::FromSnapshot => StateReason::FromSnapshot,
        Suspended::ApiError => StateReason::ApiError,
    }
}

/// What became of a guest, from what was expected and what was seen.
fn verdict(ending: Option<Stopped>, exit: &Exit) -> (Stopped, StateReason) {
    match (ending, exit) {
        (Some(Stopped::Destroyed), _) | (None, Exit::Requested) => (Stopped::Destroyed, StateReason::Destroyed),
        (Some(Stopped::Crashed), _) => (Stopped::Crashed, StateReason::Crashed),
        (Some(Stopped::FromSnapshot), _) => (Stopped::FromSnapshot, StateReason::FromSnapshot),
        (Some(_), _) | (None, Exit::Orderly) => (Stopped::Shutdown, StateReason::Shutdown),
        (None, Exit::Died(_)) => (Stopped::Failed, StateReason::Crashed),
    }
}
