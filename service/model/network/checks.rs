//! What contradicts itself in a network document, or can be on no host. A finding names the place and says what to do.

use super::NetworkDef;
use super::address::{Net, bits, number, prefix_of};
use super::dns::Dns;
use super::forward::{Forward, ForwardMode, Mode};
use super::ip::{Dhcp, DhcpHost, LeaseTime, NetworkIp, Route};
use super::names::{is_device, is_duid, is_host_name, is_line, is_word_of_reservations};
use crate::device::interface::Family;
use crate::domain::value::complain;
use crate::xml::{Finding, Place, shorten};
use std::collections::HashSet;
use std::hash::Hash;
use std::net::IpAddr;

type Log = Vec<Finding>;

/// The longest name.
const MAX_NAME: usize = 255;
/// As many as dnsmasq gives of IPv4, and a bitmap holds.
const MOST_ADDRESSES: u128 = 1 << 16;
/// No host has so many addresses in one bridge; each is held against all others.
const MOST_IPS: usize = 64;
/// As long as the field is that a client reads the name from.
const LONGEST_BOOT_FILE: usize = 127;
/// With quotation marks and what stands before it, a line of dnsmasq's has no more than 1024 bytes: the rest would be another line.
const LONGEST_ROOT: usize = 255;
/// dnsmasq knows no shorter time.
const SHORTEST_LEASE: u64 = 120;

/// Finds all of it, in no order.
pub(super) fn check(def: &NetworkDef, log: &mut Log) {
    check_identity(def, log);
    if let Some(one) = def.ips.get(MOST_IPS) {
        return complain(log, &one.at, format!("more than {MOST_IPS} <ip>"));
    }
    def.forward.iter().for_each(|forward| check_forward(forward, def, log));
    check_bridge(def, log);
    check_served(def, log);
    check_nets(def, log);
    def.ips.iter().for_each(|ip| check_ip(ip, log));
    def.dns.iter().for_each(|dns| check_dns(dns, log));
    if def.mode().is_ours() {
        def.routes.iter().for_each(|route| check_route(route, def, log));
    }
    check_groups(def, log);
}

fn never_if(condition: bool, at: &Place, message: &str, log: &mut Log) {
    if condition {
        complain(log, at, message);
    }
}

/// Reports the second of its kind.
fn once<T: Hash + Eq>(seen: &mut HashSet<T>, key: T, at: &Place, what: impl Fn() -> String, log: &mut Log) {
    if !seen.insert(key) {
        complain(log, at, format!("{} is there twice", what()));
    }
}

fn check_identity(def: &NetworkDef, log: &mut Log) {
    let (at, name) = (def.at.child("name"), &def.name);
    if name.trim().is_empty() {
        complain(log, &at, "a network needs a name");
    } else if name.contains('/') || !is_line(name) || matches!(&**name, "." | "..") {
        complain(log, &at, format!("'{}' cannot be a name: no '/', no control characters", shorten(name)));
    } else if name.len() > MAX_NAME {
        complain(log, &at, format!("the name has {} bytes, more than {MAX_NAME}", name.len()));
    }
    let lines = def.title.as_ref().is_some_and(|title| title.contains('\n'));
    never_if(lines, &def.at.child("title"), "a title is one line", log);
    if let Some(domain) = &def.domain {
        host_name(&domain.name, &domain.at.attribute("name"), "domain", log);
    }
}

fn host_name(name: &str, at: &Place, what: &str, log: &mut Log) {
    if !is_host_name(name) {
        let message = format!("'{}' is no {what} name: letters, digits, '-' and '_', with dots between", shorten(name));
        complain(log, at, message);
    }
}

fn device(name: &str, at: &Place, log: &mut Log) {
    if !is_device(name) {
        complain(log, at, format!("'{}' is no name of a network device: 1 to 15 plain characters", shorten(name)));
    }
}

