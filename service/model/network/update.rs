//! Parts of a network changed one at a time: a reservation, a range, a name. The result is a definition like any other, and held
//! to the same.

use super::NetworkDef;
use super::dns::{Dns, DnsHost, Srv, Txt};
use super::forward::ForwardInterface;
use super::ip::{Dhcp, DhcpHost, DhcpRange};
use crate::domain::part::Part;
use crate::domain::value::{Mac, choices};
use crate::xml::{self, Element, Finding, FindingKind, Limits, Place};

choices! {
    /// What is done.
    pub enum Command { Modify = "modify", Delete = "delete", AddFirst = "add-first", AddLast = "add-last", }
}

choices! {
    /// To which part.
    pub enum Section {
        DhcpHost = "ip-dhcp-host", DhcpRange = "ip-dhcp-range", DnsHost = "dns-host", DnsTxt = "dns-txt",
        DnsSrv = "dns-srv", ForwardInterface = "forward-interface", PortGroup = "portgroup",
    }
}

/// One change.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// What is done.
    pub command: Command,
    /// To which part.
    pub section: Section,
    /// Of which `<ip>`, from 0; the first that fits if `None`.
    pub parent: Option<usize>,
    /// The part, as an element.
    pub part: Element,
}

impl Section {
    /// What its elements are called.
    fn element(self) -> &'static str {
        match self {
            Section::DhcpHost | Section::DnsHost => "host",
            Section::DhcpRange => "range",
            Section::DnsTxt => "txt",
            Section::DnsSrv => "srv",
            Section::ForwardInterface => "interface",
            Section::PortGroup => "portgroup",
        }
    }
}

impl Change {
    /// Reads the part. Errors: it is no such element.
    pub fn read(command: Command, section: Section, parent: Option<usize>, text: &str) -> Result<Change, Vec<Finding>> {
        let mut part = xml::read_within(text, &[], Limits::ACCEPTED).map_err(|finding| vec![finding])?;
        if part.name != section.element() {
            let why = format!("<{}> is none of '{section}': <{}> was expected", part.name, section.element());
            return Err(vec![Finding::invalid(&part.at, why)]);
        }
        // What is written here stands in no document yet: the definition that it becomes part of says what is wrong with it.
        part.nodes.retain(|node| node.as_text().is_none_or(|text| !text.trim().is_empty()));
        Ok(Change { command, section, parent, part })
    }
}

impl NetworkDef {
    /// The definition after a change. Errors: what is to be changed is not there, or is there already; or the definition would be
    /// none.
    pub fn changed(&self, change: &Change) -> Result<NetworkDef, Vec<Finding>> {
        let mut def = self.clone();
        let (mut log, part) = (Vec::new(), change.part.clone());
        let done = match change.section {
            Section::DhcpHost => {
                let host = DhcpHost::read(part, &mut log);
                def.dhcp_of(change, host.ip).and_then(|dhcp| alter(&mut dhcp.hosts, host, change.command, is_same_host))
            }
            Section::DhcpRange => {
                let range = DhcpRange::read(part, &mut log);
                def.dhcp_of(change, Some(range.start.0)).and_then(|dhcp| {
                    if change.command == Command::Modify {
                        return Err("a range has nothing to be known by: delete it and add another".to_owned());
                    }
                    alter(&mut dhcp.ranges, range, change.command, |a, b| (a.start, a.end) == (b.start, b.end))
                })
            }
            Section::DnsHost => {
                let host = DnsHost::read(part, &mut log);
                alter(&mut def.dns_mut().hosts, host, change.command, |a, b| a.ip == b.ip)
            }
            Section::DnsTxt => {
                let txt = Txt::read(part, &mut log);
                alter(&mut def.dns_mut().txts, txt, change.command, |a, b| a.name == b.name)
            }
            Section::DnsSrv => {
                let srv = Srv::read(part, &mut log);
                alter(&mut def.dns_mut().srvs, srv, change.command, is_same_service)
            }
            Section::ForwardInterface => {
                let one = ForwardInterface::read(part, &mut log);
                let forward = def.forward.as_mut().ok_or_else(|| "the network has no <forward>".to_owned());
                forward.and_then(|forward| alter(&mut forward.interfaces, one, change.command, |a, b| a.dev == b.dev))
            }
            Section::PortGroup => {
                let group = super::PortGroup::read(part, &mut log);
                alter(&mut def.groups, group, change.command, |a, b| a.name == b.name)
            }
        };
        if let Err(why) = done {
            log.push(Finding::invalid(&change.part.at, why));
        }
        log.retain(|finding| finding.kind == FindingKind::Invalid);
        if !log.is_empty() {
            return Err(log);
        }
        // All rules of a new document hold for what it became.
        NetworkDef::parse(&def.write())
    }

