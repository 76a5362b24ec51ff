//! `NetworkDef`: what a network's XML says.
//!
//! ```text
//!  text ──xml::read──▶ tree ──Format──▶ tree ──Part::read──▶ NetworkDef ──checks──▶ findings, or the definition
//!  text ◀─xml write─── tree ◀─Format─── tree ◀─Part::write── NetworkDef
//! ```
//!
//! `format.txt` knows every name and the order of output; `standing` says what becomes of each.

pub mod address;
pub mod bridge;
mod checks;
pub mod dns;
pub mod forward;
pub mod ip;
mod names;
mod plugged;
pub mod standing;
pub mod update;

pub use names::is_host_name;

use crate::device::interface::{Bandwidth, Vlan};
use crate::domain::format::Format;
use crate::domain::metadata::Metadata;
use crate::domain::part::{Part, element};
use crate::domain::value::{Mac, complain};
use crate::xml::{self, Element, Finding, FindingKind, Limits};
use address::Net;
use bridge::{NetworkBridge, NetworkMac, NetworkMtu, NetworkPort, PortGroup};
use dns::{Dns, DnsDomain};
use forward::Forward;
use ip::{NetworkIp, Route};
use std::sync::LazyLock;
use uuid::Uuid;

static FORMAT: LazyLock<Format> = LazyLock::new(|| Format::read(include_str!("format.txt")));

/// The one namespace beside the format's own, and the prefix that stands for it.
const DNSMASQ: (&str, &str) = ("xmlns:dnsmasq", "http://libvirt.org/schemas/network/dnsmasq/1.0");

/// The most elements that a network has: reservations, names. Whoever may read may have a document of so many worked through.
pub const MAX_ELEMENTS: usize = 8192;

/// Where what others have written is kept as they wrote it.
const VERBATIM: &[(&str, &str)] = &[("network", "metadata")];

element! {
    /// A network's configuration.
    pub struct NetworkDef {
        /// Runtime: how many guests are in it.
        attr "connections" => connections: Option<u32>,
        /// Guests reach each other by IPv6, also where the host has no such address there.
        yes_no "ipv6" => ipv6: Option<bool>,
        /// Guests may change their hardware addresses.
        yes_no "trustGuestRxFilters" => trust_filters: Option<bool>,
        /// `<name>`
        own "name" => name: String,
        /// `<uuid>`, made up when the document has none.
        own "uuid" => uuid: Uuid,
        /// `<title>`
        leaf "title" => title: Option<String>,
        /// `<description>`
        leaf "description" => description: Option<String>,
        /// `<metadata>`
        child "metadata" => metadata: Option<Metadata>,
        /// `<forward>`; none: guests reach each other and the host.
        child "forward" => forward: Option<Forward>,
        /// `<bridge>`
        child "bridge" => bridge: Option<NetworkBridge>,
        /// `<mtu>`
        child "mtu" => mtu: Option<NetworkMtu>,
        /// `<mac>`
        child "mac" => mac: Option<NetworkMac>,
        /// `<domain>`
        child "domain" => domain: Option<DnsDomain>,
        /// `<dns>`
        child "dns" => dns: Option<Dns>,
        /// `<vlan>`
        child "vlan" => vlan: Option<Vlan>,
        /// `<bandwidth>`
        child "bandwidth" => bandwidth: Option<Bandwidth>,
        /// `<port>`
        child "port" => port: Option<NetworkPort>,
        /// `<ip>`
        children "ip" => ips: Vec<NetworkIp>,
        /// `<route>`
        children "route" => routes: Vec<Route>,
        /// `<portgroup>`
        children "portgroup" => groups: Vec<PortGroup>,
    }
}

/// Every element of the format with its attributes, as [`crate::domain::vocabulary`] has it for machines.
pub fn vocabulary() -> Vec<(String, Vec<String>)> {
    FORMAT.vocabulary("network")
}

impl NetworkDef {
    /// Reads a network document. Everything wrong is reported at once, never an empty list; nothing read is dropped.
    pub fn parse(text: &str) -> Result<NetworkDef, Vec<Finding>> {
        NetworkDef::parse_within(text, Limits::ACCEPTED)
    }

    /// The same with other limits: [`Limits::STORED`] for what was accepted once and is one of our own files.
    pub fn parse_within(text: &str, limits: Limits) -> Result<NetworkDef, Vec<Finding>> {
        match NetworkDef::parse_leniently(text, limits) {
            (Some(def), log) if log.iter().all(|finding| finding.kind != FindingKind::Invalid) => Ok(def),
            (_, log) => Err(log),
        }
    }

