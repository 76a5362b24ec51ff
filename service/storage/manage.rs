//! All pools: definitions until they are pools, look-up, what is found when virtd starts, and what starts with the host.

use super::follow::Occasion;
use super::notes::{NOTED, Noted};
use super::plugged::Keeper;
use super::set::Pools;
use super::work::OwnWork;
use super::{Note, Phase, Pool, StartPool, State, Volume, subject};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::fail_point;
use crate::fair::FairPlaces;
use crate::frames::{self, Changeable as _};
use crate::job::Ticket;
use crate::log;
use crate::registry::check_new_name;
use crate::shared::Shared;
use crate::store::{Folder, FoundDocument, on_disk};
use crate::verb::Verb;
use crate::{Service, verb};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{FileId, PoolAbility, Room};
use virt_model::storage::pool::{PoolDef, PoolKind, PoolSource};
use virt_model::xml::{Finding, FindingKind, Limits, shorten};

/// How many may ask at a time what something done to a pool's volumes would meet.
const CHECKS: usize = 2;

impl Service {
    /// The pool with this uuid, written with or without dashes.
    pub fn pool_by_uuid(&self, uuid: &str) -> Result<Arc<Pool>> {
        let missing = || Error::NoSuchPool { what: "uuid", value: shorten(uuid) };
        self.pool(crate::read_uuid(uuid)?).ok_or_else(missing)
    }

    /// The pool with this uuid, if there is one.
    pub fn pool(&self, uuid: Uuid) -> Option<Arc<Pool>> {
        self.pools.registry.get(uuid)
    }

    /// The pool with this name.
    pub fn pool_by_name(&self, name: &str) -> Result<Arc<Pool>> {
        let missing = || Error::NoSuchPool { what: "name", value: shorten(name) };
        self.pools.registry.by_name(name).ok_or_else(missing)
    }

    /// The volume at a path.
    pub fn volume_by_path(&self, path: &str) -> Result<Volume> {
        let missing = || Error::NoSuchVolume(format!("no active pool has a volume at '{}'", shorten(path)));
        let (pool, name) = self.pools.volume_at(Path::new(path)).ok_or_else(missing)?;
        pool.find_volume(&name)
    }

    /// The volume that is known by a key: a path, or what stays when it has another name.
    pub fn volume_by_key(&self, key: &str) -> Result<Volume> {
        // Everybody may ask, and most keys are paths, which no other key begins as.
        if key.starts_with('/') {
            return self.volume_by_path(key);
        }
        let found = self.pools.registry.all().into_iter().find_map(|pool| pool.volume_with_key(key));
        found.ok_or_else(|| Error::NoSuchVolume(format!("no active pool has a volume with key '{}'", shorten(key))))
    }

    /// What this host can do with each kind of pool.
    pub fn pool_abilities(&self) -> Vec<PoolAbility> {
        self.shared.host.storage.kinds()
    }

    /// What pools of a type could come from: what nobody uses, neither the host nor a machine. `xml` narrows the search where the type
    /// has something to narrow it by.
    pub async fn find_sources(&self, caller: &Caller, kind: &str, xml: &str) -> Result<Vec<PoolSource>> {
        self.allow(caller, &verb::FIND_SOURCES, &Default::default()).await?;
        let known = PoolKind::ALL.iter().find(|known| known.as_str() == kind).copied();
        let kind =
            known.ok_or_else(|| Error::InvalidArgument(format!("there is no type of pool '{}'", shorten(kind))))?;
        let asked = match xml {
            "" => None,
            xml => {
                let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
                Some(seat.read(xml, PoolSource::parse).await.map_err(Error::ConfigInvalid)?)
            }
        };
        let found = self.shared.host.storage.find_sources(kind, asked.as_ref()).await.map_err(|error| match error {
            DriverError::Unsupported(why) => Error::OperationUnsupported(why),
            DriverError::Argument(why) => Error::InvalidArgument(why),
            DriverError::Config(findings) => Error::ConfigInvalid(findings),
            error => Error::StorageFailed(error.to_string()),
        })?;
        let mut unused = Vec::new();
        for source in found {
            let mut is_used = false;
            for device in &source.devices {
                is_used |= !self.shared.images.machines_on(Path::new(&device.path), false).await.is_empty();
            }
            if !is_used {
                unused.push(source);
            }
        }
        Ok(unused)
    }

