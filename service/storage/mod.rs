//! Storage pools and their volumes: which there are, what is known of each, and who needs it. What is done to the host is its
//! storage's (`virt_model::driver::storage`).
//!
//! ```text
//!  define ─▶ document and note on disk ─▶ told        start ─▶ host ─▶ noted as active ─▶ told, with all its volumes
//!  create volume ─▶ made without a name ─▶ its format noted ─▶ named ─▶ told
//!  somebody else makes or removes a file ─▶ the host tells it ─▶ looked at ─▶ told
//! ```
//!
//! What is noted of a file that virtd made (format, owner) is found by which file it is, whatever it is called: so nobody's header
//! in a raw disk makes it another.

mod create;
mod follow;
mod manage;
mod notes;
mod plugged;
mod pool;
mod quota;
mod serve;
mod set;
mod users;
mod volume;
mod work;

pub use create::{AddVolume, CloneVolume, CreateVolume};
pub(crate) use manage::load;
pub use pool::StartPool;
pub use quota::Quota;
pub(crate) use serve::CONNECTIONS;
pub(crate) use set::Pools;
pub use users::StorageCheck;
pub use volume::{NewCapacity, Volume};

use crate::authz::{Action, Subject};
use crate::error::{Error, Result};
use crate::events::{Event, Happened};
use crate::facts::{ObjectFacts, PoolFacts, VolumeFacts};
use crate::fair::FairPlaces;
use crate::frames::Changeable;
use crate::images::Taken;
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef};
use crate::registry::Object;
use crate::shared::Shared;
use crate::shown::text::published;
use crate::turn::Turn;
use crate::verb::{Verb, When};
use notes::Noted;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};
use tokio_util::sync::DropGuard;
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{FileId, OpenPool, Room, VolumeLook};
use virt_model::storage::pool::{PoolDef, PoolKind};
use virt_model::storage::volume::VolumeKind;

/// A storage pool, from its definition to its end.
pub struct Pool {
    uuid: Uuid,
    name: String,
    owner: u32,
    shared: Arc<Shared>,
    pools: Arc<Pools>,
    turn: Arc<Turn>,
    /// The rights to change volumes, as long as somebody has or wants one.
    turns: Mutex<HashMap<Arc<str>, Weak<Turn>>>,
    /// Held while what is noted is written, so that what was noted last is what is on disk.
    notes: Mutex<()>,
    /// Volumes that are kept as they are, as long as somebody reads them.
    kept: Mutex<HashMap<Arc<str>, Weak<Taken>>>,
    /// Places of those who only ask what a verb would meet: nothing that is done to it waits behind them.
    checks: Arc<FairPlaces<u32>>,
    state: Mutex<State>,
    /// Its folder as its definition has it, and where that led when it was opened: machines may name its files so, too. It is held
    /// for moments, and nothing else is locked meanwhile.
    real: Mutex<Option<(PathBuf, PathBuf)>>,
}

struct State {
    /// What is stored, or what it was created with.
    def: Arc<PoolDef>,
    /// It is stored; else it is there as long as it is active.
    persistent: bool,
    /// What it runs with.
    live: Option<Arc<PoolDef>>,
    /// Why its document cannot be used: `def` then only stands for it.
    broken: Option<String>,
    autostart: bool,
    phase: Phase,
    open: Option<Arc<dyn OpenPool>>,
    /// Its devices, which are no machine's until the pool is inactive.
    devices: Vec<Taken>,
    /// Ends, when it is dropped, what follows the pool's changes.
    follows: Option<DropGuard>,
    room: Room,
    refreshed_usec: u64,
    unnameable: u32,
    volumes: BTreeMap<Arc<str>, Row>,
    /// What is noted of files.
    noted: HashMap<FileId, Noted>,
    gone: bool,
    /// As last published.
    facts: Option<Arc<PoolFacts>>,
}

/// What a pool is at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Inactive,
    Starting,
    Running,
    /// It was there, and is not any more.
    Inaccessible,
}

impl Phase {
    fn as_str(self) -> &'static str {
        match self {
            Phase::Inactive => "inactive",
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Inaccessible => "inaccessible",
        }
    }
}

/// A volume.
struct Row {
    look: VolumeLook,
    /// How many jobs are at it.
    jobs: usize,
    /// To how many clients it is served that read it.
    readers: usize,
    /// The same of those that may write it.
    writers: usize,
    /// As last published.
    facts: Option<Arc<VolumeFacts>>,
}

impl Row {
    /// Whether it is needed where it is by what virtd does.
    fn is_busy(&self) -> bool {
        self.jobs + self.readers + self.writers > 0
    }
}

/// What XML has no word for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Note {
    owner: u32,
    autostart: bool,
}

impl Object for Pool {
    const KIND: ObjectKind = ObjectKind::Pool;

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn exists(text: String) -> Error {
        Error::PoolExists(text)
    }
}

