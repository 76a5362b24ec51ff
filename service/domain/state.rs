//! What a domain is at a moment, and what is published of that. Held for a few lines, never across an await.

use super::backup::CurrentBackup;
use super::block_jobs::BlockEntry;
use super::checkpoints::CheckpointSet;
use super::settings::Looks;
use super::snapshots::set::SnapshotSet;
use super::stats::{Measured, Sampler};
use crate::error::{Error, Result};
use crate::facts::{ConfigFacts, DomainFacts};
use crate::fair::FairPlaces;
use crate::image_users::ImageUsers;
use crate::images::{DiskImages, images_of};
use crate::object::ObjectRef;
use crate::shown::text::published;
use crate::store::{Note, StatusFile};
use crate::stored::StoredDef;
use crate::uses::{Need, Uses};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::domain::abi::AbiDifference;
use virt_model::driver::{Driver, Instance};
use virt_model::state::{DomainState, StateReason, Stopped};
use virt_model::xml::Element;

/// What a domain is at a moment.
pub(super) struct State {
    pub(super) name: String,
    /// Another host keeps it.
    pub(super) hosted: bool,
    /// Its name there.
    pub(super) host_name: String,
    /// That host has not answered since then, in microseconds since the epoch.
    pub(super) unreachable_since: Option<u64>,
    pub(super) stored: Option<Arc<StoredDef>>,
    pub(super) guest: Option<Guest>,
    /// The start under way, or to come of what is under way: there is no guest yet, and soon there may be one.
    pub(super) starting: Option<Starting>,
    /// Starts that bring their own definition and have not ended: until then the domain stays, whatever else goes.
    pub(super) creations: usize,
    /// A configuration is on its way to disk: as with `creations`.
    pub(super) being_stored: bool,
    pub(super) state: DomainState,
    pub(super) reason: StateReason,
    pub(super) since_usec: u64,
    pub(super) autostart: bool,
    /// It has a managed save: the next start goes on from that.
    pub(super) managed_save: bool,
    /// What its stored configuration says otherwise than what runs.
    pub(super) pending: Arc<[AbiDifference]>,
    /// What the configurations that come now say, computed before.
    pub(super) compared: Option<Compared>,
    /// Why its stored configuration cannot be used: `stored` then only stands for it, by its name, type and uuid.
    pub(super) broken: Option<String>,
    /// A guest that ran when virtd was last here, and is not found again yet.
    pub(super) sought: Option<Sought>,
    /// What was last measured of it while it was off.
    pub(super) measured: Option<Measured>,
    /// Why what its guest runs with is not known: what is shown for that only stands for it.
    pub(super) unread: Option<String>,
    /// A client has had file systems of its guest frozen: fires when they are thawed.
    pub(super) thawed: Option<CancellationToken>,
    /// Block jobs that have begun and not ended, by their disks.
    pub(super) block_jobs: BTreeMap<String, BlockEntry>,
    pub(super) snapshots: SnapshotSet,
    pub(super) checkpoints: CheckpointSet,
    /// The backup under way.
    pub(super) backup: Option<CurrentBackup>,
    /// While a snapshot is loaded into the running guest, stops and starts of its CPUs are not told: what they last did.
    pub(super) muted: Option<DomainState>,
    /// What is on its way into it needs these of other objects: a guest that is being started, a device that is being plugged in.
    pub(super) coming: Box<[Need]>,
    /// The same of images.
    pub(super) coming_disks: Box<[DiskImages]>,
    /// No longer in the registry.
    pub(super) gone: bool,
    /// Anybody was told that it exists.
    pub(super) told: bool,
    /// What is published of what runs, and of which definition that is.
    pub(super) running: Option<(Arc<DomainDef>, Arc<ConfigFacts>)>,
    /// As last published.
    pub(super) facts: Arc<DomainFacts>,
}

/// The active half of a domain.
#[derive(Clone)]
pub(super) struct Guest {
    pub(super) id: u32,
    pub(super) instance: Arc<dyn Instance>,
    pub(super) live: Arc<DomainDef>,
    /// The document that most readers get of it, once one has been given: it costs more than all else of an answer.
    pub(super) document: Arc<OnceLock<String>>,
    /// What is last known of what it uses.
    pub(super) sampler: Arc<Sampler>,
    /// What is being read of what it is held to.
    pub(super) looks: Arc<Looks>,
    /// The place of those who only read what its agent tells: they wait for each other, and keep others waiting for one of them.
    pub(super) agent_readers: Arc<FairPlaces<u32>>,
    pub(super) status: Arc<StatusFile>,
    /// Why its end is expected, once it is.
    pub(super) ending: Option<Stopped>,
    /// It ends when it powers off, whatever its configuration says of that.
    pub(super) ends_by_powering_off: bool,
    /// All that is saved of it is written, and is not taken back.
    pub(super) saved: bool,
    /// Devices that it is asked to let go of, with what then goes from what is stored, too.
    pub(super) leaving: BTreeMap<String, Option<Element>>,
    /// Drives of which it was told that the guest has opened them, with what still lies in them.
    pub(super) ejected: BTreeSet<String>,
    /// Devices that have gone and are just being looked after.
    pub(super) looked_after: BTreeSet<String>,
    /// Asks `follow` to say when it has told all that was reported before.
    pub(super) asks: mpsc::UnboundedSender<oneshot::Sender<()>>,
}