fn check_forward(forward: &Forward, def: &NetworkDef, log: &mut Log) {
    let (mode, at) = (def.mode(), &forward.at);
    if let Some(dev) = &forward.dev {
        device(dev, &at.attribute("dev"), log);
        let first = forward.interfaces.first().is_some_and(|first| first.dev != *dev);
        never_if(first, &at.attribute("dev"), "the first <interface> is another: leave out 'dev'", log);
    }
    let mut seen = HashSet::new();
    for interface in &forward.interfaces {
        device(&interface.dev, &interface.at.attribute("dev"), log);
        once(&mut seen, &interface.dev, &interface.at, || format!("the interface '{}'", shorten(&interface.dev)), log);
    }
    let devices = def.forward_devices().len();
    match mode {
        Mode::Nat | Mode::Route => {
            never_if(devices > 1, at, "packets of this mode leave by one device, or by any: name one or none", log);
        }
        Mode::Open | Mode::Isolated | Mode::Bridge => {
            never_if(devices > 0, at, "this mode has no device that packets leave by: leave it out", log);
        }
        Mode::Macvtap => {
            let none = devices == 0 && forward.functions.is_empty();
            never_if(none, at, "this mode needs <interface dev='…'/>, or a <bridge>", log);
        }
        Mode::Hostdev => {
            let none = forward.addresses.is_empty() && devices == 0 && forward.functions.is_empty();
            never_if(none, at, "this mode needs cards: <address>, <interface> or <pf>", log);
        }
    }
    let mut seen = HashSet::new();
    for card in &forward.functions {
        device(&card.dev, &card.at.attribute("dev"), log);
        once(&mut seen, &card.dev, &card.at, || format!("the card '{}'", shorten(&card.dev)), log);
        never_if(!mode.has_no_bridge(), &card.at, "<pf> is for modes that give guests devices of the host's", log);
    }
    if let Some(address) = forward.addresses.iter().find(|address| address.pci().is_none()) {
        complain(
            log,
            &address.at,
            "cards are PCI devices: <address type='pci' domain='…' bus='…' slot='…' function='…'/>",
        );
    }
    if mode != Mode::Hostdev {
        forward.driver.iter().for_each(|driver| complain(log, &driver.at, "<driver> is for mode='hostdev'"));
        never_if(forward.managed.is_some(), &at.attribute("managed"), "'managed' is for mode='hostdev'", log);
        if let Some(address) = forward.addresses.first() {
            complain(log, &address.at, "<address> is for mode='hostdev'; mode='nat' has it in <nat>");
        }
    }
    check_nat(forward, mode, log);
}

fn check_nat(forward: &Forward, mode: Mode, log: &mut Log) {
    let Some(nat) = &forward.nat else { return };
    never_if(mode != Mode::Nat, &nat.at, "<nat> is for mode='nat'", log);
    if let Some(second) = nat.addresses.get(1) {
        complain(log, &second.at, "one <address> only: it can be a range");
    }
    if let Some(second) = nat.ports.get(1) {
        complain(log, &second.at, "one <port> only: it is a range");
    }
    for address in &nat.addresses {
        let (start, end) = (address.start.0, address.end.unwrap_or(address.start.0));
        never_if(start.is_ipv6() || end.is_ipv6(), &address.at, "guests are seen by an address of IPv4", log);
        never_if(start.is_unspecified(), &address.at.attribute("start"), "nobody has this address", log);
        never_if(number(start) > number(end), &address.at, "the range ends before it starts", log);
    }
    for port in &nat.ports {
        let wrong = port.start == 0 || port.start > port.end;
        never_if(wrong, &port.at, "ports are from 1 to 65535, and the first is not above the last", log);
    }
}

