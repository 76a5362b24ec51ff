//! What changes on a machine without plugging: its vCPUs, memory, and what else [`Adjustment`] names, in what runs, what is stored,
//! or both.
//!
//! ```text
//!  new configurations ─▶ checked as definitions are ─▶ noted ─▶ the guest follows ─▶ live on disk ─▶ stored on disk, then told
//!                                                                   └─ a failure leaves all as before, but for vCPUs that have come or gone
//! ```
//!
//! Whoever finds the note with a guest undoes what it names, so that the guest is as its configuration says; where that has been
//! written, what is to be stored beside follows. Of vCPUs, and of a device that is plugged in, it is looked which there are.

use super::config::{Configurations, Update};
use super::state::Guest;
use super::{Affect, Domain};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::fail_point;
use crate::lock::lock;
use crate::store::{Adjusting, StoredChange, on_disk};
use crate::stored::StoredDef;
use crate::verb::{self, Verb};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use virt_model::calendar;
use virt_model::device::balloon::{BalloonModel, BalloonStats};
use virt_model::device::display::{Connected, GraphicsKind};
use virt_model::domain::size::Kib;
use virt_model::domain::{DomainDef, Form, MAX_VCPUS};
use virt_model::driver::{Adjustment, DriverError};
use virt_model::xml::{Element, Limits};

/// Under which name it is kept that vCPUs are asked for: no device has one with a blank in it.
pub(super) const VCPUS_LEAVING: &str = "its vCPUs";

/// What runs, and what it is to become.
pub(super) struct LiveChange {
    pub(super) before: Arc<DomainDef>,
    pub(super) after: DomainDef,
    /// What the guest is to follow in.
    pub(super) what: Vec<Adjustment>,
}

impl Domain {
    /// Gives the guest so many bytes of its memory, or, as `maximum`, makes that the memory of the machine when it starts next.
    /// Returns when the balloon has been asked. Error: `InvalidArgument` names the maximum.
    pub async fn set_memory(
        self: &Arc<Self>,
        caller: &Caller,
        bytes: u64,
        maximum: bool,
        affect: Affect,
    ) -> Result<()> {
        let affect = of_stored("memory", maximum, affect)?;
        let kib = bytes.div_ceil(1024);
        self.adjust(caller, &verb::SET_MEMORY, affect, Adjustment::Memory, |def, runs| match maximum {
            true => set_maximum_memory(def, kib),
            false => {
                let most = def.memory_kib();
                if kib == 0 || kib > most {
                    let most = most.saturating_mul(1024);
                    return Err(Error::InvalidArgument(format!(
                        "domain '{}': {bytes} bytes of memory; there can be 1 to {most} ('maximum' changes that)",
                        def.name
                    )));
                }
                if runs {
                    has_balloon(def)?;
                }
                def.current_memory = Some(Kib(kib));
                Ok(())
            }
        })
        .await
    }

    /// Has the guest tell of its memory at that interval, in seconds; 0: never.
    pub async fn set_memory_stats_period(
        self: &Arc<Self>,
        caller: &Caller,
        seconds: u32,
        affect: Affect,
    ) -> Result<()> {
        self.adjust(caller, &verb::SET_MEMORY_STATS_PERIOD, affect, Adjustment::MemoryStats, |def, _| {
            has_balloon(def)?;
            let balloon = def.devices.memballoon.as_mut().ok_or_else(|| no_balloon(&def.name))?;
            balloon.stats = (seconds > 0).then(|| BalloonStats { period: seconds, ..BalloonStats::default() });
            Ok(())
        })
        .await
    }

