//! A guest that outlived the last virtd: sought when virtd starts, then found, or known to have gone. Until then its last
//! known state is what is published, and whoever wants to change it is told to wait.

use super::Domain;
use super::guest::pause_reason;
use super::leaving::leaving_of;
use super::reports::Reports;
use super::state::{Guest, Sought};
use crate::error::Error;
use crate::fair::FairPlaces;
use crate::lock::lock;
use crate::store::{Ended, Status, StatusFile};
use crate::time::now_usec;
use crate::turn::TurnGuard;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use virt_model::domain::{DomainDef, LifecycleAction};
use virt_model::driver::{Condition, Driver, EventStream, Instance};
use virt_model::state::{Crashed, DomainState, Lifecycle, Resumed, ShutdownBy, Started, StateReason, Stopped};

/// A guest that outlived the last virtd.
pub(crate) struct FoundGuest {
    pub instance: Arc<dyn Instance>,
    pub live: Arc<DomainDef>,
    /// What it does now.
    pub condition: Condition,
    /// It is not kept yet that it goes on from its managed save.
    pub unmarked: bool,
    /// What was last kept of it.
    pub status: Status,
    pub file: Arc<StatusFile>,
}

impl Domain {
    /// The turn for what virtd does when it starts; `None` if somebody has it already.
    pub(crate) fn turn_to_recover(&self, cancel: &CancellationToken) -> Option<TurnGuard> {
        self.turn.try_take("recovery, since virtd has started", cancel)
    }

    /// Whether it has a backup, or work on its disks, that was under way.
    pub(crate) fn has_work_on_disks(&self) -> bool {
        let state = lock(&self.state);
        state.backup.is_some() || !state.block_jobs.is_empty()
    }

    /// Whether nothing is left of it.
    pub(crate) fn has_gone(&self) -> bool {
        lock(&self.state).gone
    }

    /// Whose it is.
    pub(crate) fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Waits until nobody has its turn any more: first of all virtd itself, since it has started.
    pub(crate) async fn is_looked_after(&self) {
        self.turn.is_free().await;
    }

    /// A guest of it ran when virtd was last here, and did that; it is looked for. `unread`: why `live` only stands for what it
    /// runs with. To be called before anybody knows the domain.
    pub(crate) fn is_sought(&self, status: &Status, live: Arc<DomainDef>, unread: Option<String>) {
        let mut state = lock(&self.state);
        state.unread = unread;
        state.sought = Some(Sought { id: status.id, live, why: None });
        state.state = status.state;
        state.reason = status.reason;
        state.since_usec = status.since_usec;
        state.compare_configs();
    }

    /// The same where nothing is known of the guest, nor can it be looked for.
    pub(crate) fn may_run(&self, why: &Error) {
        let Ok(Some(live)) = self.stored() else { return };
        let mut state = lock(&self.state);
        state.sought = Some(Sought { id: 0, live, why: Some(why.to_string()) });
    }

    /// Whether its guest runs cannot be told: it is never to be started beside that.
    pub(crate) fn cannot_be_found(&self, why: &Error) {
        self.commit_report(|state| {
            state.sought.iter_mut().for_each(|sought| sought.why = Some(why.to_string()));
            state.reason = StateReason::Unknown;
            Vec::new()
        });
    }

    /// Its guest ended while virtd was away; or, if nothing was `noted` of one, before that. A domain of which nothing is left
    /// goes with it.
    pub(crate) async fn ended_unseen(self: &Arc<Self>, noted: bool) {
        let now =
            Ended { reason: if noted { StateReason::Daemon } else { StateReason::Unknown }, since_usec: now_usec() };
        let before = self.shared.store.ended(self.uuid).filter(|_| !noted);
        let Ended { reason, since_usec } = before.unwrap_or(now);
        let live = lock(&self.state).live().cloned();
        if let Some(live) = live {
            self.forget_transient(&live).await;
        }
        self.forget_guest(None, reason, since_usec).await;
        self.commit_report(|state| {
            state.has_ended(reason, since_usec);
            // Whoever was told that it runs is told of its end.
            if state.told { vec![Lifecycle::Stopped(Stopped::Failed)] } else { Vec::new() }
        });
        self.looks_at_checkpoints();
    }

