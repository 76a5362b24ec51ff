//! What becomes of each element and attribute of the format: it acts, is kept, or is refused at a start. One list, which
//! `check` and docs/NETWORK-XML.md read.

use super::NetworkDef;
use super::forward::{ForwardMode, Mode};
use crate::xml::{Element, Finding};

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
    ("forward/@managed", Refused("is not supported: no mode of virtd's takes cards from their drivers for a network")),
    ("forward/driver", Refused("is not supported: no mode of virtd's takes cards from their drivers for a network")),
    ("forward/pf", Refused("is not supported: name the card in <hostdev> of the machine")),
    ("forward/address", Refused("is not supported: name the card in <hostdev> of the machine")),
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
    let forward = def.forward.as_ref();
    match (def.mode(), forward) {
        (Mode::Macvtap, Some(forward)) => {
            let mode = forward.mode.unwrap_or(ForwardMode::Bridge);
            let why = format!("mode='{mode}' without a bridge is not supported: use <interface type='direct'>");
            log.push(Finding::unsupported(&forward.at.attribute("mode"), why));
        }
        (Mode::Hostdev, Some(forward)) => {
            let why = "mode='hostdev' is not supported: use <interface type='hostdev'>";
            log.push(Finding::unsupported(&forward.at.attribute("mode"), why));
        }
        _ => {}
    }
    log.sort_by_key(|finding| (finding.line, finding.column));
    log
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
