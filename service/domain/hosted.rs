//! A machine that another host keeps (`crate::hosts`): what is otherwise with it. Its configuration and its state are the host's,
//! and what is here is what was last seen of them; nothing of it is stored but for the time in which its host does not answer.

use super::found::became;
use super::lifecycle::StartOptions;
use super::reports::Reports;
use super::state::{Guest, Sought, State};
use super::{Domain, DomainSeed, Domains};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::fair::FairPlaces;
use crate::hosts::OtherHost;
use crate::job::Ticket;
use crate::lock::lock;
use crate::shared::Shared;
use crate::store::{Ended, HostedChange, HostedNote, Loaded, Note, StatusFile};
use crate::stored::StoredDef;
use crate::time::now_usec;
use crate::verb::{self, Hosted, Verb};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use tokio::sync::mpsc;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::inventory::{Adopted, Key};
use virt_model::driver::{Condition, DriverError, EventStream};
use virt_model::state::{Defined, DomainState, Lifecycle, Started, StateReason, Stopped, Suspended, Undefined};

/// Where a machine of another host is.
pub(crate) struct AtHost {
    pub host: Arc<OtherHost>,
    /// By what the host knows it.
    pub key: Key,
    /// What was last given to be kept of it.
    kept: Mutex<Option<(Arc<StoredDef>, HostedNote)>>,
}

impl AtHost {
    /// On that host, by that key.
    pub fn new(host: Arc<OtherHost>, key: Key) -> AtHost {
        AtHost { host, key, kept: Mutex::default() }
    }
}

/// A machine of another host that is to be a domain here.
pub(crate) struct HostedSeed {
    pub at: AtHost,
    pub uuid: Uuid,
    /// Its name here.
    pub name: String,
    /// Its name there.
    pub host_name: String,
    pub stored: Arc<StoredDef>,
    /// What it last did, where that is only known from before: with what it ran.
    pub last: Option<(HostedNote, Arc<DomainDef>)>,
}

impl Domain {
    /// A domain of a machine of another host; its name and uuid are claimed.
    pub(crate) fn of_host(shared: &Arc<Shared>, domains: &Arc<Domains>, seed: HostedSeed) -> Arc<Domain> {
        let HostedSeed { at, uuid, name, host_name, stored, last } = seed;
        let mut ended = Ended { reason: StateReason::Unknown, since_usec: now_usec() };
        if let Some((note, _)) = &last {
            ended = Ended { reason: note.reason, since_usec: note.since_usec };
        }
        let driver = at.host.driver().clone();
        let config = stored.config.clone();
        let (stored, hosted) = (Some(stored), Some(at));
        let (broken, managed_save, snapshots, note) = (None, false, Loaded::default(), Note::default());
        let birth =
            DomainSeed { uuid, name, config, stored, broken, driver, note, ended, managed_save, snapshots, hosted };
        let domain = Domain::new(shared, domains, birth);
        {
            let mut state = lock(&domain.state);
            state.host_name = host_name;
            if let Some((note, live)) = last.filter(|(note, _)| note.state.is_active()) {
                state.sought = Some(Sought { id: shared.next_id(), live, why: None });
                state.state = note.state;
            }
        }
        domain
    }

    /// Refuses what its host has no way to do, or cannot be asked now.
    pub(super) fn host_can(&self, verb: &Verb) -> Result<()> {
        let Some(AtHost { host, .. }) = &self.hosted else { return Ok(()) };
        let has = match verb.hosted() {
            Hosted::Always => return Ok(()),
            Hosted::If(ability) => host.abilities().contains(&ability),
            Hosted::Destroy => !host.is_read_only(),
            Hosted::Never => false,
        };
        if !has {
            let (name, host) = (self.name(), host.name());
            let text =
                format!("cannot {} domain '{name}': its host '{host}' has no way to do so, or none for us", verb.word);
            return Err(Error::OperationUnsupported(text));
        }
        host.reachable().map_err(|e| Error::from_driver(&self.name(), verb.word, e))
    }

    /// Refuses a document for a machine whose configuration is another host's.
    pub(crate) fn takes_documents(&self) -> Result<()> {
        let Some(AtHost { host, .. }) = &self.hosted else { return Ok(()) };
        let (name, host) = (self.name(), host.name());
        Err(Error::OperationUnsupported(format!(
            "domain '{name}' is kept by host '{host}', which takes no configuration from us; change it there"
        )))
    }

