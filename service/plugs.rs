//! Which networks are there, for machines that are to be plugged into them: by name, whoever keeps networks says so.

use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::forward_devices::{Choosing, ForwardDevices};
use crate::lock::lock;
use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use uuid::Uuid;
use virt_model::device::display::ListenKind;
use virt_model::device::interface::{InterfaceKind, Mtu};
use virt_model::device::{Graphics, Interface};
use virt_model::domain::DomainDef;
use virt_model::driver::network::{Lease, PluggedCard};
use virt_model::network::NetworkDef;
use virt_model::xml::shorten;

/// See the module.
#[derive(Default)]
pub(crate) struct Plugs {
    networks: Mutex<HashMap<String, Option<Arc<NetworkDef>>>>,
    /// Who has which address in them.
    leases: Mutex<HashMap<String, Arc<[Lease]>>>,
    /// The cards of machines that run, by the machine, each with its network: as they were held to when they were plugged in.
    cards: Mutex<HashMap<Uuid, Vec<(String, PluggedCard)>>>,
    /// The devices of the host's that networks give to cards.
    pub forward_devices: ForwardDevices,
    starter: OnceLock<Starter>,
}

/// Starts the stored network of that name, for a caller who may.
pub(crate) type Starter = Box<dyn Fn(Caller, String) -> Pin<Box<dyn Future<Output = Result<()>> + Send>> + Send + Sync>;

impl fmt::Debug for Plugs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Plugs")
    }
}

impl Plugs {
    /// There is a network of that name, with what there is of it on the host, if anything, and who has which address in it.
    /// What it has to give to cards is said to `forward_devices`.
    pub fn are(&self, name: &str, live: Option<&Arc<NetworkDef>>, leases: &Arc<[Lease]>) {
        lock(&self.networks).insert(name.to_owned(), live.cloned());
        lock(&self.leases).insert(name.to_owned(), leases.clone());
    }

    /// There is none of that name any more.
    pub fn are_gone(&self, name: &str) {
        lock(&self.networks).remove(name);
        lock(&self.leases).remove(name);
        self.forward_devices.are_gone(name);
    }

    /// From now on networks are started so.
    pub fn started_by(&self, starter: Starter) {
        let _ = self.starter.set(starter);
    }

    /// Starts the networks that a machine names, those that are stored and not active, if the caller may.
    pub async fn start_for(&self, caller: &Caller, def: &DomainDef) -> Result<()> {
        for (named, _) in def.named_networks() {
            let inactive = matches!(lock(&self.networks).get(named), Some(None));
            let Some(starter) = self.starter.get().filter(|_| inactive) else { continue };
            match starter(caller.clone(), named.to_owned()).await {
                // Another machine's start has started it meanwhile.
                Err(Error::OperationInvalid(_)) if self.network(named).is_some() => {}
                started => started?,
            }
        }
        Ok(())
    }

    /// Who has which address in the network of that name, as it was last told.
    pub fn leases(&self, name: &str) -> Arc<[Lease]> {
        lock(&self.leases).get(name).cloned().unwrap_or_default()
    }

    /// What there is on the host of the network of that name.
    pub fn network(&self, name: &str) -> Option<Arc<NetworkDef>> {
        lock(&self.networks).get(name).cloned().flatten()
    }

    /// What runs of a machine now has these cards.
    pub fn has_cards(&self, domain: Uuid, live: Option<&DomainDef>) {
        self.forward_devices.runs(domain, live);
        let cards = live.into_iter().flat_map(|def| &def.devices.interfaces);
        let cards = cards.filter(|card| card.kind == InterfaceKind::Network).filter_map(|card| {
            let network = card.source.as_ref()?.network.clone()?;
            let end = card.target.as_ref()?.dev.clone()?;
            Some((network, PluggedCard { end, isolated: card.is_isolated(), vlan: card.vlan.clone() }))
        });
        let cards: Vec<_> = cards.collect();
        let mut all = lock(&self.cards);
        if cards.is_empty() {
            all.remove(&domain)
        } else {
            all.insert(domain, cards)
        };
    }

