//! The start of a guest.

use super::Domain;
use super::reports::Reports;
use super::state::{Guest, Starting, State};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::fair::FairPlaces;
use crate::images;
use crate::job::Ticket;
use crate::lock::lock;
use crate::store::{Status, StatusFile, on_disk};
use crate::time::now_usec;
use crate::uses::{Need, needs_of};
use crate::verb;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::saved::SavedState;
use virt_model::driver::snapshots::StartFrom;
use virt_model::driver::{Accepted, DriverError, Launch, Running};
use virt_model::state::{DomainState, Lifecycle, Resumed, Started, StateReason, Suspended};

/// How a domain is started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StartOptions {
    /// Leave the CPUs standing.
    pub paused: bool,
    /// Boot even if there is a managed save, which is dropped.
    pub force_boot: bool,
    /// Make the firmware variables anew.
    pub reset_nvram: bool,
    /// End the guest when the caller leaves the bus.
    pub autodestroy: bool,
    /// Cancel the start when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
    /// Start what it needs and is stored first.
    pub start_dependencies: bool,
}

impl Domain {
    /// Starts an inactive domain. Returns when the start is accepted; the ticket answers when its CPUs run (or stand
    /// ready, if `paused`). If it fails, the domain is inactive as before.
    pub async fn start(self: &Arc<Self>, caller: &Caller, options: StartOptions) -> Result<Ticket> {
        self.accepted(caller, &verb::START, async {
            self.allow(caller, verb::START.action).await?;
            match self.hosted {
                Some(_) => self.start_at_host(caller, options).await,
                None => self.launch(caller, None, options).await,
            }
        })
        .await
    }

    /// Starts `def`, or the stored configuration. What can be checked before is checked before it is accepted.
    pub(crate) async fn launch(
        self: &Arc<Self>,
        caller: &Caller,
        def: Option<Arc<DomainDef>>,
        options: StartOptions,
    ) -> Result<Ticket> {
        let creation = def.as_ref().map(|_| Creation::begin(self)).transpose()?;
        if options.start_dependencies {
            let needs = self.def_to_start(def.as_ref())?;
            self.shared.plugs.start_for(caller, &needs).await?;
            self.shared.volumes.start_for(caller, &needs).await?;
        }
        let change = self.change(caller, &verb::START);
        let accepted = match change.has_turn() {
            false => None,
            true => {
                self.applies(&verb::START)?;
                let mut boots = self.def_to_start(def.as_ref())?;
                match self.goes_on_from(def.is_some(), options)? {
                    Some(file) => self.can_go_on_from(caller, &file).await.map(|()| None)?,
                    None => {
                        self.shared.settle_for(&boots).await;
                        self.shared.plug(&mut boots)?;
                        Some(self.can_run(&boots).await?)
                    }
                }
            }
        };
        let job = change.open(options.cancel_on_disconnect)?;
        let starts = job.has_turn().then(|| self.will_start(job.cancel_token()));
        self.announce_transient();
        let caller = caller.clone();
        Ok(job.run(async move |domain, job| {
            let _creation = creation;
            let cancel = job.cancel_token();
            let _starts = starts.unwrap_or_else(|| domain.will_start(cancel));
            // Recovery may have brought another configuration, or saved it: that is what is started.
            let boots = domain.def_to_start(def.as_ref())?;
            if let Some(file) = domain.goes_on_from(def.is_some(), options)? {
                return domain.start_managed(&caller, &file, options, &job).await;
            }
            let mut def = boots;
            domain.shared.plug(&mut def)?;
            let accepted = match accepted {
                Some(accepted) => accepted,
                None => domain.can_run(&def).await?,
            };
            // Before it can write to the disks that the memory of then belongs to.
            domain.drop_managed_save().await?;
            domain.start_guest(def, &caller, options, Origin::PowerOff(accepted), cancel).await
        }))
    }

    /// From now on a start is under way, until the result is dropped: `cancel` is fired by whoever wants no guest. For who
    /// has the turn; to be dropped before that is given back. Within another start it is part of that.
    pub(super) fn will_start(self: &Arc<Self>, cancel: &CancellationToken) -> Starts {
        let mut state = lock(&self.state);
        let first = state.starting.is_none();
        state.starting.get_or_insert_with(|| Starting { cancel: cancel.clone(), launched: false });
        Starts(first.then(|| self.clone()))
    }

