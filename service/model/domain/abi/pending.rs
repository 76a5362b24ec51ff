//! What a machine that runs would become if it were started anew: every difference between what runs and what is stored, whether its
//! guest could notice it or not. The paths are those of `compare_abi`.
//!
//! What is secret is held against each other, and only shown to be another: everybody may read what comes of it.

use super::AbiDifference;
use super::table::{RULES, Rule};
use super::walk::{Match, known_by, matches};
use crate::device::Interface;
use crate::domain::secrets::Numbers;
use crate::domain::{DomainDef, Form};
use crate::xml::Element;

/// The longest value that is shown, in bytes.
const LONGEST: usize = 4096;

/// The most bytes that all differences have: those behind are left out.
const MOST: usize = 64 << 10;

/// What is said of an element that says nothing itself.
const PRESENT: &str = "present";

impl DomainDef {
    /// Every difference from `stored`: `source` is what runs, `target` what is stored. None: they are the same configuration,
    /// runtime facts aside. A device that only one of them has is one difference, with its element in one line.
    pub fn pending_changes(&self, stored: &DomainDef) -> Vec<AbiDifference> {
        let mut numbers = Numbers::default();
        let stored = &self.with_what_others_gave(stored);
        let (running, stored) = (Side::of(self, &mut numbers), Side::of(stored, &mut numbers));
        let mut walk = Walk { running: &running, stored: &stored, found: Vec::new(), bytes: 0 };
        walk.inside(Some(&RULES), "", Some(&running.tree), Some(&stored.tree));
        if walk.found.is_empty() && running.tree.write() != stored.tree.write() {
            // Only the order of devices is another.
            walk.found("/devices".to_owned(), &order(&running.tree), &order(&stored.tree));
        }
        walk.found
    }

    /// `stored` with what cards that run have of their networks, and disks of their volumes, where it leaves that open: another
    /// start gives it again.
    fn with_what_others_gave(&self, stored: &DomainDef) -> DomainDef {
        let mut stored = stored.clone();
        let in_one = |card: &&Interface| card.network().is_some() && card.mac().is_some();
        for card in self.devices.interfaces.iter().filter(in_one) {
            let mut same = stored.devices.interfaces.iter_mut().filter(|other| other.mac() == card.mac());
            let Some(other) = same.next().filter(|other| other.network().is_some()) else { continue };
            other.bandwidth = other.bandwidth.take().or_else(|| card.bandwidth.clone());
            other.vlan = other.vlan.take().or_else(|| card.vlan.clone());
            other.mtu = other.mtu.take().or_else(|| card.mtu.clone());
            other.port = other.port.take().or_else(|| card.port.clone());
        }
        stored.take_what_volumes_gave(self);
        stored
    }

    /// Where disks leave open what their volumes say of themselves, they say what those of `running` have of the same volumes.
    pub fn take_what_volumes_gave(&mut self, running: &DomainDef) {
        for disk in &running.devices.disks {
            let same = self.devices.disks.iter_mut().find(|other| other.target.dev == disk.target.dev);
            let Some(other) = same else { continue };
            if other.volume().is_some() && other.volume() == disk.volume() {
                other.take_what_its_volume_gave(disk);
            }
            other.take_what_volumes_below_gave(disk);
        }
    }
}

/// One of both.
struct Side {
    /// With a number in place of each secret, the same for the same.
    tree: Element,
    /// As it is shown, without secrets.
    shown: Element,
}

impl Side {
    fn of(def: &DomainDef, numbers: &mut Numbers) -> Side {
        let mut numbered = def.in_form(Form::STORED);
        numbered.number_secrets(numbers);
        Side { tree: numbered.tree(), shown: def.tree_in(Form { inactive: true, ..Form::default() }) }
    }

    /// A device of `tree` as it is shown, in one line.
    fn line(&self, device: &Element) -> String {
        let mut all = self.tree.child("devices").into_iter().flat_map(Element::elements);
        let number = all.position(|one| std::ptr::eq(one, device));
        let shown = self.shown.child("devices").zip(number).and_then(|(all, number)| all.elements().nth(number));
        shown.map(Element::write).unwrap_or_default().lines().map(str::trim).collect()
    }
}

struct Walk<'a> {
    running: &'a Side,
    stored: &'a Side,
    found: Vec<AbiDifference>,
    bytes: usize,
}

