//! Which guest has which device of the host's, for networks that give each card one: it is chosen when a guest comes, is in its
//! definition from then on, and is free again when that runs no more.

use crate::error::{Error, Result};
use crate::lock::lock;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use uuid::Uuid;
use virt_model::device::Interface;
use virt_model::device::interface::{InterfaceKind, SourceMode};
use virt_model::domain::DomainDef;
use virt_model::network::NetworkDef;
use virt_model::network::forward::ForwardDevice;

/// See the module.
#[derive(Default)]
pub(crate) struct ForwardDevices(Mutex<All>);

#[derive(Default)]
struct All {
    guests: HashMap<Uuid, Guest>,
    /// Those that each network has to give, by its name.
    given: HashMap<String, Arc<[ForwardDevice]>>,
}

/// What a guest has.
#[derive(Default)]
struct Guest {
    name: String,
    live: Vec<Had>,
    /// The same of what is on its way into it, while something is.
    coming: Option<Vec<Had>>,
}

/// A device that a guest has.
#[derive(Clone, Debug, PartialEq)]
struct Had {
    device: ForwardDevice,
    /// The network that gave it.
    network: Option<String>,
    /// Nobody else can have it meanwhile.
    alone: bool,
    /// Where in the guest: the address of a card, or the name of a device.
    place: String,
}

impl Had {
    fn all_of(def: &DomainDef) -> Vec<Had> {
        let cards = def.devices.interfaces.iter().filter_map(Had::of_card);
        let others = def.devices.hostdevs.iter().filter_map(|device| {
            let place = device.info.alias().unwrap_or_default().to_owned();
            Some(Had { device: ForwardDevice::pci(device.pci()?), network: None, alone: true, place })
        });
        cards.chain(others).collect()
    }

    fn of_card(card: &Interface) -> Option<Had> {
        let source = card.source.as_ref()?;
        let (device, alone) = match card.kind {
            InterfaceKind::Direct => {
                (ForwardDevice::link(source.dev.as_deref()?), source.mode == Some(SourceMode::Passthrough))
            }
            _ => (ForwardDevice::pci(card.host_card()?), true),
        };
        let place = card.mac().map(|mac| mac.to_string()).unwrap_or_default();
        Some(Had { device, network: card.network().map(str::to_owned), alone, place })
    }
}

impl ForwardDevices {
    /// A network has these to give from now on.
    pub fn are(&self, network: &str, devices: &Arc<[ForwardDevice]>) {
        lock(&self.0).given.insert(network.to_owned(), devices.clone());
    }

    /// A network has gone. Guests have what they have.
    pub fn are_gone(&self, network: &str) {
        lock(&self.0).given.remove(network);
    }

    /// Those that the network of that name has to give.
    pub fn of(&self, network: &str) -> Arc<[ForwardDevice]> {
        lock(&self.0).given.get(network).cloned().unwrap_or_default()
    }

    /// Those that guests that run have of the network of that name, one for each card.
    pub fn had_of(&self, network: &str) -> Vec<ForwardDevice> {
        let all = lock(&self.0);
        let had = all.guests.values().flat_map(|guest| &guest.live);
        had.filter(|had| had.network.as_deref() == Some(network)).map(|had| had.device.clone()).collect()
    }

    /// That runs of a machine now.
    pub fn runs(&self, domain: Uuid, live: Option<&DomainDef>) {
        let had = live.map(Had::all_of).unwrap_or_default();
        let mut all = lock(&self.0);
        if had.is_empty() && !all.guests.contains_key(&domain) {
            return;
        }
        let guest = all.guests.entry(domain).or_default();
        guest.live = had;
        live.iter().for_each(|def| guest.name.clone_from(&def.name));
        all.forget_idle(domain);
    }

    /// That is on its way into a machine: what is chosen for it is its own until it has come, or does not.
    pub fn comes(&self, domain: Uuid, def: &DomainDef) {
        let mut all = lock(&self.0);
        let guest = all.guests.entry(domain).or_default();
        guest.name.clone_from(&def.name);
        guest.coming = Some(Had::all_of(def).into_iter().filter(|had| had.network.is_none()).collect());
    }

