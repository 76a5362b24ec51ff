//! `table.txt`, read: what is compared, and which spellings of a value are the same.

use crate::domain::format::{Line, lines};
use crate::domain::size::scaled;
use crate::domain::value::{CpuSet, Value};
use crate::xml::Element;
use std::collections::HashMap;
use std::sync::LazyLock;
use uuid::Uuid;

/// The rule of the root element.
pub static RULES: LazyLock<Rule> = LazyLock::new(|| read(include_str!("table.txt")));

/// What is compared of one element.
#[derive(Debug, Default)]
pub struct Rule {
    pub name: String,
    /// There may be several.
    pub many: bool,
    pub presence: Presence,
    /// Only in the strict form.
    pub strict: bool,
    /// By what one of several is known.
    pub identity: Vec<Identity>,
    pub attributes: Vec<Field>,
    pub text: Option<Kind>,
    pub below: Vec<Rule>,
}

/// Whether it counts that an element is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Presence {
    /// Only what is in it.
    #[default]
    Free,
    /// Yes.
    Counts,
    /// Of virtio devices.
    OfVirtio,
}

/// An attribute that makes up an identity.
#[derive(Debug)]
pub struct Identity {
    /// What it is called in paths.
    pub label: String,
    /// The way to it; the last step is the attribute.
    pub steps: Vec<String>,
}

/// A compared attribute.
#[derive(Debug)]
pub struct Field {
    pub name: String,
    pub kind: Kind,
    /// What an element says that lacks it.
    pub default: Option<String>,
}

/// Which spellings are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Only the same text.
    #[default]
    Text,
    /// A number, decimal or hexadecimal.
    Number,
    /// An amount of memory; the unit without `unit`.
    Memory(&'static str),
    /// A set of numbers.
    Set,
    /// A UUID.
    Uuid,
}

impl Kind {
    fn named(word: &str) -> Kind {
        match word {
            "n" => Kind::Number,
            "KiB" => Kind::Memory("KiB"),
            "MiB" => Kind::Memory("MiB"),
            "b" => Kind::Memory("b"),
            "set" => Kind::Set,
            "uuid" => Kind::Uuid,
            _ => Kind::Text,
        }
    }

    /// What is said by `value`, which stands in an element with that `unit`. What cannot be read is only a text.
    fn read(self, value: &str, unit: Option<&str>) -> Said {
        let shown = value.trim().to_owned();
        let canonical = match self {
            Kind::Text => None,
            Kind::Number => u64::from_text(&shown).ok().map(|number| number.to_string()),
            Kind::Memory(usual) => scaled(&shown, unit.unwrap_or(usual)).ok().map(readable),
            Kind::Set => CpuSet::from_text(&shown).ok().map(|set| set.to_text()),
            Kind::Uuid => Uuid::from_text(&shown).ok().map(|uuid| uuid.to_text()),
        };
        match (self, canonical) {
            (Kind::Number, Some(canonical)) => Said { canonical, shown },
            (_, Some(canonical)) => Said { shown: canonical.clone(), canonical },
            (_, None) => Said { canonical: shown.clone(), shown },
        }
    }
}

/// A value.
#[derive(Debug, Default)]
pub struct Said {
    /// By which it is compared.
    pub canonical: String,
    /// By which it is known to people: numbers stay decimal or hexadecimal.
    pub shown: String,
}

/// Bytes, as people write them.
fn readable(bytes: u128) -> String {
    if bytes.is_multiple_of(1024) { format!("{} KiB", bytes / 1024) } else { format!("{bytes} bytes") }
}

impl Field {
    /// What the element says; empty if it is not there or does not say.
    pub fn of(&self, element: Option<&Element>) -> Said {
        let Some(element) = element else { return Said::default() };
        let said = element.attr(&self.name).or(self.default.as_deref());
        said.map(|value| self.kind.read(value, element.attr("unit"))).unwrap_or_default()
    }
}

impl Rule {
    /// The element's text; empty if it is not compared, or there is none.
    pub fn text_of(&self, element: Option<&Element>) -> Said {
        let (Some(kind), Some(element)) = (self.text, element) else { return Said::default() };
        kind.read(&element.text(), element.attr("unit"))
    }

    /// What is compared of the element itself, in one line.
    pub fn summary(&self, element: &Element) -> Said {
        let said = self.attributes.iter().map(|field| (&*field.name, field.of(Some(element)).shown));
        let mut words: Vec<_> = said.filter(|(_, v)| !v.is_empty()).map(|(name, v)| format!("{name}={v}")).collect();
        words.extend(Some(self.text_of(Some(element)).shown).filter(|text| !text.is_empty()));
        let shown = if words.is_empty() { "present".to_owned() } else { words.join(" ") };
        Said { canonical: shown.clone(), shown }
    }
}

fn read(table: &str) -> Rule {
    let (groups, roots): (Vec<_>, Vec<_>) = lines(table).into_iter().partition(|line| line.words[0].starts_with('&'));
    let groups = groups.into_iter().map(|line| (line.words[0], line)).collect();
    roots.first().map(|root| rule(root, &groups)).unwrap_or_default()
}

type Groups<'a> = HashMap<&'a str, Line<'a>>;

fn rule(line: &Line, groups: &Groups) -> Rule {
    let name = line.words[0].trim_end_matches(['!', '?', '~', '*']);
    let marks = &line.words[0][name.len()..];
    let presence = match marks {
        "!" | "*" => Presence::Counts,
        "?" => Presence::OfVirtio,
        _ => Presence::Free,
    };
    let (many, strict) = (marks == "*", marks == "~");
    let mut rule = Rule { name: name.to_owned(), many, presence, strict, ..Rule::default() };
    line.words[1..].iter().for_each(|word| add_word(&mut rule, word, groups));
    for below in &line.below {
        let included = groups.get(below.words[0]);
        let lines = included.map_or(std::slice::from_ref(below), |group| &group.below[..]);
        rule.below.extend(lines.iter().map(|line| self::rule(line, groups)));
    }
    rule
}

fn add_word(rule: &mut Rule, word: &str, groups: &Groups) {
    if let Some(group) = groups.get(word) {
        return group.words[1..].iter().for_each(|word| add_word(rule, word, groups));
    }
    if let Some(parts) = word.strip_prefix('[').and_then(|word| word.strip_suffix(']')) {
        rule.identity = parts.split(',').map(identity).collect();
        return;
    }
    let (word, default) = word.split_once('=').map_or((word, None), |(word, default)| (word, Some(default.to_owned())));
    let (name, kind) = word.split_once(':').map_or((word, Kind::Text), |(name, kind)| (name, Kind::named(kind)));
    match name {
        "$" => rule.text = Some(kind),
        _ => rule.attributes.push(Field { name: name.to_owned(), kind, default }),
    }
}

fn identity(part: &str) -> Identity {
    let (label, way) = part.split_once('=').unwrap_or((part, part));
    Identity { label: label.to_owned(), steps: way.split('/').map(str::to_owned).collect() }
}