fn check_bridge(def: &NetworkDef, log: &mut Log) {
    let mode = def.mode();
    if let Some(bridge) = &def.bridge {
        bridge.name.iter().for_each(|name| device(name, &bridge.at.attribute("name"), log));
        let late = bridge.delay.is_some_and(|delay| delay > 30);
        never_if(late, &bridge.at.attribute("delay"), "a bridge listens for at most 30 seconds", log);
        let zone = bridge.zone.as_ref().is_some_and(|zone| !is_host_name(zone));
        never_if(zone, &bridge.at.attribute("zone"), "this is no name of a zone", log);
        never_if(mode.has_no_bridge(), &bridge.at, "this mode has no bridge", log);
        let others = mode == Mode::Bridge && (bridge.stp.is_some() || bridge.delay.is_some() || bridge.zone.is_some());
        never_if(others, &bridge.at, "the bridge is somebody else's: leave out stp, delay and zone", log);
    }
    if let Some(mtu) = &def.mtu {
        let least = if def.ips.iter().any(NetworkIp::is_v6) { 1280 } else { 68 };
        if !(least..=65_535).contains(&mtu.size) {
            complain(log, &mtu.at.attribute("size"), format!("packets have {least} to 65535 bytes"));
        }
    }
    if let Some(mac) = &def.mac {
        let wrong = mac.address.0[0] & 1 == 1 || mac.address.0 == [0; 6];
        never_if(wrong, &mac.at.attribute("address"), "a bridge has the address of a single card", log);
    }
}

/// Of a bridge or of devices of others', virtd serves nothing.
fn check_served(def: &NetworkDef, log: &mut Log) {
    if def.mode().is_ours() {
        let plain = def.forward.as_ref().and_then(|forward| forward.mode) == Some(ForwardMode::Route);
        let none = plain && def.addresses().is_empty();
        never_if(none, &def.at, "mode='route' needs an <ip> with an address", log);
        return;
    }
    let why = "this mode leaves addresses and names to others: leave it out";
    def.ips.iter().for_each(|ip| complain(log, &ip.at, why));
    def.routes.iter().for_each(|route| complain(log, &route.at, why));
    def.dns.iter().for_each(|dns| complain(log, &dns.at, why));
    def.domain.iter().for_each(|domain| complain(log, &domain.at, why));
    def.mac.iter().for_each(|mac| complain(log, &mac.at, why));
    def.mtu.iter().for_each(|mtu| complain(log, &mtu.at, why));
}

fn check_nets(def: &NetworkDef, log: &mut Log) {
    for (n, ip) in def.ips.iter().enumerate() {
        let Some(net) = ip.net() else { continue };
        // One such complaint says enough: with all of them a document of some size would have millions.
        if let Some(other) = def.ips[..n].iter().filter_map(NetworkIp::net).find(|other| other.overlaps(&net)) {
            complain(log, &ip.at, format!("the net {net} overlaps with {other}"));
        }
    }
    for v6 in [false, true] {
        let mut served = def.ips.iter().filter(|ip| ip.is_v6() == v6 && ip.dhcp.is_some());
        if let Some(second) = served.nth(1).and_then(|ip| ip.dhcp.as_ref()) {
            let kind = if v6 { "IPv6" } else { "IPv4" };
            complain(log, &second.at, format!("a second <dhcp> of {kind}: a network has one"));
        }
    }
    let mut tftp = def.ips.iter().filter_map(|ip| ip.tftp.as_ref());
    if let Some(second) = tftp.nth(1) {
        complain(log, &second.at, "a second <tftp>: a network has one");
    }
}

