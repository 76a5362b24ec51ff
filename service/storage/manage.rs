//! All pools: definitions until they are pools, look-up, what is found when virtd starts, and what starts with the host.

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
use crate::log;
use crate::registry::{Claimed, check_new_name};
use crate::shared::Shared;
use crate::store::{Folder, FoundDocument, on_disk};
use crate::{Service, verb};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::driver::storage::{FileId, PoolAbility, Room};
use virt_model::storage::pool::PoolDef;
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

    /// What this host can do with each kind of pool.
    pub fn pool_abilities(&self) -> Vec<PoolAbility> {
        self.shared.host.storage.kinds()
    }

    /// Everything that keeps a document from being a pool that can be started here.
    pub async fn validate_pool(&self, caller: &Caller, xml: &str) -> Result<Vec<Finding>> {
        self.allow(caller, &verb::VALIDATE_POOL, &Default::default()).await?;
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        match seat.read(xml, PoolDef::parse).await {
            Err(findings) => Ok(findings),
            Ok(def) => Ok(match self.shared.host.storage.check(&def) {
                Ok(()) => Vec::new(),
                Err(virt_model::driver::DriverError::Config(findings)) => findings,
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
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let def = seat.read(xml, PoolDef::parse).await.map_err(Error::ConfigInvalid)?;
        let (registry, uuid, name) = (&self.pools.registry, def.uuid, def.name.clone());
        let existing = registry.look(uuid, &name)?;
        if existing.is_none() {
            check_new_name("pool", &name)?;
        }
        let about = existing.as_ref().map_or_else(|| subject(&name, uuid), |pool| pool.subject());
        self.allow(caller, &verb::DEFINE_POOL, &about).await?;
        let text = def.write_readable(Limits::STORED).map_err(Error::InvalidArgument)?;
        match registry.claim(uuid, &name, caller.uid, self.shared.limits.others_per_user)? {
            Claimed::Existing(pool) if existing.as_ref().is_some_and(|known| Arc::ptr_eq(known, &pool)) => {
                pool.redefine(def, text).await?;
                Ok(pool)
            }
            Claimed::Existing(_) => {
                Err(Error::PoolExists(format!("pool '{name}' was defined by another call meanwhile; try again")))
            }
            Claimed::New if existing.is_none() => {
                let made = create(&self.shared, &self.pools, def, text, caller.uid).await;
                made.inspect_err(|_| registry.remove(uuid, &name, caller.uid))
            }
            Claimed::New => {
                registry.remove(uuid, &name, caller.uid);
                let text = format!("pool '{name}' was removed by another call meanwhile; try again");
                Err(Error::OperationInvalid(text))
            }
        }
    }
}

impl Pool {
    /// Takes another document. Permission has been asked.
    async fn redefine(self: &Arc<Self>, def: PoolDef, text: String) -> Result<()> {
        let _turn = frames::take_turn(&**self, verb::DEFINE_POOL.word, &CancellationToken::new()).await?;
        let (autostart, was_broken) = {
            let state = super::lock(&self.state);
            (state.autostart, state.broken.is_some())
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
        self.commit(vec![("defined", "updated")], |state| {
            (state.def, state.broken) = (Arc::new(def), None);
            noted.into_iter().for_each(|noted| state.noted = noted.into_iter().collect());
        });
        self.tell_needs();
        Ok(())
    }
}

/// A new pool, whose name and uuid are claimed.
async fn create(shared: &Arc<Shared>, pools: &Arc<Pools>, def: PoolDef, text: String, owner: u32) -> Result<Arc<Pool>> {
    let (on, uuid, note) = (shared.clone(), def.uuid, Note { owner, autostart: false });
    on_disk(move || on.store.documents(Folder::Pools).save(uuid, &text, &note)).await?;
    fail_point::reached();
    let pool = enter(shared, pools, def, None, Note { owner, autostart: false }, Vec::new());
    pool.commit(vec![("defined", "added")], |_| {});
    Ok(pool)
}

/// Registers a pool.
fn enter(
    shared: &Arc<Shared>,
    pools: &Arc<Pools>,
    def: PoolDef,
    broken: Option<String>,
    note: Note,
    noted: Vec<(FileId, Noted)>,
) -> Arc<Pool> {
    let (uuid, name) = (def.uuid, def.name.clone());
    let state = State {
        def: Arc::new(def),
        live: None,
        broken,
        autostart: note.autostart,
        phase: Phase::Inactive,
        open: None,
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
    let mut active: HashMap<Uuid, _> = active.map(|found| (found.uuid, found.text)).collect();
    for FoundDocument { uuid, text, note } in found {
        let read = text.and_then(|text| {
            PoolDef::parse_within(&text, Limits::STORED).map_err(|findings| virt_model::xml::unreadable(&findings))
        });
        let read = read.and_then(|def| match def.uuid == uuid {
            true => Ok(def),
            false => Err(format!("its file holds the pool {}", def.uuid)),
        });
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
        let pool = enter(shared, pools, def, broken, note, noted);
        pool.commit(Vec::new(), |_| {});
        pool.tell_needs();
        if let Some(text) = opens {
            let def = pool.active_as(text);
            // Who starts a machine meanwhile waits for it.
            pool.commit(Vec::new(), |state| state.phase = Phase::Starting);
            tokio::spawn(async move { pool.opens_again(def).await });
        }
    }
    listen(shared, pools);
    shared.volumes.kept_by(Box::new(Keeper(Arc::downgrade(pools))));
    Ok(())
}

impl Pool {
    /// With which definition it was active, by what was written of that.
    fn active_as(&self, text: std::result::Result<String, String>) -> Arc<PoolDef> {
        let stored = super::lock(&self.state).def.clone();
        let read = text.and_then(|text| {
            PoolDef::parse_within(&text, Limits::STORED).map_err(|findings| virt_model::xml::unreadable(&findings))
        });
        match read {
            Ok(def) if def.uuid == self.uuid && def.write() != stored.write() => Arc::new(def),
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
        if let Err(error) = self.bring_up(def, StartPool::default(), &OwnWork(cancel)).await {
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
