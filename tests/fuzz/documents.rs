//! Documents made at random: real ones changed by the format's own names and by values seen in real ones.

use super::dice::Dice;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use virt_model::domain::vocabulary;
use virt_model::xml::{Element, Node, read};

/// Values that are good or bad in many places.
const VALUES: &[&str] = &[
    "",
    "0",
    "1",
    "2",
    "-1",
    "31",
    "32",
    "255",
    "65535",
    "65536",
    "4294967295",
    "4294967296",
    "18446744073709551615",
    "99999999999999999999",
    "0x1f",
    "0x",
    "yes",
    "no",
    "on",
    "off",
    "none",
    "default",
    "auto",
    "pci",
    "usb",
    "drive",
    "virtio",
    "spice",
    "vnc",
    "file",
    "raw",
    "qcow2",
    "network",
    "tcp",
    "unix",
    "pty",
    "address",
    "vda",
    "sdb",
    "/a,b=c",
    "/",
    "a'b\"<&>\n\t\r",
    "é\u{1f600}",
    "0-3,^2",
    "0000:00:00.0",
    "52:54:00:00:00:01",
    "ua-x",
];

/// Pieces that mean something in XML.
const PIECES: &[&str] = &[
    "<",
    ">",
    "/>",
    "</",
    "='",
    "'",
    "\"",
    "&amp;",
    "&#10;",
    "&#x1f600;",
    "&#0;",
    "&x;",
    "<!--",
    "-->",
    "<![CDATA[",
    "]]>",
    "<?pi x?>",
    "<!DOCTYPE a>",
    " xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'",
    " xmlns='u'",
    "\u{feff}",
    "\r\n",
    " ",
];

/// What documents are made from.
pub struct Maker {
    /// Attributes and children by path, e.g. `devices/disk`; of the root by the empty one.
    known: BTreeMap<String, (Vec<String>, Vec<String>)>,
    /// Values that were seen, by `element@attribute` or `element`.
    values: BTreeMap<String, Vec<String>>,
    /// Real documents.
    pub seeds: Vec<Element>,
}

/// All documents below a folder, in the order of their names.
pub fn texts(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => all.extend(texts(&path)),
            path => all.extend(std::fs::read_to_string(&path).ok().map(|text| (path, text))),
        }
    }
    all.sort();
    all
}

impl Maker {
    /// From the real documents below a folder.
    pub fn new(folder: &Path) -> Maker {
        let texts = texts(folder).into_iter().filter(|(path, _)| path.extension().is_some_and(|ext| ext == "xml"));
        let seeds: Vec<Element> = texts.filter_map(|(_, text)| read(&text, &[]).ok()).collect();
        let mut maker = Maker { known: BTreeMap::new(), values: BTreeMap::new(), seeds };
        for (path, attributes) in vocabulary() {
            if let Some((parent, name)) = (!path.is_empty()).then(|| path.rsplit_once('/').unwrap_or(("", &path))) {
                maker.known.entry(parent.to_owned()).or_default().1.push(name.to_owned());
            }
            maker.known.entry(path).or_default().0 = attributes;
        }
        let mut values: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        maker.seeds.iter().for_each(|seed| note(seed, &mut values));
        maker.values = values.into_iter().map(|(name, all)| (name, all.into_iter().collect())).collect();
        maker
    }

    /// A real document with some changes.
    pub fn variant(&self, dice: &mut Dice) -> String {
        let seed = dice.pick(&self.seeds).cloned().unwrap_or_default();
        self.changed(seed, dice)
    }

    /// The document with some changes; rarely such that it is no longer well-formed.
    pub fn changed(&self, mut root: Element, dice: &mut Dice) -> String {
        for _ in 0..=dice.below(5) {
            let place = dice.below(count(&root));
            self.change(&mut root, "", place, dice);
        }
        let mut text = root.write();
        if dice.once_in(8) {
            scratch(&mut text, dice);
        }
        text
    }

    /// A document of the format's names alone.
    pub fn made_up(&self, dice: &mut Dice) -> Element {
        let mut root = Element::new("domain");
        for (name, value) in [("name", "made-up"), ("memory", "65536")] {
            root.push(Element::new(name).with_text(value));
        }
        root.set_attr("type", *dice.pick(&["qemu", "kvm", "test"]).unwrap_or(&"qemu"));
        self.fill(&mut root, "", 8, dice);
        root
    }

