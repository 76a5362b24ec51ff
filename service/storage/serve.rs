//! Volumes that are served by NBD: each to one client, by a process that has the file open for as long as that client stays. Nobody
//! else writes it meanwhile; while it is written, nobody else reads it either.

use super::Volume;
use crate::authz::{Action, Caller};
use crate::error::{Error, Result};
use crate::frames::{self, Changeable as _};
use crate::images::Taken;
use crate::verb;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_model::driver::storage::{Served, VolumeAt};

/// Connections at a time, of all users and of each.
pub(crate) const CONNECTIONS: (usize, usize) = (64, 8);

/// What is done to it, for people.
const DEED: &str = "serve";

impl Volume {
    /// A connection at which it is served by NBD until that is closed: as an export named '', read-only or not.
    /// Errors: `InUse` while a guest writes it, or uses what is to be written; `LimitsExceeded` if the user has too many connections;
    /// `OperationUnsupported` if it is encrypted.
    pub async fn open_nbd(self, caller: &Caller, read_only: bool) -> Result<OwnedFd> {
        let (volume, verb) = (Arc::new(self), &verb::OPEN_NBD);
        frames::logged(&*volume, caller, verb, async {
            frames::allow(&*volume, caller, verb.action).await?;
            if !read_only {
                frames::allow(&*volume, caller, Action::VolumeWrite).await?;
            }
            volume.applies(verb)?;
            let below = volume.below_for(caller).await?;
            let places = &volume.shared().connection_places;
            let place = places.take_now(&caller.uid).ok_or_else(|| {
                let (all, own) = CONNECTIONS;
                Error::LimitsExceeded(format!(
                    "{own} connections to volumes of yours, or {all} of all users, are open; close some first"
                ))
            })?;
            let _turn = frames::take_turn(&*volume, verb.word, &CancellationToken::new()).await?;
            volume.applies(verb)?;
            let taken = volume.takes_to_serve(read_only).await?;
            volume.still_on(&below)?;
            volume.refuse_written(DEED, &below).await?;
            let serving = Serving::of(volume.clone(), !read_only);
            let served = volume.pool.opened()?.serve(&volume.plain()?, !read_only).await;
            let Served { connection, ended } = served.map_err(|e| volume.failed(DEED, e))?;
            tokio::spawn(async move {
                let _until_the_end = (taken, place);
                ended.await;
                serving.volume.is_looked_at().await;
            });
            Ok(connection)
        })
        .await
    }

    /// Nobody else writes it until the result is dropped.
    async fn takes_to_serve(&self, read_only: bool) -> Result<Arc<Taken>> {
        if read_only {
            let kept = self.kept(DEED).await?;
            self.refuse_while_written(DEED).await?;
            return Ok(kept);
        }
        let taken = self.had_by(DEED, format!("the client that writes volume '{}' (OpenNBD)", self.name)).await?;
        self.refuse_to_change(DEED).await?;
        Ok(Arc::new(taken))
    }

    /// As it is found by who needs no secret for it.
    fn plain(&self) -> Result<VolumeAt> {
        match self.look()?.encrypted {
            true => Err(Error::OperationUnsupported(format!(
                "volume '{}' is encrypted, and is not served: download it as it is",
                self.name
            ))),
            false => self.at(),
        }
    }
}

/// A volume is served to a client, for as long as this is there.
struct Serving {
    volume: Arc<Volume>,
    writes: bool,
}

impl Serving {
    fn of(volume: Arc<Volume>, writes: bool) -> Serving {
        let serving = Serving { volume, writes };
        serving.count(|clients| clients + 1);
        serving
    }

    fn count(&self, count: impl Fn(usize) -> usize) {
        let name = &self.volume.name;
        self.volume.pool.commit_volumes(Vec::new(), [name.clone()].into(), |state| {
            let Some(row) = state.volumes.get_mut(name) else { return };
            let clients = if self.writes { &mut row.writers } else { &mut row.readers };
            *clients = count(*clients);
        });
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.count(|clients| clients.saturating_sub(1));
    }
}
