//! What a row is, and how what it says is read.
//!
//! A row belongs to elements by their path without positions; `devices/*` is every device, and `a|b` stands for both. In
//! an element, a selector leads to what is below: names with `/` between, at the end an element, an attribute (`@name`), or
//! `.`, the element itself. A condition is a selector; with `=` and words after it a value must be one of them, with `!=` a
//! value must be none of them, and `?word` before that is the value where none is said. With `!` before it, all of that is
//! turned round.

use crate::xml::{Element, Finding, Place};

/// One rule.
pub(super) trait Row: Sync {
    /// The elements that it is about.
    fn of(&self) -> &'static str;
    /// Holds it against one of them.
    fn look(&self, element: &Element, at: &Place, log: &mut Vec<Finding>);
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

/// Whether any of the values that a selector leads to is `wanted`. Makes nothing: nearly all conditions are asked in vain.
pub(super) fn any(element: &Element, selector: &str, wanted: &mut dyn FnMut(&str) -> bool) -> bool {
    if selector == "." {
        return wanted(element.text().trim());
    }
    if let Some(name) = selector.strip_prefix('@') {
        return element.attr(name).is_some_and(wanted);
    }
    let (name, below) = selector.split_once('/').unwrap_or((selector, "."));
    element.elements().filter(|child| child.name == name).any(|child| any(child, below, wanted))
}

/// Whether a condition holds.
pub(super) fn holds(element: &Element, condition: &str) -> bool {
    if let Some(other) = condition.strip_prefix('!') {
        return !holds(element, other);
    }
    let (selector, words) = condition.split_once('=').map_or((condition, None), |(left, words)| (left, Some(words)));
    let (selector, not) = selector.strip_suffix('!').map_or((selector, false), |selector| (selector, true));
    let (selector, unsaid) = selector.split_once('?').map_or((selector, None), |(left, word)| (left, Some(word)));
    let fits = |value: &str| words.is_none_or(|words| words.split('|').any(|word| word == value) != not);
    let mut said = false;
    let held = any(element, selector, &mut |value| {
        said = true;
        fits(value)
    });
    held || (!said && unsaid.is_some_and(fits))
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
        let yes = |condition: &str| holds(&disk, condition);
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
}
