//! What is stored is made what runs: the guest is asked to power off, and is then started anew.
//!
//! A guest that does not power off in time runs on, and nothing has changed. What its stored configuration needs of the host is
//! looked at before it is asked. Whoever destroys it meanwhile, or cancels the job, gets no new guest.
//!
//! It is an intent as those on snapshots are: where virtd is killed meanwhile, the next one waits for the guest as long as the caller
//! wanted to, and starts the machine if it has powered off; unless the host itself has been started anew since.

use super::Domain;
use super::lifecycle::{Origin, StartOptions};
use super::snapshots::DomainJournal;
use super::state::Guest;
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::fail_point;
use crate::images;
use crate::job::{Job, Ticket};
use crate::lock::lock;
use crate::shared::virtd_itself;
use crate::store::{Deed, Intent};
use crate::time::now_usec;
use crate::verb;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use virt_model::driver::snapshots::Journal as _;
use virt_model::driver::{DriverError, ShutdownMode};
use virt_model::state::{DomainState, StateReason};
use virt_model::xml::refusals;

/// How long a guest may take to power off, unless the caller says otherwise.
pub const POWERING_OFF: Duration = Duration::from_secs(60);

/// How long the hypervisor of a guest that has powered off may take to go.
const GOING: Duration = Duration::from_secs(30);

/// How pending changes are applied.
#[derive(Clone, Copy, Debug)]
pub struct ApplyOptions {
    /// How long the guest may take to power off.
    pub patience: Duration,
    /// Cancel it when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

impl Domain {
    /// Starts a running guest anew with what is stored. Returns when that is accepted; the ticket answers when the new guest's CPUs
    /// run. Errors of the job: `TimedOut` if the guest does not power off, which then runs on; those of a start.
    pub async fn apply_pending(self: &Arc<Self>, caller: &Caller, options: ApplyOptions) -> Result<Ticket> {
        self.accepted(caller, &verb::APPLY_PENDING, async {
            self.allow(caller, verb::APPLY_PENDING.action).await?;
            self.allow(caller, verb::START.action).await?;
            self.applies(&verb::APPLY_PENDING)?;
            let change = self.change(caller, &verb::APPLY_PENDING);
            if change.has_turn() {
                self.can_run_instead().await?;
            }
            let (job, caller) = (change.open(options.cancel_on_disconnect)?, caller.clone());
            Ok(job.run(async move |domain, job| domain.start_anew(&caller, options.patience, &job).await))
        })
        .await
    }

    async fn start_anew(self: &Arc<Self>, caller: &Caller, patience: Duration, job: &Job) -> Result<()> {
        self.applies(&verb::APPLY_PENDING)?;
        self.can_run_instead().await?;
        let (guest, cancel) = (self.guest()?, job.cancel_token());
        // From here on whoever wants no guest says so to this job.
        let _starts = self.will_start(cancel);
        let until_usec = now_usec().saturating_add(u64::try_from(patience.as_micros()).unwrap_or(u64::MAX));
        let journal = self.journal_of(Deed::Apply { id: guest.id, until_usec }, None, cancel);
        journal.begin().await?;
        let done = async {
            self.powers_off(&guest, patience, cancel).await?;
            fail_point::reached();
            self.starts_anew(caller, cancel).await
        };
        let done = done.await;
        if let Err(error) = journal.end().await {
            tracing::warn!(uuid = %self.uuid, %error, "the next virtd looks at this new start again");
        }
        done
    }

    async fn starts_anew(self: &Arc<Self>, caller: &Caller, cancel: &CancellationToken) -> Result<()> {
        let def = self.def_to_start(None)?;
        let checked = self.driver.can_start(&def).await;
        let accepted = checked.map_err(|e| Error::from_driver(&self.name(), "start", e))?;
        self.start_guest(def, caller, StartOptions::default(), Origin::PowerOff(accepted), cancel).await
    }