    /// All cards that run in that network, each with what it is to be held to now.
    pub fn cards_in(&self, network: &NetworkDef) -> Vec<PluggedCard> {
        let all = lock(&self.cards);
        let cards = all.values().flatten().filter(|(of, _)| *of == network.name).map(|(_, card)| card.clone());
        cards.map(|card| PluggedCard { isolated: is_isolated(network, card.isolated), ..card }).collect()
    }

    /// A network that is there as it is shown: with how many guests' cards are in it, and the devices that it gives to them.
    pub fn shown(&self, network: &NetworkDef) -> NetworkDef {
        let mut shown = network.clone();
        shown.show_devices(&self.forward_devices.of(&network.name));
        let had = self.forward_devices.had_of(&network.name);
        let in_bridge = lock(&self.cards).values().flatten().filter(|(of, _)| *of == network.name).count();
        let number = |count: usize| u32::try_from(count).ok().filter(|count| *count > 0);
        shown.connections = number(in_bridge + had.len());
        for interface in shown.forward.iter_mut().flat_map(|forward| &mut forward.interfaces) {
            let devices = self.forward_devices.of(&network.name);
            let device = devices.iter().find(|device| device.link.as_ref() == Some(&interface.dev));
            interface.connections = device.and_then(|device| number(had.iter().filter(|had| had.is(device)).count()));
        }
        shown
    }

    /// Says in a definition which bridge each card in a network is plugged into, or which device of the host's it is given, and what its network has it held to: whoever
    /// defines the machine need not be who defines the network, and cannot undo what that says. The bridge that an earlier start
    /// said is of no account. So is it with the address on which a display listens. Errors: `NoSuchNetwork`, `OperationInvalid` if it is
    /// not active, or has no address for that; `InUse` if it has no device left.
    pub fn plug(&self, def: &mut Arc<DomainDef>) -> Result<()> {
        if def.named_networks().next().is_none() {
            return Ok(());
        }
        let name = def.name.clone();
        {
            let mut choosing = self.forward_devices.choosing(def.uuid, &name, Some(def));
            let cards = &mut Arc::make_mut(def).devices.interfaces;
            cards.iter_mut().try_for_each(|card| self.plug_into_its_network(&mut choosing, card))?;
            choosing.keep();
        }
        let devices = &mut Arc::make_mut(def).devices;
        devices.graphics.iter_mut().try_for_each(|display| self.place_display(&name, display))
    }

    /// Says on which address a display listens that listens on a network's: the host's first one there.
    fn place_display(&self, domain: &str, display: &mut Graphics) -> Result<()> {
        for listen in display.listens.iter_mut().filter(|listen| listen.kind == ListenKind::Network) {
            let named = listen.network.clone().unwrap_or_default();
            let network = self.active(domain, "a display that listens on", &named)?;
            let address = network.addresses().first().map(|(address, _)| address.to_string()).ok_or_else(|| {
                Error::OperationInvalid(format!(
                    "domain '{domain}' has a display that listens on network '{}', where the host has no address of virtd's: \
                     name one (<listen type='address' address='…'/>)",
                    shorten(&named)
                ))
            })?;
            listen.address = Some(address);
        }
        if let Some(first) = display.listens.first().filter(|listen| listen.kind == ListenKind::Network) {
            display.listen = first.address.clone();
        }
        Ok(())
    }

    /// What there is on the host of a network of which a machine has `what`.
    fn active(&self, domain: &str, what: &str, named: &str) -> Result<Arc<NetworkDef>> {
        match lock(&self.networks).get(named) {
            Some(Some(network)) => Ok(network.clone()),
            Some(None) => Err(Error::OperationInvalid(format!(
                "domain '{domain}' has {what} network '{named}', which is not active: start it first"
            ))),
            None => Err(Error::NoSuchNetwork { what: "name", value: shorten(named) }),
        }
    }

    /// The same of one more card of a machine that runs, if it is in a network.
    pub fn plug_card(&self, domain: Uuid, name: &str, card: &mut Interface) -> Result<()> {
        let mut choosing = self.forward_devices.choosing(domain, name, None);
        self.plug_into_its_network(&mut choosing, card)?;
        choosing.keep();
        Ok(())
    }