    /// Nothing is any more.
    pub fn has_come(&self, domain: Uuid) {
        let mut all = lock(&self.0);
        all.guests.get_mut(&domain).into_iter().for_each(|guest| guest.coming = None);
        all.forget_idle(domain);
    }

    /// The right to choose for a machine, of which nobody else chooses anything meanwhile. It has `all` of `def` beside what it runs
    /// with, and is to be given what its cards have of networks.
    pub fn choosing(&self, domain: Uuid, name: &str, def: Option<&DomainDef>) -> Choosing<'_> {
        let named = def.map(Had::all_of).unwrap_or_default().into_iter().filter(|had| had.network.is_none());
        Choosing { all: lock(&self.0), domain, name: name.to_owned(), chosen: named.collect() }
    }
}

impl All {
    fn forget_idle(&mut self, domain: Uuid) {
        if self.guests.get(&domain).is_some_and(|guest| guest.live.is_empty() && guest.coming.is_none()) {
            self.guests.remove(&domain);
        }
    }
}

/// See [`ForwardDevices::choosing`].
pub(crate) struct Choosing<'a> {
    all: MutexGuard<'a, All>,
    domain: Uuid,
    name: String,
    chosen: Vec<Had>,
}

impl Choosing<'_> {
    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Chooses for a card that is in that network: what it had before, if that is free; else what fewest have.
    /// Error: `InUse` names who has which.
    pub fn choose(&mut self, network: &NetworkDef, card: &mut Interface) -> Result<()> {
        let devices = self.all.given.get(&network.name).cloned().unwrap_or_default();
        let before = card.forward_device();
        let alone = network.gives_devices_alone();
        let free = |device: &&ForwardDevice| match alone {
            true => self.users(device).next().is_none(),
            false => !self.users(device).any(|(_, had)| had.alone),
        };
        let same = devices.iter().find(|device| before.as_ref().is_some_and(|before| device.is(before)));
        let least = || devices.iter().filter(free).min_by_key(|device| self.users(device).count());
        let Some(device) = same.filter(free).or_else(least) else {
            return Err(self.none_is_free(network, &devices));
        };
        card.take_forward_device(network, device);
        self.chosen.extend(Had::of_card(card));
        Ok(())
    }

    /// What was chosen is the machine's, if that is on its way; else it was only looked whether there is something.
    pub fn keep(mut self) {
        let coming = self.all.guests.get_mut(&self.domain).and_then(|guest| guest.coming.as_mut());
        if let Some(coming) = coming {
            *coming = self.chosen;
        }
    }

    /// Who has that device, and how.
    fn users<'s>(&'s self, device: &'s ForwardDevice) -> impl Iterator<Item = (&'s str, &'s Had)> {
        let of_guests = self.all.guests.iter().flat_map(|(domain, guest)| {
            // What was chosen for it before is chosen anew.
            let coming = guest.coming.iter().flatten().filter(|_| *domain != self.domain);
            guest.live.iter().chain(coming).map(|had| (&*guest.name, had))
        });
        let own = self.chosen.iter().map(|had| (&*self.name, had));
        of_guests.chain(own).filter(|(_, had)| had.device.is(device))
    }

    fn none_is_free(&self, network: &NetworkDef, devices: &[ForwardDevice]) -> Error {
        let used = devices.iter().map(|device| {
            let mut by: Vec<String> =
                self.users(device).map(|(name, had)| format!("domain '{name}' ({})", had.place)).collect();
            // One that is coming while it runs has it once.
            by.dedup();
            format!("{device} is used by {}", by.join(" and "))
        });
        let used: Vec<String> = used.collect();
        Error::InUse(format!(
            "domain '{}' has a card in network '{}', none of whose devices is free: {}; stop one of these, or give the network \
             another device",
            self.name,
            network.name,
            used.join(", ")
        ))
    }
}