impl Walk<'_> {
    /// What is different in an element, which is there at least on one side.
    fn inside(&mut self, rule: Option<&Rule>, path: &str, running: Option<&Element>, stored: Option<&Element>) {
        let names = |of: fn(&Element) -> Vec<&str>| {
            let mut names: Vec<&str> = Vec::new();
            for name in [running, stored].into_iter().flatten().flat_map(of) {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            names
        };
        for name in names(|element| element.attributes.iter().map(|attribute| &*attribute.name).collect()) {
            let of = |side: Option<&Element>| side.and_then(|element| element.attr(name)).map(str::to_owned);
            self.same(|| format!("{path}/{name}"), of(running), of(stored));
        }
        let text = |side: Option<&Element>| side.and_then(|element| text_of(rule, element));
        self.same(|| path.to_owned(), text(running), text(stored));
        for name in names(|element| element.elements().map(|child| &*child.name).collect()) {
            let known = rule.and_then(|rule| rule.below.iter().find(|below| below.name == name));
            let any = Rule { name: name.to_owned(), many: true, ..Rule::default() };
            // What is said once at most is still said twice by somebody.
            let how = known.filter(|known| known.many).unwrap_or(&any);
            for Match { step, source, target } in matches(how, running, stored) {
                self.element(known, path, &step, source, target);
            }
        }
    }

    fn element(
        &mut self,
        rule: Option<&Rule>,
        parent: &str,
        step: &str,
        running: Option<&Element>,
        stored: Option<&Element>,
    ) {
        if self.bytes > MOST {
            return;
        }
        let path = format!("{parent}/{step}");
        let says_nothing = |element: &Element| element.attributes.is_empty() && element.nodes.is_empty();
        match (running, stored) {
            (Some(_), Some(_)) => self.inside(rule, &path, running, stored),
            _ if parent == "/devices" => {
                let line =
                    |side: &Side, device: Option<&Element>| device.map(|device| side.line(device)).unwrap_or_default();
                let (before, after) = (line(self.running, running), line(self.stored, stored));
                self.found(path, &before, &after);
            }
            _ if running.or(stored).is_some_and(says_nothing) => {
                let present = |side: Option<&Element>| side.map_or("", |_| PRESENT);
                self.found(path, present(running), present(stored));
            }
            _ => self.inside(rule, &path, running, stored),
        }
    }

    fn same(&mut self, path: impl Fn() -> String, running: Option<String>, stored: Option<String>) {
        if running != stored {
            let shown =
                |value: Option<String>| value.map(|value| if value.is_empty() { PRESENT.to_owned() } else { value });
            self.found(path(), &shown(running).unwrap_or_default(), &shown(stored).unwrap_or_default());
        }
    }

    fn found(&mut self, path: String, running: &str, stored: &str) {
        let cut = |text: &str| text[..text.floor_char_boundary(LONGEST)].to_owned();
        let difference = AbiDifference { path, source: cut(running), target: cut(stored) };
        self.bytes += difference.path.len() + difference.source.len() + difference.target.len();
        if self.found.is_empty() || self.bytes <= MOST {
            self.found.push(difference);
        }
    }
}

/// The devices as paths call them, in their order.
fn order(tree: &Element) -> String {
    let rules = RULES.below.iter().find(|rule| rule.name == "devices");
    let devices = tree.child("devices").into_iter().flat_map(Element::elements).map(|device| {
        let rule = rules.and_then(|rules| rules.below.iter().find(|rule| rule.name == device.name));
        let identity = rule.map(|rule| known_by(&rule.identity, device)).unwrap_or_default();
        if identity.is_empty() { device.name.clone() } else { format!("{}[{identity}]", device.name) }
    });
    devices.collect::<Vec<_>>().join(" ")
}

/// The text of an element, as people write it where that is known; of what others have written all of it.
fn text_of(rule: Option<&Rule>, element: &Element) -> Option<String> {
    if let Some(rule) = rule.filter(|rule| rule.text.is_some()) {
        return Some(rule.text_of(Some(element)).shown).filter(|text| !text.is_empty());
    }
    let text: String = element.nodes.iter().filter_map(|node| node.as_text().or(node.as_verbatim())).collect();
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}
