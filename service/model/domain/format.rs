//! Every name of the format, read from `format.txt`: what is known, and in which order it is written.
//!
//! The one place for both. An element or attribute that is not in the table is refused; what is in it and has no type is
//! kept.

use super::value::complain;
use crate::xml::{Element, Finding, Node};
use std::collections::HashMap;
use std::sync::LazyLock;

/// The most that is found wrong with one document.
const MAX_FINDINGS: usize = 1000;

static FORMAT: LazyLock<Format> = LazyLock::new(|| Format::read(include_str!("format.txt")));

/// Finds everything in a domain document that the format does not know; white space around child elements goes.
pub fn check(domain: &mut Element, log: &mut Vec<Finding>) {
    match FORMAT.roots.get(&domain.name) {
        Some(&root) => FORMAT.check(domain, root, log),
        None => complain(log, &domain.at, format!("<{}> is not a domain; <domain> was expected", domain.name)),
    }
}

/// Puts attributes and children of a domain into libvirt's order. What has the same name keeps its order.
pub fn arrange(domain: &mut Element) {
    if let Some(&root) = FORMAT.roots.get(&domain.name) {
        FORMAT.arrange(domain, root);
    }
}

/// What the table says of one element.
#[derive(Debug, Default)]
struct Spec {
    attributes: Vec<String>,
    children: Vec<Child>,
    /// Position in `children`.
    places: HashMap<String, usize>,
    text: bool,
}

#[derive(Clone, Debug)]
struct Child {
    name: String,
    spec: usize,
    many: bool,
}

#[derive(Debug, Default)]
struct Format {
    specs: Vec<Spec>,
    roots: HashMap<String, usize>,
}

/// A line of the table with those indented below it.
struct Line<'a> {
    words: Vec<&'a str>,
    below: Vec<Line<'a>>,
}

impl Format {
    fn read(table: &str) -> Format {
        let lines: Vec<_> = table
            .lines()
            .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
            .map(|line| (line.len() - line.trim_start().len(), line.split_whitespace().collect::<Vec<_>>()))
            .collect();
        let tree = nest(&mut lines.into_iter().peekable(), 0);
        let (groups, roots): (Vec<_>, Vec<_>) = tree.into_iter().partition(|line| line.words[0].starts_with('&'));
        let groups: HashMap<&str, &Line> = groups.iter().map(|line| (&line.words[0][1..], line)).collect();
        let mut format = Format::default();
        let mut built = HashMap::new();
        for root in &roots {
            let spec = format.build(root, &groups, &mut built);
            format.roots.insert(root.words[0].to_owned(), spec);
        }
        format
    }