/// What runs and what is stored, held against each other: to read and to compare them takes longer than a state may be held.
pub(super) struct Compared {
    live: Arc<DomainDef>,
    running: Arc<ConfigFacts>,
    stored: Option<Arc<StoredDef>>,
    pending: Arc<[AbiDifference]>,
}

impl Compared {
    pub(super) fn of(live: Arc<DomainDef>, stored: Option<Arc<StoredDef>>) -> Compared {
        let running = Arc::new(ConfigFacts::of(&live));
        let pending = stored.as_ref().map(|stored| stored.pending(&live).into()).unwrap_or_default();
        Compared { live, running, stored, pending }
    }
}

/// A guest that is sought since virtd started: what was last known of it is published meanwhile.
pub(super) struct Sought {
    pub(super) id: u32,
    pub(super) live: Arc<DomainDef>,
    /// Why it cannot be found, once that is known: it may run, and is never to be started beside that.
    pub(super) why: Option<String>,
}

/// A start under way, or to come of what is under way.
pub(super) struct Starting {
    /// Fires when no guest is wanted any more.
    pub(super) cancel: CancellationToken,
    /// The hypervisor has been asked: until it has answered there may be a process.
    pub(super) launched: bool,
}

impl Guest {
    /// The channels that something in the guest has open, by their numbers.
    fn open_channels(&self) -> Box<[usize]> {
        let all = self.live.devices.channels.iter().enumerate();
        all.filter(|(_, channel)| self.instance.is_open(channel)).map(|(number, _)| number).collect()
    }
}

impl Sought {
    /// Why nothing can be done to a guest that is not found yet.
    pub(super) fn refusal(&self, name: &str) -> Error {
        match &self.why {
            None => Error::Busy {
                object: format!("domain '{name}'"),
                job: "the search for its guest, since virtd has started".to_owned(),
            },
            Some(why) => Error::OperationInvalid(format!(
                "domain '{name}' may run: its guest could not be looked at when virtd started ({why}); mend that and restart virtd"
            )),
        }
    }
}

impl State {
    /// Its guest has gone, and none is sought any more.
    pub(super) fn has_ended(&mut self, reason: StateReason, since_usec: u64) {
        (self.guest, self.sought, self.unread, self.thawed) = (None, None, None, None);
        (self.state, self.reason, self.since_usec) = (DomainState::Shutoff, reason, since_usec);
        self.pending = Arc::default();
        self.is_saved_or_not(reason);
        self.leave_if_nothing_left();
    }

    /// It is off for that reason: if a managed save of it was under way, there is one now, or not.
    pub(super) fn is_saved_or_not(&mut self, reason: StateReason) {
        if self.snapshots.saves_for_next_start() {
            self.managed_save = reason == StateReason::Saved;
        }
    }

    /// Whether it is told already that a save under way has come to its end.
    pub(super) fn is_known_as_saved(&self) -> bool {
        self.reason == StateReason::Saved && (self.managed_save || !self.snapshots.saves_for_next_start())
    }

    /// Computes anew what is published.
    pub(super) fn refresh(&mut self) {
        let mut facts = (*self.facts).clone();
        facts.id = self.guest.as_ref().map(|g| g.id).or(self.sought.as_ref().map(|s| s.id)).unwrap_or_default();
        self.running_facts();
        let stored = self.stored.as_ref().map(|stored| &stored.config);
        match (&self.running, stored) {
            // A guest without a number only may run, with what is stored.
            (Some((_, running)), stored) => {
                (facts.config, facts.stored) = (running.clone(), stored.filter(|_| facts.id != 0).cloned());
            }
            (None, Some(stored)) => (facts.config, facts.stored) = (stored.clone(), None),
            (None, None) => {}
        }
        facts.name.clone_from(&self.name);
        facts.active = self.state.is_active();
        facts.reachable = self.unreachable_since.is_none();
        (facts.state, facts.reason, facts.since_usec) = match self.unreachable_since {
            None => (self.state, self.reason, self.since_usec),
            Some(since_usec) => (DomainState::Unknown, StateReason::Unreachable, since_usec),
        };
        facts.persistent = self.stored.is_some();
        facts.autostart = self.autostart;
        facts.has_managed_save = self.managed_save;
        facts.agent_connected = self.guest.as_ref().is_some_and(|guest| guest.instance.agent_connected());
        facts.open_channels = self.guest.as_ref().map(Guest::open_channels).unwrap_or_default();
        facts.pending = self.pending.clone();
        facts.current_snapshot = self.snapshots.current().map(str::to_owned);
        facts.snapshot_count = self.snapshots.count();
        if self.snapshots.is_stale() {
            facts.snapshots = self.snapshots.newest();
        }
        facts.broken = published(&self.why_broken()).to_owned();
        if facts != *self.facts {
            self.facts = Arc::new(facts);
        }
    }

