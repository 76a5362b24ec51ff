//! A device changed by a document: each difference between it and the device is one of the changes that a machine can make while it
//! runs, or refused by name. What the document does not say stays, but for the medium of a drive and the link of a card.

use super::adjust::LiveChange;
use super::{Affect, Domain, link, settings};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::verb;
use std::net::IpAddr;
use std::sync::Arc;
use virt_model::device::balloon::BalloonStats;
use virt_model::device::disk::{DiskDevice, Iotune, StartupPolicy};
use virt_model::device::display::{Connected, Graphics, GraphicsKind, Listen, ListenKind};
use virt_model::device::filter::FilterRef;
use virt_model::device::interface::{Bandwidth, InterfaceKind};
use virt_model::domain::one_device::first_not_in;
use virt_model::domain::part::Part;
use virt_model::domain::value::Value;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::{Adjustment, MediumExchange};
use virt_model::xml::{self, Element, Finding, shorten};

/// What a document says of a device that can be other than it is; `None`: nothing.
enum DeviceChange {
    /// Of the disk of that target.
    Disk { target: String, tune: Option<Iotune>, startup: Option<StartupPolicy> },
    /// Of the card that is known by that in what runs, if it runs.
    Card {
        known: String,
        up: bool,
        limits: Option<Bandwidth>,
        filter: Option<Option<FilterRef>>,
        bridge: Option<String>,
    },
    /// Of the display of that kind.
    Display { kind: GraphicsKind, said: Box<Graphics> },
    /// Of the balloon.
    Balloon { period: Option<u32> },
}

impl Domain {
    /// Changes a device to what the given element says, in all configurations that `affect` means, or in none.
    /// Errors: `NoSuchDevice`, `OperationUnsupported` where more would change than can.
    pub async fn update_device(self: &Arc<Self>, caller: &Caller, xml: &str, affect: Affect) -> Result<()> {
        // On the heap: it is large, and in a debug build each frame below would move it once more.
        let work = Box::pin(async {
            let device = xml::read(xml, &[]).map_err(|finding| Error::ConfigInvalid(vec![finding]))?;
            let (live, stored) = self.to_be_adjusted(&verb::UPDATE_DEVICE, affect).await?;
            let known = live.clone().or(stored.clone()).ok_or_else(|| self.vanished())?;
            if is_of_medium(&known, &device) {
                return self.put_medium(&verb::UPDATE_DEVICE, &device, affect, MediumExchange::default(), None).await;
            }
            let change = DeviceChange::read(&known, &device)?;
            let live = live.map(|before| {
                let mut after = DomainDef::clone(&before);
                let what = change.apply(&mut after, true, None)?;
                is_document(&after)?;
                Ok::<_, Error>(LiveChange { before, after, what })
            });
            let stored = stored.map(|before| {
                let mut after = DomainDef::clone(&before);
                change.apply(&mut after, false, self.live().as_deref())?;
                is_document(&after)?;
                Ok::<_, Error>((before, after))
            });
            self.put_checked(&verb::UPDATE_DEVICE, live.transpose()?, stored.transpose()?).await
        });
        self.short(caller, &verb::UPDATE_DEVICE, work).await
    }
}

/// Whether the element is of a drive, and of more than its limits.
fn is_of_medium(def: &DomainDef, device: &Element) -> bool {
    let target = device.child("target").and_then(|target| target.attr("dev")).unwrap_or_default();
    let disk = def.devices.disks.iter().find(|disk| disk.target.dev == target).filter(|_| device.name == "disk");
    let drive = disk.filter(|disk| matches!(disk.device(), DiskDevice::Cdrom | DiskDevice::Floppy));
    let Some(drive) = drive else { return false };
    let there = drive.write("disk");
    let mut rest = device.clone();
    let limits = rest.take_child("iotune").filter(|limits| there.child("iotune") != Some(limits));
    let same =
        rest.child("source").is_some() == there.child("source").is_some() && first_not_in(&rest, &there).is_none();
    limits.is_none() || !same
}

