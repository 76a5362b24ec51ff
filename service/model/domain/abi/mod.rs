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

mod plain;
mod table;
mod walk;

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
    use crate::domain::format;

    fn each<'a>(rule: &'a Rule, steps: &mut Vec<&'a str>, visit: &mut impl FnMut(&[&'a str], &'a Rule)) {
        visit(steps, rule);
        for below in &rule.below {
            steps.push(&below.name);
            each(below, steps, visit);
            steps.pop();
        }
    }

    #[test]
    fn table_names_only_what_the_format_knows() {
        let mut count = 0;
        each(&RULES, &mut Vec::new(), &mut |steps, rule| {
            assert!(format::knows(steps, None), "{steps:?}");
            for field in &rule.attributes {
                count += 1;
                assert!(format::knows(steps, Some(&field.name)), "{steps:?} {}", field.name);
            }
            for part in &rule.identity {
                let (last, way) = part.steps.split_last().unwrap();
                let way: Vec<&str> = steps.iter().copied().chain(way.iter().map(String::as_str)).collect();
                assert!(format::knows(&way, Some(last)), "{way:?} {last}");
            }
        });
        assert!(count > 250, "only {count} attributes are compared");
    }
}
