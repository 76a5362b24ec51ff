//! Every name of the format, read from `format.txt`: what is known, and in which order it is written.
//!
//! The one place for both. An element or attribute that is not in the table is refused; what is in it and has no type is
//! kept.

use super::value::complain;
use crate::xml::MAX_FINDINGS;
use crate::xml::{Element, Finding, Node};
use std::collections::HashMap;
use std::sync::LazyLock;

static FORMAT: LazyLock<Format> = LazyLock::new(|| Format::read(include_str!("format.txt")));

/// Finds everything in a domain document that the format does not know; white space around child elements goes.
pub fn check(domain: &mut Element, log: &mut Vec<Finding>) {
    FORMAT.check_root(domain, "domain", log);
}

/// Puts attributes and children of a domain into libvirt's order. What has the same name keeps its order.
pub fn arrange(domain: &mut Element) {
    FORMAT.arrange_root(domain);
}

/// Every element of the format with its attributes: the element's path without positions, e.g. `devices/disk/source`, the
/// root's empty. Elements that contain themselves are named once.
pub fn vocabulary() -> Vec<(String, Vec<String>)> {
    FORMAT.vocabulary("domain")
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

/// The names of one or several kinds of document.
#[derive(Debug, Default)]
pub(crate) struct Format {
    specs: Vec<Spec>,
    roots: HashMap<String, usize>,
}

/// A line of a table with those indented below it.
pub(super) struct Line<'a> {
    /// Never empty.
    pub words: Vec<&'a str>,
    pub below: Vec<Line<'a>>,
}

impl Format {
    pub(crate) fn read(table: &str) -> Format {
        let (groups, roots): (Vec<_>, Vec<_>) =
            lines(table).into_iter().partition(|line| line.words[0].starts_with('&'));
        let groups: HashMap<&str, &Line> = groups.iter().map(|line| (&line.words[0][1..], line)).collect();
        let mut format = Format::default();
        let mut built = HashMap::new();
        for root in &roots {
            let spec = format.build(root, &groups, &mut built);
            format.roots.insert(root.words[0].to_owned(), spec);
        }
        format
    }

    /// Finds everything in a document of that kind that the table does not know; white space around child elements goes.
    pub(crate) fn check_root(&self, root: &mut Element, kind: &str, log: &mut Vec<Finding>) {
        match self.roots.get(&root.name) {
            Some(&spec) => self.check(root, spec, true, log),
            None => complain(log, &root.at, format!("<{}> is not a {kind}; <{kind}> was expected", root.name)),
        }
    }

    /// Puts attributes and children into the table's order.
    pub(crate) fn arrange_root(&self, root: &mut Element) {
        if let Some(&spec) = self.roots.get(&root.name) {
            self.arrange(root, spec);
        }
    }

    /// Every element below a root with its attributes, as [`vocabulary`].
    pub(crate) fn vocabulary(&self, root: &str) -> Vec<(String, Vec<String>)> {
        let mut all = Vec::new();
        self.each_way(self.roots[root], &mut Vec::new(), &mut Vec::new(), &mut |steps, spec| {
            all.push((steps.join("/"), spec.attributes.clone()));
        });
        all
    }