    /// Plugs vCPUs in or out until there are so many, or, as `maximum`, makes that the most that there can be when it starts next.
    /// Errors: `InvalidArgument` names the maximum; `TimedOut` if the guest does not let go within `patience`: then it may later,
    /// and configurations follow.
    pub async fn set_vcpus(
        self: &Arc<Self>,
        caller: &Caller,
        count: u32,
        maximum: bool,
        affect: Affect,
        patience: Duration,
    ) -> Result<()> {
        let affect = of_stored("number of vCPUs", maximum, affect)?;
        self.short(caller, &verb::SET_VCPUS, async {
            let (before, before_stored) = self.to_be_adjusted(&verb::SET_VCPUS, affect).await?;
            let change = |def: &Arc<DomainDef>, runs: bool| {
                let mut def = DomainDef::clone(def);
                with_vcpus(&mut def, count, maximum, runs).map(|()| def)
            };
            let mut after = before.as_ref().map(|def| change(def, true)).transpose()?;
            let mut stored = before_stored.as_ref().map(|def| change(def, false)).transpose()?;
            let as_stored = self.stored()?;
            if let (Some(after), Some(before)) = (&mut after, &before) {
                if as_stored.is_none_or(|stored| stored.vcpus_each.is_none()) {
                    after.forget_plain_vcpus();
                }
                // Where both were the same they stay so: what can be unplugged now can be after the next start.
                if let (Some(stored), Some(before_stored)) = (&mut stored, &before_stored)
                    && (before.vcpus_at_boot(), before.maximum_vcpus())
                        == (before_stored.vcpus_at_boot(), before_stored.maximum_vcpus())
                {
                    (stored.vcpu, stored.vcpus_each) = (after.vcpu.clone(), after.vcpus_each.clone());
                }
            }
            let live = before.zip(after);
            let what = vec![Adjustment::Vcpus(patience)];
            let live = live.map(|(before, after)| LiveChange { before, after, what });
            let stored = before_stored.zip(stored);
            if let (Some(_), Ok(guest)) = (&live, self.guest()) {
                match stored.is_some() {
                    true => {
                        let wanted = Element::new("vcpu").with_attr("current", count.to_string());
                        self.will_go(guest.id, VCPUS_LEAVING, Some(wanted)).await?;
                    }
                    false => _ = self.stays(guest.id, VCPUS_LEAVING).await,
                }
            }
            let done = self.put_checked(&verb::SET_VCPUS, live, stored).await;
            if let (Ok(guest), false) = (self.guest(), matches!(done, Err(Error::TimedOut(_)))) {
                self.stays(guest.id, VCPUS_LEAVING).await;
            }
            done
        })
        .await
    }

    /// Gives the display that the `<graphics>` of this index offers another password, good for ever or to that time, in
    /// microseconds since the epoch. `connected`: what becomes of who is there, if it runs.
    /// Errors: `NoSuchDevice`; `OperationUnsupported` for a display that asks for no password.
    pub async fn set_graphics_password(
        self: &Arc<Self>,
        caller: &Caller,
        index: u32,
        password: &str,
        until_usec: Option<u64>,
        connected: Option<Connected>,
        affect: Affect,
    ) -> Result<()> {
        if password.is_empty() {
            return Err(Error::InvalidArgument("an empty password would let nobody in: give one".to_owned()));
        }
        let until = until_usec.map(|usec| calendar::date(i64::try_from(usec / 1_000_000).unwrap_or(i64::MAX)));
        let number = usize::try_from(index).unwrap_or(usize::MAX);
        let what = Adjustment::Password(number, connected);
        self.adjust(caller, &verb::SET_GRAPHICS_PASSWORD, affect, what, |def, runs| {
            let (name, count) = (def.name.clone(), def.devices.graphics.len());
            let graphics = def.devices.graphics.get_mut(number).ok_or_else(|| self.has_no("graphics", index, count))?;
            let refuse =
                |why: &str| Err(Error::OperationUnsupported(format!("domain '{name}', graphics {index}: {why}")));
            if !matches!(graphics.kind, GraphicsKind::Vnc | GraphicsKind::Spice) {
                return refuse("only VNC and SPICE ask for a password");
            }
            if runs && graphics.passwd.is_none() {
                return refuse(
                    "it was started without a password, and asks for none as long as it runs; 'config' sets one",
                );
            }
            if !runs && connected.is_some() && (affect.config && !affect.live || self.live().is_none()) {
                let why = "'connected' is of who is there: what is stored has nobody";
                return Err(Error::InvalidArgument(format!("domain '{name}': {why}")));
            }
            graphics.passwd = Some(password.to_owned());
            graphics.passwd_valid_to.clone_from(&until);
            Ok(())
        })
        .await
    }