    /// Has its host start it. See [`Domain::start`].
    pub(super) async fn start_at_host(self: &Arc<Self>, caller: &Caller, options: StartOptions) -> Result<Ticket> {
        refuse_options(options)?;
        let change = self.change(caller, &verb::START);
        if change.has_turn() {
            self.applies(&verb::START)?;
        }
        let job = change.open(options.cancel_on_disconnect)?;
        Ok(job.run(async move |domain, job| {
            domain.applies(&verb::START)?;
            let _starts = domain.will_start(job.cancel_token());
            // What a host has been asked for is not taken back.
            job.past_return();
            domain.is_launched(true, job.cancel_token())?;
            let Some(AtHost { host, key, .. }) = &domain.hosted else { return Err(domain.vanished()) };
            let (events, reports) = virt_model::driver::reports();
            let started = host.inventory()?.start(key, events).await;
            let adopted = started.map_err(|e| Error::from_driver(&domain.name(), verb::START.word, e))?;
            // Whoever wants no guest was told that none comes of this.
            let Err(cancelled) = domain.is_still_wanted(job.cancel_token()) else {
                return domain.runs_at_host(adopted, reports, StateReason::Booted);
            };
            match adopted.instance.destroy(false).await {
                Ok(()) | Err(DriverError::Gone) => Err(cancelled),
                Err(e) => {
                    domain.runs_at_host(adopted, reports, StateReason::Booted)?;
                    Err(Error::from_driver(&domain.name(), verb::DESTROY.word, e))
                }
            }
        }))
    }

    /// Has its host give it another name, which is a domain's. Returns when that is told; if another domain was given that name here
    /// meanwhile, it is called as any second machine of a name is. Error: `DomainExists` if one has it before; as the host says.
    pub(super) async fn rename_at_host(&self, AtHost { host, key, .. }: &AtHost, name: &str) -> Result<()> {
        if lock(&self.state).host_name == name {
            let (here, host) = (self.name(), host.name());
            return Err(Error::OperationInvalid(format!(
                "host '{host}' calls it '{name}' already, and it is '{here}' here because another domain had that name when it was \
                 first seen; give it a third name first, and then '{name}'"
            )));
        }
        self.domains.name_is_free(name)?;
        let renamed = host.inventory()?.rename(key, name).await;
        renamed.map_err(|e| Error::from_driver(&self.name(), verb::RENAME.word, e))?;
        host.reports_are_told().await;
        if lock(&self.state).host_name == name {
            return Ok(());
        }
        let (here, host) = (self.name(), host.name());
        Err(Error::HypervisorFailed {
            what: format!("rename domain '{here}'"),
            why: format!(
                "host '{host}' was asked to call it '{name}', and it is not seen to: the host's Problems may say why, and what it is \
                 called is told when it is seen"
            ),
        })
    }

    /// A guest of it runs: it has been started, or was found. `reason`: why it does.
    pub(crate) fn runs_at_host(
        self: &Arc<Self>,
        adopted: Adopted,
        reports: EventStream,
        reason: StateReason,
    ) -> Result<()> {
        let Adopted { instance, condition, live } = adopted;
        let (asks, asked) = mpsc::unbounded_channel();
        let sought = lock(&self.state).sought.as_ref().map(|sought| sought.id);
        let id = sought.unwrap_or_else(|| self.shared.next_id());
        let mut guest = Guest {
            id,
            instance,
            live: self.live_as_here(live, id),
            document: Arc::default(),
            sampler: Arc::default(),
            looks: Arc::default(),
            agent_readers: FairPlaces::new(1, 1),
            status: StatusFile::of_nobody(),
            ending: None,
            ends_by_powering_off: false,
            saved: false,
            leaving: BTreeMap::new(),
            ejected: BTreeSet::new(),
            looked_after: BTreeSet::new(),
            asks,
        };
        let mut refused = false;
        self.commit_report(|state| {
            if state.guest.is_some() {
                refused = true;
                return Vec::new();
            }
            if reason == StateReason::External {
                // Its host has just told it.
                state.unreachable_since = None;
            }
            let news = state.finds_at_host(condition, reason);
            Arc::make_mut(&mut guest.live).name.clone_from(&state.name);
            state.guest = Some(guest);
            (state.sought, state.starting) = (None, None);
            state.compare_configs();
            news
        });
        if refused {
            return Err(Error::OperationInvalid(format!("domain '{}' runs already", self.name())));
        }
        tokio::spawn(self.clone().follow(id, Reports::new(reports, asked)));
        Ok(())
    }

    /// A configuration of the host's with what it is known by here.
    fn live_as_here(&self, mut live: Arc<DomainDef>, id: u32) -> Arc<DomainDef> {
        let def = Arc::make_mut(&mut live);
        (def.uuid, def.id) = (self.uuid, Some(id));
        live
    }

