//! What is stored is made what runs: the guest is asked to power off, and is then started anew.
//!
//! A guest that does not power off in time runs on, and nothing has changed. What its stored configuration needs of the host is
//! looked at before it is asked. Whoever destroys it meanwhile, or cancels the job, gets no new guest.

use super::Domain;
use super::lifecycle::{Origin, StartOptions};
use super::state::Guest;
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::images;
use crate::job::{Job, Ticket};
use crate::lock::lock;
use crate::verb;
use std::sync::Arc;
use std::time::Duration;
use virt_model::driver::{DriverError, ShutdownMode};
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
        self.powers_off(&guest, patience, job).await?;
        let def = self.def_to_start(None)?;
        let checked = self.driver.can_start(&def).await;
        let accepted = checked.map_err(|e| Error::from_driver(&self.name(), "start", e))?;
        self.start_guest(def, caller, StartOptions::default(), Origin::PowerOff(accepted), cancel).await
    }

    /// Has the guest power off, and waits until it has ended. Error: it runs on.
    async fn powers_off(&self, guest: &Guest, patience: Duration, job: &Job) -> Result<()> {
        let cancelled = || Error::Cancelled(format!("starting domain '{}' anew was cancelled", self.name()));
        self.ends_by_powering_off(guest.id, true);
        let ended = async {
            let asked = guest.instance.shutdown(ShutdownMode::Default).await;
            match asked {
                Ok(()) | Err(DriverError::Gone) => self.until(|state| !state.runs(guest.id)).await,
                Err(e) => return Err(Error::from_driver(&self.name(), verb::SHUTDOWN.word, e)),
            }
            Ok(())
        };
        let done = tokio::select! {
            () = job.cancel_token().cancelled() => Err(cancelled()),
            ended = tokio::time::timeout(patience, ended) => match ended {
                Ok(ended) => ended,
                // It has powered off just now, and its hypervisor goes.
                Err(_) if !self.ends_by_powering_off(guest.id, false) => {
                    let gone = self.until(|state| !state.runs(guest.id));
                    let gone = async { tokio::time::timeout(GOING, gone).await.map_err(|_| self.stays_there()) };
                    tokio::select! {
                        () = job.cancel_token().cancelled() => Err(cancelled()),
                        gone = gone => gone,
                    }
                }
                Err(_) => Err(self.stays_on(patience)),
            },
        };
        self.ends_by_powering_off(guest.id, false);
        // Somebody may have ended it, and wants no other.
        if job.cancel_token().is_cancelled() { Err(cancelled()) } else { done }
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