impl DeviceChange {
    /// Reads what can be other, and refuses by name what else is not as it is there.
    fn read(def: &DomainDef, device: &Element) -> Result<DeviceChange> {
        let mut log = Vec::new();
        let mut rest = device.clone();
        let change = match &*device.name {
            "disk" => {
                let target =
                    device.child("target").and_then(|target| target.attr("dev")).unwrap_or_default().to_owned();
                let tune = rest.take_child("iotune").map(|tune| Iotune::read(tune, &mut log));
                let source = rest.elements_mut().find(|element| element.name == "source");
                let startup = source.and_then(|source| source.take_attr("startupPolicy"));
                let startup = startup.map(|policy| word(&policy.value)).transpose()?;
                settings::find_disk(def, &target)?;
                DeviceChange::Disk { target, tune, startup }
            }
            "interface" => DeviceChange::card(def, &mut rest, &mut log)?,
            "graphics" => {
                let said = Box::new(Graphics::read(device.clone(), &mut log));
                ["passwd", "passwdValidTo", "connected", "listen"]
                    .into_iter()
                    .for_each(|name| _ = rest.take_attr(name));
                if let Some(message) = said.says_two_addresses() {
                    let text = format!("domain '{}', <graphics>: {message}", def.name);
                    return Err(Error::InvalidArgument(text));
                }
                if let [Listen { kind: ListenKind::Address, network: None, socket: None, .. }] = &said.listens[..] {
                    rest.take_child("listen");
                }
                DeviceChange::Display { kind: said.kind, said }
            }
            "memballoon" => {
                let stats = rest.take_child("stats").map(|stats| BalloonStats::read(stats, &mut log));
                DeviceChange::Balloon { period: stats.map(|stats| stats.period) }
            }
            other => {
                return Err(Error::OperationUnsupported(format!(
                    "domain '{}': a <{}> stays as it is; disks, interfaces, graphics and memballoons can be updated",
                    def.name,
                    shorten(other)
                )));
            }
        };
        if !log.is_empty() {
            return Err(Error::ConfigInvalid(log));
        }
        let (name, there) = (&def.name, change.there(def, device)?);
        if matches!(change, DeviceChange::Card { .. }) {
            // It was found by that, however it is written.
            rest.take_child("mac");
        }
        match first_not_in(&rest, &there) {
            None => Ok(change),
            Some(other) => Err(Error::OperationUnsupported(format!(
                "domain '{name}': of {} only {} can be changed while it is there, and {other} is not what it has",
                change.called(),
                change.can_change()
            ))),
        }
    }

    fn card(def: &DomainDef, rest: &mut Element, log: &mut Vec<Finding>) -> Result<DeviceChange> {
        let limits = rest.take_child("bandwidth").map(|limits| Bandwidth::read(limits, log));
        // An empty one lifts it, as that of the limits does.
        let filter = rest.take_child("filterref").map(|filter| {
            let says = !filter.attributes.is_empty() || !filter.nodes.is_empty();
            says.then(|| FilterRef::read(filter, log))
        });
        let up = match rest.take_child("link").as_ref().and_then(|link| link.attr("state")) {
            None | Some("up") => true,
            Some("down") => false,
            Some(other) => {
                let other = shorten(other);
                return Err(Error::InvalidArgument(format!("a link is 'up' or 'down', not '{other}'")));
            }
        };
        // Of a card on a bridge, that can be another; of others the source is what it is.
        let of_bridge = rest.attr("type").is_none_or(|kind| kind == "bridge");
        let source = rest.elements_mut().find(|element| element.name == "source").filter(|_| of_bridge);
        let bridge = source.and_then(|source| source.take_attr("bridge")).map(|bridge| bridge.value);
        let none = || Error::NoSuchDevice(format!("domain '{}' has no such <interface>, or several", def.name));
        let spot = def.device_like(rest).map_err(|_| none())?;
        let card = def.devices.interfaces.get(spot.nth).ok_or_else(none)?;
        if card.forward_device().is_some() && rest.attr("type") == Some("network") {
            // What is stored says so of a card that is in its network by a device of the host's.
            rest.take_attr("type");
        }
        let address = card.mac().map(|mac| mac.to_string());
        let known = address.or(card.info.alias().map(str::to_owned)).ok_or_else(none)?;
        Ok(DeviceChange::Card { known, up, limits, filter, bridge })
    }

    /// The device as it is.
    fn there(&self, def: &DomainDef, device: &Element) -> Result<Element> {
        let none = || Error::NoSuchDevice(format!("domain '{}' has no such <{}>", def.name, device.name));
        let nth = match self {
            DeviceChange::Disk { target, .. } => def.devices.disks.iter().position(|disk| disk.target.dev == *target),
            DeviceChange::Card { known, .. } => def.devices.interfaces.iter().position(|card| card.is_known_as(known)),
            DeviceChange::Display { kind, .. } => def.devices.graphics.iter().position(|one| one.kind == *kind),
            DeviceChange::Balloon { .. } => def.devices.memballoon.as_ref().map(|_| 0),
        };
        let tree = def.tree_in(Form::LIVE);
        let devices = tree.child("devices").map(|devices| devices.elements().filter(|one| one.name == device.name));
        let there = devices.into_iter().flatten().nth(nth.ok_or_else(none)?).cloned();
        there.ok_or_else(none)
    }

    /// What it is of, for people.
    fn called(&self) -> String {
        match self {
            DeviceChange::Disk { target, .. } => format!("disk '{}'", shorten(target)),
            DeviceChange::Card { known, .. } => format!("network card '{}'", shorten(known)),
            DeviceChange::Display { kind, .. } => format!("<graphics type='{kind}'>"),
            DeviceChange::Balloon { .. } => "<memballoon>".to_owned(),
        }
    }

