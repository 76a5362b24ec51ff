//! The document of a device that is to be made, `<device>`: a mediated device, or a virtual port of a host of Fibre Channel.

use crate::xml::{self, Element, Finding, Limits, Place, shorten};
use uuid::Uuid;

/// What the document of a device that is there tells, and one that is to be made need not say: it is read and dropped.
const TOLD: [&str; 4] = ["name", "path", "devnode", "driver"];

/// The longest name of a kind of mediated devices, in bytes.
const LONGEST_KIND: usize = 128;

/// A device that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewDevice {
    /// A mediated device.
    Mdev {
        /// The name of the device that it is made of.
        parent: String,
        /// Its kind, which is one file's name.
        kind: String,
        /// Which one it will be; made up where the document does not say.
        uuid: Uuid,
    },
    /// A virtual port.
    Port {
        /// Of which host.
        parent: PortParent,
        /// Its own names.
        names: WideNames,
    },
}

/// World wide names, 16 hexadecimal digits each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WideNames {
    /// Of the node.
    pub node: String,
    /// Of the port.
    pub port: String,
}

/// The host of Fibre Channel that a virtual port is to be of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortParent {
    /// That of this name.
    Named(String),
    /// That with these names.
    With(WideNames),
    /// One on that fabric.
    OnFabric(String),
    /// Any.
    Any,
}

impl NewDevice {
    /// Reads a document; everything wrong is reported at once, and what is not known is wrong.
    pub fn parse(text: &str) -> Result<NewDevice, Vec<Finding>> {
        let root = xml::read_within(text, &[], Limits::ACCEPTED).map_err(|finding| vec![finding])?;
        if root.name != "device" {
            let message = format!("the root is <{}>, and a device's is <device>", shorten(&root.name));
            return Err(vec![Finding::invalid(&root.at, message)]);
        }
        let mut log = Vec::new();
        has_only(&root, &[], &[&TOLD[..], &["parent", "capability"]].concat(), &mut log);
        let new = match root.child("capability").and_then(|about| Some((about, about.attr("type")?))) {
            Some((about, "mdev")) => mdev(&root, about, &mut log),
            Some((about, "scsi_host")) => port(&root, about, &mut log),
            _ => {
                let how = "virtd makes devices with <capability type='mdev'> or <capability type='scsi_host'>";
                log.push(Finding::unsupported(&root.at, how));
                None
            }
        };
        log.sort_by_key(|finding| (finding.line, finding.column));
        new.filter(|_| log.is_empty()).ok_or(log)
    }
}

fn mdev(root: &Element, about: &Element, log: &mut Vec<Finding>) -> Option<NewDevice> {
    has_only(about, &["type"], &["type", "uuid", "attr", "iommuGroup", "parent_addr"], log);
    if let Some(attr) = about.child("attr") {
        log.push(Finding::unsupported(&attr.at, "attributes of mediated devices are not set by virtd: leave them out"));
    }
    let parent = root.child("parent").map(words).filter(|name| !name.is_empty());
    if parent.is_none() {
        log.push(Finding::invalid(
            &root.at,
            "a mediated device needs <parent>, the name of the device that it is made of",
        ));
    }
    root.child("parent").iter().for_each(|parent| has_only(parent, &[], &[], log));
    let kind = about.child("type").and_then(|kind| kind.attr("id")).unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:+".contains(c);
    if kind.is_empty() || kind.len() > LONGEST_KIND || kind.starts_with('.') || !kind.chars().all(plain) {
        let how = "a mediated device needs <type id='…'/>, one of the <mdev_types> of its parent";
        log.push(Finding::invalid(&about.at, how));
    }
    let uuid = match about.child("uuid") {
        None => Some(Uuid::new_v4()),
        Some(said) => {
            let read = Uuid::try_parse(&words(said)).ok().filter(|uuid| !uuid.is_nil());
            if read.is_none() {
                log.push(Finding::invalid(&said.at, format!("'{}' is no UUID", shorten(&words(said)))));
            }
            read
        }
    };
    Some(NewDevice::Mdev { parent: parent?, kind: kind.to_owned(), uuid: uuid? })
}