    /// The spec of a line, or of the group it is like.
    fn build<'a>(
        &mut self,
        line: &Line<'a>,
        groups: &HashMap<&'a str, &Line<'a>>,
        built: &mut HashMap<&'a str, usize>,
    ) -> usize {
        let like = line.words.iter().skip(1).find_map(|word| word.strip_prefix('='));
        let Some(group) = like else { return self.fill(line, groups, built, None) };
        match (built.get(group), groups.get(group)) {
            (Some(&spec), _) => spec,
            (None, Some(line)) => self.fill(line, groups, built, Some(group)),
            (None, None) => self.fill(line, groups, built, None),
        }
    }

    /// Makes a spec. It gets its number first, so that a group can contain itself.
    fn fill<'a>(
        &mut self,
        line: &Line<'a>,
        groups: &HashMap<&'a str, &Line<'a>>,
        built: &mut HashMap<&'a str, usize>,
        group: Option<&'a str>,
    ) -> usize {
        let number = self.specs.len();
        self.specs.push(Spec::default());
        group.map(|group| built.insert(group, number));
        let mut spec = Spec::default();
        spec.add_attributes(line, groups);
        for below in &line.below {
            let included = below.words[0].strip_prefix('&').and_then(|group| groups.get(group));
            let lines = included.map_or(std::slice::from_ref(below), |group| &group.below[..]);
            for line in lines {
                let (name, many) = line.words[0].strip_suffix('*').map_or((line.words[0], false), |name| (name, true));
                let child = Child { name: name.to_owned(), spec: self.build(line, groups, built), many };
                spec.places.insert(child.name.clone(), spec.children.len());
                spec.children.push(child);
            }
        }
        self.specs[number] = spec;
        number
    }

    fn check(&self, element: &mut Element, spec: usize, log: &mut Vec<Finding>) {
        let spec = &self.specs[spec];
        let is_root = element.at.path.is_root();
        for attribute in &element.attributes {
            let declaration = is_root && attribute.name.starts_with("xmlns:");
            if !declaration && !spec.attributes.contains(&attribute.name) {
                let known = list(spec.attributes.iter().map(|name| name.to_string()), "no attributes");
                let message = format!("unknown attribute '{}'; <{}> has {known}", attribute.name, element.name);
                complain(log, &attribute.at, message);
            }
        }
        if !spec.text {
            if element.has_text() {
                complain(log, &element.at, format!("<{}> has no text", element.name));
            }
            element.nodes.retain(|node| node.as_text().is_none());
        }
        self.check_children(element, spec, log);
    }

    fn check_children(&self, element: &mut Element, spec: &Spec, log: &mut Vec<Finding>) {
        let mut seen = vec![false; spec.children.len()];
        let parent = element.name.clone();
        for child in element.elements_mut() {
            if log.len() >= MAX_FINDINGS {
                return;
            }
            let Some(&place) = spec.places.get(&child.name) else {
                let known = list(spec.children.iter().map(|child| format!("<{}>", child.name)), "no child elements");
                complain(log, &child.at, format!("unknown element <{}>; <{parent}> has {known}", child.name));
                continue;
            };
            let known = &spec.children[place];
            if std::mem::replace(&mut seen[place], true) && !known.many {
                complain(log, &child.at, format!("a second <{}>; <{parent}> has only one", child.name));
            }
            self.check(child, known.spec, log);
        }
    }

    fn arrange(&self, element: &mut Element, spec: usize) {
        let spec = &self.specs[spec];
        let place = |name: &str| spec.attributes.iter().position(|known| known == name).unwrap_or(usize::MAX);
        element.attributes.sort_by_cached_key(|attribute| place(&attribute.name));
        let place = |node: &Node| node.as_element().and_then(|e| spec.places.get(&e.name)).copied().unwrap_or(0);
        if element.elements().next().is_some() {
            element.nodes.sort_by_cached_key(place);
        }
        for child in element.elements_mut() {
            if let Some(&place) = spec.places.get(&child.name) {
                self.arrange(child, spec.children[place].spec);
            }
        }
    }
}

impl Spec {
    fn add_attributes<'a>(&mut self, line: &Line<'a>, groups: &HashMap<&'a str, &Line<'a>>) {
        for word in &line.words[1..] {
            match word.strip_prefix('&').map(|group| groups.get(group)) {
                Some(Some(group)) => self.add_attributes(group, groups),
                Some(None) => {}
                None if *word == "$" => self.text = true,
                None => self.attributes.push((*word).to_owned()),
            }
        }
    }
}

/// Puts lines below those they are indented under.
fn nest<'a>(
    lines: &mut std::iter::Peekable<impl Iterator<Item = (usize, Vec<&'a str>)>>,
    indent: usize,
) -> Vec<Line<'a>> {
    let mut nested = Vec::new();
    while let Some((_, words)) = lines.next_if(|(depth, _)| *depth >= indent) {
        nested.push(Line { words, below: nest(lines, indent + 2) });
    }
    nested
}

/// `a, b, c`, or what to say for none.
fn list(names: impl Iterator<Item = String>, none: &str) -> String {
    let names: Vec<_> = names.collect();
    if names.is_empty() { none.to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_no_loose_ends() {
        let table = include_str!("format.txt");
        let defined: Vec<_> = table.lines().filter_map(|l| l.strip_prefix('&')?.split_whitespace().next()).collect();
        for line in table.lines().filter(|line| !line.starts_with('#')) {
            let indent = line.len() - line.trim_start().len();
            assert!(indent % 2 == 0, "odd indent: {line}");
            for group in line.split_whitespace().filter_map(|word| word.strip_prefix(['&', '='])) {
                assert!(defined.contains(&group), "no group {group}: {line}");
            }
        }
    }

    #[test]
    fn no_name_twice() {
        for spec in &FORMAT.specs {
            assert_eq!(spec.places.len(), spec.children.len(), "{:?}", spec.children);
            let unique: std::collections::HashSet<_> = spec.attributes.iter().collect();
            assert_eq!(unique.len(), spec.attributes.len(), "{:?}", spec.attributes);
        }
    }
}