    /// Says which images it has; what is on its way counts as what runs.
    pub(super) fn tell_images(&self, users: &ImageUsers, uuid: Uuid) {
        if self.gone {
            return users.are(uuid, &[], &[]);
        }
        let here = self.live().filter(|_| !self.hosted);
        let mut live: Vec<DiskImages> = here.into_iter().flat_map(|live| images_of(live)).collect();
        live.extend_from_slice(&self.coming_disks);
        users.are(uuid, &live, self.stored.as_ref().map_or(&[], |stored| &stored.disks));
    }

    /// Says what it needs of other objects; what is on its way counts as what runs.
    pub(super) fn tell_needs(&self, uses: &Uses, uuid: Uuid) {
        let with_coming: Vec<Need>;
        let live = match self.coming.is_empty() || self.gone {
            true => self.needs_live(),
            false => {
                with_coming = [self.needs_live(), &self.coming[..]].concat();
                &with_coming[..]
            }
        };
        uses.are(ObjectRef::Domain(uuid), live, self.needs_stored());
    }

    /// What what runs needs of other objects.
    fn needs_live(&self) -> &[Need] {
        self.running.as_ref().filter(|_| !self.gone).map_or(&[], |(_, config)| &config.needs)
    }

    /// The same of what is stored.
    fn needs_stored(&self) -> &[Need] {
        self.stored.as_ref().filter(|_| !self.gone).map_or(&[], |stored| &stored.config.needs)
    }

    /// Has `running` be of what runs, which is read once.
    fn running_facts(&mut self) {
        let Some(live) = self.live() else {
            self.running = None;
            return;
        };
        if !self.running.as_ref().is_some_and(|(of, _)| Arc::ptr_eq(of, live)) {
            let config = ConfigFacts::of(live);
            let config = if self.hosted { config.at_another_host() } else { config };
            self.running = Some((live.clone(), Arc::new(config)));
        }
    }

    /// From now on stops and starts of the CPUs are only remembered.
    pub(super) fn mute(&mut self) {
        self.muted = Some(self.state);
    }

    pub(super) fn compare_configs(&mut self) {
        let compared = self.compared.take();
        self.pending = match (&self.stored, self.live(), compared) {
            (Some(stored), Some(live), Some(before))
                if Arc::ptr_eq(live, &before.live)
                    && before.stored.as_ref().is_some_and(|of| Arc::ptr_eq(stored, of)) =>
            {
                before.pending
            }
            (Some(stored), Some(live), _) => stored.pending(live).into(),
            _ => Arc::default(),
        };
    }

    /// These configurations are about to become its own.
    pub(super) fn will_have(&mut self, compared: Option<Compared>) {
        if let Some(compared) = &compared {
            self.running = Some((compared.live.clone(), compared.running.clone()));
        }
        self.compared = compared;
    }

    /// The guest; else why there is none.
    pub(super) fn running(&self) -> Result<&Guest> {
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
    pub(super) fn live(&self) -> Option<&Arc<DomainDef>> {
        self.guest.as_ref().map(|guest| &guest.live).or(self.sought.as_ref().map(|sought| &sought.live))
    }

    /// A domain may go while somebody waits for it.
    pub(super) fn still_here(&self) -> Result<()> {
        if self.gone { Err(Error::NoSuchDomain { what: "name", value: self.name.clone() }) } else { Ok(()) }
    }

    /// Whether it is to go: it has neither configuration nor guest, and is about to get neither.
    pub(super) fn nothing_left(&self) -> bool {
        let left = self.stored.is_some() || self.guest.is_some() || self.sought.is_some();
        !left && !self.being_stored && self.creations == 0 && !self.gone
    }

    /// See [`State::nothing_left`]. `commit` does the rest.
    pub(super) fn leave_if_nothing_left(&mut self) {
        self.gone |= self.nothing_left();
    }

    pub(super) fn note(&self, owner: u32, driver: &dyn Driver) -> Note {
        Note { autostart: self.autostart, ..Note::of(owner, &self.name, driver) }
    }
}