/// What polkit is told of a pool, or of one that is about to be defined.
fn subject(name: &str, uuid: Uuid) -> Subject {
    Subject::default().with("pool_name", name).with("pool_uuid", uuid.to_string())
}

impl Changeable for Pool {
    const KIND: ObjectKind = ObjectKind::Pool;

    fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn turn(&self) -> &Arc<Turn> {
        &self.turn
    }

    fn reference(&self) -> ObjectRef {
        ObjectRef::Pool(self.uuid)
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn subject(&self) -> Subject {
        subject(&self.name, self.uuid).owned_by(self.owner)
    }

    fn still_here(&self) -> Result<()> {
        match lock(&self.state).gone {
            true => Err(Error::NoSuchPool { what: "uuid", value: self.uuid.to_string() }),
            false => Ok(()),
        }
    }

    fn sound_for(&self, action: Action) -> Result<()> {
        match &lock(&self.state).broken {
            Some(why) if !matches!(action, Action::StorageDefine | Action::StorageDelete) => {
                let name = &self.name;
                let text = format!("pool '{name}' is broken: {why}; define it anew, or undefine it");
                Err(Error::OperationInvalid(text))
            }
            _ => Ok(()),
        }
    }

    fn applies(&self, verb: &Verb) -> Result<()> {
        let (phase, persistent) = {
            let state = lock(&self.state);
            (state.phase, state.persistent)
        };
        let refused = |why: &str| {
            let (word, name) = (verb.word, &self.name);
            Err(Error::OperationInvalid(format!("pool '{name}' is {}: {word} needs it {why}", phase.as_str())))
        };
        match verb.when {
            When::Inactive if phase != Phase::Inactive => refused("inactive"),
            When::Running if phase != Phase::Running => refused("running"),
            When::Active if phase == Phase::Inactive => refused("active"),
            When::Persistent if !persistent => {
                Err(Error::OperationInvalid(format!("pool '{}' is transient: nothing is stored of it", self.name)))
            }
            _ => Ok(()),
        }
    }

    const UNDONE_LATER: &str = "its storage does not answer: it ends when it does";
}

impl Pool {
    fn open(&self) -> Option<Arc<dyn OpenPool>> {
        lock(&self.state).open.clone()
    }

    /// The same for who needs it. Error: it is not active.
    fn opened(&self) -> Result<Arc<dyn OpenPool>> {
        let missing = || Error::OperationInvalid(format!("pool '{}' is inactive: start it first", self.name));
        self.open().ok_or_else(missing)
    }

    /// Where its volumes are.
    fn target(&self) -> PathBuf {
        lock(&self.state).target()
    }

    fn failed(&self, deed: &str, error: DriverError) -> Error {
        match error {
            DriverError::Exists(text) => Error::VolumeExists(format!("cannot {deed} pool '{}': {text}", self.name)),
            error => Error::from_driver_of(ObjectKind::Pool, &self.name, deed, error),
        }
    }

    /// Changes it, and tells what came of it, as one.
    fn commit(&self, events: Vec<Happened>, change: impl FnOnce(&mut State)) {
        self.commit_volumes(events, BTreeSet::new(), change);
    }

    /// The same with volumes that may be others.
    fn commit_volumes(&self, events: Vec<Happened>, mut touched: BTreeSet<Arc<str>>, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        if state.gone {
            return;
        }
        let mut left: BTreeMap<Arc<str>, Arc<VolumeFacts>> = state.shown(&touched);
        let was_active = state.open.is_some();
        change(&mut state);
        if was_active && state.open.is_none() {
            left = std::mem::take(&mut state.volumes)
                .into_iter()
                .filter_map(|(name, row)| Some((name, row.facts?)))
                .collect();
            touched.clear();
        }
        let mut bases: BTreeSet<PathBuf> = BTreeSet::new();
        self.tell_pool(&mut state, events);
        for name in &touched {
            let Some(facts) = self.volume_facts(&state, name) else { continue };
            let before = left.remove(name);
            if before.as_deref() == Some(&facts) {
                continue;
            }
            let facts = Arc::new(facts);
            bases.extend(self.pools.stands(self.uuid, name, before.as_deref(), Some(&facts)));
            if let Some(row) = state.volumes.get_mut(name) {
                row.facts = Some(facts.clone());
            }
            self.shared.events.send(Event::Object(ObjectFacts::Volume(facts), Vec::new()));
        }
        for (name, facts) in left {
            bases.extend(self.pools.stands(self.uuid, &name, Some(&facts), None));
            self.shared.events.send(Event::ObjectGone(ObjectFacts::Volume(facts), Vec::new()));
        }
        let gone = state.gone;
        drop(state);
        if gone {
            self.pools.registry.remove(self.uuid, &self.name, self.owner);
        }
        self.pools.look_at_users(&bases);
    }

    fn tell_pool(&self, state: &mut State, events: Vec<Happened>) {
        let facts = Arc::new(self.facts_of(state));
        if state.facts.as_deref() == Some(&*facts) && events.is_empty() {
            return;
        }
        state.facts = Some(facts.clone());
        self.pools.phases.send_modify(|n| *n += 1);
        self.shared.events.send(match state.gone {
            false => Event::Object(ObjectFacts::Pool(facts), events),
            true => Event::ObjectGone(ObjectFacts::Pool(facts), events),
        });
    }

