//! What is done to a guest that runs, and its end: shutdown, reboot, reset, destroy, suspend, resume.

use super::Domain;
use super::state::{Guest, State};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::verb::{self, Ask, Verb};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use virt_model::driver::{DriverError, ShutdownMode};
use virt_model::state::{DomainState, Stopped};

/// How long what is given up may take to end, as a rule.
const MOMENT: Duration = Duration::from_secs(5);

/// How long the end of a start that is cancelled is waited for. A process is killed in moments; longer takes only what waits
/// for a file system.
const UNDER_WAY: Duration = Duration::from_secs(30);

/// How long a report may take from the driver to what is published.
const TOLD: Duration = Duration::from_secs(20);

impl Domain {
    /// Asks the guest to power off. Returns when it has been asked; what it does about it is told by events.
    pub async fn shutdown(self: &Arc<Self>, caller: &Caller, mode: ShutdownMode) -> Result<()> {
        self.short(caller, &verb::SHUTDOWN, async {
            self.guest()?.instance.shutdown(mode).await.map_err(|e| self.failed(verb::SHUTDOWN.word, e))
        })
        .await
    }

    /// Asks the guest to reboot. Returns when it has been asked.
    pub async fn reboot(self: &Arc<Self>, caller: &Caller, mode: ShutdownMode) -> Result<()> {
        self.short(caller, &verb::REBOOT, async {
            self.guest()?.instance.reboot(mode).await.map_err(|e| self.failed(verb::REBOOT.word, e))
        })
        .await
    }

    /// Asks the guest's hypervisor for what needs no more than that (see [`verb::Verb::ask`]). Returns when it is done.
    pub async fn ask(self: &Arc<Self>, caller: &Caller, verb: &'static Verb, ask: Ask) -> Result<()> {
        self.short(caller, verb, async {
            let guest = self.guest()?;
            ask(&*guest.instance).await.map_err(|e| self.failed(verb.word, e))
        })
        .await
    }

    /// Resets the machine, as with its button. One that is stopped after power-off or panic runs again.
    pub async fn reset(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        self.short(caller, &verb::RESET, async {
            let guest = self.guest()?;
            let ended = matches!(lock(&self.state).state, DomainState::Shutdown | DomainState::Crashed);
            guest.instance.reset().await.map_err(|e| self.failed(verb::RESET.word, e))?;
            if ended {
                self.resume_guest(&guest).await?;
            }
            Ok(())
        })
        .await
    }

    /// Stops the CPUs. Returns when they are stopped.
    pub async fn suspend(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        self.short(caller, &verb::SUSPEND, async {
            let guest = self.guest()?;
            self.takes_back_save(false).await?;
            guest.instance.suspend().await.map_err(|e| self.failed(verb::SUSPEND.word, e))?;
            self.sees(&guest, verb::SUSPEND.word, |s| s.state != DomainState::Running).await
        })
        .await
    }

    /// Lets the CPUs go on. Returns when they run.
    pub async fn resume(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        self.short(caller, &verb::RESUME, async {
            self.knows_its_images()?;
            self.takes_back_save(true).await?;
            self.resume_guest(&self.guest()?).await
        })
        .await
    }

    async fn resume_guest(&self, guest: &Guest) -> Result<()> {
        guest.instance.resume().await.map_err(|e| self.failed(verb::RESUME.word, e))?;
        self.sees(guest, verb::RESUME.word, |s| s.state == DomainState::Running).await
    }

    /// Waits until what the hypervisor has done is told. Something else may have undone it at once: that is not waited for
    /// without end.
    async fn sees(&self, guest: &Guest, deed: &str, wanted: impl Fn(&State) -> bool) -> Result<()> {
        let told = async {
            self.all_told().await;
            self.until(|state| !state.runs(guest.id) || wanted(state)).await;
        };
        if tokio::time::timeout(TOLD, told).await.is_err() {
            let error = "its hypervisor says that it is done, and the guest is as before".to_owned();
            return Err(self.failed(deed, DriverError::TimedOut(error)));
        }
        if lock(&self.state).runs(guest.id) { Ok(()) } else { Err(self.failed(deed, DriverError::Gone)) }
    }

    /// Pulls the plug: returns when the guest's process has gone, and none is to come. It waits for nobody: a start under way
    /// is cancelled, also one that is part of something else; whoever has the turn is asked to give up; a hypervisor that
    /// hangs is killed (or, if `graceful`, left: `TimedOut`).
    pub async fn destroy(self: &Arc<Self>, caller: &Caller, graceful: bool) -> Result<()> {
        self.logged(caller, &verb::DESTROY, async {
            self.allow(caller, verb::DESTROY.action).await?;
            self.applies(&verb::DESTROY)?;
            if let Some(starting) = &lock(&self.state).starting {
                starting.cancel.cancel();
            }
            self.turn.ask_to_give_up();
            // What is under way ends in a moment; what waits for a file system is not waited for, once it can bring no guest.
            let ended = self.until(|state| state.guest.is_some() || state.starting.is_none());
            let _ = tokio::time::timeout(MOMENT, ended).await;
            let known = self.until(|state| state.guest.is_some() || !state.may_get_a_guest());
            if tokio::time::timeout(UNDER_WAY, known).await.is_err() {
                let domain = self.name();
                return Err(Error::TimedOut(format!(
                    "the start of domain '{domain}' is cancelled, and something on the host that it waits for does not answer; it                      ends as soon as that does, without a guest"
                )));
            }
            if lock(&self.state).live().is_some() {
                self.end(self.guest()?, graceful).await?;
            }
            self.brings_none_back().await;
            Ok(())
        })
        .await
    }

    /// What was cut off, and is finished before anything else is done, does not bring back a guest that has been destroyed. Whoever
    /// has the turn sees to that itself.
    async fn brings_none_back(self: &Arc<Self>) {
        let never = CancellationToken::new();
        if let Some(_turn) = self.turn.try_take(verb::DESTROY.word, &never) {
            return self.wants_no_guest().await;
        }
        let domain = self.clone();
        tokio::spawn(async move {
            if let Ok(_turn) = domain.turn.take(verb::DESTROY.word, &never).await {
                domain.wants_no_guest().await;
            }
        });
    }

    /// Ends a guest and waits until that is told, in these words.
    pub(super) async fn end_as(self: &Arc<Self>, guest: Guest, why: Stopped) -> Result<()> {
        self.expect_end(guest.id, why);
        self.end_as_expected(guest, false).await
    }

    /// Ends a guest and waits until that is told.
    pub(super) async fn end(self: &Arc<Self>, guest: Guest, graceful: bool) -> Result<()> {
        self.expect_destruction(guest.id);
        self.end_as_expected(guest, graceful).await
    }

    async fn end_as_expected(self: &Arc<Self>, guest: Guest, graceful: bool) -> Result<()> {
        match guest.instance.destroy(graceful).await {
            Ok(()) | Err(DriverError::Gone) => {
                self.until(|s| !s.runs(guest.id)).await;
                Ok(())
            }
            Err(e) => {
                self.expect_no_end(guest.id);
                Err(self.failed("destroy", e))
            }
        }
    }

    /// The guest goes on after all.
    pub(super) fn expect_no_end(&self, id: u32) {
        if let Some(guest) = lock(&self.state).guest.as_mut().filter(|g| g.id == id) {
            (guest.ending, guest.saved) = (None, false);
        }
    }

    fn failed(&self, deed: &str, e: DriverError) -> Error {
        Error::from_driver(&self.name(), deed, e)
    }
}
