//! Volumes for machines that have them as disks: where they are, what they are, and pools that are started for them.

use super::notes::Noted;
use super::{Phase, Pool, Pools, StartPool};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::volumes::{self, Answer, VolumeImage, VolumeKeeper, VolumePlace};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use virt_model::driver::storage::FileId;
use virt_model::xml::shorten;

/// See the module.
pub(super) struct Keeper(pub Weak<Pools>);

impl Keeper {
    fn pool(&self, name: &str) -> Result<Arc<Pool>> {
        let found = self.0.upgrade().and_then(|pools| pools.registry.by_name(name));
        found.ok_or_else(|| Error::NoSuchPool { what: "name", value: shorten(name) })
    }
}

impl VolumeKeeper for Keeper {
    fn place(&self, pool: &str, volume: &str) -> Option<VolumePlace> {
        let pool = self.pool(pool).ok()?;
        let (target, kind) = {
            let state = lock(&pool.state);
            (state.target(), state.volume_kind())
        };
        // A name that leads elsewhere is none of a volume.
        let plain = Path::new(volume).file_name().is_some_and(|name| name == volume);
        (plain && target.is_absolute()).then(|| VolumePlace { path: target.join(volume), kind })
    }

    fn find(&self, pool: &str, volume: &str, whole: bool) -> Result<Vec<VolumeImage>> {
        let pool = self.pool(pool)?;
        let phase = lock(&pool.state).phase;
        let refuse = |how: &str| {
            let text =
                format!("pool '{}' is {}, and volume '{}' is in it: {how}", pool.name, phase.as_str(), shorten(volume));
            Err(Error::OperationInvalid(text))
        };
        match phase {
            Phase::Running => {}
            Phase::Inaccessible => return refuse("see that its storage is there, and refresh it"),
            Phase::Inactive | Phase::Starting => {
                return refuse("start it first, or start the machine with start-dependencies");
            }
        }
        let found = pool.find_volume(volume)?;
        let mut images = vec![pool.image(volume, found.path())?];
        if whole {
            for (place, _) in found.at()?.below {
                let (pool, name) = pool.pools.volume_at(&place).ok_or_else(|| pool.no_volume(volume))?;
                images.push(pool.image(&name, place)?);
            }
        }
        Ok(images)
    }

    fn stands_on(&self, file: &Path, base: Option<&Path>) -> Result<()> {
        let Some((pool, name)) = self.0.upgrade().and_then(|pools| pools.volume_at(file)) else { return Ok(()) };
        let (base, stands) = (base.map(Path::to_owned), base.map(|_| name.to_string()));
        let noted = {
            let state = lock(&pool.state);
            let id = state.volumes.get(&name).map(|row| row.look.id);
            id.and_then(|id| Some((id, state.noted.get(&id)?.clone())))
        };
        let Some((id, before)) = noted else { return Ok(()) };
        if (&before.base, &before.stands) == (&base, &stands) {
            return Ok(());
        }
        let put = |all: &mut HashMap<FileId, Noted>, base, stands| {
            if let Some(noted) = all.get_mut(&id) {
                (noted.base, noted.stands) = (base, stands);
            }
        };
        pool.save_noted(|all| put(all, base, stands)).inspect_err(|_| {
            // Who tries again is to find that it is not on disk.
            put(&mut lock(&pool.state).noted, before.base, before.stands);
        })
    }

    fn refuse_lost(&self, file: &Path) -> Result<()> {
        let all = self.0.upgrade().map(|pools| pools.all()).unwrap_or_default();
        let is_lost = |pool: &&Arc<Pool>| lock(&pool.state).phase == Phase::Inaccessible;
        let above = all.iter().filter(is_lost).find(|pool| file.parent().is_some_and(|folder| pool.is_above(folder)));
        match above {
            None => Ok(()),
            Some(pool) => Err(Error::OperationInvalid(format!(
                "{}: pool '{}' is inaccessible, and what is at its folder is not its own: see that its storage is there, and \
                 refresh it",
                file.display(),
                pool.name
            ))),
        }
    }

    fn start(&self, caller: Caller, pool: String) -> Answer<'_> {
        Box::pin(async move {
            let pool = self.pool(&pool)?;
            pool.comes_up().await;
            if lock(&pool.state).phase != Phase::Inactive {
                return Ok(());
            }
            let started = async { pool.start(&caller, StartPool::default()).await?.done().await };
            match started.await {
                // Another machine's start has started it meanwhile.
                Err(Error::OperationInvalid(_)) if lock(&pool.state).phase == Phase::Running => Ok(()),
                started => started,
            }
        })
    }

    fn resizes<'a>(&'a self, file: PathBuf, by: u32, capacity: u64, work: Answer<'a>) -> Answer<'a> {
        let Some(volume) = self.0.upgrade().and_then(|pools| pools.volume_of_file(&file)) else { return work };
        Box::pin(async move {
            let _until_it_is_looked_at = volume.reserve_more("resize", by, capacity)?;
            let done = work.await;
            volume.is_looked_at().await;
            done
        })
    }

    fn settles(&self, pool: String) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async move {
            if let Ok(pool) = self.pool(&pool) {
                pool.comes_up().await;
            }
        })
    }
}

impl Pool {
    /// Waits, for a while, until it does not start any more.
    async fn comes_up(&self) {
        let mut phases = self.pools.phases.subscribe();
        let settled = async {
            // Not within `wait_for`: who tells of a change has the state.
            while lock(&self.state).phase == Phase::Starting && phases.changed().await.is_ok() {}
        };
        let _ = tokio::time::timeout(volumes::PATIENCE, settled).await;
    }

    /// What a machine is to know of a volume.
    fn image(&self, name: &str, path: PathBuf) -> Result<VolumeImage> {
        let state = lock(&self.state);
        let Some(row) = state.volumes.get(name) else {
            drop(state);
            return Err(self.no_volume(name));
        };
        let secret = state.noted.get(&row.look.id).and_then(|noted| noted.secret.as_ref());
        Ok(VolumeImage {
            place: VolumePlace { path, kind: state.volume_kind() },
            format: row.look.format.clone(),
            encrypted: row.look.encrypted,
            secret: secret.map(|secret| secret.named.clone()),
        })
    }
}