    fn plug_into_its_network(&self, choosing: &mut Choosing<'_>, card: &mut Interface) -> Result<()> {
        let Some(named) = card.network().map(str::to_owned) else { return Ok(()) };
        let network = self.active(choosing.name(), "a card in", &named)?;
        if network.mode().has_no_bridge() {
            choosing.choose(&network, card)?;
        } else {
            card.leave_forward_device();
        }
        let domain = choosing.name();
        let source = card.source.get_or_insert_default();
        source.bridge = network.bridge_name().map(str::to_owned);
        let group = network.group(source.rest.attr("portgroup")).map_err(Error::OperationInvalid)?;
        // Of limits and MTU what the card says itself counts more.
        let limits = group.and_then(|group| group.bandwidth.clone());
        card.bandwidth = card.bandwidth.take().or(limits);
        let vlan = group.and_then(|group| group.vlan.clone()).or_else(|| network.vlan.clone());
        if vlan.is_none() && card.vlan.is_some() && network.groups.iter().any(|group| group.vlan.is_some()) {
            let text = format!(
                "domain '{domain}': network '{}' says who is in which VLAN: leave out <vlan>, and name a port group of it \
                 (<source portgroup='…'>)",
                shorten(&named)
            );
            return Err(Error::OperationInvalid(text));
        }
        card.vlan = vlan.or(card.vlan.take());
        if card.mtu.is_none() {
            card.mtu = network.mtu.as_ref().map(|mtu| Mtu { size: mtu.size, ..Mtu::default() });
        }
        if is_isolated(&network, card.is_isolated()) {
            card.port.get_or_insert_default().isolated = Some(true);
        }
        Ok(())
    }
}