    /// From now on that is on its way into it: nothing that it needs of other objects is taken away, until the result is dropped
    /// and what runs says so itself. To be said before it is looked at whether that is there.
    pub(super) fn awaits(self: &Arc<Self>, def: &DomainDef) -> Coming {
        self.set_coming(needs_of(def), images::images_of(def).collect());
        self.shared.plugs.forward_devices.comes(self.uuid, def);
        Coming(self.clone())
    }

    fn set_coming(&self, needs: Box<[Need]>, disks: Box<[images::DiskImages]>) {
        let mut state = lock(&self.state);
        (state.coming, state.coming_disks) = (needs, disks);
        state.tell_needs(&self.shared.uses, self.uuid);
        state.tell_images(&self.shared.image_users, self.uuid);
    }

    /// The hypervisor is about to be asked for a guest, or no longer at work on one. Error: nobody wants one any more.
    pub(super) fn is_launched(&self, launched: bool, cancel: &CancellationToken) -> Result<()> {
        let unwanted = {
            let mut state = lock(&self.state);
            let unwanted = state.wants_no_start(cancel);
            if let Some(starting) = state.starting.as_mut() {
                starting.launched = launched && !unwanted;
            }
            unwanted
        };
        self.changes.send_modify(|n| *n += 1);
        if launched && unwanted { Err(self.start_cancelled()) } else { Ok(()) }
    }

    /// Error: nobody wants the guest any more that is there now. Until the start has ended it counts as on its way.
    pub(super) fn is_still_wanted(&self, cancel: &CancellationToken) -> Result<()> {
        let unwanted = lock(&self.state).wants_no_start(cancel);
        if unwanted { Err(self.start_cancelled()) } else { Ok(()) }
    }

    fn start_cancelled(&self) -> Error {
        Error::Cancelled(format!("starting domain '{}' was cancelled; it is shut off as before", self.name()))
    }

    /// What a start now would run. Errors: `OperationInvalid` if it runs or is another driver's, `DomainExists` if it has
    /// another name by now.
    pub(super) fn def_to_start(&self, given: Option<&Arc<DomainDef>>) -> Result<Arc<DomainDef>> {
        let (name, stored) = {
            let state = lock(&self.state);
            state.still_here()?;
            state.is_inactive()?;
            state.sound()?;
            (state.name.clone(), state.stored.clone())
        };
        let def = match (given, stored) {
            (Some(def), _) => def.clone(),
            (None, Some(stored)) => self.shared.readings.of(&stored)?,
            (None, None) => return Err(Error::NoSuchDomain { what: "name", value: name }),
        };
        self.fits(&def, &name)?;
        Ok(def)
    }

    /// Refuses what the driver says cannot run here; what it has looked at is for the start.
    async fn can_run(&self, def: &DomainDef) -> Result<Accepted> {
        self.driver.can_start(def).await.map_err(|e| Error::from_driver(&def.name, "start", e))
    }