    fn facts_of(&self, state: &State) -> PoolFacts {
        let running = state.running();
        let abilities = self.shared.host.storage.kinds();
        let ability = abilities.iter().find(|ability| ability.kind == running.kind);
        PoolFacts {
            uuid: self.uuid,
            name: self.name.clone(),
            kind: running.kind.as_str(),
            state: state.phase.as_str(),
            active: state.phase != Phase::Inactive,
            persistent: state.persistent,
            autostart: state.autostart,
            config_changed: state.live.as_ref().is_some_and(|live| **live != *state.def),
            target: running.target_path().unwrap_or_default(),
            room: state.room,
            volume_count: u32::try_from(state.volumes.len()).unwrap_or(u32::MAX),
            refreshed_usec: state.refreshed_usec,
            features: match &state.open {
                Some(open) => open.features(),
                None => ability.map_or(&[], |ability| ability.features),
            },
            owner: self.owner,
            problems: state.problems(),
            users: self.users_of(state).into(),
            broken: published(state.broken.as_deref().unwrap_or_default()).to_owned(),
        }
    }
}

impl State {
    /// What it runs with, or would.
    fn running(&self) -> &Arc<PoolDef> {
        self.live.as_ref().unwrap_or(&self.def)
    }

    fn target(&self) -> PathBuf {
        PathBuf::from(self.running().target_path().unwrap_or_default())
    }

    /// Whether what is in its folder is not all its own: in that of all devices only its volumes are.
    fn shares_folder(&self) -> bool {
        self.running().kind == PoolKind::Disk
    }

    /// What its volumes are.
    fn volume_kind(&self) -> VolumeKind {
        self.running().kind.volume_kind()
    }

    /// It is lost; not if that is since it is being stopped.
    fn set_inaccessible(&mut self) {
        if self.phase == Phase::Running && self.follows.is_some() {
            self.phase = Phase::Inaccessible;
        }
    }

    /// With that one goes of which nothing is stored.
    fn set_inactive(&mut self) {
        self.gone = !self.persistent;
        (self.phase, self.open, self.live, self.follows) = (Phase::Inactive, None, None, None);
        self.devices.clear();
        (self.room, self.unnameable) = (Room::default(), 0);
    }

    /// A volume is there, and so.
    fn enter(&mut self, look: VolumeLook) {
        if let Some(noted) = self.noted.get_mut(&look.id) {
            let says = look.backing.as_ref().and_then(|backing| backing.place.as_ref());
            noted.stands = noted.base.as_ref().filter(|base| says == Some(*base)).map(|_| look.name.clone());
        }
        match self.volumes.get_mut(&*look.name) {
            Some(row) => row.look = look,
            None => {
                let row = Row { look, jobs: 0, readers: 0, writers: 0, facts: None };
                self.volumes.insert((*row.look.name).into(), row);
            }
        }
    }

    /// What has had one of these names, and is another file now or none, stands on nothing.
    fn stand_no_more(&mut self, names: &BTreeSet<Arc<str>>) {
        for (id, noted) in &mut self.noted {
            let has_left = |name: &String| {
                names.contains(&**name) && self.volumes.get(&**name).is_none_or(|row| row.look.id != *id)
            };
            noted.stands = noted.stands.take().filter(|name| !has_left(name));
        }
    }

    /// What was last published of these.
    fn shown(&self, names: &BTreeSet<Arc<str>>) -> BTreeMap<Arc<str>, Arc<VolumeFacts>> {
        let rows = names.iter().filter_map(|name| Some((name.clone(), self.volumes.get(name)?.facts.clone()?)));
        rows.collect()
    }

    /// Why it is active and cannot do its work.
    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if self.phase == Phase::Inaccessible {
            let running = self.running();
            let text = match (running.kind, running.mounted_source()) {
                (_, Some(source)) => format!(
                    "the file system of {source} is not mounted on its folder any more, or cannot be read: refresh the pool to \
                     have it there again, or stop the pool"
                ),
                (PoolKind::Logical, None) => format!(
                    "its volume group '{}' is not active any more, or cannot be read ('vgs' tells more): refresh the pool to have \
                     it there again, or stop the pool",
                    running.source_name()
                ),
                (PoolKind::Disk, None) => {
                    "its disk, or the partition table on it, is not there any more, or cannot be read: see to it, and refresh the \
                     pool, or stop it"
                        .to_owned()
                }
                _ => "what it is made of is not there any more: see to it, and refresh or stop the pool".to_owned(),
            };
            problems.push(("inaccessible", text));
        }
        if self.unnameable > 0 {
            let text = format!(
                "{} files are not listed, since nobody could write their names: rename or remove them",
                self.unnameable
            );
            problems.push(("names", text));
        }
        problems
    }
}