    /// Goes on with what the last virtd had begun, for the guest `id`. Whatever comes of it, nothing is left to be done: a machine that
    /// cannot be started is off.
    pub(super) async fn finish_apply(
        self: &Arc<Self>,
        id: u32,
        until_usec: u64,
        journal: &Arc<DomainJournal>,
    ) -> Result<String> {
        let cancel = journal.cancelled();
        let done = async {
            if let Ok(guest) = self.guest() {
                if guest.id != id {
                    return Ok("it had been started".to_owned());
                }
                let left = Duration::from_micros(until_usec.saturating_sub(now_usec()));
                // It would power off when nobody waits for it any more, and stay off.
                let stays = left.is_zero() && self.ends_by_powering_off(id, false);
                if stays && lock(&self.state).state != DomainState::Shutdown {
                    return Ok("its guest had not powered off in time, and runs on".to_owned());
                }
                self.powers_off(&guest, left, cancel).await?;
            }
            // What is known of how a guest ended does not outlive the host's own end.
            if self.shared.store.ended(self.uuid).is_none() {
                return Ok("the host has been started anew since, and it stays off".to_owned());
            }
            if lock(&self.state).reason == StateReason::Destroyed {
                return Ok("its guest has been destroyed, and it stays off".to_owned());
            }
            self.starts_anew(&virtd_itself(), cancel).await?;
            Ok("its guest had powered off, and it has been started".to_owned())
        };
        let done: Result<String> = done.await;
        journal.end().await?;
        Ok(done.unwrap_or_else(|error| error.to_string()))
    }

    /// Whether the guest `id` was to power off for that, when virtd was last here.
    pub(super) fn is_being_applied(&self, id: u32) -> bool {
        matches!(self.open_intent(), Some(Intent { deed: Deed::Apply { id: guest, .. }, .. }) if guest == id)
    }

    /// Has the guest power off, and waits until it has ended. Error: it runs on.
    async fn powers_off(&self, guest: &Guest, patience: Duration, cancel: &CancellationToken) -> Result<()> {
        let cancelled = || Error::Cancelled(format!("starting domain '{}' anew was cancelled", self.name()));
        self.ends_by_powering_off(guest.id, true);
        let ended = async {
            let is_off = lock(&self.state).state == DomainState::Shutdown;
            let asked = if is_off { Ok(()) } else { guest.instance.shutdown(ShutdownMode::Default).await };
            match asked {
                Ok(()) | Err(DriverError::Gone) => self.until(|state| !state.runs(guest.id)).await,
                Err(e) => return Err(Error::from_driver(&self.name(), verb::SHUTDOWN.word, e)),
            }
            Ok(())
        };
        let done = tokio::select! {
            () = cancel.cancelled() => Err(cancelled()),
            ended = tokio::time::timeout(patience, ended) => match ended {
                Ok(ended) => ended,
                // It has powered off just now, and its hypervisor goes.
                Err(_) if !self.ends_by_powering_off(guest.id, false) => {
                    let gone = self.until(|state| !state.runs(guest.id));
                    let gone = async { tokio::time::timeout(GOING, gone).await.map_err(|_| self.stays_there()) };
                    tokio::select! {
                        () = cancel.cancelled() => Err(cancelled()),
                        gone = gone => gone,
                    }
                }
                Err(_) => Err(self.stays_on(patience)),
            },
        };
        self.ends_by_powering_off(guest.id, false);
        // Somebody may have ended it, and wants no other.
        if cancel.is_cancelled() { Err(cancelled()) } else { done }
    }

    /// Whether the guest `id` ends when it powers off, whatever its configuration says. Returns whether it stays until then: one
    /// that ends already is not changed by it.
    fn ends_by_powering_off(&self, id: u32, ends: bool) -> bool {
        let mut state = lock(&self.state);
        let Some(guest) = state.guest.as_mut().filter(|guest| guest.id == id) else { return false };
        guest.ends_by_powering_off = ends;
        guest.ending.is_none()
    }

    fn stays_there(&self) -> Error {
        let name = self.name();
        Error::TimedOut(format!(
            "the guest of domain '{name}' has powered off, and its hypervisor does not go: destroy it, and start it then"
        ))
    }

    fn stays_on(&self, patience: Duration) -> Error {
        let (name, seconds) = (self.name(), patience.as_secs_f32());
        Error::TimedOut(format!(
            "the guest of domain '{name}' has not powered off within {seconds} s: it runs on, and its changes stay pending; shut it \
             down from inside, or destroy it, and start it then"
        ))
    }

    /// Refuses what cannot be started in place of what runs, as far as that can be told while that runs.
    async fn can_run_instead(&self) -> Result<()> {
        let def = self.stored()?.ok_or_else(|| self.vanished())?;
        let able = match refusals(self.driver.check(&def).await) {
            Ok(()) => self.driver.has_files(&def, false).await,
            Err(findings) => Err(DriverError::Config(findings)),
        };
        able.map_err(|e| Error::from_driver(&self.name(), "start", e))?;
        let deed = format!("cannot start domain '{}' anew", self.name());
        let (written, this) = (images::written_by(&def), Some(self.uuid));
        self.shared.images.refuse_in_use(&deed, &written, images::Fate::Written, this, images::FROZEN).await
    }
}
