//! Which networks a machine names.

use super::DomainDef;
use crate::device::display::ListenKind;

impl DomainDef {
    /// The networks that its cards are in, and those on whose addresses its displays listen, each with where that is said: the address
    /// of the card, or the kind of the display.
    pub fn named_networks(&self) -> impl Iterator<Item = (&str, String)> {
        let cards = self.devices.interfaces.iter().filter_map(|card| {
            let place = card.mac().map(|mac| mac.to_string()).unwrap_or_default();
            Some((card.network()?, place))
        });
        let displays = self.devices.graphics.iter().flat_map(move |display| {
            let networks = display.listens.iter().filter(|listen| listen.kind == ListenKind::Network);
            networks.filter_map(move |listen| Some((listen.network.as_deref()?, display.kind.to_string())))
        });
        cards.chain(displays)
    }
}