    /// What of it can be other, for people.
    fn can_change(&self) -> &'static str {
        match self {
            DeviceChange::Disk { .. } => "<iotune>, the startupPolicy and the medium of a drive",
            DeviceChange::Card { .. } => "<link>, <bandwidth>, <filterref> and the bridge",
            DeviceChange::Display { .. } => {
                "the password (passwd, passwdValidTo, connected) and the address of <listen>"
            }
            DeviceChange::Balloon { .. } => "the period of <stats>",
        }
    }

    /// Changes a configuration, and tells what the guest is to follow in. `running`: what runs beside it.
    fn apply(&self, def: &mut DomainDef, runs: bool, running: Option<&DomainDef>) -> Result<Vec<Adjustment>> {
        let name = def.name.clone();
        let none = |what: &str| Error::NoSuchDevice(format!("domain '{name}' has no such <{what}>"));
        let mut what = Vec::new();
        match self {
            DeviceChange::Disk { target, tune, startup } => {
                settings::find_disk(def, target)?;
                if let Some(tune) = tune {
                    settings::share(def, target, Some(tune.clone()));
                    what.push(Adjustment::Throttle(target.clone()));
                }
                let disk = def.devices.disks.iter_mut().find(|disk| disk.target.dev == *target);
                if let (Some(disk), Some(startup)) = (disk, startup) {
                    disk.source.get_or_insert_default().startup_policy = Some(*startup);
                }
            }
            DeviceChange::Card { .. } => what = self.apply_to_card(def, running)?,
            DeviceChange::Display { kind, said } => {
                let nth = def.devices.graphics.iter().position(|one| one.kind == *kind);
                let nth = nth.ok_or_else(|| none("graphics"))?;
                let display = &mut def.devices.graphics[nth];
                if listens_elsewhere(display, said, &name)? {
                    what.push(Adjustment::Listen(nth));
                }
                if change_display(display, said, runs, &name)? {
                    what.push(Adjustment::Password(nth, said.connected));
                }
            }
            DeviceChange::Balloon { period } => {
                let balloon = def.devices.memballoon.as_mut().ok_or_else(|| none("memballoon"))?;
                if let Some(period) = *period {
                    balloon.stats = (period > 0).then(|| BalloonStats { period, ..BalloonStats::default() });
                    what.push(Adjustment::MemoryStats);
                }
            }
        }
        Ok(what)
    }

    /// Changes a card, and tells what the guest is to follow in, in that order: what is to be filtered is so before it can pass, and
    /// is filtered until the last of the rest.
    fn apply_to_card(&self, def: &mut DomainDef, running: Option<&DomainDef>) -> Result<Vec<Adjustment>> {
        let DeviceChange::Card { known, up, limits, filter, bridge } = self else { return Ok(Vec::new()) };
        let (name, known) = (def.name.clone(), link::known_by(known, running));
        let card = link::find_mut(def, &known)?;
        let filtered = filter.as_ref().map(|filter| (filter.is_some(), Adjustment::Filter(known.clone())));
        let mut what = Vec::new();
        what.extend(filtered.iter().filter(|(comes, _)| *comes).map(|(_, filtered)| filtered.clone()));
        if card.link_up() != *up {
            link::set_link(card, *up);
            what.push(Adjustment::Link(known.clone()));
        }
        if let Some(bridge) = bridge.as_ref().filter(|bridge| card.bridge() != Some(bridge)) {
            // The document may not say what kind of card it is of.
            if card.kind != InterfaceKind::Bridge {
                return Err(Error::OperationUnsupported(format!(
                    "domain '{name}': network card '{}' is of type='{}', and in no bridge that could be another: only \
                     cards of type='bridge' are",
                    shorten(&known),
                    card.kind
                )));
            }
            card.source.get_or_insert_default().bridge = Some(bridge.clone());
            what.push(Adjustment::Bridge(known.clone()));
        }
        if let Some(filter) = filter {
            card.filter.clone_from(filter);
        }
        if let Some(limits) = limits {
            let says = limits.inbound.is_some() || limits.outbound.is_some() || !limits.rest.is_empty();
            card.bandwidth = says.then(|| limits.clone());
            what.push(Adjustment::Bandwidth(known));
        }
        what.extend(filtered.filter(|(comes, _)| !comes).map(|(_, filtered)| filtered));
        Ok(what)
    }
}

