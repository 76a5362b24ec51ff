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
mod manage;
mod plugged;
mod set;
mod users;
mod volume;

pub use create::{AddVolume, CloneVolume, CreateVolume};
pub(crate) use manage::load;
pub(crate) use set::Pools;
pub use users::StorageCheck;
pub use volume::{NewCapacity, Volume};

use crate::authz::{Action, Caller, Subject};
use crate::error::{Error, Result};
use crate::events::{Event, Happened};
use crate::facts::{ObjectFacts, PoolFacts, VolumeFacts, published};
use crate::fail_point;
use crate::fair::FairPlaces;
use crate::frames::{self, Changeable};
use crate::images::Taken;
use crate::job::{Job, Ticket};
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef};
use crate::registry::Object;
use crate::shared::Shared;
use crate::store::{Folder, on_disk};
use crate::time::now_usec;
use crate::turn::Turn;
use crate::uses::{Need, Needed};
use crate::verb::{self, Verb, When};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{FileId, KnownFormats, OpenPool, PoolChange, Room, VolumeLook, Work};
use virt_model::secret::SecretName;
use virt_model::storage::pool::PoolDef;

/// How often the progress of a job is told.
const PACE: Duration = Duration::from_millis(250);

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
    /// What is stored.
    def: Arc<PoolDef>,
    /// What it runs with.
    live: Option<Arc<PoolDef>>,
    /// Why its document cannot be used: `def` then only stands for it.
    broken: Option<String>,
    autostart: bool,
    phase: Phase,
    open: Option<Arc<dyn OpenPool>>,
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
    /// As last published.
    facts: Option<Arc<VolumeFacts>>,
}

/// What is noted of a file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Noted {
    format: String,
    owner: u32,
    /// Its format is what its header said when it was last written, and is noted for as long as it is incomplete.
    #[serde(default)]
    probed: bool,
    /// What was being written to it was cut off.
    #[serde(default)]
    incomplete: bool,
    /// What a guest sees of it, where it is incomplete: its header may not say it any more.
    #[serde(default)]
    capacity: u64,
    /// What it was put on when it was made. Its header says that, too, and is no wish of anybody's: who writes the file writes it.
    #[serde(default)]
    base: Option<PathBuf>,
    /// The volume that it is, while it stands on that.
    #[serde(default)]
    stands: Option<String>,
    /// What opens it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret: Option<NotedSecret>,
}

/// The secret that opens a volume. Who undefines it loses what the volume holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct NotedSecret {
    /// The volume, as it was called when it was made.
    volume: String,
    /// The secret's uuid, or what it is for.
    named: String,
}

impl NotedSecret {
    fn need(&self) -> Need {
        Need { what: Needed::Secret(SecretName::of_volume(&self.named)), place: self.volume.as_str().into() }
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
        let phase = lock(&self.state).phase;
        let refused = |why: &str| {
            let (word, name) = (verb.word, &self.name);
            Err(Error::OperationInvalid(format!("pool '{name}' is {}: {word} needs it {why}", phase.as_str())))
        };
        match verb.when {
            When::Inactive if phase != Phase::Inactive => refused("inactive"),
            When::Running if phase != Phase::Running => refused("running"),
            When::Active if phase == Phase::Inactive => refused("active"),
            _ => Ok(()),
        }
    }

    const UNDONE_LATER: &str = "its storage does not answer: it ends when it does";
}

/// A job, as the host's storage sees it.
struct JobWork {
    job: Arc<Job>,
    pool: Arc<Pool>,
    /// Whose the volumes are that it makes.
    owner: u32,
    /// What a volume that it makes stands on.
    base: Mutex<Option<PathBuf>>,
    told: Mutex<Option<Instant>>,
    /// What it changes may be changed already.
    begun: AtomicBool,
    /// Files that are not free before it has ended, and each thread of it that may still change one.
    held: Mutex<Vec<Arc<Taken>>>,
}

impl JobWork {
    fn new(job: Arc<Job>, pool: Arc<Pool>, owner: u32) -> Arc<JobWork> {
        let (base, told, begun, held) = (Mutex::default(), Mutex::default(), AtomicBool::default(), Mutex::default());
        Arc::new(JobWork { job, pool, owner, base, told, begun, held })
    }