fn check_ip(ip: &NetworkIp, log: &mut Log) {
    let at = &ip.at;
    let Some(address) = ip.address else {
        let needs = ip.dhcp.is_some() || ip.local_ptr.is_some() || ip.prefix.is_some() || ip.netmask.is_some();
        never_if(needs, at, "<ip> needs the attribute 'address'", log);
        return;
    };
    check_family(address, ip.family, at, log);
    check_prefix(address, ip.prefix, ip.netmask, at, log);
    let (net, place) = (Net::of(address, ip.prefix_bits()), at.attribute("address"));
    let nobodys = address.is_unspecified() || address.is_multicast() || address.is_loopback();
    never_if(nobodys || !net.can_be_a_hosts(address), &place, &format!("no host in {net} can have this address"), log);
    if ip.local_ptr == Some(true) {
        let digit = if address.is_ipv4() { 8 } else { 4 };
        let odd = !ip.prefix_bits().is_multiple_of(digit) || ip.prefix_bits() == 0;
        let message = format!("localPtr needs a prefix that is a multiple of {digit}");
        never_if(odd, &at.attribute("localPtr"), &message, log);
    }
    if let Some(tftp) = &ip.tftp {
        never_if(address.is_ipv6(), &tftp.at, "<tftp> is for IPv4", log);
        let path = tftp.root.starts_with('/') && is_line(&tftp.root) && tftp.root.len() <= LONGEST_ROOT;
        never_if(!path, &tftp.at.attribute("root"), "this is no path from '/' of at most 255 bytes", log);
    }
    ip.dhcp.iter().for_each(|dhcp| check_dhcp(dhcp, address, net, log));
}

fn check_family(address: IpAddr, family: Option<Family>, at: &Place, log: &mut Log) {
    match (family, address) {
        (Some(Family::Ipv6), IpAddr::V4(_)) => complain(log, at, format!("{address} is an address of IPv4")),
        (None | Some(Family::Ipv4), IpAddr::V6(_)) => {
            complain(log, at, format!("{address} is an address of IPv6: say family='ipv6'"));
        }
        _ => {}
    }
}

fn check_prefix(address: IpAddr, prefix: Option<u8>, netmask: Option<IpAddr>, at: &Place, log: &mut Log) {
    never_if(prefix.is_some() && netmask.is_some(), at, "either 'prefix' or 'netmask'", log);
    if prefix.is_some_and(|prefix| prefix > bits(address)) {
        complain(log, &at.attribute("prefix"), format!("such addresses have {} bits", bits(address)));
    }
    if let Some(netmask) = netmask {
        let wrong = address.is_ipv6() || prefix_of(netmask).is_none();
        never_if(wrong, &at.attribute("netmask"), "this is no mask of IPv4; of IPv6 say 'prefix'", log);
    }
}

fn check_dhcp(dhcp: &Dhcp, own: IpAddr, net: Net, log: &mut Log) {
    let mut spans: Vec<(u128, u128)> = Vec::new();
    for range in &dhcp.ranges {
        let (start, end) = (range.start.0, range.end.0);
        for (name, address) in [("start", start), ("end", end)] {
            let message = format!("no guest in {net} can have this address");
            never_if(!net.can_be_a_hosts(address), &range.at.attribute(name), &message, log);
        }
        let (first, last) = (number(start), number(end));
        if first > last {
            complain(log, &range.at, "the range ends before it starts");
            continue;
        }
        never_if(
            own.is_ipv4() && last - first >= MOST_ADDRESSES,
            &range.at,
            "a range has at most 65536 addresses",
            log,
        );
        let mine = number(own);
        never_if(first == mine && last == mine, &range.at, "the host itself has this address", log);
        if spans.iter().any(|(a, b)| first <= *b && *a <= last) {
            complain(log, &range.at, "the range overlaps with one before");
        }
        spans.push((first, last));
        range.lease.iter().for_each(|lease| check_lease(lease, log));
    }
    check_hosts(dhcp, own, net, log);
    if let Some(bootp) = &dhcp.bootp {
        never_if(own.is_ipv6(), &bootp.at, "<bootp> is for IPv4", log);
        let plain = |text: &str| is_line(text) && !text.contains([',', '"', '\\', '#']) && !text.is_empty();
        let file = plain(&bootp.file) && bootp.file.len() <= LONGEST_BOOT_FILE;
        let message = "this is no name of a file: at most 127 bytes, no comma or quote";
        never_if(!file, &bootp.at.attribute("file"), message, log);
        let server = bootp.server.as_ref().is_some_and(|server| !is_host_name(server));
        never_if(server, &bootp.at.attribute("server"), "this is neither a name nor an address", log);
    }
}