    /// As much of a network document as can be read, with everything wrong, in document order.
    pub fn parse_leniently(text: &str, limits: Limits) -> (Option<NetworkDef>, Vec<Finding>) {
        let mut root = match xml::read_within(text, VERBATIM, limits) {
            Ok(root) => root,
            Err(finding) => return (None, vec![finding]),
        };
        let mut log = Vec::new();
        if count(&root) > MAX_ELEMENTS {
            complain(&mut log, &root.at, format!("more than {MAX_ELEMENTS} elements"));
            return (None, log);
        }
        check_namespaces(&root, &mut log);
        FORMAT.check_root(&mut root, "network", &mut log);
        if root.name != "network" {
            return (None, log);
        }
        FORMAT.arrange_root(&mut root);
        let mut def = NetworkDef::read(root, &mut log);
        def.connections = None;
        def.forward.iter_mut().flat_map(|forward| &mut forward.interfaces).for_each(|one| one.connections = None);
        if def.uuid.is_nil() {
            def.uuid = Uuid::new_v4();
        }
        let mut seen = Vec::new();
        checks::check(&def, &mut seen);
        crate::xml::add_findings(&mut log, seen);
        (Some(def), log)
    }

    /// Writes it, in libvirt's order and layout.
    pub fn write(&self) -> String {
        self.tree().write()
    }

    /// The same as a tree.
    pub fn tree(&self) -> Element {
        let mut root = Part::write(self, "network");
        FORMAT.arrange_root(&mut root);
        root
    }

    /// Its text, which is known to be read again. Error: what stands in the way of that.
    pub fn write_readable(&self) -> Result<String, String> {
        let text = self.write();
        NetworkDef::parse_within(&text, Limits::STORED).map_err(|findings| xml::unreadable(&findings))?;
        Ok(text)
    }

    /// The host's bridge, if it has a name.
    pub fn bridge_name(&self) -> Option<&str> {
        self.bridge.as_ref()?.name.as_deref().filter(|name| !name.is_empty())
    }

    /// Fills in what a definition leaves open and must never change again: the first name of a bridge that is not taken, and its hardware
    /// address; nothing of one whose bridge is not virtd's.
    pub fn complete(&mut self, is_taken: impl Fn(&str) -> bool) {
        if !self.mode().is_ours() {
            return;
        }
        if self.bridge_name().is_none() {
            let free = (0..10_000).map(|n| format!("virbr{n}")).find(|name| !is_taken(name));
            free.iter().for_each(|name| self.set_bridge_name(name));
        }
        if self.mac.is_none() {
            self.mac.get_or_insert_default().address = Mac::made_up();
        }
    }

    /// Gives the bridge a name.
    pub fn set_bridge_name(&mut self, name: &str) {
        self.bridge.get_or_insert_default().name = Some(name.to_owned());
    }

    /// The host's addresses in it, each with its net.
    pub fn addresses(&self) -> Vec<(std::net::IpAddr, Net)> {
        self.ips.iter().filter_map(|ip| Some((ip.address?, ip.net()?))).collect()
    }

    /// Whether names are answered for.
    pub fn has_dns(&self) -> bool {
        self.dns.as_ref().is_none_or(|dns| dns.enable != Some(false)) && self.ips.iter().any(|ip| ip.address.is_some())
    }

    /// Whether guests are given addresses.
    pub fn has_dhcp(&self) -> bool {
        self.ips.iter().any(|ip| ip.served().is_some())
    }

    /// The group of ports of that name, or the default one where none is named. Error: there is none of that name.
    pub fn group(&self, named: Option<&str>) -> Result<Option<&PortGroup>, String> {
        match named {
            None => Ok(self.groups.iter().find(|group| group.default == Some(true))),
            Some(name) => {
                let found = self.groups.iter().find(|group| group.name == name).map(Some);
                found.ok_or_else(|| format!("the network '{}' has no port group '{}'", self.name, xml::shorten(name)))
            }
        }
    }

    /// Whether it is to be served from a net that is yet to be chosen: the host's first start of it chooses, and that is
    /// stored.
    pub fn awaits_a_net(&self) -> bool {
        self.mode() == forward::Mode::Nat && self.ips.is_empty()
    }

    /// Serves guests from that net of IPv4: the host has its first address, guests the others.
    pub fn take_net(&mut self, net: Net) {
        let (first, last) = (address::number(net.first), address::number(net.last()));
        let at = |number: u128| forward::Address(std::net::IpAddr::from((number as u32).to_be_bytes()));
        let range = ip::DhcpRange { start: at(first + 2), end: at(last - 1), ..ip::DhcpRange::default() };
        let dhcp = ip::Dhcp { ranges: vec![range], ..ip::Dhcp::default() };
        let netmask = Some(std::net::IpAddr::V4(net.netmask()));
        self.ips =
            vec![NetworkIp { address: Some(at(first + 1).0), netmask, dhcp: Some(dhcp), ..NetworkIp::default() }];
    }
}

fn count(element: &Element) -> usize {
    element.elements().map(|child| 1 + count(child)).sum()
}

fn check_namespaces(root: &Element, log: &mut Vec<Finding>) {
    if let Some(uri) = &root.namespace {
        complain(log, &root.at, format!("<{}> is in the namespace '{uri}'; it must be in none", root.name));
    }
    for attribute in root.attributes.iter().filter(|a| a.name == DNSMASQ.0 && a.value != DNSMASQ.1) {
        complain(log, &attribute.place(), format!("the prefix 'dnsmasq' can only stand for '{}'", DNSMASQ.1));
    }
}