    /// A file is not free before it has ended.
    fn holds(&self, taken: impl Into<Arc<Taken>>) {
        lock(&self.held).push(taken.into());
    }

    /// Whether what it changes may be changed already.
    fn has_begun(&self) -> bool {
        self.begun.load(Ordering::SeqCst)
    }

    /// What it makes is put on that.
    fn puts_on(&self, base: Option<PathBuf>) {
        *lock(&self.base) = base;
    }
}

impl Work for JobWork {
    fn progress(&self, done: u64, total: u64) {
        self.begun.store(true, Ordering::SeqCst);
        let mut told = lock(&self.told);
        // Of a client's stream nobody knows how long it is: it may come byte by byte.
        if (total == 0 || done < total) && told.is_some_and(|told| told.elapsed() < PACE) {
            return;
        }
        *told = Some(Instant::now());
        self.job.progress(done, total);
    }

    fn step(&self) {
        fail_point::reached();
    }

    fn names(&self, id: FileId, name: &str, format: &str, secret: Option<&str>) -> Result<(), DriverError> {
        // What takes the place of a volume stays its owner's, and what opened that may open it still.
        let (owner, before) = self.pool.noted_of(name).unwrap_or((self.owner, None));
        let secret = secret.map(|named| NotedSecret { volume: name.to_owned(), named: named.to_owned() }).or(before);
        let base = lock(&self.base).clone();
        let stands = base.as_ref().map(|_| name.into());
        let noted = Noted { format: format.to_owned(), owner, base, stands, secret, ..Noted::default() };
        self.pool.note(id, Some(noted)).map_err(|e| DriverError::Storage(e.to_string()))
    }

    fn cancelled(&self) -> &CancellationToken {
        self.job.cancel_token()
    }
}

/// Work of virtd's own, which nobody follows.
struct OwnWork(CancellationToken);

impl Work for OwnWork {
    fn progress(&self, _: u64, _: u64) {}

    fn step(&self) {
        fail_point::reached();
    }

    fn names(&self, _: FileId, _: &str, _: &str, _: Option<&str>) -> Result<(), DriverError> {
        Ok(())
    }

    fn cancelled(&self) -> &CancellationToken {
        &self.0
    }
}

/// How a pool is started.
#[derive(Clone, Copy, Debug, Default)]
pub struct StartPool {
    /// What volumes are in is made first, if it is not there.
    pub build: bool,
    /// What is there is overwritten for that.
    pub overwrite: bool,
    /// The start is cancelled when its caller leaves.
    pub cancel_on_disconnect: bool,
}

impl Pool {
    /// Its identity.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is inactive, and is to be active when the host is there.
    pub(crate) fn starts_with_host(&self) -> bool {
        let state = lock(&self.state);
        state.autostart && state.phase == Phase::Inactive
    }