/// Whether it is told of its password again.
fn change_display(display: &mut Graphics, said: &Graphics, runs: bool, name: &str) -> Result<bool> {
    let refuse = |why: &str| Err(Error::OperationUnsupported(format!("domain '{name}', <graphics>: {why}")));
    let password = said.passwd.as_ref().filter(|password| !password.is_empty());
    // One that is not shown is not said, and stays; with its time, unless that is said.
    if password.is_none() && said.passwd_valid_to.is_none() {
        let there = display.connected.unwrap_or(Connected::Keep);
        return match said.connected.is_none_or(|connected| connected == there) {
            true => Ok(false),
            false => refuse("connected is of a change of the password; give passwd or passwdValidTo, too"),
        };
    }
    if said.connected.is_some_and(|connected| connected != Connected::Keep)
        || display.connected.is_some() && (password.is_some() || said.connected.is_some())
    {
        display.connected = said.connected;
    }
    match (password, &display.passwd) {
        (Some(_), None) if runs => {
            return refuse("it was started without a password, and asks for none as long as it runs");
        }
        (None, None) => return refuse("it has no password that passwdValidTo could be of; give one (passwd)"),
        (Some(password), _) => display.passwd = Some(password.clone()),
        (None, Some(_)) => {}
    }
    display.passwd_valid_to.clone_from(&said.passwd_valid_to);
    Ok(true)
}

/// Whether it is to listen on another address. What listens on none does not begin to.
fn listens_elsewhere(display: &mut Graphics, said: &Graphics, name: &str) -> Result<bool> {
    let mut besides = said.listens.iter().zip(&display.listens).skip(1);
    let same = besides.all(|(said, there)| said.address.is_none() || said.address == there.address);
    if said.listens.len() > 1 && !(same && said.listens.len() == display.listens.len()) {
        let why = "only where it listens first can be changed, and another <listen> is not what it has";
        return Err(Error::OperationUnsupported(format!("domain '{name}', <graphics>: {why}")));
    }
    let on_address = said.listens.iter().any(|listen| listen.kind == ListenKind::Address);
    let address = said.listen_address().filter(|said| display.listen_address() != Some(said));
    if (on_address || address.is_some()) && display.listen_kind() != ListenKind::Address {
        let why = "it listens on no address, and is to be defined anew for that";
        return Err(Error::OperationUnsupported(format!("domain '{name}', <graphics>: {why}")));
    }
    let Some(address) = address else { return Ok(false) };
    // A name would be looked up by whoever listens.
    if address.parse::<IpAddr>().is_err() {
        let address = shorten(address);
        let text = format!("domain '{name}', <graphics>: '{address}' is not an IP address to listen on");
        return Err(Error::InvalidArgument(text));
    }
    display.set_listen_address(address);
    Ok(true)
}

/// A word as it stands in a document.
fn word<T: Value>(text: &str) -> Result<T> {
    T::from_text(text).map_err(|expected| Error::InvalidArgument(format!("'{}' is not {expected}", shorten(text))))
}

/// Holds what a document has put in to the format.
fn is_document(def: &DomainDef) -> Result<()> {
    DomainDef::from_kept_tree(def.tree()).map(drop).map_err(Error::ConfigInvalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_passes_a_card_that_comes_up_or_is_plugged_elsewhere_before_it_is_filtered() {
        let with = |filter: &str| {
            let text = format!(
                "<domain type='test'><name>web</name><memory>1024</memory><devices><interface type='bridge'><mac \
                 address='52:54:00:00:00:07'/><source bridge='br0'/>{filter}<link state='down'/></interface></devices></domain>"
            );
            DomainDef::parse(&text).expect("a domain")
        };
        let order = |before: &str, said: &str| {
            let mut def = with(before);
            let card = format!(
                "<interface type='bridge'><mac address='52:54:00:00:00:07'/><source bridge='br1'/>{said}<link state='up'/>\
                 <bandwidth><inbound average='10'/></bandwidth></interface>"
            );
            let device = xml::read(&card, &[]).expect("an element");
            let change = DeviceChange::read(&def, &device).expect("a change");
            let what = change.apply(&mut def, true, None).expect("applied");
            let is_filtered = def.devices.interfaces[0].filter.is_some();
            let which = |one: &Adjustment| match one {
                Adjustment::Filter(_) => 'f',
                Adjustment::Link(_) => 'l',
                Adjustment::Bridge(_) => 'b',
                Adjustment::Bandwidth(_) => 'w',
                other => panic!("{other}"),
            };
            (what.iter().map(which).collect::<String>(), is_filtered)
        };
        let clean = "<filterref filter='clean-traffic'/>";
        assert_eq!(order("", clean), ("flbw".to_owned(), true));
        assert_eq!(order("<filterref filter='no-mac-spoofing'/>", clean), ("flbw".to_owned(), true));
        assert_eq!(order(clean, "<filterref/>"), ("lbwf".to_owned(), false), "it is lifted last");
        assert_eq!(order(clean, ""), ("lbw".to_owned(), true));
    }
}