    pub(super) async fn start_guest(
        self: &Arc<Self>,
        def: Arc<DomainDef>,
        caller: &Caller,
        options: StartOptions,
        origin: Origin,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let mut def = def;
        self.shared.images.declare(&mut def);
        let _coming = self.awaits(&def);
        self.shared.settle_for(&def).await;
        self.shared.plug(&mut def)?;
        let deed = format!("cannot start domain '{}'", self.name());
        let _begins = self.reserve_images(&deed, "which starts", images::written_by(&def)).await?;
        for finding in self.changed_below(&def).await {
            tracing::warn!(uuid = %self.uuid, name = self.name(), "{finding}");
        }
        let id = self.shared.next_id();
        let (told, from, accepted) = match origin {
            Origin::PowerOff(accepted) => (Told { options, how: Started::Booted }, None, accepted),
            Origin::Snapshot(from) => (Told { options, how: Started::FromSnapshot }, from, Accepted::default()),
            Origin::Saved(saved) => {
                let from = Box::new(StartFrom::Saved(*saved));
                (Told { options, how: Started::Restored }, Some(from), Accepted::default())
            }
        };
        let status = self.shared.store.status_file_of_start(self.uuid, self.first_status(id, &def, caller, told));
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        let runtime_dir = on_disk(move || shared.store.make_runtime_dir(uuid)).await?;
        let (events, reports) = virt_model::driver::reports();
        let asked = def.clone();
        let launch = Launch {
            def,
            accepted,
            paused: options.paused,
            reset_nvram: options.reset_nvram,
            from: from.map(|from| *from),
            runtime_dir,
            log_file: self.shared.store.log_file(self.uuid),
            recorder: status.clone(),
            events,
            cancel: cancel.clone(),
        };
        let started = match self.is_launched(true, cancel) {
            Ok(()) => self.driver.start(launch).await,
            Err(_) => Err(DriverError::Cancelled),
        };
        match started {
            Ok(running) => self.became_active(id, running, status, told, caller, reports).await,
            Err(e) => {
                // What marks the managed save may not have come to its end where the start was given up: it is waited for, and
                // nothing is marked afterwards.
                let closed = on_disk(move || {
                    status.close();
                    Ok(())
                });
                if let Err(e) = closed.await {
                    tracing::warn!(%uuid, "{e}");
                }
                self.forget_transient(&asked).await;
                let forgotten = self.shared.forget_guest(uuid).await;
                self.is_launched(false, cancel)?;
                forgotten?;
                Err(match e {
                    DriverError::Cancelled => self.start_cancelled(),
                    e => self.driver_failed("start", e),
                })
            }
        }
    }

    /// What is on disk before there is a guest: with it a start that is cut off can be finished or ended.
    fn first_status(&self, id: u32, def: &DomainDef, caller: &Caller, told: Told) -> Status {
        let options = told.options;
        let (state, reason) = told.state();
        Status {
            driver: self.driver.name().to_owned(),
            id,
            owner: self.owner,
            state,
            reason,
            since_usec: now_usec(),
            autodestroy: options.autodestroy.then(|| caller.bus_name.clone().unwrap_or_default()),
            live: def.write(Form::LIVE),
            leaving: BTreeMap::new(),
            adjusting: None,
            record: None,
        }
    }

    async fn became_active(
        self: &Arc<Self>,
        id: u32,
        running: Running,
        status: Arc<StatusFile>,
        told: Told,
        caller: &Caller,
        reports: virt_model::driver::EventStream,
    ) -> Result<()> {
        let mut live = running.live;
        Arc::make_mut(&mut live).id = Some(id);
        let (file, text) = (status.clone(), live.write(Form::LIVE));
        let kept = match file.started_as_said(&text) {
            Some(since_usec) => Ok((since_usec, Ok(()))),
            None => on_disk(move || Ok(file.started(text))).await,
        };
        let (since_usec, kept) = kept.unwrap_or_else(|e| (now_usec(), Err(e)));
        if let Err(e) = kept {
            tracing::warn!(uuid = %self.uuid, "{e}; after a restart of virtd its terminals and ports will be missing in GetXML");
        }
        self.managed_save_is_used().await;
        let (asks, asked) = mpsc::unbounded_channel();
        let guest = Guest {
            id,
            instance: running.instance,
            live,
            document: Arc::default(),
            sampler: Arc::default(),
            looks: Arc::default(),
            agent_readers: FairPlaces::new(1, 1),
            status,
            ending: None,
            ends_by_powering_off: false,
            saved: false,
            leaving: BTreeMap::new(),
            ejected: BTreeSet::new(),
            looked_after: BTreeSet::new(),
            asks,
        };
        self.commit_report(|state| {
            (state.state, state.reason) = told.state();
            state.since_usec = since_usec;
            state.starting = None;
            state.managed_save = false;
            state.guest = Some(guest);
            state.compare_configs();
            told.events()
        });
        tokio::spawn(self.clone().follow(id, Reports::new(reports, asked)));
        self.looks_at_checkpoints();
        if told.options.autodestroy {
            self.end_when_gone(id, caller.departed.clone());
        }
        Ok(())
    }