    /// What a method would meet now: `yes`, `no`, `challenge` or `na`. Never prompts.
    /// Error: `InvalidArgument` for a name that is no method of a pool.
    pub async fn can(&self, caller: &Caller, member: &str) -> Result<&'static str> {
        let verb = verb::find("org.virt.StoragePool", verb::POOL, member)?;
        Ok(frames::can(self, caller, verb).await)
    }

    /// Its document: of what runs, with how much room there is, or of what is stored.
    pub async fn xml(&self, caller: &Caller, inactive: bool) -> Result<String> {
        frames::beside(self, caller, &verb::POOL_XML, async {
            let state = lock(&self.state);
            Ok(match state.live.as_ref().filter(|_| !inactive) {
                Some(live) => live.with_room(state.room.capacity, state.room.allocation, state.room.available).write(),
                None => state.def.write(),
            })
        })
        .await
    }

    /// Starts with the host, from now on or not any more.
    pub async fn set_autostart(self: &Arc<Self>, caller: &Caller, autostart: bool) -> Result<()> {
        frames::short(self, caller, &verb::POOL_AUTOSTART, async {
            let (shared, uuid, note) = (self.shared.clone(), self.uuid, Note { owner: self.owner, autostart });
            on_disk(move || shared.store.documents(Folder::Pools).save_note(uuid, &note)).await?;
            self.commit(Vec::new(), |state| state.autostart = autostart);
            Ok(())
        })
        .await
    }

    /// Makes it usable.
    pub async fn start(self: &Arc<Self>, caller: &Caller, options: StartPool) -> Result<Ticket> {
        self.job(caller, &verb::POOL_START, options.cancel_on_disconnect, async {
            if options.build {
                frames::allow(&**self, caller, Action::StorageDefine).await?;
            } else if options.overwrite {
                return Err(Error::InvalidArgument("overwrite is for what is built: say build, too".to_owned()));
            }
            Ok(())
        })
        .await?
        .and_then_run(move |pool, work| async move {
            let def = lock(&pool.state).def.clone();
            pool.bring_up(def, options, &*work).await
        })
    }

    /// Looks at all of it anew.
    pub async fn refresh(self: &Arc<Self>, caller: &Caller, departs: bool) -> Result<Ticket> {
        let begun = self.job(caller, &verb::POOL_REFRESH, departs, async { Ok(()) }).await?;
        begun.and_then_run(|pool, work| async move {
            let lost = {
                let state = lock(&pool.state);
                state.live.clone().filter(|_| state.phase == Phase::Inaccessible)
            };
            match lost {
                // What is there now may be another folder.
                Some(def) => pool.opens(def, &*work).await?,
                None => pool.look_at_all().await?,
            }
            pool.commit(vec![("refreshed", "")], |state| state.phase = Phase::Running);
            Ok(())
        })
    }

    /// Makes what volumes are to be in.
    pub async fn build(self: &Arc<Self>, caller: &Caller, overwrite: bool, departs: bool) -> Result<Ticket> {
        let begun = self.job(caller, &verb::POOL_BUILD, departs, async { Ok(()) }).await?;
        begun.and_then_run(move |pool, work| async move {
            let def = lock(&pool.state).def.clone();
            let built = pool.shared.host.storage.build(&def, overwrite, &*work).await;
            built.map_err(|e| pool.failed("build", e))?;
            fail_point::reached();
            pool.commit(vec![("built", "")], |_| {});
            Ok(())
        })
    }

    /// Removes what volumes were in, if it is empty.
    pub async fn delete(self: &Arc<Self>, caller: &Caller, departs: bool) -> Result<Ticket> {
        let begun = self.job(caller, &verb::POOL_DELETE, departs, async { Ok(()) }).await?;
        begun.and_then_run(move |pool, work| async move {
            let def = lock(&pool.state).def.clone();
            let removed = pool.shared.host.storage.delete(&def, &*work).await;
            removed.map_err(|e| pool.failed("delete", e))?;
            fail_point::reached();
            pool.commit(vec![("deleted", "")], |_| {});
            Ok(())
        })
    }

    /// It is not used any more. What is in it stays, and so does who uses it: a folder is no mount.
    pub async fn destroy(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        frames::short(self, caller, &verb::POOL_DESTROY, async {
            let (open, busy) = {
                let state = lock(&self.state);
                let busy = state.volumes.iter().find(|(_, row)| row.jobs > 0).map(|(name, _)| name.clone());
                (state.open.clone(), busy)
            };
            if let Some(volume) = busy {
                let text = format!(
                    "something is done to volume '{volume}' of pool '{}': wait for its job, or cancel it",
                    self.name
                );
                return Err(Error::OperationInvalid(text));
            }
            if let Some(open) = open {
                open.close().await.map_err(|e| self.failed("stop", e))?;
            }
            let pool = self.clone();
            on_disk(move || {
                // What stands on what is asked of the notes from now on.
                pool.save_noted(|_| {}).unwrap_or_else(|e| tracing::warn!(uuid = %pool.uuid, "{e}"));
                pool.shared.store.active_pools().remove(pool.uuid)
            })
            .await?;
            fail_point::reached();
            self.commit(vec![("stopped", "destroyed")], State::is_inactive);
            Ok(())
        })
        .await
    }

    /// Forgets it. What is in it stays.
    pub async fn undefine(self: &Arc<Self>, caller: &Caller, force: bool) -> Result<()> {
        frames::short(self, caller, &verb::UNDEFINE_POOL, async {
            self.refuse_to_undefine(force)?;
            let (shared, uuid) = (self.shared.clone(), self.uuid);
            on_disk(move || {
                let documents = shared.store.documents(Folder::Pools);
                documents.remove(uuid)?;
                documents.remove_beside(uuid, NOTED)
            })
            .await?;
            fail_point::reached();
            self.commit(vec![("undefined", "removed")], |state| state.gone = true);
            self.tell_needs();
            Ok(())
        })
        .await
    }

    fn refuse_to_undefine(&self, force: bool) -> Result<()> {
        let users = self.users();
        self.refuse_users("undefine", &users, |user| !force || user.how != crate::object::Usage::Config)
    }

    /// What undefining it would meet.
    pub async fn check_undefine(&self, caller: &Caller, force: bool) -> Result<StorageCheck> {
        frames::beside(self, caller, &verb::CHECK_UNDEFINE_POOL, async {
            let active = self.applies(&verb::UNDEFINE_POOL).err();
            let refusal = active.or_else(|| self.refuse_to_undefine(force).err());
            Ok(StorageCheck { refusal, users: self.users(), ..StorageCheck::default() })
        })
        .await
    }

    /// What deleting it would meet.
    pub async fn check_delete(&self, caller: &Caller) -> Result<StorageCheck> {
        frames::beside(self, caller, &verb::CHECK_POOL_DELETE, async {
            let refusal = self.applies(&verb::POOL_DELETE).err();
            let path = self.target().display().to_string();
            Ok(StorageCheck {
                refusal,
                users: self.users(),
                files: vec![(path, "deleted", 0)],
                ..StorageCheck::default()
            })
        })
        .await
    }
}