fn port(root: &Element, about: &Element, log: &mut Vec<Finding>) -> Option<NewDevice> {
    has_only(about, &["type"], &["host", "unique_id", "capability"], log);
    let Some(fibre) = about.elements().find(|inner| inner.attr("type") == Some("fc_host")) else {
        let how = "a virtual port needs <capability type='fc_host'> with <wwnn> and <wwpn>";
        log.push(Finding::invalid(&about.at, how));
        return None;
    };
    has_only(fibre, &["type"], &["wwnn", "wwpn", "fabric_wwn"], log);
    let mut own = |name: &str| {
        let said = fibre.child(name);
        let place = said.map_or(&fibre.at, |said| &said.at);
        wide_name(name, &said.map(words).unwrap_or_default(), place, log)
    };
    let (node, port) = (own("wwnn"), own("wwpn"));
    let parent = port_parent(root.child("parent"), log);
    Some(NewDevice::Port { parent: parent?, names: WideNames { node: node?, port: port? } })
}

fn port_parent(parent: Option<&Element>, log: &mut Vec<Finding>) -> Option<PortParent> {
    let Some(parent) = parent else { return Some(PortParent::Any) };
    has_only(parent, &["wwnn", "wwpn", "fabric_wwn"], &[], log);
    let mut said = |name: &str| parent.attr(name).map(|text| wide_name(name, text, &parent.at.attribute(name), log));
    let (node, port, fabric) = (said("wwnn"), said("wwpn"), said("fabric_wwn"));
    let name = words(parent);
    let ways = [!name.is_empty(), node.is_some() || port.is_some(), fabric.is_some()];
    if ways.iter().filter(|way| **way).count() > 1 || node.is_some() != port.is_some() {
        let how = "<parent> says a name, or wwnn and wwpn, or fabric_wwn";
        log.push(Finding::invalid(&parent.at, how));
        return None;
    }
    Some(match (node, port, fabric) {
        (Some(node), Some(port), _) => PortParent::With(WideNames { node: node?, port: port? }),
        (_, _, Some(fabric)) => PortParent::OnFabric(fabric?),
        _ if name.is_empty() => PortParent::Any,
        _ => PortParent::Named(name),
    })
}

fn wide_name(what: &str, text: &str, place: &Place, log: &mut Vec<Finding>) -> Option<String> {
    let digits = text.strip_prefix("0x").unwrap_or(text).to_ascii_lowercase();
    if digits.len() == 16 && digits.chars().all(|c| c.is_ascii_hexdigit()) {
        return Some(digits);
    }
    log.push(Finding::invalid(place, format!("{what} is a world wide name, of 16 hexadecimal digits")));
    None
}

fn words(element: &Element) -> String {
    element.text().trim().to_owned()
}

/// Tells of what else there is, and of what is there twice but for links to its file.
fn has_only(element: &Element, attributes: &[&str], children: &[&str], log: &mut Vec<Finding>) {
    for attribute in element.attributes.iter().filter(|one| !attributes.contains(&&*one.name)) {
        let message = format!("unknown attribute '{}' of <{}>", shorten(&attribute.name), element.name);
        log.push(Finding::invalid(&attribute.place(), message));
    }
    let mut seen: Vec<&str> = Vec::new();
    for child in element.elements() {
        let name = &*child.name;
        if !children.contains(&name) {
            log.push(Finding::invalid(&child.at, format!("unknown element <{}> in <{}>", shorten(name), element.name)));
        } else if seen.contains(&name) && name != "devnode" && !is_told_beside(child) {
            log.push(Finding::invalid(&child.at, format!("a second <{name}>")));
        }
        if !is_told_beside(child) {
            seen.push(name);
        }
    }
}