    /// Everything that keeps a document from being a pool that can be started here.
    pub async fn validate_pool(&self, caller: &Caller, xml: &str) -> Result<Vec<Finding>> {
        self.allow(caller, &verb::VALIDATE_POOL, &Default::default()).await?;
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        match seat.read(xml, PoolDef::parse).await {
            Err(findings) => Ok(findings),
            Ok(def) => Ok(match self.shared.host.storage.check(&def) {
                Ok(()) => Vec::new(),
                Err(DriverError::Config(findings)) => findings,
                Err(error) => vec![Finding::anywhere(FindingKind::Unsupported, "/", error.to_string())],
            }),
        }
    }

    /// Defines a pool, or changes the definition of one.
    pub async fn define_pool(&self, caller: &Caller, xml: &str) -> Result<Arc<Pool>> {
        let (verb, begun) = (&verb::DEFINE_POOL, Instant::now());
        let result = self.define_pool_inner(caller, xml).await;
        match &result {
            Ok(pool) => frames::log_of(&**pool, caller, verb, begun, None),
            Err(error) => log::refused(caller, verb, begun, error),
        }
        result
    }

    async fn define_pool_inner(&self, caller: &Caller, xml: &str) -> Result<Arc<Pool>> {
        let AcceptedPool { def, text, existing } = self.accept_pool(caller, xml, &[&verb::DEFINE_POOL]).await?;
        if let Some(pool) = existing {
            pool.redefine(def, text).await?;
            return Ok(pool);
        }
        let (uuid, name) = (def.uuid, def.name.clone());
        let made = store_new(&self.shared, &self.pools, def, text, caller.uid).await;
        made.inspect_err(|_| self.pools.registry.remove(uuid, &name, caller.uid))
    }

    /// Starts a pool of which nothing is stored, or an inactive one that is stored with this document. The ticket answers when it is
    /// started; one that does not come up is as before, or gone.
    pub async fn create_pool(&self, caller: &Caller, xml: &str, options: StartPool) -> Result<(Arc<Pool>, Ticket)> {
        let begun = Instant::now();
        let accepted = self.accept_pool(caller, xml, &[&verb::CREATE_POOL, &verb::POOL_START]).await;
        let refused = |error: &Error| log::refused(caller, &verb::CREATE_POOL, begun, error);
        let AcceptedPool { def, existing, .. } = accepted.inspect_err(refused)?;
        let pool = existing.unwrap_or_else(|| {
            let note = Note { owner: caller.uid, autostart: false };
            enter(&self.shared, &self.pools, PoolSeed { persistent: false, ..PoolSeed::of(def.clone(), note) })
        });
        let ticket = pool.create(caller, def, options).await?;
        Ok((pool, ticket))
    }

