//! What becomes of each element and attribute of the format: it acts, is kept, or is refused at a start. One list, which
//! `check` and docs/NETWORK-XML.md read.

use super::NetworkDef;
use super::forward::Mode;
use crate::device::hostdev::HostdevDriverName;
use crate::xml::{Element, Finding, Place};

/// What becomes of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Something is done about it.
    Acts,
    /// It is stored and shown, and asks for nothing; the text says why.
    Kept(&'static str),
    /// A start is refused; the text completes "<vlan> …".
    Refused(&'static str),
}

use Standing::{Acts, Kept, Refused};

/// What does not act, by its path; what is not listed is as what it is in.
const TABLE: &[(&str, Standing)] = &[
    ("@connections", Kept("counted anew")),
    ("@ipv6", Kept("guests are in one bridge, and no packet between them is looked at")),
    ("@trustGuestRxFilters", Refused("is not supported: the host's cards are told no addresses of guests'")),
    ("title", Kept("for people")),
    ("description", Kept("for people")),
    ("metadata", Kept("for other programs")),
    ("forward/driver/@model", Refused("is not supported: a card is handed over by the kernel's vfio-pci")),
    ("forward/interface/@connections", Kept("counted anew")),
    ("bridge/@macTableManager", Refused("is not supported: the kernel keeps the table")),
    ("domain/@register", Refused("is not supported: the host's resolver is told of no network")),
    ("vlan", Refused("is not supported: the bridge would have to filter; say <vlan> in the machine's <interface>")),
    ("bandwidth", Refused("is not supported for all guests together; say <bandwidth> in a <portgroup> or <interface>")),
    ("virtualport", Refused("is not supported: the bridge is the kernel's")),
    ("portgroup/@trustGuestRxFilters", Refused("is not supported: the host's cards are told no addresses of guests'")),
    ("portgroup/virtualport", Refused("is not supported: the bridge is the kernel's")),
    ("portgroup/bandwidth/@classID", Kept("chosen anew")),
    ("portgroup/bandwidth/inbound/@floor", Refused("is not supported: the bridge would have to promise it")),
    ("dnsmasq:options", Refused("is not supported: raw options could name any program of the host's")),
];

/// What becomes of the element or attribute at that path, e.g. `forward/nat/@ipv6`; the root's own are `@ipv6`.
pub fn standing(path: &str) -> Standing {
    let is_in = |of: &str| path == of || path.strip_prefix(of).is_some_and(|rest| rest.starts_with('/'));
    TABLE.iter().find(|(of, _)| is_in(of)).map_or(Acts, |(_, standing)| *standing)
}

/// Everything that keeps a definition from being started by virtd, whatever the host, in document order.
pub fn check(def: &NetworkDef) -> Vec<Finding> {
    let mut log = Vec::new();
    walk(&def.tree(), "", &mut log);
    if def.mode().has_no_bridge() {
        check_without_bridge(def, &mut log);
    }
    log.sort_by_key(|finding| (finding.line, finding.column));
    log
}

/// What a network cannot say of cards on devices of the host's, or of cards that are such devices.
fn check_without_bridge(def: &NetworkDef, log: &mut Vec<Finding>) {
    let is_hostdev = def.mode() == Mode::Hostdev;
    let mut refuse = |at: &Place, why: &str| log.push(Finding::unsupported(at, why));
    let driver = def.forward.as_ref().and_then(|forward| forward.driver.as_ref());
    if let Some(driver) = driver.filter(|driver| driver.name.is_some_and(|name| name != HostdevDriverName::Vfio)) {
        refuse(&driver.at.attribute("name"), "a card is handed over by vfio: leave the name out");
    }
    if let Some(port) = def.port.as_ref().filter(|port| port.isolated == Some(true)) {
        refuse(&port.at.attribute("isolated"), "ports are a bridge's: cards of mode='private' do not see each other");
    }
    for vlan in def.groups.iter().filter_map(|group| group.vlan.as_ref()) {
        if !is_hostdev {
            refuse(
                &vlan.at,
                "a device of the host's is in its VLAN for all: make one of the VLAN (ip link add … type vlan)",
            );
        } else if vlan.is_trunk() || vlan.tags.len() != 1 || !(1..=4094).contains(&vlan.tags[0].id) {
            refuse(&vlan.at, "a card of the host's has one VLAN tag, from 1 to 4094, and is no trunk");
        }
    }
    for limits in def.groups.iter().filter_map(|group| group.bandwidth.as_ref()).filter(|_| is_hostdev) {
        refuse(&limits.at, "what passes a card of the host's does not pass the host's kernel, which cannot limit it");
    }
}

fn walk(element: &Element, path: &str, log: &mut Vec<Finding>) {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
    let place = if element.at.is_known() { &element.at } else { &element.origin };
    for attribute in element.attributes.iter().filter(|attribute| !attribute.name.starts_with("xmlns:")) {
        if let Refused(why) = standing(&below(&format!("@{}", attribute.name))) {
            log.push(Finding::unsupported(&place.attribute(&attribute.name), format!("'{}' {why}", attribute.name)));
        }
    }
    for child in element.elements() {
        let path = below(&child.name);
        match standing(&path) {
            Refused(why) => {
                log.push(Finding::unsupported(&child.place_below(place), format!("<{}> {why}", child.name)));
            }
            Acts => walk(child, &path, log),
            Kept(_) => {}
        }
    }
}