/// What is noted of files, beside a pool's document.
const NOTED: &str = "volumes";

/// A job of a pool that is on record.
struct Begun {
    job: frames::OpenJob<Pool>,
    verb: &'static Verb,
    owner: u32,
}

impl Begun {
    /// Does `work` when its turn has come.
    fn and_then_run<F>(self, work: impl FnOnce(Arc<Pool>, Arc<dyn Work>) -> F + Send + 'static) -> Result<Ticket>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let Begun { job, verb, owner } = self;
        Ok(job.run(move |pool, job| async move {
            pool.applies(verb)?;
            let told = JobWork::new(job, pool.clone(), owner);
            work(pool, told).await
        }))
    }
}

impl Pool {
    /// Begins a job: permission, what else is to be asked first, the state, the record.
    async fn job(
        self: &Arc<Self>,
        caller: &Caller,
        verb: &'static Verb,
        departs: bool,
        first: impl Future<Output = Result<()>>,
    ) -> Result<Begun> {
        frames::accepted(&**self, caller, verb, async {
            frames::allow(&**self, caller, verb.action).await?;
            first.await?;
            let change = frames::change(self, caller, verb);
            if change.has_turn() {
                self.applies(verb)?;
            }
            Ok(Begun { job: change.open(departs)?, verb, owner: caller.uid })
        })
        .await
    }

    /// Makes it usable, as that definition says. For who has the turn.
    async fn bring_up(self: &Arc<Self>, def: Arc<PoolDef>, options: StartPool, work: &dyn Work) -> Result<()> {
        self.commit(Vec::new(), |state| state.phase = Phase::Starting);
        let started = async {
            if options.build {
                let built = self.shared.host.storage.build(&def, options.overwrite, work).await;
                built.map_err(|e| self.failed("build", e))?;
            }
            self.opens(def.clone(), work).await?;
            let (shared, uuid, text) = (self.shared.clone(), self.uuid, def.write());
            on_disk(move || shared.store.active_pools().save(uuid, &text, &Note::default())).await
        };
        let started = started.await;
        fail_point::reached();
        match started {
            Ok(()) => self.commit(vec![("started", "booted")], |state| state.phase = Phase::Running),
            Err(_) => self.commit(Vec::new(), State::is_inactive),
        }
        started
    }