/// Whether it is told of hosts that can have virtual ports, and says nothing of one that is to be made.
fn is_told_beside(element: &Element) -> bool {
    element.name == "capability" && element.attr("type") == Some("vport_ops")
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "c2177883-f1bb-47f0-914d-32a22e3a8804";

    #[test]
    fn a_device_is_read_as_it_is_to_be_made_and_as_it_is_told() {
        let mdev = |more: &str, about: &str| {
            format!(
                "<device>{more}<parent>pci_0000_00_02_0</parent><capability type='mdev'><type id='i915-GVTg_V5_4'/>{about}</capability></device>"
            )
        };
        let told = "<name>mdev_x</name><path>/sys/x</path><devnode type='dev'>/dev/a</devnode><devnode type='link'>/dev/b</devnode>\
                    <driver><name>vfio_mdev</name></driver>";
        let about = format!("<iommuGroup number='7'/><uuid>{UUID}</uuid><parent_addr>0000:00:02.0</parent_addr>");
        let wanted = NewDevice::Mdev {
            parent: "pci_0000_00_02_0".into(),
            kind: "i915-GVTg_V5_4".into(),
            uuid: Uuid::try_parse(UUID).unwrap(),
        };
        assert_eq!(NewDevice::parse(&mdev(told, &about)), Ok(wanted));
        let NewDevice::Mdev { uuid, .. } = NewDevice::parse(&mdev("", "")).unwrap() else { panic!() };
        assert!(!uuid.is_nil());

        let port = |parent: &str| {
            let text = format!(
                "<device>{parent}<capability type='scsi_host'><capability type='vport_ops'/><capability type='fc_host'>\
                 <wwnn>20000000C9831B4B</wwnn><wwpn>0x10000000c9831b4b</wwpn></capability></capability></device>"
            );
            NewDevice::parse(&text)
        };
        let names = WideNames { node: "20000000c9831b4b".into(), port: "10000000c9831b4b".into() };
        for (said, parent) in [
            ("", PortParent::Any),
            ("<parent>scsi_host5</parent>", PortParent::Named("scsi_host5".into())),
            ("<parent wwnn='20000000c9831b4b' wwpn='10000000c9831b4b'/>", PortParent::With(names.clone())),
            ("<parent fabric_wwn='2002000573de9a81'/>", PortParent::OnFabric("2002000573de9a81".into())),
        ] {
            assert_eq!(port(said), Ok(NewDevice::Port { parent, names: names.clone() }), "{said}");
        }
        assert!(port("<parent wwnn='20000000c9831b4b'/>").is_err());
        assert!(port("<parent fabric_wwn='2002000573de9a81'>scsi_host5</parent>").is_err());
    }

    #[test]
    fn what_cannot_be_made_is_refused_where_it_stands() {
        let of = |about: &str| {
            format!("<device>\n<parent>a</parent>\n<capability type='mdev'>\n{about}</capability></device>")
        };
        for (text, line, why) in [
            ("<domain/>".to_owned(), 1, "a device's is <device>"),
            ("<device/>".to_owned(), 1, "<capability type='mdev'> or"),
            ("<device><capability type='pci'/></device>".to_owned(), 1, "<capability type='mdev'> or"),
            (of("<uuid>x</uuid><type id='t'/>"), 4, "'x' is no UUID"),
            (of("<type id='t'/><attr name='a' value='b'/>"), 4, "attributes of mediated devices"),
            (of("<type id='../t'/>"), 3, "one of the <mdev_types>"),
            (of("<type id='t'/><odd/>"), 4, "unknown element <odd>"),
            (of("<type id='t'/><type id='t'/>"), 4, "a second <type>"),
            ("<device><capability type='mdev'><type id='t'/></capability></device>".to_owned(), 1, "needs <parent>"),
            ("<device odd='1'><capability type='mdev'/></device>".to_owned(), 1, "unknown attribute 'odd'"),
            ("<device><capability type='scsi_host'/></device>".to_owned(), 1, "<wwnn> and <wwpn>"),
            (
                "<device><capability type='scsi_host'>\n<capability type='fc_host'>\n<wwnn>1</wwnn></capability></capability></device>"
                    .to_owned(),
                3,
                "wwnn is a world wide name",
            ),
        ] {
            let findings = NewDevice::parse(&text).expect_err(&text);
            let found = findings.iter().any(|one| one.line == line && one.message.contains(why));
            assert!(found, "{text}: {findings:?}");
        }
    }
}
