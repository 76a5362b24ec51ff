//! `Domain`: what it is made of, and how a change of its state is told. What is done to it is told by the other files here.
//!
//! Two locks with two meanings: `state` is held for a few lines and never across an await; the turn is the right to
//! change. What is published is computed while `state` is held, so the order of events is the order of changes.

mod adjust;
mod agent;
mod apply;
mod backup;
mod block_jobs;
mod broken;
mod can;
mod change;
mod checkpoints;
mod config;
mod console;
mod devices;
mod found;
mod given;
mod guest;
mod hosted;
mod images;
mod leaving;
mod lifecycle;
mod link;
mod managed;
mod media;
mod power;
mod reports;
mod save;
mod settings;
mod snapshots;
mod state;
mod stats;
mod undefine;
mod update;

pub use agent::{ExecOptions, InterfaceAddresses};
pub use apply::{ApplyOptions, POWERING_OFF};
pub use backup::{BackupOptions, BackupTicket};
pub use block_jobs::{BlockJobOptions, ResizeOptions};
pub use checkpoints::DeleteCheckpoint;
pub use config::Affect;
pub use devices::{LETTING_GO, Wanted};
pub(crate) use found::FoundGuest;
pub(crate) use hosted::{AtHost, HostedSeed};
pub use lifecycle::StartOptions;
pub use managed::ManagedSaveOptions;
pub use save::{DumpOptions, Resumption, SaveOptions};
pub(crate) use save::{absolute, path_or_given};
pub use settings::SettingsOf;
pub use snapshots::{CreateCheck, CreateOptions, DeleteOptions, Force, Plan, RevertOptions};
pub use stats::{Stats, StatsOptions};
pub use undefine::{UndefineCheck, UndefineOptions};

use crate::authz::Subject;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::facts::{ConfigFacts, DomainFacts};
use crate::lock::lock;
use crate::object::ObjectKind;
use crate::registry::{Object, Registry};
use crate::shared::Shared;
use crate::store::{Ended, Loaded, Note};
use crate::stored::StoredDef;
use crate::turn::Turn;
use backup::CurrentBackup;
use block_jobs::BlockEntry;
use checkpoints::CheckpointSet;
use lifecycle::Creation;
use snapshots::set::SnapshotSet;
use state::State;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use uuid::Uuid;
use virt_model::driver::Driver;
use virt_model::state::{Defined, DomainState, Lifecycle};

/// One domain, from its definition (or creation, if transient) to its end.
pub struct Domain {
    uuid: Uuid,
    owner: u32,
    driver: Arc<dyn Driver>,
    /// Where it is, if another host keeps it.
    hosted: Option<AtHost>,
    shared: Arc<Shared>,
    domains: Arc<Domains>,
    turn: Arc<Turn>,
    /// Held while records of block jobs are written.
    block_records: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    /// Counts the changes of `state`, for those who wait for one.
    changes: watch::Sender<u64>,
}

/// All domains of this host.
pub(crate) type Domains = Registry<Domain>;

impl Object for Domain {
    const KIND: ObjectKind = ObjectKind::Domain;
    const RENAMED_BY: &str = "Rename";

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn exists(text: String) -> Error {
        Error::DomainExists(text)
    }
}

/// What polkit is told of a domain, or of one that is about to be defined.
pub(crate) fn domain_subject(driver: &dyn Driver, name: &str, uuid: Uuid) -> Subject {
    let subject = Subject::default().with("driver", driver.name()).with("domain_name", name);
    subject.with("domain_uuid", uuid.to_string())
}

/// How a new `Domain` comes to be.
pub(crate) struct DomainSeed {
    pub uuid: Uuid,
    pub name: String,
    /// What is published of its configuration; of a transient domain of that of its guest, or of the one about to start.
    pub config: Arc<ConfigFacts>,
    /// Its stored configuration; a transient domain has none.
    pub stored: Option<Arc<StoredDef>>,
    /// Why the stored configuration cannot be used; `stored` then has only its name, type and uuid.
    pub broken: Option<String>,
    pub driver: Arc<dyn Driver>,
    pub note: Note,
    pub ended: Ended,
    /// It has a managed save.
    pub managed_save: bool,
    /// What was found of its snapshots.
    pub snapshots: Loaded,
    /// Where it is, if another host keeps it.
    pub hosted: Option<AtHost>,
}