    /// Opens it, reads what is in it, and follows what changes.
    async fn opens(self: &Arc<Self>, def: Arc<PoolDef>, work: &dyn Work) -> Result<()> {
        let open = self.shared.host.storage.open(&def, work).await.map_err(|e| self.failed("start", e))?;
        // First it is listened, then looked: what changes in between is told.
        let changes = open.follow().await.map_err(|e| self.failed("start", e))?;
        let target = PathBuf::from(def.target_path().unwrap_or_default());
        *lock(&self.real) = Some((target, open.real_path().to_owned()));
        {
            let mut state = lock(&self.state);
            (state.open, state.live) = (Some(open.clone()), Some(def));
        }
        self.look_at_all().await?;
        if let Some(changes) = changes {
            let ends = CancellationToken::new();
            tokio::spawn(follow(Arc::downgrade(self), changes, ends.clone()));
            lock(&self.state).follows = Some(ends.drop_guard());
        }
        Ok(())
    }

    /// Reads all that is in it.
    async fn look_at_all(self: &Arc<Self>) -> Result<()> {
        let Some(open) = self.open() else { return Ok(()) };
        let survey = open.survey(&self.known()).await;
        let survey = survey.map_err(|e| {
            self.commit(Vec::new(), |state| state.phase = Phase::Inaccessible);
            self.failed("read", e)
        })?;
        let there: BTreeSet<Arc<str>> = survey.volumes.iter().map(|look| (*look.name).into()).collect();
        let gone: Vec<Arc<str>> =
            lock(&self.state).volumes.keys().filter(|name| !there.contains(*name)).cloned().collect();
        self.take_in(survey.volumes, gone, |state| {
            (state.room, state.unnameable, state.refreshed_usec) = (survey.room, survey.unnameable, now_usec());
            let there: HashSet<FileId> = state.volumes.values().map(|row| row.look.id).collect();
            let gone = state.noted.iter_mut().filter(|(id, _)| !there.contains(*id));
            gone.for_each(|(_, noted)| noted.stands = None);
        });
        Ok(())
    }

    /// Looks at some volumes, which may have come, changed or gone.
    async fn look_at(self: &Arc<Self>, names: Vec<String>) -> Result<()> {
        let Some(open) = self.open() else { return Ok(()) };
        let looks = open.look(names.clone(), &self.known()).await.map_err(|e| self.failed("read", e))?;
        let room = open.room().await.map_err(|e| self.failed("read", e))?;
        let gone = names.into_iter().filter(|name| !looks.iter().any(|look| look.name == *name));
        let gone = gone.map(|name| (*name).into()).collect();
        self.take_in(looks, gone, |state| state.room = room);
        Ok(())
    }

    fn open(&self) -> Option<Arc<dyn OpenPool>> {
        lock(&self.state).open.clone()
    }

    /// The same for who needs it. Error: it is not active.
    fn opened(&self) -> Result<Arc<dyn OpenPool>> {
        let missing = || Error::OperationInvalid(format!("pool '{}' is inactive: start it first", self.name));
        self.open().ok_or_else(missing)
    }