    /// The frame of what changes one thing: `edit` makes it of a configuration, and is told whether that is what runs.
    pub(super) async fn adjust(
        self: &Arc<Self>,
        caller: &Caller,
        verb: &'static Verb,
        affect: Affect,
        what: Adjustment,
        edit: impl Fn(&mut DomainDef, bool) -> Result<()> + Send + Sync,
    ) -> Result<()> {
        self.short(caller, verb, async {
            let (live, stored) = self.to_be_adjusted(verb, affect).await?;
            let edited = |def: &Arc<DomainDef>, runs: bool| {
                let mut def = DomainDef::clone(def);
                edit(&mut def, runs).map(|()| def)
            };
            let live = live.map(|before| {
                let after = edited(&before, true)?;
                Ok::<_, Error>(LiveChange { before, after, what: vec![what.clone()] })
            });
            let stored = stored.map(|def| edited(&def, false).map(|after| (def, after))).transpose()?;
            self.put_checked(verb, live.transpose()?, stored).await
        })
        .await
    }

    /// Holds new configurations to what definitions are held to, has the guest follow, and puts them in the place of the old ones.
    pub(super) async fn put_checked(
        &self,
        verb: &'static Verb,
        live: Option<LiveChange>,
        stored: Option<(Arc<DomainDef>, DomainDef)>,
    ) -> Result<()> {
        if let Some(live) = &live {
            self.is_no_worse(&live.before, &live.after).await?;
        }
        if let Some((before, after)) = &stored {
            self.is_no_worse(before, after).await?;
        }
        self.put_changed(verb, live, stored.map(|(_, after)| Arc::new(after))).await
    }

    /// The same of configurations that somebody else holds to that.
    pub(super) async fn put_changed(
        &self,
        verb: &'static Verb,
        live: Option<LiveChange>,
        stored: Option<Arc<DomainDef>>,
    ) -> Result<()> {
        if let Some(live) = &live {
            self.nothing_works_on(&live.what)?;
        }
        let stored = match stored {
            Some(after) => Some((after.name.clone(), self.to_store(after).await?)),
            None => None,
        };
        let Some(live) = live else { return self.put_written(None, stored, Update::Whole).await };
        // On the heap: in a debug build each frame would hold it once more.
        Box::pin(self.put_followed(verb, live, stored)).await
    }

    /// Puts new configurations in the place of the old ones, in which no guest has to follow; killed in between, the next virtd
    /// stores what runs already.
    pub(super) async fn put_both(
        &self,
        verb: &'static Verb,
        before: Option<Arc<DomainDef>>,
        live: Option<Arc<DomainDef>>,
        stored: Option<Arc<DomainDef>>,
    ) -> Result<()> {
        match (before.zip(live), stored) {
            (Some((before, after)), Some(stored)) => {
                let live = LiveChange { before, after: Arc::unwrap_or_clone(after), what: Vec::new() };
                self.put_changed(verb, Some(live), Some(stored)).await
            }
            (live, stored) => self.put_configurations(live.map(|(_, after)| after), stored, Update::Whole).await,
        }
    }

