//! How rows are held against a document.
//!
//! A row belongs to elements by their path without positions; `devices/*` is every device, and `a|b` stands for both. In
//! an element, a selector leads to what is below: names with `/` between, at the end an element, an attribute (`@name`), or
//! `.`, the element itself. A condition is a selector; with `=` and words after it a value must be one of them, with `!=` a
//! value must be none of them, and `?word` before that is the value where none is said. With `!` before it, all of that is
//! turned round.

use super::{once, pairs, seats, values};
use crate::xml::{Element, Finding, Place};
use std::collections::HashMap;
use std::sync::LazyLock;

/// One rule.
pub(super) trait Row: Sync {
    /// The elements that it is about.
    fn of(&self) -> &'static str;
    /// Holds it against one of them.
    fn look(&self, element: &Element, at: &Place, log: &mut Vec<Finding>);
}

static TABLE: LazyLock<HashMap<String, Vec<&'static dyn Row>>> = LazyLock::new(|| {
    let mut table: HashMap<String, Vec<&'static dyn Row>> = HashMap::new();
    let all = values::ROWS.iter().map(|row| row as &dyn Row).chain(pairs::ROWS.iter().map(|row| row as &dyn Row));
    let all = all.chain(once::ROWS.iter().map(|row| row as &dyn Row));
    for row in all.chain(seats::ROWS.iter().map(|row| row as &dyn Row)) {
        each_path(row.of()).into_iter().for_each(|path| table.entry(path).or_default().push(row));
    }
    table
});

/// The paths that a pattern stands for.
fn each_path(pattern: &str) -> Vec<String> {
    pattern.split('/').fold(vec![String::new()], |paths, step| {
        let longer =
            |path: &String, name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
        paths.iter().flat_map(|path| step.split('|').map(move |name| longer(path, name))).collect()
    })
}

/// Holds all rows against a document.
pub(super) fn hold(root: &Element, log: &mut Vec<Finding>) {
    walk(root, &mut String::new(), &root.origin, log);
}

fn walk(element: &Element, path: &mut String, at: &Place, log: &mut Vec<Finding>) {
    let of_any = path.strip_prefix("devices/").filter(|kind| !kind.contains('/')).and_then(|_| TABLE.get("devices/*"));
    for row in TABLE.get(path.as_str()).into_iter().chain(of_any).flatten() {
        row.look(element, at, log);
    }
    for child in element.elements().filter(|child| child.name != "metadata") {
        let length = path.len();
        if length > 0 {
            path.push('/');
        }
        path.push_str(&child.name);
        walk(child, path, &child.place_below(at), log);
        path.truncate(length);
    }
}

/// All that a selector leads to, with its value.
pub(super) fn select(element: &Element, at: &Place, selector: &str) -> Vec<(Place, String)> {
    if selector == "." {
        return vec![(at.clone(), element.text().trim().to_owned())];
    }
    if let Some(name) = selector.strip_prefix('@') {
        return element.attr(name).map(|value| (at.attribute(name), value.to_owned())).into_iter().collect();
    }
    let (name, below) = selector.split_once('/').unwrap_or((selector, "."));
    let named = element.elements().filter(|child| child.name == name);
    named.flat_map(|child| select(child, &child.place_below(at), below)).collect()
}

/// Whether a condition holds.
pub(super) fn holds(element: &Element, at: &Place, condition: &str) -> bool {
    if let Some(other) = condition.strip_prefix('!') {
        return !holds(element, at, other);
    }
    let (selector, words) = condition.split_once('=').map_or((condition, None), |(left, words)| (left, Some(words)));
    let (selector, not) = selector.strip_suffix('!').map_or((selector, false), |selector| (selector, true));
    let (selector, unsaid) = selector.split_once('?').map_or((selector, None), |(left, word)| (left, Some(word)));
    let mut values: Vec<String> = select(element, at, selector).into_iter().map(|(_, value)| value).collect();
    if values.is_empty() {
        values.extend(unsaid.map(str::to_owned));
    }
    match words {
        None => !values.is_empty(),
        Some(words) => values.iter().any(|value| words.split('|').any(|word| word == value) != not),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_hold_as_they_read() {
        let disk = Element::new("disk").with_attr("device", "cdrom");
        let mut disk = disk.with_text("words");
        disk.push(Element::new("target").with_attr("dev", "sda"));
        disk.push(Element::new("target").with_attr("dev", "sdb"));
        let yes = |condition: &str| holds(&disk, &Place::default(), condition);
        for condition in [
            "@device",
            "!@bus",
            "@device=disk|cdrom",
            "@device!=disk",
            "@bus?ide=ide",
            "target/@dev=sdb",
            "target",
            ".=words",
            "!target/@dev=sdc",
        ] {
            assert!(yes(condition), "{condition}");
        }
        for condition in [
            "!@device",
            "@bus",
            "@device=disk",
            "@device!=disk|cdrom",
            "@bus=ide",
            "@bus!=ide",
            "target/@bus",
            "!target/@dev=sda",
        ] {
            assert!(!yes(condition), "{condition}");
        }
    }

    #[test]
    fn every_row_is_about_what_is_in_the_format() {
        let known: std::collections::HashSet<String> =
            crate::domain::vocabulary().into_iter().map(|(path, _)| path).collect();
        for path in TABLE.keys().filter(|path| *path != "devices/*") {
            assert!(known.contains(path), "{path}");
        }
        assert!(TABLE.len() > 40, "the tables are there");
    }
}