    /// Formats that are noted.
    fn known(&self) -> KnownFormats {
        let state = lock(&self.state);
        Arc::new(state.noted.iter().map(|(id, noted)| (*id, noted.format.clone())).collect())
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

    /// Notes something of a file, or that nothing is known any more. Blocks.
    fn note(&self, id: FileId, noted: Option<Noted>) -> Result<()> {
        self.save_noted(|all| {
            match noted {
                Some(noted) => all.insert(id, noted),
                None => all.remove(&id),
            };
        })
    }

    /// Changes what is noted of files. Blocks.
    fn save_noted(&self, change: impl FnOnce(&mut HashMap<FileId, Noted>)) -> Result<()> {
        let _writing = lock(&self.notes);
        let all = {
            let mut state = lock(&self.state);
            change(&mut state.noted);
            let mut all: Vec<(FileId, Noted)> = state.noted.iter().map(|(id, noted)| (*id, noted.clone())).collect();
            all.sort_by_key(|(id, _)| *id);
            all
        };
        let saved = self.shared.store.documents(Folder::Pools).save_beside(self.uuid, NOTED, &all);
        self.tell_noted_needs();
        saved
    }

    /// Whose a volume of that name is, and what opens it, if there is one.
    fn noted_of(&self, name: &str) -> Option<(u32, Option<NotedSecret>)> {
        let state = lock(&self.state);
        let look = &state.volumes.get(name)?.look;
        let noted = state.noted.get(&look.id);
        Some((noted.map_or(look.permissions.0, |noted| noted.owner), noted.and_then(|noted| noted.secret.clone())))
    }

    /// Says which secrets open its volumes, active or not.
    fn tell_needs(&self) {
        let _writing = lock(&self.notes);
        self.tell_noted_needs();
    }

    /// The same for who holds its notes: what is told last is what is so last.
    fn tell_noted_needs(&self) {
        let needs: Vec<Need> = {
            let state = lock(&self.state);
            let noted = state.noted.values().filter(|_| !state.gone);
            noted.filter_map(|noted| noted.secret.as_ref()).map(NotedSecret::need).collect()
        };
        self.shared.uses.are(self.reference(), &[], &needs);
    }

    /// Volumes are so, and these are gone.
    fn take_in(self: &Arc<Self>, looks: Vec<VolumeLook>, gone: Vec<Arc<str>>, change: impl FnOnce(&mut State)) {
        let touched: BTreeSet<Arc<str>> = looks.iter().map(|look| (*look.name).into()).chain(gone.clone()).collect();
        let names = touched.clone();
        self.commit_volumes(Vec::new(), touched, |state| {
            gone.iter().for_each(|name| _ = state.volumes.remove(name));
            looks.into_iter().for_each(|look| state.enter(look));
            state.stand_no_more(&names);
            change(state);
        });
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
        let running = state.live.as_ref().unwrap_or(&state.def);
        let abilities = self.shared.host.storage.kinds();
        let ability = abilities.iter().find(|ability| ability.kind == running.kind);
        PoolFacts {
            uuid: self.uuid,
            name: self.name.clone(),
            kind: running.kind.as_str(),
            state: state.phase.as_str(),
            active: state.phase != Phase::Inactive,
            autostart: state.autostart,
            config_changed: state.live.as_ref().is_some_and(|live| **live != *state.def),
            target: running.target_path().unwrap_or_default(),
            room: state.room,
            volume_count: u32::try_from(state.volumes.len()).unwrap_or(u32::MAX),
            refreshed_usec: state.refreshed_usec,
            features: ability.map_or(&[], |ability| ability.features),
            owner: self.owner,
            problems: state.problems(),
            users: self.users_in(&state.target()).into(),
            broken: published(state.broken.as_deref().unwrap_or_default()).to_owned(),
        }
    }
}

impl State {
    fn target(&self) -> PathBuf {
        let running = self.live.as_ref().unwrap_or(&self.def);
        PathBuf::from(running.target_path().unwrap_or_default())
    }

    fn is_inactive(&mut self) {
        (self.phase, self.open, self.live, self.follows) = (Phase::Inactive, None, None, None);
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
                let row = Row { look, jobs: 0, facts: None };
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
            let text = "what it is made of is not there any more: see to it, and refresh or stop the pool".to_owned();
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

/// Looks at what changes, for as long as the pool is open.
async fn follow(pool: Weak<Pool>, mut changes: mpsc::Receiver<PoolChange>, ends: CancellationToken) {
    while let Some(Some(change)) = ends.run_until_cancelled(changes.recv()).await {
        let Some(pool) = pool.upgrade() else { return };
        let looked = match change {
            PoolChange::Names(names) | PoolChange::Sizes(names) => pool.look_at(names.into_iter().collect()).await,
            PoolChange::Much => pool.look_at_all().await,
            PoolChange::Lost => {
                pool.commit(Vec::new(), |state| state.phase = Phase::Inaccessible);
                return;
            }
        };
        if let Err(error) = looked {
            tracing::warn!(uuid = %pool.uuid, %error, "a pool cannot be read");
        }
    }
}