    /// Has the guest follow, and puts the configurations in the place of the old ones.
    async fn put_followed(
        &self,
        verb: &'static Verb,
        live: LiveChange,
        stored: Option<(String, Arc<StoredDef>)>,
    ) -> Result<()> {
        let LiveChange { before, mut after, what } = live;
        let guest = self.guest()?;
        Box::pin(self.undo_what_is_noted(&guest)).await?;
        fail_point::reached();
        note(&guest, self.adjusting(&after, &what, stored.as_ref().map(|(_, stored)| &**stored))).await?;
        fail_point::reached();
        for (done, one) in what.iter().enumerate() {
            let followed = self.driver.adjust(guest.instance.as_ref(), &before, &mut after, one).await;
            if let Err(error) = followed {
                // A hypervisor that does not answer may still do it: the note says so.
                let undone = Box::pin(self.undo(&guest, &before, &after, &what[..done])).await;
                if undone.is_ok() && !matches!(error, DriverError::TimedOut(_)) {
                    self.is_as_kept(&guest).await;
                }
                if matches!(one, Adjustment::Vcpus(_)) && after.vcpus_at_boot() != before.vcpus_at_boot() {
                    self.put_configurations(Some(Arc::new(after)), None, Update::Whole).await?;
                }
                return Err(match one {
                    Adjustment::Medium { .. } => self.driver_failed(&format!("change {one} of"), error),
                    _ => self.driver_failed(verb.word, error),
                });
            }
        }
        fail_point::reached();
        let put = async {
            let (status, text) = (guest.status.clone(), after.write(Form::LIVE));
            on_disk(move || status.runs_as_adjusted(text)).await?;
            fail_point::reached();
            let put = self.put_written(Some(Arc::new(after.clone())), stored, Update::Whole).await;
            fail_point::reached();
            put
        };
        let put = Box::pin(put).await;
        if put.is_ok() {
            self.is_adjusted(&guest);
        } else if Box::pin(self.undo(&guest, &before, &after, &what)).await.is_ok() {
            self.is_as_kept(&guest).await;
        }
        put
    }

    /// Refuses limits and another medium of a disk that a job or a backup works on: they are put into its graph of nodes.
    fn nothing_works_on(&self, what: &[Adjustment]) -> Result<()> {
        let disk = |one: &Adjustment| match one {
            Adjustment::Throttle(target) | Adjustment::Medium { target, .. } => self.disks_are_idle(Some(target)),
            _ => Ok(()),
        };
        what.iter().try_for_each(disk)
    }

    /// Of a guest that was found: undoes what the last virtd was changing on it. For who has the turn.
    pub(super) async fn adjusted_as_found(&self, guest: &Guest) {
        if let Err(error) = self.undo_what_is_noted(guest).await {
            tracing::error!(uuid = %self.uuid, name = self.name(), %error, "that is done before anything else is changed on it");
        }
    }

    /// The same before what does not go together with a change that was cut off.
    pub(super) async fn is_as_configured(&self) -> Result<()> {
        match self.guest() {
            Ok(guest) => Box::pin(self.undo_what_is_noted(&guest)).await,
            Err(_) => Ok(()),
        }
    }

    pub(super) async fn undo_what_is_noted(&self, guest: &Guest) -> Result<()> {
        self.store_what_is_noted(guest).await?;
        let Some(Adjusting { after, what, .. }) = guest.status.adjusting() else { return Ok(()) };
        self.nothing_works_on(&what)?;
        let after = DomainDef::parse_leniently_within(&after, Limits::STORED).0.filter(|after| after.uuid == self.uuid);
        // What cannot be read was written by a virtd that knew more.
        if let Some(after) = after.filter(|_| !what.is_empty()) {
            let named: Vec<_> = what.iter().map(ToString::to_string).collect();
            self.undo(guest, &guest.live, &after, &what)
                .await
                .map_err(|e| self.driver_failed("undo a change of", e))?;
            tracing::warn!(uuid = %self.uuid, name = self.name(), "a change of {} was cut off, and is undone", named.join(", "));
        }
        note(guest, None).await
    }

    /// What is to be changed: what runs, and what is stored, to the end of what was changed before.
    pub(super) async fn to_be_adjusted(&self, verb: &Verb, affect: Affect) -> Result<Configurations> {
        if let Ok(guest) = self.guest() {
            self.store_what_is_noted(&guest).await?;
        }
        self.affected(verb, affect)
    }

