//! A running guest: what its hypervisor reports, and what becomes of the domain by that. [`Domain::follow`] is the only
//! reader of those reports.

use super::Domain;
use super::reports::Reports;
use super::state::{Guest, State};
use crate::error::Result;
use crate::lock::lock;
use crate::log;
use crate::store::{Ended, StatusFile, on_disk};
use crate::time::now_usec;
use std::sync::Arc;
use tokio::sync::oneshot;
use virt_model::domain::LifecycleAction;
use virt_model::driver::{DriverEvent, Exit};
use virt_model::state::{
    Crashed, DomainState, Lifecycle, Resumed, ShutdownBy, Started, StateReason, Stopped, Suspended,
};

/// What a hypervisor has reported is told: now it can be told what a verb has done.
pub(super) struct AllTold<'a>(&'a Domain);

impl AllTold<'_> {
    /// The one way for a verb to change what is published, so that a record of what was done to a guest never comes before
    /// what that did to the guest. See [`Domain::commit_report`].
    pub(super) fn commit(self, change: impl FnOnce(&mut State) -> Vec<Lifecycle>) {
        self.0.commit_report(change);
    }
}

impl Domain {
    pub(super) fn guest(&self) -> Result<Guest> {
        lock(&self.state).running().cloned()
    }

    /// Returns when all that the hypervisor has reported until now is told.
    pub(super) async fn all_told(&self) -> AllTold<'_> {
        if let Ok(guest) = self.guest() {
            let (ask, told) = oneshot::channel();
            let asked = guest.asks.send(ask);
            // A question that comes in while `follow` ends is lost only with the last who could ask another.
            drop(guest);
            if asked.is_ok() {
                // No answer: the guest's end was among it.
                let _ = told.await;
            }
        }
        AllTold(self)
    }

    /// Follows what a guest's hypervisor reports, to its end.
    pub(super) async fn follow(self: Arc<Self>, id: u32, mut reports: Reports) {
        while let Some(report) = reports.next().await {
            tracing::debug!(uuid = %self.uuid, ?report, "reported");
            match report {
                DriverEvent::Suspended(why) => {
                    self.note(id, DomainState::Paused, pause_reason(why), Lifecycle::Suspended(why)).await;
                }
                DriverEvent::Resumed => {
                    let event = Lifecycle::Resumed(Resumed::Unpaused);
                    self.note(id, DomainState::Running, StateReason::Unpaused, event).await;
                }
                DriverEvent::SuspendedByOthers => {
                    let event = Lifecycle::Suspended(Suspended::Paused);
                    self.note(id, DomainState::Paused, StateReason::External, event).await;
                }
                DriverEvent::ResumedByOthers => {
                    let event = Lifecycle::Resumed(Resumed::Unpaused);
                    self.note(id, DomainState::Running, StateReason::External, event).await;
                }
                DriverEvent::PmSuspended(how) => {
                    let event = Lifecycle::PmSuspended(how);
                    self.note(id, DomainState::PmSuspended, StateReason::Unknown, event).await;
                }
                DriverEvent::Woken => {
                    let event = Lifecycle::Started(Started::Wakeup);
                    self.note(id, DomainState::Running, StateReason::Wakeup, event).await;
                }
                DriverEvent::PoweredOff { by, rebooting } => self.powered_off(id, by, rebooting).await,
                DriverEvent::Panicked => self.panicked(id).await,
                DriverEvent::PortsChanged => self.ports_changed(),
                DriverEvent::DeviceGone(alias) => drop(tokio::spawn(self.clone().device_has_gone(id, alias))),
                DriverEvent::VcpusChanged => drop(tokio::spawn(self.clone().vcpus_have_changed(id))),
                DriverEvent::TrayOpened(alias) => self.tray_opened(&alias),
                DriverEvent::Device(event) => self.device_reported(event).await,
                DriverEvent::Exited(exit) => return self.became_inactive(id, &exit).await,
            }
        }
    }

    /// The guest's state is another: kept, then told.
    pub(super) async fn note(&self, id: u32, new: DomainState, reason: StateReason, event: Lifecycle) {
        if matches!(event, Lifecycle::Suspended(_) | Lifecycle::Resumed(_)) && self.swallow(new) {
            return;
        }
        let since_usec = now_usec();
        self.keep_status(id, new, reason, since_usec).await;
        self.commit_report(|state| {
            state.state = new;
            state.reason = reason;
            state.since_usec = since_usec;
            vec![event]
        });
        log::guest(self.uuid, &self.name(), event);
    }

    /// Whether this is part of loading a snapshot, of which only the outcome is told.
    pub(super) fn swallow(&self, new: DomainState) -> bool {
        lock(&self.state).muted.as_mut().map(|seen| *seen = new).is_some()
    }

    pub(super) async fn keep_status(&self, id: u32, new: DomainState, reason: StateReason, since_usec: u64) {
        let Some(status) = self.guest().ok().filter(|g| g.id == id).map(|g| g.status) else { return };
        let kept = on_disk(move || {
            status.update(|s| {
                s.state = new;
                s.reason = reason;
                s.since_usec = since_usec;
            })
        });
        if let Err(e) = kept.await {
            tracing::warn!(uuid = %self.uuid, "{e}; after a restart of virtd the reason of its state will be an older one");
        }
    }

    pub(super) async fn powered_off(self: &Arc<Self>, id: u32, by: ShutdownBy, rebooting: bool) {
        self.note(id, DomainState::Shutdown, StateReason::User, Lifecycle::Shutdown(by)).await;
        let Ok(guest) = self.guest() else { return };
        let action = match rebooting {
            true => guest.live.on_reboot,
            false if guest.ends_by_powering_off => LifecycleAction::Destroy,
            false => guest.live.on_poweroff,
        };
        self.act_on_end(guest, action, Stopped::Shutdown);
    }

    pub(super) async fn panicked(self: &Arc<Self>, id: u32) {
        self.note(id, DomainState::Crashed, StateReason::Panicked, Lifecycle::Crashed(Crashed::Panicked)).await;
        let Ok(guest) = self.guest() else { return };
        let action = guest.live.on_crash;
        self.act_on_end(guest, action, Stopped::Crashed);
    }

    /// Does what the configuration says is to follow the guest's end. In a task: `follow` must go on reading.
    pub(super) fn act_on_end(self: &Arc<Self>, guest: Guest, action: LifecycleAction, as_what: Stopped) {
        let restart = matches!(action, LifecycleAction::Restart | LifecycleAction::CoredumpRestart);
        if action == LifecycleAction::Preserve {
            return;
        }
        if !restart {
            self.expect_end(guest.id, as_what);
        }
        let domain = self.clone();
        tokio::spawn(async move {
            let done = if restart {
                match guest.instance.reset().await {
                    Ok(()) => guest.instance.resume().await,
                    failed => failed,
                }
            } else {
                guest.instance.destroy(false).await
            };
            if let Err(e) = done {
                tracing::error!(uuid = %domain.uuid, name = domain.name(), "could not {action:?} the ended guest: {e}");
            }
        });
    }

    /// Remembers why the guest will end; the first reason stays.
    pub(super) fn expect_end(&self, id: u32, why: Stopped) {
        if let Some(guest) = lock(&self.state).guest.as_mut().filter(|g| g.id == id) {
            guest.ending.get_or_insert(why);
        }
    }

    /// The same where somebody ends it: one whose save is not complete does not end as saved.
    pub(super) fn expect_destruction(&self, id: u32) {
        if let Some(guest) = lock(&self.state).guest.as_mut().filter(|g| g.id == id) {
            let unsaved = guest.ending == Some(Stopped::Saved) && !guest.saved;
            guest.ending = guest.ending.filter(|_| !unsaved).or(Some(Stopped::Destroyed));
        }
    }

    /// From here on its save comes to its end, whoever ends it.
    pub(super) fn is_past_saving(&self, id: u32) {
        if let Some(guest) = lock(&self.state).guest.as_mut().filter(|g| g.id == id) {
            guest.saved = true;
        }
    }

    /// The one place where a guest ends, however it came to that.
    pub(super) async fn became_inactive(self: &Arc<Self>, id: u32, exit: &Exit) {
        let Some(guest) = self.guest().ok().filter(|g| g.id == id) else { return };
        let (stopped, reason) = verdict(guest.ending, exit);
        let since_usec = now_usec();
        self.forget_transient(&guest.live).await;
        self.forget_guest(Some(guest.status), reason, since_usec).await;
        self.commit_report(|state| {
            state.has_ended(reason, since_usec);
            vec![Lifecycle::Stopped(stopped)]
        });
        self.looks_at_checkpoints();
        let name = self.name();
        log::guest(self.uuid, &name, Lifecycle::Stopped(stopped));
        if let Exit::Died(words) = exit {
            let words = guest.live.black_out(&words.lines().collect::<Vec<_>>().join("; "));
            tracing::error!(uuid = %self.uuid, name, "domain {name:?}: the hypervisor died: {words}");
        }
    }

    /// Keeps how a guest ended, and removes what is on disk of it: in this order, so that a virtd killed in between does
    /// not take the end of an earlier guest for that of this one.
    pub(super) async fn forget_guest(&self, status: Option<Arc<StatusFile>>, reason: StateReason, since_usec: u64) {
        if self.hosted.is_some() {
            return;
        }
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        let stays = {
            let state = lock(&self.state);
            state.stored.is_some() || state.being_stored
        };
        let forgotten = on_disk(move || {
            if let Some(status) = status {
                status.close();
            }
            let kept = shared.store.save_ended(uuid, stays.then_some(Ended { reason, since_usec }));
            shared.store.forget_guest(uuid);
            kept
        });
        if let Err(e) = forgotten.await {
            tracing::warn!(%uuid, "{e}");
        }
    }
}