/// What is published of a domain that has no guest yet.
fn first_facts(birth: &DomainSeed) -> DomainFacts {
    DomainFacts {
        name: birth.name.clone(),
        uuid: birth.uuid,
        id: 0,
        driver: birth.driver.name(),
        host: birth.hosted.as_ref().map(|at| at.host.name().clone()).unwrap_or_default(),
        reachable: true,
        active: false,
        state: DomainState::Shutoff,
        reason: birth.ended.reason,
        since_usec: birth.ended.since_usec,
        persistent: birth.stored.is_some(),
        autostart: birth.note.autostart,
        config: birth.config.clone(),
        stored: None,
        has_managed_save: birth.managed_save,
        agent_connected: false,
        open_channels: Box::default(),
        lacks: birth.driver.lacks(),
        pending: Arc::default(),
        current_snapshot: None,
        snapshot_count: 0,
        snapshots: Arc::default(),
        owner: birth.note.owner,
        broken: String::new(),
    }
}

impl Domain {
    pub(crate) fn new(shared: &Arc<Shared>, domains: &Arc<Domains>, birth: DomainSeed) -> Arc<Domain> {
        let facts = Arc::new(first_facts(&birth));
        let (uuid, name, mut kept) = (birth.uuid, birth.name, birth.snapshots);
        let hosted = birth.hosted.is_some();
        let backup = kept.backup.as_ref().map(CurrentBackup::found);
        let checkpoints = CheckpointSet::new(std::mem::take(&mut kept.checkpoints));
        let block_jobs = kept.block_jobs.iter();
        let block_jobs =
            block_jobs.map(|(target, record)| (target.clone(), BlockEntry::found(record.clone()))).collect();
        Arc::new(Domain {
            uuid,
            owner: birth.note.owner,
            driver: birth.driver,
            hosted: birth.hosted,
            shared: shared.clone(),
            domains: domains.clone(),
            turn: Arc::default(),
            block_records: tokio::sync::Mutex::default(),
            state: Mutex::new(State {
                name,
                hosted,
                host_name: String::new(),
                unreachable_since: None,
                stored: birth.stored,
                guest: None,
                starting: None,
                creations: 0,
                being_stored: false,
                state: DomainState::Shutoff,
                reason: birth.ended.reason,
                since_usec: birth.ended.since_usec,
                autostart: birth.note.autostart,
                managed_save: birth.managed_save,
                pending: Arc::default(),
                compared: None,
                broken: birth.broken,
                sought: None,
                measured: None,
                unread: None,
                thawed: None,
                snapshots: SnapshotSet::new(kept),
                checkpoints,
                block_jobs,
                backup,
                muted: None,
                coming: Box::default(),
                coming_disks: Box::default(),
                gone: false,
                told: false,
                running: None,
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

    /// What polkit is told it is about.
    pub fn subject(&self) -> Subject {
        let subject = domain_subject(&*self.driver, &self.name(), self.uuid).owned_by(self.owner);
        match &self.hosted {
            Some(at) => subject.with("host", &**at.host.name()),
            None => subject,
        }
    }

    /// The same of one of its snapshots.
    fn snapshot_subject(&self, name: &str) -> Subject {
        self.subject().with("snapshot_name", name)
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
        let before = state.facts.clone();
        let events = change(&mut state);
        state.refresh();
        let facts = state.facts.clone();
        state.tell_images(&self.shared.image_users, self.uuid);
        state.tell_needs(&self.shared.uses, self.uuid);
        let otherwise = !was_told || facts.is_made_otherwise(&before);
        let wants_devices = before.wants_devices() || facts.wants_devices();
        let here = |_: &&Arc<_>| !state.gone && !state.hosted;
        self.shared.plugs.has_cards(self.uuid, state.live().filter(here).map(|live| &**live));
        if was_told || !state.gone {
            let gone = state.gone;
            let (mut there, mut lost) = state.snapshots.news(self.uuid, gone);
            state.checkpoints.news(self.uuid, gone, &mut there, &mut lost);
            // A snapshot or checkpoint is told before the domain that names it, and goes after it does not; but a new domain is told
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
            self.domains.remove(self.uuid, &state.name, self.owner);
        }
        if !was_told || !Arc::ptr_eq(&before, &state.facts) {
            self.keep_for_host(&state);
        }
        let has_gone = state.gone;
        drop(state);
        if wants_devices && (otherwise || has_gone) {
            self.shared.configurations.send_modify(|n| *n += 1);
        }
        self.changes.send_modify(|n| *n += 1);
    }

    /// Makes a new domain findable and tells of it, as one: nothing can be told of it before.
    pub(crate) fn add(self: &Arc<Self>) {
        self.commit_report(|_| {
            self.domains.insert(self.clone());
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
}