    /// A reservation of that card set, in place of what there is of it.
    pub fn with_host(
        &self,
        mac: Mac,
        address: Option<std::net::IpAddr>,
        name: &str,
    ) -> Result<NetworkDef, Vec<Finding>> {
        let mut def = self.clone();
        let host = DhcpHost {
            mac: Some(mac),
            ip: address,
            name: (!name.is_empty()).then(|| name.to_owned()),
            ..DhcpHost::default()
        };
        let served = def.served_mut().ok_or_else(|| vec![anywhere("the network gives no addresses of IPv4")])?;
        match served.hosts.iter_mut().find(|other| other.mac == Some(mac)) {
            // What else the document says of it stays.
            Some(other) => (other.ip, other.name) = (host.ip, host.name),
            None => served.hosts.push(host),
        }
        NetworkDef::parse(&def.write())
    }

    /// The same without that card's reservation; nothing if there is none.
    pub fn without_host(&self, mac: Mac) -> Option<NetworkDef> {
        let mut def = self.clone();
        let served = def.served_mut()?;
        let before = served.hosts.len();
        served.hosts.retain(|host| host.mac != Some(mac));
        (served.hosts.len() < before).then_some(def)
    }

    fn served_mut(&mut self) -> Option<&mut Dhcp> {
        let ip = self.ips.iter_mut().find(|ip| !ip.is_v6() && ip.dhcp.is_some());
        ip.and_then(|ip| ip.dhcp.as_mut())
    }

    fn dns_mut(&mut self) -> &mut Dns {
        self.dns.get_or_insert_default()
    }

    /// Where ranges and reservations stand that a change is about.
    fn dhcp_of(&mut self, change: &Change, near: Option<std::net::IpAddr>) -> Result<&mut Dhcp, String> {
        let chosen = match (change.parent, near) {
            (Some(number), _) => (number < self.ips.len()).then_some(number),
            (None, Some(near)) => self.ips.iter().position(|ip| ip.net().is_some_and(|net| net.contains(near))),
            (None, None) => self.ips.iter().position(|ip| ip.dhcp.is_some()),
        };
        let none = || match change.parent {
            Some(number) => format!("the network has no <ip> with the number {number}"),
            None => "the network has no <ip> that this belongs to".to_owned(),
        };
        Ok(self.ips[chosen.ok_or_else(none)?].dhcp.get_or_insert_default())
    }
}

fn anywhere(why: &str) -> Finding {
    Finding::invalid(&Place::default(), why)
}

/// Reservations are the same if what they are known by is.
fn is_same_host(a: &DhcpHost, b: &DhcpHost) -> bool {
    let mac = a.mac.is_some() && a.mac == b.mac;
    let id = a.id.is_some() && a.id == b.id;
    if a.mac.is_some() || a.id.is_some() {
        return mac || id;
    }
    a.name.is_some() && a.name == b.name || a.ip.is_some() && a.name.is_none() && a.ip == b.ip
}

fn is_same_service(a: &Srv, b: &Srv) -> bool {
    // What is left out does not tell them apart.
    let agrees = |a: &Option<String>, b: &Option<String>| a.is_none() || a == b;
    (&a.service, &a.protocol) == (&b.service, &b.protocol)
        && agrees(&a.domain, &b.domain)
        && agrees(&a.target, &b.target)
}