fn check_lease(lease: &LeaseTime, log: &mut Log) {
    let seconds = lease.seconds();
    let wrong = (1..SHORTEST_LEASE).contains(&seconds) || seconds > u64::from(u32::MAX) - 1;
    never_if(wrong, &lease.at, "an address is given for 120 seconds at least, or for ever (0)", log);
}

fn check_hosts(dhcp: &Dhcp, own: IpAddr, net: Net, log: &mut Log) {
    let (mut macs, mut addresses, mut names, mut ids) =
        (HashSet::new(), HashSet::new(), HashSet::new(), HashSet::new());
    for host in &dhcp.hosts {
        check_host(host, own, net, log);
        if let Some(mac) = host.mac {
            once(&mut macs, mac, &host.at.attribute("mac"), || format!("the card {mac}"), log);
        }
        if let Some(ip) = host.ip {
            once(&mut addresses, ip, &host.at.attribute("ip"), || format!("the address {ip}"), log);
        }
        if let Some(name) = &host.name {
            once(&mut names, name, &host.at.attribute("name"), || format!("the name '{}'", shorten(name)), log);
        }
        if let Some(id) = &host.id {
            once(&mut ids, id, &host.at.attribute("id"), || format!("the identifier '{}'", shorten(id)), log);
        }
    }
}

/// One reservation.
fn check_host(host: &DhcpHost, own: IpAddr, net: Net, log: &mut Log) {
    let at = &host.at;
    if let Some(name) = &host.name {
        host_name(name, &at.attribute("name"), "host", log);
        let word = is_host_name(name) && is_word_of_reservations(name);
        let message =
            format!("'{}' is a time, an address or a word of dnsmasq's, which is not taken as a name", shorten(name));
        never_if(word, &at.attribute("name"), &message, log);
    }
    host.lease.iter().for_each(|lease| check_lease(lease, log));
    if own.is_ipv6() {
        never_if(host.mac.is_some(), &at.attribute("mac"), "guests of IPv6 are known by 'id' or 'name'", log);
        never_if(host.id.is_none() && host.name.is_none(), at, "a reservation needs 'id' or 'name'", log);
        let wrong = host.id.as_ref().is_some_and(|id| !is_duid(id));
        never_if(wrong, &at.attribute("id"), "an identifier is hexadecimal digits with ':' between pairs", log);
    } else {
        never_if(host.id.is_some(), &at.attribute("id"), "'id' is for IPv6; say 'mac' or 'name'", log);
        never_if(host.mac.is_none() && host.name.is_none(), at, "a reservation needs 'mac' or 'name'", log);
        let wrong = host.mac.is_some_and(|mac| mac.0[0] & 1 == 1);
        never_if(wrong, &at.attribute("mac"), "this is the address of many cards, not of one", log);
    }
    match host.ip {
        Some(ip) => {
            let message = format!("no guest in {net} can have this address");
            never_if(!net.can_be_a_hosts(ip) || ip == own, &at.attribute("ip"), &message, log);
        }
        None => never_if(host.name.is_none(), at, "a reservation needs 'ip' or 'name'", log),
    }
}

