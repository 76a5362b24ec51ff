//! Both trees, element by element: what is the same device, and what is different about it.

use super::table::{Identity, Presence, RULES, Rule, Said};
use super::{AbiDifference, Strictness};
use crate::xml::Element;
use std::collections::{HashMap, HashSet};

/// All differences, in the order of the table and, among several elements of a kind, of the source.
pub fn differences(source: &Element, target: &Element, strictness: Strictness) -> Vec<AbiDifference> {
    let mut walk = Walk { strictness, virtio: false, found: Vec::new() };
    walk.inside(&RULES, "", Some(source), Some(target));
    walk.found
}

struct Walk {
    strictness: Strictness,
    /// In a virtio device.
    virtio: bool,
    found: Vec<AbiDifference>,
}

/// One element on both sides; at least on one.
pub struct Match<'a> {
    pub step: String,
    pub source: Option<&'a Element>,
    pub target: Option<&'a Element>,
}

impl Walk {
    fn inside(&mut self, rule: &Rule, path: &str, source: Option<&Element>, target: Option<&Element>) {
        for field in &rule.attributes {
            self.same(|| format!("{path}/{}", field.name), field.of(source), field.of(target));
        }
        self.same(|| path.to_owned(), rule.text_of(source), rule.text_of(target));
        let outside = self.virtio;
        self.virtio |= [source, target].into_iter().flatten().any(is_virtio);
        let strict = self.strictness == Strictness::Strict;
        for below in rule.below.iter().filter(|below| strict || !below.strict) {
            for pair in matches(below, source, target) {
                self.element(below, &format!("{path}/{}", pair.step), pair.source, pair.target);
            }
        }
        self.virtio = outside;
    }

    fn element(&mut self, rule: &Rule, path: &str, source: Option<&Element>, target: Option<&Element>) {
        let counts = match rule.presence {
            Presence::Free => false,
            Presence::Counts => true,
            Presence::OfVirtio => self.virtio,
        };
        if counts && source.is_some() != target.is_some() {
            let summary = |side: Option<&Element>| side.map(|element| rule.summary(element)).unwrap_or_default();
            self.same(|| path.to_owned(), summary(source), summary(target));
        } else {
            self.inside(rule, path, source, target);
        }
    }

    fn same(&mut self, path: impl Fn() -> String, source: Said, target: Said) {
        if source.canonical != target.canonical {
            self.found.push(AbiDifference { path: path(), source: source.shown, target: target.shown });
        }
    }
}

/// Whether the device says that it is one: by model, bus, type, or by being of a kind that has no other.
fn is_virtio(device: &Element) -> bool {
    let says = |value: Option<&str>| value.is_some_and(|value| value.starts_with("virtio"));
    let child = |name: &str, attribute: &str| device.child(name).and_then(|child| child.attr(attribute));
    matches!(&*device.name, "memballoon" | "rng" | "vsock" | "crypto" | "filesystem")
        || says(device.attr("model"))
        || says(device.attr("type"))
        || says(device.attr("bus"))
        || says(child("model", "type"))
        || device.name == "disk" && says(child("target", "bus"))
}

/// Children of that kind, each with its like.
pub fn matches<'a>(rule: &Rule, source: Option<&'a Element>, target: Option<&'a Element>) -> Vec<Match<'a>> {
    let all = |side: Option<&'a Element>| -> Vec<&'a Element> {
        side.into_iter().flat_map(Element::elements).filter(|e| e.name == rule.name).collect()
    };
    let (source, target) = (all(source), all(target));
    if !rule.many {
        let (source, target) = (source.first().copied(), target.first().copied());
        let there = source.is_some() || target.is_some();
        return there.then(|| Match { step: rule.name.clone(), source, target }).into_iter().collect();
    }
    let likes = likes(rule, &source, &target);
    let names = (Names::of(rule, &source), Names::of(rule, &target));
    let mut extra: Vec<bool> = vec![true; target.len()];
    let mut matches = Vec::new();
    for (index, element) in source.iter().enumerate() {
        likes[index].iter().for_each(|&like| extra[like] = false);
        let step = names.0.step(rule, index, &names.1);
        matches.push(Match { step, source: Some(element), target: likes[index].map(|like| target[like]) });
    }
    for index in (0..target.len()).filter(|&index| extra[index]) {
        matches.push(Match { step: names.1.step(rule, index, &names.0), source: None, target: Some(target[index]) });
    }
    matches
}

