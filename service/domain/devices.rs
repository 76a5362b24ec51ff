//! Devices plugged into and out of a machine: what runs, what is stored, or both.
//!
//! ```text
//!  attach: placed and checked ─▶ in the guest's record, with what is to be stored ─▶ plugged in ─▶ stored ─▶ told
//!  detach: the guest is asked ─▶ it has let go ─▶ configurations ─▶ told        (else nothing changes until it does)
//! ```
//!
//! The record names a device before the hypervisor is asked for it, so whoever finds the guest knows what it was lent; what the
//! guest then turns out not to have is reported as gone ([`Domain::device_has_gone`]).

use super::config::Update;
use super::state::Guest;
use super::{Affect, Domain, given};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::fail_point;
use crate::images;
use crate::lock::lock;
use crate::verb::{self, Verb};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use virt_model::domain::one_device::{DeviceSpot, alias_of};
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::{Attachment, Detachment, DeviceEvent, DriverError, GivenFile};
use virt_model::xml::{self, Element, FindingKind, shorten};

/// How long a guest may take to let go of a device, unless its caller says otherwise.
pub const LETTING_GO: Duration = Duration::from_secs(30);

/// Which device is meant.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// The one that this element describes.
    Like(&'a str),
    /// The one of that name.
    Named(&'a str),
}

/// A definition with one device more, and that device's name.
struct Placed {
    def: Arc<DomainDef>,
    alias: String,
    /// Who would change its image is told of it.
    begins: Arc<images::Begins>,
}

impl Domain {
    /// Plugs in a device, in all configurations that `affect` means. Gives its name in what runs, or the one that the document
    /// gives it. On failure none of them changes, but that what runs says what the guest has: a device that cannot be stored,
    /// or a controller that came with one that was refused and cannot be taken back.
    /// `images`: what the caller has open itself for it, then in what runs alone.
    /// Errors: `OperationUnsupported` and `OperationInvalid` name what cannot be plugged, or has no place.
    pub async fn attach_device(
        self: &Arc<Self>,
        caller: &Caller,
        xml: &str,
        affect: Affect,
        images: Vec<GivenFile>,
    ) -> Result<String> {
        let (affect, image) = given::one(affect, images)?;
        self.short(caller, &verb::ATTACH_DEVICE, async {
            let mut device = xml::read(xml, &[]).map_err(|finding| Error::ConfigInvalid(vec![finding]))?;
            // Of a document that was shown of another guest, or of this one earlier, its name means nothing.
            let named =
                device.take_child("alias").filter(|alias| alias.attr("name").is_some_and(|n| n.starts_with("ua-")));
            named.into_iter().for_each(|alias| device.push(alias));
            given::names_none(&self.name(), &device)?;
            let (live, stored) = self.to_be_adjusted(&verb::ATTACH_DEVICE, affect).await?;
            let wanted = live.as_ref().map(|live| with_device(live, &device)).transpose()?;
            let _coming = wanted.as_ref().map(|wanted| self.awaits(wanted));
            let Some((before, wanted)) = live.zip(wanted) else {
                let stored = self.stored_with(stored.as_deref(), &device, None).await?;
                self.put_configurations(None, stored, Update::Whole).await?;
                return Ok(alias_of(&device).unwrap_or_default().to_owned());
            };
            let placed = self.place(&before, wanted, &device, image.as_ref()).await?;
            let (alias, _begins) = (placed.alias.clone(), placed.begins.clone());
            fail_point::reached();
            let stored = match self.stored_with(stored.as_deref(), &device, Some(&placed)).await? {
                Some(def) => Some((def.name.clone(), self.to_store(def).await?)),
                None => None,
            };
            let guest = self.guest()?;
            self.will_be_given(&guest, (&placed.def, &alias), stored.as_ref().map(|(_, stored)| &**stored)).await?;
            fail_point::reached();
            let live = self.plug(&before, placed, image).await?;
            fail_point::reached();
            let mut put = self.put_written(Some(live.clone()), stored, Update::Whole).await;
            fail_point::reached();
            if put.is_ok() {
                self.is_adjusted(&guest);
            } else {
                // The guest has it, whatever cannot be written.
                put = self.put_written(Some(live), None, Update::Whole).await.and(put);
                self.is_as_kept(&guest).await;
            }
            self.tell_device(DeviceEvent::Added { alias: alias.clone() });
            put.map(|()| alias)
        })
        .await
    }

    /// What runs with one device more (`def`), which has its place and may be plugged in.
    async fn place(
        &self,
        before: &Arc<DomainDef>,
        mut def: DomainDef,
        device: &Element,
        image: Option<&Arc<GivenFile>>,
    ) -> Result<Placed> {
        let name = self.name();
        match def.devices.disks.last_mut().filter(|_| device.name == "disk") {
            Some(disk) => self.take_images(disk, image).await?,
            None if image.is_some() => return Err(given::of_no_disk(&name, device)),
            None => {}
        }
        if let Some(card) = def.devices.interfaces.last_mut().filter(|_| device.name == "interface") {
            self.shared.plugs.plug_card(self.uuid, &name, card)?;
        }
        let guest = self.guest()?;
        let placed = self.driver.place_device(guest.instance.as_ref(), before, &mut def).await;
        let alias = placed.map_err(|e| Error::from_driver(&name, "plug a device into", e))?;
        let mut def = Arc::new(def);
        self.shared.images.declare(&mut def);
        let written = images::written_of(&def, |disk| disk.info.alias() == Some(&alias));
        let deed = format!("cannot plug '{alias}' into domain '{name}'");
        let begins = self.reserve_images(&deed, &format!("which is given it as '{alias}'"), written).await?;
        Ok(Placed { def, alias, begins: Arc::new(begins) })
    }

    /// The stored configuration, where it is meant, with that device; where it is plugged in, too, it is the same one.
    async fn stored_with(
        &self,
        def: Option<&DomainDef>,
        device: &Element,
        placed: Option<&Placed>,
    ) -> Result<Option<Arc<DomainDef>>> {
        let Some(def) = def else { return Ok(None) };
        let there = placed.and_then(|placed| placed.def.device_at(&placed.def.spot_of(&placed.alias)?, Form::LIVE));
        let mut same = device.clone();
        let kept = |part: &&Element| ["mac", "address"].contains(&&*part.name) && device.child(&part.name).is_none();
        there.iter().flat_map(Element::elements).filter(kept).for_each(|part| same.push(part.clone()));
        let completed = match self.completed_with(def, &same).await {
            // What is stored may have something else in that place.
            Err(_) if same.child("address").is_some() && device.child("address").is_none() => {
                same.take_child("address");
                self.completed_with(def, &same).await
            }
            completed => completed,
        };
        completed.map(|def| Some(Arc::new(def)))
    }

    async fn completed_with(&self, def: &DomainDef, device: &Element) -> Result<DomainDef> {
        let mut def = with_device(def, device)?.in_form(Form::STORED);
        let completed = self.driver.learn_and_complete(&mut def).await;
        completed.map_err(|e| Error::from_driver(&self.name(), "add a device to", e))?;
        let mut found = def.contradictions();
        found.retain(|finding| finding.kind == FindingKind::Invalid);
        if found.is_empty() { Ok(def) } else { Err(Error::ConfigInvalid(found)) }
    }

    /// Says so where the record still names a device that the guest was not given.
    fn is_not_plugged(&self, alias: &str, kept: Result<()>) {
        if let Err(error) = kept {
            tracing::warn!(uuid = %self.uuid, "{error}; after a restart of virtd '{alias}' is told as gone");
        }
    }

    /// Plugs it in, which is in the record; gives what runs then. On failure what runs is as before, with what of it could not be taken back.
    async fn plug(
        self: &Arc<Self>,
        before: &Arc<DomainDef>,
        placed: Placed,
        image: Option<Arc<GivenFile>>,
    ) -> Result<Arc<DomainDef>> {
        let Placed { mut def, alias, .. } = placed;
        let guest = self.guest()?;
        let live = Arc::make_mut(&mut def);
        let device = Attachment { before, alias: &alias, image: image.as_ref() };
        match self.driver.attach_device(guest.instance.as_ref(), live, device).await {
            Ok(()) => Ok(def),
            Err(error) => {
                // What a hypervisor that does not answer may have is the guest's until it says that it has not.
                self.is_not_plugged(&alias, self.keep_what_stays(&guest, before, def).await);
                self.is_as_kept(&guest).await;
                Err(self.driver_failed(&format!("plug '{alias}' into"), error))
            }
        }
    }

    /// Keeps what the guest has after a device was refused: what it had, and what could not be taken back, or may be there.
    async fn keep_what_stays(self: &Arc<Self>, guest: &Guest, before: &DomainDef, def: Arc<DomainDef>) -> Result<()> {
        let known: BTreeSet<_> = before.devices.infos().into_iter().map(|(info, _)| info.alias()).collect();
        let stays =
            def.devices.infos().into_iter().map(|(info, _)| info.alias()).filter(|alias| !known.contains(alias));
        let stays: Vec<String> = stays.flatten().map(str::to_owned).collect();
        if stays.is_empty() {
            return self.keep_live(before).await;
        }
        self.put_configurations(Some(def), None, Update::Whole).await?;
        // The guest may let go of it at any moment, and have done so by now.
        stays.into_iter().for_each(|alias| drop(tokio::spawn(self.clone().device_has_gone(guest.id, alias))));
        Ok(())
    }

    /// Unplugs a device, from all configurations that `affect` means; returns when the guest has let go of it.
    /// Errors: `NoSuchDevice`; `OperationInvalid` if the guest refuses; `TimedOut` if it does not let go within `patience`: then
    /// it has it still, and configurations follow when it does.
    pub async fn detach_device(
        self: &Arc<Self>,
        caller: &Caller,
        verb: &'static Verb,
        wanted: Wanted<'_>,
        affect: Affect,
        patience: Duration,
    ) -> Result<()> {
        self.short(caller, verb, async {
            let (live, stored) = self.affected(verb, affect)?;
            let element = match wanted {
                Wanted::Like(text) => xml::read(text, &[]).map_err(|finding| Error::ConfigInvalid(vec![finding]))?,
                Wanted::Named(alias) => self.named(alias, live.as_deref(), stored.as_deref())?,
            };
            // Where it is open which configuration is meant, it goes from those that have it.
            let open = !affect.live && !affect.config;
            let has = |def: &DomainDef| def.device_like(&element) != Err(0);
            let live = live.filter(|live| !open || has(live) || !stored.as_deref().is_some_and(has));
            let leaving = live.as_ref().map(|live| self.leaving(live, &element)).transpose()?;
            let disks = live.iter().flat_map(|live| &live.devices.disks);
            let named = |alias: &str| disks.clone().find(|disk| disk.info.alias() == Some(alias));
            if let Some(disk) = leaving.as_ref().and_then(|(alias, _)| named(alias)) {
                self.disks_are_idle(Some(&disk.target.dev))?;
            }
            // What is stored knows no names but those that people gave: it is the device that runs.
            let of_stored = match (&live, &leaving) {
                (Some(live), Some((_, spot))) => live.device_at(spot, Form::STORED).unwrap_or(element),
                _ => element,
            };
            let missing = |def: &DomainDef| def.device_like(&of_stored) == Err(0);
            let stored = stored.filter(|stored| !(open && leaving.is_some() && missing(stored)));
            let kept = stored.as_deref().map(|def| self.stored_without(def, &of_stored)).transpose()?;
            let Some((alias, _)) = leaving else {
                return self.put_configurations(None, kept, Update::Whole).await;
            };
            self.unplug(&alias, kept.is_some().then_some(of_stored), patience).await?;
            fail_point::reached();
            self.has_let_go(&alias).await
        })
        .await
    }

    /// Asks the guest, and waits for it. `stored`: the device that then goes from what is stored, too, whenever that is.
    async fn unplug(self: &Arc<Self>, alias: &str, stored: Option<Element>, patience: Duration) -> Result<()> {
        let guest = self.guest()?;
        let disk = guest.live.devices.disks.iter().find(|disk| disk.info.alias() == Some(alias));
        disk.map_or(Ok(()), |disk| lock(&self.state).disk_is_not_backed_up(&disk.target.dev))?;
        self.will_go(guest.id, alias, stored).await?;
        fail_point::reached();
        let device = Detachment { def: &guest.live, alias, patience };
        let done = self.driver.detach_device(guest.instance.as_ref(), device).await;
        let Err(error) = done else { return Ok(()) };
        if !matches!(error, DriverError::TimedOut(_)) {
            self.stays(guest.id, alias).await;
        }
        if matches!(error, DriverError::Refused(_)) {
            self.tell_device(DeviceEvent::RemovalFailed { alias: alias.to_owned() });
        }
        Err(Error::from_driver(&self.name(), &format!("unplug '{alias}' from"), error))
    }

    /// The device is no more: it goes from the configurations, and that is told.
    async fn has_let_go(self: &Arc<Self>, alias: &str) -> Result<()> {
        let guest = self.guest()?;
        let live = guest.live.without_devices(|_, element| alias_of(element) == Some(alias));
        let live = live.map_err(Error::ConfigInvalid)?;
        let stored = match (self.stored_that_goes(guest.id, alias), self.stored()?) {
            // Whoever took it out of what is stored meanwhile has done what was wanted.
            (Some(element), Some(def)) => self.stored_without(&def, &element).ok(),
            _ => None,
        };
        let live = Arc::new(live);
        let put = self.put_configurations(Some(live.clone()), stored, Update::Whole).await;
        if put.is_err() {
            // The guest does not have it, whatever cannot be written.
            self.put_configurations(Some(live), None, Update::Whole).await?;
        }
        self.stays(guest.id, alias).await;
        self.tell_device(DeviceEvent::Removed { alias: alias.to_owned() });
        put
    }

    /// The hypervisor says that a device has gone, which nobody waits for.
    pub(super) async fn device_has_gone(self: Arc<Self>, id: u32, alias: String) {
        let has_it = |domain: &Domain| {
            let guest = domain.guest().ok().filter(|guest| guest.id == id);
            guest.filter(|guest| guest.live.devices.infos().iter().any(|(info, _)| info.alias() == Some(&alias)))
        };
        if has_it(&self).is_none() || !self.begins_to_look(id, &alias) {
            return;
        }
        let word = "look after a device that has gone from";
        let turn = loop {
            match self.take_turn(word, &CancellationToken::new()).await {
                Ok(turn) => break Some(turn),
                Err(Error::Busy { .. }) if has_it(&self).is_some() => {}
                Err(_) => break None,
            }
        };
        self.has_looked(id, &alias);
        let (Some(_turn), Some(guest)) = (turn, has_it(&self)) else { return };
        let told = match self.driver.is_detached(guest.instance.as_ref(), &guest.live, &alias).await {
            Ok(false) => return,
            Ok(true) => self.has_let_go(&alias).await,
            Err(error) => Err(Error::from_driver(&self.name(), &format!("look after '{alias}' of"), error)),
        };
        match told {
            Ok(()) => tracing::info!(uuid = %self.uuid, name = self.name(), "its guest has let go of '{alias}'"),
            Err(Error::TimedOut(why)) => {
                tracing::warn!(uuid = %self.uuid, name = self.name(), why, "whether it has '{alias}' is seen when it answers")
            }
            Err(error) => {
                tracing::error!(uuid = %self.uuid, name = self.name(), %error, "'{alias}' has gone, and the configurations do not follow")
            }
        }
    }

    /// Tells of a device; of what was done to it in the configurations it is told before.
    pub(super) fn tell_device(&self, event: DeviceEvent) {
        self.shared.events.send(Event::Device(self.uuid, event));
    }

    /// What the hypervisor reports of a device; of an image it knows the node's name alone, which begins with the disk's target.
    pub(super) async fn device_reported(self: &Arc<Self>, event: DeviceEvent) {
        let disk_of = |node: &str| {
            let live = self.live()?;
            let of = |target: &str| node.strip_prefix(target).is_some_and(|rest| rest.starts_with('-'));
            live.devices.disks.iter().map(|disk| &disk.target.dev).find(|target| of(target)).cloned()
        };
        let event = match event {
            DeviceEvent::IoError { target: node, action, reason } => {
                let Some(target) = disk_of(&node) else { return };
                DeviceEvent::IoError { target, action, reason }
            }
            DeviceEvent::WrittenBeyond { target: node, threshold, excess } => {
                let Some(target) = disk_of(&node) else { return };
                DeviceEvent::WrittenBeyond { target, threshold, excess }
            }
            // A guest can say so as often as it likes: that counts once, and if it was asked.
            DeviceEvent::RemovalFailed { alias } => {
                let Some(guest) = self.guest().ok() else { return };
                if !self.stays(guest.id, &alias).await {
                    return;
                }
                DeviceEvent::RemovalFailed { alias }
            }
            other => other,
        };
        self.tell_device(event);
    }

    /// Where the device stands in what runs that an element means, and its name.
    fn leaving(&self, live: &DomainDef, element: &Element) -> Result<(String, DeviceSpot)> {
        let spot = self.spot(live, element)?;
        let there = live.device_at(&spot, Form::LIVE);
        let alias = there.as_ref().and_then(alias_of).map(str::to_owned);
        let alias = alias.ok_or_else(|| {
            let (name, element) = (self.name(), &spot.element);
            Error::OperationUnsupported(format!("domain '{name}': a <{element}> stays as long as the machine runs"))
        })?;
        Ok((alias, spot))
    }

    pub(super) fn stored_without(&self, def: &DomainDef, element: &Element) -> Result<Arc<DomainDef>> {
        let gone = self.spot(def, element)?;
        let without = def.without_devices(|spot, _| *spot == gone);
        Ok(Arc::new(without.map_err(Error::ConfigInvalid)?))
    }

    fn spot(&self, def: &DomainDef, element: &Element) -> Result<DeviceSpot> {
        def.device_like(element).map_err(|count| {
            let (domain, what) = (self.name(), shorten(&element.name));
            match count {
                0 => Error::NoSuchDevice(format!("domain '{domain}' has no such <{what}>")),
                count => Error::OperationInvalid(format!(
                    "domain '{domain}' has {count} <{what}> that are so; say which by its alias or address"
                )),
            }
        })
    }

    /// The element of the device of that name, in what runs or else in what is stored.
    fn named(&self, alias: &str, live: Option<&DomainDef>, stored: Option<&DomainDef>) -> Result<Element> {
        let found = live.or(stored).and_then(|def| def.device_at(&def.spot_of(alias)?, Form::LIVE));
        found.ok_or_else(|| Error::NoSuchDevice(format!("domain '{}' has no device '{}'", self.name(), shorten(alias))))
    }

    /// Whether nobody looks after that device yet: a hypervisor may say as often as it likes that it has gone.
    pub(super) fn begins_to_look(&self, id: u32, alias: &str) -> bool {
        let mut state = lock(&self.state);
        let guest = state.guest.as_mut().filter(|guest| guest.id == id);
        guest.is_some_and(|guest| guest.looked_after.insert(alias.to_owned()))
    }

    pub(super) fn has_looked(&self, id: u32, alias: &str) {
        if let Some(guest) = lock(&self.state).guest.as_mut().filter(|guest| guest.id == id) {
            guest.looked_after.remove(alias);
        }
    }
}

/// The definition with one device more, as the document says it: of a kind that a machine has, and not of another's.
fn with_device(def: &DomainDef, device: &Element) -> Result<DomainDef> {
    let count = |def: &DomainDef| def.devices.infos().len();
    let mut with = def.with_device(device.clone()).map_err(Error::ConfigInvalid)?;
    with.keep_hidden(&[def]).map_err(Error::ConfigInvalid)?;
    if count(&with) > count(def) {
        return Ok(with);
    }
    let (name, what) = (&def.name, shorten(&device.name));
    Err(Error::OperationUnsupported(format!("domain '{name}': a <{what}> is no device that can be plugged in")))
}