    /// Where the guest has followed and its configuration says so, what is to be stored beside is stored, unless something else is
    /// by now.
    async fn store_what_is_noted(&self, guest: &Guest) -> Result<()> {
        let Some(Adjusting { stored, followed, device, .. }) = guest.status.adjusting() else { return Ok(()) };
        let has_come = match &device {
            Some(alias) => {
                let gone = self.driver.is_detached(guest.instance.as_ref(), &guest.live, alias).await;
                !gone.map_err(|error| self.driver_failed(&format!("look for '{alias}' in"), error))?
            }
            None => followed,
        };
        if !has_come {
            return if device.is_some() { note(guest, None).await } else { Ok(()) };
        }
        let is_stored = lock(&self.state).stored.as_ref().map(|stored| stored.text());
        if let Some(StoredChange { after, .. }) = stored.filter(|noted| is_stored.as_ref() == Some(&noted.before)) {
            let after = DomainDef::parse_leniently_within(&after, Limits::STORED).0;
            // What cannot be read was written by a virtd that knew more.
            if let Some(after) = after.filter(|after| after.uuid == self.uuid) {
                self.put_configurations(None, Some(Arc::new(after)), Update::Whole).await?;
                tracing::warn!(uuid = %self.uuid, name = self.name(), "a change was cut off after the guest had followed: it is stored now, too");
            }
        }
        note(guest, None).await
    }

    /// What is noted of a change; nothing for vCPUs alone: which there are is looked up.
    fn adjusting(&self, after: &DomainDef, what: &[Adjustment], stored: Option<&StoredDef>) -> Option<Adjusting> {
        let followed: Vec<_> = what.iter().filter(|one| !matches!(one, Adjustment::Vcpus(_))).cloned().collect();
        if followed.is_empty() && (stored.is_none() || !what.is_empty()) {
            return None;
        }
        let (after, stored) = (after.write(Form::LIVE), stored.and_then(|stored| self.change_of(stored)));
        Some(Adjusting { after, what: followed, stored, device: None, followed: false })
    }

    /// What is stored, and what is to be.
    fn change_of(&self, after: &StoredDef) -> Option<StoredChange> {
        let before = lock(&self.state).stored.as_ref().map(|stored| stored.text())?;
        Some(StoredChange { before, after: after.text() })
    }

    /// Keeps that the guest is about to run with a device more, and what is then to be stored, before it is given that.
    pub(super) async fn will_be_given(
        &self,
        guest: &Guest,
        (live, alias): (&DomainDef, &str),
        stored: Option<&StoredDef>,
    ) -> Result<()> {
        Box::pin(self.undo_what_is_noted(guest)).await?;
        let (status, text) = (guest.status.clone(), live.write(Form::LIVE));
        let noted = stored.and_then(|stored| self.change_of(stored)).map(|stored| Adjusting {
            after: text.clone(),
            what: Vec::new(),
            stored: Some(stored),
            device: Some(alias.to_owned()),
            followed: false,
        });
        on_disk(move || status.is_given(text, noted)).await
    }

    /// The guest is as its configurations say, which are on disk: nobody waits until the note of the change is none.
    pub(super) fn is_adjusted(&self, guest: &Guest) {
        let (status, uuid) = (guest.status.clone(), self.uuid);
        status.is_adjusted();
        tokio::spawn(async move {
            if let Err(error) = on_disk(move || status.catch_up()).await {
                tracing::warn!(%uuid, %error, "what has been changed is noted as being changed until more is written");
            }
        });
    }

    /// The guest is as its configuration says.
    pub(super) async fn is_as_kept(&self, guest: &Guest) {
        if let Err(error) = note(guest, None).await {
            tracing::warn!(uuid = %self.uuid, %error, "the next virtd, or the next change, takes what was changed last for cut off");
        }
    }