    /// Calls `visit` with every way from the root to an element of the table; groups that contain themselves once.
    fn each_way(
        &self,
        spec: usize,
        way: &mut Vec<usize>,
        steps: &mut Vec<String>,
        visit: &mut impl FnMut(&[String], &Spec),
    ) {
        if way.contains(&spec) {
            return;
        }
        way.push(spec);
        visit(steps, &self.specs[spec]);
        for child in &self.specs[spec].children {
            steps.push(child.name.clone());
            self.each_way(child.spec, way, steps, visit);
            steps.pop();
        }
        way.pop();
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

    /// `is_root`: it is the domain itself, in a document of its own or in a snapshot's, and may declare prefixes.
    fn check(&self, element: &mut Element, spec: usize, is_root: bool, log: &mut Vec<Finding>) {
        let spec = &self.specs[spec];
        for attribute in &element.attributes {
            let declaration = is_root && attribute.name.starts_with("xmlns:");
            if !declaration && !spec.attributes.contains(&attribute.name) {
                let expected = expected(&element.name, &spec.attributes, &attribute.name);
                let message = format!("unknown attribute '{}'; {expected}", attribute.name);
                complain(log, &attribute.place(), message);
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
                let known: Vec<_> = spec.children.iter().map(|known| known.name.clone()).collect();
                let expected = expected(&parent, &known, &child.name);
                complain(log, &child.at, format!("unknown element <{}>; {expected}", child.name));
                continue;
            };
            let known = &spec.children[place];
            if std::mem::replace(&mut seen[place], true) && !known.many {
                complain(log, &child.at, format!("a second <{}>; <{parent}> has only one", child.name));
            }
            self.check(child, known.spec, false, log);
        }
    }

    fn arrange(&self, element: &mut Element, spec: usize) {
        let spec = &self.specs[spec];
        let place = |name: &str| spec.attributes.iter().position(|known| known == name).unwrap_or(usize::MAX);
        // Nearly always it is in order, as what is written is mostly written in that.
        if !element.attributes.is_sorted_by_key(|attribute| place(&attribute.name)) {
            element.attributes.sort_by_cached_key(|attribute| place(&attribute.name));
        }
        let place = |node: &Node| node.as_element().and_then(|e| spec.places.get(&e.name)).copied().unwrap_or(0);
        if element.elements().next().is_some() && !element.nodes.is_sorted_by_key(place) {
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

/// The lines of a table that are not indented, with what is below each. Lines with `#` are remarks.
pub(super) fn lines(table: &str) -> Vec<Line<'_>> {
    let lines: Vec<_> = table
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
        .map(|line| (line.len() - line.trim_start().len(), line.split_whitespace().collect::<Vec<_>>()))
        .collect();
    nest(&mut lines.into_iter().peekable(), 0)
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

/// What to say of an unknown name: what there is, or, of much, what is most like it.
fn expected(parent: &str, known: &[String], unknown: &str) -> String {
    const FEW: usize = 16;
    match known {
        [] => format!("<{parent}> has none"),
        _ if known.len() <= FEW => format!("<{parent}> has {}", known.join(", ")),
        _ => match nearest(known, unknown) {
            Some(name) => format!("was '{name}' meant?"),
            None => format!("<{parent}> has no such thing"),
        },
    }
}

/// The known name that an unknown one is most like, if it is much like it.
pub fn nearest<'a, T: AsRef<str>>(known: &'a [T], unknown: &str) -> Option<&'a str> {
    let near = known.iter().map(|name| (distance(name.as_ref(), unknown), name.as_ref())).min();
    near.filter(|(distance, _)| *distance <= 2).map(|(_, name)| name)
}

/// How many letters have to be put in, taken out or changed.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::domain::DomainDef;
    use crate::domain::part::Part;
    use crate::xml::{Attribute, Path, Place};

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

    /// Every way from the root to an element, and to each of its attributes.
    pub fn names() -> Vec<(Vec<String>, Option<String>)> {
        let mut all = Vec::new();
        FORMAT.each_way(FORMAT.roots["domain"], &mut Vec::new(), &mut Vec::new(), &mut |steps, spec| {
            all.push((steps.to_vec(), None));
            all.extend(spec.attributes.iter().map(|name| (steps.to_vec(), Some(name.clone()))));
        });
        all
    }

    /// Elements in each other, the innermost with an attribute, all at known places.
    fn chain(steps: &[String], attribute: Option<(&str, &str)>, text: Option<&str>) -> Element {
        let path = |depth: usize| steps[..depth].iter().fold(Path::default(), |path, step| path.child(step, 1));
        let mut inner: Option<Element> = None;
        for depth in (0..=steps.len()).rev() {
            let name = if depth == 0 { "domain" } else { &steps[depth - 1] };
            let mut element = Element::new(name);
            element.at = Place { line: 1, column: 1, path: path(depth) };
            match inner.take() {
                Some(inner) => element.push(inner),
                None => {
                    if let Some((name, value)) = attribute {
                        let at = element.at.clone();
                        element.attributes.push(Attribute { name: name.to_owned(), value: value.to_owned(), at });
                    }
                    element.nodes.extend(text.map(|text| Node::Text(text.to_owned())));
                }
            }
            inner = Some(element);
        }
        inner.unwrap_or_default()
    }

    /// Reads, writes, and says whether what the chain ends in is in the result, or was reported.
    fn survives(steps: &[String], attribute: Option<(&str, &str)>, text: Option<&str>) -> bool {
        let mut log = Vec::new();
        let def = DomainDef::read(chain(steps, attribute, text), &mut log);
        let tree = def.tree();
        let last = steps.iter().try_fold(&tree, |element, step| element.child(step));
        let there = last.is_some_and(|element| {
            attribute.is_none_or(|(name, _)| element.attr(name).is_some())
                && (text.is_none() || !element.text().is_empty())
        });
        let place = chain(steps, None, None);
        let mut at =
            steps.iter().fold(&place, |element, step| element.child(step).unwrap_or(element)).at.path.to_string();
        if at == "/" && attribute.is_some() {
            at.clear();
        }
        at += &attribute.map(|(name, _)| format!("/@{name}")).unwrap_or_default();
        there || log.iter().any(|finding| finding.path == at)
    }

    #[test]
    fn every_known_name_is_kept_or_refused() {
        let mut count = 0;
        let mut lost = Vec::new();
        let root = FORMAT.roots["domain"];
        FORMAT.each_way(root, &mut Vec::new(), &mut Vec::new(), &mut |steps, spec| {
            if steps.first().is_some_and(|step| step == "metadata") {
                return;
            }
            let mut try_one = |attribute: Option<(&str, &str)>, text| {
                count += 1;
                if !survives(steps, attribute, text) {
                    lost.push(format!("/{} {attribute:?} {text:?}", steps.join("/")));
                }
            };
            try_one(None, None);
            for value in ["1", "yes", "on", "pci", "none"] {
                spec.attributes.iter().for_each(|name| try_one(Some((name, value)), None));
                if spec.text {
                    try_one(None, Some(value));
                }
            }
        });
        assert!(lost.is_empty(), "{} lost: {lost:#?}", lost.len());
        assert!(count > 9000, "only {count} were tried");
    }
}