/// Whether a card that is isolated by itself, or not, is so in that network.
fn is_isolated(network: &NetworkDef, by_itself: bool) -> bool {
    by_itself || network.port.as_ref().is_some_and(|port| port.isolated == Some(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugged(plugs: &Plugs, source: &str, more: &str) -> Result<Interface> {
        let card = format!("<interface type='network'><source network='home'{source}/>{more}</interface>");
        let text =
            format!("<domain type='test'><name>web</name><memory>1024</memory><devices>{card}</devices></domain>");
        let mut def = Arc::new(DomainDef::parse(&text).expect("a domain"));
        plugs.plug(&mut def).map(|()| def.devices.interfaces[0].clone())
    }

    #[test]
    fn a_display_listens_on_its_networks_address() {
        let plugs = Plugs::default();
        let listens = |form: &str| {
            let display = "<graphics type='vnc'><listen type='network' network='home' address='192.0.2.1'/></graphics>";
            let text = format!(
                "<domain type='test'><name>web</name><memory>1024</memory><devices>{display}</devices></domain>"
            );
            let mut def = Arc::new(DomainDef::parse(&text).expect("a domain"));
            plugs.are("home", Some(&Arc::new(NetworkDef::parse(form).expect("a network"))), &Arc::default());
            plugs.plug(&mut def).map(|()| def.devices.graphics[0].clone())
        };
        let network = "<network><name>home</name><bridge name='virbr7'/><ip address='10.0.0.1' prefix='24'/></network>";
        let display = listens(network).expect("placed");
        assert_eq!(display.listens[0].address.as_deref(), Some("10.0.0.1"), "an earlier address is forgotten");
        assert_eq!(
            (display.listen.as_deref(), display.listens[0].network.as_deref()),
            (Some("10.0.0.1"), Some("home"))
        );
        let none = listens("<network><name>home</name><forward mode='bridge'/><bridge name='br0'/></network>");
        assert!(none.unwrap_err().to_string().contains("no address of virtd's"));
    }

    #[test]
    fn a_card_is_plugged_into_its_network_and_held_to_what_that_says() {
        let plugs = Plugs::default();
        assert!(matches!(plugged(&plugs, "", ""), Err(Error::NoSuchNetwork { value, .. }) if value == "home"));
        plugs.are("home", None, &Arc::default());
        assert!(matches!(plugged(&plugs, "", ""), Err(Error::OperationInvalid(text)) if text.contains("not active")));
        let network = NetworkDef::parse(
            "<network><name>home</name><bridge name='virbr7'/><mtu size='9000'/><port isolated='yes'/>\
             <portgroup name='slow'><bandwidth><inbound average='10'/></bandwidth></portgroup>\
             <portgroup name='office'><vlan><tag id='42'/></vlan></portgroup></network>",
        );
        let network = Arc::new(network.expect("a network"));
        plugs.are("home", Some(&network), &Arc::default());
        let card = plugged(&plugs, "", "").expect("plugged");
        assert_eq!(card.bridge(), Some("virbr7"));
        assert_eq!(card.mtu.map(|mtu| mtu.size), Some(9000));
        assert_eq!(card.port.and_then(|port| port.isolated), Some(true));
        assert!(card.bandwidth.is_none());
        let inbound = |card: Interface| card.bandwidth.and_then(|limits| limits.inbound).and_then(|rate| rate.average);
        let slow = plugged(&plugs, " bridge='virbr3' portgroup='slow'", "").expect("plugged");
        assert_eq!(
            (slow.bridge(), inbound(slow.clone())),
            (Some("virbr7"), Some(10)),
            "an earlier bridge is forgotten"
        );
        // Whoever owns the machine does not get round what the network says.
        let bold = plugged(&plugs, " portgroup='office'", "<vlan><tag id='7'/></vlan><port isolated='no'/>");
        let bold = bold.expect("plugged");
        let refused = plugged(&plugs, "", "<vlan><tag id='7'/></vlan>").unwrap_err().to_string();
        assert!(refused.contains("name a port group"), "{refused}");
        let vlans: Vec<u16> = bold.vlan.iter().flat_map(|vlan| &vlan.tags).map(|tag| tag.id).collect();
        assert!(bold.is_isolated() && vlans == [42], "{vlans:?}");
        let of_its_own = "<target dev='tap7'/>";
        let text = format!(
            "<domain type='test'><name>web</name><memory>1024</memory><devices><interface type='network'>\
             <source network='home'/>{of_its_own}</interface></devices></domain>"
        );
        plugs.has_cards(Uuid::from_u128(7), Some(&DomainDef::parse(&text).expect("a domain")));
        let card = PluggedCard { end: "tap7".to_owned(), isolated: true, vlan: None };
        assert_eq!(
            plugs.cards_in(&network),
            std::slice::from_ref(&card),
            "one that was not isolated is when it is plugged in again, if the network says so by then"
        );
        let open = NetworkDef { port: None, ..NetworkDef::clone(&network) };
        assert_eq!(plugs.cards_in(&open), [PluggedCard { isolated: false, ..card }]);
        let own =
            plugged(&plugs, " portgroup='slow'", "<bandwidth><inbound average='7'/></bandwidth><mtu size='1400'/>");
        let own = own.expect("plugged");
        assert_eq!((own.mtu.as_ref().map(|mtu| mtu.size), inbound(own)), (Some(1400), Some(7)));
        let refused = plugged(&plugs, " portgroup='fast'", "").unwrap_err();
        assert!(
            matches!(&refused, Error::OperationInvalid(text) if text.contains("no port group 'fast'")),
            "{refused}"
        );
        let whole = NetworkDef::parse(
            "<network><name>home</name><forward mode='bridge'/><bridge name='br0'/><vlan><tag id='9'/></vlan>\
             <portgroup name='office'><vlan><tag id='42'/></vlan></portgroup></network>",
        );
        plugs.are("home", Some(&Arc::new(whole.expect("a network"))), &Arc::default());
        let vlan = |source: &str| plugged(&plugs, source, "<vlan><tag id='7'/></vlan>").expect("plugged").vlan;
        let tags = |source: &str| vlan(source).iter().flat_map(|vlan| &vlan.tags).map(|tag| tag.id).collect::<Vec<_>>();
        assert_eq!(
            (tags(""), tags(" portgroup='office'")),
            (vec![9], vec![42]),
            "the network's, and its group's before it"
        );
        plugs.are_gone("home");
        assert!(matches!(plugged(&plugs, "", ""), Err(Error::NoSuchNetwork { .. })));
    }
}