    /// The guest is to be again as it was `before`, as far as it can be. Error: its hypervisor does not answer, or it cannot be said what
    /// a card of it is held to; the rest is undone all the same.
    async fn undo(
        &self,
        guest: &Guest,
        before: &DomainDef,
        after: &DomainDef,
        what: &[Adjustment],
    ) -> std::result::Result<(), DriverError> {
        let mut undone = Ok(());
        for one in what.iter().rev() {
            let mut has = before.clone();
            let back = self.driver.adjust(guest.instance.as_ref(), after, &mut has, &one.back()).await;
            let Err(error) = back else { continue };
            let is_undone_again = is_undone_again(one, &error);
            if !is_undone_again && self.tells(one, has).await {
                tracing::error!(uuid = %self.uuid, name = self.name(), %error, "a change of {one} cannot be undone");
                continue;
            }
            tracing::error!(uuid = %self.uuid, name = self.name(), %error, "GetXML does not tell {one}");
            if is_undone_again {
                undone = Err(error);
            }
        }
        undone
    }

    /// Keeps of what could not be undone how it is, where that is known. Whether `GetXML` tells it now.
    async fn tells(&self, what: &Adjustment, has: DomainDef) -> bool {
        matches!(what, Adjustment::Medium { .. })
            && self.put_configurations(Some(Arc::new(has)), None, Update::Whole).await.is_ok()
    }

    /// Refuses what says more against a configuration than there was before.
    async fn is_no_worse(&self, before: &DomainDef, after: &DomainDef) -> Result<()> {
        let said = async |def: &DomainDef| {
            self.driver
                .check(def)
                .await
                .into_iter()
                .map(|finding| (finding.path, finding.message))
                .collect::<BTreeSet<_>>()
        };
        let known = said(before).await;
        let new: Vec<String> = said(after).await.difference(&known).map(|(_, message)| message.clone()).collect();
        match new.is_empty() {
            true => Ok(()),
            false => Err(Error::InvalidArgument(format!("domain '{}': {}", self.name(), new.join("; ")))),
        }
    }

    /// The hypervisor says that vCPUs have come or gone, which nobody waits for.
    pub(super) async fn vcpus_have_changed(self: Arc<Self>, id: u32) {
        let is_there = |domain: &Domain| domain.guest().ok().filter(|guest| guest.id == id);
        if is_there(&self).is_none() || !self.begins_to_look(id, VCPUS_LEAVING) {
            return;
        }
        let word = "look after vCPUs that have gone from";
        let turn = loop {
            match self.take_turn(word, &CancellationToken::new()).await {
                Ok(turn) => break Some(turn),
                Err(Error::Busy { .. }) if is_there(&self).is_some() => {}
                Err(_) => break None,
            }
        };
        self.has_looked(id, VCPUS_LEAVING);
        let (Some(_turn), Some(guest)) = (turn, is_there(&self)) else { return };
        if let Err(error) = self.follow_vcpus(&guest).await {
            tracing::error!(uuid = %self.uuid, name = self.name(), %error, "its vCPUs have changed, and the configurations do not follow");
        }
    }

    async fn follow_vcpus(self: &Arc<Self>, guest: &Guest) -> Result<()> {
        let mut live = DomainDef::clone(&guest.live);
        let looked = self.driver.look_at(guest.instance.as_ref(), &mut live, &Adjustment::Vcpus(Duration::ZERO)).await;
        looked.map_err(|error| self.driver_failed("look at the vCPUs of", error))?;
        let wanted = self.vcpus_wanted(guest.id).filter(|wanted| *wanted == live.vcpus());
        // Where they are as wanted already, virtd was killed before that was stored.
        if live.vcpus_at_boot() == guest.live.vcpus_at_boot() && wanted.is_none() {
            return Ok(());
        }
        let stored = match (wanted, self.stored()?) {
            (Some(wanted), Some(def)) => {
                let mut def = DomainDef::clone(&def);
                // Whoever has changed the maximum meanwhile has said what is to be.
                (wanted <= def.maximum_vcpus()).then(|| def.set_vcpus(wanted, false).map(|()| Arc::new(def)).ok())
            }
            _ => None,
        };
        self.put_configurations(Some(Arc::new(live)), stored.flatten(), Update::Whole).await?;
        if wanted.is_some() {
            self.stays(guest.id, VCPUS_LEAVING).await;
        }
        Ok(())
    }