    /// Reads a document, asks whether its caller may do all of that, and claims its name and uuid for it.
    async fn accept_pool(&self, caller: &Caller, xml: &str, verbs: &[&'static Verb]) -> Result<AcceptedPool> {
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let def = seat.read(xml, PoolDef::parse).await.map_err(Error::ConfigInvalid)?;
        let (registry, uuid, name) = (&self.pools.registry, def.uuid, def.name.clone());
        let existing = registry.look(uuid, &name)?;
        if existing.is_none() {
            check_new_name("pool", &name)?;
        }
        let about = existing.as_ref().map_or_else(|| subject(&name, uuid), |pool| pool.subject());
        for verb in verbs {
            self.allow(caller, verb, &about).await?;
        }
        let text = def.write_readable(Limits::STORED).map_err(Error::InvalidArgument)?;
        let limit = self.shared.limits.others_per_user;
        registry.claim_as_seen(uuid, &name, caller.uid, limit, existing.as_ref())?;
        Ok(AcceptedPool { def, text, existing })
    }
}

/// A document whose name and uuid are claimed.
struct AcceptedPool {
    def: PoolDef,
    /// It as it is stored.
    text: String,
    /// The pool that it is of, if there is one.
    existing: Option<Arc<Pool>>,
}

impl Pool {
    /// Takes another document. Permission has been asked.
    async fn redefine(self: &Arc<Self>, def: PoolDef, text: String) -> Result<()> {
        let _turn = frames::take_turn(&**self, verb::DEFINE_POOL.word, &CancellationToken::new()).await?;
        let (autostart, was_broken, was_persistent) = {
            let state = super::lock(&self.state);
            (state.autostart, state.broken.is_some(), state.persistent)
        };
        let (shared, uuid, note) = (self.shared.clone(), self.uuid, Note { owner: self.owner, autostart });
        let noted = on_disk(move || {
            let documents = shared.store.documents(Folder::Pools);
            // What could not be read when virtd began may be right by now, and is not made good by a new document.
            let noted: Option<Vec<(FileId, Noted)>> =
                if was_broken { Some(documents.load_beside(uuid, NOTED)?) } else { None };
            documents.save(uuid, &text, &note)?;
            Ok(noted)
        })
        .await?;
        fail_point::reached();
        let how = if was_persistent { "updated" } else { "added" };
        self.commit(vec![("defined", how)], |state| {
            (state.def, state.broken, state.persistent) = (Arc::new(def), None, true);
            noted.into_iter().for_each(|noted| state.noted = noted.into_iter().collect());
        });
        self.tell_needs();
        Ok(())
    }
}

/// A new pool that is stored, whose name and uuid are claimed.
async fn store_new(
    shared: &Arc<Shared>,
    pools: &Arc<Pools>,
    def: PoolDef,
    text: String,
    owner: u32,
) -> Result<Arc<Pool>> {
    let (on, uuid, note) = (shared.clone(), def.uuid, Note { owner, autostart: false });
    let stored = note.clone();
    on_disk(move || on.store.documents(Folder::Pools).save(uuid, &text, &stored)).await?;
    fail_point::reached();
    let pool = enter(shared, pools, PoolSeed::of(def, note));
    pool.commit(vec![("defined", "added")], |_| {});
    pool.tell_needs();
    Ok(pool)
}

/// What is known of a pool at first.
struct PoolSeed {
    def: PoolDef,
    persistent: bool,
    broken: Option<String>,
    note: Note,
    noted: Vec<(FileId, Noted)>,
}

impl PoolSeed {
    /// Of one that is stored, and of whose volumes nothing is noted.
    fn of(def: PoolDef, note: Note) -> PoolSeed {
        PoolSeed { def, persistent: true, broken: None, note, noted: Vec::new() }
    }
}

/// Registers a pool.
fn enter(shared: &Arc<Shared>, pools: &Arc<Pools>, seed: PoolSeed) -> Arc<Pool> {
    let PoolSeed { def, persistent, broken, note, noted } = seed;
    let (uuid, name) = (def.uuid, def.name.clone());
    let state = State {
        def: Arc::new(def),
        persistent,
        live: None,
        broken,
        autostart: note.autostart,
        phase: Phase::Inactive,
        open: None,
        devices: Vec::new(),
        follows: None,
        room: Room::default(),
        refreshed_usec: 0,
        unnameable: 0,
        volumes: BTreeMap::new(),
        noted: noted.into_iter().collect(),
        gone: false,
        facts: None,
    };
    let pool = Arc::new(Pool {
        uuid,
        name,
        owner: note.owner,
        shared: shared.clone(),
        pools: pools.clone(),
        turn: Arc::default(),
        turns: Mutex::new(HashMap::new()),
        notes: Mutex::default(),
        kept: Mutex::new(HashMap::new()),
        checks: FairPlaces::new(CHECKS, 1),
        state: Mutex::new(state),
        real: Mutex::default(),
    });
    pools.registry.insert(pool.clone());
    pool
}

/// Fills the registry from disk, and opens again, in the background, what was active when virtd was last here. One whose document
/// cannot be used is there, and says so.
pub(crate) async fn load(shared: &Arc<Shared>, pools: &Arc<Pools>) -> Result<()> {
    let on = shared.clone();
    let found = on_disk(move || on.store.documents(Folder::Pools).load::<Note>()).await?;
    let on = shared.clone();
    let active = on_disk(move || on.store.active_pools().load::<Note>()).await?.into_iter();
    let mut active: HashMap<Uuid, _> = active.map(|found| (found.uuid, found)).collect();
    for FoundDocument { uuid, text, note } in found {
        let read = read_pool(text, uuid);
        let read = read.and_then(|def| pools.registry.look(uuid, &def.name).map(|_| def).map_err(|e| e.to_string()));
        let (def, broken) = match read {
            Ok(def) => (def, None),
            Err(why) => {
                tracing::error!(%uuid, "the document of this pool is left alone: {why}");
                (PoolDef { name: uuid.to_string(), uuid, ..PoolDef::default() }, Some(why))
            }
        };
        let on = shared.clone();
        let noted: Result<Vec<(FileId, Noted)>> =
            on_disk(move || on.store.documents(Folder::Pools).load_beside(uuid, NOTED)).await;
        let (noted, broken) = match noted {
            Ok(noted) => (noted, broken),
            Err(e) => {
                tracing::error!(%uuid, "what is noted of this pool's volumes is left alone: {e}");
                let why = format!("what is noted of its volumes is lost ({e}): put that file right, or remove it");
                (Vec::new(), broken.or(Some(why)))
            }
        };
        // Without what is noted a guest's disk would be what the guest says that it is.
        let opens = active.remove(&uuid).filter(|_| broken.is_none());
        pools.registry.claim(uuid, &def.name, note.owner, usize::MAX)?;
        let pool = enter(shared, pools, PoolSeed { def, persistent: true, broken, note, noted });
        pool.commit(Vec::new(), |_| {});
        pool.tell_needs();
        if let Some(found) = opens {
            let def = pool.active_as(found.text);
            pool.begins_again(def);
        }
    }
    for found in active.into_values() {
        let uuid = found.uuid;
        if let Err(why) = load_transient(shared, pools, found).await {
            tracing::error!(%uuid, "a pool of which nothing is stored is not there any more: {why}");
        }
    }
    listen(shared, pools);
    shared.volumes.kept_by(Box::new(Keeper(Arc::downgrade(pools))));
    Ok(())
}

/// The definition in a file that is called by that uuid. Error: the file cannot be read, or holds another pool.
fn read_pool(text: std::result::Result<String, String>, uuid: Uuid) -> std::result::Result<PoolDef, String> {
    let unreadable = |findings: Vec<Finding>| virt_model::xml::unreadable(&findings);
    let def = PoolDef::parse_within(&text?, Limits::STORED).map_err(unreadable)?;
    match def.uuid == uuid {
        true => Ok(def),
        false => Err(format!("its file holds the pool {}", def.uuid)),
    }
}

/// A pool that is active, and of which nothing is stored.
async fn load_transient(
    shared: &Arc<Shared>,
    pools: &Arc<Pools>,
    FoundDocument { uuid, text, note }: FoundDocument<Note>,
) -> std::result::Result<(), String> {
    let def = read_pool(text, uuid)?;
    let on = shared.clone();
    // Without what is noted a guest's disk would be what the guest says that it is.
    let noted = on_disk(move || on.store.documents(Folder::Pools).load_beside(uuid, NOTED)).await;
    let noted = noted.map_err(|e| e.to_string())?;
    pools.registry.claim(uuid, &def.name, note.owner, usize::MAX).map_err(|e| e.to_string())?;
    let (def, running) = (def.clone(), Arc::new(def));
    let pool = enter(shared, pools, PoolSeed { persistent: false, noted, ..PoolSeed::of(def, note) });
    pool.tell_needs();
    pool.begins_again(running);
    Ok(())
}

impl Pool {
    /// It is opened in the background, as it was when virtd was last here. Who starts a machine meanwhile waits for it.
    fn begins_again(self: Arc<Self>, def: Arc<PoolDef>) {
        self.commit(Vec::new(), |state| state.phase = Phase::Starting);
        tokio::spawn(async move { self.opens_again(def).await });
    }

