//! What is in a pool is read and followed: when it starts, when it is to be looked at anew, and when somebody else changes it.

use super::{Note, Phase, Pool, StartPool, State};
use crate::error::Result;
use crate::fail_point;
use crate::lock::lock;
use crate::store::on_disk;
use crate::time::now_usec;
use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use virt_model::driver::storage::{FileId, PoolChange, VolumeLook, Work};
use virt_model::storage::pool::PoolDef;

/// How a pool comes to be started.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Occasion {
    /// A client wants it, or the host has come up.
    Anew,
    /// It was active when virtd was last here.
    Again,
}

impl Pool {
    /// Makes it usable, as that definition says. For who has the turn. On failure it is inactive, and nothing is left on the host of
    /// what was begun; one that was attached when virtd was last here is inaccessible, and what is mounted, or active, stays.
    pub(super) async fn bring_up(
        self: &Arc<Self>,
        def: Arc<PoolDef>,
        options: StartPool,
        on: Occasion,
        work: &dyn Work,
    ) -> Result<()> {
        self.commit(Vec::new(), |state| state.phase = Phase::Starting);
        let started = async {
            self.keep_devices("start", &def).await?;
            if on == Occasion::Anew {
                self.refuse_device_in_use("start", &def, true).await?;
            }
            if options.build {
                self.builds(&def, options.overwrite, work).await?;
            }
            let (shared, uuid, text) = (self.shared.clone(), self.uuid, def.write());
            let note = Note { owner: self.owner, autostart: false };
            // Before anything is done to the host: what is cut off from here on is finished by the next virtd.
            on_disk(move || shared.store.active_pools().save(uuid, &text, &note)).await?;
            fail_point::reached();
            self.opens(def.clone(), work).await
        };
        let started = started.await;
        fail_point::reached();
        match started {
            Ok(()) => self.commit(vec![("started", "booted")], |state| state.phase = Phase::Running),
            // Guests may run on what is mounted still.
            Err(_) if on == Occasion::Again && def.kind.is_attached() => {
                self.commit(Vec::new(), |state| (state.phase, state.live) = (Phase::Inaccessible, Some(def)));
            }
            Err(_) => self.goes_down(on).await,
        }
        started
    }

    /// It does not come up: what was done to the host for it is taken back. As long as that cannot be done it is inaccessible.
    async fn goes_down(self: &Arc<Self>, on: Occasion) {
        if let Some(open) = self.open()
            && let Err(error) = open.take_back().await
        {
            tracing::warn!(uuid = %self.uuid, %error, "a pool that was not started is not taken from the host");
            return self.commit(Vec::new(), |state| state.phase = Phase::Inaccessible);
        }
        // One that was active is to be active again when what it lacks is there.
        if on == Occasion::Anew || !lock(&self.state).persistent {
            let pool = self.clone();
            if let Err(error) = on_disk(move || pool.forget_active()).await {
                tracing::warn!(uuid = %self.uuid, "{error}");
            }
        }
        self.commit(Vec::new(), State::set_inactive);
    }

    /// Opens it, reads what is in it, and follows what changes.
    pub(super) async fn opens(self: &Arc<Self>, def: Arc<PoolDef>, work: &dyn Work) -> Result<()> {
        let open = self.shared.host.storage.open(&def, work).await.map_err(|e| self.failed("start", e))?;
        fail_point::reached();
        let target = PathBuf::from(def.target_path().unwrap_or_default());
        *lock(&self.real) = Some((target, open.real_path().to_owned()));
        {
            let mut state = lock(&self.state);
            (state.open, state.live) = (Some(open.clone()), Some(def));
        }
        // First it is listened, then looked: what changes in between is told.
        let changes = open.follow().await.map_err(|e| self.failed("start", e))?;
        self.look_at_all().await?;
        // No volume of it is being made yet.
        let lost = lock(&self.state).noted.keys().copied().collect();
        self.forget_lost(lost).await?;
        if let Some(changes) = changes {
            let ends = CancellationToken::new();
            lock(&self.state).follows = Some(ends.clone().drop_guard());
            tokio::spawn(follow(Arc::downgrade(self), changes, ends));
        }
        Ok(())
    }

    /// Reads all that is in it.
    pub(super) async fn look_at_all(self: &Arc<Self>) -> Result<()> {
        let Some(open) = self.open() else { return Ok(()) };
        let survey = open.survey(&self.known()).await;
        let survey = survey.map_err(|e| {
            self.commit(Vec::new(), |state| state.phase = Phase::Inaccessible);
            self.failed("read", e)
        })?;
        let there: BTreeSet<Arc<str>> = survey.volumes.iter().map(|look| (*look.name).into()).collect();
        let gone: Vec<Arc<str>> =
            lock(&self.state).volumes.keys().filter(|name| !there.contains(*name)).cloned().collect();
        let lost = self.take_in(survey.volumes, gone, |state| {
            (state.room, state.unnameable, state.refreshed_usec) = (survey.room, survey.unnameable, now_usec());
            let there: HashSet<FileId> = state.volumes.values().map(|row| row.look.id).collect();
            let gone = state.noted.iter_mut().filter(|(id, _)| !there.contains(*id));
            gone.for_each(|(_, noted)| noted.stands = None);
        });
        self.forget_lost(lost).await
    }

    /// Looks at some volumes, which may have come, changed or gone.
    pub(super) async fn look_at(self: &Arc<Self>, names: Vec<String>) -> Result<()> {
        let Some(open) = self.open() else { return Ok(()) };
        let looks = open.look(names.clone(), &self.known()).await.map_err(|e| self.failed("read", e))?;
        let room = open.room().await.map_err(|e| self.failed("read", e))?;
        let gone = names.into_iter().filter(|name| !looks.iter().any(|look| look.name == *name));
        let gone = gone.map(|name| (*name).into()).collect();
        let lost = self.take_in(looks, gone, |state| state.room = room);
        self.forget_lost(lost).await
    }

    /// Volumes are so, and these are gone. The files are told that had one of these names before.
    fn take_in(
        self: &Arc<Self>,
        looks: Vec<VolumeLook>,
        gone: Vec<Arc<str>>,
        change: impl FnOnce(&mut State),
    ) -> Vec<FileId> {
        let touched: BTreeSet<Arc<str>> = looks.iter().map(|look| (*look.name).into()).chain(gone.clone()).collect();
        let names = touched.clone();
        let mut had = Vec::new();
        self.commit_volumes(Vec::new(), touched, |state| {
            had = names.iter().filter_map(|name| Some(state.volumes.get(name)?.look.id)).collect();
            gone.iter().for_each(|name| _ = state.volumes.remove(name));
            looks.into_iter().for_each(|look| state.enter(look));
            state.stand_no_more(&names);
            change(state);
        });
        had
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
                pool.commit(Vec::new(), State::set_inaccessible);
                return;
            }
        };
        if let Err(error) = looked {
            tracing::warn!(uuid = %pool.uuid, %error, "a pool cannot be read");
        }
    }
}
