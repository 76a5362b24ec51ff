//! The cables of network cards: plugged in, or pulled out, in what runs, what is stored, or both.

use super::config::Update;
use super::{Affect, Domain};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::verb::{self, Verb};
use std::sync::Arc;
use virt_model::device::Interface;
use virt_model::device::interface::LinkState;
use virt_model::domain::one_device::{alias_of, first_not_in};
use virt_model::domain::{DomainDef, Form};
use virt_model::xml::{Element, shorten};

impl Domain {
    /// Plugs the cable of a card in, or pulls it out. The card is known by its hardware address, its name on the host, or its
    /// alias.
    pub async fn set_link(self: &Arc<Self>, caller: &Caller, card: &str, up: bool, affect: Affect) -> Result<()> {
        self.short(caller, &verb::SET_LINK, self.change_link(&verb::SET_LINK, card, up, affect)).await
    }

    /// Changes a card to what the element says, which may be its link alone.
    pub(super) async fn update_card(&self, device: &Element, affect: Affect) -> Result<()> {
        let (live, stored) = self.affected(&verb::UPDATE_DEVICE, affect)?;
        let def = live.or(stored).ok_or_else(|| self.vanished())?;
        let none = || Error::NoSuchDevice(format!("domain '{}' has no such <interface>, or several", self.name()));
        let mut asked = device.clone();
        let link = asked.take_child("link");
        let spot = def.device_like(&asked).map_err(|_| none())?;
        let there = def.device_at(&spot, Form::LIVE).ok_or_else(none)?;
        // It was found by that, however it is written.
        asked.take_child("mac");
        if let Some(other) = first_not_in(&asked, &there) {
            return Err(Error::OperationUnsupported(format!(
                "domain '{}': of a network card only the link can be updated yet, and {other} is not what it has",
                self.name()
            )));
        }
        let up = match link.as_ref().and_then(|link| link.attr("state")) {
            None | Some("up") => true,
            Some("down") => false,
            Some(other) => {
                let other = shorten(other);
                return Err(Error::InvalidArgument(format!("a link is 'up' or 'down', not '{other}'")));
            }
        };
        let address = there.child("mac").and_then(|mac| mac.attr("address"));
        let card = address.or(alias_of(&there)).ok_or_else(none)?;
        self.change_link(&verb::UPDATE_DEVICE, card, up, affect).await
    }

    async fn change_link(&self, verb: &'static Verb, card: &str, up: bool, affect: Affect) -> Result<()> {
        let (live, stored) = self.affected(verb, affect)?;
        // What is stored knows neither alias nor name: it is the card of that address.
        let running = self.live().and_then(|live| find(&live, card).and_then(|card| Some(card.mac()?.to_string())));
        let changed = |mut def: Arc<DomainDef>, known: &str| {
            let cards = &mut Arc::make_mut(&mut def).devices.interfaces;
            let found = cards.iter_mut().find(|one| one.is_known_as(known)).ok_or_else(|| {
                Error::NoSuchDevice(format!("domain '{}' has no network card '{}'", self.name(), shorten(card)))
            })?;
            match &mut found.link {
                None if up => {}
                link => link.get_or_insert_default().state = if up { LinkState::Up } else { LinkState::Down },
            }
            Ok::<_, Error>(def)
        };
        let live = live.map(|def| changed(def, card)).transpose()?;
        let stored = stored.map(|def| changed(def, running.as_deref().unwrap_or(card))).transpose()?;
        let name = live.as_ref().and_then(|live| find(live, card)?.info.alias().map(str::to_owned));
        let was_up = self.live().and_then(|live| find(&live, card).map(Interface::link_up));
        if let Some(name) = &name {
            let set = self.guest()?.instance.set_link(name, up).await;
            set.map_err(|e| Error::from_driver(&self.name(), verb.word, e))?;
        }
        let put = self.put_configurations(live, stored, Update::Whole).await;
        if let (Err(_), Some(name), Some(was_up)) = (&put, &name, was_up) {
            let back = self.guest()?.instance.set_link(name, was_up).await;
            back.unwrap_or_else(
                |error| tracing::error!(uuid = %self.uuid, %error, "GetXML does not tell the link of '{name}'"),
            );
        }
        put
    }
}

pub(super) fn find<'a>(def: &'a DomainDef, card: &str) -> Option<&'a Interface> {
    def.devices.interfaces.iter().find(|one| one.is_known_as(card))
}