    /// Its host says that it has this configuration; `name`: what it is called here from now on, which is claimed, and there.
    pub(crate) async fn is_at_host(
        self: &Arc<Self>,
        (name, host_name): (&str, &str),
        def: Arc<DomainDef>,
        stored: Arc<StoredDef>,
    ) {
        let told = self.all_told().await;
        let (before, same) = {
            let state = lock(&self.state);
            (state.name.clone(), state.stored.as_ref().is_some_and(|known| known.text() == stored.text()))
        };
        let renamed = before != name;
        if renamed {
            self.shared.events.send(Event::Domain(self.facts(), vec![Lifecycle::Undefined(Undefined::Renamed)]));
        }
        if !renamed && same {
            host_name.clone_into(&mut lock(&self.state).host_name);
            return;
        }
        told.commit(|state| {
            name.clone_into(&mut state.name);
            host_name.clone_into(&mut state.host_name);
            if let Some(guest) = &mut state.guest {
                guest.live = self.live_as_here(def, guest.id);
                guest.document = Arc::default();
            }
            state.has_stored(stored, Lifecycle::Defined(if renamed { Defined::Renamed } else { Defined::Updated }))
        });
        if renamed {
            self.domains.drop_name(&before);
        }
    }

    /// Its host has it no more.
    pub(crate) async fn has_left_host(self: &Arc<Self>) {
        self.all_told().await.commit(|state| {
            let ended = state.sought.take().or_else(|| state.guest.take().map(|guest| Sought::at_host(&guest)));
            state.has_ended(StateReason::Shutdown, now_usec());
            (state.stored, state.unreachable_since) = (None, None);
            state.leave_if_nothing_left();
            let ended = ended.map(|_| Lifecycle::Stopped(Stopped::Shutdown));
            ended.into_iter().chain([Lifecycle::Undefined(Undefined::Removed)]).collect()
        });
    }

    /// Its host answers, and has told all that runs: a guest that was known from before, and is not among it, has ended.
    pub(crate) fn all_of_host_told(&self) {
        self.commit_report(|state| {
            state.unreachable_since = None;
            if state.sought.is_none() {
                return Vec::new();
            }
            state.has_ended(StateReason::Shutdown, now_usec());
            vec![Lifecycle::Stopped(Stopped::Shutdown)]
        });
    }

    /// Its host does not answer, since then. What it is and does stays as it was last seen.
    pub(crate) fn is_unreachable(&self, since_usec: u64) {
        self.commit_report(|state| {
            state.unreachable_since = Some(since_usec);
            Vec::new()
        });
    }

    /// Returns when all that its host has reported of its guest is told.
    pub(crate) async fn guest_is_told(&self) {
        self.all_told().await;
    }

    /// Has what is known of it kept for the time in which its host does not answer.
    pub(super) fn keep_for_host(&self, state: &State) {
        let Some(AtHost { host, key, kept }) = &self.hosted else { return };
        host.keep(match &state.stored {
            Some(stored) if !state.gone => {
                let (key, name) = (key.to_string(), state.host_name.clone());
                let (now, reason, since_usec) = (state.state, state.reason, state.since_usec);
                let note = HostedNote { key, name, state: now, reason, since_usec };
                let mut kept = lock(kept);
                // That its host answers, or does not, is not kept.
                if kept.as_ref().is_some_and(|(known, was)| Arc::ptr_eq(known, stored) && *was == note) {
                    return;
                }
                *kept = Some((stored.clone(), note.clone()));
                HostedChange::Is(self.uuid, stored.text(), note)
            }
            _ => HostedChange::Gone(self.uuid),
        });
    }
}

impl Sought {
    fn at_host(guest: &Guest) -> Sought {
        Sought { id: guest.id, live: guest.live.clone(), why: None }
    }
}

impl State {
    /// A guest is there that nobody had here: what that means to who was told what there was before.
    fn finds_at_host(&mut self, condition: Condition, reason: StateReason) -> Vec<Lifecycle> {
        let paused = matches!(condition, Condition::Suspended(_));
        let now = if paused { DomainState::Paused } else { DomainState::Running };
        let known = self.sought.is_some();
        let news = match known {
            true => became(condition, self.state).into_iter().collect(),
            false => {
                let started = Lifecycle::Started(Started::Booted);
                let stands = paused.then_some(Lifecycle::Suspended(Suspended::Paused));
                [started].into_iter().chain(stands).collect::<Vec<_>>()
            }
        };
        if !news.is_empty() || !known {
            (self.state, self.reason, self.since_usec) = (now, reason, now_usec());
        }
        news
    }
}

/// Refuses ways to start that are not the host's.
fn refuse_options(options: StartOptions) -> Result<()> {
    let StartOptions { paused, reset_nvram, autodestroy, start_dependencies, force_boot: _, cancel_on_disconnect: _ } =
        options;
    let all = [
        (paused, "paused"),
        (reset_nvram, "reset-nvram"),
        (autodestroy, "autodestroy"),
        (start_dependencies, "start-dependencies"),
    ];
    match all.iter().find(|(given, _)| *given) {
        None => Ok(()),
        Some((_, key)) => Err(Error::OperationUnsupported(format!(
            "the host that keeps this machine has no way to start it with the option '{key}'; leave it out"
        ))),
    }
}