    /// With which definition it was active, by what was written of that.
    fn active_as(&self, text: std::result::Result<String, String>) -> Arc<PoolDef> {
        let stored = super::lock(&self.state).def.clone();
        match read_pool(text, self.uuid) {
            Ok(def) if def.write() != stored.write() => Arc::new(def),
            Ok(_) => stored,
            Err(why) => {
                let uuid = self.uuid;
                tracing::warn!(%uuid, "a pool is active as it is stored: how it was made active cannot be read: {why}");
                stored
            }
        }
    }

    /// It was active, as that definition says, when virtd was last here.
    async fn opens_again(self: Arc<Self>, def: Arc<PoolDef>) {
        let cancel = CancellationToken::new();
        let Ok(_turn) = frames::take_turn(&*self, verb::POOL_START.word, &cancel).await else {
            return self.commit(Vec::new(), State::set_inactive);
        };
        if let Err(error) = self.bring_up(def, StartPool::default(), Occasion::Again, &OwnWork(cancel)).await {
            tracing::error!(uuid = %self.uuid, %error, "a pool that was active is not any more");
        }
    }
}

/// Has pools tell who uses their volumes whenever machines name others, and machines refused what volumes stand on.
fn listen(shared: &Arc<Shared>, pools: &Arc<Pools>) {
    let all = Arc::downgrade(pools);
    shared.image_users.listen(move |changed| {
        all.upgrade().into_iter().for_each(|pools| pools.look_at_users(changed));
    });
    let all = Arc::downgrade(pools);
    shared.images.also(move || all.upgrade().map(|pools| pools.noted_chains()).unwrap_or_default());
}
