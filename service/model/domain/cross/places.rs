//! Places that are there: USB companions have a master, devices sit at ports and functions that a guest finds.

use super::{Log, never_if};
use crate::device::controller::ControllerModel;
use crate::device::{AddressKind, Controller, ControllerKind, PciAddress};
use crate::domain::DomainDef;
use crate::domain::value::complain;
use std::collections::{BTreeMap, BTreeSet};

/// Ports of a hub.
const HUB_PORTS: u32 = 8;

pub(super) fn check(def: &DomainDef, log: &mut Log) {
    let of_kind = |kind| def.devices.controllers.iter().filter(move |c| c.kind == kind);
    let usb: Vec<&Controller> = of_kind(ControllerKind::Usb).collect();
    companions(&usb, log);
    functions(def, log);
    ports(def, &usb, log);
    let serials = of_kind(ControllerKind::VirtioSerial).filter_map(|c| Some((c.index?, c.ports?)));
    let serials: BTreeMap<u32, u32> = serials.collect();
    for (info, _) in def.devices.infos() {
        let Some(AddressKind::VirtioSerial(at)) = info.address.as_ref().map(|a| &a.kind) else { continue };
        let count = serials.get(&at.controller);
        if let (Some(count), Some(port), Some(address)) = (count, at.port, &info.address) {
            let message = format!(
                "virtio-serial controller {} has ports 0 to {}: use one of these",
                at.controller,
                count.saturating_sub(1)
            );
            never_if(port >= *count, &address.at.attribute("port"), &message, log);
        }
    }
}

/// A guest looks for further functions of a slot only where the first one says that there are any.
fn functions(def: &DomainDef, log: &mut Log) {
    let all = || def.devices.infos().into_iter().filter_map(|(info, _)| Some((*info.pci()?, info.address.as_ref()?)));
    let slot = |pci: &PciAddress| (pci.domain, pci.bus, pci.slot);
    let alone = all().filter(|(pci, _)| pci.function == 0 && pci.multifunction == Some(false));
    let alone: BTreeSet<_> = alone.map(|(pci, _)| slot(&pci)).collect();
    for (pci, address) in all().filter(|(pci, _)| pci.function > 0 && alone.contains(&slot(pci))) {
        let message = format!("function 0 of slot {} says multifunction='off': say 'on' there, or nothing", pci.slot);
        complain(log, &address.at.attribute("function"), message);
    }
}

fn companions(usb: &[&Controller], log: &mut Log) {
    if usb.iter().any(|c| c.index.is_none()) {
        // They are numbered first.
        return;
    }
    for companion in usb.iter().filter(|c| c.master.is_some()) {
        let index = companion.index();
        let master = usb.iter().any(|c| c.index() == index && c.master.is_none());
        let message = format!(
            "there is no USB controller {index} that it could be the companion of: add <controller type='usb' index='{index}' model='ich9-ehci1'/>"
        );
        never_if(!master, &companion.at, &message, log);
    }
    let off = usb.iter().any(|c| c.model == Some(ControllerModel::None));
    for other in usb.iter().skip(1).filter(|_| off) {
        complain(log, &other.at, "a controller of model='none' says that there is no USB: leave out one of the two");
    }
}

fn ports(def: &DomainDef, usb: &[&Controller], log: &mut Log) {
    let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
    for controller in usb.iter().filter(|c| c.master.is_none() && c.model.is_some()) {
        let Some(index) = controller.index else { continue };
        let count = counts.entry(index).or_default();
        *count = controller.usb_ports().max(*count);
    }
    let seat = |info: &crate::device::DeviceInfo| match &info.address.as_ref()?.kind {
        AddressKind::Usb(usb) => Some((usb.bus, usb.port.clone()?)),
        _ => None,
    };
    let hubs: BTreeSet<(u32, String)> = def.devices.hubs.iter().filter_map(|hub| seat(&hub.info)).collect();
    for (info, _) in def.devices.infos() {
        let (Some((bus, path)), Some(address)) = (seat(info), &info.address) else { continue };
        let place = address.at.attribute("port");
        let (hub, last) = path.rsplit_once('.').map_or((None, &*path), |(hub, last)| (Some(hub), last));
        let number: u32 = last.parse().unwrap_or(0);
        match (hub, counts.get(&bus)) {
            (Some(hub), _) if !hubs.contains(&(bus, hub.to_owned())) => {
                complain(
                    log,
                    &place,
                    format!("there is no hub at port {hub} of USB controller {bus}: add it, or use another port"),
                );
            }
            (Some(_), _) => never_if(
                number > HUB_PORTS,
                &place,
                &format!("a hub has ports 1 to {HUB_PORTS}: use one of these"),
                log,
            ),
            (None, Some(count)) => {
                let message = format!("USB controller {bus} has ports 1 to {count}: use one of these");
                never_if(number > *count, &place, &message, log);
            }
            (None, None) => {}
        }
    }
}