pub(super) fn pause_reason(why: Suspended) -> StateReason {
    match why {
        Suspended::Paused => StateReason::User,
        Suspended::Migrated => StateReason::Migrated,
        Suspended::IoError => StateReason::IoError,
        Suspended::Watchdog => StateReason::Watchdog,
        Suspended::Restored => StateReason::Restored,
        Suspended::FromSnapshot => StateReason::FromSnapshot,
        Suspended::ApiError => StateReason::ApiError,
    }
}

/// What became of a guest, from what was expected and what was seen.
fn verdict(ending: Option<Stopped>, exit: &Exit) -> (Stopped, StateReason) {
    match (ending, exit) {
        (Some(Stopped::Destroyed), _) | (None, Exit::Requested | Exit::Forced) => {
            (Stopped::Destroyed, StateReason::Destroyed)
        }
        (Some(Stopped::Crashed), _) => (Stopped::Crashed, StateReason::Crashed),
        (Some(Stopped::Saved), _) => (Stopped::Saved, StateReason::Saved),
        (Some(Stopped::FromSnapshot), _) => (Stopped::FromSnapshot, StateReason::FromSnapshot),
        (Some(_), _) | (None, Exit::Orderly) => (Stopped::Shutdown, StateReason::Shutdown),
        (None, Exit::Died(_)) => (Stopped::Failed, StateReason::Crashed),
    }
}
