//! Guest ABI: whether a guest would notice that its machine was changed, and every difference by its path.
//!
//! ```text
//!  source ─▶ plain form ─▶ tree ─┐
//!                                ├─▶ walk, led by table.txt ─▶ [(path, source, target)]
//!  target ─▶ plain form ─▶ tree ─┘
//! ```
//!
//! What is compared stands in `table.txt`, one line an element, in the layout of `format.txt`. Both work on the tree, where
//! typed and merely kept elements look the same, so neither kind can be forgotten. What the table does not name may differ.

mod open;
mod pending;
mod plain;
mod table;
mod walk;

pub use open::{Side, read_pair};

use super::DomainDef;
use std::fmt;

/// One thing that the guest would notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AbiDifference {
    /// Where, e.g. `/devices/interface[mac=52:54:00:ab:1a:01]/mtu/size`: attributes are steps like any other.
    pub path: String,
    /// The value in the source; empty if it has none. Of a whole element, what is compared of it, or `present`.
    pub source: String,
    /// The same in the target.
    pub target: String,
}

impl fmt::Display for AbiDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_nothing = |value: &str| if value.is_empty() { "nothing".to_owned() } else { format!("'{value}'") };
        write!(f, "{}: {} → {}", self.path, or_nothing(&self.source), or_nothing(&self.target))
    }
}

/// How strictly two definitions are held against each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// For documents: a saved guest's, a snapshot's. `currentMemory` counts.
    Strict,
    /// Against a running guest, whose `currentMemory` wins.
    Running,
}

impl DomainDef {
    /// Every difference that a guest with this machine would notice if it became `target`, in libvirt's order of output;
    /// none if they are compatible. Both are to be completed in the same way; runtime facts do not count.
    pub fn compare_abi(&self, target: &DomainDef, strictness: Strictness) -> Vec<AbiDifference> {
        let (source, target) = plain::pair(self, target);
        walk::differences(&source, &target, strictness)
    }
}

#[cfg(test)]
mod tests {
    use super::table::{RULES, Rule};
    use super::{AbiDifference, Strictness, walk};
    use crate::domain::format::tests::names;
    use crate::xml::Element;
    use std::collections::BTreeSet;

    type Way = (Vec<String>, Option<String>);

    /// Every way in the table that leads to something compared: `None` for text or presence.
    fn compared() -> BTreeSet<Way> {
        let mut all = BTreeSet::new();
        each(&RULES, &mut Vec::new(), &mut |steps, rule| {
            all.extend(rule.attributes.iter().map(|field| (steps.to_vec(), Some(field.name.clone()))));
            if rule.text.is_some() {
                all.insert((steps.to_vec(), None));
            }
        });
        all
    }

    /// Every way to what tells one of several from the others.
    fn identities() -> BTreeSet<Way> {
        let mut all = BTreeSet::new();
        each(&RULES, &mut Vec::new(), &mut |steps, rule| {
            all.extend(rule.identity.iter().map(|part| {
                let plain = part.steps.iter().map(|step| step.split(':').next().unwrap().to_owned());
                let mut way: Vec<String> = steps.iter().cloned().chain(plain).collect();
                let attribute = way.pop();
                (way, attribute)
            }));
        });
        all
    }

    fn each(rule: &Rule, steps: &mut Vec<String>, visit: &mut impl FnMut(&[String], &Rule)) {
        visit(steps, rule);
        for below in &rule.below {
            steps.push(below.name.clone());
            each(below, steps, visit);
            steps.pop();
        }
    }

    /// Elements in each other; the last says `value`.
    fn chain((steps, attribute): &Way, value: &str) -> Element {
        let mut element = Element::new(steps.last().map_or("domain", |step| step));
        match attribute {
            Some(name) => element.set_attr(name, value),
            None => element = element.with_text(value),
        }
        for depth in (0..steps.len()).rev() {
            let mut parent = Element::new(depth.checked_sub(1).map_or("domain", |above| &*steps[above]));
            parent.push(element);
            element = parent;
        }
        element
    }

    fn found(way: &Way, source: &str, target: &str) -> Vec<AbiDifference> {
        walk::differences(&chain(way, source), &chain(way, target), Strictness::Strict)
    }

    #[test]
    fn table_names_only_what_the_format_knows() {
        let known: BTreeSet<Way> = names().into_iter().collect();
        let ours = compared();
        assert!(ours.len() > 300, "only {} values are compared", ours.len());
        assert_eq!(ours.difference(&known).collect::<Vec<_>>(), Vec::<&Way>::new());
        each(&RULES, &mut Vec::new(), &mut |steps, _| {
            assert!(known.contains(&(steps.to_vec(), None)), "{steps:?}");
        });
        assert_eq!(identities().difference(&known).collect::<Vec<_>>(), Vec::<&Way>::new());
    }

    #[test]
    fn any_single_compared_value_is_found_with_its_path() {
        for way in compared() {
            let (there, back) = (found(&way, "1", "2"), found(&way, "2", "1"));
            let path: String = way.0.iter().chain(&way.1).map(|step| format!("/{step}")).collect();
            match &there[..] {
                [one] => {
                    let plain = one.path.split(['[', ']']).step_by(2).collect::<String>();
                    assert_eq!(plain, path, "{one}");
                }
                // What makes up an identity says that another thing is there now.
                [gone, new] => assert!(gone.target.is_empty() && new.source.is_empty(), "{gone}, {new}"),
                _ => panic!("{path}: {there:?}"),
            }
            let mirrored: Vec<_> = back.iter().map(|d| (&d.target, &d.source)).collect();
            let mut straight: Vec<_> = there.iter().map(|d| (&d.source, &d.target)).collect();
            if straight.len() == 2 {
                straight.swap(0, 1);
            }
            assert_eq!(straight, mirrored, "{path}");
        }
    }

    #[test]
    fn what_is_not_in_the_table_may_change() {
        let ours = &compared() | &identities();
        let mut count = 0;
        for way in names().into_iter().filter(|way| !ours.contains(way)) {
            count += 1;
            assert_eq!(found(&way, "1", "2"), [], "{way:?}");
        }
        assert!(count > 700, "only {count} were tried");
    }
}
