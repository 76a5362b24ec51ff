//! What can be done to a pool: its verbs, and the jobs that they begin.

use super::follow::Occasion;
use super::notes::NOTED;
use super::work::JobWork;
use super::{Note, Phase, Pool, State, StorageCheck};
use crate::authz::{Action, Caller};
use crate::error::{Error, Result};
use crate::fail_point;
use crate::frames::{self, Changeable as _};
use crate::images::Taken;
use crate::job::Ticket;
use crate::lock::lock;
use crate::object::Usage;
use crate::store::{Folder, on_disk};
use crate::verb::{self, Verb};
use std::sync::Arc;
use uuid::Uuid;
use virt_model::driver::storage::{PoolDevice, Work};
use virt_model::storage::pool::{PoolDef, PoolKind};
use virt_model::storage::volume::VolumeKind;

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

impl StartPool {
    fn make_sense(&self) -> Result<()> {
        match self.overwrite && !self.build {
            true => Err(Error::InvalidArgument("overwrite is for what is built: say build, too".to_owned())),
            false => Ok(()),
        }
    }
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
            }
            options.make_sense()
        })
        .await?
        .and_then_run(move |pool, work| async move {
            let def = lock(&pool.state).def.clone();
            pool.bring_up(def, options, Occasion::Anew, &*work).await
        })
    }

    /// Makes it usable with that definition, of which nothing is stored. Permission has been asked. Where there was no such pool
    /// before, and it does not come up, it is gone.
    pub(super) async fn create(self: &Arc<Self>, caller: &Caller, def: PoolDef, options: StartPool) -> Result<Ticket> {
        let unstarted = Unstarted(self.clone());
        let begun = frames::accepted(&**self, caller, &verb::POOL_START, async {
            options.make_sense()?;
            self.begin(caller, &verb::POOL_START, options.cancel_on_disconnect)
        });
        begun.await?.and_then_run(move |pool, work| async move {
            let _unstarted = unstarted;
            pool.bring_up(Arc::new(def), options, Occasion::Anew, &*work).await
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
                // What is there now may be another folder, or is not mounted.
                Some(def) => {
                    pool.keep_devices("refresh", &def).await?;
                    pool.refuse_device_in_use("refresh", &def, true).await?;
                    pool.opens(def, &*work).await?;
                }
                None => {
                    // Some may have come to its volume group.
                    let live = lock(&pool.state).live.clone();
                    if let Some(def) = live.filter(|def| def.kind == PoolKind::Logical) {
                        pool.keep_devices("refresh", &def).await?;
                        pool.refuse_device_in_use("refresh", &def, true).await?;
                    }
                    pool.look_at_all().await?;
                }
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
            let _until_it_is_built = pool.take_devices("build", &def, false).await?;
            pool.builds(&def, overwrite, &*work).await?;
            fail_point::reached();
            pool.commit(vec![("built", "")], |_| {});
            Ok(())
        })
    }

    /// The same for who has the turn. What a machine has for a disk is not overwritten.
    pub(super) async fn builds(&self, def: &PoolDef, overwrite: bool, work: &dyn Work) -> Result<()> {
        self.refuse_device_in_use("build", def, false).await?;
        let built = self.shared.host.storage.build(def, overwrite, work).await;
        built.map_err(|e| self.failed("build", e))
    }

    /// Takes its devices, so that no machine gets them: to be done before it is asked which machine has one. For who has the turn.
    /// `again`: those that it has already are passed over.
    async fn take_devices(&self, deed: &str, def: &PoolDef, again: bool) -> Result<Vec<Taken>> {
        let mut all = Vec::new();
        for PoolDevice { path, overlapping, .. } in self.devices_of(deed, def).await? {
            let whose = format!("pool '{}', which is to be stopped first,", self.name);
            match self.shared.images.take_device(&path, overlapping, whose.clone()).await {
                Ok(taken) => all.push(taken),
                Err(by) if again && by == whose => {}
                Err(by) => {
                    let (name, device) = (&self.name, path.display());
                    return Err(Error::InUse(format!("cannot {deed} pool '{name}': {by} has its device {device}")));
                }
            }
        }
        Ok(all)
    }

    async fn devices_of(&self, deed: &str, def: &PoolDef) -> Result<Vec<PoolDevice>> {
        self.shared.host.storage.devices(def).await.map_err(|e| self.failed(deed, e))
    }

    /// The same until it is inactive, with those that it has not taken yet.
    pub(super) async fn keep_devices(&self, deed: &str, def: &PoolDef) -> Result<()> {
        let again = !lock(&self.state).devices.is_empty();
        let taken = self.take_devices(deed, def, again).await?;
        lock(&self.state).devices.extend(taken);
        Ok(())
    }

    /// Refuses to use a device of which a machine's disk has bytes, or, where it is not only of one that is `running`, to overwrite it
    /// with all that is on it.
    pub(super) async fn refuse_device_in_use(&self, deed: &str, def: &PoolDef, running: bool) -> Result<()> {
        for PoolDevice { path, mut overlapping, volumes } in self.devices_of(deed, def).await? {
            if !running {
                overlapping.extend(volumes);
            }
            let others = overlapping.iter().map(|one| (one, format!(", of which {} has bytes,", one.display())));
            for (one, has) in [(&path, String::new())].into_iter().chain(others) {
                let machines = self.shared.images.machines_on(one, running).await;
                if !machines.is_empty() {
                    let (name, device, machines) = (&self.name, path.display(), machines.join(", "));
                    return Err(Error::InUse(format!(
                        "cannot {deed} pool '{name}': its device {device}{has} is used by {machines}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Removes what volumes were in, if it is empty.
    pub async fn delete(self: &Arc<Self>, caller: &Caller, departs: bool) -> Result<Ticket> {
        let begun = self.job(caller, &verb::POOL_DELETE, departs, async { Ok(()) }).await?;
        begun.and_then_run(move |pool, work| async move {
            let def = lock(&pool.state).def.clone();
            // To remove a folder writes to no device, whatever is mounted there.
            let writes_devices = def.kind.volume_kind() == VolumeKind::Block;
            let _until_it_is_removed = match writes_devices {
                true => pool.take_devices("delete", &def, false).await?,
                false => Vec::new(),
            };
            if writes_devices {
                pool.refuse_device_in_use("delete", &def, true).await?;
            }
            let removed = pool.shared.host.storage.delete(&def, &*work).await;
            removed.map_err(|e| pool.failed("delete", e))?;
            fail_point::reached();
            pool.commit(vec![("deleted", "")], |_| {});
            Ok(())
        })
    }

    /// It is not used any more. What is in it stays, and so does who uses it: a folder is no mount. What was mounted for it is
    /// unmounted, and what was activated deactivated, and neither while a guest runs on it.
    pub async fn destroy(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        frames::short(self, caller, &verb::POOL_DESTROY, async {
            self.refuse_busy()?;
            self.closes().await?;
            fail_point::reached();
            let pool = self.clone();
            on_disk(move || {
                // What stands on what is asked of the notes from now on.
                if lock(&pool.state).persistent {
                    pool.save_noted(|_| {}).unwrap_or_else(|e| tracing::warn!(uuid = %pool.uuid, "{e}"));
                }
                pool.forget_active()
            })
            .await?;
            fail_point::reached();
            self.commit(vec![("stopped", "destroyed")], State::set_inactive);
            Ok(())
        })
        .await
    }

    fn refuse_busy(&self) -> Result<()> {
        let state = lock(&self.state);
        let Some((volume, _)) = state.volumes.iter().find(|(_, row)| row.is_busy()) else { return Ok(()) };
        Err(Error::OperationInvalid(format!(
            "something is done to volume '{volume}' of pool '{}': wait for its job, or cancel it; a client that it is served to \
             closes its connection",
            self.name
        )))
    }

    /// Takes back what was done to the host for it. On failure it is as before.
    async fn closes(&self) -> Result<()> {
        let (open, live) = {
            let state = lock(&self.state);
            (state.open.clone(), state.live.clone())
        };
        if live.as_ref().is_some_and(|live| live.kind.is_attached()) {
            self.refuse_users("stop", &self.users(), |user| user.how == Usage::Live)?;
        }
        let Some(open) = open else {
            let Some(live) = live else { return Ok(()) };
            return self.shared.host.storage.close(&live).await.map_err(|e| self.failed("stop", e));
        };
        // That it is not there any more is no loss now.
        let follows = lock(&self.state).follows.take();
        let closed = open.close().await;
        if closed.is_err() {
            // One that came back too late may be done yet.
            let answers = open.room().await.is_ok();
            self.commit(Vec::new(), |state| {
                state.follows = follows;
                if !answers {
                    state.phase = Phase::Inaccessible;
                }
            });
        }
        closed.map_err(|e| self.failed("stop", e))
    }

    /// Removes what says that it is active, and all that is kept of one that is not stored: without its notes it must not be found
    /// active. Blocks.
    pub(super) fn forget_active(&self) -> Result<()> {
        self.shared.store.active_pools().remove(self.uuid)?;
        let persistent = lock(&self.state).persistent;
        match persistent {
            true => Ok(()),
            false => self.shared.store.documents(Folder::Pools).remove_beside(self.uuid, NOTED),
        }
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
        self.refuse_users("undefine", &users, |user| !force || user.how != Usage::Config)
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

/// A pool whose start may not come to be begun: then one of which nothing is stored is gone.
struct Unstarted(Arc<Pool>);

impl Drop for Unstarted {
    fn drop(&mut self) {
        let is_left = {
            let state = lock(&self.0.state);
            !state.persistent && state.phase == Phase::Inactive
        };
        if is_left {
            self.0.commit(Vec::new(), State::set_inactive);
        }
    }
}

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
            self.begin(caller, verb, departs)
        })
        .await
    }

    /// The record of a job, if it has a meaning now.
    fn begin(self: &Arc<Self>, caller: &Caller, verb: &'static Verb, departs: bool) -> Result<Begun> {
        let change = frames::change(self, caller, verb);
        if change.has_turn() {
            self.applies(verb)?;
        }
        Ok(Begun { job: change.open(departs)?, verb, owner: caller.uid })
    }
}