    /// Makes a guest that was found running this domain's.
    pub(crate) async fn adopt(self: &Arc<Self>, found: FoundGuest, reports: EventStream) {
        let FoundGuest { instance, live, condition, unmarked, status, file } = found;
        let marked = file.marked();
        let (asks, asked) = mpsc::unbounded_channel();
        let guest = Guest {
            id: status.id,
            instance,
            live,
            document: Arc::default(),
            sampler: Arc::default(),
            looks: Arc::default(),
            agent_readers: FairPlaces::new(1, 1),
            status: file,
            ending: None,
            ends_by_powering_off: self.is_being_applied(status.id),
            saved: false,
            leaving: leaving_of(&status.leaving),
            ejected: BTreeSet::new(),
            looked_after: BTreeSet::new(),
            asks,
        };
        let (now, reason) = found_as(condition, status.state, status.reason);
        let since_usec = if now == status.state { status.since_usec } else { now_usec() };
        // What it is to go on from is there still, and is kept: until that is marked.
        let unmarked = unmarked && !*marked.borrow() && lock(&self.state).managed_save;
        if !unmarked && !lock(&self.state).snapshots.saves_for_next_start() {
            self.managed_save_is_used().await;
        }
        self.commit_report(|state| {
            state.managed_save = unmarked;
            // Whoever was told its last known state is told what has become of it.
            let news = state.told.then(|| became(condition, state.state)).flatten();
            state.guest = Some(guest.clone());
            state.sought = None;
            state.state = now;
            state.reason = reason;
            state.since_usec = since_usec;
            state.compare_configs();
            news.into_iter().collect()
        });
        self.keep_status(guest.id, now, reason, since_usec).await;
        self.thaws_as_found(&guest);
        match status.autodestroy.as_deref() {
            None => {}
            Some("") => self.end_when_gone(guest.id, departed()),
            Some(bus_name) => self.end_when_gone(guest.id, self.shared.callers.watch(bus_name)),
        }
        match condition {
            Condition::PoweredOff => {
                let ends = guest.ends_by_powering_off;
                let action = if ends { LifecycleAction::Destroy } else { guest.live.on_poweroff };
                self.act_on_end(guest.clone(), action, Stopped::Shutdown);
            }
            Condition::Panicked => self.act_on_end(guest.clone(), guest.live.on_crash, Stopped::Crashed),
            _ => {}
        }
        if unmarked {
            tokio::spawn(self.clone().is_marked_later(guest.id, marked));
        }
        tokio::spawn(self.clone().follow(guest.id, Reports::new(reports, asked)));
        self.looks_at_checkpoints();
        Box::pin(self.adjusted_as_found(&guest)).await;
        Box::pin(self.leaves_as_found(&guest)).await;
    }

    /// The guest `id` stands, and goes on from its managed save once that is marked: then that is forgotten. Where it ends before, its
    /// managed save stays.
    async fn is_marked_later(self: Arc<Self>, id: u32, mut marked: watch::Receiver<bool>) {
        tokio::select! {
            _ = marked.wait_for(|marked| *marked) => {}
            () = self.until(|state| !state.runs(id)) => {}
        }
        if *marked.borrow() {
            self.managed_save_is_used().await;
            self.all_told().await.commit(|state| {
                state.managed_save = false;
                Vec::new()
            });
        }
    }
}

/// The token of a caller who has gone.
pub(super) fn departed() -> CancellationToken {
    let token = CancellationToken::new();
    token.cancel();
    token
}

/// What must have happened to a guest that was last known in that state; nothing if it is still in it.
pub(super) fn became(condition: Condition, before: DomainState) -> Option<Lifecycle> {
    let (now, event) = match condition {
        Condition::Running if before == DomainState::PmSuspended => {
            (DomainState::Running, Lifecycle::Started(Started::Wakeup))
        }
        Condition::Running => (DomainState::Running, Lifecycle::Resumed(Resumed::Unpaused)),
        Condition::Suspended(why) => (DomainState::Paused, Lifecycle::Suspended(why)),
        Condition::PoweredOff => (DomainState::Shutdown, Lifecycle::Shutdown(ShutdownBy::Finished)),
        Condition::Panicked => (DomainState::Crashed, Lifecycle::Crashed(Crashed::Panicked)),
        Condition::PmSuspended(how) => (DomainState::PmSuspended, Lifecycle::PmSuspended(how)),
    };
    (now != before).then_some(event)
}

/// State and reason of a guest that was found; the recorded reason holds if the state is still the recorded one.
fn found_as(condition: Condition, recorded: DomainState, reason: StateReason) -> (DomainState, StateReason) {
    let (now, why) = match condition {
        Condition::Running => (DomainState::Running, StateReason::Unknown),
        Condition::Suspended(why) => (DomainState::Paused, pause_reason(why)),
        Condition::PoweredOff => (DomainState::Shutdown, StateReason::User),
        Condition::Panicked => (DomainState::Crashed, StateReason::Panicked),
        Condition::PmSuspended(_) => (DomainState::PmSuspended, StateReason::Unknown),
    };
    if now == recorded { (now, reason) } else { (now, why) }
}