    /// Changes the `place`-th element, counted from the root, whose path is `path`.
    fn change(&self, element: &mut Element, path: &str, mut place: usize, dice: &mut Dice) {
        if place == 0 {
            return self.change_one(element, path, dice);
        }
        place -= 1;
        for child in element.elements_mut() {
            let size = count(child);
            if place < size {
                let path = join(path, &child.name);
                return self.change(child, &path, place, dice);
            }
            place -= size;
        }
    }

    fn change_one(&self, element: &mut Element, path: &str, dice: &mut Dice) {
        let some = dice.below(element.nodes.len());
        match dice.below(10) {
            0 | 1 => {
                let name = dice.pick(&element.attributes).map(|attribute| attribute.name.clone());
                name.into_iter().for_each(|name| self.set(element, &name, dice));
            }
            2 => {
                let names = self.known.get(path).map(|known| &known.0[..]).unwrap_or_default();
                dice.pick(names).into_iter().for_each(|name| self.set(element, name, dice));
            }
            3 if !element.attributes.is_empty() => {
                drop(element.attributes.remove(dice.below(element.attributes.len())))
            }
            4 => element.nodes = vec![Node::Text(self.value(&element.name, dice))],
            5 | 6 => self.add(element, path, 3, dice),
            7 if !element.nodes.is_empty() => drop(element.nodes.remove(some)),
            8 if !element.nodes.is_empty() => element.nodes.push(element.nodes[some].clone()),
            _ => {
                let like = dice.pick(&self.seeds).and_then(|seed| find(seed, path, dice)).cloned();
                like.into_iter().for_each(|like| *element = like);
            }
        }
    }

    fn set(&self, element: &mut Element, attribute: &str, dice: &mut Dice) {
        let value = self.value(&format!("{}@{attribute}", element.name), dice);
        element.set_attr(attribute, value);
    }

    /// Mostly one that was seen there.
    fn value(&self, of: &str, dice: &mut Dice) -> String {
        let seen = self.values.get(of).filter(|_| !dice.once_in(4));
        let value = seen.and_then(|seen| dice.pick(seen)).map(|value| &**value);
        value.or_else(|| dice.pick(VALUES).copied()).unwrap_or_default().to_owned()
    }

    fn add(&self, element: &mut Element, path: &str, depth: usize, dice: &mut Dice) {
        let names = self.known.get(path).map(|known| &known.1[..]).unwrap_or_default();
        let Some(name) = dice.pick(names) else { return };
        let mut child = Element::new(name);
        self.fill(&mut child, &join(path, name), depth, dice);
        element.push(child);
    }

    fn fill(&self, element: &mut Element, path: &str, depth: usize, dice: &mut Dice) {
        let Some((attributes, children)) = self.known.get(path) else { return };
        for name in attributes {
            if element.attr(name).is_none() && dice.once_in(3) {
                self.set(element, name, dice);
            }
        }
        if children.is_empty() {
            let text = self.value(&element.name, dice);
            element.nodes.extend((!text.is_empty()).then_some(Node::Text(text)));
            return;
        }
        for _ in 0..depth.min(1 + dice.below(children.len())) {
            self.add(element, path, depth.saturating_sub(1), dice);
        }
    }
}

/// Notes all values of a tree.
fn note(element: &Element, values: &mut BTreeMap<String, BTreeSet<String>>) {
    for attribute in &element.attributes {
        let name = format!("{}@{}", element.name, attribute.name);
        values.entry(name).or_default().insert(attribute.value.clone());
    }
    if element.has_text() {
        values.entry(element.name.clone()).or_default().insert(element.text());
    }
    element.elements().for_each(|child| note(child, values));
}

fn count(element: &Element) -> usize {
    1 + element.elements().map(count).sum::<usize>()
}

/// An element at that path.
fn find<'a>(root: &'a Element, path: &str, dice: &mut Dice) -> Option<&'a Element> {
    path.split('/').filter(|step| !step.is_empty()).try_fold(root, |element, step| {
        let all: Vec<&Element> = element.elements().filter(|child| child.name == step).collect();
        dice.pick(&all).copied()
    })
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") }
}

/// Changes some characters.
fn scratch(text: &mut String, dice: &mut Dice) {
    let mut chars: Vec<char> = text.chars().collect();
    for _ in 0..=dice.below(3) {
        let from = dice.below(chars.len());
        let to = (from + dice.below(20)).min(chars.len());
        let piece = dice.pick(PIECES).copied().unwrap_or_default();
        match dice.below(3) {
            0 => drop(chars.splice(from..from, piece.chars())),
            1 => drop(chars.splice(from..to, piece.chars())),
            _ => {
                let copy = chars[from..to].to_vec();
                chars.splice(from..from, copy);
            }
        }
    }
    *text = chars.into_iter().collect();
}