/// For each of the source, the number of the one in the target that is the same: by identity, and where that leaves a
/// choice, by address, then by position.
fn likes(rule: &Rule, source: &[&Element], target: &[&Element]) -> Vec<Option<usize>> {
    let mut groups: HashMap<String, (Vec<usize>, Vec<usize>)> = HashMap::new();
    for (index, element) in source.iter().enumerate() {
        groups.entry(known_by(&rule.identity, element)).or_default().0.push(index);
    }
    for (index, element) in target.iter().enumerate() {
        groups.entry(known_by(&rule.identity, element)).or_default().1.push(index);
    }
    let mut likes = vec![None; source.len()];
    for (ours, theirs) in groups.into_values() {
        let mut places = HashMap::new();
        for (index, address) in theirs.iter().filter_map(|&index| Some((index, address(target[index])?))) {
            places.entry(address).or_insert(index);
        }
        for &index in &ours {
            likes[index] = address(source[index]).and_then(|address| places.remove(&address));
        }
        let taken: HashSet<usize> = ours.iter().filter_map(|&index| likes[index]).collect();
        let alone: Vec<usize> = ours.into_iter().filter(|&index| likes[index].is_none()).collect();
        let left = theirs.into_iter().filter(|index| !taken.contains(index));
        alone.into_iter().zip(left).for_each(|(index, like)| likes[index] = Some(like));
    }
    likes
}

/// The identity as it stands in paths; empty if the element has none.
pub fn known_by(identity: &[Identity], element: &Element) -> String {
    let said = identity.iter().filter_map(|part| {
        let (attribute, way) = part.steps.split_last()?;
        let at = way.iter().try_fold(element, |element, step| child(element, step))?;
        Some(format!("{}={}", part.label, decimal(at.attr(attribute)?)))
    });
    said.collect::<Vec<_>>().join(",")
}

/// A child by its name, or by name and type: `address:dimm`.
fn child<'a>(element: &'a Element, step: &str) -> Option<&'a Element> {
    let (name, kind) = step.split_once(':').map_or((step, None), |(name, kind)| (name, Some(kind)));
    element.child(name).filter(|child| kind.is_none() || child.attr("type") == kind)
}

fn decimal(text: &str) -> String {
    let hex = text.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
    hex.map_or_else(|| text.to_owned(), |number| number.to_string())
}

/// Where the guest sees the device, if that has been decided.
fn address(device: &Element) -> Option<String> {
    let address = device.child("address").filter(|address| address.attributes.len() > 1)?;
    let said = address.attributes.iter().filter(|attribute| attribute.name != "multifunction");
    Some(
        said.map(|attribute| format!("{}={}", attribute.name, decimal(&attribute.value))).collect::<Vec<_>>().join(" "),
    )
}

/// What the elements of one side are called in paths: `disk[target=vda]`, or `rng[2]` where nothing but the position tells
/// one from the others.
struct Names {
    /// Identity and, from 1, the number among those that share it.
    each: Vec<(String, usize)>,
    /// How many share it.
    count: HashMap<String, usize>,
}

impl Names {
    fn of(rule: &Rule, elements: &[&Element]) -> Names {
        let mut count: HashMap<String, usize> = HashMap::new();
        let mut each = Vec::new();
        for element in elements {
            let identity = known_by(&rule.identity, element);
            let number = count.entry(identity.clone()).or_default();
            *number += 1;
            each.push((identity, *number));
        }
        Names { each, count }
    }

    fn step(&self, rule: &Rule, index: usize, others: &Names) -> String {
        let (identity, number) = &self.each[index];
        let several = [self, others].iter().any(|names| names.count.get(identity).is_some_and(|count| *count > 1));
        let mut step = rule.name.clone();
        if !identity.is_empty() {
            step += &format!("[{identity}]");
        }
        if several {
            step += &format!("[{number}]");
        }
        step
    }
}