fn alter<T: Part>(list: &mut Vec<T>, new: T, command: Command, is_same: fn(&T, &T) -> bool) -> Result<(), String> {
    let mut there = (0..list.len()).filter(|n| is_same(&new, &list[*n]));
    let (found, more) = (there.next(), there.next().is_some());
    match (command, found) {
        (Command::AddFirst | Command::AddLast, Some(_)) => return Err("it is there already: use 'modify'".to_owned()),
        (Command::AddFirst, None) => list.insert(0, new),
        (Command::AddLast, None) => list.push(new),
        (_, None) => return Err("it is not there".to_owned()),
        (_, Some(_)) if more => return Err("several are like this: say more of it".to_owned()),
        (Command::Modify, Some(n)) => list[n] = new,
        (Command::Delete, Some(n)) => drop(list.remove(n)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: &str = "<network><name>n</name><forward/><ip address='10.0.0.1' netmask='255.255.255.0'><dhcp>\
        <range start='10.0.0.2' end='10.0.0.99'/><host mac='52:54:00:00:00:01' ip='10.0.0.200'/></dhcp></ip>\
        <ip family='ipv6' address='fd00::1' prefix='64'/></network>";

    fn change(command: &str, section: &str, text: &str) -> Result<NetworkDef, String> {
        use crate::domain::value::Value;
        let (command, section) = (Command::from_text(command).unwrap(), Section::from_text(section).unwrap());
        let def = NetworkDef::parse(HOME).unwrap();
        let done = Change::read(command, section, None, text).and_then(|change| def.changed(&change));
        done.map_err(|findings| findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    #[test]
    fn parts_come_change_and_go() {
        let def =
            change("add-last", "ip-dhcp-host", "<host mac='52:54:00:00:00:02' name='b' ip='10.0.0.201'/>").unwrap();
        assert_eq!(def.ips[0].dhcp.as_ref().unwrap().hosts.len(), 2);
        let def = change("modify", "ip-dhcp-host", "<host mac='52:54:00:00:00:01' ip='10.0.0.202'/>").unwrap();
        assert_eq!(def.ips[0].dhcp.as_ref().unwrap().hosts[0].ip, Some("10.0.0.202".parse().unwrap()));
        let def = change("delete", "ip-dhcp-host", "<host ip='10.0.0.200'/>").unwrap();
        assert!(def.ips[0].dhcp.as_ref().unwrap().hosts.is_empty());
        let def = change("add-first", "ip-dhcp-range", "<range start='10.0.0.100' end='10.0.0.110'/>").unwrap();
        assert_eq!(
            def.ips[0].dhcp.as_ref().unwrap().ranges[0].end.0,
            "10.0.0.110".parse::<std::net::IpAddr>().unwrap()
        );
        let def = change("add-last", "ip-dhcp-range", "<range start='fd00::100' end='fd00::1ff'/>").unwrap();
        assert_eq!(def.ips[1].dhcp.as_ref().unwrap().ranges.len(), 1, "in the net that it is of");
        let def = change("add-last", "dns-host", "<host ip='10.0.0.7'><hostname>gate</hostname></host>").unwrap();
        assert_eq!(def.dns.unwrap().hosts[0].names, ["gate"]);
        assert!(change("add-last", "dns-txt", "<txt name='a' value='b'/>").is_ok());
        assert!(change("add-last", "dns-srv", "<srv service='ldap' protocol='tcp'/>").is_ok());
        assert!(change("add-last", "portgroup", "<portgroup name='eng'/>").is_ok());
        assert!(change("add-last", "forward-interface", "<interface dev='eth0'/>").is_ok());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let is = |command, section, text, why: &str| {
            let said = change(command, section, text).unwrap_err();
            assert!(said.contains(why), "{said}");
        };
        is("add-last", "ip-dhcp-host", "<host mac='52:54:00:00:00:01' ip='10.0.0.9'/>", "there already");
        is("add-last", "ip-dhcp-host", "<host mac='52:54:00:00:00:03' ip='10.0.0.200'/>", "10.0.0.200 is there twice");
        is("add-last", "ip-dhcp-host", "<host mac='52:54:00:00:00:03' ip='10.1.0.9'/>", "no <ip> that this belongs to");
        is("delete", "ip-dhcp-host", "<host mac='52:54:00:00:00:09'/>", "not there");
        is("modify", "ip-dhcp-range", "<range start='10.0.0.2' end='10.0.0.99'/>", "delete it and add");
        is("add-last", "ip-dhcp-range", "<range start='10.0.0.9' end='10.0.0.12'/>", "overlaps");
        is("add-last", "ip-dhcp-range", "<host/>", "<range> was expected");
        is("add-last", "dns-host", "<host ip='10.0.0.7'/>", "needs a <hostname>");
        is(
            "add-last",
            "dns-host",
            "<host ip='10.0.0.7' colour='red'><hostname>a</hostname></host>",
            "unknown attribute 'colour'",
        );
        is("add-last", "dns-txt", "<txt name='a' value='&#10;dhcp-script=/bin/sh'/>", "one line");
    }

    #[test]
    fn a_reservation_without_xml() {
        let def = NetworkDef::parse(HOME).unwrap();
        let mac = |n| Mac([0x52, 0x54, 0, 0, 0, n]);
        let hosts = |def: &NetworkDef| def.ips[0].dhcp.as_ref().unwrap().hosts.clone();
        let more = def.with_host(mac(2), Some("10.0.0.5".parse().unwrap()), "two").unwrap();
        assert_eq!((hosts(&more).len(), hosts(&more)[1].name.as_deref()), (2, Some("two")));
        let other = more.with_host(mac(2), Some("10.0.0.6".parse().unwrap()), "").unwrap();
        assert_eq!((hosts(&other).len(), hosts(&other)[1].ip), (2, Some("10.0.0.6".parse().unwrap())));
        assert!(other.with_host(mac(3), Some("10.0.0.6".parse().unwrap()), "").is_err());
        for word in ["ignore", "10.0.0.1", "45m"] {
            assert!(def.with_host(mac(3), Some("10.0.0.7".parse().unwrap()), word).is_err(), "{word}");
        }
        assert_eq!(hosts(&other.without_host(mac(2)).unwrap()).len(), 1);
        assert!(other.without_host(mac(9)).is_none());
    }
}