fn check_dns(dns: &Dns, log: &mut Log) {
    for forwarder in &dns.forwarders {
        let at = &forwarder.at;
        never_if(
            forwarder.domain.is_none() && forwarder.addr.is_none(),
            at,
            "a <forwarder> needs 'addr' or 'domain'",
            log,
        );
        never_if(forwarder.port.is_some() && forwarder.addr.is_none(), at, "a port needs an address", log);
        never_if(forwarder.port == Some(0), &at.attribute("port"), "ports are from 1 to 65535", log);
        forwarder.domain.iter().for_each(|name| host_name(name, &at.attribute("domain"), "domain", log));
    }
    for txt in &dns.txts {
        host_name(&txt.name, &txt.at.attribute("name"), "host", log);
        let fits = txt.value.as_ref().is_none_or(|value| is_line(value) && value.len() <= 255);
        never_if(!fits, &txt.at.attribute("value"), "a text is one line of at most 255 bytes", log);
    }
    for srv in &dns.srvs {
        check_srv(srv, log);
    }
    let mut seen = HashSet::new();
    for host in &dns.hosts {
        match host.ip {
            Some(ip) => once(&mut seen, ip, &host.at, || format!("the address {ip}"), log),
            None => complain(log, &host.at, "<host> needs the attribute 'ip'"),
        }
        never_if(host.names.is_empty(), &host.at, "<host> needs a <hostname>", log);
        host.names.iter().for_each(|name| host_name(name, &host.at.child("hostname"), "host", log));
    }
}

fn check_srv(srv: &super::dns::Srv, log: &mut Log) {
    let at = &srv.at;
    let label = |text: &str| is_host_name(text) && !text.contains('.');
    never_if(!label(&srv.service), &at.attribute("service"), "this is no name of a service", log);
    never_if(!label(&srv.protocol), &at.attribute("protocol"), "this is no protocol: say tcp or udp", log);
    srv.domain.iter().for_each(|name| host_name(name, &at.attribute("domain"), "domain", log));
    match &srv.target {
        // The root is nobody: there is no such service.
        Some(target) if target != "." => host_name(target, &at.attribute("target"), "host", log),
        Some(_) => {}
        None => {
            let more = srv.port.is_some() || srv.priority.is_some() || srv.weight.is_some();
            never_if(more, at, "port, priority and weight need a target", log);
        }
    }
    never_if(srv.port == Some(0), &at.attribute("port"), "ports are from 1 to 65535", log);
}

fn check_route(route: &Route, def: &NetworkDef, log: &mut Log) {
    let (at, address, gateway) = (&route.at, route.address.0, route.gateway.0);
    check_family(address, route.family, at, log);
    check_prefix(address, route.prefix, route.netmask, at, log);
    let net = route.net();
    if net.first != address {
        complain(log, &at.attribute("address"), format!("the net that this is in begins with {}", net.first));
    }
    never_if(route.metric == Some(0), &at.attribute("metric"), "metrics count from 1", log);
    if gateway.is_ipv4() != address.is_ipv4() {
        complain(log, &at.attribute("gateway"), format!("{gateway} is an address of another kind"));
    } else if gateway.is_unspecified() {
        complain(log, &at.attribute("gateway"), "nobody has this address");
    } else if !def.addresses().iter().any(|(_, own)| own.can_be_a_hosts(gateway)) {
        complain(log, &at.attribute("gateway"), format!("{gateway} is in no <ip> of this network"));
    }
}

fn check_groups(def: &NetworkDef, log: &mut Log) {
    let (mut names, mut chosen) = (HashSet::new(), HashSet::new());
    for group in &def.groups {
        let at = &group.at;
        never_if(group.name.trim().is_empty() || !is_line(&group.name), at, "a port group needs a name", log);
        once(&mut names, &group.name, at, || format!("the port group '{}'", shorten(&group.name)), log);
        if group.default == Some(true) {
            once(&mut chosen, (), &at.attribute("default"), || "a default port group".to_owned(), log);
        }
    }
    let vlans = def.groups.iter().filter_map(|group| group.vlan.as_ref()).chain(def.vlan.as_ref());
    for tag in vlans.flat_map(|vlan| &vlan.tags) {
        never_if(tag.id > 4094, &tag.at.attribute("id"), "VLANs are from 0 to 4094", log);
    }
}
