//! What becomes of each element and attribute of the format: it acts, is kept, or is refused at a start. One list, which
//! `check` and docs/NETWORK-XML.md read.

use super::NetworkDef;
use super::forward::Mode;
use crate::device::hostdev::HostdevDriverName;
use crate::device::interface::{Bandwidth, VLANS, Vlan};
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
    ("bandwidth/@classID", Kept("chosen anew")),
    ("bandwidth/inbound/@floor", Refused("is not supported: the bridge would have to promise it")),
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
    match def.mode() {
        Mode::Macvtap | Mode::Hostdev => check_without_bridge(def, &mut log),
        Mode::Bridge => def.vlan.iter().for_each(|vlan| check_tags(vlan, &mut log)),
        _ => {
            let why = "a bridge of virtd's is the host's as well, who would be in no VLAN of its guests': say <vlan> in a \
                       <portgroup> or <interface>, or name a bridge of your own (<forward mode='bridge'/>)";
            log.extend(def.vlan.iter().map(|vlan| Finding::unsupported(&vlan.at, why)));
        }
    }
    def.bandwidth.iter().for_each(|limits| check_limits(limits, def.mode(), &mut log));
    log.sort_by_key(|finding| (finding.line, finding.column));
    log
}

/// What can be no limit of all guests together.
fn check_limits(limits: &Bandwidth, mode: Mode, log: &mut Vec<Finding>) {
    if !mode.is_ours() {
        let why = "all guests are limited together by the bridge that virtd makes, and this mode has none: say <bandwidth> in a \
                   <portgroup> or <interface>";
        return log.push(Finding::unsupported(&limits.at, why));
    }
    for rate in [&limits.inbound, &limits.outbound].into_iter().flatten() {
        if rate.average.is_none_or(|average| average == 0) {
            log.push(Finding::unsupported(&rate.at, "a limit needs an average above 0"));
        }
    }
}

/// What no bridge has.
fn check_tags(vlan: &Vlan, log: &mut Vec<Finding>) {
    if vlan.tags.is_empty() {
        log.push(Finding::unsupported(&vlan.at, "<vlan> needs a <tag>"));
    }
    for tag in vlan.tags.iter().filter(|tag| !VLANS.contains(&tag.id)) {
        log.push(Finding::unsupported(&tag.at.attribute("id"), "VLANs are 1 to 4094"));
    }
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
    for vlan in def.groups.iter().filter_map(|group| group.vlan.as_ref()).chain(&def.vlan) {
        if !is_hostdev {
            refuse(
                &vlan.at,
                "a device of the host's is in its VLAN for all: make one of the VLAN (ip link add … type vlan)",
            );
        } else if vlan.is_trunk() || vlan.tags.len() != 1 || !VLANS.contains(&vlan.tags[0].id) {
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
