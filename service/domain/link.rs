//! The cables of network cards: plugged in, or pulled out, in what runs, what is stored, or both.

use super::{Affect, Domain};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::verb;
use std::sync::Arc;
use virt_model::device::Interface;
use virt_model::device::interface::LinkState;
use virt_model::domain::DomainDef;
use virt_model::driver::Adjustment;
use virt_model::xml::shorten;

impl Domain {
    /// Plugs the cable of a card in, or pulls it out. The card is known by its hardware address, its name on the host, or its
    /// alias.
    pub async fn set_link(self: &Arc<Self>, caller: &Caller, card: &str, up: bool, affect: Affect) -> Result<()> {
        self.adjust(caller, &verb::SET_LINK, affect, Adjustment::Link(card.to_owned()), |def, runs| {
            let running = self.live().filter(|_| !runs);
            set_link(find_mut(def, &known_by(card, running.as_deref()))?, up);
            Ok(())
        })
        .await
    }
}

/// Writes down whether its cable is plugged in.
pub(super) fn set_link(card: &mut Interface, up: bool) {
    match &mut card.link {
        None if up => {}
        link => link.get_or_insert_default().state = if up { LinkState::Up } else { LinkState::Down },
    }
}

/// By what another configuration than what runs knows a card: there it has neither alias nor name, but its address.
pub(super) fn known_by(card: &str, running: Option<&DomainDef>) -> String {
    let address = running.and_then(|def| find(def, card).ok()?.mac()).map(|mac| mac.to_string());
    address.unwrap_or_else(|| card.to_owned())
}

pub(super) fn find<'a>(def: &'a DomainDef, card: &str) -> Result<&'a Interface> {
    def.devices.interfaces.iter().find(|one| one.is_known_as(card)).ok_or_else(|| none(def, card))
}

pub(super) fn find_mut<'a>(def: &'a mut DomainDef, card: &str) -> Result<&'a mut Interface> {
    let none = none(def, card);
    def.devices.interfaces.iter_mut().find(|one| one.is_known_as(card)).ok_or(none)
}

fn none(def: &DomainDef, card: &str) -> Error {
    Error::NoSuchDevice(format!("domain '{}' has no network card '{}'", def.name, shorten(card)))
}