    /// Ends the guest `id` when its caller has departed.
    pub(super) fn end_when_gone(self: &Arc<Self>, id: u32, departed: CancellationToken) {
        let domain = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = departed.cancelled() => {
                    if let Some(guest) = domain.guest().ok().filter(|guest| guest.id == id) {
                        tracing::info!(uuid = %domain.uuid, name = domain.name(), "its caller left, so the guest ends");
                        if let Err(e) = domain.end(guest, false).await {
                            tracing::error!(uuid = %domain.uuid, "{e}");
                        }
                    }
                }
                () = domain.until(|state| !state.runs(id)) => {}
            }
        });
    }

    /// A transient domain is there from the moment its start is accepted.
    pub(super) fn announce_transient(&self) {
        let transient = lock(&self.state).stored.is_none();
        if transient {
            self.announce();
        }
    }
}

/// The start of a transient domain, from its acceptance to its end: as long as it is under way, the domain is there. One
/// whose guest did not come to be is nothing.
pub(crate) struct Creation(Arc<Domain>);

impl Creation {
    pub(super) fn begin(domain: &Arc<Domain>) -> Result<Creation> {
        let mut state = lock(&domain.state);
        state.still_here()?;
        state.creations += 1;
        Ok(Creation(domain.clone()))
    }
}

impl Drop for Creation {
    fn drop(&mut self) {
        lock(&self.0.state).creations -= 1;
        self.0.drop_if_nothing_left();
    }
}

/// See [`Domain::will_start`].
pub(super) struct Starts(Option<Arc<Domain>>);

impl Drop for Starts {
    fn drop(&mut self) {
        if let Some(domain) = &self.0 {
            lock(&domain.state).starting = None;
            domain.changes.send_modify(|n| *n += 1);
        }
    }
}

/// See [`Domain::awaits`].
pub(super) struct Coming(Arc<Domain>);

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.set_coming(Box::default(), Box::default());
        self.0.shared.plugs.forward_devices.has_come(self.0.uuid);
    }
}

impl State {
    /// Whether there may be a process that nobody can end yet: it is just being made, or looked for.
    pub(super) fn may_get_a_guest(&self) -> bool {
        let launched = self.starting.as_ref().is_some_and(|starting| starting.launched);
        launched || self.sought.as_ref().is_some_and(|sought| sought.why.is_none())
    }

    /// Whether somebody has cancelled the start that is under way, or that of which it is a part.
    fn wants_no_start(&self, cancel: &CancellationToken) -> bool {
        cancel.is_cancelled() || self.starting.as_ref().is_some_and(|start| start.cancel.is_cancelled())
    }

    /// Whether guest `id` is (still) this domain's.
    pub(super) fn runs(&self, id: u32) -> bool {
        self.guest.as_ref().is_some_and(|guest| guest.id == id)
    }
}

/// What a guest is started from.
pub(super) enum Origin {
    /// Power off, because somebody asked for it; what the driver has looked at before.
    PowerOff(Accepted),
    /// A snapshot: its memory, or power off where it has none.
    Snapshot(Option<Box<StartFrom>>),
    /// A saved machine, which has been verified.
    Saved(Box<SavedState>),
}

/// What is told of a start.
#[derive(Clone, Copy)]
struct Told {
    options: StartOptions,
    how: Started,
}

impl Told {
    fn state(self) -> (DomainState, StateReason) {
        let state = if self.options.paused { DomainState::Paused } else { DomainState::Running };
        let reason = match (self.how, self.options.paused) {
            (Started::FromSnapshot, _) => StateReason::FromSnapshot,
            (Started::Restored, _) => StateReason::Restored,
            (_, true) => StateReason::User,
            (_, false) => StateReason::Booted,
        };
        (state, reason)
    }

    fn events(self) -> Vec<Lifecycle> {
        let settled = match (self.how, self.options.paused) {
            (Started::FromSnapshot, true) => Some(Lifecycle::Suspended(Suspended::FromSnapshot)),
            (Started::FromSnapshot, false) => Some(Lifecycle::Resumed(Resumed::FromSnapshot)),
            (Started::Restored, true) => Some(Lifecycle::Suspended(Suspended::Restored)),
            (_, true) => Some(Lifecycle::Suspended(Suspended::Paused)),
            (_, false) => None,
        };
        [Lifecycle::Started(self.how)].into_iter().chain(settled).collect()
    }
}