    fn vcpus_wanted(&self, id: u32) -> Option<u32> {
        self.stored_that_goes(id, VCPUS_LEAVING)?.attr("current")?.parse().ok()
    }
}

/// Whether what could not be undone is to be undone again, before anything else is changed: a guest whose filter fails to come back could
/// pass what it forbids. A card that has gone is held to nothing.
fn is_undone_again(one: &Adjustment, error: &DriverError) -> bool {
    match error {
        DriverError::TimedOut(_) => true,
        DriverError::Hypervisor(_) => matches!(one, Adjustment::Filter(_)),
        _ => false,
    }
}

/// Notes with the guest what is about to be changed on it, or that nothing is any more.
async fn note(guest: &Guest, adjusting: Option<Adjusting>) -> Result<()> {
    let status = guest.status.clone();
    if adjusting.is_none() && status.adjusting().is_none() {
        return Ok(());
    }
    on_disk(move || status.update(|status| status.adjusting = adjusting)).await
}

/// A maximum is of what is stored.
fn of_stored(what: &str, maximum: bool, affect: Affect) -> Result<Affect> {
    match (maximum, affect.live) {
        (true, true) => Err(Error::InvalidArgument(format!(
            "'maximum' is of what is stored, not 'live': the largest {what} stays as long as the machine runs"
        ))),
        (true, false) => Ok(Affect { live: false, config: true }),
        (false, _) => Ok(affect),
    }
}

fn with_vcpus(def: &mut DomainDef, count: u32, maximum: bool, runs: bool) -> Result<()> {
    let (name, most) = (def.name.clone(), if maximum { MAX_VCPUS } else { def.maximum_vcpus() });
    if count == 0 || count > most {
        let remedy = if maximum { "" } else { " ('maximum' changes that)" };
        return Err(Error::InvalidArgument(format!(
            "domain '{name}': {count} vCPUs; there can be 1 to {most}{remedy}"
        )));
    }
    if maximum {
        def.set_maximum_vcpus(count);
        return Ok(());
    }
    def.set_vcpus(count, runs).map_err(|board| {
        Error::OperationUnsupported(format!(
            "domain '{name}': {board} of its vCPUs were there at its start and stay as long as it runs"
        ))
    })
}

fn set_maximum_memory(def: &mut DomainDef, kib: u64) -> Result<()> {
    let name = def.name.clone();
    let (cells, devices) = (def.numa_cells().len(), def.memory_devices_kib());
    if cells > 0 {
        return Err(Error::OperationUnsupported(format!(
            "domain '{name}': its memory is that of its NUMA cells; define it with others"
        )));
    }
    if kib <= devices {
        let least = devices.saturating_mul(1024);
        return Err(Error::InvalidArgument(format!("domain '{name}': it needs more than {least} bytes of memory")));
    }
    def.memory.get_or_insert_default().size = Kib(kib);
    def.current_memory = def.current_memory.map(|now| now.min(Kib(kib)));
    Ok(())
}

fn has_balloon(def: &DomainDef) -> Result<()> {
    let none = def.devices.memballoon.as_ref().is_some_and(|balloon| balloon.model == BalloonModel::None);
    if none { Err(no_balloon(&def.name)) } else { Ok(()) }
}

fn no_balloon(name: &str) -> Error {
    Error::OperationUnsupported(format!(
        "domain '{name}' has no <memballoon>, by which its guest would give memory back"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_fails_to_come_back_is_not_forgotten() {
        let (filter, link) = (Adjustment::Filter("net0".to_owned()), Adjustment::Link("net0".to_owned()));
        let failed = DriverError::Hypervisor("nft does not take its filter".to_owned());
        assert!(is_undone_again(&filter, &failed) && !is_undone_again(&link, &failed));
        let late = DriverError::TimedOut("no answer".to_owned());
        assert!(is_undone_again(&filter, &late) && is_undone_again(&link, &late));
        assert!(!is_undone_again(&filter, &DriverError::Refused("its QEMU does not have it any more".to_owned())));
    }
}
